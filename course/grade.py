"""Grade students' copies made by make_assignment.py.

    python course/grade.py STUDENT                          points of each exercise, set, and all
    python course/grade.py STUDENT --sets 1 2 --seed 7      only these sets; other random cases
    python course/grade.py STUDENT --only dpo_loss          one exercise, with all that it printed
    python course/grade.py class/* --table class.csv --feedback feedback
    python course/grade.py --self-check                     blanks, our code, mistakes and cheats

Every exercise is graded in a copy of *our* scripts in which only that function is the student's,
with the helpers at top level that it needs. So a blank or broken function costs its own points and
no others, and edited tests do not matter. Where functions agree between them (a forward and its
backward pass), the student's own together count as well. First rules.py reads the function; then it
runs in a process of its own, for at most --seconds of CPU time (see sandbox.py), where twins of it
are blank. A part of an exercise gives its points if its tests and its random cases all pass. Only
plain files are read, and what goes wrong with one hand-in costs no other student anything.

In FILE of --table and --json the rows of students who are not graded now are kept.
"""
import argparse
import ast
import contextlib
import csv
import fcntl
import io
import os
import signal
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import sandbox
from exercises import (DAY_ONE, EXERCISES, ROOT, SCRIPTS, SETS, blank, exercises_of, extras, find,
                       is_blank, lines_of, parse, splice, top_names)
from make_assignment import copy_parts
from rules import refusals

if __name__ != "__mp_main__":       # as which the process of a graded function loads this file, and
    sys.path.insert(0, str(ROOT))   # there nothing that solves an exercise may be in memory
    from data import (InputError, at_least, is_there, read_object, read_text, say, tell,
                      write_bytes, write_json, writing)

NEEDED = ["toy/model", "tests/test_exercises.py", "tests/test_exercises_kernels.py",
          "course/cases.py", "course/exercises.py"]
LARGEST = 2 ** 20                                       # bytes of a script that is handed in


class Refused(Exception):
    """Why a file is not read."""


@dataclass
class Result:
    """What an exercise is worth; remarks: {part: what is wrong, or ""}."""
    points: int
    remarks: dict
    seconds: float = 0.0
    log: str = ""

    def __post_init__(self):
        """Nothing that graded code says steers a terminal, or stops a file from being written."""
        self.remarks = {part: spelled_out(wrong, "\n\t") for part, wrong in self.remarks.items()}
        self.log = spelled_out(self.log, "\n\t")

    @property
    def remark(self):
        """One line for the table."""
        said = {wrong: None for wrong in self.remarks.values() if wrong}
        whole = set(self.remarks.values()) == set(said)
        if len(said) == 1 and whole:
            return in_one_line(next(iter(said)), 160)
        room = 160 // max(1, sum(map(bool, self.remarks.values())))
        return "; ".join(f"{part}: {in_one_line(wrong, room)}" if part else in_one_line(wrong, room)
                         for part, wrong in self.remarks.items() if wrong)


def spelled_out(text, kept=""):
    """The text, with control characters (but for those kept) and what UTF-8 cannot spell as Python
    spells them: a name that is not UTF-8, b"Jos\\xe9", becomes Jos\\udce9."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode()
                   for c in text)


def in_one_line(text, room):
    """A text without line breaks, cut where there is no more room."""
    text = " ".join(text.split())
    return text if len(text) <= room else text[:room] + "..."


def read_script(path):
    """The text of a script that was handed in, or None where there is none. Refused unless it is a
    plain file: a link may lead to another one's work or to ours, and a pipe never ends."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f"refused: {path.name} is no plain file (a link?)") from error
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise Refused(f"refused: {path.name} is no plain file")
        data = os.read(number, LARGEST + 1)
    finally:
        os.close(number)
    if len(data) > LARGEST:
        raise Refused(f"refused: {path.name} has more than {LARGEST} bytes")
    return data.decode("utf-8", errors="replace").removeprefix("\ufeff")       # a byte order mark


# ------------------------------------------------------------------ one exercise
def graded_copy(folder, exercise, functions):
    """Write what one function is graded in: our scripts with these functions {(file, name): (text,
    helpers)} in them, and the exercise's twins blank."""
    copy_parts(folder, NEEDED)
    for file in SCRIPTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        if file == exercise.file:
            source = blank(source, exercise.twins)
        for (where, name), (text, helpers) in functions.items():
            if where == file:
                source = splice(source, name, text, helpers)
        (folder / file).write_text(source, encoding="utf-8")


def scratch_folder():
    """A new folder, gone after the `with`, whatever graded code leaves in it."""
    return tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True)


