"""The first step of the paper: a strong model writes the reasoning for exchanges whose labels are known.

    python tools/synthesize.py --url http://localhost:8000/v1 --model NAME --data FILE... --out DIR
    python tools/synthesize.py --table toy/train_*.json    the paper's Table 1 only, of these files

    labelled exchanges -> OUT/NAME.json, records {"instruction", "input", "output"} for train_sft.py

A file holds JSON lines or an array, one source a file: {"prompt", "response", "labels": {"request",
"completion", "response"}}, where what is not known is left out or null; or records whose output is a label.
Every answer is checked; one that fails is asked for again, at temperature 0.7 instead of 0 (paper:
gpt-4o-2024-08-06 at 0), and after --attempts dropped and counted. Answers are kept a line each in
OUT/NAME/answers.jsonl: start again, and only missing rows are asked. The key, if any, is OPENAI_API_KEY.

Not the released script's ways: an empty or refused answer never becomes a record, an answer that quotes
the given labels does not either, and where there is no response, tasks 2 and 3 have the verdict None.
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import audit  # noqa: E402
from baselines import answer_rows, ask, server_url  # noqa: E402
from data import (INSTRUCTION, VERDICTS, Extend, InputError, at_least, format_answers,  # noqa: E402
                  format_input, gold_verdict, parse_records, parse_verdict, read_records, say,
                  split_input, write_json)
from eval import print_line  # noqa: E402
from files import check_names, keep_inputs, keep_others  # noqa: E402
from mine_hard import check_settings  # noqa: E402

TASKS = dict(enumerate(VERDICTS, 1))                        # the number in a heading -> the name of the task
# paper, Table 1: source -> samples, reasoning steps; and of all: mean characters of a step
PAPER = {"WildGuardTrain-R": (86759, 323930), "AegisTrain-R": (10798, 37082),
         "BeaverTailsTrain-R": (27186, 90553), "ToxicChatTrain-R": (2801, 9094)}
PAPER_LENGTH = 133.97

FORM = """\
The three verdicts are known and given below. Write the reasoning that leads to them from the texts alone:
a reader sees the request and the response, not the verdicts, so never mention that they were given.

Write a section for each task, with 1 to {steps} short steps that build on one another, then the verdicts. Choose
harmful or unharmful, refusal or compliance. Where a verdict is not known, decide yourself. Where the
response is None, tasks 2 and 3 need no step and their verdict is None. Keep exactly this form:

# Task 1
## Reasoning Step 1: ...
## Reasoning Step 2: ...
Conclusion: ...
# Task 2
...
# Task 3
...

Answers:\x20
Request: ...
Completion: ...
Response: ..."""

# ------------------------------------------------------------------ what goes in


def read_exchanges(path, limit=None):
    """[(prompt, response or None, {task: word or None})] of a file; InputError says which record is wrong."""
    exchanges = []
    for place, record in list(parse_records(Path(path)))[:limit]:
        if isinstance(record, dict) and isinstance(record.get("input"), str):
            prompt, response = split_input(record["input"])
            labels = gold_verdict({**record, "output": audit.output_of(f"{path}: {place}", record)})
        else:
            prompt, response, labels = fields_of(record, f"{path}: {place}")
        if not any(labels.values()):
            raise InputError(f"{path}: {place} has no label (harmful, unharmful, refusal, compliance)")
        about_response = [name for name in ("completion", "response") if labels[name]]
        if about_response and response is None:
            raise InputError(f"{path}: {place}: a label {about_response[0]}, but no response")
        exchanges.append((prompt, response, labels))
    if not exchanges:
        raise InputError(f"{path}: no exchange")
    return exchanges


def fields_of(record, place):
    """(prompt, response or None, labels) of one {"prompt", "response", "labels"} object."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(f'{place} needs a text field "prompt"')
    response = record.get("response")
    given = record.get("labels") or {}
    if not isinstance(response, (str, type(None))) or not isinstance(given, dict):
        raise InputError(f'{place}: "response" must be text or null, "labels" an object')
    for name, word in given.items():
        if name not in VERDICTS or word not in (None, *VERDICTS[name]):
            raise InputError(f"{place}: unknown label {name} = {word!r}")
    return record["prompt"], response, {name: given.get(name) for name in VERDICTS}


def form_of(most):
    """FORM with the most steps of a task in it."""
    return FORM.replace("{steps}", str(most))


def question(prompt, response, labels, most=10):
    """The messages that ask for reasoning: the form, the exchange as it will be trained on, the verdicts."""
    known = {name: word or ("not known" if name == "request" or response is not None else "None")
             for name, word in labels.items()}
    return [{"role": "system", "content": INSTRUCTION + "\n" + form_of(most)},
            {"role": "user", "content": format_input(prompt, response) + "Known verdicts:\n"
             + "\n".join(f"{name.capitalize()}: {word}" for name, word in known.items())}]


# ------------------------------------------------------------------ what comes out


CONCLUSION = r"^[^\w\n]*Conclusion\b"


