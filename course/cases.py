"""The instructor's cases: each part of an exercise on random inputs, against its formula written
down here once more. (The grader takes this module out of reach before a function runs: sandbox.py.)

`run(name, part, seed)` raises where the function of that name is wrong; another seed gives other
inputs. What is expected comes from loops over numbers in NumPy, from a property that a right answer
must have, or from one sequence at a time; never from the function itself, nor from a finished twin
of it, as both are blank while an exercise is graded. mistakes.py holds what must not pass.
"""
import math
import random
import re
import zlib
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import test_exercises
from test_exercises import Largest, Products, Watched, has_gradient, keeps

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
FIELDS = {"request": (H, U), "completion": (R, C), "response": (H, U)}
CASES = {}


def case(name, part=""):
    """Register a function of a random generator as the case of a part of an exercise."""
    def register(function):
        CASES[name, part] = function
        return function
    return register


def run(name, part, seed):
    """Run the case of a part of an exercise; the same seed gives the same inputs."""
    mixed = zlib.crc32(f"{seed} {name}".encode())
    torch.manual_seed(mixed)
    random.seed(mixed)
    CASES[name, part](np.random.default_rng(mixed))


def own_tests(exercise, part):
    """The students' own tests of a part of an exercise."""
    module = test_exercises
    if exercise.needs_triton:
        import test_exercises_kernels
        module = test_exercises_kernels
    start = f"test_{exercise.slug}__{part}"
    return [f for name, f in vars(module).items() if name.startswith(start)]


def numbers(x):
    return np.asarray(x.detach().double() if torch.is_tensor(x) else x, dtype=np.float64)


