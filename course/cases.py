"""The instructor's cases: each exercise on random inputs, against its formula written down here once more.

`run(name, seed)` raises where the function of that name is wrong. What is expected comes from loops over
numbers in NumPy, from a property that a right answer must have, or from one sequence at a time; never from
the function itself. WRONG holds plausible mistakes, which must not pass.
"""
import math
import random
import zlib
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

H, U, R, C = "harmful", "unharmful", "refusal", "compliance"
FIELDS = {"request": (H, U), "completion": (R, C), "response": (H, U)}
CASES = {}


def case(*names):
    """Register a function of a random generator as the case of these exercises."""
    return lambda function: CASES.update(dict.fromkeys(names, function))


def run(name, seed):
    """Run the case of an exercise; the same seed gives the same inputs."""
    mixed = zlib.crc32(f"{seed} {name}".encode())
    torch.manual_seed(mixed)
    random.seed(mixed)
    CASES[name](np.random.default_rng(mixed))


def numbers(x):
    return np.asarray(x.detach().double() if torch.is_tensor(x) else x, dtype=np.float64)


def close(got, want, what, tolerance=1e-9):
    """AssertionError that says by how much `got` misses `want`, relative to the largest number (or 1)."""
    got, want = numbers(got), numbers(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    worst = np.abs(got - want).max(initial=0)
    assert worst <= tolerance * max(1, np.abs(want).max(initial=0)), f"{what}: off by {worst:.3g}"


def holds(fact, what):
    """AssertionError with a sentence, where `fact` is not true."""
    assert fact, what


def tensor(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made meanwhile."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                self.size = max(self.size, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return out


def config(**changes):
    from model import LlamaConfig
    return LlamaConfig(**{**dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                 num_attention_heads=6, num_key_value_heads=2, head_dim=8), **changes})


def forest(rng, start, stop, depth=0):
    """`end` of rows start..stop of a random forest, depth first."""
    end = []
    while start < stop:
        size = int(rng.integers(1, min(stop - start, 25) + 1))
        own = int(rng.integers(1, size + 1)) if depth < 4 else size
        end += [start + size] * own + forest(rng, start + own, start + size, depth + 1)
        start += size
    return end


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
        x, weight, eps = 3 * tensor(rng, *shape), tensor(rng, shape[-1]), float(rng.uniform(0.01, 1))
        want = numbers(weight) * numbers(x) / np.sqrt((numbers(x) ** 2).mean(-1, keepdims=True) + eps)
        close(rms_norm(x, weight, eps), want, "rms_norm")
    large = (300 * tensor(rng, 4, 512)).half()                               # squares overflow half precision
    got = rms_norm(large, torch.ones(512), 1e-5)
    holds(got.dtype == torch.float16, "the result has the dtype of x")
    close(got, numbers(large) / np.sqrt((numbers(large) ** 2).mean(-1, keepdims=True)),
          "mean in at least float32", 2e-3)


@case("rope_frequencies")
def _(rng):
    from model import rope_frequencies
    for scaled in (False, True):
        E, theta = 2 * int(rng.integers(8, 65)), float(rng.uniform(5e3, 1e6))
        low = float(rng.uniform(0.5, 2))
        scaling = dict(factor=float(rng.uniform(2, 40)), low_freq_factor=low,
                       high_freq_factor=low + float(rng.uniform(1, 4)),
                       original_max_position_embeddings=int(rng.integers(1000, 9000)))
        want = []
        for i in range(E // 2):
            f = theta ** (-2 * i / E)
            turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)    # original / wavelength
            if scaled and turns < scaling["low_freq_factor"]:
                f /= scaling["factor"]
            elif scaled and turns < scaling["high_freq_factor"]:
                s = (turns - low) / (scaling["high_freq_factor"] - low)
                f = s * f + (1 - s) * f / scaling["factor"]
            want.append(f)
        got = rope_frequencies(config(head_dim=E, rope_theta=theta, rope_scaling=scaling if scaled else None))
        holds(got.dtype == torch.float64, "frequencies are float64")
        close(numbers(got) / np.array(want), np.ones(E // 2), "rope_frequencies, relative")


@case("apply_rope")
def _(rng):
    from model import apply_rope
    for T, heads, E in ((1, 1, 2), (9, 3, 8), (5, 2, 64)):
        x, angle = tensor(rng, T, heads, E), tensor(rng, T, 1, E // 2) * 5
        close(apply_rope(x, angle.cos(), angle.sin()), turned(x, angle[:, 0]), "apply_rope")


@case("attention_by_mask")
def _(rng):
    from model import attention_by_mask, tree_plan
    for T, heads, groups in ((1, 1, 1), (40, 4, 2), (50, 3, 3)):
        end = forest(rng, 0, T)
        q, k, v = 2 * tensor(rng, T, heads, 4), 2 * tensor(rng, T, groups, 4), tensor(rng, T, groups, 4)
        close(attention_by_mask(q, k, v, tree_plan(torch.tensor(end))), attend_by_hand(q, k, v, end),
              "attention_by_mask")


@case("Attention.forward")
def _(rng):
    from model import Attention, rope_tables
    c, T, asked = config(), 9, []
    layer, x = Attention(c).double(), tensor(rng, T, c.hidden_size)
    position = torch.arange(T) + int(rng.integers(1, 99))

    def attend(q, k, v):
        asked.append((q, k, v))
        return q * 2 + 1

    got = layer(x, *rope_tables(c, position, x.dtype), attend)
    angle = numbers(position)[:, None] * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    split = lambda part: (numbers(x) @ numbers(part.weight).T).reshape(T, -1, c.head_dim)
    want = [turned(split(layer.q_proj), angle), turned(split(layer.k_proj), angle), split(layer.v_proj)]
    for name, a, b in zip("qkv", asked[0], want, strict=True):
        close(a, b, name)
    close(got, (want[0] * 2 + 1).reshape(T, -1) @ numbers(layer.o_proj.weight).T, "Attention.forward")


@case("MLP.forward")
def _(rng):
    from model import MLP
    layer, x = MLP(config()).double(), 3 * tensor(rng, 5, 24)
    gate, up, down = (numbers(part.weight).T for part in (layer.gate_proj, layer.up_proj, layer.down_proj))
    a = numbers(x) @ gate
    close(layer(x), (a / (1 + np.exp(-a)) * (numbers(x) @ up)) @ down, "MLP.forward")


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


# ------------------------------------------------------------------ set 2


@case("tree_plan")
def _(rng):
    from model import tree_plan
    for T, skip in ((1, 0), (60, 0), (300, 0), (300, 70)):
        end = forest(rng, 0, T)
        sees, plan = visible(end), tree_plan(torch.tensor(end), skip)
        close(plan.position, sees.sum(1) - 1, "position = how many keys a row sees, less one")
        holds(plan.skip == skip and plan.end.tolist() == end, "a plan keeps end and skip")
    a = int(rng.integers(1, 6))
    for bad in ([a + 2] + [a + 3] * (a + 2), [a + 1] * a, list(range(a)), [2, 2, 3, 3, 5, 4]):
        try:
            tree_plan(torch.tensor(bad))
        except ValueError:
            continue
        raise AssertionError(f"end = {bad} does not nest: ValueError expected")


@case("row_tiles", "TileAttention.backward")
def _(rng):
    from model import attention, attention_by_mask, tree_plan
    for T in (1, 60, 300):
        end = forest(rng, 0, T)
        q, k, v = 2 * tensor(rng, T, 4, 4), 2 * tensor(rng, T, 2, 4), tensor(rng, T, 2, 4)
        # the last rows only, as after a cached prefix
        for first in (0, int(rng.integers(0, T)), T - 1):
            close(attention(q[first:], k, v, tree_plan(torch.tensor(end), first)), attend_by_hand(q[first:], k, v, end),
                  f"attention, rows from {first}")
        q, k, v, plan = *(x.requires_grad_() for x in (q, k, v)), tree_plan(torch.tensor(end))
        g = tensor(rng, T, 4, 4)
        got, want = (torch.autograd.grad(f(q, k, v, plan), (q, k, v), g) for f in (attention, attention_by_mask))
        for name, a, b in zip("qkv", got, want):
            close(a, b, f"gradient of {name}")
    # 80 sequences: 1/80 of the square is needed
    end = torch.arange(1280) // 16 * 16 + 16
    q, k, v = tensor(rng, 1280, 4, 4), tensor(rng, 1280, 2, 4), tensor(rng, 1280, 2, 4)
    with Largest() as largest:
        attention(q, k, v, tree_plan(end))
    holds(largest.size < 1280 * 1280 // 8,
          f"a tensor of {largest.size} numbers: the whole square was computed or masked")


def scores_by_hand(rng, N, D, V, scale=1.0):
    """hidden, head, targets; log p and the gradients of sum(g log p), by the formulas."""
    hidden, head = scale * tensor(rng, N, D).numpy(), tensor(rng, V, D).numpy()
    targets, g = rng.integers(0, V, N), tensor(rng, N).numpy()
    z = hidden @ head.T
    top = z.max(1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(z - top).sum(1))
    dz = g[:, None] * (np.eye(V)[targets] - np.exp(z - total[:, None]))
    return (torch.from_numpy(x)
            for x in (hidden, head, targets, g, z[range(N), targets] - total, dz @ head, dz.T @ hidden))


def check_logprobs(rng, gradient):
    import model
    chunks = patch.object(model.TokenLogprobs, "LOGITS", 500)               # ten rows a chunk where V = 50
    for N, D, V, scale in ((1, 3, 5, 1), (203, 8, 50, 1), (37, 8, 50, 300)):
        hidden, head, targets, g, want, d_hidden, d_head = scores_by_hand(rng, N, D, V, scale)
        hidden, head = hidden.requires_grad_(), head.requires_grad_()
        with chunks, Largest() as largest:
            got = model.token_logprobs(hidden, head, targets)
            if gradient:
                got.backward(g)
        holds(N < 100 or largest.size < N * V, f"a tensor of {largest.size} numbers: all logits at once")
        close(got, want, "log p")
        if gradient:
            close(hidden.grad, d_hidden, "gradient of hidden")
            close(head.grad, d_head, "gradient of head")


case("TokenLogprobs.forward")(lambda rng: check_logprobs(rng, False))
case("TokenLogprobs.backward")(lambda rng: check_logprobs(rng, True))


@case("common_prefix")
def _(rng):
    from data import common_prefix
    for _ in range(200):
        some = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 4))]
        start = rng.integers(0, 9, rng.integers(0, 5)).tolist()
        some = [start + x for x in some]
        want = max(n for n in range(min(map(len, some))) if len({tuple(x[:n]) for x in some}) == 1)
        holds(common_prefix(some) == want, f"common_prefix({some}) is {want}")


def random_examples(rng, roots=1, n=8):
    """Examples of random ids; those of one root share its first tokens."""
    from data import Example
    ids = lambda low, high: rng.integers(0, 50, rng.integers(low, high)).tolist()
    starts = [ids(3, 8) for _ in range(roots)]
    chosen = [starts[int(rng.integers(roots))] for _ in range(n)]
    return [Example(start + ids(1, 12), [ids(1, 9) for _ in range(rng.integers(1, 4))], len(start))
            for start in chosen]


def check_pack(p, wanted):
    """Every loss pair must see its prompt and the answer so far, no more; wanted: {number: (prompt, ids)}."""
    sees, tokens, got = visible(p.end.tolist()), p.tokens.numpy(), {}
    for row, target, answer in zip(p.rows.tolist(), p.targets.tolist(), p.answer.tolist(), strict=True):
        prompt, ids = wanted[answer]
        done = got.setdefault(answer, [])
        holds(tokens[sees[row]].tolist() == prompt + ids[:len(done)],
              f"answer {answer}: row {row} sees other tokens than its prompt and the answer so far")
        done.append(target)
    for answer, targets in got.items():
        holds(targets == wanted[answer][1], f"answer {answer}: {targets} is scored, not {wanted[answer][1]}")
    return got


@case("lay_out")
def _(rng):
    from data import lay_out
    for roots in (0, 1):
        examples, number, branches, wanted = random_examples(rng), 0, [], {}
        root = examples[0].prompt[:examples[0].root] if roots else []
        for e in examples:
            answers = list(enumerate(e.answers, number))
            branches.append((e.prompt, answers))
            wanted.update({n: (e.prompt, ids) for n, ids in answers})
            number += len(answers)
        p = lay_out(root, branches)
        holds(check_pack(p, wanted).keys() == wanted.keys(), "an answer is not scored")
        size = len(root) + sum(len(e.prompt) - len(root) + sum(len(a) - 1 for a in e.answers)
                               for e in examples)
        holds(len(p.tokens) == len(p.end) == size,
              f"{len(p.tokens)} tokens; with the shared prefix once there are {size}")


@case("pack")
def _(rng):
    from data import pack
    examples = random_examples(rng, roots=2, n=14)
    answers = [(i, e, ids) for i, e in enumerate(examples) for ids in e.answers]
    wanted = {n: (e.prompt, ids) for n, (_, e, ids) in enumerate(answers)}
    for share in (True, False):
        for most in (1, 45, 90, 10 ** 6):
            packs, seen = pack(examples, most, share), []
            for p in packs:
                here = sorted(check_pack(p, wanted))
                seen += here
                owners = {answers[n][0] for n in here}
                holds(here == [n for n, a in enumerate(answers) if a[0] in owners],
                      "an example is torn apart")
                holds(len(p.tokens) <= most or len(owners) == 1,
                      f"{len(p.tokens)} tokens in a pack of several examples")
                packed = [examples[i] for i in sorted(owners)]
                holds(not share or len({tuple(e.prompt[:e.root]) for e in packed}) == 1,
                      "a pack holds one instruction")
                own = sum(len(e.prompt) - e.root + sum(len(a) - 1 for a in e.answers)
                          for e in packed)
                if share:
                    holds(len(p.tokens) == own + packed[0].root,
                          "the instruction once, each prompt once")
            holds(sorted(seen) == sorted(wanted), "every answer in exactly one pack")
            # first fit: no two packs would fit into one
            for a in packs:
                for b in packs:
                    root = answers[int(a.answer[0])][1].root if share else 0
                    same = a is not b and a.tokens[:root].tolist() == b.tokens[:root].tolist()
                    both = len(a.tokens) + len(b.tokens) - root
                    holds(not same or both > most, "two packs would fit into one")


@case("sft_loss")
def _(rng):
    from train_sft import sft_loss
    for n in (0, 1, 30):
        x, count = -tensor(rng, n).abs(), int(rng.integers(31, 99))
        close(sft_loss(x, count), sum(-v for v in x.tolist()) / count, "sft_loss")


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
    n, size, seed = int(rng.integers(40, 90)), int(rng.integers(3, 20)), int(rng.integers(10 ** 6))
    got, a = list(batches(n, size, 2, seed)), -(-n // size)
    holds(len(got) == 2 * a and all(len(b) == size for b in got[:a - 1]),
          "batches of `size`, the last of an epoch may be short")
    epochs = [[i for b in part for i in b] for part in (got[:a], got[a:])]
    holds(all(sorted(e) == list(range(n)) for e in epochs), "every example once an epoch")
    holds(epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]), "another order in each epoch")
    holds(list(batches(n, size, 1, seed)) == got[:a], "the order depends on (seed, epoch) alone")
    holds(list(batches(n, size, 2, seed + 1)) != got, "another seed, another order")


