"""Speed and memory of training, generation and kernels on this device, beside peers in the same run.

    python tests/bench.py                                                  the toy model and its corpus
    python tests/bench.py --model DIR --sft FILE --dpo FILE --peers --repeat 3 --json FILE
    python tests/bench.py --shape 1b --peers --minutes 9 --json FILE       random weights, on a GPU
    python tests/bench.py --shape 1b --memory-cap 22                       training on a 24 GB card

Each item runs in a process of its own, so that peak memory is its own, and the items of a round run one
after another, as machines drift; the table shows medians, and the median of each round's ratio to ours.
A rate counts the tokens of each sequence as it would stand alone: padding earns nothing, and a shared
prefix shows as speed. "of GEMM" is model FLOPs a second over the matrix-product rate of the same round:
6 N a trained token, 2 N more for the reference pass of DPO, 2 N a generated token (N: all parameters).
A peer that is not installed is named; none is needed. Peak memory: CUDA's allocator, else resident
memory; for kernels, what a call takes beside its inputs and their gradients.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from inspect import signature
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import model as library  # noqa: E402
from data import FORMATS, Sample, Tokenizer, encode_records, pack, read_records  # noqa: E402
from model import (InputError, Llama, LlamaConfig, attention, attention_by_mask, draw_token, generate,  # noqa: E402
                   pick_device, pick_dtype, token_logprobs, tree_plan, write_json)
from train_dpo import pairs_loss, reference_logprobs  # noqa: E402
from train_sft import make_optimizer, sft_loss, update  # noqa: E402

LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0)
SHAPES = {"1b": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                            num_attention_heads=32, tie_word_embeddings=True, **LLAMA3),
          "3b": LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                            num_attention_heads=24, tie_word_embeddings=True, **LLAMA3),
          "8b": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                            num_attention_heads=32, **LLAMA3),
          "tiny": LlamaConfig(96, 32, 64, 2, 4, 2)}                            # for tests
PEER_ROWS = 4           # sequences, pairs or prompts that a padded peer computes at once


# ------------------------------------------------------------------ what is computed

def config_of(args):
    return SHAPES[args.shape] if args.shape else LlamaConfig.from_json(Path(args.model) / "config.json")


def our_model(args, device, training):
    """As the scripts load it: fp32 weights beside products in bf16 (where there are) to train, else one dtype."""
    products = pick_dtype(device, args.dtype)
    storage = torch.promote_types(products, torch.float32) if training else products
    if args.shape:
        model = random_model(config_of(args), device, storage)
    else:
        model = Llama.from_pretrained(args.model, device, storage)
    model.compute_dtype, model.recompute = products, args.recompute
    return model


def random_model(config, device, dtype):
    """Llama.random, but drawn on the device: billions of weights in no time."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    for weight in model.to_empty(device=device).parameters():
        weight.data.normal_(0, 0.02) if weight.dim() == 2 else weight.data.fill_(1)
    return model


def random_samples(n, answers, vocabulary, length=None, root=110, seed=0):
    """Samples with the lengths of guard data: instruction 110, prompt 230 and answer 260 on average, the
    last two log-normal such that E[S^2] / E[S]^2 = 1.27; or sequences of exactly `length` tokens."""
    rng, samples = np.random.default_rng(seed), []
    ids = lambda count: rng.integers(vocabulary, size=count).tolist()
    start, s = ids(root), np.log(1 + 0.27 * 600 ** 2 / (230 ** 2 + 260 ** 2)) ** 0.5
    for _ in range(n):
        prompt, *sizes = rng.lognormal(np.log([230] + [260] * answers) - s * s / 2, s).astype(int) + 1
        if length:
            prompt, sizes = (length - root) * 230 // 490, [length - root - (length - root) * 230 // 490] * answers
        samples.append(Sample(start + ids(min(prompt, 1000)), [ids(min(size, 900)) if not length else ids(size)
                                                               for size in sizes], root))
    return samples


