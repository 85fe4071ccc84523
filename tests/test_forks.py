"""The patches in course/forks: each is applied to a copy of the code, run for a few steps, and
checked there.

The functions check_... run inside the patched copy, each in a process of its own.
"""
import json
import os
import re
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
    for name in PATCHES:
        row, = re.findall(rf"^\| `{name}.patch` .*$", text, re.MULTILINE)
        assert any(check.startswith(f"check_{name}") for check in globals())
        patch = (ROOT / "course/forks" / f"{name}.patch").read_text()
        lines = re.search(r"\((\d+) lines\)", row)
        assert not lines or int(lines[1]) == len(re.findall(r"^\+[^+\n]", patch, re.MULTILINE)), row
        for file, names in re.findall(r"`(\w+\.py): ([\w., ]+)`", row):
            code = (ROOT / file).read_text() + patch
            for function in names.split(", "):
                assert re.search(rf"(def|class) {function.split('.')[-1]}\b", code), (file, function)


def test_what_needs_no_patch_is_a_flag():
    args = mine_hard.parse_arguments(["--data", "x", "--k", "8", "--judge", "field", "--pair", "longest",
                                      "--temperature", "0.7"])
    assert (args.k, args.judge, args.pair, args.temperature) == (8, "field", "longest", 0.7)


# ------------------------------------------------------------------ in the patched copy


def two_steps(folder, *more):
    """metrics.jsonl of two steps of the patched train_dpo.py from the toy model, all 12 pairs in each;
    the rejected answer is the longer one."""
    from test_dpo import run, write_pairs
    pairs = write_pairs(folder / "hard.jsonl")
    pairs.write_text(pairs.read_text().replace('"rejected": "', '"rejected": "Well, well. '))
    return run(folder / "run", pairs, "--batch-size", 12, "--max-steps", 2, *more)[0]


# of the pairs that test_dpo.py writes
MEAN_WEIGHT = sum(0.8 + 0.1 * (i % 5) for i in range(12)) / 12


def check_ipo(tmp_path):
    from train_dpo import dpo_loss
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for beta in (0.01, 0.1, 2.0):
        assert torch.allclose(dpo_loss(zero, zero, zero, zero, beta, one), one / (2 * beta) ** 2)
        best = dpo_loss(one / (2 * beta), zero, zero, zero, beta, one)
        assert best.abs().max() < 1e-12
    rows = two_steps(tmp_path, "--sft", 0, "--lr", 1e-5)
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


def check_length_normalised(tmp_path, monkeypatch):
    import train_dpo
    lengths = (2, 3), (20, 3), (40, 90)
    short, long, longer = (pair_loss([-0.7, -1.9], n, 1.1, both=True) for n in lengths)
    assert short.item() == pytest.approx(long.item()) == pytest.approx(longer.item())
    seen, pairs_loss = [], train_dpo.pairs_loss
    monkeypatch.setattr(train_dpo, "pairs_loss", lambda *args: (seen.append(args[2]), pairs_loss(*args))[1])
    rows = two_steps(tmp_path)
    assert rows[0]["preference"] == pytest.approx(MEAN_WEIGHT * 0.693147, rel=1e-3)
    assert seen[0].shape == (12, 2) and (seen[0][:, 1] > seen[0][:, 0]).all()
    assert seen[0].sum() == rows[0]["loss_tokens"]


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


def check_grpo_by_hand(tokenizer):
    from data import format_answers, parse_verdict
    from train_grpo import advantages, policy_loss, reward
    assert advantages(torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]])).flatten().tolist() == pytest.approx(
        [1, -1, 1, -1, 0, 0, 0, 0], abs=1e-4)
    # two tokens of an answer of advantage 2, one of an answer of advantage -1: -(2 (-1 - 3) / 2 - (-5))
    loss = policy_loss(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), torch.tensor([2.0, -1.0]),
                       torch.tensor([2, 1]))
    assert loss.item() == -1
    right, wrong = (tokenizer.answer_ids(format_answers(word)) for word in ("harmful", "unharmful"))
    gold = parse_verdict(format_answers("harmful"))
    assert [reward(ids, tokenizer, gold) for ids in (right, wrong, right[:-1])] == [1, 0, 0]


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
    assert same(weights) and [r["grad_norm"] for r in rows] == [0, 0] and rows[0]["reward"] == 1 and rows[0]["mixed"] == 0
    rows, weights = run("mixed", lambda ids, tokenizer, gold: float(sum(ids) % 2))
    assert not same(weights) and 0 < rows[0]["reward"] < 1 and rows[0]["mixed"] > 0


