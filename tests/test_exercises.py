"""What each exercise of course/exercises.py must do, by numbers that can be worked by hand.

    python -m pytest -q tests/test_exercises.py -k rms_norm__

The name of a test is test_, the exercise, two underscores, the part of it that is graded, and what
is asked. Tests stand in the order of the handouts and need no function that comes later; a message
says what was asked, what came, and what was wanted. Of the kernels: test_exercises_kernels.py.
"""
import copy
import math
import random
from dataclasses import is_dataclass
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval as evaluation
import mine_hard
import model
import train_dpo
import train_sft
from data import Example, Pack
from model import LlamaConfig, TreePlan, World

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
ALONE = World(torch.device("cpu"))


# ------------------------------------------------------------------ what came, what was wanted
def plain(value):
    """Tensors and arrays as numbers and lists, tuples as lists, to be compared and shown."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if is_dataclass(value):
        return plain(vars(value))
    return value


def same(got, want, tolerance):
    """Are these equal, numbers up to a tolerance? What is wanted decides what kind is asked for."""
    if isinstance(want, list):
        return (type(got) is list and len(got) == len(want)
                and all(same(a, b, tolerance) for a, b in zip(got, want)))
    if isinstance(want, dict):
        return (isinstance(got, dict) and sorted(got) == sorted(want)
                and all(same(got[key], want[key], tolerance) for key in want))
    if isinstance(want, (bool, str, type(None))):
        return type(got) is type(want) and got == want
    is_number = type(got) in (int, float)
    return is_number and (got == want or abs(got - want) <= tolerance * max(1, abs(want)))


def shown(value, digits=6):
    """A value as a message shows it: numbers short, nothing longer than a few lines."""
    def short(item):
        if isinstance(item, list):
            return "[" + ", ".join(map(short, item)) + "]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{key!r}: {short(v)}" for key, v in item.items()) + "}"
        return f"{item:.{digits}g}" if type(item) is float else repr(item)

    text = short(plain(value))
    return text if len(text) < 700 else text[:600] + " ..."


def check(asked, got, want, why="", tolerance=1e-6):
    """AssertionError unless `got` is `want`; it says what was asked, came, was wanted, and why."""
    __tracebackhide__ = True
    if not same(plain(got), plain(want), tolerance):
        digits = 6 if shown(got) != shown(want) else 17
        wrong = (f"{asked}\n    got     {shown(got, digits)}\n"
                 f"    wanted  {shown(want, digits)}")
        raise AssertionError(wrong + (f"\n    ({why})" if why else ""))


def holds(fact, sentence):
    """AssertionError with a sentence, unless `fact` is true."""
    __tracebackhide__ = True
    if not fact:
        raise AssertionError(sentence)


def refuses(asked, function, *arguments):
    """AssertionError unless the call ends in ValueError."""
    __tracebackhide__ = True
    try:
        got = function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{asked}\n    got     {shown(got)}\n    wanted  ValueError")


def keeps(asked, function, *arguments):
    """AssertionError where function(*arguments) changes an argument."""
    __tracebackhide__ = True
    before = copy.deepcopy(arguments)
    function(*arguments)
    for number, (now, was) in enumerate(zip(arguments, before), 1):
        check(f"{asked}: its argument {number}, afterwards", now, was,
              "leave what you are given as it is: whoever called still needs it")


def has_gradient(asked, function, *inputs):
    """AssertionError unless function(*inputs), of tensors in float64, has the gradients that small
    steps give."""
    __tracebackhide__ = True
    inputs = [x.clone().requires_grad_() for x in inputs]
    holds(torch.is_tensor(function(*inputs)), f"{asked}: is no tensor, and so has no gradient")
    try:
        torch.autograd.gradcheck(function, inputs)
    except torch.autograd.gradcheck.GradcheckError as error:
        what = ("is not what small steps of its arguments say (was something detached, or taken as "
                f"a number?): {error}")
    except RuntimeError as error:
        what = f"cannot be computed: {error}"
    else:
        return
    first_line, *_ = what.splitlines()
    raise AssertionError(f"{asked}: its gradient {first_line}")


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made meanwhile."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.size = max(self.size, min(x.numel(), stored))
        return out


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# ================================================================== set 1
def test_rms_norm__by_hand():
    got = model.rms_norm(tensor([3, 4]), tensor([1, 10]), 0.0)
    check("rms_norm([3, 4], weight [1, 10], eps 0)", got, [0.8485281, 11.3137085],
          "the mean of the squares 9 and 16 is 12.5; 3 / sqrt(12.5) = 0.8485")


def test_rms_norm__eps_is_inside_the_root():
    got = model.rms_norm(tensor([0.1, 0.1]), tensor([1, 1]), 0.03)
    check("rms_norm([0.1, 0.1], weight [1, 1], eps 0.03)", got, [0.5, 0.5],
          "0.1 / sqrt(0.01 + 0.03) = 0.5")


def test_rms_norm__each_row_has_its_own_mean():
    got = model.rms_norm(tensor([[[3, 4]], [[30, 40]]]), tensor([1, 1]), 0.0)
    check(
        "rms_norm([[[3, 4]], [[30, 40]]], weight [1, 1], eps 0)",
        got,
        [[[0.8485281, 1.1313708]], [[0.8485281, 1.1313708]]],
        "the mean is over the last dimension",
    )


def test_rms_norm__float64_stays_float64():
    got = model.rms_norm(tensor([3, 4]), torch.tensor([1.0, 1.0]), 0.0)
    check("rms_norm(float64 [3, 4], float32 weight [1, 1], eps 0)", got,
          [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)],
          "to ten digits: float32 has seven, and full_precision leaves float64 as it is", 1e-10)
    check("the dtype of that", str(got.dtype), "torch.float64", "the result has the dtype of x")


def test_rms_norm__half_precision():
    got = model.rms_norm(torch.tensor([300.0, 400.0]).half(), torch.ones(2), 0.0)
    check("rms_norm(float16 [300, 400], float32 weight [1, 1], eps 0)", got, [0.8485281, 1.1313708],
          "400 * 400 is more than float16 can hold: square in float32", 1e-3)
    check("the dtype of that", str(got.dtype), "torch.float16", "the result has the dtype of x")


def test_rms_norm__bfloat16():
    x = torch.tensor([1.0, 1.0078125] * 64).bfloat16()
    got = model.rms_norm(x, torch.ones(128), 0.0)
    wide = x.double() / x.double().square().mean().sqrt()
    check("rms_norm(bfloat16 1 and 1.0078 in turns)", got, wide.bfloat16(),
          "bfloat16 has three digits: cast to it no sooner than x / sqrt(...) is there", 1e-9)


def test_rms_norm__leaves_its_arguments():
    keeps("rms_norm([3, 4], weight [1, 10], eps 0)", model.rms_norm, tensor([3, 4]),
          tensor([1, 10]), 0.0)


def test_rms_norm__has_a_gradient():
    has_gradient("rms_norm([3, 4], weight [1, 10], eps 0.1)",
                 lambda x, weight: model.rms_norm(x, weight, 0.1), tensor([3, 4]), tensor([1, 10]))


def config(**changes):
    fields = dict(vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                  num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    return LlamaConfig(**{**fields, **changes})


def test_rope_frequencies__plain():
    got = model.rope_frequencies(config(head_dim=4, rope_theta=10000.0))
    check("rope_frequencies, head_dim 4, theta 10000", got, [1, 0.01],
          "10000^0 and 10000^(-2/4)", 1e-12)
    check("the dtype of that", str(got.dtype), "torch.float64")


SCALING = dict(factor=8.0, low_freq_factor=4.0, high_freq_factor=16.0,
               original_max_position_embeddings=200 * math.pi)


def stretched():
    return model.rope_frequencies(config(head_dim=6, rope_theta=1000.0, rope_scaling=SCALING))


def test_rope_frequencies__stretch_keeps_short_waves_and_slows_long_ones():
    first, _, last = stretched().tolist()
    asked = (
        "theta 1000, head_dim 6, factor 8, low 4, high 16, original 628.3: the wave of frequency"
    )
    check(f"{asked} 1", first, 1, "it turns 628.3 * 1 / 2 pi = 100 times, more than 16: kept")
    check(f"{asked} 0.01", last, 0.00125, "it turns once, less often than 4: divided by 8")


def test_rope_frequencies__stretch_is_a_ramp_between_the_two():
    check(
        "theta 1000, head_dim 6, factor 8, low 4, high 16, original 628.3: the wave of f 0.1",
        stretched()[1],
        0.05625,
        "it turns 10 times, halfway between 4 and 16: half of 0.1 and half of 0.1 / 8",
    )


def test_rope_frequencies__plain_on_the_device_that_is_asked_for():
    got = model.rope_frequencies(config(), "meta").device.type
    check("rope_frequencies(config, 'meta'): its device", got, "meta")


def test_apply_rope__pairs_are_the_halves_of_a_head():
    angle = tensor([[[1, 0.01]]])
    got = model.apply_rope(tensor([[[1, 1, 0, 0]]]), angle.cos(), angle.sin())
    check("apply_rope([1, 1, 0, 0], angles 1 and 0.01)", got,
          [[[math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]]],
          "the pairs are (x0, x2) and (x1, x3), not neighbours")


def test_apply_rope__a_quarter_turn_is_counterclockwise():
    got = model.apply_rope(tensor([[[1, 2, 3, 4]]]), tensor([[[0, 0]]]), tensor([[[1, 1]]]))
    check(
        "apply_rope([1, 2, 3, 4], cos 0, sin 1)", got, [[[-3, -4, 1, 2]]], "(a, b) becomes (-b, a)"
    )


def test_apply_rope__each_position_has_its_angle_and_all_heads_the_same():
    angle = tensor([0, math.pi / 2])[:, None, None]
    x = tensor([[[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    check("apply_rope of heads (1, 0) and (0, 1), angle 0 and then a quarter turn",
          model.apply_rope(x, angle.cos(), angle.sin()),
          [[[1, 0], [0, 1]], [[0, 1], [-1, 0]]])


def test_apply_rope__leaves_its_arguments():
    keeps("apply_rope([1, 2, 3, 4], cos 0, sin 1)", model.apply_rope, tensor([[[1, 2, 3, 4]]]),
          tensor([[[0, 0]]]), tensor([[[1, 1]]]))


def test_apply_rope__has_a_gradient():
    cos, sin = tensor([[[0.8, 0.6]]]), tensor([[[0.6, 0.8]]])
    has_gradient("apply_rope([1, 2, 3, 4])", lambda x: model.apply_rope(x, cos, sin),
                 tensor([[[1, 2, 3, 4]]]))


def plan_of(end, skip=0):
    """The TreePlan of a stream, made without tree_plan."""
    position = [sum(end[j] > i for j in range(i)) for i in range(len(end))]
    return TreePlan(torch.tensor(end), torch.tensor(position), skip)


def heads(rows):
    """(T, 1, 1) of one number a row."""
    return tensor(rows)[:, None, None]


def test_attention_by_mask__causal_and_softmax():
    got = model.attention_by_mask(
        heads([1, 1]), heads([0, math.log(3)]), heads([0, 4]), plan_of([2, 2])
    )
    check("one head of width 1: q 1 1, k 0 log(3), v 0 4", got.flatten(), [0, 3],
          "row 0 sees only itself; row 1 weighs v by exp(0) : exp(log 3) = 1 : 3")


def test_attention_by_mask__causal_scores_are_divided_by_the_root_of_the_width():
    q, k, v = (tensor(x)[:, None] for x in ([[0, 0, 0, 0], [2, 0, 0, 0]],
                                            [[0, 0, 0, 0], [math.log(3), 0, 0, 0]],
                                            [[0, 0, 0, 0], [4, 0, 0, 0]]))
    check("one head of width 4: q 2 0 0 0, second key log(3) 0 0 0, v 0 and 4",
          model.attention_by_mask(q, k, v, plan_of([2, 2]))[1, 0, 0], 3.0,
          "the score is 2 log(3) / sqrt(4) = log(3)")


# the stream of README: an instruction I, a prompt p q, answers a b and x y
TREE = [7, 7, 7, 5, 5, 7, 7]


def test_attention_by_mask__tree_rows_skip_their_siblings():
    zero = heads([0.0] * 7)
    got = model.attention_by_mask(zero, zero, heads(range(7)), plan_of(TREE))
    check(f"end {TREE}, all scores 0, v 0 1 2 3 4 5 6: the means of what rows see", got.flatten(),
          [0, 0.5, 1, 1.5, 2, 2, 2.8], "row 5 sees 0 1 2 and itself, not 3 and 4: i < end[j]")


def test_attention_by_mask__groups_of_query_heads_share_a_key_head():
    q, v = torch.zeros(1, 4, 1).double(), tensor([[[10], [20]]])
    got = model.attention_by_mask(q, torch.zeros_like(v), v, plan_of([1]))
    check("4 query heads, 2 key heads with v 10 and 20", got.flatten(), [10, 10, 20, 20],
          "query head h reads key head h G // H")


def test_attention_by_mask__tree_of_large_scores():
    got = model.attention_by_mask(heads([1, 1, 20]), heads([-10, 10, -10]), heads([0, 1, 0]),
                                  plan_of([3, 2, 3]))
    check("end [3, 2, 3], q 1 1 20, k -10 10 -10, v 0 1 0", got.flatten(), [0, 1, 0],
          "row 2 does not see row 1, however large its score; no exponential is 0 / 0")


def test_attention_by_mask__tree_has_all_rows_whatever_skip_is():
    zero = heads([0] * 7)
    got = model.attention_by_mask(zero, zero, heads(range(7)), plan_of(TREE, 3))
    check(f"end {TREE}, skip 3, all scores 0, v 0 1 2 3 4 5 6: the means of what rows see",
          got.flatten(), [0, 0.5, 1, 1.5, 2, 2, 2.8], "q has a row for every token here")


def test_attention_by_mask__tree_has_a_gradient():
    plan = plan_of([3, 2, 3])
    has_gradient("attention_by_mask, end [3, 2, 3]",
                 lambda q, k, v: model.attention_by_mask(q, k, v, plan),
                 heads([1, 2, 1]), heads([0, 1, 2]), heads([3, 1, 2]))


def test_attention_by_mask__tree_leaves_its_arguments():
    keeps("attention_by_mask, end [3, 2, 3]", model.attention_by_mask,
          heads([1, 2, 1]), heads([0, 1, 2]), heads([3, 1, 2]), plan_of([3, 2, 3]))


def test_attention_by_mask__tree_of_scores_of_a_million():
    got = model.attention_by_mask(heads([1, 1, 1]), heads([-1e6, 1e6, -1e6]),
                                  heads([0, 1, 0]), plan_of([3, 2, 3]))
    check("end [3, 2, 3], q 1 1 1, k -1e6 1e6 -1e6, v 0 1 0", got.flatten(), [0, 1, 0],
          "row 2 does not see row 1, whatever its score: -inf, not a large number")


def test_attention_by_mask__causal_with_several_heads():
    q, k, v = (tensor(x)[:, None].expand(2, 3, 1).contiguous() for x in ([[1], [1]],
               [[0], [math.log(3)]], [[0], [4]]))
    check("three heads of width 1: q 1 1, k 0 log(3), v 0 4",
          model.attention_by_mask(q, k, v, plan_of([2, 2])), [[[0]] * 3, [[3]] * 3],
          "E is the width of one head")


def attention_layer():
    """Queries are x itself; the one key is ten times its first two numbers, v its last two."""
    layer = model.Attention(config()).double()
    layer.q_proj.weight.data = torch.eye(4).double()
    layer.k_proj.weight.data = 10 * torch.eye(4)[:2].double()
    layer.v_proj.weight.data = torch.eye(4)[2:].double()
    layer.o_proj.weight.data = tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    return layer


ROW = [[1, 2, 3, 4]]                    # x (T, D); a quarter turn: cos 0, sin 1
QUARTER = (tensor([[[0]]]), tensor([[[1]]]))


def test_Attention_forward__asks_with_turned_queries_and_keys():
    calls = []

    def attend(q, k, v):
        calls.append((q, k, v))
        return q

    attention_layer()(tensor(ROW), *QUARTER, attend)
    check("how often attend was called", len(calls), 1)
    for name, got, want in zip("qkv", calls[0], ([[[-2, 1], [-4, 3]]], [[[-20, 10]]], [[[3, 4]]])):
        check(f"x {ROW[0]}, heads of width 2, a quarter turn: {name}", got, want,
              "queries and keys are turned, values are not")


def test_Attention_forward__output_joins_heads_side_by_side():
    got = attention_layer()(tensor(ROW), *QUARTER, lambda q, k, v: tensor([[[1, 2], [3, 4]]]))
    check(
        "heads read (1, 2) and (3, 4); o_proj adds all four in its last row", got, [[1, 2, 3, 10]]
    )


def test_Attention_forward__output_has_a_gradient():
    layer = attention_layer()
    has_gradient(f"x {ROW[0]}, attend gives q + k + v",
                 lambda x: layer(x, *QUARTER, lambda q, k, v: q + k + v), tensor(ROW))


def test_Attention_forward__asks_with_heads_of_width_E():
    layer = model.Attention(config(head_dim=4)).double()
    shapes = []
    angle = torch.zeros(3, 1, 2).double()
    layer(torch.ones(3, 4).double(), angle.cos(), angle.sin(),
          lambda q, k, v: shapes.extend(list(x.shape) for x in (q, k, v)) or q)
    check("3 tokens, 2 query heads and 1 key head of width 4: shapes of q, k, v", shapes,
          [[3, 2, 4], [3, 1, 4], [3, 1, 4]])


def mlp(gate, up, down):
    layer = model.MLP(config(hidden_size=1, intermediate_size=1, num_attention_heads=1)).double()
    for part, value in ((layer.gate_proj, gate), (layer.up_proj, up), (layer.down_proj, down)):
        part.weight.data = tensor([[value]])
    return layer


def test_MLP_forward__by_hand():
    check("x 1, weights of gate 1, up 2, down 10", mlp(1, 2, 10)(tensor([[1]])), [[14.6211716]],
          "silu(1) = 1 / (1 + exp(-1)) = 0.731; 0.731 * 2 * 10")


def test_MLP_forward__silu_is_around_the_gate():
    check("x 1, weights of gate -2, up 1, down 1", mlp(-2, 1, 1)(tensor([[1]])), [[-0.2384058]],
          "silu(-2) = -2 / (1 + exp(2)); of up there is none")


def test_MLP_forward__has_a_gradient():
    layer = mlp(1, 2, 10)
    has_gradient("x 1, weights of gate 1, up 2, down 10", lambda x: layer(x), tensor([[1]]))


class Times(torch.nn.Module):
    """x -> factor x, or x + plus."""

    def __init__(self, factor=1, plus=0):
        super().__init__()
        self.factor = factor
        self.plus = plus

    def forward(self, x, *rest):
        return self.factor * x + self.plus


def test_Layer_forward__two_residual_steps():
    layer = model.Layer(config())
    layer.input_layernorm = Times(plus=1)
    layer.self_attn = Times(10)
    layer.post_attention_layernorm = Times(plus=2)
    layer.mlp = Times(100)
    check("x 1; norms add 1 and 2, attention is times 10, mlp times 100",
          layer(tensor([[1]]), None, None, None), [[2321]],
          "1 + 10 (1 + 1) = 21, then 21 + 100 (21 + 2)")


def test_Layer_forward__leaves_its_arguments():
    layer = model.Layer(config())
    layer.input_layernorm = layer.self_attn = Times()
    layer.post_attention_layernorm = layer.mlp = Times()
    keeps("Layer.forward of x 1", layer, tensor([[1]]), None, None, None)


def test_Layer_forward__has_a_gradient():
    layer = model.Layer(config())
    layer.input_layernorm = layer.post_attention_layernorm = Times()
    layer.self_attn = layer.mlp = Times(2)
    has_gradient("x 1; attention and mlp are times 2", lambda x: layer(x, None, None, None),
                 tensor([[1]]))


# ================================================================== set 2
def test_format_input__by_hand():
    check("format_input('a', 'b')", data.format_input("a", "b"),
          "Human user:\na\n\nAI assistant:\nb\n\n")


def test_format_input__a_missing_response_is_not_an_empty_one():
    check("format_input('a')", data.format_input("a"), "Human user:\na\n\nAI assistant:\nNone\n\n")
    check(
        "format_input('a', '')", data.format_input("a", ""), "Human user:\na\n\nAI assistant:\n\n\n"
    )


def test_check_nesting__takes_forests():
    for end in ([], [1], [3, 3, 3], [2, 2, 3], [3, 2, 3], TREE, [4, 3, 3, 4]):
        check(f"check_nesting({end})", model.check_nesting(list(end)), None)


def test_check_nesting__refuses_what_does_not_nest():
    for end, why in (
        ([1, 1], "row 1 ends before it is over"),
        ([2, 5], "5 is more than there are rows"),
        ([2, 3, 3], "row 1 outlives row 0, in whose subtree it stands"),
        ([5, 3, 4, 4, 5], "row 2 outlives row 1"),
        ([0], "an end is at least 1"),
    ):
        refuses(f"check_nesting({end}): {why}", model.check_nesting, end)


class Watched(list):
    """A list that says so when more than `most` of its items have been looked at."""
    most = 0

    def look(self, count):
        self.most -= count
        holds(self.most >= 0, f"check_nesting of {len(self)} rows looks at each of them more than "
              "ten times on average: remember which subtrees are open, so that it is linear in T")

    def __getitem__(self, place):
        self.look(len(range(*place.indices(len(self)))) if isinstance(place, slice) else 1)
        return super().__getitem__(place)

    def __iter__(self):
        for item in super().__iter__():
            self.look(1)
            yield item


def test_check_nesting__takes_time_linear_in_the_rows():
    for end in ([20000] * 20000, list(range(1, 20001)), [20000] * 19999 + [20001]):
        watched = Watched(end)
        watched.most = 10 * len(end)
        try:
            model.check_nesting(watched)
        except ValueError:
            holds(end[-1] > len(end), f"end {end[:4]} ..., 20000 rows: refused, and it nests")


def test_check_nesting__leaves_its_argument():
    keeps(f"check_nesting({TREE})", model.check_nesting, list(TREE))


def test_tree_plan__position_counts_the_keys_that_a_row_sees():
    for end, want in ((TREE, [0, 1, 2, 3, 4, 3, 4]), ([2, 2, 3], [0, 1, 0]), ([3, 2, 3], [0, 1, 1]),
                      ([1], [0]), ([1, 2, 3], [0, 0, 0])):
        check(f"the positions of end {end}", model.tree_plan(torch.tensor(end)).position, want)


def test_tree_plan__rest_is_kept_and_checked():
    plan = model.tree_plan(torch.tensor(TREE), 3)
    check("tree_plan(end, skip 3): skip, end", [plan.skip, plan.end], [3, TREE])
    check("... and the dtype of position", str(plan.position.dtype), "torch.int64")
    refuses("tree_plan of end 2 3 3", model.tree_plan, torch.tensor([2, 3, 3]))


def test_tree_plan__rest_checks_with_skip_too():
    refuses("tree_plan of end 2 3 3, skip 1", model.tree_plan, torch.tensor([2, 3, 3]), 1)
    keeps(f"tree_plan of end {TREE}", model.tree_plan, torch.tensor(TREE), 3)


def test_tree_plan__position_on_the_device_that_is_asked_for():
    plan = model.tree_plan(torch.tensor(TREE), 0, "meta")
    check("tree_plan(end, 0, 'meta'): devices of position and end",
          [plan.position.device.type, plan.end.device.type], ["meta", "cpu"])


def test_tree_plan__position_is_of_all_rows_whatever_skip_is():
    check(f"the positions of end {TREE}, skip 3", model.tree_plan(torch.tensor(TREE), 3).position,
          [0, 1, 2, 3, 4, 3, 4])


def seen_by(tiles, rows, keys):
    """(rows, keys) of what tiles let rows see: 1, or 0."""
    sees = np.zeros((rows, keys), int)
    asked = []
    for some, j, masked in tiles:
        asked += range(rows)[some]
        by_all = len(j) - masked.shape[1]
        for line, row in enumerate(range(rows)[some]):
            sees[row, j[:by_all].tolist()] += 1
            sees[row, j[by_all:][~masked[line]].tolist()] += 1
    holds(
        asked == list(range(rows)),
        f"tiles ask for rows {asked}, wanted each of {rows} once, in order",
    )
    return sees.tolist()


def rule(end, skip):
    T = len(end)
    return [[int(j <= i < end[j]) for j in range(T)] for i in range(skip, T)]


def test_row_tiles__right_in_one_tile():
    for end, skip in ((TREE, 0), ([3, 2, 3], 0), (TREE, 3), ([1], 0)):
        got = seen_by(model.row_tiles(plan_of(end, skip)), len(end) - skip, len(end))
        check(
            f"which keys the rows from {skip} on see by the tiles of end {end}",
            got,
            rule(end, skip),
        )


def test_row_tiles__right_in_several():
    with patch.object(model, "TILE_ROWS", 4):
        for end, skip in (([9, 9, 5, 5, 5, 9, 9, 9, 9], 2), ([12] * 12, 0), (TREE, 0)):
            tiles = model.row_tiles(plan_of(end, skip))
            got = seen_by(tiles, len(end) - skip, len(end))
            check(f"which keys rows see by tiles of 4 rows of end {end}", got, rule(end, skip))


def test_row_tiles__right_order_of_keys():
    (rows, keys, masked), = model.row_tiles(plan_of(TREE))
    check("of README's example: rows, keys, shape of masked",
          [rows.start, rows.stop, keys, masked.shape], [0, 7, [0, 1, 2, 3, 4, 5, 6], [7, 6]],
          "key 0 is seen by all rows, so it stands first and has no column in masked")


def test_row_tiles__small_tiles_only_hold_what_they_see():
    end = [i // 16 * 16 + 16 for i in range(640)]              # 40 sequences of 16 rows
    tiles = model.row_tiles(plan_of(end))
    size = sum((rows.stop - rows.start) * len(keys) for rows, keys, _ in tiles)
    holds(
        size <= 640 * 640 // 4,
        f"40 sequences of 16 rows: all tiles together have {size} scores, and "
        f"the whole square {640 * 640}; a tile needs the keys that one of its rows sees, no others",
    )
    longest = max(rows.stop - rows.start for rows, _, _ in tiles)
    holds(longest <= model.TILE_ROWS, f"a tile has {longest} rows, more than TILE_ROWS")


def test_row_tiles__small_tiles_of_subtrees_end_with_them():
    end = [i // 50 * 50 + 50 for i in range(200)]               # 4 sequences of 50 rows
    stops = [rows.stop for rows, _, _ in model.row_tiles(plan_of(end))]
    start = 0
    for stop in stops:
        check(f"4 sequences of 50 rows: the tile from row {start} on ends before row", stop,
              model.tile_stop(start, torch.tensor(end)), "by tile_stop")
        start = stop


def test_row_tiles__right_keys_after_skipped_siblings():
    (_, keys, masked), = model.row_tiles(plan_of(TREE, 5))
    check(f"end {TREE}, rows from 5 on: keys, masked", [keys, masked],
          [[0, 1, 2, 5, 6], [[True], [False]]], "3 and 4 end at row 5: no row here sees them")


def test_row_tiles__right_keys_that_all_see_have_no_column():
    with patch.object(model, "TILE_ROWS", 4):
        tiles = model.row_tiles(plan_of([9, 9, 5, 5, 5, 9, 9, 9, 9], 2))
    check("end 9 9 5 5 5 9 9 9 9, rows from 2 on, tiles of 4 rows: keys and masked of the first",
          tiles[0][1:], [[0, 1, 2, 3, 4], [[True, True], [False, True], [False, False]]],
          "key 2 is seen by all of rows 2, 3, 4, though it ends before the stream does")


def gradients(end, skip=0, seed=0):
    """{name: (got, by small steps)}: gradients of sum(g out) of TileAttention with 4 query heads
    and 2 key heads."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (len(end) - skip, 4), (len(end), 2), (len(end), 2), (len(end) - skip, 4)
    q, k, v, g = (torch.randn(*shape, 2, generator=rng, dtype=torch.float64) for shape in shapes)
    plan = plan_of(end, skip)

    def total(q, k, v):
        return (
            g * model.TileAttention.forward(SimpleNamespace(save_for_backward=id_of), q, k, v, plan)
        ).sum()

    def id_of(*saved):
        pass

    def by_steps(n):
        xs = [q.clone(), k.clone(), v.clone()]
        slopes = torch.zeros_like(xs[n])
        for place in np.ndindex(*xs[n].shape):
            values = []
            for step in (1e-5, -1e-5):
                before = xs[n][place].item()
                xs[n][place] = before + step
                values.append(total(*xs))
                xs[n][place] = before
            slopes[place] = (values[0] - values[1]) / 2e-5
        return slopes

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    (g * model.TileAttention.apply(*inputs, plan)).sum().backward()
    return {name: (x.grad, by_steps(n)) for n, (name, x) in enumerate(zip("qkv", inputs))}


