"""Grade a student's copy made by make_assignment.py.

    python course/grade.py STUDENT                       points of each exercise, each set, and all
    python course/grade.py STUDENT --sets 1 2 --seed 7   only these sets; other random cases
    python course/grade.py STUDENT --only dpo_loss       one exercise, with the output of its tests
    python course/grade.py --self-check                  0 for blanks and mistakes, all for our code

Every exercise is graded in a copy of *our* checkout in which only that function is the student's (with what
else their file has at top level that ours has not: helpers, imports). So a blank or broken function costs its
own points and no others, and edited tests do not matter. Where functions agree on something between them (a
forward and its backward pass), the student's own together count as well. Each runs in a process of its own,
for at most --seconds of CPU time. That guards against mistakes, not malice: grade strangers in a container.
"""
import argparse
import ast
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")           # a forked process must not need its parent's threads

from make_assignment import (EXERCISES, ROOT, SCRIPTS, SETS, blank, copy_repository, find,  # noqa: E402
                             first_line, is_blank)

# ------------------------------------------------------------------ a student's function in our file


@lru_cache
def parse(source):
    """The syntax tree of a file, or None where it has a mistake in syntax."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def lines_of(source, name):
    """The text of a function or method, decorators included and not indented; None where it is not there.

    A file with a mistake in syntax is searched by indentation: one broken function must not cost others."""
    lines, tree = source.split("\n"), parse(source)
    if tree:
        node = find(tree, name)
        text = node and lines[first_line(node) - 1:node.end_lineno]
    else:
        text, start = None, 0
        for depth, part in enumerate(name.split(".")):
            head = re.compile(rf"{'    ' * depth}(def|class) {part}\b")
            start = next((i for i in range(start, len(lines)) if head.match(lines[i])), None)
            if start is None:
                return None
        indent = "    " * name.count(".")
        inside = lambda line: not line.strip() or line.startswith((indent + " ", indent + ")"))
        stop = next((i for i in range(start + 1, len(lines)) if not inside(lines[i])), len(lines))
        while start and lines[start - 1].startswith(indent + "@"):
            start -= 1
        text = lines[start:stop]
    return text and textwrap.dedent("\n".join(text)).rstrip()


def bound(node):
    """The names that a statement at top level binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def extras(ours, theirs):
    """The statements at top level of the student's file that bind a name which ours has not, as text."""
    ours, tree, lines = parse(ours), parse(theirs), theirs.split("\n")
    known = set().union(*map(bound, ours.body))
    nodes = [] if tree is None else [n for n in tree.body if isinstance(
        n, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)) and bound(n) - known]
    return ["\n".join(lines[first_line(n) - 1:n.end_lineno]) for n in nodes]


def splice(ours, name, text, more=()):
    """Our file with the function `name` replaced by `text`, and the statements `more` before it."""
    tree, lines = parse(ours), ours.split("\n")
    node, top = find(tree, name), find(tree, name.split(".")[0])
    lines[first_line(node) - 1:node.end_lineno] = textwrap.indent(text, " " * node.col_offset).split("\n")
    at = first_line(top) - 1
    return "\n".join([*lines[:at], *more, *lines[at:]])


# ------------------------------------------------------------------ one exercise, in a process of its own


def child(folder, exercise, seed, seconds, result):
    """Run the instructor's case and the named tests in the copy `folder`; send "" or what is wrong."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with open(folder.parent / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    parts = ("", "tests", "toy", "tools", "course")
    ours = [ROOT / part for part in parts]
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() not in ours]
    sys.path[:] = [*(str(folder / part) for part in parts), *elsewhere]
    os.chdir(folder)
    sys.dont_write_bytecode, options = True, []
    if exercise.set == 5:                               # before Triton is imported
        os.environ["TRITON_INTERPRET"], options = "1", ["-o", "python_functions=check_*"]
    try:
        import cases
        cases.run(exercise.name, seed)
        import pytest
        options += ["-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", str(folder)]
        options += ["--basetemp", str(folder.parent / "tmp")]
        code = pytest.main([*options, f"tests/{exercise.tests}", "-k", exercise.keys])
        wrong = {0: "", 5: "no test matches the table in make_assignment.py"}.get(
            int(code), f"fails in {exercise.tests} -k \"{exercise.keys}\"")
    except BaseException as error:                      # SystemExit too: whatever a student's function does
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        wrong = f"{type(error).__name__}: {first}" if first else type(error).__name__
    sys.stdout.flush()
    result.send(wrong)
    os._exit(0)


def attempt(exercise, functions, seed, seconds, show=False):
    """What is wrong with our checkout once it has these functions, {(file, name): (text, extras)}; or ""."""
    with tempfile.TemporaryDirectory(prefix="grade-") as scratch:
        folder = Path(scratch).resolve() / "copy"
        copy_repository(folder)
        for (file, name), (text, more) in functions.items():
            if parse(text) is None:
                return "a mistake in syntax"
            path = folder / file
            path.write_text(splice(path.read_text(encoding="utf-8"), name, text, more), encoding="utf-8")
        context = multiprocessing.get_context("fork")                        # torch is imported once, here
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(folder, exercise, seed, seconds, send))
        process.start()
        send.close()
        try:                                            # the wall may be far behind the CPU on a busy machine
            wrong = receive.recv() if receive.poll(60 + 20 * seconds) else "hangs"
        except EOFError:
            wrong = f"ended by itself, or took more than {seconds} s"
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.join()
        if show:
            print((folder.parent / "log").read_text(errors="replace"))
    return wrong


def preload(exercises):
    """Import what every process needs, once; not Triton where its interpreter is to be chosen later."""
    import numpy, pytest, safetensors.torch, tiktoken, torch  # noqa: E401, F401
    if all(e.set != 5 for e in exercises):
        try:
            import triton  # noqa: F401
        except ImportError:
            pass


# ------------------------------------------------------------------ all exercises


def grade_one(exercise, read, seed, seconds, show=False):
    """(points, remark) of one exercise; read(file) gives the text of a student's file, or None."""
    def theirs(name):
        ours, source = (ROOT / exercise.file).read_text(encoding="utf-8"), read(exercise.file)
        text = source and lines_of(source, name)
        tree = parse(text) if text else None
        return None if text is None or (tree and is_blank(tree.body[-1])) else (text, extras(ours, source))

    mine = theirs(exercise.name)
    if mine is None:
        return 0, "not attempted"
    functions = {(exercise.file, exercise.name): mine}
    wrong = attempt(exercise, functions, seed, seconds, show)
    partners = {(exercise.file, name): theirs(name) for name in exercise.together}
    if wrong and partners and all(partners.values()):
        wrong = attempt(exercise, functions | partners, seed, seconds, show) and wrong
    return (0, wrong) if wrong else (exercise.points, "")


