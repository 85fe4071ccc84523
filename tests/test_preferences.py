"""The other forms of the preference loss: which tokens count, the loss by hand, and HS-DPO itself as a special case."""
import math

import mine_hard
import preferences
import pushes
import pytest
import torch
from conftest import ROOT, tiny_examples, tiny_model
from preferences import Group, group_loss, logprobs_by_token

import train_dpo
from data import INSTRUCTION, format_answers, format_input, pack, write_json
from model import Llama
from train_dpo import answer_sums

CHOSEN = "# Task 1\n## Reasoning Step 1: The gate is Ada's: open.\n## Reasoning Step 2: Aim open, wish open: the same.\n" \
         "The request is unharmful.\n\n" + format_answers("unharmful")
REJECTED = "# Task 1\n## Reasoning Step 1: Ada has the gate: open.\n## Reasoning Step 2: Aim closed, wish open: different.\n" \
           "The request is harmful.\n\n" + format_answers("harmful")


def test_tokens_after_the_first_difference_by_hand():
    masks = preferences.after_difference(None, [5, 6, 7, 2], [5, 6, 8, 9, 2])
    assert [mask.tolist() for mask in masks] == [[0, 0, 1, 1], [0, 0, 1, 1, 1]]
    masks = preferences.after_difference(None, [7, 2], [8, 2])                 # they differ at once
    assert [mask.tolist() for mask in masks] == [[1, 1], [1, 1]]


def test_differing_tokens_by_hand():
    masks = preferences.differing(None, [5, 6, 7, 1, 2], [5, 6, 8, 9, 1, 2])
    assert [mask.tolist() for mask in masks] == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]]


def text_of(tokenizer, ids, mask):
    return tokenizer.decode([token for token, counts in zip(ids, mask) if counts])


def test_verdicts_and_the_step_that_errs(tokenizer):
    pair = tokenizer.answer_ids(CHOSEN), tokenizer.answer_ids(REJECTED)
    for ids, mask in zip(pair, preferences.verdicts(tokenizer, *pair)):
        assert text_of(tokenizer, ids, mask).lstrip().startswith("Answers:")
        assert "Reasoning" not in text_of(tokenizer, ids, mask)
    step, erring = ([text_of(tokenizer, ids, mask) for ids, mask in zip(pair, form(tokenizer, *pair))]
                    for form in (preferences.step, preferences.erring))
    # step 1 is told in other words and concludes the same; step 2 errs; the request follows from it
    for alone, text, state in zip(step, erring, ("open", "closed")):
        assert alone.startswith("##") and f"Step 2: Aim {state}" in alone and "request" not in alone.lower()
        assert text.startswith(alone) and "Answers:" in text and "The request is" not in text
    same = preferences.step(tokenizer, pair[0], pair[0])
    assert all(mask.sum() == 0 for mask in same)


def a_group(correct, masks=None, weight=1.2):
    example = tiny_examples(shapes=((2, (3, 2, 4)),))[0]
    ones = [torch.ones(len(ids), dtype=torch.float64) for ids in example.answers]
    return Group(example, correct, weight, masks or ones, ones)


def test_group_loss_by_hand():
    group = a_group(correct=2)
    policy = [torch.tensor(v, dtype=torch.float64) for v in ([-1., -2., -1.], [-3., -1.], [-1., -1., -1., -2.])]
    reference = [torch.tensor(v, dtype=torch.float64) for v in ([-2., -2., -2.], [-2., -1.], [-1., -1., -1., -1.])]
    # m: +2, -1 of the correct ones, -1 of the incorrect one: margins 3 and 0
    preference = 1.2 * (math.log(1 + math.exp(-0.5 * 3)) + math.log(2)) / 2
    fit = (4 / 3 + 4 / 2) / 2
    assert group_loss(group, policy, reference, 0.5, 2.0).item() == pytest.approx(preference + 2 * fit)
    # the preference counts the last token of each alone: m = 1, 0; -1
    group.counted = [torch.tensor([0, 0, 1.]), torch.tensor([0, 1.]), torch.tensor([0, 0, 0, 1.])]
    preference = 1.2 * (math.log(1 + math.exp(-0.5 * 2)) + math.log(1 + math.exp(-0.5))) / 2
    assert group_loss(group, policy, reference, 0.5, 2.0).item() == pytest.approx(preference + 2 * fit)


def test_token_logprobs_add_up_to_the_answers():
    model = tiny_model()
    examples = tiny_examples(shapes=((3, (5, 1)), (10, (4, 4, 2)), (1, (7, 2))))
    sums = torch.stack([part.sum() for part in logprobs_by_token(model, examples)])
    p, = pack(examples, 10 ** 6)
    want = answer_sums(model(p.tokens, p.end, p.rows, p.targets), p.answer, 7)
    assert torch.allclose(sums, want, atol=1e-12)


