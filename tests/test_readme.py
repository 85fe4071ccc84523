"""README.md and docs/*.md say what is so: their commands, flags, paths, names, pictures and arithmetic.

Commands that need weights or hours are parsed by the scripts themselves; the others are run here or by the test
that RUN_BY names. The four stages of the demo are run, in small, by test_pipeline.py, and in full by `make demo`.
"""
import argparse
import importlib
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree

import data
import mine_hard
import plot
import pytest
import torch
import train_dpo
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = TEXT + "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("RESULTS", "PREDICTIONS", "REFERENCE"))
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", BOTH, re.M | re.S)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", BOTH, flags=re.M | re.S).replace("\n", " "))
COMMANDS = [line for line in [line for block in BLOCKS for line in block.splitlines()] + SPANS
            if re.match(r"(python|torchrun) ", line)]
SCRIPTS = ["data", "train_sft", "mine_hard", "train_dpo", "eval"]
TOOLS = ["ablation", "baselines", "bench", "certificate", "fuzz", "grade", "kill", "make_assignment", "make_toy", "plot",
         "synthesize", "traces", "early_verdict", "view", "real", "first_gpu", "ablation_table", "pushes", "reason", "scale"]
FOLDERS = ("tests", "tools", "course", "docs")
OTHERS = {"--nproc_per_node", "--shutdown-timeout", "--repo-type", "--local-dir", "--help"}          # of torchrun, hf, argparse
RUN_BY = {"train_sft.py": "test_pipeline.py four_stages", "mine_hard.py": "test_pipeline.py four_stages",
          "train_dpo.py": "test_pipeline.py four_stages", "eval.py": "test_pipeline.py four_stages",
          "data.py": "test_readme.py draws_the_pack", "tools/plot.py": "test_readme.py plot_draws",
          "course/make_assignment.py": "test_course.py handout",
          "course/grade.py": "test_course.py scores_nothing",
          "tools/audit.py": "test_data.py audit_run",
          "tools/early_verdict.py": "test_early.py finds_what_is_there",
          "tools/view.py": "test_view.py rendered_text",
          "tools/real.py": "test_real.py whole_recipe",
          "tools/first_gpu.py": "test_first_gpu.py all_stages_run",
          "tests/test_budget.py": "test_budget.py costs_no_more",
          "tools/traces.py": "test_tools.py traces_keep",
          "tools/certificate.py": "test_tools.py keeps_its_claims",
          "tests/mutants.py": "test_tools.py every_mutant",
          "tests/kill.py": "test_kill.py five_kills",
          "tests/test_kernels.py": "test_kernels.py equal_their_twins",
          "tools/bench.py": "test_bench.py one_command",
          "tools/scale.py": "test_scale.py one_command",
          "toy/make_toy.py": "test_ablation.py small_ablation",
          "tools/pushes.py": "test_preferences.py pushes_of_a_small_cell",
          "tools/ablation_table.py": "test_ablation.py small_ablation",
          "tools/reason.py": "test_reason.py small_grid",
          "tools/ablation.py": "test_ablation.py small_ablation"}


class Parsed(Exception):
    """Ends a script once its arguments are read; holds the parser."""


