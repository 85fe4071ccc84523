"""Saved predictions become training records: the reasoning of another guard, kept where its verdict is right.

    python tools/traces.py PREDICTIONS... --out traces.json
        [--limit N] [--seed S] [--most-characters M] [--labels]

PREDICTIONS are JSON lines {"prompt", "label", "predict"} as the released models' files are; a record is
kept if every verdict that its label names is right, each prompt once, in seeded order. --labels leaves the
reasoning out: the same records for the baseline that learns nothing but verdicts.
"""
import argparse
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (HUMAN, INSTRUCTION, InputError, format_answers, gold_verdict,  # noqa: E402
                  parse_records, parse_verdict, write_json)
from eval import labels_of  # noqa: E402
from mine_hard import judge  # noqa: E402


def right_traces(path, counts):
    """The records of one file whose verdict is right; counts says what became of the others."""
    dataset, records = Path(path).resolve().parent.name, []
    for place, line in parse_records(Path(path)):
        if not isinstance(line, dict) or not all(isinstance(line.get(k), str) for k in ("prompt", "label", "predict")):
            raise InputError(f"{path}: {place} needs the text fields prompt, label and predict")
        at = line["prompt"].find(HUMAN)
        if at < 0:
            counts["without a request"] += 1
            continue
        text = line["prompt"][at:]
        right = judge(parse_verdict(line["predict"]), labels_of({"input": text, "output": line["label"]}, dataset))
        counts["right" if right else "wrong"] += 1
        if right:
            records.append({"instruction": INSTRUCTION, "input": text, "output": line["predict"].strip()})
    return records


def labels_only(records):
    """The same records without reasoning: the output is the verdicts of the trace."""
    return [{**r, "output": format_answers(**gold_verdict(r))} for r in records]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("predictions", nargs="+", metavar="FILE", help="prediction files of a teacher")
    p.add_argument("--out", required=True, help="records to write (JSON array)")
    p.add_argument("--limit", type=int, help="keep the first N of the shuffled records")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle")
    p.add_argument("--most-characters", type=int, default=10 ** 9, help="leave out longer exchanges and traces")
    p.add_argument("--labels", action="store_true", help="write the verdicts of each trace alone")
    args = p.parse_args(argv)
    counts = Counter()
    records = {r["input"]: r for path in args.predictions for r in right_traces(path, counts)}
    records = [r for r in records.values() if len(r["input"]) + len(r["output"]) <= args.most_characters]
    random.Random(args.seed).shuffle(records)
    write_json(args.out, (labels_only(records) if args.labels else records)[:args.limit])
    print(f"{args.out}: {len(records[:args.limit])} records; {dict(counts)}")


if __name__ == "__main__":
    main()
