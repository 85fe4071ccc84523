"""All four stages through their command lines, as a user runs them."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def script(name, *arguments, code=0):
    done = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_four_stages_end_in_a_table(tmp_path):
    common = ["--device", "cpu", "--dtype", "float32", "--limit", "16"]
    script("train_sft.py", "--data", "toy/train_wildguard.json", "--out", tmp_path / "sft", "--lr", "2e-3", "--epochs", 60,
           "--batch-size", 16, *common)
    mined = script("mine_hard.py", "--model", tmp_path / "sft", "--data", "toy/train_wildguard.json", "--out",
                   tmp_path / "hard", "--max-new-tokens", 160, *common)
    assert "of 16 prompts hard" in mined and "answers without verdict" in mined
    pairs = [json.loads(line) for line in (tmp_path / "hard/hard.jsonl").read_text().splitlines()]
    assert pairs and {"instruction", "input", "chosen", "rejected", "weight", "k_correct", "k_incorrect", "source"} == pairs[0].keys()
    script("train_dpo.py", "--model", tmp_path / "sft", "--data", tmp_path / "hard/hard.jsonl", "--out", tmp_path / "dpo",
           "--lr", "1e-4", "--batch-size", 8, *common)
    table = script("eval.py", "--model", tmp_path / "dpo", "--data", "toy/test.json", "--out", tmp_path / "eval",
                   "--max-new-tokens", 160, *common)
    assert "prompt harmfulness" in table and "weighted average" in table
    for folder in ("sft", "dpo"):                                                  # what other engines need to load and stop
        names = {p.name for p in (tmp_path / folder).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


@pytest.mark.parametrize("name, arguments, says", [
    ("train_sft.py", ["--data", "nowhere.json"], "nowhere.json: cannot read"),
    ("train_sft.py", ["--model", "nowhere", "--data", "toy/dev.json"], "nowhere"),
    ("train_dpo.py", ["--model", "toy/model", "--data", "toy/dev.json"], "has no text in field 'chosen'"),
    ("mine_hard.py", ["--model", "toy/model", "--data", "toy/dev.json", "--device", "warp"], "--device warp"),
    ("eval.py", ["--model", "toy/model", "--data", "nowhere.json", "--out", "x"], "nowhere.json: cannot read"),
    ("eval.py", ["--predictions", "README.md"], "line 1 is not valid JSON"),
    ("data.py", ["toy/dev.json", "--number", "5000"], "has no record 5000")])
def test_a_mistake_ends_in_one_line_and_no_traceback(tmp_path, name, arguments, says):
    out = [] if name in ("eval.py", "data.py") else ["--out", tmp_path / "x"]
    message = script(name, *arguments, *out, code=1)
    assert says in message and "Traceback" not in message and len(message.strip().splitlines()) == 1