def check_gradient(name):
    for end, skip, rows in ((TREE, 0, 128), (TREE, 0, 3), ([6, 6, 4, 4, 6, 6], 2, 2)):
        with patch.object(model, "TILE_ROWS", rows):
            got, want = gradients(end, skip)[name]
        check(f"the gradient of {name}, end {end}, rows from {skip} on, tiles of {rows}", got, want,
              "wanted: by small steps of 1e-5 through forward", 1e-5)


def test_TileAttention_backward__dv():
    check_gradient("v")


def test_TileAttention_backward__dq():
    check_gradient("q")


def test_TileAttention_backward__dk():
    check_gradient("k")


def summed_over_tiles(name):
    """The gradient of key or value 0 in bfloat16. 64 tiles of one row add 1 to it, after one that
    adds 256; row i sees keys 0 and i with equal weight."""
    T = 66
    do = [0, 512] + [2] * 64
    rows = {"q": [1] * T, "k": [0] * T, "v": [2] + [0] * (T - 1)}
    xs = [heads(x).bfloat16().requires_grad_() for x in rows.values()]
    with patch.object(model, "TILE_ROWS", 1):
        out = model.TileAttention.apply(*xs, plan_of([T, *range(2, T + 1)]))
        out.backward(heads(do).bfloat16())
    return dict(zip(rows, xs))[name].grad[0, 0, 0]


