"""Speed and memory of training, generation and kernels on this device, beside peers in the same run.

    python tools/bench.py                                               the toy model and its corpus
    python tools/bench.py --model DIR --sft FILE --dpo FILE --peers --repeat 3 --json FILE
    python tools/bench.py --shape 1b --peers --minutes 9 --json FILE    random weights, on a GPU
    python tools/bench.py --shape 1b --memory-cap 22                    can a 24 GB card train it?

Every item (measure.py: ours, peers.py: others) runs in a process of its own, so that peak memory is its own.
A round runs all items in turn, as machines drift; the table shows medians over rounds, "ours/this" the median
of the rates' ratios within a round. The first item of a group is ours.

A rate counts the tokens of each sequence as it would stand alone: padding earns nothing, and a shared prefix
shows as speed. "of GEMM": model FLOPs a second over the matrix-product rate of the round, with 6 N for a
trained token, 2 N more for DPO's reference pass, 2 N for a generated token (N: all parameters). GiB: CUDA's
allocator, else resident memory; of a kernel, what it takes beside its inputs and their gradients. Goals (on
CUDA) are parts of the rate that the limits of the round allow.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import measure  # noqa: E402
import peers  # noqa: E402
from data import Extend, InputError, at_least, tell, write_json  # noqa: E402
from eval import print_line  # noqa: E402
from measure import twin  # noqa: E402
import model as library  # noqa: E402
from model import attention_by_mask  # noqa: E402
from train_sft import git_commit  # noqa: E402

sft, dpo, sample, attend, score = measure.sft, measure.dpo, measure.sample, measure.attend, measure.score
by_mask = partial(attend, prepare=lambda plan: partial(attention_by_mask, plan=plan))
LOSS = 8192, 128256, 2048           # rows, vocabulary, width
ITEMS = {                           # name: (function, what it needs); the slowest peers last
    "limits": (measure.limits, ""),
    "sft": (sft, ""),
    "sft unshared": (partial(sft, share=False), ""),
    "sft transformers": (peers.sft, "peers"),
    "sft trl": (partial(peers.trl, pairs=False), "peers model"),
    "sft trl packed": (partial(peers.trl, pairs=False, packing=True), "peers model"),
    "sft trl stored": (partial(peers.trl, pairs=False, gradient_checkpointing=False), "peers model"),
    "dpo": (dpo, ""),
    "dpo unshared": (partial(dpo, share=False), ""),
    "dpo trl": (partial(peers.trl, pairs=True), "peers model"),
    "dpo trl precomputed": (partial(peers.trl, pairs=True, precompute_ref_log_probs=True), "peers model"),
    "dpo trl stored": (partial(peers.trl, pairs=True, gradient_checkpointing=False), "peers model"),
    "generate": (sample, ""),
    "generate unshared": (partial(sample, share=False), ""),
    "stops": (partial(sample, stops=True), "model"),
    "attention": (attend, ""),
    "attention twin": (twin(attend), "cuda"),
    "attention varlen_attn": (partial(attend, prepare=peers.varlen), "peers cuda"),
    "attention flex_attention": (partial(attend, prepare=peers.flex), "peers cuda"),
    "attention one by one": (partial(attend, prepare=peers.one_by_one), "peers"),
    "attention by mask": (by_mask, ""),
    "tree": (partial(attend, tree=True), ""),
    "tree twin": (twin(partial(attend, tree=True)), "cuda"),
    "tree flex_attention": (partial(attend, prepare=peers.flex, tree=True), "peers cuda"),
    "tree by mask": (partial(by_mask, tree=True), ""),
    "logprobs": (score, ""),
    "logprobs twin": (twin(score), "cuda"),
    "logprobs cross_entropy": (partial(score, function=peers.logprobs), "peers"),
    "loss": (partial(score, sizes=LOSS), "big"),
    "loss cross_entropy": (partial(score, function=peers.logprobs, sizes=LOSS), "peers big"),
    "nucleus": (measure.nucleus, ""),
    "nucleus sort": (partial(measure.nucleus, function=peers.nucleus), "peers"),
    "decode": (measure.decode, ""),
    "decode twin": (twin(measure.decode), "cuda"),
    "adamw": (measure.optimize, ""),
    "adamw foreach": (partial(measure.optimize, make=peers.adamw), "peers"),
    "generate transformers": (peers.sample, "peers"),
    "generate transformers sorted": (partial(peers.sample, sort=True), "peers"),
    "generate transformers at once": (partial(peers.sample, prompts_a_call=0), "peers"),
    "generate vllm": (peers.vllm, "peers model"),
    "stops transformers sorted": (partial(peers.sample, sort=True, stops=True), "peers model"),
    "stops transformers at once": (partial(peers.sample, prompts_a_call=0, stops=True), "peers model"),
    "stops vllm": (partial(peers.vllm, stops=True), "peers model"),
}
# the part of the rate that the measured limits allow, for models of about 1B, 3B and 8B
GOALS = {"sft unshared": ("G1", 0.63, 0.63, 0.70), "sft": ("G2", 0.63, 0.63, 0.70),
         "logprobs": ("G3", 0.90, 0.90, 0.90), "dpo": ("G4", 0.63, 0.63, 0.70),
         "attention": ("G7", 0.14, 0.19, 0.19), "generate": ("G8", 0.60, 0.67, 0.75),
         "nucleus": ("G11", 0.36, 0.36, 0.36)}
# (goal, which ratio, the least that is asked of it): our rate over this one's, or this one's memory over ours
RATIOS = {"dpo unshared": ("G4", "ratio", 1.3), "loss cross_entropy": ("G5", "memory_ratio", 8.0),
          "attention varlen_attn": ("G7", "ratio", 1.0), "generate unshared": ("G10", "ratio", 1.5),
          "nucleus sort": ("G11", "ratio", 50.0)}
COLD = "G12", 60                    # seconds from the start of the process to the end of the first step


# ------------------------------------------------------------------ running

def run_here(args):
    """One item, in this process; prints its result as a line of JSON."""
    library.choose_kernels(args.kernels)
    try:
        bench = measure.Bench(args)
        result = {"parameters": bench.parameters, **ITEMS[args.only][0](bench)}
        result.setdefault("peak_memory", bench.peak() / 2 ** 30)
    except ModuleNotFoundError as error:
        result = {"error": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    print("\n" + json.dumps(result), flush=True)


def run_child(argv, name, seconds, python=sys.executable):
    """One item in a process of its own; {"error"} where it fails or is not done within `seconds`."""
    if seconds is not None and seconds < 5:
        return {"error": "left out: --minutes are over"}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1",
             "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [python, __file__, *argv, "--only", name, "--started", str(time.time())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds,
                              env={**os.environ, **quiet})
    except subprocess.TimeoutExpired:
        return {"error": "cut off: --minutes are over"}
    if done.returncode:
        tell(done.stderr)
        what = error_line(done.stderr) or f"exit status {done.returncode}"
        return {"error": what, "stderr": done.stderr}
    result = json.loads(done.stdout.splitlines()[-1])
    return result if "error" in result else {**result, "rate": result["units"] / result["seconds"]}


def error_line(said):
    """What the output of a failed process ends with: the last line that names an exception, as
    advice may follow it (after a fault on CUDA), else its last line, "" where there is none."""
    lines = said.strip().splitlines()
    named = [line for line in lines if re.match(r"(E +)?[\w.]+(Error|Exception)\b", line)]
    return ([""] + (named or lines))[-1][:160]


def summarize(name, rounds, goals):
    """An item's row: medians over the rounds in which it ran, and (goals) what is asked of it."""
    row = {"name": name, "rounds": [r[name] for r in rounds]}
    ran = [r for r in rounds if "rate" in r[name]]
    if not ran:
        return row
    runs = [r[name] for r in ran]
    rates = [run["rate"] for run in runs]
    row.update(unit=runs[0]["unit"], rate=median(rates), slowest=min(rates), fastest=max(rates),
               peak_memory=median(run["peak_memory"] for run in runs))
    limited = [(r[name], r["limits"]) for r in ran if "rate" in r["limits"]]
    if limited:
        row["of_gemm"] = median(run["flops"] / run["seconds"] / limits["rate"] for run, limits in limited)
    first = name.split()[0]                                 # ours, with which the item is compared
    pairs = [(r[first], r[name]) for r in ran if name != first and "rate" in r[first]]
    if pairs:
        row["ratio"] = median(ours["rate"] / run["rate"] for ours, run in pairs)
        row["memory_ratio"] = median(run["peak_memory"] / (ours["peak_memory"] + 1e-9) for ours, run in pairs)
    if name == "sft":
        row["cold_start"] = runs[0]["cold_start_seconds"]
    if goals:
        row["goals"] = goals_of(row, limited)
    return row


