"""Real traces, real tests, full size: what does a small guard learn? One command an arm.

    python tools/real.py data --predictions 8B 1B --tests FILE... --out DATA
    python tools/real.py arm r_sft --model BASE --data DATA --out OUT --seed 1      one arm
    python tools/real.py all --model BASE --data DATA --out OUT --seed 1 2 3        all, in turn
    python tools/real.py table --data DATA --out OUT                                so far

    data    DATA/traces.json and its other forms, DATA/tests, DATA/data.json (what became of what)
    arm     OUT/NAME_seed1: model, eval/TEST/results.json, seconds.txt; what was mined, and the
            parent, beside it: OUT/mined_NAME_seed1, OUT/parent_seed1.json
    table   OUT/table.json, OUT/table.svg, and Markdown on the console (real_table.py); and
            OUT/said.jsonl: what each arm said to each record, without a text. With --beside and
            such files of other folders, these arms are compared with those, record by record

8B and 1B are folders with the answers of one model each, generated_predictions.jsonl in a folder
called like its benchmark. Another base is another --model: the learning rates follow from its
width. Everything goes on where it was killed; what is done is not done again. For a test that comes
later: `arm NAME ... --tests FILE`, which says what of it was trained on. The exchanges of
--predictions are trained on, so they are no test. To test on such a benchmark all the same, name its
file in --tests: its prompts are then left out of training.

What `data` keeps. A chain is an answer of which every labelled verdict is right (the labels of all
files in which its answer has an end), in the one form into which traces.py (tidy) can bring it; an
exchange has at most one chain of each model, that of the model named first first. Exchanges whose
prompt is in a test, word for word or nearly (half of the runs of three words that either has are in both:
audit.py, near_prompts), are left out. Classes are balanced by task: all exchanges of the rarer one,
as many of the other. An exchange counts for one task, the last that is labelled of request,
completion and response; verdicts that no label names are the teacher's, in all arms. Of each task a
tenth of the rarer class, and as many of the other, is dev.json, which chooses the parent of the
last three arms and is not trained on.

    labels_1x, labels_3x    the verdicts alone, for as many epochs as R-SFT, or three times as many
    r_sft                   one chain an exchange
    r_sft_fast              that model, read without reasoning
    r_sft_two_chains        up to two chains, of two models; as many steps as r_sft
    short                   one step a task: of each section its heading, its last step, and the
                            conclusion after it (traces.py, shorten)
    verdict_first           the verdicts, then the chain; read with --fast: its answers begin so
    both_fast               each exchange with its chain, and with the verdicts alone; --fast
    shuffled                the chain of another exchange with the same verdicts

and from the reasoning arm (r_sft, r_sft_two_chains, short) with the best mean F1 on dev.json:

    hs_dpo                  HS-DPO on what is hard of --mine training prompts; the labels judge
    continued               the parent on its own records, for as many sequences as HS-DPO sees
    chosen                  the parent on the chosen answers alone

An arm of your own: a row of ARMS, whose records are a file of DATA that you write yourself
(DATA/NAME.json, in the same format), and a row of CONTRASTS in real_table.py. `data` need not run
again; what it wrote is known by its hash, and an OUT has arms of one hash.

Beside them "throughout", which always says harmful, and "words", logistic regression on the words
of prompt and response, trained on the same exchanges and verdicts. Intervals resample the prompts
of a test, all rows of a prompt together, the same for both sides of a difference; with more seeds
they are of the mean over seeds. They do not cover what another seed would change.
"""
import argparse
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import real_table  # noqa: E402
from audit import near_prompts, prompt_of  # noqa: E402
from data import (INSTRUCTION, VERDICTS, Extend, InputError, at_least, format_answers,  # noqa: E402
                  gold_verdict, is_there, parse_records, parse_verdict, read_bytes, read_json,
                  read_object, read_records, say, split_input, tell, warn, write_bytes, write_json,
                  writing)