@case("deal")
def _(rng):
    from data import Pack, deal
    zeros, scored = lambda n: torch.zeros(n, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for ranks in (1, 2, 3, 7):
        sizes = rng.choice(3000, int(rng.integers(1, 20)), replace=False) + 1
        packs = [Pack(zeros(n), zeros(n) + n, scored, scored, scored) for n in sizes.tolist()]
        hands = [deal(packs, rank, ranks) for rank in range(ranks)]
        most = -(-len(packs) // ranks)
        holds(all(len(h) == most for h in hands), "the same number of packs to each rank")
        dealt = [id(p) for h in hands for p in h if len(p.rows)]
        holds(sorted(dealt) == sorted(map(id, packs)), "every pack to exactly one rank")
        loads, counts = [0] * ranks, [0] * ranks
        for n in sorted(sizes.tolist(), reverse=True):
            r = min((r for r in range(ranks) if counts[r] < most), key=lambda r: loads[r])
            loads[r], counts[r] = loads[r] + n, counts[r] + 1
        got = [sum(len(p.tokens) for p in h if len(p.rows)) for h in hands]
        holds(sorted(got) == sorted(loads),
              f"loads {sorted(got)}; longest first to the lightest gives {sorted(loads)}")


# ------------------------------------------------------------------ set 3


@case("draw_token")
def _(rng):
    from model import draw_token
    n, V = 20000, 7
    logits, T = 2 * tensor(rng, 1, V), float(rng.uniform(0.5, 1.5))
    p = np.exp(numbers(logits)[0] / T)
    p, order = p / p.sum(), np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]                                  # mass of likelier tokens
    kept = int(rng.integers(1, V))                                           # how many the nucleus is to hold
    top_p = float((before[kept] + before[kept - 1]) / 2)
    want = np.zeros(V)
    want[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
    key, position = torch.from_numpy(rng.integers(0, 2 ** 31, n)), torch.from_numpy(rng.integers(0, 5000, n))
    got = draw_token(logits.expand(n, V), key, position, T, top_p)
    share = np.bincount(got.numpy(), minlength=V) / n
    holds(not share[want == 0].any(), "a token outside the nucleus was drawn")
    close(share, want, "frequencies in the nucleus", 5 * 0.5 / math.sqrt(n))
    rows = torch.from_numpy(rng.choice(n, 20, replace=False))
    many = 2 * tensor(rng, 20, 1000)
    together = draw_token(many, key[rows], position[rows], T, 0.9)
    alone = [draw_token(many[i:i + 1], key[rows[i:i + 1]], position[rows[i:i + 1]], T, 0.9).item()
             for i in range(20)]
    holds(together.tolist() == alone, "what a row draws depends on the other rows")
    holds(draw_token(many, key[rows], position[rows], 0, 0.9).tolist() == many.argmax(-1).tolist(),
          "temperature 0 is argmax")


def random_answer(rng):
    """A generated text: verdict lines in many spellings, prose, and now and then an "Answers:" line."""
    lines = []
    for _ in range(rng.integers(0, 14)):
        name = str(rng.choice(list(FIELDS)))
        word = str(rng.choice([*FIELDS[name] * 3, "None", "ambiguous", "un-harmful", FIELDS[name][0] + "ly"]))
        line = f"{name.capitalize()}: {word}"
        style = rng.integers(9)
        lines.append([line, line, line.lower(), line.upper(), "- " + line, "### " + line + "!",
                      f"**{name.capitalize()}:** {word}.", f"the {line} was weighed",
                      "Step 1: a plain sentence"][style])
        if rng.random() < 0.15:
            lines.append("Answers: ")
    return "\n".join(lines)


def verdict_by_hand(text):
    lines = text.lower().split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("answers:")]
    verdict = {}
    for name, words in FIELDS.items():
        word = None
        for part in (lines[starts[-1]:] if starts else lines, lines):
            said = [line.lstrip("-#* ") for line in part]
            said = [line[len(name) + 1:].lstrip("* ") for line in said if line.startswith(name + ":")]
            if said:
                word = "".join(c if c.isalnum() else " " for c in said[-1]).split()[0]
                break
        verdict[name] = word if word in words else None
    return verdict


@case("parse_verdict")
def _(rng):
    from data import parse_verdict
    for _ in range(500):
        text = random_answer(rng)
        want = verdict_by_hand(text)
        holds(parse_verdict(text) == want, f"parse_verdict({text!r}) is {want}")


@case("gold_verdict")
def _(rng):
    from data import format_answers, format_input, gold_verdict
    empty = dict.fromkeys(FIELDS)
    for _ in range(60):
        name = str(rng.choice(list(FIELDS)))
        word = str(rng.choice(FIELDS[name]))
        response = str(rng.choice(["a", "None said", "b\n\nAI assistant:\nc"]))
        one = {"request": format_input("x"), "completion": format_input("x", response),
               "response": format_input("x", response)}
        got = gold_verdict({"input": one[name], "output": f" {word.capitalize()}\n"})
        holds(got == {**empty, name: word}, f"one word, {word}, is about the {name}")
        verdict = {n: [None, *words][rng.integers(3)] for n, words in FIELDS.items()}
        got = gold_verdict({"input": one[name],
                            "output": "# Task 1\nA reason.\n\n" + format_answers(**verdict)})
        holds(got == verdict, "a block of answers is read by parse_verdict")


def all_verdicts():
    return [dict(zip(FIELDS, (a, b, c))) for a in (H, U, None) for b in (R, C, None) for c in (H, U, None)]


@case("judge")
def _(rng):
    from mine_hard import judge
    for verdict in all_verdicts():
        for gold in all_verdicts():
            asked = [n for n in FIELDS if gold[n] is not None]
            wrong = [n for n in asked if verdict[n] != gold[n]]
            holds(judge(verdict, gold) is (len(asked) > 0 and not wrong), f"judge({verdict}, {gold})")


def random_sample(rng, text="t", gaps=0.1):
    verdict = {n: None if rng.random() < gaps else str(rng.choice(words)) for n, words in FIELDS.items()}
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
        right = [all(s["verdict"][name] == gold[name] for name in labelled) and bool(labelled) for s in samples]
        want = [None if lack else ok for lack, ok in zip(lacks, right)]
        for name in labelled:
            right = [None if lack else s["verdict"][name] == gold[name] for lack, s in zip(lacks, samples)]
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
    holds(pick_pair(samples, right, "longest", random.Random(0)) == longest, "longest")
    drawn = Counter(pick_pair(samples, right, "random", random.Random(i)) for i in range(600))
    holds(set(drawn) == {(a, b) for a in part(True) for b in part(False)},
          "random: every correct with every incorrect sample")
    holds(min(drawn.values()) > 600 / 9 / 3, "random: all pairs about equally often")
    again = [pick_pair(samples, right, "random", random.Random(5)) for _ in range(3)]
    holds(len(set(again)) == 1, "random: the given generator decides")


@case("sample_weights")
def _(rng):
    from mine_hard import sample_weights
    for n in (2, 5, 40):
        d, gamma = rng.integers(-4, 5, n).tolist(), float(rng.uniform(0.05, 0.9))
        d[:2] = [-5, 6]
        close(sample_weights(d, gamma), np.interp(d, [-5, 6], [1 - gamma, 1 + gamma]),
              f"sample_weights({d}, {gamma})")
    holds(list(sample_weights([3, 3], 0.2)) == [1, 1] and list(sample_weights([], 0.2)) == [], "all equal: 1")


@case("select")
def _(rng):
    from data import format_answers
    from mine_hard import select
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
                     all(s["verdict"][f] == gold[f] for f in FIELDS if gold[f]) for s in by_prompt[i]}
            good = sum(right.values())
            count["all right" if good == k else "hard" if good else "all wrong"] += 1
            count["answers without verdict"] += sum(set(s["verdict"].values()) == {None}
                                                    for s in by_prompt[i])
            if 0 < good < k and records[i]["input"] not in seen:
                seen.add(records[i]["input"])
                want.append((i, good, right))
    holds(len(want) > 2, "too few hard prompts in this draw; take another seed")
    hard, got = select(records, [f"s{i}" for i in range(n)], answers, "all", "random", 0.3, 0)
    for what in ("all right", "hard", "all wrong", "answers without verdict"):
        holds(got[what] == count[what], f"{what}: {got[what]}, expected {count[what]}")
    holds([p["input"] for p in hard] == [records[i]["input"] for i, _, _ in want],
          "one entry for each hard input, in order")
    for pair, (i, good, right) in zip(hard, want):
        holds(right[pair["chosen"]] and not right[pair["rejected"]], "chosen is correct, rejected is not")
        got = [pair[name] for name in ("k_correct", "k_incorrect", "source", "instruction")]
        holds(got == [good, k - good, f"s{i}", "i"], "k_correct, k_incorrect, source, instruction")
    d = [k - 2 * good for _, good, _ in want]
    alpha = np.interp(d, [min(d), max(d)], [0.7, 1.3]) if min(d) < max(d) else np.ones(len(d))
    close([p["weight"] for p in hard], alpha, "weights")
    holds(select(records, ["s"] * n, answers, "all", "random", 0.3, 0)[0][0]["chosen"] == hard[0]["chosen"],
          "seeded")


