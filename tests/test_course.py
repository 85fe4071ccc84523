"""The course: what is handed out, and a grader that gives points for right functions and for nothing else.

`python course/grade.py --self-check --sets 1 2 3 4 5` tries the grader itself on all exercises;
here, it is tried on some.
"""
import ast
import json
import subprocess
import sys

import cases
import grade
import make_assignment
import pytest
from conftest import ROOT
from make_assignment import EXERCISES, KEPT_BACK, SCRIPTS, SETS, blank, find, is_blank


@pytest.fixture(scope="module")
def blanked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "student"
    make_assignment.main([str(folder)])
    return folder


def test_the_handout_lists_everything_and_gives_nothing_away(blanked):
    text = (blanked / "ASSIGNMENT.md").read_text()
    for e in EXERCISES:
        ours, theirs = (find(grade.parse((f / e.file).read_text()), e.name) for f in (ROOT, blanked))
        assert is_blank(theirs) and not is_blank(ours) and f"| `{e.name}` | {e.file} | {e.points} |" in text
        assert ast.dump(ours.args) == ast.dump(theirs.args)
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        assert (ROOT / "tests" / e.tests).exists()
    assert all(f"Set {number}: {title}" in text for number, (title, *_) in SETS.items())
    names = {path.name for path in blanked.rglob("*")}
    assert not names & {*KEPT_BACK, "__pycache__", ".git"}
    assert {"conftest.py", "toy", "tools", "docs", "README.md", *SCRIPTS} <= names
    assert [path.name for path in (blanked / "course").iterdir()] == ["QUESTIONS.md"]


@pytest.mark.parametrize("name", [e.name for e in EXERCISES if e.set < 5])         # kernels need an interpreter
def test_the_instructors_cases_hold_for_our_code(name):
    cases.run(name, seed=0)


