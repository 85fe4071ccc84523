"""bench.py on the toy model: what it reports, and that it computes what it says."""
import json
import subprocess
import sys
import time

import bench
import measure
import peers
import pytest
import torch
from conftest import ROOT
from measure import Bench, random_examples

from data import Tokenizer
from model import Llama

FAST = ["--steps", 1, "--batch-size", 2, "--prompts", 2, "--new-tokens", 4, "--device", "cpu",
        "--dtype", "float32"]


def arguments(*more):
    return bench.parse_arguments([str(a) for a in [*FAST, *more]])


def test_one_command_reports_every_figure(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, bench.__file__, *FAST, "--threads", 1, "--json", path, "--items", "sft"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"date", "device", "dtype", "threads", "versions", "git", "arguments", "items"} <= result.keys()
    assert result["threads"] == 1
    assert torch.__version__.startswith(result["versions"]["torch"])           # "+cu130" may follow
    rows = {row["name"]: row for row in result["items"]}
    assert list(rows) == ["limits", "sft", "sft unshared"] and all(name in done.stdout for name in rows)
    for row in rows.values():
        assert len(row["rounds"]) == 1 and row["slowest"] == row["rate"] == row["fastest"] > 0
        assert 0 < row["of_gemm"] < 1.5 and 0.05 < row["peak_memory"] < 16
    ours, other = rows["sft"], rows["sft unshared"]
    assert other["ratio"] == pytest.approx(ours["rate"] / other["rate"]) and "ratio" not in ours
    assert ours["rounds"][0]["units"] == other["rounds"][0]["units"]           # each sequence standing alone
    assert ours["rounds"][0]["work"] < other["rounds"][0]["work"]


@pytest.mark.parametrize("which", [[], ["--shape", "tiny", "--items", "sft", "dpo", "generate"]])
def test_every_item_of_ours_runs(which):
    args = arguments(*which)
    for name in set(bench.chosen(args)) - {"limits", "sft", "sft unshared"}:
        result = bench.ITEMS[name][0](Bench(args))
        assert result["units"] > 0 and result["seconds"] > 0 and result["flops"] >= 0, name
        if name == "generate":
            assert result["units"] == 2 * 4 * 4                                # prompts, samples, tokens


def test_sft_loss_is_the_plain_mean():
    b = Bench(arguments("--warm", 0))
    (batch,), _ = b.batches()
    model, total, count = Llama.from_pretrained(b.args.model, "cpu", torch.float32), 0.0, 0
    for e in batch:
        tokens = torch.tensor(e.prompt + e.answers[0])
        logits = model(tokens, torch.full_like(tokens, len(tokens))) @ model.head.T
        scored, targets = logits[len(e.prompt) - 1:-1], tokens[len(e.prompt):, None]
        logprobs = scored.log_softmax(-1).gather(1, targets)
        total, count = total - logprobs.sum().item(), count + len(logprobs)
    for share in (True, False):
        result = measure.sft(b, share)
        assert result["losses"] == pytest.approx([total / count], rel=1e-5)
        assert result["units"] == sum(len(e.prompt) + len(e.answers[0]) for e in batch)
        assert result["flops"] == 6 * sum(p.numel() for p in model.parameters()) * result["units"]


def test_work_of_one_sequence_by_hand():
    b = Bench(arguments("--shape", "tiny"))
    pack = measure.pack([measure.Example([1, 2, 3], [[4, 5]])], 100)[0]  # the end mark is never fed
    assert len(pack.tokens) == 4 and len(pack.rows) == 2
    layer = 64 * 16 * (4 + 2) * 2 + 3 * 64 * 96
    assert b.work([pack], 1) == 2 * (4 * 2 * layer + 2 * 96 * 64) + 4 * (1 + 2 + 3 + 4) * 2 * 4 * 16


