"""What a layer costs on a GPU, counted without one; and what a look costs the host.

    python tests/test_budget.py         print the figures

A GPU spends a layer's time on products and on moving bytes. Here a layer runs on tensors without
memory, and every operation that would be a kernel is noted: its bytes are those that it must read
and write at least, each once. A layer's cost is what a third layer adds to two. The figures below
are what it was when they were written down; a test fails where one has grown by a tenth.
"""
import sys
import time
from dataclasses import replace

import conftest  # noqa: F401  (where modules are found)
import pytest
import torch
from measure import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as library
from model import Capacity, Engine, Job, Llama, LlamaConfig, Sampling

TOKENS = 8192               # of a training pack
SLOTS = 1024                # of a decoding step
ROOT = 110                  # tokens of the instruction, of a prompt after it, of an answer:
PROMPT = 230                # the means of guard data
ANSWER = 260


# ------------------------------------------------------------------ counting
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh",
             "_unsafe_view", "_reshape_alias")
WRITE_ONLY = ("copy_", "fill_", "zero_")                # their first input is not read
PICK = ("index", "gather", "embedding")                 # of their first input, what they return


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_meta]


def size(x):
    """Bytes of a tensor's different numbers: an expanded one has fewer than its shape says."""
    count = 1
    for n, stride in zip(x.shape, x.stride()):
        count *= n if stride else 1
    return count * x.element_size()


def bytes_moved(name, args, result):
    """What an operation must read and write."""
    read = list(map(size, tensors(args)))
    written = sum(map(size, tensors(result)))
    if name in WRITE_ONLY:
        read = read[1:]
    elif name in PICK:
        read[0] = min(read[0], written)
    elif name == "index_put_":                          # (into, indices, values)
        written = read[-1]
        read = read[1:]
    elif name.startswith("_embedding_bag"):             # (table, indices, ...): a row for each
        table = args[0]
        read[0] = args[1].numel() * table.shape[1] * table.element_size()
    return sum(read) + written


class Cost(TorchDispatchMode):
    """Kernels launched and bytes moved by what runs under it."""

    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.bytes = 0
        self.by_name = {}

    def __torch_dispatch__(self, f, types, args, kwargs=None):
        result = f(*args, **(kwargs or {}))
        name = f.name().removeprefix("aten::").split(".")[0]
        seen = tensors((args, kwargs, result))
        casts = name == "to" and result.dtype != args[0].dtype      # "to" may also be a view
        if seen and (casts or not f.is_view) and name not in NO_KERNEL:
            self.add(name, bytes_moved(name, args, result))
        return result

    def add(self, name, moved):
        self.kernels += 1
        self.bytes += moved
        count, total = self.by_name.get(name, (0, 0))
        self.by_name[name] = (count + 1, total + moved)

    def launch(self, kernel, grid, warps, *args):
        """In the place of model.launch: a kernel of ours reads or writes each tensor once."""
        self.add(kernel.__name__, sum(map(size, tensors(args))))


class TorchNorm(torch.autograd.Function):
    """rms_norm as CUDA has it, a kernel forward and two backward; of a tensor without memory torch
    takes it apart."""

    @staticmethod
    def forward(ctx, x, weight, cost):
        ctx.save_for_backward(x, weight)
        ctx.cost = cost
        cost.add("rms_norm", 2 * size(x) + size(weight))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.cost.add("rms_norm_backward", 3 * size(x) + size(weight))       # x, grad -> of x
        ctx.cost.add("rms_norm_backward", 2 * size(x) + size(weight))       # x, grad -> of weight
        return torch.empty_like(x), torch.empty_like(weight), None


def as_on_cuda(monkeypatch, cost):
    def rms_norm(x, shape, weight, eps):
        return TorchNorm.apply(x, weight, cost)

    monkeypatch.setattr(library, "launch", cost.launch)
    monkeypatch.setattr(library, "use_kernels", lambda x: x.is_meta)
    monkeypatch.setattr(library.functional, "rms_norm", rms_norm)


def meta_model(shape, layers):
    config = replace(SHAPES[shape], num_hidden_layers=layers)
    with torch.device("meta"):
        return Llama(config)


def guard_pack():
    """`end` of TOKENS rows: an instruction, then prompts with an answer each."""
    end = [TOKENS] * ROOT
    while len(end) < TOKENS:
        stop = min(TOKENS, len(end) + PROMPT + ANSWER)
        end += [stop] * (stop - len(end))
    return torch.tensor(end)


def train(shape, layers, monkeypatch):
    """The cost of forward and backward pass of a pack, weights in fp32, products in bf16."""
    model = meta_model(shape, layers)
    model.compute_dtype = torch.bfloat16
    tokens = torch.zeros(TOKENS, dtype=torch.long, device="meta")
    end = guard_pack()
    cost = Cost()
    as_on_cuda(monkeypatch, cost)
    with cost:
        model(tokens, end).sum().backward()
    return cost


