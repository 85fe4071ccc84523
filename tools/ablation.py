"""The paper's Table 7 on the embedded corpus, with the controls it lacks (`make ablation`).

    python tools/ablation.py --out out/ablation         corpus seeds that no default was chosen on
    python tools/ablation.py --out DIR --skips 0.5 --variants r_sft hs_dpo swapped --minutes 5
    python tools/ablation_table.py DIR                  the tables again, from DIR/answers alone

For each corpus seed, training seed and share s of traces that skip a check, every variant is
trained from the same base model and answers the same test records greedily; all that follow R-SFT
start from one R-SFT model and its 8 answers to each of the mined prompts.

    labels          no reasoning: the outputs are the labels; as many epochs as R-SFT or three times
                    as many, whichever answers the dev records better
    shuffled        each trace replaced by another of the same source and verdicts
    r_sft           stage 1
    continued       R-SFT trained further on its own data, for as many sequences as HS-DPO sees
    chosen          R-SFT trained further on the chosen answers of the hard samples, no preference
    no_weight       HS-DPO with alpha = 1
    hs_dpo          HS-DPO, mined by the R-SFT model alone; k = 4, so alpha has three levels
    hs_dpo_k8       the same prompts with k = 8: seven levels
    ensemble        HS-DPO, mined by three models, each trained without one of the sources
    swapped         HS-DPO with chosen and rejected exchanged: must hurt
    two_correct     HS-DPO's prompts and chosen answers, each with another *correct* answer rejected
    consistent      HS-DPO, without correct answers whose reasoning concludes otherwise
    sound           HS-DPO, without correct answers that state an aim, a wish or an outcome wrongly
    alpha_k8        where alpha could show: no SFT term, gamma = 0.9, k = 8
    alpha_k8_flat   the same with alpha = 1
    group           all 8 answers of a prompt (tools/preferences.py has this loss and the next six)
    chosen_all      the same without preference: SFT on all correct answers of these prompts
    after_difference  no term of HS-DPO pushes what both answers begin with
    differing       the preference counts only tokens that the other answer does not have
    verdicts        it counts only the Answers block
    step            it counts only the first step whose conclusion differs: the one that errs
    erring          it counts that step and the Answers block

With a setting in its name a variant is a point of a grid: chosen@3e-4 has that learning rate,
hs_dpo@3e-4x10 ten times its beta as well. chosen_dev, continued_dev, hs_dpo_dev, step_dev stand
for whole grids; of each the table has the point whose answers to the dev records are best, over all
cells of a share.

A task is one variant of one cell, on one thread; --jobs of them run at once, and what is finished
is kept: the same command goes on. OUT/answers holds all that the tables need, a small file for each
task; folders of two machines merge by copying, as long as a cell is from one of them.
Not as in the paper: beta = 0.01 x 257 / (mean length of a chosen answer), because these answers are
shorter than the paper's 257 tokens; learning rates are those of the demo.

A variant of your own: what it trains in Cell.build, or its pairs in Cell.pairs_for; its name in
VARIANTS and a row of CONTRASTS, both in ablation_table.py.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import ablation_table  # noqa: E402
import certificate  # noqa: E402
import eval as evaluation  # noqa: E402
import make_toy  # noqa: E402
import mine_hard  # noqa: E402
import preferences  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
import traces  # noqa: E402
from ablation_table import GRIDS, PAPER, VARIANTS  # noqa: E402
from data import (VERDICTS, Extend, InputError, Tokenizer, at_least, gold_verdict,  # noqa: E402
                  parse_records, read_records, say, split_input, tell, write_json)
from files import folder_path  # noqa: E402
from model import weights_hash  # noqa: E402
from traces import shuffled  # noqa: E402

ALONE = ["labels_1x", "labels_3x", "shuffled"]      # need no R-SFT model; the longest, so first
FORMS = {"after_difference": preferences.after_difference, "differing": preferences.differing,
         "verdicts": preferences.verdicts, "step": preferences.step,
         "erring": preferences.erring}
DPO_LR = "3e-5"                     # as the demo; further SFT takes it too
SFT_TERM = 2.0                      # as the paper
SOURCES = ["wildguard", "aegis", "beavertails", "toxicchat"]


def cell_name(corpus_seed, seed, skip):
    """A cell's folder; skip None: the variant without reasoning, the same for all shares."""
    share = "labels" if skip is None else f"s{skip}"
    return f"{share}_corpus{corpus_seed}_seed{seed}"


