"""A student's copy of the repository: functions blanked out in problem sets, and a handout that lists them.

    python course/make_assignment.py OUT              all sets, and the voluntary fifth
    python course/make_assignment.py OUT --sets 2     this one; everything else stays as it is

A blanked function keeps its signature, its docstring (which is the exercise) and comments above its first
statement; its body becomes `raise NotImplementedError`. OUT/ASSIGNMENT.md is made from the table below, and
`python course/grade.py OUT` grades. What would give solutions away is kept back: see KEPT_BACK.
"""
import argparse
import ast
import shutil
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["model.py", "data.py", "train_sft.py", "mine_hard.py", "train_dpo.py", "eval.py"]
PARTS = [*SCRIPTS, "README.md", "LICENSE", "Makefile", "requirements.txt", ".gitignore",
         "toy", "tests", "tools", "docs", "course"]
KEPT_BACK = ["make_assignment.py", "grade.py", "cases.py", "test_course.py", "mutants.py",
             "test_forks.py", "forks"]

# set -> (title, hours, prerequisites, what to read first, what to do beside the functions)
SETS = {
    1: ("RoPE and attention", 6, "linear algebra; tensors, broadcasting and autograd in PyTorch",
        "part I of model.py down to `attention_by_mask`, then the modules",
        "Draw the scores of one head with and without RoPE as a function of the distance of two tokens."),
    2: ("Masks, the prefix tree, and supervised fine-tuning", 10, "set 1; the chain rule for softmax",
        "The prefix tree in README.md; `python data.py toy/train_wildguard.json`",
        "By hand: how many tokens does a pack save for k answers to one prompt? Check with "
        "`python data.py`."),
    3: ("Mining hard samples, and DPO", 8, "set 2; maximum likelihood; sampling from a distribution",
        "The method in README.md, formulas 2 and 3; Rafailov et al. 2023, section 4",
        "Show that the first loss of a DPO run is mean(alpha) ln 2 plus the SFT term, then find it in "
        "metrics.jsonl."),
    4: ("Evaluation and ablation", 6, "set 3; precision and recall; the bootstrap",
        "F1 in README.md; the header of eval.py",
        "One ablation of your own on the embedded corpus (`--gamma 0`, `--sft 0`, `--pair longest`, `--k 8`, "
        "`--judge field`, or a change of the loss): F1 of the three tasks with 95% intervals, and one "
        "honest sentence on what they show."),
    5: ("Kernels (voluntary)", 15,
        "set 2; a first look at Triton's tutorials; no GPU is needed, an interpreter runs them",
        "part II of model.py down to `page_kernel`; each kernel names its twin in part I",
        "On a GPU: time `attention` with and without the kernel for sequences of 512, 2048 and 8192 tokens."),
}

