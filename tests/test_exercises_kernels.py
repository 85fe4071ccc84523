"""What the kernels of set 5 must do. Triton's interpreter runs them; no GPU is needed:

    TRITON_INTERPRET=1 python -m pytest -q tests/test_exercises_kernels.py -k row_totals__

Every test launches its kernel; what it does not write is wrong. Others are not launched.
"""
import math
import os
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

import model
from model import PAGE, TreeAttention
from test_exercises import check, holds, plan_of

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1",
                                reason="set TRITON_INTERPRET=1 (test_course.py does)")


def numbers(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return torch.from_numpy(rng.standard_normal(shape)).float()


def empty(*shape):
    return torch.full(shape, math.nan)


# ------------------------------------------------------------------ rotations
def check_rope(T, H):
    x, angle = numbers(T, H, 16), 3 * numbers(T, 1, 8, seed=1)
    got = model.launch_rope_kernel(x, angle.cos(), angle.sin())
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(1j * angle)
    want = torch.cat([z.real, z.imag], -1)
    worst = (got - want).abs().max().item()
    holds(worst < 1e-5, f"{T} tokens of {H} heads of width 16: OUT is off by up to {worst:.3g}"
          + (" (NaN: not all of it was written)" if math.isnan(worst) else ""))


def test_rope_kernel__one_program():
    check_rope(1, 1)
    check_rope(5, 1)


def test_rope_kernel__one_angle_for_all_heads_of_a_token():
    check_rope(4, 6)


def test_rope_kernel__many_programs():
    check_rope(45, 3)
    check_rope(32, 2)


def test_rope_kernel__one_program_of_half_precision():
    x, angle = numbers(5, 2, 16).half(), 3 * numbers(5, 1, 8, seed=1)
    cos, sin = angle.cos().half(), angle.sin().half()
    got = model.launch_rope_kernel(x, cos, sin)
    a, b = x.float().chunk(2, -1)
    want = torch.cat([a * cos.float() - b * sin.float(), b * cos.float() + a * sin.float()], -1)
    check("float16, 5 tokens of 2 heads: OUT", got, want.half(), "products and sums in float32",
          1e-9)


# ------------------------------------------------------------------ log-probabilities
def totals(z, target):
    """(z[target], log sum exp(z)) as row_totals gives them."""
    N = len(target)
    picked, total = empty(N), empty(N)
    model.launch_row_totals(z, torch.tensor(target), picked, total)
    return picked, total


def test_row_totals__picked():
    z = torch.tensor([[0.5, -1.0, 2.0], [3.0, 4.0, 5.0]])
    check("logits (.5 -1 2) and (3 4 5), targets 2 and 0: PICKED", totals(z, [2, 0])[0], [2, 3])


def test_row_totals__total():
    z = torch.tensor([[0.0, math.log(3), -math.inf], [1000.0, 1000.0, 0.0]])
    check("logits (0, log 3, -inf) and (1000, 1000, 0): TOTAL", totals(z, [0, 0])[1],
          [math.log(4), 1000 + math.log(2)], "log sum exp: subtract the largest first", 1e-5)


def test_row_totals__total_of_a_row_longer_than_one_part():
    C = model.LOGITS_OF_PROGRAM
    for peak in (0, C, 2 * C + 2):
        z = torch.zeros(2, 2 * C + 3)
        z[1, peak] = 50
        want = [math.log(2 * C + 3), 50 + math.log(1 + (2 * C + 2) * math.exp(-50))]
        check(f"{2 * C + 3} logits, {C} at a time, all 0, and with a 50 at {peak}: TOTAL",
              totals(z, [0, 0])[1], want, "the sum so far shrinks where a larger logit comes", 1e-5)


def test_row_totals__total_of_small_logits():
    z = torch.tensor([[-1000.0, -1000.0], [-2e4, -3e4]])
    check("logits (-1000, -1000) and (-20000, -30000): TOTAL", totals(z, [0, 0])[1],
          [-1000 + math.log(2), -2e4], "the largest may be far below 0", 1e-5)


def gradients(z, target, total, grad):
    z = z.clone()
    return model.launch_row_gradients(
        z, torch.tensor(target), torch.tensor(total), torch.tensor(grad)
    )


def test_row_gradients__inside():
    got = gradients(torch.tensor([[0.0, math.log(3)]] * 2), [0, 1], [math.log(4)] * 2, [1.0, 10.0])
    check(
        "logits (0, log 3) twice, targets 0 and 1, gradients 1 and 10",
        got,
        [[0.75, -0.75], [-2.5, 2.5]],
        "g (onehot(target) - p), p = (1/4, 3/4)",
        1e-5,
    )


def test_row_gradients__inside_a_row_longer_than_one_part():
    V = model.LOGITS_OF_PROGRAM + 3
    got = gradients(torch.zeros(1, V), [V - 1], [math.log(V)], [1.0])
    want = torch.full((1, V), -1 / V)
    want[0, V - 1] += 1
    holds(not got.isnan().any(), "some logits were not written")
    check(f"{V} logits of 0, target {V - 1}: the last four", got[0, -4:], want[0, -4:], "", 1e-5)
    check("... the sum of all, which is 0", got.sum(), 0.0, "", 1e-4)


def test_row_gradients__outside():
    for target in (-1, 2, 5000):
        got = gradients(torch.tensor([[0.0, math.log(3)]]), [target], [math.log(4)], [1.0])
        check(f"logits (0, log 3) of some of the vocabulary, target {target}: not among them", got,
              [[-0.25, -0.75]], "no one is added", 1e-5)


# ------------------------------------------------------------------ attention
def attend(q, k, v, end):
    """(out, log2 sum exp of a row's scores, p) of the last len(q) rows, one row and head a time."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    N, H, E = q.shape
    T, G, _ = k.shape
    p = np.zeros((H, N, T))
    lse = np.zeros((H, N))
    for h in range(H):
        for n in range(N):
            i = T - N + n
            keys = [j for j in range(i + 1) if i < end[j]]
            s = k[keys, h * G // H] @ q[n, h] / math.sqrt(E)
            lse[h, n] = np.log(np.exp(s).sum())
            p[h, n, keys] = np.exp(s - lse[h, n])
    group = np.arange(H) * G // H
    out = np.einsum("hnt,thE->nhE", p, v[:, group])
    return out, lse / math.log(2), p


class Problem:
    """Queries, keys and values of a stream, the answers by hand, and what a launch needs."""

    def __init__(self, end, skip=0, H=2, G=1, E=16):
        T = len(end)
        N = T - skip
        self.q, self.do = numbers(N, H, E), numbers(N, H, E, seed=1)
        self.k, self.v = numbers(T, G, E, seed=2), numbers(T, G, E, seed=3)
        self.plan = plan_of(end, skip)
        out, self.lse, p = attend(self.q, self.k, self.v, end)
        self.out = torch.from_numpy(np.ascontiguousarray(out)).float()
        do, q, k, v = (x.double().numpy() for x in (self.do, self.q, self.k, self.v))
        group = np.arange(H) * G // H
        self.delta = np.ascontiguousarray((do * out).sum(-1).T)         # (H, N)
        dp = np.einsum("nhE,thE->hnt", do, v[:, group])
        ds = p * (dp - self.delta[:, :, None]) / math.sqrt(E)
        self.dq = np.einsum("hnt,thE->nhE", ds, k[:, group])
        by_head = lambda x: x.reshape(T, G, H // G, E).sum(2)
        self.dk = by_head(np.einsum("hnt,nhE->thE", ds, q))
        self.dv = by_head(np.einsum("hnt,nhE->thE", p, do))
        self.said = f"end {end}" if T < 12 else f"a stream of {T} rows, the last {N} ask, {H} heads"

    def launched(self, *kernels):
        """Replace `launch`: of all kernels, run these; note the tensors that each is given."""
        launch = model.launch
        self.given = []

        def some(kernel, grid, warps, *arguments):
            if kernel in kernels:
                self.given += [x for x in arguments if torch.is_tensor(x)]
                launch(kernel, grid, warps, *arguments)

        return patch.object(model, "launch", some)

    def forward(self, *kernels):
        """(out, lse, what forward left for backward)."""
        ctx = SimpleNamespace()
        ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
        with self.launched(*kernels):
            out = TreeAttention.forward(ctx, self.q, self.k, self.v, self.plan)
        return out, ctx.saved_tensors[-1], ctx

    def backward(self, *kernels):
        """(dq, dk, dv, delta), after a forward pass by hand."""
        _, _, ctx = self.forward()
        lse = torch.from_numpy(self.lse).float()
        ctx.saved_tensors = *ctx.saved_tensors[:3], self.out, lse
        with self.launched(*kernels):
            dq, dk, dv, _ = TreeAttention.backward(ctx, self.do)
        delta = [x for x in self.given if x.shape == lse.shape and x is not lse]
        return dq, dk, dv, delta[0]


ONE_TILE = (([5] * 5, 0), ([7, 7, 7, 5, 5, 7, 7], 0))
# three tiles; sequences of 16 and 20 rows; two branches of one prompt; only the last rows ask
FOREST = [16] * 16 + [36] * 20 + [70] * 4 + [55] * 15 + [70] * 15
SEVERAL = ((FOREST, 0), (FOREST, 41))


def agree(name, problem, got, want):
    worst = np.abs(got.double().numpy() - want).max()
    holds(worst < 1e-4, f"{problem.said}: {name} is off by up to {worst:.3g}"
          + (" (NaN: not all of it was written)" if math.isnan(worst) else ""))


def check_forward(cases):
    for end, skip in cases:
        problem = Problem(end, skip)
        out, lse, _ = problem.forward(model.tree_forward)
        agree("OUT", problem, out, problem.out.double().numpy())
        agree("LSE, log2 of the sum of 2^score", problem, lse, problem.lse)


def check_backward_q(cases):
    for end, skip in cases:
        problem = Problem(end, skip)
        dq, _, _, delta = problem.backward(model.tree_backward_q)
        agree("DELTA, sum(do out)", problem, delta, problem.delta)
        agree("DQ", problem, dq, problem.dq)


def check_backward_kv(cases):
    for end, skip in cases:
        problem = Problem(end, skip)
        _, dk, dv, _ = problem.backward(model.tree_backward_q, model.tree_backward_kv)
        agree("DV, the sum over its heads", problem, dv, problem.dv)
        agree("DK, the sum over its heads", problem, dk, problem.dk)


def test_tree_forward__tile():
    check_forward(ONE_TILE)


def test_tree_forward__forest():
    check_forward(SEVERAL)


def grouped(kernels, names):
    """Compare these results of several key heads, widths and sizes of tiles."""
    for H, G, E in ((4, 2, 16), (6, 3, 16), (2, 1, 32)):
        for sizes in ((32, 4, 32, 4), (16, 4, 32, 4)):
            problem = Problem(FOREST, 41, H, G, E)
            with patch.object(TreeAttention, "tile_sizes", staticmethod(lambda q: sizes)):
                if "OUT" in names:
                    out, lse, _ = problem.forward(*kernels)
                    got = {"OUT": (out, problem.out.double().numpy()), "LSE": (lse, problem.lse)}
                else:
                    dq, dk, dv, delta = problem.backward(*kernels)
                    got = {"DQ": (dq, problem.dq), "DK": (dk, problem.dk), "DV": (dv, problem.dv)}
            for name in names:
                agree(f"{H} heads of width {E}, {G} key heads, tiles {sizes[0]}: {name}", problem,
                      *got[name])


def test_tree_forward__forest_of_several_key_heads():
    grouped([model.tree_forward], ["OUT", "LSE"])


def test_tree_forward__tile_of_small_scores():
    problem = Problem([5] * 5)
    problem.q, problem.k = torch.full_like(problem.q, -1000), torch.ones_like(problem.k)
    out, lse, _ = problem.forward(model.tree_forward)
    mean = problem.v.cumsum(0) / torch.arange(1, 6)[:, None, None]
    check("scores of -4000: OUT, the means of v", out, mean.expand_as(out), "", 1e-5)
    want = -4000 / math.log(2) + torch.arange(1, 6).log2()
    check("... LSE", lse, want.expand_as(lse), "the largest score may be far below 0", 1e-5)


def test_tree_backward_q__tile():
    check_backward_q(ONE_TILE)


def test_tree_backward_q__forest():
    check_backward_q(SEVERAL)


def test_tree_backward_q__forest_of_several_key_heads():
    grouped([model.tree_backward_q], ["DQ"])


def test_tree_backward_kv__tile():
    check_backward_kv(ONE_TILE)


def test_tree_backward_kv__forest():
    check_backward_kv(SEVERAL)


def test_tree_backward_kv__forest_of_several_key_heads():
    grouped([model.tree_backward_q, model.tree_backward_kv], ["DK", "DV"])


# ------------------------------------------------------------------ pages
def check_pages(filled, w, R=3):
    """Attention of w readers, R heads each, to pages that hold so many keys."""
    pages = len(filled)
    q = numbers(5, 2, R, 16)
    k = numbers(pages, 2, PAGE, 16)
    v = numbers(pages, 2, PAGE, 16, seed=1)
    readers = (torch.arange(pages * w) * 3 % 5).view(pages, w)
    count = torch.tensor(filled)
    bias = torch.where(torch.arange(PAGE) < count[:, None], 0, model.NO_KEY).float()
    lse = empty(pages * w, 2, R)
    out = empty(pages * w, 2, R, 16)
    model.launch_page_kernel(q, readers, k, v, bias, lse, out)
    lse = lse.unflatten(0, (pages, w))
    out = out.unflatten(0, (pages, w))
    for page, n in enumerate(filled):
        asked = f"{w} readers of {R} heads, a page with {n} of {PAGE} keys"
        if n == 0:
            holds(
                bool((lse[page] < -2e4).all()), f"{asked}: LSE {lse[page].max()}, wanted below -2e4"
            )
            holds(bool(out[page].isfinite().all()), f"{asked}: OUT is no finite number")
            continue
        s = q[readers[page]].double() @ k[page, :, :n].double().mT / 4         # (w, G, R, n)
        for name, got, want in (("LSE", lse[page], s.logsumexp(-1)),
                                ("OUT", out[page], s.softmax(-1) @ v[page, :, :n].double())):
            worst = (got - want).abs().max().item()
            holds(worst < 1e-4, f"{asked}: {name} is off by up to {worst:.3g}"
                  + (" (NaN: not all of it was written)" if math.isnan(worst) else ""))


def test_page_kernel__full():
    check_pages([PAGE, PAGE], 1)
    check_pages([PAGE], 11)


def test_page_kernel__part():
    check_pages([1, 7, PAGE - 1], 1)
    check_pages([5, 0, 20], 5)


def test_page_kernel__part_with_keys_anywhere():
    q, k, v = numbers(1, 2, 1, 16), numbers(1, 2, PAGE, 16), numbers(1, 2, PAGE, 16, seed=1)
    bias = torch.full((1, PAGE), float(model.NO_KEY))
    bias[0, [3, 4, PAGE - 1]] = 0
    lse, out = empty(1, 2, 1), empty(1, 2, 1, 16)
    model.launch_page_kernel(q, torch.zeros(1, 1, dtype=torch.long), k, v, bias, lse, out)
    s = q[0].double() @ k[0][:, [3, 4, PAGE - 1]].double().mT / 4
    check(f"keys at 3, 4 and {PAGE - 1}: LSE", lse[0], s.logsumexp(-1), "0 where a key is", 1e-5)
    check("... OUT", out[0], s.softmax(-1) @ v[0][:, [3, 4, PAGE - 1]].double(), "", 1e-5)


def test_page_kernel__full_of_three_key_heads():
    q, k, v = numbers(2, 3, 2, 32), numbers(1, 3, PAGE, 32), numbers(1, 3, PAGE, 32, seed=1)
    lse, out = empty(2, 3, 2), empty(2, 3, 2, 32)
    readers = torch.tensor([[1, 0]])
    model.launch_page_kernel(q, readers, k, v, torch.zeros(1, PAGE), lse, out)
    s = q[readers[0]].double() @ k[0].double().mT / math.sqrt(32)
    check("3 key heads of width 32: LSE", lse, s.logsumexp(-1), "", 1e-5)
    check("... OUT", out, s.softmax(-1) @ v[0].double(), "", 1e-5)