def workload(args, pairs=False):
    """(samples, records, batches): the batches of a run, warm-up first, as lists of sample numbers."""
    count = (args.warm + args.steps) * args.batch_size
    if args.shape:
        samples = random_samples(count, 2 if pairs else 1, config_of(args).vocab_size, args.length)
        records = None
    else:
        fields = ("instruction", "input") + (("chosen", "rejected") if pairs and args.dpo else ("output",))
        records = read_records(args.dpo if pairs and args.dpo else args.sft, fields)
        if pairs and not args.dpo:                      # no pairs at hand: the neighbour's answer is rejected
            records = [{**a, "chosen": a["output"], "rejected": b["output"]}
                       for a, b in zip(records, records[1:])]
        samples, records = encode_records(Tokenizer.from_pretrained(args.model), records, 2048,
                                          ("chosen", "rejected") if pairs else ("output",))
    order = np.random.default_rng(42).permutation(len(samples))
    order = [int(order[i % len(order)]) for i in range(count)]
    return samples, records, [order[i:i + args.batch_size] for i in range(0, count, args.batch_size)]


def tokens_of(samples):
    """Tokens of all sequences, each standing alone."""
    return sum(len(s.prompt) + len(a) for s in samples for a in s.answers)


def parameters(config):
    """(body, head): weights that multiply tokens, and those of one V x D matrix."""
    c = config
    attend = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    return (c.num_hidden_layers * (attend + 3 * c.hidden_size * c.intermediate_size),
            c.vocab_size * c.hidden_size)


def model_flops(config, tokens, factor):
    """factor x N x tokens, N being all weights, an untied embedding too."""
    body, head = parameters(config)
    return factor * tokens * (body + head * (1 if config.tie_word_embeddings else 2))


def work(config, packs, passes):
    """FLOPs that these packs really need: body for each token, head for each scored row, attention for
    each visible pair. passes: forward passes, a backward pass being worth two."""
    (body, head), c = parameters(config), config
    pairs = sum((tree_plan(p.end).position + 1).sum().item() for p in packs)
    linear = sum(body * len(p.tokens) + head * len(p.rows) for p in packs)
    return passes * (2 * linear + 4 * pairs * c.num_hidden_layers * c.num_attention_heads * c.head_dim)


# ------------------------------------------------------------------ clocks

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_steps(args, device, step, batches):
    """{"seconds" of all timed steps, "losses", "first": seconds of the very first one}."""
    losses, times = [], []
    for batch in batches:
        began = time.perf_counter()
        losses.append(step(batch))
        synchronize(device)
        times.append(time.perf_counter() - began)
    return {"seconds": sum(times[args.warm:]), "losses": losses[args.warm:], "first": times[0]}


def time_call(device, call, seconds=0.5):
    """Median seconds of a call, after one that does not count; a GPU gets ten at a time."""
    call()
    synchronize(device)
    calls, times = 10 if device.type == "cuda" else 1, []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times) / calls


def limits(args):
    """What the device can do: a large matrix product and a copy."""
    device = pick_device(args.device)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(pick_dtype(device, args.dtype))
    x = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    y, flops = torch.empty_like(x), 2 * n ** 3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"unit": "FLOP", "units": flops, "flops": flops, "seconds": time_call(device, lambda: F.linear(a, b)),
            "copy": 2 * x.nbytes / time_call(device, lambda: y.copy_(x)), "device": name}


# ------------------------------------------------------------------ training

def our_sft(args, share):
    """A step as in train_sft.main."""
    device, (samples, _, batches) = pick_device(args.device), workload(args)
    model = our_model(args, device, True)
    optimizer, packed = make_optimizer(model, 5e-5), []

    def step(batch):
        chosen = [samples[i] for i in batch]
        count, loss = sum(len(s.answers[0]) for s in chosen), 0.0
        packed.append(pack(chosen, args.max_tokens, share))
        for p in packed[-1]:
            p = p.to(device)
            part = sft_loss(model(p.tokens, p.end, p.rows, p.targets), count)
            part.backward()
            loss += part.item()
        update(model, optimizer, 5e-5)
        return loss

    result = time_steps(args, device, step, batches)
    tokens = tokens_of(samples[i] for batch in batches[args.warm:] for i in batch)
    return {**result, "unit": "tokens", "units": tokens, "flops": model_flops(model.config, tokens, 6),
            "work": sum(work(model.config, packs, 3) for packs in packed[args.warm:])}


