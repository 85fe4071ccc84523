"""The exercises: one table, and the text of functions in source files.

The maker, the grader and a student's own check all read this table; it gives no solution away.

    Exercise, SETS, EXERCISES      the table
    find, blank, lines_of, splice  functions as text: take out, put in, make empty
"""
import ast
import re
import symtable
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["data.py", "model.py", "train_sft.py", "mine_hard.py", "train_dpo.py", "eval.py"]
DATA, MODEL, SFT, MINE, DPO, EVAL = SCRIPTS


# ------------------------------------------------------------------ the table
@dataclass(frozen=True)
class Exercise:
    """A function that students write. A part is graded apart: the instructor's case of that name in
    cases.py, and the tests of tests/test_exercises.py whose names begin with exercise and part."""
    name: str                   # "function", or "Class.method"
    file: str
    set: int
    parts: dict                 # part -> points; "" where there is one
    twins: tuple = ()           # finished functions that do the same: blank while this is graded
    forbidden: tuple = ()       # what it must not use, beside the names of rules.py (* is any text)
    together: tuple = ()        # what may agree with it on something that tests do not fix

    @property
    def points(self):
        return sum(self.parts.values())

    @property
    def slug(self):
        """The name as it stands in names of tests."""
        return self.name.replace(".", "_")

    @property
    def tests(self):
        """The file of tests/ that has its tests."""
        return "test_exercises_kernels.py" if self.needs_triton else "test_exercises.py"

    @property
    def needs_triton(self):
        return self.set == 5 and self.name != "number_reads"


@dataclass(frozen=True)
class Set:
    """What is handed out together; course/set1.md is the handout."""
    title: str
    hours: int                  # of a student who meets it for the first time
    question: int               # points of its research question, given by hand
    needs: str                  # what to know before


SETS = {
    0: Set("Day one: from the prompt to the DPO loss", 2, 0, "Python; what a tensor is"),
    1: Set("RoPE and attention", 6, 4,
           "linear algebra; tensors, broadcasting and autograd in PyTorch"),
    2: Set("Masks, the prefix tree, and supervised fine-tuning", 11, 4,
           "set 1; the chain rule for softmax"),
    3: Set("Mining hard samples, and DPO", 9, 4,
           "set 2; maximum likelihood; sampling from a distribution"),
    4: Set("Evaluation and ablation", 7, 6, "set 3; precision and recall; the bootstrap"),
    5: Set("Kernels and the sampling engine (voluntary)", 17, 4,
           "set 2; a first look at Triton's tutorials; no GPU is needed, an interpreter runs them"),
}

# what computes gradients, or attention, for whoever does not want to
GRADIENTS = ("autograd", "backward", "grad", "enable_grad", "requires_grad", "requires_grad_",
             "func", "vjp", "vmap", "jacobian", "checkpoint", "recomputed", "apply")
READY_ATTENTION = ("*scaled_dot_product*", "*multi_head_attention*", "MultiheadAttention",
                   "*flex_attention*", "Transformer*")
FAST_ATTENTION = ("attention", "TileAttention.forward", "TileAttention.backward",
                  "TreeAttention.forward", "TreeAttention.backward")
PLAIN_ATTENTION = ("attention_by_mask", "TreeAttention.forward", "TreeAttention.backward")
KERNEL_PAIR = ("row_totals", "row_gradients")
TREE_KERNELS = ("tree_forward", "tree_backward_q", "tree_backward_kv")

