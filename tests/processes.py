"""Run the scripts in processes of their own, forked from one that has torch loaded: quick to start."""
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

from data import INSTRUCTION, format_answers, format_input  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")                # on a CPU; torch 2.6 cannot
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["processes", "train_dpo", "eval", "torch.distributed.fsdp"])      # all that is slow
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])            # where the fork server finds them


def child(name, arguments, environment, output, stop_at):
    """The life of such a process: one script's main, all that it prints in the file `output`.

    stop_at: raise SIGTERM in the last rank, and there only, during this step of the run; and once more, as
    torchrun does where the scheduler has told every process already."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    script, steps = importlib.import_module(name), itertools.count(1)
    if stop_at and int(environment["RANK"]) == int(environment["WORLD_SIZE"]) - 1:
        update = script.update

        def update_and_stop(*args):
            if next(steps) == stop_at:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            return update(*args)

        script.update = update_and_stop
    script.main(arguments)


def start(name, arguments, output, ranks=1, stop_at=None):
    """Start main(arguments) of a script in `ranks` processes, as torchrun would; returns the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        world = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        what = name, list(map(str, arguments)), world, f"{output}.{rank}", stop_at
        processes.append(FORK.Process(target=child, args=what))
        processes[-1].start()
    return processes


def run(name, arguments, output, ranks=1, stop_at=None, code=0):
    """Start, wait, check the exit status; returns what rank 0 printed."""
    if ranks > 1 and name.startswith("train") and not CAN_SHARD:
        pytest.skip(f"torch {torch.__version__} cannot train on several ranks of a CPU")
    processes = start(name, arguments, output, ranks, stop_at)
    for process in processes:
        process.join(300)
        process.kill()                                                             # if it hangs
        process.join()
    said = [Path(f"{output}.{rank}").read_text() for rank in range(ranks)]
    codes = [process.exitcode for process in processes]
    assert not any("Traceback" in text for text in said), "\n".join(said)         # an error's exit status is 1, too
    assert codes == [code] * ranks, f"{name} ended with {codes}\n" + "\n".join(said)
    return said[0]


def without(arguments, replaced):
    """Of [flag, value, flag, value, ...] those whose flag is not among these: a list given twice is one list."""
    return [word for pair in zip(arguments[::2], arguments[1::2]) if pair[0] not in replaced for word in pair]


def tiny_folder(folder, tied=True, seed=1):
    """A model folder of random weights with the toy vocabulary."""
    config = LlamaConfig(vocab_size=761, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
                         torch_dtype="float64")
    Llama.random(config, seed, std=0.1).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "toy/model" / name, folder)
    return folder


def write_records(path, n=12):
    """Records with a short instruction and a one-line answer."""
    with open(path, "w") as file:
        for i in range(n):
            request = "Please lock the chest. " * (1 + i % 4) + str(i)
            word = "harmful" if i % 3 == 0 else "unharmful"
            file.write(json.dumps({"instruction": "Judge.\n", "input": format_input(request),
                                   "output": f"Request: {word}"}) + "\n")
    return path


def write_pairs(path, n=11):
    """A hard.jsonl of n pairs whose prompts and weights differ."""
    with open(path, "w") as file:
        for i in range(n):
            request = format_input("Please lock the chest. " * (1 + i % 4))
            chosen, rejected = (f"# Task 1\nThe aim of {i} is plain.\n\n{format_answers(word)}"
                                for word in ("harmful", "unharmful"))
            file.write(json.dumps({"instruction": INSTRUCTION, "input": request, "chosen": chosen,
                                   "rejected": rejected, "weight": 0.8 + 0.1 * (i % 5)}) + "\n")
    return path


def rows_of(out):
    """The steps of metrics.jsonl, without timings and memory."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()[1:]]
    timings = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]