def block_place(text):
    """Where the last "answers:" of a text begins, in any case; 0 where it has none."""
    places = [found.start() for found in re.finditer("answers:", text, re.I)]
    return places[-1] if places else 0


def sections(text):
    """{task number: its part of the trace}; 0 is what stands before the first heading. A heading that comes
    again, as "# Task 1 Conclusion" does in many of the released models' answers, adds to its task's part."""
    body = text[:block_place(text) or None]
    before, *rest = re.split(r"^#+ *Task *(\d)\b(.*)$", body, flags=re.M)
    found = {0: before}
    for number, heading, part in zip(map(int, rest[::3]), rest[1::3], rest[2::3]):
        conclusion = re.search(r"Conclusion\b.*", heading)
        if conclusion and number in found:
            part = "\n" + conclusion[0] + part
        found[number] = found.get(number, "") + part
    return found


def steps_in(part):
    """[(step number, its text)] of one section; the conclusion is not a step."""
    found = re.split(r"^[^\w\n]*Reasoning Step *(\d+)\W*", re.split(CONCLUSION, part, flags=re.M)[0], flags=re.M)
    return [(int(n), without_rules(words)) for n, words in zip(found[1::2], found[2::2])]


def without_rules(text):
    """A step's text without the empty lines, and the ruled ones (---), after it."""
    lines = text.strip().split("\n")
    while lines and not re.search(r"\w", lines[-1]):
        lines.pop()
    return "\n".join(lines)


def check(answer, response, labels, most=10):
    """What is wrong with this answer, in a few words that can be counted, or None."""
    text = answer["text"]
    if answer["refused"]:
        return "refused"
    if not text:
        return "empty"
    if answer["finish"] != "stop":
        return "cut off"
    block = text[block_place(text):]
    if not re.match(r"answers:\s*\n([^\n]+\n){2}[^\n]+$", block.rstrip(), re.I):
        return "no closing block of three lines"
    verdict = parse_verdict(block)
    asked = ["request"] if response is None else list(VERDICTS)
    for name in VERDICTS:
        if labels[name] and verdict[name] != labels[name]:
            return f"wrong verdict on the {name}"
        if name in asked and verdict[name] is None:
            return f"no verdict on the {name}"
        if name not in asked and verdict[name] is not None:
            return f"verdict on a missing {name}"
    if re.search(r"ground[- ]truth|(known|given|provided) (verdict|label)", text, re.I):
        return "speaks of the given labels"
    parts = sections(text)
    for number, name in TASKS.items():
        least = 1 if name in asked else 0
        fault = check_section(parts.get(number, ""), name, verdict[name], range(least, most + 1))
        if fault:
            return fault
    return None


def check_section(part, name, word, allowed):
    """What is wrong with the reasoning on one task: number of steps, their order, its conclusion."""
    numbers = [n for n, words in steps_in(part) if words]
    if len(numbers) not in allowed:
        return f"not {allowed[0]} to {allowed[-1]} steps"
    if numbers != list(range(1, len(numbers) + 1)):
        return "steps not numbered 1, 2, 3 ..."
    conclusion = " ".join(re.split(CONCLUSION, part, flags=re.M)[1:]).lower()
    words = re.findall(rf"\b(?:{'|'.join(VERDICTS[name])})\b", conclusion)
    return "conclusion against the verdict" if words and word not in words else None


def target_of(text, labels, unlabelled):
    """The training target: the reasoning as it came, the closing block as data.py writes it.

    unlabelled: "own" keeps the model's verdict where no label is known (paper), "none" writes None."""
    start = block_place(text)
    verdict = parse_verdict(text[start:])                   # of the block that `check` has read
    for name, word in labels.items():
        if word or unlabelled == "none":
            verdict[name] = word
    line_start = text.rfind("\n", 0, start) + 1
    if re.fullmatch(r"[\W_]*(?:final)?[\W_]*", text[line_start:start], re.I):
        start = line_start                                  # "## Final Answers:" goes as a whole
    return text[:start].rstrip(" \n#-*") + "\n\n" + format_answers(**verdict)


def synthesize(args, exchanges, path):
    """{row: line} of all rows: an output or null, and what was wrong with each failed attempt."""
    def answer(row):
        prompt, response, labels = exchanges[row]
        messages = question(prompt, response, labels, args.steps)
        faults = []
        for attempt in range(args.attempts):
            temperature = 0.7 if attempt else 0.0           # at 0 it would say the same again
            reply = ask(args.url, args.model, messages, temperature,
                        args.max_new_tokens, args.timeout, args.tries, args.pause)
            fault = check(reply, response, labels, args.steps)
            if fault is None:
                return {"output": target_of(reply["text"], labels, args.unlabelled), "faults": faults}
            faults.append(fault)
        return {"output": None, "faults": faults}

    return answer_rows(path, dict(enumerate(exchanges)), answer, args.workers, is_answer=is_outcome)


def is_outcome(line):
    """Does a line of answers.jsonl hold what `answer` gives?"""
    faults = line.get("faults")
    has_output = "output" in line and isinstance(line["output"], (str, type(None)))
    return has_output and isinstance(faults, list) and all(isinstance(fault, str) for fault in faults)


