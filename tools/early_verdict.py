"""When does a guard know its verdict? P(verdict | the first i steps of its own reasoning).

    python tools/early_verdict.py --model out/sft --data out/eval_sft/test/generated_predictions.jsonl \\
                                  --out out/early

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
- An answer is read with its own form, where that is used, else with the commonest of the task.

Steps of a task come after all that the answer says before: tasks 2 and 3 know the earlier verdicts.
Beside P stands what the model itself would write there: `held`, how much of its probability the two
sentences hold after their common words. Low: the form is not known at this place, distrust P.

All branches of all answers are one forest, so each prompt and each step is computed once. Exact: as
one sequence at a time (1e-9 in float64, tests/test_early.py).

    read_sections, find_forms      a trace -> steps and closings; a file -> pairs of sentences
    branch_off, grow               answers -> sequences -> one stream
    early_verdicts                 the measure
    curve                          mean and bootstrap interval
"""
import argparse
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from data import (HUMAN, VERDICTS, InputError, Pack, Tokenizer, at_least,  # noqa: E402
                  gold_verdict, parse_records, parse_verdict, warn, write_json)
from eval import TITLES, labels_of  # noqa: E402
from mine_hard import encode_prompts, write_lines  # noqa: E402
from model import Llama, answer_logprobs, join_ranks, pick_dtype, read_arguments  # noqa: E402
from plot import COLOURS, FAINT, GREY, legend, line, text, write_svg  # noqa: E402

# ------------------------------------------------------------------ a trace and its sentences
HEADING = re.compile(r"^[ \t]*[#*]+[ \t]*Task[ \t]*(\d)\b.*$", re.I | re.M)
STEP = re.compile(r"^[#* \t]*Reasoning Step\b.*$", re.I | re.M)
REASONING_ENDS = re.compile(r"^(?:[#* \t]*answers\b|-{3,}[ \t]*$|the ground truth)", re.I | re.M)
LEAST = 2           # answers with each verdict that a form needs


@dataclass
class Section:
    """What an answer says about one task; text[:cuts[i]] is the answer up to after i steps."""
    said: str           # the verdict of the Answers block
    cuts: list          # n + 1 places for n steps, the last one without the closing
    stop: int           # where the section ends
    closing: str        # its closing, or None
    form: str           # the closing with a blank


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
        if steps and verdict[task]:
            place = closing_place(answer[steps[-1]:stop], words)
            sections[task] = Section(verdict[task], [*steps, stop], stop, None, None)
            if place is not None:
                closing = answer[steps[-1] + place:stop].rstrip()
                word = one_verdict(words, closing)
                sections[task].closing = closing
                sections[task].form = closing[:word.start()] + "_" + closing[word.end():]
    return sections


def section_bounds(answer):
    """{number of a task: (start, stop) of its section}. Of two sections the last one counts, and a
    heading that states a verdict, or a conclusion, is none."""
    reasoning = REASONING_ENDS.search(answer)
    reasoning = reasoning.start() if reasoning else len(answer)
    starts = [(1, 0)]
    for found in HEADING.finditer(answer, 0, reasoning):
        number = int(found[1])
        words = list(VERDICTS.values())[number - 1] if number in (1, 2, 3) else ()
        closes = "conclusion" in found[0].lower() or words and one_verdict(words, found[0])
        if not closes:
            starts.append((number, found.start()))
    stops = [start for _, start in starts[1:]] + [reasoning]
    return {number: (start, stop) for (number, start), stop in zip(starts, stops)}


def closing_place(last_step, words):
    """Where the closing begins in the text from the last step's heading to the section's end, or
    None. A line right under a bare "Reasoning Step 3" is the step itself, not a closing."""
    lines = [found for found in re.finditer(r"^.*\S.*$", last_step, re.M)]
    if len(lines) < 2 or not one_verdict(words, lines[-1][0]):
        return None
    above = lines[-2]
    if re.fullmatch(r"[#* \t]*Reasoning Step[ \t]*\d*[:.* \t]*", above[0], re.I):
        return None
    if re.match(r"[ \t]*[#*]", above[0]) and len(lines) > 2 and not one_verdict(words, above[0]):
        return above.start()
    return lines[-1].start()


def find_forms(answers):
    """{task: {form: (sentence with the first verdict word, with the second)}}, the commonest form
    first. answers: [{task: Section}]."""
    spelled = defaultdict(lambda: defaultdict(Counter))             # task, form -> closings
    for sections in answers:
        for task, section in sections.items():
            if section.form:
                spelled[task][section.form][section.closing] += 1
    forms = {}
    for task, of_form in spelled.items():
        first, second = VERDICTS[task]
        forms[task] = {}
        for form, closings in sorted(of_form.items(), key=lambda item: -item[1].total()):
            with_word = {word: Counter() for word in (first, second)}
            for closing, count in closings.items():
                word = one_verdict(VERDICTS[task], closing)[1].lower()
                with_word[word][closing] += count
            if min(with_word[first].total(), with_word[second].total()) >= LEAST:
                pair = [with_word[word].most_common(1)[0][0] for word in (first, second)]
                forms[task][form] = tuple(pair)
    return forms


