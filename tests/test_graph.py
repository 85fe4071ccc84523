"""The decode step as it is recorded on CUDA, without a GPU.

A CUDA graph repeats kernels on the same memory; no Python runs again, nothing is waited for, and nothing
comes from the host. Here the operations of a step are noted and repeated in the same way on the CPU, and
the step is run on tensors of another device, which have a shape and no memory."""
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, tiny_model, tiny_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import (Capacity, Engine, Job, Llama, Sampling, generate, generate_iter,
                   generate_plain)

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Notes operations; fails on one that needs the host: its numbers, its lists, or its memory."""
    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, f, types, args, kwargs=None):
        result, kwargs = f(*args, **(kwargs or {})), kwargs or {}
        name = f.name().removeprefix("aten::").split(".")[0]
        assert name not in WAITS and not (name == "lift_fresh" and result.dim()), name     # (a list of numbers)
        assert not (name == "index_put_" and args[2].dim() == 0), "a number from the host"
        assert not (name in ("index", "index_put_") and any(x.dtype == torch.bool for x in tensors(args[1])))
        assert len({x.device.type for x in tensors((args, kwargs, result)) if x.dim()}) < 2, name
        self.noted.append((f, args, kwargs, result))
        return result

    def replay(self):
        for f, args, kwargs, result in self.noted:
            for old, new in zip(tensors(result), tensors(f(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():                       # neither a view nor in place
                    old.copy_(new)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_replayed_step_equals_no_cache(monkeypatch, temperature):
    def record(self, step):
        with Recording() as recording:
            hidden = step()
        hidden.fill_(torch.nan)                                            # a recording computes nothing
        replays.append(0)

        def again():
            replays[-1] += 1
            recording.replay()
            return hidden
        return again

    replays = []
    monkeypatch.setattr(Engine, "record", record)
    model = tiny_model()
    prompts = [e.prompt for e in tiny_examples(shapes=[(n, ()) for n in (1, 70, 64)])]
    options = dict(k=3, max_new_tokens=70, temperature=temperature, stop=list(range(12)))
    assert generate(model, prompts, **options) == generate_plain(model, prompts, **options)
    assert len(replays) > 5 and set(replays) == {3}                        # 4 steps, of which one was not replayed


def test_a_step_takes_nothing_from_the_host(monkeypatch):
    def record(self, step):
        with Recording() as recording:
            step()
        seen.extend(recording.noted)
        return step

    seen = []
    monkeypatch.setattr(Engine, "record", record)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with torch.inference_mode():
        with torch.device("meta"):
            model = Llama(replace(CONFIG, rope_scaling=scaling))
        sampling = Sampling(max_new_tokens=8, temperature=0, top_p=0.95, stop=[0], seed=0)
        engine = Engine(model, [], sampling, Capacity(pages=8, slots=4, width=2, poll=4))
        engine.owned = {slot: engine.pool.take_highest(1) for slot in (0, 1)}
        prompt = engine.pool.take_lowest(1)
        engine.jobs = [Job(0, [1, 2, 3], [0, 1], {0: 0, 1: 1}, prompt, 1)]
        engine.decode()
    assert len(seen) > 100 and all(x.device.type == "meta" for _, _, _, out in seen for x in tensors(out) if x.dim())


def test_answers_are_handed_out_while_the_next_are_decoded(monkeypatch):
    """What a caller does with an answer costs no time on a GPU, which has work by then."""
    decode = Engine.decode
    happened = []

    def decode_and_note(engine):
        happened.append("decode")
        decode(engine)

    monkeypatch.setattr(Engine, "decode", decode_and_note)
    prompts = [e.prompt for e in tiny_examples(shapes=[(n, ()) for n in (1, 3, 2)])]
    # one slot: a prompt at a time, with 1 + 4 tokens in one look
    for number, _ in generate_iter(tiny_model(), prompts, max_new_tokens=5, max_slots=1):
        happened.append(number)
    assert happened == ["decode", "decode", 0, "decode", 1, 2]
