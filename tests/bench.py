"""Speed and memory of training, generation and kernels on this device, beside peers in the same run.

    python tests/bench.py                                                  the toy model and its corpus
    python tests/bench.py --model DIR --sft FILE --dpo FILE --peers --repeat 3 --json FILE
    python tests/bench.py --shape 1b --peers --minutes 9 --json FILE       random weights, on a GPU
    python tests/bench.py --shape 1b --memory-cap 22                       can a 24 GB card train it?

Every item runs in a process of its own, so that peak memory is its own. A round runs all items in turn, as
machines drift; the table shows medians over rounds, and the median of ours / this one in the same round.
A rate counts the tokens of each sequence as it would stand alone: padding earns nothing, and a shared
prefix shows as speed. "of GEMM": model FLOPs a second over the matrix-product rate measured in the round,
6 N a trained token, 2 N more for DPO's reference pass, 2 N a generated token (N: all parameters). A goal is
a part of the rate at the limits measured here, a matrix product and a copy. Memory: CUDA's allocator, else
resident; of a kernel, what it takes beside inputs and their gradients. Peers (peers.py) are never needed.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import model as library  # noqa: E402
import peers  # noqa: E402
from data import Sample, Tokenizer, encode_records, pack, read_records  # noqa: E402
from model import (InputError, Llama, LlamaConfig, at_least, attention, attention_by_mask, draw_token,  # noqa: E402
                   generate, pick_device, pick_dtype, token_logprobs, tree_plan, write_json)
from train_dpo import pairs_loss, reference_logprobs  # noqa: E402
from train_sft import make_optimizer, sft_loss, update  # noqa: E402

LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0)
SHAPES = {"1b": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                            num_attention_heads=32, tie_word_embeddings=True, **LLAMA3),
          "3b": LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                            num_attention_heads=24, tie_word_embeddings=True, **LLAMA3),
          "8b": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                            num_attention_heads=32, **LLAMA3),
          "tiny": LlamaConfig(96, 64, 96, 2, 4, 2)}                            # for tests
LONGEST = 2048          # tokens of a sequence, as in the paper


def random_samples(n, answers, vocabulary, length=None, root=110, seed=0):
    """Samples with the lengths S of guard data: an instruction of 110 tokens, a prompt of 230 and an answer
    of 260 on average, E[S^2] / E[S]^2 = 1.27; or with sequences of exactly `length` tokens."""
    rng, mean = np.random.default_rng(seed), np.array([230] + [260] * answers)
    spread = 0.27 * 600 ** 2 / (230 ** 2 + 260 ** 2)                           # variance / mean^2 of each
    ids = lambda count: rng.integers(vocabulary, size=int(count)).tolist()
    start, samples = ids(root), []
    for _ in range(n):
        sizes = rng.gamma(1 / spread, mean * spread)
        room = ((length or LONGEST) - root) / (sizes[0] + sizes[1:])
        sizes = np.concatenate([sizes[:1] * min(1, room.min()), sizes[1:] * np.minimum(1, room)])
        if length:
            sizes = [(length - root) // 2] + [length - root - (length - root) // 2] * answers
        samples.append(Sample(start + ids(max(1, sizes[0])), [ids(max(1, size)) for size in sizes[1:]], root))
    return samples


class Bench:
    """What every item needs to know: the device, the model's shape, the batches, clocks."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        self.cuda, self.products = self.device.type == "cuda", pick_dtype(self.device, args.dtype)
        path = Path(args.model) / "config.json"
        c = self.config = SHAPES[args.shape] if args.shape else LlamaConfig.from_json(path)
        attend = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        self.body = c.num_hidden_layers * (attend + 3 * c.hidden_size * c.intermediate_size)
        self.head = c.vocab_size * c.hidden_size
        self.parameters = self.body + self.head * (1 if c.tie_word_embeddings else 2)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.memory_cap:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.memory_cap * 2 ** 30 / total)

    def samples(self, n, pairs=False):
        """(samples, their records): n random ones, or all of the files."""
        args = self.args
        if args.shape:
            return random_samples(n, 2 if pairs else 1, self.config.vocab_size, args.length), None
        answers = ("chosen", "rejected") if pairs else ("output",)
        asked = answers if args.dpo else ("output",)
        records = read_records(args.dpo if pairs and args.dpo else args.sft, ("instruction", "input", *asked))
        if pairs and not args.dpo:                      # the neighbour's answer is "rejected": good for timing
            records = [{**a, "chosen": a["output"], "rejected": b["output"]}
                       for a, b in zip(records, records[1:])]
        return encode_records(Tokenizer.from_pretrained(args.model), records, LONGEST, answers)

    def batches(self, pairs=False):
        """(batches of samples, batches of their records), warm-up first, in a shuffled order."""
        size, steps = self.args.batch_size, self.args.warm + self.args.steps
        samples, records = self.samples(size * steps, pairs)
        order = np.random.default_rng(42).permutation(len(samples))
        cut = lambda items: [[items[order[i % len(order)]] for i in range(n, n + size)]
                             for n in range(0, size * steps, size)]
        return cut(samples), cut(records) if records else None

    def prompts(self):
        return [sample.prompt for sample in self.samples(self.args.prompts)[0][:self.args.prompts]]

    def load(self, training):
        """Our model as the scripts load it: to train, fp32 weights beside products of another dtype."""
        storage = torch.promote_types(self.products, torch.float32) if training else self.products
        model = (random_model(self.config, self.device, storage) if self.args.shape
                 else Llama.from_pretrained(self.args.model, self.device, storage))
        model.compute_dtype, model.recompute = self.products, self.args.recompute
        return model

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self):
        """Most bytes held so far."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def train(self, step, batches, factor=6, unit="tokens"):
        """Time step(batch) -> loss; factor: model FLOPs for each parameter and token."""
        losses, times = [], []
        for batch in batches:
            began = time.perf_counter()
            losses.append(step(batch))
            self.synchronize()
            times.append(time.perf_counter() - began)
        warm = self.args.warm
        return {**self.trained([s for batch in batches[warm:] for s in batch], factor, unit),
                "seconds": sum(times[warm:]), "losses": losses[warm:], "first_step_seconds": times[0]}

    def trained(self, samples, factor, unit):
        tokens = sum(len(s.prompt) + len(a) for s in samples for a in s.answers)
        return {"unit": unit, "units": tokens if unit == "tokens" else len(samples), "tokens": tokens,
                "flops": factor * self.parameters * tokens}

    def work(self, packs, passes):
        """FLOPs that packs really need, a backward pass being worth two forward passes: the body for each
        token, the head for each scored row, attention for each pair of rows that see one another."""
        c, linear = self.config, sum(self.body * len(p.tokens) + self.head * len(p.rows) for p in packs)
        seen = sum((tree_plan(p.end).position + 1).sum().item() for p in packs)
        return passes * (2 * linear + 4 * seen * c.num_hidden_layers * c.num_attention_heads * c.head_dim)

    def time(self, call, seconds=0.4):
        """Median seconds of a call after one that does not count; a GPU gets ten at a time."""
        calls, times = 10 if self.cuda else 1, []
        while len(times) < 4 or sum(times) < seconds:
            began = time.perf_counter()
            for _ in range(calls if times else 1):
                call()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return median(times[1:]) / calls

    def kernel(self, call, inputs, flops, unit="rows", units=None, work=0, moved=0):
        """Time call(*inputs) alone and, where inputs want gradients, with its backward pass."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        wanted, before = [x for x in inputs if x.requires_grad], self.peak()
        with torch.no_grad():
            weight = torch.randn_like(call(*inputs)) if wanted else None
            forward = self.time(partial(call, *inputs))
        both = lambda: torch.autograd.grad(call(*inputs), wanted, weight)
        seconds = self.time(both) if wanted else forward
        given = sum(x.nbytes for x in [*wanted, weight]) if wanted else 0
        return {"unit": unit, "units": units or len(inputs[0]), "seconds": seconds, "forward_seconds": forward,
                "flops": flops, "work": work, "bytes": moved,
                "peak_memory": max(0, self.peak() - before - given) / 2 ** 30}


