"""What tools/real.py found: the table, paired differences, a picture.

    python tools/real.py table --data DATA --out OUT --beside said.jsonl

    Guard                       what one guard said to one test, for one seed
    throughout, words_guard     guards without a model, on the same tests
    f1_draws, ...               a figure and its resamplings by prompt, the same for all guards
    said_lines, read_said       what a guard said to each record, without a text: said.jsonl
    make_table                  OUT -> OUT/table.json, OUT/table.svg, OUT/said.jsonl, Markdown
"""
import hashlib
import json
import re
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from audit import prompt_of  # noqa: E402
from certificate import features, logistic, number, words_of  # noqa: E402
from data import (VERDICTS, InputError, gold_verdict, parse_records, read_json,  # noqa: E402
                  read_object, read_records, say, split_input, tell, write_bytes, write_json)
from eval import TITLES, f1_of, labels_of, read_predictions, score_cases  # noqa: E402
from plot import COLOURS, GREY, line, text, write_svg  # noqa: E402
from train_sft import git_commit  # noqa: E402

# what each difference is between; "parent" is the arm that the first one began from
CONTRASTS = [
    ("r_sft", "labels_1x"), ("r_sft", "labels_3x"), ("r_sft", "shuffled"), ("r_sft", "r_sft_fast"),
    ("r_sft_fast", "labels_1x"), ("shuffled", "labels_1x"), ("labels_3x", "labels_1x"),
    ("r_sft_two_chains", "r_sft"), ("short", "r_sft"),
    ("verdict_first", "r_sft"), ("verdict_first", "labels_1x"), ("verdict_first", "labels_3x"),
    ("both_fast", "r_sft"), ("both_fast", "labels_1x"),
    ("hs_dpo", "parent"), ("continued", "parent"), ("chosen", "parent"),
    ("hs_dpo", "continued"), ("hs_dpo", "chosen"), ("continued", "chosen")]
# key of a result -> head of its column
FIGURES = {"f1": "F1", "recall": "recall", "false_positive_rate": "FPR", "auprc": "AUPRC",
           "best_f1": "F1 at the best threshold",
           "recall_at_1": "recall at 1% FPR", "recall_at_5": "at 5%", "ece": "ECE",
           "unparsable": "no verdict", "tokens_per_query": "tokens a query"}


# ------------------------------------------------------------------ figures, and what they could be
def f1_draws(cases, task):
    """F1 in percent, (2001,): of the cases (eval.py), then of 2000 resamplings of their prompts. A
    case has prompt, gold and verdict; those of one prompt are drawn together."""
    cases, positive, prompt, drawn = labelled(cases, task)
    right = np.array([case["gold"][task] == case["verdict"][task] for case in cases])
    tp = drawn @ np.bincount(prompt, right & positive)      # (2001, prompts) @ (prompts,)
    wrong = drawn @ np.bincount(prompt, ~right)
    return f1_of(tp, wrong, 0, 0)                           # which are fp or fn: F1 adds them up


def fpr_draws(cases, task):
    """The false-positive rate in percent, (2001,), of the same resamplings: no verdict is one."""
    cases, positive, prompt, drawn = labelled(cases, task)
    wrong = np.array([case["gold"][task] != case["verdict"][task] for case in cases])
    fp = drawn @ np.bincount(prompt, wrong & ~positive)
    negatives = drawn @ np.bincount(prompt, ~positive)
    return 100 * fp / np.maximum(negatives, 1)


def auprc_draws(cases, task):
    """AUPRC in percent, (2001,), of the same resamplings, as eval.py's auprc has it of one; None unless
    all cases have p."""
    counts = by_threshold(cases, task)
    if counts is None:
        return None
    tp, flagged = counts
    gained = np.diff(tp, prepend=0)
    area = np.sum(gained * tp / np.maximum(flagged, 1), 1)
    return 100 * area / np.maximum(tp[:, -1], 1)


