"""Another body for a function of a loaded script, as long as a `with` lasts.

So hundreds of blanks and mistakes can be tried in one process: what imported the function by name
has it, too, as only its code is exchanged. The grader itself does not use this; see sandbox.py.
"""
import contextlib
import importlib
import linecache

BLANK = "raise NotImplementedError"


def mistaken(text, mistake):
    """The text of a function with a mistake of mistakes.py in it; ValueError where its place is not
    there once."""
    if isinstance(mistake, str):
        return mistake
    right, wrong = mistake
    if text.count(right) != 1:
        raise ValueError(f"{text.count(right)} places read {right!r}; correct course/mistakes.py")
    return text.replace(right, wrong)


def function_from(text, names, number=[0]):
    """The function that this text defines, undecorated; names: its globals."""
    number[0] += 1
    file = f"<another body {number[0]}>"
    linecache.cache[file] = len(text), None, text.splitlines(True), file    # Triton reads it again
    made = {}
    exec(compile(text, file, "exec"), names, made)
    (function,) = made.values()
    return innermost(function)


def innermost(function):
    """The plain function inside staticmethod, lru_cache, and Triton's decorator."""
    for name in ("__func__", "__wrapped__", "fn"):
        function = getattr(function, name, function)
    return function


@contextlib.contextmanager
def swapped(exercise, text):
    """Let an exercise's function be that of `text`."""
    module = importlib.import_module(exercise.file.removesuffix(".py"))
    *owner, name = exercise.name.split(".")
    place = getattr(module, owner[0]) if owner else module
    before = vars(place)[name]
    if exercise.needs_triton:
        undecorated = text[text.index("def "):]
        setattr(module, name, module.jit(function_from(undecorated, vars(module))))
        try:
            yield
        finally:
            setattr(module, name, before)
        return
    function = innermost(before)
    code = function.__code__
    function.__code__ = function_from(text, vars(module)).__code__
    forget(before)
    try:
        yield
    finally:
        function.__code__ = code
        forget(before)


def forget(function):
    """Empty the cache of a function that has one."""
    if hasattr(function, "cache_clear"):
        function.cache_clear()
