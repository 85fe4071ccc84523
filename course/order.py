"""Is every blank red before it is filled and green right after, and does every mistake stand out?

    python course/order.py [--kernels]       set 5 runs by Triton's interpreter, in a run of its own

All exercises are blanked and filled again in the order of the handouts; then each known mistake is
put in. A student's tests and the instructor's cases must refuse blanks and mistakes, test by test
and part by part. tests/test_course.py runs both.
"""
import argparse
import contextlib
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "course")]

from exercises import EXERCISES, blank, lines_of  # noqa: E402
from mistakes import MISTAKES  # noqa: E402
from swap import mistaken, swapped  # noqa: E402


def fails(function, *arguments):
    """Does this call end in an exception? NameError: a mistake of mistakes.py uses a name that the
    function no longer has, and shows nothing."""
    try:
        function(*arguments)
    except BaseException as error:                      # SystemExit too
        if type(error) is NameError:
            raise
        return True
    return False


def own_text(exercise):
    return lines_of((ROOT / exercise.file).read_text(encoding="utf-8"), exercise.name)


def blank_text(exercise):
    source = (ROOT / exercise.file).read_text(encoding="utf-8")
    return lines_of(blank(source, [exercise.name]), exercise.name)


def out_of_order(exercises):
    """What is green on a blank, or red when all exercises so far are filled in: sentences."""
    import cases
    wrong = []
    with contextlib.ExitStack() as later:
        blanks = []
        for e in reversed(exercises):                   # what is filled first is put back first
            stack = later.enter_context(contextlib.ExitStack())
            stack.enter_context(swapped(e, blank_text(e)))
            blanks.append(stack)
        for e in exercises:
            tests = cases.own_tests(e, "")
            green = [test.__name__ for test in tests if not fails(test)]
            blanks.pop().close()
            red = [test.__name__ for test in tests if fails(test)]
            wrong += [f"{name}: passes on the blank" for name in green]
            wrong += [f"{name}: needs something that comes later" for name in red]
            if not tests:
                wrong.append(f"{e.name}: has no test")
            wrong += [f"{e.name}: no test of the part {part}" for part in e.parts
                      if not cases.own_tests(e, part)]
    return wrong


def unnoticed(exercises, seed=0):
    """Mistakes and blanks that the tests, or the cases, take for right: sentences."""
    import cases
    wrong = []
    for e in exercises:
        mistakes = MISTAKES.get(e.name, [])
        if len(mistakes) < 2:
            wrong.append(f"{e.name}: fewer than two known mistakes")
        for number, mistake in enumerate([None, *mistakes]):
            what = f"{e.name}, mistake {number} of mistakes.py" if number else f"{e.name}, blank"
            try:
                text = mistaken(own_text(e), mistake) if number else blank_text(e)
            except ValueError as error:
                wrong.append(f"{what}: {error}")
                continue
            with swapped(e, text):
                by_tests = any(fails(test) for test in cases.own_tests(e, ""))
                by_cases = any(fails(cases.run, e.name, part, seed) for part in e.parts)
            if not by_tests:
                wrong.append(f"{what}: the student's tests pass")
            if not by_cases:
                wrong.append(f"{what}: the instructor's cases pass")
    return wrong


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kernels", action="store_true", help="those that need Triton's interpreter")
    args = p.parse_args(argv)
    if args.kernels:
        os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported
    os.chdir(ROOT)
    some = [e for e in EXERCISES if e.needs_triton == args.kernels]
    wrong = out_of_order(some) + unnoticed(some)
    for sentence in wrong:
        print(sentence)
    count = sum(len(MISTAKES[e.name]) for e in some)
    print(f"{len(some)} exercises in order, {count} mistakes; {len(wrong)} findings")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
