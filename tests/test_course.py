"""The course: what is handed out teaches and gives nothing away; the grader gives points for right
functions and for nothing else.

`python course/grade.py --self-check --sets 1 2 3 4 5` tries the grader itself on all exercises, all
mistakes and all tricks; here, all of them are tried in one process, and some through the grader.
"""
import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys

import cases
import check
import day_one
import grade
import make_assignment
import mine_hard
import order
import pytest
import rules
import sandbox
import train_dpo
import train_sft
from conftest import ROOT
from data import InputError
from exercises import (BY_NAME, EXERCISES, SCRIPTS, SETS, blank, exercises_of, extras, find,
                       is_blank, lines_of, parse, splice, top_names)
from mistakes import BY_HAND, CHEATS

HANDOUTS = {n: (ROOT / f"course/set{n}.md").read_text(encoding="utf-8") for n in SETS}
PLAIN = [e for e in EXERCISES if not e.needs_triton]


@pytest.fixture(scope="module")
def blanked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "student"
    make_assignment.main([str(folder)])
    return folder


def run(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          **options)


# ------------------------------------------------------------------ what is handed out
def test_the_handout_lists_everything_and_gives_nothing_away(blanked):
    for e in EXERCISES:
        ours, theirs = (find(parse((f / e.file).read_text()), e.name) for f in (ROOT, blanked))
        assert is_blank(theirs) and not is_blank(ours), e.name
        assert ast.dump(ours.args) == ast.dump(theirs.args)
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        assert (
            f"| `{e.name}` | {e.file} | {e.points}"
            in (blanked / f"course/set{e.set}.md").read_text()
        )
    names = {path.name for path in blanked.rglob("*")}
    assert not names & {"grade.py", "cases.py", "mistakes.py", "order.py", "forks", "mutants.py",
                        "test_course.py", "docs", "__pycache__", ".git"}
    assert {"conftest.py", "toy", "README.md", "Makefile", "check.py", *SCRIPTS} <= names


def test_every_exercise_has_a_docstring_or_comments_that_say_what_it_does():
    for e in EXERCISES:
        node = find(parse((ROOT / e.file).read_text()), e.name)
        text = ast.get_docstring(node) or ""
        if e.needs_triton:                                  # comments stand where docstrings would
            text = lines_of((ROOT / e.file).read_text(), e.name)
            text = "".join(re.findall(r"^    #(.*)", text, re.M))
        assert len(text) > 60, e.name


@pytest.mark.parametrize("number", SETS)
def test_a_handout_teaches(number):
    text = HANDOUTS[number]
    some = exercises_of([number])
    for heading in (
        "## The idea",
        "## The functions",
        "\nEXERCISES\n",
        "## Hints",
        "## What to look at",
    ):
        assert text.count(heading) == 1, heading
    assert "derivation" in text.lower() and "```" in text
    listed = re.findall(r"^### `(.*)`$", text, re.M)
    assert listed == [e.name for e in some]
    for e in some:
        assert (
            check.hint(e, 1) != check.hint(e, 2) != check.hint(e, 3)
            and min(len(check.hint(e, n)) for n in (1, 2, 3)) > 15
        )
    rubric = sum(
        map(int, re.findall(r"^\| (\d) \| ", text.split("## Research question")[-1], re.M))
    )
    assert rubric == SETS[number].question
    assert f"{sum(e.points for e in some)} points" in text


def test_commands_of_the_handouts_are_taken_by_their_scripts():
    for text in HANDOUTS.values():
        for line in re.findall(r"`python ((?:train_sft|train_dpo|mine_hard)\.py[^`]*)`", text):
            script, *argv = shlex.split(line)
            module = {
                "train_sft.py": train_sft,
                "train_dpo.py": train_dpo,
                "mine_hard.py": mine_hard,
            }[script]
            module.parse_arguments(argv)
        for name in re.findall(r"`python course/check.py (\w[\w.]*)", text):
            assert name in (*BY_NAME, "NAME"), name
        for file, key in re.findall(r"pytest -q tests/(\w+\.py) -k (\w+)", text):
            assert key in (ROOT / "tests" / file).read_text(), key


