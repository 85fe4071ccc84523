"""Pictures of runs: metrics.jsonl and results.json become two SVG files, with the standard library alone.

    python tools/plot.py                                         the demo's, into docs
    python tools/plot.py --metrics FILE... --results FILE... --out DIR

    OUT/curves.svg    loss of each run by step, and margin and accuracy of those that train on pairs
    OUT/f1.svg        F1 of each data set and task with its 95% interval, a bar for each results.json

A run is called what its folder is called. Colours are read on light and on dark pages.
"""
import argparse
import math
import sys
from html import escape
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import InputError, parse_records, read_json, write_whole  # noqa: E402
from eval import TITLES  # noqa: E402

GREY, FAINT, COLOURS = "#767676", "#9a9a9a66", ["#3d85c6", "#d9822b", "#4f9e5b", "#b565a7", "#8c8c3a",
                        "#c2504d", "#4aa3a2"]

# ------------------------------------------------------------------ drawing


def text(x, y, words, anchor="start", size=12, colour=GREY, turn=False):
    """A line of text that starts, ends or is centred at (x, y); turn: upwards."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{turned}>'
            f"{escape(str(words))}</text>")


def line(points, colour=FAINT, width=1.0):
    """A line through points [(x, y)]."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def dot(x, y, colour):
    """A small dot, pale enough to see another through it."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}" fill-opacity="0.5"/>'


def legend(x, y, names):
    """Squares of colour and names, in one line from (x, y)."""
    parts = []
    for name, colour in zip(names, COLOURS):
        parts += [f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{colour}"/>', text(x + 14, y, name)]
        x += 30 + 7 * len(name)
    return parts


def write_svg(path, width, height, parts):
    """Write a picture without a background, whole or not at all."""
    svg = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                     f'height="{height}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">', *parts, "</svg>\n"])
    write_whole(path, lambda temporary: temporary.write_text(svg, encoding="utf-8"))
    print(f"wrote {path}")


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


def panel(x, y, width, height, title, unit, runs, low=None, high=None):
    """Axes at (x, y) and one curve a run: runs is [(name, steps, values)]; low, high: fixed ends of the axis."""
    values = [v for _, _, some in runs for v in some]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    logarithmic = low is None and 20 * bottom < top < 10 ** 4 * bottom
    if top <= bottom:
        bottom, top = bottom - 0.5, top + 0.5
    if not logarithmic and low is None:
        bottom, top = bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)
    scale = math.log if logarithmic else float
    first, last = min(s[0] for _, s, _ in runs), max(s[-1] for _, s, _ in runs)
    across = lambda step: x + width * (step - first) / max(last - first, 1)
    up = lambda v: y + height * (1 - (scale(v) - scale(bottom)) / (scale(top) - scale(bottom)))
    parts = [text(x, y - 12, title, size=13)]
    for v in ticks(bottom, top, logarithmic):
        parts += [line([(x, up(v)), (x + width, up(v))]), text(x - 6, up(v) + 4, f"{v:.4g}", "end", 11)]
    for step in sorted({first, *(int(s) for s in ticks(first, max(last, first + 1)) if first < s and s == int(s))}):
        parts += [line([(across(step), y + height), (across(step), y + height + 4)], GREY),
                  text(across(step), y + height + 17, step, "middle", 11)]
    parts += [line([(x, y + height), (x + width, y + height)], GREY),
              text(x + width / 2, y + height + 34, "optimizer step", "middle", 11),
              text(x - 46, y + height / 2, unit + (", logarithmic" if logarithmic else ""), "middle", 11, turn=True)]
    for (_, steps, some), colour in zip(runs, cycle(COLOURS)):
        parts.append(line([(across(s), up(v)) for s, v in zip(steps, some)], colour, 1.8))
    return parts + (legend(x + 8 * len(title) + 20, y - 12, [name for name, _, _ in runs]) if len(runs) > 1 else [])


# ------------------------------------------------------------------ the two pictures


def read_runs(paths):
    """[(name, rows)] of metrics.jsonl files; the rows are objects, one a step."""
    runs = []
    for path in paths:
        rows = [row for _, row in parse_records(path)][1:]                     # the first line: arguments
        if not rows:
            raise InputError(f"{path}: no step is in it yet")
        runs.append((Path(path).resolve().parent.name, rows))
    return runs


def curves(runs, path):
    """Loss of the runs on answers, then loss, margin and accuracy of the runs on pairs: a panel each."""
    kinds = [[run for run in runs if ("margin" in run[1][0]) == pairs] for pairs in (False, True)]
    shown = [("R-SFT: loss", "nats a token", kinds[0], "loss", {}), ("HS-DPO: loss", "nats", kinds[1], "loss", {}),
             ("HS-DPO: margin", "beta x log-ratio, nats", kinds[1], "margin", {}),
             ("HS-DPO: accuracy", "share of pairs", kinds[1], "accuracy", dict(low=0.0, high=1.0))]
    shown, parts = [row for row in shown if row[2]], []
    for n, (title, unit, some, key, ends) in enumerate(shown):
        lines = [(name, [r["step"] for r in rows], [r[key] for r in rows]) for name, rows in some]
        parts += panel(70 + 420 * (n % 2), 40 + 240 * (n // 2), 330, 160, title, unit, lines, **ends)
    write_svg(path, 420 * min(2, len(shown)), 20 + 240 * -(-len(shown) // 2), parts)


def bars(results, path):
    """results: [(name, rows of results.json)]. A group for each data set and task, a bar for each name."""
    groups = list(dict.fromkeys((r["task"], r["dataset"]) for _, rows in results for r in rows if "dataset" in r and "slice" not in r))
    groups.sort(key=lambda group: list(TITLES).index(group[0]))
    if not groups:
        raise InputError("the results hold no data set")
    x, width, y, thick = 330, 390, 40, 16
    across = lambda v: x + width * v / 100
    parts, start = legend(x, 18, [name for name, _ in results]), y - 6
    for task, dataset in groups:
        found = [(colour, r) for (_, rows), colour in zip(results, cycle(COLOURS)) for r in rows
                 if (r["task"], r.get("dataset")) == (task, dataset) and "slice" not in r]
        middle = y + thick * len(found) / 2 + 4
        parts.append(text(x - 10, middle, f"{dataset}: {TITLES[task]}, n = {found[0][1]['n']}", "end"))
        for colour, r in found:
            (low, high), at = r["ci95"], y + thick / 2
            parts += [f'<rect x="{x}" y="{y}" width="{across(r["f1"]) - x:.1f}" height="{thick - 3}" '
                      f'fill="{colour}" fill-opacity="0.45"/>',
                      line([(across(low), at - 1.5), (across(high), at - 1.5)], colour, 2),
                      *(line([(across(v), at - 5), (across(v), at + 2)], colour, 2) for v in (low, high)),
                      text(x + width + 12, y + thick - 5, f"{r['f1']:.2f}  ({low:.1f} - {high:.1f})")]
            y += thick
        y += 12
    grid = [p for v in range(0, 101, 20) for p in (line([(across(v), start), (across(v), y)]),
                                                   text(across(v), y + 16, v, "middle", 11))]
    label = text(x + width / 2, y + 36, "F1 in percent, with its 95% interval", "middle", 11)
    write_svg(path, x + width + 150, y + 46, [*grid, *parts, label])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--metrics", nargs="*", metavar="FILE", help="metrics.jsonl of runs, of one or both kinds",
                   default=["out/sft/metrics.jsonl", "out/dpo/metrics.jsonl"])
    p.add_argument("--results", nargs="*", metavar="FILE", help="results.json of evaluations",
                   default=["out/eval_sft/results.json", "out/eval_dpo/results.json"])
    p.add_argument("--out", type=Path, default=ROOT / "docs", help="folder to write")
    args = p.parse_args(argv)
    if args.metrics:
        curves(read_runs(args.metrics), args.out / "curves.svg")
    if args.results:
        names = [Path(path).resolve().parent.name.removeprefix("eval_") for path in args.results]
        bars(list(zip(names, map(read_json, args.results))), args.out / "f1.svg")


if __name__ == "__main__":
    main()
