"""One graded function in a process of its own, which ends in time and cannot read the reference.

The process is forked from a server that has the packages loaded and nothing of this repository. It
may use `seconds` of CPU time, and so much memory and disk. What judges it is loaded first, and then
taken out of its reach. On Linux (5.13 on) Landlock leaves it the packages and the folder of the
graded copy, where neither the solution nor a finished twin of it is; another process's memory is
closed to it, too; and it has no network where the system lets a process leave it. What stays open:
it may start a process that outlives it. Grade strangers in a container.
"""
import builtins
import contextlib
import ctypes
import errno
import json
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
MEMORY = 6 * 2 ** 30                                    # bytes that a process may hold
WRITTEN = 16 * 2 ** 20                                  # bytes of a file that it may write
SAID = 20_000                                           # characters of its output that are kept
IDLE = 15                                               # seconds without any work: it hangs

# ------------------------------------------------------------------ Landlock, without a package
LIBC = ctypes.CDLL(None, use_errno=True)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446     # numbers of system calls
PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8       # rights
RIGHTS = 2 ** 13 - 1                                        # all thirteen of version 1
READING = EXECUTE | READ_FILE | READ_DIR
NEW_USER = 0x10000000                                       # of unshare
NEW_NETWORK = 0x40000000
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
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/sys",
              "/dev/null", "/dev/zero", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo"]
    return [*system, sys.prefix, sys.base_prefix, *(p for p in sys.path if "-packages" in p)]


def is_out_of_reach(path):
    """Is this path, of the reference, closed to a graded function?"""
    open_paths = [Path(p).resolve() for p in readable_paths()]
    return can_confine() and not any(Path(path).is_relative_to(p) for p in open_paths)


def leave_network():
    """Go where there is no network, if the system lets a process do that."""
    if sys.platform.startswith("linux"):
        LIBC.unshare(NEW_USER | NEW_NETWORK)


def can_leave_network():
    """Does the system let a process do that? One tries."""
    if not sys.platform.startswith("linux"):
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(LIBC.unshare(NEW_USER | NEW_NETWORK) != 0)
    _, status = os.waitpid(pid, 0)
    return status == 0


# ------------------------------------------------------------------ the process
def life(folder, name, seed, seconds, tell):
    """Run an exercise's parts in the copy `folder`; tell [part, what is wrong or ""] of each."""
    os.setsid()
    take_limits(seconds)
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    look_around(folder)
    leave_network()
    if can_confine():
        confine(readable_paths(), [folder, "/dev/null"])

    def say(part, wrong):
        tell.send_bytes(json.dumps([part, wrong]).encode())

    try:
        from exercises import BY_NAME
        exercise = BY_NAME[name]
        if exercise.needs_triton:
            os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported
        import cases
        tests = {part: cases.own_tests(exercise, part) for part in exercise.parts}
        judges = hide(cases, exercise)
        before = what_judges(judges)
        for part in exercise.parts:
            wrong = what_is_wrong(tests[part], cases.run, exercise, part, seed)
            if what_judges(judges, before) != before:
                wrong = "refused: it changed a function that judges it"
            say(part, wrong)
    except BaseException as error:                          # the file cannot even be imported
        log_exception()
        say(None, message_of(error))
    with contextlib.suppress(OSError):                      # it wrote more than it may
        sys.stdout.flush()
    os._exit(0)


def take_limits(seconds):
    """So much CPU time, memory and disk for this process, and no more."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    if sys.platform.startswith("linux"):                    # shared memory, too, is no way round
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def look_around(folder):
    """Import from the copy, not from here; of the surroundings only what packages need."""
    here = str(Path(__file__).resolve().parent)
    elsewhere = [path for path in sys.path if path not in ("", here) and "-packages" in path
                 or path.startswith(sys.base_prefix)]
    sys.path[:] = [*(str(folder / part) for part in ("", "tests", "course")), *elsewhere]
    sys.dont_write_bytecode = True
    for module in ("exercises", "rules", "make_assignment", "grade", "sandbox", "__mp_main__"):
        sys.modules.pop(module, None)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=str(folder), TMPDIR=str(folder), OMP_NUM_THREADS="1")


def hide(cases, exercise):
    """Take what judges a function out of its reach, as modules and as files: who can call the
    instructor's formula has no need of one. Returns the modules."""
    names = {"cases", "test_exercises", exercise.tests.removesuffix(".py")}
    judges = [sys.modules[name] for name in sorted(names)]
    for module in judges:
        del sys.modules[module.__name__]
        os.remove(module.__file__)
    return judges


def what_judges(judges, before=None):
    """{(module or class, name): which function it is}, of what tests compare by. With `before`, of
    modules only what was there then, as packages load parts of themselves late."""
    import torch
    import numpy
    places = [torch.Tensor, numpy, math, random, builtins, *judges]
    found = {(place.__name__, name): id(value)
             for place in places for name, value in vars(place).items() if callable(value)}
    if before is None:
        return found
    return {key: thing for key, thing in found.items() if key in before or key[0] == "Tensor"}


def what_is_wrong(tests, run_case, exercise, part, seed):
    """"" or the message of the first failing test of a part: the student's own, then the
    instructor's."""
    try:
        for test in tests:
            test()
        run_case(exercise.name, part, seed)
    except BaseException as error:                          # SystemExit too: whatever is raised
        log_exception()
        return message_of(error)
    return ""


def log_exception():
    """Print the exception that is handled, as far as there is room."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def message_of(error):
    """What to say of an exception."""
    text = str(error).strip()[:SAID]
    if getattr(error, "errno", None) == errno.EFBIG:
        return f"it prints too much, or writes a file of more than {WRITTEN // 2 ** 20} MB"
    if isinstance(error, AssertionError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ------------------------------------------------------------------ who waits for it
def work_of(pid):
    """The CPU time that a process has used, in ticks, or None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])


def hear(listen, pid, count, seconds):
    """({part: what is wrong, or ""}, how it ended) of a process that tells of `count` parts, and may
    work so many seconds."""
    told = {}
    deadline = time.time() + 10 + 3 * seconds           # the wall may be far behind a busy CPU
    work = work_of(pid)
    last_worked = time.time()
    while len(told) < count:
        if listen.poll(1):
            try:
                part, wrong = json.loads(listen.recv_bytes(10 * SAID))
            except (EOFError, OSError):
                return told, "ended by itself"
            if part is None:
                return told, wrong
            told[part] = wrong
        elif work_of(pid) != work:
            work = work_of(pid)
            last_worked = time.time()
        waits = work is not None and time.time() - last_worked > IDLE
        if waits or time.time() > deadline:
            return told, "hangs"
    return told, ""


def end(process):
    """End a process and what it started, unless that has left its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def run(folder, exercise, seed, seconds):
    """{part: what is wrong, or ""} of an exercise in the copy `folder`; and what it printed."""
    listen, tell = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=life, args=(folder, exercise.name, seed, seconds, tell))
    process.start()
    tell.close()
    try:
        told, ended = hear(listen, process.pid, len(exercise.parts), seconds)
    finally:                                            # also where the grader itself is ended
        end(process)
        listen.close()
    log = folder.parent / "log"
    said = log.read_text(errors="replace")[-SAID:] if log.exists() else ""
    if process.exitcode == -signal.SIGXCPU:
        ended = f"took more than {seconds} s: an endless loop?"
    return {part: told.get(part, ended) for part in exercise.parts}, said
