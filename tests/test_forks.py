"""The patches in course/forks: each is applied to a copy of the code, run for a few steps, and
checked there.

The functions check_... run inside the patched copy, each in a process of its own.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_model, tiny_examples
from make_assignment import copy_repository
from safetensors.torch import load_file

import mine_hard
from data import pack

PATCHES = sorted(path.stem for path in (ROOT / "course/forks").glob("*.patch"))


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_applies_runs_and_keeps_its_promise(name, tmp_path):
    copy_repository(tmp_path / "copy")
    # a repository around the temporary folder must not be taken for the one to patch
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run(["git", "apply", ROOT / "course/forks" / f"{name}.patch"],
                          cwd=tmp_path / "copy", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"course/forks/{name}.patch does not apply: {done.stderr}"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider",
                           "-o", f"python_functions=check_{name}", "tests/test_forks.py"],
                          cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr


def test_every_patch_is_listed_with_its_check():
    text = (ROOT / "course/forks/README.md").read_text()
    assert PATCHES and all(f"`{name}.patch`" in text and f"check_{name}" in globals() for name in PATCHES)


def test_what_needs_no_patch_is_a_flag():
    args = mine_hard.parse_arguments(["--data", "x", "--k", "8", "--judge", "field", "--pair", "longest",
                                      "--temperature", "0.7"])
    assert (args.k, args.judge, args.pair, args.temperature) == (8, "field", "longest", 0.7)


# ------------------------------------------------------------------ in the patched copy


def two_steps(folder, *more):
    """metrics.jsonl of two steps of the patched train_dpo.py from the toy model, all 12 pairs in each."""
    from test_dpo import run, write_pairs
    return run(folder / "run", write_pairs(folder / "hard.jsonl"), "--batch-size", 12, "--max-steps", 2,
               *more)[0]


# of the pairs that test_dpo.py writes
MEAN_WEIGHT = sum(0.8 + 0.1 * (i % 5) for i in range(12)) / 12


def check_ipo(tmp_path):
    from train_dpo import dpo_loss
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for beta in (0.01, 0.1, 2.0):
        assert torch.allclose(dpo_loss(zero, zero, zero, zero, beta, one), one / (2 * beta) ** 2)
        best = dpo_loss(one / (2 * beta), zero, zero, zero, beta, one)
        assert best.abs().max() < 1e-12
    rows = two_steps(tmp_path, "--sft", 0)
    assert rows[0]["loss"] == pytest.approx(MEAN_WEIGHT * 25, rel=1e-3) and rows[1]["loss"] < rows[0]["loss"]


def pair_loss(logprobs, lengths, weight, both=False):
    """The loss of a pair whose answers have these lengths (2,) and log-probabilities of each token
    (2,). both: pairs_loss takes the lengths of both answers, and not of the chosen one alone."""
    from train_dpo import pairs_loss
    tensor = lambda values: torch.tensor([values], dtype=torch.float64)
    length, policy = tensor(lengths), tensor(logprobs) * tensor(lengths)
    reference = tensor([-1.0, -2.0]) * length
    length = length if both else length[:, 0]
    return pairs_loss(policy, reference, length, tensor(weight), beta=0.3, sft=2.0)["loss"]


def check_length_normalised(tmp_path):
    lengths = (2, 3), (20, 3), (40, 90)
    short, long, longer = (pair_loss([-0.7, -1.9], n, 1.1, both=True) for n in lengths)
    assert short.item() == pytest.approx(long.item()) == pytest.approx(longer.item())
    rows = two_steps(tmp_path)
    assert rows[0]["preference"] == pytest.approx(MEAN_WEIGHT * 0.693147, rel=1e-3)


def check_alpha_on_both(tmp_path):
    one, two = (pair_loss([-0.7, -1.9], (4, 3), weight) for weight in (0.6, 1.2))
    assert two.item() == pytest.approx(2 * one.item())
    rows = two_steps(tmp_path)
    assert rows[1]["loss"] < rows[0]["loss"]


def policy_gradient(rewards, max_tokens=10 ** 6):
    """Gradient of train_grpo.policy_loss over the trees of tiny samples, (weights,); rewards (P, k)."""
    from train_grpo import advantages, policy_loss
    model, examples = tiny_model(), tiny_examples(shapes=[(3, (5, 1, 4)), (10, (4, 2, 2))])
    advantage = advantages(torch.tensor(rewards, dtype=torch.float64)).flatten()
    length = torch.tensor([len(a) for e in examples for a in e.answers])
    for p in pack(examples, max_tokens):
        policy_loss(model(p.tokens, p.end, p.rows, p.targets), p.answer, advantage, length).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_grpo(tmp_path, monkeypatch):
    import train_grpo
    assert not policy_gradient([[1.0, 1, 1], [0, 0, 0]]).any()               # equal rewards teach nothing
    gradient = policy_gradient([[1.0, 0, 0], [0, 0, 0]])
    assert gradient.any() and torch.allclose(gradient, policy_gradient([[1.0, 0, 0], [1, 1, 1]]))
    assert torch.allclose(gradient, -policy_gradient([[0.0, 1, 1], [0, 0, 0]]))
    apart = policy_gradient([[1.0, 0, 0], [0, 0, 0]], max_tokens=1)
    assert (gradient - apart).abs().max() < 1e-9

    def run(name, judge):
        monkeypatch.setattr(train_grpo, "reward", judge)
        train_grpo.main(["--data", "toy/dev.json", "--model", "toy/model", "--limit", "4",
                         "--batch-size", "2", "--k", "4", "--max-new-tokens", "8", "--lr", "1e-3",
                         "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / name)])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][1:]
        return rows, load_file(tmp_path / name / "model.safetensors")

    start = load_file("toy/model/model.safetensors")
    same = lambda weights: all(torch.equal(weights[name], start[name]) for name in start)
    rows, weights = run("equal", lambda ids, tokenizer, gold: 1.0)
    assert same(weights) and [r["grad_norm"] for r in rows] == [0, 0] and rows[0]["reward"] == 1
    rows, weights = run("mixed", lambda ids, tokenizer, gold: float(sum(ids) % 2))
    assert not same(weights) and 0 < rows[0]["reward"] < 1 and rows[0]["groups"] > 0