def check_summed_over_tiles(name):
    check(f"bfloat16, tiles of one row that add 256, then 64 times 1: d{name} of row 0",
          summed_over_tiles(name), 320.0,
          "in bfloat16, 256 + 1 is 256: sum in full_precision, and cast at the end", 0.01)


def test_TileAttention_backward__dv_is_summed_in_full_precision():
    check_summed_over_tiles("v")


def test_TileAttention_backward__dk_is_summed_in_full_precision():
    check_summed_over_tiles("k")


def saved_by_tiles():
    """A context in which TileAttention.forward has saved, in bfloat16."""
    xs = [heads([1, 2, 3]).bfloat16() for _ in range(3)]
    ctx = SimpleNamespace()
    ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
    model.TileAttention.forward(ctx, *xs, plan_of([3, 2, 3]))
    return ctx


def test_TileAttention_backward__dk_and_dv_have_the_dtype_of_q():
    got = model.TileAttention.backward(saved_by_tiles(), heads([1, 2, 3]).bfloat16())
    check("bfloat16: dtypes of dq, dk, dv", [str(x.dtype) for x in got[:3]], ["torch.bfloat16"] * 3)


def test_TileAttention_backward__dq_leaves_what_was_saved():
    ctx = saved_by_tiles()
    keeps("TileAttention.backward", lambda do, *saved: model.TileAttention.backward(ctx, do),
          heads([1, 2, 3]).bfloat16(), *ctx.saved_tensors)


def logits_of(z):
    """hidden (N, D) and head (V, D) whose products are these logits (N, V)."""
    return tensor(z), torch.eye(len(z[0])).double()


def test_TokenLogprobs_forward__value():
    hidden, head = logits_of([[0, math.log(3)], [0, math.log(3)], [1000, 0]])
    got = model.TokenLogprobs.apply(hidden, head, torch.tensor([0, 1, 1]))
    check("logits (0, log 3), targets 0 and 1; logits (1000, 0), target 1", got,
          [math.log(1 / 4), math.log(3 / 4), -1000],
          "p = exp(z) / sum exp(z); exp(1000) overflows, log sum exp does not")


def test_TokenLogprobs_forward__value_of_half_precision_is_full():
    hidden, head = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = model.TokenLogprobs.apply(hidden, head, torch.arange(40))
    want = (hidden @ head.T).double().log_softmax(-1).diagonal()
    check(
        "40 rows of bfloat16: log p", got, want, "sums of exponentials are taken in float32", 1e-5
    )
    check("the dtype of that", str(got.dtype), "torch.float32")


def test_TokenLogprobs_forward__parts():
    hidden, head = torch.ones(60, 4).double(), torch.ones(50, 4).double()
    with patch.object(model.TokenLogprobs, "LOGITS", 500), Largest() as largest:
        got = model.TokenLogprobs.apply(hidden, head, torch.zeros(60, dtype=torch.long))
    check("60 equal rows, 50 words: log p", got, [math.log(1 / 50)] * 60)
    holds(
        largest.size <= 600,
        f"LOGITS is 500, and a tensor of {largest.size} numbers was made; all "
        f"logits at once are {60 * 50}: take so many rows at a time that they have 500",
    )


def test_TokenLogprobs_forward__parts_of_what_is_saved():
    head = torch.ones(50, 4)
    got = model.TokenLogprobs.apply(torch.ones(3, 4, requires_grad=True).bfloat16(), head,
                                    torch.tensor([0, 1, 2]))
    kinds = {str(x.dtype) for x in got.grad_fn.saved_tensors if x.shape == head.shape}
    check("hidden bfloat16, head float32: dtypes of saved tensors of the head's shape",
          sorted(kinds), ["torch.float32"],
          "save head itself: a cast copy would lie in memory until the backward pass")


def test_TokenLogprobs_forward__value_of_no_row():
    got = model.TokenLogprobs.apply(torch.ones(0, 4).double(), torch.ones(5, 4).double(),
                                    torch.zeros(0, dtype=torch.long))
    check("no row: log p", got, [], "N may be 0: a rank may have nothing to score (deal)")


def test_TokenLogprobs_forward__parts_have_one_row_at_least():
    hidden, head = logits_of([[0, math.log(3)], [0, math.log(3)]])
    with patch.object(model.TokenLogprobs, "LOGITS", 1):
        got = model.TokenLogprobs.apply(hidden, head, torch.tensor([0, 1]))
    check("logits (0, log 3) twice, LOGITS 1, targets 0 and 1", got,
          [math.log(1 / 4), math.log(3 / 4)], "one row has more logits than a part: still one row")


def test_TokenLogprobs_forward__parts_are_of_logits_in_part():
    hidden, head = torch.ones(60, 4).double(), torch.ones(50, 4).double()
    with patch.object(model.TokenLogprobs, "logits_in_part", lambda device: 450):
        with Largest() as largest:
            got = model.TokenLogprobs.apply(hidden, head, torch.zeros(60, dtype=torch.long))
    check("60 equal rows, 50 words, 9 rows at a time, the last part shorter: log p", got,
          [math.log(1 / 50)] * 60)
    holds(largest.size <= 450, f"logits_in_part is 450, a tensor of {largest.size} was made")


def test_TokenLogprobs_forward__parts_have_as_many_rows_as_fit():
    hidden, head = torch.ones(60, 4).double(), torch.ones(50, 4).double()
    with patch.object(model.TokenLogprobs, "LOGITS", 500), Products() as products:
        model.TokenLogprobs.apply(hidden, head, torch.zeros(60, dtype=torch.long))
    check("60 rows, 50 words, LOGITS 500: products", products.count, 6, "ten rows at a time")


def test_TokenLogprobs_forward__value_casts_head_to_the_dtype_of_hidden():
    hidden, head = torch.ones(1, 1).bfloat16(), torch.tensor([[0.0], [1.00390625 + 0.0001]])
    got = model.TokenLogprobs.apply(hidden, head, torch.tensor([0]))
    z = head.bfloat16()[1].item()
    check("hidden bfloat16, head float32: log p", got, [-math.log(1 + math.exp(z))])


def logprob_gradients(z, targets, g, **limits):
    """Gradients of sum(g log p) for hidden and head, as logits_of makes them."""
    hidden, head = (x.requires_grad_() for x in logits_of(z))
    with (
        patch.multiple(model.TokenLogprobs, **limits)
        if limits
        else patch.object(model, "PAGE", model.PAGE)
    ):
        (
            tensor(g) * model.TokenLogprobs.apply(hidden, head, torch.tensor(targets))
        ).sum().backward()
    return hidden.grad, head.grad


def test_TokenLogprobs_backward__hidden():
    got, _ = logprob_gradients([[0, math.log(3)], [0, math.log(3)]], [0, 1], [1.0, 10.0])
    check(
        "logits (0, log 3) twice, targets 0 and 1, gradients 1 and 10: of hidden",
        got,
        [[0.75, -0.75], [-2.5, 2.5]],
        "dz = g (onehot(target) - p), p = (1/4, 3/4); head is the identity",
    )


def test_TokenLogprobs_backward__head():
    _, got = logprob_gradients([[0, math.log(3)]], [0], [2.0])
    check("logits (0, log 3), target 0, gradient 2: of head", got,
          [[0, 1.5 * math.log(3)], [0, -1.5 * math.log(3)]], "dz' hidden, dz = 2 (3/4, -3/4)")


def test_TokenLogprobs_backward__parts():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((30, 100))
    targets = rng.integers(0, 100, 30)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    with Largest() as largest:
        got, _ = logprob_gradients(z.tolist(), targets.tolist(), [1.0] * 30, LOGITS=900)
    check("30 rows, 100 words, LOGITS 900 (32 words at a time at most): of hidden",
          got, np.eye(100)[targets] - p, "a target is counted from the part's first word")
    made = largest.size
    holds(made <= 100 * 100, f"a tensor of {made} numbers was made")


def test_TokenLogprobs_backward__parts_never_hold_all_logits():
    hidden = torch.ones(400, 2).double().requires_grad_()
    head = torch.ones(200, 2).double().requires_grad_()
    with patch.object(model.TokenLogprobs, "LOGITS", 8000), Largest() as largest:
        model.TokenLogprobs.apply(hidden, head, torch.zeros(400, dtype=torch.long)).sum().backward()
    holds(
        largest.size <= 8000,
        f"400 rows, 200 words, LOGITS 8000: a tensor of {largest.size} numbers "
        "was made; compute logits again for some of the vocabulary at a time",
    )


