"""The ablation's own arithmetic, and a small form of it from end to end."""
import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import ablation
import ablation_table
import mine_hard
import numpy as np
import pytest
from ablation_table import CONTRASTS, GRIDS, VARIANTS, groups_of, interval, mean_f1
from conftest import ROOT

from data import InputError, gold_verdict, read_json, write_json
from eval import f1
from make_toy import make_corpus


def test_mean_f1_equals_the_scorers():
    rng = np.random.default_rng(3)
    table = np.stack([rng.integers(-1, 2, (80, 3)), rng.integers(0, 2, (80, 3))], -1)
    want = []
    for task in range(3):
        rows = [(g, g if ok else None) for g, ok in table[:, task] if g >= 0]       # wrong: as good as no verdict
        want.append(f1(*zip(*rows), positive=1))
    assert abs(mean_f1(table, np.ones(80)) - np.mean(want)) < 1e-9
    twice = np.concatenate([table, table[:5]])                                    # a weight of 2 is a row twice
    weights = np.ones(80)
    weights[:5] = 2
    assert abs(mean_f1(table, weights) - mean_f1(twice, np.ones(85))) < 1e-9


def test_intervals_are_paired():
    table = np.stack([np.random.default_rng(0).integers(0, 2, (200, 3))] * 2, -1)
    table[..., 1] = np.random.default_rng(1).integers(0, 2, (200, 3))
    cell = (7, table)
    assert interval([cell], [cell]) == (0, 0, 0)                         # a model minus itself
    figure, low, high = interval([cell])
    assert low < figure < high and high - low > 3
    assert interval([cell, cell]) == (figure, low, high)                 # the same records are no new ones
    again = np.concatenate([table, table])                                        # each row twice, drawn together
    assert interval([(7, again)], groups={7: np.arange(400) % 200}) == (figure, low, high)


def test_opposite_answers_to_a_pair_are_drawn_together():
    records = make_corpus(seed=5, train=120, test=96)[0]["test"]
    counts = np.bincount(groups_of(records))
    assert set(counts) == {2, 4} and counts.sum() == 96                           # without and with responses


def test_shuffled_keeps_source_and_verdicts_and_moves_the_reasoning():
    corpus, _ = make_corpus(seed=5, train=120, test=24)
    by_source = {name: rs for name, rs in corpus.items() if name.startswith("train")}
    records = [r for rs in by_source.values() for r in rs]
    other = {r["input"]: r for r in ablation.shuffled(by_source, 1)}
    assert all(gold_verdict(other[r["input"]]) == gold_verdict(r) for r in records)
    assert sum(other[r["input"]]["output"] != r["output"] for r in records) > 0.9 * len(records)
    assert sorted(r["output"] for r in other.values()) == sorted(r["output"] for r in records)


SMALL = ["--skips", "0.25", "--train", "48", "--test", "24", "--dev", "12", "--epochs", "1", "--model", str(ROOT / "toy/model"),
         "--mine", "8", "--jobs", "1"]


def test_a_small_ablation_runs(tmp_path, capsys):
    ablation.main(["--out", str(tmp_path), *SMALL, "--variants", "labels", "shuffled", "r_sft"])
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    named = ["labels", "shuffled", "r_sft", "labels_1x", "labels_3x"]
    assert [row["variant"] for row in rows] == [*named, "r_sft", "r_sft"]
    assert all(row["ci95"][0] <= row.get("f1", row.get("difference")) <= row["ci95"][1] for row in rows)
    said = capsys.readouterr().out
    assert "| r_sft - labels |" in said
    ablation_table.main([str(tmp_path)])                                          # the same tables from the small files
    assert capsys.readouterr().out.strip() in said
    with pytest.raises(SystemExit, match="s0.25_corpus101_seed1, chosen: InputError.*no prompt was hard"):
        ablation.main(["--out", str(tmp_path), *SMALL, "--variants", "chosen", "r_sft"])
    with pytest.raises(InputError, match="was made with dev = .*choose another --out"):
        ablation.main(["--out", str(tmp_path), *SMALL, "--variants", "shuffled", "--dev", "7"])


def test_nothing_begins_after_the_time_limit(tmp_path):
    with pytest.raises(InputError, match="no answers here"):
        ablation.main(["--out", str(tmp_path), *SMALL, "--variants", "r_sft", "--minutes", "0"])