# of the linear layers of a block of the tiny model: q, k, v, o, gate, up, down
TINY_IN_PLUS_OUT = (48 + 48) + 2 * (48 + 16) + (48 + 48) + 3 * (48 + 96)


def logprobs_of(model, examples):
    """log p of all answer tokens of these examples, in one pack."""
    p, = pack(examples, 10 ** 6)
    with torch.no_grad():
        return model(p.tokens, p.end, p.rows, p.targets)


def check_lora_trains_adapters_alone_and_merges_them():
    from model import Llama, add_adapters, merge_adapters
    from train_sft import make_optimizer, sft_loss, update
    model, examples = tiny_model(), tiny_examples()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = logprobs_of(model, examples)
    add_adapters(model, 4, 6.0, seed=0)
    assert torch.equal(logprobs_of(model, examples), before)                 # B = 0
    again, other = tiny_model(), tiny_model()
    add_adapters(again, 4, 6.0, seed=0)
    add_adapters(other, 4, 6.0, seed=1)
    a, b, c = (m.model["layers"][2].mlp.down_proj.A for m in (model, again, other))
    assert torch.equal(a, b) and (a - c).abs().min() > 0
    optimizer = make_optimizer(model, 1e-2)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert sum(weight.numel() for weight in trained) == 4 * 3 * TINY_IN_PLUS_OUT
    p, = pack(examples, 10 ** 6)
    for _ in range(3):
        sft_loss(model(p.tokens, p.end, p.rows, p.targets), len(p.rows)).backward()
        assert all(weight.grad is not None for weight in trained)
        update(model, optimizer, 1e-2)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], base[name]) for name in base)      # the base did not move
    after = logprobs_of(model, examples)
    assert after.mean() > before.mean() + 0.1
    merged = Llama(model.config).double()
    merged.load_state_dict(merge_adapters(weights, 6.0 / 4))                 # strict: an ordinary model's names
    assert (logprobs_of(merged, examples) - after).abs().max() < 1e-9


def check_lora_saves_an_ordinary_folder_and_resumes(tmp_path, monkeypatch):
    import train_sft
    from data import InputError
    from model import Llama
    from test_train import run
    models, save_final = [], train_sft.save_final
    monkeypatch.setattr(train_sft, "save_final", lambda *args: (models.append(args[1]), save_final(*args)))
    arguments = ["--save-every", 2, "--lr", "1e-2", "--max-steps", 4]
    _, rows, weights = run(tmp_path / "sft", *arguments)
    start, examples = load_file("toy/model/model.safetensors"), tiny_examples()
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2 and weights.keys() == start.keys()
    adapted = logprobs_of(models[0], examples)
    folder = Llama.from_pretrained(tmp_path / "sft", "cpu", torch.float32)
    assert (logprobs_of(folder, examples) - adapted).abs().max() < 1e-5
    assert (logprobs_of(Llama.from_pretrained("toy/model", "cpu", torch.float32), examples) - adapted).abs().max() > 0.1

    saved = load_file(tmp_path / "sft/step-000002/model.safetensors")
    assert len(saved) == 2 * 7 * 4 and all(name.endswith((".A", ".B")) for name in saved)
    (tmp_path / "sft/config.json").unlink()                                  # as if killed before the end
    with pytest.raises(InputError, match="its run has lora_rank = 8, not 2"):
        run(tmp_path / "sft", *arguments, "--resume", "--lora-rank", 2)
    _, again, same = run(tmp_path / "sft", *arguments, "--resume")
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), same.values()))

    run(tmp_path / "bf16", "--max-steps", 2, "--save-every", 1, "--dtype", "bfloat16")
    stored = {name.endswith("weight"): weight.dtype for name, weight in models[-1].named_parameters()}
    assert stored == {True: torch.bfloat16, False: torch.float32}
    saved = load_file(tmp_path / "bf16/step-000001/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert two_steps(tmp_path)[0]["preference"] == pytest.approx(MEAN_WEIGHT * 0.693147, rel=1e-3)


def check_lora_needs_24_gb_for_8b():
    from model import LlamaConfig
    from train_sft import training_bytes
    c = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8)
    N, head, passing = 8_030_261_248, 128256 * 4096, 4 * 8192 * 14336
    trained = 8 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    kept = 8192 * (32 * 4096 + 4 * 4096 + 2 * 4096 + 2 * 1024 + 2 * 14336)
    need = training_bytes(c, 8192, torch.bfloat16, torch.float32, 1, True, 8)
    assert need == 4 * 4 * trained + 2 * (N + kept + passing + head) + 4e8
    assert 2 * N < 16.1e9 and need < 22e9                                # what passes through an MLP is 0.9 of it


