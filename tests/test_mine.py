"""Judging, pairing, weighting, and a file that does not depend on interruptions."""
import json
import gc
import random
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mine_hard
from conftest import ROOT
from data import InputError
from mine_hard import judge, judge_by_all_fields, judge_by_field, pick_pair, sample_weights, select
from model import World
from processes import without

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
verdict = lambda request=None, completion=None, response=None: dict(request=request, completion=completion, response=response)
sample = lambda v, text="t", finish="stop": {"text": text, "finish": finish, "verdict": v}


def test_judge_asks_for_every_labelled_verdict():
    assert judge(verdict(H, R, U), verdict(H, R, U))
    assert judge(verdict(H, C, U), verdict(request=H))                             # unlabelled ones are not asked
    assert not judge(verdict(H, C, U), verdict(H, R, U)) and not judge(verdict(), verdict(request=H))
    assert not judge(verdict(H, R, U), verdict())                                  # nothing labelled, nothing right


def test_an_answer_that_was_cut_off_is_never_correct():
    assert judge_by_all_fields([sample(verdict(H)), sample(verdict(H), finish="length")], verdict(H)) == [True, False]


def test_the_released_judge_takes_the_first_field_with_both_and_drops_gaps():
    gold = verdict(H, R, U)
    whole = [verdict(H, R, U), verdict(H, C, H), verdict(H, R, None)]              # request: all right; response: both
    assert judge_by_field([sample(v) for v in whole], gold) == [True, False, None]
    first = [verdict(H, C, H), verdict(U, R, U)]                                   # chosen for the request, wrong elsewhere
    assert judge_by_field([sample(v) for v in first], gold) == [True, False]
    assert judge_by_field([sample(verdict(U, R, U))] * 2, gold) == [False, False]  # no field decides: all the same
    assert judge_by_field([sample(gold)] * 2, gold) == [True, True]
    prompts = [verdict(H), verdict(U), verdict()]                                  # no response: only one label
    assert judge_by_field([sample(v) for v in prompts], verdict(H)) == [True, False, None]
    assert judge_by_field([sample(v) for v in first], verdict(None, None, U)) == [False, True]
    assert judge_by_field([sample(verdict(H, R, H)), sample(verdict(H, C, U))], gold) == [False, True]      # response first


def test_pick_pair_is_seeded_and_longest_is_longest():
    samples = [sample(None, t) for t in ("aa", "b", "cccc", "dd")]
    right = [True, True, False, False]
    assert pick_pair(samples, right, "longest", random.Random(0)) == ("aa", "cccc")
    drawn = {pick_pair(samples, right, "random", random.Random(i)) for i in range(40)}
    assert drawn == {(a, b) for a in ("aa", "b") for b in ("cccc", "dd")}
    assert pick_pair(samples, [True, None, False, None], "random", random.Random(1)) == ("aa", "cccc")


def test_weights_by_hand():
    # k = 4: 1, 2 or 3 wrong of 4 differ by -2, 0, 2 -> 0.8, 1, 1.2; with 5 answers dropped to odd counts, steps of 0.1
    assert sample_weights([-2, 0, 2], 0.2) == pytest.approx([0.8, 1.0, 1.2])
    assert sample_weights([-2, -1, 0, 1, 2], 0.2) == pytest.approx([0.8, 0.9, 1.0, 1.1, 1.2])
    assert sample_weights([0, 2], 0.2) == pytest.approx([0.8, 1.2])                # min-max of what was mined
    assert sample_weights([2, 2], 0.2) == [1.0, 1.0] and sample_weights([], 0.2) == []


def records_and_answers():
    records = [{"instruction": "i", "input": f"x{n % 3}", "output": f"Answers: \nRequest: {H}"} for n in range(4)]
    good, bad, none = sample(verdict(H), "good"), sample(verdict(U), "bad"), sample(verdict(), "none")
    first = {0: [good, bad, bad, bad], 1: [good] * 4, 2: [none, none, bad, bad], 3: [good, good, bad, none]}
    second = {0: [good, good, good, bad], 1: [good, bad, good, bad], 2: [bad] * 4, 3: [good] * 4}
    return records, first, second


