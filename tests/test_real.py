"""tools/real.py: what it keeps of answers, its intervals, and the whole recipe on a toy model."""
import json
import random
import re
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import real
import real_table
import train_dpo
import train_sft
from audit import near_prompts
from conftest import ROOT
from traces import shorten, tidy, verdict_first

import eval as evaluation
import mine_hard
from data import (INSTRUCTION, InputError, format_answers, format_input, gold_verdict,
                  parse_verdict, read_json, read_records, write_json)
from eval import auprc, confusion, f1

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
TRACE = """\
# Task 1

## Reasoning Step 1
It asks for a bomb.

## Reasoning Step 2
That hurts.

## Conclusion
The request is harmful.

# Task 2
## Reasoning Step 1: It declines.
# Task 2: refusal

# Task 3
## Reasoning Step 1: It says no.
## Reasoning Step 2: Nothing in it hurts.

Answers:\x20
Request: harmful
Completion: refusal
Response: unharmful"""


# ------------------------------------------------------------------ what becomes of an answer
def test_minutes_are_of_training_and_of_every_test(tmp_path):
    (tmp_path / "seconds.txt").write_text("10.0 train_sft.py DATA/traces.json\n5.0 eval.py DATA/dev.json\n2.0 eval.py civil_dev.json\n1.0 eval.py dev.json\n")
    assert real_table.seconds_of(tmp_path) == 12


def test_a_tidy_trace_stays_as_it_is():
    assert tidy(TRACE, has_response=True) == (TRACE, None)
    without_heading = TRACE.removeprefix("# Task 1\n\n")
    ruled = without_heading.replace("Answers", "---\n\nAnswers")
    assert tidy(ruled, has_response=True) == (TRACE, None)


def test_of_a_response_that_is_not_there_nothing_is_said():
    kept, fault = tidy(TRACE, has_response=False)
    assert fault is None and kept == TRACE.split("\n\n# Task 2")[0] + f"\n\n{format_answers(H)}"


@pytest.mark.parametrize("old, new, fault", [
    ("# Task 1\n", "6. And so on.\n\n# Task 1\n", "begins in the middle"),
    ("Completion: refusal", "Completion: unsure", "no verdict on the completion"),
    ("## Reasoning Step 1: It declines.", "It declines.", "no steps on the completion"),
    ("# Task 3\n", "", "no steps on the response"),
    ("request is harmful", "request is unharmful", "its conclusion on the request is another")])
def test_what_is_wrong_with_an_answer(old, new, fault):
    assert tidy(TRACE.replace(old, new, 1), has_response=True) == (None, fault)


def test_short_chains_by_hand():
    (short,) = shorten([{"output": TRACE, "source": "x"}])
    assert short == {"source": "x", "output": f"""\
# Task 1

## Reasoning Step 1
That hurts.

## Conclusion
The request is harmful.

# Task 2
## Reasoning Step 1: It declines.
# Task 2: refusal

# Task 3
## Reasoning Step 1: Nothing in it hurts.

{format_answers(H, R, U)}"""}


def test_the_verdict_first_is_still_the_verdict():
    (turned,) = verdict_first([{"input": "", "output": TRACE}])
    assert turned["output"].startswith(format_answers(H, R, U) + "\n\n# Task 1\n")
    assert parse_verdict(turned["output"]) == parse_verdict(TRACE)
    assert turned["output"].endswith("Nothing in it hurts.")
    spoken = TRACE.replace("Nothing in it hurts.", "It answers: sure. Nothing in it hurts.")
    (turned,) = verdict_first([{"input": "", "output": spoken}])
    assert turned["output"].endswith("It answers: sure. Nothing in it hurts.")


def test_near_prompts_by_hand():
    others = ["How can I rob a bank?", "Hello", "how do I cook rice in a pot"]
    prompts = ["How can I rob a shop", "hello!", "rice", "How can I rob a bank", "Who are you?"]
    # runs of three words: 4 and 4, 3 of them in both
    assert near_prompts(prompts, others, 3 / 5) == {0: 0, 1: 1, 3: 0}
    assert near_prompts(prompts, others, 0.61) == {1: 1, 3: 0}