from eval import read_benchmark  # noqa: E402
from files import folder_path  # noqa: E402
from mine_hard import check_settings, judge  # noqa: E402
from model import LlamaConfig, weights_hash  # noqa: E402
from real_table import check_test, data_hash, hash_of  # noqa: E402
from train_sft import checkpoints, git_commit  # noqa: E402
from traces import (labels_only, read_traces, shorten, shuffled, tidy,  # noqa: E402
                    verdict_first)


# ------------------------------------------------------------------ data
def make_data(args):
    """Write what all arms train on, and say what became of what."""
    paths = [*args.tests, *args.leave_out]
    check_names(paths)
    pool, counts = read_pool(args.predictions)
    random.Random(args.seed).shuffle(pool)
    allowed, overlaps = leave_out(pool, paths)
    dev, rest = take(allowed, args.dev)
    held = set(map(prompt_of, dev))
    train, _ = take([record for record in rest if prompt_of(record) not in held])
    report_answers(counts)
    report_left_out(overlaps, len(pool) - len(allowed), len(pool))
    classes = report_classes({"with a chain": pool, "in no test": allowed,
                              "train": train, "dev": dev})
    if not train or not dev:
        raise InputError("no task has both classes, in training and in dev.json: more answers, or "
                         "another --dev")
    files = {**forms_of(train, args.seed), "dev": to_judge(dev)}
    check_folder(args.out, files, args.tests)
    report_files(files)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "data.json").unlink(missing_ok=True)    # which says that all files are there
    for name, records in files.items():
        write_json(args.out / f"{name}.json", records)
    tests = [copy_of(path, args.out / "tests") for path in args.tests]
    write_json(args.out / "data.json", {
        "tests": tests,
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "git": git_commit(), "hash": hash_of(files), "answers": counts,
        "overlaps": overlaps, "classes": classes,
        "records": {name: len(records) for name, records in files.items()}})
    say(f"\nwrote {args.out}")


def check_folder(out, files, tests):
    """InputError where the folder holds other data: of another seed, or not made here."""
    told = out / "data.json"
    if is_there(told) and not {"hash", "records"} <= read_object(told).keys():
        raise InputError(f"{told}: is there, and was not made here; choose another --out")
    for path in tests:
        copy = out / "tests" / Path(path).name
        if is_there(copy) and read_bytes(copy) != read_bytes(path):
            raise InputError(f"{copy}: is there, and is not {path}; choose another --out")
    for name, records in files.items():
        path = out / f"{name}.json"
        if is_there(path) and read_json(path) != records:
            raise InputError(f"{path}: is there and holds something else; choose another --out")


def check_names(paths):
    """A test is known by its file's name: refuse two of one name, and that of dev.json."""
    names = Counter(Path(path).stem for path in paths)
    names["dev"] += 1
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise InputError(f"two files are called {twice[0]!r} (dev.json is one); rename one")


def copy_of(path, folder):
    """Copy a file into a folder, unless it is there (then it is the same: check_folder); returns the
    copy's name."""
    copy = folder / Path(path).name
    if not is_there(copy):
        write_bytes(copy, read_bytes(path))                 # whole, as a half one would be another
    return copy.name


def read_pool(folders):
    """([a record for each exchange with a chain], {folder: Counter of what became of its answers}).

    A record has instruction, input, label (an Answers block of all labels), source (the benchmark)
    and chains, at most one a folder."""
    answers = defaultdict(list)                             # exchange -> (folder, answer), in order
    labels = defaultdict(dict)                              # exchange -> task -> words
    sources = {}
    counts = {folder: Counter() for folder in folders}
    read = set()
    for folder in folders:
        for path in prediction_files(folder):
            if os.path.realpath(path) in read:
                raise InputError(f"{path}: is in two folders of --predictions; a model is one")
            read.add(os.path.realpath(path))
            for record, gold in read_traces(path, counts[folder]):
                exchange = record["input"]
                sources.setdefault(exchange, path.parent.name)
                answers[exchange].append((folder, record["output"]))
                for task, word in gold.items():
                    if word:
                        labels[exchange].setdefault(task, []).append(word)
    pool = []
    for exchange, some in answers.items():
        gold = labels[exchange]
        chains = {}
        for folder, answer in some:
            chain, fault = chain_of(exchange, answer, gold)
            if chain and folder in chains:
                fault = "the exchange has a chain of this model already"
            counts[folder][fault or "kept"] += 1
            if not fault:
                chains[folder] = chain
        if chains:
            label = format_answers(**{task: words[0] for task, words in gold.items()})
            pool.append({"instruction": INSTRUCTION, "input": exchange, "label": label,
                         "source": sources[exchange], "chains": list(chains.values())})
    return pool, counts