def goals_of(row, limited):
    """[{goal, what: the figure, asked, met}] of an item; limited: [(its run, the limits of that round)]."""
    name = row["name"]
    asked = []
    if limited and name in GOALS:
        goal, *parts = GOALS[name]
        run, _ = limited[0]
        part = parts[sum(run["parameters"] > size for size in (2e9, 5e9))]
        least = median(part * run["units"] / least_seconds(run, limits) for run, limits in limited)
        asked.append((goal, "rate", least, row["rate"] >= least))
    if "ratio" in row and name in RATIOS:
        goal, what, least = RATIOS[name]
        asked.append((goal, what, least, row[what] >= least))
    if "cold_start" in row:
        goal, most = COLD
        asked.append((goal, "cold_start", most, row["cold_start"] <= most))
    return [dict(zip(("goal", "what", "asked", "met"), one)) for one in asked]


def least_seconds(run, limits):
    """What the limits of the round allow, see measure.py."""
    return run["work"] / limits["rate"] + run.get("bytes", 0) / limits["copy"]


# ------------------------------------------------------------------ showing

def human(x):
    """Three or four figures, from a million on in powers of a thousand."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if x >= size:
            return f"{x / size:.4g}{letter}"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show(row):
    """One line of the table."""
    if "rate" not in row:
        return f"{row['name']:30} {row['rounds'][0]['error']}"
    spread = f"{human(row['slowest'])} - {human(row['fastest'])}" if len(row["rounds"]) > 1 else ""
    share = f"{100 * row['of_gemm']:.1f}%" if row.get("of_gemm") else ""
    ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
    sign = {"rate": "/s", "cold_start": " s", "ratio": "x", "memory_ratio": "x less memory"}
    goals = "; ".join(f"{g['goal']} {human(g['asked'])}{sign[g['what']]} {'met' if g['met'] else 'missed'}"
                      for g in row.get("goals", ()))
    return (f"{row['name']:30} {human(row['rate']) + ' ' + row['unit'] + '/s':>18} {spread:>18} {share:>7} "
            f"{row['peak_memory']:6.2f} {ratio:>9}  {goals}").rstrip()


def circumstances(args, rounds):
    """Everything that a figure depends on."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    measured = next((r["limits"] for r in rounds if "rate" in r["limits"]), {})
    versions = {name: installed.get(name) for name in ("torch", "triton", "transformers", "trl")}
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{key: measured.get(key) for key in ("device", "dtype", "threads")},
            "versions": {"python": platform.python_version(), **versions},
            "git": git_commit(), "arguments": vars(args)}


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = at_least(1)
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="folder with weights and tokenizer")
    p.add_argument("--shape", choices=measure.SHAPES, help="random weights of this shape, and random records")
    p.add_argument("--sft", default=str(ROOT / "toy/train_wildguard.json"), help="records with an output")
    p.add_argument("--dpo", help="records with chosen and rejected (default: made up from --sft)")
    p.add_argument("--items", nargs="+", action=Extend, metavar="NAME", help="items or groups to run (default: all)")
    p.add_argument("--peers", action="store_true", help="run transformers, TRL and torch's own kernels too")
    p.add_argument("--vllm-python", default=sys.executable, metavar="FILE",
                   help="the interpreter that has vLLM, which wants a torch of its own (default: this one)")
    p.add_argument("--big", action="store_true", help="the loss at 8,192 x 128,256 on a CPU too")
    p.add_argument("--repeat", type=count, default=1, metavar="N", help="rounds through all items")
    p.add_argument("--minutes", type=at_least(0, float), help="stop then, and say what was left out")
    p.add_argument("--json", metavar="FILE", help="write every figure here")
    p.add_argument("--warm", type=at_least(0), default=1, help="steps before the clock")
    p.add_argument("--steps", type=count, default=3, help="steps on the clock")
    p.add_argument("--batch-size", type=count, help="sequences or pairs in a step (default: 4; CUDA: 64)")
    p.add_argument("--max-tokens", type=count, help="of a pack (default: 8192; CUDA: 32768 of a 1B, 16384 of "
                   "larger ones)")
    p.add_argument("--length", type=at_least(200), help="of every sequence, with --shape (default: mixed)")
    p.add_argument("--prompts", type=count, help="to be answered (default: 16; CUDA: 256)")
    p.add_argument("--k", type=count, default=4, help="answers to each prompt")
    p.add_argument("--new-tokens", type=count, default=128, help="of an answer")
    p.add_argument("--recompute", action="store_true", help="activations twice: less memory")
    p.add_argument("--memory-cap", type=at_least(1, float), metavar="GIB",
                   help="CUDA: train in no more; then by default 20 steps of 4, length and packs 2048, --recompute")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="of products (default: as in training)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--kernels", choices=["triton", "torch"], default=library.KERNELS,
                   help="torch: the plain twins of the kernels")
    p.add_argument("--threads", type=count, help="of torch (default: its own choice)")
    p.add_argument("--processor-time", action="store_true", help="a clock that stands while others use the "
                   "machine; for --threads 1 and OMP_NUM_THREADS=1, as idle threads count")
    p.add_argument("--only", choices=ITEMS, help=argparse.SUPPRESS)
    p.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    if p.parse_args(argv).memory_cap:
        p.set_defaults(steps=20, length=2048, recompute=True, max_tokens=2048, batch_size=4)
    args = p.parse_args(argv)
    args.cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    if args.memory_cap and not args.cuda:
        raise InputError("--memory-cap needs a CUDA device")
    args.batch_size = args.batch_size or (64 if args.cuda else 4)
    args.prompts = args.prompts or (256 if args.cuda else 16)
    return args


