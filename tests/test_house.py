"""The house itself: what stands where, what imports what, and how dense the scripts read."""
import ast
import io
import os
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

SCRIPTS = ("data", "model", "train_sft", "mine_hard", "train_dpo", "eval")
MAY_IMPORT = {                                              # of ours; arrows point back only
    "data": set(),
    "model": {"data"},
    "train_sft": {"data", "model"},
    "mine_hard": {"data", "model"},
    "train_dpo": {"data", "model", "train_sft"},
    "eval": {"data", "model", "mine_hard"},
}
PACKAGES = {"torch", "tiktoken", "numpy", "safetensors", "triton"}
TOP_LEVEL = {*(f"{name}.py" for name in SCRIPTS), "README.md", "LICENSE", "Makefile",
             "requirements.txt", ".gitignore", ".ci", "toy", "tests", "tools", "course", "docs"}


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(tree):
    """The top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_only_the_packages_and_what_stands_before_it(name):
    known = PACKAGES | set(sys.stdlib_module_names)
    ours = set(imported(tree_of(name))) - known
    assert ours <= MAY_IMPORT[name]


def test_nothing_else_stands_at_the_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


def test_the_scripts_need_none_of_the_other_folders(tmp_path):
    for script in SCRIPTS:
        (tmp_path / f"{script}.py").write_bytes((ROOT / f"{script}.py").read_bytes())
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(SCRIPTS)}"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr        # nothing happens at import


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_names_a_folder_that_users_may_delete(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert not any(f"{folder}/" in text for folder in ("tests", "tools", "course", "docs"))


# ------------------------------------------------------------------ how it reads
LIGHT = (ast.Load, ast.Store, ast.Del, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
         ast.arguments, ast.arg, ast.alias, ast.keyword)


def code_lines(text):
    """The numbers of the lines that hold code: no blank lines, comments, or docstrings."""
    other = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in other:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def density(text):
    """Syntax-tree nodes a code line: one line, one idea."""
    nodes = sum(not isinstance(node, LIGHT) for node in ast.walk(ast.parse(text)))
    return nodes / len(code_lines(text))


def test_density_by_hand():
    # module, docstring (2), assignment, target, sum, two operands; the plus is light: 8 on one line
    assert density('"""A text."""\n\n# a comment\na = b + c\n') == 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_holds_one_idea(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert density(text) <= 7.0
    wide = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}.py: lines over 100 columns: {wide}"


def test_assignments_are_not_packed():
    packed = [f"{name}.py:{node.lineno}" for name in SCRIPTS for node in ast.walk(tree_of(name))
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
              and isinstance(node.value, ast.Tuple)]
    assert len(packed) <= 3, packed


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (60 if node.name == "main" else 50), f"{node.name}: {lines} lines"


def test_python_3_10_reads_every_file():
    """Newer grammar that it has not: a starred index without brackets, except*, type statements."""
    newer = re.compile(r"\w\[(?:[^\][()\n]*, )?\*\w|^\s*except\*|^\s*type \w+ =", re.M)
    for path in sorted(ROOT.glob("*.py")) + [path for folder in ("tools", "course", "toy", "tests") for path in sorted((ROOT / folder).glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        assert not newer.search(text), f"{path.name}: {newer.search(text)[0]}"
        ast.parse(text, feature_version=(3, 10))
