"""Say what is odd about data files: duplicates, conflicting labels, overlap, gaps, leaks.

    python tools/audit.py FILE...      later files are compared with the earlier ones
"""
import re
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import INSTRUCTION, VERDICTS, gold_verdict, read_records, split_input  # noqa: E402


def audit(paths):
    """Print what is odd about data files: the same inputs, other labels, overlap, gaps, leaks."""
    seen = {}
    for path in paths:
        records = read_records(path, fields=("instruction", "input"))
        rows, gold = defaultdict(list), [gold_verdict({"output": "", **r}) for r in records]
        for i, record in enumerate(records):
            rows[record["input"]].append(i)
        steps = [len(re.findall("Reasoning Step", r.get("output", ""))) for r in records]
        findings = {
            "inputs that occur again": [i for same in rows.values() for i in same[1:]],
            "inputs with two labels": [i for same in rows.values() for i in same
                                       if len({str(gold[j]) for j in same}) > 1],
            "prompts of an earlier file": [i for i, r in enumerate(records) if split_input(r["input"])[0] in seen],
            "without any label": [i for i, g in enumerate(gold) if not any(g.values())],
            "empty outputs": [i for i, r in enumerate(records) if not r.get("output", "").strip()],
            "outputs over 8,000 characters": [i for i, r in enumerate(records) if len(r.get("output", "")) > 8000],
            "leaked phrase 'The ground truth is'": [i for i, r in enumerate(records)
                                                    if "the ground truth is" in r.get("output", "").lower()],
            "other instructions": [i for i, r in enumerate(records) if r["instruction"] != INSTRUCTION]}
        print(f"\n{path}: {len(records)} records, {sum(steps)} reasoning steps, labels "
              + ", ".join(f"{name} {dict(Counter(g[name] for g in gold if g[name]))}" for name in VERDICTS))
        for what, where in findings.items():
            print(f"  {len(where):6} {what}" + (f": rows {', '.join(map(str, islice(where, 8)))}" if where else ""))
        seen.update(dict.fromkeys(split_input(r["input"])[0] for r in records))


if __name__ == "__main__":
    audit(sys.argv[1:])