@case("dpo_loss")
def _(rng):
    from train_dpo import dpo_loss
    x, beta, weight = 20 * tensor(rng, 4, 30), float(rng.uniform(0.01, 1)), tensor(rng, 30).abs()
    margin = numbers((x[0] - x[2]) - (x[1] - x[3]))
    close(dpo_loss(*x, beta, weight), numbers(weight) * np.logaddexp(0, -beta * margin), "dpo_loss")
    far = torch.tensor([1e4, -1e4], dtype=torch.float64)                     # exp of these is 0 or infinite
    close(dpo_loss(far, 0 * far, 0 * far, 0 * far, 1.0, torch.ones(2)), [0, 1e4],
          "dpo_loss of margins of 10000")


@case("answer_sums")
def _(rng):
    from train_dpo import answer_sums
    x, answer = tensor(rng, 50), torch.from_numpy(rng.integers(0, 6, 50))
    want = np.zeros(8)
    np.add.at(want, answer.numpy(), x.numpy())
    close(answer_sums(x, answer, 8), want, "answer_sums")


@case("pairs_loss")
def _(rng):
    from train_dpo import pairs_loss
    n, beta, sft = 6, float(rng.uniform(0.05, 1)), float(rng.uniform(0.5, 3))
    policy, reference = (-5 * tensor(rng, n, 2).abs() for _ in range(2))
    length, weight = torch.from_numpy(rng.integers(1, 9, n)).double(), tensor(rng, n).abs()
    names = ["loss", "preference", "accuracy", "margin", "chosen_logprob", "rejected_logprob"]
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
    got = pairs_loss(policy.requires_grad_(), reference, length, weight, beta, sft)
    holds(sorted(got) == sorted(names), f"the figures of each pair are {', '.join(names)}")
    for name, row in zip(names, want):
        close(got[name], row, f"{name} of each pair")
    got["loss"].sum().backward()
    close(policy.grad, gradient, "gradient")


