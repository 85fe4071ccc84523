"""The tables of tools/ablation.py, from the small files in OUT/answers alone.

    python tools/ablation_table.py OUT              two Markdown tables, and OUT/ablation.json

The figure is the mean of the three tasks' F1. Intervals are 95%, from resampling groups of test
records (a pair and its opposite answers), the same draws for both sides of a difference; they do
not cover what another training seed would change. A difference is over the cells that have both
sides; where some are missing, their number stands behind it.

    VARIANTS, GRIDS, CONTRASTS      what there is, what is chosen on dev, what is compared
    groups_of, mean_f1, interval    the figures
    choose, report                  the tables
"""
import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import certificate  # noqa: E402
from data import InputError, read_json, say, split_input, write_json  # noqa: E402
from eval import f1_of  # noqa: E402
from files import folder_path  # noqa: E402

PAPER = ["labels", "shuffled", "r_sft", "continued", "chosen", "no_weight", "hs_dpo", "hs_dpo_k8",
         "ensemble", "swapped"]
OPENED = ["two_correct", "consistent", "sound", "alpha_k8", "alpha_k8_flat", "group", "chosen_all",
          "after_difference", "differing", "verdicts", "step", "erring"]
VARIANTS = [*PAPER, *OPENED, "continued_dev", "chosen_dev", "hs_dpo_dev", "step_dev"]
# arm: the points of its grid; the best on dev is the arm, the first where several are
GRIDS = {
    "labels": ["labels_1x", "labels_3x"],
    "continued_dev": ["continued", "continued@1e-5", "continued@1e-4", "continued@3e-4"],
    "chosen_dev": ["chosen", "chosen@1e-5", "chosen@1e-4", "chosen@3e-4"],
    "hs_dpo_dev": ["hs_dpo", "hs_dpo@1e-5", "hs_dpo@1e-4", "hs_dpo@1e-5x10", "hs_dpo@3e-5x10",
                   "hs_dpo@1e-4x10"],
    "step_dev": ["step", "step@1e-5", "step@1e-4", "step@1e-5x10", "step@3e-5x10", "step@1e-4x10"],
}
CONTRASTS = [
    ("r_sft", "labels"),
    ("r_sft", "shuffled"),
    ("continued", "r_sft"),
    ("chosen", "r_sft"),
    ("hs_dpo", "r_sft"),
    ("hs_dpo", "continued"),
    ("hs_dpo", "chosen"),
    ("hs_dpo", "no_weight"),
    ("hs_dpo_k8", "hs_dpo"),
    ("ensemble", "hs_dpo"),
    ("swapped", "hs_dpo"),
    ("hs_dpo", "two_correct"),
    ("two_correct", "r_sft"),
    ("two_correct", "chosen"),
    ("consistent", "hs_dpo"),
    ("sound", "hs_dpo"),
    ("alpha_k8", "alpha_k8_flat"),
    ("alpha_k8", "r_sft"),
    ("alpha_k8", "hs_dpo_k8"),
    ("alpha_k8_flat", "hs_dpo_k8"),
    ("group", "hs_dpo_k8"),
    ("group", "chosen_all"),
    ("chosen_all", "chosen"),
    ("after_difference", "hs_dpo"),
    ("differing", "hs_dpo"),
    ("verdicts", "hs_dpo"),
    ("step", "hs_dpo"),
    ("step", "chosen"),
    ("erring", "hs_dpo"),
    ("step", "erring"),
    ("hs_dpo@1e-4", "hs_dpo"),
    ("chosen@1e-4", "chosen"),
    ("step@1e-4x10", "hs_dpo@1e-4x10"),
    ("chosen_dev", "r_sft"),
    ("hs_dpo_dev", "hs_dpo"),
    ("hs_dpo_dev", "r_sft"),
    ("hs_dpo_dev", "continued_dev"),
    ("hs_dpo_dev", "chosen_dev"),
    ("step_dev", "hs_dpo_dev"),
    ("step_dev", "chosen_dev"),
]


