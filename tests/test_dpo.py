"""The DPO loss by hand, its first value, and its independence of packing."""
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_examples
from safetensors.torch import load_file
from types import SimpleNamespace

import train_dpo
import train_sft
from data import INSTRUCTION, InputError, format_answers, format_input, pack
from model import World
from train_dpo import (answer_sums, block_start, dpo_loss, pairs_loss, reference_logprobs,
                       verdict_sums, watched)
from train_sft import batches, lr_at


def test_dpo_loss_by_hand():
    # margin = (-1 - -2) - (-4 - -3) = 2, beta 0.5  ->  -log sigmoid(1) = 0.31326, times alpha 1.2
    loss = dpo_loss(*[torch.tensor([v]) for v in (-1.0, -4.0, -2.0, -3.0)], beta=0.5, weight=torch.tensor([1.2]))
    assert loss.shape == (1,) and loss.item() == pytest.approx(1.2 * 0.3132617, rel=1e-5)


def test_dpo_loss_is_the_textbook_one_for_weight_one_and_falls_with_the_margin():
    x = torch.randn(4, 50, dtype=torch.float64)
    want = -torch.log(1 / (1 + torch.exp(-0.1 * ((x[0] - x[1]) - (x[2] - x[3])))))
    assert torch.allclose(dpo_loss(*x, 0.1, torch.ones(50)), want)
    assert dpo_loss(x[0] + 1, *x[1:], 0.1, torch.ones(50)).sum() < want.sum()


def test_answer_sums_add_up_tokens():
    assert answer_sums(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([0, 0, 2, 1]), 4).tolist() == [-3, -8, -4, 0]


def test_the_answers_block_begins_where_its_word_does(tokenizer):
    reasoning, block = "# Task 1\nSo the answer is plain.\n\n", format_answers("harmful")
    ids = tokenizer.answer_ids(reasoning + block)
    start = block_start(tokenizer, ids)
    assert tokenizer.decode(ids[start:]).startswith(block.rstrip())
    twice = tokenizer.answer_ids(reasoning + block + "\n\n" + block)      # the last block counts
    assert tokenizer.decode(twice[block_start(tokenizer, twice):]).startswith(block.rstrip())
    assert len(twice) - block_start(tokenizer, twice) == len(ids) - start
    for spelled in ("**Answers**:", "ANSWERS :"):                           # as parse_verdict takes them
        other = tokenizer.answer_ids(reasoning + block.replace("Answers:", spelled) + "\nMy answers: above")
        assert tokenizer.decode(other[block_start(tokenizer, other):]).startswith(spelled)
    for without in (tokenizer.answer_ids(reasoning), []):
        assert block_start(tokenizer, without) == len(without)


def test_verdict_sums_by_hand():
    logprobs, answer = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 0, 0, 1, 1])
    starts = torch.tensor([[1, 2], [0, 0]])     # answer 0 from its second token; answer 1 has no block
    assert verdict_sums(logprobs, answer, starts).tolist() == [-6, 0, 0, 0]


def test_pushes_are_those_of_the_formula():
    policy = torch.tensor([[-6.0, -9.0]], dtype=torch.float64, requires_grad=True)
    length, weight = torch.tensor([3.0]), torch.tensor([0.8])
    loss = pairs_loss(policy, policy.detach(), length, weight, beta=0.1, sft=2.0)["loss"]
    seen = watched(loss, policy, policy.detach(), torch.tensor([[3, 4]]))
    preference = 0.8 * 0.1 / 2                  # at margin 0: alpha beta / 2
    assert seen["chosen_push"].item() == pytest.approx(preference + 2 / 3)
    assert seen["rejected_push"].item() == pytest.approx(-preference)


ARGS = SimpleNamespace(batch_size=3, max_tokens=10 ** 6, no_share=False, beta=0.1, sft=2.0)
ALONE = World(torch.device("cpu"))