# in the order in which they are handed out, and in which the tests of each pass
EXERCISES = [
    Exercise("rms_norm", MODEL, 1, {"": 2}, forbidden=("*rms_norm*", "RMSNorm")),
    Exercise("rope_frequencies", MODEL, 1, {"plain": 1, "stretch": 2}),
    Exercise("apply_rope", MODEL, 1, {"": 2}, twins=("rope", "launch_rope_kernel")),
    Exercise("attention_by_mask", MODEL, 1, {"causal": 2, "tree": 1, "groups": 1},
             twins=FAST_ATTENTION, forbidden=READY_ATTENTION),
    Exercise("Attention.forward", MODEL, 1, {"asks": 2, "output": 1}),
    Exercise("MLP.forward", MODEL, 1, {"": 2}),
    Exercise("Layer.forward", MODEL, 1, {"": 1}),

    Exercise("format_input", DATA, 2, {"": 1}),
    Exercise("check_nesting", MODEL, 2, {"": 2}),
    Exercise("tree_plan", MODEL, 2, {"position": 2, "rest": 1}),
    Exercise("row_tiles", MODEL, 2, {"right": 3, "small": 2}, twins=("tree_tiles",)),
    Exercise("TileAttention.backward", MODEL, 2, {"dv": 1, "dq": 1, "dk": 2},
             twins=PLAIN_ATTENTION, forbidden=GRADIENTS + READY_ATTENTION),
    Exercise("TokenLogprobs.forward", MODEL, 2, {"value": 2, "parts": 1},
             twins=("token_logprobs_at_once",), forbidden=GRADIENTS,
             together=("TokenLogprobs.backward",)),
    Exercise("TokenLogprobs.backward", MODEL, 2, {"hidden": 2, "head": 1, "parts": 1},
             twins=("token_logprobs_at_once",), forbidden=GRADIENTS,
             together=("TokenLogprobs.forward",)),
    Exercise("common_prefix", DATA, 2, {"": 1}),
    Exercise("lay_out", DATA, 2, {"tokens": 1, "end": 2, "scored": 2}),
    Exercise("pack", DATA, 2, {"whole": 2, "fit": 1, "apart": 1}, together=("lay_out",)),
    Exercise("sft_loss", SFT, 2, {"": 1}),
    Exercise("lr_at", SFT, 2, {"": 1}),
    Exercise("batches", SFT, 2, {"": 2}),
    Exercise("deal", DATA, 2, {"once": 1, "balance": 1, "empty": 1}),

    Exercise("draw_token", MODEL, 3, {"greedy": 1, "nucleus": 2, "rows": 1},
             twins=("launch_draw_kernel",)),
    Exercise("parse_verdict", DATA, 3, {"line": 1, "block": 2}),
    Exercise("gold_verdict", DATA, 3, {"": 2}),
    Exercise("judge", MINE, 3, {"": 2}),
    Exercise("judge_by_field", MINE, 3, {"": 2}),
    Exercise("pick_pair", MINE, 3, {"": 2}),
    Exercise("sample_weights", MINE, 3, {"": 2}),
    Exercise("select", MINE, 3, {"pairs": 2, "count": 1, "weights": 1}),
    Exercise("dpo_loss", DPO, 3, {"": 2}),
    Exercise("answer_sums", DPO, 3, {"": 1}),
    Exercise("pairs_loss", DPO, 3, {"loss": 2, "figures": 2}),
    Exercise("reference_logprobs", DPO, 3, {"values": 2, "packing": 1}),

    Exercise("confusion", EVAL, 4, {"": 2}),
    Exercise("f1", EVAL, 4, {"": 1}),
    Exercise("bootstrap", EVAL, 4, {"": 2}),
    Exercise("auprc", EVAL, 4, {"distinct": 2, "ties": 1}),
    Exercise("threshold_for", EVAL, 4, {"": 2}),
    Exercise("weighted_average", EVAL, 4, {"": 1}),
    Exercise("majority", EVAL, 4, {"": 1}),
    Exercise("reasoning_verdict", EVAL, 4, {"sections": 2, "block": 1}),
    Exercise("legacy_pairs", EVAL, 4, {"found": 1, "missing": 2}),
    Exercise("up_to_verdict", EVAL, 4, {"": 2}),
    Exercise("verdict_probability", EVAL, 4, {"one": 2, "many": 2}),

    Exercise("number_reads", MODEL, 5, {"full": 2, "gaps": 2}),
    Exercise("rope_kernel", MODEL, 5, {"one": 2, "many": 1}),
    Exercise("row_totals", MODEL, 5, {"picked": 1, "total": 3}, together=KERNEL_PAIR),
    Exercise("row_gradients", MODEL, 5, {"inside": 2, "outside": 1}, together=KERNEL_PAIR),
    Exercise("tree_forward", MODEL, 5, {"tile": 3, "forest": 3}, together=TREE_KERNELS),
    Exercise("tree_backward_q", MODEL, 5, {"tile": 3, "forest": 3}, together=TREE_KERNELS),
    Exercise("tree_backward_kv", MODEL, 5, {"tile": 3, "forest": 3}, together=TREE_KERNELS),
    Exercise("page_kernel", MODEL, 5, {"full": 3, "part": 3}),
]
BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
DAY_ONE = ["format_input", "sft_loss", "judge", "sample_weights", "dpo_loss"]


def exercises_of(sets):
    """The exercises of these sets, in order; those of set 0 are a choice from the others."""
    chosen = set(DAY_ONE) if 0 in sets else set()
    return [e for e in EXERCISES if e.set in sets or e.name in chosen]


# ------------------------------------------------------------------ functions as text
@lru_cache
def parse(source):
    """The syntax tree of a file, or None where it has a mistake in syntax."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deep
        return None


def find(tree, name):
    """The ast node of "function", "Class" or "Class.method", or None; the last one wins, as in
    Python."""
    for part in name.split("."):
        named = [node for node in getattr(tree, "body", []) if getattr(node, "name", None) == part]
        tree = named[-1] if named else None
    return tree


def statements(node):
    """The statements of a function after its docstring."""
    has_docstring = ast.get_docstring(node, clean=False) is not None
    return node.body[1:] if has_docstring else node.body


def is_blank(node):
    """Is a function's body nothing but `raise NotImplementedError`, or empty?"""
    try:
        body = [ast.unparse(statement) for statement in statements(node)]
    except RecursionError:                                  # nested deep: it is something
        return False
    raises = ["raise NotImplementedError"], ["raise NotImplementedError()"]
    return body in ([], ["pass"], ["..."], *raises)


