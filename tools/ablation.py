"""The paper's Table 7 on the embedded corpus, with the controls it lacks (`make ablation`).

    python tools/ablation.py --out out/ablation         corpus seeds that no default was chosen on
    python tools/ablation.py --out DIR --skips 0.25 --variants r_sft hs_dpo swapped

For each corpus seed, training seed and share s of traces that skip a check, every variant is trained
from the same base model and answers the same test records greedily. The figure is the mean of the three
tasks' F1; intervals are 95%, from resampling groups of test records (a pair and its opposite answers), the
same for both sides of a difference. They do not cover what another training seed would change.

    labels          no reasoning: the outputs are the labels; as many epochs as R-SFT or three times as
                    many, whichever answers the dev records better
    shuffled        each trace replaced by another of the same source and verdicts
    r_sft           stage 1
    continued       R-SFT trained further on its own data, for as many sequences as HS-DPO sees
    chosen          R-SFT trained further on the chosen answers of the hard samples, no preference
    no_weight       HS-DPO with alpha = 1
    hs_dpo          HS-DPO, mined by the R-SFT model alone; k = 4, so alpha has three levels
    hs_dpo_k8       the same prompts with k = 8: seven levels
    ensemble        HS-DPO, mined by three models, each trained without one of the sources
    swapped         HS-DPO with chosen and rejected exchanged: must hurt

A cell runs on one thread, --jobs of them at once. What is finished is kept: the same command goes on.
Not as in the paper: beta = 0.01 x 257 / (mean length of a chosen answer), because these answers are shorter than
the paper's 257 tokens; learning rates are those of the demo.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import certificate  # noqa: E402
import eval as evaluation  # noqa: E402
import make_toy  # noqa: E402
import mine_hard  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
import traces  # noqa: E402
from data import (VERDICTS, Tokenizer, gold_verdict, parse_records, parse_verdict,  # noqa: E402
                  read_json, read_records, split_input, write_json)
from traces import shuffled  # noqa: E402

VARIANTS = ["labels", "shuffled", "r_sft", "continued", "chosen", "no_weight", "hs_dpo", "hs_dpo_k8", "ensemble",
            "swapped"]
CONTRASTS = [("r_sft", "labels"), ("r_sft", "shuffled"), ("continued", "r_sft"), ("chosen", "r_sft"),
             ("hs_dpo", "r_sft"), ("hs_dpo", "continued"), ("hs_dpo", "chosen"), ("hs_dpo", "no_weight"),
             ("hs_dpo_k8", "hs_dpo"), ("ensemble", "hs_dpo"), ("swapped", "hs_dpo")]
DPO_LR = "3e-5"                     # as the demo; further SFT takes it too
SOURCES = ["wildguard", "aegis", "beavertails", "toxicchat"]


def folder_of(args, corpus_seed, seed, skip):
    """Where a cell lives; skip None: the variant without reasoning, the same for all shares."""
    return args.out / f"{'labels' if skip is None else f's{skip}'}_corpus{corpus_seed}_seed{seed}"


class Cell:
    """One corpus seed, training seed and share of skipping traces; each method trains or mines once."""

    def __init__(self, args, corpus_seed, seed, skip):
        self.args, self.seed, self.folder = args, seed, folder_of(args, corpus_seed, seed, skip)
        corpus, _ = make_toy.make_corpus(corpus_seed, skip or 0.0, args.train, args.test)
        self.train = {source: corpus[f"train_{source}"] for source in SOURCES}
        for name in ("dev", "test"):
            write_json(self.folder / f"{name}.json", corpus[name])
        self.common = ["--seed", str(seed), "--device", "cpu", "--dtype", "float32"]

    def sft(self, name, records, model=None, epochs=None, steps=None, lr="2e-3"):
        out = self.folder / name
        if not (out / "config.json").exists():
            write_json(self.folder / f"{name}.json", records)
            train_sft.main(["--model", str(model or self.args.model), "--data", str(self.folder / f"{name}.json"),
                            "--out", str(out), "--lr", lr, "--epochs", str(epochs or self.args.epochs), "--resume",
                            "--batch-size", "32", *(["--max-steps", str(steps)] if steps else []), *self.common])
        return out

    def everything(self, without=None):
        return [r for source in SOURCES if source != without for r in self.train[source]]

    def r_sft(self):
        return self.sft("r_sft", self.everything())

    def mine(self, name, models, k=4):
        out = self.folder / f"mined_{name}"
        if not (out / "hard.jsonl").exists():
            write_json(self.folder / "pool.json", self.everything()[::max(1, self.args.train // self.args.mine)])
            mine_hard.main(["--model", *map(str, models), "--data", str(self.folder / "pool.json"), "--out", str(out),
                            "--k", str(k), "--max-new-tokens", "224", "--resume", *self.common])
        return [json.loads(line) for line in (out / "hard.jsonl").read_text().splitlines()]

    def first_four(self):
        """The pairs of k = 4: a sample depends on its number, so these are the first of the k = 8."""
        self.mine("k8", [self.r_sft()], 8)
        pool, lines = read_records(self.folder / "pool.json"), parse_records(self.folder / "mined_k8/samples.jsonl")
        answers = {line["prompt"]: line["samples"][:4] for _, line in lines}
        return mine_hard.select(pool, ["pool"] * len(pool), [("r_sft", answers)], "all", "random", 0.2, self.seed)[0]

    def dpo(self, name, pairs):
        out, tokenizer = self.folder / name, Tokenizer.from_pretrained(self.args.model)
        if not pairs:
            raise SystemExit(f"{self.folder}: no prompt was hard; raise --mine or --train")
        if not (out / "config.json").exists():
            write_json(self.folder / f"{name}_pairs.json", pairs)
            length = np.mean([len(tokenizer.answer_ids(p["chosen"])) for p in pairs])
            train_dpo.main(["--model", str(self.r_sft()), "--data", str(self.folder / f"{name}_pairs.json"), "--out",
                            str(out), "--lr", DPO_LR, "--batch-size", "32", "--beta", f"{0.01 * 257 / length:.4f}",
                            "--resume", *self.common])
        return out

    def build(self, name):
        """The model folder of a variant."""
        if name == "r_sft":
            return self.r_sft()
        if name.startswith("labels"):
            return self.sft(name, traces.labels_only(self.everything()), epochs=int(name[-2]) * self.args.epochs)
        if name == "shuffled":
            return self.sft(name, shuffled(self.train, self.seed))
        if name == "ensemble":
            models = [self.sft(f"without_{source}", self.everything(without=source)) for source in SOURCES[1:]]
            return self.dpo(name, self.mine("ensemble", models))
        pairs = self.mine("k8", [self.r_sft()], 8) if name == "hs_dpo_k8" else self.first_four()
        if name == "chosen":
            return self.sft(name, [{**p, "output": p["chosen"]} for p in pairs], self.r_sft(), epochs=2, lr=DPO_LR)
        if name == "continued":                      # a pair is two answers: 2 x pairs x 2 epochs of sequences
            return self.sft(name, self.everything(), self.r_sft(), steps=max(1, 4 * len(pairs) // 32), lr=DPO_LR)
        if name == "swapped":
            pairs = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
        return self.dpo(name, [{**p, "weight": 1.0} for p in pairs] if name == "no_weight" else pairs)

    def answers(self, name, data="test"):
        """(rows of the file, 3 tasks) of gold (1 positive, 0 other, -1 no label) and right or wrong (1, 0)."""
        if name == "labels":
            on_dev = {n: mean_f1(self.answers(f"labels_{n}x", "dev")) for n in (1, 3)}
            return self.answers(f"labels_{max(on_dev, key=on_dev.get)}x")
        out = self.folder / f"eval_{data}_{name}"
        if not (out / "results.json").exists():
            evaluation.main(["--model", str(self.build(name)), "--data", str(self.folder / f"{data}.json"), "--out",
                             str(out), "--max-new-tokens", "224", *self.common])
        lines = (out / data / "generated_predictions.jsonl").read_text().splitlines()
        told = [parse_verdict(json.loads(line)["predict"]) for line in lines]
        gold = [gold_verdict(r) for r in read_records(self.folder / f"{data}.json")]
        return np.array([[(-1 if g[t] is None else int(g[t] == words[0]), int(g[t] == p[t]))
                          for t, words in VERDICTS.items()] for g, p in zip(gold, told)])


def run_cell(job):
    """{variant: its answers} of one cell, on one thread; what it prints goes to log.txt."""
    args, corpus_seed, seed, skip, names = job
    torch.set_num_threads(1)
    cell, tables = Cell(args, corpus_seed, seed, skip), {}
    with open(cell.folder / "log.txt", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        for name in names:
            start = time.process_time()
            tables[name] = cell.answers(name)
            with open(cell.folder / "cpu_seconds.txt", "a") as file:
                file.write(f"{time.process_time() - start:.1f} {name}\n")
    return tables


def groups_of(records):
    """(n,) a number for each record: a pair and its opposite answers share one."""
    keys = [replace(certificate.read(*split_input(r["input"])), wish="", changed=False, verb="", left=None)
            for r in records]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def mean_f1(table, weights=None):
    """Mean over tasks of F1 in percent; table (n, 3, 2) as `answers` gives it, weights (n,) counts of each row."""
    scores, weights = [], np.ones(len(table)) if weights is None else weights
    for task in range(3):
        gold, right = table[:, task].T
        tp = (weights * (gold == 1) * right).sum()
        wrong = (weights * (gold >= 0) * (1 - right)).sum()        # 2 tp + fp + fn = 2 tp + all that are wrong
        scores.append(200 * tp / max(2 * tp + wrong, 1))
    return np.mean(scores)


def interval(cells, others=None, groups=None, draws=1000):
    """(figure, low, high) of the mean over cells of mean_f1, or of its difference to `others`, paired.
    cells, others: [(corpus seed, table)]; groups {corpus seed: (n,)}: rows that are drawn together. Cells of
    one corpus have the same test records, so a draw is the same for all of them."""
    rng, sizes = np.random.default_rng(0), {corpus: len(table) for corpus, table in cells}
    groups = groups or {corpus: np.arange(n) for corpus, n in sizes.items()}
    score = lambda some, weights: np.mean([mean_f1(table, weights[corpus]) for corpus, table in some])
    figure = lambda weights: float(score(cells, weights) - (score(others, weights) if others else 0))

    def draw():
        counts = {corpus: groups[corpus].max() + 1 for corpus in sizes}
        return {corpus: np.bincount(rng.integers(n, size=n), minlength=n)[groups[corpus]]
                for corpus, n in counts.items()}

    drawn = [figure(draw()) for _ in range(draws)]
    return figure({corpus: np.ones(n) for corpus, n in sizes.items()}), *map(float, np.percentile(drawn, [2.5, 97.5]))


def report(cells, groups):
    """Two Markdown tables of {(variant, skip): [(corpus seed, table)]}, and their figures as rows."""
    names, skips = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    columns = {**{f"s = {skip}": [skip] for skip in skips}, **({"all": skips} if len(skips) > 1 else {})}
    some = lambda name, shares: [cell for skip in shares for cell in cells[name, skip]]
    line = lambda first, rest: f"| {first} | " + " | ".join(rest) + " |"
    title = lambda first: [line(first, columns), "|---" * (len(columns) + 1) + "|"]
    rows, lines = [], title("mean F1 (95% interval)")
    for name in names:
        found = [interval(some(name, shares), groups=groups) for shares in columns.values()]
        lines.append(line(name, ["{:.1f} ({:.1f} - {:.1f})".format(*x) for x in found]))
        rows += [{"variant": name, "skips": column, "f1": x[0], "ci95": x[1:]} for column, x in zip(columns, found)]
    lines += ["", *title("difference (95% interval, paired)")]
    for name, other in [pair for pair in CONTRASTS if {*pair} <= {*names}]:
        found = [interval(some(name, shares), some(other, shares), groups) for shares in columns.values()]
        lines.append(line(f"{name} - {other}", ["{:+.1f} ({:+.1f} to {:+.1f})".format(*x) for x in found]))
        rows += [{"variant": name, "minus": other, "skips": column, "difference": x[0], "ci95": x[1:]}
                 for column, x in zip(columns, found)]
    return lines, rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/ablation"), help="folder; what is there is not done again")
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="the base model")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which to run")
    p.add_argument("--corpus-seeds", type=int, nargs="+", default=[101], help="none of them 0, the demo's")
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="training and mining seeds")
    p.add_argument("--skips", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.65], help="shares of skipping traces")
    p.add_argument("--train", type=int, default=2400, help="training records")
    p.add_argument("--test", type=int, default=240, help="test records")
    p.add_argument("--mine", type=int, default=136, help="prompts that are mined")
    p.add_argument("--epochs", type=int, default=2, help="of R-SFT")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, a thread each")
    args = p.parse_args(argv)
    start, seeds = time.time(), [(corpus, seed) for corpus in args.corpus_seeds for seed in args.seeds]
    reasoning = [name for name in args.variants if name != "labels"]
    jobs = [(args, *pair, skip, reasoning) for skip in args.skips for pair in seeds]
    jobs += [(args, *pair, None, ["labels"]) for pair in seeds if "labels" in args.variants]
    with ProcessPoolExecutor(min(args.jobs, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(run_cell, jobs))                              # a process that dies is an error here
    cells, groups, notes = defaultdict(list), {}, []
    for (_, corpus, seed, skip, _), tables in zip(jobs, done):
        folder = folder_of(args, corpus, seed, skip)
        groups[corpus] = groups_of(read_records(folder / "test.json"))
        for name, table in tables.items():
            for share in args.skips if skip is None else [skip]:
                cells[name, share].append((corpus, table))
        for name in ("hs_dpo", "hs_dpo_k8") if "r_sft" in tables else ():
            if (folder / f"{name}_pairs.json").exists():
                pairs = read_json(folder / f"{name}_pairs.json")
                weights = Counter(round(pair["weight"], 2) for pair in pairs)
                notes.append(f"s = {skip}, corpus {corpus}, seed {seed}, {name}: {len(pairs)} pairs, alpha "
                             + ", ".join(f"{w} x {n}" for w, n in sorted(weights.items())))
    lines, rows = report({key: cells[key] for name in args.variants for key in cells if key[0] == name}, groups)
    spent = sum(float(line.split()[0]) for path in args.out.glob("*/cpu_seconds.txt") for line in path.open())
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    notes.append(f"{(time.time() - start) / 60:.1f} minutes, {args.jobs} jobs; {spent / 60:.1f} of CPU time in all")
    print("\n".join([*lines, "", *notes]))
    write_json(args.out / "ablation.json", {"rows": rows, "notes": notes, "git": commit.strip() or None,
                                            "arguments": {k: str(v) for k, v in vars(args).items()}})


if __name__ == "__main__":
    main()