@case("reference_logprobs")
def _(rng):
    from data import Example
    from model import World
    from train_dpo import reference_logprobs
    ids, scale = lambda n: rng.integers(0, 50, n).tolist(), torch.ones(()).double().requires_grad_()
    root = ids(3)
    examples = [Example(root + ids(int(rng.integers(1, 9))),
                        [ids(int(m)) for m in rng.integers(1, 7, 2)], 3) for _ in range(8)]
    f = lambda last, target: -(last * 0.7 + target * 0.11 + 1)               # log p of a token after another
    model = lambda tokens, end, rows, targets: scale * f(tokens[rows].double(), targets.double())
    want = [[sum(map(f, [e.prompt[-1], *answer[:-1]], answer)) for answer in e.answers]
            for e in examples]
    for batch_size, max_tokens, no_share in ((3, 40, False), (100, 10 ** 6, False), (2, 1, True)):
        args = SimpleNamespace(batch_size=batch_size, max_tokens=max_tokens, no_share=no_share)
        got = reference_logprobs(model, examples, args, World(torch.device("cpu")))
        holds(not got.requires_grad, "the reference has no gradient")
        close(got, want, "reference_logprobs")


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


@case("f1")
def _(rng):
    from eval import f1
    for n in (1, 7, 90):
        gold, predicted = labels(rng, n), labels(rng, n, 0.2)
        tp, fp, fn, _ = cells_by_hand(gold, predicted)
        precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
        close(f1(gold, predicted, H), 200 * precision * recall / max(precision + recall, 1e-300) if tp else 0,
              "f1")
    close(f1([U, U], [U, U], H), 0, "f1 where nothing is positive")