# ------------------------------------------------------------------ the forest
@dataclass
class Branch:
    """A sequence of ids, and from which of them on it is scored."""
    ids: list
    start: int


def branch_off(tokenizer, prompt, answer, sections, forms):
    """[(task, [(Branch, Branch) after 0, 1, ... steps])] of one answer."""
    branches = []
    for task, section in sections.items():
        if not forms.get(task):
            continue
        own = section.form in forms[task]
        pair = forms[task][section.form if own else next(iter(forms[task]))]
        cuts = list(section.cuts)
        if own:
            cuts[-1] = answer.rindex(section.closing, 0, section.stop)
        after = []
        for cut in cuts:
            ids = [prompt + tokenizer.encode(answer[:cut] + sentence) for sentence in pair]
            start = shared_start(*ids)
            after.append(tuple(Branch(some, start) for some in ids))
        branches.append((task, after))
    return branches


def shared_start(a, b):
    """How many first items two lists share."""
    for place, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return place
    return min(len(a), len(b))


def grow(branches):
    """The forest of any sequences as one stream: what two of them begin with stands once.

        in order     a b c      a b d      e         rows  0 1 2 3 4
                     tokens     a b c d e            end   4 4 3 4 5

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
    """Packs of about max_tokens rows; a group of branches (those of one answer) stays together.
    Answers are numbered 0, 1, ... through all groups."""
    packs = []
    held = []                                               # branches of the pack being filled
    size = 0
    number = 0
    for group in [*groups, None]:
        rows = len(grow(group).tokens) if group else 0
        if held and (group is None or size + rows > max_tokens):
            p = grow(held)
            p.answer += number
            packs.append(p)
            number += len(held)
            held = []
            size = 0
        held += group or []
        size += rows
    return packs


# ------------------------------------------------------------------ the measure
def early_verdicts(model, tokenizer, prompts, answers, world, max_tokens=8192, forms=None):
    """([{task: {"said", "p": [P(first class) after 0, 1, ... steps], "held": [...]}}], forms).

    prompts: ids. answers: texts. forms: as find_forms gives them; default: of these answers."""
    sections = [read_sections(answer) for answer in answers]
    forms = forms or find_forms(sections)
    branches = [branch_off(tokenizer, prompt, answer, some, forms)
                for prompt, answer, some in zip(prompts, answers, sections)]
    groups = [[branch for _, after in some for pair in after for branch in pair]
              for some in branches]
    count = sum(map(len, groups))
    packs = grow_packs([group for group in groups if group], max_tokens)
    pairs = answer_logprobs(model, packs, count, world).view(-1, 2)
    p = pairs.softmax(1)[:, 0].tolist()
    held = pairs.exp().sum(1).tolist()
    found = []
    place = 0
    for some, tasks in zip(branches, sections):
        found.append({})
        for task, after in some:
            these = slice(place, place + len(after))
            found[-1][task] = {"said": tasks[task].said, "p": p[these], "held": held[these]}
            place += len(after)
    return found, forms


def of_verdict(task, verdict, p):
    """P of this verdict, where p is that of the task's first class."""
    return p if verdict == VERDICTS[task][0] else 1 - p


def curve(values, from_end=False):
    """[{"steps", "mean", "ci95"}] of lists of numbers after 0, 1, ... steps. A short list keeps its
    last value: every point is a mean over all answers. from_end: step -i is i steps before the end,
    and a short list begins with its first value."""
    most = max(map(len, values)) - 1
    if from_end:
        table = [[some[max(0, len(some) - 1 - i)] for i in range(most, -1, -1)] for some in values]
    else:
        table = [[some[min(i, len(some) - 1)] for i in range(most + 1)] for some in values]
    table = np.array(table)                                 # (answers, most + 1)
    n = len(table)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000)    # how often each
    low, high = np.percentile(drawn @ table / n, [2.5, 97.5], axis=0)
    first = -most if from_end else 0
    return [{"steps": first + i, "mean": float(table[:, i].mean()),
             "ci95": (float(low[i]), float(high[i]))} for i in range(most + 1)]