@pytest.fixture
def parse(monkeypatch):
    """parse(module, argv) -> the parser that took argv; SystemExit where it refused."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed(parser)

    def run(name, argv):
        module = importlib.import_module(name)
        with pytest.raises(Parsed) as caught:
            module.main(argv)
        return caught.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return run


def flags_of(parser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def has_test(file, key):
    return any(key in name for name in re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text()))


def words_of(command):
    """(script, arguments) of a command line, without comment and redirection; script None where it has none."""
    words = shlex.split(re.split(r"\s<\s", command)[0], comments=True)
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return (None, []) if at is None else (words[at], [word for word in words[at + 1:] if word != "..."])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_script_takes(parse, command):
    script, argv = words_of(command)
    if script:
        assert (ROOT / script).exists() and has_test(*RUN_BY[script].split()), command
        name = script.split("/")[-1].removesuffix(".py")
        if name in SCRIPTS + TOOLS:
            parse(name, argv)
        else:
            assert argv in ([], ["FILE..."]), f"{script} has no parser"


def test_the_demo_is_the_four_commands_that_are_shown():
    recipe = re.search(r"^demo: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M).group(1)
    runs = [line.split("$(BIN)/")[1] for line in recipe.splitlines() if "$(BIN)/" in line]
    assert len(runs) == 4 and re.findall(r"^(python \w+\.py)  ", TEXT, re.M) == runs
    assert "rm " not in recipe                                                 # what lies in out/ is somebody's
    for target in re.findall(r"make (\w+)", " ".join(BLOCKS + SPANS)):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_every_flag_is_named_and_every_named_flag_exists(parse):
    known = [flags_of(parse(name, ["x"] if name == "data" else [])) for name in SCRIPTS[:-1]]
    known.append(flags_of(parse("eval", ["--predictions", "x"])))
    known = set().union(*known) - {"--help"}
    named = set(re.findall(r"--[a-z][\w-]*", BOTH))
    paths = [ROOT / folder / f"{name}.py" for name in TOOLS for folder in (*FOLDERS, "toy")]
    tools = [path.read_text() for path in paths if path.exists()]
    of_tools = set(re.findall(r'add_argument\("(--[\w-]+)"', "".join(tools)))
    assert not known - named, "README and REFERENCE have no use for these"
    assert not named - known - of_tools - OTHERS, "no script has these"


def test_paths_exist():
    for path in set(re.findall(r"(?:\w+/)*\w+\.(?:py|patch|svg|md)\b", BOTH)) - {"train_grpo.py"}:
        assert any((ROOT / folder / path).exists() for folder in ("", *FOLDERS)), path
    for pattern in re.findall(r"\btoy/[\w*]+(?:\.json|\.py)?", TEXT):
        assert list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize("name", ["README.md", "docs/REFERENCE.md", "docs/RESULTS.md", "docs/PREDICTIONS.md"])
def test_links_lead_to_headings(name):
    links = re.findall(r"\]\(([\w./]*)#([\w-]+)\)", (ROOT / name).read_text(encoding="utf-8").replace("\n", " "))
    assert links
    for path, anchor in links:
        there = ROOT / name if not path else (ROOT / name).parent / path
        headings = re.findall(r"^##+ (.*)", there.read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, (path, anchor)


def test_the_map_names_what_exists():
    rows = re.search(r"## Paper, code, test\n(.*?)\n## ", TEXT, re.S).group(1)
    named = re.findall(r"`(?:(?:tests|tools)/)?(\w+)\.py: ([^`]+)`", rows)
    assert len(named) >= 20
    for file, names in named:
        for name in names.split(", "):
            if file.startswith("test_"):
                assert has_test(f"{file}.py", name), f"{file}.py has no test like {name}"
            else:
                assert hasattr(importlib.import_module(file), name), f"{file}.py has no {name}"


def test_data_draws_the_pack_that_is_shown(capsys):
    data.main(["toy/train_wildguard.json"])
    assert capsys.readouterr().out in BLOCKS


def test_figures_that_follow_from_others():
    for parameters, layers, width in ((1.236e9, 16, 512), (3.213e9, 28, 1024), (8.030e9, 32, 1024)):
        token = 2 * layers * width * 2                                         # keys and values in bf16
        assert f"{token / 1e3:.1f}" in BOTH and f"{16 * parameters / 1e9:.1f} GB" in BOTH
        assert f"{16 * parameters / 4e9:.1f} GB a card" in BOTH
        for memory in (16e9, 24e9, 80e9):
            held = 0.7 * (memory - 2 * parameters) / token
            assert held < 0 or f"{round(held, -3):,.0f}" in BOTH
    assert mine_hard.sample_weights([-2, 0, 2], 0.2)[2] == 1.2                 # question 3 of QUESTIONS.md
    golden = json.loads((ROOT / "tests/golden_f1.json").read_text())["results"]
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (Aegis|HarmBench|SimpleSafety|XSTest)", line)]
    order = "AegisSafetyTest HarmBenchPrompt SimpleSafetyTests HarmBenchResponse XSTestReponseHarmful XSTestResponseRefusal"
    for name, row in zip(order.split(), rows, strict=True):
        shown = [cell.split()[0] for cell in row.split("|")[2:-1]]
        for (ours, legacy, _), size in zip((shown[:3], shown[3:]), ("1B", "8B")):
            want = golden[size][name]
            assert (ours, legacy) == (f"{want['f1_default']:.2f}", f"{want['f1_evaluate_py']:.2f}")


def test_the_worked_loss_is_what_dpo_loss_gives():
    rows = {when: re.search(rf"^\| {when} \|(.*)\|$", TEXT, re.M).group(1).split("|") for when in ("before", "after")}
    reference = [float(cell) for cell in rows["before"][:2]]
    for row in rows.values():
        chosen, rejected = (float(cell) for cell in row[:2])
        margin, first, second = (float(cell.split("=")[-1]) for cell in row[2:])
        inputs = torch.tensor([chosen, rejected, *reference], dtype=torch.float64)
        assert margin == pytest.approx(chosen - reference[0] - (rejected - reference[1]), abs=1e-4)
        assert first == pytest.approx(train_dpo.dpo_loss(*inputs, beta=0.02, weight=0.8).item(), abs=1e-4)
        assert second == pytest.approx(2 * -chosen / 104, abs=1e-4)


def test_lines_are_short_outside_tables_and_blocks():
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", TEXT, flags=re.M | re.S)
    assert max(map(len, prose.splitlines())) <= 110


def test_plot_draws_curves_and_bars(tmp_path):
    runs = {"sft": [dict(step=n, loss=6.0 / n) for n in range(1, 151)],
            "dpo": [dict(step=n, loss=0.7, margin=0.1 * n, accuracy=1.0) for n in range(1, 4)]}
    for name, rows in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{}, *rows]))
        results = [dict(task="completion", dataset=name + " & <more>", n=9, f1=88.8, ci95=[80.0, 91.5]),
                   dict(task="completion", weighted_f1=88.8)]
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    plot.main([*(["--metrics"] + [str(tmp_path / name / "metrics.jsonl") for name in runs]),
               *(["--results"] + [str(tmp_path / name / "results.json") for name in runs]), "--out", str(tmp_path)])
    for name, lines, says in (("curves.svg", 4, "R-SFT: loss"), ("f1.svg", 2, "88.80  (80.0 - 91.5)")):
        svg = ElementTree.parse(tmp_path / name).getroot()
        assert says in [element.text for element in svg] and "nan" not in (tmp_path / name).read_text()
        right, bottom = float(svg.get("width")), float(svg.get("height"))
        ends = [tuple(map(float, point.split(","))) for element in svg if "points" in element.keys()
                for point in element.get("points").split()]
        assert ends and all(0 <= x <= right and 0 <= y <= bottom for x, y in ends)
        thick = [element for element in svg if element.get("stroke-width") in ("1.8",)]
        assert len(thick) == (lines if name == "curves.svg" else 0)
    (tmp_path / "curves.svg").write_text("<svg>mine</svg>")
    with pytest.raises(data.InputError, match="curves.svg: is there, and was not made here; move it away, or choose another --out"):
        plot.write_svg(tmp_path / "curves.svg", 9, 9, [])
    assert plot.ticks(0.0, 1.0)[:3] == pytest.approx([0, 0.2, 0.4]) and plot.ticks(0.03, 6.3, True)[:2] == [0.05, 0.1]
