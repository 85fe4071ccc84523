"""Try your functions.

    python course/check.py                       where you stand
    python course/check.py rms_norm              one exercise: what came, and what was wanted
    python course/check.py rms_norm --hint 1     a first hint, and no other; 2 and 3 say more
"""
import argparse
import ast
import difflib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "course")]
sys.dont_write_bytecode = True

from exercises import (BY_NAME, SCRIPTS, exercises_of, extras, find, is_blank,  # noqa: E402
                       lines_of, parse, top_names)
from rules import refusals  # noqa: E402

SECONDS = 20                                            # that a test may take, as in grading


def handed_out():
    """The exercises of the sets whose handouts are here."""
    numbers = [int(path.stem[3:]) for path in (ROOT / "course").glob("set*.md")]
    return exercises_of(sorted(numbers))


def hint(exercise, number):
    """The text of a hint, as the handouts hold it."""
    for path in sorted((ROOT / "course").glob("*set*.md")):     # in a copy, of hints_set1.md
        section = re.search(rf"^### `{re.escape(exercise.name)}`$(.*?)(?=^#|\Z)",
                            path.read_text(encoding="utf-8"), re.M | re.S)
        if section:
            hints = re.findall(r"<summary>Hint \d</summary>\s*(.*?)\s*</details>", section[1], re.S)
            return hints[number - 1]
    return "There is none."


def read(file):
    """The text of a script, without the byte order mark that some editors write."""
    return (ROOT / file).read_text(encoding="utf-8-sig")


def known_names(file):
    """The names at top level of a script as it was handed out, whose definitions are not theirs."""
    handed = ROOT / "course/names.json"
    if not handed.exists():                                 # this is no student's copy
        return top_names(read(file))
    return set(json.loads(handed.read_text(encoding="utf-8"))[file])


# ------------------------------------------------------------------ one exercise
def tests_of(exercise):
    """{name: function} of an exercise's tests."""
    module = importlib.import_module(exercise.tests.removesuffix(".py"))
    start = f"test_{exercise.slug}__"
    return {name: f for name, f in vars(module).items() if name.startswith(start)}


def what_is_wrong(test):
    """"" or what a test says."""
    def ring(number, frame):
        raise TimeoutError(f"took more than {SECONDS} s: an endless loop?")

    has_alarm = hasattr(signal, "SIGALRM")
    if has_alarm:
        signal.signal(signal.SIGALRM, ring)
        signal.alarm(SECONDS)
    try:
        test()
    except AssertionError as error:
        return str(error) or "AssertionError"
    except BaseException as error:                      # SystemExit too: whatever is raised
        return where(error)
    finally:
        if has_alarm:
            signal.alarm(0)
    return ""


def where(error):
    """An exception, and the place in the scripts where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).parent == ROOT]
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    if not frames:
        return said
    last = frames[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}: {last.line}"
    if isinstance(error, NotImplementedError):
        return f"{place}\n    this one is not written yet"
    return f"{said}\n    {place}"


def slip_in(file):
    """What keeps Python from reading a script, as a line; "" where nothing does."""
    try:
        ast.parse(read(file))
    except SyntaxError as error:
        return f"{file}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
    except UnicodeDecodeError as error:
        return f"{file} is not UTF-8 at byte {error.start}: save it as UTF-8 in your editor"
    except (ValueError, MemoryError, RecursionError) as error:
        return f"{file} cannot be read: {str(error) or 'it is nested too deep'}"
    return ""


def state(exercise):
    """("done", "blank", "wrong" or "refused", lines to show)."""
    source = read(exercise.file)
    node = find(parse(source), exercise.name)
    if node is None:
        return "blank", [f"{exercise.file} has no `def` of {exercise.name}: put its name and arguments "
                         "back as they were handed out"]
    if is_blank(node):
        return "blank", [f"{exercise.name} in {exercise.file} is not written yet"]
    text = lines_of(source, exercise.name)
    against = refusals([text, *extras(known_names(exercise.file), source, text)],
                       exercise.forbidden)
    if against:
        return "refused", [f"of {exercise.name}, {reason}" for reason in against]
    told = {}
    for name, test in tests_of(exercise).items():
        told[name] = what_is_wrong(test)
        if told[name].startswith("TimeoutError"):           # the others would wait as long
            break
    lines = [f"{'no ' if wrong else 'ok '} {name.removeprefix('test_')}"
             + (f"\n    {wrong}" if wrong else "") for name, wrong in told.items()]
    return "wrong" if any(told.values()) else "done", lines


def by_interpreter(name):
    """(state, lines) of a kernel, from a process in which Triton's interpreter is on."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    *lines, last = (done.stdout or done.stderr).splitlines() or [""]
    return last.rsplit(" ", 1)[-1], lines


def exercise_name(text):
    """The name of an exercise, as typed; argparse says what else was near."""
    if text in BY_NAME:
        return text
    near = difflib.get_close_matches(text, BY_NAME, n=3, cutoff=0.4)
    near = f"; near it: {', '.join(near)}" if near else ""
    raise argparse.ArgumentTypeError(f"no exercise is called {text}{near}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", type=exercise_name, metavar="NAME", help="an exercise")
    p.add_argument("--hint", type=int, choices=(1, 2, 3), help="show a hint instead")
    args = p.parse_args(argv)
    if sys.stdout:              # what the console cannot show: as Python spells it
        sys.stdout.reconfigure(errors="backslashreplace")
    os.chdir(ROOT)
    if args.hint:
        print(hint(BY_NAME[args.name], args.hint) if args.name else "which exercise?")
        return 0
    slips = list(filter(None, map(slip_in, SCRIPTS)))       # tests load all six
    if slips:
        print("\n".join(slips))
        return 1
    some = [BY_NAME[args.name]] if args.name else handed_out()
    points = 0
    for e in some:
        if e.needs_triton and os.environ.get("TRITON_INTERPRET") != "1":
            word, lines = by_interpreter(e.name)
        else:
            word, lines = state(e)
        points += e.points * (word == "done")
        if args.name:
            print("\n".join(lines))
        print(f"{e.file:14}{e.name:26}{e.points} points  {word}", flush=True)
    if not args.name:
        print(f"{points} of {sum(e.points for e in some)} points by these tests")
    return int(word != "done")


if __name__ == "__main__":
    sys.exit(main())