def test_select_counts_and_weighs():
    records, first, second = records_and_answers()
    hard, count = select(records, ["a", "a", "b", "b"], [("m", first)], "all", "random", 0.2, 0)
    assert (count["all right"], count["hard"], count["all wrong"], count["answers without verdict"]) == (1, 2, 1, 3)
    assert [p["input"] for p in hard] == ["x0"]                                    # record 3 repeats the input x0
    assert hard[0]["chosen"] == "good" and hard[0]["rejected"] == "bad" and hard[0]["source"] == "a"
    assert (hard[0]["k_correct"], hard[0]["k_incorrect"], hard[0]["weight"]) == (1, 3, 1.0)


def test_an_ensemble_is_a_union_with_one_entry_an_input():
    records, first, second = records_and_answers()
    hard, _ = select(records, ["a"] * 4, [("m", first), ("n", second)], "all", "random", 0.2, 0)
    assert [(p["input"], p["k_correct"]) for p in hard] == [("x0", 1), ("x1", 2)]
    assert [p["weight"] for p in hard] == pytest.approx([1.2, 0.8])


def test_no_verdict_is_never_chosen():
    records, first, _ = records_and_answers()
    for seed in range(20):
        for pair in select(records, ["a"] * 4, [("m", {3: first[3]})], "all", "random", 0.2, seed)[0]:
            assert pair["chosen"] == "good" and pair["rejected"] in ("bad", "none")


ARGS = ["--model", "toy/model", "--data", "toy/dev.json", "--limit", "7", "--k", "2", "--max-new-tokens", "12",
        "--block", "3", "--dtype", "float32", "--device", "cpu"]


def mine(out, *more):
    mine_hard.main([*without(ARGS, more), "--out", str(out), *map(str, more)])
    return (out / "samples.jsonl").read_bytes(), (out / "hard.jsonl").read_bytes()


def test_an_interrupted_run_gives_the_same_files(tmp_path, monkeypatch):
    whole = mine(tmp_path / "a")
    lines = [json.loads(line) for line in whole[0].splitlines()]
    assert [line["prompt"] for line in lines] == list(range(7)) and all(len(line["samples"]) == 2 for line in lines)
    original, blocks = mine_hard.answer_block, []

    def fail_in_second(*args):
        blocks.append(1)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(mine_hard, "answer_block", fail_in_second)
    with pytest.raises(KeyboardInterrupt):
        mine(tmp_path / "b")
    assert len(list((tmp_path / "b/samples.jsonl.parts").glob("*.jsonl"))) == 1    # what was done is kept
    settings = tmp_path / "b/samples.jsonl.parts/settings.json"
    settings.rename(tmp_path / "settings.json")
    with pytest.raises(InputError, match="which says what it was made with, is gone"):
        mine(tmp_path / "b", "--resume", "--k", 3)
    (tmp_path / "settings.json").rename(settings)
    assert mine(tmp_path / "b", "--resume") == whole and len(blocks) == 4         # 1 + the failed + 2 left


