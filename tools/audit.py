"""Say what is odd about data files: duplicates, conflicting labels, overlap, gaps, leaks.

    python tools/audit.py FILE...      later files are compared with the earlier ones
"""
import argparse
import re
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (INSTRUCTION, VERDICTS, InputError, gold_verdict, is_blank, is_there,  # noqa: E402
                  output_of_columns, read_records, split_input)


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


def keep_inputs(out, paths, option="--out"):
    """InputError where a file that is to be written is one of those that are read, under any name."""
    for path in paths:
        if is_there(out) and is_there(path) and Path(out).samefile(path):
            raise InputError(f"{path}: is read, and would be overwritten; choose another {option}")


def audit(paths):
    """Print what is odd about data files: the same inputs, other labels, overlap, gaps, leaks."""
    seen = {}
    for path in paths:
        records = read_records(path, fields=("instruction", "input"))
        for record in records:
            record["output"] = output_of(path, record)
        gold = [gold_verdict(record) for record in records]
        rows = defaultdict(list)
        for i, record in enumerate(records):
            rows[record["input"]].append(i)
        steps = [len(re.findall(r"^[#* \t]*Reasoning Step\b", r["output"], re.I | re.M)) for r in records]
        findings = {
            "inputs that occur again": [i for same in rows.values() for i in same[1:]],
            "inputs with two labels": [i for same in rows.values() for i in same
                                       if len({str(gold[j]) for j in same}) > 1],
            "prompts of an earlier file": [i for i, r in enumerate(records) if prompt_of(r) in seen],
            "without any label": [i for i, g in enumerate(gold) if not any(g.values())],
            "empty outputs": [i for i, r in enumerate(records) if not r["output"].strip()],
            "outputs over 8,000 characters": [i for i, r in enumerate(records) if len(r["output"]) > 8000],
            "leaked phrase 'The ground truth is'": [i for i, r in enumerate(records)
                                                    if "the ground truth is" in r["output"].lower()],
            "other instructions": [i for i, r in enumerate(records) if r["instruction"] != INSTRUCTION]}
        print(f"\n{path}: {len(records)} records, {sum(steps)} reasoning steps, labels "
              + ", ".join(f"{name} {dict(Counter(g[name] for g in gold if g[name]))}" for name in VERDICTS))
        for what, where in findings.items():
            print(f"  {len(where):6} {what}" + (f": rows {', '.join(map(str, islice(where, 8)))}" if where else ""))
        seen.update(dict.fromkeys(map(prompt_of, records)))


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
