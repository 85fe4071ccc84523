"""Stage 1, R-SFT: supervised fine-tuning on reasoning traces (GuardReasoner, Eq. 1).

    python train_sft.py                                          the embedded corpus, on any laptop
    python train_sft.py --model DIR --data FILE... --out DIR     yours
    torchrun --nproc_per_node 4 train_sft.py ...                 the same on four GPUs

    model folder + records  ->  OUT (a model folder), OUT/metrics.jsonl, OUT/step-000120 (to resume)

The loss of a step is the sum of -log p over all answer tokens of the batch, divided by their number:
the same for any --max-tokens and any number of GPUs. fp32 weights and AdamW state. Simpler than the
paper's LLaMA-Factory run: torch's own sharding (FSDP2) instead of ZeRO-3, nothing padded, no dropout.
"""
import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as states

from data import (Tokenizer, answer_logprobs, deal, encode_records, pack, parse_records, read_arguments,
                  read_records)
from model import (InputError, Llama, LlamaConfig, TokenLogprobs, all_sum, at_least, check_memory, join_ranks,
                   pick_dtype, read_json, read_tensors, weight_files, write_json, write_whole, writing)

FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)      # whole tensors, not shards

def sft_loss(logprobs, count):
    """L = -(1/count) sum_n log p(target_n)   (GuardReasoner Eq. 1, as a mean over tokens)
    logprobs (N,) of one pack; count: the answer tokens of the whole step, over all packs and ranks."""
    return -logprobs.sum() / count

def lr_at(step, steps, peak):
    """Learning rate of step 0, 1, ... of `steps`: half a cosine from `peak` to 0, no warm-up."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))

def batches(n, size, epochs, seed):
    """Yield lists of sample numbers; the order depends on (seed, epoch) alone. The last may be short."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
        for i in range(0, n, size):
            yield order[i:i + size]

# ---- plumbing shared with train_dpo.py: nothing about SFT from here to the next line of this kind ----
def common_arguments(p):
    """The arguments that mean the same in both trainers."""
    p.add_argument("--max-length", type=at_least(1), default=2048, help="tokens of a sequence (paper: 2048)")
    p.add_argument("--max-tokens", type=at_least(1), default=8192, help="of a pack: speed and memory only")
    p.add_argument("--max-steps", type=at_least(1), help="stop here; the schedule ends here too")
    p.add_argument("--recompute", action="store_true", help="activations twice: less memory, 4/3 time")
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    p.add_argument("--save-every", type=at_least(0), default=0, metavar="N", help="checkpoint every N steps")
    p.add_argument("--keep", type=at_least(1), default=2, metavar="N", help="keep the newest N checkpoints")

def training_bytes(c, T, products, storage, ranks, recompute):
    """Bytes a rank holds at most, for packs of T tokens. In dtype `storage`: weights, gradients, AdamW's two
    moments, the head's gradient. In dtype `products`: weights cast for products, what layers keep for the
    backward pass. 0.4 GB for Python and torch. A long run on a CPU may add half: freed memory is kept."""
    with torch.device("meta"):
        N = sum(weight.numel() for weight in Llama(c).parameters())
    D, F, V, L = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 4 * D + 2 * q + 2 * k + 2 * F               # numbers a token: norms, attention, SwiGLU
    kept = T * (L * D + layer if recompute else L * layer) + TokenLogprobs.LOGITS + V * D
    cast = 0 if products == storage else N / L if recompute or ranks > 1 else N      # one layer's, or all
    return storage.itemsize * (4 * N / ranks + V * D) + products.itemsize * (cast + kept) + 4e8

def load(args, rank_info, samples):
    """The model of args.model for training: fp32 weights, sharded where there are more ranks.
    InputError before any weight is read if memory will not do."""
    (device, _, ranks), products = rank_info, pick_dtype(rank_info[0], args.dtype)
    storage = torch.promote_types(products, torch.float32)
    sizes = sorted(len(s.prompt) + sum(map(len, s.answers)) for s in samples)
    T = max(sizes[-1], min(args.max_tokens, sum(sizes[-args.batch_size:])))     # tokens of the largest pack
    config = LlamaConfig.from_json(Path(args.model) / "config.json")
    check_memory(training_bytes(config, T, products, storage, ranks, args.recompute), device,
                 "use --recompute, a lower --max-tokens, or more GPUs")
    model = Llama.from_pretrained(args.model, "cpu" if ranks > 1 else device, storage)
    model.compute_dtype, model.recompute = products, args.recompute
    return shard(model, device, products) if ranks > 1 else model

def shard(model, device, products):
    """Spread weights, gradients and optimizer state over all ranks (FSDP2, one unit a layer)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=products, cast_forward_inputs=False,
                                  reduce_dtype=torch.promote_types(products, torch.float32))
    for layer in model.model["layers"]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model.to(device), mesh=mesh)      # embedding and head add up many gradients: in fp32

def make_optimizer(model, lr):
    """AdamW as in the paper's run: betas 0.9 and 0.999, eps 1e-8, no weight decay."""
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=model.head.device.type != "mps")

