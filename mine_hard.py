"""Stage 2: find the hard samples, those that a model answers sometimes right and sometimes wrong.

    python mine_hard.py                                             after `python train_sft.py`
    python mine_hard.py --model DIR... --data FILE... --out DIR     yours; several models: an ensemble
    torchrun --nproc_per_node 4 mine_hard.py ...                    blocks of prompts go to the ranks

    model folders + records  ->  OUT/samples.jsonl (k answers to every prompt, each judged)
                             ->  OUT/hard.jsonl    (one pair for each hard prompt, with its weight)

hard.jsonl follows from samples.jsonl and --judge, --pair, --gamma: with --resume and others of these no model
is loaded. Prompts are answered in fixed blocks, and only unfinished blocks are redone, so any number of
stops and ranks gives the same file. Not the released code's rules, unless asked: see --judge, --pair.
"""
import argparse
import json
import random
import sys
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

from data import (VERDICTS, Tokenizer, fit_prompt, gold_verdict, parse_records, parse_verdict, read_arguments,
                  read_records)
from model import (InputError, Llama, all_sum, at_least, generate_iter, join_ranks, pick_dtype, read_json,
                   row_key, weights_time, write_json, write_whole)

# ------------------------------------------------------------------ the method
def judge(verdict, gold):
    """Is this output correct: is every verdict that the record labels right? A missing verdict is wrong.
    verdict, gold: dicts as parse_verdict gives them; a None in gold is no label."""
    labelled = [name for name in VERDICTS if gold[name] is not None]
    return bool(labelled) and all(verdict[name] == gold[name] for name in labelled)

def judge_all(samples, gold):
    """[is it correct, for each sample (see answer_block)] under `judge`; one that was cut off never is."""
    return [judge(s["verdict"], gold) and s["finish"] == "stop" for s in samples]

def judge_by_field(samples, gold):
    """The released code's rule: [correct, wrong or (None) dropped, for each sample] on one field.
    The first of request, response, completion on which the samples differ decides, and the others are
    not looked at; a sample that lacks a verdict which the record labels is dropped."""
    labelled = [name for name in ("request", "response", "completion") if gold[name] is not None]
    whole = [all(s["verdict"][name] for name in labelled) for s in samples]
    for name in labelled:
        right = [s["verdict"][name] == gold[name] if ok else None for s, ok in zip(samples, whole)]
        if True in right and False in right:
            return right
    return [judge(s["verdict"], gold) if ok else None for s, ok in zip(samples, whole)]    # all the same

def pick_pair(samples, right, rule, rng):
    """(chosen, rejected) texts: a correct and an incorrect sample, at random or (released) the longest."""
    good = [s["text"] for s, ok in zip(samples, right) if ok is True]
    bad = [s["text"] for s, ok in zip(samples, right) if ok is False]
    pick = partial(max, key=len) if rule == "longest" else rng.choice
    return pick(good), pick(bad)

def sample_weights(differences, gamma):
    """alpha = 1 + Norm(k_incorrect - k_correct, gamma)   (GuardReasoner, Eq. 2)
    Norm maps the differences of the mined set linearly to [-gamma, gamma]; all equal: alpha = 1."""
    low, high = min(differences, default=0), max(differences, default=0)
    return [1 + gamma * (2 * (d - low) / (high - low) - 1) if high > low else 1.0 for d in differences]

def select(records, sources, answers, judging, pairing, gamma, seed):
    """hard.jsonl from all models' answers [(model, {prompt number: samples})], and a count of outcomes.
    A prompt is hard if it has correct and incorrect answers; an input that is hard twice is taken once, from
    the model named first. sources: the file of each record; judging, pairing: --judge and --pair."""
    judge_samples = {"all": judge_all, "field": judge_by_field}[judging]
    hard, count = {}, Counter()
    for model, by_prompt in answers:
        for number, samples in sorted(by_prompt.items()):
            record = records[number]
            right = judge_samples(samples, gold_verdict(record))
            good, bad = right.count(True), right.count(False)
            count["all wrong" if not good else "hard" if bad else "all right"] += 1
            count["answers without verdict"] += sum(not any(s["verdict"].values()) for s in samples)
            if good and bad and record["input"] not in hard:
                rng = random.Random(f"{seed} {model} {number}")
                chosen, rejected = pick_pair(samples, right, pairing, rng)
                hard[record["input"]] = {
                    "instruction": record["instruction"], "input": record["input"], "chosen": chosen,
                    "rejected": rejected, "k_correct": good, "k_incorrect": bad, "source": sources[number]}
    pairs = list(hard.values())
    weights = sample_weights([pair["k_incorrect"] - pair["k_correct"] for pair in pairs], gamma)
    return [{**pair, "weight": weight} for pair, weight in zip(pairs, weights)], count

