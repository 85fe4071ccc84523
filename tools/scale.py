"""What everything but the model costs as the records grow: seconds and memory, for several numbers of them.

    python tools/scale.py --model DIR                       1,000, 10,000 and 127,000 records
    python tools/scale.py --model DIR --records 1000 2000 --rate 75000

Records are generated, as long as real ones: an instruction, exchanges of 1,030 characters, traces of 1,300 on
average. Each number of records has a process of its own. One thing after another is done as the scripts do it:

    read records    read_records of a JSON file
    encode          encode_records: text -> ids
    start a run     what identify_run fingerprints: all ids, all batches, all rates
    steps           one epoch of train_sft without its model: a batch's examples, pack, deal, counts, the log
    references      the packs of reference_logprobs for as many pairs
    read samples    four answers to every prompt, from samples.jsonl
    select          judge them, draw pairs, weigh them

A row gives seconds of processor time (others may use the machine) and, in brackets, microseconds a record: what
grows linearly keeps the latter. GiB is what the records and their answers hold; "above", the most beyond that while
the line ran. --rate: tokens a second that the model trains at, to say which part of a step is not the model's.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from data import (INSTRUCTION, Example, Extend, Tokenizer, at_least, deal, encode_records,  # noqa: E402
                  format_answers, format_input, pack, parse_records, parse_verdict, read_records, write_json)
from eval import print_line  # noqa: E402
from mine_hard import select, write_lines  # noqa: E402
from model import World  # noqa: E402

WORDS = ("analyze the request a user asks whether this text could harm someone or describes how to make it "
         "no response was provided so there is nothing that complies with or refuses what they wrote about "
         "people information security question history story legal advice therefore considered").split()
REQUEST = 1030              # mean characters: 230 tokens
TRACE = 1300                # 260 tokens
ANSWERS = 4                 # to each prompt, in mining
ALONE = World(torch.device("cpu"))


# ------------------------------------------------------------------ what is generated
def make_text(rng, characters):
    """Words, of about so many characters on average; lengths are spread as those of guard data."""
    count = 1 + int(rng.gamma(2.0, characters / 6 / 2.0))
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))


def make_output(rng):
    """A trace: reasoning and an Answers block."""
    verdict = "harmful" if rng.random() < 0.5 else "unharmful"
    return make_text(rng, TRACE) + "\n\n" + format_answers(request=verdict)


def write_data(folder, n, seed=0):
    """n records, and the answers that a model might have given to them."""
    rng = np.random.default_rng(seed)
    records = [dict(instruction=INSTRUCTION, input=format_input(make_text(rng, REQUEST)),
                    output=make_output(rng)) for _ in range(n)]
    write_json(folder / "records.json", records)
    write_lines(folder / "samples.jsonl", (make_answers(rng, number) for number in range(n)))


def make_answers(rng, number):
    """A line of samples.jsonl."""
    texts = [make_output(rng) for _ in range(ANSWERS)]
    samples = [dict(text=text, finish="stop", tokens=len(text) // 5, verdict=parse_verdict(text))
               for text in texts]
    return dict(prompt=number, model="generated", seed=0, samples=samples)


# ------------------------------------------------------------------ what is measured
def held():
    """GiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2 ** 30