@case("bootstrap")
def _(rng):
    from eval import bootstrap
    cells = rng.integers(100, 300, 4).tolist()
    rows = np.repeat(np.arange(4), cells)
    drawn = [np.bincount(rng.choice(rows, len(rows)), minlength=4) for _ in range(3000)]
    want = np.percentile([200 * tp / (2 * tp + fp + fn) for tp, fp, fn, _ in drawn], [2.5, 97.5])
    got = bootstrap(tuple(cells))
    holds(len(got) == 2 and np.abs(np.array(got) - want).max() < 1.2,
          f"bootstrap({cells}) is about {want.round(1)}, not {got}")
    holds(bootstrap(tuple(cells)) == got, "the same seed gives the same interval")
    holds(np.isfinite(bootstrap((0, 0, 0, 9))).all(), "no positives: still a number")


@case("auprc")
def _(rng):
    from eval import auprc
    for digits in (1, 8):                                                    # with ties, and without
        hit = rng.random(50) < 0.4
        hit[0] = True
        score, before, want = np.round(rng.random(50) + 0.3 * hit, digits), 0, 0
        for t in sorted(set(score), reverse=True):
            tp, n = (hit & (score >= t)).sum(), (score >= t).sum()
            want, before = want + (tp - before) / hit.sum() * tp / n, tp
        close(auprc(hit.tolist(), score.tolist()), 100 * want, "auprc")