# ------------------------------------------------------------------ figures
def groups_of(records):
    """(n,) a number for each record: a pair and its opposite answers share one."""
    keys = []
    for record in records:
        reading = certificate.read(*split_input(record["input"]))
        keys.append(replace(reading, wish="", changed=False, verb="", left=None))
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def mean_f1(table, weights=None):
    """Mean over tasks of F1 in percent. table (n, 3, 2): gold (1 positive, 0 other, -1 no label),
    and right or wrong (1, 0); weights (n,): how often each row counts."""
    if weights is None:
        weights = np.ones(len(table))
    scores = []
    for task in range(3):
        gold, right = table[:, task].T
        tp = (weights * (gold == 1) * right).sum()
        wrong = (weights * (gold >= 0) * (1 - right)).sum()
        scores.append(f1_of(tp, wrong, 0, 0))                   # which are fp or fn: F1 adds them up
    return np.mean(scores)


def score(cells, weights):
    """The mean over cells of mean_f1; weights: of the rows of each corpus."""
    return np.mean([mean_f1(table, weights[corpus]) for corpus, table in cells])


def interval(cells, others=None, groups=None, draws=1000):
    """(figure, low, high) of the mean over cells of mean_f1, or of its difference to `others`,
    paired. cells, others: [(corpus seed, table)]; groups {corpus seed: (n,)}: rows that are drawn
    together. Cells of one corpus have the same test records, so a draw is the same for all of
    them."""
    rng = np.random.default_rng(0)
    sizes = {corpus: len(table) for corpus, table in cells}
    groups = groups or {corpus: np.arange(n) for corpus, n in sizes.items()}

    def figure(weights):
        value = score(cells, weights)
        return float(value - score(others, weights) if others else value)

    def draw():
        weights = {}
        for corpus in sizes:
            n = groups[corpus].max() + 1
            count = np.bincount(rng.integers(n, size=n), minlength=n)
            weights[corpus] = count[groups[corpus]]
        return weights

    drawn = [figure(draw()) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    whole = figure({corpus: np.ones(n) for corpus, n in sizes.items()})
    return whole, float(low), float(high)


# ------------------------------------------------------------------ what is there
def read_answers(out):
    """All files of OUT/answers. InputError where there are none, or where the files of one cell
    start from different R-SFT models."""
    found = [read_json(path) for path in sorted(Path(out).glob("answers/*/*.json"))]
    if not found:
        raise InputError(f"{out}/answers: no answers here; run tools/ablation.py --out {out}")
    bases = {}                                              # cell -> the hash of its R-SFT model
    for file in found:
        if not file["base"]:                                # a variant that needs none
            continue
        cell = (file["corpus"], file["seed"], file["skip"])
        if bases.setdefault(cell, file["base"]) != file["base"]:
            raise InputError(f"{out}/answers: corpus {cell[0]}, seed {cell[1]}, s = {cell[2]} has "
                             "answers from two R-SFT models; keep those of one machine")
    return found


def tables_of(found, part="test"):
    """{(variant, share): {(corpus, seed): table (n, 3, 2)}} of the answers to test.json or dev.json;
    what has no share counts for all."""
    shares = sorted({file["skip"] for file in found if file["skip"] is not None}) or [None]
    tables = defaultdict(dict)
    for file in found:
        if part not in file:
            continue
        cell = (file["corpus"], file["seed"])
        of_file = shares if file["skip"] is None else [file["skip"]]
        for share in of_file:
            tables[file["variant"], share][cell] = np.array(file[part])
    return tables


def choose(found, tables):
    """Add the arms of GRIDS to tables: of each, in each share, the point that is best on dev, over
    the cells that have all points. -> notes, which point that was."""
    notes = []
    dev = tables_of(found, "dev")
    for share in sorted({share for _, share in tables}):
        for arm, points in GRIDS.items():
            cells = set.intersection(*[set(dev.get((point, share), ())) for point in points])
            if not cells:
                continue
            means = []
            for point in points:
                means.append(np.mean([mean_f1(dev[point, share][cell]) for cell in cells]))
            best = points[int(np.argmax(means))]
            tables[arm, share] = {cell: tables[best, share][cell] for cell in cells}
            listed = [f"{point} {mean:.1f}" for point, mean in zip(points, means)]
            notes.append(f"{arm}, s = {share}: {best} of (mean F1 on dev, {len(cells)} cells) "
                         + ", ".join(listed))
    return notes


def pair_notes(found):
    """How many pairs of which weight the variants of each cell had."""
    notes = []
    for f in found:
        if not f["pairs"]:
            continue
        count = sum(f["pairs"].values())
        weights = [f"{weight} x {n}" for weight, n in sorted(f["pairs"].items())]
        cell = f"s = {f['skip']}, corpus {f['corpus']}, seed {f['seed']}"
        notes.append(f"{cell}, {f['variant']}: {count} pairs, alpha " + ", ".join(weights))
    return notes


def time_note(found):
    """CPU time by what it was for."""
    seconds = Counter()
    for f in found:
        seconds.update(f["cpu_seconds"])
    spent = [f"{name} {value / 60:.1f}" for name, value in seconds.items()]
    return "minutes of CPU time: " + ", ".join(spent)


# ------------------------------------------------------------------ tables
def cells_of(tables, names, shares):
    """For each of these variants [(corpus, table)], over the cells that have all of them."""
    lists = [[] for _ in names]
    for share in shares:
        there = [tables.get((name, share), {}) for name in names]
        for cell in sorted(set.intersection(*[set(some) for some in there])):
            for cells, some in zip(lists, there):
                cells.append((cell[0], some[cell]))
    return lists


def entry(tables, names, shares, groups, form):
    """(text, interval or None) of one field of a table: of one variant, or of a difference."""
    cells = cells_of(tables, names, shares)
    if not cells[0]:
        return "-", None
    others = cells[1] if len(names) == 2 else None
    found = interval(cells[0], others, groups)
    text = form.format(*found)
    there = len(cells[0])
    most = sum(len(known_cells(tables, share)) for share in shares)
    if there < most:
        text += f", {there} of {most} cells"
    return text, found


def known_cells(tables, share):
    """All cells of a share that any variant has."""
    known = set()
    for (_, other), some in tables.items():
        if other == share:
            known.update(some)
    return known


def markdown(title, columns, rows):
    """A table: rows are [first field, ...]."""
    ruler = ["---"] * (len(columns) + 1)
    lines = []
    for fields in ([title, *columns], ruler, *rows):
        lines.append("| " + " | ".join(fields) + " |")
    lines[1] = lines[1].replace(" ", "")
    return lines


def report(tables, groups):
    """(lines of two Markdown tables, their figures as rows), of {(variant, share): {cell: table}}.
    """
    there = dict.fromkeys(name for name, _ in tables)
    names = sorted(there, key=[*VARIANTS, *there].index)
    shares = sorted({share for _, share in tables}, key=str)
    columns = {f"s = {share}": [share] for share in shares}
    if len(shares) > 1:
        columns["all"] = shares
    found = []

    def table(title, sides, form):
        rows = []
        for side in sides:
            row = [" - ".join(side)]
            for column, some in columns.items():
                text, figures = entry(tables, side, some, groups, form)
                row.append(text)
                if figures:
                    found.append(figure_row(side, column, figures))
            rows.append(row)
        return markdown(title, columns, rows)

    lines = table("mean F1 (95% interval)", [(name,) for name in names], "{:.1f} ({:.1f} - {:.1f})")
    contrasts = [pair for pair in CONTRASTS if {*pair} <= {*names}]
    lines += ["", *table("difference (95% interval, paired)", contrasts,
                         "{:+.1f} ({:+.1f} to {:+.1f})")]
    return lines, found


def figure_row(side, column, figures):
    """One figure as ablation.json holds it."""
    figure, *ci95 = figures
    if len(side) == 1:
        return {"variant": side[0], "skips": column, "f1": figure, "ci95": ci95}
    return {"variant": side[0], "minus": side[1], "skips": column, "difference": figure,
            "ci95": ci95}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=folder_path, metavar="OUT", help="folder that tools/ablation.py wrote")
    args = p.parse_args(argv)
    found = read_answers(args.out)
    tables = tables_of(found)
    notes = choose(found, tables)
    groups = {f["corpus"]: np.array(f["groups"]) for f in found}
    lines, rows = report(tables, groups)
    notes += [*pair_notes(found), time_note(found)]
    commits = sorted({f["git"] for f in found if f["git"]})
    write_json(args.out / "ablation.json", {"rows": rows, "notes": notes, "git": commits})
    say("\n".join([*lines, "", *notes]))


if __name__ == "__main__":
    main()