class Products(TorchDispatchMode):
    """Counts the products of matrices that are made meanwhile."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return function(*args, **(kwargs or {}))


def test_TokenLogprobs_backward__parts_have_sixteen_words_at_least():
    hidden = torch.ones(64, 2).double().requires_grad_()
    head = torch.ones(160, 2).double().requires_grad_()
    with patch.object(model.TokenLogprobs, "LOGITS", 64):
        got = model.TokenLogprobs.apply(hidden, head, torch.zeros(64, dtype=torch.long)).sum()
        with Products() as products:
            got.backward()
    holds(products.count <= 40, f"64 rows, 160 words, LOGITS 64: {products.count} products; "
          "sixteen words at a time, the least, are ten parts of three products each")


def test_TokenLogprobs_backward__hidden_is_summed_in_full_precision():
    head = -torch.full((1024, 1), 1 / 16)
    head[:16] = torch.tensor([0, -32])[torch.arange(16) % 2, None]
    hidden = torch.zeros(1, 1).bfloat16().requires_grad_()
    with patch.object(model.TokenLogprobs, "LOGITS", 16):
        got = model.TokenLogprobs.apply(hidden, head.requires_grad_(), torch.tensor([0]))
        got.backward(torch.tensor([1024.0]))
    check("bfloat16, 64 parts of the vocabulary that add 256, then 63 times 1: d hidden",
          hidden.grad, [[319.0]],
          "in bfloat16, 256 + 1 is 256: sum in full_precision, and cast at the end", 0.01)


def test_TokenLogprobs_backward__hidden_of_no_row():
    hidden = torch.ones(0, 2).double().requires_grad_()
    head = torch.ones(3, 2).double().requires_grad_()
    model.TokenLogprobs.apply(hidden, head, torch.zeros(0, dtype=torch.long)).sum().backward()
    check("no row: the gradient of hidden", hidden.grad, [], "N may be 0")
    check("no row, 3 words: the gradient of head", head.grad, [[0, 0]] * 3)


def test_TokenLogprobs_backward__parts_leave_the_targets():
    targets = torch.tensor([0, 39, 20])
    hidden = torch.ones(3, 2).double().requires_grad_()
    head = torch.ones(40, 2).double().requires_grad_()
    with patch.object(model.TokenLogprobs, "LOGITS", 1):
        model.TokenLogprobs.apply(hidden, head, targets).sum().backward()
    check("targets 0 39 20, three parts: targets after the backward pass", targets, [0, 39, 20])


def test_TokenLogprobs_backward__parts_are_of_logits_in_part():
    hidden = torch.ones(10, 2).double().requires_grad_()
    head = torch.ones(160, 2).double().requires_grad_()
    with patch.object(model.TokenLogprobs, "logits_in_part", lambda device: 320):
        got = model.TokenLogprobs.apply(hidden, head, torch.zeros(10, dtype=torch.long)).sum()
        with Products() as products:
            got.backward()
    check("10 rows, 160 words, logits_in_part 320: products", products.count, 15)


def test_common_prefix__by_hand():
    for sequences, want, why in (
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]], 2, ""),
        ([[5], [6]], 0, ""),
        ([[1, 2], [1, 2, 3]], 1, "one item of each must be left"),
        ([[1, 2, 3]], 2, "one item must be left"),
        ([[7], [7]], 0, "the same"),
        ([[3, 1, 9], [3, 2, 9], [3, 1, 9]], 1, "what is alike later does not count"),
        ([[4, 3, 7], [4, 1, 7], [4, 3, 7]], 1, "every sequence counts"),
        ([[1, 1, 1, 0], [1, 1]], 1, "one item of the shortest must be left, wherever it stands"),
    ):
        check(f"common_prefix({sequences})", data.common_prefix(sequences), want, why)


def test_common_prefix__leaves_its_argument():
    keeps("common_prefix([[1, 2, 3], [1, 2, 4]])", data.common_prefix, [[1, 2, 3], [1, 2, 4]])


# instruction 1, prompts 1 2 3 and 1 8, answers 4 5 $, 6 7 $ and 9 $, with $ = 0
BRANCHES = [([1, 2, 3], [(4, [4, 5, 0]), (7, [6, 7, 0])]), ([1, 8], [(2, [9, 0])])]
LAID_OUT = "lay_out([1], [([1, 2, 3], [(4, [4, 5, 0]), (7, [6, 7, 0])]), ([1, 8], [(2, [9, 0])])])"


def test_lay_out__tokens():
    check(f"{LAID_OUT}.tokens", data.lay_out([1], BRANCHES).tokens, [1, 2, 3, 4, 5, 6, 7, 8, 9],
          "the root once, then prompt and answers, depth first; an end mark is never fed")


def test_lay_out__tokens_without_a_root_or_branches():
    p = data.lay_out([], [([1, 2], [(0, [3, 0])]), ([4], [(1, [5, 0])])])
    check("lay_out([], [([1, 2], [(0, [3, 0])]), ([4], [(1, [5, 0])])]): tokens, end",
          [p.tokens, p.end], [[1, 2, 3, 4, 5], [3, 3, 3, 5, 5]])
    p = data.lay_out([0], [])
    check("lay_out([0], []): tokens, end, rows", [p.tokens, p.end, p.rows], [[0], [1], []])


def test_lay_out__end():
    check(f"{LAID_OUT}.end", data.lay_out([1], BRANCHES).end, [9, 7, 7, 5, 5, 7, 7, 9, 9],
          "the row after a token's subtree: 2 3 are over after both answers, 4 5 after themselves")
    check("the dtype of that", str(data.lay_out([1], BRANCHES).end.dtype), "torch.int64")


def test_lay_out__scored():
    p = data.lay_out([1], BRANCHES)
    check(f"{LAID_OUT}: rows, targets", [p.rows, p.targets],
          [[2, 3, 4, 2, 5, 6, 7, 8], [4, 5, 0, 6, 7, 0, 9, 0]],
          "row 2, the prompt's last, is asked for the first token of both answers")
    check(f"{LAID_OUT}.answer", p.answer, [4, 4, 4, 7, 7, 7, 2, 2])


def test_lay_out__scored_tensors_are_int64_even_when_empty():
    p = data.lay_out([0], [])
    check("lay_out([0], []): dtypes of rows, targets, answer",
          [str(x.dtype) for x in (p.rows, p.targets, p.answer)], ["torch.int64"] * 3,
          "torch.tensor([]) is float32, with which nothing can be indexed: name the dtype")


def test_lay_out__tokens_leave_the_arguments():
    keeps(LAID_OUT, data.lay_out, [1], copy.deepcopy(BRANCHES))


def example(prompt, *answers, root=1):
    return Example(list(prompt), [list(a) for a in answers], root)


def tokens_of(packs):
    return [p.tokens.tolist() for p in packs]


def test_pack__whole_the_readme_example():
    p, = data.pack([example([1, 2, 3], [4, 5, 0], [6, 7, 0])], 100)
    check("one example, prompt 1 2 3 with root 1, answers 4 5 0 and 6 7 0: tokens, end, answer",
          [p.tokens, p.end, p.answer], [[1, 2, 3, 4, 5, 6, 7], TREE, [0, 0, 0, 1, 1, 1]])


def test_pack__whole_one_instruction_each_and_examples_in_one_piece():
    examples = [example([1, 2], [3, 0]), example([9, 2], [3, 0]), example([1, 4], [5, 0], [6, 0])]
    packs = data.pack(examples, 100)
    check("roots 1, 9, 1, room for all: tokens", sorted(tokens_of(packs)),
          [[1, 4, 5, 6, 2, 3], [9, 2, 3]], "a pack holds one instruction, once")
    by_answer = {a: t for p in packs for a, t in zip(p.answer.tolist(), p.targets.tolist()) if t}
    check("first target of answers 0 .. 3", [by_answer[n] for n in range(4)], [3, 3, 5, 6],
          "answers are numbered through the examples as they are given")
    packs = data.pack([example([1, 2, 2, 2], [3, 3, 0], [4, 4, 0])], 3)
    check(
        "one example of 8 rows, max_tokens 3: tokens",
        tokens_of(packs),
        [[1, 2, 2, 2, 3, 3, 4, 4]],
        "an example is never torn apart",
    )


def test_pack__fit_longest_first_into_the_first_with_room():
    sizes = (4, 2, 3, 5, 1)
    examples = [example([1] + [n] * n, [7, 0]) for n in sizes]  # n + 1 rows below the root
    packs = data.pack(examples, 10)
    check(
        "rows below the root 5 3 4 6 2, root 1, max_tokens 10: rows of the packs",
        [len(p.tokens) for p in packs],
        [10, 10, 3],
        "6 and 5 open packs; 4 joins 5 (1 + 5 + 4), 3 joins 6 (1 + 6 + 3), 2 finds no room",
    )


def test_pack__fit_is_first_fit_and_not_best_fit():
    packs = data.pack([example([1] + [n] * n, [0]) for n in (6, 4, 4, 1)], 10)
    check("rows below the root 6 4 4 1, root 1, max_tokens 10: rows of the packs",
          [len(p.tokens) for p in packs], [9, 8],
          "6 opens a pack, 4 and 4 another; 1 goes into the first that has room, though it leaves "
          "more room there")


def test_pack__fit_counts_the_root_when_packs_are_sorted():
    packs = data.pack([example([1, 2, 2, 2, 2], [0]), example([3] * 5 + [4] * 3, [0], root=5)], 10)
    check("a root of 1 with 4 rows below, a root of 5 with 3: rows of the packs",
          [len(p.tokens) for p in packs], [8, 5], "the largest first, the root included")


def test_pack__apart():
    p, = data.pack([example([1, 2, 3], [4, 5, 0], [6, 7, 0])], 100, share=False)
    check(
        "share=False: tokens, end",
        [p.tokens, p.end],
        [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7], [5] * 5 + [10] * 5],
        "each answer has a prompt of its own",
    )
    packs = data.pack([example([1, 2, 3], [4, 5, 0], [6, 7, 0])], 5, share=False)
    check(
        "share=False, max_tokens 5: an example's answers, in packs",
        [p.answer.unique() for p in packs],
        [[0, 1]],
        "an example is never torn apart, however it is packed",
    )


def test_pack__whole_leaves_its_arguments():
    keeps("pack of two examples", data.pack,
          [example([1, 2, 3], [4, 5, 0], [6, 7, 0]), example([1, 4], [5, 0])], 100)


def test_pack__apart_is_first_fit_too():
    two = [example([1, 2], [3, 0]), example([1, 4], [5, 0])]
    check("share=False, two examples of 3 rows, max_tokens 6: rows of the packs",
          [len(p.tokens) for p in data.pack(two, 6, share=False)], [6])
    check("share=False, two examples of 3 rows, max_tokens 5: rows of the packs",
          [len(p.tokens) for p in data.pack(two, 5, share=False)], [3, 3])


def test_pack__whole_roots_are_compared_to_their_ends():
    two = [example([1, 2, 3], [4, 0], root=2), example([1, 5, 3], [4, 0], root=2),
           example([1, 6], [4, 0], root=1)]
    check("roots 1 2, 1 5 and 1: tokens", sorted(tokens_of(data.pack(two, 100))),
          [[1, 2, 3, 4], [1, 5, 3, 4], [1, 6, 4]], "one pack a root")


def test_sft_loss__divides_by_the_count_of_the_whole_step():
    parts = [train_sft.sft_loss(tensor(x), 3) for x in ([-1, -2], [-6], [])]
    check("log p (-1, -2), (-6) and () in packs of a step of 3 tokens", parts, [1, 2, 0],
          "summed they are 3, the mean over the tokens; not the mean over each pack")


def test_sft_loss__has_a_gradient():
    has_gradient("sft_loss of log p (-1, -2), count 4", lambda x: train_sft.sft_loss(x, 4),
                 tensor([-1, -2]))


def test_lr_at__is_half_a_cosine():
    check("lr_at of steps 0 .. 4 of 4, peak 2", [train_sft.lr_at(s, 4, 2.0) for s in range(5)],
          [2, 1.70710678, 1, 0.29289322, 0], "peak (1 + cos(pi step / steps)) / 2")


def test_lr_at__has_no_warm_up():
    check("lr_at of steps 0 and 1 of 100, peak 2", [train_sft.lr_at(s, 100, 2.0) for s in (0, 1)],
          [2, 1 + math.cos(math.pi / 100)])


def test_batches__every_number_once_an_epoch():
    got = list(train_sft.batches(10, 4, 2, 7))
    check(
        "batches(10, 4, 2 epochs, seed 7): their lengths", [len(b) for b in got], [4, 4, 2, 4, 4, 2]
    )
    for epoch in (got[:3], got[3:]):
        check("... the numbers of an epoch, sorted", sorted(sum(epoch, [])), list(range(10)))
    holds(got[:3] != got[3:], f"both epochs have the order {got[:3]}")


def test_batches__order_follows_from_seed_and_epoch():
    first = list(train_sft.batches(40, 9, 2, 7))
    check("the same call again", list(train_sft.batches(40, 9, 2, 7)), first)
    check(
        "one epoch of two: the first one's batches", list(train_sft.batches(40, 9, 1, 7)), first[:5]
    )
    holds(list(train_sft.batches(40, 9, 2, 8)) != first, "seed 8 gives the order of seed 7")
    holds(sum(first[:5], []) != list(range(40)), "the order is 0, 1, 2, ...")


def test_batches__do_not_depend_on_what_else_is_drawn():
    alone = list(train_sft.batches(40, 9, 2, 7))
    both = zip(train_sft.batches(40, 9, 2, 7), train_sft.batches(40, 9, 2, 8))
    check("batches(40, 9, 2, 7), taken in turns with those of seed 8", [a for a, _ in both], alone,
          "a generator of its own for each epoch, np.random.default_rng(...), not np.random.seed")


def test_batches__first_epoch_depends_on_the_seed_and_not_on_the_size():
    first = [sum(train_sft.batches(40, 9, 1, seed), []) for seed in (7, 8)]
    holds(first[0] != first[1], "the first epoch of seed 8 has the order of seed 7")
    check("the order of an epoch in batches of 4", sum(train_sft.batches(40, 4, 1, 7), []),
          first[0], "the same as in batches of 9: it depends on (seed, epoch) alone")


def packs_of(*sizes):
    """Packs of so many tokens, with one scored pair each."""
    one = torch.zeros(1, dtype=torch.long)
    return [
        Pack(torch.zeros(n, dtype=torch.long), torch.full((n,), n), one, one, one) for n in sizes
    ]


def dealt(packs, ranks):
    """What each rank gets: the sizes of its packs, 0 for an empty one."""
    hands = [data.deal(packs, rank, ranks) for rank in range(ranks)]
    return [[len(p.tokens) if len(p.rows) else 0 for p in hand] for hand in hands]


def test_deal__once_and_the_same_number_to_all():
    for ranks in (1, 2, 3):
        got = dealt(packs_of(8, 5, 3, 2, 2, 1), ranks)
        check(f"packs of 8 5 3 2 2 1, {ranks} ranks: all that is dealt",
              sorted(sum(got, []), reverse=True), [8, 5, 3, 2, 2, 1])
        check("... how many each rank has", [len(hand) for hand in got], [6 // ranks] * ranks)


def test_deal__balance_longest_first_to_the_lightest():
    check(
        "packs of 1 2 3 6 7 8, 3 ranks",
        dealt(packs_of(1, 2, 3, 6, 7, 8), 3),
        [[8, 1], [7, 2], [6, 3]],
        "8, 7, 6 to ranks 0, 1, 2; then 3 to the lightest, 2; ...",
    )
    check("packs of 9 2 2 2, 2 ranks", dealt(packs_of(9, 2, 2, 2), 2), [[9, 2], [2, 2]],
          "nobody gets more than 4 / 2 packs, however light")


def test_deal__empty_packs_keep_ranks_in_step():
    hands = [data.deal(packs_of(5, 4, 3), rank, 2) for rank in range(2)]
    check("packs of 5 4 3, 2 ranks: how many each has", [len(hand) for hand in hands], [2, 2])
    empty, = [p for hand in hands for p in hand if len(p.rows) == 0]
    check("the one that fills up: tokens, end, targets", [empty.tokens, empty.end, empty.targets],
          [[0], [1], []])


def test_deal__once_leaves_its_argument():
    keeps("deal, packs of 1 2 3", data.deal, packs_of(1, 2, 3), 0, 2)


def test_deal__balance_adds_up_tokens():
    check("packs of 6 4 3 2 1 1, 2 ranks", dealt(packs_of(6, 4, 3, 2, 1, 1), 2),
          [[6, 2, 1], [4, 3, 1]], "tokens, not their squares")
    check("packs of 9 5 5 4 4 3, 2 ranks", dealt(packs_of(9, 5, 5, 4, 4, 3), 2),
          [[9, 4, 3], [5, 5, 4]], "to the lightest, not in turns there and back")


# ================================================================== set 3
def draw(p, n, temperature, top_p):
    """How often each token is drawn of n draws with probabilities p."""
    logits = tensor(p).log().expand(n, len(p))
    drawn = model.draw_token(logits, torch.arange(n), torch.full((n,), 5), temperature, top_p)
    return (torch.bincount(drawn, minlength=len(p)) / n).double()


def test_draw_token__greedy():
    logits = tensor([[1, 5, 2], [9, 0, 0]])
    seed = torch.tensor([3, 4])
    for temperature, top_p in ((0, 0.95), (1.0, 0)):
        check(f"logits (1, 5, 2) and (9, 0, 0), temperature {temperature}, top_p {top_p}",
              model.draw_token(logits, seed, seed, temperature, top_p), [1, 0])


def test_draw_token__nucleus():
    got = draw([0.15, 0.5, 0.05, 0.3], 20000, 1.0, 0.8 - 1e-9)
    check("p .15 .5 .05 .3, top_p just below 0.8: shares of 20000 draws", got, [0, 0.625, 0, 0.375],
          "before .15 come .5 + .3, no less than top_p: it is out; .5 and .3 keep their proportion",
          0.012)
    got = draw([0.5, 0.5], 20000, 1.0, 0.3)
    check(
        "p .5 .5, top_p 0.3", got, [0.5, 0.5], "neither is strictly likelier than the other", 0.012
    )


def test_draw_token__nucleus_ends_where_top_p_is_reached():
    check("p .5 .25 .25, top_p 0.5: shares of 2000 draws", draw([0.5, 0.25, 0.25], 2000, 1.0, 0.5),
          [1, 0, 0], "before .25 comes .5: that is not below top_p, so .25 is out")


def test_draw_token__nucleus_of_probabilities_at_the_temperature():
    check("p .2 .8 at temperature 1/2: shares of 20000 draws", draw([0.2, 0.8], 20000, 0.5, 1.0),
          [1 / 17, 16 / 17], "logits / T: p squared, .04 to .64", 0.01)
    got = draw([1 / 600] * 600, 20000, 1.0, 1.0)
    holds(
        got.max() < 0.006 and (got > 0).sum() > 590,
        "600 equal tokens: some are drawn too often or never",
    )


def test_draw_token__rows_do_not_depend_on_other_rows():
    rng = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(12, 300, generator=rng)
    seed = torch.randint(0, 2 ** 31, (12,), generator=rng)
    position = torch.arange(12)
    together = model.draw_token(logits, seed, position, 1.0, 0.5)
    alone = [model.draw_token(logits[i:i + 1], seed[i:i + 1], position[i:i + 1], 1.0, 0.5).item()
             for i in range(12)]
    check("12 rows drawn together; wanted: each drawn alone", together, alone,
          "random numbers belong to a row: uniform(seed, position, attempt)")
    one = logits[:1].expand(12, 300)
    holds(len(set(model.draw_token(one, seed, position, 1.0, 0.9).tolist())) > 3,
          "12 seeds draw the same from one row of logits")
    same_seed = seed[:1].expand(12)
    holds(len(set(model.draw_token(one, same_seed, position, 1.0, 0.9).tolist())) > 3,
          "12 positions draw the same from one row of logits")


def test_draw_token__rows_of_nan_end():
    attempts = []
    uniform = model.uniform

    def counted(*arguments):
        attempts.append(1)
        holds(len(attempts) < 500, "logits NaN NaN, and 1 2: 500 draws, and no end. Nothing is "
              "smaller than NaN, nor is NaN * 0 a 0: let such a row accept its first token")
        return uniform(*arguments)

    with patch.object(model, "uniform", counted):
        got = model.draw_token(tensor([[math.nan, math.nan], [1, 2]]), torch.tensor([3, 4]),
                               torch.tensor([5, 6]), 1.0, 0.9)
    check("logits NaN NaN, and 1 2: how many tokens come", len(got), 2)


def test_draw_token__rows_leave_the_arguments():
    seed = torch.tensor([3, 4])
    for temperature in (0, 0.5):
        keeps(f"draw_token, temperature {temperature}", model.draw_token,
              tensor([[1, 5, 2], [9, 0, 0]]), seed, seed.clone(), temperature, 0.9)


def drawn_at(numbers, logits, top_p=0.79):
    """(what draw_token draws of one row at these uniform numbers, how it asked for each)."""
    asked = []

    def uniform(seed, position, attempt):
        asked.append([seed.tolist(), position.tolist(), attempt])
        return torch.full((len(seed),), numbers[len(asked) - 1], dtype=torch.float64)

    with patch.object(model, "uniform", uniform):
        got = model.draw_token(logits, torch.tensor([3]), torch.tensor([7]), 1.0, top_p)
    return got, asked


def test_draw_token__nucleus_of_three_attempts():
    got, asked = drawn_at([0.1, 0.68, 0.9], tensor([[0.15, 0.5, 0.05, 0.3]]).log())
    check("p .15 .5 .05 .3, top_p .79, uniform numbers .1, .68, .9", got, [3],
          "the running sum .15 .65 .70 1 passes .1 at token 0 and .68 at token 2, which are out")
    check("... uniform was asked for (seed, position, attempt)", asked,
          [[[3], [7], 0], [[3], [7], 1], [[3], [7], 2]])


def test_draw_token__nucleus_of_a_rare_first_token():
    numbers = [0.9] * 40 + [0.05]
    got, asked = drawn_at(numbers, tensor([[0.1] + [0.0009] * 1000]).log(), 0.05)
    check("p .1, and .0009 a thousand times, top_p .05; 40 draws outside: token, draws",
          [got, len(asked)], [[0], 41], "draw again until a token is accepted")


def test_draw_token__nucleus_in_full_precision():
    one = torch.zeros(1, 600).bfloat16().expand(6000, 600)
    got = model.draw_token(one, torch.arange(6000), torch.full((6000,), 5), 1.0, 1.0)
    holds(len(set(got.tolist())) > 590, f"600 equal logits in bfloat16, 6000 draws: "
          f"{len(set(got.tolist()))} tokens; divide, add up and compare in full_precision")


def test_draw_token__greedy_where_temperature_is_nearly_0():
    one = torch.tensor([[1.0, 5.0, 2.0]])
    seed = torch.tensor([3])
    check("logits (1, 5, 2) in float32, temperature 1e-40",
          model.draw_token(one, seed, seed, 1e-40, 0.9), [1], "nearly 0: 5 / 1e-40 is infinite")


def test_draw_token__rows_of_nan_have_a_token():
    got = model.draw_token(tensor([[math.nan] * 3]), torch.tensor([3]), torch.tensor([5]), 1.0, 0.9)
    holds(0 <= got.item() < 3, f"three logits NaN: got {got.item()}, wanted any token, 0, 1 or 2")


def verdict(request=None, completion=None, response=None):
    return {"request": request, "completion": completion, "response": response}


def check_verdicts(*cases):
    for text, want, why in cases:
        check(f"parse_verdict({text!r})", data.parse_verdict(text), verdict(*want), why)


def test_parse_verdict__line():
    check_verdicts(
        (f"Request: {H}\nCompletion: {R}\nResponse: {U}", (H, R, U), ""),
        (f"request:{H}\nCOMPLETION:  Compliance\n**Response:** {U}", (H, C, U), "case, markdown"),
        (f"- **Request**: {H}", (H,), "emphasis may end before the colon"),
        (f"Request: {U}\nthen\nRequest: {H}", (H,), "without a block the last line counts"),
        (f"the request: {H} was", (), "a letter stands before the name: prose"),
        ("Request: ambiguous\nCompletion: None\nResponse: harmfully", (), "no verdict words"),
        ("", (), ""),
    )


def test_parse_verdict__block():
    check_verdicts(
        (
            f"Request: {U}\n\nAnswers: \nRequest: {H}\nCompletion: {R}\nResponse: {U}\n",
            (H, R, U),
            "",
        ),
        (f"Answers: \nRequest: {U}\nso\nANSWERS: \nRequest: {H}", (H,), "the last block counts"),
        (f"Answers: \nRequest: {H}\nRequest: {U}", (H,), "in the block the first line counts"),
        (f"the answers: \nRequest: {H}\nRequest: {U}", (U,), "prose is no heading: no block"),
        (
            f"Completion: {R}\n\nAnswers: \nRequest: {H}",
            (H, R),
            "what the block lacks: the last line before",
        ),
        (f"Completion: {R}\n\nAnswers: \nCompletion: None", (), "None in the block is no verdict"),
    )


def test_parse_verdict__line_of_the_docstring():
    check_verdicts(
        (f"Response: {U}, I think.\nRequest: {U} at first.\nAnswers:\n1. **Request:** Harmful\n"
         "Completion: not a refusal", (H, None, U), "the example of the docstring"),
        (f"Request: {H}/{U}", (), "two words are no verdict"),
        (f"Request: {H}: no", (), "taken back"),
        (f"Request:\n{H}", (H,), "a verdict alone on the next line"),
    )


def test_parse_verdict__block_has_headings_of_several_kinds():
    for heading in ("**Answers:**", "Final answers:", "## Answers"):
        check_verdicts((f"Request: {U}\n\n{heading}\nRequest: {H}\nRequest: {U}", (H,),
                        "the first line in the block: see answers_heading"))


def test_parse_verdict__block_begins_on_the_line_of_its_heading():
    check_verdicts((f"Request: {U}\nAnswers: Request: {H}", (H,), "what follows the heading"))


def test_parse_verdict__block_asks_no_other_line():
    check_verdicts((f"Answers:\nRequest: unclear\nRequest: {H}", (), "the first one decides"),
                   (f"Request: {H}\nRequest: unclear", (), "the last one decides"))


def test_parse_verdict__block_may_hold_empty_lines():
    check_verdicts((f"Request: {U}\nAnswers:\n\nSo:\n\nRequest: {H}\nRequest: {U}", (H,),
                    "the block is all that follows"))


def test_parse_verdict__block_of_a_listed_heading():
    check_verdicts((f"4. Final answers:\nRequest: {H}\nRequest: {U}", (H,), "see ANSWERS"))


def test_gold_verdict__one_word():
    for output, response, want in (
        (H, None, verdict(H)),
        (H, "b", verdict(response=H)),
        (f" {U.title()}\n", "b", verdict(response=U)),
        (H, "", verdict(response=H)),
        (R, "b", verdict(None, R)),
        (C.upper(), None, verdict(None, C)),
    ):
        record = {"input": data.format_input("a", response), "output": output}
        check(
            f"gold_verdict: output {output!r}, response {response!r}",
            data.gold_verdict(record),
            want,
        )


def test_gold_verdict__a_trace():
    block = f"Answers: \nRequest: {U}\nCompletion: None\nResponse: {H}"
    for output in (block, f"# Task 1\nIt is {H}.\n\n{block}"):
        record = {"input": data.format_input("a", "b"), "output": output}
        check(f"gold_verdict: output {output!r}", data.gold_verdict(record), verdict(U, None, H))


def test_gold_verdict__what_split_input_finds():
    for text, want in (("plain question", verdict(H)),
                       (data.format_input("a", " None "), verdict(H)),
                       (data.format_input("a", "None of it"), verdict(response=H))):
        got = data.gold_verdict({"input": text, "output": H})
        check(f"gold_verdict: output {H!r}, input {text!r}", got, want,
              "no response, no verdict on one: by split_input")


def test_gold_verdict__a_trace_that_begins_with_a_word():
    record = {"input": data.format_input("a", "b"),
              "output": f"{H.title()} intent is absent.\n\nAnswers: \nRequest: {U}"}
    check(f"gold_verdict: output {record['output']!r}", data.gold_verdict(record), verdict(U),
          "one word is a label only where it is alone")


def test_judge__every_labelled_verdict_must_be_right():
    for said, gold, want, why in (
            (verdict(H, R, U), verdict(H, R, U), True, ""),
            (verdict(H, C, U), verdict(H), True, "only the request is labelled"),
            (verdict(H, C, U), verdict(H, R, U), False, "one of three is wrong"),
            (verdict(None, R, U), verdict(H, R, U), False, "a missing verdict is wrong"),
            (verdict(H, R, U), verdict(), False, "nothing is labelled: nothing is right"),
            (verdict(), verdict(), False, "the same")):
        check(
            f"judge({list(said.values())}, gold {list(gold.values())})",
            mine_hard.judge(said, gold),
            want,
            why,
        )


def test_judge__leaves_its_arguments():
    keeps("judge", mine_hard.judge, verdict(H, R, U), verdict(H))


def sample(said, text="t", finish="stop"):
    return {"text": text, "finish": finish, "tokens": 3, "verdict": said}


def test_judge_by_field__the_first_field_that_differs_decides():
    gold = verdict(H, R, U)
    for verdicts, want, why in (
        (
            [(H, R, U), (H, C, H)],
            [True, False],
            "the request is right in both; the response decides",
        ),
        ([(H, C, H), (U, R, U)], [True, False], "the request decides, though all else is wrong"),
        ([(H, R, H), (H, C, U)], [False, True], "the response is asked before the completion"),
        ([(H, C, U), (H, R, U)], [False, True], "only the completion differs"),
        ([(U, C, U), (U, R, H)], [True, False], "both requests are wrong; the response decides"),
        ([(U, R, U)] * 2, [False, False], "they differ in nothing: judge"),
        ([(H, R, U)] * 2, [True, True], "they differ in nothing: judge"),
    ):
        got = mine_hard.judge_by_field([sample(verdict(*v)) for v in verdicts], gold)
        check(f"judge_by_field({verdicts}, gold {H}, {R}, {U})", got, want, why)


def test_judge_by_field__gaps_are_dropped():
    samples = [sample(verdict(*v)) for v in ((H, R, U), (U, R, None), (U, C, U))]
    check("gold harmful, refusal, unharmful; the second sample has no response",
          mine_hard.judge_by_field(samples, verdict(H, R, U)), [True, None, False])
    samples = [sample(verdict(H)), sample(verdict(U), finish="length"), sample(verdict(None, R, U))]
    check("only the request is labelled; the third sample has none",
          mine_hard.judge_by_field(samples, verdict(H)), [True, False, None],
          "verdicts that are not labelled need not be there")
    samples = [sample(verdict(U)), sample(verdict(None, R, U))]
    check("the only sample without a gap is wrong", mine_hard.judge_by_field(samples, verdict(H)),
          [False, None])
    check("nothing is labelled", mine_hard.judge_by_field([sample(verdict(H))], verdict()), [False])


def test_judge_by_field__leaves_its_arguments():
    keeps("judge_by_field", mine_hard.judge_by_field,
          [sample(verdict(H, R, U)), sample(verdict(U, R))], verdict(H, R, U))


def test_judge_by_field__gaps_do_not_decide():
    samples = [sample(verdict(*v)) for v in ((H, R, U), (U, R, None), (H, C, U))]
    check("the only sample whose request is wrong has no response",
          mine_hard.judge_by_field(samples, verdict(H, R, U)), [True, None, False],
          "of the samples left the request is right in both; the completion decides")


def test_judge_by_field__the_first_field_that_differs_whatever_the_end():
    cut = sample(verdict(H, R, U), finish="length")
    check("a right sample that was cut", mine_hard.judge_by_field([cut], verdict(H, R, U)), [True])
    got = mine_hard.judge_by_field([cut, sample(verdict(U, R, U))], verdict(H, R, U))
    check("a right sample that was cut, and a wrong one", got, [True, False])
    got = mine_hard.judge_by_field([sample(verdict(H, C, U))] * 2, verdict(H, R, U))
    check("twice a right request and a wrong completion", got, [False, False], "judge")


def texts(*some):
    return [sample(None, text) for text in some]


def test_pick_pair__longest():
    got = mine_hard.pick_pair(texts("aa", "b", "cccc", "dd"), [True, True, False, False], "longest",
                              random.Random(0))
    check("correct aa b, incorrect cccc dd, the longest", got, ["aa", "cccc"])
    got = mine_hard.pick_pair(
        texts("aaaaa", "b", "cc"), [None, True, False], "longest", random.Random(0)
    )
    check("aaaaa is neither, b correct, cc incorrect", got, ["b", "cc"])


def test_pick_pair__longest_counts_characters():
    samples = texts("\u00e9\u00e9\u00e9", "eeee", "b")
    for right in ([True, True, False], [False, False, True]):
        got = mine_hard.pick_pair(samples, right, "longest", random.Random(0))
        want = ["eeee", "b"] if right[0] else ["b", "eeee"]
        check(f"\u00e9\u00e9\u00e9, eeee, b, of which are right {right}: the longest", got, want,
              "by characters, 3 and 4, not by bytes, 6 and 4")


def test_pick_pair__random_takes_samples_not_different_texts():
    samples, right = texts("a", "a", "a", "b", "c"), [True, True, True, True, False]
    drawn = [mine_hard.pick_pair(samples, right, "random", random.Random(i)) for i in range(600)]
    check("correct a a a b: the share of a in 600 draws",
          sum(chosen == "a" for chosen, _ in drawn) / 600, 0.75, "each sample is as likely", 0.08)


def test_pick_pair__random():
    samples, right = texts("aa", "b", "cccc", "dd", "e"), [True, True, False, False, None]
    drawn = [mine_hard.pick_pair(samples, right, "random", random.Random(i)) for i in range(60)]
    check("correct aa b, incorrect cccc dd: what 60 generators draw",
          sorted(set(map(tuple, drawn))),
          [["aa", "cccc"], ["aa", "dd"], ["b", "cccc"], ["b", "dd"]])
    again = [mine_hard.pick_pair(samples, right, "random", random.Random(i)) for i in range(60)]
    check("the same generators again", again, drawn, "all chance comes from rng")


def test_pick_pair__leaves_its_arguments():
    for rule in ("longest", "random"):
        keeps(f"pick_pair, {rule}", lambda samples, right: mine_hard.pick_pair(
            samples, right, rule, random.Random(0)), texts("a", "bb", "c"), [True, False, None])


def test_pick_pair__longest_counts_all_characters():
    samples = texts("a      ", "bbb b b", "aaaaaaaa", "c" * 10, " c c c   ")
    right = [True, True, True, False, False]
    got = mine_hard.pick_pair(samples, right, "longest", random.Random(0))
    check("'a      ', 'bbb b b' and 8 a", got, ["a" * 8, "c" * 10])
    got = mine_hard.pick_pair(texts("a" + " " * 8, "bbb", "c"), [True, True, False], "longest",
                              random.Random(0))
    check("'a' and 8 spaces, 'bbb'", got[0], "a" + " " * 8, "spaces are characters, too")


def test_pick_pair__random_draws_from_the_generator_given():
    samples, rng = texts(*"abcdefgh"), random.Random(0)
    drawn = {tuple(mine_hard.pick_pair(samples, [True] * 4 + [False] * 4, "random", rng))
             for _ in range(40)}
    holds(len(drawn) > 4, f"40 draws from one generator: {len(drawn)} pairs of 16")


def test_pick_pair__random_takes_equal_texts_on_both_sides():
    samples, right = texts("a", "a", "b"), [True, False, False]
    drawn = {mine_hard.pick_pair(samples, right, "random", random.Random(i))[1] for i in range(60)}
    check("correct a, incorrect a b: what is rejected", sorted(drawn), ["a", "b"],
          "all of a kind are equally likely")


def test_sample_weights__by_hand():
    for differences, want, why in (
        ([-2, 0, 2], [0.8, 1.0, 1.2], "k = 4: 1, 2 or 3 of 4 answers are wrong"),
        ([2, 0, 0], [1.2, 0.8, 0.8], "the smallest and largest of what was mined"),
        ([-2, -1, 2], [0.8, 0.9, 1.2], "linear between them"),
        ([2, 2], [1, 1], "all equal"),
        ([], [], ""),
    ):
        check(
            f"sample_weights({differences}, gamma 0.2)",
            mine_hard.sample_weights(differences, 0.2),
            want,
            why,
        )


def test_sample_weights__are_floats():
    got = mine_hard.sample_weights([-2, 0, 2], 0.2)
    check("sample_weights([-2, 0, 2], gamma 0.2): of which kind", type(got).__name__, "list")
    holds(all(isinstance(x, float) for x in got),
          f"its items are {[type(x).__name__ for x in got]}, and not floats, as the docstring says")


def test_sample_weights__leave_their_argument():
    keeps("sample_weights([2, -2, 0], gamma 0.2)", mine_hard.sample_weights, [2, -2, 0], 0.2)


RECORDS = [
    {"instruction": "i", "input": f"x{n % 3}", "output": f"Answers: \nRequest: {H}"}
    for n in range(4)
]
GOOD, BAD, NONE = sample(verdict(H), "good"), sample(verdict(U), "bad"), sample(verdict(), "none")
FIRST = {
    3: [GOOD, GOOD, BAD, NONE],
    0: [GOOD, BAD, BAD, BAD],
    1: [GOOD] * 4,
    2: [NONE, NONE, BAD, BAD],
}
SECOND = {0: [GOOD, GOOD, GOOD, BAD], 1: [GOOD, BAD, GOOD, BAD], 2: [BAD] * 4, 3: [GOOD] * 4}
TOLD = "four records x0 x1 x2 x0, all harmful; correct answers of model m: 1 4 0 2, of n: 3 2 0 4; "


def selected(answers, judging="all", pairing="random", seed=0):
    return mine_hard.select(RECORDS, list("abcd"), answers, judging, pairing, 0.2, seed)


def test_select__pairs():
    got, _ = selected([("m", FIRST), ("n", SECOND)])
    check(
        TOLD + "the lines' instruction, input, source, k_correct, k_incorrect, chosen, rejected",
        [
            [
                p[key]
                for key in (
                    "instruction",
                    "input",
                    "source",
                    "k_correct",
                    "k_incorrect",
                    "chosen",
                    "rejected",
                )
            ]
            for p in got
        ],
        [["i", "x0", "a", 1, 3, "good", "bad"], ["i", "x1", "b", 2, 2, "good", "bad"]],
        "x0 is hard for m already (record 0, before 3): it is taken once; x1 is hard for n alone",
    )


def test_select__pairs_an_unfinished_answer_is_incorrect():
    cut = sample(verdict(H), "cut", "length")
    (pair,), _ = selected([("m", {0: [cut, GOOD]})])
    check(
        "a right answer without an end, and one with",
        [pair["chosen"], pair["rejected"]],
        ["good", "cut"],
    )


def test_select__pairs_of_the_released_judge():
    gap = sample(verdict(None, R, U), "gap")
    (pair,), _ = selected([("m", {0: [GOOD, BAD, gap, gap]})], "field")
    check(
        "judging 'field': a right, a wrong, two without the verdict: k_correct, k_incorrect",
        [pair["k_correct"], pair["k_incorrect"]],
        [1, 1],
        "what is dropped counts for neither side",
    )


MANY = [sample(verdict(w), f"{w} {i}") for i, w in enumerate([H, U] * 8)]


def drawn_by(folder="m", number=0, seed=0, before=()):
    """The pair that select draws for a prompt of that number, which has 8 right and 8 wrong
    answers; before: numbers of other hard prompts."""
    answers = {**dict.fromkeys(before, MANY), number: MANY}
    lines, _ = selected([(folder, answers)], seed=seed)
    return lines[-1]["chosen"], lines[-1]["rejected"]


def test_select__pairs_are_seeded():
    asked = "8 right and 8 wrong answers to a prompt: the pair that is drawn"
    check(f"{asked}, by the same call again", drawn_by(), drawn_by())
    check(f"{asked}, where another prompt is hard, too", drawn_by(number=1, before=[0]),
          drawn_by(number=1), "each prompt has a random.Random of its own")
    for what, draws in (("seeds", [drawn_by(seed=n) for n in range(6)]),
                        ("folders", [drawn_by(folder) for folder in "mnopqr"]),
                        ("numbers", [drawn_by(number=n) for n in range(4)])):
        holds(len(set(draws)) > 1, f"{asked} is the same for {len(draws)} {what}, {draws[0]}: its "
              "random.Random is of seed, folder and number")


def test_select__pairs_of_the_longest():
    texts = {0: [sample(verdict(w), w * n) for n, w in enumerate([H, U, H, U, H, U], 1)]}
    (line,), _ = selected([("m", texts)], pairing="longest")
    check("pairing 'longest', right answers of 7, 21 and 35 letters, wrong of 18, 36 and 54",
          [len(line["chosen"]), len(line["rejected"])], [35, 54])


def test_select__pairs_leave_the_arguments():
    keeps("select", mine_hard.select, copy.deepcopy(RECORDS), list("abcd"), [("m", FIRST)], "all",
          "random", 0.2, 0)


def test_select__count():
    _, count = selected([("m", FIRST), ("n", SECOND)])
    names = ("all right", "hard", "all wrong", "answers without verdict")
    check(TOLD + f"counts of {', '.join(names)}", [count[name] for name in names], [2, 4, 2, 3],
          "every model's every prompt, x0's second time too; three answers of m say nothing at all")


def test_select__weights():
    got, _ = selected([("m", FIRST), ("n", SECOND)])
    check(TOLD + "the weights of x0 and x1, gamma 0.2", [p["weight"] for p in got], [1.2, 0.8],
          "k_incorrect - k_correct are 2 and 0, of which the larger weighs more")


def test_select__pairs_of_one_input_and_two_instructions():
    records = [{**RECORDS[0], "instruction": i} for i in ("i", "j")]
    got, _ = mine_hard.select(records, ["a", "b"], [("m", {0: [GOOD, BAD], 1: [GOOD, BAD]})],
                              "all", "random", 0.2, 0)
    check("two records of one input: instructions of the lines", [p["instruction"] for p in got],
          ["i"], "several records make the same input hard: the first counts")
    records = [{**RECORDS[0], "input": x, "instruction": x} for x in ("x", "X ")]
    got, _ = mine_hard.select(records, ["a", "b"], [("m", {0: [GOOD, BAD], 1: [GOOD, BAD]})],
                              "all", "random", 0.2, 0)
    check("inputs 'x' and 'X ': instructions of the lines", [p["instruction"] for p in got],
          ["x", "X "], "other inputs")


def test_select__pairs_have_these_fields():
    got, _ = selected([("m", FIRST)])
    check("the fields of a line", sorted(got[0]), ["chosen", "input", "instruction", "k_correct",
          "k_incorrect", "rejected", "source", "weight"])


def test_select__pairs_stand_as_models_are_named():
    got, _ = selected([("n", {3: [GOOD, BAD]}), ("m", {1: [GOOD, BAD]})])
    check("n makes record 3 hard, then m record 1: inputs", [p["input"] for p in got], ["x0", "x1"],
          "models as they are named, not by their names nor by number")


def test_select__count_of_answers_without_one_verdict():
    half = sample(verdict(None, R, U))
    _, count = selected([("m", {0: [half, half, NONE]})])
    check("two without a request, one without anything", count["answers without verdict"], 1)


def test_select__weights_of_unequal_numbers_of_answers():
    got, _ = selected([("m", {0: [GOOD] + [BAD] * 3, 1: [GOOD, BAD], 2: [GOOD] * 3 + [BAD] * 9})])
    check("k_correct 1 1 3, k_incorrect 3 1 9: weights", [p["weight"] for p in got],
          [1 - 0.2 + 0.4 / 3, 0.8, 1.2], "differences 2 0 6, not shares")


def test_dpo_loss__by_hand():
    got = train_dpo.dpo_loss(*(tensor([x]) for x in (-1, -4, -2, -3)), 0.5, tensor([1.2]))
    check("log pi -1 and -4, log ref -2 and -3, beta 0.5, alpha 1.2", got, [1.2 * 0.31326169],
          "margin (-1 + 2) - (-4 + 3) = 2; -log sigmoid(0.5 * 2) = 0.3133")


def test_dpo_loss__at_the_reference_it_is_alpha_ln_2():
    x, y = tensor([-5, -9]), tensor([-7, -2])
    check(
        "policy = reference, alpha 1 and 0.8",
        train_dpo.dpo_loss(x, y, x, y, 0.1, tensor([1, 0.8])),
        [math.log(2), 0.8 * math.log(2)],
        "not reduced: one number a pair",
    )


def test_dpo_loss__large_margins_are_finite():
    x, zero = tensor([1e4, -1e4]), tensor([0, 0])
    check(
        "margins of 10000 and -10000, beta 1",
        train_dpo.dpo_loss(x, zero, zero, zero, 1.0, tensor([1, 1])),
        [0, 1e4],
        "log(sigmoid(-10000)) is log(0) if computed in two steps: see functional.logsigmoid",
    )


def test_dpo_loss__has_a_gradient():
    reference = tensor([-2, -7]), tensor([-3, -2])
    has_gradient("log pi (-1, -4) and (-8, -1), log ref (-2, -3) and (-7, -2), beta 0.5",
                 lambda w, l: train_dpo.dpo_loss(w, l, *reference, 0.5, tensor([1.2, 1])),
                 tensor([-1, -8]), tensor([-4, -1]))
    has_gradient("policy = reference, a margin of 0, as at the first step",
                 lambda w, l: train_dpo.dpo_loss(w, l, *reference, 0.5, tensor([1.2, 1])),
                 *reference)


def test_dpo_loss__large_margins_have_a_finite_gradient():
    chosen, zero = tensor([1e4, -1e4]).requires_grad_(), tensor([0, 0])
    train_dpo.dpo_loss(chosen, zero, zero, zero, 1.0, tensor([1, 1])).sum().backward()
    check("margins of 10000 and -10000, beta 1: the gradient of log pi_w", chosen.grad, [0, -1],
          "-alpha beta sigmoid(-beta margin)")


def test_dpo_loss__leaves_its_arguments():
    keeps("dpo_loss", train_dpo.dpo_loss, *(tensor([x]) for x in (-1, -4, -2, -3)), 0.5,
          tensor([1.2]))


def test_answer_sums__by_hand():
    got = train_dpo.answer_sums(tensor([-1, -2, -4, -8]), torch.tensor([0, 0, 2, 1]), 4)
    check("log p -1 -2 -4 -8 of answers 0 0 2 1, of 4", got, [-3, -8, -4, 0])
    check("log p in float64: the dtype of that", str(got.dtype), "torch.float64",
          "torch.zeros(n) is float32; logprobs.new_zeros(n) is like logprobs")


def test_answer_sums__has_a_gradient():
    x = tensor([-1, -2, -4]).requires_grad_()
    (train_dpo.answer_sums(x, torch.tensor([1, 0, 1]), 2) * tensor([5, 7])).sum().backward()
    check("gradients 5 and 7 of answers 0 and 1; tokens of answers 1 0 1", x.grad, [7, 5, 7])


def test_answer_sums__leaves_its_arguments():
    keeps("answer_sums", train_dpo.answer_sums, tensor([-1, -2]), torch.tensor([1, 0]), 2)


def pair_figures():
    """Two pairs: the margin of the first is 2, of the second -2."""
    policy = tensor([[-1, -4], [-8, -1]]).requires_grad_()
    got = train_dpo.pairs_loss(
        policy, tensor([[-2, -3], [-7, -2]]), tensor([2, 4]), tensor([1.2, 1]), 0.5, 2.0
    )
    return policy, got


PAIRS = ("pairs_loss(log pi (-1, -4) (-8, -1), log ref (-2, -3) (-7, -2), |w| 2 4, alpha 1.2 1, "
         "beta .5, sft 2)")


def test_pairs_loss__loss():
    _, got = pair_figures()
    check(f"{PAIRS}: preference", got["preference"], [1.2 * 0.31326169, 1.31326169],
          "margins 2 and -2, times beta: -log sigmoid(1), -log sigmoid(-1), times alpha")
    check(f"{PAIRS}: loss", got["loss"], [1.2 * 0.31326169 + 1, 1.31326169 + 4],
          "+ sft * -log pi_w / |w|: 2 * 1 / 2 and 2 * 8 / 4, not times alpha")


def test_pairs_loss__loss_has_a_gradient():
    policy, got = pair_figures()
    got["loss"].sum().backward()
    slopes = [1.2 * 0.5 * 0.26894142, 0.5 * 0.73105858]
    check(f"{PAIRS}: the gradient of log pi", policy.grad,
          [[-slopes[0] - 1, slopes[0]], [-slopes[1] - 0.5, slopes[1]]],
          "alpha beta sigmoid(-beta margin), and sft / |w| on the chosen")


def test_pairs_loss__figures():
    _, got = pair_figures()
    check(
        f"{PAIRS}: the names",
        sorted(got),
        ["accuracy", "chosen_logprob", "loss", "margin", "preference", "rejected_logprob"],
    )
    for name, want in (("accuracy", [1.0, 0.0]), ("margin", [1, -1]), ("chosen_logprob", [-1, -8]),
                       ("rejected_logprob", [-4, -1])):
        check(f"{PAIRS}: {name}", got[name], want)


def test_pairs_loss__figures_at_the_reference():
    policy = tensor([[-1, -4]])
    got = train_dpo.pairs_loss(policy, policy, tensor([2]), tensor([1]), 0.5, 2.0)
    check("policy = reference, a margin of 0: accuracy", got["accuracy"], [0.0],
          "1 only where the margin is above 0: at the first step no pair counts")


def test_pairs_loss__loss_leaves_the_arguments():
    keeps(PAIRS, train_dpo.pairs_loss, tensor([[-1, -4], [-8, -1]]), tensor([[-2, -3], [-7, -2]]),
          tensor([2, 4]), tensor([1.2, 1]), 0.5, 2.0)


def test_pairs_loss__loss_of_no_sft():
    got = train_dpo.pairs_loss(tensor([[-1, -4]]), tensor([[-2, -3]]), tensor([2]), tensor([1.2]),
                               0.5, 0.0)
    check("sft 0: loss", got["loss"], [1.2 * 0.31326169])


def log_p(last, target):
    """A made-up model: log p of a token after another one."""
    return -(last * 0.5 + target * 0.25 + 1)


def stub(tokens, end, rows, targets):
    """Such a model, as Llama is called."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    return scale * log_p(tokens[rows].double(), targets.double())