def update(model, optimizer, lr):
    """Clip gradients to norm 1, step, clear; returns the norm before. InputError where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise InputError(f"the gradient's norm is {norm}: lower --lr; earlier checkpoints are not touched")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

def save(folder, model, optimizer, step, rank, keep=2):
    """Write a checkpoint (fp32 weights, optimizer state, step) aside, rename it, keep the newest `keep`."""
    weights = states.get_model_state_dict(model, options=FULL)
    moments = states.get_optimizer_state_dict(model, optimizer, options=FULL).get("state", {})
    if rank == 0:
        folder, temporary = Path(folder), Path(f"{folder}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        moments = {f"{name}:{key}": value.contiguous() for name, values in moments.items()
                   for key, value in values.items()}
        model.save_pretrained(temporary, model.head.dtype, weights)
        write_whole(temporary / "optimizer.safetensors", lambda path: save_file(moments, path))
        write_json(temporary / "state.json", {"step": step})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

def save_final(args, model, tokenizer, rank):
    """Write the finished model, its tokenizer and chat template to --out, in the base model's dtype."""
    weights = states.get_model_state_dict(model, options=FULL)
    if rank == 0:
        for left in Path(args.out).glob(".tmp*"):            # what a kill leaves when safetensors writes
            left.unlink()
        tokenizer.save_pretrained(args.out)
        model.save_pretrained(args.out, state=weights)
        print(f"wrote {args.out}")

def checkpoints(out):
    """The complete checkpoint folders of a run, oldest first."""
    return sorted(p for p in Path(out).glob("step-*") if p.suffix != ".tmp" and (p / "state.json").exists())

def resume(folder, model, optimizer):
    """Load a checkpoint into model and optimizer, whatever number of ranks wrote it; returns its step."""
    if hasattr(model, "reshard"):                       # FSDP: a forward pass leaves the head whole
        model.reshard()
    weights = (pair for path in weight_files(folder) for pair in read_tensors(path))
    states.set_model_state_dict(model, dict(weights), options=FULL)     # which puts its own copies in there
    state = states.get_optimizer_state_dict(model, optimizer)["state"]      # the optimizer's own tensors,
    for name, tensor in read_tensors(folder / "optimizer.safetensors"):     # so that there is only one copy
        parameter, key = name.rsplit(":", 1)
        if hasattr(into := state[parameter][key], "device_mesh"):
            tensor = dist.tensor.distribute_tensor(tensor.to(into.device), into.device_mesh, into.placements)
        into.copy_(tensor)
    return read_json(folder / "state.json")["step"]

class Log:
    """metrics.jsonl (first line: arguments and versions; then one object a step) and the console line."""
    def __init__(self, args, step, steps):
        self.path, self.first, self.steps = Path(args.out) / "metrics.jsonl", step, steps
        self.started = self.tick = time.time()
        commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()           # none: no output
        old = self.path.read_text().splitlines()[1:] if step and self.path.exists() else []
        lines = [json.dumps({**vars(args), "torch": torch.__version__, "git": commit or None}, default=str)]
        lines += [line for line in old if line.endswith("}") and json.loads(line)["step"] <= step]
        write_whole(self.path, lambda path: path.write_text("".join(line + "\n" for line in lines)))

    def __call__(self, device, step, **row):
        """Write one step; row has loss, lr, grad_norm, tokens and what else the stage counts."""
        now, unit = time.time(), 1 if sys.platform == "darwin" else 1024
        seconds, self.tick = now - self.tick, now
        memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        row.update(seconds=seconds, tokens_per_second=row["tokens"] / seconds, peak_memory=memory / 2 ** 30)
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        keep = step in (1, self.steps) or step % 10 == 0 or "eval_loss" in row
        if keep or sys.stdout.isatty():
            extra = f"  accuracy {row['accuracy']:.2f}" if "accuracy" in row else ""
            extra += f"  eval {row['eval_loss']:.4f}" if "eval_loss" in row else ""
            left = (now - self.started) / (step - self.first) * (self.steps - step)
            print(f"step {step:5}/{self.steps}  loss {row['loss']:.4f}{extra}  lr {row['lr']:.1e}  "
                  f"grad {row['grad_norm']:6.2f}  {row['tokens_per_second']:8,.0f} tokens/s  "
                  f"{row['peak_memory']:.1f} GiB  {left / 60:.1f} min left ",
                  end="\n" if keep else "\r", flush=True)