def our_dpo(args, share):
    """A step as in train_dpo.main, and its part of the reference pass."""
    device, (samples, _, batches) = pick_device(args.device), workload(args, pairs=True)
    model, packed = our_model(args, device, True), []
    optimizer, settings = make_optimizer(model, 5e-6), SimpleNamespace(
        beta=0.01, sft=2.0, batch_size=args.batch_size, max_tokens=args.max_tokens, no_share=not share)

    def step(batch):
        chosen, loss = [samples[i] for i in batch], 0.0
        reference, weight = reference_logprobs(model, chosen, settings, (device, 0, 1)), torch.ones(len(batch))
        packed.append(pack(chosen, args.max_tokens, share))
        for p in packed[-1]:
            p = p.to(device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)
            part, _ = pairs_loss(logprobs, p.answer, chosen, reference, weight, settings)
            (part / len(batch)).backward()
            loss += part.item() / len(batch)
        update(model, optimizer, 5e-6)
        return loss

    result = time_steps(args, device, step, batches)
    timed = [samples[i] for batch in batches[args.warm:] for i in batch]
    return {**result, "unit": "pairs", "units": len(timed), "tokens": tokens_of(timed),
            "flops": model_flops(model.config, tokens_of(timed), 8),
            "work": sum(work(model.config, packs, 4) for packs in packed[args.warm:])}


def hf_model(args, device):
    from transformers import AutoModelForCausalLM, LlamaConfig as Config
    dtype = pick_dtype(device, args.dtype)
    if args.shape:
        with device:
            return AutoModelForCausalLM.from_config(Config.from_dict(config_of(args).to_json()), dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)


def padded(rows, value, left=False):
    """A list of lists as a matrix."""
    longest = max(map(len, rows))
    fill = lambda row: [value] * (longest - len(row))
    return torch.tensor([fill(row) + row if left else row + fill(row) for row in rows])


def hf_sft(args):
    """transformers and AdamW in a plain loop: padded batches, labels of -100 over prompts."""
    device, (samples, _, batches) = pick_device(args.device), workload(args)
    model = hf_model(args, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)

    def step(batch):
        chosen, loss = [samples[i] for i in batch], 0.0
        count = sum(len(s.answers[0]) for s in chosen)
        for some in (chosen[i:i + PEER_ROWS] for i in range(0, len(chosen), PEER_ROWS)):
            rows = [s.prompt + s.answers[0] for s in some]
            labels = padded([[-100] * len(s.prompt) + s.answers[0] for s in some], -100).to(device)
            mask = padded([[1] * len(row) for row in rows], 0).to(device)
            part = model(input_ids=padded(rows, 0).to(device), attention_mask=mask, labels=labels,
                         use_cache=False, num_items_in_batch=count).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    result = time_steps(args, device, step, batches)
    tokens = tokens_of(samples[i] for batch in batches[args.warm:] for i in batch)
    return {**result, "unit": "tokens", "units": tokens, "flops": model_flops(config_of(args), tokens, 6)}