# instruction 1; prompts 1 2 and 1 4 3; log p of an answer is a sum over its tokens
REFERENCE = [example([1, 2], [2, 0], [4, 6, 0]), example([1, 4, 3], [6, 0], [0])]
WANTED = [[-(1 + .5 + 1) - (1 + 0 + 1), -(1 + 1 + 1) - (2 + 1.5 + 1) - (3 + 0 + 1)],
          [-(1.5 + 1.5 + 1) - (3 + 0 + 1), -(1.5 + 0 + 1)]]


def test_reference_logprobs__values():
    args = SimpleNamespace(max_tokens=100, no_share=False, batch_size=2)
    got = train_dpo.reference_logprobs(stub, REFERENCE, args, ALONE)
    check(
        "log p(t after s) = -(s/2 + t/4 + 1); prompts 1 2, 1 4 3; answers 2 0 | 4 6 0 and 6 0 | 0",
        got,
        WANTED,
        "(pairs, 2): chosen, rejected, each the sum over its tokens",
    )
    check("... needs a gradient?", got.requires_grad, False)


def test_reference_logprobs__packing_changes_nothing():
    for max_tokens, no_share in ((1, False), (100, True), (8, True)):
        args = SimpleNamespace(max_tokens=max_tokens, no_share=no_share, batch_size=1)
        sizes = []

        def noting(tokens, *rest):
            sizes.append(len(tokens))
            return stub(tokens, *rest)

        got = train_dpo.reference_logprobs(noting, REFERENCE, args, ALONE)
        check(f"max_tokens {max_tokens}, no_share {no_share}", got, WANTED)
        want = {(1, False): [4, 5], (100, True): [14], (8, True): [7, 7]}[max_tokens, no_share]
        check("... the tokens of the packs that the model saw", sorted(sizes), want,
              "packs are made by pack(examples, args.max_tokens, not args.no_share)")


