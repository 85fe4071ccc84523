"""Stage 1, R-SFT: supervised fine-tuning on reasoning traces (GuardReasoner, Eq. 1).

    python train_sft.py                                          the embedded corpus, on any laptop
    python train_sft.py --model DIR --data FILE... --out DIR     yours
    torchrun --nproc_per_node 4 train_sft.py ...                 the same on four GPUs

    model folder + records  ->  OUT (a model folder), OUT/metrics.jsonl, OUT/step-000120 (to resume)

The loss of a step is the sum of -log p over all answer tokens of the batch, divided by their
number: the same for any --max-tokens and any number of GPUs. fp32 weights and AdamW state. Simpler
than the paper's LLaMA-Factory run: torch's own sharding (FSDP2) instead of ZeRO-3, nothing padded,
no dropout.

    sft_loss, lr_at, batches       the method
    main                           the run, from top to bottom
    machinery                      what train_dpo.py uses as well
"""
import argparse
import contextlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as states

from data import (INSTRUCTION, Extend, InputError, Tokenizer, at_least, deal, encode_records, hold,
                  is_there, on_terminal, pack, parse_json, parse_verdict, read_object, read_records,
                  reading, say, tell, warn, write_json, write_whole, writing)
from model import (Llama, LlamaConfig, TokenLogprobs, answer_logprobs, check_memory, config_hash,
                   fingerprint, folder_name, free_on_gpu, join_ranks, name_of, pick_dtype,
                   read_arguments, read_tensors, weights_hash)


def sft_loss(logprobs, count):
    """L = -(1/count) sum_n log p(target_n)   (GuardReasoner Eq. 1, as a mean over tokens)
    logprobs (N,) of one pack, or sums of them, and N may be 0; count: the answer tokens of the
    whole step, over all packs and ranks. -> (), to be summed over the packs."""
    return -logprobs.sum() / count


def lr_at(step, steps, peak):
    """Learning rate of a step, counted from 0 (main counts from 1): half a cosine from `peak` at
    step 0 to 0 at step `steps`, one after the last, which therefore still learns; no warm-up."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(n, size, epochs, seed):
    """Yield lists of example numbers below n, `size` of them each. An epoch has every number once,
    in an order of its own that depends on (seed, epoch) alone; its last batch may be short."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
        for start in range(0, n, size):
            yield order[start:start + size]


# ------------------------------------------------------------------ the script
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=folder_name, default="toy/model",
                   help="folder with a pretrained LLaMA")
    p.add_argument("--data", nargs="+", action=Extend, metavar="FILE",
                   help="records with instruction, input, output")
    p.add_argument("--out", type=folder_name, default="out/sft",
                   help="folder for the trained model")
    p.add_argument("--lr", type=at_least(0, float), default=5e-5, help="peak rate (paper: 5e-5)")
    p.add_argument("--epochs", type=at_least(1), default=3, help="passes over the data (paper: 3)")
    p.add_argument("--batch-size", type=at_least(1), default=384,
                   help="sequences in a step (paper: 384)")
    p.add_argument("--eval-data", nargs="+", action=Extend, metavar="FILE",
                   help="records for eval_loss, once an epoch")
    training_arguments(p)
    # without --data the demo runs: these values replace the defaults above. (read_arguments also
    # adds --seed, --limit, --dtype and others)
    return read_arguments(p, argv, lr=2e-3, epochs=2, batch_size=32, dtype="float32")


def read_examples(tokenizer, paths, max_length, limit=None):
    """The examples of these files of records, of the first `limit` of each."""
    records = []
    for path in paths:
        some = read_records(path)[:limit]
        warn_of_training(path, some)
        records += some
    examples, _ = encode_records(tokenizer, records, max_length)
    return examples


