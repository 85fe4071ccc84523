"""Two and three ranks against one: the same losses, the same weights, the same files."""
import json
import os
import subprocess
import sys

import pytest
from processes import CAN_SHARD, ROOT, rows_of, run, tiny_folder, write_pairs, write_records
from safetensors.torch import load_file

EXACT = ["--epochs", 2, "--batch-size", 5, "--lr", "1e-2", "--dtype", "float64", "--device", "cpu"]
# the short last batch of each epoch makes one pack, the others two or three: neither 2 nor 3 ranks divide them
SAVE = ["--save-every", 4]
STAGES = {"train_sft": ["--data", "toy/dev.json", "--limit", 11, "--max-tokens", 700, "--eval-data", "HELD OUT", *SAVE, *EXACT],
          "train_dpo": ["--data", "PAIRS", "--max-tokens", 400, *SAVE, *EXACT]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and the runs of one rank that the others must equal."""
    folder = tmp_path_factory.mktemp("ranks")
    short = [json.loads(line) for line in write_records(folder / "records.jsonl").read_text().splitlines()]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in short[:7]))
    write_pairs(folder / "pairs.jsonl")
    for tied in (True, False):
        tiny_folder(folder / f"model-{tied}", tied)
    return folder


def arguments(folder, name, tied, out):
    files = {"PAIRS": folder / "pairs.jsonl", "HELD OUT": folder / "held_out.jsonl"}
    return ["--model", folder / f"model-{tied}", "--out", folder / out, *(files.get(a, a) for a in STAGES[name])]


def train(folder, name, tied, out, *more, **how):
    return run(name, [*arguments(folder, name, tied, out), *more], folder / "log", **how)


def assert_same_training(folder, name, tied, other):
    one = f"{name}-{tied}"
    if not (folder / one).exists():
        train(folder, name, tied, one)
    a, b = (rows_of(folder / out) for out in (one, other))
    assert len(a) == len(b) == 6
    for x, y in zip(a, b):
        del x["computed"], y["computed"]                                           # empty packs and copies count there
        assert y == pytest.approx(x, abs=1e-9)
    assert a[0]["loss"] > a[5]["loss"] + 0.5                                       # it did train
    for file in ("model.safetensors", "step-000004/model.safetensors", "step-000004/optimizer.safetensors"):
        a, b = (load_file(folder / out / file) for out in (one, other))
        assert a.keys() == b.keys() and all((a[n] - b[n]).abs().max() < 1e-9 for n in a)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("ranks, tied, more", [(2, True, []), (3, False, ["--recompute", "--no-share"])])
def test_training_does_not_depend_on_the_number_of_ranks(folder, name, ranks, tied, more):
    train(folder, name, tied, f"{name}-{tied}-{ranks}", *more, ranks=ranks)
    assert_same_training(folder, name, tied, f"{name}-{tied}-{ranks}")


@pytest.mark.parametrize("name", STAGES)
def test_one_then_two_then_one_rank_across_two_stops(folder, name):
    out = f"{name}-stopped"
    for ranks, stop_at, step in ((1, 1, 1), (2, 3, 4)):                            # SIGTERM in the last rank alone
        said = train(folder, name, True, out, "--resume", ranks=ranks, stop_at=stop_at, code=1)
        assert said.splitlines()[-1].startswith(f"interrupted after step {step}; ")
    train(folder, name, True, out, "--resume")
    assert_same_training(folder, name, True, out)


def test_sharded_embeddings_gather_their_gradient_as_precisely_as_one_rank(folder):
    # products in bf16: an embedding that is itself cast to bf16 sums its gradient in bf16: 1e-4 off
    norm = []
    for ranks in (1, 2):
        run("train_sft", ["--model", "toy/model", "--data", "toy/dev.json", "--limit", 16, "--batch-size", 16,
                          "--max-steps", 1, "--dtype", "bfloat16", "--device", "cpu",
                          "--out", folder / f"bf16-{ranks}"], folder / "log", ranks)
        norm.append(rows_of(folder / f"bf16-{ranks}")[0]["grad_norm"])
    assert norm[1] == pytest.approx(norm[0], rel=1e-5)


@pytest.fixture(scope="module")
def guard(folder):
    """A toy guard that gives short verdicts, sometimes right and sometimes wrong."""
    run("train_sft", ["--model", "toy/model", "--data", folder / "records.jsonl", "--out", folder / "guard",
                      "--epochs", 10, "--batch-size", 6, "--lr", "3e-3", "--dtype", "float32", "--device", "cpu"],
        folder / "log")
    return folder / "guard"


GENERATE = ["--limit", 11, "--max-new-tokens", 24, "--block", 2, "--dtype", "float32", "--device", "cpu"]


def test_mining_gives_the_same_files_for_any_number_of_ranks(folder, guard):
    files = []
    for ranks in (1, 2, 3):
        out = folder / f"hard-{ranks}"
        run("mine_hard", ["--model", guard, "--data", folder / "records.jsonl", "--out", out, *GENERATE],
            folder / "log", ranks)
        files.append([(out / name).read_bytes() for name in ("samples.jsonl", "hard.jsonl")])
    assert files[0] == files[1] == files[2]
    samples, hard = (file.decode().splitlines() for file in files[0])
    assert [json.loads(line)["prompt"] for line in samples] == list(range(11)) and 0 < len(hard) < 11


def test_evaluation_gives_the_same_files_for_any_number_of_ranks(folder, guard):
    files = []
    for ranks in (1, 3):
        out = folder / f"eval-{ranks}"
        run("eval", ["--model", guard, "--data", folder / "records.jsonl", folder / "held_out.jsonl", "--out", out,
                     "--scores", *GENERATE], folder / "log", ranks)
        results = json.loads((out / "results.json").read_text())
        for result in results:
            for timing in ("ms_per_query", "latency_ms_p50", "latency_ms_p95"):
                result.pop(timing, None)
        texts = [(out / name / file).read_bytes() for name in ("records", "held_out") for file in
                 ("answers.jsonl", "generated_predictions.jsonl")]
        files.append((results, texts))
    assert files[0] == files[1] and [r["n"] for r in files[0][0][:2]] == [11, 7]


def test_moderation_under_torchrun_says_the_same_on_each_rank(folder, guard):
    ask = ["--model", guard, "--prompt", "Please lock the chest.", "--max-new-tokens", 24, "--device", "cpu"]
    said = [json.loads(run("eval", ask, folder / "log", ranks)) for ranks in (1, 2)]
    assert "one process reads the lines" in run("eval", ["--model", guard, "--moderate", "--device", "cpu"], folder / "log", 2, code=1)
    assert said[0]["p_harmful"] == said[1]["p_harmful"] and 0.02 < said[0]["p_harmful"]["request"] < 0.98


@pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot train on several ranks of a CPU")
def test_torchrun_itself(folder):
    """The command line of the README, once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_sft.py"]
    done = subprocess.run([*torchrun, *map(str, arguments(folder, "train_sft", True, "torchrun"))], capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     1/6") == done.stdout.count("wrote ") == 1   # rank 0 alone speaks
    assert_same_training(folder, "train_sft", True, "torchrun")
