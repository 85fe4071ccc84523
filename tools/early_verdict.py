"""When does a guard know its verdict? P(verdict | the first i steps of its own reasoning).

    python tools/early_verdict.py --model out/sft \\
        --data out/eval_sft/test/generated_predictions.jsonl        --out: that folder, or another

    --data: records (instruction, input, output) or eval.py's answers (prompt, label, predict)
    -> OUT/early.jsonl    one line an answer, in the order of the file (tools/view.py shows it)
       OUT/early.json     the curves with 95% intervals, and the sentences that were scored
       OUT/early.svg      a picture of them

A flat curve: the verdict stood before the reasoning began. A rising one: the steps made it.

What is scored. An Answers block after half a trace is a form that no model was taught, and measures
nothing. What a model knows is how its traces close a task: "The request is harmful." So after each
step stand two sentences, which differ in the verdict, and P = a / (a + b) of their probabilities:

- The section of a task runs from its heading "# Task N" to the next one, or to the Answers; text
  before any heading is Task 1's. Its steps begin at "Reasoning Step".
- Its closing is its last line, if that states one verdict word of the task, once, after all steps;
  a heading right above belongs to it ("## Conclusion").
- The form of a closing is its text with a blank for the verdict: an article before it, too, so that
  "is a refusal." and "is compliance." are one form. A form is used if in this file both verdicts
  follow it, each in two answers or more: such a text gives nothing away. The two sentences are the
  commonest spellings with one and with the other.
- An answer is read with its own form, where that is used, else with the commonest of the task. In
  the second case its last point stands behind its own closing, which has named the verdict, unless
  a heading sets the closing off: then before it.

Steps of a task come after all that the answer says before: tasks 2 and 3 know the earlier verdicts.
Beside P stands what the model itself would write there: `held`, how much of its probability the two
sentences hold after their common words. Low (hollow in the picture): the form is not known at this
place, and P may fall short. A tiny model that decides at once, but always wrote three steps, read
0.65 before the first of them, with held at 0.17; taught with any number of steps, 0.99 with 0.92.
So compare with a model that knows the form everywhere: --cut writes records whose sections end
after a random step, to go on training with.

The branches of an answer, and of as many others as fit into --max-tokens, are one forest: what they
begin with is computed once a pack. Exact: as one sequence at a time (1e-9 in float64,
tests/test_early.py).

    read_sections, find_forms      a trace -> steps and closings; a file -> pairs of sentences
    branch_off, grow               answers -> sequences -> one stream
    early_verdicts                 the measure
    curve                          mean and bootstrap interval
"""
import argparse
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from audit import STEP  # noqa: E402
from data import (HUMAN_LINE, MARK, VERDICTS, InputError, Pack, Tokenizer, at_least,  # noqa: E402
                  exchange_of, folder_of, gold_verdict, is_there, parse_records, parse_verdict, read_object, say, warn,
                  write_json)
from eval import TITLES, has_no_end, labels_of  # noqa: E402
from files import folder_path, keep_inputs, keep_others, write_new  # noqa: E402
from mine_hard import encode_prompts, write_lines  # noqa: E402
from model import (Llama, answer_logprobs, folder_name, join_ranks, pick_dtype,  # noqa: E402
                   read_arguments)
import plot  # noqa: E402
from plot import COLOURS, GREY, legend, write_svg  # noqa: E402

# ------------------------------------------------------------------ a trace and its sentences
HEADING = re.compile(r"^[ \t]*[#*]+[ \t]*Task[ \t]*(\d)\b.*$", re.I | re.M)
BARE_STEP = re.compile(r"[#* \t]*Reasoning Step[ \t]*\d*[:.* \t]*", re.I)       # without a text
REASONING_ENDS = re.compile(r"^(?:[#* \t]*answers\b|-{3,}[ \t]*$|the ground truth)", re.I | re.M)
LEAST = 2           # answers with each verdict that a form needs


@dataclass
class Section:
    """What an answer says about one task: places in its text."""
    said: str               # the verdict of the Answers block
    steps: list             # where each step begins
    stop: int               # where the section ends
    closes: int = None      # where its closing begins; None: it has none
    closing: str = None     # the closing
    form: str = None        # the closing with a blank for the verdict


def one_verdict(words, line):
    """The match of a verdict word in this line, with its article, if there is exactly one."""
    found = list(re.finditer(rf"\b(?:an? )?({'|'.join(words)})\b", line, re.I))
    return found[0] if len(found) == 1 else None