def test_random_examples_have_the_lengths_of_guard_data():
    examples = random_examples(4000, 1, 50)
    S = torch.tensor([len(e.prompt) + len(e.answers[0]) for e in examples]).double()
    assert S.mean().item() == pytest.approx(600, rel=0.03) and S.max() <= 2048
    assert (S.square().mean() / S.mean() ** 2).item() == pytest.approx(1.27, rel=0.03)
    equal = random_examples(9, 2, 50, 777)
    assert {len(e.prompt) + len(a) for e in equal for a in e.answers} == {777}


def test_errors_and_time(tmp_path, capsys):
    assert bench.run_child([], "sft", 1)["error"] == "left out: --minutes are over"
    result = bench.main([*FAST, "--minutes", 0, "--items", "sft"])
    assert all("minutes" in row["rounds"][0]["error"] for row in result["items"])
    assert "left out" in capsys.readouterr().out
    failed = bench.run_child([*map(str, FAST), "--model", str(tmp_path)], "sft", None)
    assert "config.json: cannot read" in failed["error"]
    assert failed["error"] in failed["stderr"]
    with pytest.raises(SystemExit, match="none of"):
        bench.main(["--items", "sftt"])
    with pytest.raises(SystemExit, match="'sgt trl' is none of"):
        bench.main(["--items", "sgt trl"])
    with pytest.raises(SystemExit, match="'sft trl' needs --peers"):
        bench.main(["--items", "sft trl"])


def test_a_fault_on_cuda_is_told_by_its_own_line_and_not_by_the_advice_after_it():
    fault = ["Traceback (most recent call last):", '  File "a.py", line 1', "  raise SomeError: no",
             "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
             "CUDA kernel errors might be asynchronously reported at some other API call.",
             "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."]
    assert bench.error_line("\n".join(fault)) == fault[3]
    assert bench.error_line("killed\n") == "killed"
    assert bench.error_line("") == ""


def rounds(ours, other):
    same = {"unit": "tokens", "seconds": 1.0, "parameters": 1e9, "peak_memory": 2.0, "cold_start_seconds": 50}
    run = lambda rate: {**same, "units": rate, "rate": rate, "flops": 10 * rate, "work": 8 * rate}
    return {"limits": {"rate": 2000.0, "copy": 1.0}, "sft": run(ours), "sft unshared": run(other)}


def test_goals_follow_from_the_limits_of_the_same_round():
    row = bench.summarize("sft", [rounds(100.0, 80.0), rounds(180.0, 60.0)], True)
    assert row["rate"] == 140 and row["of_gemm"] == pytest.approx(0.7)
    least = pytest.approx(0.63 * 2000 / 8)
    assert row["goals"] == [{"goal": "G2", "what": "rate", "asked": least, "met": False},
                            {"goal": "G12", "what": "cold_start", "asked": 60, "met": True}]
    assert "G2 158/s missed; G12 60 s met" in bench.show(row)
    other = bench.summarize("sft unshared", [rounds(100.0, 80.0), rounds(180.0, 60.0)], False)
    assert other["ratio"] == pytest.approx((1.25 + 3) / 2) and "goals" not in other


def test_trl_is_given_the_prompt_that_we_train_on():
    b = Bench(arguments("--model", ROOT / "toy/model"))
    batches, records = b.batches(pairs=True)
    rows = peers.trl_rows(b, batches, records, pairs=True)
    t = Tokenizer.from_pretrained(b.args.model)
    for example, row in zip([e for some in batches for e in some], rows, strict=True):
        assert t.template_ids(t.split_control(row["prompt"])) == example.prompt
        for answer, name in zip(example.answers, ("chosen", "rejected")):
            assert t.template_ids(t.split_control(row[name])) == answer


def test_processor_time_stands_while_nothing_is_computed():
    seconds = {}
    for flags in ([], ["--processor-time"]):
        b = Bench(arguments("--shape", "tiny", *flags))
        began = b.now()
        time.sleep(0.2)
        seconds[len(flags)] = b.now() - began
    assert seconds[0] >= 0.2 and seconds[1] < 0.1
