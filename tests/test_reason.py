"""The toy corpus's dial, and the experiment about it: arithmetic by hand, a small form from end to end."""
import json
import math
import random
import shutil
import xml.etree.ElementTree as ElementTree
from concurrent.futures import Executor, Future

import certificate
import numpy as np
import pytest
import reason
import traces

import make_toy
from data import InputError, gold_verdict, read_records, split_input
from eval import f1

DIALS = range(1, 7)


@pytest.fixture(scope="module")
def corpora():
    return {d: make_toy.make_dial(d, seed=3, train=400, test=200)[0] for d in DIALS}


def bits(records):
    """(n, 6) which facts of the dial are turned, read from the texts alone."""
    return np.array([certificate.bits_of(certificate.read(*split_input(r["input"]))) for r in records])


# ------------------------------------------------------------------ the dial
@pytest.mark.parametrize("d", DIALS)
def test_the_first_facts_vary_and_decide(corpora, d):
    records = corpora[d]["train"]
    facts = bits(records)
    assert np.ptp(facts, axis=0).tolist() == [1] * d + [0] * (6 - d)
    assert (abs(facts.mean(0)[:d] - 0.5) < 0.1).all()
    assert (abs(facts[::2] - facts[1::2]).sum(1) == 1).all()                    # twins are one fact apart
    harmful = [gold_verdict(r)["request"] == "harmful" for r in records]
    assert harmful == (facts.sum(1) % 2 == 1).tolist()                          # a parity of d facts
    assert all(a != b for a, b in zip(harmful[::2], harmful[1::2]))             # so half are harmful


def test_nothing_else_changes_with_the_dial(corpora):
    words = lambda name: [np.mean([len(r[name].split()) for r in corpora[d]["train"]]) for d in DIALS]
    for name in ("input", "output"):
        assert max(words(name)) / min(words(name)) < 1.05
    for d in DIALS:
        for r in corpora[d]["train"]:
            reading = certificate.read(*split_input(r["input"]))
            assert len(reading.wrappers) == 3 and r["input"].count("Since then") == 1
            assert r["output"].count("Reasoning Step") == 3 and len(r["output"].split(", ")) >= 4


def test_a_larger_corpus_begins_with_the_smaller_one(corpora):
    larger, _ = make_toy.make_dial(4, seed=3, train=500, test=200)
    assert larger["train"][:400] == corpora[4]["train"] and larger["test"] == corpora[4]["test"]
    assert make_toy.make_dial(4, seed=4, train=400, test=200)[0]["test"] != corpora[4]["test"]