def read_sections(answer):
    """{task: Section} of the tasks on which this answer has a verdict and steps."""
    verdict = parse_verdict(answer)
    bounds = section_bounds(answer)
    sections = {}
    for number, (task, words) in enumerate(VERDICTS.items(), 1):
        start, stop = bounds.get(number, (0, 0))
        steps = [found.start() for found in STEP.finditer(answer, start, stop)]
        if not steps or not verdict[task]:
            continue
        section = sections[task] = Section(verdict[task], steps, stop)
        place = closing_place(answer[steps[-1]:stop], words)
        if place is not None:
            section.closes = steps[-1] + place
            section.closing = answer[section.closes:stop].rstrip()
            word = one_verdict(words, section.closing)
            section.form = section.closing[:word.start()] + "_" + section.closing[word.end():]
    return sections


def section_bounds(answer):
    """{number of a task: (start, stop) of its section}. Of two sections the last one counts; a
    heading that states a verdict, or a conclusion, opens none."""
    found = REASONING_ENDS.search(answer)
    reasoning = found.start() if found else len(answer)
    words_of = dict(enumerate(VERDICTS.values(), 1))
    starts = [(1, 0)]
    for found in HEADING.finditer(answer, 0, reasoning):
        number = int(found[1])
        states = number in words_of and one_verdict(words_of[number], found[0])
        if not states and "conclusion" not in found[0].lower():
            starts.append((number, found.start()))
    stops = [start for _, start in starts[1:]] + [reasoning]
    return {number: (start, stop) for (number, start), stop in zip(starts, stops)}


def closing_place(last_step, words):
    """Where the closing begins in the text from the last step's heading to the section's end, or
    None. What stands right under a bare "Reasoning Step 3" is the step itself."""
    lines = list(re.finditer(r"^.*\S.*$", last_step, re.M))
    if len(lines) < 2 or not one_verdict(words, lines[-1][0]):
        return None
    above = lines[-2]
    if BARE_STEP.fullmatch(above[0]):
        return None
    is_heading = re.match(r"[ \t]*[#*]", above[0])
    if is_heading and len(lines) > 2 and one_verdict(words, last_step[above.start():]):
        return above.start()
    return lines[-1].start()


def find_forms(sections):
    """{task: {form: (sentence with the first verdict word, with the second)}}, the commonest form
    first, of all forms that both verdicts follow. sections: [what read_sections gives]."""
    closings = {task: defaultdict(Counter) for task in VERDICTS}    # task, form -> closings
    for some in sections:
        for task, section in some.items():
            if section.form:
                closings[task][section.form][section.closing] += 1
    forms = {}
    for task, words in VERDICTS.items():
        by_number = sorted(closings[task].items(), key=lambda item: -item[1].total())
        pairs = {form: sentence_pair(words, spelled) for form, spelled in by_number}
        forms[task] = {form: pair for form, pair in pairs.items() if pair}
    return forms


def sentence_pair(words, spelled):
    """The commonest closing with each of the two words, or None where one is rarer than LEAST.
    spelled: a Counter of closings of one form."""
    pair = []
    for word in words:
        some = Counter({closing: count for closing, count in spelled.items()
                        if one_verdict(words, closing)[1].lower() == word})
        if some.total() < LEAST:
            return None
        pair.append(some.most_common(1)[0][0])
    return pair


def reading_places(section, forms):
    """([places in the text after 0, 1, ... steps], the two sentences to read there), or None where
    the task has no form. forms: those of the task."""
    if not forms:
        return None
    sentences = forms.get(section.form) or next(iter(forms.values()))
    # a closing of another form may be the last step's own last line, and is left in; below a heading
    # it surely is none
    concludes = section.form in forms or (section.form or "").startswith("#")
    return [*section.steps, section.closes if concludes else section.stop], sentences


# ------------------------------------------------------------------ the forest
@dataclass
class Branch:
    """A sequence of ids, and from which of them on it is scored."""
    ids: list
    start: int


def branch_off(tokenizer, prompt, answer, sections, forms):
    """{task: ([places], [(Branch, Branch) at each])} of one answer."""
    branches = {}
    for task, section in sections.items():
        reading = reading_places(section, forms[task])
        if reading is None:
            continue
        places, sentences = reading
        pairs = []
        for place in places:
            ids = [prompt + tokenizer.encode(answer[:place] + sentence) for sentence in sentences]
            start = shared_start(*ids)
            pairs.append(tuple(Branch(some, start) for some in ids))
        branches[task] = (places, pairs)
    return branches


def shared_start(a, b):
    """How many first items two lists share."""
    for place, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return place
    return min(len(a), len(b))