def main(argv=None):
    args = parse_arguments(argv)
    interrupts = Interrupts()
    world = join_ranks(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    examples = read_examples(tokenizer, args.data, args.max_length, args.limit)
    held_out = read_examples(tokenizer, args.eval_data or [], args.max_length)

    schedule = batches(len(examples), args.batch_size, args.epochs, args.seed)
    schedule = list(islice(schedule, args.max_steps))
    steps = len(schedule)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    identify_run(args, world, examples, schedule, held_out=held_out)      # adds hashes to args
    checkpoint = start_run(args, world)             # ends the script where all is done
    args.max_tokens = fit_memory(args, world, examples)
    model = load_for_training(args, world)
    optimizer = make_optimizer(model, args.lr)
    done = resume(checkpoint, model, optimizer) if checkpoint else 0

    world.wait()            # no rank writes into --out before all have seen that it is free
    interrupts.wait_for_step = True    # from here on a signal ends the run after a whole step
    log = Log(args, done, steps, world)
    for step in range(done + 1, steps + 1):
        batch = [examples[i] for i in schedule[step - 1]]
        count = sum(len(e.answers[0]) for e in batch)       # tokens of all answers, on all ranks
        packs = pack(batch, args.max_tokens, not args.no_share)
        packs = deal(packs, world.rank, world.ranks)
        loss = 0.0
        for p in packs:
            p = p.to(world.device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)            # (N,)
            part = sft_loss(logprobs, count)
            (part * world.ranks).backward()     # FSDP averages over the ranks, and a sum is wanted
            loss += part.detach()           # on the device: to read it would wait for the GPU
        lr = lr_at(step - 1, steps, args.lr)
        norm = update(model, optimizer, lr)

        loss = world.sum(loss)                              # over the ranks; a float from here on
        counts = token_counts(batch, packs, world)          # sums over the ranks: all must call it
        figures = dict(loss=loss, lr=lr, grad_norm=norm, **counts)
        if held_out and (step % steps_per_epoch == 0 or step == steps):
            figures["eval_loss"] = held_out_loss(model, held_out, args, world)
        log.write(step, figures)

        finish_step(args, step, steps, model, optimizer, world, interrupts)
    save_final(args, model, tokenizer, world)


def held_out_loss(model, examples, args, world):
    """sft_loss of all these examples."""
    packs = pack(examples, args.max_tokens, not args.no_share)
    logprobs = answer_logprobs(model, packs, len(examples), world)
    count = sum(len(e.answers[0]) for e in examples)
    return sft_loss(logprobs, count).item()


# ================================================================== machinery, for both trainers
def training_arguments(p):
    """The arguments that mean the same in both trainers."""
    p.add_argument("--max-length", type=at_least(1), default=2048,
                   help="tokens of a prompt with its answer (paper: 2048)")
    p.add_argument("--max-tokens", type=at_least(1),
                   help="of a pack: speed and memory only (default: 8192; CUDA: up to 32768, "
                   "from 2e9 parameters on 16384, if memory will do)")
    p.add_argument("--max-steps", type=at_least(1), help="stop here; the schedule ends here too")
    p.add_argument("--recompute", action="store_true",
                   help="activations twice: less memory, 4/3 time")
    p.add_argument("--resume", action="store_true",
                   help="continue from the last checkpoint in --out")
    p.add_argument("--save-every", type=at_least(0), default=0, metavar="N",
                   help="checkpoint every N steps")
    p.add_argument("--keep", type=at_least(1), default=2, metavar="N",
                   help="keep the newest N checkpoints")


def warn_of_training(path, records):
    """Say how many records of a file would teach a guard what it will not be asked, or what is not
    read."""
    other = sum(record["instruction"] != INSTRUCTION for record in records)
    warn(other, f"records of {path} have another instruction than eval.py's --prompt and "
                "--moderate ask with")
    silent = sum(not any(parse_verdict(record["output"]).values()) for record in records)
    warn(silent, f"records of {path} have an output in which no verdict is read: it must end in an "
                 "Answers block, with lines like 'Request: harmful'")


# ------------------------------------------------------------------ model and optimizer
def fit_memory(args, world, examples):
    """--max-tokens, or where it is not given as many as memory and device suggest. InputError if
    memory will not do, before any weight is loaded."""
    products, storage = training_dtypes(args, world)
    sizes = sorted(tokens_of(example, args.no_share) for example in examples)
    largest_batch = sum(sizes[-args.batch_size:])
    config = LlamaConfig.from_json(Path(args.model) / "config.json")
    logits = TokenLogprobs.logits_in_part(world.device)

    def need(max_tokens):
        """Bytes, if packs have at most so many tokens."""
        T = max(sizes[-1], min(max_tokens, largest_batch))              # tokens of the largest pack
        return training_bytes(config, T, products, storage, world.ranks, args.recompute, logits)

    max_tokens = args.max_tokens or default_max_tokens(parameters(config), world, need)
    check_memory(need(max_tokens), world.device,
                 "use --recompute, a lower --max-tokens, or more GPUs")
    return max_tokens


def load_for_training(args, world):
    """The model of args.model, sharded where there are more ranks."""
    if world.ranks > 1:
        check_can_shard(world.device)
    if world.rank == 0:
        check_disk(args)
    products, storage = training_dtypes(args, world)
    device = "cpu" if world.ranks > 1 else world.device
    model = Llama.from_pretrained(args.model, device, storage)
    model.compute_dtype = products
    model.recompute = args.recompute
    if world.ranks > 1:
        model = shard(model, world.device, products)
    return model


def check_can_shard(device):
    """InputError where torch cannot train on several ranks of a CPU (2.6)."""
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(f"torch {torch.__version__} cannot train on several ranks of a CPU: use "
                         "one, or the torch of requirements.txt")


def check_disk(args):
    """InputError if --out has no room for what will be written: better now than after hours. That
    is the finished model and, with --save-every, checkpoints of fp32 weights and two moments: a new
    one is written before the oldest is removed, so at most --keep + 1, and no more than are due. A
    remark where there is room for all that, but not for the checkpoint that a signal would save."""
    config = LlamaConfig.from_json(Path(args.model) / "config.json")
    weights = parameters(config)
    need = weights * getattr(torch, config.torch_dtype).itemsize
    checkpoint = weights * 3 * torch.float32.itemsize
    more = 0                                                # checkpoints that are to come
    if args.save_every:
        due = (args.steps - 1) // args.save_every           # none after the last step
        more = min(due, max(1, args.keep + 1 - len(checkpoints(args.out))))
    need += checkpoint * more
    free = shutil.disk_usage(args.out).free
    if need > free:
        raise InputError(f"{args.out}: what will be written needs {need / 2 ** 30:.1f} GiB, and "
                         f"{free / 2 ** 30:.1f} are free; make room, lower --keep, or choose "
                         "another --out")
    if not more and need + checkpoint > free:
        tell(f"{args.out}: has no room for what Ctrl-C or SIGTERM would save, "
             f"{checkpoint / 2 ** 30:.1f} GiB")


def training_dtypes(args, world):
    """(dtype of products, dtype in which weights are kept and updated: fp32 at least)."""
    products = pick_dtype(world.device, args.dtype)
    return products, torch.promote_types(products, torch.float32)


def tokens_of(example, no_share):
    """Tokens that an example brings to a pack, if its answers share its prompt or have a copy each;
    end marks are counted, too, which a pack leaves out."""
    prompts = len(example.answers) if no_share else 1
    return prompts * len(example.prompt) + sum(map(len, example.answers))


def parameters(config):
    """How many numbers the weights of such a model are."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in Llama(config).parameters())


def default_max_tokens(weights, world, need):
    """Tokens of a pack where --max-tokens says nothing, the same on all ranks: 8192, enough to keep
    a CPU busy. A GPU reads a layer's weights and launches its kernels once for a pack, so that more
    tokens are faster: 32768, or 16384 of a model of 2e9 weights or more, whose products are
    large enough then. What a layer keeps of each token for the backward pass must fit: half as many
    where need(tokens) bytes are over 90% of what is free (the rest is lost between blocks)."""
    most = 32768 if weights < 2e9 else 16384
    while world.device.type == "cuda" and most > 8192:
        free = free_on_gpu(world.device)
        if world.sum(need(most) > 0.9 * free) == 0:                     # on no rank is it too much
            return most
        most //= 2
    return 8192


def training_bytes(c, T, products, storage, ranks, recompute, logits=TokenLogprobs.LOGITS):
    """Bytes a rank holds at most, for packs of T tokens:

    storage size x (4 weights / ranks + whole + head)
    + products size x (cast + kept + passing + head) + 4e8

    The 4 are weights, gradients and AdamW's two moments; whole: of several ranks each has embedding
    and head undivided from the forward pass on (FSDP's outermost unit); head: first the head's
    gradient, then the head as it is multiplied; cast: weights cast for products; kept: what layers
    keep for the backward pass; passing: what lives briefly, a part of the logits or, in an MLP's
    backward pass, four times its F numbers a token, whichever is more; 4e8: Python and torch. A
    long run in bfloat16 on a CPU holds up to three times as much: freed memory is kept, in small
    pieces."""
    weights = parameters(c)
    D = c.hidden_size
    F = c.intermediate_size
    layers = c.num_hidden_layers
    head = c.vocab_size * D
    q_width = c.num_attention_heads * c.head_dim
    kv_width = c.num_key_value_heads * c.head_dim
    # numbers a token, of one layer: both norms' inputs and outputs; q, out; k, v; gate, up
    layer = 4 * D + 2 * q_width + 2 * kv_width + 2 * F
    kept = T * (layers * D + layer) if recompute else T * layers * layer
    passing = max(logits, 4 * T * F)
    if products == storage:
        cast = 0
    elif recompute or ranks > 1:
        cast = weights / layers                                     # one layer's at a time
    else:
        cast = weights
    embeddings = head if c.tie_word_embeddings else 2 * head
    whole = embeddings if ranks > 1 else 0
    stored = 4 * weights / ranks + whole + head
    return (storage.itemsize * stored
            + products.itemsize * (cast + kept + passing + head) + 4e8)


def shard(model, device, products):
    """Spread weights, gradients and optimizer state over all ranks (FSDP2, one unit a layer)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=products, cast_forward_inputs=False,
                                  reduce_dtype=torch.promote_types(products, torch.float32))
    for layer in model.model["layers"]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # embedding and head add up many gradients: in fp32
    return fully_shard(model.to(device), mesh=mesh)


def make_optimizer(model, lr):
    """AdamW as in the paper's run: betas 0.9 and 0.999, eps 1e-8, no weight decay."""
    fused = model.head.device.type != "mps"
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=fused)