def test_reference_logprobs__values_are_float64():
    args = SimpleNamespace(max_tokens=100, no_share=False, batch_size=2)
    got = train_dpo.reference_logprobs(stub, REFERENCE, args, ALONE)
    check("dtype and device", [str(got.dtype), got.device.type], ["torch.float64", "cpu"])


def test_reference_logprobs__values_of_many_pairs():
    args = SimpleNamespace(max_tokens=4000, no_share=False, batch_size=2)
    got = train_dpo.reference_logprobs(stub, REFERENCE * 600, args, ALONE)
    check("1200 pairs: their number", len(got), 1200)
    check("... the last two", got[-2:], WANTED)


def test_reference_logprobs__packing_fills_max_tokens():
    args = SimpleNamespace(max_tokens=8, no_share=False, batch_size=1)
    sizes = []
    train_dpo.reference_logprobs(lambda tokens, *rest: sizes.append(len(tokens))
                                 or stub(tokens, *rest), REFERENCE, args, ALONE)
    check("max_tokens 8, packs of 4 and 5 with a root of 1: tokens", sizes, [8])


# ================================================================== set 4
def test_confusion__by_hand():
    check(
        "confusion: gold H H H U U, predicted H H U H U, positive H",
        evaluation.confusion([H, H, H, U, U], [H, H, U, H, U], H),
        [2, 1, 1, 1],
        "(tp, fp, fn, tn)",
    )
    check("confusion: gold R C C, predicted R R R, positive R",
          evaluation.confusion([R, C, C], [R, R, R], R), [1, 2, 0, 0])