def prediction_files(folder):
    """The answers of one model, in order."""
    paths = sorted(Path(folder).rglob("generated_predictions.jsonl"))
    if not paths:
        raise InputError(f"{folder}: no generated_predictions.jsonl in it")
    return paths


def chain_of(exchange, answer, gold):
    """(the chain, None), or (None, why it is none). gold: {task: the words that files label it}."""
    if any(len(set(words)) > 1 for words in gold.values()):
        return None, "files label the exchange differently"
    labels = {task: gold.get(task, [None])[0] for task in VERDICTS}
    if not judge(parse_verdict(answer), labels):
        return None, "a labelled verdict is wrong"
    _, response = split_input(exchange)
    return tidy(answer, response is not None)


def leave_out(pool, paths):
    """(the records whose prompts are in none of these files, {test: what was found in it})."""
    prompts = [prompt_of(record) for record in pool]
    gone = set()
    overlaps = {}
    for path in paths:
        exact, near = overlap(prompts, path)
        gone.update(exact, near)
        overlaps[Path(path).stem] = {"exact": len(exact), "near": len(near),
                                     "pairs": sorted({(prompts[n], other)
                                                      for n, other in near.items()})}
    return [record for n, record in enumerate(pool) if n not in gone], overlaps


def overlap(prompts, path):
    """(numbers of the prompts that are in this file word for word, {number of a prompt that nearly
    is: the file's})."""
    others = list(dict.fromkeys(map(prompt_of, read_records(path))))
    known = set(others)
    exact = [n for n, prompt in enumerate(prompts) if prompt in known]
    near = {n: others[other] for n, other in near_prompts(prompts, others).items()
            if prompts[n] not in known}
    return exact, near


def class_of(record):
    """(task, word): of the labelled tasks the last one."""
    gold = parse_verdict(record["label"])
    task = [task for task in VERDICTS if gold[task]][-1]
    return task, gold[task]


def take(records, share=1):
    """(the first records of each class, the others), in their order: of each task as many of one
    class as of the other, this share of the rarer one."""
    sizes = Counter(map(class_of, records))
    room = {}
    for task, words in VERDICTS.items():
        for word in words:
            room[task, word] = round(share * min(sizes[task, other] for other in words))
    taken = []
    others = []
    for record in records:
        key = class_of(record)
        if room[key]:
            room[key] -= 1
            taken.append(record)
        else:
            others.append(record)
    return taken, others


def with_chains(records, most):
    """A record for each of the first `most` chains of these, which is its output."""
    result = []
    for record in records:
        rest = {name: value for name, value in record.items() if name != "chains"}
        result += [{**rest, "output": chain} for chain in record["chains"][:most]]
    return result


def to_judge(records):
    """A record for each of these whose output is its labels."""
    return [{**record, "output": record["label"]} for record in with_chains(records, 1)]


def forms_of(train, seed):
    """{file: its records}."""
    traces = with_chains(train, 1)
    labels = labels_only(traces)
    return {"traces": traces,
            "labels": labels,
            "two_chains": with_chains(train, 2),
            "short": shorten(traces),
            "verdict_first": verdict_first(traces),
            "both": traces + labels,
            "shuffled": shuffled({"all": traces}, seed),
            "prompts": to_judge(train)}


def report_answers(counts):
    """Print what became of each model's answers."""
    for folder, some in counts.items():
        say(f"\n{folder}: {some.total()} answers")
        for what, count in some.most_common():
            say(f"  {count:6} {what}")