def grow(branches):
    """The forest of any sequences as one stream: what two of them begin with stands once.

        in order     a b c $    a b d $    e $       rows  0 1 2 3 4
                     tokens     a b c d e            end   4 4 3 4 5      ($ is only predicted)

    In dictionary order a sequence leaves the one before it where they first differ: there the
    subtrees below end. Returns a Pack whose answer n is branches[n], scored from its start on."""
    tokens = []
    end = []
    path = []                                               # the rows of the sequence before
    before = []
    rows = []
    targets = []
    number = []
    for n in sorted(range(len(branches)), key=lambda n: branches[n].ids[:-1]):
        ids = branches[n].ids
        fed = ids[:-1]                                      # the last one is only predicted
        shared = shared_start(before, fed)
        for row in path[shared:]:
            end[row] = len(tokens)
        new = range(len(tokens), len(tokens) + len(fed) - shared)
        path = path[:shared] + list(new)
        tokens += fed[shared:]
        end += [None] * len(new)
        before = fed
        scored = range(branches[n].start, len(ids))
        rows += [path[i - 1] for i in scored]
        targets += [ids[i] for i in scored]
        number += [n] * len(scored)
    end = [len(tokens) if stop is None else stop for stop in end]
    lists = (tokens, end, rows, targets, number)
    return Pack(*(torch.tensor(values, dtype=torch.long) for values in lists))


def grow_packs(groups, max_tokens):
    """Packs of at most max_tokens rows (more where one group has more); a group of branches, those
    of one answer, stays together. Branches are numbered 0, 1, ... through all groups."""
    packs = []
    number = 0
    for held in fill(groups, max_tokens):
        p = grow(held)
        p.answer += number
        number += len(held)
        packs.append(p)
    return packs


def fill(groups, max_tokens):
    """Yield lists of branches: neighbouring groups that take at most max_tokens rows together."""
    held = []
    size = 0
    for group in groups:
        rows = len(grow(group).tokens)
        if held and size + rows > max_tokens:
            yield held
            held = []
            size = 0
        held = held + group
        size += rows
    if held:
        yield held


# ------------------------------------------------------------------ the measure
def early_verdicts(model, tokenizer, prompts, answers, world, max_tokens=8192, forms=None):
    """([{task: reading}] of each answer, the forms). A reading is a dict of said, the answer's own
    verdict; places, in its text, after 0, 1, ... steps; p, there, of the task's first verdict word;
    and held, see above.

    prompts: ids. answers: texts. forms: as find_forms gives them; default: of these answers."""
    sections = [read_sections(answer) for answer in answers]
    forms = forms or find_forms(sections)
    branches = [branch_off(tokenizer, prompt, answer, some, forms)
                for prompt, answer, some in zip(prompts, answers, sections)]
    groups = [[branch for _, pairs in some.values() for pair in pairs for branch in pair]
              for some in branches]
    groups = [group for group in groups if group]
    packs = grow_packs(groups, max_tokens)
    total = answer_logprobs(model, packs, sum(map(len, groups)), world)
    pairs = total.view(-1, 2)                               # log p of the two, in the same order
    p = iter(pairs.softmax(1)[:, 0].tolist())
    held = iter(pairs.exp().sum(1).tolist())
    readings = []
    for some, tasks in zip(branches, sections):
        readings.append({})
        for task, (places, _) in some.items():
            readings[-1][task] = {"said": tasks[task].said,
                                  "places": places,
                                  "p": [next(p) for _ in places],
                                  "held": [next(held) for _ in places]}
    return readings, forms


def of_verdict(task, verdict, p):
    """P of this verdict, where p is that of the task's first class."""
    return p if verdict == VERDICTS[task][0] else 1 - p


def curve(values, from_end=False):
    """[{"steps", "mean", "ci95"}] of lists of numbers after 0, 1, ... steps. A short list keeps its
    last value: every point is a mean over all answers. from_end: step -i is i steps before the end,
    and a short list begins with its first value."""
    n = len(values)
    most = max(map(len, values))
    table = np.empty((n, most))
    for row, some in zip(table, values):
        missing = most - len(some)
        if from_end:
            row[:] = [some[0]] * missing + some
        else:
            row[:] = some + [some[-1]] * missing
    times_drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000)     # (2000, n)
    resampled = times_drawn @ table / n                     # (2000, most)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0).tolist()
    mean = table.mean(0).tolist()
    first = 1 - most if from_end else 0
    return [{"steps": first + i, "mean": mean[i], "ci95": (low[i], high[i])}
            for i in range(most)]