def summarize(found, golds):
    """{task: what early.json says of it}. golds: the labels of each answer, for P(gold)."""
    summary = {}
    for task in VERDICTS:
        rows = [(some[task], gold[task]) for some, gold in zip(found, golds) if task in some]
        if not rows:
            continue
        said = [[of_verdict(task, row["said"], p) for p in row["p"]] for row, _ in rows]
        labelled = [[of_verdict(task, gold, p) for p in row["p"]] for row, gold in rows if gold]
        summary[task] = {
            "n": len(rows),
            "steps": dict(sorted(Counter(len(some) - 1 for some in said).items())),
            "said": curve(said),
            "said_from_end": curve(said, from_end=True),
            "decided": curve([[float(p > 0.5) for p in some] for some in said]),
            "gold": curve(labelled) if labelled else [],
            "held": curve([row["held"] for row, _ in rows])}
    return summary


# ------------------------------------------------------------------ the script
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/sft", help="model folder")
    p.add_argument("--data", required=True, metavar="FILE", help="records with traces, or answers")
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument("--max-length", type=at_least(1), default=4096,
                   help="user texts are cut to fit in it, as by eval.py")
    p.add_argument("--max-tokens", type=at_least(1), default=8192,
                   help="of a pack: speed and memory only")
    args = read_arguments(p, argv)
    world = join_ranks(args.device)
    records = read_answers(args.data)[:args.limit]
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    prompts, _ = encode_prompts(tokenizer, records, args.max_length)
    model = Llama.from_pretrained(args.model, world.device, pick_dtype(world.device, args.dtype))
    answers = [record["output"] for record in records]
    found, forms = early_verdicts(model, tokenizer, prompts, answers, world, args.max_tokens)
    if not any(found):
        raise InputError(f"{args.data}: no answer has steps, a verdict and a closing sentence")
    if world.rank == 0:
        summary = summarize(found, [record["gold"] for record in records])
        report(summary, forms, records, found)
        write_lines(args.out / "early.jsonl", found)
        write_json(args.out / "early.json", {"model": str(args.model), "data": str(args.data),
                                             "forms": forms, "tasks": summary})
        draw(summary, f"{args.model} on {args.data}", args.out / "early.svg")


def read_answers(path):
    """Records, with `gold`, of a file of records or of eval.py's answers."""
    records = []
    for place, record in parse_records(path):
        fields = record if isinstance(record, dict) else {}
        if "predict" in fields:
            prompt = str(fields.get("prompt"))
            at = max(1, prompt.find(HUMAN))
            record = {"instruction": prompt[:at - 1], "input": prompt[at:],
                      "output": fields["predict"]}
            gold = labels_of({**record, "output": str(fields.get("label"))},
                             Path(path).resolve().parent.name)
        names = ("instruction", "input", "output")
        if not all(isinstance(record.get(name), str) for name in names):
            raise InputError(f"{path}: {place} is neither a record nor an answer of eval.py")
        if "predict" not in fields:
            gold = gold_verdict(record)
        records.append({**record, "gold": gold})
    return records


def report(summary, forms, records, found):
    """Print the curves, the sentences, and what was left out."""
    for task, some in summary.items():
        print(f"\n{TITLES[task]}: {some['n']} answers")
        for first, second in list(forms[task].values())[:3]:
            print(f"  {first!r} against {second!r}")
        for name in ("said", "gold", "held"):
            points = "  ".join(f"{point['mean']:.3f}" for point in some[name])
            print(f"  {name:6} after 0, 1, ... steps:  {points}")
    warn(sum(not some for some in found), f"of {len(records)} answers have no such section")


# ------------------------------------------------------------------ the picture
def draw(summary, title, path):
    """Two panels, P by steps read and by steps left; a line and a band for each task."""
    parts = [text(60, 20, "P(the answer's own verdict | steps so far)", size=14),
             text(60, 38, title, size=11),
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
        parts.append(line([(x, up(p)), (x + width, up(p))]))
        parts.append(text(x - 8, up(p) + 4, f"{p:.4g}", "end", 11))
    for step in range(first, last + 1):
        parts.append(line([(across(step), y + height), (across(step), y + height + 4)], GREY))
        parts.append(text(across(step), y + height + 18, step, "middle", 11))
    parts.append(text(x + width / 2, y + height + 38, label, "middle", 11))
    for (task, some), colour in zip(summary.items(), COLOURS):
        points = some[name]
        low = [(across(point["steps"]), up(point["ci95"][0])) for point in points]
        high = [(across(point["steps"]), up(point["ci95"][1])) for point in points]
        band = " ".join(f"{a:.1f},{b:.1f}" for a, b in low + high[::-1])
        parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.18"/>')
        mean = [(across(point["steps"]), up(point["mean"])) for point in points]
        parts.append(line(mean, colour, 2))
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in mean]
    return parts


if __name__ == "__main__":
    main()
