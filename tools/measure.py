"""What tools/bench.py measures of ours: one function an item, and the Bench that all items share.

An item takes a Bench and returns {"unit", "units", "seconds", "flops"} of what it timed: its rate is units /
seconds, flops are model FLOPs. Where a limit is known it adds "work" and "bytes", the FLOPs and the memory
traffic that the task needs; its least time is work / (rate of a matrix product) + bytes / (rate of a copy).
"""
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import model as library
from data import Example, Tokenizer, common_prefix, encode_records, pack, read_records
from model import (Llama, LlamaConfig, World, attention, draw_token, generate, pick_device,
                   pick_dtype, token_logprobs, tree_plan)
from train_dpo import answer_sums, pairs_loss, reference_logprobs
from train_sft import (default_max_tokens, make_optimizer, parameters, peak_memory, sft_loss,
                       training_bytes, update)

LLAMA3 = partial(LlamaConfig, 128256, num_key_value_heads=8, rope_theta=500000.0)
SHAPES = {"1b": LLAMA3(2048, 8192, 16, 32, tie_word_embeddings=True),
          "3b": LLAMA3(3072, 8192, 28, 24, tie_word_embeddings=True),
          "8b": LLAMA3(4096, 14336, 32, 32),
          "tiny": LlamaConfig(96, 64, 96, 2, 4, 2)}                            # for tests
LONGEST = 2048          # tokens of a sequence, as in the paper


def random_examples(n, answers, vocabulary, length=None, root=110, seed=0):
    """Examples with the lengths S of guard data: an instruction of 110 tokens, a prompt of 230 and
    an answer of 260 on average, E[S^2] / E[S]^2 = 1.27; or sequences of exactly `length` tokens."""
    rng = np.random.default_rng(seed)
    mean = np.array([230] + [260] * answers)
    spread = 0.27 * 600 ** 2 / (230 ** 2 + 260 ** 2)                           # variance / mean^2 of each
    ids = lambda count: rng.integers(vocabulary, size=max(1, int(count))).tolist()
    start = ids(root)
    examples = []
    for _ in range(n):
        prompt, *sizes = rng.gamma(1 / spread, mean * spread)
        fit = min(1, (LONGEST - root) / (prompt + max(sizes)))
        if length:
            prompt = (length - root) // 2
            fit = 1
            sizes = [length - root - prompt] * answers
        whole = start + ids(prompt * fit)
        examples.append(Example(whole, [ids(size * fit) for size in sizes], root))
    return examples