def summarize(readings, golds):
    """{task: what early.json says of it}. golds: the labels of each answer, for P(gold)."""
    summary = {}
    for task in VERDICTS:
        rows = [(some[task], gold[task]) for some, gold in zip(readings, golds) if task in some]
        if not rows:
            continue
        said = [[of_verdict(task, row["said"], p) for p in row["p"]] for row, _ in rows]
        gold = [[of_verdict(task, label, p) for p in row["p"]] for row, label in rows if label]
        held = [row["held"] for row, _ in rows]
        summary[task] = {
            "n": len(rows),
            "steps": dict(sorted(Counter(len(some) - 1 for some in said).items())),
            "said": curve(said),
            "said_from_end": curve(said, from_end=True),
            "gold": curve(gold) if gold else [],
            "held": curve(held),
            "held_from_end": curve(held, from_end=True)}
    return summary


# ------------------------------------------------------------------ traces cut short
def cut_traces(records, seed=0):
    """The records, each section cut after a random number of its steps, from none to all: a model
    trained on these knows the closing at every place. Sections without a used form stay whole."""
    rng = random.Random(seed)
    sections = [read_sections(record["output"]) for record in records]
    forms = find_forms(sections)
    cut = []
    for record, some in zip(records, sections):
        text = record["output"]
        for task, section in sorted(some.items(), key=lambda item: -item[1].stop):     # from the end: places stay
            if section.form in forms[task]:
                keep = rng.choice([*section.steps, section.closes])
                text = text[:keep] + text[section.closes:]
        cut.append({**record, "output": text})
    return cut


