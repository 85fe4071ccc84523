"""The first nine minutes on a GPU: is all right there, how fast is it, what does each change buy?

    python tools/first_gpu.py --out out/gpu                     all stages, 540 seconds at most
    python tools/first_gpu.py --out out/gpu                     again: what failed or was left out
    python tools/first_gpu.py --out out/gpu --stages bench      these, done before or not

A stage is a process with a time limit of its own. What it prints goes to OUT/STAGE.log, what it
found to OUT/STAGE.json, and its line is printed again at the end. A stage that fails never stops
the next; the exit status is 1 then. Where a kernel is wrong, the later stages run with --kernels
torch, the plain twins.

Without CUDA each stage runs in a small form: kernels by Triton's interpreter where a stage tests
them, else the plain twins. That rehearses this file, it measures nothing.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import bench as bench_tool  # noqa: E402
import eval as evaluation  # noqa: E402
import measure  # noqa: E402
import mine_hard  # noqa: E402
import model as library  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from data import (Extend, at_least, common_prefix, pack, read_records, say, tell,  # noqa: E402
                  write_json)
from model import (Engine, Job, Sampling, folder_name, generate, join_results,  # noqa: E402
                   plan_capacity)
from train_sft import sft_loss, shard  # noqa: E402


# ------------------------------------------------------------------ what stages share
def make_bench(args, *more):
    """A Bench (see measure.py): of Llama 1B on CUDA, of a toy shape elsewhere."""
    small = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--prompts", "2",
             "--length", "200"]
    options = ["--shape", "1b"] if args.cuda else small
    return measure.Bench(bench_tool.parse_arguments([*options, "--kernels", args.kernels, *more]))


def shallow_model(b, layers, dtype):
    """Random weights of the Bench's shape, but with so many layers."""
    config = replace(b.config, num_hidden_layers=layers)
    return measure.random_model(config, b.device, dtype)


def one_pack(b, tokens):
    """A pack of so many tokens at most, on the device; without CUDA of 70."""
    if b.cuda:
        examples, _ = b.examples(tokens // 256)
    else:
        examples = measure.random_examples(2, 1, b.config.vocab_size, length=40, root=10)
    return pack(examples, tokens)[0].to(b.device)


def train(model, p):
    """Forward and backward pass of a pack; its loss."""
    logprobs = model(p.tokens, p.end, p.rows, p.targets)
    loss = sft_loss(logprobs, len(p.rows))
    loss.backward()
    return loss.detach()


def held(b):
    """Bytes that this process holds now: of the GPU's memory, else the most it ever held."""
    if b.cuda:
        return torch.cuda.memory_reserved(b.device)
    return b.peak()


def start_engine(model, prompts, k, new_tokens):
    """An Engine that has read these prompts and can draw new_tokens of k answers to each."""
    sampling = Sampling(new_tokens, temperature=1, top_p=0.95, stop=[], seed=0)
    root = prompts[0][:common_prefix(prompts)]
    jobs = [Job(number, ids, list(range(k))) for number, ids in enumerate(prompts)]
    capacity = plan_capacity(model, jobs, len(root), new_tokens, None, len(prompts) * k)
    engine = Engine(model, root, sampling, capacity)
    engine.admit(jobs[::-1])
    return engine


# ------------------------------------------------------------------ the stages
# Each takes the arguments and returns (its line, its figures); it fails by an exception.
def limits(args):
    """Versions, and what the device can do at most."""
    found = measure.limits(make_bench(args))
    product = found["flops"] / found["seconds"]
    names = ["torch", "triton", "numpy"]
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()
                if d.metadata["Name"] in names}
    if args.cuda:
        subprocess.run("nvidia-smi", check=False)
    line = (f"{found['device']}: {product / 1e12:.3g} TFLOP/s, {found['copy'] / 1e12:.3g} TB/s, "
            f"torch {versions['torch']}, triton {versions.get('triton')}")
    return line, {**found, "product": product, "versions": versions}