def test_tasks_wait_for_their_model_and_a_variant_runs_in_all_cells():
    args = ablation.parse_arguments(["--variants", "labels", "hs_dpo", "chosen_dev", "--corpus-seeds", "5", "6", "--skips", "0.5"])
    names = ablation.names_of(args)
    assert names == ["r_sft", "labels_1x", "labels_3x", "hs_dpo", *GRIDS["chosen_dev"]]
    first, after = ablation.tasks_of(args, names)
    assert sorted(first) == [(corpus, 1, None, f"labels_{n}x") for corpus in (5, 6) for n in (1, 3)]
    assert after == {(corpus, 1, 0.5, "r_sft"): [(corpus, 1, 0.5, name) for name in names[3:]] for corpus in (5, 6)}
    assert ablation.names_of(ablation.parse_arguments(["--variants", "shuffled"])) == ["shuffled"]


def test_workers_end_with_their_parent():
    """A worker whose parent was killed would go on with what it has, and write where nobody looks."""
    worker = "import os, time, ablation; ablation.end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {worker!r}]); sys.stdin.read()"
    place = os.pathsep.join(str(ROOT / part) for part in ("", "tools"))
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": place}) as first:
        assert int(first.stdout.readline()) > 0                                   # the worker is there
        first.kill()
        killed = time.time()
        assert first.stdout.read() == ""                                          # until the worker has ended, too
    assert time.time() - killed < 30


def test_every_variant_has_a_line_and_every_contrast_its_arms():
    for name in VARIANTS:
        assert name in ablation.__doc__
    known = {*VARIANTS}.union(*GRIDS.values())
    assert {name for pair in CONTRASTS for name in pair} <= known


CONSISTENT = "# Task 1\n## Reasoning Step 3: Aim {}, wish {}: the same.\nThe request is unharmful.\n"


@pytest.fixture
def cell(tmp_path):
    """A cell whose model has answered two prompts 8 times; nothing of it is trained."""
    args = Namespace(out=tmp_path, train=48, test=24, dev=12, mine=8, epochs=1, model=ROOT / "toy/model")
    cell = ablation.Cell(args, corpus_seed=5, seed=1, skip=0.25)
    mined, pool = cell.folder / "mined_k8", cell.everything()[:2]
    for path in (cell.folder / "r_sft/config.json", mined / "hard.jsonl"):             # made already: nothing runs
        path.parent.mkdir()
        path.write_text("{}")
    write_json(cell.folder / "pool.json", pool)
    told = lambda i, verdict: {"text": f"{i}", "finish": "stop", "verdict": verdict}
    wrong, gold = dict.fromkeys(("request", "completion", "response")), [gold_verdict(r) for r in pool]
    right = [[0, 1, 4], [0, 1, 2, 3]]                            # of eight: three, and all of the first four
    lines = [{"prompt": n, "samples": [told(i, gold[n] if i in right[n] else wrong) for i in range(8)]} for n in (0, 1)]
    mine_hard.write_lines(mined / "samples.jsonl", lines)
    return cell


def test_four_samples_are_the_first_of_eight(cell):
    pair, = cell.pairs(4)                                        # the second prompt is not hard with four
    assert (pair["input"], pair["k_correct"], pair["k_incorrect"]) == (cell.pool()[0]["input"], 2, 2)
    assert pair["chosen"] in "01" and pair["rejected"] in "23"
    assert [pair["k_correct"] for pair in cell.pairs(8)] == [3, 4]


def test_pairs_of_the_variants(cell):
    plain, = cell.pairs_for("hs_dpo")
    two, = cell.pairs_for("two_correct")
    assert two["chosen"] == plain["chosen"] and two["rejected"] in {"0", "1", "4"} - {plain["chosen"]}
    swapped, = cell.pairs_for("swapped")
    assert (swapped["chosen"], swapped["rejected"]) == (plain["rejected"], plain["chosen"])
    weights = {name: [pair["weight"] for pair in cell.pairs_for(name)] for name in ("hs_dpo_k8", "alpha_k8", "alpha_k8_flat")}
    # 5 - 3 = 2 and 4 - 4 = 0 incorrect more than correct: the larger is the harder
    assert weights["hs_dpo_k8"] == pytest.approx([1.2, 0.8]) and weights["alpha_k8"] == pytest.approx([1.9, 0.1])
    assert weights["alpha_k8_flat"] == [1, 1]
    pairs = cell.pairs(8, keep=lambda record, sample: sample["text"] != "0")
    assert [(pair["k_correct"], pair["k_incorrect"]) for pair in pairs] == [(2, 5), (3, 4)]