def attempt(exercise, functions, seed, seconds):
    """({part: what is wrong, or ""}, what it printed) of these functions, {(file, name): (text,
    helpers)}, among our others."""
    for text, helpers in functions.values():
        slip = slip_in(text)
        if slip:
            return dict.fromkeys(exercise.parts, slip), ""
        against = refusals([text, *helpers], exercise.forbidden)
        if against:
            return dict.fromkeys(exercise.parts, "refused: " + "; ".join(against)), ""
    with scratch_folder() as scratch:
        folder = Path(scratch).resolve() / "copy"
        graded_copy(folder, exercise, functions)
        return sandbox.run(folder, exercise, seed, seconds)


def slip_in(text):
    """What keeps this Python from reading a function, as a line; "" where nothing does."""
    try:
        ast.parse(text)
    except SyntaxError as error:
        version = "Python {}.{}".format(*sys.version_info)
        return f"a mistake in syntax (of {version}), line {error.lineno} of it: {error.msg}"
    except (ValueError, MemoryError, RecursionError) as error:
        return f"a mistake in syntax: {str(error) or 'it is nested too deep'}"
    return ""


def student_function(exercise_file, name, read):
    """(text, helpers) of a student's function, or None where it is blank or not there."""
    source = read(exercise_file)
    text = source and lines_of(source, name)
    if not text:
        return None
    tree = parse(text)
    if tree and is_blank(find(tree, name.split(".")[-1])):
        return None
    ours = (ROOT / exercise_file).read_text(encoding="utf-8")
    return text, extras(top_names(ours), source, text)


def grade_one(exercise, read, seed, seconds):
    """The Result of one exercise; read(file) gives the text of a student's file, or None."""
    start = time.time()
    mine = student_function(exercise.file, exercise.name, read)
    if mine is None:
        return Result(0, dict.fromkeys(exercise.parts, why_none(exercise, read)))
    functions = {(exercise.file, exercise.name): mine}
    remarks, log = attempt(exercise, functions, seed, seconds)
    partners = {(exercise.file, name): student_function(exercise.file, name, read)
                for name in exercise.together if name != exercise.name}
    partners = {place: theirs for place, theirs in partners.items() if theirs}
    if any(remarks.values()) and partners:
        again, _ = attempt(exercise, {**partners, **functions}, seed, seconds)
        remarks = {part: wrong and again[part] and wrong for part, wrong in remarks.items()}
    points = sum(points for part, points in exercise.parts.items() if not remarks[part])
    return Result(points, remarks, time.time() - start, log)


def why_none(exercise, read):
    """Why there is no function to grade."""
    source = read(exercise.file)
    if source and lines_of(source, exercise.name):
        return "not attempted"
    return f"not attempted: no `def` of {exercise.name} in {exercise.file}"


def grade_one_or_say_why(exercise, read, seed, seconds):
    """`grade_one`; a hand-in that it stumbles over gives no points, and says why."""
    try:
        return grade_one(exercise, read, seed, seconds)
    except Refused as error:
        why = str(error)
    except Exception as error:
        why = f"could not be graded: {sandbox.message_of(error)}"
    return Result(0, dict.fromkeys(exercise.parts, why))


# ------------------------------------------------------------------ students
def grade(folder, exercises, seed, seconds, show=False):
    """Print a student's table; returns {exercise: Result}."""
    def read(file):
        return read_script(Path(folder) / file)

    results = {}
    for number, some in by_set(exercises):
        say(f"\nset {number}: {SETS[number].title}")
        for e in some:
            result = results[e.name] = grade_one_or_say_why(e, read, seed, seconds)
            say(f"   {e.name:24}{result.points:3} /{e.points:3}  {result.seconds:5.1f} s   "
                f"{result.remark}")
            if show:
                say(result.log)
        say(f"   {'':24}{points_of(results, some):3} /{sum(e.points for e in some):3}")
    say(f"\ntotal {points_of(results, exercises)} of {sum(e.points for e in exercises)} points "
        f"(seed {seed})")
    return results


def by_set(exercises):
    """[(number, exercises)] of each set; those of day one alone are set 0."""
    if sorted(e.name for e in exercises) == sorted(DAY_ONE):
        return [(0, exercises)]
    numbers = sorted({e.set for e in exercises})
    return [(number, [e for e in exercises if e.set == number]) for number in numbers]


def points_of(results, exercises):
    return sum(results[e.name].points for e in exercises)