def random_model(config, device, dtype):
    """Llama.random, but drawn on the device: billions of weights in no time."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    for weight in model.to_empty(device=device).parameters():
        weight.data.normal_(0, 0.02) if weight.dim() == 2 else weight.data.fill_(1)
    return model


class Bench:
    """The device, the model's shape, the batches, and clocks."""

    def __init__(self, args):
        self.args = args
        self.device = pick_device(args.device)
        self.cuda = self.device.type == "cuda"
        self.products = pick_dtype(self.device, args.dtype)
        path = Path(args.model) / "config.json"
        c = self.config = SHAPES[args.shape] if args.shape else LlamaConfig.from_json(path)
        attend = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        self.body = c.num_hidden_layers * (attend + 3 * c.hidden_size * c.intermediate_size)
        self.head = c.vocab_size * c.hidden_size
        self.parameters = parameters(c)
        if args.max_tokens is None:                     # as a trainer, if memory will do
            logits = library.TokenLogprobs.logits_in_part(self.device)
            need = lambda T: training_bytes(c, T, self.products, torch.float32, 1, False, logits)
            args.max_tokens = default_max_tokens(self.parameters, World(self.device), need)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.memory_cap:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.memory_cap * 2 ** 30 / total, self.device)

    # ---- what is computed
    def examples(self, n, pairs=False):
        """(examples, their records): n random ones and None, or all of the files."""
        args = self.args
        answers = ("chosen", "rejected") if pairs else ("output",)
        if args.shape:
            vocabulary = self.config.vocab_size
            return random_examples(n, len(answers), vocabulary, args.length), None
        if pairs and args.dpo:
            records = read_records(args.dpo, ("instruction", "input", *answers))
        else:
            records = read_records(args.sft)
        if pairs and not args.dpo:                      # for timing, the neighbour's answer will do
            records = [{**a, "chosen": a["output"], "rejected": b["output"]}
                       for a, b in zip(records, records[1:])]
        return encode_records(Tokenizer.from_pretrained(args.model), records, LONGEST, answers)

    def batches(self, pairs=False):
        """(batches of examples, batches of their records), warm-up first, in a shuffled order."""
        size = self.args.batch_size
        steps = self.args.warm + self.args.steps
        examples, records = self.examples(size * steps, pairs)
        order = np.random.default_rng(42).permutation(len(examples))
        cut = lambda items: [[items[order[i % len(order)]] for i in range(n, n + size)]
                             for n in range(0, size * steps, size)]
        return cut(examples), cut(records) if records else None

    def prompts(self):
        examples, _ = self.examples(self.args.prompts)
        return [example.prompt for example in examples[:self.args.prompts]]

    def load(self, training):
        """Our model as the scripts load it: to train, fp32 weights beside products of another dtype."""
        storage = torch.promote_types(self.products, torch.float32) if training else self.products
        model = (random_model(self.config, self.device, storage) if self.args.shape
                 else Llama.from_pretrained(self.args.model, self.device, storage))
        model.compute_dtype = self.products
        model.recompute = self.args.recompute
        return model

    def work(self, packs, passes):
        """FLOPs that packs need, a backward pass being worth two forward passes: the body for each token,
        the head for each scored row, attention for each pair of a row and a key that it sees."""
        c = self.config
        linear = sum(self.body * len(p.tokens) + self.head * len(p.rows) for p in packs)
        seen = sum((tree_plan(p.end).position + 1).sum().item() for p in packs)
        return passes * (2 * linear + 4 * seen * c.num_hidden_layers * c.num_attention_heads * c.head_dim)

    # ---- clocks
    def now(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.args.processor_time else time.perf_counter()

    def peak(self):
        """Most bytes held so far."""
        return peak_memory(self.device)

    def train(self, step, batches, factor=6, unit="tokens"):
        """Time step(batch) -> loss; factor: model FLOPs for each parameter and token."""
        losses = []
        times = [self.now()]
        warm = self.args.warm
        cold = None
        for batch in batches:
            losses.append(step(batch))
            times.append(self.now())
            cold = cold or time.time() - self.args.started
        return {**self.trained([e for batch in batches[warm:] for e in batch], factor, unit),
                "seconds": times[-1] - times[warm], "losses": losses[warm:], "cold_start_seconds": cold}

    def trained(self, examples, factor, unit):
        """Units and model FLOPs of examples whose sequences are counted as they stand alone."""
        tokens = sum(len(e.prompt) + len(a) for e in examples for a in e.answers)
        units = tokens if unit == "tokens" else len(examples)
        return {"unit": unit, "units": units, "tokens": tokens,
                "flops": factor * self.parameters * tokens}

    def time(self, call, seconds=0.5):
        """Median seconds of a call, after one that does not count; a GPU gets ten at a time."""
        calls = 10 if self.cuda else 1
        times = []
        call()
        while sum(times) < seconds:
            began = self.now()
            for _ in range(calls):
                call()
            times.append(self.now() - began)
        return median(times) / calls

    def kernel(self, call, inputs, flops, unit="rows", work=0, moved=0):
        """Time call(*inputs) alone and, where inputs want gradients, with its backward pass."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        wanted = [x for x in inputs if x.requires_grad]
        before = self.peak()
        with torch.no_grad():
            weight = torch.randn_like(call(*inputs)) if wanted else None
            seconds = forward = self.time(partial(call, *inputs))
        if wanted:
            seconds = self.time(lambda: torch.autograd.grad(call(*inputs), wanted, weight))
        extra = self.peak() - before - sum(x.nbytes for x in [*wanted, weight] if wanted)
        return {"unit": unit, "units": len(inputs[0]), "seconds": seconds, "forward_seconds": forward,
                "flops": flops, "work": work, "bytes": moved, "peak_memory": max(0, extra) / 2 ** 30}


# ------------------------------------------------------------------ items

def limits(b):
    """What the device can do: a large matrix product, a copy."""
    n, floats = (8192, 2 ** 28) if b.cuda else (2048, 2 ** 25)
    x, y = torch.randn(2, n, n, device=b.device).to(b.products)
    source, target = torch.ones(2, floats, device=b.device)
    name = platform.machine()
    cpu = Path("/proc/cpuinfo")
    if b.cuda:
        name = torch.cuda.get_device_name(b.device)
    elif cpu.exists():
        lines = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(": ")[1] if lines else name
    flops = 2 * n ** 3
    seconds = b.time(lambda: F.linear(x, y))
    return {"unit": "FLOP", "units": flops, "seconds": seconds, "flops": flops,
            "copy": 2 * source.nbytes / b.time(lambda: target.copy_(source)), "dtype": str(b.products),
            "device": name, "threads": torch.get_num_threads()}


def sft(b, share=True):
    """A step as in train_sft.main."""
    batches, _ = b.batches()
    model = b.load(training=True)
    done = []
    optimizer = make_optimizer(model, 5e-5)

    def step(batch):
        count = sum(len(e.answers[0]) for e in batch)
        loss = 0.0
        done.append(pack(batch, b.args.max_tokens, share))
        for p in done[-1]:
            p = p.to(b.device)
            part = sft_loss(model(p.tokens, p.end, p.rows, p.targets), count)
            part.backward()
            loss += part.detach()
        update(model, optimizer, 5e-5)
        return float(loss)

    result = b.train(step, batches)
    return {**result, "work": sum(b.work(packs, 3) for packs in done[b.args.warm:])}


def dpo(b, share=True):
    """A step as in train_dpo.main, with its part of the reference pass."""
    batches, _ = b.batches(pairs=True)
    model = b.load(training=True)
    done = []
    optimizer = make_optimizer(model, 5e-6)
    settings = SimpleNamespace(max_tokens=b.args.max_tokens, no_share=not share)

    def step(batch):
        reference = reference_logprobs(model, batch, settings, World(b.device))
        loss = 0.0
        done.append(pack(batch, b.args.max_tokens, share))
        for p in done[-1]:
            pairs = torch.unique(p.answer // 2)
            p = p.to(b.device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)
            policy = answer_sums(logprobs, p.answer, 2 * len(batch)).view(-1, 2)[pairs]
            length = policy.new_tensor([len(batch[i].answers[0]) for i in pairs])
            part = pairs_loss(policy, reference[pairs].to(policy), length, torch.ones_like(length),
                              beta=0.01, sft=2.0)["loss"].sum() / len(batch)
            part.backward()
            loss += part.item()
        update(model, optimizer, 5e-6)
        return loss

    result = b.train(step, batches, 8, "pairs")
    return {**result, "work": sum(b.work(packs, 4) for packs in done[b.args.warm:])}


def sample(b, share=True, stops=False):
    """k answers to each prompt, of just --new-tokens or (stops) until the model ends, at most twice that."""
    c = b.config
    k = b.args.k
    prompts = b.prompts()
    model = b.load(training=False)
    new = b.args.new_tokens
    stop = ()
    if stops:
        new = 2 * new
        stop = Tokenizer.from_pretrained(b.args.model).stop
    run = partial(generate, model, k=k, temperature=1.0, top_p=0.95, share=share)
    run(prompts[:2], max_new_tokens=4)
    began = b.now()
    answers = run(prompts, max_new_tokens=new, stop=stop)
    seconds = b.now() - began
    tokens = sum(len(ids) for some in answers for ids in some)
    root = common_prefix(prompts) if share else 0
    read = root + sum(len(p) - root for p in prompts) * (1 if share else k)    # prompt keys, at each step
    kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim        # numbers kept of a token
    keys = new * read + len(prompts) * k * new * new / 2
    return {"unit": "tokens", "units": tokens, "seconds": seconds, "flops": 2 * b.parameters * tokens,
            "work": 2 * b.body * read + 2 * (b.body + b.head) * tokens,
            "bytes": b.products.itemsize * (new * (b.body + b.head) + keys * kept)}


def attend(b, prepare=lambda plan: partial(attention, plan=plan), tree=False):
    """One layer's attention over a stream of real lengths: sequences side by side, or pairs as a tree."""
    c = b.config
    most = 8192 if b.cuda else 2048
    p = pack(b.examples(most // 64, pairs=tree)[0], most, share=tree)[0]
    plan = tree_plan(p.end, device=b.device)
    G = c.num_key_value_heads
    qkv = [torch.randn(len(p.tokens), n, c.head_dim, device=b.device, dtype=b.products, requires_grad=True)
           for n in (c.num_attention_heads, G, G)]
    flops = 3.5 * 4 * (plan.position + 1).sum().item() * c.num_attention_heads * c.head_dim
    return b.kernel(prepare(plan), qkv, flops, work=flops)


def score(b, function=token_logprobs, sizes=None):
    """Log-probabilities of N targets from hidden states (N, D) and a head (V, D) kept in fp32."""
    N, V, D = sizes or (4096 if b.cuda else 256, b.config.vocab_size, b.config.hidden_size)
    hidden = torch.randn(N, D, device=b.device).to(b.products).requires_grad_()
    head = torch.randn(V, D, device=b.device).mul_(0.02).requires_grad_()
    targets = torch.arange(N, device=b.device) % V
    return b.kernel(lambda h, w: function(h, w, targets), (hidden, head), 6 * N * V * D, work=8 * N * V * D)


def nucleus(b, function=draw_token):
    """One top-p draw a row from a softmax that is neither flat nor a single peak."""
    B, V = (1024, 128256) if b.cuda else (64, b.config.vocab_size)
    logits = torch.randn(B, V, device=b.device).mul_(3).to(b.products)
    seed = torch.arange(B, device=b.device)
    return b.kernel(lambda z: function(z, seed, seed, 1.0, 0.95), (logits,), 0,
                    moved=2 * logits.nbytes)


def decode(b):
    """Generation by one layer with hardly any vocabulary: attention over the paged cache, and the engine."""
    shape = {**vars(b.config), "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": True}
    model = random_model(LlamaConfig(**shape), b.device, b.products)
    new = b.args.new_tokens
    prompts = [e.prompt for e in random_examples(b.args.prompts, 1, 64)]
    run = partial(generate, model, prompts, k=b.args.k)
    run(max_new_tokens=4)
    began = b.now()
    run(max_new_tokens=new)
    seconds = b.now() - began
    return {"unit": "tokens", "units": b.args.prompts * b.args.k * new, "seconds": seconds, "flops": 0}


def optimize(b, make=make_optimizer):
    """One update of all weights: clipping and AdamW."""
    model = b.load(training=True)
    optimizer = make(model, 1e-5)
    gradients = [torch.full_like(w, 1e-3) for w in model.parameters()]

    def call():
        for weight, gradient in zip(model.parameters(), gradients):
            weight.grad = gradient
        update(model, optimizer, 1e-5)

    return {"unit": "weights", "units": b.parameters, "seconds": b.time(call), "flops": 0}


def twin(function):
    """The same item with the plain twins instead of kernels."""
    def run(b):
        library.choose_kernels("torch")
        return function(b)
    return run
