"""Saved predictions become training records: the reasoning of another guard, kept where its verdict is right.
Its functions also turn such records into other forms, for experiments (ablation.py, real.py, reason.py).

    python tools/traces.py PREDICTIONS... --out traces.json
        [--limit N] [--seed S] [--most-characters M] [--labels]

PREDICTIONS are JSON lines {"prompt", "label", "predict"} as the released models' files are; a record is
kept if every verdict that its label names is right, each exchange once (the last file wins), in seeded
order. --labels leaves the reasoning out: the same records for the baseline that learns nothing but verdicts.
"""
import argparse
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from data import (HUMAN_LINE, INSTRUCTION, VERDICTS, InputError, answers_heading, at_least,  # noqa: E402
                  exchange_of, folder_of, format_answers, gold_verdict, parse_records, parse_verdict, say)
from early_verdict import one_verdict, read_sections, section_bounds  # noqa: E402
from eval import has_no_end, labels_of  # noqa: E402
from files import keep_inputs, write_new  # noqa: E402
from mine_hard import judge  # noqa: E402


def read_traces(path, counts):
    """Yield (record, gold) of each line of a prediction file: the answer as `output`, and the labels.
    Lines without a request, and answers without an end, are counted."""
    dataset = folder_of(path).name
    for place, line in parse_records(Path(path)):
        if not isinstance(line, dict) or not all(isinstance(line.get(k), str) for k in ("prompt", "label", "predict")):
            raise InputError(f"{path}: {place} needs the text fields prompt, label and predict")
        if has_no_end(line):
            counts["without an end"] += 1
            continue
        if not HUMAN_LINE.search(line["prompt"]):
            counts["without a request"] += 1
            continue
        text = exchange_of(line["prompt"])
        gold = labels_of({"input": text, "output": line["label"]}, dataset)
        yield {"instruction": INSTRUCTION, "input": text, "output": line["predict"].strip()}, gold


def right_traces(path, counts):
    """The records of one file whose verdict is right; counts says what became of the others."""
    records = []
    for record, gold in read_traces(path, counts):
        right = judge(parse_verdict(record["output"]), gold)
        counts["right" if right else "wrong"] += 1
        if right:
            records.append(record)
    return records


# ------------------------------------------------------------------ the same records in other forms
def labels_only(records):
    """The same records without reasoning: the output is the verdicts of the trace."""
    return [{**r, "output": format_answers(**gold_verdict(r))} for r in records]


def shuffled(by_source, seed):
    """Each trace goes to another record of the same source and verdicts: within such a group all move on
    by one random distance. The records come back by groups. One that is alone with its verdicts keeps
    its own."""
    rng = random.Random(seed)
    result = []
    for records in by_source.values():
        groups = defaultdict(list)
        for record in records:
            groups[str(gold_verdict(record))].append(record)
        for group in groups.values():
            outputs = [r["output"] for r in group]
            turn = rng.randrange(1, len(outputs)) if len(outputs) > 1 else 0
            result += [{**r, "output": o} for r, o in zip(group, outputs[turn:] + outputs[:turn])]
    return result


def tidy(answer, has_response):
    """(trace, None): the answer in one form; or (None, what is wrong with it, to be counted).

    The form: a section for each task, "# Task 1" first, with at least one step; a blank line; the
    Answers. An exchange without a response has task 1 alone, and None for the other verdicts: what a
    model says of a response that is not there is cut. Wrong is an answer that begins in the middle
    (some go on with the user's text), lacks a verdict, a section or its steps, or closes a section
    with the other verdict than its Answers give."""
    said = parse_verdict(answer)
    bounds = section_bounds(answer)
    sections = read_sections(answer)
    if not re.match(r"#+ *(Task *1|Reasoning Step *1)\b", answer, re.I):
        return None, "begins in the middle"
    parts = []
    for number, task in enumerate(VERDICTS, 1):
        if task != "request" and not has_response:
            said[task] = None
            continue
        if said[task] is None:
            return None, f"no verdict on the {task}"
        if number not in bounds or task not in sections:
            return None, f"no steps on the {task}"
        closing = sections[task].closing
        if closing and one_verdict(VERDICTS[task], closing)[1].lower() != said[task]:
            return None, f"its conclusion on the {task} is another"
        start, stop = bounds[number]
        part = answer[start:stop].strip()
        has_heading = re.match(r"#+ *Task\b", part, re.I)
        parts.append(part if has_heading else f"# Task {number}\n\n{part}")
    return "\n\n".join([*parts, format_answers(**said)]), None


def shorten(records):
    """The same records with one step a task. The rule: of each section stay its heading, its last
    step, which decides, now numbered 1, and the conclusion after it; the Answers stay."""
    short = []
    for record in records:
        text = record["output"]
        sections = sorted(read_sections(text).values(), key=lambda section: -section.stop)
        for section in sections:                            # from the end: places stay right
            first, last = section.steps[0], section.steps[-1]
            kept = re.sub(r"(Reasoning Step *)\d+", r"\g<1>1", text[last:], count=1, flags=re.I)
            text = text[:first] + kept
        short.append({**record, "output": text})
    return short


def verdict_first(records):
    """The same records with the Answers before the reasoning, which can then only explain them."""
    turned = []
    for record in records:
        text = record["output"]
        heading = answers_heading(text)
        reasoning = text[:heading.start()] if heading else text
        answers = format_answers(**gold_verdict(record))
        turned.append({**record, "output": f"{answers}\n\n{reasoning.rstrip()}"})
    return turned


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("predictions", nargs="+", metavar="FILE", help="prediction files of a teacher")
    p.add_argument("--out", required=True, help="records to write (JSON array)")
    p.add_argument("--limit", type=at_least(1), help="keep the first N of the shuffled records")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the shuffle")
    p.add_argument("--most-characters", type=at_least(1), default=10 ** 9,
                   help="leave out records whose exchange and trace have more together")
    p.add_argument("--labels", action="store_true", help="write the verdicts of each trace alone")
    args = p.parse_args(argv)
    keep_inputs(args.out, args.predictions)
    counts = Counter()
    records = {r["input"]: r for path in args.predictions for r in right_traces(path, counts)}
    records = [r for r in records.values() if len(r["input"]) + len(r["output"]) <= args.most_characters]
    if not records:
        raise InputError(f"{args.out}: nothing to write, as no trace was kept: {dict(counts)}")
    random.Random(args.seed).shuffle(records)
    write_new(args.out, (labels_only(records) if args.labels else records)[:args.limit])
    say(f"{args.out}: {len(records[:args.limit])} records; {dict(counts)}")


if __name__ == "__main__":
    main()