def step_means(model, examples, reference, weights, max_tokens=10 ** 6, share=True):
    """The means of what pairs_loss returns, over all pairs; the mean loss gives gradients."""
    means, n = {}, len(examples)
    for p in pack(examples, max_tokens, share):
        pairs, logprobs = torch.unique(p.answer // 2), model(p.tokens, p.end, p.rows, p.targets)
        policy = answer_sums(logprobs, p.answer, 2 * n).view(-1, 2)[pairs]
        length = policy.new_tensor([len(examples[i].answers[0]) for i in pairs])
        weight = weights[pairs].to(policy)
        part = pairs_loss(policy, reference[pairs], length, weight, ARGS.beta, ARGS.sft)
        (part["loss"].sum() / n).backward()
        for name, values in part.items():
            means[name] = means.get(name, 0) + values.sum().item() / n
    return means


def test_the_first_loss_is_mean_alpha_ln_2_plus_the_sft_term():
    model, examples = tiny_model(), tiny_examples()
    reference = reference_logprobs(model, examples, ARGS, ALONE)
    weights = torch.tensor([0.8, 1.0, 1.2, 1.1], dtype=torch.float64)
    means = step_means(model, examples, reference, weights)
    lengths = [len(e.answers[0]) for e in examples]
    sft = sum(-r / n for r, n in zip(reference[:, 0].tolist(), lengths)) / 4     # mean over tokens
    assert means["preference"] == pytest.approx(1.025 * math.log(2), rel=1e-9)
    assert means["loss"] == pytest.approx(1.025 * math.log(2) + 2 * sft, rel=1e-9)


def test_reference_is_a_sum_over_tokens_and_does_not_depend_on_packing():
    model, examples = tiny_model(), tiny_examples()
    reference = reference_logprobs(model, examples, ARGS, ALONE)
    for example, row in zip(examples, reference):
        for answer, value in zip(example.answers, row.tolist()):
            ids = torch.tensor(example.prompt + answer[:-1])
            hidden = model(ids, torch.full((len(ids),), len(ids)))[len(example.prompt) - 1:]
            logits = hidden @ model.head.T
            assert value == pytest.approx(-F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), rel=1e-9)
    for other in (dict(max_tokens=1), dict(no_share=True), dict(batch_size=1)):
        args = SimpleNamespace(**{**vars(ARGS), **other})
        assert (reference_logprobs(model, examples, args, ALONE) - reference).abs().max() < 1e-9