def update(model, optimizer, lr):
    """Clip gradients to norm 1, step, clear; returns the norm before.
    InputError where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if hasattr(norm, "full_tensor"):                        # of a sharded model
        norm = norm.full_tensor()
    norm = norm.item()
    if not math.isfinite(norm):
        raise InputError(f"the gradient's norm is {norm}: lower --lr, unless the model's own "
                         "weights are broken; earlier checkpoints are not touched")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def token_counts(batch, packs, world):
    """tokens: of the sequences as each would stand alone, end marks too; computed: those in the
    packs of all ranks, where end marks are not fed; loss_tokens: those of answers."""
    sequences = [(len(e.prompt), len(ids)) for e in batch for ids in e.answers]
    computed = world.sum(sum(len(p.tokens) for p in packs))
    return dict(tokens=sum(map(sum, sequences)), computed=int(computed),
                loss_tokens=sum(answer for _, answer in sequences))


# ------------------------------------------------------------------ checkpoints
# whole tensors, not shards of them
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def finish_step(args, step, steps, model, optimizer, world, interrupts):
    """Save every --save-every steps, but not after the last one, as the model itself is written
    then; and after a signal to any rank, which ends the run on all of them."""
    stop = world.sum(interrupts.seen) > 0
    due = args.save_every > 0 and step % args.save_every == 0 and step < steps
    if stop or due:
        folder = Path(args.out) / checkpoint_name(step)
        save(folder, model, optimizer, step, world, args.keep)
    if stop:
        world.wait()                                        # torchrun kills whoever still writes
        raise InputError(f"interrupted after step {step}; the same command with --resume continues")


def checkpoint_name(step):
    """What the folder of the checkpoint after this step is called."""
    return f"step-{step:06d}"


def save(folder, model, optimizer, step, world, keep=2):
    """Write a checkpoint (fp32 weights, optimizer state, step) aside, rename it,
    keep the newest `keep`."""
    weights = states.get_model_state_dict(model, options=WHOLE)
    state = states.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if world.rank > 0:
        return                                          # torch gives whole tensors to rank 0 alone
    moments = {name: value.contiguous() for name, value in moments_of(state).items()}
    folder = Path(folder)
    temporary = Path(f"{folder}.tmp")
    remove_left(folder.parent)
    model.save_pretrained(temporary, model.head.dtype, weights)
    write_whole(temporary / "optimizer.safetensors", lambda path: save_file(moments, path))
    write_json(temporary / "state.json", {"step": step})
    with writing(folder):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    for old in checkpoints(folder.parent)[:-keep]:
        with writing(old):
            left = old.rename(f"{old}.tmp")                 # which a kill leaves to the next save
        shutil.rmtree(left, ignore_errors=True)


def save_final(args, model, tokenizer, world):
    """Write the finished model, its tokenizer and chat template to --out,
    in the base model's dtype."""
    weights = states.get_model_state_dict(model, options=WHOLE)
    if world.rank > 0:
        return
    remove_left(Path(args.out))
    tokenizer.save_pretrained(args.out)
    dtype = getattr(torch, model.config.torch_dtype)
    if any(overflows(weight, dtype) for weight in weights.values()):
        tell(f"{args.out}: weights are too large for {model.config.torch_dtype}: stored in float32")
        model.config.torch_dtype = "float32"
    model.save_pretrained(args.out, state=weights)
    say(f"wrote {args.out}")


