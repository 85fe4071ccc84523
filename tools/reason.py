"""When must a guard reason? The toy corpus with a dial; the same records with and without reasoning.

    python tools/reason.py --out out/reason              run the grid, then report
    python tools/reason.py --minutes 20 --jobs 16        begin nothing new after 20 minutes
    python tools/reason.py table --out out/reason        report what is there

The dial is the number of facts that a verdict combines, 1 to 6 (toy/make_toy.py --facts). For each
of them, each size of training set and each seed, every arm is trained from one base model on the
same records, and answers the same test records:

    labels          verdicts alone; as many steps as r_sft or three times as many, as dev prefers
    labels_tokens   verdicts alone, until as many answer tokens were trained as r_sft trains
    r_sft           the reasoning, then the verdict
    verdict_first   the verdict, then the same reasoning, which can only explain it
    shuffled        the reasoning of another record with the same verdict
    r_sft_fast      the model of r_sft, asked for the verdict at once (eval.py --fast)
    both_fast       trained on r_sft's records and on labels', twice the steps, asked at once

The figure is accuracy: half of the records are harmful, in pairs that differ in one fact, so a guard
that knows nothing has 50, while its F1 is anything from 0 (it says unharmful) to 66.7, by its bias.
Intervals resample the pairs of the test; they do not cover what another seed would change.

r_sft and shuffled write their reasoning, greedily; an answer without an end or a verdict is wrong.
The others begin with the verdict, so it is read at once. R-SFT makes 120 steps of 16 records, or an
epoch where that is more, so that every record is read: 300 steps for 4,800 records.

A seed is that of the corpus and of training. What is finished is a line of OUT/results.jsonl and is
not done again; files of two machines can be joined with cat, if both began from one OUT/base. That
is the demo's model, taught further to retell facts of requests in which all six vary. Its sentences
include a chain's single steps (whether a changed mind or a wrapper turns a state, whether two
states are the same), each by itself; it never saw a chain or a verdict.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "tools")]
import make_toy  # noqa: E402
import train_sft  # noqa: E402
import traces  # noqa: E402
from ablation import end_with  # noqa: E402
from ablation_table import markdown  # noqa: E402
from data import (VERDICTS, Extend, InputError, Tokenizer, at_least, gold_verdict,  # noqa: E402
                  hold, parse_verdict, reading, say, tell, write_bytes, write_json)
from eval import answer_fast, f1_of  # noqa: E402
from files import folder_path  # noqa: E402
from mine_hard import encode_prompts  # noqa: E402
from model import Llama, World, generate, weights_hash  # noqa: E402
from plot import COLOURS, GREY, dot, line, text, ticks, write_svg  # noqa: E402

# what is trained -> the arms that its model answers for; in the order of their cost
TRAININGS = {
    "labels": ["labels"],
    "r_sft": ["r_sft", "r_sft_fast"],
    "verdict_first": ["verdict_first"],
    "shuffled": ["shuffled"],
    "both": ["both_fast"],
    "labels_tokens": ["labels_tokens"],
}
ARMS = {                    # as tables and picture call them
    "r_sft": "R-SFT",
    "labels": "labels only",
    "labels_tokens": "labels only, as many tokens",
    "verdict_first": "verdict, then reasoning",
    "shuffled": "reasoning of another record",
    "r_sft_fast": "R-SFT, answered at once",
    "both_fast": "both forms, answered at once",
}
CONTRASTS = [("r_sft", "labels"), ("r_sft", "labels_tokens"), ("r_sft", "verdict_first"),
             ("r_sft", "shuffled"), ("r_sft", "r_sft_fast"), ("verdict_first", "labels"),
             ("both_fast", "labels")]
BASE_RECORDS = 4800         # that the base model retells
BATCH = 16
LR = 2e-3
PRETRAIN = 50               # steps of the base model
STEPS = 120                 # of R-SFT
TEST = 400                  # records of a test set: 200 pairs
GOAL = 90                   # the accuracy whose price in records is asked for
DRAWS = 1000                # of the bootstrap


# ------------------------------------------------------------------ one cell
@dataclass(frozen=True)
class Cell:
    """One training: its place in the grid."""
    facts: int              # that a verdict combines
    size: int               # records to train on
    seed: int
    training: str           # a key of TRAININGS


def make_base(folder, steps):
    """Write the base model, whole, unless it is there: the demo's, taught further to retell."""
    if (folder / "config.json").exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model = Llama.from_pretrained(ROOT / "toy/model", "cpu", torch.float32)
    tokenizer = Tokenizer.from_pretrained(ROOT / "toy/model")
    _, read = make_toy.make_dial(len(make_toy.VARYING), seed=0, train=BASE_RECORDS)
    make_toy.pretrain(model, tokenizer, read, random.Random(0), steps)
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    os.replace(part, folder)