def report_left_out(overlaps, gone, total):
    """Print how many exchanges were left out for each test."""
    say("\nexchanges whose prompt is in a test         word for word    nearly")
    for test, some in overlaps.items():
        say(f"  {test:42} {some['exact']:12} {some['near']:9}")
    say(f"  {gone} of {total} left out")


def report_classes(stages):
    """Print how many exchanges of each class there are; returns {stage: {class: number}}."""
    classes = {}
    for stage_name, records in stages.items():
        classes[stage_name] = {f"{task} {word}": n
                               for (task, word), n in Counter(map(class_of, records)).items()}
    say("\nexchanges, by label      " + "".join(f"{name:>15}" for name in stages))
    for task, words in VERDICTS.items():
        for word in words:
            key = f"{task} {word}"
            cells = [f"{some.get(key, 0):15}" for some in classes.values()]
            say(f"  {key:23}" + "".join(cells))
    say(f"  {'in all':23}" + "".join(f"{len(records):15}" for records in stages.values()))
    return classes


def report_files(files):
    """Print records, characters and verdicts of each file."""
    say("\nfile              records  characters  verdicts, labelled or the teacher's")
    for name, records in files.items():
        characters = np.mean([len(record["output"]) for record in records])
        golds = [gold_verdict(record) for record in records]
        cells = []
        for task, words in VERDICTS.items():
            sizes = Counter(gold[task] for gold in golds)
            cells.append(f"{task} {sizes[words[0]]} {words[0]}, {sizes[words[1]]} {words[1]}")
        say(f"{name:16} {len(records):8} {characters:11.0f}  {'; '.join(cells)}")


# ------------------------------------------------------------------ the arms
@dataclass(frozen=True)
class Arm:
    """How an arm is made that has no parent; those of AFTER set nothing here."""
    data: str = None            # the file of DATA it trains on
    times: int = 1              # --epochs times this
    steps_of: str = None        # as many steps as an arm on this file
    fast: bool = False          # read without reasoning
    model_of: str = None        # trains nothing: the model of this arm


ARMS = {
    "labels_1x": Arm("labels"),
    "labels_3x": Arm("labels", times=3),
    "r_sft": Arm("traces"),
    "r_sft_fast": Arm(model_of="r_sft", fast=True),
    "r_sft_two_chains": Arm("two_chains", steps_of="traces"),
    "short": Arm("short"),
    "verdict_first": Arm("verdict_first", fast=True),
    "both_fast": Arm("both", fast=True),
    "shuffled": Arm("shuffled"),
    "hs_dpo": Arm(),
    "continued": Arm(),
    "chosen": Arm(),
}
REASONING = ["r_sft", "r_sft_two_chains", "short"]          # one of them is the parent
AFTER = ["hs_dpo", "continued", "chosen"]                   # these begin from the parent
DPO_EPOCHS = 2                                              # paper: 2
WIDTH = 576                 # of SmolLM2-135M, at which 3e-4 was a good rate of R-SFT
LR = 3e-4                   # at another width: in inverse proportion; 8.4e-5 at 1B (paper: 5e-5)
DPO_LR = 1 / 15             # of --lr, of what follows R-SFT; 5.6e-6 at 1B (paper: 5e-6)


def run_arm(args, name):
    """Train an arm and answer all tests; what is done already is skipped."""
    build(args, name)
    for path in test_files(args):
        evaluate(args, name, path)


def claim(args):
    """Refuse a folder whose arms were made with other settings: they could not be compared."""
    names = "model lr dpo_lr epochs batch_size mine limit max_new_tokens dtype".split()
    settings = {key: getattr(args, key) for key in names}
    settings["data"] = data_hash(args.data)
    settings["weights_hash"] = weights_hash(args.model)     # other weights may come into the folder
    check_settings(args.out / "settings.json", settings)


def arm_folder(args, name):
    return args.out / f"{name}_seed{args.seed}"


