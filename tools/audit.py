"""Say what is odd about data files: duplicates, conflicting labels, overlap, gaps, leaks.

    python tools/audit.py FILE...      later files are compared with the earlier ones
"""
import argparse
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (INSTRUCTION, VERDICTS, InputError, gold_verdict, is_blank,  # noqa: E402
                  output_of_columns, read_records, split_input)
from eval import print_line  # noqa: E402

STEP = re.compile(r"^[#* \t]*Reasoning Step\b.*$", re.I | re.M)          # the heading of a step


def prompt_of(record):
    """The user's request of a record."""
    return split_input(record["input"])[0].replace("\r\n", "\n")


def output_of(place, record):
    """The output of a record that need not have one: its text, else what its label columns say, else ""."""
    output = record.get("output")
    if is_blank(output):
        return output_of_columns(place, record).get("output", "")
    if not isinstance(output, str):
        raise InputError(f"{place}: an output is no text: {output!r}"[:200])
    return output


def audit(paths):
    """Print what is odd about data files: the same inputs, other labels, overlap, gaps, leaks. A row is a place,
    from 0 on, among the records that are read: those with an empty field are skipped, which stderr says."""
    seen = set()                                            # prompts of the files before
    for path in paths:
        records = read_records(path, fields=("instruction", "input"))
        for record in records:
            record["output"] = output_of(path, record)
        gold = [gold_verdict(record) for record in records]
        again, conflicting = same_inputs(records, gold)
        findings = {
            "inputs that occur again": again,
            "inputs with two labels": conflicting,
            "prompts of an earlier file": rows_where(records, lambda r: prompt_of(r) in seen),
            "without any label": rows_where(gold, lambda verdict: not any(verdict.values())),
            "empty outputs": rows_where(records, lambda r: not r["output"].strip()),
            "outputs over 8,000 characters": rows_where(records, lambda r: len(r["output"]) > 8000),
            "leaked phrase 'The ground truth is'": rows_where(records, has_leak),
            "other instructions": rows_where(records, lambda r: r["instruction"] != INSTRUCTION)}
        steps = sum(len(STEP.findall(record["output"])) for record in records)
        labels = []
        for task in VERDICTS:
            words = Counter(verdict[task] for verdict in gold if verdict[task])
            labels.append(f"{task} {dict(words)}")
        print_line(f"\n{path}: {len(records)} records, {steps} reasoning steps, labels {', '.join(labels)}")
        for what, rows in findings.items():
            some = ", ".join(map(str, rows[:8]))
            print_line(f"  {len(rows):6} {what}" + (f": rows {some}" if rows else ""))
        seen.update(map(prompt_of, records))


def rows_where(items, is_odd):
    """The places of the items of which that holds."""
    return [row for row, item in enumerate(items) if is_odd(item)]


def has_leak(record):
    return "the ground truth is" in record["output"].lower()


def same_inputs(records, gold):
    """(rows whose input stood before, rows of inputs that have two labels)."""
    with_input = defaultdict(list)                          # input -> the rows that have it
    for row, record in enumerate(records):
        with_input[record["input"]].append(row)
    again = []
    conflicting = []
    for rows in with_input.values():
        again += rows[1:]
        if any(gold[row] != gold[rows[0]] for row in rows):
            conflicting += rows
    return again, conflicting


# ------------------------------------------------------------------ prompts that are nearly the same
def shingles(text, n=3):
    """The set of runs of n words of a text, in lower case; the whole text where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def near_prompts(prompts, others, share=0.5):
    """{number of a prompt: number of the other that is most like it}, where they share at least this
    much: (shingles that both have) / (shingles that either has), 1 where they have the same words in
    the same order."""
    sets = [shingles(text) for text in others]
    holders = defaultdict(list)                             # shingle -> the others that have it
    for number, some in enumerate(sets):
        for shingle in some:
            holders[shingle].append(number)
    near = {}
    for number, prompt in enumerate(prompts):
        own = shingles(prompt)
        common = Counter(other for shingle in own for other in holders[shingle])
        alike = {other: both / (len(own) + len(sets[other]) - both)
                 for other, both in common.items()}
        best = max(alike, key=alike.get, default=None)
        if best is not None and alike[best] >= share:
            near[number] = best
    return near


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE", help="records; the output may be label columns")
    audit(p.parse_args().files)