def record(prompt, label, response=None, chains=("x",)):
    return {"instruction": INSTRUCTION, "input": format_input(prompt, response), "label": label,
            "source": "s", "chains": list(chains)}


def test_classes_are_balanced_and_the_rarer_one_is_taken_whole():
    words = [H, U, H, H, U, H]
    pool = [record(f"p{i}", format_answers(word)) for i, word in enumerate(words)]
    pool += [record(f"q{i}", format_answers(None, R, word), "r")
             for i, word in enumerate([U, H, U])]
    taken, others = real.take(pool)
    assert [real.prompt_of(r) for r in taken] == ["p0", "p1", "p2", "p4", "q0", "q1"]
    assert [real.prompt_of(r) for r in others] == ["p3", "p5", "q2"]
    half, _ = real.take(pool, 0.5)
    assert [real.class_of(r) for r in half] == [("request", H), ("request", U)]


# ------------------------------------------------------------------ intervals
def rows_of(golds, verdicts, prompts):
    return [{"prompt": prompt, "gold": {"request": gold}, "verdict": {"request": verdict}}
            for gold, verdict, prompt in zip(golds, verdicts, prompts)]


def test_draws_begin_with_f1_itself_and_keep_a_prompt_together():
    rng = random.Random(1)
    golds = [rng.choice([H, U]) for _ in range(60)]
    verdicts = [rng.choice([H, U, None]) for _ in golds]
    draws = real_table.f1_draws(rows_of(golds, verdicts, range(60)), "request")
    assert draws.shape == (2001,) and draws[0] == pytest.approx(f1(golds, verdicts, H))
    (tp, fp, fn, _), weights = confusion(golds, verdicts, H), real_table.resamplings(60)
    assert weights[0].tolist() == [1] * 60 and set(weights.sum(1)) == {60}
    counts = [sum(w for w, g, v in zip(weights[7], golds, verdicts) if kind(g, v)) for kind in
              (lambda g, v: g == v == H, lambda g, v: g != v)]
    assert draws[7] == pytest.approx(200 * counts[0] / (2 * counts[0] + counts[1]))
    twice = real_table.f1_draws(rows_of(golds * 2, verdicts * 2, [*range(60)] * 2), "request")
    assert np.allclose(twice, draws)                        # the same prompts are no new ones
    assert real_table.interval(draws - draws) == (0, [0, 0])
    assert tp + fp + fn > 0


def test_draws_of_auprc_are_the_figure_of_the_rows_that_were_drawn():
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, 40, 60)
    p = rng.integers(0, 12, 60) / 12                        # equal scores share a threshold
    rows = rows_of(rng.choice([H, U], 60), [None] * 60, prompts)
    rows = [{**row, "p": {"request": value}} for row, value in zip(rows, p)]
    draws = real_table.auprc_draws(rows, "request")
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    for draw in (0, 1, 7):
        times = real_table.resamplings(len(numbers))[draw]
        drawn = [row for row in rows for _ in range(int(times[numbers[row["prompt"]]]))]
        positive = [row["gold"]["request"] == H for row in drawn]
        scores = [row["p"]["request"] for row in drawn]
        assert draws[draw] == pytest.approx(auprc(positive, scores))
        said = [[H if score >= threshold else U for score in scores] for threshold in p]
        best = max(f1([row["gold"]["request"] for row in drawn], some, H) for some in said)
        assert real_table.best_f1_draws(rows, "request")[draw] == pytest.approx(best)
    del rows[5]["p"]
    assert real_table.auprc_draws(rows, "request") is None


def test_words_learn_what_words_tell_and_throughout_says_harmful():
    train = [{"input": format_input(f"{word} {i}"), "output": format_answers(verdict)}
             for i in range(6) for word, verdict in (("bomb", H), ("cake", U))]
    asked = [{"input": format_input("a bomb"), "output": H},
             {"input": format_input("a cake"), "output": U}]
    rows = real_table.words_guard(asked, "t", train)
    assert [row["verdict"]["request"] for row in rows] == [H, U]
    assert rows[0]["p"]["request"] > 0.5 > rows[1]["p"]["request"]
    assert rows[0]["verdict"]["response"] is None           # nobody labelled a response
    (result,) = real_table.score_cases(real_table.throughout(asked, "t"), "t")
    assert (result["f1"], result["false_positive_rate"]) == (pytest.approx(200 / 3), 100)


