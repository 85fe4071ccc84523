"""Pictures of runs: metrics.jsonl and results.json become two SVG files, with the standard library alone.

    python tools/plot.py                                         the demo's, into docs
    python tools/plot.py --metrics FILE... --results FILE... --out DIR

    OUT/curves.svg    loss of each run by step, and margin and accuracy of those that train on pairs
    OUT/f1.svg        F1 of each data set and task with its 95% interval, a bar for each results.json

A run is called what its folder is called (an evaluation's without eval_). Colours are read on light and on dark pages.
"""
import argparse
import itertools
import json
import math
import re
import sys
from html import escape
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import (Extend, InputError, folder_of, is_there, parse_records, read_bytes, read_json,  # noqa: E402
                  say, write_whole)
from eval import TITLES  # noqa: E402
from files import folder_path  # noqa: E402

GREY, FAINT, COLOURS = "#767676", "#9a9a9a66", ["#3d85c6", "#d9822b", "#4f9e5b", "#b565a7", "#8c8c3a",
                        "#c2504d", "#4aa3a2"]

# ------------------------------------------------------------------ drawing

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")     # what no SVG file may hold


def text(x, y, words, anchor="start", size=12, colour=GREY, turn=False):
    """A line of text that starts, ends or is centred at (x, y); turn: upwards."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    words = NOT_XML.sub(lambda odd: ascii(odd[0])[1:-1], str(words))           # spelled as by ascii()
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{turned}>'
            f"{escape(words)}</text>")


def line(points, colour=FAINT, width=1.0):
    """A line through points [(x, y)]."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def dot(x, y, colour):
    """A small dot, pale enough to see another through it."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}" fill-opacity="0.5"/>'


def legend(x, y, names):
    """Squares of colour and names, in one line from (x, y); after the last colour the first again."""
    parts = []
    for name, colour in zip(names, itertools.cycle(COLOURS)):
        parts += [f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{colour}"/>', text(x + 14, y, name)]
        x += 30 + 7 * len(name)
    return parts


FONT = 'font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'      # by which our pictures are known, too


def write_svg(path, width, height, parts):
    """Write a picture without a background, whole or not at all; InputError where a file is there that is no
    picture of ours."""
    if is_there(path) and FONT.encode() not in read_bytes(path)[:400]:
        raise InputError(f"{path}: is there, and was not made here; move it away, or choose another --out")
    svg = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                     f'height="{height}" {FONT}>', *parts, "</svg>\n"])
    write_whole(path, lambda temporary: temporary.write_text(svg, encoding="utf-8"))
    say(f"wrote {path}")


def ticks(low, high, logarithmic=False):
    """About five round numbers from low to high; powers of ten, or 1, 2, 5 times them, on a logarithmic axis."""
    if logarithmic:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(tens) > 4 else (1, 2, 5)
        return [d * 10.0 ** n for n in tens for d in steps if low <= d * 10.0 ** n <= high * 1.0001]
    rough = (high - low) / 7
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(m * ten for m in (1, 2, 2.5, 5, 10) if m * ten >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Values from low to high, drawn from pixel `start` to pixel `end`."""

    def __init__(self, low, high, start, end, logarithmic=False):
        self.low = low
        self.high = high
        self.start = start
        self.end = end
        self.logarithmic = logarithmic

    def __call__(self, value):
        """The pixel of a value."""
        scale = math.log if self.logarithmic else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + (self.end - self.start) * share

    def ticks(self):
        return ticks(self.low, self.high, self.logarithmic)


def value_axis(values, start, end):
    """The axis that shows all of `values`: logarithmic where they span a factor of 20 to 10,000."""
    low, high = min(values), max(values)
    if 20 * low < high < 10 ** 4 * low:
        return Axis(low, high, start, end, logarithmic=True)
    if low == high:
        low, high = low - 0.5, high + 0.5
    room = 0.05 * (high - low)
    return Axis(low - room, high + room, start, end)


def step_axis(runs, start, end):
    """The axis from the first step of any run to the last of any."""
    first = min(steps[0] for _, steps, _ in runs)
    last = max(steps[-1] for _, steps, _ in runs)
    return Axis(first, max(last, first + 1), start, end)