def grade(folder, exercises, seed, seconds, show=False):
    """Print the table; returns {name: points}."""
    def read(file):
        path = Path(folder) / file
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None

    points = {}
    for number in sorted({e.set for e in exercises}):
        print(f"\nset {number}: {SETS[number][0]}")
        some = [e for e in exercises if e.set == number]
        for e in some:
            start = time.time()
            points[e.name], remark = grade_one(e, read, seed, seconds, show)
            print(f"   {e.name:24}{points[e.name]:3} /{e.points:3}  {time.time() - start:5.1f} s   {remark}",
                  flush=True)
        print(f"   {'':24}{sum(points[e.name] for e in some):3} /{sum(e.points for e in some):3}")
    print(f"\ntotal {sum(points.values())} of {sum(e.points for e in exercises)} points (seed {seed})")
    return points


def self_check(exercises, seed, seconds):
    """Each exercise blank, with our body, and with a known mistake; returns how many come out otherwise."""
    from cases import WRONG
    surprises = 0
    for e in exercises:
        ours, start = (ROOT / e.file).read_text(encoding="utf-8"), time.time()
        tries = [("blank", lines_of(blank(ours, [e.name]), e.name), False),
                 ("ours", lines_of(ours, e.name), True)]
        tries += [("mistake", WRONG[e.name], False)] if e.name in WRONG else []
        said = []
        for what, text, good in tries:
            wrong = attempt(e, {(e.file, e.name): (text, [])}, seed, seconds)
            surprises += (wrong == "") != good
            said.append(f"{what} {0 if wrong else e.points}" + (f" ({wrong})" if good and wrong else ""))
        print(f"   set {e.set}  {e.name:24}{e.points:3} points: {', '.join(said)}   "
              f"{time.time() - start:.1f} s", flush=True)
    print(f"{len(exercises)} exercises, {sum(e.points for e in exercises)} points; {surprises} surprises")
    return surprises


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("student", nargs="?", metavar="STUDENT", help="folder of a student")
    p.add_argument("--sets", nargs="+", type=int, choices=SETS, default=[1, 2, 3, 4],
                   help="what to grade (default: 1 2 3 4)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these exercises, whatever their set")
    p.add_argument("--seed", type=int, default=0, help="of the random cases")
    p.add_argument("--seconds", type=int, default=60, help="CPU time an exercise may take")
    p.add_argument("--json", metavar="FILE", help="also write {exercise: points} there")
    p.add_argument("--self-check", action="store_true", help="grade blanks, our code and known mistakes")
    args = p.parse_args(argv)
    unknown = set(args.only or []) - {e.name for e in EXERCISES}
    if unknown:
        p.error(f"no exercise is called {', '.join(sorted(unknown))}")
    some = [e for e in EXERCISES if (e.name in args.only if args.only else e.set in args.sets)]
    if not args.self_check and not (args.student
                                    and any((Path(args.student) / file).exists() for file in SCRIPTS)):
        p.error("STUDENT must be a folder that holds the six scripts")
    preload(some)
    if args.self_check:
        return self_check(some, args.seed, args.seconds) > 0
    points = grade(args.student, some, args.seed, args.seconds, show=len(args.only or []) == 1)
    if args.json:
        Path(args.json).write_text(json.dumps(points, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