# ------------------------------------------------------------------ the script
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=folder_name, default="out/sft", help="model folder")
    p.add_argument("--data", required=True, metavar="FILE", help="records with traces, or answers")
    p.add_argument("--out", type=folder_path, help="folder to write (default: that of --data)")
    p.add_argument("--max-length", type=at_least(1), default=4096,
                   help="user texts are cut to fit in it, as by eval.py")
    p.add_argument("--max-tokens", type=at_least(1), default=8192,
                   help="of a pack: speed and memory only")
    p.add_argument("--cut", metavar="FILE",
                   help="measure nothing: write the records, cut after random steps, to train on")
    args = read_arguments(p, argv)
    records = read_answers(args.data)[:args.limit]
    if args.cut:
        return write_cut(args.cut, records, args.data)
    out = args.out or Path(args.data).parent
    keep_what_is_not_ours(out)
    world = join_ranks(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    prompts, _ = encode_prompts(tokenizer, records, args.max_length, 0)
    model = Llama.from_pretrained(args.model, world.device, pick_dtype(world.device, args.dtype))
    answers = [record["output"] for record in records]
    ended = ["" if has_no_end(record) else record["output"] for record in records]
    readings, forms = early_verdicts(model, tokenizer, prompts, ended, world, args.max_tokens)
    if not any(readings):
        raise InputError(f"{args.data}: no answer has steps, a verdict, and a closing sentence "
                         f"that both verdicts end")
    if world.rank == 0:
        summary = summarize(readings, [record["gold"] for record in records])
        warn(readings.count({}), f"of {len(records)} answers could not be read")
        # early.json first: it says that the others were made here
        write_json(out / "early.json", {"model": str(args.model), "data": str(args.data),
                                        "forms": forms, "tasks": summary})
        write_lines(out / "early.jsonl",
                    [{"text": zlib.crc32(answer.encode(errors="replace")), "tasks": reading}
                     for answer, reading in zip(answers, readings)])
        draw(summary, f"{args.model} on {args.data}", out / "early.svg")
        report(summary, forms)                              # last: a reader may be slow


def keep_what_is_not_ours(out):
    """InputError where a file that is to be written is there, and early.json does not say that it
    was made here."""
    made = out / "early.json"
    if is_there(made) and not {"forms", "tasks"} <= read_object(made).keys():
        raise InputError(f"{made}: is there, and was not made here; choose another --out")
    for name in ("early.jsonl", "early.svg"):
        keep_others(out / name, made)


def write_cut(path, records, data):
    """Write these records, read from `data`, cut after random steps; InputError where none has an
    end."""
    keep_inputs(path, [data], "--cut")
    ended = [record for record in records if not has_no_end(record)]
    if not ended:
        raise InputError(f"{data}: has no answer with an end, so there is nothing to cut")
    warn(len(records) - len(ended), "answers without an end are left out")
    write_new(path, cut_traces(ended), "--cut")


def read_answers(path):
    """Records, with `gold`, of a file of records or of eval.py's answers."""
    records = []
    for place, record in parse_records(path):
        if not isinstance(record, dict):
            record = {}
        is_prediction = "predict" in record
        if is_prediction:
            record = record_of_prediction(record, folder_of(path).name)
        names = ("instruction", "input", "output")
        if not all(isinstance(record.get(name), str) for name in names):
            raise InputError(f"{path}: {place} is neither a record nor an answer of eval.py")
        if not is_prediction:                               # whatever columns are called like these
            record = {**record, "gold": gold_verdict(record)}
            record.pop("forced", None)
        records.append(record)
    return records


# what a chat template writes before an instruction: control tokens, and the role that speaks
FRAME_BEFORE = re.compile(rf"\A(?:\s*(?:{MARK}|(?:system|user)(?=\n|{MARK})))+\s*")


def record_of_prediction(line, dataset):
    """The record whose `output` is this answer, its gold labels, and `forced` where it had no end,
    so that no verdict of it counts; line: as eval.py writes it, or with the prompt as a chat
    template wrote it."""
    prompt = str(line.get("prompt") or "")
    exchange = exchange_of(prompt)
    if HUMAN_LINE.match(exchange):
        before = prompt[:prompt.index(exchange.rstrip())]
        instruction, _, same_line = FRAME_BEFORE.sub("", before).rpartition("\n")
        text = same_line + exchange
    else:                                                   # an input that is no exchange
        start = prompt.find("\n") + 1
        instruction = prompt[:start].removesuffix("\n")     # none where there is one line alone
        text = prompt[start:]
    gold = labels_of({"input": exchange, "output": str(line.get("label"))}, dataset)
    return {"instruction": instruction, "input": text, "output": line["predict"],
            "gold": gold, "forced": line.get("forced")}


def report(summary, forms):
    """Print the sentences and the curves."""
    for task, some in summary.items():
        say(f"\n{TITLES[task]}: {some['n']} answers")
        for first, second in list(forms[task].values())[:3]:
            say(f"  {first!r} against {second!r}")
        for name in ("said", "gold", "held"):
            points = "  ".join(f"{point['mean']:.3f}" for point in some[name])
            say(f"  {name:6} after 0, 1, ... steps:  {points}")


# ------------------------------------------------------------------ the picture
def draw(summary, title, path):
    """Two panels, P by steps read and by steps left; a line and a band for each task."""
    parts = [plot.text(60, 20, "P(the answer's own verdict | steps so far)", size=14),
             plot.text(60, 38, f"{title}; hollow: the sentence is not known there", size=11),
             *legend(60, 60, [f"{TITLES[task]}, n = {some['n']}"
                              for task, some in summary.items()])]
    most = max(point["steps"] for some in summary.values() for point in some["said"])
    parts += panel(60, 80, summary, "said", 0, most, "steps of the task read")
    parts += panel(420, 80, summary, "said_from_end", -most, 0, "steps before the last one is over")
    write_svg(path, 740, 330, parts)


def panel(x, y, summary, name, first, last, label):
    """Axes at (x, y), and the curve `name` of each task from step `first` to `last`."""
    width = 290
    height = 200

    def across(step):
        return x + width * (step - first) / max(last - first, 1)

    def up(p):
        return y + height * (1 - p)

    parts = []
    for p in (0, 0.25, 0.5, 0.75, 1):
        parts.append(plot.line([(x, up(p)), (x + width, up(p))]))
        parts.append(plot.text(x - 8, up(p) + 4, f"{p:.4g}", "end", 11))
    bottom = up(0)
    for step in range(first, last + 1):
        at = across(step)
        parts.append(plot.line([(at, bottom), (at, bottom + 4)], GREY))
        parts.append(plot.text(at, bottom + 18, step, "middle", 11))
    parts.append(plot.text(x + width / 2, bottom + 38, label, "middle", 11))
    for some, colour in zip(summary.values(), COLOURS):
        places = [across(point["steps"]) for point in some[name]]
        low = [up(point["ci95"][0]) for point in some[name]]
        high = [up(point["ci95"][1]) for point in some[name]]
        mean = [up(point["mean"]) for point in some[name]]
        parts.append(band(places, low, high, colour))
        parts.append(plot.line(zip(places, mean), colour, 2))
        held = [point["mean"] for point in some[name.replace("said", "held")]]
        for at, p, known in zip(places, mean, held):
            inside = colour if known >= 0.5 else "none"
            parts.append(f'<circle cx="{at:.1f}" cy="{p:.1f}" r="3.5" fill="{inside}" '
                         f'stroke="{colour}" stroke-width="1.5"/>')
    return parts


def band(places, low, high, colour):
    """The area between two curves over the same places."""
    there = list(zip(places, low))
    back = list(zip(places, high))[::-1]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
    return f'<polygon points="{points}" fill="{colour}" fill-opacity="0.18"/>'


if __name__ == "__main__":
    main()
