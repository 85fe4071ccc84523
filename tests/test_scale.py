"""scale.py on few records: every line is measured, on records that are as long as real ones."""
import json

import numpy as np
import pytest
import scale

from data import Tokenizer, encode_records, parse_records, read_records
from mine_hard import judge_by_all_fields


def test_one_command_measures_every_line(capsys):
    small, large = scale.main(["--records", "20", "40", "--batch-size", "8", "--rate", "1000"])
    names = ["read records", "encode", "start a run", "steps", "references", "read samples", "select"]
    for result, n, steps in ((small, 20, 3), (large, 40, 5)):
        assert [row["name"] for row in result["rows"]] == names
        assert (result["records"], result["steps"]) == (n, steps) and result["tokens"] > 100 * n
        for row in result["rows"]:
            assert row["seconds"] > 0 and row["a_record"] == pytest.approx(1e6 * row["seconds"] / n)
            assert 0 < row["gib"] < 4 and 0 <= row["above"] < 1
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in names)
    seconds = small["rows"][3]["seconds"]
    assert f"{1000 * seconds / 3:.1f} ms of a step" in said
    assert f"{100 * seconds * 1000 / small['tokens']:.2f}% of the model's time at 1,000 tokens a second" in said


def test_generated_records_are_as_long_as_real_ones(tmp_path):
    scale.write_data(tmp_path, 300)
    records = read_records(tmp_path / "records.json")
    assert np.mean([len(r["input"]) for r in records]) == pytest.approx(scale.REQUEST, rel=0.15)
    assert np.mean([len(r["output"]) for r in records]) == pytest.approx(scale.TRACE, rel=0.15)
    lines = [line for _, line in parse_records(tmp_path / "samples.jsonl")]
    assert [line["prompt"] for line in lines] == list(range(300))
    right = [judge_by_all_fields(line["samples"], dict(request="harmful", completion=None, response=None)) for line in lines]
    assert {sum(of_prompt) for of_prompt in right} == {0, 1, 2, 3, 4}      # some hard, some all right, some all wrong


def test_an_epoch_has_every_token_once(tmp_path):
    scale.write_data(tmp_path, 9, seed=1)
    tokenizer = Tokenizer.from_pretrained("toy/model")
    examples, _ = encode_records(tokenizer, read_records(tmp_path / "records.json"), 10 ** 6)
    assert len(examples) == 9
    args = scale.SimpleNamespace(out=str(tmp_path / "out"), lr=1e-3, max_tokens=2000)
    tokens = scale.steps(examples, [[0, 1, 2, 3], [4, 5, 6, 7], [8]], args)
    assert tokens == sum(len(e.prompt) + len(e.answers[0]) for e in examples)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()[1:]
    assert sum(json.loads(line)["tokens"] for line in lines) == tokens
    reference = scale.references(examples, scale.SimpleNamespace(max_tokens=2000, no_share=False))
    assert reference.shape == (9, 2) and not reference.any()