def test_loss_and_gradient_do_not_depend_on_packing():
    examples, weights = tiny_examples(), torch.tensor([0.8, 1.0, 1.2, 1.1])
    reference = reference_logprobs(tiny_model(seed=2), examples, ARGS, ALONE)
    results = []
    for max_tokens, share in ((10 ** 6, True), (10 ** 6, False), (1, True)):
        model = tiny_model()
        means = step_means(model, examples, reference, weights, max_tokens, share)
        results.append((means, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for means, gradient in results[1:]:
        assert means["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-10)
        assert means == pytest.approx(results[0][0], rel=1e-5, abs=1e-8)
        assert (gradient - results[0][1]).abs().max() < 1e-8


def write_pairs(path, n=12):
    lines = []
    for i in range(n):
        answer = lambda word: f"# Task 1\nThe aim of {i} is plain.\n\n" + format_answers(word)
        lines.append({"instruction": INSTRUCTION, "input": format_input(f"Please lock chest {i}."), "chosen": answer("harmful"),
                      "rejected": answer("unharmful"), "weight": 0.8 + 0.1 * (i % 5)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(out, pairs, *more):
    train_dpo.main(["--model", "toy/model", "--data", str(pairs), "--out", str(out), "--lr", "1e-3", "--epochs", "2",
                    "--batch-size", "5", "--beta", "0.1", "--dtype", "float32", "--device", "cpu", *map(str, more)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    return rows, load_file(out / "model.safetensors")


def test_a_run_starts_at_ln_2_learns_the_preference_and_resumes_bit_for_bit(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "hard.jsonl")
    rows, weights = run(tmp_path / "whole", pairs, "--sft", 0, "--save-every", 3)
    assert rows[0]["loss"] == pytest.approx(math.log(2) * 1.0, rel=0.1) and rows[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["preference"] < rows[0]["preference"] and rows[-1]["accuracy"] == 1
    assert [r["pairs"] for r in rows] == [5, 5, 2] * 2
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "whole", pairs, "--sft", 0, "--resume")                     # nothing to do
    assert not ended.value.code and "this run is finished" in capsys.readouterr().out
    (tmp_path / "whole/config.json").unlink()                                      # the last file: as if killed before the end
    again, same = run(tmp_path / "whole", pairs, "--sft", 0, "--save-every", 3, "--resume")
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), same.values()))


def test_resuming_with_other_pairs_or_another_reference_is_refused(tmp_path, monkeypatch):
    run(tmp_path / "a", write_pairs(tmp_path / "hard.jsonl"), "--max-steps", 1)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="its run has weights_hash .*= '.*', not 'new'"):
        patched.setattr(train_sft, "weights_hash", lambda folder: "new")
        run(tmp_path / "a", tmp_path / "hard.jsonl", "--max-steps", 1, "--resume")
    with pytest.raises(InputError, match="its run has examples = 12, not 7"):
        run(tmp_path / "a", write_pairs(tmp_path / "hard.jsonl", 7), "--max-steps", 1, "--resume")


@pytest.mark.parametrize("change", [
    lambda pairs: [{**p, "weight": 1.0} for p in pairs], lambda pairs: pairs[::-1], lambda pairs: [{**p, "weight": p["weight"] + 1e-9} for p in pairs],
    lambda pairs: [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]])
def test_the_pairs_and_their_weights_belong_to_a_run(tmp_path, change):
    path = write_pairs(tmp_path / "hard.jsonl", 4)
    run(tmp_path / "a", path, "--max-steps", 1)
    pairs = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(InputError, match=r"its run has data_hash .*= \d+, not \d+"):
        run(tmp_path / "a", path, "--max-steps", 1, "--resume")


def test_pairs_of_equal_answers_are_left_out_and_counted(tmp_path, capsys):
    # as text, and as ids: half a surrogate pair becomes U+FFFD, whichever it was
    path = write_pairs(tmp_path / "hard.jsonl", 5)
    pairs = [{**json.loads(line), "weight": 2.0 ** i} for i, line in enumerate(path.read_text().splitlines())]
    pairs[1].update(chosen="the same", rejected="the same")
    pairs[3].update(chosen="a \ud800", rejected="a \udfff")
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (row,), _ = run(tmp_path / "a", path, "--lr", 0, "--max-steps", 1)
    assert "2 pairs left out: their two answers are equal" in capsys.readouterr().err
    assert row["pairs"] == 3 and row["preference"] == pytest.approx(math.log(2) * (1 + 4 + 16) / 3, rel=1e-3)
    path.write_text(json.dumps(pairs[1]) + "\n")
    with pytest.raises(InputError, match="hard.jsonl: no pair has two different answers"):
        run(tmp_path / "b", path)


@pytest.mark.parametrize("weight", ["0.9", True, -1, 1e39, float("nan"), None])
def test_a_wrong_weight_names_its_file_and_a_missing_one_is_said(tmp_path, capsys, weight):
    first = write_pairs(tmp_path / "first.jsonl", 2)
    second = write_pairs(tmp_path / "second.jsonl", 3)
    pairs = [json.loads(line) for line in second.read_text().splitlines()]
    del pairs[0]["weight"]
    pairs[1]["sample_weight"] = pairs[1].pop("weight")                         # the released name
    write = lambda: second.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write()
    (row,), _ = run(tmp_path / "a", first, "--data", second, "--lr", 0, "--max-steps", 1)
    assert f"1 pairs of {second} have no weight: they count 1" in capsys.readouterr().err and row["pairs"] == 5
    pairs[2]["weight"] = weight
    write()
    with pytest.raises(InputError, match="second.jsonl: a weight is .* must be a number from 0 to 1,000,000 .*chest 2"):
        run(tmp_path / "b", first, "--data", second)


@pytest.mark.parametrize("name", ["load_for_training", "reference_logprobs"])
def test_a_signal_before_the_first_step_ends_in_one_line(tmp_path, monkeypatch, name):
    whole, pairs = getattr(train_dpo, name), write_pairs(tmp_path / "hard.jsonl", 4)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="interrupted before the first step: nothing is lost"):
        patched.setattr(train_dpo, name, lambda *args: (signal.raise_signal(signal.SIGTERM), whole(*args))[1])
        run(tmp_path / "a", pairs)
    assert not list((tmp_path / "a").iterdir()) and run(tmp_path / "a", pairs, "--max-steps", 1)


def test_each_pair_keeps_its_weight_where_another_is_left_out(tmp_path):
    # powers of two: each batch has a mean of its own
    pairs = write_pairs(tmp_path / "hard.jsonl")
    first, *rest = map(json.loads, pairs.read_text().splitlines())
    rest = [{**r, "weight": 2.0 ** i} for i, r in enumerate(rest)]
    pairs.write_text("".join(json.dumps(r) + "\n" for r in [{**first, "chosen": "a b " * 2000}, *rest]))
    rows, _ = run(tmp_path / "a", pairs, "--lr", 0, "--max-steps", 3)
    want = [sum(2.0 ** i for i in b) / len(b) for b in batches(11, 5, 2, 42)][:3]
    assert [r["preference"] / math.log(2) for r in rows] == pytest.approx(want, rel=1e-3)


def test_every_pair_twice_has_the_gradient_of_once(tmp_path):
    once, twice = write_pairs(tmp_path / "once.jsonl", 3), tmp_path / "twice.jsonl"
    twice.write_text(once.read_text() * 2)
    a, b = (run(tmp_path / p.stem, p, "--batch-size", n, "--max-steps", 1)[0][0] for p, n in ((once, 3), (twice, 6)))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_every_step_is_made_at_the_rate_that_is_logged(tmp_path, monkeypatch):
    used, update = [], train_dpo.update
    monkeypatch.setattr(train_dpo, "update", lambda *args: (used.append(args[2]), update(*args))[1])
    rows, _ = run(tmp_path / "a", write_pairs(tmp_path / "hard.jsonl", 4), "--batch-size", 2)
    assert used == [r["lr"] for r in rows] == [lr_at(step, 4, 1e-3) for step in range(4)]