def test_all_answers_of_a_prompt_make_a_group(cell, monkeypatch):
    seen = []
    monkeypatch.setattr(ablation.preferences, "train", lambda *args: seen.append(args))
    for preferred in (True, False):
        cell.group("group", preferred)
    (_, _, make_groups, _, beta, sft, _), (*_, flat, _, _) = seen
    groups = make_groups(ablation.Tokenizer.from_pretrained(ROOT / "toy/model"))
    assert [(g.correct, len(g.example.answers)) for g in groups] == [(3, 8), (4, 8)]
    assert beta > 0 and flat == 0 and sft == 2


def test_which_correct_answers_are_right_for_the_right_reasons(cell):
    record = make_corpus(seed=5, train=48, test=24)[0]["train_aegis"][0]
    facts = ablation.certificate.states(ablation.certificate.read(*ablation.split_input(record["input"])))
    sample = {"text": record["output"], "verdict": gold_verdict(record)}
    assert ablation.is_consistent(record, sample) and ablation.is_sound(record, sample)
    other = {"harmful": "unharmful", "unharmful": "harmful"}[sample["verdict"]["request"]]
    assert not ablation.is_consistent(record, {**sample, "verdict": {**sample["verdict"], "request": other}})
    turned = CONSISTENT.format(*[ablation.certificate.OPPOSITE[facts[name]] for name in ("aim", "wish")])
    assert not ablation.is_sound(record, {**sample, "text": turned})       # two errors cancel


def answers_file(cell, variant, base, right, corpus=5, dev=None):
    """A file of OUT/answers: 4 records of one task, all positive, `right` of them answered right."""
    table = [[[1, int(i < right)], [-1, 0], [-1, 0]] for i in range(4)]
    dev = {} if dev is None else {"dev": [[[1, int(i < dev)], [-1, 0], [-1, 0]] for i in range(4)]}
    write_json(cell / "answers" / f"s0.5_corpus{corpus}_seed1" / f"{variant}.json", {
        "corpus": corpus, "seed": 1, "skip": 0.5, "variant": variant, "base": base, "pairs": {}, "cpu_seconds": {},
        "groups": [0, 1, 2, 3], "git": None, "test": table, **dev})


def test_a_grid_takes_the_point_that_is_best_on_dev_over_all_cells(tmp_path):
    points = GRIDS["chosen_dev"]
    for corpus, scores in ((5, [1, 2, 3, 1]), (6, [1, 4, 2, 1])):
        for point, dev in zip(points, scores):
            answers_file(tmp_path, point, "abc", right=points.index(point), corpus=corpus, dev=dev)
    found = ablation_table.read_answers(tmp_path)
    tables = ablation_table.tables_of(found)
    note, = ablation_table.choose(found, tables)
    # F1 on dev of points 1 and 2: 66.7 and 85.7, 100 and 66.7
    assert note.startswith(f"chosen_dev, s = 0.5: {points[1]} of (mean F1 on dev, 2 cells)") and f"{points[1]} 27.8" in note
    for cell in ((5, 1), (6, 1)):
        assert (tables["chosen_dev", 0.5][cell] == tables[points[1], 0.5][cell]).all()


def test_a_difference_is_over_the_cells_that_have_both(tmp_path):
    for corpus in (5, 6):
        answers_file(tmp_path, "r_sft", "abc", right=2, corpus=corpus)
    answers_file(tmp_path, "hs_dpo", "abc", right=4)
    ablation_table.main([str(tmp_path)])
    rows = read_json(tmp_path / "ablation.json")["rows"]
    f1s = {row["variant"]: row["f1"] for row in rows if "f1" in row}
    assert f1s == pytest.approx({"r_sft": 200 / 9, "hs_dpo": 100 / 3})
    difference, = [row["difference"] for row in rows if "minus" in row]
    assert difference == pytest.approx(100 / 9)


def test_one_cell_starts_from_one_model(tmp_path):
    answers_file(tmp_path, "r_sft", "abc", right=2)
    answers_file(tmp_path, "hs_dpo", "other", right=2)
    with pytest.raises(InputError, match="two R-SFT models"):
        ablation_table.main([str(tmp_path)])


def test_a_cell_whose_model_is_elsewhere_gets_nothing_new(tmp_path, capsys):
    answers_file(tmp_path, "r_sft", "abc", right=2)
    ablation.run_task(Namespace(out=tmp_path), 5, 1, 0.5, "hs_dpo")
    assert "is left out" in capsys.readouterr().out
