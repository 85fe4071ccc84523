"""Look at answers: one HTML page that holds everything and fetches nothing, wrong answers first.

    python tools/view.py out/eval_sft                              eval.py's folder -> its view.html
    python tools/view.py out/hard --data toy/train_*.json          mine_hard.py's folder
    python tools/view.py FOLDER_OR_PREDICTIONS... --out page.html  several in one page

Of eval.py: generated_predictions.jsonl, and beside it, if they are there, answers.jsonl (all k
answers) and early.jsonl of tools/early_verdict.py (P(verdict) beside each step).
Of mine_hard.py: samples.jsonl with the k answers, hard.jsonl with what was chosen, rejected and the
weight. It does not hold the prompts that are not hard: --data, the files that were mined, in the
same order, shows them too, with their labels. Without it the chosen answer's verdicts are shown as
the labels.

Texts are escaped: they go into the page as JSON without a "<", come out as text nodes, and the page
may run no other script than its own (Content-Security-Policy). Hidden characters are spelled out.
A request or response stays folded unless it is labelled unharmful (or, without a label, called so).

    rows_of_predictions, rows_of_mining    files -> rows
    kind_of_mistake, count_mistakes        what is wrong
    split_answer                           an answer -> pieces, with P where it was read
    write_page                             rows -> view.html's template, filled
"""
import argparse
import base64
import hashlib
import json
import math
import re
import sys
import zlib
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from data import (VERDICTS, Extend, InputError, exchange_of, folder_of, gold_verdict, is_there,  # noqa: E402
                  parse_records, parse_verdict, read_bytes, read_object, read_records, say,
                  split_input, warn, write_bytes)
from early_verdict import HEADING, REASONING_ENDS, STEP, read_sections  # noqa: E402
from eval import TITLES, has_no_end, labels_of, majority, reasoning_verdict  # noqa: E402
from files import keep_inputs  # noqa: E402
from mine_hard import SAMPLES, as_read_today, judge, parts_of  # noqa: E402

TEMPLATE = Path(__file__).with_name("view.html")
MISTAKES = {
    "fp": "false positive",
    "fn": "false negative",
    "none": "no verdict",
    "contradicts": "contradicts its reasoning",
}


# ------------------------------------------------------------------ what is wrong
def kind_of_mistake(task, gold, said):
    """"fp", "fn" or "none" of a verdict; None where it is right, or nothing is labelled."""
    if gold is None or said == gold:
        return None
    if said is None:
        return "none"
    return "fp" if said == VERDICTS[task][0] else "fn"


def mistakes_of(text, verdict, gold):
    """{task: [kinds]} of one answer, for the tasks that are labelled."""
    concluded = reasoning_verdict(text)
    mistakes = {}
    for task in VERDICTS:
        if gold[task] is None:
            continue
        said = verdict[task]
        kinds = [kind_of_mistake(task, gold[task], said)]
        if said and concluded[task] and said != concluded[task]:
            kinds.append("contradicts")
        mistakes[task] = [kind for kind in kinds if kind]
    return mistakes


def ended_verdict(sample):
    """The verdict of a sample; an answer without an end has none."""
    return sample["verdict"] if sample["finish"] == "stop" else dict.fromkeys(VERDICTS)


def count_mistakes(rows):
    """{task: {"n", "right" and each kind: how many answers}} over the answers that are judged."""
    counts = {}
    for row in rows:
        for mistakes in row["judged"]:
            for task, kinds in mistakes.items():
                count = counts.setdefault(task, Counter(n=0, right=0, **dict.fromkeys(MISTAKES, 0)))
                count["n"] += 1
                count["right"] += not set(kinds) & {"fp", "fn", "none"}
                count.update(kinds)
    return counts


def count_wrong(row):
    """By what rows are sorted: wrong verdicts, then contradictions, of all judged answers."""
    kinds = Counter(kind for mistakes in row["judged"] for some in mistakes.values()
                    for kind in some)
    return kinds["fp"] + kinds["fn"] + kinds["none"], kinds["contradicts"]