# ------------------------------------------------------------------ answering all prompts (eval.py too)
def encode_prompts(tokenizer, records, max_length):
    """(ids, was it cut?) of the prompt of each record; InputError where not even an empty exchange fits."""
    prompts, cuts = zip(*(fit_prompt(tokenizer, record, max_length) for record in records))
    if None in prompts:
        raise InputError(f"--max-length {max_length} is too short for the template itself")
    if any(cuts):
        print(f"{sum(cuts)} prompts cut inside the user's text (--max-length {max_length})", file=sys.stderr)
    return prompts, cuts

def lazy_model(args, folder, device):
    """(tokenizer, load) of a folder; load() -> (model, tokenizer) reads the weights at its first call."""
    tokenizer, dtype = Tokenizer.from_pretrained(folder, args.format), pick_dtype(device, args.dtype)
    return tokenizer, cache(lambda: (Llama.from_pretrained(folder, device, dtype), tokenizer))

def answer_prompts(load, prompts, path, rank_info, block, settings, label, **options):
    """Answer prompts (lists of ids) into path, a line each, and return the lines as dicts.
    load() -> (model, tokenizer), called only if something is left to do. Blocks of prompts are written
    whole into path.parts, whichever rank and run answers them, and joined in order at the end."""
    (device, rank, ranks), block = rank_info, block or (1024 if rank_info[0].type == "cuda" else 256)
    settings = {**settings, "block": block, "prompts": row_key(0, [row_key(0, p, 0) for p in prompts], 0)}
    check_settings(Path(f"{path}.parts/settings.json"), settings, rank)
    parts = {i: Path(f"{path}.parts/{i:08d}.jsonl") for i in range(0, len(prompts), block)}  # by first prompt
    if not Path(path).exists():
        todo = [i for i in list(parts)[rank::ranks] if not parts[i].exists()]
        meter = Meter(sum(len(prompts[i:i + block]) for i in todo), label, rank)
        for i in todo:
            lines = answer_block(*load(), prompts[i:i + block], i, settings, meter, options)
            write_lines(parts[i], lines)
        all_sum(0, device)                                                     # a barrier: all blocks exist
        if rank == 0:
            write_lines(path, [line for part in parts.values() for _, line in parse_records(part)])
        all_sum(0, device)                                                     # another: the file does
    for part in parts.values() if rank == 0 else []:
        part.unlink(missing_ok=True)
    return [line for _, line in parse_records(path)]

def answer_block(model, tokenizer, prompts, first, settings, meter, options):
    """The lines of one block, in the order of its prompts."""
    lines = [None] * len(prompts)
    for i, answers in generate_iter(model, prompts, stop=tokenizer.stop, **options):
        texts = [tokenizer.decode(ids) for ids in answers]
        samples = [{"text": text, "finish": "stop" if ids[-1] in tokenizer.stop else "length",
                    "tokens": len(ids), "verdict": parse_verdict(text)} for text, ids in zip(texts, answers)]
        lines[i] = dict(prompt=first + i, model=settings["model"], seed=settings["seed"], samples=samples)
        meter.add(sum(map(len, answers)))
    return lines

def check_settings(path, settings, rank):
    """Remember what a file is made with; refuse to continue it with something else."""
    old = read_json(path) if path.exists() else settings
    for name, now in settings.items():
        if (was := old.get(name)) != now:
            raise InputError(f"{path}: was made with {name} = {was!r}, not {now!r}; choose another --out")
    if rank == 0 and old is settings:
        write_json(path, settings)

def write_lines(path, lines):
    """Write a JSON value a line, whole; half a surrogate pair is written as JSON spells it."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"))

class Meter:
    """Progress on one console line: prompts done, tokens a second, time left."""
    def __init__(self, total, label, rank):
        self.total, self.label, self.rank, self.done = total, label, rank, 0
        self.tokens, self.start = 0, time.time()

    def add(self, tokens):
        """One more prompt is answered, with so many tokens."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        left, seconds = self.total - self.done, time.time() - self.start
        if self.rank == 0 and (left == 0 or sys.stdout.isatty()):
            print(f"\r{self.label}{self.done}/{self.total} prompts  {self.tokens / seconds:,.0f} tokens/s  "
                  f"{seconds / self.done * left / 60:.1f} min left  ", end="" if left else "\n", flush=True)