def test_the_readme_of_the_course_adds_up():
    text = (ROOT / "course/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]*\| (\d): [^|]*\|[^|]*\| (\d+) \| (\d+) \| (\d+|-) \|$", text, re.M)
    told = {int(n): (int(hours), int(points), int(question.replace("-", "0")))
            for n, hours, points, question in rows}
    assert told == {n: (s.hours, sum(e.points for e in exercises_of([n])), s.question)
                    for n, s in SETS.items()}
    main = [told[n] for n in (1, 2, 3, 4)]
    assert (
        "{} hours, {} points for functions and {} for questions".format(*map(sum, zip(*main)))
        in text
    )
    for path in re.findall(r"\]\(([\w.]+)\)", text):
        assert (ROOT / "course" / path).exists(), path


def test_questions_name_what_is_there():
    text = (ROOT / "course/QUESTIONS.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\d+\. ", text, re.M)) == 20
    for name, file in re.findall(r"`(\w+)`(?: and `\w+`)? in (\w+\.py)", text):
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), name


def test_a_blanked_copy_can_be_imported_and_scores_nothing(blanked, capsys):
    modules = ", ".join(file.removesuffix(".py") for file in SCRIPTS)
    done = run("-B", "-c", f"import {modules}", cwd=blanked)
    assert done.returncode == 0, done.stderr
    assert not any(r.points for r in grade.grade(blanked, EXERCISES, 0, 1).values())
    assert "total 0 of" in capsys.readouterr().out


def test_a_folder_without_scripts_costs_nobody_else(blanked, tmp_path, capsys):
    (tmp_path / "nested").mkdir()
    assert grade.main([str(tmp_path / "nested"), str(blanked), "--only", "f1", "--seconds", "1"]) == 0
    shown = capsys.readouterr()
    assert "nested: holds none of the six scripts, and is not graded" in shown.err and "total 0 of" in shown.out
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path / "nested")])


def test_only_the_chosen_sets_are_blanked(tmp_path):
    for sets in ("0", "3"):
        make_assignment.main([str(tmp_path / sets), "--sets", sets])
        chosen = exercises_of([int(sets)])
        for e in EXERCISES:
            node = find(parse((tmp_path / sets / e.file).read_text()), e.name)
            assert is_blank(node) == (e in chosen), e.name
        names = {path.name for path in (tmp_path / sets / "course").iterdir()}
        assert f"set{sets}.md" in names and ("day_one.py" in names) == (sets == "0")
        text = (tmp_path / sets / f"course/set{sets}.md").read_text()
        hints = (tmp_path / sets / f"course/hints_set{sets}.md").read_text()
        assert "Hint 3" in hints and "Hint 3" not in text and "## What to look at" in text
        assert f"write {len(chosen)} functions" in (tmp_path / sets / "README.md").read_text()
    with pytest.raises(SystemExit, match="is not empty"):
        make_assignment.main([str(tmp_path / "0")])


def test_a_copy_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(InputError, match=f"{place}: cannot write: Not a directory"):
            make_assignment.main([str(tmp_path / place)])
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------ the copy works
def test_all_tests_of_a_filled_copy_can_be_collected_and_one_that_never_ends_is_ended(
        blanked, tmp_path):
    filled = tmp_path / "filled"
    make_assignment.main([str(filled)])
    make_assignment.copy_parts(filled, SCRIPTS)
    done = run("-m", "pytest", "-q", "--collect-only", cwd=filled)
    assert done.returncode == 0, done.stdout[-2000:]
    (blanked / "tests/test_endless.py").write_text(
        "def test_endless():\n    while True:\n        pass\n"
    )
    done = run(
        "-m",
        "pytest",
        "-q",
        "tests/test_endless.py",
        cwd=blanked,
        env={**order.os.environ, "TEST_SECONDS": "1"},
    )
    (blanked / "tests/test_endless.py").unlink()
    assert done.returncode == 1 and "took more than 1 s: an endless loop?" in done.stdout


