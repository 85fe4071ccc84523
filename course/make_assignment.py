"""A student's copy of the repository: functions blanked out in problem sets, with handouts.

    python course/make_assignment.py OUT              sets 1 to 5, of which the fifth is voluntary
    python course/make_assignment.py OUT --sets 2     this one; all else stays finished, to be read
    python course/make_assignment.py OUT --sets 0     day one: five functions, two hours; the same

A blanked function keeps its signature, its docstring (which is the exercise) and comments above its
first statement; its body becomes `raise NotImplementedError`. The copy carries what CARRIED names
and nothing else: no grader, no figures of what is left out, and no solution but those of the sets
that are not named. Hints and answers are in files of their own. `python course/grade.py OUT` grades
it.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

from exercises import EXERCISES, ROOT, SCRIPTS, SETS, blank, exercises_of, top_names
from rules import published

COURSE = ROOT / "course"
CARRIED = [
    "LICENSE", "requirements.txt", ".gitignore", "toy",
    *(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("golden_*"))),
    *(f"tests/{name}" for name in (
        "conftest.py", "processes.py", "make_golden.py", "test_exercises.py",
        "test_exercises_kernels.py", "test_data.py", "test_model.py", "test_train.py",
        "test_mine.py", "test_dpo.py", "test_eval.py")),
    "tools/audit.py", "tools/measure.py",                   # which test_data.py and test_train.py try
    "course/exercises.py", "course/rules.py", "course/check.py"]
FOR_DAY_ONE = ["course/day_one.py"]
HINTS = """## Hints

`python course/check.py {name} --hint 1` prints one; 2 and 3 say more. All of them are in
hints_set{number}.md, one below the other.

"""
READ_ALL = """Read the files in this order: data.py, model.py (part I), train_sft.py, mine_hard.py,
   train_dpo.py, eval.py; model.py's parts II and III last. Ask yourself the ten questions of
   course/QUESTIONS.md."""
READ_NOTHING = "Read nothing first: the handout and five docstrings are enough for two hours."
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc", "*.tmp", ".pytest_cache")


def copy_repository(out):
    """Copy the parts of the repository that a reader needs; nothing that tools left behind."""
    parts = [*SCRIPTS, "README.md", "LICENSE", "Makefile", "requirements.txt", ".gitignore",
             "toy", "tests", "tools", "docs", "course"]
    copy_parts(out, parts)


def copy_parts(out, parts):
    """Copy these files and folders of the repository, as far as they are there."""
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, out / part, ignore=SKIP)
        elif source.exists():
            (out / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / part)


# ------------------------------------------------------------------ handouts
def command(exercise):
    """What a student types to try an exercise."""
    return f"python course/check.py {exercise.name}"


def points_of(exercise):
    """"3", or "3: plain 1, stretch 2"."""
    parts = [f"{part} {points}" for part, points in exercise.parts.items() if part]
    return f"{exercise.points}: {', '.join(parts)}" if len(parts) > 1 else str(exercise.points)


def table(exercises):
    """Exercises as a table of a handout."""
    lines = ["| function | file | points | try it |", "|---|---|---|---|"]
    for e in exercises:
        lines.append(f"| `{e.name}` | {e.file} | {points_of(e)} | `{command(e)}` |")
    return "\n".join(lines) + "\n"


def handout(number):
    """(a set's handout, its table of exercises filled in; its hints, which are a file of their own,
    as nothing folds them in a terminal)."""
    text = (COURSE / f"set{number}.md").read_text(encoding="utf-8")
    text = text.replace("EXERCISES\n", table(exercises_of([number])))
    start = text.index("## Hints\n")
    stop = text.index("## What to look at\n")
    instead = HINTS.format(number=number, name=exercises_of([number])[0].name)
    return text[:start] + instead + text[stop:], text[start:stop]


def questions():
    """(the questions on the reading, their answers)."""
    text = (COURSE / "QUESTIONS.md").read_text(encoding="utf-8")
    asked, told = text.split("<details><summary>Answers</summary>")
    return asked + "The answers are in ANSWERS.md.\n", told.replace("</details>", "").strip() + "\n"


def overview(sets):
    """The sets of a copy as a table."""
    lines = ["| set | | hours | points for functions | for the question | know before |",
             "|---|---|---|---|---|---|"]
    for number in sets:
        s = SETS[number]
        points = sum(e.points for e in exercises_of([number]))
        lines.append(f"| [{number}](course/set{number}.md) | {s.title} | {s.hours} | {points} | "
                     f"{s.question or '-'} | {s.needs} |")
    return "\n".join(lines) + "\n"


def readme(sets):
    """README.md of the copy."""
    text = (COURSE / "copy/README.md").read_text(encoding="utf-8")
    some = exercises_of(sets)
    text = text.replace("OVERVIEW\n", overview(sets)).replace("RULES\n", published(some))
    text = text.replace("READ\n", (READ_NOTHING if sets == [0] else READ_ALL) + "\n")
    text = text.replace("VERSION", "Python {}.{}".format(*sys.version_info))
    text = text.replace("HANDOUT", ", ".join(f"course/set{number}.md" for number in sets))
    return text.replace("FIRST", some[0].name).replace("COUNT", str(len(some)))


# ------------------------------------------------------------------ the copy
def make(out, sets):
    """Write the student's copy into the folder `out`, which must be new or empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: is not empty; choose another folder")
    copy_parts(out, CARRIED + (FOR_DAY_ONE if 0 in sets else []))
    names = [e.name for e in exercises_of(sets)]
    for file in SCRIPTS:
        here = [e.name for e in EXERCISES if e.file == file and e.name in names]
        source = (ROOT / file).read_text(encoding="utf-8")
        (out / file).write_text(blank(source, here), encoding="utf-8")
    known = {file: sorted(top_names((ROOT / file).read_text(encoding="utf-8"))) for file in SCRIPTS}
    (out / "course/names.json").write_text(json.dumps(known), encoding="utf-8")     # for check.py
    for number in sets:
        text, hints = handout(number)
        (out / f"course/set{number}.md").write_text(text, encoding="utf-8")
        (out / f"course/hints_set{number}.md").write_text(hints, encoding="utf-8")
    asked, told = questions()
    (out / "course/QUESTIONS.md").write_text(asked, encoding="utf-8")
    (out / "course/ANSWERS.md").write_text(told, encoding="utf-8")
    (out / "README.md").write_text(readme(sets), encoding="utf-8")
    shutil.copyfile(COURSE / "copy/Makefile", out / "Makefile")
    shutil.copyfile(COURSE / "copy/pytest.ini", out / "pytest.ini")
    limit = (COURSE / "copy/limit.py").read_text(encoding="utf-8")
    with open(out / "tests/conftest.py", "a", encoding="utf-8") as file:
        file.write("\n\n" + limit)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--sets", nargs="+", type=int, choices=SETS, default=[1, 2, 3, 4, 5],
                   help="which problem sets to blank (0: day one)")
    args = p.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from data import writing        # here: the process of a graded function imports this file, too
    with writing(args.out):
        make(args.out, sorted(set(args.sets)))
    some = exercises_of(args.sets)
    print(f"wrote {args.out}: {len(some)} exercises, {sum(e.points for e in some)} points; "
          f"see {Path(args.out) / 'README.md'}")
    finished = sorted({e.set for e in EXERCISES if e not in some})
    if finished:
        print("NOTE: functions of these sets are finished in it, for all to read: "
              f"{', '.join(map(str, finished))}; name every set that is still to give points")


if __name__ == "__main__":
    main()
