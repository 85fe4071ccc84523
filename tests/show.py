"""Show records as the model sees them: the tree that a pack of some records is.

    python data.py toy/train_wildguard.json [--number 7] [--count 3] [--model DIR]     (this file does the work)
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import FORMATS, Tokenizer, encode_records, pack, parse_records, read_records  # noqa: E402
from model import InputError, tree_plan  # noqa: E402


def show(tokenizer, samples):
    """Print a pack: one line a segment, the scored text in brackets, and the mask of a small one."""
    def text(start, stop):
        text = tokenizer.decode(tokens[start:stop]).replace("\n", "\\n")
        return text if len(text) < 60 else text[:32] + " ... " + text[-24:]

    p = pack(samples, 10 ** 9)[0]
    T, plan, tokens, end = len(p.tokens), tree_plan(p.end), p.tokens.tolist(), p.end.tolist()
    print(f"{T} tokens in the pack, {sum(len(s.prompt) + len(a) for s in samples for a in s.answers)} as "
          f"separate sequences; {len(p.rows)} scored (row, next token) pairs\n\n"
          "    rows        position      end   text, the scored part in [ ]")
    # an answer's rows, but for the first: that is the prompt's last
    scored = set(p.rows[1:][p.answer[1:] == p.answer[:-1]].tolist())
    starts = [i for i in range(T) if i == 0 or end[i] != end[i - 1]]       # of the segments
    for start, stop in zip(starts, starts[1:] + [T]):
        first = next((i for i in range(start, stop) if i in scored), stop)
        answer = f"[{text(first, stop)}]" if first < stop else ""
        indent = "  " * sum(above < start < end[above] for above in starts)
        print(f"{start:6}-{stop - 1:<6} {plan.position[start]:6}-{plan.position[stop - 1]:<6} "
              f"{end[start]:5}   {indent}{text(start, first)}{answer}")
    if T <= 40:
        print("\nquery i sees key j iff j <= i < end[j]:\n")
        for i in range(T):
            print("".join("#" if j <= i < p.end[j] else "." for j in range(T)))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE", help="records (SFT, pairs or benchmark)")
    p.add_argument("--model", default="toy/model", help="folder whose tokenizer to use")
    p.add_argument("--format", choices=FORMATS, help="prompt template (default: what the folder says)")
    p.add_argument("--number", type=int, default=0, help="which record to show, from 0")
    p.add_argument("--count", type=int, default=2, help="how many records to show in one pack")
    args = p.parse_args(argv)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    for path in args.files:
        first = next(parse_records(path), ("", {}))[1]
        answers = ("chosen", "rejected") if isinstance(first, dict) and "chosen" in first else ("output",)
        records = read_records(path, ("instruction", "input", *answers))[args.number:args.number + args.count]
        if not records:
            raise InputError(f"{path}: has no record {args.number}")
        show(tokenizer, encode_records(tokenizer, records, 10 ** 6, answers)[0])


if __name__ == "__main__":
    main()