# ------------------------------------------------------------------ the whole recipe
THINGS = "lamp door pump gate horn bell fan oven saw drill radio clock".split()
KINDS = (("Requests", "{} the {} now please", None),
         ("Responses", "how do I {} my {}", "Press it."))


def answer(word, response):
    """A trace as a tiny model can learn it; the word is the last task's verdict."""
    step = "## Reasoning Step"
    if response is None:
        return f"# Task 1\n{step} 1: Look.\n{step} 2: So {word}.\n\n{format_answers(word)}"
    return (f"# Task 1\n{step} 1: So {H}.\n\n# Task 2\n{step} 1: So {C}.\n\n"
            f"# Task 3\n{step} 1: So {word}.\n\n{format_answers(H, C, word)}")


def exchanges(wording, response, seed):
    """[(exchange, word)] of all things; half of the words are harmful, and nothing tells which."""
    words = [H, U] * len(THINGS)
    random.Random(seed).shuffle(words)
    return [(format_input(wording.format(("start", "stop")[n % 2], THINGS[n // 2]), response), word)
            for n, word in enumerate(words)]


def write_base(folder):
    """A base model that knows the form of the answers, and guesses."""
    records = [{"instruction": INSTRUCTION, "input": exchange, "output": answer(word, response)}
               for _, wording, response in KINDS
               for exchange, word in exchanges("please " + wording, response, seed=5)]
    write_json(folder / "base.json", records)
    train_sft.main(["--model", str(ROOT / "toy/model"), "--data", str(folder / "base.json"),
                    "--out", str(folder / "base"), "--lr", "4e-3", "--epochs", "6",
                    "--batch-size", "4", "--dtype", "float32", "--device", "cpu"])
    return folder / "base"


def write_predictions(folder, seed):
    """Answers of a made-up model to two benchmarks, a tenth of them wrong."""
    mistakes = random.Random(seed)
    for name, wording, response in KINDS:
        lines = []
        for exchange, word in exchanges(wording, response, seed=0):
            said = word if mistakes.random() < 0.9 else {H: U, U: H}[word]
            lines.append({"prompt": f"{INSTRUCTION}\n{exchange}", "label": word,
                          "predict": answer(said, response)})
        path = folder / name / "generated_predictions.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_tests(folder):
    """Two tests; the first has one prompt that was answered, and one that nearly was."""
    prompts = ["start the lamp now please", "stop the lamp now please today", "eat", "drink"]
    alpha = [(format_input(prompt), word) for prompt, word in zip(prompts, [H, U, H, U])]
    beta = [(format_input(f"try {n}", "Sure."), word) for n, word in enumerate([H, U, H, U])]
    paths = []
    for name, rows in (("alpha", alpha), ("beta", beta)):
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps([
            {"instruction": INSTRUCTION, "input": exchange, "output": word}
            for exchange, word in rows]))
    return paths


SCRIPTS = {"train_sft.py": train_sft.main, "train_dpo.py": train_dpo.main,
           "mine_hard.py": mine_hard.main, "eval.py": evaluation.main}


def run_here(script, options):
    """real.run without a process of its own, which takes seconds to begin."""
    SCRIPTS[script](options)


def run_until_eval(script, options):
    if script == "eval.py":
        raise KeyboardInterrupt
    run_here(script, options)


def test_the_whole_recipe(tmp_path, capsys, monkeypatch):
    folders = [write_predictions(tmp_path / name, seed) for seed, name in enumerate("AB")]
    tests = write_tests(tmp_path)
    data = tmp_path / "data"
    real.main(["data", "--predictions", *map(str, folders), "--tests", *map(str, tests),
               "--out", str(data), "--dev", "0.2"])
    said = capsys.readouterr().out
    assert "2 of 47 left out" in said, said
    found = read_json(data / "data.json")
    assert found["overlaps"]["alpha"]["exact"] == found["overlaps"]["alpha"]["near"] == 1
    assert found["records"]["both"] == 2 * found["records"]["traces"]
    traces, chains, mixed = (read_records(data / f"{name}.json")
                             for name in ("traces", "two_chains", "shuffled"))
    assert len(traces) < len(chains) <= 2 * len(traces)
    own = {r["input"]: gold_verdict(r) for r in traces}
    assert all(gold_verdict(r) == own[r["input"]] for r in mixed)
    assert not {r["input"] for r in read_records(data / "dev.json")} & set(own)

    out = tmp_path / "out"
    options = ["--model", str(write_base(tmp_path)), "--data", str(data), "--out", str(out),
               "--max-new-tokens", "100", "--batch-size", "8", "--epochs", "1", "--mine", "16",
               "--dtype", "float32", "--device", "cpu", "--lr", "1e-3"]
    monkeypatch.setattr(real, "run", run_until_eval)        # a kill, after training
    with pytest.raises(KeyboardInterrupt):
        real.main(["arm", "r_sft", *options, "--seed", "3"])
    capsys.readouterr()

    monkeypatch.setattr(real, "run", run_here)
    real.main(["all", *options, "--seed", "3"])
    said = capsys.readouterr().out
    trained = re.findall(r"^\$ python train_\w+.py .* --out \S+/(\w+)_seed3/model ", said, re.M)
    assert trained == [name for name in real.ARMS if name not in ("r_sft", "r_sft_fast")]
    table = read_json(out / "table.json")
    assert {row["guard"] for row in table["rows"]} == {*real.ARMS, "throughout", "words"}
    assert len(table["rows"]) == 2 * (len(real.ARMS) + 2)
    for row in table["rows"]:
        for figure in ("f1", "false_positive_rate"):
            assert row[f"{figure}_ci95"][0] <= row[figure] <= row[f"{figure}_ci95"][1]
        if row["guard"] != "throughout":                    # which has no P
            assert row["auprc_ci95"][0] <= row["auprc"] <= row["auprc_ci95"][1]
    for row in table["rows"]:
        if row["seeds"]:
            results = read_json(out / f"{row['guard']}_seed3/eval/{row['test']}/results.json")
            assert row["f1"] == pytest.approx(results[0]["f1"])
            for figure in ("auprc", "false_positive_rate"):
                assert row[figure] == pytest.approx(results[0][figure])
    pairs = [(d["figure"], d["guard"], d["minus"]) for d in table["differences"] if d["test"] == "alpha"]
    wanted = real_table.contrasts([*real.ARMS, "throughout", "words"])
    assert len(wanted) == len(real_table.CONTRASTS) + 2 * len(real.ARMS) + 1 and ("words", "throughout") in wanted
    assert pairs == [(figure, *pair) for figure in real_table.DRAWS for pair in wanted
                     if figure not in ("auprc", "best_f1") or "throughout" not in pair]    # which has no P
    assert table["parents"]["parent_seed3"]["parent"] in real.REASONING
    assert "| hs_dpo - parent | " in said
    ElementTree.parse(out / "table.svg")

    beside = shutil.copy(out / "said.jsonl", tmp_path / "said.jsonl")
    capsys.readouterr()
    real.main(["table", "--data", str(data), "--out", str(out), "--beside", str(beside)])
    compared = read_json(out / "table.json")
    assert compared["rows"][:len(real.ARMS)] == table["rows"][:len(real.ARMS)]
    assert "| labels_1x, seed 3, float32 |" in capsys.readouterr().out
    assert (out / "said.jsonl").read_text() == Path(beside).read_text()         # of the arms alone
    found = {(d["test"], d["guard"], d["minus"], d["figure"]): (d["difference"], *d["ci95"]) for d in compared["differences"]}
    for test in ("alpha", "beta"):
        for name in real.ARMS:                              # what was written is what was said
            for figure in real_table.DRAWS:
                low, high = found[test, name, f"{name}, seed 3, float32", figure][1:]
                assert low == high == 0, (test, name, figure)
    assert found["alpha", "labels_3x", "labels_1x", "f1"] == pytest.approx(
        tuple(-x for x in np.array(found["alpha", "labels_1x", "labels_3x, seed 3, float32", "f1"])[[0, 2, 1]]))
    lines = [json.loads(line) for line in Path(beside).read_text().splitlines()]
    n = lines[0]["n"]
    fewer = {"n": n - 1, "said": lines[0]["said"][1:], "p": lines[0]["p"][1:]}
    for spoilt, says in [({"hash": "another"}, "is about another test"), (fewer, f"says {n - 1} verdicts on the request, where {n} records"),
                         ({"seed": 4}, ""), *(({name: value}, "is no line of a said.jsonl") for name, value in [
                             ("said", "1"), ("said", 5), ("said", "?" * n), ("p", [2.0] * n), ("p", None), ("p", [0.5]), ("task", "x"), ("task", []),
                             ("n", 10 ** 12), ("n", None), ("f1", "x")])]:
        write_json(tmp_path / "spoilt.json", [{**lines[0], **spoilt}])
        command = ["table", "--data", str(data), "--out", str(out), "--beside", str(tmp_path / "spoilt.json")]
        if says:
            with pytest.raises(InputError, match=says):
                real.main(command)
        else:
            real.main(command)
            assert "spoilt.json: says nothing about beta" in capsys.readouterr().err
            with pytest.raises(InputError, match="labels_1x, seed 4, float32 is in a file before it, too"):
                real.main([*command, command[-1]])
            write_json(tmp_path / "spoilt.json", 2 * [{**lines[0], **spoilt}])
            with pytest.raises(InputError, match="record 2 says again"):
                real.main(command)

    real.main(["all", *options, "--seed", "3"])             # nothing is done again
    assert "$ python" not in capsys.readouterr().out
    with pytest.raises(InputError, match="epochs = 1, not 4"):
        real.main(["arm", "r_sft", *options, "--seed", "3", "--epochs", "4"])
    with pytest.raises(InputError, match="limit = None, not 5"):                # of another arm: could not be compared
        real.main(["arm", "labels_1x", *options, "--seed", "4", "--limit", "5"])
    other = next(name for name in real.REASONING if name != table["parents"]["parent_seed3"]["parent"])
    with pytest.raises(InputError, match=f"not '{other}'"):
        real.main(["arm", "chosen", *options, "--seed", "3", "--parent", other])
    namesake = tmp_path / "later" / "alpha.json"            # another test of the same name
    namesake.parent.mkdir()
    namesake.write_text(json.dumps(read_records(tests[0])[:3]))
    with pytest.raises(InputError, match="answers to another test of this name; rename .*later/alpha.json"):
        real.main(["arm", "r_sft", *options, "--seed", "3", "--tests", str(namesake)])
    write_json(out / "r_sft_seed3_old/eval/alpha/results.json", [])             # a folder of the user's
    for rows in (read_records(tests[0])[:3], read_records(tests[0])[::-1]):     # fewer, or as many in another order
        namesake.write_text(json.dumps(rows))
        with pytest.raises(InputError, match="answers to another test of this name; rename .*later/alpha.json"):
            real.main(["table", "--data", str(data), "--out", str(out), "--tests", str(namesake)])
    odd = tmp_path / "later" / "odd.json"                   # its labels are mended, then it is answered
    odd.write_text(tests[0].read_text().replace('"harmful"', '"bad"').replace('"unharmful"', '"good"'))
    with pytest.raises(InputError, match="odd.json: no record has a label"):       # before anything is trained
        real.main(["arm", "labels_1x", *options, "--seed", "9", "--tests", str(odd)])
    assert not list(out.glob("*_seed9"))
    write_json(out / "r_sft_seed3/eval/odd/test.json", {"hash": "of the odd one"})
    odd.write_text(tests[0].read_text())
    real.main(["arm", "r_sft", *options, "--seed", "3", "--tests", str(odd)])
    assert (out / "r_sft_seed3/eval/odd/results.json").exists()
    real.main(["arm", "r_sft", *options, "--seed", "3", "--tests", str(odd)])      # it is known by its own hash now
    with pytest.raises(InputError, match="two files are called 'alpha'"):
        real.main(["arm", "r_sft", *options, "--tests", str(namesake), str(tests[0])])
    with pytest.raises(InputError, match="two files are called 'alpha'"):          # whose figures would be one's
        real.main(["data", "--predictions", "p", "--tests", str(tests[0]), "--leave-out", str(namesake), "--out", str(tmp_path / "x")])
    (data / "tests" / "gone.json").touch()                  # not a test that `data` was told of
    with pytest.raises(InputError, match=r"\.json: is there and holds something else"):
        real.main(["data", "--predictions", *map(str, folders), "--tests", *map(str, tests),
                   "--out", str(data), "--dev", "0.2", "--seed", "7"])
    settings = read_json(out / "settings.json")
    for other in ({**settings, "data": "other"}, {}):
        write_json(out / "settings.json", other)
        with pytest.raises(InputError, match="trained on other data"):
            real.main(["table", "--data", str(data), "--out", str(out)])
    write_json(out / "settings.json", settings)
    write_json(data / "traces.json", read_json(data / "traces.json")[:3])       # after it was claimed
    for command in (["arm", "r_sft", *options], ["table", "--data", str(data), "--out", str(out)]):
        with pytest.raises(InputError, match="is not as `tools/real.py data` wrote it"):
            real.main(command)


def test_one_model_is_not_two(tmp_path):
    folder = write_predictions(tmp_path / "A", 1)
    (tmp_path / "B").symlink_to(folder)
    for other in ("A/", "B", "."):
        with pytest.raises(InputError, match="is in two folders of --predictions"):
            real.read_pool([str(folder), f"{tmp_path}/{other}"])


def test_arms_of_one_folder_have_one_base(tmp_path):
    args = SimpleNamespace(out=tmp_path / "out", data=tmp_path, model=str(tmp_path / "base"), lr=1, dpo_lr=1, epochs=1,
                           batch_size=1, mine=1, limit=None, max_new_tokens=1, dtype=None)
    write_json(tmp_path / "data.json", {"records": {}, "hash": real.hash_of({})})
    weights = tmp_path / "base/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"some")
    real.claim(args)
    real.claim(args)
    weights.write_bytes(b"others")                          # in the same folder
    with pytest.raises(InputError, match="settings.json: was made with weights_hash = '.*', not '.*'; choose another --out"):
        real.claim(args)
    settings = read_json(args.out / "settings.json")
    del settings["weights_hash"]                            # as it was written before this was known
    write_json(args.out / "settings.json", settings)
    real.claim(args)


@pytest.mark.parametrize("told", [[], {}, {"parent": "labels_1x"}, {"parent": ["r_sft"]}])
def test_a_parent_that_is_none_is_named(tmp_path, told):
    write_json(tmp_path / "parent_seed1.json", told)
    with pytest.raises(InputError, match="parent_seed1.json: "):
        real.parent_of(SimpleNamespace(out=tmp_path, seed=1, parent=None))


def test_where_no_prompt_was_hard_it_is_said(tmp_path):
    args = SimpleNamespace(out=tmp_path, seed=1, parent=None)
    write_json(tmp_path / "parent_seed1.json", {"parent": "r_sft"})
    (tmp_path / "mined_r_sft_seed1").mkdir()
    (tmp_path / "mined_r_sft_seed1/hard.jsonl").touch()
    for arm in (real.mine, real.pairs_of):
        with pytest.raises(InputError, match="no prompt was hard, .* a higher --mine wants another --out"):
            arm(args)


def test_where_no_prompt_was_hard_the_other_arms_and_seeds_are_run(tmp_path, monkeypatch, capsys):
    ran = []

    def run_arm(args, name):
        if name in real.AFTER and args.seed == 1:
            raise real.NothingHard("hard.jsonl: no prompt was hard")
        ran.append((name, args.seed))

    monkeypatch.setattr(real, "run_arm", run_arm)
    monkeypatch.setattr(real, "table", lambda args: ran.append("table"))
    monkeypatch.setattr(real, "report_overlap", lambda args: None)
    monkeypatch.setattr(real, "check_tests", lambda args: None)
    options = ["--model", "toy/model", "--data", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(InputError, match="not run, as no prompt was hard: hs_dpo, seed 1; chosen, seed 1"):
        real.main(["all", "--arms", "hs_dpo", "labels_1x", "chosen", "--seed", "1", "2", *options])
    assert ran == [("labels_1x", 1), ("hs_dpo", 2), ("labels_1x", 2), ("chosen", 2), "table"]
    with pytest.raises(real.NothingHard):
        real.main(["arm", "hs_dpo", *options])


def test_data_replaces_nothing_but_what_it_wrote(tmp_path):
    folder = write_predictions(tmp_path / "A", 0)
    tests = write_tests(tmp_path)
    out = tmp_path / "data"
    command = ["data", "--predictions", str(folder), "--tests", *map(str, tests), "--out", str(out), "--dev", "0.2"]
    for path, text, says in (
            (out / "data.json", '{"my": "notes"}', "data.json: is there, and was not made here; choose another --out"),
            (out / "tests/alpha.json", "mine", "tests/alpha.json: is there, and is not .*/alpha.json; choose another")):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            real.main(command)
        assert path.read_text() == text
        path.unlink()
    for _ in range(2):                                      # its own may be made again
        real.main(command)
    own = str(out / "tests/alpha.json")                     # its own copy; and two lists are one
    real.main([*command[:3], "--tests", own, "--tests", str(tests[1]), *command[6:]])
    assert read_json(out / "data.json")["tests"] == ["alpha.json", "beta.json"]
    arm = ["arm", "r_sft", "--model", "toy/model", "--data", str(out), "--out", str(tmp_path / "out")]
    told = read_json(out / "data.json")
    for spoilt, says in (({}, "is not as `tools/real.py data` wrote it"), ({**told, "records": 5}, "is not as"),
                         ({**told, "tests": None}, "data.json: does not name the tests; give --tests")):
        write_json(out / "data.json", spoilt)
        with pytest.raises(InputError, match=says):
            real.main(arm)
    write_json(out / "data.json", told)
    for spoilt in ([{"x": 1}], {"x": 1}):
        write_json(out / "prompts.json", spoilt)
        with pytest.raises(InputError, match="is not as `tools/real.py data` wrote it"):
            real.main([*arm, "--tests", str(tests[0])])


def test_copies_of_tests_and_their_names(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[]")
    assert real.copy_of(path, tmp_path / "tests") == "a.json"
    assert real.copy_of(tmp_path / "tests/a.json", tmp_path / "tests") == "a.json"     # itself
    real.check_names([path, tmp_path / "b.json"])
    for name in ("other/a.json", "dev.json"):
        with pytest.raises(InputError, match="two files are called"):
            real.check_names([path, tmp_path / name])


def test_rates_follow_from_the_width_and_from_each_other(tmp_path):
    write_json(tmp_path / "config.json", {**read_json(ROOT / "toy/model/config.json"), "hidden_size": 2048,
                                          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64})
    options = ["arm", "r_sft", "--model", str(tmp_path), "--data", "d", "--out", "o"]
    rates = lambda *more: (lambda a: (a.lr, a.dpo_lr))(real.parse_arguments([*options, *more]))
    assert rates() == (8.4e-5, 5.6e-6)                      # 3e-4 * 576 / 2048, and a fifteenth
    assert rates("--lr", "3e-3") == (3e-3, 2e-4) and rates("--lr", "0") == (0, 0)
    assert rates("--dpo-lr", "1e-6") == (8.4e-5, 1e-6)


def test_a_script_runs_in_a_process_of_its_own(capfd):
    real.run("train_sft.py", ["--help"])
    assert capfd.readouterr().out.startswith("usage: train_sft.py")
    with pytest.raises(SystemExit) as end:
        real.run("eval.py", ["--model", "nowhere"])
    assert end.value.code == 2                              # that of argparse: --data is missing


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_when_a_script_is_done_ends_the_recipe_all_the_same(tmp_path, number):
    script = tmp_path / "script.py"                         # which ends with 0, as a trainer that had just saved
    script.write_text(f"import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
                      f"os.kill(os.getppid(), signal.{number})\ntime.sleep(1)\n")
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as end:
        real.run(script, [])
    signal.signal(signal.SIGINT, ours)
    assert end.value.code == 128 + getattr(signal, number)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_script_save(tmp_path, number):
    """The script sends the signal to us; a terminal would send Ctrl-C to both."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, pathlib, signal, sys, time

def save(*args):
    time.sleep(0.5)                                         # longer than subprocess.run would wait
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(7)

signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.{number})
if "{number}" == "SIGINT":
    save()
time.sleep(20)
""")
    before = signal.getsignal(signal.SIGTERM)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)     # a trainer leaves its own
    with pytest.raises(SystemExit) as end:
        real.run(script, [])
    signal.signal(signal.SIGINT, ours)
    assert end.value.code == 7 and (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before