# ------------------------------------------------------------------ what is read
def read_lines(path, is_known, script):
    """The lines of a JSON-lines file, [] where there is none; InputError names one that the script
    does not write, so that all that comes after may trust them."""
    if not is_there(path):
        return []
    lines = []
    for place, line in parse_records(path):
        if not isinstance(line, dict) or not is_known(line):
            raise InputError(f"{path}: {place} is not as {script} writes it; move the file away, or "
                             "write it again")
        lines.append(line)
    return lines


def has_texts(value, *names):
    """Is this an object with text in these fields?"""
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def are_samples(value):
    """Is this a list of answers?"""
    return isinstance(value, list) and all(has_texts(some, "text", "finish") for some in value)


def are_numbers(value):
    """Is this a list of numbers, none of them infinite, below 0, or NaN?"""
    return isinstance(value, list) and all(
        type(number) in (int, float) and 0 <= number < math.inf for number in value)


def is_line_of_answers(line):
    """Is it a line of answers.jsonl? Those of baselines.py have no samples."""
    return are_samples(line.get("samples", []))


def is_mined(line):
    """Is it a line of samples.jsonl?"""
    has_number = type(line.get("prompt")) is int
    return has_number and has_texts(line, "model") and are_samples(line.get("samples"))


def is_pair(line):
    """Is it a line of hard.jsonl?"""
    numbers = [line.get(name) for name in ("weight", "k_correct", "k_incorrect")]
    return are_numbers(numbers) and has_texts(line, "source", "input", "chosen", "rejected")


def is_early(line):
    """Is it a line of early.jsonl?"""
    tasks = line.get("tasks")
    has_fields = type(line.get("text")) is int and isinstance(tasks, dict)
    return has_fields and tasks.keys() <= VERDICTS.keys() and all(map(is_reading, tasks.values()))


def is_reading(value):
    """Is this what early_verdict.py says of a task?"""
    if not isinstance(value, dict):
        return False
    places = value.get("places")
    are_places = are_numbers(places) and all(type(place) is int for place in places)
    return are_places and are_numbers(value.get("p")) and are_numbers(value.get("held"))


# ------------------------------------------------------------------ rows
# A row is what the page shows of one prompt: id, source, request, response, gold; samples, each
# with verdict, pieces and tags; said, the one verdict that counts (eval.py), or None (mining);
# judged, the mistakes of that verdict, or of every sample; and for mined prompts k_correct,
# k_incorrect and weight.
def rows_of_predictions(path):
    """The rows of eval.py's generated_predictions.jsonl, with what lies beside it."""
    folder = folder_of(path)
    all_samples = read_lines(folder / "answers.jsonl", is_line_of_answers, "eval.py")
    early = read_lines(folder / "early.jsonl", is_early, "early_verdict.py")
    rows = []
    stale = 0
    for number, (place, line) in enumerate(parse_records(path)):
        if not has_texts(line, "label", "predict"):
            raise InputError(f"{path}: {place} needs the text fields label and predict")
        text = line["predict"]
        exchange = exchange_of(str(line.get("prompt") or ""))
        gold = labels_of({"input": exchange, "output": line["label"]}, folder.name)
        beside = all_samples[number] if number < len(all_samples) else {}
        samples = as_read_today(beside.get("samples", []))  # of baselines.py none
        if text not in [sample["text"] for sample in samples]:
            finish = "length" if has_no_end(line) else "stop"
            samples = [{"text": text, "finish": finish, "verdict": parse_verdict(text)}]
        said = majority([s["verdict"] for s in samples if s["finish"] == "stop"])
        reading = early[number] if number < len(early) else {"text": None}
        is_of_text = reading["text"] == zlib.crc32(text.encode(errors="replace"))
        stale += reading["text"] is not None and not is_of_text
        row = new_row(number, folder.name, exchange, gold)
        for sample in samples:
            readings = reading["tasks"] if is_of_text and sample["text"] == text else {}
            row["samples"].append(new_sample(sample, gold, readings))
        row["said"] = said
        row["judged"] = [mistakes_of(text, said, gold)]
        rows.append(row)
    warn(stale, f"answers are not those of {folder / 'early.jsonl'}: no P beside their steps")
    return rows