# tests, keys: the pytest file and -k expression that a student can run, and that the grader runs beside its
# own random cases; together: functions that may agree on something between them, and are then graded as one
Exercise = namedtuple("Exercise", "name file set points tests keys together", defaults=[()])
M, D, S, H, P, E = SCRIPTS
EXERCISES = [Exercise(*row) for row in [
    ("rms_norm", M, 1, 2, "test_model.py", "rms_norm_by_hand"),
    ("rope_frequencies", M, 1, 3, "test_model.py", "slows_long_waves"),
    ("apply_rope", M, 1, 2, "test_model.py", "halves_of_a_head or distance_only"),
    ("attention_by_mask", M, 1, 4, "test_model.py", "by_tiles"),
    ("Attention.forward", M, 1, 3, "test_model.py", "logits_equal_transformers"),
    ("MLP.forward", M, 1, 2, "test_model.py", "logits_equal_transformers"),
    ("Layer.forward", M, 1, 1, "test_model.py", "logits_equal_transformers"),

    ("tree_plan", M, 2, 5, "test_model.py",
     "plan_of_the_readme_example or does_not_nest or by_tiles"),
    ("row_tiles", M, 2, 5, "test_model.py", "by_tiles or tiles_end"),
    ("TileAttention.backward", M, 2, 4, "test_model.py", "by_tiles"),
    ("TokenLogprobs.forward", M, 2, 3, "test_model.py", "token_logprobs", ("TokenLogprobs.backward",)),
    ("TokenLogprobs.backward", M, 2, 4, "test_model.py", "token_logprobs", ("TokenLogprobs.forward",)),
    ("common_prefix", D, 2, 1, "test_data.py", "common_prefix"),
    ("lay_out", D, 2, 5, "test_data.py", "pack_of_the_readme_example or scores_every"),
    ("pack", D, 2, 4, "test_data.py", "pack_of_the_readme_example or scores_every"),
    ("sft_loss", S, 2, 1, "test_train.py", "whole_step"),
    ("lr_at", S, 2, 1, "test_train.py", "half_a_cosine"),
    ("batches", S, 2, 2, "test_train.py", "function_of_seed"),
    ("deal", D, 2, 3, "test_train.py", "deal_gives"),

    ("draw_token", M, 3, 4, "test_model.py", "from_the_nucleus or covers_a_large"),
    ("parse_verdict", D, 3, 3, "test_data.py", "parse_verdict"),
    ("gold_verdict", D, 3, 2, "test_data.py", "gold_of"),
    ("judge", H, 3, 2, "test_mine.py", "every_labelled"),
    ("judge_by_field", H, 3, 2, "test_mine.py", "released_judge"),
    ("pick_pair", H, 3, 2, "test_mine.py", "pick_pair"),
    ("sample_weights", H, 3, 2, "test_mine.py", "weights_by_hand"),
    ("select", H, 3, 4, "test_mine.py", "select_counts or ensemble or never_chosen"),
    ("dpo_loss", P, 3, 2, "test_dpo.py", "dpo_loss"),
    ("answer_sums", P, 3, 1, "test_dpo.py", "answer_sums"),
    ("pairs_loss", P, 3, 4, "test_dpo.py", "the_first_loss or loss_and_gradient"),
    ("reference_logprobs", P, 3, 3, "test_dpo.py", "reference_is_a_sum"),

    ("confusion", E, 4, 2, "test_eval.py", "counts_once or f1_by_hand"),
    ("f1", E, 4, 1, "test_eval.py", "f1_by_hand"),
    ("bootstrap", E, 4, 2, "test_eval.py", "bootstrap"),
    ("auprc", E, 4, 3, "test_eval.py", "auprc"),
    ("threshold_for", E, 4, 2, "test_eval.py", "threshold_keeps"),
    ("weighted_average", E, 4, 1, "test_eval.py", "papers_averages"),
    ("majority", E, 4, 1, "test_eval.py", "majority"),
    ("reasoning_verdict", E, 4, 3, "test_eval.py", "reasoning_verdict"),
    ("legacy_pairs", E, 4, 3, "test_eval.py", "give_the_golden_f1 and not files"),
    ("up_to_verdict", E, 4, 2, "test_eval.py", "up_to_verdict"),
    ("verdict_probability", E, 4, 4, "test_eval.py", "two_branches"),

    ("row_totals", M, 5, 4, "test_kernels.py", "check_token_logprobs and 9000"),
    ("row_gradients", M, 5, 3, "test_kernels.py", "check_token_logprobs and 9000"),
    ("tree_forward", M, 5, 6, "test_kernels.py", "check_tree_attention and (packed or pairs)",
     ("tree_backward_q", "tree_backward_kv")),
    ("tree_backward_q", M, 5, 6, "test_kernels.py", "check_tree_attention and (packed or pairs)",
     ("tree_forward", "tree_backward_kv")),
    ("tree_backward_kv", M, 5, 6, "test_kernels.py", "check_tree_attention and (packed or pairs)",
     ("tree_forward", "tree_backward_q")),
    ("page_kernel", M, 5, 6, "test_kernels.py", "check_attend_pages"),
]]

# ------------------------------------------------------------------ source text


def find(tree, name):
    """The ast node of a function or method ("Class.method"), or None; the last one wins, as in Python."""
    for part in name.split("."):
        tree = next((node for node in reversed(getattr(tree, "body", []))
                     if getattr(node, "name", None) == part), None)
    return tree


def statements(node):
    """The statements of a function after its docstring."""
    return node.body[ast.get_docstring(node, clean=False) is not None:]


def is_blank(node):
    """Is a function's body nothing but `raise NotImplementedError`, or empty?"""
    body = [ast.unparse(statement) for statement in statements(node)]
    return body in ([], ["pass"], ["..."], ["raise NotImplementedError"], ["raise NotImplementedError()"])


def first_line(node):
    """The line number, from 1, where a statement begins, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def blank(source, names):
    """`source` with the bodies of the functions `names` replaced; SystemExit where one is not there."""
    tree, lines, nodes = ast.parse(source), source.split("\n"), []
    for name in names:
        node = find(tree, name)
        if node is None or not statements(node):
            raise SystemExit(f"no function {name} to blank; correct the table in "
                             "course/make_assignment.py")
        nodes.append(node)
    # from below: line numbers above stay right
    for node in sorted(nodes, key=lambda node: -node.lineno):
        start, indent = first_line(statements(node)[0]), " " * (node.col_offset + 4)
        # the signature, in a def of one line
        before = lines[start - 1][:statements(node)[0].col_offset].rstrip()
        lines[start - 1:node.end_lineno] = [*filter(None, [before]), indent + "raise NotImplementedError"]
    return "\n".join(lines)


# ------------------------------------------------------------------ the copy


def copy_repository(out, without=()):
    """Copy the parts of the repository that a reader needs; nothing that tools left behind."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "*.tmp", ".pytest_cache", *without)
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, out / part, ignore=skip)
        elif (ROOT / part).exists():
            shutil.copyfile(ROOT / part, out / part)