def test_a_students_own_check_says_what_came_and_what_was_wanted(blanked, tmp_path):
    make_assignment.main([str(tmp_path / "copy"), "--sets", "0"])
    path = tmp_path / "copy/train_sft.py"
    wrong = "def sft_loss(logprobs, count):\n    return -logprobs.mean()"
    path.write_text(splice(path.read_text(), "sft_loss", wrong))
    done = run("-B", tmp_path / "copy/course/check.py", "sft_loss")
    assert (
        done.returncode == 1
        and "got     [1.5, 6," in done.stdout
        and "wanted  [1, 2, 0]" in done.stdout
    )
    assert "1 points  wrong" in done.stdout
    wrong = "def sft_loss(logprobs, count):\n    return -open('x').read()"
    path.write_text(splice(path.read_text(), "sft_loss", wrong))
    done = run("-B", tmp_path / "copy/course/check.py")
    assert "1 points  refused" in done.stdout and done.stdout.count("points  blank") == 4
    right = "import copy\n\n\ndef sft_loss(logprobs, count):\n    return copy.copy(-logprobs.sum() / count)"
    path.write_text(splice(path.read_text(), "sft_loss", right))
    done = run("-B", tmp_path / "copy/course/check.py", "sft_loss")      # what grading would refuse, a helper
    assert "importing `copy` is not allowed" in done.stdout and "1 points  refused" in done.stdout
    done = run("-B", tmp_path / "copy/course/check.py", "sft_loss", "--hint", "2")
    assert done.stdout.startswith("By `count`")
    done = run("-B", tmp_path / "copy/course/day_one.py")
    assert done.returncode == 1 and done.stdout.startswith("not written yet: format_input, judge,")


def test_a_check_says_what_utf8_cannot_spell(tmp_path):
    make_assignment.main([str(tmp_path / "copy"), "--sets", "0"])
    path = tmp_path / "copy/train_sft.py"
    wrong = "def sft_loss(logprobs, count):\n    raise AssertionError('got \\ud83d')"
    path.write_text(splice(path.read_text(), "sft_loss", wrong))
    done = run("-B", tmp_path / "copy/course/check.py", "sft_loss")
    assert "got \\ud83d" in done.stdout and "1 points  wrong" in done.stdout and not done.stderr