def arm_records(training, records, seed):
    """The records that a training sees, of those with reasoning."""
    if training in ("labels", "labels_tokens"):
        return traces.labels_only(records)
    if training == "verdict_first":
        return traces.verdict_first(records)
    if training == "shuffled":
        return traces.shuffled({"all": records}, seed)
    if training == "both":
        return records + traces.labels_only(records)
    return records


def arm_steps(training, steps, records, tokenizer):
    """[steps] of a training, all that are tried; steps: r_sft's, which are an epoch at least."""
    steps = max(steps, math.ceil(len(records) / BATCH))
    if training == "labels":
        return [steps, 3 * steps]
    if training == "both":
        return [2 * steps]
    if training == "labels_tokens":
        with_reasoning = answer_tokens(records, tokenizer)
        without = answer_tokens(traces.labels_only(records), tokenizer)
        return [round(steps * with_reasoning / without)]
    return [steps]


def answer_tokens(records, tokenizer):
    """How many tokens of these records the loss is about."""
    return sum(len(tokenizer.answer_ids(record["output"])) for record in records)


def train(base, records, steps, seed, folder, device):
    """Train the base model into folder/model; returns the answer tokens that its loss was about."""
    write_json(folder / "records.json", records)
    epochs = math.ceil(steps * BATCH / len(records)) + 1            # --max-steps ends it
    train_sft.main(["--model", str(base), "--data", str(folder / "records.json"),
                    "--out", str(folder / "model"), "--epochs", str(epochs),
                    "--max-steps", str(steps), "--batch-size", str(BATCH), "--lr", str(LR),
                    "--seed", str(seed), "--device", device, "--dtype", "float32"])
    rows = (folder / "model/metrics.jsonl").read_text().splitlines()[1:]
    return sum(json.loads(row)["loss_tokens"] for row in rows)


def answer_at_once(model, tokenizer, records):
    """The likelier verdict on each request right after the prompt, as eval.py --fast."""
    prompts, _ = encode_prompts(tokenizer, records, 4096, 0)
    answers = answer_fast(model, tokenizer, prompts, World(model.head.device))
    return [parse_verdict(block)["request"] for block, _ in answers]


def answer_reasoned(model, tokenizer, records):
    """The verdict on each request after greedy reasoning; None where the answer has no end."""
    prompts, _ = encode_prompts(tokenizer, records, 4096, 192)
    answers = generate(model, prompts, max_new_tokens=192, temperature=0, stop=tokenizer.stop)
    said = []
    for (ids,) in answers:
        ended = ids[-1] in tokenizer.stop
        said.append(parse_verdict(tokenizer.decode(ids))["request"] if ended else None)
    return said


def answer(arm, folder, records, device):
    """The verdicts of an arm's model on these records."""
    model = Llama.from_pretrained(folder, device, torch.float32)
    tokenizer = Tokenizer.from_pretrained(folder)
    reads = answer_reasoned if arm in ("r_sft", "shuffled") else answer_at_once
    return reads(model, tokenizer, records)


def golds(records):
    """The right verdict on each request."""
    return [gold_verdict(record)["request"] for record in records]


def flags(values):
    """A string of 1 and 0, one for each value."""
    return "".join("1" if value else "0" for value in values)


def accuracy(said, records):
    """Percent of these verdicts that are right."""
    right = [s == g for s, g in zip(said, golds(records))]
    return 100 * sum(right) / len(right)