def generation_arguments(p):
    """The arguments of everything that generates."""
    p.add_argument("--max-length", type=at_least(1), default=4096, help="user texts are cut to fit in it")
    p.add_argument("--max-new-tokens", type=at_least(1), default=2048, help="of an answer (released: 2048)")
    p.add_argument("--kv-tokens", type=at_least(1), help="keys and values held at once (default: what fits)")
    p.add_argument("--block", type=at_least(1), help="prompts answered together (default: 256; CUDA: 1024)")

def generation(args, model, **sampling):
    """(what a file of answers depends on, options of generate_iter) of --k and generation_arguments."""
    options = dict(k=args.k, seed=args.seed, max_new_tokens=args.max_new_tokens, **sampling)
    settings = dict(model=str(model), weights=weights_time(model), limit=args.limit,
                    max_length=args.max_length, format=args.format, dtype=args.dtype, **options)
    return settings, dict(kv_tokens=args.kv_tokens, share=not args.no_share, **options)

# ------------------------------------------------------------------ the script
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", nargs="+", default=["out/sft"], metavar="DIR", help="one model, or an ensemble")
    p.add_argument("--data", nargs="+", metavar="FILE", help="the training records")
    p.add_argument("--out", default="out/hard", help="folder for samples.jsonl and hard.jsonl")
    p.add_argument("--k", type=at_least(1), default=4, help="answers to each prompt (released code: 4)")
    p.add_argument("--temperature", type=at_least(0, float), default=1.0, help="paper: 1.0; released: 0.7")
    p.add_argument("--top-p", type=at_least(1e-6, float), default=0.95, help="nucleus (paper: 0.95)")
    p.add_argument("--judge", choices=["all", "field"], default="all",
                   help="an output is correct if all labelled verdicts are, or (released) one field's is")
    p.add_argument("--pair", choices=["random", "longest"], default="random",
                   help="which correct and which incorrect output make the pair (released code: longest)")
    p.add_argument("--gamma", type=at_least(0, float), default=0.2, help="weights: 1 +- gamma (paper: 0.2)")
    p.add_argument("--resume", action="store_true", help="continue, or only select again, in --out")
    generation_arguments(p)
    return read_arguments(p, argv, max_new_tokens=224, limit=100, dtype="float32")

def main(argv=None):
    args = parse_arguments(argv)
    out = Path(args.out)
    if out.exists() and any(out.glob("samples*")) and not args.resume:
        raise InputError(f"{out}: already holds samples; add --resume to continue, or choose another --out")
    rank_info = join_ranks(args.device)
    found = [(record, Path(path).stem) for path in args.data for record in read_records(path)[:args.limit]]
    records, sources = zip(*found)
    answers = []
    for n, folder in enumerate(args.model):
        path = out / ("samples.jsonl" if len(args.model) == 1 else f"samples-{n}.jsonl")
        tokenizer, load = lazy_model(args, folder, rank_info[0])
        prompts, _ = encode_prompts(tokenizer, records, args.max_length)
        settings, options = generation(args, folder, temperature=args.temperature, top_p=args.top_p)
        lines = answer_prompts(load, prompts, path, rank_info, args.block, settings, f"{folder}: ", **options)
        answers.append((folder, {line["prompt"]: line["samples"] for line in lines}))
    if rank_info[1] > 0:
        return
    hard, count = select(records, sources, answers, args.judge, args.pair, args.gamma, args.seed)
    n = len(records) * len(args.model)
    for what in ("all right", "hard", "all wrong"):
        print(f"{count[what]:7} of {n} prompts {what} ({100 * count[what] / n:.1f}%)")
    print(f"{count['answers without verdict']:7} of {n * args.k} answers without verdict")
    write_lines(out / "hard.jsonl", hard)
    print(f"wrote {out / 'hard.jsonl'}: {len(hard)} pairs, weights "
          + ", ".join(f"{w:.2f} x {c}" for w, c in sorted(Counter(p["weight"] for p in hard).items())))

if __name__ == "__main__":
    main()