class Collected:
    """Tells pytest to note the names of the tests that it finds."""

    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


def kernels(args):
    """The tests of all kernels, dealt to processes."""
    tests = str(ROOT / "tests/test_kernels.py")
    for log in Path(args.out).glob("kernels_*.log"):        # of an earlier call; is_wrong reads
        log.unlink()
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    collected = Collected()
    pytest.main([*options, "--collect-only", tests], plugins=[collected])
    names = collected.names
    processes = min(16, os.cpu_count())
    if not args.cuda:                                       # tests/ has them all
        names = names[:2]
        processes = 1
    running = []
    for n in range(processes):
        log = Path(args.out) / f"kernels_{n}.log"
        process = subprocess.Popen([sys.executable, "-m", "pytest", *options, *names[n::processes]],
                                   cwd=ROOT, stdout=open(log, "w"), stderr=subprocess.STDOUT)
        running.append((process, log))
    passed = 0
    for process, log in running:
        process.wait()
        text = log.read_text()
        say(text)
        passed += sum(map(int, re.findall(r"(\d+) passed", text)))
    assert passed == len(names), f"{passed} of {len(names)} kernel tests passed"
    return f"{passed} kernel tests passed", {"passed": passed}


def graph(args):
    """Are recorded steps plain steps, and does memory stay as it is from look to look?"""
    b = make_bench(args)
    model = shallow_model(b, 2, b.products)
    prompts = b.prompts()
    looks, poll = (20, 32) if args.cuda else (2, 4)
    memory = []                                             # of each run with recorded steps
    record = Engine.record
    finish = Engine.finish

    def finish_and_note(engine):
        memory[-1].append(held(b))
        return finish(engine)

    same = {}
    for temperature in (0, 1):
        run = partial(generate, model, prompts, k=4, max_new_tokens=looks * poll,
                      temperature=temperature)
        Engine.record = lambda engine, step: step
        plain = run()
        Engine.record = record
        Engine.finish = finish_and_note
        memory.append([])
        recorded = run()
        Engine.finish = finish
        equal = [a == b for a, b in zip(sum(plain, []), sum(recorded, []))]
        same[temperature] = sum(equal) / len(equal)
    first, second = memory                                  # answers, and so results, grow alike
    growth = max(second) / max(first) - 1
    line = (f"recorded answers equal plain ones: {same[0]:.0%} at temperature 0, "
            f"{same[1]:.0%} at 1; memory of a second run {growth:+.1%}, {len(first)} looks each")
    assert min(same.values()) == 1 and growth < 0.02, line
    return line, {"same": same, "memory": memory}