def random_model(config, device, dtype):
    """Llama.random, but drawn on the device: billions of weights in no time."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    for weight in model.to_empty(device=device).parameters():
        weight.data.normal_(0, 0.02) if weight.dim() == 2 else weight.data.fill_(1)
    return model


# ------------------------------------------------------------------ items: each measures one thing

def limits(b):
    """What the device can do: a large matrix product, a copy."""
    n, floats = (8192, 2 ** 28) if b.cuda else (2048, 2 ** 25)
    x, y = torch.randn(2, n, n, device=b.device).to(b.products)
    source, target = torch.ones(2, floats, device=b.device)
    return {"unit": "FLOP", "units": 2 * n ** 3, "flops": 2 * n ** 3, "seconds": b.time(lambda: F.linear(x, y)),
            "copy": 2 * source.nbytes / b.time(lambda: target.copy_(source)), "dtype": str(b.products),
            "device": torch.cuda.get_device_name(b.device) if b.cuda else platform.machine(),
            "threads": torch.get_num_threads()}


def sft(b, share=True):
    """A step as in train_sft.main."""
    (batches, _), model, done = b.batches(), b.load(training=True), []
    optimizer = make_optimizer(model, 5e-5)

    def step(batch):
        count, loss = sum(len(s.answers[0]) for s in batch), 0.0
        done.append(pack(batch, b.args.max_tokens, share))
        for p in done[-1]:
            p = p.to(b.device)
            part = sft_loss(model(p.tokens, p.end, p.rows, p.targets), count)
            part.backward()
            loss += part.item()
        update(model, optimizer, 5e-5)
        return loss

    return {**b.train(step, batches), "work": sum(b.work(packs, 3) for packs in done[b.args.warm:])}


def dpo(b, share=True):
    """A step as in train_dpo.main, with its part of the reference pass."""
    (batches, _), model, done = b.batches(pairs=True), b.load(training=True), []
    optimizer, settings = make_optimizer(model, 5e-6), SimpleNamespace(
        beta=0.01, sft=2.0, batch_size=b.args.batch_size, max_tokens=b.args.max_tokens, no_share=not share)

    def step(batch):
        reference, loss = reference_logprobs(model, batch, settings, (b.device, 0, 1)), 0.0
        done.append(pack(batch, b.args.max_tokens, share))
        for p in done[-1]:
            p = p.to(b.device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)
            part, _ = pairs_loss(logprobs, p.answer, batch, reference, torch.ones(len(batch)), settings)
            (part / len(batch)).backward()
            loss += part.item() / len(batch)
        update(model, optimizer, 5e-6)
        return loss

    return {**b.train(step, batches, 8, "pairs"), "work": sum(b.work(packs, 4) for packs in done[b.args.warm:])}


def sample(b, share=True, stops=False):
    """k answers to each prompt, of exactly --new-tokens or (stops) until the model ends, at most twice that."""
    c, k, prompts, model = b.config, b.args.k, b.prompts(), b.load(training=False)
    new, stop = b.args.new_tokens, ()
    if stops:
        new, stop = 2 * new, Tokenizer.from_pretrained(b.args.model).stop
    run = partial(generate, model, k=k, temperature=1.0, top_p=0.95, share=share)
    run(prompts[:2], max_new_tokens=4)
    b.synchronize()
    began = time.perf_counter()
    answers = run(prompts, max_new_tokens=new, stop=stop)
    seconds, tokens = time.perf_counter() - began, sum(len(ids) for some in answers for ids in some)
    root = library.common_prefix(prompts) if share else 0
    read = root + sum(len(p) - root for p in prompts) * (1 if share else k)    # prompt tokens, each step again
    keys = new * read + len(prompts) * k * new * new / 2
    kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim        # numbers kept of each token
    return {"unit": "tokens", "units": tokens, "seconds": seconds, "flops": 2 * b.parameters * tokens,
            "work": 2 * b.body * read + 2 * (b.body + b.head) * tokens,
            "bytes": b.products.itemsize * (new * (b.body + b.head) + keys * kept)}


def attend(b, prepare=lambda plan: partial(attention, plan=plan), tree=False):
    """One layer's attention over a stream of real lengths: sequences side by side, or pairs as a tree."""
    c, most = b.config, 8192 if b.cuda else 2048
    p = pack(b.samples(most // 64, pairs=tree)[0], most, share=tree)[0]
    plan, T = tree_plan(p.end), len(p.tokens)
    sizes = [c.num_attention_heads] + [c.num_key_value_heads] * 2
    q, k, v = (torch.randn(T, n, c.head_dim, device=b.device, dtype=b.products, requires_grad=True) for n in sizes)
    flops = 3.5 * 4 * (plan.position + 1).sum().item() * c.num_attention_heads * c.head_dim
    return b.kernel(prepare(plan), (q, k, v), flops, work=flops)


def score(b, function=token_logprobs, sizes=None):
    """Log-probabilities of N targets from hidden states (N, D) and a head (V, D) kept in fp32."""
    N, V, D = sizes or (4096 if b.cuda else 256, b.config.vocab_size, b.config.hidden_size)
    hidden = torch.randn(N, D, device=b.device).to(b.products).requires_grad_()
    head = torch.randn(V, D, device=b.device).mul_(0.02).requires_grad_()
    targets = torch.arange(N, device=b.device) % V
    return b.kernel(lambda h, w: function(h, w, targets), (hidden, head), 6 * N * V * D, work=8 * N * V * D)


def nucleus(b, function=draw_token):
    """One top-p draw from a softmax that is neither flat nor a single peak."""
    B, V = (1024, 128256) if b.cuda else (64, b.config.vocab_size)
    logits = torch.randn(B, V, device=b.device).mul_(3).to(b.products)
    key = torch.arange(B, device=b.device)
    return b.kernel(lambda z: function(z, key, key, 1.0, 0.95), (logits,), 0, moved=2 * logits.nbytes)


def decode(b):
    """Generation by one layer with hardly any vocabulary: attention over the paged cache, and the engine."""
    shape = {**vars(b.config), "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True}
    model = random_model(LlamaConfig(**shape), b.device, b.products)
    prompts = [[i % 64 for i in s.prompt] for s in random_samples(b.args.prompts, 1, 64)]
    run = partial(generate, model, prompts, k=b.args.k)
    run(max_new_tokens=4)
    began, new = time.perf_counter(), b.args.new_tokens
    run(max_new_tokens=new)
    b.synchronize()
    return {"unit": "tokens", "units": len(prompts) * b.args.k * new, "flops": 0,
            "seconds": time.perf_counter() - began}


def optimize(b, make=make_optimizer):
    """One update of all weights: clipping and AdamW."""
    model = b.load(training=True)
    optimizer, weights = make(model, 1e-5), list(model.parameters())
    gradients = [torch.full_like(weight, 1e-3) for weight in weights]

    def call():
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
        update(model, optimizer, 1e-5)

    return {"unit": "weights", "units": b.parameters, "flops": 0, "seconds": b.time(call)}


def twin(function):
    """The same item with the plain twins instead of kernels."""
    def run(b):
        library.KERNELS = "torch"
        return function(b)
    return run


BIG = 8192, 128256, 2048
ITEMS = {       # name: (function, what it needs), most important first; the first of a group (first word) is ours
    "limits": (limits, ""),
    "sft": (sft, ""),
    "sft unshared": (partial(sft, share=False), ""),
    "sft transformers": (peers.sft, "peers"),
    "sft trl": (partial(peers.trl, pairs=False), "peers model"),
    "sft trl packed": (partial(peers.trl, pairs=False, packing=True), "peers model"),
    "dpo": (dpo, ""),
    "dpo unshared": (partial(dpo, share=False), ""),
    "dpo trl": (partial(peers.trl, pairs=True), "peers model"),
    "dpo trl precomputed": (partial(peers.trl, pairs=True, precompute_ref_log_probs=True), "peers model"),
    "generate": (sample, ""),
    "generate unshared": (partial(sample, share=False), ""),
    "generate transformers": (peers.sample, "peers"),
    "generate transformers sorted": (partial(peers.sample, sort=True), "peers"),
    "generate transformers at once": (partial(peers.sample, groups=(0,)), "peers"),
    "stops": (partial(sample, stops=True), "model"),
    "stops transformers": (partial(peers.sample, groups=(4, 0), sort=True, stops=True), "peers model"),
    "attention": (attend, ""),
    "attention twin": (twin(attend), "cuda"),
    "attention varlen": (partial(attend, prepare=peers.varlen), "peers cuda"),
    "attention flex": (partial(attend, prepare=peers.flex), "peers cuda"),
    "attention each": (partial(attend, prepare=peers.each), "peers"),
    "attention mask": (partial(attend, prepare=lambda plan: partial(attention_by_mask, plan=plan)), ""),
    "tree": (partial(attend, tree=True), ""),
    "tree twin": (twin(partial(attend, tree=True)), "cuda"),
    "tree flex": (partial(attend, prepare=peers.flex, tree=True), "peers cuda"),
    "logprobs": (score, ""),
    "logprobs twin": (twin(score), "cuda"),
    "logprobs cross_entropy": (partial(score, function=peers.logprobs), "peers"),
    "nucleus": (nucleus, ""),
    "nucleus sorting": (partial(nucleus, function=peers.nucleus), "peers"),
    "decode": (decode, ""),
    "decode twin": (twin(decode), "cuda"),
    "adamw": (optimize, ""),
    "adamw foreach": (partial(optimize, make=peers.adamw), "peers"),
    "loss": (partial(score, sizes=BIG), "big"),
    "loss cross_entropy": (partial(score, function=peers.logprobs, sizes=BIG), "peers big"),
}
# goal and the part, at the size of 1B, 3B and 8B, of the rate that the measured limits allow
GOALS = {"sft unshared": ("G1", 0.63, 0.63, 0.70), "sft": ("G2", 0.63, 0.63, 0.70), "logprobs": ("G3", 0.9, 0.9, 0.9),
         "dpo": ("G4", 0.63, 0.63, 0.70), "attention": ("G7", 0.14, 0.19, 0.19), "nucleus": ("G11", 0.36, 0.36, 0.36),
         "generate": ("G8", 0.60, 0.67, 0.75)}
# goal and how many times ours must be as fast (or, of the loss, as small)
RATIOS = {"dpo unshared": ("G4", 1.3), "loss cross_entropy": ("G5", 8.0), "attention varlen": ("G7", 1.0),
          "generate unshared": ("G10", 1.5), "nucleus sorting": ("G11", 50.0)}


# ------------------------------------------------------------------ running and showing

def run_here(args):
    """One item, in this process; prints its result as a line of JSON."""
    b = Bench(args)
    try:
        result = {"parameters": b.parameters, **ITEMS[args.only][0](b)}
        result.setdefault("peak_memory", b.peak() / 2 ** 30)
    except ModuleNotFoundError as error:
        result = {"error": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    print("\n" + json.dumps(result), flush=True)


def run_child(argv, name, seconds):
    """One item in a process of its own; {"error"} where it fails or is not done in time."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1",
             "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if seconds is not None and seconds < 5:
        return {"error": "left out for time"}
    try:
        done = subprocess.run([sys.executable, __file__, *argv, "--only", name], capture_output=True, text=True,
                              env={**os.environ, **quiet}, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "cut off: --minutes were over"}
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1][:160]}
    result = json.loads(done.stdout.splitlines()[-1])
    return result if "error" in result else {**result, "rate": result["units"] / result["seconds"]}


def summarize(name, rounds, goals):
    """An item's row: medians over the rounds in which it ran."""
    group, errors = name.split()[0], [r[name]["error"] for r in rounds if "error" in r[name]]
    runs = [(r[name], r[group], r["limits"]) for r in rounds if "error" not in r[name]]
    row = {"name": name, "errors": errors, "rounds": [r[name] for r in rounds]}
    if not runs:
        return row
    middle = lambda key: median(run[key] for run, _, _ in runs)
    rates = [run["rate"] for run, _, _ in runs]
    row.update(unit=runs[0][0]["unit"], rate=median(rates), slowest=min(rates), fastest=max(rates),
               peak_memory=middle("peak_memory"))
    limited = [(run, limit) for run, _, limit in runs if "error" not in limit]
    if limited:
        row["of_gemm"] = median(run["flops"] / run["seconds"] / limit["rate"] for run, limit in limited)
    pairs = [(ours, run) for run, ours, _ in runs if "error" not in ours and run is not ours]
    if pairs:
        row["ratio"] = median(ours["rate"] / run["rate"] for ours, run in pairs)
        row["memory_ratio"] = median(run["peak_memory"] / max(ours["peak_memory"], 1e-9) for ours, run in pairs)
    if goals and limited and name in GOALS:
        goal, *parts = GOALS[name]
        part = parts[0 if middle("parameters") < 2e9 else 1 if middle("parameters") < 5e9 else 2]
        rate = median(part * run["units"] / (run["work"] / limit["rate"] + run.get("bytes", 0) / limit["copy"])
                      for run, limit in limited)
        row["goal"] = {"name": goal, "rate": rate, "met": row["rate"] >= rate}
    if goals and pairs and name in RATIOS:
        goal, ratio = RATIOS[name]
        row["goal"] = {"name": goal, "ratio": ratio,
                       "met": row["memory_ratio" if goal == "G5" else "ratio"] >= ratio}
    return row


def human(x):
    """Three figures or so, in powers of a thousand from a million on."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if x >= size:
            return f"{x / size:.4g}{letter}"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show(row):
    """One line of the table."""
    if "rate" not in row:
        return f"{row['name']:30} {row['errors'][0]}"
    spread = f"[{human(row['slowest'])} - {human(row['fastest'])}]" if len(row["rounds"]) > 1 else ""
    share = f"{100 * row['of_gemm']:7.1f}%" if row.get("of_gemm") else " " * 8
    ratio = f"{row['ratio']:7.2f}x" if "ratio" in row else " " * 8
    goal = row.get("goal")
    if goal:
        goal = (f"{goal['name']}: {human(goal['rate']) if 'rate' in goal else format(goal['ratio'], '.4g') + 'x'} "
                f"{'met' if goal['met'] else 'missed'}")
    return (f"{row['name']:30} {human(row['rate']) + ' ' + row['unit'] + '/s':>20} {spread:24}{share} "
            f"{row['peak_memory']:8.2f} {ratio}  {goal or ''}").rstrip()


def header(args):
    """Everything that a figure depends on."""
    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "triton", "transformers", "trl")},
            "git": commit.stdout.strip() or None, "arguments": vars(args)}


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = at_least(1)
    p.add_argument("--model", default=str(ROOT / "toy/model"), help="folder with weights and tokenizer")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape and random records instead")
    p.add_argument("--sft", default=str(ROOT / "toy/train_wildguard.json"), help="records with an output")
    p.add_argument("--dpo", help="records with chosen and rejected (default: made up from --sft)")
    p.add_argument("--items", nargs="+", help="groups or items to run (default: all)")
    p.add_argument("--peers", action="store_true", help="run transformers, TRL and torch's own kernels too")
    p.add_argument("--big", action="store_true", help="the loss at 8,192 x 128,256 on a CPU, too")
    p.add_argument("--repeat", type=count, default=1, metavar="N", help="rounds through all items")
    p.add_argument("--minutes", type=at_least(0, float), help="start nothing after these; name what was left out")
    p.add_argument("--json", metavar="FILE", help="write everything here")
    p.add_argument("--warm", type=at_least(0), default=1, help="steps before the clock")
    p.add_argument("--steps", type=count, help="steps on the clock (default: 3; 20 with --memory-cap)")
    p.add_argument("--batch-size", type=count, help="sequences or pairs a step (default: 4, CUDA: 64)")
    p.add_argument("--max-tokens", type=count, default=8192, help="of a pack")
    p.add_argument("--length", type=at_least(200), help="of every sequence, with --shape (default: mixed)")
    p.add_argument("--prompts", type=count, help="of generation (default: 16, CUDA: 256)")
    p.add_argument("--k", type=count, default=4, help="answers to a prompt")
    p.add_argument("--new-tokens", type=count, default=128, help="of an answer")
    p.add_argument("--recompute", action="store_true", help="activations twice: less memory")
    p.add_argument("--memory-cap", type=at_least(1, float), metavar="GIB",
                   help="CUDA: fail above this; by default then 20 steps of R-SFT and HS-DPO at length 2,048")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="of products")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--threads", type=count, help="of torch (default: its own choice)")
    p.add_argument("--only", choices=ITEMS, help=argparse.SUPPRESS)
    if p.parse_args(argv).memory_cap:
        p.set_defaults(steps=20, length=2048, recompute=True, max_tokens=2048, batch_size=4, items=["sft", "dpo"])
    args = p.parse_args(argv)
    cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    if args.memory_cap and not cuda:
        raise InputError("--memory-cap needs a CUDA device")
    args.steps, args.batch_size = args.steps or 3, args.batch_size or (64 if cuda else 4)
    args.prompts = args.prompts or (256 if cuda else 16)
    have = {"peers": args.peers, "model": not args.shape, "cuda": cuda, "big": cuda or args.big}
    items = [name for name, (_, needs) in ITEMS.items() if all(have[need] for need in needs.split())]
    groups = {name for name in items if not args.items or {name, name.split()[0]} & set(args.items)}
    ours = {name.split()[0] for name in groups}                    # a ratio needs ours
    return args, [name for name in items if name == "limits" or name in groups | ours]


def main(argv=None):
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    args, names = parse_arguments(argv)
    if args.only:
        return run_here(args)
    began, rounds = time.time(), []
    for number in range(1, args.repeat + 1):
        rounds.append({})
        for name in names:
            left = args.minutes * 60 - time.time() + began if args.minutes else None
            result = rounds[-1][name] = run_child(argv, name, left)
            said = result.get("error") or f"{human(result['rate'])} {result['unit']}/s"
            print(f"round {number}: {name}: {said}", file=sys.stderr, flush=True)
    goals = any(r["limits"].get("device", "cpu") != platform.machine() for r in rounds) and torch.cuda.is_available()
    rows = [summarize(name, rounds, goals) for name in names]
    result = {**header(args), "device": rounds[0]["limits"].get("device"), "seconds": time.time() - began, "items": rows}
    print(f"\n{result['device']}, {result['versions']}, commit {result['git']}\n\n{'':30} {'rate':>20} {'':24}"
          f"{'of GEMM':>8} {'GiB':>8} {'ours/this':>8}  goal", *map(show, rows), sep="\n")
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