def best_f1_draws(cases, task):
    """F1 in percent, (2001,), of the same resamplings at the threshold on p that is best for it:
    what a guard's ranking allows, as the test itself chooses. None unless all cases have p."""
    counts = by_threshold(cases, task)
    if counts is None:
        return None
    tp, flagged = counts
    positives = tp[:, -1:]
    f1 = f1_of(tp, flagged - tp, positives - tp, 0)         # (2001, thresholds)
    return f1.max(1)


def by_threshold(cases, task):
    """(tp, flagged), each (2001, thresholds): how many cases, positive or all, have a p at or above
    each threshold, from the highest on, in every resampling. None unless all cases have p."""
    cases, positive, prompt, drawn = labelled(cases, task)
    if not all(task in case.get("p", {}) for case in cases):
        return None
    p = np.array([case["p"][task] for case in cases])
    order = np.argsort(-p, kind="stable")
    is_last = np.append(np.diff(p[order]) != 0, True)       # last of each threshold
    times = drawn[:, prompt[order]]                         # (2001, n): how often a case is drawn
    tp = np.cumsum(times * positive[order], 1)
    flagged = np.cumsum(times, 1)
    return tp[:, is_last], flagged[:, is_last]


def labelled(cases, task):
    """Of the cases that are labelled for a task: (they, which are positive (n,), the number of each
    one's prompt (n,), how often a resampling draws each prompt (2001, prompts))."""
    cases = [case for case in cases if case["gold"][task]]
    numbers = {}
    prompt = [numbers.setdefault(case["prompt"], len(numbers)) for case in cases]
    positive = [case["gold"][task] == VERDICTS[task][0] for case in cases]
    return cases, np.array(positive), np.array(prompt), resamplings(len(numbers))