def test_files(args):
    """--tests, or all that `data` was told of."""
    if args.tests:
        check_names(args.tests)
        return args.tests
    told = args.data / "data.json"
    names = read_object(told).get("tests")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{told}: does not name the tests; give --tests")
    return [args.data / "tests" / name for name in names]


def build(args, name):
    """The model folder of an arm, trained if it is not there yet."""
    claim(args)
    arm = ARMS[name]
    if name in AFTER:
        return {"hs_dpo": hs_dpo, "continued": continued, "chosen": chosen}[name](args)
    if arm.model_of:
        return build(args, arm.model_of)
    steps = None
    if arm.steps_of:
        records = read_json(args.data / f"{arm.steps_of}.json")
        steps = args.epochs * math.ceil(len(records) / args.batch_size)
    data = args.data / f"{arm.data}.json"
    return sft(args, name, args.model, data, args.lr, args.epochs * arm.times, steps)


def sft(args, name, model, data, lr, epochs, steps=None):
    """Train on records; the model folder."""
    options = ["--data", data, "--lr", lr, "--epochs", epochs]
    if steps:
        options += ["--max-steps", steps]
    return run_trainer(args, name, "train_sft.py", model, options)


def run_trainer(args, name, script, model, options):
    """Run a trainer, unless its model is there; the model folder."""
    out = arm_folder(args, name) / "model"
    if not (out / "config.json").exists():
        options = ["--model", model, *options, "--out", out, "--resume",
                   "--batch-size", args.batch_size, "--max-tokens", args.max_tokens,
                   "--save-every", args.save_every, "--keep", 1]
        stage(args, name, script, options)
    for left in checkpoints(out):                           # at 1B each takes 15 GB
        shutil.rmtree(left)
    return out


def evaluate(args, name, path):
    """The results of an arm on one file, answered if they are not there yet."""
    out = arm_folder(args, name) / "eval" / Path(path).stem
    claim_test(out, path)
    if not (out / "results.json").exists():
        options = ["--model", build(args, name), "--data", path, "--out", out, "--scores",
                   "--max-new-tokens", args.max_new_tokens]
        if ARMS[name].fast:
            options.append("--fast")
        if args.limit:
            options += ["--limit", args.limit]
        stage(args, name, "eval.py", options)
    return [result for result in read_json(out / "results.json") if "dataset" in result]


def claim_test(out, path):
    """Refuse a folder with answers to another test of this name. A test of which nothing was
    answered, as its file was wrong, say, holds no folder."""
    known = out / "test.json"
    asked = {"hash": hash_of(read_records(path))}
    if known.exists() and any(other != known for other in out.iterdir()):
        check_test(out, path, asked)
    else:
        write_json(known, asked)


def stage(args, name, script, options):
    """Run a script, as the command line that is shown would; note its seconds."""
    options = [*map(str, options), "--seed", str(args.seed)]
    for flag in ("device", "dtype"):
        if getattr(args, flag):
            options += [f"--{flag}", getattr(args, flag)]
    say(f"\n$ python {script} {shlex.join(options)}")
    start = time.time()
    try:
        run(script, options)
    finally:
        arm_folder(args, name).mkdir(parents=True, exist_ok=True)
        with open(arm_folder(args, name) / "seconds.txt", "a") as file:
            data = options[options.index("--data") + 1]
            data = " ".join(data.splitlines())              # one line, whatever the path is
            file.write(f"{time.time() - start:.1f} {Path(script).stem} {data}\n")


def run(script, options):
    """Run a script in a process of its own, which leaves no memory behind: on a CPU what training
    gives back lies in small pieces, and whatever comes next is slow. A signal ends the script,
    which saves, and then this process."""
    process = subprocess.Popen([sys.executable, ROOT / script, *options])
    told = []                                               # the signals that came meanwhile

    def pass_on(number, frame):
        told.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:                               # the terminal told the script as well
        told.append(signal.SIGINT)
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code or told:                                        # a script that was at its end says 0
        raise SystemExit(code or 128 + told[0])