def train_cell(cell, base, steps, corpus, folder, device):
    """Train what a cell needs; returns what its lines say of that, and the folder of the model."""
    records = arm_records(cell.training, corpus["train"], cell.seed)
    tokenizer = Tokenizer.from_pretrained(base)
    tried = []
    start = time.time()
    for count in arm_steps(cell.training, steps, corpus["train"], tokenizer):
        tokens = train(base, records, count, cell.seed, folder / str(count), device)
        tried.append({"steps": count, "trained_tokens": tokens})
    if len(tried) > 1:                                              # labels alone has a choice
        for row in tried:
            model = folder / str(row["steps"]) / "model"
            said = answer(cell.training, model, corpus["dev"], device)
            row["dev_accuracy"] = accuracy(said, corpus["dev"])
        tried.sort(key=lambda row: -row["dev_accuracy"])            # of equals the shorter is first
    seconds = round(time.time() - start, 1)
    return {**tried[0], "training_seconds": seconds}, folder / str(tried[0]["steps"]) / "model"


def run_cell(cell, base, steps, test, device):
    """The lines of results.jsonl of one training, one for each of its arms."""
    corpus, _ = make_toy.make_dial(cell.facts, cell.seed, cell.size, test)
    gold = golds(corpus["test"])
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        facts_of_training, folder = train_cell(cell, base, steps, corpus, Path(temporary),
                                                device)
        for arm in TRAININGS[cell.training]:
            start = time.time()
            said = answer(arm, folder, corpus["test"], device)
            lines.append({
                **asdict(cell), "arm": arm, **facts_of_training,
                "gold": flags(g == VERDICTS["request"][0] for g in gold),
                "right": flags(g == s for g, s in zip(gold, said)),
                "no_verdict": said.count(None),
                "test_seconds": round(time.time() - start, 1),
                "settings": {"steps": steps, "test": test}, "base": weights_hash(base),
                "torch": torch.__version__, "git": train_sft.git_commit()})
    return lines


# ------------------------------------------------------------------ the grid
def grid(args):
    """All cells: one seed after another, in it small sizes first, in them few facts first."""
    return [Cell(facts, size, seed, training) for seed in args.seeds for size in sorted(args.sizes)
            for facts in sorted(args.facts) for training in args.trainings]


def key_of(row):
    """Which figure a line of results.jsonl is about."""
    return row["facts"], row["size"], row["seed"], row["arm"]


def read_results(path):
    """{key_of: line} of results.jsonl; a line that a kill left half-written is as if not there.
    InputError names one that run_cell does not make."""
    results = {}
    if not path.exists():
        return results
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, text_line in enumerate(lines, 1):
        try:
            row = json.loads(text_line)
        except (ValueError, RecursionError):
            say(f"{path}: a line is not whole and is left out")
            continue
        if not is_of_cell(row):
            raise InputError(f"{path}: line {number} is not as reason.py writes it; move the file "
                             "away, or choose another --out")
        results.setdefault(key_of(row), row)
    return results


def is_of_cell(row):
    """Is this what run_cell makes of an arm?"""
    kinds = {"facts": int, "size": int, "seed": int, "arm": str, "gold": str, "right": str,
             "settings": dict, "base": str}
    return (isinstance(row, dict)
            and all(type(row.get(name)) is kind for name, kind in kinds.items())
            and len(row["gold"]) == len(row["right"]) > 0 and len(row["gold"]) % 2 == 0
            and set(row["gold"] + row["right"]) <= {"0", "1"})


def check_lines(path, results, settings, base):
    """InputError where a line was made with other settings, or from another base model (its
    weights_hash)."""
    for row in results.values():
        if row["settings"] != settings:
            raise InputError(f"{path}: was made with {row['settings']}, not {settings}; "
                             "choose another --out")
        if row["base"] != base:
            raise InputError(f"{path}: has lines from another base model, which cannot be "
                             "compared; choose another --out, or report each file by itself")


def drop_half_line(path):
    """Drop the last line where a kill left it without an end."""
    if path.exists():
        whole, end, half = path.read_bytes().rpartition(b"\n")
        if half:
            write_bytes(path, whole + end)


def prepare_worker(parent):
    """A process that runs cells: one thread, and it ends where the process that began it ended."""
    torch.set_num_threads(1)
    end_with(parent)


def run_in_time(cell, deadline, *arguments):
    """run_cell without its printing, or no lines where the time is over."""
    if time.time() > deadline:
        return []
    with contextlib.redirect_stdout(io.StringIO()):
        return run_cell(cell, *arguments)