def start_run(args, samples):
    """Refuse to mix two runs in a folder; return the checkpoint to go on from, or None; set args.samples."""
    log, final, args.samples = Path(args.out) / "metrics.jsonl", Path(args.out) / "config.json", len(samples)
    if log.exists() and not args.resume or final.exists() and not log.exists():
        raise InputError(f"{args.out}: already holds a run or a model; add --resume, or choose another --out")
    checkpoint = checkpoints(args.out)[-1:] if args.resume else []
    old = next(parse_records(log))[1] if log.exists() else vars(args)
    same = "model data samples limit batch_size max_length epochs max_steps seed format dtype lr"
    for name in [*same.split(), "beta", "sft", "weights"]:   # (the last three are DPO's)
        if (was := old.get(name)) != (now := getattr(args, name, None)):
            raise InputError(f"{args.out}: its run has {name} = {was!r}, not {now!r}; choose another --out")
    if final.exists():
        print(f"{args.out}: this run is finished")
        sys.exit()
    return checkpoint[0] if checkpoint else None

def run_steps(args, n, model, tokenizer, optimizer, checkpoint, rank_info):
    """Yield (step, steps, sample numbers, log) of each step left; save, if due, when main's loop is back for
    more, and the model at the end. SIGTERM or Ctrl-C, to any rank: save after this step, end. Another Ctrl-C:
    end now; another SIGTERM: nothing, as torchrun passes on what a rank may have."""
    def notice(number, frame):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    (device, rank, _), interrupted = rank_info, []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, notice)
    plan = list(batches(n, args.batch_size, args.epochs, args.seed))[:args.max_steps]
    done, steps = resume(checkpoint, model, optimizer) if checkpoint else 0, len(plan)
    all_sum(0, device)                                       # a barrier: all have seen that --out is free
    log = Log(args, done, steps) if rank == 0 else lambda device, **row: None
    for step, batch in enumerate(plan[done:], done + 1):
        yield step, steps, batch, log
        stop = all_sum(len(interrupted), device) > 0
        if stop or (args.save_every and step % args.save_every == 0 and step < steps):
            save(Path(args.out) / f"step-{step:06d}", model, optimizer, step, rank, args.keep)
        if stop:
            all_sum(0, device)                               # a barrier: torchrun kills whoever still writes
            raise InputError(f"interrupted after step {step}; the same command with --resume continues")
    save_final(args, model, tokenizer, rank)

# ---- end of the plumbing ----
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="toy/model", help="folder with a pretrained LLaMA")
    p.add_argument("--data", nargs="+", metavar="FILE", help="records with instruction, input, output")
    p.add_argument("--out", default="out/sft", help="folder for the trained model")
    p.add_argument("--lr", type=at_least(0, float), default=5e-5, help="peak learning rate (paper: 5e-5)")
    p.add_argument("--epochs", type=at_least(1), default=3, help="passes over the data (paper: 3)")
    p.add_argument("--batch-size", type=at_least(1), default=384, help="sequences in a step (paper: 384)")
    p.add_argument("--eval-data", nargs="+", metavar="FILE", help="records for eval_loss, once an epoch")
    common_arguments(p)
    return read_arguments(p, argv, lr=2e-3, epochs=2, batch_size=32, dtype="float32")

def main(argv=None):
    args = parse_arguments(argv)
    rank_info = device, rank, ranks = join_ranks(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    records = sum(map(read_records, args.data), [])[:args.limit]
    samples, _ = encode_records(tokenizer, records, args.max_length)
    held_out, _ = encode_records(tokenizer, sum(map(read_records, args.eval_data or []), []), args.max_length)
    checkpoint = start_run(args, samples)
    model = load(args, rank_info, samples)
    optimizer, epoch = make_optimizer(model, args.lr), math.ceil(len(samples) / args.batch_size)
    run = run_steps(args, len(samples), model, tokenizer, optimizer, checkpoint, rank_info)
    for step, steps, batch, log in run:
        lr, drawn = lr_at(step - 1, steps, args.lr), [samples[i] for i in batch]
        count, loss = sum(len(s.answers[0]) for s in drawn), 0.0
        packs = deal(pack(drawn, args.max_tokens, not args.no_share), rank, ranks)
        for p in packs:
            p = p.to(device)
            part = sft_loss(model(p.tokens, p.end, p.rows, p.targets), count)
            (part * ranks).backward()                        # FSDP averages gradients over the ranks
            loss += part.detach()                            # read once, after the last pack
        norm = update(model, optimizer, lr)
        row = dict(step=step, loss=all_sum(float(loss), device), lr=lr, grad_norm=norm,
                   tokens=sum(len(s.prompt) + len(s.answers[0]) for s in drawn),
                   computed=int(all_sum(sum(len(p.tokens) for p in packs), device)), loss_tokens=count)
        if held_out and (step % epoch == 0 or step == steps):
            total = answer_logprobs(model, pack(held_out, args.max_tokens), len(held_out), rank_info).sum()
            row["eval_loss"] = sft_loss(total, sum(len(s.answers[0]) for s in held_out)).item()
        log(device, **row)

if __name__ == "__main__":
    main()
