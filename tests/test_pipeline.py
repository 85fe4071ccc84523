"""All four stages through their command lines, as a user runs them."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import write_records


def script(name, *arguments, code=0):
    done = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_four_stages_end_in_a_table(tmp_path):
    # short answers: soon the form is learned and the verdicts are guesses, so prompts are hard
    data, common = write_records(tmp_path / "short.jsonl", 24), ["--device", "cpu", "--dtype", "float32"]
    script("train_sft.py", "--data", data, "--out", tmp_path / "sft", "--lr", "3e-3", "--epochs", 10, "--batch-size", 12,
           *common)
    mined = script("mine_hard.py", "--model", tmp_path / "sft", "--data", data, "--out", tmp_path / "hard",
                   "--max-new-tokens", 24, *common)
    assert "of 24 prompts hard" in mined and "answers without verdict" in mined
    pairs = [json.loads(line) for line in (tmp_path / "hard/hard.jsonl").read_text().splitlines()]
    assert pairs and {"instruction", "input", "chosen", "rejected", "weight", "k_correct", "k_incorrect", "source"} == pairs[0].keys()
    said = script("train_dpo.py", "--model", tmp_path / "sft", "--data", tmp_path / "hard/hard.jsonl", "--out",
                  tmp_path / "dpo", "--lr", "1e-4", "--batch-size", 8, *common)
    assert "accuracy" in said
    table = script("eval.py", "--model", tmp_path / "dpo", "--data", "toy/test.json", "--out", tmp_path / "eval",
                   "--limit", 16, "--max-new-tokens", 24, *common)
    assert "prompt harmfulness" in table and "weighted average" in table
    said_of = (ROOT / "docs/REFERENCE.md").read_text()                                # every field has its line there
    steps = [json.loads((tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()[1]) for name in ("sft", "dpo")]
    for row in steps + json.loads((tmp_path / "eval/results.json").read_text()):
        assert not [key for key in row if f"`{key}`" not in said_of]
    for folder in ("sft", "dpo"):                                                  # what other engines need to load and stop
        names = {p.name for p in (tmp_path / folder).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


@pytest.mark.parametrize("name, arguments, says", [
    ("train_sft.py", ["--data", "nowhere.json"], "nowhere.json: cannot read"),
    ("train_sft.py", ["--model", "nowhere", "--data", "toy/dev.json"], "nowhere"),
    ("train_dpo.py", ["--model", "toy/model", "--data", "toy/dev.json"], "has no text in field 'chosen'"),
    ("mine_hard.py", ["--model", "toy/model", "--data", "toy/dev.json", "--device", "warp"], "--device warp"),
    ("eval.py", ["--model", "toy/model", "--data", "nowhere.json", "--out", "nowhere"], "nowhere.json: cannot read"),
    ("eval.py", ["--predictions", "README.md"], "line 1 is not valid JSON"),
    ("data.py", ["toy/dev.json", "--number", "5000"], "has no record 5000")])
def test_a_mistake_ends_in_one_line_and_no_traceback(tmp_path, name, arguments, says):
    out = [] if name in ("eval.py", "data.py") else ["--out", tmp_path / "x"]
    message = script(name, *arguments, *out, code=1)
    assert says in message and "Traceback" not in message and len(message.strip().splitlines()) == 1