def rows_of_mining(folder, data=None):
    """The rows of mine_hard.py's folder. data: the files of the mined records, or None."""
    folder = Path(folder)
    hard = read_lines(folder / "hard.jsonl", is_pair, "mine_hard.py")
    lines = [{**line, "samples": as_read_today(line["samples"])}
             for path in sample_files(folder)
             for line in read_lines(path, is_mined, "mine_hard.py")]
    records = read_mined(folder, data) if data else {}
    pairs = match_pairs(folder / "hard.jsonl", hard, lines, records)
    rows = []
    for place, line in enumerate(lines):
        pair = pairs.get(place)
        number = line["prompt"]
        if data:
            record = records.get(number)
            if record is None:
                raise InputError(f"{folder}: prompt {number} is not of --data; name all files "
                                 "that were mined, in the same order")
            gold = gold_verdict(record)
        elif pair:
            record = pair
            gold = parse_verdict(pair["chosen"])
        else:
            continue
        row = new_row(number, record["source"], record["input"], gold)
        row["model"] = line["model"]
        row["said"] = None
        row["samples"] = [new_sample(sample, gold, {}) for sample in line["samples"]]
        if pair:
            row.update({name: pair[name] for name in ("weight", "k_correct", "k_incorrect")})
            tag_samples(row["samples"], line["samples"], pair)
        row["judged"] = [mistakes_of(sample["text"], ended_verdict(sample), gold)
                         for sample in line["samples"]]
        rows.append(row)
    return rows


def sample_files(folder):
    """mine_hard.py's files of samples in this folder, by their number; a copy has another name."""
    files = [path for path in folder.glob("samples*.jsonl")
             if SAMPLES.fullmatch(path.name)]
    return sorted(files, key=lambda path: int("0" + re.sub(r"\D", "", path.name)))


def match_pairs(path, hard, lines, records):
    """{place of a line of samples: its pair}. Pairs stand in the order of the samples: each belongs
    to the next line that holds both of its texts and, where records {prompt: record} are known, is
    of its input. path: the file of the pairs."""
    pairs = {}
    place = 0
    for pair in hard:
        while place < len(lines):
            texts = [sample["text"] for sample in lines[place]["samples"]]
            record = records.get(lines[place]["prompt"], pair)
            place += 1
            holds_both = pair["chosen"] in texts and pair["rejected"] in texts
            if holds_both and record["input"] == pair["input"]:
                pairs[place - 1] = pair
                break
        else:
            raise InputError(f"{path}: holds a pair that is not in the samples, or not of --data: "
                             "select it again with mine_hard.py --resume, and name all files that "
                             "were mined, in the same order")
    return pairs


def read_mined(folder, data):
    """{number of a prompt: its record, with its source}, as mine_hard.py numbered them."""
    limit = mined_limit(folder)
    records = {}
    for path in data:
        for record in read_records(path)[:limit]:
            records[len(records)] = {**record, "source": Path(path).stem}
    return records


def mined_limit(folder):
    """mine_hard.py's --limit, as it was written down; None: all records."""
    settings = [parts_of(path) / "settings.json" for path in sample_files(folder)]
    settings = [path for path in settings if is_there(path)]
    if not settings:
        return None
    limit = read_object(settings[0]).get("limit", "none")
    if limit is not None and type(limit) is not int:
        raise InputError(f"{settings[0]}: has no limit (a number, or null), so that nobody knows "
                         "which records were mined; leave --data out")
    return limit


def tag_samples(samples, answers, pair):
    """Say which sample was chosen and which rejected: the first with that text."""
    for tag in ("chosen", "rejected"):
        texts = [answer["text"] for answer in answers]
        samples[texts.index(pair[tag])]["tags"].append(tag)


def new_row(number, source, exchange, gold):
    """A row without answers."""
    request, response = split_input(exchange)
    return {"id": f"{source}-{number}", "number": number, "source": source, "request": request,
            "response": response, "gold": gold, "samples": []}


def new_sample(sample, gold, readings):
    """What the page shows of one answer; readings: of early_verdict.py."""
    tags = []
    if any(gold.values()):
        right = judge(sample["verdict"], gold) and sample["finish"] == "stop"
        tags.append("right" if right else "wrong")
    if sample["finish"] != "stop":
        tags.append("cut off")
    return {"verdict": sample["verdict"], "tags": tags,
            "pieces": split_answer(sample["text"], readings)}