def run_grid(args):
    """Run the cells that results.jsonl lacks, and add their lines as they come; returns how many
    failed. (An InputError is a mistake in the command, and ends all of them.)"""
    hold(args.out)
    path = args.out / "results.jsonl"
    drop_half_line(path)
    results = read_results(path)
    base = args.out / "base"
    if results and not base.exists():
        raise InputError(f"{base}: is not there, the base model that the lines of {path} began "
                         "from; copy it, or choose another --out")
    torch.set_num_threads(1)
    make_base(base, args.pretrain)
    check_lines(path, results, {"steps": args.steps, "test": args.test}, weights_hash(base))
    todo = [cell for cell in grid(args)
            if any((cell.facts, cell.size, cell.seed, arm) not in results
                   for arm in TRAININGS[cell.training])]
    deadline = args.started + 60 * args.minutes
    left = len(todo)
    fresh = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(args.jobs, fresh, prepare_worker, (os.getpid(),)) as pool:
        futures = {pool.submit(run_in_time, cell, deadline, base, args.steps, args.test,
                               args.device): cell
                   for cell in todo}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, Exception) and not isinstance(error, BrokenProcessPool):
                    tell(f"failed: {futures[future]}: {error!r}")
                    failed += 1                             # the others go on
                    continue
                lines = future.result()
                if lines:
                    left -= 1
                    append(path, lines, left)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    say(f"{left} of {len(todo)} cells are left" if left else "all cells are done")
    return failed