def test_selecting_again_needs_no_model(tmp_path, monkeypatch):
    whole = mine(tmp_path / "a")
    monkeypatch.setattr(mine_hard.Llama, "from_pretrained", None)
    assert mine(tmp_path / "a", "--resume") == whole
    with pytest.raises(InputError, match="was made with k = 2"):
        mine(tmp_path / "a", "--resume", "--k", 3)
    with pytest.raises(InputError, match="was made with prompts = "):
        mine(tmp_path / "a", "--resume", "--data", "toy/test.json")
    for flag, value in (("--limit", 6), ("--max-length", 4000), ("--seed", 1), ("--dtype", "float64"),
                        ("--temperature", 0.5), ("--top-p", 0.5), ("--max-new-tokens", 9), ("--block", 2)):
        with pytest.raises(InputError, match=f"was made with {flag[2:].replace('-', '_')} = "):
            mine(tmp_path / "a", "--resume", flag, value)
    with pytest.raises(InputError, match="already holds samples"):
        mine(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/samples.jsonl.parts")              # it looks like something left over
    with pytest.raises(InputError, match="which says what it was made with, is gone"):
        mine(tmp_path / "a", "--resume", "--k", 3)


@pytest.mark.parametrize("change", [
    lambda line: line["samples"][0].update(text=None), lambda line: line["samples"][0].update(tokens="x"), lambda line: line["samples"].pop(),
    lambda line: line["samples"][0].update(verdict=[]), lambda line: line.update(prompt=3)])
def test_a_block_that_is_not_whole_is_answered_again(tmp_path, change):
    whole = mine(tmp_path / "a")
    lines = [json.loads(line) for line in whole[0].splitlines()]
    (tmp_path / "a/samples.jsonl").unlink()
    change(lines[0])
    (tmp_path / "a/samples.jsonl.parts/00000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert mine(tmp_path / "a", "--resume") == whole


def test_answers_of_other_weights_or_other_prompts_are_not_taken_for_these(tmp_path):
    shutil.copytree("toy/model", tmp_path / "model")
    data, weights = tmp_path / "data.json", tmp_path / "model/model.safetensors"
    data.write_text(json.dumps(json.loads(Path("toy/dev.json").read_text())[:2]))
    arguments = ["--model", tmp_path / "model", "--data", data, "--max-new-tokens", 2]
    mine(tmp_path / "a", *arguments)
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))             # trained again, into the same folder
    with pytest.raises(InputError, match="was made with weights_hash = "):
        mine(tmp_path / "a", *arguments, "--resume")
    weights.write_bytes(before)                                            # copied: another time, the same weights
    mine(tmp_path / "a", *arguments, "--resume")
    config = tmp_path / "model/config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "rope_theta": 500.0}))
    with pytest.raises(InputError, match="was made with config_hash = "):
        mine(tmp_path / "a", *arguments, "--resume")
    config.write_text(before)
    ends = tmp_path / "model/generation_config.json"                       # an end mark that was forgotten
    before = ends.read_text()
    ends.write_text(json.dumps({"eos_token_id": [*json.loads(before)["eos_token_id"], 759]}))
    with pytest.raises(InputError, match="was made with stop = "):
        mine(tmp_path / "a", *arguments, "--resume")
    ends.write_text(before)
    data.write_text(json.dumps(json.loads(data.read_text())[::-1]))                # as many records, but others
    with pytest.raises(InputError, match="was made with prompts = "):
        mine(tmp_path / "a", *arguments, "--resume")


def test_a_file_of_answers_that_lost_some_is_refused(tmp_path):
    mine(tmp_path / "a")
    path = tmp_path / "a/samples.jsonl"
    lines = path.read_text().splitlines(True)
    for left in ([], lines[:-1], lines[1:], lines[::-1], [*lines[:-1], '{"a": 1}\n'], [*lines[:-1], "[1]\n"],
                 [*lines[:-1], lines[-1].replace("finish", "ended")], [*lines[:-1], lines[-1].replace('"length"', '"LENGTH"').replace('"stop"', '"STOP"')],
                 [lines[0], lines[1].replace('"prompt": 1', '"prompt": 1.0'), *lines[2:]], [*lines[:-1], re.sub('"tokens": [0-9]+', '"tokens": 1' + "0" * 30, lines[-1])], [*lines[:-1], json.dumps({**json.loads(lines[-1]), "samples": []}) + "\n"]):
        path.write_text("".join(left))
        with pytest.raises(InputError, match=f"samples.jsonl: is damaged: it should have 2 answers to each of {len(lines)} prompts"):
            mine(tmp_path / "a", "--resume")
    path.unlink()
    mine(tmp_path / "a", "--resume")
    assert path.read_text() == "".join(lines)
    for left in ("", "".join(lines)[:-9], "\0" * 99):                               # what a crash may leave of a block
        path.unlink()
        (tmp_path / "a/samples.jsonl.parts/00000000.jsonl").write_text(left)
        mine(tmp_path / "a", "--resume")
        assert path.read_text() == "".join(lines)
    (tmp_path / "a/samples.jsonl.parts/settings.json").write_text("[]")
    with pytest.raises(InputError, match="settings.json: is not a JSON object"):
        mine(tmp_path / "a", "--resume")


def test_a_gpu_answers_more_prompts_together(tmp_path, monkeypatch):
    # it has 1,024 slots, which a block of 256 would leave idle, and one long answer delays a block
    sizes = []

    def answer(guard, prompts, first, settings, args, meter, seconds):
        sizes.append(len(prompts))
        sample = {"text": "", "finish": "stop", "tokens": 0, "verdict": {}}
        return [{"prompt": first + i, "samples": [sample]} for i in range(len(prompts))]

    monkeypatch.setattr(mine_hard, "answer_block", answer)
    monkeypatch.setattr(mine_hard, "check_room", lambda *_: None)
    for device in ("cpu", "cuda"):
        world = World(torch.device(device))
        guard, args = SimpleNamespace(folder="m"), SimpleNamespace(block=None, kv_tokens=None, no_share=False)
        lines = mine_hard.answer_prompts(guard, [[1]] * 300, tmp_path / device, world, {"k": 1, "max_new_tokens": 1}, args)
        assert [line["prompt"] for line in lines] == list(range(300))
    assert sizes == [256, 44, 300]


