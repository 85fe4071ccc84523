"""Kill the four stages at random moments, during saves too; each must continue to the same bytes.

    python tests/kill.py --kills 50 [--seed N]
"""
import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from processes import ROOT, rows_of, run, start, write_records

COMMON = ["--dtype", "float32", "--device", "cpu"]
TRAIN = ["--batch-size", 5, "--save-every", 1, "--resume", *COMMON]
GENERATE = ["--max-new-tokens", 12, "--block", 2, *COMMON]


def stages(folder):
    """{script: arguments without --out}; each stage reads what the undisturbed one before it wrote."""
    data, whole = folder / "records.jsonl", folder / "whole"
    return {"train_sft": ["--model", ROOT / "toy/model", "--data", data, "--lr", "8e-3", "--epochs", 4, *TRAIN],
            "mine_hard": ["--model", whole / "train_sft", "--data", data, "--resume", *GENERATE],
            "train_dpo": ["--model", whole / "train_sft", "--data", whole / "mine_hard/hard.jsonl",
                          "--lr", "1e-4", "--epochs", 3, *TRAIN],
            "eval": ["--model", whole / "train_dpo", "--data", data, "--scores", *GENERATE]}


def content(out):
    """All that a finished stage left, {path: bytes or rows}, without timings and what only resuming needs."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith("step-")}
    if "metrics.jsonl" in files:
        files["metrics.jsonl"] = rows_of(out)
    if "results.json" in files:
        files["results.json"] = json.loads(files["results.json"])
        for result in files["results.json"]:
            for timing in ("ms_per_query", "latency_ms_p50", "latency_ms_p95"):
                result.pop(timing, None)
    return files


def kill(process, out, delay, saving):
    """SIGKILL after `delay` seconds or, if `saving`, at the next half-written file; where it hit, or None."""
    process.join(delay)
    while saving and process.is_alive() and not unfinished(out):
        process.join(0.001)
    alive = process.is_alive()
    process.kill()
    process.join()
    return None if not alive else "during a save" if unfinished(out) else "elsewhere"


def unfinished(out):
    """Is there a half-written file or folder (ours end in .tmp, those of safetensors begin so)?"""
    try:
        return any(".tmp" in path.name for path in out.rglob("*"))
    except FileNotFoundError:                                                      # renamed while we looked
        return True


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    rng, seconds, count = random.Random(args.seed), {}, Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_records(folder / "records.jsonl", 11)
        for name, arguments in stages(folder).items():
            began = time.time()
            run(name, [*arguments, "--out", folder / "whole" / name], folder / "log")
            seconds[name] = time.time() - began
        for n, (name, arguments) in enumerate(itertools.cycle(stages(folder).items())):
            out = folder / f"killed-{n}"
            for _ in range(rng.randrange(1, 4)):                                   # some are killed again and again
                if count.total() < args.kills:
                    process, = start(name, [*arguments, "--out", out], folder / "log")
                    where = kill(process, out, rng.uniform(0, seconds[name]), rng.random() < 0.5)
                    count.update([where] if where else [])
            began = time.time()
            said = run(name, [*arguments, "--out", out], folder / "log")
            seconds[name] = min(seconds[name], time.time() - began)                # the machine may have been busy
            want, got = content(folder / "whole" / name), content(out)
            wrong = [file for file in want.keys() | got.keys() if want.get(file) != got.get(file)]
            if wrong:
                raise SystemExit(f"{name}, after kill {count.total()}: other {', '.join(wrong)}\n{said}")
            if count.total() >= args.kills:
                break
    print(f"{count.total()} kills ({count['during a save']} during a save), {n + 1} runs: all ended in the same files")


if __name__ == "__main__":
    main()