def test_confusion__no_verdict_is_wrong_once():
    check("confusion: gold H U H, predicted None None H, positive H",
          evaluation.confusion([H, U, H], [None, None, H], H), [1, 1, 1, 0],
          "None is fn where gold is positive, and fp where it is not")


def test_confusion__counts_are_ints():
    got = evaluation.confusion([H, U], [H, None], H)
    check("of which kind the counts are", [type(x).__name__ for x in got], ["int"] * 4,
          "json.dumps, which writes results.json, knows no numbers of NumPy")


def test_f1__by_hand():
    check(
        "f1: gold H H H U U, predicted H H U H U",
        evaluation.f1([H, H, H, U, U], [H, H, U, H, U], H),
        200 / 3,
        "2 tp / (2 tp + fp + fn) = 4 / 6, in percent",
    )
    check("f1: all right", evaluation.f1([R, C], [R, C], R), 100)
    check("f1: nothing is positive, and nothing said to be", evaluation.f1([U, U], [U, U], H), 0)
    check("f1: gold H U, predicted None None", evaluation.f1([H, U], [None, None], H), 0)


def test_f1__no_verdict_is_wrong():
    check("f1: gold H H, predicted H None", evaluation.f1([H, H], [H, None], H), 200 / 3, "a miss")
    check("f1: gold H U, predicted H None", evaluation.f1([H, U], [H, None], H), 200 / 3,
          "None where gold is not positive is a false alarm")


def test_bootstrap__interval():
    got = evaluation.bootstrap((60, 20, 20, 100))
    check("the interval of tp 60, fp 20, fn 20, tn 100 (F1 75)", got, [67.1, 82.0],
          "the 2.5th and 97.5th percentile of F1 over resamplings of the 200 rows", 0.015)
    check("the same call again", evaluation.bootstrap((60, 20, 20, 100)), got)


def test_bootstrap__resamplings():
    off = []                                # of the ends, in standard deviations of F1
    for cells, low, high, deviation in (((60, 20, 20, 100), 67.07, 82.02, 3.86),
                                        ((30, 10, 25, 60), 50.67, 73.68, 5.85),
                                        ((90, 40, 15, 30), 70.19, 82.26, 3.08),
                                        ((25, 25, 25, 25), 37.21, 61.26, 6.15),
                                        ((50, 5, 30, 80), 65.08, 81.82, 4.27),
                                        ((40, 30, 10, 10), 56.14, 75.76, 5.0)):
        got = evaluation.bootstrap(cells)
        off += [abs(got[0] - low) / deviation, abs(got[1] - high) / deviation]
    holds(np.mean(off) < 0.1, f"the ends of six intervals are off by {np.mean(off):.2f} standard "
          "deviations of F1; 2000 resamplings are off by 0.05")


def test_bootstrap__edges():
    check("nothing is positive: tp 0, fp 0, fn 0, tn 9", evaluation.bootstrap((0, 0, 0, 9)), [0, 0])
    check("all is right: tp 9", evaluation.bootstrap((9, 0, 0, 0)), [100, 100])
    low, high = evaluation.bootstrap((40, 40, 0, 0))
    check("the interval of tp 40, fp 40 (F1 66.7)", (low, high), [55.9, 75.0],
          "a resample has as many rows as there are, 80; how often to resample is another number",
          0.02)


def test_auprc__distinct_scores():
    check(
        "hits + - +, scores .9 .5 .4",
        evaluation.auprc([True, False, True], [0.9, 0.5, 0.4]),
        100 * (0.5 * 1 + 0.5 * 2 / 3),
        "precision at the hits is 1/1 and 2/3; each gains recall 1/2",
    )
    check("hits - + (scores rise)", evaluation.auprc([True, False], [0.1, 0.7]), 50)
    check("all hits", evaluation.auprc([True, True], [0.2, 0.1]), 100)
    check("no hit", evaluation.auprc([False, False], [0.2, 0.1]), 0)


def test_auprc__ties_share_a_threshold():
    for hits in ([True, False], [False, True]):
        check(f"hits {hits}, scores .5 .5", evaluation.auprc(hits, [0.5, 0.5]), 50,
              "one threshold: precision 1/2, whichever stands first")
    check("hits + + - -, scores .9 .5 .5 .1", evaluation.auprc([True, True, False, False],
                                                                 [0.9, 0.5, 0.5, 0.1]),
          100 * (0.5 * 1 + 0.5 * 2 / 3))


def test_auprc__distinct_scores_stay():
    keeps("auprc", evaluation.auprc, [True, False, True], [0.4, 0.9, 0.5])
    keeps("auprc of arrays", evaluation.auprc, np.array([True, False]), np.array([0.4, 0.9]))


def test_auprc__distinct_scores_that_nearly_agree():
    check("hits - +, scores 1 - 1e-9 and 1", evaluation.auprc([False, True], [1 - 1e-9, 1.0]), 100,
          "only equal scores share a threshold; in float32 these are equal")


def test_auprc__distinct_scores_where_precision_rises():
    check("hits - + +, scores .9 .5 .4", evaluation.auprc([False, True, True], [0.9, 0.5, 0.4]),
          100 * (0.5 * 1 / 2 + 0.5 * 2 / 3), "precision as it is at each threshold")


def test_threshold_for__keeps_the_rate():
    negatives = [i / 10 for i in range(10)]                     # 0.0 .. 0.9, and one positive
    for rate, allowed in ((0.0, 0), (0.1, 1), (0.35, 3), (0.9, 9)):
        t = evaluation.threshold_for([False] * 10 + [True], [*negatives, 0.95], rate)
        wrong = sum(x >= t for x in negatives)
        check(
            f"negatives 0.0 .. 0.9, rate {rate}, threshold {t}: negatives at or above it",
            wrong,
            allowed,
            "at most rate * 10, rounded down; and no lower threshold would do",
        )
        first = negatives[9 - allowed]
        check("... the threshold", t, float(np.nextafter(first, 2)),
              f"the next float above {first}, the first negative too many", 0)


def test_threshold_for__a_rate_that_floats_do_not_hold():
    negatives = [i / 100 for i in range(100)]
    for percent in (7, 29, 57, 58):                             # 0.29 * 100 is 28.999999999999996
        t = evaluation.threshold_for([False] * 100, negatives, percent / 100)
        check(f"negatives 0.00 .. 0.99, rate {percent / 100}: negatives at or above the threshold",
              sum(x >= t for x in negatives), percent)


def test_threshold_for__edges():
    check("rate 1", evaluation.threshold_for([False, True], [0.4, 0.9], 1.0), 0.0)
    t = evaluation.threshold_for([False, False, True], [1.0, 0.2, 1.0], 0.0)
    holds(t > 1, f"a negative has the score 1, rate 0: got {t}, wanted a threshold above 1")
    check("no negative at all, rate 0", evaluation.threshold_for([True], [0.9], 0.0), 0.0)