@lru_cache(8)
def resamplings(n):
    """How often each of n prompts is drawn, (2001, n): first each once; the same at every call."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000)
    return np.concatenate([np.ones((1, n)), drawn])


def interval(draws):
    """(figure, [low, high]) of draws that begin with the figure itself."""
    return float(draws[0]), np.percentile(draws[1:], [2.5, 97.5]).tolist()


# ------------------------------------------------------------------ guards without a model
def throughout(records, dataset):
    """Cases for eval.score_cases of the guard that always gives the positive verdict."""
    verdict = {task: positive for task, (positive, _) in VERDICTS.items()}
    return [case_of(record, dataset, verdict) for record in records]


def words_guard(records, dataset, train):
    """Cases for eval.score_cases of logistic regression on the words of prompt and response.

    train: records whose outputs are verdicts. A task is learned from the records that have one."""
    known = [words_in(record) for record in train]
    golds = [gold_verdict(record) for record in train]
    vocabulary = number(known)
    tested = features([words_in(record) for record in records], vocabulary)
    p = {}
    for task, (positive, _) in VERDICTS.items():
        some = [i for i, gold in enumerate(golds) if gold[task]]
        if some:
            is_positive = torch.tensor([golds[i][task] == positive for i in some])
            own = features([known[i] for i in some], vocabulary)
            weights, bias = logistic(own, is_positive)
            p[task] = torch.sigmoid(tested @ weights + bias).tolist()
    cases = []
    for i, record in enumerate(records):
        own = {task: values[i] for task, values in p.items()}
        verdict = dict.fromkeys(VERDICTS)
        for task, value in own.items():
            verdict[task] = VERDICTS[task][0 if value > 0.5 else 1]
        cases.append({**case_of(record, dataset, verdict), "p": own})
    return cases


def words_in(record):
    """The words of prompt and response, apart; "no response" counts as a word."""
    prompt, response = split_input(record["input"])
    found = {f"prompt {word}" for word in words_of(prompt)}
    if response is None:
        return found | {"no response"}
    return found | {f"response {word}" for word in words_of(response)}


def case_of(record, dataset, verdict):
    """A case for eval.score_cases and f1_draws."""
    return {"file": dataset, "text": "", "tokens": 0, "prompt": prompt_of(record),
            "gold": labels_of(record, dataset), "verdict": verdict}


# ------------------------------------------------------------------ what is there
# the figures that have an interval
DRAWS = {"f1": f1_draws, "false_positive_rate": fpr_draws, "auprc": auprc_draws,
         "best_f1": best_f1_draws}


class Guard:
    """What one guard said to one test, for one seed: {task: its result of eval.score_cases},
    {figure: {task: its draws}}."""

    def __init__(self, results, cases):
        self.cases = cases
        self.results = {result["task"]: result for result in results if "dataset" in result}
        self.draws = {figure: {task: draws_of(cases, task) for task in self.results}
                      for figure, draws_of in DRAWS.items()}


def hash_of(records):
    """A fingerprint of records, or of files of them."""
    return hashlib.blake2b(json.dumps(records).encode(), digest_size=8).hexdigest()


def data_hash(folder):
    """The hash of what `data` wrote; InputError where it is not there as it was written."""
    told = read_object(folder / "data.json")
    names = told.get("records")
    names = names if isinstance(names, dict) else {}
    files = {name: read_json(folder / f"{name}.json") for name in names}
    if told.get("hash") != hash_of(files):
        raise InputError(f"{folder}: is not as `tools/real.py data` wrote it; make it again, in "
                         "another folder")
    return told["hash"]


def check_test(folder, test, asked):
    """InputError where a folder's answers are to another test of this name. asked: what its
    test.json should say, {"hash": hash_of(all records of the file `test`)}."""
    if read_object(folder / "test.json") != asked:
        raise InputError(f"{folder}: has answers to another test of this name; rename {test}")


def read_guards(out, names, test, train, settings, beside):
    """{guard: {seed: Guard}} of all arms that answered this test, of the guards without a model and
    of those in the files `beside`, whose seed is None. train: the records that `words` learns from;
    settings: see make_table."""
    dataset = Path(test).stem
    records = read_records(test)
    asked = {"hash": hash_of(records)}
    records = records[:settings.get("limit")]
    guards = {}
    for name in names:
        for folder in sorted(out.glob(f"{name}_seed*")):
            seed = folder.name.removeprefix(f"{name}_seed")
            path = folder / "eval" / dataset
            if seed.isdigit() and (path / "results.json").exists():
                check_test(path, test, asked)
                cases = read_answers(path / dataset, records, dataset)
                results = read_json(path / "results.json")
                guards.setdefault(name, {})[int(seed)] = Guard(results, cases)
    simple = {"throughout": throughout(records, dataset),
              "words": words_guard(records, dataset, train)}
    for name, cases in simple.items():
        guards[name] = {None: Guard(score_cases(cases, dataset), cases)}
    for path in beside:
        found = read_said(path, records, dataset, asked["hash"], settings["data"])
        if not found:
            tell(f"{path}: says nothing about {dataset}")
        twice = sorted(found.keys() & guards.keys())
        if twice:
            raise InputError(f"{path}: {twice[0]} is in a file before it, too; leave one out")
        guards.update((name, {None: guard}) for name, guard in found.items())
    return guards


def read_answers(folder, records, dataset):
    """A case for each record, with p where eval.py knew it."""
    answers = read_predictions(folder / "generated_predictions.jsonl", dataset)
    if len(answers) != len(records):
        raise InputError(f"{folder}: {len(answers)} answers to a test of {len(records)} records; "
                         "is it another file of this name?")
    cases = []
    for record, answer in zip(records, answers):
        known = {"p": answer["p"]} if "p" in answer else {}
        cases.append({**case_of(record, dataset, answer["verdict"]), **known})
    return cases


# ------------------------------------------------------------------ what was said, without a text
LETTERS = "10-"             # of a verdict: the positive one, the other one, none


def said_lines(guards, names, test, settings):
    """A line of said.jsonl for each arm, seed and task of a test: the figures, then of each record
    the verdict and P. It holds no text, so what a guard says can be shown where a test cannot.
    settings: of all arms (OUT/settings.json)."""
    lines = []
    asked = hash_of(read_records(test))
    for name in names:
        for seed, guard in guards.get(name, {}).items():
            for task, result in guard.results.items():
                lines.append({
                    "guard": name, "seed": seed, "dtype": settings.get("dtype"),
                    "data": settings["data"], "test": Path(test).stem,
                    "hash": asked, "task": task,
                    **{key: result.get(key) for key in ("n", *FIGURES)},
                    **said_of(guard.cases, task)})
    return lines


def said_of(cases, task):
    """{"said": a letter of LETTERS for each labelled case, "p": a number each, or nothing}."""
    letters = dict(zip((*VERDICTS[task], None), LETTERS))
    some = [case for case in cases if case["gold"][task]]
    said = {"said": "".join(letters[case["verdict"][task]] for case in some)}
    if all(task in case.get("p", {}) for case in some):
        said["p"] = [case["p"][task] for case in some]      # all digits: many lie near 1, and rank
    return said


def read_said(path, records, dataset, asked, data):
    """{name: Guard} of the guards in a said.jsonl that answered this test; InputError where that
    was another one of this name, or the file is no such file. asked, data: the hash of all records
    of the test, and that of what the arms here learned."""
    lines = {}                                              # name -> task -> line
    for place, told in parse_records(path):
        check_said(f"{path}: {place}", told)
        if told["test"] != dataset:
            continue
        if told["hash"] != asked:
            raise InputError(f"{path}: {place} is about another test than this {dataset}")
        own = lines.setdefault(name_of(told, data), {})
        if told["task"] in own:
            raise InputError(f"{path}: {place} says again what a line before it says")
        own[told["task"]] = told
    guards = {}
    for name, own in lines.items():
        cases = [case_of(record, dataset, dict.fromkeys(VERDICTS)) for record in records]
        for task in VERDICTS:
            take_said(f"{path}: {name}", cases, task, own.get(task, {}))
        guards[name] = Guard([{**told, "dataset": dataset} for told in own.values()], cases)
    return guards


def name_of(told, data):
    """What a guard of a said.jsonl is called: arm, seed, what it was computed in and learned."""
    name = f"{told['guard']}, seed {told['seed']}"
    if told["dtype"]:                                       # else what its machine chose
        name += f", {told['dtype']}"
    if told["data"] != data:
        name += f", data {told['data']}"
    return name


def check_said(place, told):
    """InputError where this is not a line of a said.jsonl."""
    known = {"guard", "seed", "dtype", "data", "test", "hash", "task", "said", "n", *FIGURES}
    if not isinstance(told, dict) or not known <= set(told) or not is_said(told):
        raise InputError(f"{place} is no line of a said.jsonl as tools/real.py writes it")


def is_said(told):
    """Whether a line has a letter and P, or no P, for each of its n cases, and figures or none."""
    said = told["said"]
    if not isinstance(said, str) or told["task"] not in list(VERDICTS):
        return False
    p = told.get("p", [0.5] * len(said))
    figures = [told[key] for key in FIGURES if told[key] is not None]
    return (set(said) <= set(LETTERS) and told["n"] == len(said) > 0
            and isinstance(p, list) and len(p) == len(said)
            and all(type(some) is float and 0 <= some <= 1 for some in p)
            and all(type(some) in (int, float) for some in figures))


def take_said(place, cases, task, told):
    """Put what a line of said.jsonl says of a task into its cases; InputError unless it says as
    much as there is to say. told: {} where there is no line."""
    words = dict(zip(LETTERS, (*VERDICTS[task], None)))
    some = [case for case in cases if case["gold"][task]]
    count = told.get("n", 0)
    if len(some) != count:
        raise InputError(f"{place} says {count} verdicts on the {task}, where {len(some)} records "
                         "are labelled")
    for case, letter in zip(some, told.get("said", "")):
        case["verdict"][task] = words[letter]
    for case, p in zip(some, told.get("p", [])):
        case.setdefault("p", {})[task] = p


# ------------------------------------------------------------------ the table
def make_table(out, data, tests, names, settings, beside):
    """Print, write and draw the figures of all that is there. names: of the arms, in order;
    settings: of all of them (OUT/settings.json); beside: files like said.jsonl, with whose guards
    they are compared."""
    train = read_json(data / "labels.json")
    rows = []
    differences = []
    lines = []
    for test in tests:
        guards = read_guards(out, names, test, train, settings, beside)
        lines += said_lines(guards, names, test, settings)
        tasks = {task for seeds in guards.values() for some in seeds.values()
                 for task in some.results}
        for task in [task for task in VERDICTS if task in tasks]:
            where = {"test": Path(test).stem, "task": task}
            rows += [{**where, **figures_of(out, name, seeds, task)}
                     for name, seeds in guards.items()]
            differences += [{**where, **found} for found in differences_of(out, guards, task)]
    parents = {path.stem: read_json(path) for path in sorted(out.glob("parent_seed*.json"))}
    write_json(out / "table.json", {
        "rows": rows, "differences": differences, "parents": parents,
        "data": read_object(data / "data.json")["hash"], "git": git_commit()})
    write_bytes(out / "said.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    draw_picture(rows, out / "table.svg")
    print_tables(rows, differences)                         # last: a reader may be slow


def figures_of(out, name, seeds, task):
    """A row of the table: means over the seeds."""
    results = [guard.results[task] for guard in seeds.values()]
    numbers = [seed for seed in seeds if seed is not None]
    row = {"guard": name, "seeds": numbers, "n": results[0]["n"]}
    for key in FIGURES:
        values = [result.get(key) for result in results]
        row[key] = None if None in values else float(np.mean(values))
    for figure in DRAWS:
        draws = [guard.draws[figure][task] for guard in seeds.values()]
        if all(some is not None for some in draws):
            row[figure], row[f"{figure}_ci95"] = interval(np.mean(draws, 0))
    row["f1_of_seeds"] = [result["f1"] for result in results]
    spent = [seconds_of(out / f"{name}_seed{seed}") for seed in numbers]
    row["minutes"] = float(np.mean(spent)) / 60 if spent else None
    return row


def seconds_of(folder):
    """What seconds.txt of an arm's folder adds up to: its training and all its tests. Mining has a
    folder of its own; answers to dev.json choose a parent, and are no test; what was killed at once
    left no time."""
    path = folder / "seconds.txt"
    if not path.exists():
        return 0.0
    total = 0.0
    for entry in path.read_text().splitlines():             # seconds, script, --data
        if not re.search(r"[ /]dev\.json$", entry):
            total += float(entry.split()[0])
    return total


def contrasts(names):
    """CONTRASTS, then each guard against those without a model, and each before one of a file
    `beside` against that one."""
    pairs = [(name, other) for other in ("words", "throughout") for name in names
             if name not in (other, "throughout")]
    numbered = list(enumerate(names))
    pairs += [(name, other) for place, other in numbered if is_beside(other)
              for _, name in numbered[:place] if name not in ("words", "throughout")]
    return CONTRASTS + pairs


def is_beside(name):
    """Whether a guard is one of a file `beside`, which tells its seed in its name."""
    return ", seed " in name


def differences_of(out, guards, task):
    """[{figure, guard, minus, difference, ci95, seeds}] of `contrasts`, paired by prompt and by
    seed."""
    found = []
    for figure, (name, other) in product(DRAWS, contrasts(guards)):
        by_seed = {}                                        # seed -> draws of the difference
        for seed, guard in guards.get(name, {}).items():
            base = base_of(out, guards, other, seed)
            if base is None:
                continue
            ours = guard.draws[figure][task]
            theirs = base.draws[figure][task]
            if ours is not None and theirs is not None:     # None: of a guard without P
                by_seed[seed] = ours - theirs
        if by_seed:
            difference, ci95 = interval(np.mean(list(by_seed.values()), 0))
            found.append({"figure": figure, "guard": name, "minus": other,
                          "difference": difference, "ci95": ci95,
                          "seeds": [seed for seed in by_seed if seed is not None]})
    return found


def base_of(out, guards, other, seed):
    """The Guard that a guard of this seed is compared with: of the same seed, or without a model;
    None where it has not answered. other: its name, or "parent"."""
    if other == "parent":
        other = parent_in(out, seed)
    seeds = guards.get(other, {})
    return seeds.get(seed, seeds.get(None))


def parent_in(out, seed):
    """The arm that hs_dpo, continued and chosen began from."""
    return read_json(out / f"parent_seed{seed}.json")["parent"]


def by_place(rows):
    """{(test, task): its rows}, in their order."""
    places = {}
    for row in rows:
        places.setdefault((row["test"], row["task"]), []).append(row)
    return places


def print_tables(rows, differences):
    """Markdown: the guards on each test and task, then the differences."""
    places = by_place(rows)
    for (test, task), some in places.items():
        size = some[0]["n"]
        say(f"\n{test}, {TITLES[task]}, n = {size}\n")
        print_row(["guard", *FIGURES.values(), "minutes", "seeds"], is_head=True)
        for row in some:
            cells = {key: shown(row[key]) for key in [*FIGURES, "minutes"]}
            for figure in DRAWS:
                if f"{figure}_ci95" in row:
                    cells[figure] += " ({:.1f} - {:.1f})".format(*row[f"{figure}_ci95"])
            print_row([row["guard"], *cells.values(), str(len(row["seeds"]) or "")])
    for figure in DRAWS:
        say("")
        print_row([f"difference in {FIGURES[figure]} (95% interval, paired)",
                   *(f"{test}, {TITLES[task]}" for test, task in places)], is_head=True)
        some = [found for found in differences if found["figure"] == figure]
        for pair in dict.fromkeys((found["guard"], found["minus"]) for found in some):
            print_difference(places, [found for found in some
                                      if (found["guard"], found["minus"]) == pair])


def print_difference(places, some):
    """A row: one contrast at all places where it is known."""
    cells = dict.fromkeys(places, "")
    for found in some:
        cell = "{:+.1f} ({:+.1f} to {:+.1f})".format(found["difference"], *found["ci95"])
        if len(found["seeds"]) > 1:
            cell += f", {len(found['seeds'])} seeds"
        cells[found["test"], found["task"]] = cell
    print_row(["{guard} - {minus}".format(**some[0]), *cells.values()])


def print_row(cells, is_head=False):
    say("| " + " | ".join(cells) + " |")
    if is_head:
        say("|---" * len(cells) + "|")


def shown(value):
    return "" if value is None else f"{value:.1f}"


# ------------------------------------------------------------------ the picture
TOP = 50
WIDTH = 230         # of a panel
GAP = 30
STEP = 20           # from guard to guard


def draw_picture(rows, path):
    """F1 and interval of each guard, a panel for each test and task."""
    names = list(dict.fromkeys(row["guard"] for row in rows))
    left = 28 + 7 * max(map(len, names))                    # where the first panel begins
    bottom = TOP + STEP * len(names)
    parts = []
    for n, name in enumerate(names):
        parts.append(text(left - 12, TOP + STEP * n + 14, name, "end"))
    x = left
    for (test, task), some in by_place(rows).items():
        size = some[0]["n"]
        parts.append(text(x, TOP - 26, spoken(test)))
        parts.append(text(x, TOP - 10, f"{TITLES[task]}, n = {size}", size=11))
        parts += panel(x, bottom, names, some)
        x += WIDTH + GAP
    label = "F1 in percent, with its 95% interval; the line: throughout"
    parts.append(text(left, bottom + 36, label, size=11))
    write_svg(path, x, bottom + 46, parts)


def spoken(test):
    """The name of a test's file without its numbers: 0_8_toxic_chat is toxic chat."""
    return re.sub(r"^(\d+_)+", "", test).replace("_", " ")


def panel(x, bottom, names, rows):
    """A point and a line for each guard, and a line from top to bottom at "throughout"."""
    def across(f1):
        return x + WIDTH * f1 / 100

    parts = []
    for value in range(0, 101, 25):
        parts.append(line([(across(value), TOP), (across(value), bottom)]))
        parts.append(text(across(value), bottom + 16, value, "middle", 11))
    for row in rows:
        at = across(row["f1"])
        low, high = map(across, row["f1_ci95"])
        y = TOP + STEP * names.index(row["guard"]) + 10
        colour = COLOURS[0] if row["seeds"] else GREY
        if row["guard"] == "throughout":
            parts.append(line([(at, TOP), (at, bottom)], GREY, 1.5))
        parts.append(line([(low, y), (high, y)], colour, 2))
        parts.append(f'<circle cx="{at:.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return parts