# ------------------------------------------------------------------ from the best reasoning arm on
def parent_of(args):
    """--parent, or else best_on_dev: all arms of a seed that have a parent have the same."""
    path = args.out / f"parent_seed{args.seed}.json"
    if args.parent:
        check_settings(path, {"parent": args.parent})
    elif not path.exists():
        write_json(path, best_on_dev(args))
    parent = read_object(path).get("parent")
    if parent not in REASONING:
        raise InputError(f"{path}: names no parent; give --parent and another --out, or remove it")
    return parent


def best_on_dev(args):
    """The reasoning arm with the best mean F1 on dev.json, of equal ones the first; and all F1."""
    figures = {}
    for name in REASONING:
        results = evaluate(args, name, args.data / "dev.json")
        figures[name] = float(np.mean([result["f1"] for result in results]))
    return {"parent": max(figures, key=figures.get), "dev_f1": figures}


def mine(args):
    """The hard.jsonl of the parent's answers to training prompts."""
    parent = parent_of(args)
    name = f"mined_{parent}"
    out = arm_folder(args, name)
    if not (out / "hard.jsonl").exists():
        stage(args, name, "mine_hard.py",
              ["--model", build(args, parent), "--data", args.data / "prompts.json", "--out", out,
               "--limit", args.mine, "--max-new-tokens", args.max_new_tokens, "--resume"])
    path = out / "hard.jsonl"
    if not path.stat().st_size:
        raise NothingHard(f"{path}: no prompt was hard, so there is nothing to learn for "
                          f"{', '.join(AFTER)}; a higher --mine wants another --out")
    return path


class NothingHard(InputError):
    """The parent answers all mined prompts right every time, or none."""


def pairs_of(args):
    """The pairs that were mined."""
    return [pair for _, pair in parse_records(mine(args))]


def hs_dpo(args):
    return run_trainer(args, "hs_dpo", "train_dpo.py", build(args, parent_of(args)),
                       ["--data", mine(args), "--lr", args.dpo_lr, "--epochs", DPO_EPOCHS])


def continued(args):
    parent = parent_of(args)
    data = args.data / f"{ARMS[parent].data}.json"
    sequences = DPO_EPOCHS * 2 * len(pairs_of(args))        # a pair is two answers
    epochs = math.ceil(sequences / len(read_json(data)))
    steps = math.ceil(sequences / args.batch_size)
    return sft(args, "continued", build(args, parent), data, args.dpo_lr, epochs, steps)


def chosen(args):
    data = arm_folder(args, "chosen") / "chosen.json"
    write_json(data, [{**pair, "output": pair["chosen"]} for pair in pairs_of(args)])
    return sft(args, "chosen", build(args, parent_of(args)), data, args.dpo_lr, DPO_EPOCHS)


# ------------------------------------------------------------------ the script
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write what all arms train on")
    data.add_argument("--predictions", nargs="+", action=Extend, required=True, metavar="DIR",
                      help="answers of one model each; a chain of the first one is preferred")
    data.add_argument("--tests", nargs="+", action=Extend, required=True, metavar="FILE",
                      help="benchmarks")
    data.add_argument("--leave-out", nargs="+", action=Extend, default=[], metavar="FILE",
                      help="more files whose prompts are not trained on")
    data.add_argument("--out", type=folder_path, required=True, help="folder to write")
    data.add_argument("--seed", type=at_least(0), default=1, help="of the order and the split")
    data.add_argument("--dev", type=at_least(0, float, 0.5), default=0.1,
                      help="share of each class for dev.json")
    arm = commands.add_parser("arm", help="one arm, end to end")
    arm.add_argument("arms", nargs=1, choices=ARMS, metavar="NAME", help=" ".join(ARMS))
    arm.add_argument("--seed", dest="seeds", type=at_least(0), nargs=1, default=[1],
                     help="of training and mining")
    everything = commands.add_parser("all", help="arms one after another, then the table")
    everything.add_argument("--arms", nargs="+", action=Extend, choices=ARMS, default=list(ARMS),
                            help="which")
    everything.add_argument("--seed", dest="seeds", type=at_least(0), nargs="+", action=Extend,
                            default=[1],
                            help="one or more")
    for some in (arm, everything):
        arm_arguments(some)
    figures = commands.add_parser("table", help="the figures of all that is there")
    for some in (arm, everything, figures):
        some.add_argument("--data", type=folder_path, required=True, metavar="DIR",
                          help="what `data` wrote")
        some.add_argument("--out", type=folder_path, required=True, help="folder of all arms")
        some.add_argument("--tests", nargs="+", action=Extend, metavar="FILE",
                          help="these instead of those that `data` was told of")
    for some in (everything, figures):
        some.add_argument("--beside", nargs="+", action=Extend, default=[], metavar="FILE",
                          help="said.jsonl of other arms, to compare with")
    args = p.parse_args(argv)
    if args.command in ("arm", "all"):
        width = LlamaConfig.from_json(Path(args.model) / "config.json").hidden_size
        if args.lr is None:
            args.lr = float(f"{LR * WIDTH / width:.2g}")
        if args.dpo_lr is None:
            args.dpo_lr = float(f"{args.lr * DPO_LR:.2g}")
    return args