def panel(x, y, width, height, title, unit, runs, ends=None):
    """Axes at (x, y) and one curve a run: runs is [(name, steps, values)]; ends: (low, high) of a fixed axis."""
    right, bottom = x + width, y + height
    up = Axis(*ends, bottom, y) if ends else value_axis([v for _, _, values in runs for v in values], bottom, y)
    across = step_axis(runs, x, right)

    parts = [text(x, y - 12, title, size=13)]
    for v in up.ticks():
        parts.append(line([(x, up(v)), (right, up(v))]))
        parts.append(text(x - 6, up(v) + 4, f"{v:.4g}", "end", 11))
    whole_steps = [int(step) for step in across.ticks() if step == int(step) and step > across.low]
    for step in [across.low, *whole_steps]:
        parts.append(line([(across(step), bottom), (across(step), bottom + 4)], GREY))
        parts.append(text(across(step), bottom + 17, step, "middle", 11))
    parts.append(line([(x, bottom), (right, bottom)], GREY))
    parts.append(text(x + width / 2, bottom + 34, "optimizer step", "middle", 11))
    unit += ", logarithmic" if up.logarithmic else ""
    parts.append(text(x - 46, y + height / 2, unit, "middle", 11, turn=True))

    for (_, steps, values), colour in zip(runs, cycle(COLOURS)):
        parts.append(line([(across(s), up(v)) for s, v in zip(steps, values)], colour, 1.8))
    if len(runs) > 1:
        parts += legend(x + 8 * len(title) + 20, y - 12, [name for name, _, _ in runs])
    return parts


# ------------------------------------------------------------------ what is read


def is_number(value, low=-1e15, high=1e15):
    """Can an axis show it? Not NaN, Infinity, null; nor what is so large that a step of 1 is lost in rounding."""
    return type(value) in (int, float) and low <= value <= high


def read_runs(paths):
    """[(name, rows)] of metrics.jsonl files; the rows are objects, one a step."""
    runs = []
    for path in paths:
        lines = list(parse_records(path))[1:]                                  # the first line: arguments
        if not lines:
            raise InputError(f"{path}: no step is in it yet")
        rows = [row for _, row in lines]
        of_pairs = isinstance(rows[0], dict) and "margin" in rows[0]
        for place, row in lines:
            check_step(f"{path}: {place}", row, ("loss", "margin", "accuracy") if of_pairs else ("loss",))
        runs.append((folder_of(path).name, rows))
    return runs


def check_step(place, row, keys):
    """InputError unless a row is a step of a run, with a number for each of these keys."""
    if not isinstance(row, dict) or not is_number(row.get("step"), 0):
        raise InputError(f"{place} is no step of a run; name a metrics.jsonl of train_sft.py or train_dpo.py")
    for key in keys:
        if not is_number(row.get(key)):
            said = json.dumps(row.get(key))[:40]
            raise InputError(f"{place}: the run's {key} is no number at step {row['step']}, but {said}; leave this "
                             "run out, or train it again")


def read_results(path):
    """The results of single data sets in a results.json: neither averages nor slices."""
    results = read_json(path)
    if not isinstance(results, list):
        raise InputError(f"{path}: is no list of results; name a results.json of eval.py")
    rows = []
    for number, row in enumerate(results, 1):
        if not isinstance(row, dict) or "dataset" in row and not is_result(row):
            raise InputError(f"{path}: result {number} is not as eval.py writes it: dataset, task "
                             f"({', '.join(TITLES)}), n, and f1 and ci95 in percent; score it again")
        if "dataset" in row and "slice" not in row:
            rows.append(row)
    return rows


def is_result(row):
    """Has the result of a data set all that its bar shows?"""
    interval = row.get("ci95")
    has_interval = isinstance(interval, list) and len(interval) == 2
    named = isinstance(row["dataset"], str) and row.get("task") in list(TITLES)
    return has_interval and named and is_number(row.get("n")) and all(
        is_number(value, 0, 100) for value in [row.get("f1"), *interval])


# ------------------------------------------------------------------ the two pictures