def test_a_check_names_the_line_that_python_cannot_read_and_the_name_that_was_meant(
        tmp_path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "eval.py").write_text("x = 1\ny = (\n")
    assert check.slip_in("eval.py") == "eval.py, line 2: '(' was never closed: y = ("
    (tmp_path / "eval.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    assert "eval.py is not UTF-8 at byte 5" in check.slip_in("eval.py")
    with pytest.raises(check.argparse.ArgumentTypeError, match="near it: dpo_loss"):
        check.exercise_name("dpo_los")


def test_day_one_ends_in_two_losses_that_fall(tmp_path):
    done = run(ROOT / "course/day_one.py", "--limit", 5, "--out", tmp_path / "out")
    assert done.returncode == 0 and "both losses fall" in done.stdout, done.stdout + done.stderr
    first = re.findall(r"step   1 +(\d\.\d+)", done.stdout)[1]
    assert f"mean(alpha) ln 2 over all of them is {first}" in done.stdout


def test_day_one_removes_nothing_but_its_own(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds what this did not write"):
        day_one.clear(tmp_path)
    (tmp_path / "notes.txt").unlink()
    for name in ("sft", "dpo"):                             # of python train_sft.py, say
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match="holds what this did not write"):
        day_one.clear(tmp_path)
    for name in ("records.json", "hard.jsonl"):
        (tmp_path / name).write_text("")
    day_one.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    day_one.clear(tmp_path / "new/folder")
    assert (tmp_path / "new/folder").is_dir()


# ------------------------------------------------------------------ the tests teach
def test_every_test_is_red_before_its_function_is_written_and_green_right_after():
    assert order.out_of_order(PLAIN) == []


def test_students_and_instructors_tests_notice_every_blank_and_every_mistake():
    assert order.unnoticed(PLAIN) == []


def test_the_same_holds_for_the_kernels():
    if order.importlib.util.find_spec("triton") is None:
        pytest.skip("NO KERNEL IS TESTED: triton is not installed")
    done = run("-W", "ignore", ROOT / "course/order.py", "--kernels")
    assert done.returncode == 0 and "; 0 findings" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("exercise", PLAIN, ids=lambda e: e.name)
def test_the_instructors_cases_hold_for_our_code(exercise):
    for part in exercise.parts:
        for seed in (0, 1):
            cases.run(exercise.name, part, seed)


# ------------------------------------------------------------------ the grader
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
    assert lines_of(SOURCE, "Thing.other").startswith("@staticmethod\ndef other(x):\n    def inner")
    broken = SOURCE.replace("def last():", "def last(:")                # the file no longer parses
    for name in ("plain", "Thing.method", "Thing.other"):
        assert lines_of(broken, name) == lines_of(SOURCE, name)
    assert lines_of(broken, "gone") is lines_of(SOURCE, "gone") is None
    theirs = ("import math\nimport os\nimport re\n\n\ndef helper():\n    return os\n\n\n"
              "def unused():\n    return 1\n\n\ndef plain():\n    pass\n")
    own = "@staticmethod\ndef other(x):\n    return helper()"
    more = extras(top_names(SOURCE), theirs, own)
    assert more == ["import os", "def helper():\n    return os"]
    typed = theirs.replace("def helper", "ONE: int = 1\n\n\ndef helper").replace("return os", "return os, ONE")
    for theirs in (typed, typed + "\n\ndef broken(:\n    pass\n", "class Slip\n    x = 1\n\n\n" + typed):
        found = extras(top_names(SOURCE), theirs, own)      # whatever else in the file does not parse
        assert found == ["import os", "ONE: int = 1", "def helper():\n    return os, ONE"]
    text = 'NOTES = """\\\ndef helper():\n    return 7\n"""\n\n\n'                   # no code, though it looks like it
    found = extras(top_names(SOURCE), text + "@lru_cache(\n    9,\n)\n" + theirs[theirs.index("def helper"):] + "\n\ndef broken(:\n", own)
    assert found == ["@lru_cache(\n    9,\n)\ndef helper():\n    return os, ONE"]
    table = "try:\n    import math as m\nexcept ImportError:\n    m = None"
    lines = [table, "TABLE = {}", 'TABLE["one"] = 1', "for n in (2, 3):\n    TABLE[n] = m"]
    found = extras(top_names(SOURCE), "\n".join(lines) + "\nprint(TABLE)\n", "def plain():\n    return TABLE")
    assert found == lines
    tried = ("if __name__ == '__main__':\n    x = 1\n    print(plain(x))\n\n\n"
             "for y in (1, 2):\n    print(plain(y))\n")
    assert not extras(top_names(SOURCE), tried, "def plain(x):\n    y = x\n    return [y for z in x]")
    spliced = splice(SOURCE, "Thing.other", own, more)
    assert "    @staticmethod\n    def other(x):\n        return helper()\n\n\ndef last" in spliced
    assert spliced.index("def helper") < spliced.index("class Thing") and ast.parse(spliced)


def test_students_whose_folders_have_one_name_are_told_apart():
    names = grade.names_of(["class/alice/guard", "class/bob/guard"])
    assert names == ["alice-guard", "bob-guard"] and grade.names_of(["a/x", "b/y"]) == ["x", "y"]


def test_rules_refuse_what_they_publish_and_let_honest_code_pass():
    for e in EXERCISES:
        text = BY_HAND.get(e.name) or lines_of((ROOT / e.file).read_text(), e.name)
        assert rules.refusals([text], e.forbidden) == [], e.name
    for text in (
        "def f(x):\n    return torch.os.listdir(x)",
        "def f(x):\n    from random import _os\n    return _os",
        "def f(x):\n    return x.__class__",
        "def f(x):\n    np.abs = max\n    return x",
        "def f(x):\n    return getattr(x, 'a')",
        "def f(x):\n    from torch import *",
        "def f(x):\n    return torch._C",
        "def f(x):\n    from torch import _C",
        "def f(x):\n    return type('A', (int,), {})",
        "def f(x):\n    return torch.rms_norm_of_another_name(x)",
    ):
        assert rules.refusals([text], ("*rms_norm*",)), text
    assert not rules.refusals(["def f(x):\n    return re.compile(x), x._replace(a=type(x))"])
    helper = "def plain_rms_norm(x):\n    return x"            # their own, whatever it is called
    assert not rules.refusals(["def f(x):\n    return plain_rms_norm(x)", helper], ("*rms_norm*",))
    printed = rules.published(EXERCISES)
    for word in (*rules.NAMES, *rules.ATTRIBUTES, "*scaled_dot_product*", "enable_grad"):
        assert f"`{word}`" in printed


@pytest.mark.parametrize("number", range(len(CHEATS)))
def test_no_trick_scores(number):
    name, text, says = CHEATS[number]
    e = BY_NAME[name]
    remarks, _ = grade.attempt(e, {(e.file, name): (text, [])}, 0, 20)
    assert all(remarks.values()) and any(says in wrong for wrong in remarks.values()), remarks


def test_graded_code_reads_its_own_folder_and_no_other():
    if not sandbox.is_out_of_reach(ROOT):
        pytest.skip("no Landlock here: graded code is not confined, and grade.py says so")
    e = BY_NAME["lr_at"]
    tried = "def lr_at(step, steps, peak):\n    raise AssertionError(len(open({!r}).read()))"
    remarks, _ = grade.attempt_unruled(e, tried.format(str(ROOT / "train_sft.py")), 0, 20)
    assert "Permission denied" in remarks[""]
    inside = f"/proc/{order.os.getpid()}/cwd/train_sft.py"
    remarks, _ = grade.attempt_unruled(e, tried.format(inside), 0, 20)
    assert "Permission denied" in remarks[""] or "No such file" in remarks[""]
    remarks, _ = grade.attempt_unruled(e, tried.format("train_sft.py"), 0, 20)
    assert remarks[""].isdecimal()                                      # its own copy, blank there
    judges = "def lr_at(step, steps, peak):\n    import os, sys\n    raise AssertionError(" \
             "[name for name in (*sys.modules, *os.listdir('course'), *os.listdir('tests')) " \
             "if name.startswith(('cases', 'test_ex'))])"
    remarks, _ = grade.attempt_unruled(e, judges, 0, 20)
    assert remarks[""] in ("[]", "['test_exercises_kernels.py']")       # not what judges it


def test_a_hand_in_that_is_no_plain_file_costs_its_own_points_only(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "train_dpo.py").symlink_to(ROOT / "train_dpo.py")
    order.os.mkfifo(theirs / "eval.py")
    (theirs / "mine_hard.py").mkdir()
    minuses = "-" * 200_000
    (theirs / "data.py").write_text(f"def format_input(prompt):\n    return {minuses}1\n")
    (theirs / "model.py").write_text("#" * (grade.LARGEST + 1))
    names = ("dpo_loss", "f1", "judge", "format_input", "rms_norm", "sft_loss")
    results = grade.grade(theirs, [BY_NAME[name] for name in names], 0, 1)
    said = {name: results[name].remark for name in names}
    assert not any(result.points for result in results.values())
    assert said["dpo_loss"] == "refused: train_dpo.py is no plain file (a link?)"
    assert said["f1"] == "refused: eval.py is no plain file"
    assert said["judge"] == "refused: mine_hard.py is no plain file"
    assert said["format_input"] == "a mistake in syntax: it is nested too deep"
    assert said["sft_loss"] == "not attempted: no `def` of sft_loss in train_sft.py"
    assert "more than" in said["rms_norm"] and "total 0 of" in capsys.readouterr().out


def test_what_stumbles_over_one_function_says_so_and_goes_on(monkeypatch, capsys):
    def stumble(exercise, read, seed, seconds):
        raise MemoryError("no room")

    monkeypatch.setattr(grade, "grade_one", stumble)
    results = grade.grade(ROOT, exercises_of([0]), 0, 1)
    assert {r.remark for r in results.values()} == {"could not be graded: MemoryError: no room"}
    assert "set 0: Day one" in capsys.readouterr().out


def run_grader(*arguments):
    done = run(ROOT / "course/grade.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_function_costs_its_own_points_and_no_others(blanked, tmp_path):
    """Some right, some wrong, one half right, one that does not end, two that end everything, and
    a file with a slip; of two students."""
    ours = {file: (ROOT / file).read_text() for file in SCRIPTS}
    theirs = {file: (blanked / file).read_text() for file in SCRIPTS}

    def answer(name, text):
        theirs[BY_NAME[name].file] = splice(theirs[BY_NAME[name].file], name, text)

    answer("pick_pair", lines_of(ours["mine_hard.py"], "pick_pair"))
    answer("lr_at", "def half(x):\n    return x / 2\n\n\ndef lr_at(step, steps, peak):\n"
                    "    return half(peak) * (1 + math.cos(math.pi * step / steps))")
    answer("rope_frequencies", "def rope_frequencies(config, device='cpu'):\n"
           "    i = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)\n"
           "    return config.rope_theta ** (-i / config.head_dim)")
    answer("common_prefix", "def common_prefix(sequences):\n    while True:\n        pass")
    answer("sample_weights", "def sample_weights(differences, gamma):\n    raise SystemExit(0)")
    answer("weighted_average", lines_of(ours["eval.py"], "weighted_average"))
    answer("f1", "def f1(gold, predicted, positive):\n    return 1")
    theirs["eval.py"] = theirs["eval.py"].replace("    return 1\n", "    return (1\n")
    for student in ("ada", "ben"):
        (tmp_path / student).mkdir()
    for file, text in theirs.items():
        (tmp_path / "ada" / file).write_text(text)
    (tmp_path / "ben/eval.py").write_text(ours["eval.py"])
    want = dict(rope_frequencies=1, common_prefix=0, lr_at=1, pick_pair=2, sample_weights=0,
                dpo_loss=0, f1=0, weighted_average=1)
    out = run_grader(
        tmp_path / "ada",
        tmp_path / "ben",
        "--seconds",
        10,
        "--json",
        tmp_path / "points.json",
        "--table",
        tmp_path / "class.csv",
        "--feedback",
        tmp_path / "feedback",
        "--only",
        *want,
    )
    points = json.loads((tmp_path / "points.json").read_text())
    assert points["ada"] == want, out
    assert "took more than 10 s" in out and "a mistake in syntax" in out and "not attempted" in out
    head, _, ada, ben = csv.reader((tmp_path / "class.csv").read_text().splitlines())
    assert head[:2] == ["student", "total"] and ada[:2] == ["ada", "5"] and ben[:2] == ["ben", "2"]
    text = (tmp_path / "feedback/ada.md").read_text()
    assert "5 of 13 points" in text and "plain yes, stretch no" in text
    assert "it turns once, less often than 4: divided by 8" in text  # what was wanted, and why


def test_no_remark_and_no_name_ends_a_class_or_steers_a_terminal(tmp_path):
    """Half a surrogate pair, escape codes, letters that the console has not, and a folder whose name is
    no UTF-8; zoe, who comes last, is graded."""
    bad = tmp_path / os.fsdecode(b"Jos\xe9\x1b[2J")
    good = tmp_path / "zoe"
    for folder in (bad, good):
        folder.mkdir()
    (bad / "train_sft.py").write_text("def lr_at(step, steps, peak):\n"
                                      "    raise AssertionError('got \\ud83d\\x1b[2J\\u2192')\n")
    (good / "train_sft.py").write_text((ROOT / "train_sft.py").read_text())
    (tmp_path / "none\x1b[2J").mkdir()
    done = run(ROOT / "course/grade.py", bad, tmp_path / "none\x1b[2J", good, "--only", "lr_at",
               "--table", tmp_path / "class.csv", "--json", tmp_path / "points.json",
               "--feedback", tmp_path / "feedback", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    name = r"Jos\udce9\x1b[2J"
    assert f"==== {name}" in done.stdout and "==== zoe" in done.stdout
    assert r"got \ud83d\x1b[2J\u2192" in done.stdout                     # the log and the remark
    assert r"none\x1b[2J: holds none of" in done.stderr and "\x1b" not in done.stdout + done.stderr
    points = json.loads((tmp_path / "points.json").read_text())
    assert points == {name: {"lr_at": 0}, "zoe": {"lr_at": 1}}
    rows = csv.reader((tmp_path / "class.csv").read_text().splitlines())
    assert [row[:2] for row in rows][2:] == [[name, "0"], ["zoe", "1"]]
    assert "got \\ud83d\\x1b[2J\u2192" in (tmp_path / f"feedback/{name}.md").read_text(encoding="utf-8")


def test_a_class_is_graded_to_its_end_though_nobody_reads_on(tmp_path):
    for name in ("anna", "zoe"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_sft.py").write_text((ROOT / "train_sft.py").read_text())
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(ROOT / "course/grade.py"), *map(str, sorted(tmp_path.iterdir())), "--only", "lr_at",
               "--json", str(tmp_path / "points.json")]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "points.json").read_text()) == {"anna": {"lr_at": 1}, "zoe": {"lr_at": 1}}


def test_graders_side_by_side_keep_each_others_rows(tmp_path):
    command = [sys.executable, str(ROOT / "course/grade.py"), "--only", "lr_at", "--table", str(tmp_path / "class.csv"),
               "--json", str(tmp_path / "points.json")]
    graders = []
    for name in ("anna", "bob", "zoe"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_sft.py").write_text((ROOT / "train_sft.py").read_text())
        graders.append(subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.DEVNULL))
    assert [grader.wait() for grader in graders] == [0, 0, 0]
    assert json.loads((tmp_path / "points.json").read_text()).keys() == {"anna", "bob", "zoe"}
    rows = list(csv.reader((tmp_path / "class.csv").read_text().splitlines()))[2:]
    assert {row[0] for row in rows} == {"anna", "bob", "zoe"}


def test_the_process_of_a_graded_function_loads_no_script_of_ours():
    """multiprocessing loads grade.py there once more, under the name __mp_main__."""
    loads = "import runpy, sys; sys.path.insert(0, 'course'); " \
            "runpy.run_path('course/grade.py', run_name='__mp_main__'); print(*sys.modules)"
    done = run("-c", loads, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {file.removesuffix(".py") for file in SCRIPTS} & set(done.stdout.split())


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_function_is_given_some_time(seconds, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(ROOT), "--only", "lr_at", "--seconds", seconds])
    assert "--seconds: must be at least 1" in capsys.readouterr().err


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Grade these students' f1 by quick(names, points, options...), in no time; quick.graded says who
    was."""
    def graded_at_once(folder, exercises, seed, seconds, show=False):
        quick.graded.append(folder.name)
        return {e.name: grade.Result(quick.points, {"": ""}) for e in exercises}

    def quick(names, points, *options):
        quick.graded, quick.points = [], points
        for name in names.split():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "eval.py").touch()
        return grade.main([*(str(tmp_path / name) for name in names.split()), "--only", "f1", *options])

    monkeypatch.setattr(grade, "grade", lambda folder, *rest: graded_at_once(grade.Path(folder), *rest))
    monkeypatch.setattr(grade, "check_reach", lambda: None)
    return quick


def test_rows_of_students_who_are_not_graded_again_are_kept(quick, tmp_path):
    table, points = tmp_path / "class.csv", tmp_path / "points.json"
    into = ["--table", str(table), "--json", str(points)]
    quick("ann ben", 1, *into)
    quick("ben cid", 0, *into)
    assert table.read_text().splitlines() == [
        "student,total,set 4,f1", "(of),1,1,1", "ann,1,1,1", "ben,0,0,0", "cid,0,0,0"]
    assert json.loads(points.read_text()) == {"ann": {"f1": 1}, "ben": {"f1": 0}, "cid": {"f1": 0}}


@pytest.mark.parametrize("there", [
    "", "my notes\n", "student,total,set 1,lr_at\n(of),1,1,1\nann,1,1,1\n",         # none, notes, other exercises
    "student,total,set 4,f1\n(of),1,1,1\nann,1,1\n",                               # a row that is too short
    "student,total,set 4,f1\n(of),1,1,1\nann,1,1,1\nann,0,0,0\n",                   # two of one name
    '{"ann": {"lr_at": 1}}', '{"ann": 1}', "[]"])
def test_a_file_that_is_no_table_of_these_exercises_is_left_alone(quick, tmp_path, there):
    (tmp_path / "file").write_text(there)
    for option in ("--table", "--json"):
        with pytest.raises(InputError, match="file.? is") as error:
            quick("ann", 1, option, str(tmp_path / "file"))
        assert "\n" not in str(error.value)
        assert quick.graded == [] and (tmp_path / "file").read_text() == there


def test_a_place_that_cannot_be_written_is_one_line_before_anybody_is_graded(quick, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for option, place, says in (
        ("--table", "folder", "folder: is a folder"),
        ("--json", "folder", "folder: is a folder"),
        ("--table", "file/class.csv", "file: is a file; choose another folder"),
        ("--json", "file/points.json", "file: is a file; choose another folder"),
        ("--feedback", "file", "file: is a file; choose another folder"),
    ):
        with pytest.raises(InputError, match=says):
            quick("ann", 1, option, str(tmp_path / place))
        assert quick.graded == []
    assert (tmp_path / "file").read_text() == "mine"
    too_long = "n" * 255                                    # whose feedback would have a longer name still
    with pytest.raises(InputError, match="File name too long"):
        quick(f"ann {too_long}", 1, "--feedback", str(tmp_path / "feedback"))
    assert quick.graded == []


def test_names_that_are_one_when_spelled_out_are_said(quick):
    with pytest.raises(SystemExit):
        quick(r"a\x07 " + "a\x07", 1)
    assert quick.graded == []


def test_a_forward_and_its_backward_count_together(monkeypatch):
    """What the one saves the other reads: a student's pair may agree on other things than ours."""
    backward, tried = BY_NAME["TokenLogprobs.backward"], []

    def attempt(exercise, functions, *_):
        tried.append(sorted(name for _, name in functions))
        return dict.fromkeys(exercise.parts, "" if len(functions) == 2 else "wrong"), ""

    monkeypatch.setattr(grade, "attempt", attempt)
    both = lambda file: (ROOT / file).read_text()
    assert grade.grade_one(backward, both, 0, 1).points == backward.points
    assert tried == [
        ["TokenLogprobs.backward"],
        ["TokenLogprobs.backward", "TokenLogprobs.forward"],
    ]
    one = lambda file: blank(both(file), ["TokenLogprobs.forward"] if file == "model.py" else [])
    assert grade.grade_one(backward, one, 0, 1).points == 0 and len(tried) == 3


def test_right_functions_score_through_the_whole_grader():
    out = run_grader("--self-check", "--seed", 3, "--only", "apply_rope")
    assert "apply_rope                2 points: blank 0, right 2, mistake 1 0" in out
    assert "0 surprises" in out