NOTES = {                                               # where a function has no docstring of its own
    "Attention.forward": "x (T, D) -> (T, D): queries, keys and values are x times the three projections, "
                         "split into heads of E; queries and keys are turned by `apply_rope`; "
                         "`attend(q, k, v)` gives what each head reads, (T, H, E); the heads side by side go "
                         "through `o_proj`",
    "MLP.forward": "see the docstring of the class; x (T, D) -> (T, D)",
    "Layer.forward": "see the docstring of the class; x (T, D) -> (T, D)",
    "TokenLogprobs.forward": "see the docstring of the class; as many rows at a time as have LOGITS logits. "
                             "Save hidden, head, targets and the log-sum-exp of every row",
    "TokenLogprobs.backward": "see the docstring of the class; gradients of hidden and head, in their shapes"}

HEAD = """# Assignment

Write the functions below. Each has a signature and a docstring, which says what it is to do, with its formula
and shapes; its body is `raise NotImplementedError`. Everything around them works and is there to be read.
Keep to plain PyTorch, NumPy and the standard library.

| set | | hours | points | prerequisites |
|---|---|---|---|---|
"""

CHECK = """
## How to check yourself

`make setup` once (or `pip install -r requirements.txt`), then the tests named beside an exercise, for example

    python -m pytest -q tests/test_model.py -k rms_norm_by_hand

A test may use other functions of this list: where it ends in NotImplementedError inside another one, that one
comes first. Grading does not have this problem: each function is graded alone, put among finished ones, by
the named tests and by random cases of the instructor. A function gives all its points or none. So keep
signatures, and put helpers at the top level of the same file; changes elsewhere, and to tests, are not looked
at.

Before you begin, ask yourself the ten questions of course/QUESTIONS.md: README.md and an hour of
reading answer them.
"""


def handout(sets):
    """The text of ASSIGNMENT.md."""
    some, text = [e for e in EXERCISES if e.set in sets], HEAD
    for number in sets:
        title, hours, needs, _, _ = SETS[number]
        points = sum(e.points for e in some if e.set == number)
        text += f"| {number} | {title} | {hours} | {points} | {needs} |\n"
    text += f"\nTogether {sum(e.points for e in some)} points"
    text += (", of which those of set 5 are extra.\n" if 5 in sets else ".\n") + CHECK
    for number in sets:
        title, _, _, reading, more = SETS[number]
        text += f"\n## Set {number}: {title}\n\nRead first: {reading}.\n\n"
        text += "| function | file | points | `python -m pytest -q tests/...` |\n|---|---|---|---|\n"
        mine = [e for e in some if e.set == number]
        for e in mine:
            keys = f'"{e.keys}"' if " " in e.keys else e.keys
            text += f"| `{e.name}` | {e.file} | {e.points} | `{e.tests} -k {keys}` |\n"
        if number == 5:
            text += ("\nThese tests run by Triton's interpreter: "
                     "`TRITON_INTERPRET=1 python -m pytest -q -o 'python_functions=check_*' tests/...`\n")
        text += "".join(f"\n- `{e.name}`: {NOTES[e.name]}." for e in mine if e.name in NOTES)
        text += "\n" * any(e.name in NOTES for e in mine) + f"\nBeside the code (marked by hand): {more}\n"
    return text


def make(out, sets):
    """Write the student's copy into the folder `out`, which must be new or empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: is not empty; choose another folder")
    copy_repository(out, KEPT_BACK)
    for file in SCRIPTS:
        names = [e.name for e in EXERCISES if e.file == file and e.set in sets]
        (out / file).write_text(blank((ROOT / file).read_text(encoding="utf-8"), names), encoding="utf-8")
    (out / "ASSIGNMENT.md").write_text(handout(sets), encoding="utf-8")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--sets", nargs="+", type=int, choices=SETS, default=list(SETS),
                   help="which problem sets to blank")
    args = p.parse_args(argv)
    make(args.out, sorted(set(args.sets)))
    some = [e for e in EXERCISES if e.set in args.sets]
    print(f"wrote {args.out}: {len(some)} exercises, {sum(e.points for e in some)} points; "
          f"see {Path(args.out) / 'ASSIGNMENT.md'}")


if __name__ == "__main__":
    main()
