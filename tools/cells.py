"""What the experiments share: arms are trained and read in this process, then compared.

    train, answers                     one arm: records -> a model folder -> a table of its answers
    shuffled                           the same records, each with the reasoning of another
    mean_f1, interval, resamplings     mean F1 of the three tasks, and 95% intervals by bootstrap
    groups_of                          records that must be drawn together
    run_jobs                           machinery: jobs over processes, each on one thread

A table (n, 3, 2) holds the answers to n records: for each task the gold verdict (1 positive, 0 the
other, -1 no label), and whether the answer is right (1, 0). A cell is (corpus seed, table). Cells of
one corpus have the same test records, so a resampling draws the same records for all of them.
"""
import contextlib
import json
import multiprocessing
import random
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import certificate  # noqa: E402
import eval as evaluation  # noqa: E402
import train_sft  # noqa: E402
from data import (VERDICTS, gold_verdict, parse_verdict, read_records, split_input,  # noqa: E402
                  write_json)

SOURCES = ["wildguard", "aegis", "beavertails", "toxicchat"]


# ------------------------------------------------------------------ one arm
def on_cpu(seed):
    """The arguments of every script that is run here."""
    return ["--seed", str(seed), "--device", "cpu", "--dtype", "float32"]


def train(out, records, model, seed, **options):
    """SFT of `model` on these records into the folder `out`, unless it is there already.
    options: train_sft.py's, with _ for -; None is left out."""
    if not (out / "config.json").exists():
        data = out.with_name(out.name + ".json")
        write_json(data, records)
        flags = []
        for name, value in options.items():
            if value is not None:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        train_sft.main(["--model", str(model), "--data", str(data), "--out", str(out), "--resume",
                        "--batch-size", "32", *flags, *on_cpu(seed)])
    return out


def answers(out, model, data, seed, *flags):
    """The table of a model's greedy answers to the records of the file `data`, which are written
    to the folder `out`, unless they are there already."""
    if not (out / "results.json").exists():
        evaluation.main(["--model", str(model), "--data", str(data), "--out", str(out),
                         *flags, *on_cpu(seed)])
    records = read_records(data)
    lines = (out / data.stem / "generated_predictions.jsonl").read_text().splitlines()
    table = []
    for record, line in zip(records, lines, strict=True):
        gold = gold_verdict(record)
        said = parse_verdict(json.loads(line)["predict"])
        row = []
        for task, (positive, _) in VERDICTS.items():
            label = -1 if gold[task] is None else int(gold[task] == positive)
            row.append((label, int(gold[task] == said[task])))
        table.append(row)
    return np.array(table)


def shuffled(by_source, seed):
    """Every trace goes to another record of the same source and verdicts."""
    rng = random.Random(seed)
    result = []
    for records in by_source.values():
        groups = defaultdict(list)
        for record in records:
            groups[str(gold_verdict(record))].append(record)
        for group in groups.values():
            outputs = [record["output"] for record in group]
            turn = rng.randrange(1, len(outputs)) if len(outputs) > 1 else 0
            turned = outputs[turn:] + outputs[:turn]
            result += [{**record, "output": output} for record, output in zip(group, turned)]
    return result


# ------------------------------------------------------------------ figures
def mean_f1(table, weights=None):
    """Mean over tasks of F1 in percent; weights (n,): how often each row counts."""
    if weights is None:
        weights = np.ones(len(table))
    scores = []
    for task in range(3):
        gold, right = table[:, task].T
        tp = (weights * (gold == 1) * right).sum()
        wrong = (weights * (gold >= 0) * (1 - right)).sum()     # fp + fn
        scores.append(200 * tp / max(2 * tp + wrong, 1))
    return np.mean(scores)


def resamplings(groups, draws=1000, over_corpora=False):
    """Samples of the test records, the first as they are. A sample is [(corpus seed, weights)],
    weights (n,) saying how often each record of that corpus is in it.

    groups {corpus seed: (n,)}: records of one number are drawn together. over_corpora: the corpora
    are drawn too, and then the records of each; an interval then covers what another seed would
    change, as far as so many seeds can tell."""
    rng = np.random.default_rng(0)
    corpora = list(groups)

    def draw(corpus):
        of_row = groups[corpus]
        n = of_row.max() + 1
        drawn = rng.integers(n, size=n)
        return corpus, np.bincount(drawn, minlength=n)[of_row]

    samples = [[(corpus, np.ones(len(groups[corpus]))) for corpus in corpora]]
    for _ in range(draws):
        chosen = corpora
        if over_corpora:
            chosen = [corpora[i] for i in rng.integers(len(corpora), size=len(corpora))]
        samples.append([draw(corpus) for corpus in chosen])
    return samples


def scores(cells, samples):
    """(samples,) the mean of mean_f1 over corpora, and over the cells of each."""
    tables = defaultdict(list)
    for corpus, table in cells:
        tables[corpus].append(table)
    return np.array([np.mean([mean_f1(table, weights) for corpus, weights in sample
                              for table in tables[corpus]]) for sample in samples])


def bounds(values):
    """(figure, low, high) of what `scores` gives, or of the difference of two such."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def interval(cells, others=None, groups=None, draws=1000):
    """(figure, low, high) of the mean F1 of cells, or of its difference to `others`, paired."""
    alone = {corpus: np.arange(len(table)) for corpus, table in cells}
    samples = resamplings({corpus: (groups or alone)[corpus] for corpus in alone}, draws)
    values = scores(cells, samples)
    if others is not None:
        values = values - scores(others, samples)
    return bounds(values)


def groups_of(records):
    """(n,) a number for each record of the toy corpus: a pair and its opposite answers share one."""
    number = {}
    of_row = []
    for record in records:
        reading = certificate.read(*split_input(record["input"]))
        setting = replace(reading, wish="", changed=False, verb="", left=None)
        of_row.append(number.setdefault(setting, len(number)))
    return np.array(of_row)


# ================================================================== machinery
def run_jobs(function, jobs, processes):
    """function(job) of every job, in order, in processes of one thread each."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), spawn, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, jobs)             # a process that dies is an error here


@contextlib.contextmanager
def logged(path):
    """What is printed goes to the end of this file."""
    with open(path, "a", buffering=1) as log, contextlib.redirect_stdout(log):
        yield