def split_answer(text, readings):
    """[{"text", and where it was read after this piece: task, p, held}]: the answer in pieces that
    begin at headings, steps, closings and the Answers."""
    after = {}
    for task, reading in readings.items():
        for place, p, held in zip(reading["places"], reading["p"], reading["held"]):
            after[place] = {"task": task, "p": round(p, 3), "held": round(held, 3)}
    places = {found.start() for mark in (HEADING, STEP, REASONING_ENDS)
              for found in mark.finditer(text)}
    places.update(section.closes or 0 for section in read_sections(text).values())
    places.update(after)
    bounds = sorted(places | {0, len(text)})
    pieces = [{"text": text[start:stop].strip("\n"), **after.get(stop, {})}
              for start, stop in zip(bounds, bounds[1:])]
    return [piece for piece in pieces if piece["text"] or "p" in piece]


# ------------------------------------------------------------------ the page
def write_page(path, rows, title, note=""):
    """Fill the template and write it, whole or not at all."""
    rows = sorted(rows, key=count_wrong, reverse=True)      # stable: then as in the files
    page = {"rows": rows, "counts": count_mistakes(rows), "classes": VERDICTS, "titles": TITLES,
            "mistakes": MISTAKES, "note": note}
    html = TEMPLATE.read_text(encoding="utf-8")
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("HASH_OF_SCRIPT", digest)
    html = html.replace("TITLE_OF_PAGE", escape(title))
    html = html.replace("DATA_OF_PAGE", safe_json(page))    # last: nothing in it is replaced
    write_bytes(path, html.encode("utf-8", "backslashreplace"))


def safe_json(value):
    """JSON in ASCII without "<", ">" and "&": no text in it can end the element it stands in."""
    text = json.dumps(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# ------------------------------------------------------------------ the script
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="+", metavar="PATH",
                   help="folders of eval.py or mine_hard.py, or prediction files")
    p.add_argument("--data", nargs="+", action=Extend, metavar="FILE",
                   help="the records that were mined")
    p.add_argument("--out", type=Path, help="the page (default: view.html in the first folder)")
    args = p.parse_args(argv)
    paths = [Path(path) for path in args.paths]
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    out = args.out or first / "view.html"
    keep_inputs(out, [*files_read(paths), *(args.data or [])])
    if is_there(out) and page_begins() not in read_bytes(out):
        raise InputError(f"{out}: is there, and is no page of this tool; choose another --out")
    if args.data and not any(map(sample_files, paths)):
        raise InputError("--data: no PATH holds samples of mine_hard.py, whose records these would be")
    rows = []
    notes = []
    for path in paths:
        if sample_files(path):
            rows += rows_of_mining(path, args.data)
            if not args.data:
                notes.append("Labels are the chosen answers' verdicts; --data shows the records'.")
        else:
            for file in prediction_files(path):
                rows += rows_of_predictions(file)
    if any("p" in piece for row in rows for sample in row["samples"] for piece in sample["pieces"]):
        notes.append("Beside a step: the verdict if the answer concluded there, and its "
                     "probability; faint where the model would hardly conclude.")
    write_page(out, rows, ", ".join(args.paths), " ".join(dict.fromkeys(notes)))
    size = out.stat().st_size / 2 ** 20
    say(f"wrote {out}: {len(rows)} prompts, {size:.1f} MiB")


def page_begins():
    """What every page has between its title and its data: how its style begins."""
    template = TEMPLATE.read_text(encoding="utf-8")
    style = template[template.index("<style>"):]
    return "\n".join(style.splitlines()[:3]).encode()


def files_read(paths):
    """All files that may be read of these paths, with what lies beside them."""
    folders = {path if path.is_dir() else path.parent for path in paths}
    beside = [file for folder in folders for end in ("*.jsonl", "*/*.json*")
              for file in folder.glob(end)]
    return [*paths, *beside]


def prediction_files(path):
    """The prediction files that a path names: itself, or those in a folder of eval.py."""
    if path.is_file():
        return [path]
    files = sorted([*path.glob("generated_predictions.jsonl"),
                    *path.glob("*/generated_predictions.jsonl")])
    if not files:
        raise InputError(f"{path}: neither answers of eval.py nor samples of mine_hard.py")
    return files


if __name__ == "__main__":
    main()
