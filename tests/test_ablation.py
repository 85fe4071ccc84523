"""The ablation's own arithmetic, and a small form of it from end to end."""
import json
from argparse import Namespace

import ablation
import mine_hard
import numpy as np
from conftest import ROOT

from data import gold_verdict, write_json
from eval import f1
from make_toy import make_corpus


def test_mean_f1_equals_the_scorers():
    rng = np.random.default_rng(3)
    table = np.stack([rng.integers(-1, 2, (80, 3)), rng.integers(0, 2, (80, 3))], -1)
    want = []
    for task in range(3):
        rows = [(g, g if ok else None) for g, ok in table[:, task] if g >= 0]       # wrong: as good as no verdict
        want.append(f1(*zip(*rows), positive=1))
    assert abs(ablation.mean_f1(table, np.ones(80)) - np.mean(want)) < 1e-9
    twice = np.concatenate([table, table[:5]])                                    # a weight of 2 is a row twice
    weights = np.ones(80)
    weights[:5] = 2
    assert abs(ablation.mean_f1(table, weights) - ablation.mean_f1(twice, np.ones(85))) < 1e-9


def test_intervals_are_paired():
    table = np.stack([np.random.default_rng(0).integers(0, 2, (200, 3))] * 2, -1)
    table[..., 1] = np.random.default_rng(1).integers(0, 2, (200, 3))
    cell = (7, table)
    assert ablation.interval([cell], [cell]) == (0, 0, 0)                         # a model minus itself
    figure, low, high = ablation.interval([cell])
    assert low < figure < high and high - low > 3
    assert ablation.interval([cell, cell]) == (figure, low, high)                 # the same records are no new ones
    again = np.concatenate([table, table])                                        # each row twice, drawn together
    assert ablation.interval([(7, again)], groups={7: np.arange(400) % 200}) == (figure, low, high)


def test_opposite_answers_to_a_pair_are_drawn_together():
    records = make_corpus(seed=5, train=120, test=96)[0]["test"]
    counts = np.bincount(ablation.groups_of(records))
    assert set(counts) == {2, 4} and counts.sum() == 96                           # without and with responses


def test_shuffled_keeps_source_and_verdicts_and_moves_the_reasoning():
    corpus, _ = make_corpus(seed=5, train=120, test=24)
    by_source = {name: rs for name, rs in corpus.items() if name.startswith("train")}
    records = [r for rs in by_source.values() for r in rs]
    other = {r["input"]: r for r in ablation.shuffled(by_source, 1)}
    assert all(gold_verdict(other[r["input"]]) == gold_verdict(r) for r in records)
    assert sum(other[r["input"]]["output"] != r["output"] for r in records) > 0.9 * len(records)
    assert sorted(r["output"] for r in other.values()) == sorted(r["output"] for r in records)


def test_a_small_ablation_runs(tmp_path, capsys):
    ablation.main(["--out", str(tmp_path), "--skips", "0.25", "--train", "48", "--test", "24", "--epochs", "1",
                   "--model", str(ROOT / "toy/model"), "--variants", "labels", "shuffled", "r_sft", "--mine", "8"])
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["labels", "shuffled", "r_sft", "r_sft", "r_sft"]
    assert all(row["ci95"][0] <= row.get("f1", row.get("difference")) <= row["ci95"][1] for row in rows)
    assert "| r_sft - labels |" in capsys.readouterr().out


def test_four_samples_are_the_first_of_eight(tmp_path):
    args = Namespace(out=tmp_path, train=48, test=24, mine=8)
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
    pair, = cell.first_four()                                    # the second prompt is not hard with four
    assert (pair["input"], pair["k_correct"], pair["k_incorrect"]) == (pool[0]["input"], 2, 2)
    assert pair["chosen"] in "01" and pair["rejected"] in "23"