@case("threshold_for")
def _(rng):
    from eval import threshold_for
    hit, score = rng.random(80) < 0.4, rng.random(80)
    wrong = lambda t: int((score[~hit] >= t).sum())
    for rate in (0.0, *rng.uniform(0.02, 0.98, 4)):
        t, allowed = threshold_for(hit.tolist(), score.tolist(), float(rate)), rate * (~hit).sum()
        holds(wrong(t) <= allowed, f"rate {rate}: {wrong(t)} negatives at or above the threshold")
        holds(wrong(np.nextafter(t, 0)) > allowed, f"rate {rate}: a lower threshold keeps the rate too")
    holds(wrong(threshold_for(hit.tolist(), score.tolist(), 1.0)) == (~hit).sum(),
          "rate 1: everything may be above")


@case("weighted_average")
def _(rng):
    from eval import weighted_average
    values, counts = rng.uniform(0, 100, 6).tolist(), rng.integers(1, 3000, 6).tolist()
    close(weighted_average(values, counts), sum(v * c for v, c in zip(values, counts)) / sum(counts),
          "weighted_average")


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


@case("reasoning_verdict")
def _(rng):
    from eval import reasoning_verdict
    for _ in range(200):
        text, want = "", dict.fromkeys(FIELDS)
        for number, (name, words) in enumerate(FIELDS.items(), 1):
            if rng.random() < 0.85:
                said = [str(rng.choice([*words, "plain", "harmfully", words[1].upper(), "text.", "\n"]))
                        for _ in range(rng.integers(0, 8))]
                text += f"# Task {number}\n## Reasoning Step 1: {' '.join(said)}.\n\n"
                found = [w.lower() for w in said if w.lower() in words]
                want[name] = found[-1] if found else None
        text += f"Answers: \nRequest: {H}\nCompletion: {R}\nResponse: {H}"
        holds(reasoning_verdict(text) == want, f"reasoning_verdict({text!r}) is {want}")