def most_held():
    """The most GiB that it held since reset_peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """Processor time and memory of one thing after another."""

    def __init__(self, n):
        self.n = n
        self.rows = []

    def run(self, name, work, *args):
        """work(*args), noted under a name."""
        reset_peak()
        began = time.process_time()
        result = work(*args)
        seconds = time.process_time() - began
        now = held()
        self.rows.append(dict(name=name, seconds=seconds, a_record=1e6 * seconds / self.n, gib=now,
                              above=max(0.0, most_held() - now)))
        return result


def steps(examples, schedule, args):
    """What train_sft does in one epoch beside its model; the tokens of all steps."""
    log = train_sft.Log(args, 0, len(schedule), ALONE)
    tokens = 0
    for step, numbers in enumerate(schedule, 1):
        batch = [examples[i] for i in numbers]
        packs = deal(pack(batch, args.max_tokens), ALONE.rank, ALONE.ranks)
        packs = [p.to(ALONE.device) for p in packs]
        counts = train_sft.token_counts(batch, packs, ALONE)
        rate = train_sft.lr_at(step - 1, len(schedule), args.lr)
        log.write(step, dict(loss=0.0, lr=rate, grad_norm=0.0, **counts))
        tokens += counts["tokens"]
    return tokens


class NoModel:
    """In the place of the model: log-probabilities of 0."""

    def __call__(self, tokens, end, rows, targets):
        return torch.zeros(len(rows))


def references(examples, args):
    """The reference pass over as many pairs, without a model: each trace against itself."""
    pairs = [Example(e.prompt, [e.answers[0], e.answers[0]], e.root_length) for e in examples]
    return train_dpo.reference_logprobs(NoModel(), pairs, args, ALONE)


def read_samples(path):
    return {line["prompt"]: line["samples"] for _, line in parse_records(path)}


def measure(args, folder):
    """All lines for one number of records; {"records", "rows", "tokens", "steps"}."""
    n, = args.records
    meter = Meter(n)
    tokenizer = Tokenizer.from_pretrained(args.model)
    records = meter.run("read records", read_records, folder / "records.json")
    examples, _ = meter.run("encode", encode_records, tokenizer, records, 2048)
    run = SimpleNamespace(out=str(folder / "out"), lr=5e-5, no_share=False, dtype=None,
                          max_tokens=args.max_tokens, model=args.model)
    schedule = list(train_sft.batches(len(examples), args.batch_size, 1, 0))
    meter.run("start a run", train_sft.identify_run, run, ALONE, examples, schedule)
    tokens = meter.run("steps", steps, examples, schedule, run)
    meter.run("references", references, examples, run)
    answers = meter.run("read samples", read_samples, folder / "samples.jsonl")
    meter.run("select", select, records, ["generated"] * n, [("generated", answers)],
              "all", "random", 0.2, 0)
    return dict(records=n, rows=meter.rows, tokens=tokens, steps=len(schedule))


# ------------------------------------------------------------------ what is shown
def show(results, rate):
    """The table, as Markdown."""
    head = "".join(f" {r['records']:,} records | GiB | above |" for r in results)
    lines = ["| seconds (microseconds a record) |" + head, "|---" * (3 * len(results) + 1) + "|"]
    for rows in zip(*(r["rows"] for r in results)):
        cells = "".join(f" {row['seconds']:.2f} ({row['a_record']:,.0f}) | {row['gib']:.2f} | "
                        f"{row['above']:.2f} |" for row in rows)
        lines.append(f"| {rows[0]['name']} |{cells}")
    for result in results:
        seconds = next(row["seconds"] for row in result["rows"] if row["name"] == "steps")
        text = (f"{result['records']:,} records: {result['tokens'] / result['records']:,.0f} tokens each; "
                f"{1000 * seconds / result['steps']:.1f} ms of a step are not the model's")
        if rate:
            model = result["tokens"] / rate
            text += f", {100 * seconds / model:.2f}% of the model's time at {rate:,.0f} tokens a second"
        lines.append(text)
    return "\n".join(lines)


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="folder whose tokenizer to use")
    p.add_argument("--records", nargs="+", action=Extend, type=at_least(2), default=[1000, 10_000, 127_000],
                   metavar="N")
    p.add_argument("--batch-size", type=at_least(1), default=384, help="sequences in a step (paper: 384)")
    p.add_argument("--max-tokens", type=at_least(1), default=8192, help="of a pack")
    p.add_argument("--rate", type=at_least(1, float), help="tokens a second of the model's part of a step")
    p.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.only:                                           # one number of records, in this process
        with tempfile.TemporaryDirectory() as folder:
            write = [sys.executable, "-c", "import sys; from pathlib import Path; import scale; "
                     "scale.write_data(Path(sys.argv[1]), int(sys.argv[2]))", folder, str(args.records[0])]
            subprocess.run(write, cwd=Path(__file__).parent, check=True)        # its memory is not counted
            print("\n" + json.dumps(measure(args, Path(folder))))
        return None
    results = []
    for n in args.records:
        command = [sys.executable, __file__, "--only", "--records", str(n), "--model", args.model,
                   "--batch-size", str(args.batch_size), "--max-tokens", str(args.max_tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)               # it said why on stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print_line(show(results, args.rate))
    return results


if __name__ == "__main__":
    main()
