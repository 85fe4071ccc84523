"""One graded function in a process of its own, which ends in time and cannot read the reference.

The process is forked from a server that has the packages loaded and nothing of this repository. It
may use `seconds` of CPU time. On Linux (5.13 on) Landlock then leaves it the packages, the system,
and the folder of the graded copy, where neither the solution nor a finished twin of it is; another
process's memory is closed to it, too. Elsewhere `confined` says so: grade strangers in a container.
"""
import builtins
import ctypes
import math
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "numpy", "tiktoken", "safetensors.torch"])
MEMORY = 16 * 2 ** 30                                   # bytes of data that a process may hold

# ------------------------------------------------------------------ Landlock, without a package
LIBC = ctypes.CDLL(None, use_errno=True)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446     # numbers of system calls
PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8       # rights
RIGHTS = 2 ** 13 - 1                                        # all thirteen of version 1
READING = EXECUTE | READ_FILE | READ_DIR
ALONE = EXECUTE | WRITE_FILE | READ_FILE                    # what a rule on a single file may give


def can_confine():
    """Does this system have Landlock?"""
    if not sys.platform.startswith("linux"):
        return False
    return LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1) >= 1


def confine(readable, writable):
    """From now on this process, and what it starts, reads and writes below these paths only."""
    attributes = struct.pack("Q", RIGHTS)
    ruleset = LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(8), 0)
    for paths, rights in ((readable, READING), (writable, RIGHTS)):
        for path in paths:
            if not os.path.exists(path):
                continue
            place = os.open(path, os.O_PATH)
            given = rights if os.path.isdir(path) else rights & ALONE
            rule = struct.pack("=Qi", given, place)
            LIBC.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
            os.close(place)
    LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if LIBC.syscall(RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refused")
    os.close(ruleset)


def readable_paths():
    """What Python and its packages need."""
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev"]
    return [*system, sys.prefix, sys.base_prefix, *(p for p in sys.path if "-packages" in p)]


def is_out_of_reach(path):
    """Is this path, of the reference, closed to a graded function?"""
    open_paths = [Path(p).resolve() for p in readable_paths()]
    return can_confine() and not any(Path(path).is_relative_to(p) for p in open_paths)


# ------------------------------------------------------------------ the process
def life(folder, name, seed, seconds, tell):
    """Run an exercise's parts in the copy `folder`; tell (part, what is wrong or "") of each."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    here = str(Path(__file__).resolve().parent)
    elsewhere = [path for path in sys.path if path not in ("", here) and "-packages" in path
                 or path.startswith(sys.base_prefix)]
    sys.path[:] = [*(str(folder / part) for part in ("", "tests", "course")), *elsewhere]
    sys.dont_write_bytecode = True
    for module in ("exercises", "rules", "make_assignment", "grade", "sandbox", "__mp_main__"):
        sys.modules.pop(module, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    if can_confine():
        confine(readable_paths(), [folder.parent, "/dev/null"])
    try:
        from exercises import BY_NAME
        exercise = BY_NAME[name]
        if exercise.needs_triton:
            os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported
        import cases
        cases.own_tests(exercise, "")                       # which loads them
        before = what_judges(cases, exercise)
        for part in exercise.parts:
            wrong = what_is_wrong(cases, exercise, part, seed)
            if what_judges(cases, exercise, before) != before:
                wrong = "refused: it changed a function that judges it"
            tell.send((part, wrong))
    except BaseException as error:                          # the file cannot even be imported
        traceback.print_exc()
        tell.send((None, message_of(error)))
    sys.stdout.flush()
    os._exit(0)


def what_judges(cases, exercise, before=None):
    """{(module or class, name): which function it is}, of what tests compare by. With `before`, of
    modules only what was there then, as packages load parts of themselves late."""
    import torch
    import numpy
    tests = sys.modules[exercise.tests.removesuffix(".py")]
    places = [torch.Tensor, numpy, math, random, builtins, cases, tests]
    found = {(place.__name__, name): id(value)
             for place in places for name, value in vars(place).items() if callable(value)}
    if before is None:
        return found
    return {key: thing for key, thing in found.items() if key in before or key[0] == "Tensor"}


def what_is_wrong(cases, exercise, part, seed):
    """"" or the message of the first failing test of a part: the student's own, then the
    instructor's."""
    try:
        for test in cases.own_tests(exercise, part):
            test()
        cases.run(exercise.name, part, seed)
    except BaseException as error:                          # SystemExit too: whatever is raised
        traceback.print_exc()
        return message_of(error)
    return ""


def message_of(error):
    """What to say of an exception."""
    text = str(error).strip()
    if isinstance(error, AssertionError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def run(folder, exercise, seed, seconds):
    """{part: what is wrong, or ""} of an exercise in the copy `folder`; and what it printed."""
    listen, tell = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=life, args=(folder, exercise.name, seed, seconds, tell))
    process.start()
    tell.close()
    told = {}
    deadline = time.time() + 10 + 3 * seconds           # the wall may be far behind a busy CPU
    ended = f"ended by itself, or took more than {seconds} s"
    while len(told) < len(exercise.parts):
        if not listen.poll(max(0, deadline - time.time())):
            ended = "hangs"
            break
        try:
            part, wrong = listen.recv()
        except EOFError:
            break
        if part is None:
            ended = wrong
            break
        told[part] = wrong
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
    log = folder.parent / "log"
    said = log.read_text(errors="replace") if log.exists() else ""
    return {part: told.get(part, ended) for part in exercise.parts}, said