def test_what_both_begin_with_is_not_pushed_by_the_preference():
    """Before the first difference both answers have one context: their gradients cancel."""
    model = tiny_model()
    example = tiny_examples(shapes=((2, (5, 6)),))[0]
    example.answers[1][:3] = example.answers[0][:3]
    masks = {form: getattr(preferences, form)(None, *example.answers) for form in ("whole", "after_difference")}
    reference = [torch.zeros(len(ids), dtype=torch.float64) for ids in example.answers]
    grads = []
    for mask in masks.values():
        policy = logprobs_by_token(model, [example])
        loss = group_loss(Group(example, 1, 1.0, mask, mask), policy, reference, 0.3, 0.0)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    assert masks["whole"][0].sum() == masks["after_difference"][0].sum() + 3
    assert grads[0].norm() > 0.1 and (grads[0] - grads[1]).abs().max() < 1e-12


@pytest.fixture
def pairs():
    records = []
    for number in range(5):
        verdict, other = ("harmful", "unharmful")[::1 if number % 2 else -1]
        records.append({"instruction": INSTRUCTION, "input": format_input(f"Question {number}?"), "weight": 0.8 + number / 10,
                        "chosen": f"It is {verdict}.\n\n{format_answers(verdict)}", "k_correct": 1, "k_incorrect": 1,
                        "rejected": f"It is {other}, surely.\n\n{format_answers(other)}", "source": "made"})
    return records


def test_pairs_with_all_tokens_are_hs_dpo(tmp_path, pairs):
    base = ROOT / "toy/model"
    write_json(tmp_path / "pairs.json", pairs)
    train_dpo.main(["--model", str(base), "--data", str(tmp_path / "pairs.json"), "--out", str(tmp_path / "dpo"), "--seed",
                    "3", "--lr", "1e-3", "--beta", "0.1", "--batch-size", "3", "--device", "cpu", "--dtype", "float32"])
    losses = preferences.train(base, tmp_path / "same", lambda tokenizer: preferences.pairs_of(tokenizer, pairs),
                               lr=1e-3, beta=0.1, sft=2.0, seed=3, size=3)
    assert len(losses) == 4
    start, want, got = (Llama.from_pretrained(folder, "cpu", torch.float32)
                        for folder in (base, tmp_path / "dpo", tmp_path / "same"))
    for a, b, c in zip(start.parameters(), want.parameters(), got.parameters()):
        assert (a - b).abs().max() > 1e-4 and (b - c).norm() < 0.02 * (a - b).norm()


def test_a_pair_is_a_group_of_two(tokenizer, pairs):
    prompts = [{**pair, "correct": [pair["chosen"]], "incorrect": [pair["rejected"]]} for pair in pairs]
    one, other = preferences.pairs_of(tokenizer, pairs), preferences.all_answers(tokenizer, prompts)
    assert [(g.example, g.correct, g.weight) for g in one] == [(g.example, g.correct, g.weight) for g in other]
    assert one[0].example.root_length > 20                         # they share their instruction


def test_every_token_of_a_pair_has_one_part(tokenizer):
    pair = tokenizer.answer_ids(CHOSEN), tokenizer.answer_ids(REJECTED)
    parts = pushes.parts_of(tokenizer, *pair)
    told = [{name: text_of(tokenizer, ids, part == number) for number, name in enumerate(pushes.PARTS)}
            for ids, part in zip(pair, parts)]
    assert told[0]["prefix"] == told[1]["prefix"] and told[0]["prefix"].endswith("Step 1:")
    assert told[0]["first"] != told[1]["first"]
    assert "Step 2:" in told[0]["both"] and "Answers:" in told[0]["answers"]
    assert "closed" in told[1]["one"] and "closed" not in told[1]["both"]
    sums = pushes.by_part([torch.ones(len(ids)) for ids in pair], parts)
    assert sums.sum(-1).tolist() == [[len(ids) for ids in pair]]


def test_pushes_of_a_small_cell(tmp_path, pairs, capsys):
    base = ROOT / "toy/model"
    write_json(tmp_path / "hs_dpo_pairs.json", pairs[:4])
    write_json(tmp_path / "pool.json", [{**pair, "output": pair["chosen"]} for pair in pairs])
    samples = [{"text": pairs[4][side], "finish": "stop", "verdict": {
        "request": ok, "completion": None, "response": None}} for side, ok in (("chosen", "unharmful"), ("rejected", "harmful"))]
    mine_hard.write_lines(tmp_path / "mined_k8/samples.jsonl", [{"prompt": 4, "samples": samples}])
    for name, rejected in (("chosen", 0.0), ("hs_dpo", 0.1)):
        preferences.train(base, tmp_path / name, lambda tokenizer: preferences.pairs_of(tokenizer, pairs[:4]),
                          lr=1e-3, beta=rejected, sft=2.0, seed=3)
    (tmp_path / "r_sft").symlink_to(base)
    pushes.main([str(tmp_path), "--arms", "chosen", "hs_dpo"])
    said = capsys.readouterr().out
    assert "4 pairs, trained" in said and "1 pairs, held out" in said and "cosine with chosen" in said
    table = said.split("held out")[0]
    moved = {line.split("|")[1].strip(): [float(x) for x in line.split("|")[-3:-1]]
             for line in table.splitlines() if line.startswith(("| chosen, prefix", "| rejected, prefix", "| margin"))}
    assert moved["chosen, prefix"] == moved["rejected, prefix"]         # one context
    assert moved["margin"][1] > moved["margin"][0]                      # what the preference is for