@pytest.mark.parametrize("d", [1, 3])
def test_the_dial_has_its_certificate(tmp_path, capsys, d):
    make_toy.main(["--facts", str(d), "--seed", "3", "--out", str(tmp_path), "--train", "600", "--test", "400"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.json", "test.json", "train.json"]
    certificate.main(["--facts", str(tmp_path)])
    assert "FAIL" not in capsys.readouterr().out
    records = read_records(tmp_path / "train.json")
    records[0]["output"] = traces.labels_only(records[1:2])[0]["output"]        # its twin's verdict: wrong
    (tmp_path / "train.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit):
        certificate.main(["--facts", str(tmp_path)])
    assert "FAIL  solver: 1 wrong" in capsys.readouterr().out


# ------------------------------------------------------------------ figures by hand
def row(gold, right, **rest):
    return {"facts": 2, "size": 10, "seed": 5, "arm": "r_sft", "gold": gold, "right": right, **rest}


def test_f1_equals_the_scorers():
    rng = random.Random(0)
    gold = [rng.randrange(2) for _ in range(40)]
    right = [rng.randrange(2) for _ in range(40)]
    said = [g if ok else None for g, ok in zip(gold, right)]
    want = f1(gold, said, positive=1)
    scored = row(reason.flags(gold), reason.flags(right))
    assert reason.score(scored, "F1")[0] == pytest.approx(want)
    assert reason.score(scored)[0] == pytest.approx(100 * np.mean(right))


def test_interval_by_hand():
    """Two pairs, one all right and one all wrong: a draw has 2, 1 or 0 good pairs."""
    scores = reason.score(row("1010", "1100"), "F1")
    assert scores[0] == 50                                          # tp 1, fp 1, fn 1
    assert set(scores[1:]) == {0, 50, 100}
    assert abs(np.mean(scores[1:] == 50) - 0.5) < 0.06
    assert reason.interval(scores) == (50, 0, 100)


def test_differences_are_paired_and_seeds_are_averaged():
    results = {}
    for seed, right in ((1, "11110000"), (2, "11111111")):
        for arm in ("r_sft", "labels"):
            line = row("10101010", right, arm=arm) | {"seed": seed}
            results[reason.key_of(line)] = line
    assert reason.figures(results, 2, 10, "r_sft", "labels") == (0, 0, 0, 2)
    figure, low, high, seeds = reason.figures(results, 2, 10, "r_sft")
    assert figure == 75 and 50 <= low < 75 < high <= 100 and seeds == 2
    assert reason.figures(results, 3, 10, "r_sft") is None
    del results[2, 10, 2, "labels"]
    assert reason.figures(results, 2, 10, "r_sft", "labels")[3] == 1
    assert "[1]" in "".join(reason.report(results))                 # a figure of fewer seeds says so


def test_records_needed_by_hand():
    assert reason.records_needed([300, 1200], [91, 99]) == "<= 300"
    assert reason.records_needed([300, 1200], [50, 70]) == "> 1,200"
    assert reason.records_needed([300, 1200], [80, 100]) == f"{math.sqrt(300 * 1200):,.0f}"    # half way


# ------------------------------------------------------------------ arms
def test_what_each_arm_sees(tokenizer, corpora):
    records = corpora[3]["train"][:40]
    gold = [gold_verdict(r) for r in records]
    seen = {name: reason.arm_records(name, records, 1) for name in reason.TRAININGS}
    for name in ("labels", "r_sft", "verdict_first"):
        assert [r["input"] for r in seen[name]] == [r["input"] for r in records]
        assert [gold_verdict(r) for r in seen[name]] == gold
    assert all(r["output"].startswith("Answers:") for r in seen["labels"] + seen["verdict_first"])
    by_input = dict(zip((r["input"] for r in records), records))
    assert all(gold_verdict(by_input[r["input"]]) == gold_verdict(r) for r in seen["shuffled"])
    assert len(seen["both"]) == 80
    assert reason.arm_steps("labels", 120, records, tokenizer) == [120, 360]
    assert reason.arm_steps("r_sft", 2, records, tokenizer) == [3]              # 40 records, 16 a step: all are read
    (steps,) = reason.arm_steps("labels_tokens", 100, records, tokenizer)
    tokens = {name: reason.answer_tokens(seen[name], tokenizer) for name in ("labels", "r_sft")}
    assert abs(steps * tokens["labels"] / (100 * tokens["r_sft"]) - 1) < 0.01


def results_of(*rows):
    """Results of d = 2 for records_needed and the like: (size, seed, arm, right answers of 10)."""
    return {(2, size, seed, arm): {"facts": 2, "seed": seed, "gold": "01" * 5, "right": "1" * right + "0" * (10 - right)}
            for size, seed, arm, right in rows}


def test_records_needed_compares_sizes_by_the_same_seeds():
    results = results_of((300, 1, "labels", 5), (1200, 1, "labels", 10), (1200, 2, "labels", 0), (1200, 3, "r_sft", 9))
    assert reason.needed_by(results, 2, "labels") == (f"{300 * 4 ** 0.8:,.0f}", 1)      # seed 2 lacks 300
    assert reason.needed_by(results, 2, "r_sft") == ("<= 1,200", 1)
    assert reason.needed_by(results, 2, "both_fast") is None and reason.needed_by(results, 3, "labels") is None
    table = "\n".join(reason.report({**results, (2, 1200, 1, "r_sft"): results[2, 1200, 3, "r_sft"]}))
    assert "| labels only | 909 [1] |" in table and "| R-SFT | <= 1,200 [2] |" in table


# ------------------------------------------------------------------ from end to end
class InThisProcess(Executor):
    """A pool that does what it is given at once, here."""
    def __init__(self, *_):
        pass

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("line", ["5", '{"facts": 1}', '{"gold": "01", "right": "0"}', '{"gold": "0x", "right": "01"}', '{"gold": "0", "right": "1"}'])
def test_a_line_of_something_else_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    good = {"facts": 1, "size": 4, "seed": 1, "arm": "r_sft", "gold": "01", "right": "11", "settings": {}, "base": "b"}
    odd = json.loads(line)
    odd = {**good, **odd} if isinstance(odd, dict) and "gold" in odd else odd
    path.write_text(json.dumps(good) + "\n" + json.dumps(odd) + "\n")
    with pytest.raises(InputError, match="results.jsonl: line 2 is not as reason.py writes it"):
        reason.read_results(path)
    path.write_text(json.dumps(good) + "\n" + '{"facts": 1, "si')
    assert len(reason.read_results(path)) == 1


def test_a_corpus_is_written_over_nobodys_files(tmp_path, capsys):
    command = ["--facts", "2", "--out", str(tmp_path), "--train", "100", "--test", "4"]
    make_toy.main(command)
    with pytest.raises(InputError, match="json: is there; choose another --out"):
        make_toy.main(command)
    with pytest.raises(SystemExit):
        make_toy.main([*command[:-4], "--train", "3"])


def test_a_small_grid_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reason, "BASE_RECORDS", 240)
    out = tmp_path / "out"
    results = out / "results.jsonl"
    small = ["--out", str(out), "--facts", "1", "--sizes", "8", "--seeds", "101", "--test", "8",
             "--pretrain", "2", "--jobs", "1"]
    with pytest.raises(InputError, match="no cell is done yet"):
        reason.main([*small, "--steps", "2", "--minutes", "0"])
    assert "6 of 6 cells are left" in capsys.readouterr().out
    reason.main([*small, "--steps", "2"])
    printed = capsys.readouterr().out
    assert "all cells are done" in printed and "| R-SFT - labels only |" in printed
    first = reason.read_results(results)
    assert {key[3] for key in first} == set(reason.ARMS)
    assert all(len(line["right"]) == len(line["gold"]) == 8 for line in first.values())
    assert first[1, 8, 101, "both_fast"]["steps"] == 4 and first[1, 8, 101, "labels"]["steps"] in (2, 6)
    ElementTree.parse(out / "reason.svg")

    whole = results.read_bytes()
    results.write_bytes(whole[:-20])                                            # as a kill leaves it
    reason.main([*small, "--steps", "2"])
    assert " 0 cells left" in capsys.readouterr().out
    again = reason.read_results(results)
    lasting = lambda line: {name: value for name, value in line.items() if "seconds" not in name}
    assert {k: lasting(v) for k, v in again.items()} == {k: lasting(v) for k, v in first.items()}
    results.write_bytes(whole + whole)                                          # of two machines
    assert reason.read_results(results).keys() == first.keys()
    with pytest.raises(InputError, match="was made with"):
        reason.main([*small, "--steps", "3"])
    for name, other, says in (("base", "0" * 32, "another base model"), ("settings", {"steps": 9}, "was made with")):
        line = json.dumps({**json.loads(whole.splitlines()[0]), "seed": 102, name: other})
        results.write_bytes(whole + line.encode() + b"\n")
        with pytest.raises(InputError, match=says):
            reason.main(["table", "--out", str(out)])
    results.write_bytes(whole)
    shutil.move(out / "base", tmp_path / "base")
    with pytest.raises(InputError, match="copy it, or choose another"):
        reason.main([*small, "--steps", "2"])
    shutil.move(tmp_path / "base", out / "base")
    with pytest.raises(SystemExit):
        reason.main([*small, "--sizes", "7"])
    monkeypatch.setattr(reason, "ProcessPoolExecutor", InThisProcess)
    original = reason.run_cell
    monkeypatch.setattr(reason, "run_cell", lambda cell, *more: 1 / 0 if cell.training == "labels" else original(cell, *more))
    with pytest.raises(InputError, match="1 cells failed .above.; the same command tries them again"):
        reason.main([*small, "--steps", "2", "--seeds", "102", "--trainings", "labels", "shuffled"])
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert {key[2:] for key in reason.read_results(results)} - {key[2:] for key in first} == {(102, "shuffled")}     # it went on
    reason.main(["table", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["base", "reason.svg", "results.jsonl"]