def remove_left(out):
    """Remove what a kill leaves in a run's folder: of a checkpoint that was written or removed, and
    of safetensors' own writing."""
    for folder in out.glob("step-*.tmp"):
        if re.fullmatch(r"step-\d+\.tmp", folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    for left in out.glob(".tmp" + 6 * "[A-Za-z0-9]"):
        if left.is_file():
            left.unlink()


def overflows(weight, dtype):
    """Does a number become infinite in this dtype?"""
    return bool((weight.to(dtype).isinf() & weight.isfinite()).any())


def checkpoints(out):
    """The complete checkpoint folders of a run, oldest first; copies under other names are none."""
    folders = [p for p in Path(out).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    whole = [p for p in folders if (p / "state.json").exists()]
    return sorted(whole, key=lambda p: int(p.name.removeprefix("step-")))


def resume(folder, model, optimizer):
    """Load a checkpoint into model and optimizer, whatever number of ranks wrote it; returns its
    step. InputError where it is not whole, or another step's."""
    step = read_object(folder / "state.json").get("step")
    if type(step) is not int or folder.name != checkpoint_name(step):
        raise not_whole(folder, "state.json does not say this step")
    for name in ("model.safetensors", "optimizer.safetensors"):
        if not is_there(folder / name):
            raise not_whole(folder, f"{name} is missing")
    if hasattr(model, "reshard"):                       # FSDP: a forward pass leaves the head whole
        model.reshard()
    weights = dict(read_tensors(folder / "model.safetensors"))
    check_tensors(folder, weights, dict(model.named_parameters()))
    states.set_model_state_dict(model, weights, options=WHOLE)
    # the optimizer makes its moments in the first call;
    # they are then filled, so there is one copy only
    moments = moments_of(states.get_optimizer_state_dict(model, optimizer))
    for name, tensor in read_tensors(folder / "optimizer.safetensors"):
        into = moments.pop(name, None)
        check_tensors(folder, {name: tensor}, {name: into})
        if hasattr(into, "device_mesh"):
            tensor = dist.tensor.distribute_tensor(tensor.to(into.device), into.device_mesh,
                                                   into.placements)
        into.copy_(tensor)
    check_tensors(folder, {}, moments)                  # what is left of these is missing there
    return step


def moments_of(state):
    """{"parameter:key": tensor} of an optimizer's state."""
    return {f"{parameter}:{key}": value
            for parameter, values in state["state"].items()
            for key, value in values.items()}


def check_tensors(folder, tensors, wanted):
    """InputError unless these tensors of a checkpoint have names, shapes and dtypes of `wanted`."""
    for name in sorted(tensors.keys() | wanted.keys()):
        tensor = tensors.get(name)
        want = wanted.get(name)
        if tensor is None or want is None:
            raise not_whole(folder, f"{name} is {'missing' if tensor is None else 'unknown'}")
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            raise not_whole(folder, f"{name} has another shape or dtype")


def not_whole(folder, why):
    """The InputError for a checkpoint that cannot be gone on from."""
    return InputError(f"{folder}: {why}; remove this folder to go on from the checkpoint before it")


# ------------------------------------------------------------------ a run and its log
def identify_run(args, world, examples, schedule, alphas=(), held_out=()):
    """Add to args what makes a run this one beside its arguments, for the log and for start_run,
    which compares it when a run is resumed: examples and steps, how many there are; data_hash, of
    all ids and of the pairs' alphas; eval_hash, of the held-out ids; schedule_hash, of the batches
    and learning rates; config_hash and weights_hash, of the base model; dtype, as other hardware
    would choose another."""
    steps = len(schedule)
    rates = [f"{lr_at(step, steps, args.lr):.6g}" for step in range(steps)]
    args.examples = len(examples)
    args.steps = steps
    args.data_hash = fingerprint([*all_ids(examples), alphas])
    args.eval_hash = fingerprint(all_ids(held_out))
    args.schedule_hash = fingerprint([*schedule, rates])
    args.config_hash = config_hash(args.model)
    args.weights_hash = weights_hash(args.model)
    args.dtype = name_of(pick_dtype(world.device, args.dtype))


def all_ids(examples):
    """The ids of every prompt and answer."""
    return [ids for e in examples for ids in (e.prompt, *e.answers)]


def start_run(args, world):
    """Take the folder args.out; return the checkpoint to go on from, or None. InputError where that
    would mix two runs, at once or one after another. A run that is finished ends the script."""
    if world.rank == 0:
        hold(args.out)
    out = Path(args.out)
    log = out / "metrics.jsonl"
    found = checkpoints(out)
    holds = f"{args.out}: already holds a run or a model;"
    if not log.exists():
        if found or any((out / name).exists() for name in OF_MODELS):
            raise InputError(f"{holds} choose another --out")
        return None
    if not args.resume:
        raise InputError(f"{holds} add --resume, or choose another --out")
    with reading(log), open(log, "rb") as file:             # bytes: a kill may have cut a later
        first_line = file.readline().decode("utf-8-sig")
    before = parse_json(log, first_line or "null")
    if not isinstance(before, dict) or not {"model", "data", "seed"} <= before.keys():
        raise InputError(f"{log}: does not begin with a run's settings; choose another --out")
    check_same_run(args, before)
    if (out / "config.json").exists():                      # written last, see save_final
        say(f"{args.out}: this run is finished")
        sys.exit()
    return found[-1] if found else None


# the files of a model folder: with one of them an --out is somebody's
OF_MODELS = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
             "tokenizer.model", "tokenizer_config.json", "generation_config.json",
             "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
OLD_NAMES = {"examples": "samples", "schedule_hash": "schedule"}
HASHED = {"data_hash": "records and tokenizer",         # hash -> what it is of
          "eval_hash": "--eval-data",
          "config_hash": "--model's config.json",
          "weights_hash": "--model's weights",
          "schedule_hash": "batches and learning rates"}
# what may be another when a run goes on: where it runs, and how fast; what is kept on the way; how
# a file is called of which the ids are compared. All other arguments are the run's own
MAY_DIFFER = {"out", "resume", "save_every", "keep", "eval_data",
              "max_tokens", "recompute", "no_share", "kernels", "device"}


def check_same_run(args, before):
    """InputError where a setting, or what was read, is not that with which the run began.
    before: the first line of its log; an older one has fewer of these, or other names."""
    for name, now in vars(args).items():
        if name in MAY_DIFFER:
            continue
        now = json.loads(json.dumps(now, default=str))      # as the log has it
        was = before.get(name, before.get(OLD_NAMES.get(name), now))
        if was != now:
            what = f"{name} (of {HASHED[name]})" if name in HASHED else name
            raise InputError(f"{args.out}: its run has {what} = {was!r}, not {now!r}; "
                             "give the same again, or choose another --out")


class Interrupts:
    """Notices SIGTERM, Ctrl-C and a terminal that is closed. Before the first step they end the run
    at once; then it ends after a whole step, which is saved. Another Ctrl-C ends it at once;
    another of the others does nothing, as torchrun passes on what a rank may have had already."""

    def __init__(self):
        self.seen = 0
        self.wait_for_step = False
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # as under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.notice)

    def notice(self, number, frame):
        if not self.wait_for_step:
            raise InputError("interrupted before the first step: nothing is lost, "
                             "and the same command begins again")
        self.seen += 1
        again = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
        signal.signal(number, again)


class Log:
    """metrics.jsonl (first line: arguments and versions; then one object a step) and the console
    line; written by rank 0."""

    def __init__(self, args, done, steps, world):
        self.path = Path(args.out) / "metrics.jsonl"
        self.done = done
        self.steps = steps
        self.world = world
        self.started = time.time()
        self.last = self.started
        if world.rank == 0:
            self.begin(args)

    def begin(self, args):
        """Write the first line anew, and keep the lines of steps that the checkpoint has."""
        header = {**vars(args), **versions(), "device": self.world.device,
                  "ranks": self.world.ranks, "git": git_commit()}
        lines = [json.dumps(header, default=str)]
        if self.done:
            lines += self.lines_to_keep()
        text = "".join(line + "\n" for line in lines)
        write_whole(self.path, lambda path: path.write_text(text))

    def lines_to_keep(self):
        """The lines of the steps that the checkpoint has, of a log that a kill may have cut."""
        kept = []
        for line in self.path.read_text(errors="replace").splitlines()[1:]:
            try:
                step = json.loads(line)["step"]
            except (ValueError, LookupError, TypeError):
                continue
            if type(step) is int and step <= self.done:
                kept.append(line)
        return kept

    def write(self, step, figures):
        """Add one step; figures: loss, lr, grad_norm, tokens and what else the stage counts."""
        if self.world.rank > 0:
            return
        now = time.time()
        seconds = now - self.last
        self.last = now
        figures = {"step": step, **figures, "seconds": seconds,
                   "tokens_per_second": figures["tokens"] / seconds,
                   "peak_memory": peak_memory(self.world.device) / 2 ** 30}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(figures) + "\n")
        kept = step in (1, self.steps) or step % 10 == 0 or "eval_loss" in figures
        if kept or on_terminal():
            say(self.console_line(step, figures), end="\n" if kept else "\r")

    def console_line(self, step, figures):
        """The figures of one step to look at while a run goes on."""
        seconds_a_step = (self.last - self.started) / (step - self.done)
        left = seconds_a_step * (self.steps - step) / 60
        accuracy = f"  accuracy {figures['accuracy']:.2f}" if "accuracy" in figures else ""
        eval_loss = f"  eval {figures['eval_loss']:.4f}" if "eval_loss" in figures else ""
        return (f"step {step:5}/{self.steps}  loss {figures['loss']:.4f}{accuracy}{eval_loss}  "
                f"lr {figures['lr']:.1e}  grad {figures['grad_norm']:6.2f}  "
                f"{figures['tokens_per_second']:8,.0f} tokens/s  "
                f"{figures['peak_memory']:.1f} GiB  {left:.1f} min left ")


def versions():
    """Of Python and of each package that a run may use, where it is there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "tiktoken", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit():
    """The commit of this code, or None where there is no git or no repository."""
    done = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                          capture_output=True, text=True)
    return done.stdout.strip() or None


def peak_memory(device):
    """The most bytes held so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