def close(got, want, what, tolerance=1e-9):
    """AssertionError that says by how much `got` misses `want`, relative to the largest number, or
    to 1."""
    is_tensor = torch.is_tensor(got)
    got, want = numbers(got), numbers(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    worst = np.abs(got - want).max(initial=0)
    size = max(1, np.abs(want).max(initial=0))
    is_rounded = is_tensor and tolerance < 1e-8 and worst < 1e-5 * size
    why = ": as if in float32; the inputs are float64, so keep their dtype" if is_rounded else ""
    assert worst <= tolerance * size, f"{what}: off by {worst:.3g}{why}"


def holds(fact, what):
    """AssertionError with a sentence, where `fact` is not true."""
    assert fact, what


def tensor(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def config(**changes):
    from model import LlamaConfig
    fields = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    return LlamaConfig(**{**fields, **changes})


def forest(rng, start, stop, depth=0):
    """`end` of rows start..stop of a random forest, depth first."""
    end = []
    while start < stop:
        size = int(rng.integers(1, min(stop - start, 25) + 1))
        own = int(rng.integers(1, size + 1)) if depth < 4 else size
        end += [start + size] * own + forest(rng, start + own, start + size, depth + 1)
        start += size
    return end


def plan_of(end, skip=0):
    """The TreePlan of a stream, made without tree_plan."""
    from model import TreePlan
    return TreePlan(torch.tensor(end), torch.from_numpy(visible(end).sum(1) - 1), skip)


def visible(end):
    """(T, T) bool: does row i see key j?"""
    return np.array([[j <= i < end[j] for j in range(len(end))] for i in range(len(end))])


def attend_by_hand(q, k, v, end):
    """softmax(q k' / sqrt(E)) v, one row and head at a time; q may be the last rows only."""
    q, k, v = numbers(q), numbers(k), numbers(v)
    (n, heads, E), out = q.shape, np.zeros_like(q)
    for row in range(n):
        i = len(end) - n + row
        keys = [j for j in range(i + 1) if i < end[j]]
        for h in range(heads):
            g = h * k.shape[1] // heads
            s = k[keys, g] @ q[row, h] / math.sqrt(E)
            p = np.exp(s - s.max())
            out[row, h] = p / p.sum() @ v[keys, g]
    return out


def turned(x, angle):
    """RoPE by complex numbers: x (T, H, E), angle (T, E/2)."""
    x, half = numbers(x), x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(angle))[:, None]
    return np.concatenate([z.real, z.imag], -1)


# ------------------------------------------------------------------ set 1


@case("rms_norm")
def _(rng):
    from model import rms_norm
    for shape in ((7,), (3, 16), (2, 5, 64)):
        x, weight, eps = (
            3 * tensor(rng, *shape),
            tensor(rng, shape[-1]),
            float(rng.uniform(0.01, 1)),
        )
        want = (
            numbers(weight) * numbers(x) / np.sqrt((numbers(x) ** 2).mean(-1, keepdims=True) + eps)
        )
        close(rms_norm(x, weight, eps), want, "rms_norm of float64, which stays float64")
    for dtype in (torch.float64, torch.float16):
        got = rms_norm(tensor(rng, 3, 8).to(dtype), torch.ones(8), 1e-5)
        holds(got.dtype == dtype, f"rms_norm of {dtype} is {got.dtype}")
    large = (300 * tensor(rng, 4, 512)).half()  # squares overflow half precision
    got = rms_norm(large, torch.ones(512), 1e-5)
    close(got, numbers(large) / np.sqrt((numbers(large) ** 2).mean(-1, keepdims=True)),
          "mean in at least float32", 2e-3)
    x = tensor(rng, 16, 64).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    off = rms_norm(x, torch.ones(64), 0.0) != exact.bfloat16()
    holds(off.double().mean() < 0.02, "bfloat16: cast no sooner than x / sqrt(...) is there")
    x, weight = tensor(rng, 3, 8), tensor(rng, 8)
    keeps("rms_norm", rms_norm, x, weight, 0.1)
    has_gradient("rms_norm", lambda x, weight: rms_norm(x, weight, 0.1), x, weight)


def check_rope(rng, scaled):
    from model import rope_frequencies
    E, theta = 2 * int(rng.integers(8, 65)), float(rng.uniform(5e3, 1e6))
    low = float(rng.uniform(0.5, 2))
    high = low + float(rng.uniform(1, 4))
    original = int(rng.integers(1000, 9000))
    factor = float(rng.uniform(2, 40))
    scaling = dict(factor=factor, low_freq_factor=low, high_freq_factor=high,
                   original_max_position_embeddings=original)
    want = []
    for i in range(E // 2):
        f = theta ** (-2 * i / E)
        turns = original * f / (2 * math.pi)
        if scaled and turns < low:
            f /= factor
        elif scaled and turns < high:
            s = (turns - low) / (high - low)
            f = s * f + (1 - s) * f / factor
        want.append(f)
    got = rope_frequencies(config(head_dim=E, rope_theta=theta,
                                  rope_scaling=scaling if scaled else None))
    holds(got.dtype == torch.float64, "frequencies are float64")
    close(numbers(got) / np.array(want), np.ones(E // 2), "rope_frequencies, relative")


@case("rope_frequencies", "plain")
def _(rng):
    check_rope(rng, False)


@case("rope_frequencies", "stretch")
def _(rng):
    for _ in range(3):
        check_rope(rng, True)


@case("apply_rope")
def _(rng):
    from model import apply_rope
    for T, heads, E in ((1, 1, 2), (9, 3, 8), (5, 2, 64)):
        x, angle = tensor(rng, T, heads, E), tensor(rng, T, 1, E // 2) * 5
        close(apply_rope(x, angle.cos(), angle.sin()), turned(x, angle[:, 0]), "apply_rope")
    x, angle = tensor(rng, 3, 2, 4), tensor(rng, 3, 1, 2)
    keeps("apply_rope", apply_rope, x, angle.cos(), angle.sin())
    has_gradient("apply_rope", lambda x: apply_rope(x, angle.cos(), angle.sin()), x)


def check_by_mask(rng, ends, heads, groups, scale=2, skip=0):
    from model import attention_by_mask
    for end in ends:
        T = len(end)
        q, k, v = (scale * tensor(rng, T, heads, 4), scale * tensor(rng, T, groups, 4),
                   tensor(rng, T, groups, 4))
        close(attention_by_mask(q, k, v, plan_of(end, skip)), attend_by_hand(q, k, v, end),
              f"attention_by_mask of {T} tokens, {heads} heads, {groups} groups")


@case("attention_by_mask", "causal")
def _(rng):
    check_by_mask(rng, ([1], [30] * 30), 3, 3)


@case("attention_by_mask", "tree")
def _(rng):
    from model import attention_by_mask
    forests = [forest(rng, 0, 50) for _ in range(3)]
    check_by_mask(rng, forests, 1, 1)
    check_by_mask(rng, forests, 1, 1, scale=40)             # scores of thousands
    check_by_mask(rng, forests, 1, 1, skip=int(rng.integers(1, 50)))    # all rows ask here
    plan, xs = plan_of(forest(rng, 0, 6)), [tensor(rng, 6, 1, 2) for _ in range(3)]
    keeps("attention_by_mask", attention_by_mask, *xs, plan)
    has_gradient("attention_by_mask", lambda *xs: attention_by_mask(*xs, plan), *xs)


@case("attention_by_mask", "groups")
def _(rng):
    check_by_mask(rng, ([20] * 20, [33] * 33), 6, 2)


def asked_of_attention(rng):
    """(the layer's q, k and v, its result, what they should be)."""
    from model import Attention, rope_tables
    c, T, asked = config(), 9, []
    layer, x = Attention(c).double(), tensor(rng, T, c.hidden_size)
    position = torch.arange(T) + int(rng.integers(1, 99))

    def attend(q, k, v):
        asked.append((q, k, v))
        return q * 2 + 1

    got = layer(x, *rope_tables(c, position, x.dtype), attend)
    angle = numbers(position)[:, None] * c.rope_theta ** (
        -np.arange(0, c.head_dim, 2) / c.head_dim)
    split = lambda part: (numbers(x) @ numbers(part.weight).T).reshape(T, -1, c.head_dim)
    want = [turned(split(layer.q_proj), angle), turned(split(layer.k_proj), angle),
            split(layer.v_proj)]
    joined = (numbers(asked[0][0]) * 2 + 1).reshape(T, -1) @ numbers(layer.o_proj.weight).T
    return asked, want, got, joined


@case("Attention.forward", "asks")
def _(rng):
    asked, want, _, _ = asked_of_attention(rng)
    holds(len(asked) == 1, "attend is called once")
    for name, a, b in zip("qkv", asked[0], want, strict=True):
        close(a, b, name)


@case("Attention.forward", "output")
def _(rng):
    _, _, got, joined = asked_of_attention(rng)
    close(got, joined, "Attention.forward")
    from model import Attention, rope_tables
    c = config(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    layer, x = Attention(c).double(), tensor(rng, 3, 4)
    tables = rope_tables(c, torch.arange(3), x.dtype)
    has_gradient("Attention.forward, where attend gives q + k + v",
                 lambda x: layer(x, *tables, lambda q, k, v: q + k + v), x)


@case("MLP.forward")
def _(rng):
    from model import MLP
    layer, x = MLP(config()).double(), 3 * tensor(rng, 5, 24)
    gate, up, down = (
        numbers(part.weight).T for part in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    a = numbers(x) @ gate
    close(layer(x), (a / (1 + np.exp(-a)) * (numbers(x) @ up)) @ down, "MLP.forward")
    has_gradient("MLP.forward", lambda x: layer(x), x[:2])


@case("Layer.forward")
def _(rng):
    from model import Layer, rope_tables
    c = config()
    layer, x = Layer(c).double(), tensor(rng, 6, 24)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.data = tensor(rng, 24)
    cos, sin = rope_tables(c, torch.arange(6), x.dtype)
    attend = lambda q, k, v: q.cumsum(0) + k.repeat_interleave(3, 1) * v.repeat_interleave(3, 1)
    middle = x + layer.self_attn(layer.input_layernorm(x), cos, sin, attend)
    close(layer(x, cos, sin, attend), middle + layer.mlp(layer.post_attention_layernorm(middle)),
          "Layer.forward")
    keeps("Layer.forward", lambda x: layer(x, cos, sin, attend), x)
    has_gradient("Layer.forward", lambda x: layer(x, cos[:2], sin[:2], attend), x[:2])


# ------------------------------------------------------------------ set 2


@case("format_input")
def _(rng):
    from data import format_input
    for _ in range(30):
        a, b = (" ".join(rng.choice(["x", "None", "AI assistant:", "\n", "é"], rng.integers(4)))
                for _ in range(2))
        for response in (None, b):
            said = b if response is not None else "None"
            want = "Human user:\n" + a + "\n\nAI assistant:\n" + said + "\n\n"
            holds(
                format_input(a, response) == want, f"format_input({a!r}, {response!r}) is {want!r}"
            )


def nests(end):
    return all(i < end[i] <= len(end) and all(end[j] <= end[i] for j in range(i + 1, end[i]))
               for i in range(len(end)))


@case("check_nesting")
def _(rng):
    from model import check_nesting
    seen = Counter()
    for _ in range(300):
        end = forest(rng, 0, int(rng.integers(1, 9)))
        if rng.random() < 0.7:
            end[rng.integers(len(end))] += int(rng.integers(-2, 3))
        try:
            says = check_nesting(list(end)) is None
        except ValueError:
            says = False
        holds(says == nests(end), f"check_nesting({end}): {'accepted' if says else 'refused'}, "
              f"and it {'nests' if nests(end) else 'does not nest'}")
        seen[says] += 1
        if says:
            keeps(f"check_nesting({end})", check_nesting, end)
    holds(min(seen.values()) > 30, "too few of one kind in this draw; take another seed")
    for end in ([10 ** 5] * 10 ** 5, forest(rng, 0, 10 ** 5)):
        watched = Watched(end)
        watched.most = 10 * len(end)
        check_nesting(watched)


@case("tree_plan", "position")
def _(rng):
    from model import tree_plan
    for T, skip in ((1, 0), (60, 0), (300, 0), (300, 70)):
        end = forest(rng, 0, T)
        close(tree_plan(torch.tensor(end), skip).position, visible(end).sum(1) - 1,
              "position = how many keys a row sees, less one")


@case("tree_plan", "rest")
def _(rng):
    from model import tree_plan
    end, skip = forest(rng, 0, 60), int(rng.integers(1, 50))
    plan = tree_plan(torch.tensor(end), skip)
    holds(plan.skip == skip and plan.end.tolist() == end, "a plan keeps end and skip")
    a = int(rng.integers(1, 6))
    keeps("tree_plan", tree_plan, torch.tensor(end), skip)
    for bad in ([a + 2] + [a + 3] * (a + 2), [a + 1] * a, list(range(a)), [2, 2, 3, 3, 5, 4]):
        for skip in (0, 1):
            try:
                tree_plan(torch.tensor(bad), skip)
            except ValueError:
                continue
            raise AssertionError(f"end = {bad} does not nest: ValueError expected, skip {skip}")


@case("row_tiles", "right")
def _(rng):
    from model import attention
    for T in (1, 60, 300):
        end = forest(rng, 0, T)
        q, k, v = 2 * tensor(rng, T, 4, 4), 2 * tensor(rng, T, 2, 4), tensor(rng, T, 2, 4)
        # the last rows only, as after a cached prefix
        for first in (0, int(rng.integers(0, T)), T - 1):
            close(attention(q[first:], k, v, plan_of(end, first)),
                  attend_by_hand(q[first:], k, v, end), f"attention, rows from {first}")


@case("row_tiles", "small")
def _(rng):
    from model import row_tiles
    size = int(rng.integers(12, 20))                        # of each of 80 sequences
    end = [i // size * size + size for i in range(80 * size)]
    tiles = row_tiles(plan_of(end))
    made = sum((rows.stop - rows.start) * len(keys) for rows, keys, _ in tiles)
    holds(
        made <= (80 * size) ** 2 // 7,
        f"{made} scores for 80 sequences of {size}: most are of keys that no row of the tile sees",
    )
    from model import tile_stop
    end, start = torch.tensor([i // 50 * 50 + 50 for i in range(50 * size)]), 0
    for rows, _, _ in row_tiles(plan_of(end.tolist())):
        stop = tile_stop(start, end)
        holds(rows.stop == stop, f"{size} sequences of 50: the tile from row {start} on ends before "
              f"row {rows.stop}, by tile_stop before {stop}")
        start = stop


def attention_gradients(q, k, v, g, end):
    """Gradients of sum(g attention(q, k, v)) for q, k and v, by the formulas; q: the last rows."""
    q, k, v, g = map(numbers, (q, k, v, g))
    N, heads, E = q.shape
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row in range(N):
        i = len(end) - N + row
        keys = [j for j in range(i + 1) if i < end[j]]
        for h in range(heads):
            group = h * k.shape[1] // heads
            s = k[keys, group] @ q[row, h] / math.sqrt(E)
            p = np.exp(s - s.max())
            p /= p.sum()
            dp = v[keys, group] @ g[row, h]
            ds = p * (dp - p @ dp) / math.sqrt(E)
            dv[keys, group] += p[:, None] * g[row, h]
            dk[keys, group] += ds[:, None] * q[row, h]
            dq[row, h] = ds @ k[keys, group]
    return dq, dk, dv


def check_tile_gradient(rng, n):
    from model import TileAttention
    for end in ([1], forest(rng, 0, 40), [90] * 30 + forest(rng, 30, 90)):
        T = len(end)
        for first in (0, int(rng.integers(0, T))):
            shapes = (T - first, 4), (T, 2), (T, 2), (T - first, 4)
            q, k, v, g = (tensor(rng, *shape, 4) for shape in shapes)
            xs = [x.clone().requires_grad_() for x in (q, k, v)]
            with patch("model.TILE_ROWS", 16):
                (g * TileAttention.apply(*xs, plan_of(end, first))).sum().backward()
            want = attention_gradients(q, k, v, g, end)
            close(xs[n].grad, want[n], f"gradient of {'qkv'[n]}, rows from {first}")


def check_bfloat16_gradient(rng, n):
    """Siblings below one row, in tiles of one row: a large term, then terms that are lost if they
    are added to it in bfloat16. Row i sees keys 0 and i with equal weight."""
    from model import TileAttention
    T, large = int(rng.integers(60, 130)), 2 ** int(rng.integers(9, 12))
    do = torch.tensor([0, large] + [large // 256] * (T - 2))[:, None, None].bfloat16()
    q, k, v = torch.ones(T, 1, 1), torch.zeros(T, 1, 1), torch.zeros(T, 1, 1)
    v[0] = 2
    xs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    with patch("model.TILE_ROWS", 1):
        TileAttention.apply(*xs, plan_of([T, *range(2, T + 1)])).backward(do)
    want = large / 2 + (T - 2) * large / 512
    close(xs[n].grad[0, 0, 0] / want, 1, f"bfloat16: gradient of {'qkv'[n]}, relative", 0.01)


@case("TileAttention.backward", "dq")
def _(rng):
    check_tile_gradient(rng, 0)
    from model import TileAttention
    ctx, xs = SimpleNamespace(), [tensor(rng, 6, 1, 4).bfloat16() for _ in range(4)]
    ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
    TileAttention.forward(ctx, *xs[:3], plan_of(forest(rng, 0, 6)))
    got = TileAttention.backward(ctx, xs[3])
    holds(all(x.dtype == torch.bfloat16 for x in got[:3]), "gradients have the dtype of q")


@case("TileAttention.backward", "dk")
def _(rng):
    check_tile_gradient(rng, 1)
    check_bfloat16_gradient(rng, 1)


@case("TileAttention.backward", "dv")
def _(rng):
    check_tile_gradient(rng, 2)
    check_bfloat16_gradient(rng, 2)


def scores_by_hand(rng, N, D, V, scale=1.0):
    """hidden, head, targets; log p and the gradients of sum(g log p), by the formulas."""
    hidden, head = scale * tensor(rng, N, D).numpy(), tensor(rng, V, D).numpy()
    targets, g = rng.integers(0, V, N), tensor(rng, N).numpy()
    z = hidden @ head.T
    top = z.max(1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(z - top).sum(1))
    dz = g[:, None] * (np.eye(V)[targets] - np.exp(z - total[:, None]))
    return (
        torch.from_numpy(x)
        for x in (hidden, head, targets, g, z[range(N), targets] - total, dz @ head, dz.T @ hidden)
    )


def check_logprobs(rng, what, N, D, V, scale=1):
    """Compare `value`, or the gradient of `hidden` or `head`; the largest tensor that was made."""
    import model
    hidden, head, targets, g, want, d_hidden, d_head = scores_by_hand(rng, N, D, V, scale)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    with patch.object(model.TokenLogprobs, "LOGITS", 2500), Largest() as largest:
        got = model.TokenLogprobs.apply(hidden, head, targets)
        if what != "value":
            got.backward(g)
    if what == "value":
        close(got, want, "log p")
    elif what == "hidden":
        close(hidden.grad, d_hidden, "gradient of hidden")
    else:
        close(head.grad, d_head, "gradient of head")
    return largest.size


SIZES = ((1, 3, 5, 1), (70, 8, 50, 1), (37, 8, 50, 300))
NO_ROW = (0, 3, 5, 1)


@case("TokenLogprobs.forward", "value")
def _(rng):
    for N, D, V, scale in (*SIZES, NO_ROW):
        check_logprobs(rng, "value", N, D, V, scale)
    from model import TokenLogprobs
    hidden, head = tensor(rng, 40, 8).bfloat16(), tensor(rng, 60, 8).float()
    got = TokenLogprobs.apply(hidden, head, torch.arange(40))
    want = (hidden @ head.bfloat16().T).double().log_softmax(-1).diagonal()
    holds(got.dtype == torch.float32, f"log p of bfloat16 hidden is {got.dtype}, not float32")
    close(got, want, "log p of bfloat16 hidden, sums in float32", 1e-5)


@case("TokenLogprobs.forward", "parts")
def _(rng):
    made = check_logprobs(rng, "value", 203, 8, 50)         # fifty rows at a time
    holds(made < 203 * 50, f"a tensor of {made} numbers: all logits at once")
    from model import TokenLogprobs
    V = int(rng.integers(30, 60))
    hidden, head = tensor(rng, 9, 4).bfloat16().requires_grad_(), tensor(rng, V, 4).float()
    got = TokenLogprobs.apply(hidden, head, torch.arange(9))    # held: with it goes what is saved
    kinds = {x.dtype for x in got.grad_fn.saved_tensors if x.shape == head.shape}
    holds(kinds == {torch.float32}, f"float32 head, bfloat16 hidden: saved as {kinds}")


@case("TokenLogprobs.backward", "hidden")
def _(rng):
    for N, D, V, scale in (*SIZES, NO_ROW):
        check_logprobs(rng, "hidden", N, D, V, scale)
    from model import TokenLogprobs
    parts = int(rng.integers(60, 100))                      # the first adds 256, each other one 1
    head = -torch.full((16 * parts, 1), 1 / 16)
    head[:16] = torch.tensor([0, -32])[torch.arange(16) % 2, None]
    hidden = torch.zeros(1, 1).bfloat16().requires_grad_()
    with patch.object(TokenLogprobs, "LOGITS", 16):
        got = TokenLogprobs.apply(hidden, head.requires_grad_(), torch.tensor([0]))
        got.backward(torch.tensor([16.0 * parts]))
    close(numbers(hidden.grad) / (255 + parts), [[1]],
          "bfloat16: gradient of hidden over many parts, relative", 0.01)


@case("TokenLogprobs.backward", "head")
def _(rng):
    for N, D, V, scale in SIZES:
        check_logprobs(rng, "head", N, D, V, scale)


@case("TokenLogprobs.backward", "parts")
def _(rng):
    for what in ("hidden", "head"):
        made = check_logprobs(rng, what, 60, 8, 203)        # thirty-two words at a time
        holds(made < 60 * 203, f"a tensor of {made} numbers: all logits at once")
    from model import TokenLogprobs
    N, V = int(rng.integers(50, 90)), 16 * int(rng.integers(8, 14))
    hidden, head = tensor(rng, N, 2).requires_grad_(), tensor(rng, V, 2).requires_grad_()
    with patch.object(TokenLogprobs, "LOGITS", N):
        total = TokenLogprobs.apply(hidden, head, torch.zeros(N, dtype=torch.long)).sum()
        with Products() as products:
            total.backward()
    holds(products.count <= V // 4, f"{N} rows, {V} words, LOGITS {N}: {products.count} products; "
          "at least sixteen words at a time")


@case("common_prefix")
def _(rng):
    from data import common_prefix
    for _ in range(200):
        some = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 4))]
        start = rng.integers(0, 9, rng.integers(0, 5)).tolist()
        some = [start + x for x in some]
        want = max(n for n in range(min(map(len, some))) if len({tuple(x[:n]) for x in some}) == 1)
        holds(common_prefix(some) == want, f"common_prefix({some}) is {want}")
        keeps(f"common_prefix({some})", common_prefix, some)


def random_examples(rng, roots=1, n=8):
    """Examples of random ids; those of one root share its first tokens."""
    from data import Example
    ids = lambda low, high: rng.integers(0, 50, rng.integers(low, high)).tolist()
    starts = [ids(3, 8) for _ in range(roots)]
    chosen = [starts[int(rng.integers(roots))] for _ in range(n)]
    return [Example(start + ids(1, 12), [ids(1, 9) for _ in range(rng.integers(1, 4))], len(start))
            for start in chosen]


def check_pack(p, wanted):
    """Every loss pair must see its prompt and the answer so far, no more; wanted: {number: (prompt,
    ids)}."""
    sees, tokens, got = visible(p.end.tolist()), p.tokens.numpy(), {}
    for row, target, answer in zip(
        p.rows.tolist(), p.targets.tolist(), p.answer.tolist(), strict=True
    ):
        prompt, ids = wanted[answer]
        done = got.setdefault(answer, [])
        holds(tokens[sees[row]].tolist() == prompt + ids[:len(done)],
              f"answer {answer}: row {row} sees other tokens than its prompt and the answer so far")
        done.append(target)
    for answer, targets in got.items():
        holds(
            targets == wanted[answer][1],
            f"answer {answer}: {targets} is scored, not {wanted[answer][1]}",
        )
    return got


def laid_out(rng):
    """Yield (pack, {number: (prompt, ids)}, tokens it should have), with a root and without."""
    from data import lay_out
    for roots in (0, 1):
        examples, branches, wanted = random_examples(rng), [], {}
        number = int(rng.integers(3, 9))
        root = examples[0].prompt[:examples[0].root_length] if roots else []
        for e in examples:
            answers = list(enumerate(e.answers, number))
            branches.append((e.prompt, answers))
            wanted.update({n: (e.prompt, ids) for n, ids in answers})
            number += len(answers)
        tokens = list(root)
        for e in examples:
            tokens += sum([ids[:-1] for ids in e.answers], e.prompt[len(root):])
        yield lay_out(root, branches), wanted, tokens


@case("lay_out", "tokens")
def _(rng):
    from data import lay_out
    for p, _, tokens in laid_out(rng):
        holds(p.tokens.tolist() == tokens, f"tokens {p.tokens.tolist()}, wanted {tokens}")
    ids = rng.integers(0, 9, 6).tolist()
    keeps("lay_out", lay_out, ids[:2], [(ids[:4], [(0, ids[3:]), (1, ids[2:])])])


@case("lay_out", "end")
def _(rng):
    for p, wanted, tokens in laid_out(rng):
        holds(len(p.end) == len(tokens) and nests(p.end.tolist()), "`end` does not nest")
        check_pack(p, wanted)


@case("lay_out", "scored")
def _(rng):
    from data import lay_out
    for root in ([0], rng.integers(0, 9, 5).tolist()):
        kinds = {name: x.dtype for name, x in vars(lay_out(root, [])).items()}
        holds(set(kinds.values()) == {torch.int64}, f"lay_out({root}, []): dtypes {kinds}")
    for p, wanted, _ in laid_out(rng):
        got = {}
        for target, answer in zip(p.targets.tolist(), p.answer.tolist(), strict=True):
            got.setdefault(answer, []).append(target)
        holds(got == {n: ids for n, (_, ids) in wanted.items()}, "targets, by answer")
        asked = p.tokens[p.rows].tolist()
        want = [token for n in dict.fromkeys(p.answer.tolist())
                for token in (wanted[n][0][-1], *wanted[n][1][:-1])]
        holds(asked == want, "the row before each target holds the token before it")


def packs_of(rng, share, maximum):
    """(packs, answers (number of the example, example, ids), {number: (prompt, ids)})."""
    from data import pack
    examples = random_examples(rng, roots=2, n=14)
    answers = [(i, e, ids) for i, e in enumerate(examples) for ids in e.answers]
    wanted = {n: (e.prompt, ids) for n, (_, e, ids) in enumerate(answers)}
    return pack(examples, maximum, share), answers, wanted


def check_packs(packs, answers, wanted, share, maximum):
    seen = []
    for p in packs:
        here = sorted(check_pack(p, wanted))
        seen += here
        owners = sorted({answers[n][0] for n in here})
        holds(
            here == [n for n, a in enumerate(answers) if a[0] in owners], "an example is torn apart"
        )
        holds(len(p.tokens) <= maximum or len(owners) == 1,
              f"{len(p.tokens)} tokens in a pack of several examples")
        packed = [next(e for i, e, _ in answers if i == owner) for owner in owners]
        roots = {tuple(e.prompt[:e.root_length]) for e in packed}
        holds(not share or len(roots) == 1, "a pack holds one instruction")
        own = sum(len(e.prompt) - e.root_length + sum(len(a) - 1 for a in e.answers)
                  for e in packed)
        if share:
            holds(len(p.tokens) == own + packed[0].root_length,
                  "the instruction once, each prompt once")
        else:
            alone = sum(len(e.prompt) + len(a) - 1 for e in packed for a in e.answers)
            holds(len(p.tokens) == alone, "a prompt for every answer")
    holds(sorted(seen) == sorted(wanted), "every answer in exactly one pack")


@case("pack", "whole")
def _(rng):
    from data import pack
    for maximum in (1, 45, 90, 10 ** 6):
        check_packs(*packs_of(rng, True, maximum), True, maximum)
    keeps("pack", pack, random_examples(rng, roots=2, n=6), 60)
    from data import Example
    packs = pack([Example([1, n, 3], [[4, 0]], 2) for n in range(3)], 100)
    holds([len(p.tokens) for p in packs] == [4] * 3, "roots that begin alike are different roots")


@case("pack", "apart")
def _(rng):
    from data import Example, pack
    a = int(rng.integers(3, 20))
    packs = pack([Example([7, n, *range(a)], [[0]], 1) for n in range(4)], 2 * (a + 2), share=False)
    holds([len(p.tokens) for p in packs] == [2 * (a + 2)] * 2, "share=False: first fit, too")
    for maximum in (1, 45, 90, 10 ** 6):
        check_packs(*packs_of(rng, False, maximum), False, maximum)


def check_fit(rng):
    """First fit and not best fit; the root counts when packs are sorted."""
    from data import Example, pack
    a, b = (int(n) for n in rng.integers(4, 30, 2))
    sizes = [2 * a - 2, a, a, 1]                            # room for 2 a + 1 below the root
    packs = pack([Example([7] + [n] * n, [[0]], 1) for n in sizes], 2 * a + 2)
    rows = [len(p.tokens) for p in packs]
    holds(rows == [2 * a + 1, 2 * a], f"rows below the root {sizes}, root 1, max_tokens "
          f"{2 * a + 2}: packs of {rows} rows; the last goes into the first pack that has room")
    packs = pack([Example([1] * (a + 2), [[0]], 1), Example([2] * (2 * a + b), [[0]], a + b)], 200)
    rows = [len(p.tokens) for p in packs]
    holds(rows == [2 * a + b, a + 2], f"packs of {rows} rows: the largest first, roots included")


@case("pack", "fit")
def _(rng):
    check_fit(rng)
    for maximum in (45, 60, 90, 10 ** 6):
        packs, answers, _ = packs_of(rng, True, maximum)
        sizes = [len(p.tokens) for p in packs]
        holds(sizes == sorted(sizes, reverse=True), "the largest pack first")
        for a in packs:
            for b in packs:
                length = answers[int(a.answer[0])][1].root_length
                same = a is not b and a.tokens[:length].tolist() == b.tokens[:length].tolist()
                both = len(a.tokens) + len(b.tokens) - length
                holds(not same or both > maximum, "two packs would fit into one")
        want = {}
        for i, e in {i: e for i, e, _ in answers}.items():
            rows = len(e.prompt) - e.root_length + sum(len(a) - 1 for a in e.answers)
            want.setdefault(tuple(e.prompt[:e.root_length]), []).append(rows)
        sizes = Counter(sizes)
        for root, rows in want.items():
            bins = []
            for n in sorted(rows, reverse=True):
                place = next((b for b in bins if len(root) + sum(b) + n <= maximum), None)
                if place is None:
                    bins.append([n])
                else:
                    place.append(n)
            sizes.subtract(Counter(len(root) + sum(b) for b in bins))
        holds(not +sizes and not -sizes, "longest first, each into the first pack that has room")


@case("sft_loss")
def _(rng):
    from train_sft import sft_loss
    for n in (0, 1, 30):
        x, count = -tensor(rng, n).abs(), int(rng.integers(31, 99))
        close(sft_loss(x, count), sum(-v for v in x.tolist()) / count, "sft_loss")
    has_gradient("sft_loss", lambda x: sft_loss(x, count), tensor(rng, 3))


@case("lr_at")
def _(rng):
    from train_sft import lr_at
    steps, peak = int(rng.integers(3, 500)), float(rng.uniform(1e-5, 1))
    for step in {0, 1, steps // 2, steps - 1, int(rng.integers(steps))}:
        close(lr_at(step, steps, peak), peak * math.cos(math.pi * step / steps / 2) ** 2,
              f"lr_at({step}, {steps}, {peak})")


@case("batches")
def _(rng):
    from train_sft import batches
    size, seed = int(rng.integers(3, 20)), int(rng.integers(10 ** 6))
    n = size * int(rng.integers(3, 9)) + int(rng.integers(1, size))
    got, a = list(batches(n, size, 2, seed)), -(-n // size)
    holds(len(got) == 2 * a and all(len(b) == size for b in got[:a - 1]),
          "batches of `size`, the last of an epoch may be short")
    epochs = [[i for b in part for i in b] for part in (got[:a], got[a:])]
    holds(all(sorted(e) == list(range(n)) for e in epochs), "every example once an epoch")
    holds(epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]), "another order in each epoch")
    holds(list(batches(n, size, 1, seed)) == got[:a], "the order depends on (seed, epoch) alone")
    holds(list(batches(n, size, 1, seed + 1)) != got[:a], "another seed, another order")
    holds(sum(batches(n, size + 1, 1, seed), []) == epochs[0], "the order depends on the size")
    both = zip(batches(n, size, 2, seed), batches(n, size, 2, seed + 1))
    holds([one for one, _ in both] == got, "what another generator draws changes the order")


def dealt(rng):
    """Yield (packs, [what each rank gets], ranks)."""
    from data import Pack, deal
    zeros, scored = lambda n: torch.zeros(n, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for ranks in (1, 2, 3, 7):
        sizes = rng.choice(3000, int(rng.integers(1, 20)), replace=False) + 1
        sizes[0] += 100_000                                 # longer than all others together
        packs = [Pack(zeros(n), zeros(n) + n, scored, scored, scored) for n in sizes.tolist()]
        hands = [deal(packs, rank, ranks) for rank in range(ranks)]
        holds([len(p.tokens) for p in packs] == sizes.tolist(), "deal changes the list of packs")
        yield packs, hands, ranks


@case("deal", "once")
def _(rng):
    for packs, hands, _ in dealt(rng):
        given = [id(p) for h in hands for p in h if len(p.rows)]
        holds(sorted(given) == sorted(map(id, packs)), "every pack to exactly one rank")


@case("deal", "balance")
def _(rng):
    for packs, hands, ranks in dealt(rng):
        most = -(-len(packs) // ranks)
        loads, counts = [0] * ranks, [0] * ranks
        for n in sorted((len(p.tokens) for p in packs), reverse=True):
            r = min((r for r in range(ranks) if counts[r] < most), key=lambda r: loads[r])
            loads[r], counts[r] = loads[r] + n, counts[r] + 1
        got = [sum(len(p.tokens) for p in h if len(p.rows)) for h in hands]
        holds(got == loads, f"loads {got}; longest first to the lightest gives {loads}")


@case("deal", "empty")
def _(rng):
    for packs, hands, ranks in dealt(rng):
        most = -(-len(packs) // ranks)
        holds(all(len(h) == most for h in hands), "the same number of packs to each rank")
        fill = [p for h in hands for p in h if not len(p.rows)]
        holds(all(p.tokens.tolist() == [0] and p.end.tolist() == [1] for p in fill),
              "an empty pack is one token")


# ------------------------------------------------------------------ set 3


@case("draw_token", "nucleus")
def _(rng):
    from model import draw_token
    n, V = 20000, 7
    logits, T = 2 * tensor(rng, 1, V), float(rng.uniform(0.5, 1.5))
    p = np.exp(numbers(logits)[0] / T)
    p, order = p / p.sum(), np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]                 # mass of likelier tokens
    kept = int(rng.integers(1, V))                          # how many the nucleus is to hold
    top_p = float((before[kept] + before[kept - 1]) / 2)
    want = np.zeros(V)
    want[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
    seed = torch.from_numpy(rng.integers(0, 2 ** 31, n))
    position = torch.from_numpy(rng.integers(0, 5000, n))
    got = draw_token(logits.expand(n, V), seed, position, T, top_p)
    share = np.bincount(got.numpy(), minlength=V) / n
    holds(not share[want == 0].any(), "a token outside the nucleus was drawn")
    close(share, want, "frequencies in the nucleus", 5 * 0.5 / math.sqrt(n))
    place = rng.permutation(3)
    half = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[place].log().expand(500, 3)
    got = draw_token(half, seed[:500], position[:500], 1.0, 0.5)
    holds((got == int(place.argmin())).all(), "p .5 .25 .25, top_p .5: .25 was drawn, before which "
          "comes a mass of .5, which is not below top_p")


def at_most(most, sentence):
    """model.uniform, which may be called so many times."""
    from model import uniform
    calls = []

    def counted(*arguments):
        calls.append(1)
        holds(len(calls) <= most, sentence)
        return uniform(*arguments)

    return counted


@case("draw_token", "rows")
def _(rng):
    from model import draw_token
    seed, position = (torch.from_numpy(rng.integers(0, 9999, 20)) for _ in range(2))
    many = 2 * tensor(rng, 20, 1000)
    together = draw_token(many, seed, position, 0.9, 0.9)
    alone = [draw_token(many[i:i + 1], seed[i:i + 1], position[i:i + 1], 0.9, 0.9).item()
             for i in range(20)]
    holds(together.tolist() == alone, "what a row draws depends on the other rows")
    keeps("draw_token", draw_token, many, seed, position, 0.9, 0.9)
    bad = many.clone()
    bad[int(rng.integers(20))] = math.nan
    with patch("model.uniform", at_most(2000, "a row of NaN: no token after 2000 draws")):
        got = draw_token(bad, seed, position, 0.9, 0.9)
    holds((got == together).sum() >= 19, "a row of NaN changes what the others draw")
    one = many[:1].expand(20, 1000)
    holds(len(set(draw_token(one, seed, position[:1].expand(20), 1.0, 1.0).tolist())) > 5, "seeds")
    holds(len(set(draw_token(one, seed[:1].expand(20), position, 1.0, 1.0).tolist())) > 5,
          "positions")


@case("draw_token", "greedy")
def _(rng):
    from model import draw_token
    many, seed = 2 * tensor(rng, 20, 1000), torch.from_numpy(rng.integers(0, 9999, 20))
    for temperature, top_p in ((0, 0.9), (1e-6, 0.9), (1.0, 0.0)):
        holds(draw_token(many, seed, seed, temperature, top_p).tolist() == many.argmax(-1).tolist(),
              f"temperature {temperature}, top_p {top_p}: argmax")


def random_answer(rng):
    """A generated text: verdict lines in many spellings, prose, now and then an "Answers:" line."""
    lines = []
    for _ in range(rng.integers(0, 14)):
        name = str(rng.choice(list(FIELDS)))
        word = str(
            rng.choice(
                [*FIELDS[name] * 3, "None", "ambiguous", "un-harmful", FIELDS[name][0] + "ly"]
            )
        )
        line = f"{name.capitalize()}: {word}"
        style = rng.integers(9)
        lines.append([line, line, line.lower(), line.upper(), "- " + line, "### " + line + "!",
                      f"**{name.capitalize()}:** {word}.", f"the {line} was weighed",
                      "Step 1: a plain sentence"][style])
        if rng.random() < 0.15:
            lines.append("Answers: ")
    return "\n".join(lines)


def verdict_by_hand(text):
    low = text.lower()
    block = low[low.rindex("answers:") + 8:] if "answers:" in low else None
    verdict = {}
    for name, words in FIELDS.items():
        def said(part):
            lines = [line.lstrip("-#* ") for line in part.split("\n")]
            return [line[len(name) + 1:].lstrip("* ") for line in lines
                    if line.startswith(name + ":")]

        told = said(block)[:1] if block is not None else []
        told = told or said(low)[-1:]
        word = re.split(r"\W", told[0])[0] if told else None
        verdict[name] = word if word in words else None
    return verdict


def check_verdicts(rng, block):
    from data import parse_verdict
    for _ in range(500):
        text = random_answer(rng)
        if ("answers:" in text.lower()) != block:
            continue
        want = verdict_by_hand(text)
        got = parse_verdict(text)
        holds(got == want, f"parse_verdict({text!r}) is {want}, not {got}")
    headings = ["**Answers:**", "Final answers:", "## Answers", "Answers: "] if block else ["So:"]
    for name, (word, other) in FIELDS.items():
        title = name.capitalize()
        for line, want in ((f"1. **{title}:** {word.title()}", word), (f"{title}:\n{word}", word),
                           (f"{title}: not {word}", None), (f"{title}: {word}/{other}", None),
                           (f"{title}: {word}: no", None)):
            text = f"{name}: {other}\n\n{rng.choice(headings)}\n{line}\n"
            got = parse_verdict(text)[name]
            holds(got == want, f"parse_verdict({text!r}) says of the {name} {want}, not {got}")
        if block:
            text = f"{name}: {other}\nFinal answers: {name}: {word}\n\nso\n\n{name}: {other}"
            got = parse_verdict(text)[name]
            holds(got == word, f"parse_verdict({text!r}): the block begins on its heading's line")


@case("parse_verdict", "line")
def _(rng):
    check_verdicts(rng, False)


@case("parse_verdict", "block")
def _(rng):
    check_verdicts(rng, True)


@case("gold_verdict")
def _(rng):
    from data import format_answers, format_input, gold_verdict
    empty = dict.fromkeys(FIELDS)
    for _ in range(60):
        name = str(rng.choice(list(FIELDS)))
        word = str(rng.choice(FIELDS[name]))
        response = str(rng.choice(["a", "", "None said", "b\n\nAI assistant:\nc"]))
        one = {"request": format_input("x"), "completion": format_input("x", response),
               "response": format_input("x", response)}
        got = gold_verdict({"input": one[name], "output": f" {word.capitalize()}\n"})
        holds(got == {**empty, name: word}, f"one word, {word}, is about the {name}")
        bare = str(rng.choice(["plain", format_input("x", " None ")]))
        got = gold_verdict({"input": bare, "output": FIELDS["request"][rng.integers(2)]})
        holds(got["request"] and not got["response"], f"input {bare!r} has no response")
        verdict = {n: [None, *words][rng.integers(3)] for n, words in FIELDS.items()}
        got = gold_verdict({"input": one[name],
                            "output": f"{word} is a word.\n\n" + format_answers(**verdict)})
        holds(got == verdict, "a block of answers is read by parse_verdict")


def all_verdicts():
    return [
        dict(zip(FIELDS, (a, b, c)))
        for a in (H, U, None)
        for b in (R, C, None)
        for c in (H, U, None)
    ]


@case("judge")
def _(rng):
    from mine_hard import judge
    for verdict in all_verdicts():
        for gold in all_verdicts():
            asked = [n for n in FIELDS if gold[n] is not None]
            wrong = [n for n in asked if verdict[n] != gold[n]]
            holds(
                judge(verdict, gold) is (len(asked) > 0 and not wrong), f"judge({verdict}, {gold})"
            )


def random_sample(rng, text="t", gaps=0.1):
    verdict = {
        n: None if rng.random() < gaps else str(rng.choice(words)) for n, words in FIELDS.items()
    }
    return {"text": text, "finish": "stop" if rng.random() < 0.9 else "length", "verdict": verdict,
            "tokens": 3}


@case("judge_by_field")
def _(rng):
    from mine_hard import judge_by_field
    golds = all_verdicts()
    for _ in range(400):
        samples = [random_sample(rng) for _ in range(rng.integers(1, 6))]
        gold = golds[rng.integers(len(golds))]
        labelled = [name for name in ("request", "response", "completion") if gold[name]]
        lacks = [not all(s["verdict"][name] for name in labelled) for s in samples]
        right = [
            all(s["verdict"][name] == gold[name] for name in labelled) and bool(labelled)
            for s in samples
        ]
        want = [None if lack else ok for lack, ok in zip(lacks, right)]
        for name in labelled:
            right = [
                None if lack else s["verdict"][name] == gold[name]
                for lack, s in zip(lacks, samples)
            ]
            if {True, False} <= set(right):
                want = right
                break
        holds(list(judge_by_field(samples, gold)) == want,
              f"judge_by_field({[s['verdict'] for s in samples]}, {gold}) is {want}")


@case("pick_pair")
def _(rng):
    from mine_hard import pick_pair
    lengths = rng.permutation(9)
    samples = [{"text": f"{i}" + "x" * int(n)} for i, n in enumerate(lengths)]
    right = [True, False, None] * 3
    rng.shuffle(right)
    part = lambda value: {s["text"] for s, ok in zip(samples, right) if ok is value}
    longest = tuple(max(part(value), key=len) for value in (True, False))
    pick = lambda *asked: tuple(pick_pair(*asked))          # a list will do
    holds(pick(samples, right, "longest", random.Random(0)) == longest, "longest")
    n = int(rng.integers(3, 9))
    wide = [{"text": text} for text in ("é" * n, "e" * (n + 1), "é" * n, "e" * (n + 1))]
    holds(pick(wide, [True, True, False, False], "longest", random.Random(0))
          == ("e" * (n + 1),) * 2, f"{n} times é, {n + 1} times e: the longest by characters")
    twice = [{"text": text} for text in "aaaab"] + [{"text": text} for text in "cdddd"]
    drawn = Counter(pick(twice, [True] * 5 + [False] * 5, "random", random.Random(i))
                    for i in range(600))
    holds(drawn["a", "d"] > 600 * 0.5, "random: each sample is as likely, also of equal texts")
    drawn = Counter(pick(samples, right, "random", random.Random(i)) for i in range(600))
    holds(set(drawn) == {(a, b) for a in part(True) for b in part(False)},
          "random: every correct with every incorrect sample")
    holds(min(drawn.values()) > 600 / 9 / 3, "random: all pairs about equally often")
    again = [pick(samples, right, "random", random.Random(5)) for _ in range(20)]
    holds(len(set(again)) == 1, "random: the given generator decides")
    keeps("pick_pair", lambda *given: pick(*given, "random", random.Random(1)), samples, right)


@case("sample_weights")
def _(rng):
    from mine_hard import sample_weights
    for n in (2, 5, 40):
        d, gamma = rng.integers(-4, 5, n).tolist(), float(rng.uniform(0.05, 0.9))
        d[:2] = [-5, 6]
        got = sample_weights(d, gamma)
        close(got, np.interp(d, [-5, 6], [1 - gamma, 1 + gamma]), f"sample_weights({d}, {gamma})")
        holds(type(got) is list and all(isinstance(x, float) for x in got),
              "weights are a list of floats")
        keeps("sample_weights", sample_weights, d, gamma)
    holds(
        list(sample_weights([3, 3], 0.2)) == [1, 1] and list(sample_weights([], 0.2)) == [],
        "all equal: 1",
    )


def hard_by_hand(rng):
    """What to give select, and what it should find: [(record, k_correct, {text: correct?})], and
    counts."""
    from data import format_answers
    n, k, golds = 30, 4, all_verdicts()[:-1]
    records = [{"instruction": "i", "input": f"x{rng.integers(24)}",
                "output": format_answers(**golds[rng.integers(len(golds))])}
               for _ in range(n)]
    answers = [(model, {int(i): [random_sample(rng, f"{model} {i} {s}", 0.2) for s in range(k)]
                        for i in rng.permutation(n)[:20]})
               for model in ("a", "b")]
    want, count, seen = [], Counter(), set()
    for model, by_prompt in answers:
        for i in sorted(by_prompt):
            gold = verdict_by_hand(records[i]["output"])
            right = {s["text"]: any(gold.values()) and s["finish"] == "stop" and
                     all(s["verdict"][f] == gold[f] for f in FIELDS if gold[f])
                     for s in by_prompt[i]}
            good = sum(right.values())
            count["all right" if good == k else "hard" if good else "all wrong"] += 1
            count["answers without verdict"] += sum(set(s["verdict"].values()) == {None}
                                                    for s in by_prompt[i])
            if 0 < good < k and records[i]["input"] not in seen:
                seen.add(records[i]["input"])
                want.append((i, good, right))
    holds(len(want) > 2, "too few hard prompts in this draw; take another seed")
    return records, answers, want, count


def select_hard(records, answers, judging="all"):
    from mine_hard import select
    return select(records, [f"s{i}" for i in range(30)], answers, judging, "random", 0.3, 0)


@case("select", "pairs")
def _(rng):
    records, answers, want, _ = hard_by_hand(rng)
    hard, _ = select_hard(records, answers)
    holds([p["input"] for p in hard] == [records[i]["input"] for i, _, _ in want],
          "one entry for each hard input, in order")
    for pair, (i, good, right) in zip(hard, want):
        holds(right[pair["chosen"]] and not right[pair["rejected"]],
              "chosen is correct, rejected is not")
        got = [pair[name] for name in ("k_correct", "k_incorrect", "source", "instruction")]
        holds(got == [good, 4 - good, f"s{i}", "i"], "k_correct, k_incorrect, source, instruction")
    for pair in select_hard(records, answers, "field")[0]:
        told = [by_prompt[i] for _, by_prompt in answers for i in by_prompt
                if records[i]["input"] == pair["input"]]
        golds = [verdict_by_hand(record["output"]) for record in records
                 if record["input"] == pair["input"]]
        if len(told) == len(golds) == 1:
            whole = sum(all(s["verdict"][f] for f in FIELDS if golds[0][f]) for s in told[0])
            holds(pair["k_correct"] + pair["k_incorrect"] == whole,
                  "what the judge drops (None) counts for neither side")
    again, _ = select_hard(records, answers)
    holds([p["chosen"] for p in again] == [p["chosen"] for p in hard], "seeded")
    check_draws(rng)


def check_draws(rng):
    """What a pair is drawn by: seed, folder and number, each prompt's own, and --pair."""
    from data import format_answers
    from mine_hard import select
    n, first = 20, int(rng.integers(5))
    records = [{"instruction": "i", "input": f"x{i}", "output": format_answers(request=H)}
               for i in range(n)]
    samples = [{"text": "x" * int(length), "finish": "stop", "tokens": 3,
                "verdict": {**dict.fromkeys(FIELDS), "request": (H, U)[i % 2]}}
               for i, length in enumerate(rng.permutation(40) + 1)]

    def drawn(folder="m", number=first, seed=0, before=(), pairing="random"):
        answers = [(folder, {i: samples for i in (*before, number)})]
        line = select(records, ["s"] * n, answers, "all", pairing, 0.2, seed)[0][-1]
        return line["chosen"], line["rejected"]

    holds(drawn(number=n - 1, before=range(first, n - 1)) == drawn(number=n - 1),
          "what one prompt draws depends on which others are hard")
    for what, draws in (("seeds", [drawn(seed=s) for s in range(9)]),
                        ("folders", [drawn(f"m{i}") for i in range(9)]),
                        ("numbers", [drawn(number=i) for i in range(9)])):
        holds(len(set(draws)) > 3, f"nine {what} draw nearly the same of 400 pairs")
    longest = tuple("x" * max(len(s["text"]) for s in samples[i::2]) for i in range(2))
    holds(drawn(pairing="longest") == longest, "pairing 'longest': by pick_pair")
    keeps("select", lambda records: select(records, ["s"] * n, [("m", {0: samples})], "all",
                                           "random", 0.2, 0), records)


@case("select", "count")
def _(rng):
    records, answers, _, count = hard_by_hand(rng)
    _, got = select_hard(records, answers)
    for what in ("all right", "hard", "all wrong", "answers without verdict"):
        holds(got[what] == count[what], f"{what}: {got[what]}, expected {count[what]}")


@case("select", "weights")
def _(rng):
    records, answers, want, _ = hard_by_hand(rng)
    hard, _ = select_hard(records, answers)
    d = [4 - 2 * good for _, good, _ in want]
    alpha = np.interp(d, [min(d), max(d)], [0.7, 1.3]) if min(d) < max(d) else np.ones(len(d))
    close([p["weight"] for p in hard], alpha, "weights")


@case("dpo_loss")
def _(rng):
    from train_dpo import dpo_loss
    x, beta, weight = 20 * tensor(rng, 4, 30), float(rng.uniform(0.01, 1)), tensor(rng, 30).abs()
    margin = numbers((x[0] - x[2]) - (x[1] - x[3]))
    close(dpo_loss(*x, beta, weight), numbers(weight) * np.logaddexp(0, -beta * margin), "dpo_loss")
    far = torch.tensor([1e4, -1e4], dtype=torch.float64)  # exp of these is 0 or infinite
    far.requires_grad_()
    zero = torch.zeros(2).double()
    got = dpo_loss(far, zero, zero, zero, 1.0, torch.ones(2).double())
    close(got, [0, 1e4], "dpo_loss of margins of 10000")
    got.sum().backward()
    close(far.grad, [0, -1], "dpo_loss of margins of 10000: the gradient of log pi_w")
    keeps("dpo_loss", dpo_loss, *x, beta, weight)
    loss = lambda w, l: dpo_loss(w, l, *x[2:, :4], beta, weight[:4])
    has_gradient("dpo_loss", loss, *x[:2, :4])
    has_gradient("dpo_loss at the reference, where margins are 0", loss, *x[2:, :4])


@case("answer_sums")
def _(rng):
    from train_dpo import answer_sums
    x, answer = tensor(rng, 50), torch.from_numpy(rng.integers(0, 6, 50))
    want = np.zeros(8)
    np.add.at(want, answer.numpy(), x.numpy())
    got = answer_sums(x, answer, 8)
    holds(got.dtype == x.dtype, f"answer_sums of float64 is {got.dtype}; new_zeros keeps the dtype")
    close(got, want, "answer_sums")
    keeps("answer_sums", answer_sums, x, answer, 8)
    has_gradient("answer_sums", lambda x: answer_sums(x, answer, 8), x)


NAMES = ["loss", "preference", "accuracy", "margin", "chosen_logprob", "rejected_logprob"]


def pairs_by_hand(rng):
    """(what pairs_loss gives, what it should, the gradient of policy, what that should be)."""
    from train_dpo import pairs_loss
    n, beta, sft = 6, float(rng.uniform(0.05, 1)), float(rng.uniform(0.5, 3))
    policy, reference = (-5 * tensor(rng, n, 2).abs() for _ in range(2))
    reference[0] = policy[0]                                # a margin of 0
    length, weight = torch.from_numpy(rng.integers(1, 9, n)).double(), tensor(rng, n).abs()
    want, gradient = np.zeros((6, n)), np.zeros((n, 2))
    for i in range(n):
        w, l = policy[i].tolist()
        margin = (w - reference[i, 0].item()) - (l - reference[i, 1].item())
        alpha, size = weight[i].item(), length[i].item()
        preference = alpha * np.logaddexp(0, -beta * margin)
        loss = preference - sft * w / size
        want[:, i] = [loss, preference, margin > 0, beta * margin, w, l]
        slope = alpha * beta / (1 + np.exp(beta * margin))
        gradient[i] = -slope - sft / size, slope
    policy.requires_grad_()
    got = pairs_loss(policy, reference, length, weight, beta, sft)
    return policy, got, dict(zip(NAMES, want)), gradient


@case("pairs_loss", "loss")
def _(rng):
    policy, got, want, gradient = pairs_by_hand(rng)
    for name in NAMES[:2]:
        close(got[name], want[name], f"{name} of each pair")
    got["loss"].sum().backward()
    close(policy.grad, gradient, "gradient")


@case("pairs_loss", "figures")
def _(rng):
    _, got, want, _ = pairs_by_hand(rng)
    holds(sorted(got) == sorted(NAMES), f"the figures of each pair are {', '.join(NAMES)}")
    for name in NAMES[2:]:
        close(got[name], want[name], f"{name} of each pair")


def check_reference(rng, settings):
    from data import Example
    from model import World
    from train_dpo import reference_logprobs
    ids = lambda n: rng.integers(0, 50, n).tolist()
    scale = torch.ones(()).double().requires_grad_()
    root = ids(3)
    examples = [Example(root + ids(int(rng.integers(1, 9))),
                        [ids(int(m)) for m in rng.integers(1, 7, 2)], 3) for _ in range(8)]
    f = lambda last, target: -(last * 0.7 + target * 0.11 + 1)      # log p of a token after another
    model = lambda tokens, end, rows, targets: scale * f(tokens[rows].double(), targets.double())
    want = [[sum(map(f, [e.prompt[-1], *answer[:-1]], answer)) for answer in e.answers]
            for e in examples]
    def noting(tokens, *rest):
        seen.append(len(tokens))
        return model(tokens, *rest)

    alone = sum(len(e.prompt) + len(a) - 1 for e in examples for a in e.answers)
    for batch_size, max_tokens, no_share in settings:
        seen = []
        args = SimpleNamespace(batch_size=batch_size, max_tokens=max_tokens, no_share=no_share)
        got = reference_logprobs(noting, examples, args, World(torch.device("cpu")))
        holds((sum(seen) == alone) == no_share, f"no_share {no_share}: {sum(seen)} tokens were run")
        holds(max_tokens > 1 or len(seen) == len(examples), "max_tokens 1: a pack for each pair")
        holds(not got.requires_grad, "the reference has no gradient")
        close(got, want, "reference_logprobs")


@case("reference_logprobs", "values")
def _(rng):
    check_reference(rng, ((100, 10 ** 6, False),))


@case("reference_logprobs", "packing")
def _(rng):
    check_reference(rng, ((3, 40, False), (2, 1, True), (8, 100, True)))


# ------------------------------------------------------------------ set 4


def labels(rng, n, gaps=0.0):
    return [None if rng.random() < gaps else str(rng.choice([H, U])) for _ in range(n)]


def cells_by_hand(gold, predicted):
    tp = fp = fn = tn = 0
    for g, p in zip(gold, predicted):
        right = p is not None and p == g
        tp, fn = tp + (g == H and right), fn + (g == H and not right)
        tn, fp = tn + (g != H and right), fp + (g != H and not right)
    return tp, fp, fn, tn


@case("confusion")
def _(rng):
    from eval import confusion
    for n in (1, 7, 90):
        gold, predicted = labels(rng, n), labels(rng, n, 0.2)
        holds(tuple(confusion(gold, predicted, H)) == cells_by_hand(gold, predicted),
              f"confusion({gold}, {predicted})")
        holds({*map(type, confusion(gold, predicted, H))} == {int}, "counts are ints")


@case("f1")
def _(rng):
    from eval import f1
    for n in (1, 7, 90):
        gold, predicted = labels(rng, n), labels(rng, n, 0.2)
        tp, fp, fn, _ = cells_by_hand(gold, predicted)
        precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
        close(
            f1(gold, predicted, H),
            200 * precision * recall / max(precision + recall, 1e-300) if tp else 0,
            "f1",
        )
    close(f1([U, U], [U, U], H), 0, "f1 where nothing is positive")


@case("bootstrap")
def _(rng):
    from eval import bootstrap
    cells = rng.integers(20, 60, 4).tolist()
    rows = np.repeat(np.arange(4), cells)
    drawn = [np.bincount(rng.choice(rows, len(rows)), minlength=4) for _ in range(8000)]
    figures = [200 * tp / (2 * tp + fp + fn) for tp, fp, fn, _ in drawn]
    want = np.percentile(figures, [2.5, 97.5])
    got = bootstrap(tuple(cells))
    holds(len(got) == 2 and np.abs(np.array(got) - want).max() < 0.32 * np.std(figures),
          f"bootstrap({cells}) is about {want.round(1)}, not {got}")
    holds(bootstrap(tuple(cells)) == got, "the same seed gives the same interval")
    errors = []                         # of a sample of 2000, over many tables: small on average
    for _ in range(12):
        cells = rng.integers(20, 60, 4)
        tp, fp, fn, _ = rng.multinomial(sum(cells), cells / sum(cells), 8000).T
        figures = 200 * tp / (2 * tp + fp + fn)
        off = np.array(bootstrap(tuple(cells.tolist()))) - np.percentile(figures, [2.5, 97.5])
        errors.append(np.abs(off).mean() / np.std(figures))
    holds(np.mean(errors) < 0.1, "the ends of the interval vary: far fewer resamplings than 2000?")
    holds(np.isfinite(bootstrap((0, 0, 0, 9))).all(), "no positives: still a number")


def check_auprc(rng, digits):
    from eval import auprc
    hit = rng.random(50) < 0.4
    hit[0] = True
    score, before, want = np.round(rng.random(50) + 0.3 * hit, digits), 0, 0
    for t in sorted(set(score), reverse=True):
        tp, n = (hit & (score >= t)).sum(), (score >= t).sum()
        want, before = want + (tp - before) / hit.sum() * tp / n, tp
    close(auprc(hit.tolist(), score.tolist()), 100 * want, "auprc")
    keeps("auprc of arrays", auprc, hit, score)


@case("auprc", "distinct")
def _(rng):
    check_auprc(rng, 8)
    from eval import auprc
    n = int(rng.integers(3, 30))
    hit = np.arange(n) % 2 == 1
    want = 100 * (hit * hit.cumsum() / np.arange(1, n + 1)).sum() / hit.sum()
    got = auprc(hit.tolist(), (1 - 1e-10 * np.arange(n)).tolist())
    close(got, want, "auprc of scores that nearly agree")


@case("auprc", "ties")
def _(rng):
    check_auprc(rng, 1)


@case("threshold_for")
def _(rng):
    from eval import threshold_for
    hit, exact = rng.random(80) < 0.4, rng.random(80)
    wrong = lambda t: int((score[~hit] >= t).sum())
    for score in (exact, exact.round(1)):                   # the second with many ties
        for rate in (0.0, *rng.uniform(0.02, 0.9, 4)):
            t = threshold_for(hit.tolist(), score.tolist(), float(rate))
            allowed = rate * (~hit).sum()
            holds(wrong(t) <= allowed, f"rate {rate}: {wrong(t)} negatives at or above it")
            holds(wrong(np.nextafter(t, 0)) > allowed,
                  f"rate {rate}: a lower threshold keeps the rate too")
        keeps("threshold_for of arrays", threshold_for, hit, score, 0.3)
    holds(wrong(threshold_for(hit.tolist(), score.tolist(), 1.0)) == (~hit).sum(),
          "rate 1: everything may be above")
    hundred = rng.permutation(np.arange(100) / 100)
    for percent in (7, 14, 28, 29, 57, 58):             # 0.29 * 100 is below 29
        t = threshold_for([False] * 100, hundred.tolist(), percent / 100)
        holds((hundred >= t).sum() == percent, f"100 negatives, rate {percent / 100}: {percent} "
              f"may be above, not {(hundred >= t).sum()}")


@case("weighted_average")
def _(rng):
    from eval import weighted_average
    values, counts = rng.uniform(0, 100, 6).tolist(), rng.integers(1, 3000, 6).tolist()
    close(
        weighted_average(values, counts),
        sum(v * c for v, c in zip(values, counts)) / sum(counts),
        "weighted_average",
    )


@case("majority")
def _(rng):
    from eval import majority
    for _ in range(100):
        votes = [{n: None if rng.random() < 0.3 else str(rng.choice(w)) for n, w in FIELDS.items()}
                 for _ in range(rng.integers(1, 6))]
        for name, got in majority(votes).items():
            said = [v[name] for v in votes if v[name]]
            want = max(dict.fromkeys(said), key=said.count) if said else None
            holds(got == want, f"majority of {[v[name] for v in votes]} is {want}")


def check_reasoning(rng, block):
    from eval import reasoning_verdict
    for _ in range(150):
        text, want = "", dict.fromkeys(FIELDS)
        for number, (name, words) in enumerate(FIELDS.items(), 1):
            if rng.random() < 0.85:
                odd = [*words, "plain", "harmfully", f"non{words[0]}", words[1].upper(), "text.",
                       "\n"]
                said = [str(rng.choice(odd)) for _ in range(rng.integers(0, 8))]
                text += f"# Task {number}\n## Reasoning Step 1: {' '.join(said)}.\n\n"
                found = [w.lower() for w in said if w.lower() in words]
                want[name] = found[-1] if found else None
        text += f"# Task 4\n{H}, {R}.\n" if rng.random() < 0.2 else ""
        if block:
            text += str(rng.choice(["", "So, final ", "**"]))
            text += f"Answers: \nRequest: {H}\nCompletion: {R}\nResponse: {H}"
        holds(reasoning_verdict(text) == want, f"reasoning_verdict({text!r}) is {want}")


@case("reasoning_verdict", "sections")
def _(rng):
    check_reasoning(rng, False)


@case("reasoning_verdict", "block")
def _(rng):
    check_reasoning(rng, True)


def check_legacy(rng, kinds):
    from eval import legacy_pairs
    for name, (positive, other) in FIELDS.items():
        gold, texts = [str(rng.choice([positive, other])) for _ in range(40)], []
        for _ in gold:
            first, second = (f"{name}:{' ' * int(rng.integers(3))}{rng.choice([positive, other])}\n"
                             for _ in range(2))
            edge = first + "x" * (300 - len(first) + int(rng.integers(2)))  # 300 or 301 characters
            texts.append(["nothing", first + "x" * 300, "x" * 400 + first.upper(),
                          first.title() + second, edge][rng.choice(kinds)])
        got, want = legacy_pairs(gold, texts, name), legacy_by_hand(gold, texts, name)
        holds([list(x) for x in got] == [list(x) for x in want], f"legacy_pairs for {name}")


@case("legacy_pairs", "found")
def _(rng):
    check_legacy(rng, [2, 3, 4])


@case("legacy_pairs", "missing")
def _(rng):
    check_legacy(rng, [0, 1, 2, 3, 4])


def legacy_by_hand(gold, texts, name):
    positive, other = FIELDS[name]
    for label, text in zip(gold, texts):
        tail, found = text[-300:].lower(), None
        places = [i for i in range(len(tail)) if tail.startswith(name + ":", i)]
        for i in places:
            rest = tail[i + len(name) + 1:].lstrip()
            found = found or next((w for w in (positive, other) if rest.startswith(w)), None)
        if found:
            yield label, found
        elif label != H:
            yield from [(label, other if label == positive else positive)] * 2


@case("up_to_verdict")
def _(rng):
    from eval import up_to_verdict
    for _ in range(100):
        name = str(rng.choice(list(FIELDS)))
        lead = random_answer(rng).replace("Answers", "Notes") + " so.\n\n"
        shown = [n for n in FIELDS if rng.random() < 0.7]
        prose = f"The {name} is odd: so\n" if rng.random() < 0.3 else ""
        block = f"Answers: \n{prose}"
        bullet = str(rng.choice(["", "1. ", "- "]))
        lines = [f"{bullet}{n.capitalize()}: {FIELDS[n][0]}\n" for n in shown]
        block += "".join(lines * int(rng.integers(1, 3)))   # a block may say it twice
        field = f"{name.capitalize()}:"
        want = (lead + block).rstrip() + f"\n\nAnswers: \n{field}"
        if name in shown:
            want = lead + block[:block.index(field) + len(field)]
        holds(up_to_verdict(lead + block, name) == want,
              f"up_to_verdict({lead + block!r}, {name!r}) is {want!r}")
        holds(up_to_verdict(lead, name) == lead.rstrip() + f"\n\nAnswers: \n{field}",
              "no block: it is written")


def check_probabilities(rng, n):
    from data import Tokenizer
    from eval import verdict_probability
    from model import Llama, LlamaConfig, World
    tokenizer = Tokenizer.from_pretrained("toy/model")
    size = LlamaConfig.from_json("toy/model/config.json").vocab_size
    model = Llama.random(config(vocab_size=size), int(rng.integers(10 ** 6)), 0.3).double()
    words = ["please", "open", "the", "gate", "now"]
    start = " ".join(rng.choice(words, 9))
    prompts = [tokenizer.encode(f"{start} {' '.join(rng.choice(words, 5))}") for _ in range(n)]
    starts = ["Request:", "x\n\nAnswers: \nRequest:", "Answers: \nCompletion:"]
    texts = [str(rng.choice(starts)) for _ in prompts]
    for name in ("request", "completion"):
        seen = []

        def noting(tokens, *rest):
            seen.append(len(tokens))
            return model(tokens, *rest)

        got = verdict_probability(noting, tokenizer, prompts, texts, name, World(model.head.device))
        want, alone = [], 0
        for prompt, text in zip(prompts, texts):
            both = []
            for word in FIELDS[name]:
                ids, answer = prompt + tokenizer.encode(text), tokenizer.encode(" " + word)
                stream = torch.tensor(ids + answer)
                alone += len(stream) - 1
                with torch.no_grad():
                    hidden = model(stream, torch.full((len(stream),), len(stream)))
                    z = numbers(hidden @ model.head.T)
                logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
                both.append(sum(logp[len(ids) - 1 + i, t] for i, t in enumerate(answer)))
            want.append(1 / (1 + np.exp(both[1] - both[0])))
        close(got, want, f"verdict_probability of the {name}", 1e-7)
        shared = sum(len(p + tokenizer.encode(t)) for p, t in zip(prompts, texts))
        shared += (n - 1) * len(tokenizer.encode(start))
        holds(sum(seen) <= alone - shared, f"{sum(seen)} tokens were run; two branches share their "
              "prompt and text, all prompts their start")


@case("verdict_probability", "one")
def _(rng):
    check_probabilities(rng, 1)


@case("verdict_probability", "many")
def _(rng):
    check_probabilities(rng, 5)


# ------------------------------------------------------------------ set 5, by Triton's interpreter


def pages_and_readers(rng, gaps):
    """Groups of pages for number_reads, with free pages and idle rows between, or without."""
    rows, groups, page = int(rng.integers(2, 7)), [], 0
    for w in (rows, 2, 1):
        reads, line = [], 0
        for row in range(rows):
            reader = {rows: row, 2: row % 2, 1: 0}[w]
            fresh = w == 1 or w == 2 and reader == 0 or w == rows and row == 0
            if fresh:
                line = page + (int(rng.integers(0, 3)) if gaps else 0)
                count = int(rng.integers(1, 4))
                page = line + count
                own = rng.permutation(range(line, line + count)).tolist()
            skip = gaps and w == rows and rng.random() < 0.3
            reads.append(([] if skip else own, reader))
        groups.append((w, reads))
    return groups


def check_reads(groups):
    from model import number_reads
    tables, results = number_reads(groups)
    rows, reader, where = len(groups[0][1]), [], {}
    for (w, reads), group in zip(groups, range(len(groups))):
        pages = [page for own, _ in reads for page in own]
        if not pages:
            continue
        first, lines = tables.pop(0)
        holds(first == min(pages) and len(lines) == max(pages) - first + 1, f"pages of {reads}")
        for line, told in enumerate(lines):
            want = [0] * w
            for row, (own, place) in enumerate(reads):
                if first + line in own:
                    want[place] = row
                    where[row, first + line, group] = len(reader) + 1 + place
            holds(list(told) == want, f"the readers of page {first + line} are {want}, not {told}")
            reader += told
    holds(not tables, "more tables than groups with pages")
    want = [[where[row, page, group] for group, (_, reads) in enumerate(groups)
             for page in reads[row][0]] for row in range(rows)]
    holds([list(own) for own in results] == want, f"results {results}, wanted {want}, of {groups}")


@case("number_reads", "full")
def _(rng):
    for _ in range(20):
        check_reads(pages_and_readers(rng, False))


@case("number_reads", "gaps")
def _(rng):
    for _ in range(20):
        check_reads(pages_and_readers(rng, True))


def check_rope_kernel(rng, T, heads):
    from model import launch_rope_kernel
    x, angle = tensor(rng, T, heads, 32).float(), 5 * tensor(rng, T, 1, 16).float()
    got = launch_rope_kernel(x, angle.cos(), angle.sin())
    close(got, turned(x, numbers(angle)[:, 0]), f"{T} tokens of {heads} heads", 1e-5)


@case("rope_kernel", "one")
def _(rng):
    for heads in (1, int(rng.integers(2, 6))):
        check_rope_kernel(rng, int(rng.integers(1, 6)), heads)


@case("rope_kernel", "many")
def _(rng):
    check_rope_kernel(rng, int(rng.integers(20, 60)), int(rng.integers(2, 6)))


def launch_totals(z, targets):
    import model
    picked, total = torch.full((2, len(z)), math.nan)
    model.launch_row_totals(z, targets, picked, total)
    return picked, total


def random_logits(rng):
    for V in (int(rng.integers(3, 40)), 4096 + int(rng.integers(1, 60))):   # a part is 4096 wide
        z = 5 * tensor(rng, 4, V).float()
        z[1, -1] = z[2, 0] = 40  # the largest, late or early
        yield z, torch.from_numpy(rng.integers(0, V, 4))


@case("row_totals", "picked")
def _(rng):
    for z, targets in random_logits(rng):
        close(launch_totals(z, targets)[0], z[range(4), targets], "z[target]", 1e-6)


@case("row_totals", "total")
def _(rng):
    for z, targets in random_logits(rng):
        want = np.log(np.exp(numbers(z)).sum(1))
        close(launch_totals(z, targets)[1], want, "log sum exp(z)", 1e-5)


def check_row_gradients(rng, shift):
    import model
    for z, targets in random_logits(rng):
        targets = targets + shift * z.shape[1]
        total, g = z.logsumexp(-1), tensor(rng, 4).float()
        p = np.exp(numbers(z) - numbers(total)[:, None])
        one = np.array([[v == t for v in range(z.shape[1])] for t in targets.tolist()])
        want = numbers(g)[:, None] * (one - p)
        close(model.launch_row_gradients(z.clone(), targets, total, g), want, "gradient of z", 1e-5)


@case("row_gradients", "inside")
def _(rng):
    check_row_gradients(rng, 0)


@case("row_gradients", "outside")
def _(rng):
    check_row_gradients(rng, 1)
    check_row_gradients(rng, -1)


def check_tree_kernels(rng, T, which, H=2, G=1, E=16):
    """The forward kernel's result, and gradients of `which`; all three kernels run."""
    from model import TreeAttention
    end = forest(rng, 0, T)
    skip = int(rng.integers(0, T // 2))
    shapes = (T - skip, H), (T, G), (T, G), (T - skip, H)
    q, k, v, g = (tensor(rng, *shape, E).float() for shape in shapes)
    xs = [x.clone().requires_grad_() for x in (q, k, v)]
    got = TreeAttention.apply(*xs, plan_of(end, skip))
    close(got, attend_by_hand(q, k, v, end), "attention", 1e-5)
    got.backward(g)                                                         # which reads LSE
    want = attention_gradients(q, k, v, g, end)
    for name, x, y in zip("qkv", xs, want):
        if name in which:
            close(x.grad, y, f"gradient of {name}", 1e-5)


for kernel, result in (("tree_forward", "q"), ("tree_backward_q", "q"),
                       ("tree_backward_kv", "kv")):
    for size, part in (((3, 31), "tile"), ((34, 60), "forest")):
        @case(kernel, part)
        def _(rng, size=size, result=result):
            check_tree_kernels(rng, int(rng.integers(*size)), result)
            check_tree_kernels(rng, int(rng.integers(*size)), result, H=4, G=2)
            check_tree_kernels(rng, int(rng.integers(*size)), result, E=32)


def check_pages(rng, filled, w):
    from model import PAGE, launch_page_kernel
    R = int(rng.integers(1, 5))
    q, k, v = (tensor(rng, *shape, 16).float()
               for shape in ((7, 2, R), (len(filled), 2, PAGE), (len(filled), 2, PAGE)))
    readers = torch.tensor(rng.integers(7, size=(len(filled), w)))
    bias = torch.where(torch.arange(PAGE) < torch.tensor(filled)[:, None], 0, -3e4).float()
    lse = torch.full((len(filled) * w, 2, R), math.nan)
    out = torch.full((len(filled) * w, 2, R, 16), math.nan)
    launch_page_kernel(q, readers, k, v, bias, lse, out)
    lse = lse.unflatten(0, (len(filled), w))
    out = out.unflatten(0, (len(filled), w))
    for p, n in enumerate(filled):
        s = q[readers[p]].double() @ k[p, :, :n].double().mT / 4
        close(lse[p], s.logsumexp(-1), f"log sum exp of {n} keys", 1e-5)
        close(out[p], s.softmax(-1) @ v[p, :, :n].double(), f"attention to {n} keys", 1e-5)


@case("page_kernel", "full")
def _(rng):
    for W in (1, int(rng.integers(2, 16)), 70):                             # readers of a page
        check_pages(rng, [64, 64, 64], W)


@case("page_kernel", "part")
def _(rng):
    for W in (1, int(rng.integers(2, 16)), 70):
        check_pages(rng, [1, 64, int(rng.integers(2, 64))], W)