def test_room_for_the_longest_prompt_is_found_before_the_first_block(tmp_path):
    record = {"instruction": "i", "output": "harmful"}
    (tmp_path / "d.json").write_text(json.dumps([{**record, "input": "a"}, {**record, "input": "b"}, {**record, "input": "gate " * 900}]))
    options = ["--data", tmp_path / "d.json", "--block", 1]
    with pytest.raises(InputError, match=r"--kv-tokens 600: a prompt of \d+ tokens and its samples may need \d+"):
        mine(tmp_path / "a", *options, "--kv-tokens", 600)
    assert not list((tmp_path / "a").rglob("*.jsonl"))
    with pytest.raises(InputError, match="a prompt of"):                           # 2 answers side by side, or one by one
        mine(tmp_path / "a", *options, "--kv-tokens", 1100)
    mine(tmp_path / "b", *options, "--kv-tokens", 1100, "--no-share")
    mine(tmp_path / "a", *options, "--max-new-tokens", 2)                          # nothing was answered: other settings may be


def test_of_several_models_the_last_is_checked_before_the_first_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(mine_hard, "answer_block", None)
    with pytest.raises(InputError, match="nowhere"):
        mine(tmp_path / "a", "--model", "toy/model", tmp_path / "nowhere")
    shutil.copytree("toy/model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="bare/model.safetensors"):
        mine(tmp_path / "a", "--model", "toy/model", tmp_path / "bare")


def test_of_several_models_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    original, models = mine_hard.answer_block, []

    def watch(guard, *more):
        models.append(weakref.ref(guard.model))
        gc.collect()
        assert sum(model() is not None for model in models) == 1
        return original(guard, *more)

    monkeypatch.setattr(mine_hard, "answer_block", watch)
    shutil.copytree("toy/model", tmp_path / "other")
    mine_hard.main([*ARGS[2:], "--block", "7", "--model", "toy/model", str(tmp_path / "other"), "--out", str(tmp_path / "a")])
    assert len(models) == 2


@pytest.mark.parametrize("alike", [["--k", 1], ["--temperature", 0], ["--top-p", 1e-9]])
def test_where_all_answers_are_alike_that_is_said(tmp_path, capsys, alike):
    assert mine(tmp_path / "a", "--limit", 1, *alike)[1] == b""
    assert "all answers to a prompt will be alike" in capsys.readouterr().err
    mine(tmp_path / "b", "--limit", 1)
    assert "alike" not in capsys.readouterr().err


def test_pairs_whose_samples_were_moved_away_are_not_written_over_by_others(tmp_path):
    whole = mine(tmp_path / "a")
    (tmp_path / "a/samples.jsonl").rename(tmp_path / "a/samples_old.jsonl")
    for more, says in (([], "already holds samples"), (["--resume", "--k", 3], "was made with k = 2")):
        with pytest.raises(InputError, match=says):
            mine(tmp_path / "a", *more)
    assert mine(tmp_path / "a", "--resume") == whole                               # made again, they are the same
    with pytest.raises(InputError, match="samples.jsonl: is of a run with another number of models"):
        mine(tmp_path / "a", "--resume", "--model", "toy/model", tmp_path / "other")
    with pytest.raises(InputError, match="a folder is named twice"):
        mine(tmp_path / "b", "--model", "toy/model", "toy/model/")


def test_models_that_are_alike_draw_other_samples(tmp_path):
    copy = shutil.copytree("toy/model", tmp_path / "m")
    mine_hard.main([*ARGS[2:], "--out", str(tmp_path / "a"), "--model", "toy/model", str(copy)])
    first, second = ((tmp_path / f"a/samples-{number}.jsonl").read_text().splitlines() for number in (0, 1))
    settings = tmp_path / "a/samples-1.jsonl.parts/settings.json"
    made = json.loads(settings.read_text())
    assert made["seed"] == 43
    settings.write_text(json.dumps({**made, "seed": 42}))                          # as they were made before
    mine_hard.main([*ARGS[2:], "--out", str(tmp_path / "a"), "--model", "toy/model", str(copy), "--resume"])
    assert json.loads(settings.read_text())["seed"] == 42
    texts = [[sample["text"] for line in lines for sample in json.loads(line)["samples"]] for lines in (first, second)]
    assert len(texts[0]) == len(texts[1]) > 1 and all(a != b for a, b in zip(*texts))


def test_two_miners_do_not_write_into_one_folder(tmp_path):
    code = "import sys, time; from data import hold; hold(sys.argv[1]); print(flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        try:
            with pytest.raises(InputError, match="another process is writing there"):
                mine(tmp_path / "a", "--model", "toy/model", shutil.copytree("toy/model", tmp_path / "m"))         # other names, but hard.jsonl
        finally:
            other.kill()


def test_a_slash_after_a_folders_name_makes_it_no_other(tmp_path):
    whole = mine(tmp_path / "a")
    assert mine(tmp_path / "a", "--resume", "--model", "./toy/model/") == whole


def test_verdicts_are_read_as_the_parser_of_today_reads_them(tmp_path):
    mine(tmp_path / "a", "--max-new-tokens", 2)
    path = tmp_path / "a/samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["samples"][0].update(text="Request: harmful", verdict={"request": "unharmful"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mine_hard.read_answers(path, 7, 2)[0]["samples"][0]["verdict"]["request"] == "harmful"


def test_without_data_the_demo_names_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="toy/train_.*json: cannot read"):
        mine_hard.main([])