class Cell:
    """One corpus seed, training seed and share of skipping traces; each method trains or mines
    once."""

    def __init__(self, args, corpus_seed, seed, skip):
        self.args = args
        self.seed = seed
        self.folder = args.out / cell_name(corpus_seed, seed, skip)
        corpus, _ = make_toy.make_corpus(corpus_seed, skip or 0.0, args.train, args.test)
        self.train = {source: corpus[f"train_{source}"] for source in SOURCES}
        dev, _ = make_toy.make_corpus(corpus_seed, 0.0, 12, 4 * args.dev)
        for name, records in (("dev", dev["dev"]), ("test", corpus["test"])):
            path = self.folder / f"{name}.json"
            if not path.exists():                           # other tasks of the cell may read it
                write_json(path, records)
        self.common = ["--seed", str(seed), "--device", "cpu", "--dtype", "float32"]

    # -------------------------------------------------------------- stages
    def everything(self, without=None):
        """The training records of all sources but one."""
        records = []
        for source in SOURCES:
            if source != without:
                records += self.train[source]
        return records

    def sft(self, name, records, model=None, epochs=None, steps=None, lr="2e-3"):
        """Train on these records, unless that is done; -> the model folder."""
        out = self.folder / name
        data = self.folder / f"{name}.json"
        if not (out / "config.json").exists():
            write_json(data, records)
            limit = ["--max-steps", str(steps)] if steps else []
            train_sft.main(["--model", str(model or self.args.model), "--data", str(data),
                            "--out", str(out), "--lr", lr,
                            "--epochs", str(epochs or self.args.epochs),
                            "--batch-size", "32", "--resume", "--save-every", "25",
                            *limit, *self.common])
            for checkpoint in out.glob("step-*"):           # of a run that is finished
                shutil.rmtree(checkpoint)
        return out

    def r_sft(self):
        return self.sft("r_sft", self.everything())

    def mine(self, name, models, k):
        """Let these models answer the mined prompts k times; -> the folder with samples."""
        out = self.folder / f"mined_{name}"
        if not (out / "hard.jsonl").exists():
            every = max(1, self.args.train // self.args.mine)
            write_json(self.folder / "pool.json", self.everything()[::every])
            mine_hard.main(["--model", *map(str, models), "--data", str(self.folder / "pool.json"),
                            "--out", str(out), "--k", str(k), "--max-new-tokens", "224",
                            "--resume", *self.common])
        return out

    def samples(self, k):
        """{number of a prompt: its first k answers}. An answer depends on its number, so those of
        k = 4 are the first of the 8."""
        out = self.mine("k8", [self.r_sft()], 8)
        lines = parse_records(out / "samples.jsonl")
        return {line["prompt"]: line["samples"][:k] for _, line in lines}

    def pool(self):
        return read_records(self.folder / "pool.json")

    def pairs(self, k, gamma=0.2, keep=None):
        """hard.jsonl's lines of the first k answers; keep(record, sample): may this correct answer
        be chosen?"""
        pool = self.pool()
        answers = self.samples(k)
        if keep:
            for number, samples in answers.items():
                right = mine_hard.judge_by_all_fields(samples, gold_verdict(pool[number]))
                answers[number] = [s for s, ok in zip(samples, right)
                                   if not ok or keep(pool[number], s)]
        pairs, _ = mine_hard.select(pool, ["pool"] * len(pool), [("r_sft", answers)],
                                    "all", "random", gamma, self.seed)
        if not pairs:
            raise InputError(f"{self.folder}: no prompt was hard; raise --mine or --train")
        return pairs

    def dpo(self, name, pairs, lr=DPO_LR, factor=1.0, sft=SFT_TERM):
        """HS-DPO on these pairs, unless that is done; factor: of beta."""
        out = self.folder / name
        if not (out / "config.json").exists():
            self.keep_pairs(name, pairs)
            beta = factor * self.beta(pairs)
            train_dpo.main(["--model", str(self.r_sft()),
                            "--data", str(self.folder / f"{name}_pairs.json"), "--out", str(out),
                            "--lr", lr, "--batch-size", "32", "--beta", f"{beta:.4f}",
                            "--sft", str(sft), "--resume", *self.common])
        return out

    def prefer(self, name, pairs, make_groups, lr=DPO_LR, factor=1.0):
        """A form of the loss on what make_groups(tokenizer) makes of these pairs, unless that is
        done."""
        out = self.folder / name
        if not (out / "config.json").exists():
            self.keep_pairs(name, pairs)
            beta = factor * self.beta(pairs)
            preferences.train(self.r_sft(), out, make_groups, float(lr), round(beta, 4), SFT_TERM,
                              self.seed)
        return out

    def keep_pairs(self, name, pairs):
        """Write the pairs of a variant beside its model."""
        write_json(self.folder / f"{name}_pairs.json", pairs)

    def beta(self, pairs):
        """The paper's beta, for answers as long as these."""
        tokenizer = Tokenizer.from_pretrained(self.args.model)
        return 0.01 * 257 / np.mean([len(tokenizer.answer_ids(p["chosen"])) for p in pairs])

    # -------------------------------------------------------------- variants
    def build(self, name):
        """The model folder of a variant, or of a point of a grid."""
        method, _, point = name.partition("@")
        lr, _, factor = (point or DPO_LR).partition("x")
        factor = float(factor or 1)
        if method == "r_sft":
            return self.r_sft()
        if method.startswith("labels"):
            epochs = int(method[-2]) * self.args.epochs
            return self.sft(name, traces.labels_only(self.everything()), epochs=epochs)
        if method == "shuffled":
            return self.sft(name, shuffled(self.train, self.seed))
        if method == "continued":                   # a pair is two answers, seen in two epochs
            steps = max(1, 4 * len(self.pairs(4)) // 32)
            return self.sft(name, self.everything(), self.r_sft(), steps=steps, lr=lr)
        if method == "chosen":
            records = [{**pair, "output": pair["chosen"]} for pair in self.pairs(4)]
            return self.sft(name, records, self.r_sft(), epochs=2, lr=lr)
        if method in ("group", "chosen_all"):
            return self.group(name, preferred=method == "group")
        if method in FORMS:
            return self.form(name, FORMS[method], lr, factor)
        sft = 0.0 if method.startswith("alpha") else SFT_TERM
        return self.dpo(name, self.pairs_for(method), lr, factor, sft)

    def pairs_for(self, method):
        """The pairs of a variant that is train_dpo.py on other pairs or weights."""
        if method == "hs_dpo_k8":
            return self.pairs(8)
        if method == "ensemble":
            return self.ensemble()
        if method == "two_correct":
            return self.two_correct()
        if method == "consistent":
            return self.pairs(4, keep=is_consistent)
        if method == "sound":
            return self.pairs(4, keep=is_sound)
        if method == "swapped":
            return [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
                    for pair in self.pairs(4)]
        pairs = self.pairs(8, gamma=0.9) if method.startswith("alpha_k8") else self.pairs(4)
        if method in ("no_weight", "alpha_k8_flat"):
            return [{**pair, "weight": 1.0} for pair in pairs]
        return pairs

    def ensemble(self):
        models = []
        for source in SOURCES[1:]:
            models.append(self.sft(f"without_{source}", self.everything(without=source)))
        out = self.mine("ensemble", models, 4)
        return [pair for _, pair in parse_records(out / "hard.jsonl")]

    def judged_answers(self):
        """{input of a mined prompt: (its number, its right answers, its wrong ones)}, of all 8, as
        texts."""
        samples = self.samples(8)
        judged = {}
        for number, record in enumerate(self.pool()):
            right = mine_hard.judge_by_all_fields(samples[number], gold_verdict(record))
            texts = {True: [], False: []}
            for sample, ok in zip(samples[number], right):
                texts[ok].append(sample["text"])
            judged[record["input"]] = (number, texts[True], texts[False])
        return judged

    def two_correct(self):
        """The pairs of k = 4 with another correct answer, of all 8, rejected; without the prompts
        that have none."""
        judged = self.judged_answers()
        pairs = []
        for pair in self.pairs(4):
            number, correct, _ = judged[pair["input"]]
            others = [text for text in correct if text != pair["chosen"]]
            if others:
                rejected = random.Random(f"{self.seed} {number}").choice(others)
                pairs.append({**pair, "rejected": rejected})
        return pairs

    def group(self, name, preferred):
        """All 8 answers; preferred False: the SFT term alone, on the same batches."""
        judged = self.judged_answers()
        pairs = self.pairs(8)
        prompts = []
        for pair in pairs:
            _, correct, incorrect = judged[pair["input"]]
            prompts.append({**pair, "correct": correct, "incorrect": incorrect})

        def make_groups(tokenizer):
            return preferences.all_answers(tokenizer, prompts)

        return self.prefer(name, pairs, make_groups, factor=1.0 if preferred else 0.0)

    def form(self, name, mask, lr, factor):
        """HS-DPO whose preference counts a part of the tokens."""
        pairs = self.pairs(4)
        fitted = mask if mask is preferences.after_difference else preferences.whole

        def make_groups(tokenizer):
            return preferences.pairs_of(tokenizer, pairs, mask, fitted)

        return self.prefer(name, pairs, make_groups, lr, factor)

    # -------------------------------------------------------------- answers
    def answers(self, name):
        """{file: its answers} of test.json, and of dev.json where a grid needs them: (rows, 3
        tasks) of gold (1 positive, 0 other, -1 no label) and right or wrong (1, 0)."""
        files = ["test"]
        if any(name in points for points in GRIDS.values()):
            files.append("dev")
        out = self.folder / f"eval_{name}"
        if not (out / "results.json").exists():
            paths = [str(self.folder / f"{file}.json") for file in files]
            evaluation.main(["--model", str(self.build(name)), "--data", *paths, "--out", str(out),
                             "--max-new-tokens", "224", *self.common])
        return {file: self.table(out / file) for file in files}

    def table(self, folder):
        """The table of one file's predictions, see `answers`."""
        table = []
        for case in evaluation.read_predictions(folder / "generated_predictions.jsonl", folder.name):
            row = []
            for task, (positive, _) in VERDICTS.items():
                gold = case["gold"][task]
                label = -1 if gold is None else int(gold == positive)
                row.append((label, int(gold == case["verdict"][task])))
            table.append(row)
        return table


def is_consistent(record, sample):
    """Does the reasoning conclude what the verdicts say?"""
    rows = [{"text": sample["text"], "verdict": sample["verdict"]}]
    return not any(evaluation.disagreements(rows, task) for task in VERDICTS)


def is_sound(record, sample):
    """Are all aims, wishes and outcomes that the trace compares as the rule of the corpus has
    them? An answer can have wrong steps and be right by luck: two errors cancel."""
    facts = certificate.states(certificate.read(*split_input(record["input"])))
    for line in re.findall(r"^.*: (?:the same|different)\.$", sample["text"], re.M):
        for what, state in re.findall(r"\b(aim|wish|outcome) (\w+)", line.lower()):
            if state != facts[what]:
                return False
    return True


# ------------------------------------------------------------------ tasks
def run_task(args, corpus_seed, seed, skip, name):
    """Answer the records with one variant, on one thread, and keep what the tables need in
    OUT/answers; what it prints goes to NAME.log in the cell's folder."""
    folder = cell_name(corpus_seed, seed, skip)
    path = args.out / "answers" / folder / f"{name}.json"
    if path.exists():
        return
    if name not in ["r_sft", *ALONE] and not (args.out / folder / "mined_k8/hard.jsonl").exists():
        say(f"{folder}: {name} is left out: the cell's R-SFT model is not here")
        return
    torch.set_num_threads(1)
    cell = Cell(args, corpus_seed, seed, skip)
    seconds = {}
    with open(cell.folder / f"{name}.log", "a", buffering=1) as log:
        with contextlib.redirect_stdout(log):
            start = time.process_time()
            model = cell.build(name)
            seconds["train"] = time.process_time() - start
            if name == "r_sft":
                cell.mine("k8", [model], 8)
                seconds["mine"] = time.process_time() - start - seconds["train"]
            before = time.process_time()
            tables = cell.answers(name)
            seconds["answer"] = time.process_time() - before
    weights = {}
    pairs = cell.folder / f"{name}_pairs.json"
    if pairs.exists():
        weights = Counter(f"{pair['weight']:.2f}" for pair in json.loads(pairs.read_text()))
    base = "" if name in ALONE else weights_hash(cell.r_sft())
    groups = ablation_table.groups_of(read_records(cell.folder / "test.json"))
    write_json(path, {"corpus": corpus_seed, "seed": seed, "skip": skip, "variant": name,
                      "base": base, "pairs": weights, "cpu_seconds": seconds,
                      "groups": groups.tolist(), "git": train_sft.git_commit(), **tables})
    spent = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    say(f"{folder}: {name}, CPU seconds: {spent}")


def names_of(args):
    """What to train for --variants, a grid as its points: what others wait for and what takes
    longest first, then in the order given."""
    names = []
    for variant in args.variants:
        names += GRIDS.get(variant, [variant])
    first = [name for name in ("r_sft", *ALONE, "ensemble") if name in names]
    if set(names) - set(ALONE):
        first = ["r_sft", *first]
    return list(dict.fromkeys(first + names))


def tasks_of(args, names):
    """(tasks that need nothing, {task of an R-SFT model: the tasks that start from it}); a task is
    the arguments of run_task after args."""
    first = []
    after = {}
    for corpus_seed in args.corpus_seeds:
        for seed in args.seeds:
            for skip in args.skips:
                cell = (corpus_seed, seed, skip)
                if "r_sft" in names:
                    rest = [name for name in names if name not in ["r_sft", *ALONE]]
                    after[(*cell, "r_sft")] = [(*cell, name) for name in rest]
                if "shuffled" in names:
                    first.append((*cell, "shuffled"))
            for name in ("labels_3x", "labels_1x"):
                if name in names:
                    first.append((corpus_seed, seed, None, name))
    return first, after


def end_with(parent):
    """Let this process end soon after its parent, however that ended: nobody would wait for it."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(args):
    """All tasks, --jobs at a time; those of a cell once its R-SFT model has mined; a variant in all
    cells before the next; none begins after --minutes. A process that dies is an error here; a task
    that fails is not: -> a line for each of these."""
    names = names_of(args)
    first, after = tasks_of(args, names)
    ready = [*after, *first]
    for corpus_seed, seed, skip, _ in ready:                # here, as two tasks of a cell may begin
        Cell(args, corpus_seed, seed, skip)                 # together: each writes its records
    running = {}
    failed = []
    deadline = time.time() + 60 * args.minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, end_with, (os.getpid(),)) as pool:
        while running or (ready and time.time() < deadline):
            ready.sort(key=lambda task: names.index(task[-1]))
            while ready and len(running) < args.jobs and time.time() < deadline:
                task = ready.pop(0)
                running[pool.submit(run_task, args, *task)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error:
                    line = f"{cell_name(*task[:3])}, {task[3]}: {error!r}"
                    tell(f"failed: {line}")
                    failed.append(line)
                else:
                    ready += after.get(task, [])
    return failed


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=folder_path, default=Path("out/ablation"),
                   help="folder; what is there is not done again")
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="the base model")
    p.add_argument("--variants", nargs="+", action=Extend, choices=VARIANTS, default=PAPER, metavar="NAME",
                   help=f"which to run, of {' '.join(VARIANTS)} (default: the first {len(PAPER)})")
    p.add_argument("--corpus-seeds", type=int, nargs="+", action=Extend, default=[101],
                   help="none of them 0, the demo's")
    p.add_argument("--seeds", type=int, nargs="+", action=Extend, default=[1], help="training and mining seeds")
    p.add_argument("--skips", type=float, nargs="+", action=Extend, default=[0.0, 0.25, 0.5, 0.65],
                   help="shares of skipping traces")
    p.add_argument("--train", type=at_least(1), default=2400, help="training records")
    p.add_argument("--test", type=at_least(1), default=240, help="test records")
    p.add_argument("--dev", type=at_least(1), default=120, help="dev records, on which settings are chosen")
    p.add_argument("--mine", type=at_least(1), default=136, help="prompts that are mined, about")
    p.add_argument("--epochs", type=at_least(1), default=2, help="of R-SFT")
    p.add_argument("--jobs", type=at_least(1), default=os.cpu_count(),
                   help="tasks at a time, a thread each")
    p.add_argument("--minutes", type=float, default=float("inf"), help="begin no task after these")
    return p.parse_args(argv)


def claim(args):
    """Refuse a folder whose variants were made with other settings: they could not be compared."""
    settings = {key: getattr(args, key) for key in ("train", "test", "dev", "mine", "epochs")}
    settings["model"] = weights_hash(args.model)
    mine_hard.check_settings(args.out / "settings.json", settings)


def main(argv=None):
    args = parse_arguments(argv)
    claim(args)
    failed = run_all(args)
    ablation_table.main([str(args.out)])
    if failed:
        raise SystemExit("\n".join(["these failed:", *failed]))


if __name__ == "__main__":
    main()