def decode(shape, layers, monkeypatch):
    """The cost of one token in every slot, each at the middle of its answer."""
    model = meta_model(shape, layers).to(torch.bfloat16)
    sampling = Sampling(2 * ANSWER, temperature=0, top_p=1, stop=[0], seed=0)
    pages = [library.pages_for(n) for n in (ROOT, PROMPT, ANSWER // 2 + 32)]
    capacity = Capacity(pages=pages[0] + SLOTS * sum(pages[1:]), slots=SLOTS, width=1, poll=32)
    cost = Cost()
    as_on_cuda(monkeypatch, cost)
    with torch.inference_mode():
        engine = Engine(model, [0] * ROOT, sampling, capacity)
        for slot in range(SLOTS):
            engine.owned[slot] = engine.pool.take_highest(pages[2])
            prompt = engine.pool.take_lowest(pages[1])
            job = Job(slot, [0] * (ROOT + PROMPT), [0], {slot: 0}, prompt, ANSWER // 2)
            engine.jobs.append(job)
        batch = engine.make_batch()
        cost.__init__()
        with cost:
            engine.step(batch)
    return cost


def layer_cost(measure, shape, monkeypatch):
    """(kernels, bytes) that a layer adds."""
    two = measure(shape, 2, monkeypatch)
    three = measure(shape, 3, monkeypatch)
    return three.kernels - two.kernels, three.bytes - two.bytes


# ------------------------------------------------------------------ the figures
# (kernels, MB moved) of one layer
BUDGET = {
    ("train", "1b"): (73, 7935),
    ("train", "8b"): (73, 16812),
    ("decode", "1b"): (21, 1466),
    ("decode", "8b"): (21, 3085),
}
MEASURES = {"train": train, "decode": decode}


@pytest.mark.parametrize("what, shape", BUDGET)
def test_a_layer_costs_no_more_than_it_did(what, shape, monkeypatch):
    kernels, megabytes = BUDGET[what, shape]
    now_kernels, now_bytes = layer_cost(MEASURES[what], shape, monkeypatch)
    assert now_kernels <= 1.1 * kernels
    assert now_bytes / 1e6 <= 1.1 * megabytes
    assert now_bytes / 1e6 >= 0.9 * megabytes, "less than it was: write the new figures down"


# ------------------------------------------------------------------ the host
def look_seconds(looks=6):
    """The least time of a look at SLOTS answers, beside the model: reserve, make_batch, finish."""
    model = Llama.random(LlamaConfig(64, 16, 16, 1, 2, 1))
    sampling = Sampling(2048, temperature=0, top_p=1, stop=[0], seed=0)
    capacity = Capacity(pages=2 + SLOTS * 40, slots=SLOTS, width=4, poll=32)
    with torch.inference_mode():
        engine = Engine(model, [], sampling, capacity)
        engine.feed = lambda tokens, end, places: torch.zeros(len(tokens), 16)
        jobs = [Job(number, [1] * 64 * 4, list(range(4))) for number in range(SLOTS // 4)]
        engine.admit(jobs)
        times = []
        for look in range(looks):
            began = time.process_time()
            engine.reserve()
            engine.make_batch()
            middle = time.process_time()
            for job in engine.jobs:
                job.drawn += capacity.poll
            engine.history[:, :job.drawn] = 1
            engine.history[10 * look:10 * look + 10, job.drawn - 1] = 0     # ten answers end
            again = time.process_time()
            done = engine.finish()
            times.append(time.process_time() - again + middle - began)
            assert len(done) == 10
    return min(times)


def lists_seconds():
    """The time of a yardstick: 60,000 short lists, made by Python as busy as the machine is now."""
    began = time.process_time()
    table = {n: [n, n + 1] for n in range(30_000)}
    copies = [list(pair) for pair in table.values()]
    assert len(copies) == len(table)
    return time.process_time() - began


def test_a_look_costs_the_host_at_most_four_yardsticks():
    """On a quiet core 8 ms beside 5; before number_reads and make_batch were made faster, 33."""
    looks = min(look_seconds() for _ in range(5))
    lists = min(lists_seconds() for _ in range(30))
    assert looks < 4 * lists


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        for what, shape in BUDGET:
            kernels, moved = layer_cost(MEASURES[what], shape, patch)
            print(f"{what:6} {shape}: {kernels} kernels, {moved / 1e6:.0f} MB a layer")
            if "-v" in sys.argv:
                cost = MEASURES[what](shape, 3, patch).by_name
                for name, (count, total) in sorted(cost.items(), key=lambda item: -item[1][1]):
                    print(f"    {name:40} {count:4} {total / 1e6:10.1f} MB")
    print(f"a look at {SLOTS} slots: {1000 * look_seconds():.1f} ms")