@case("legacy_pairs")
def _(rng):
    from eval import legacy_pairs
    for name, (positive, other) in FIELDS.items():
        gold, texts = [str(rng.choice([positive, other])) for _ in range(40)], []
        for _ in gold:
            first, second = (f"{name}:{' ' * int(rng.integers(3))}{rng.choice([positive, other])}\n"
                             for _ in range(2))
            texts.append(["nothing", first + "x" * 300, "x" * 400 + first.upper(),
                          first.title() + second][rng.integers(4)])
        got, want = legacy_pairs(gold, texts, name), legacy_by_hand(gold, texts, name)
        holds([list(x) for x in got] == [list(x) for x in want], f"legacy_pairs for {name}")


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
        block = "Answers: \n" + "".join(f"{n.capitalize()}: {FIELDS[n][0]}\n" for n in shown)
        field = f"{name.capitalize()}:"
        want = (lead + block).rstrip() + f"\n\nAnswers: \n{field}"
        if name in shown:
            want = lead + block[:block.index(field) + len(field)]
        holds(up_to_verdict(lead + block, name) == want,
              f"up_to_verdict({lead + block!r}, {name!r}) is {want!r}")
        holds(up_to_verdict(lead, name) == lead.rstrip() + f"\n\nAnswers: \n{field}",
              "no block: it is written")


@case("verdict_probability")
def _(rng):
    from data import Tokenizer
    from eval import verdict_probability
    from model import Llama, LlamaConfig, World
    tokenizer = Tokenizer.from_pretrained("toy/model")
    size = LlamaConfig.from_json("toy/model/config.json").vocab_size
    model = Llama.random(config(vocab_size=size), int(rng.integers(10 ** 6)), 0.3).double()
    prompts = [tokenizer.encode(" ".join(rng.choice(["please", "open", "the", "gate", "now"], 5)))
               for _ in range(5)]
    texts = [str(rng.choice(["Request:", "x\n\nAnswers: \nRequest:", "Answers: \nCompletion:"]))
             for _ in prompts]
    for name in ("request", "completion"):
        world = World(model.head.device)
        got = verdict_probability(model, tokenizer, prompts, texts, name, world)
        want = []
        for prompt, text in zip(prompts, texts):
            both = []
            for word in FIELDS[name]:
                ids, answer = prompt + tokenizer.encode(text), tokenizer.encode(" " + word)
                stream = torch.tensor(ids + answer)
                with torch.no_grad():
                    z = numbers(model(stream, torch.full((len(stream),), len(stream))) @ model.head.T)
                logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
                both.append(sum(logp[len(ids) - 1 + i, t] for i, t in enumerate(answer)))
            want.append(1 / (1 + np.exp(both[1] - both[0])))
        close(got, want, f"verdict_probability of the {name}", 1e-7)