def test_a_file_without_labels_is_refused_before_anything_else(tmp_path, capsys):
    records = [{"instruction": "i", "input": f"x{i}", "output": "I cannot say."} for i in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="d.json: no output is a label .harmful, unharmful, refusal, compliance"):
        mine(tmp_path / "a", "--data", tmp_path / "d.json", "--model", "nowhere")
    assert not (tmp_path / "a").exists()
    records[1]["output"] = H
    (tmp_path / "d.json").write_text(json.dumps(records))
    mine(tmp_path / "a", "--data", tmp_path / "d.json", "--max-new-tokens", 2)
    assert "2 records have no usable label: all answers to them count as wrong" in capsys.readouterr().err


def test_the_answers_to_one_prompt_are_drawn_apart(tmp_path):
    samples, _ = mine(tmp_path / "a", "--k", 4, "--limit", 3, "--max-new-tokens", 8)
    texts = [[s["text"] for s in json.loads(line)["samples"]] for line in samples.splitlines()]
    assert all(len(set(four)) > 1 for four in texts)
    greedy, _ = mine(tmp_path / "b", "--k", 2, "--limit", 2, "--max-new-tokens", 4, "--temperature", "1e-30", "--top-p", 1)
    assert all(s["text"] == line["samples"][0]["text"] for line in map(json.loads, greedy.splitlines()) for s in line["samples"])


def test_answers_that_the_released_judge_drops_count_for_neither_side():
    told = [sample(verdict(H, R, U), "ok"), sample(verdict(H, C, U), "longest"), sample(verdict(U, R, U), "bad"),
            sample(verdict(None, R, U), "a gap, and long")]
    by_prompt = {0: told, 1: [sample(verdict(H))] * 2, 2: [sample(verdict(U))] * 2}
    (pair,), count = select(records_and_answers()[0], ["a"] * 4, [("m", by_prompt)], "field", "longest", 0.2, 0)
    assert [pair[k] for k in ("k_correct", "k_incorrect", "chosen", "rejected")] == [2, 1, "longest", "bad"]
    want = {"hard": 1, "all right": 1, "all wrong": 1, "answers without verdict": 0}
    assert {what: count[what] for what in {*want, *count}} == want               # (a Counter's own 0 need not be there)


def test_an_answer_may_end_in_any_end_mark(tokenizer, monkeypatch):
    ends, asked = [*tokenizer.stop[:2], tokenizer.encode("x")[0]], []
    answers = lambda m, p, stop, **_: asked.append(stop) or [(0, [[e] for e in ends])]
    monkeypatch.setattr(mine_hard, "generate_iter", answers)
    guard = SimpleNamespace(model=None, tokenizer=tokenizer)
    meter = mine_hard.Meter(1, "", World(None))
    args = SimpleNamespace(kv_tokens=None, no_share=False)
    line, = mine_hard.answer_block(guard, [[1]], 5, {"model": "m", "seed": 3}, args, meter, {})
    assert [s["finish"] for s in line["samples"]] == ["stop", "stop", "length"] and asked == [tokenizer.stop] and line["prompt"] == 5