def append(path, lines, left):
    """Add lines to results.jsonl, and say so."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in lines))
    for row in lines:
        say(f"d = {row['facts']}  n = {row['size']:5}  seed {row['seed']}  {row['arm']:14} "
              f"accuracy {score(row)[0]:5.1f}  {row['training_seconds']:6.1f} s + "
              f"{row['test_seconds']:.1f} s  {left} cells left")


# ------------------------------------------------------------------ figures
def score(row, figure="accuracy"):
    """Accuracy (or "F1") in percent: (1 + DRAWS,), first of the test as it is, then of redrawn ones.

    The draws depend on facts, seed and number of pairs alone, which settle the test: so arms are
    compared on the same draws."""
    return redrawn(row["gold"], row["right"], (row["facts"], row["seed"]), figure)


@functools.cache
def redrawn(gold, right, seed, figure):
    """`score` of strings of 1 and 0; pairs of rows are drawn together, with replacement."""
    gold = np.array(list(gold), int)
    right = np.array(list(right), int)
    tp = (gold * right).reshape(-1, 2).sum(1)                       # (pairs,)
    wrong = (1 - right).reshape(-1, 2).sum(1)                       # fp + fn
    pairs = len(tp)
    drawn = np.random.default_rng(seed).multinomial(pairs, np.full(pairs, 1 / pairs), DRAWS)
    counts = np.concatenate([np.ones((1, pairs), int), drawn])      # how often each pair is there
    if figure == "F1":
        return f1_of(counts @ tp, 0, counts @ wrong, 0)
    return 100 - 100 * (counts @ wrong) / (2 * pairs)


def average(results, seeds, facts, size, arm, figure):
    """The mean of `score` over these seeds."""
    rows = [results[facts, size, seed, arm] for seed in seeds]
    return np.mean([score(row, figure) for row in rows], axis=0)


def seeds_of(results, facts, size, *arms):
    """The seeds for which all these arms are done."""
    seeds = sorted({key[2] for key in results})
    return [seed for seed in seeds if all((facts, size, seed, arm) in results for arm in arms)]


def interval(scores):
    """(figure, low, high) of such an array: 95%."""
    low, high = np.percentile(scores[1:], [2.5, 97.5])
    return float(scores[0]), float(low), float(high)


def figures(results, facts, size, arm, minus=None, figure="accuracy"):
    """(figure, low, high, seeds) of an arm, or of its difference to another; None: not run yet."""
    arms = [arm, minus] if minus else [arm]
    seeds = seeds_of(results, facts, size, *arms)
    if not seeds:
        return None
    scores = average(results, seeds, facts, size, arm, figure)
    if minus:
        scores = scores - average(results, seeds, facts, size, minus, figure)
    return *interval(scores), len(seeds)


def records_needed(sizes, scores):
    """How many records first reach GOAL, in words; between two sizes linear in the size's
    logarithm."""
    before = None
    for size, figure in zip(sizes, scores):
        if figure >= GOAL:
            if before is None:
                return f"<= {size:,}"
            low, below = before
            share = (GOAL - below) / (figure - below)
            return f"{low * (size / low) ** share:,.0f}"
        before = size, figure
    return f"> {sizes[-1]:,}"


def needed_by(results, facts, arm):
    """(records_needed of an arm at d = facts, seeds): over all sizes that it was run at, by the
    seeds that have them all. None where no seed has."""
    sizes = sorted({key[1] for key in results if key[0] == facts and key[3] == arm})
    seeds = [seed for seed in sorted({key[2] for key in results})
             if all((facts, size, seed, arm) in results for size in sizes)]
    if not (sizes and seeds):
        return None
    scores = [average(results, seeds, facts, size, arm, "accuracy")[0] for size in sizes]
    return records_needed(sizes, scores), len(seeds)


# ------------------------------------------------------------------ report
def table(title, names, dials, cell):
    """A Markdown table: a line a name, a column a d; cell(name, d) gives its words or None."""
    rows = [[name, *(cell(name, d) or "" for d in dials)] for name in names]
    return [*markdown(title, [f"d = {d}" for d in dials], rows), ""]


def report(results):
    """The lines of the Markdown report."""
    arm_of = {title: arm for arm, title in ARMS.items()}
    pairs = {f"{ARMS[arm]} - {ARMS[minus]}": (arm, minus) for arm, minus in CONTRASTS}
    dials = sorted({key[0] for key in results})
    sizes = sorted({key[1] for key in results})
    seeds = sorted({key[2] for key in results})
    lines = [f"Seeds {', '.join(map(str, seeds))}; a figure of fewer says of how many.", ""]

    def words(form, found):
        """A figure as the table has it; the last of `found`: of how many seeds it is."""
        if found is None:
            return None
        fewer = f" [{found[-1]}]" if found[-1] < len(seeds) else ""
        return form.format(*found) + fewer

    for size in sizes:
        lines += table(f"accuracy (95% interval), {size:,} records", arm_of, dials,
                       lambda title, d: words("{:.1f} ({:.1f} - {:.1f})",
                                              figures(results, d, size, arm_of[title])))
    for size in sizes:
        lines += table(f"difference (95% interval, paired), {size:,} records", pairs, dials,
                       lambda title, d: words("{:+.1f} ({:+.1f} to {:+.1f})",
                                              figures(results, d, size, *pairs[title])))
    lines += table(f"records needed to pass an accuracy of {GOAL}", arm_of, dials,
                   lambda title, d: words("{}", needed_by(results, d, arm_of[title])))
    for size in sizes:
        lines += table(f"F1, {size:,} records (nothing known: 0 to 66.7)", arm_of, dials,
                       lambda title, d: words("{:.1f}", figures(results, d, size, arm_of[title],
                                                                figure="F1")))
    return lines


def picture(results, path):
    """Accuracy over d, a panel for each size, a line for each arm; below, the records that each
    needs."""
    dials = sorted({key[0] for key in results})
    sizes = sorted({key[1] for key in results})
    parts = []
    for n, size in enumerate(sizes):
        parts += panel(60 + 300 * n, 44, results, dials, size, is_first=n == 0)
    bottom, last = needed_table(40, 340, results, dials)
    width = max(300 * len(sizes) + 30, 640)
    write_svg(path, width, last, parts + bottom)


def panel(left, top, results, dials, size, is_first, width=240, height=220):
    """One panel: accuracy over d, means with intervals, a dot a seed; arms stand a little apart."""
    step = width / max(len(dials), 1)
    across = {d: left + step * (n + 0.5) for n, d in enumerate(dials)}
    up = lambda percent: top + height * (1 - percent / 100)
    parts = [text(left, top - 14, f"{size:,} training records", size=13)]
    for tick in ticks(0, 100):
        parts.append(line([(left, up(tick)), (left + width, up(tick))]))
        parts.append(text(left - 6, up(tick) + 4, f"{tick:.0f}", "end", 11))
    parts += [text(across[d], top + height + 17, d, "middle", 11) for d in dials]
    parts.append(text(left + width / 2, top + height + 36, "facts that a verdict combines",
                      "middle", 11))
    if is_first:
        parts.append(text(left - 38, top + height / 2, "accuracy, with its 95% interval", "middle",
                          11, turn=True))
    parts.append(line([(left, up(50)), (left + width, up(50))], GREY))
    for n, (arm, colour) in enumerate(zip(ARMS, COLOURS)):
        apart = (n - (len(ARMS) - 1) / 2) * step / 12
        found = [(across[d] + apart, figures(results, d, size, arm)) for d in dials]
        found = [(x, figure) for x, figure in found if figure]
        for d in dials:
            for seed in seeds_of(results, d, size, arm):
                own = average(results, [seed], d, size, arm, "accuracy")[0]
                parts.append(dot(across[d] + apart, up(own), colour))
        parts += [line([(x, up(low)), (x, up(high))], colour, 1) for x, (_, low, high, _) in found]
        parts.append(line([(x, up(mean)) for x, (mean, _, _, _) in found], colour, 2))
    return parts


def needed_table(left, top, results, dials):
    """(parts, bottom edge) of a table that is also the legend: an arm a row, a d a column."""
    columns = {d: left + 270 + 60 * n for n, d in enumerate(dials)}
    parts = [text(left, top, f"records needed to pass {GOAL}%", size=13)]
    parts += [text(x, top, f"d = {d}", "end", 11) for d, x in columns.items()]
    for (arm, title), colour in zip(ARMS.items(), COLOURS):
        top += 20
        parts.append(line([(left, top - 4), (left + 22, top - 4)], colour, 3))
        parts.append(text(left + 30, top, title))
        for d, x in columns.items():
            needed, _ = needed_by(results, d, arm) or ("", 0)
            parts.append(text(x, top, needed, "end"))
    note = "a dot is a seed; grey line: 50, where nothing is known"
    parts.append(text(left, top + 24, note, size=11))
    return parts, top + 36


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("do", nargs="?", choices=["run", "table"], default="run",
                   help="table: only report what is there")
    p.add_argument("--out", type=folder_path, default=Path("out/reason"), help="folder of results.jsonl")
    p.add_argument("--facts", type=int, nargs="+", action=Extend, choices=range(1, 7),
                   default=[1, 2, 3, 4, 5, 6], help="the dial's places")
    p.add_argument("--sizes", type=at_least(4), nargs="+", action=Extend, default=[300, 1200, 4800],
                   help="records to train on, even numbers: they are pairs")
    p.add_argument("--seeds", type=int, nargs="+", action=Extend, default=[201, 202, 203],
                   help="of corpus and training; those below 200 were used for development")
    p.add_argument("--trainings", nargs="+", action=Extend, choices=TRAININGS,
                   default=list(TRAININGS), help="what to train; both_fast's is both, r_sft_fast's r_sft")
    p.add_argument("--test", type=at_least(4), default=TEST,
                   help="test records, an even number")
    p.add_argument("--steps", type=at_least(1), default=STEPS,
                   help="of R-SFT, or an epoch if that is more; other arms' follow")
    p.add_argument("--pretrain", type=at_least(1), default=PRETRAIN, help="steps of the base model")
    p.add_argument("--jobs", type=at_least(1), default=os.cpu_count(),
                   help="cells at a time, a thread each")
    p.add_argument("--device", default="cpu", help="cpu, a thread a cell; or cuda, shared by all")
    p.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    args = p.parse_args(argv)
    args.started = time.time()
    if any(n % 2 for n in [*args.sizes, args.test]):
        p.error("--sizes and --test: records come in pairs, so these are even numbers")
    failed = run_grid(args) if args.do == "run" else 0
    results = read_results(args.out / "results.jsonl")
    if not results:
        raise InputError(f"{args.out / 'results.jsonl'}: no cell is done yet")
    first = next(iter(results.values()))
    check_lines(args.out / "results.jsonl", results, first["settings"], first["base"])
    picture(results, args.out / "reason.svg")
    say("\n".join(report(results)))
    if failed:
        raise InputError(f"{failed} cells failed (above); the same command tries them again")


if __name__ == "__main__":
    main()