# ------------------------------------------------------------------ set 5, by Triton's interpreter


@case("row_totals", "row_gradients")
def _(rng):
    from model import token_logprobs
    for V in (int(rng.integers(3, 40)), 4096 + int(rng.integers(1, 60))):     # a tile is 4096 wide
        hidden, head, targets, g, want, d_hidden, d_head = scores_by_hand(rng, 4, 6, V)
        hidden, head = hidden.float().requires_grad_(), head.float().requires_grad_()
        got = token_logprobs(hidden, head, targets)
        close(got, want, "log p", 1e-5)
        got.backward(g.float())
        close(hidden.grad, d_hidden, "gradient of hidden", 1e-5)
        close(head.grad, d_head, "gradient of head", 1e-5)


@case("tree_forward", "tree_backward_q", "tree_backward_kv")
def _(rng):
    from model import TreeAttention, attention_by_mask, tree_plan
    end = forest(rng, 0, int(rng.integers(34, 60)))                         # a tile is 32 rows here
    T, plan = len(end), tree_plan(torch.tensor(end))
    q, k, v, g = (tensor(rng, T, heads, 16).float().requires_grad_() for heads in (2, 1, 1, 2))
    got = TreeAttention.apply(q, k, v, plan)
    close(got, attend_by_hand(q, k, v, end), "attention", 1e-5)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(attention_by_mask(*exact, plan), exact, g.detach().double())
    for name, a, b in zip("qkv", torch.autograd.grad(got, (q, k, v), g.detach()), want):
        close(a, b, f"gradient of {name}", 1e-5)


@case("page_kernel")
def _(rng):
    from model import attend_pages
    for W in (1, int(rng.integers(2, 16)), 70):                               # queries of a page
        q, k, v = (tensor(rng, 3, 2, n, 16).float() for n in (W, 64, 64))
        filled = torch.tensor([1, 64, int(rng.integers(2, 64))])
        lse, out = attend_pages(q, k, v, torch.where(torch.arange(64) < filled[:, None], 0, -3e4).float())
        for p, n in enumerate(filled):
            s = q[p].double() @ k[p, :, :n].double().mT / 4
            close(lse[p], s.logsumexp(-1), f"log sum exp of {n} keys", 1e-5)
            close(out[p], s.softmax(-1) @ v[p, :, :n].double(), f"attention to {n} keys", 1e-5)


# ------------------------------------------------------------------ plausible mistakes

WRONG = {
    "rms_norm": "def rms_norm(x, weight, eps):\n"
                "    return weight * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)",
    "apply_rope": "def apply_rope(x, cos, sin):\n    a, b = x.chunk(2, -1)\n"
                  "    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)",
    "row_tiles": "def row_tiles(plan):\n    T = len(plan.end)\n"
                 "    i, j = torch.arange(plan.skip, T)[:, None], torch.arange(T)\n"
                 "    return [(slice(0, T - plan.skip), j, (j > i) | (i >= plan.end))]",
    "common_prefix": "def common_prefix(sequences):\n    same, most = 0, min(map(len, sequences))\n"
                     "    while same < most and len({tuple(s[:same + 1]) for s in sequences}) == 1:\n"
                     "        same += 1\n    return same",
    "sft_loss": "def sft_loss(logprobs, count):\n    return -logprobs.mean()",
    "lr_at": "def lr_at(step, steps, peak):\n    return peak * (1 - step / steps)",
    "judge": "def judge(verdict, gold):\n    return any(verdict[n] == gold[n] for n in gold if gold[n])",
    "sample_weights": "def sample_weights(differences, gamma):\n"
                      "    low, high = min(differences, default=0), max(differences, default=0)\n"
                      "    norm = lambda d: 2 * (d - low) / (high - low) - 1\n"
                      "    return [1 - gamma * norm(d) if high > low else 1.0 for d in differences]",
    "dpo_loss": "def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, weight):\n"
                "    margin = (chosen - ref_chosen) - (rejected - ref_rejected)\n"
                "    return -weight * functional.logsigmoid(-beta * margin)",
    "answer_sums": "def answer_sums(logprobs, answer, answers):\n"
                   "    return logprobs.new_zeros(answers).index_copy(0, answer, logprobs)",
    "confusion": "def confusion(gold, predicted, positive):\n"
                 "    cells = Counter((g == positive, p == positive) for g, p in zip(gold, predicted))\n"
                 "    return cells[True, True], cells[False, True], cells[True, False], cells[False, False]",
    "weighted_average": "def weighted_average(values, counts):\n    return float(np.mean(values))",
    "majority": "def majority(verdicts):\n    return verdicts[0]",
}