# ------------------------------------------------------------------ the paper's Table 1


def table_of(sources):
    """Samples, reasoning steps, steps a sample and characters a step: {source: outputs}, then the sum."""
    lines = [f"\n{'source':24}  samples    steps  steps a sample  characters a step"]
    total = Counter()
    for name, outputs in sources.items():
        lengths = [len(words) for text in outputs for part in sections(text).values()
                   for _, words in steps_in(part)]
        row = Counter(samples=len(outputs), steps=len(lengths), characters=sum(lengths))
        lines.append(table_row(name, row["samples"], row["steps"], row["characters"] / max(row["steps"], 1)))
        total += row
    lines.append(table_row("sum", total["samples"], total["steps"], total["characters"] / max(total["steps"], 1)))
    lines.append(table_row("paper", *map(sum, zip(*PAPER.values())), PAPER_LENGTH))
    return "\n".join(lines)


def table_row(name, samples, steps, length):
    return f"{name[:24]:24} {samples:8,} {steps:8,} {steps / max(samples, 1):15.2f} {length:18.2f}"


# ------------------------------------------------------------------ the script


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", nargs="+", action=Extend, metavar="FILE",
                   help="only print Table 1 of these training files")
    p.add_argument("--url", type=server_url, help="address with /v1, as http://localhost:8000/v1")
    p.add_argument("--model", help="name of the model at that address (paper: gpt-4o-2024-08-06)")
    p.add_argument("--data", nargs="+", action=Extend, metavar="FILE", help="labelled exchanges, a source each")
    p.add_argument("--out", help="folder for answers and training files")
    p.add_argument("--unlabelled", choices=["own", "none"], default="own", help="verdict where none is known")
    p.add_argument("--attempts", type=at_least(1), default=3, help="answers asked for before a row is dropped")
    p.add_argument("--steps", type=at_least(1), default=10, help="most steps of a task (paper: 10)")
    p.add_argument("--max-new-tokens", type=at_least(1), default=2048, help="of an answer")
    p.add_argument("--workers", type=at_least(1), default=4, help="questions under way at once")
    p.add_argument("--timeout", type=at_least(0.1, float, 3600), default=120, help="seconds to wait for an answer")
    p.add_argument("--tries", type=at_least(1), default=6, help="for each question, while the server is busy")
    p.add_argument("--pause", type=at_least(0, float, 3600), default=1.0,
                   help="seconds before the second try; then doubled, up to an hour")
    p.add_argument("--limit", type=at_least(1), help="use the first N exchanges of each file only")
    args = p.parse_args(argv)
    if not args.table and not all((args.url, args.model, args.data, args.out)):
        p.error("--url, --model, --data and --out belong together (or --table FILE...)")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    check_names(Path(path).stem for path in args.table or args.data)
    if args.table:
        return print_line(table_of({Path(path).stem: [record["output"] for record in read_records(path)]
                                    for path in args.table}))
    for path in args.data:                                  # all of them, before the first is asked about
        folder = Path(args.out) / Path(path).stem
        target = folder.with_name(f"{folder.name}.json")
        keep_inputs(target, args.data)
        keep_others(target, folder / "settings.json")
    exchanges = {path: read_exchanges(path, args.limit) for path in args.data}
    sources = {}                                            # name -> the outputs that were kept
    faults = Counter()                                      # of all attempts
    dropped = Counter()                                     # rows without an output, by their last fault
    for path in args.data:
        outcomes = synthesize_file(args, path, exchanges[path])
        sources[Path(path).stem] = [outcome["output"] for outcome in outcomes if outcome["output"]]
        for outcome in outcomes:
            faults.update(outcome["faults"])
            if outcome["output"] is None:
                dropped.update(outcome["faults"][-1:])
    say(f"\n{faults.total()} answers failed a check, {dropped.total()} rows were dropped")
    for fault, n in faults.most_common():
        say(f"{n:7} {fault} (last fault of {dropped[fault]} dropped rows)")
    say(table_of(sources))


def synthesize_file(args, path, exchanges):
    """Write the records of one file of exchanges; -> what became of each exchange, in their order."""
    name = Path(path).stem
    folder = Path(args.out) / name
    settings = {"model": args.model, "data": str(path), "unlabelled": args.unlabelled, "form": form_of(args.steps),
                "attempts": args.attempts, "steps": args.steps, "max_new_tokens": args.max_new_tokens}
    check_settings(folder / "settings.json", settings)
    outcomes = list(synthesize(args, exchanges, folder / "answers.jsonl").values())
    records = []
    for (prompt, response, _), outcome in zip(exchanges, outcomes):
        if outcome["output"]:
            records.append({"instruction": INSTRUCTION, "input": format_input(prompt, response),
                            "output": outcome["output"]})
    write_json(folder.with_name(f"{name}.json"), records)
    say(f"wrote {folder}.json: {len(records)} of {len(exchanges)} records")
    return outcomes


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:               # (SIGTERM ends at once: what was answered is written)
        raise InputError("interrupted; the same command goes on") from None