def curves(runs, path):
    """Loss of the runs on answers, then loss, margin and accuracy of the runs on pairs: a panel each."""
    answers = [run for run in runs if "margin" not in run[1][0]]
    pairs = [run for run in runs if "margin" in run[1][0]]
    panels = [("R-SFT: loss", "nats a token", answers, "loss", None),
              ("HS-DPO: loss", "nats", pairs, "loss", None),
              ("HS-DPO: margin", "beta x log-ratio, nats", pairs, "margin", None),
              ("HS-DPO: accuracy", "share of pairs", pairs, "accuracy", (0.0, 1.0))]
    panels = [one for one in panels if one[2]]

    parts = []
    for n, (title, unit, some, key, ends) in enumerate(panels):
        row, column = divmod(n, 2)
        lines = [(name, [r["step"] for r in rows], [r[key] for r in rows]) for name, rows in some]
        parts += panel(70 + 420 * column, 40 + 240 * row, 330, 160, title, unit, lines, ends)
    write_svg(path, 420 * min(2, len(panels)), 20 + 240 * math.ceil(len(panels) / 2), parts)


def bar(y, thick, across, result, colour):
    """One F1 from the left end of the axis, its interval above it, both as figures to the right."""
    left = across.start
    f1 = across(result["f1"])
    low, high = map(across, result["ci95"])
    middle = y + thick / 2
    figures = f"{result['f1']:.2f}  ({result['ci95'][0]:.1f} - {result['ci95'][1]:.1f})"
    return [f'<rect x="{left}" y="{y}" width="{f1 - left:.1f}" height="{thick - 3}" '
            f'fill="{colour}" fill-opacity="0.45"/>',
            line([(low, middle - 1.5), (high, middle - 1.5)], colour, 2),
            line([(low, middle - 5), (low, middle + 2)], colour, 2),
            line([(high, middle - 5), (high, middle + 2)], colour, 2),
            text(across.end + 12, y + thick - 5, figures)]


def bars(results, path):
    """results: [(name, what read_results gives)]. A group for each data set and task, a bar for each name."""
    groups = {}                                                    # (task, dataset): [(colour, row)]
    for (_, rows), colour in zip(results, cycle(COLOURS)):
        for row in rows:
            groups.setdefault((row["task"], row["dataset"]), []).append((colour, row))
    if not groups:
        raise InputError("the results hold no data set")

    across = Axis(0, 100, 330, 720)                                # F1 in percent
    top, thick = 34, 16
    parts = legend(across.start, 18, [name for name, _ in results])
    y = top + 6
    for task, dataset in sorted(groups, key=lambda group: list(TITLES).index(group[0])):
        found = groups[task, dataset]
        middle = y + thick * len(found) / 2 + 4
        parts.append(text(across.start - 10, middle, f"{dataset}: {TITLES[task]}, n = {found[0][1]['n']}", "end"))
        for colour, row in found:
            parts += bar(y, thick, across, row, colour)
            y += thick
        y += 12

    grid = []
    for v in range(0, 101, 20):
        grid.append(line([(across(v), top), (across(v), y)]))
        grid.append(text(across(v), y + 16, v, "middle", 11))
    label = text(across(50), y + 36, "F1 in percent, with its 95% interval", "middle", 11)
    write_svg(path, across.end + 150, y + 46, [*grid, *parts, label])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--metrics", nargs="*", action=Extend, metavar="FILE",
                   help="metrics.jsonl of runs, of one or both kinds",
                   default=["out/sft/metrics.jsonl", "out/dpo/metrics.jsonl"])
    p.add_argument("--results", nargs="*", action=Extend, metavar="FILE", help="results.json of evaluations",
                   default=["out/eval_sft/results.json", "out/eval_dpo/results.json"])
    p.add_argument("--out", type=folder_path, default=ROOT / "docs", help="folder to write")
    args = p.parse_args(argv)
    if args.metrics:
        curves(read_runs(args.metrics), args.out / "curves.svg")
    if args.results:
        names = [folder_of(path).name.removeprefix("eval_") for path in args.results]
        bars(list(zip(names, map(read_results, args.results))), args.out / "f1.svg")


if __name__ == "__main__":
    main()
