"""What a graded function must not use, read from its syntax tree before it runs.

The rules are published: every handout prints them, and `python course/check.py` applies them, so
nobody loses a point to a surprise. They keep honest people to the exercise; what else keeps
strangers' code from the reference is in sandbox.py.
"""
import ast
import fnmatch
import re

# packages that a function, or a helper of it, may import
PACKAGES = ("torch", "numpy", "math", "re", "json", "random", "bisect", "collections",
            "dataclasses", "functools", "heapq", "itertools", "operator", "statistics", "string",
            "typing", "triton")
# modules that no exercise needs, by name or as an attribute of another one
MODULES = ("os", "sys", "subprocess", "signal", "shutil", "resource", "importlib", "inspect", "gc",
           "ctypes", "threading", "builtins", "ops", "fx", "package", "library",
           "multiprocessing", "distributed", "futures", "serialization", "f2py", "ctypeslib")
# functions that no exercise needs
NAMES = ("open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "globals",
         "locals", "vars", "hash", "getattr", "setattr", "delattr", "attrgetter", "methodcaller",
         "get_type_hints", "singledispatch", "singledispatchmethod", "make_dataclass", "time",
         "Path", "read_text", "read_json", "parse_json", "parse_records", "parse_lines",
         "read_records", "read_vocabulary", "read_tensors", "safe_open", "save_file", "write_json",
         "write_whole")
# what can be asked of a package or an object: files, things by their name as a text, and the
# frames of other code
ATTRIBUTES = ("load", "save", "fromfile", "from_file", "tofile", "memmap", "loadtxt", "savetxt",
              "genfromtxt", "read_text", "read_bytes", "write_text", "write_bytes", "open",
              "from_pretrained", "hub", "cpp_extension", "fromregex", "DataSource", "attrgetter",
              "methodcaller", "Formatter", "get_type_hints", "ForwardRef", "singledispatch",
              "singledispatchmethod", "make_dataclass", "CompilationUnit", "ScriptModule",
              "f_back", "f_globals", "f_locals", "f_code", "f_builtins", "tb_frame", "tb_next",
              "gi_frame", "gi_code")
ONE_UNDERSCORE = ("_replace", "_asdict")                    # of named tuples: the only ones allowed


def refusals(texts, forbidden=()):
    """Why code is refused: ["line 3: `open` is not allowed"], [] where it is not. texts: a function
    and its helpers, each parsable, the lines counted in each; forbidden: the exercise's own."""
    found = []
    trees = [ast.parse(text) for text in texts]
    helpers = {node.name for tree in trees for node in tree.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for tree in trees:
        own = own_names(tree) | helpers
        for node in ast.walk(tree):
            reason = reason_against(node, forbidden, own)
            if reason:
                found.append(f"line {node.lineno}: {reason}")
    return list(dict.fromkeys(found))


def own_names(tree):
    """The names that code gives to values of its own: arguments and variables."""
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return arguments | {name.id for name in names if isinstance(name.ctx, ast.Store)}


def reason_against(node, forbidden, own):
    """What speaks against one node of a syntax tree, or None."""
    if isinstance(node, ast.Name):
        word = node.id
        banned = word in NAMES or word in MODULES or is_among(word, forbidden)
        if is_dunder(word) or banned and word not in own:
            return f"`{word}` is not allowed"
    elif isinstance(node, ast.Attribute):
        return reason_against_attribute(node, forbidden, own)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        return reason_against_import(node, forbidden)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_dunder(node.name):
        if node.name != "__init__":
            return f"`{node.name}` must not be defined"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_dunder(node.value):
        return f"the text {node.value!r} is not allowed"
    elif isinstance(node, ast.Global):
        return "`global` is not allowed"
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "type":
        if len(node.args) != 1:
            return "`type` must not make a class"


def reason_against_attribute(node, forbidden, own):
    """What speaks against `value.attr`."""
    word = node.attr
    owner = node.value.id if isinstance(node.value, ast.Name) else None
    if word == "load" and owner == "tl" and owner not in own:
        return None                                         # Triton's, from memory
    banned = word in ATTRIBUTES or word in MODULES or is_among(word, forbidden)
    hidden = word.startswith("_") and word not in (*ONE_UNDERSCORE, "__init__")
    if banned or hidden:
        return f"`.{word}` is not allowed"
    if isinstance(node.ctx, (ast.Store, ast.Del)) and owner not in own:
        return f"`.{word}` of something else must not be set"


def reason_against_import(node, forbidden):
    """What speaks against an import."""
    module = getattr(node, "module", None)                  # of `from module import ...`
    names = [alias.name for alias in node.names]
    for path in [module] if module else names:
        if path.split(".")[0] not in PACKAGES:
            return f"importing `{path}` is not allowed"
    for word in ".".join([module or "", *names]).split("."):
        banned = word in (*NAMES, *MODULES, *ATTRIBUTES, "*") or is_among(word, forbidden)
        if banned or word.startswith("_"):
            return f"importing `{word}` is not allowed"


def is_among(word, patterns):
    """Is this one of an exercise's forbidden names, in which * stands for any text?"""
    return any(fnmatch.fnmatchcase(word, pattern) for pattern in patterns)


def is_dunder(text):
    """Is this a name like __dict__?"""
    return re.fullmatch(r"__\w+__", text) is not None


def published(exercises):
    """The rules as a handout prints them."""
    def listed(words):
        return ", ".join(f"`{word}`" for word in words)

    lines = [f"- import only {listed(PACKAGES)}",
             f"- do not use {listed(NAMES)}",
             f"- nor these modules, also through another one: {listed(MODULES)}",
             f"- nor an attribute {listed(ATTRIBUTES)} (but `tl.load`)",
             "- no names like `__dict__`, no attribute that begins with `_` (but "
             f"{listed(ONE_UNDERSCORE)}), no `global`, no class with methods like `__eq__` or made "
             "by `type`; set no attribute of what is not yours (arguments and variables are)"]
    for e in exercises:
        if e.forbidden:
            lines.append(f"- in `{e.name}` also none of {listed(e.forbidden)} (* is any text)")
    return "\n".join(lines) + "\n"