def check_lora_does_not_depend_on_the_number_of_ranks(tmp_path):
    from processes import rows_of, run, tiny_folder
    tiny_folder(tmp_path / "model")
    for ranks in (1, 2):
        run("train_sft", ["--model", tmp_path / "model", "--data", "toy/dev.json", "--limit", 11, "--max-tokens", 700,
                          "--epochs", 2, "--batch-size", 5, "--lr", "1e-2", "--dtype", "float64", "--device", "cpu",
                          "--save-every", 4, "--out", tmp_path / str(ranks)], tmp_path / "log", ranks=ranks)
    one, two = (rows_of(tmp_path / name) for name in "12")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-9)
    for file in ("model.safetensors", "step-000004/model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in "12")
        assert one.keys() == two.keys() and all((one[n] - two[n]).abs().max() < 1e-9 for n in one)


def check_warmup_linear(tmp_path):
    from data import InputError
    from test_train import run
    from train_sft import lr_at
    # 20 of 200 steps up, 180 down
    points = {0: 0.0, 5: 0.5, 20: 2.0, 110: 1.0, 200: 0.0}
    assert [lr_at(step, 200, 2.0, 0.1) for step in points] == pytest.approx(list(points.values()))
    assert [lr_at(step, 4, 2.0, 0) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert [lr_at(step, 3, 2.0, 0.1) for step in range(3)] == [0.0, 2.0, 1.0]                # at least one step up
    _, rows, _ = run(tmp_path / "sft", "--warmup", 0.5, "--max-steps", 4)
    assert [r["lr"] for r in rows] == [0, 0.5e-3, 1e-3, 0.5e-3]
    (tmp_path / "sft/config.json").unlink()                                  # as if killed before the end
    with pytest.raises(InputError, match="its run has warmup = 0.5, not 0.25; .*, or choose another --out"):
        run(tmp_path / "sft", "--warmup", 0.25, "--max-steps", 4, "--resume")
    rows = two_steps(tmp_path, "--warmup", 0.5)
    assert [r["lr"] for r in rows] == [0, 1e-3] and rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)


def draw_by_hand(model, prompt, sample, stop, shortest, longest):
    """One sample of the plain sampler, whose draws are those that `generate` must make."""
    from model import draw_token, sample_seed
    answer, seed = [], torch.tensor([sample_seed(5, prompt, sample)])
    while len(answer) < longest and not (answer and answer[-1] in stop):
        ids = torch.tensor(prompt + answer)
        logits = model(ids, torch.full((len(ids),), len(ids)))[-1:] @ model.head.T
        for id in stop if len(answer) < shortest else ():
            logits[0, id] = -float("inf")
        answer.append(draw_token(logits, seed, torch.tensor([len(ids)]), 1.0, 0.95).item())
    return answer


def check_min_length(tmp_path, monkeypatch):
    import mine_hard
    from data import InputError
    from model import generate, generate_plain
    model, prompts = tiny_model(), [e.prompt for e in tiny_examples(shapes=[(3, ()), (1, ())])]
    stop = list(range(0, 97, 3))                                             # a third of all ids
    lengths = {}
    for shortest in (0, 6):
        with torch.no_grad():
            want = [[draw_by_hand(model, ids, sample, stop, shortest, 12) for sample in range(3)] for ids in prompts]
        options = dict(k=3, max_new_tokens=12, stop=stop, seed=5)
        assert generate(model, prompts, min_new_tokens=shortest, **options) == want
        assert generate_plain(model, prompts, min_new_tokens=shortest, **options) == want
        assert shortest or generate(model, prompts, **options) == want       # 0 is the default
        lengths[shortest] = [len(ids) for answers in want for ids in answers]
    assert min(lengths[0]) < 6 < min(lengths[6]) < 12                        # a stop id comes on top
    assert generate(model, prompts[:1], stop=[], max_new_tokens=3, min_new_tokens=9)

    generate_iter = mine_hard.generate_iter
    monkeypatch.setattr(mine_hard, "generate_iter", lambda model, prompts, stop, **options: generate_iter(
        model, prompts, stop=range(0, 761, 2), **options))
    arguments = ["--model", "toy/model", "--data", "toy/dev.json", "--limit", "4", "--k", "3", "--max-new-tokens", "9",
                 "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "hard")]
    mine_hard.main([*arguments, "--min-new-tokens", "5"])
    lines = [json.loads(line) for line in (tmp_path / "hard/samples.jsonl").read_text().splitlines()]
    lengths = [sample["tokens"] for line in lines for sample in line["samples"]]
    assert min(lengths) > 5 and len(set(lengths)) > 1
    with pytest.raises(InputError, match="was made with min_new_tokens = 5, not 0"):
        mine_hard.main([*arguments, "--resume"])


def check_group_preference_by_hand(tmp_path, monkeypatch):
    import train_dpo
    from data import INSTRUCTION, format_input
    from test_dpo import run
    seen, reference_logprobs = [], train_dpo.reference_logprobs
    ratios = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)             # log pi - log ref: two correct ones, one not

    def shifted(model, examples, *more):
        (reference,) = reference_logprobs(model, examples, *more)
        seen.append(-reference / torch.tensor([len(ids) for ids in examples[0].answers]))
        return [reference - ratios]

    monkeypatch.setattr(train_dpo, "reference_logprobs", shifted)
    line = {"instruction": INSTRUCTION, "input": format_input("Please lock the chest."), "chosen": "b", "rejected": "d e",
            "correct": ["a b c", "b"], "incorrect": ["d e"], "weight": 1.2}
    (tmp_path / "hard.jsonl").write_text(json.dumps(line))
    rows, _ = run(tmp_path / "run", tmp_path / "hard.jsonl", "--dtype", "float64", "--lr", 0, "--beta", 0.5)
    # -log sigmoid(0.5) = 0.474077, -log sigmoid(-1) = 1.313262
    assert rows[0]["preference"] == pytest.approx(1.2 * (0.474077 + 1.313262) / 2, abs=1e-6)
    assert rows[0]["loss"] - rows[0]["preference"] == pytest.approx(2.0 * seen[0][:2].mean().item(), abs=1e-9)
    assert (rows[0]["pairs"], rows[0]["accuracy"]) == (2, 0.5)
    assert rows[0]["margin"] == pytest.approx(0.5 * (1 - 2) / 2, abs=1e-9)


def write_groups(path, turn=0):
    """hard.jsonl of 6 prompts with 1 to 3 correct and 1 to 2 incorrect answers, in an order that depends on turn."""
    from data import INSTRUCTION, format_answers, format_input
    lines = []
    for i in range(6):
        answer = lambda word, n: f"The aim of {i}{' is plain' * n}.\n\n" + format_answers(word)
        correct = [answer("harmful", n) for n in range(1 + i % 3)]
        incorrect = [answer("unharmful", n) for n in range(2 - i % 2)]
        correct, incorrect = (some[turn % len(some):] + some[:turn % len(some)] for some in (correct, incorrect))
        lines.append({"instruction": INSTRUCTION, "input": format_input(f"Please lock chest {i}."), "chosen": correct[0],
                      "rejected": incorrect[0], "correct": correct, "incorrect": incorrect, "weight": 0.8 + 0.1 * i})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def check_group_preference_depends_neither_on_order_nor_on_packing(tmp_path):
    from test_dpo import run
    exact = ["--batch-size", 6, "--dtype", "float64"]
    rows, weights = run(tmp_path / "run", write_groups(tmp_path / "groups.jsonl"), *exact)
    assert [r["pairs"] for r in rows] == [1 * 2 + 2 * 1 + 3 * 2 + 1 * 1 + 2 * 2 + 3 * 1] * 2
    assert rows[1]["preference"] < rows[0]["preference"]
    names = ["loss", "preference", "margin", "grad_norm", "chosen_logprob", "rejected_logprob", "chosen_push",
             "chosen_verdict", "rejected_verdict", "rejected_length", "tokens"]
    for number, (turn, *more) in enumerate([(0, "--max-tokens", 1), (0, "--no-share"), (1,)]):
        again, same = run(tmp_path / str(number), write_groups(tmp_path / "groups.jsonl", turn), *exact, *more)
        for a, b in zip(rows, again):
            assert [b[name] for name in names] == pytest.approx([a[name] for name in names], rel=1e-8, abs=1e-8)
        assert all((weights[name] - same[name]).abs().max() < 1e-6 for name in weights)


def check_group_preference_of_pairs_is_dpo(tmp_path):
    from data import Tokenizer
    from model import Llama
    from test_dpo import run, write_pairs
    from train_dpo import answer_sums, pairs_loss, parse_arguments, read_pairs
    from train_sft import batches
    pairs = write_pairs(tmp_path / "hard.jsonl")                             # without the lists
    rows, _ = run(tmp_path / "run", pairs, "--batch-size", 5, "--dtype", "float64", "--epochs", 1, "--lr", 0)
    args = parse_arguments(["--data", str(pairs)])
    examples, _, weights = read_pairs(Tokenizer.from_pretrained("toy/model"), args)
    p, = pack(examples, 10 ** 6)
    with torch.no_grad():
        logprobs = Llama.from_pretrained("toy/model", "cpu", torch.float64)(p.tokens, p.end, p.rows, p.targets)
    policy = answer_sums(logprobs, p.answer, 24).view(-1, 2)
    length = torch.tensor([len(e.answers[0]) for e in examples])
    want = pairs_loss(policy, policy, length, weights, 0.1, 2.0)
    del want["accuracy"]                                                     # at margins that are 0 up to rounding
    for name, values in want.items():
        means = [values[numbers].mean().item() for numbers in batches(12, 5, 1, 42)]
        assert [r[name] for r in rows] == pytest.approx(means, abs=1e-12)


def check_group_preference_is_mined():
    from data import format_answers, format_input
    samples = [dict(text=str(i), finish="stop", tokens=1, verdict=dict(request=word, completion=None, response=None))
               for i, word in enumerate(("harmful", "unharmful", "harmful", "unharmful", "harmful"))]
    record = dict(instruction="i", input=format_input("x"), output=format_answers("harmful"))
    (line,), _ = mine_hard.select([record], ["toy"], [("model", {0: samples})], "all", "random", 0.2, 1)
    assert line["correct"] == ["0", "2", "4"] and line["incorrect"] == ["1", "3"]
    assert line["chosen"] in line["correct"] and line["rejected"] in line["incorrect"]