def feedback(name, results, exercises, seed):
    """What a student is told, as Markdown: points, and what is wrong, with the input where a test
    of theirs says it."""
    total = sum(e.points for e in exercises)
    lines = [f"# {name}: {points_of(results, exercises)} of {total} points", ""]
    for number, some in by_set(exercises):
        lines += [f"## Set {number}: {SETS[number].title}: {points_of(results, some)} of "
                  f"{sum(e.points for e in some)}", "", "| function | points | |", "|---|---|---|"]
        for e in some:
            parts = [f"{part} {'yes' if not wrong else 'no'}"
                     for part, wrong in results[e.name].remarks.items() if part]
            said = ", ".join(parts) or ("" if results[e.name].points else "no")
            lines.append(f"| `{e.name}` | {results[e.name].points} / {e.points} | {said} |")
        lines.append("")
        for e in some:
            for part, wrong in results[e.name].remarks.items():
                if wrong and not wrong.startswith("not attempted"):
                    title = f"`{e.name}`" + (f", {part}" if part else "")
                    lines += [f"**{title}**", "", "```", wrong[:1500], "```", "",
                              f"Next: `python course/check.py {e.name}`, and `--hint 1`.", ""]
    lines += [f"Random cases: seed {seed}. Questions marked by hand are not in here.", ""]
    return "\n".join(lines)


