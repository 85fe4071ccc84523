"""The paper's Table 7 on the embedded corpus, with the controls it lacks (`make ablation`).

    python tests/ablation.py --out out/ablation              corpus seeds that no default was chosen on
    python tests/ablation.py --out DIR --skips 0.25 --variants r_sft hs_dpo swapped

For each corpus seed, training seed and share s of traces that skip a check, every variant is trained
from the same base model and answers the same test records greedily. The figure is the mean of the three
tasks' F1; intervals are 95%, from resampling test records, the same for both sides of a difference.

    labels_1x, labels_3x     no reasoning: the outputs are the labels; one and three times R-SFT's epochs
    shuffled                 each trace replaced by another of the same source and verdicts
    r_sft                    stage 1
    continued                R-SFT trained further on its own data, for as many tokens as HS-DPO sees
    chosen                   R-SFT trained further on the chosen answers of the hard samples, no preference
    no_weight                HS-DPO with alpha = 1
    hs_dpo                   HS-DPO, mined by the R-SFT model alone
    ensemble                 HS-DPO, mined by three models, each trained without one of the sources
    swapped                  HS-DPO with chosen and rejected exchanged: must hurt

Not as in the paper: beta = 0.01 x 257 / (mean length of a chosen answer), because these answers are shorter than
the paper's 257 tokens; learning rates are those of the demo.
"""
import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import eval as evaluation  # noqa: E402
import make_toy  # noqa: E402
import mine_hard  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from data import VERDICTS, Tokenizer, format_answers, gold_verdict, parse_verdict, read_records  # noqa: E402
from model import write_json  # noqa: E402

VARIANTS = ["labels_1x", "labels_3x", "shuffled", "r_sft", "continued", "chosen", "no_weight", "hs_dpo", "ensemble",
            "swapped"]
SOURCES = ["wildguard", "aegis", "beavertails", "toxicchat"]


def labels_only(records):
    return [{**r, "output": format_answers(**gold_verdict(r))} for r in records]


def shuffled(by_source, seed):
    """Every trace goes to another record of the same source and verdicts."""
    rng, result = random.Random(seed), []
    for records in by_source.values():
        groups = defaultdict(list)
        for record in records:
            groups[str(gold_verdict(record))].append(record)
        for group in groups.values():
            outputs = [r["output"] for r in group]
            turn = rng.randrange(1, len(outputs)) if len(outputs) > 1 else 0
            result += [{**r, "output": o} for r, o in zip(group, outputs[turn:] + outputs[:turn])]
    return result