def trl(args, pairs, **options):
    """TRL's SFTTrainer on our token ids, or its DPOTrainer on the same text; options go to its config."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    datasets.disable_caching()
    device, (samples, records, batches) = pick_device(args.device), workload(args, pairs)
    clock, seen, order = {"reference": 0.0}, [], [i for batch in batches for i in batch]

    class Clock(TrainerCallback):
        def on_step_begin(self, _, state, control, **others):
            synchronize(device)
            clock.setdefault("start" if state.global_step == args.warm else "first", time.perf_counter())

        def on_step_end(self, *_, **others):
            synchronize(device)
            clock["stop"] = time.perf_counter()

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *inputs):
            began = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*inputs)
            finally:
                clock["reference"] += time.perf_counter() - began

    dtype = pick_dtype(device, args.dtype)
    packing = options.get("packing", False)
    rows = 1 if packing else min(PEER_ROWS, args.batch_size)        # a packed row holds about four sequences
    common = dict(per_device_train_batch_size=rows, max_length=2048, max_steps=len(batches),
                  gradient_accumulation_steps=max(1, args.batch_size // (4 if packing else rows)),
                  lr_scheduler_type="constant", train_sampling_strategy="sequential", report_to="none",
                  use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, save_strategy="no",
                  dataloader_pin_memory=False, disable_tqdm=True, output_dir=tempfile.mkdtemp(),
                  model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")}, **options)
    if pairs:
        template, end, _ = FORMATS[Tokenizer.from_pretrained(args.model).format]
        prompt = lambda r: template.replace("{}", r["instruction"] + "\n" + r["input"])
        rows = [{"prompt": prompt(r), "chosen": r["chosen"] + end[0], "rejected": r["rejected"] + end[0]}
                for r in (records[i] for i in order)]
        config = DPOConfig(beta=0.01, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0], **common)
    else:
        rows = [{"input_ids": s.prompt + s.answers[0], "labels": [-100] * len(s.prompt) + s.answers[0]}
                for s in (samples[i] for i in order + order)]       # packing may need more than it was dealt
        config = SFTConfig(learning_rate=5e-5, **common)
    trainer = (Timed if pairs else SFTTrainer)(
        model=args.model, args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(args.model))
    collate = trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        mask = batch.get("attention_mask")
        seen.append(batch["input_ids"].numel() if mask is None else mask.sum().item())
        return batch

    trainer.data_collator = counting
    trainer.train()
    if options.get("precompute_ref_log_probs") and not clock["reference"]:
        raise RuntimeError("this TRL computes its reference somewhere else: time it there")
    seconds = clock["stop"] - clock["start"] + clock["reference"] * args.steps / len(batches)
    each = config.gradient_accumulation_steps
    tokens = sum(seen[args.warm * each:len(batches) * each])
    units = {"unit": "pairs", "units": args.steps * args.batch_size} if pairs else {"unit": "tokens", "units": tokens}
    return {**units, "seconds": seconds, "tokens": tokens,
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row][args.warm:],
            "flops": model_flops(config_of(args), tokens, 8 if pairs else 6)}


# ------------------------------------------------------------------ generation

def prompts_of(args):
    return [s.prompt for s in workload(SimpleNamespace(**{**vars(args), "warm": 0, "steps": 1,
                                                          "batch_size": args.prompts}))[0][:args.prompts]]


def stops_of(args):
    return Tokenizer.from_pretrained(args.model).stop


def our_generate(args, share=True, stops=False):
    device, prompts = pick_device(args.device), prompts_of(args)
    model, new = our_model(args, device, False), args.new_tokens * (2 if stops else 1)
    run = partial(generate, model, k=args.k, temperature=1.0, top_p=0.95, share=share)
    run(prompts[:2], max_new_tokens=4)
    began = time.perf_counter()
    answers = run(prompts, max_new_tokens=new, stop=stops_of(args) if stops else ())
    tokens = sum(len(ids) for samples in answers for ids in samples)
    return {"unit": "tokens", "units": tokens, "seconds": time.perf_counter() - began,
            "flops": model_flops(model.config, tokens, 2)}


@torch.inference_mode()
def hf_generate(args, groups=(PEER_ROWS,), sort=False, stops=False):
    """transformers' generate, left padded, `group` prompts a call (0: all); the best of several groups."""
    device, prompts = pick_device(args.device), prompts_of(args)
    model, ends = hf_model(args, device).eval(), stops_of(args) if stops else None
    model.generation_config.eos_token_id = ends

    def run(prompts, new):
        ids, mask = padded(prompts, 0, True), padded([[1] * len(p) for p in prompts], 0, True)
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new,
                             do_sample=True, temperature=1.0, top_p=0.95, top_k=0, pad_token_id=0,
                             num_return_sequences=args.k)[:, ids.shape[1]:].tolist()
        return sum(next((n for n, i in enumerate(row, 1) if i in (ends or ())), len(row)) for row in out)

    results, prompts = [], sorted(prompts, key=len) if sort else prompts
    run(prompts[:2], 4)
    for group in groups:
        size, began = group or len(prompts), time.perf_counter()
        tokens = sum(run(prompts[i:i + size], args.new_tokens * (2 if stops else 1))
                     for i in range(0, len(prompts), size))
        results.append({"unit": "tokens", "units": tokens, "seconds": time.perf_counter() - began, "group": size,
                        "flops": model_flops(config_of(args), tokens, 2)})
    return max(results, key=lambda result: result["units"] / result["seconds"])