def first_line(node):
    """The line number, from 1, where a statement begins, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def blank(source, names):
    """`source` with the bodies of the functions `names` replaced; SystemExit where one is not
    there."""
    tree = ast.parse(source)
    lines = source.split("\n")
    nodes = []
    for name in names:
        node = find(tree, name)
        if node is None or not statements(node):
            raise SystemExit(f"no function {name} to blank; correct course/exercises.py")
        nodes.append(node)
    for node in sorted(nodes, key=lambda node: -node.lineno):       # line numbers above stay right
        first = statements(node)[0]
        start = first_line(first)
        signature = lines[start - 1][:first.col_offset].rstrip()    # of a def in one line
        body = " " * (node.col_offset + 4) + "raise NotImplementedError"
        lines[start - 1:node.end_lineno] = [signature, body] if signature else [body]
    return "\n".join(lines)


def lines_of(source, name):
    """The text of a function or method, decorators included and not indented; None where it is not
    there. A file with a mistake in syntax is searched by indentation: one broken function must not
    cost others."""
    lines = source.split("\n")
    tree = parse(source)
    if tree is None:
        text = lines_by_indentation(lines, name)
    else:
        node = find(tree, name)
        text = node and lines[first_line(node) - 1:node.end_lineno]
    return textwrap.dedent("\n".join(text)).rstrip() if text else None


def lines_by_indentation(lines, name):
    """The lines of a function in a file that does not parse, or None."""
    start = 0
    for depth, part in enumerate(name.split(".")):
        head = re.compile(rf"{'    ' * depth}(def|class) {part}\b")
        start = next((i for i in range(start, len(lines)) if head.match(lines[i])), None)
        if start is None:
            return None
    indent = "    " * name.count(".")
    stop = start + 1
    while stop < len(lines):
        line = lines[stop]
        if line.strip() and not line.startswith((indent + " ", indent + ")")):
            break
        stop += 1
    while start and lines[start - 1].startswith(indent + "@"):
        start -= 1
    return lines[start:stop]


def bound(node):
    """The names that a statement at top level binds, also within an if, try or loop, and those of
    which it sets an item or an attribute."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            names.add(part.name)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in part.names}
        elif isinstance(getattr(part, "ctx", None), ast.Store):
            names |= used(part)
    return names


def used(node):
    """All names that stand in a piece of code."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def read_from_file(node):
    """The names that a piece of code looks up in its file: not the arguments and variables of
    functions in it."""
    names = set()
    tables = [symtable.symtable(ast.unparse(node), "", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols()
                  if symbol.is_global() or table.get_type() == "module"}
    return names


def top_names(source):
    """The names that a script binds at top level."""
    return set().union(*map(bound, parse(source).body))


def parse_the_rest(source):
    """The tree of a script in which what does not parse at top level is left out: one broken
    function must not cost others their helpers. A statement may have several lines that begin at
    the margin (a text, a decorator): it is the shortest piece from its first line on that parses."""
    lines = source.split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"[^\s#)\]}]", line)]
    bounds = [*starts, len(lines)]
    at = 0
    while at < len(starts):
        ends = range(at + 1, min(at + 60, len(bounds)))
        end = next((end for end in ends if parse("\n".join(lines[bounds[at]:bounds[end]]))), None)
        if end:
            at = end
        else:
            lines[bounds[at]:bounds[at + 1]] = [""] * (bounds[at + 1] - bounds[at])
            at += 1                                         # the others keep their places
    return parse("\n".join(lines))


def extras(known, theirs, text):
    """What a student's function needs beside itself, as text: the statements at top level of their
    file that bind a name which is not known (of our file: top_names), and which `text`, or another
    of these, reads. (A call alone binds nothing, and stays behind, as does what depends on
    __name__.)"""
    tree = parse(theirs) or parse_the_rest(theirs)
    function = parse(text)
    if tree is None or function is None:
        return []
    own = [node for node in tree.body if bound(node) - known and "__name__" not in used(node)]
    binds = {}                                              # name -> the statements that bind it
    for node in own:
        for name in bound(node):
            binds.setdefault(name, []).append(node)
    found = set()
    waiting = list(read_from_file(function))
    while waiting:
        for node in binds.pop(waiting.pop(), []):           # each may need another one
            found.add(node)
            waiting += read_from_file(node)
    lines = theirs.split("\n")
    needed = [node for node in own if node in found]
    return ["\n".join(lines[first_line(node) - 1:node.end_lineno]) for node in needed]


def splice(ours, name, text, more=()):
    """Our file with the function `name` replaced by `text`, and the statements `more` before it."""
    tree = parse(ours)
    lines = ours.split("\n")
    node = find(tree, name)
    top = find(tree, name.split(".")[0])
    indented = textwrap.indent(text, " " * node.col_offset)
    lines[first_line(node) - 1:node.end_lineno] = indented.split("\n")
    at = first_line(top) - 1
    return "\n".join([*lines[:at], *more, *lines[at:]])