NEEDS = {"peers": "--peers", "model": "--model instead of --shape", "cuda": "a CUDA device",
         "big": "--big, or a CUDA device"}


def chosen(args):
    """The names of the items to run: the limits, those asked for, and ours to compare them with. One
    that lacks what it needs (ITEMS) is an InputError where it was named, else left out."""
    have = {"peers": args.peers, "model": not args.shape, "cuda": args.cuda, "big": args.cuda or args.big}
    asked = {"sft", "dpo"} if args.memory_cap else set(args.items or ITEMS)
    if unknown := asked - set(ITEMS):
        raise InputError(f"--items: {sorted(unknown)[0]!r} is none of {', '.join(ITEMS)}")
    lacking = {name: [need for need in needs.split() if not have[need]]
               for name, (_, needs) in ITEMS.items()}
    for name in args.items or []:
        for need in lacking[name]:
            raise InputError(f"--items: {name!r} needs {NEEDS[need]}")
    asked |= {name for name in ITEMS if name.split()[0] in asked and not args.memory_cap}
    asked |= {name.split()[0] for name in asked} | {"limits"}
    return [name for name in ITEMS if name in asked and not lacking[name]]


def main(argv=None):
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    args = parse_arguments(argv)
    if args.only:
        return run_here(args)
    names = chosen(args)
    rounds = []                                             # of each {name: what its process said}
    for number in range(1, args.repeat + 1):
        results = {}
        for name in names:
            left = None
            if args.minutes is not None:
                left = args.minutes * 60 - (time.time() - args.started)
            python = args.vllm_python if name.endswith("vllm") else sys.executable
            result = run_child(argv, name, left, python)
            said = result.get("error") or f"{human(result['rate'])} {result['unit']}/s"
            tell(f"round {number} of {args.repeat}: {name}: {said}")
            results[name] = result
            figures = figures_of(args, names, [*rounds, results])
            if args.json:                                   # at once: a later item may end it all
                write_json(args.json, figures)
        rounds.append(results)
    print_table(figures, args.cuda)
    return figures


def figures_of(args, names, rounds):
    """All that is known after these rounds, of which the last may have begun."""
    rows = []
    for name in names:
        some = [results for results in rounds if name in results]
        rows += [summarize(name, some, args.cuda)] if some else []
    return {**circumstances(args, rounds), "seconds": time.time() - args.started, "items": rows}


def print_table(figures, goals):
    """Print the circumstances and a line for each item."""
    print_line(", ".join(f"{key} {figures[key]}" for key in ("device", "dtype", "threads", "versions", "git")))
    print_line("")
    head = f"{'':30} {'rate':>18} {'slowest - fastest':>18} {'of GEMM':>7} {'GiB':>6} {'ours/this':>9}"
    print_line(head + ("  goal" if goals else ""))
    for row in figures["items"]:
        print_line(show(row))


if __name__ == "__main__":
    main()