# ------------------------------------------------------------------ running and showing

ITEMS = {       # name: (function, what it needs); the first word is the group, whose first item is ours
    "limits": (limits, ""),
    "sft": (partial(our_sft, share=True), ""),
    "sft unshared": (partial(our_sft, share=False), ""),
    "sft transformers": (hf_sft, "peers"),
    "sft trl": (partial(trl, pairs=False), "peers model"),
    "sft trl packed": (partial(trl, pairs=False, packing=True), "peers model"),
    "dpo": (partial(our_dpo, share=True), ""),
    "dpo unshared": (partial(our_dpo, share=False), ""),
    "dpo trl": (partial(trl, pairs=True), "peers model"),
    "dpo trl precomputed": (partial(trl, pairs=True, precompute_ref_log_probs=True), "peers model"),
    "generate": (our_generate, ""),
    "generate unshared": (partial(our_generate, share=False), ""),
    "generate transformers": (hf_generate, "peers"),
    "generate transformers sorted": (partial(hf_generate, sort=True), "peers"),
    "generate transformers at once": (partial(hf_generate, groups=(0,)), "peers"),
    "stops": (partial(our_generate, stops=True), "model"),
    "stops transformers": (partial(hf_generate, groups=(PEER_ROWS, 0), sort=True, stops=True), "peers model"),
}


def run_one(args):
    """What a child process does: one item, a JSON line."""
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = ITEMS[args.only][0](args)
        result.setdefault("peak_memory", peak_bytes(device) / 2 ** 30)
    except ModuleNotFoundError as error:
        result = {"error": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    print("\n" + json.dumps(result), flush=True)


def run_child(argv, name, seconds):
    """Run one item in a process of its own; its result, or {"error"}."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = subprocess.run([sys.executable, __file__, *argv, "--only", name], capture_output=True, text=True,
                              env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "cut off by --minutes"}
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message").splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    args = parse_arguments(argv)
    if args.only:
        return run_one(args)
    began, names, rounds = time.time(), wanted(args), []
    for number in range(args.repeat):
        rounds.append({})
        for name in names:
            left = args.minutes * 60 - (time.time() - began) if args.minutes else None
            if left is not None and left < 5:
                rounds[-1][name] = {"error": "left out for time"}
                continue
            result = rounds[-1][name] = run_child(argv, name, left)
            if "error" not in result:
                result["rate"] = result["units"] / result["seconds"]
            print(f"round {number + 1}  {name:32} {result.get('error') or result['rate']}", file=sys.stderr)
    print(json.dumps(rounds))


def wanted(args):
    have = {"peers": args.peers, "model": not args.shape}
    return [name for name, (_, needs) in ITEMS.items() if all(have[need] for need in needs.split())
            and (not args.items or name == "limits" or name in args.items or name.split()[0] in args.items)]


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "toy/model"))
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--sft", default=str(ROOT / "toy/train_wildguard.json"))
    p.add_argument("--dpo")
    p.add_argument("--peers", action="store_true")
    p.add_argument("--items", nargs="+")
    p.add_argument("--only")
    p.add_argument("--json")
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--minutes", type=float)
    p.add_argument("--warm", type=int, default=1)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--k", type=int, default=4)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--max-tokens", type=int, default=8192)
    p.add_argument("--length", type=int)
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--dtype")
    p.add_argument("--device")
    p.add_argument("--threads", type=int)
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