class Cell:
    """One corpus seed, training seed and share of skipping traces; each method trains or mines once."""

    def __init__(self, args, folder, corpus_seed, seed, skip):
        self.args, self.folder, self.seed = args, folder, seed
        corpus, _ = make_toy.make_corpus(corpus_seed, skip, args.train, args.test)
        self.train = {source: corpus[f"train_{source}"] for source in SOURCES}
        self.test = corpus["test"][:args.test]
        write_json(folder / "test.json", self.test)
        self.common = ["--seed", str(seed), "--device", "cpu", "--dtype", "float32"]

    def sft(self, name, records, model=None, epochs=None, steps=None, lr="1.5e-3"):
        out = self.folder / name
        if not (out / "config.json").exists():
            write_json(self.folder / f"{name}.json", records)
            train_sft.main(["--model", str(model or self.args.model), "--data", str(self.folder / f"{name}.json"),
                            "--out", str(out), "--lr", lr, "--epochs", str(epochs or self.args.epochs),
                            "--batch-size", "32", *(["--max-steps", str(steps)] if steps else []), *self.common])
        return out

    def everything(self, without=None):
        return [r for source in SOURCES if source != without for r in self.train[source]]

    def r_sft(self):
        return self.sft("r_sft", self.everything())

    def mine(self, name, models):
        out = self.folder / f"mined_{name}"
        if not (out / "hard.jsonl").exists():
            write_json(self.folder / "pool.json", self.everything()[::max(1, self.args.train // self.args.mine)])
            mine_hard.main(["--model", *map(str, models), "--data", str(self.folder / "pool.json"), "--out", str(out),
                            "--max-new-tokens", "224", "--resume", *self.common])
        return [json.loads(line) for line in (out / "hard.jsonl").read_text().splitlines()]

    def dpo(self, name, pairs):
        out, tokenizer = self.folder / name, Tokenizer.from_pretrained(self.args.model)
        if not pairs:
            raise SystemExit(f"{self.folder}: no prompt was hard; raise --mine or --train")
        if not (out / "config.json").exists():
            write_json(self.folder / f"{name}_pairs.json", pairs)
            length = np.mean([len(tokenizer.answer_ids(p["chosen"])) for p in pairs])
            train_dpo.main(["--model", str(self.r_sft()), "--data", str(self.folder / f"{name}_pairs.json"), "--out",
                            str(out), "--lr", "3e-4", "--batch-size", "32", "--beta", f"{0.01 * 257 / length:.4f}",
                            *self.common])
        return out

    def build(self, name):
        """The model folder of a variant."""
        if name == "r_sft":
            return self.r_sft()
        if name.startswith("labels"):
            return self.sft(name, labels_only(self.everything()), epochs=int(name[-2]) * self.args.epochs)
        if name == "shuffled":
            return self.sft(name, shuffled(self.train, self.seed))
        if name == "ensemble":
            models = [self.sft(f"without_{s}", self.everything(without=s)) for s in ("aegis", "beavertails", "toxicchat")]
            return self.dpo(name, self.mine("ensemble", models))
        pairs = self.mine("self", [self.r_sft()])
        if name == "chosen":
            return self.sft(name, [{**p, "output": p["chosen"]} for p in pairs], self.r_sft(), epochs=2, lr="3e-4")
        if name == "continued":                      # a pair is two answers: 2 x pairs x 2 epochs of sequences
            return self.sft(name, self.everything(), self.r_sft(), steps=max(1, 4 * len(pairs) // 32), lr="3e-4")
        if name == "swapped":
            pairs = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
        return self.dpo(name, [{**p, "weight": 1.0} for p in pairs] if name == "no_weight" else pairs)

    def answers(self, name):
        """(test rows, 3 tasks) of gold (1 positive, 0 other, -1 no label) and right or wrong (1, 0)."""
        out = self.folder / f"eval_{name}"
        if not (out / "results.json").exists():
            evaluation.main(["--model", str(self.build(name)), "--data", str(self.folder / "test.json"), "--out", str(out),
                             "--max-new-tokens", "224", *self.common])
        lines = (out / "test" / "generated_predictions.jsonl").read_text().splitlines()
        told = [parse_verdict(json.loads(line)["predict"]) for line in lines]
        gold = [gold_verdict(r) for r in read_records(self.folder / "test.json")]
        return np.array([[(-1 if g[t] is None else int(g[t] == words[0]), int(g[t] == p[t]))
                          for t, words in VERDICTS.items()] for g, p in zip(gold, told)])


def mean_f1(table, weights):
    """Mean over tasks of F1 in percent; table (n, 3, 2) as `answers` gives it, weights (n,) counts of each row."""
    scores = []
    for task in range(3):
        gold, right = table[:, task].T
        tp = (weights * (gold == 1) * right).sum()
        wrong = (weights * (gold >= 0) * (1 - right)).sum()        # 2 tp + fp + fn = 2 tp + all that are wrong
        scores.append(200 * tp / max(2 * tp + wrong, 1))
    return np.mean(scores)


def interval(tables, others=None, draws=400):
    """(figure, low, high) of the mean over cells of mean_f1, or of its difference to `others`, paired."""
    rng = np.random.default_rng(0)
    both = list(zip(tables, others or [None] * len(tables)))
    figure = lambda weights: np.mean([mean_f1(a, w) - (mean_f1(b, w) if b is not None else 0)
                                      for (a, b), w in zip(both, weights)])
    counts = lambda n: np.bincount(rng.integers(n, size=n), minlength=n)
    drawn = [figure([counts(len(t)) for t in tables]) for _ in range(draws)]
    return figure([np.ones(len(t)) for t in tables]), *np.percentile(drawn, [2.5, 97.5])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/ablation"), help="folder; what is there is not done again")
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="the base model")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which to run")
    p.add_argument("--corpus-seeds", type=int, nargs="+", default=[101], help="none of them 0, the demo's")
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="training and mining seeds")
    p.add_argument("--skips", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.65], help="shares of skipping traces")
    p.add_argument("--train", type=int, default=1200, help="training records")
    p.add_argument("--test", type=int, default=300, help="test records")
    p.add_argument("--mine", type=int, default=200, help="prompts that are mined")
    p.add_argument("--epochs", type=int, default=2, help="of R-SFT")
    args = p.parse_args(argv)
    start, tables, notes = time.time(), {}, []
    for skip in args.skips:
        for corpus_seed in args.corpus_seeds:
            for seed in args.seeds:
                folder = args.out / f"s{skip}_corpus{corpus_seed}_seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                cell = Cell(args, folder, corpus_seed, seed, skip)
                for name in args.variants:
                    tables.setdefault((skip, name), []).append(cell.answers(name))
                pairs = folder / "mined_self/hard.jsonl"
                if pairs.exists():
                    weights = Counter(round(json.loads(line)["weight"], 2) for line in pairs.open())
                    notes.append(f"s = {skip}: {sum(weights.values())} pairs, alpha {dict(sorted(weights.items()))}")
    result = []
    print(f"\n{'s':>5}  {'variant':10}  mean F1   95% interval    minus r_sft   95% interval")
    for (skip, name), cells in tables.items():
        figure, low, high = interval(cells)
        row = {"skip": skip, "variant": name, "f1": figure, "ci95": [low, high]}
        line = f"{skip:5}  {name:10}  {figure:7.2f}   {low:5.1f} - {high:5.1f}"
        if (skip, "r_sft") in tables and name != "r_sft":
            row["minus_r_sft"] = interval(cells, tables[skip, "r_sft"])
            line += "      {:+6.2f}     {:+5.1f} to {:+5.1f}".format(*row["minus_r_sft"])
        result.append(row)
        print(line)
    print("\n" + "\n".join(notes) + f"\n{(time.time() - start) / 60:.1f} minutes")
    write_json(args.out / "ablation.json", {"rows": result, "notes": notes, "arguments": {k: str(v) for k, v in vars(args).items()}})


if __name__ == "__main__":
    main()
