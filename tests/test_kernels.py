"""The kernels: right (judged against float64, by Triton's interpreter on a CPU or on a GPU), and compiled for two GPUs.

    python tests/test_kernels.py        compile all kernels, for all dtypes; needs no GPU; prints what each one takes

The functions check_... run in a process of their own, as TRITON_INTERPRET must be set before Triton is imported.
"""
import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, tiny_examples

import model
from data import InputError
from model import (KernelRope, Llama, RMSNorm, TreeAttention, apply_rope, attend_pages, attention,
                   attention_by_mask, draw_token, generate, join_results, rms_norm, rope, rope_tables,
                   token_logprobs, tree_plan)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]     # the interpreter multiplies bf16 wrongly


def run(*command, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**inherited, **environment})


@pytest.mark.skipif(model.triton is None, reason="NO KERNEL IS TESTED: triton is not installed")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_equal_their_twins(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels run by the interpreter only")
    done = run("-m", "pytest", "-q", "-x", "-W", "ignore", "-o", "python_functions=check_*", __file__,
               TRITON_INTERPRET="1" if device == "cpu" else "0")
    assert done.returncode == 0, done.stdout[-4000:]


def error(got, want):
    """Largest distance, relative to the largest wanted number, or to 1 (one token alone has gradients of 0)."""
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1)).item()


def judge(function, exact, inputs, dtype):
    """With kernels, a function's output and gradients must be about as near to float64 as without them."""
    inputs = [x.to(DEVICE, dtype) for x in inputs]                              # rounded once: all three see the same

    def results(function, dtype, kernels):
        model.KERNELS, xs = kernels, [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*xs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out, *torch.autograd.grad(out, xs, weight)]

    want = results(exact, torch.float64, "torch")
    twin, got = ([error(x, y) for x, y in zip(results(function, dtype, kernels), want)] for kernels in ("torch", "triton"))
    assert all(a <= 2.5 * b + 4 * torch.finfo(dtype).eps for a, b in zip(got, twin)), (got, twin)


def forest(*segments):
    """end of a forest written as (depth, length) of its segments, depth first."""
    starts = [sum(n for _, n in segments[:i]) for i in range(len(segments) + 1)]
    ends = [next((starts[m] for m in range(i + 1, len(segments)) if segments[m][0] <= depth), starts[-1])
            for i, (depth, _) in enumerate(segments)]
    return torch.tensor([end for end, (_, n) in zip(ends, segments) for _ in range(n)])


# tiles hold 32 rows in float32 and 64 in bf16: sizes lie around both
FORESTS = {"one token": [(0, 1)], "tile less one": [(0, 31)], "a tile": [(0, 32)],
           "tile and one": [(0, 33)], "two tiles and one": [(0, 65)],
           "packed": [(0, 33), (0, 1), (0, 40)],
           "shared root": [(0, 5), (1, 30), (1, 31), (1, 9)], "pairs": [(0, 3), (1, 20), (2, 15), (2, 7), (1, 2), (2, 33), (2, 1)],
           "nested": [(depth, 6) for depth in range(12)], "one-token segments": [(i % 5, 1) for i in range(35)],
           "hidden for long": [(0, 2), (1, 64), (1, 5)]}
WIDTHS = [16]                   # of heads
VOCABULARIES = [5, 4096, 9000]  # a program draws from 4096 logits at a time
if DEVICE == "cuda":            # what real models have, which would take the interpreter hours
    FORESTS["wide heads"] = [(0, 100), (1, 130), (2, 70), (2, 200), (1, 90)]
    WIDTHS += [64, 128]
    VOCABULARIES.append(128256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORESTS)
def check_tree_attention(name, dtype):
    end, rng = forest(*FORESTS[name]), torch.Generator().manual_seed(0)
    T = len(end)
    H, G, E = {"tile and one": (3, 1, 64), "packed": (2, 2, 32),
               "two tiles and one": (1, 1, 16), "wide heads": (8, 2, 128)}.get(name, (4, 2, 16))
    for N in {T, T - T // 3} if name == "two tiles and one" else {T}:       # only the last rows ask
        plan = tree_plan(end, T - N, DEVICE)
        q, k, v = (torch.randn(n, heads, E, generator=rng) for n, heads in ((N, H), (T, G), (T, G)))
        exact = lambda q, k, v: attention_by_mask(torch.cat([q.new_zeros(T - N, H, E), q]), k, v, plan)[T - N:]
        judge(lambda *x: attention(*x, plan), exact, (q, k, v), dtype)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    assert torch.equal(attention(q, k, v, plan), TreeAttention.apply(q, k, v, plan))   # the switch chose the kernel


@pytest.mark.parametrize("rows", [64, 63])
def check_tiles_of_more_keys_than_rows(rows, monkeypatch):
    """As in bf16 with E = 128, where the interpreter cannot go: 64 keys beside 32 rows."""
    monkeypatch.setattr(TreeAttention, "tile_sizes", staticmethod(lambda q: (32, 4, 64, 4)))
    end = forest((0, 3), (1, 20), (2, 15), (2, 7), (1, 2), (2, 33), (2, 1))
    T = len(end)
    plan = tree_plan(end, T - rows, DEVICE)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 16, generator=rng) for n, heads in ((rows, 4), (T, 2), (T, 2)))

    def exact(q, k, v):
        all_rows = torch.cat([q.new_zeros(T - rows, 4, 16), q])
        return attention_by_mask(all_rows, k, v, plan)[T - rows:]

    judge(lambda *qkv: attention(*qkv, plan), exact, (q, k, v), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [11, 4096, 9000])