def pages(args):
    """Are answers the same where pages move as where they stay? Jobs wait for room meanwhile, and
    some are put back; the batches are the same in both runs, as in bfloat16 their sizes matter."""
    b = make_bench(args, *([] if args.cuda else ["--prompts", "6"]))
    model = shallow_model(b, 2, b.products)
    prompts = b.prompts()
    most, ends = (512, 128) if args.cuda else (96, 96)
    stop = list(range(b.config.vocab_size // ends))         # an answer ends after `ends` tokens
    longest = max(map(len, prompts)) + 4 * (most + 64)      # keys that one job can need
    answer = partial(generate, model, prompts, k=4, max_new_tokens=most, stop=stop,
                     kv_tokens=(8 if args.cuda else 1) * longest)
    compact, reserve, move = Engine.compact, Engine.reserve, library.PagePool.move
    seen = {"moved": 0, "put back": 0}

    def move_and_count(pool, moved):
        seen["moved"] += len(moved)
        move(pool, moved)

    def reserve_and_count(engine):
        jobs = reserve(engine)
        seen["put back"] += len(jobs)
        return jobs

    Engine.compact = lambda engine: None
    stayed = answer()
    Engine.compact, Engine.reserve = compact, reserve_and_count
    library.PagePool.move = move_and_count
    moved = answer()
    Engine.reserve = reserve
    library.PagePool.move = move
    equal = [a == b for a, b in zip(sum(stayed, []), sum(moved, []))]
    same = sum(equal) / len(equal)
    line = f"{same:.0%} of answers are the same; " + ", ".join(
        f"{count} {'pages' if what == 'moved' else 'jobs'} {what}" for what, count in seen.items())
    assert same == 1 and all(seen.values()), line
    return line, {"same": same, **seen}


def step(args):
    """A step of training by kernels and by twins, beside one in a wider dtype; and through FSDP."""
    b = make_bench(args)
    wide = torch.float32 if args.cuda else torch.float64
    model = shallow_model(b, 4 if args.cuda else 1, torch.float32)
    p = one_pack(b, 2048)

    def gradients(dtype, kernels):
        library.choose_kernels(kernels)
        model.to(torch.promote_types(dtype, torch.float32))
        model.compute_dtype = dtype
        loss = train(model, p)
        found = {name: weight.grad.double() for name, weight in model.named_parameters()}
        model.zero_grad()
        return loss.item(), found

    def error(found):
        """The largest distance of a weight's gradient from the wide one, relative to that."""
        parts = [(found[name] - want).norm() / want.norm() for name, want in exact.items()]
        return max(parts).item()

    _, exact = gradients(wide, "torch")
    twin_loss, by_twins = gradients(b.products, "torch")
    twins = error(by_twins)
    loss, by_kernels = gradients(b.products, args.kernels)
    ours = error(by_kernels)
    sharded = sharded_loss(args, b, model, p)
    line = (f"gradients off by {ours:.2g} (kernels), {twins:.2g} (twins); "
            f"loss {loss:.6f}, {twin_loss:.6f}, {sharded:.6f} by FSDP")
    assert ours < 2 * twins + 1e-5, line
    assert abs(loss - twin_loss) < 0.01 and abs(loss - sharded) < 0.01, line
    return line, {"kernels": ours, "twins": twins, "losses": [loss, twin_loss, sharded]}


def sharded_loss(args, b, model, p):
    """The same loss by train_sft.shard, on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if args.cuda else "gloo", rank=0, world_size=1,
            init_method=f"file://{folder}/ranks")
        model.compute_dtype = b.products
        model = shard(model, b.device, b.products)
        loss = train(model, p).item()
        torch.distributed.destroy_process_group()
    return loss


def scripts(args):
    """All four scripts on the toy corpus: do they run, and does a trainer that was stopped go on as
    it would have?"""
    same = ["--kernels", args.kernels, "--seed", "1", *([] if args.cuda else ["--device", "cpu"])]
    file = ROOT / "toy/train_aegis.json"
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        sft, hard, pairs, dpo, answers = (f"{folder}/{name}" for name in
                                          ("sft", "hard", "pairs.json", "dpo", "answers"))
        few = ["--max-steps", "3", "--batch-size", "8", "--save-every", "1", *same]
        command = ["--model", str(ROOT / "toy/model"), "--data", str(file),
                   "--eval-data", str(file), "--limit", "32", "--out", sft, *few]
        train_sft.main(command)
        whole = steps_of(sft)
        for name in ("config.json", "model.safetensors"):   # as if it had been killed in step 2
            os.unlink(f"{sft}/{name}")
        shutil.rmtree(f"{sft}/step-000002")
        train_sft.main([*command, "--resume"])
        resumed = steps_of(sft)
        mine_hard.main(["--model", sft, "--data", str(file), "--limit", "8", "--k", "2",
                        "--max-new-tokens", "16", "--out", hard, *same])
        records = read_records(file)[:16]                   # what is mined after two steps is empty
        write_json(pairs, [{**record, "chosen": record["output"], "rejected": other["output"]}
                           for record, other in zip(records, records[1:] + records[:1])])
        train_dpo.main(["--model", sft, "--data", pairs, "--out", dpo, *few])
        evaluation.main(["--model", dpo, "--data", str(ROOT / "toy/test.json"), "--limit", "8",
                         "--scores", "--max-new-tokens", "16", "--out", answers, *same])
        evaluation.main(["--model", dpo, "--prompt", "Hello?", "--max-new-tokens", "16", *same])
        preferred = steps_of(dpo)
    losses = {name: [step["loss"] for step in steps]
              for name, steps in (("sft", whole), ("resumed", resumed), ("dpo", preferred))}
    assert all(len(some) == 3 and all(map(math.isfinite, some)) for some in losses.values())
    assert resumed[0] == whole[0], "it began anew"          # `seconds` is never the same twice
    apart = abs(resumed[2]["loss"] / whole[2]["loss"] - 1)  # after a step with AdamW's moments
    assert apart < 0.01, f"step 3: {whole[2]['loss']}, and again {resumed[2]['loss']}"
    line = f"all four ran in {time.time() - began:.0f} s; a step done again is {apart:.1e} apart"
    return line, losses


def steps_of(folder):
    """What a trainer's log has of each step."""
    _, *steps = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(step) for step in steps]


def profile(args):
    """Where a training pack's and a decoding step's time goes: the 25 longest kernels of each."""
    b = make_bench(args)
    layers = b.config.num_hidden_layers
    model = shallow_model(b, layers, torch.float32)
    model.compute_dtype = b.products
    p = one_pack(b, 8192)
    training = time_kernels(b, "a pack", partial(train, model, p))
    model.to(b.products)
    for weight in model.parameters():
        weight.grad = None
    with torch.inference_mode():
        prompts = b.prompts()
        engine = start_engine(model, prompts, 4, 64)        # of which three calls draw 28
        engine.capacity.poll = 9                            # one step plain, eight replayed
        decoding = time_kernels(b, "a decoding step and 8 replays", engine.decode)
    line = (f"busy: {training['busy']:.0%} of a pack's {training['seconds']:.3g} s, "
            f"{decoding['busy']:.0%} of 9 steps' {decoding['seconds']:.3g} s "
            f"with {len(prompts) * 4} rows")
    return line, {"training": training, "decoding": decoding}


def time_kernels(b, name, call):
    """The second of two calls by torch's profiler; prints its table."""
    call()
    b.now()
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if b.cuda else [activity.CPU]
    by = "self_cuda_time_total" if b.cuda else "self_cpu_time_total"
    began = b.now()
    call()
    seconds = b.now() - began                               # without the profiler
    with torch.profiler.profile(activities=kinds) as seen:
        call()
        b.now()
    table = seen.key_averages()
    kind = torch.autograd.DeviceType.CUDA if b.cuda else torch.autograd.DeviceType.CPU
    rows = [row for row in table if row.device_type == kind]        # on CUDA kernels, not who asked
    say(f"\n{name}: {seconds:.4f} s\n{table.table(sort_by=by, row_limit=25)}")
    attribute = "self_device_time_total" if b.cuda else "self_cpu_time_total"
    times = sorted(((getattr(row, attribute) / 1e6, row.count, row.key) for row in rows),
                   reverse=True)
    busy = sum(time for time, _, _ in times) / seconds
    return {"seconds": seconds, "busy": busy, "longest": times[:25]}


def bench(args):
    """tools/bench.py on the items that the goals speak of."""
    path = Path(args.out) / "bench_items.json"
    items = ["sft unshared", "dpo unshared", "logprobs cross_entropy", "attention varlen_attn",
             "nucleus sort", "generate unshared", "loss cross_entropy"]        # and ours of each
    options = ["--shape", "1b", "--peers", "--minutes", str(max(0, args.limit - 25) / 60)]
    if not args.cuda:
        items = ["limits"]
        options += ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--steps", "1"]
    result = bench_tool.main([*options, "--kernels", args.kernels, "--json", path,
                              "--items", *items])
    failed = [row["name"] for row in result["items"] if "rate" not in row]
    rates = [f"{row['name']} {bench_tool.human(row['rate'])}"
             for row in result["items"] if "rate" in row]
    line = ", ".join(rates)
    assert not failed, f"no rate of {', '.join(failed)}; {line}"
    return line, {"items": result["items"]}


@contextlib.contextmanager
def undone(change):
    """As if this change had not been made."""
    owner, name, before = CHANGES[change]
    now = vars(owner)[name]
    setattr(owner, name, before)
    yield
    setattr(owner, name, now)


def plain_norm(self, x):
    return library.recomputed(library.rms_norm, x, self.weight, self.eps)


def join_by_twin(*args):
    kernels = library.KERNELS
    library.choose_kernels("torch")
    joined = join_results(*args)
    library.choose_kernels(kernels)
    return joined


CHANGES = {                         # name: (where it is, its name there, what was there before)
    "norm": (library.RMSNorm, "forward", plain_norm),
    "rope": (library, "rope", library.apply_rope),
    "logits": (library.TokenLogprobs, "ON_CUDA", 1),
    "tiles": (library.TreeAttention, "tile_sizes", staticmethod(lambda q: (64, 8, 64, 8))),
    "join": (library, "join_results", join_by_twin),
}


def compare(b, call, changes):
    """How many times as long a call takes with each of these changes undone."""
    seconds = {change: [] for change in ("none", *changes)}
    for _ in range(8 if b.cuda else 2):                     # in turn, as clocks drift
        for change, times in seconds.items():
            with undone(change) if change in CHANGES else contextlib.nullcontext():
                ready = call()                              # compiles, or records
                began = b.now()
                ready()
                times.append(b.now() - began)
    now = median(seconds["none"][1:])
    return {change: median(seconds[change][1:]) / now for change in changes}


def changes(args):
    """What each change of the code buys: the time without it over the time with it."""
    b = make_bench(args)
    layers = 4 if args.cuda else 2
    model = shallow_model(b, layers, torch.float32)
    model.compute_dtype = b.products
    p = one_pack(b, 8192)

    def training():
        train(model, p)
        return partial(train, model, p)

    found = {"training": compare(b, training, ["norm", "rope", "logits"])}
    if args.cuda:                                           # heads of 128
        eight = make_bench(args, "--shape", "8b")
        model = shallow_model(eight, layers, torch.float32)
        model.compute_dtype = b.products
        found["training 8b"] = compare(b, training, ["tiles", "norm", "rope"])
    with torch.inference_mode():
        engine = start_engine(shallow_model(b, layers, b.products), b.prompts(), 4, 64)

        def decoding():
            batch = engine.make_batch()
            step = partial(engine.step, batch)
            step()
            step = engine.record(step)
            return lambda: [step() for _ in range(20 if b.cuda else 1)]

        found["decoding"] = compare(b, decoding, ["norm", "rope", "join"])
        slot = next(iter(engine.owned))
        longer = min(32, len(engine.pool.free))             # pages: 2,048 tokens
        engine.owned[slot] += engine.pool.take_highest(longer)
        found["decoding beside a long answer"] = compare(b, decoding, ["join"])
    parts = [f"{what}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
             for what, ratios in found.items()]
    return "time without / with; " + "; ".join(parts), found


def blocks(args):
    """What a single long answer costs: in a step, and in a block of prompts that ends with it."""
    b = make_bench(args)
    model = shallow_model(b, 2, b.products)
    c = b.config
    rows, most = (1024, 1024) if args.cuda else (4, 24)
    length = None if args.cuda else 200
    large = 4 * rows
    prompts = [e.prompt for e in measure.random_examples(large, 1, c.vocab_size, length)]
    stop = list(range(c.vocab_size // (most // 8)))         # an answer ends after most / 8 tokens
    seconds = {}
    for size in (rows, large):
        began = b.now()
        for start in range(0, large, size):
            generate(model, prompts[start:start + size], max_new_tokens=most, stop=stop,
                     max_slots=rows)
        seconds[size] = b.now() - began
    ratio = seconds[rows] / seconds[large]
    line = f"blocks of {large} prompts are {ratio:.2f} times as fast as of {rows}"
    return line, {"seconds": seconds}


STAGES = {                          # name: (function, seconds at most)
    "limits": (limits, 40),
    "kernels": (kernels, 200),
    "graph": (graph, 60),
    "pages": (pages, 40),
    "step": (step, 60),
    "scripts": (scripts, 80),
    "profile": (profile, 70),
    "bench": (bench, 260),
    "changes": (changes, 80),
    "blocks": (blocks, 70),
}
INTERPRETED = ("kernels", "step")   # without CUDA; the other stages use the plain twins there


# ------------------------------------------------------------------ running them
def run_here(args):
    """One stage, in this process."""
    library.choose_kernels(args.kernels)
    function, _ = STAGES[args.only]
    line, figures = function(args)
    write_json(Path(args.out) / f"{args.only}.json",
               {"line": line, "kernels": args.kernels, "figures": figures})


def run_stage(args, name, kernels, seconds):
    """One stage in a process of its own: what its JSON file then holds."""
    out = Path(args.out)
    path = out / f"{name}.json"
    log = out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", args.out, "--kernels", kernels,
               "--only", name, "--limit", str(seconds)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if name in INTERPRETED and not args.cuda:
        environment["TRITON_INTERPRET"] = "1"
    began = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=environment, start_new_session=True)
        try:
            process.wait(seconds)
            failed = bench_tool.error_line(log.read_text()) or f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)          # the stage's own processes, too
            process.wait()
            failed = f"cut off after {seconds:.0f} s"
    if path.exists() and process.returncode == 0:
        result = json.loads(path.read_text())
    else:
        result = {"failed": failed, "kernels": kernels}
    result["seconds"] = time.time() - began
    write_json(path, result)
    return result


def found_before(args, name, kernels):
    """What an earlier call found, if it need not be found again; else None."""
    path = Path(args.out) / f"{name}.json"
    if args.stages or not path.exists():
        return None
    result = json.loads(path.read_text())
    if "failed" in result or result["kernels"] != kernels:
        return None
    return result


def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=folder_name, required=True, help="folder for logs and figures")
    p.add_argument("--seconds", type=at_least(1, float), default=540, help="for all stages")
    p.add_argument("--stages", nargs="+", action=Extend, choices=STAGES,
                   help="only these, whatever is done")
    p.add_argument("--kernels", choices=["triton", "torch"], default=library.KERNELS,
                   help="torch: the plain twins")
    p.add_argument("--device", help="cpu: rehearse, where a GPU is, too")
    p.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)
    p.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.cuda = torch.cuda.is_available() and args.device != "cpu"
    args.out = os.path.abspath(args.out)                    # stages run elsewhere
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.only:
        return run_here(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    began = time.time()
    kernels = args.kernels
    results = {}
    for name in args.stages or STAGES:
        _, limit = STAGES[name]
        left = args.seconds - (time.time() - began)
        result = found_before(args, name, kernels)
        if result is None and left < 5:
            result = {"failed": "left out: no time is left", "seconds": 0, "kernels": kernels}
        elif result is None:
            result = run_stage(args, name, kernels, min(limit, left))
        results[name] = result
        tell(show(name, result))
        if name == "kernels" and is_wrong(args, result):
            kernels = "torch"
    say("\n".join(show(name, result) for name, result in results.items()))
    return results


def is_wrong(args, result):
    """Did a test of the kernels fail? That they were cut off as too slow says nothing of that."""
    failed = result.get("failed", "")
    logs = "\n".join(path.read_text() for path in Path(args.out).glob("kernels_*.log"))
    marks = re.search(r"^[.s]*[FE]", logs, re.MULTILINE)    # as pytest shows its progress
    return bool(failed) and (not failed.startswith(("cut off", "left out")) or bool(marks))


def show(name, result):
    """A stage's line."""
    said = f"FAILED: {result['failed']}" if "failed" in result else result["line"]
    return f"{name:8} {result['seconds']:6.1f} s  {said}"


if __name__ == "__main__":
    results = main()
    sys.exit(any("failed" in result for result in (results or {}).values()))