def arm_arguments(p):
    """What shapes an arm."""
    # as it is given: an --out knows it so
    p.add_argument("--model", required=True, metavar="DIR", help="the base model")
    p.add_argument("--epochs", type=at_least(1), default=2, help="of R-SFT")
    p.add_argument("--batch-size", type=at_least(1), default=8, help="sequences, or pairs, a step")
    p.add_argument("--lr", type=at_least(0, float), help="of R-SFT (default: by the model's width)")
    p.add_argument("--dpo-lr", type=at_least(0, float), help="of what follows (default: lr / 15)")
    p.add_argument("--parent", choices=REASONING, help="of the last arms (default: dev.json says)")
    p.add_argument("--mine", type=at_least(1), default=200, help="training prompts to mine")
    p.add_argument("--max-new-tokens", type=at_least(1), default=600, help="of an answer")
    p.add_argument("--max-tokens", type=at_least(1), default=4096,
                   help="of a pack: speed and memory only")
    p.add_argument("--save-every", type=at_least(0), default=20, metavar="N",
                   help="checkpoint every N steps; gone when the model is there")
    p.add_argument("--limit", type=at_least(1), help="rows of each test and of dev.json: a trial")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--dtype", choices=["bfloat16", "float32", "float64"], help="of products")


def main(argv=None):
    args = parse_arguments(argv)
    if args.command == "data":
        return make_data(args)
    if args.command == "table":
        return table(args)
    report_overlap(args)
    check_tests(args)
    missing = []                                            # of `all`: arms that cannot be made
    for seed in args.seeds:
        args.seed = seed                                    # what run_arm reads
        for name in args.arms:
            say(f"\n==== {name}, seed {seed}")
            try:
                run_arm(args, name)
            except NothingHard as nothing:
                if args.command == "arm":
                    raise
                tell(nothing)
                missing.append(f"{name}, seed {seed}")
    if args.command == "all":
        table(args)
    if missing:
        raise InputError(f"not run, as no prompt was hard: {'; '.join(missing)}")


def table(args):
    settings = read_object(args.out / "settings.json")
    if settings.get("data") != data_hash(args.data):
        raise InputError(f"{args.out}: these arms were trained on other data than {args.data}")
    real_table.make_table(args.out, args.data, test_files(args), ARMS, settings, args.beside)


def report_overlap(args):
    """Warn how many training prompts are in each file of --tests, word for word or nearly: `data` knew
    of other tests."""
    data_hash(args.data)                                    # prompts.json is as `data` wrote it
    prompts = [prompt_of(record) for record in read_json(args.data / "prompts.json")]
    for path in args.tests or []:
        exact, near = overlap(prompts, path)
        warn(len(exact) + len(near), f"training prompts are in {path}, {len(exact)} word for word")


def check_tests(args):
    """InputError where a test has no label, before hours of training rather than after them."""
    for path in test_files(args):
        read_benchmark(path, limit=args.limit)


if __name__ == "__main__":
    main()