def test_threshold_for__counts_equal_scores_each():
    for negatives, rate in (([0.9, 0.9, 0.5], 0.34), ([0.9, 0.9, 0.9, 0.5], 0.5)):
        t = evaluation.threshold_for([False] * len(negatives), negatives, rate)
        check(f"negatives {negatives}, rate {rate}: the threshold", t, float(np.nextafter(0.9, 2)),
              "those at .9 are wrong together, and they are too many", 0)


def test_threshold_for__leaves_its_arguments():
    keeps("threshold_for", evaluation.threshold_for, [False, True, False], [0.2, 0.5, 0.9], 0.5)
    keeps("threshold_for of arrays", evaluation.threshold_for, np.array([False, True, False]),
          np.array([0.2, 0.5, 0.9]), 0.5)


def test_weighted_average__by_hand():
    check("figures 50 and 80 of 3 and 1 rows", evaluation.weighted_average([50, 80], [3, 1]), 57.5)


def test_majority__by_hand():
    votes = [verdict(w, None, U) for w in (H, None, U, H)]
    check(
        "request H None U H, completion None, response U",
        evaluation.majority(votes),
        verdict(H, None, U),
    )
    votes = [verdict(w) for w in (None, U, H, H, U)]
    check(
        "request None U H H U",
        evaluation.majority(votes),
        verdict(U),
        "of equally many the first given",
    )
    votes = [verdict(w) for w in (None, None, H)]
    check("request None None H", evaluation.majority(votes), verdict(H), "None is no vote")
    check("no vote at all", evaluation.majority([]), verdict())


def test_majority__leaves_its_argument():
    keeps("majority", evaluation.majority, [verdict(H), verdict(U)])


def test_majority__of_equally_many_the_first():
    for votes in ([U, H, H, U], [H, U, U, H], [H, U], [U, H]):
        check(f"request {votes}", evaluation.majority([verdict(w) for w in votes]),
              verdict(votes[0]))
    check("request None None None U", evaluation.majority([verdict(w) for w in (None,) * 3 + (U,)]),
          verdict(U), "None is no vote, however many")


def test_reasoning_verdict__sections():
    text = (f"# Task 1\nIt looks {H}, but it is {U}.\n# Task 2\nA {R.title()}.\n"
            f"# Task 3\nnothing non{H}")
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U, R),
          "the last whole word of the two under each heading, in lower case")
    text = f"#task 3: {H}\n#  Task 1 {R} {H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(H, None, H))
    check("reasoning_verdict('')", evaluation.reasoning_verdict(""), verdict())


def test_reasoning_verdict__block_is_not_read():
    text = f"# Task 1\n{U}\n# Task 3\nwell\nanswers: \nRequest: {H}\nResponse: {H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U))
    text = f"# Task 1\nAnswers: {U}\nand\nAnswers: \nRequest: {H}"
    check(
        f"reasoning_verdict({text!r})",
        evaluation.reasoning_verdict(text),
        verdict(U),
        "only the last block",
    )
    text = f"Answers: # Task 1 {H}"
    check(
        f"reasoning_verdict({text!r})",
        evaluation.reasoning_verdict(text),
        verdict(H),
        "it is all there is",
    )


def test_reasoning_verdict__sections_of_other_numbers_are_nobodys():
    text = f"# Task 1\n{U}\n# Task 4\n{H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U))


def test_reasoning_verdict__block_may_begin_anywhere():
    text = f"# Task 1\n{U}. Final Answers: {H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U),
          'what follows the last "answers:" is not read, wherever that stands')


def test_reasoning_verdict__block_after_a_text_that_begins_with_one():
    text = f"Answers: # Task 1 {U}\nAnswers: # Task 1 {H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U),
          "the text does not begin with the last one")


def test_reasoning_verdict__sections_without_spaces():
    text = f"#TASK2: {C}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(None, C))


def test_reasoning_verdict__sections_of_number_9_are_nobodys():
    text = f"# Task 1\n{U}\n# Task 9\n{H}\n# Task 0\n{H}\n# Task 10\n{H}"
    check(f"reasoning_verdict({text!r})", evaluation.reasoning_verdict(text), verdict(U))


def check_legacy(gold, text, name, want, why=""):
    check(f"legacy_pairs([{gold!r}], [{text[-60:]!r}], {name!r})",
          evaluation.legacy_pairs([gold], [text], name), want, why)


def test_legacy_pairs__found():
    check_legacy(H, f"so\nRequest: {U}", "request", [[H, U]])
    check_legacy(U, f"Response: {H}\nResponse: {U}", "response", [[U, H]], "the first match counts")
    check_legacy(
        R,
        f"Completion: {C}" + " " * 280 + f"COMPLETION:{R.upper()}!",
        "completion",
        [[R, R]],
        "only the last 300 characters are looked at; any case, no space needed",
    )
    check_legacy(
        H,
        f"request:\n  {H}ly",
        "request",
        [[H, H]],
        "any spaces after the colon, anything after the word",
    )


def test_legacy_pairs__missing():
    check_legacy(H, "nothing", "request", [], "a row labelled harmful is left out")
    check_legacy(U, "nothing", "request", [[U, H]] * 2, "any other counts twice, as the other word")
    check_legacy(R, f"completion {C}", "completion", [[R, C]] * 2, "no colon, no match")
    check_legacy(C, f"completion: {C}" + "x" * 300, "completion", [[C, R]] * 2)


def test_legacy_pairs__found_in_300_characters():
    check_legacy(U, f"request: {H}" + "x" * 285, "request", [[U, H]] * 2,
                 "301 characters: the first one is not looked at, and `equest` is no task")
    check_legacy(U, f"request: {H}" + "x" * 284, "request", [[U, H]], "300 characters")


def test_up_to_verdict__cuts_the_last_block_after_the_colon():
    text = f"Request: {U}\n\nAnswers: \nRequest: {H}\nCompletion: {R}"
    check(f"up_to_verdict({text!r}, 'request')", evaluation.up_to_verdict(text, "request"),
          f"Request: {U}\n\nAnswers: \nRequest:")
    check(f"up_to_verdict({text!r}, 'completion')", evaluation.up_to_verdict(text, "completion"),
          f"Request: {U}\n\nAnswers: \nRequest: {H}\nCompletion:")
    text = f"Answers: \nRequest: {U}\nANSWERS: \nrequest: {H}"
    check(f"up_to_verdict({text!r}, 'request')", evaluation.up_to_verdict(text, "request"),
          f"Answers: \nRequest: {U}\nANSWERS: \nrequest:")


def test_up_to_verdict__takes_no_prose_for_a_verdict_line():
    text = f"Answers: \nThe request is odd: so\nRequest: {H}"
    check(f"up_to_verdict({text!r}, 'request')", evaluation.up_to_verdict(text, "request"),
          "Answers: \nThe request is odd: so\nRequest:",
          "a line that line_pattern finds begins with it")


def test_up_to_verdict__writes_what_is_not_there():
    check(
        "up_to_verdict('I think \\n', 'response')",
        evaluation.up_to_verdict("I think \n", "response"),
        "I think\n\nAnswers: \nResponse:",
    )
    check(f"up_to_verdict('Response: {H}', 'response')",
          evaluation.up_to_verdict(f"Response: {H}", "response"),
          f"Response: {H}\n\nAnswers: \nResponse:", "a line that is in no block is not taken")
    text = f"Response: {H}\n\nAnswers: \nRequest: {U}\n"
    check(f"up_to_verdict({text!r}, 'response')", evaluation.up_to_verdict(text, "response"),
          f"Response: {H}\n\nAnswers: \nRequest: {U}\n\nAnswers: \nResponse:",
          "the block lacks the task: another one is written, after the spaces at the end are gone")


def test_up_to_verdict__takes_the_first_line_of_the_block():
    for text, want in (
        (f"Answers:\nRequest: {H}\nRequest: {U}", "Answers:\nRequest:"),
        (f"Answers:\n1. **Request:** {H}", "Answers:\n1. **Request:"),
        (f"Answers: Request: {H}", "Answers: Request:"),
    ):
        check(f"up_to_verdict({text!r}, 'request')", evaluation.up_to_verdict(text, "request"),
              want, "the first line that line_pattern finds in what follows the heading")


class Letters:
    """A tokenizer whose ids are: a word's length."""

    def encode(self, text):
        return [len(word) for word in text.split(" ") if word] if text != " " else []


def asked(texts, prompts, name, calls=None):
    def noting(tokens, end, rows, targets):
        if calls is not None:
            calls.append(len(tokens))
        return stub(tokens, end, rows, targets)

    return evaluation.verdict_probability(noting, Letters(), prompts, texts, name, ALONE)


def test_verdict_probability__one():
    # after the last token of prompt + text: harmful is 7 letters, unharmful 9, so a - b = 0.5
    check(
        "log p(t after s) = -(s/2 + t/4 + 1), words of 7 and 9 letters",
        asked(["Request:"], [[1, 2]], "request"),
        [1 / (1 + math.exp(-0.5))],
        "a - b = (9 - 7) / 4; p = exp(a) / (exp(a) + exp(b))",
    )
    check("completion: words of 7 and 10 letters", asked(["so"], [[1, 2]], "completion"),
          [1 / (1 + math.exp(-0.75))])


class Long:
    """A tokenizer of letters: a verdict word is several tokens."""

    def encode(self, text):
        return [ord(c) % 8 for c in text]


def test_verdict_probability__one_word_of_several_tokens():
    got = evaluation.verdict_probability(stub, Long(), [[1, 2]], ["Request:"], "request", ALONE)
    total = []
    for word in (" harmful", " unharmful"):
        ids = [ord(":") % 8] + [ord(c) % 8 for c in word]
        total.append(sum(log_p(a, b) for a, b in zip(ids, ids[1:])))
    check("a token a letter: the words' log p are sums, a space before the word included", got,
          [1 / (1 + math.exp(total[1] - total[0]))])


def test_verdict_probability__many():
    calls = []
    prompts = [[5, 1, n] for n in (1, 2, 3)]
    got = evaluation.verdict_probability(
        noting_stub(calls), Long(), prompts, ["Request:", "x", "Request"], "request", ALONE
    )
    alone = [evaluation.verdict_probability(stub, Long(), [p], [t], "request", ALONE)[0]
             for p, t in zip(prompts, ["Request:", "x", "Request"])]
    check("three prompts and texts; wanted: each asked alone, in this order", got, alone)
    whole = sum(3 + len(t) + 16 for t in ("Request:", "x", "Request")) - 2 * 2
    check("... tokens that the model saw", sum(calls), whole,
          "two branches of one prompt share it, and all prompts what they begin with")


def test_verdict_probability__one_is_a_list_of_floats():
    got = asked(["Request:"], [[1, 2]], "request")
    check("of which kind", [type(got).__name__, type(got[0]).__name__], ["list", "float"])


def test_verdict_probability__many_share_a_prompt_and_a_text():
    calls = []
    evaluation.verdict_probability(noting_stub(calls), Long(), [[5, 1, 2]] * 2,
                                   ["Request: so", "Request: no"], "request", ALONE)
    check("one prompt twice, texts 'Request: so' and 'Request: no': tokens that the model saw",
          calls, [3 + 9 + 2 * (2 + 7 + 9)], "what they begin with includes the text's begin")


def noting_stub(calls):
    def call(tokens, end, rows, targets):
        calls.append(len(tokens))
        return stub(tokens, end, rows, targets)

    return call


# ================================================================== set 5, without the kernels
def unread(tables, results):
    """The results of no row, after a check that every other one lies where its row reads."""
    reader = [row for _, lines in tables for line in lines for row in line]
    read = [r for own in results for r in own]
    holds(
        len(set(read)) == len(read) and 0 not in read,
        f"results {results}: one is read twice, or 0 is",
    )
    return sorted(set(range(1, len(reader) + 1)) - set(read))


def test_number_reads__full():
    tables, results = model.number_reads([
        (4, [([0], 0), ([0], 1), ([0], 2), ([0], 3)]),
        (2, [([1], 0), ([1], 1), ([2], 0), ([2], 1)]),
        (1, [([9], 0), ([8], 0), ([7], 0), ([6], 0)])])
    check("the drawing above PAGE: tables", tables,
          [[0, [[0, 1, 2, 3]]], [1, [[0, 1], [2, 3]]], [6, [[3], [2], [1], [0]]]])
    check(
        "the drawing above PAGE: results", results, [[1, 5, 12], [2, 6, 11], [3, 7, 10], [4, 8, 9]]
    )


def test_number_reads__gaps_in_readers():
    tables, results = model.number_reads([(3, [([0, 1], 0), ([], 1), ([0, 1], 2)]),
                                          (1, [([4], 0), ([3], 0), ([2], 0)])])
    check(
        "row 1 reads no page of the first group: tables",
        tables,
        [[0, [[0, 0, 2], [0, 0, 2]]], [2, [[2], [1], [0]]]],
        "its column says row 0; nobody reads the result",
    )
    check("... results", results, [[1, 4, 9], [8], [3, 6, 7]])
    tables, results = model.number_reads([(2, [([], 0), ([], 1)]), (2, [([0], 0), ([0], 1)])])
    check(
        "a group without pages: tables, results", [tables, results], [[[0, [[0, 1]]]], [[1], [2]]]
    )


def test_number_reads__gaps_in_pages():
    tables, results = model.number_reads([(3, [([0], 0), ([0], 1), ([0], 2)]),
                                          (2, [([1], 0), ([1], 1), ([4], 0)]),
                                          (1, [([9, 7], 0), ([6], 0), ([5], 0)])])
    check("pages 2 and 3 are free: tables", tables,
          [[0, [[0, 1, 2]]], [1, [[0, 1], [0, 0], [0, 0], [2, 0]]], [5, [[2], [1], [0], [0], [0]]]])
    check("... results", results, [[1, 4, 16, 14], [2, 5, 13], [3, 10, 12]],
          "in the order of each row's pages: 9 before 7")
    check("... of nobody", unread(tables, results), [6, 7, 8, 9, 11, 15])


def test_number_reads__full_leaves_its_argument():
    keeps("number_reads", model.number_reads, [(2, [([1, 0], 0), ([0, 1], 1)])])