def test_a_blanked_copy_can_be_imported_and_scores_nothing(blanked, capsys):
    modules = ", ".join(file.removesuffix(".py") for file in SCRIPTS)
    done = subprocess.run([sys.executable, "-B", "-c", f"import {modules}"], cwd=blanked, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert sum(grade.grade(blanked, EXERCISES, 0, 1).values()) == 0
    assert "total 0 of" in capsys.readouterr().out


def test_only_the_chosen_sets_are_blanked(tmp_path):
    make_assignment.main([str(tmp_path / "out"), "--sets", "3"])
    for e in EXERCISES:
        node = find(grade.parse((tmp_path / "out" / e.file).read_text()), e.name)
        assert is_blank(node) == (e.set == 3), e.name
    assert "Set 3" in (tmp_path / "out/ASSIGNMENT.md").read_text() != make_assignment.handout([1, 3])
    with pytest.raises(SystemExit, match="is not empty"):
        make_assignment.main([str(tmp_path / "out")])


SOURCE = '''import math

@decorated
def plain(a,
          b=1):
    """What it does."""
    # a comment above
    return a


class Thing:
    def method(self): return 1

    @staticmethod
    def other(x):
        def inner():
            pass
        return inner


def last():
    return """
not indented
"""
'''


def test_blanking_keeps_signature_docstring_and_comments():
    text = blank(SOURCE, ["plain", "Thing.method", "Thing.other", "last"])
    assert text == '''import math

@decorated
def plain(a,
          b=1):
    """What it does."""
    # a comment above
    raise NotImplementedError


class Thing:
    def method(self):
        raise NotImplementedError

    @staticmethod
    def other(x):
        raise NotImplementedError


def last():
    raise NotImplementedError
'''
    with pytest.raises(SystemExit, match="no function gone"):
        blank(SOURCE, ["gone"])


def test_a_function_is_found_and_put_in_place_whatever_is_around_it():
    assert grade.lines_of(SOURCE, "Thing.other").startswith("@staticmethod\ndef other(x):\n    def inner")
    broken = SOURCE.replace("def last():", "def last(:")                     # the whole file no longer parses
    for name in ("plain", "Thing.method", "Thing.other"):
        assert grade.lines_of(broken, name) == grade.lines_of(SOURCE, name)
    assert grade.lines_of(broken, "gone") is grade.lines_of(SOURCE, "gone") is None
    theirs = "import math\nimport os\n\n\ndef helper():\n    return os\n\n\ndef plain():\n    pass\n"
    more = grade.extras(SOURCE, theirs)
    assert more == ["import os", "def helper():\n    return os"]
    spliced = grade.splice(SOURCE, "Thing.other", "@staticmethod\ndef other(x):\n    return helper()", more)
    assert "    @staticmethod\n    def other(x):\n        return helper()\n\n\ndef last" in spliced
    assert spliced.index("def helper") < spliced.index("class Thing") and ast.parse(spliced)


def run_grader(*arguments):
    done = subprocess.run([sys.executable, ROOT / "course/grade.py", *map(str, arguments)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blanks_and_mistakes_score_nothing_and_our_code_everything():
    out = run_grader("--self-check", "--seed", 3, "--only", "apply_rope", "tree_plan", "sample_weights",
                     "dpo_loss", "confusion")
    assert out.count("blank 0") == out.count("ours") == 5 and out.count("mistake 0") == 4
    assert "0 surprises" in out


def test_each_function_costs_its_own_points_and_no_others(blanked, tmp_path):
    """Some right, some wrong, one that does not end, two that end everything, and a file with a slip."""
    ours = {file: (ROOT / file).read_text() for file in SCRIPTS}
    theirs = {file: (blanked / file).read_text() for file in SCRIPTS}

    def answer(name, text):
        file = next(e.file for e in EXERCISES if e.name == name)
        theirs[file] = grade.splice(theirs[file], name, text)

    answer("pick_pair", grade.lines_of(ours["mine_hard.py"], "pick_pair"))
    answer("lr_at", "def half(x):\n    return x / 2\n\n\ndef lr_at(step, steps, peak):\n"
                    "    return half(peak) * (1 + math.cos(math.pi * step / steps))")
    answer("common_prefix", "def common_prefix(sequences):\n    while True:\n        pass")
    answer("sample_weights", "def sample_weights(differences, gamma):\n    import os\n    os._exit(0)")
    answer("judge", "def judge(verdict, gold):\n    raise SystemExit(0)")
    answer("weighted_average", grade.lines_of(ours["eval.py"], "weighted_average"))
    answer("f1", "def f1(gold, predicted, positive):\n    return 1")
    theirs["eval.py"] = theirs["eval.py"].replace("    return 1\n", "    return (1\n")
    for file, text in theirs.items():
        (tmp_path / file).write_text(text)
    want = dict(pick_pair=2, lr_at=1, common_prefix=0, sample_weights=0, judge=0, weighted_average=1, f1=0,
                dpo_loss=0)
    out = run_grader(tmp_path, "--seconds", 5, "--json", tmp_path / "points.json", "--only", *want)
    assert json.loads((tmp_path / "points.json").read_text()) == want, out
    assert "took more than 5 s" in out and "a mistake in syntax" in out and "not attempted" in out


def test_a_forward_and_its_backward_count_together(monkeypatch):
    """What the one saves the other reads: a student's pair may agree on something else than ours does."""
    backward, tried = next(e for e in EXERCISES if e.name == "TokenLogprobs.backward"), []

    def attempt(exercise, functions, *_):
        tried.append([name for _, name in functions])
        return "" if len(functions) == 2 else "gradients are wrong"

    monkeypatch.setattr(grade, "attempt", attempt)
    both = lambda file: (ROOT / file).read_text()
    assert grade.grade_one(backward, both, 0, 1) == (backward.points, "")
    assert tried == [["TokenLogprobs.backward"], ["TokenLogprobs.backward", "TokenLogprobs.forward"]]
    one = lambda file: blank(both(file), ["TokenLogprobs.forward"] if file == "model.py" else [])
    assert grade.grade_one(backward, one, 0, 1) == (0, "gradients are wrong") and len(tried) == 3