def check_token_logprobs(V, dtype, monkeypatch):
    # forward 3 rows at a time, then 1; backward parts of the vocabulary: one, three, and three of two tiles each
    monkeypatch.setattr("model.TokenLogprobs.ON_CUDA", 1)
    monkeypatch.setattr("model.TokenLogprobs.LOGITS", 7 * 4112 if V == 9000 else 3 * V)
    targets = torch.tensor([0, V - 1, 3, 3, V // 2, 0, 9], device=DEVICE)
    exact = lambda h, w: (h @ w.T).log_softmax(-1)[range(7), targets]
    hidden, head = torch.randn(7 + V, 8, generator=torch.Generator().manual_seed(0)).mul(0.5).split([7, V])
    judge(lambda h, w: token_logprobs(h, w, targets), exact, (hidden, head), dtype)
    none = token_logprobs(hidden[:0].to(DEVICE), head.to(DEVICE), targets[:0])
    assert none.shape == (0,)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("E", WIDTHS)
@pytest.mark.parametrize("w, R", [(1, 1), (3, 3), (4, 4), (17, 1), (16, 4), (13, 5)])    # tiles hold 16 queries, or 64
def check_attend_pages(w, R, E, dtype):
    rng, filled = torch.Generator().manual_seed(w * R), torch.tensor([1, 7, 63, 64, 0])
    q, k, v = (torch.randn(*shape, E, generator=rng).to(DEVICE, dtype)
               for shape in ((20, 2, R), (5, 2, 64), (5, 2, 64)))
    readers = torch.randint(20, (5, w), generator=rng).to(DEVICE)
    lse, out = (torch.full((5 * w, 2, R, *rest), math.nan, device=DEVICE) for rest in ((), (E,)))
    attend_pages(q, readers, k, v, torch.where(torch.arange(64) < filled[:, None], 0, -3e4).to(q), lse, out)
    lse, out = lse.unflatten(0, (5, w)), out.unflatten(0, (5, w))
    assert lse[4].max() < -2e4 and out[4].isfinite().all()                      # a page without keys: weight 0, times a number
    for p, n in enumerate(filled[:4].tolist()):
        s = q[readers[p]].double() @ k[p, :, :n].double().mT / E ** 0.5                          # (w, G, R, n)
        assert error(lse[p], s.logsumexp(-1)) < 1e-5
        assert error(out[p], s.softmax(-1) @ v[p, :, :n].double()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, H, E", [(1, 1, 16), (37, 3, 32), (64, 2, 128)])     # 32 heads a program
def check_rope(T, H, E, dtype):
    rng = torch.Generator().manual_seed(T)
    config = replace(CONFIG, head_dim=E)
    position = torch.randint(2048, (T,), generator=rng)
    exact = [x.to(DEVICE) for x in rope_tables(config, position, torch.float64)]
    tables = [x.to(dtype) for x in exact]
    x = torch.randn(T, H, E, generator=rng)
    judge(lambda x: rope(x, *(table.to(x.dtype) for table in tables)),
          lambda x: apply_rope(x, *(table.double() for table in tables)), (x,), dtype)
    cos, sin = tables
    x = x.to(DEVICE, dtype).detach()
    back = KernelRope.apply(KernelRope.apply(x, cos, sin), cos, -sin)
    assert error(back, x.double()) < 20 * torch.finfo(dtype).eps
    assert torch.equal(rope(x, cos, sin), KernelRope.apply(x, cos, sin))    # the switch chose it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 1000])
def check_norm(D, dtype):
    """torch's kernel, beside rms_norm."""
    x, weight = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(D))
    norm = RMSNorm(D, 1e-5).to(DEVICE)

    def by_module(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    judge(by_module, lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, E", [(1, 16), (6, 64), (3, 128)])
def check_join_results(H, E, dtype):
    rng = torch.Generator().manual_seed(H)
    lse = 3 * torch.randn(40, H, 1, generator=rng)
    out = torch.randn(40, H, 1, E, generator=rng)
    lse[5] = -2.9e4                                         # of a page without keys
    reads = [[1], [2, 5], list(range(6, 22)), list(range(22, 40)), [3, 4, 1]]   # 1, 2, 16, 18, 3
    count = torch.tensor([len(own) for own in reads])
    most = int(count.max())
    filled = torch.tensor([own + [0] * (most - len(own)) for own in reads])
    terms = (filled[:, None] * H + torch.arange(H)[:, None]).flatten(0, 1)      # (B H, S)
    got = join_results(lse.to(DEVICE), out.to(DEVICE), terms.to(DEVICE), count.to(DEVICE), dtype)
    assert got.dtype == dtype
    for b, own in enumerate(reads):
        weight = lse[own, :, 0].double().softmax(0)                             # (S, H)
        want = (weight[:, :, None] * out[own, :, 0].double()).sum(0)            # (H, E)
        assert error(got[b * H:(b + 1) * H].cpu(), want) < 4 * torch.finfo(dtype).eps
    model.KERNELS = "torch"
    twin = join_results(lse.to(DEVICE), out.to(DEVICE), terms.to(DEVICE), count.to(DEVICE), dtype)
    model.KERNELS = "triton"
    assert error(got, twin.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.95), (0.7, 0.5), (1.3, 1.0)])
def check_draw_token(V, temperature, top_p, dtype):
    rng = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(20, V, generator=rng).to(DEVICE, dtype)
    seed = torch.arange(20, device=DEVICE) * 977
    position = torch.arange(20, device=DEVICE) % 7
    drawn = draw_token(logits, seed, position, temperature, top_p)
    want = draw_token(logits.double(), seed, position, temperature, top_p)          # no kernel knows float64
    assert (drawn != want).sum() <= (1 if V < 10 ** 5 else 4)   # a draw beside an edge, which rounding moves
    alone = torch.cat([draw_token(logits[i:i + 1], seed[i:i + 1], position[i:i + 1], temperature, top_p)
                       for i in range(0, 20, 7)])
    assert torch.equal(drawn[::7], alone)
    for broken in (math.nan, math.inf):                         # it ends, with any token
        logits[:, 1] = broken
        assert (draw_token(logits, seed, position, temperature, top_p) < V).all()


@pytest.mark.parametrize("H, G, k, lengths", [(6, 2, 3, (1, 22)), (4, 4, 1, (3, 16)), (3, 1, 23, (5,))])
def check_generate(H, G, k, lengths, monkeypatch):
    config = replace(CONFIG, head_dim=16, num_attention_heads=H, num_key_value_heads=G, num_hidden_layers=1)
    model_ = Llama.random(config, std=0.1).to(DEVICE)
    prompts = [e.prompt for e in tiny_examples(shapes=[(n, ()) for n in lengths])]
    answers = {}
    monkeypatch.setattr("model.PAGE", 16)
    for kernels in ("torch", "triton"):
        monkeypatch.setattr("model.KERNELS", kernels)
        answers[kernels] = generate(model_, prompts, k, max_new_tokens=18 if k == 1 else 6,       # two pages, or
                                    stop=[] if k == 1 else list(range(25)))                       # some end early
    assert answers["triton"] == answers["torch"]


# ------------------------------------------------------------------ compilation, without a GPU


def launches(dtype, E):
    """(kernel, arguments, warps) of every launch that training and decoding make, recorded instead
    of made; once each for what is compiled in."""
    made = {}

    def launch(kernel, grid, warps, *args):
        compiled_in = [value for value, parameter in zip(args, kernel.params)
                       if parameter.is_constexpr]
        made[(kernel.__name__, *compiled_in)] = (kernel, args, warps)

    model.launch = launch
    model.use_kernels = lambda x: True
    q, k, v = (torch.zeros(64, heads, E, dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    TreeAttention.apply(q, k, v, tree_plan(torch.full((64,), 64))).sum().backward()
    head = torch.zeros(128, 16, dtype=dtype, requires_grad=True)
    token_logprobs(head[:8], head, torch.zeros(8, dtype=torch.long)).sum().backward()
    row = torch.zeros(1, dtype=torch.long)
    draw_token(torch.zeros(1, 128, dtype=dtype), row, row, temperature=1.0, top_p=0.95)
    config = replace(CONFIG, head_dim=E, num_attention_heads=8, num_key_value_heads=2,
                     num_hidden_layers=1)
    with contextlib.suppress(InputError):                   # nothing was computed: logits are no numbers
        generate(Llama.random(config).to(dtype), [[1, 2, 3], [1, 2, 4]], k=4, max_new_tokens=1,
                 temperature=0)
    return list(made.values())


def compile_for(arch, kernel, args, warps):
    """Triton's compiled kernel, for sm_`arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    letters = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
               torch.int64: "*i64"}
    signature = {}
    constants = {}
    aligned = {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = value
        elif torch.is_tensor(value):
            signature[name] = letters[value.dtype]
            aligned[i,] = [["tt.divisibility", 16]]         # as torch allocates
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if name == "V":
            aligned[i,] = [["tt.divisibility", 16]]         # as real vocabularies are
    return triton.compile(ASTSource(kernel, signature, constants, aligned),
                          target=GPUTarget("cuda", arch, 32),
                          options={"num_warps": warps, "num_stages": 2})


def resources(compiled):
    """(registers a thread, bytes spilled a thread, bytes of shared memory)."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack), compiled.metadata.shared


def covered_by_warps(compiled):
    """How much of a product's rows, or of its columns, all warps cover side by side, at most: with
    more than 1, some compute what others do. 0: there is no product by matrix units."""
    layouts = {}
    pattern = r"(#mma\d*) = .*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)"
    for name, *numbers in re.findall(pattern, compiled.asm["ttgir"]):
        down, across, rows, columns = map(int, numbers)
        layouts[name] = down * rows, across * columns
    pattern = r"dot %.*-> tensor<(\d+)x(\d+)xf32, (#mma\d*)>"
    most = 0
    for rows, columns, name in re.findall(pattern, compiled.asm["ttgir"]):
        down, across = layouts[name]
        most = max(most, down / int(rows), across / int(columns))
    return most


WITHOUT_HEADS = ("row_totals", "row_gradients", "draw_kernel")      # compiled once, whatever E is


def compile_all(dtypes):
    print(f"{'kernel':17} {'dtype':9} {'E':>3} {'for':>6} {'registers':>9} {'spilled':>7} {'shared':>6} "
          f"{'warps':>5} {'covered':>7} products")
    for dtype in dtypes:
        for E in (64, 128):
            for launched in launches(dtype, E):
                kernel, _, warps = launched
                name = kernel.__name__
                if E == 64 or name not in WITHOUT_HEADS:
                    for arch in (80, 90):
                        judge_compiled(name, dtype, E, arch, warps, compile_for(arch, *launched))


def judge_compiled(name, dtype, E, arch, warps, compiled):
    """Print a line; fail where a kernel spills, takes too much, or its warps repeat each other."""
    registers, spilled, shared = resources(compiled)
    covered = covered_by_warps(compiled)
    products = "wgmma" if "wgmma.mma_async" in compiled.asm["ptx"] else "mma" if covered else ""
    print(f"{name:17} {str(dtype)[6:]:9} {E:3}  sm_{arch} {registers:9} {spilled:7} {shared:6} "
          f"{warps:5} {covered:7.2f} {products}", flush=True)
    half = dtype == torch.bfloat16
    assert shared <= (99 if arch == 80 else 160) * 1024     # sm_86 and 89, that take the same, have 99 KiB
    assert spilled <= (8 if arch == 80 else 0)              # two registers
    assert covered <= 1
    if half and name.startswith("tree"):
        assert products == ("wgmma" if arch == 90 else "mma")


@pytest.mark.skipif(model.triton is None, reason="NO KERNEL IS COMPILED: triton is not installed")
def test_every_kernel_compiles_for_ampere_and_hopper(tmp_path):
    if model.triton.__version__.startswith("3.2."):
        pytest.skip("NO KERNEL IS COMPILED: triton 3.2 takes arguments in another form")
    done = run(__file__, "bfloat16", TRITON_CACHE_DIR=str(tmp_path))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    compiled = {tuple(line.split()[:4]) for line in done.stdout.splitlines()[1:]}
    attention = ("tree_forward", "tree_backward_q", "tree_backward_kv", "page_kernel", "join_kernel",
                 "rope_kernel")
    want = {(name, "bfloat16", E, arch)
            for E in ("64", "128")
            for arch in ("sm_80", "sm_90")
            for name in (*attention, *(WITHOUT_HEADS if E == "64" else ()))}
    assert compiled == want


if __name__ == "__main__":
    compile_all([getattr(torch, name) for name in sys.argv[1:] or ("bfloat16", "float32")])