def names_of(folders):
    """A name for each student's folder: the end of its path, as much as tells them apart."""
    paths = [Path(folder).resolve().parts[1:] for folder in folders]
    names = []
    for depth in range(1, max(map(len, paths)) + 1):
        names = [spelled_out("-".join(parts[-depth:])) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def grade_class(args, names, students, exercises):
    """Grade these students, and write what is asked for after each: the next may be interrupted."""
    check_files(args, names, exercises)
    for name, student in zip(names, students):
        if len(students) > 1:
            say(f"\n==== {name}")
        results = grade(student, exercises, args.seed, args.seconds, len(args.only or []) == 1)
        if args.feedback:
            write_text(feedback_path(args, name), feedback(name, results, exercises, args.seed))
        if args.table:
            with alone_with(args.table):
                rows = read_table(args.table, exercises)
                rows[name] = row_of(name, results, exercises)
                write_table(args.table, rows, exercises)
        if args.json:
            with alone_with(args.json):
                points = read_points(args.json, exercises)
                points[name] = {e.name: results[e.name].points for e in exercises}
                write_json(args.json, points)


# ------------------------------------------------------------------ files
def check_files(args, names, exercises):
    """InputError, before anybody is graded, where something cannot be written, or a table that is
    there cannot be kept."""
    files = [args.table, args.json]
    if args.feedback:
        files += [feedback_path(args, name) for name in names]
    for path in filter(None, files):
        check_writable(Path(path))
    if args.table:
        read_table(args.table, exercises)
    if args.json:
        read_points(args.json, exercises)


@contextlib.contextmanager
def alone_with(path):
    """Wait until no other grader reads and writes this file: each adds its own row."""
    with writing(path):
        folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def feedback_path(args, name):
    return Path(args.feedback) / f"{name}.md"


def check_writable(path):
    """InputError unless `write_bytes` can write this file. One that is there stays as it is."""
    with writing(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is a folder, or no plain file; choose another name")
        if path.parent.is_file():
            raise InputError(f"{path.parent}: is a file; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")      # the longer name of the two
        with alone_with(path):                              # another grader may be writing it
            temporary.touch()
            temporary.unlink()


def write_text(path, text):
    """Write a file whole, whatever is in the text."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def head_of(exercises):
    """The first two rows of a table: its columns, and the most points of each."""
    sets = by_set(exercises)
    columns = ["student", "total", *(f"set {n}" for n, _ in sets), *(e.name for e in exercises)]
    groups = [exercises, *(some for _, some in sets), *([e] for e in exercises)]
    most = [str(sum(e.points for e in group)) for group in groups]
    return [columns, ["(of)", *most]]


def row_of(name, results, exercises):
    """A student's row of a table: total, each set, each exercise."""
    sets = [points_of(results, some) for _, some in by_set(exercises)]
    each = [results[e.name].points for e in exercises]
    return [name, points_of(results, exercises), *sets, *each]


def write_table(path, rows, exercises):
    """One CSV row a student."""
    file = io.StringIO()
    csv.writer(file).writerows([*head_of(exercises), *rows.values()])
    write_text(path, file.getvalue())


def read_table(path, exercises):
    """{student: row} of a table, {} where there is none; InputError where it has other columns."""
    if not is_there(path):
        return {}
    try:
        lines = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
    except csv.Error:
        lines = []
    rows = {row[0]: row for row in lines[2:]}
    columns = head_of(exercises)[0]
    whole = len(rows) == len(lines[2:]) and all(len(row) == len(columns) for row in rows.values())
    if lines[:2] != head_of(exercises) or not whole:
        raise InputError(not_ours(path))
    return rows


def read_points(path, exercises):
    """{student: {exercise: points}} of a JSON file, {} where there is none; InputError where it
    has other exercises."""
    students = read_object(path, absent={})
    names = {e.name for e in exercises}
    for points in students.values():
        if not isinstance(points, dict) or set(points) != names:
            raise InputError(not_ours(path))
    return students


def not_ours(path):
    return f"{path}: is no table of these exercises, and is left as it is; choose another file"


# ------------------------------------------------------------------ the grader itself
def self_check(exercises, seed, seconds):
    """Each exercise blank, right, with each known mistake and trick, through the whole grader;
    returns how many come out otherwise than they should."""
    from mistakes import BY_HAND, CHEATS, MISTAKES
    from swap import mistaken
    surprises = 0
    for e in exercises:
        start = time.time()
        ours = (ROOT / e.file).read_text(encoding="utf-8")
        own = lines_of(ours, e.name)
        right = BY_HAND.get(e.name, own)
        tries = {"blank": lines_of(blank(ours, [e.name]), e.name), "right": right}
        for number, mistake in enumerate(MISTAKES[e.name], 1):
            tries[f"mistake {number}"] = mistaken(own, mistake)
        for number, (name, text, _) in enumerate(CHEATS, 1):
            if name == e.name:
                tries[f"cheat {number}"] = text
        said = []
        for what, text in tries.items():
            if what.startswith("mistake") and right != own:             # ours is against the rules
                remarks, _ = attempt_unruled(e, text, seed, seconds)
            else:
                remarks, _ = attempt(e, {(e.file, e.name): (text, [])}, seed, seconds)
            passed = [part for part, wrong in remarks.items() if not wrong]
            points = sum(e.parts[part] for part in passed)
            good = points == e.points if what == "right" else (
                points < e.points if what.startswith("mistake") else points == 0)
            surprises += not good
            said.append(f"{what} {points}" + ("" if good else " (!)"))
        say(f"   set {e.set}  {e.name:24}{e.points:3} points: {', '.join(said)}   "
            f"{time.time() - start:.1f} s")
    say(f"{len(exercises)} exercises, {sum(e.points for e in exercises)} points; {surprises} "
        "surprises")
    return surprises


def attempt_unruled(exercise, text, seed, seconds):
    """`attempt` of a function that may call what is forbidden."""
    with scratch_folder() as scratch:
        folder = Path(scratch).resolve() / "copy"
        graded_copy(folder, exercise, {(exercise.file, exercise.name): (text, [])})
        return sandbox.run(folder, exercise, seed, seconds)


def check_reach():
    """Say so where graded code could read the reference, or use the network."""
    if not sandbox.can_leave_network():
        tell("NOTE: here, graded code can use the network; grade strangers in a container without")
    if not sandbox.is_out_of_reach(ROOT):
        tell("NOTE: here, graded code can read this repository and other files (no Landlock, or "
             f"{ROOT} lies in a system folder); grade strangers in a container")


def parser():
    """What the command line may hold."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("students", nargs="*", metavar="STUDENT", help="folders of students")
    p.add_argument("--sets", nargs="+", type=int, choices=SETS, default=[1, 2, 3, 4],
                   help="what to grade (default: 1 2 3 4)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these exercises")
    p.add_argument("--seed", type=int, default=0, help="of the random cases")
    p.add_argument("--seconds", type=at_least(1), default=20, help="CPU time an exercise may take")
    p.add_argument("--table", metavar="FILE", help="also write a CSV row a student there")
    p.add_argument("--feedback", metavar="DIR", help="also write DIR/STUDENT.md for each")
    p.add_argument("--json", metavar="FILE", help="also write {student: {exercise: points}} there")
    p.add_argument("--self-check", action="store_true",
                   help="grade blanks, our code, known mistakes and cheats")
    return p


def who_handed_in(folders):
    """Those of the folders that hold a script; says which do not."""
    students = []
    for folder in folders:
        if any(os.path.lexists(Path(folder) / file) for file in SCRIPTS):
            students.append(folder)
        else:
            tell(f"{spelled_out(folder)}: holds none of the six scripts, and is not graded")
    return students


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    unknown = set(args.only or []) - {e.name for e in EXERCISES}
    if unknown:
        p.error(f"no exercise is called {', '.join(sorted(unknown))}")
    some = exercises_of(args.sets)
    if args.only:
        some = [e for e in EXERCISES if e.name in args.only]
    students = who_handed_in(args.students)
    if args.students and not students:
        p.error("there is nobody to grade")
    if not (args.students or args.self_check):
        p.error("STUDENT... is missing")
    check_reach()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # which leaves no folder behind
    if args.self_check:
        return self_check(some, args.seed, args.seconds) > 0
    names = names_of(students)
    if len(set(names)) < len(names):
        p.error("a folder is given twice, or two have names that look alike")
    grade_class(args, names, students, some)
    return 0


if __name__ == "__main__":
    sys.exit(main())
