"""Stage 2: find the hard prompts (the paper's hard samples), those that a model answers sometimes
right and sometimes wrong.

    python mine_hard.py                                           after `python train_sft.py`
    python mine_hard.py --model DIR... --data FILE... --out DIR   yours; several models: an ensemble
    torchrun --nproc_per_node 4 mine_hard.py ...                  blocks of prompts go to the ranks

    model folders + records  ->  OUT/samples.jsonl (k answers to every prompt, with verdicts)
                             ->  OUT/hard.jsonl    (one pair for each hard prompt, with its weight)

Of several models each has a file of its own, samples-0.jsonl, samples-1.jsonl, ..., and draws with
a seed of its own, --seed, --seed + 1, ...
hard.jsonl follows from samples.jsonl, the records' labels, --seed and --judge, --pair, --gamma:
change one of these three, add --resume, and no model is loaded. The rules are the paper's; for the
released code's see --judge and --pair.

    judge, pick_pair, sample_weights, select   the method
    main                                       the script
    answer_prompts                             machinery: k answers to all prompts in a file, which
                                               eval.py uses, too
"""
import argparse
import json
import os
import random
import re
import time
from collections import Counter
from functools import cached_property
from pathlib import Path

from data import (VERDICTS, Extend, InputError, Tokenizer, at_least, fit_prompt, gold_verdict,
                  hold, interruptible, is_there, on_terminal, parse_records, parse_verdict,
                  read_object, read_records, reading, say, tell, warn, write_json, write_whole)
from model import (NEARLY_ZERO, Job, Llama, config_hash, fingerprint, folder_name, generate_iter,
                   join_ranks, name_of, pick_dtype, plan_capacity, read_arguments, weights_hash)


# ------------------------------------------------------------------ the method
# A sample is one answer of a model, a dict: text, finish ("stop", or "length" where the answer is
# unfinished), tokens, verdict (see data.parse_verdict).
def judge(verdict, gold):
    """Is an answer with this verdict correct: is it right on every task that the record labels? A
    missing verdict is wrong, and where nothing is labelled, nothing is right. verdict, gold: dicts
    as parse_verdict gives them; a None in gold is no label. -> bool"""
    labelled = [name for name in VERDICTS if gold[name] is not None]
    return bool(labelled) and all(verdict[name] == gold[name] for name in labelled)


def judge_by_all_fields(samples, gold):
    """[is it correct?, for each sample] under `judge`; an unfinished answer never is."""
    return [judge(s["verdict"], gold) and s["finish"] == "stop" for s in samples]


def judge_by_field(samples, gold):
    """The released code's rule: [True, False or (dropped) None, for each sample], by one field.

    A sample that lacks a verdict of a labelled field is dropped. The first labelled field, of
    request, response, completion in this order, on which some of the samples left are right and
    some wrong decides alone. If there is none, `judge` does. How a sample ended does not matter."""
    labelled = [name for name in ("request", "response", "completion") if gold[name] is not None]
    complete = [all(s["verdict"][name] for name in labelled) for s in samples]
    for name in labelled:
        right = [s["verdict"][name] == gold[name] if ok else None
                 for s, ok in zip(samples, complete)]
        if True in right and False in right:
            return right
    return [judge(s["verdict"], gold) if ok else None
            for s, ok in zip(samples, complete)]


def pick_pair(samples, right, rule, rng):
    """(chosen, rejected) texts: a correct and an incorrect sample, at random or (released) the
    longest by characters. right: for each sample True, False, or None, which is neither; True and
    False both occur. rule: "random", where all of a kind are equally likely, or "longest"; rng: a
    random.Random, from which all chance comes."""
    correct = [s["text"] for s, ok in zip(samples, right) if ok is True]
    incorrect = [s["text"] for s, ok in zip(samples, right) if ok is False]
    if rule == "longest":
        return max(correct, key=len), max(incorrect, key=len)
    return rng.choice(correct), rng.choice(incorrect)


def sample_weights(differences, gamma):
    """alpha = 1 + Norm(k_incorrect - k_correct, gamma)   (GuardReasoner, Eq. 2)
    Norm maps the differences of the mined set linearly to [-gamma, gamma], the smallest to -gamma
    and the largest to gamma; all equal: alpha = 1. -> a list of floats, [] for []."""
    low = min(differences, default=0)
    high = max(differences, default=0)
    if low == high:
        return [1.0 for _ in differences]
    return [1 + gamma * (2 * (d - low) / (high - low) - 1) for d in differences]


def select(records, sources, answers, judging, pairing, gamma, seed):
    """(lines of hard.jsonl, a Counter of outcomes) from all models' answers.

    sources     the file of each record
    answers     [(folder, {number of the record: its samples})], a model's folder as --model names
                it
    judging     --judge: "all" or "field", see judge_by_...
    pairing     --pair: how pick_pair chooses, with a random.Random of seed, folder and number
    gamma       how far weights are from 1: sample_weights over all lines

    A prompt is hard if it has correct and incorrect answers. Where several models or records make
    the same input hard, the first that is found counts: models as they are named, then records in
    their order. A line has instruction, input, chosen, rejected, k_correct, k_incorrect, source and
    weight; lines stand in the order in which they were found. Counted, once for every model and
    prompt: "all right", "hard", "all wrong"; and "answers without verdict", the samples whose three
    verdicts are all None."""
    judge_samples = {"all": judge_by_all_fields, "field": judge_by_field}[judging]
    hard = {}
    count = Counter()
    for folder, by_number in answers:
        for number, samples in sorted(by_number.items()):
            record = records[number]
            right = judge_samples(samples, gold_verdict(record))
            k_correct = right.count(True)
            k_incorrect = right.count(False)
            what = outcome(k_correct, k_incorrect)
            count[what] += 1
            count["answers without verdict"] += sum(not any(s["verdict"].values()) for s in samples)
            if what != "hard" or record["input"] in hard:
                continue
            rng = random.Random(f"{seed} {folder} {number}")
            chosen, rejected = pick_pair(samples, right, pairing, rng)
            hard[record["input"]] = {
                "instruction": record["instruction"], "input": record["input"], "chosen": chosen,
                "rejected": rejected, "k_correct": k_correct, "k_incorrect": k_incorrect,
                "source": sources[number]}
    pairs = list(hard.values())
    differences = [pair["k_incorrect"] - pair["k_correct"] for pair in pairs]
    weights = sample_weights(differences, gamma)
    return [{**pair, "weight": weight} for pair, weight in zip(pairs, weights)], count


def outcome(k_correct, k_incorrect):
    """What select counts a prompt as: "all right", "hard" or "all wrong", by the answers that are
    judged. Without a correct one it is "all wrong", also where judge_by_field dropped them all."""
    if not k_correct:
        return "all wrong"
    return "hard" if k_incorrect else "all right"


# ------------------------------------------------------------------ the script
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=folder_name, nargs="+", action=Extend, default=["out/sft"],
                   metavar="DIR", help="one model, or an ensemble")
    p.add_argument("--data", nargs="+", action=Extend, metavar="FILE", help="the training records")
    p.add_argument("--out", type=folder_name, default="out/hard",
                   help="folder for samples.jsonl and hard.jsonl")
    p.add_argument("--k", type=at_least(1, most=10_000), default=4,
                   help="answers to each prompt (released code: 4)")
    p.add_argument("--temperature", type=at_least(0, float), default=1.0,
                   help="paper: 1.0; released code: 0.7")
    p.add_argument("--top-p", type=at_least(0, float, 1), default=0.95,
                   help="nucleus (paper: 0.95)")
    p.add_argument("--judge", choices=["all", "field"], default="all",
                   help="an answer is correct if all labelled verdicts are, "
                        "or (released) one field's is")
    p.add_argument("--pair", choices=["random", "longest"], default="random",
                   help="which correct and which incorrect answer make the pair "
                        "(released: longest)")
    p.add_argument("--gamma", type=at_least(0, float, 1), default=0.2,
                   help="weights: 1 +- gamma (paper: 0.2)")
    p.add_argument("--resume", action="store_true", help="continue, or only select again, in --out")
    generation_arguments(p)
    # without --data the demo runs: these values replace the defaults above. (read_arguments also
    # adds --seed, --limit, --dtype and others)
    return read_arguments(p, argv, max_new_tokens=224, limit=100, dtype="float32")


def main(argv=None):
    args = parse_arguments(argv)
    out = Path(args.out)
    names = [f"samples-{number}.jsonl" for number in range(len(args.model))]
    if len(args.model) == 1:
        names = ["samples.jsonl"]
    check_out(args, out, names)
    if args.k == 1 or min(args.temperature, args.top_p) < NEARLY_ZERO:
        tell("all answers to a prompt will be alike, so none is hard "
             "(--k, --temperature, --top-p)")
    world = join_ranks(args.device)
    records = []
    sources = []
    for path in args.data:
        some = read_records(path)[:args.limit]
        records += some
        sources += [Path(path).stem] * len(some)
    check_labels([gold_verdict(record) for record in records],
                 f"{' '.join(args.data)}: no output is a label",
                 "records have no usable label: all answers to them count as wrong")
    if world.rank == 0:
        hold(out)
    asked = []
    last_prompts = None
    # every folder is looked at before one model answers for hours
    for model_number, (name, folder) in enumerate(zip(names, args.model)):
        guard = LazyModel(args, folder, world.device)
        prompts, _ = encode_prompts(guard.tokenizer, records, args.max_length, args.max_new_tokens)
        if prompts == last_prompts:
            prompts = last_prompts                          # the same tokenizer: one copy is held
        last_prompts = prompts
        settings = generation_settings(args, guard, args.temperature, top_p=args.top_p)
        settings["seed"] = seed_of(model_number, args.seed, out / name)
        claim_answers(prompts, out / name, world, settings, args, out / "hard.jsonl")
        asked.append((guard, prompts, out / name, settings))
    answers = []
    while asked:                        # popped: a model's weights are let go before the next one's
        guard, prompts, path, settings = asked.pop(0)
        lines = answer_prompts(guard, prompts, path, world, settings, args)
        answers.append((guard.folder, {line["prompt"]: line["samples"] for line in lines}))
    if world.rank == 0:
        hard, count = select(records, sources, answers,
                             args.judge, args.pair, args.gamma, args.seed)
        write_lines(out / "hard.jsonl", hard)
        report(count, len(records) * len(args.model), args.k)
        weights = Counter(pair["weight"] for pair in hard)
        spread = ", ".join(f"{weight:.2f} x {n}"
                           for weight, n in sorted(weights.items()))
        say(f"wrote {out / 'hard.jsonl'}: {len(hard)} pairs, weights {spread}")


def seed_of(number, seed, path):
    """The seed with which model `number` answers: with one for all, models that are alike would
    draw much the same. (A file that an earlier version began has the run's own.)"""
    before = read_object(parts_of(path) / "settings.json", {})
    begun = has_answers(path) and before.get("seed") == seed
    return seed if begun else seed + number


SAMPLES = re.compile(r"samples(-\d+)?\.jsonl")      # how these files are called, and no other


def check_out(args, out, names):
    """InputError where --model names a folder twice, or --out cannot be used: it holds samples or a
    hard.jsonl and --resume is not given, or samples of a run with another number of models, or a
    hard.jsonl whose samples are gone. names: the files of samples that this run writes."""
    if len(set(map(os.path.realpath, args.model))) < len(args.model):
        raise InputError("--model: a folder is named twice")
    with reading(out):
        found = {path.name.removesuffix(".parts") for path in out.glob("samples*")}
    claimed = [name for name in found if SAMPLES.fullmatch(name)]
    samples = [name for name in claimed if has_answers(out / name)]
    hard = out / "hard.jsonl"
    if is_there(hard) and not claimed:
        raise InputError(f"{hard}: is there without the samples it was made of; move it away, or "
                         "choose another --out")
    if (samples or is_there(hard)) and not args.resume:
        raise InputError(f"{out}: already holds samples; add --resume to continue, "
                         "or choose another --out")
    others = sorted(set(samples) - set(names))
    if others:
        raise InputError(f"{out}/{others[0]}: is of a run with another number of models; choose "
                         "another --out")


def check_labels(golds, fault, remark):
    """Say how many of these records have no label, with this remark; InputError if none has one,
    with this fault."""
    unlabelled = sum(not any(gold.values()) for gold in golds)
    if unlabelled == len(golds):
        raise InputError(f"{fault} (harmful, unharmful, refusal, compliance)")
    warn(unlabelled, remark)


def report(count, n, k):
    """Print how many of n prompts were hard, and how many of all n k answers had no verdict."""
    for what in ("all right", "hard", "all wrong"):
        share = 100 * count[what] / n
        say(f"{count[what]:7} of {n} prompts {what} ({share:.1f}%)")
    say(f"{count['answers without verdict']:7} of {n * k} answers without verdict")


# ================================================================= machinery: answering all prompts
# Prompts are answered in fixed blocks, in the order of the records. A block is written whole; an
# unfinished one is done again, with the same random numbers. Ranks take whole blocks in turn. So
# the file is the same however often a run is interrupted, and on any number of ranks (on a GPU with
# --kv-tokens given: without it the cache's size follows from the memory that is free).
def generation_arguments(p):
    """The arguments of everything that generates."""
    p.add_argument("--max-length", type=at_least(1), default=4096,
                   help="tokens of a prompt; user texts are cut to fit")
    p.add_argument("--max-new-tokens", type=at_least(1), default=2048,
                   help="of an answer (released: 2048)")
    p.add_argument("--kv-tokens", type=at_least(1),
                   help="keys and values held at once (default: what fits)")
    p.add_argument("--block", type=at_least(1),
                   help="prompts answered together (default: 256; CUDA: 8192)")


def generation_settings(args, guard, temperature, **sampling):
    """What a file of answers depends on, beside its prompts. guard: a LazyModel."""
    return dict(model=str(guard.folder), **guard.hashes, limit=args.limit,
                max_length=args.max_length, format=args.format, dtype=name_of(guard.dtype),
                k=args.k, seed=args.seed, max_new_tokens=args.max_new_tokens,
                stop=guard.tokenizer.stop, temperature=temperature, **sampling)


class LazyModel:
    """A model folder: the tokenizer is read at once,
    the weights when `model` is first asked for."""

    def __init__(self, args, folder, device):
        self.folder = folder
        self.device = device
        self.dtype = pick_dtype(device, args.dtype)
        self.tokenizer = Tokenizer.from_pretrained(folder, args.format)

    @cached_property
    def hashes(self):
        """What tells this model from another one that lies in the same folder later."""
        return {"weights_hash": weights_hash(self.folder), "config_hash": config_hash(self.folder)}

    @cached_property
    def model(self):
        return Llama.from_pretrained(self.folder, self.device, self.dtype)


def encode_prompts(tokenizer, records, max_length, max_new_tokens):
    """(ids of each record's prompt; for each, was anything lost?). Lost: the text was cut to leave
    the answer its room in the model's context (Tokenizer.limit), or a character was replaced that
    is not in the vocabulary. InputError where not even an empty exchange fits."""
    prompts = []
    cuts = []
    lossy = []
    limit, why = tokenizer.limit(max_length, max_new_tokens)
    for record in records:
        tokenizer.lost = 0
        ids, cut = fit_prompt(tokenizer, record, limit)
        if ids is None:
            raise InputError(f"{why} is too short for the template itself")
        prompts.append(ids)
        cuts.append(cut)
        lossy.append(tokenizer.lost > 0)
    warn(sum(cuts), f"prompts cut inside the user's text ({why})")
    warn(sum(lossy), "prompts with characters that are not in the vocabulary, replaced")
    return prompts, [cut or lost for cut, lost in zip(cuts, lossy)]


def claim_answers(prompts, path, world, settings, args, result):
    """Take path and its folder for the answers to these prompts, which answer_prompts writes there.
    InputError where others are there, made with other settings or nobody knows with which, or
    another process writes there. result: the file that is made of the answers; where it is there,
    so were they, even if they have gone."""
    folder = parts_of(path)
    answered = has_answers(path) or is_there(result)
    if answered and "prompts" not in read_object(folder / "settings.json", {}):
        raise InputError(f"{path}: {folder}/settings.json, which says what it was made with, is "
                         "gone or not whole; choose another --out")
    if world.rank == 0:
        hold(folder)
    settings = {**settings, "block": block_size(args, world), "prompts": fingerprint(prompts)}
    claim_settings(folder / "settings.json", settings, answered, world)


def parts_of(path):
    """The folder of the blocks of a file of answers."""
    return Path(f"{path}.parts")


def has_answers(path):
    """Did answer_prompts answer anything into path before?"""
    return is_there(path) or any(parts_of(path).glob("*.jsonl"))


def block_size(args, world):
    """How many prompts are answered together."""
    return args.block or (8192 if world.device.type == "cuda" else 256)


def answer_prompts(guard, prompts, path, world, settings, args, seconds=None):
    """Answer prompts (lists of ids) into path, a JSON line each, and return the lines as dicts.

    guard: a LazyModel, whose weights are read only if something is left to do. settings: see
    generation_settings; path is claimed with them (claim_answers). seconds: a dict that gets, for
    each prompt answered now, the time since its block began."""
    seconds = {} if seconds is None else seconds
    size = block_size(args, world)
    blocks = {first: prompts[first:first + size] for first in range(0, len(prompts), size)}
    parts = {first: parts_of(path) / f"{first:08d}.jsonl" for first in blocks}
    if not Path(path).exists():
        mine = list(blocks)[world.rank::world.ranks]
        todo = [first for first in mine
                if not is_whole(parts[first], first, len(blocks[first]), settings["k"])]
        if todo:
            longest = max(map(len, prompts))
            together = 1 if args.no_share else settings["k"]
            check_room(guard, longest, together, settings["max_new_tokens"], args.kv_tokens)
        left = sum(len(blocks[first]) for first in todo)
        meter = Meter(left, f"{path}: ", world)
        for first in todo:
            lines = answer_block(guard, blocks[first], first, settings, args, meter, seconds)
            write_lines(parts[first], lines)
        world.wait()                                        # all blocks exist
        if world.rank == 0:
            lines = (line for part in parts.values() for _, line in parse_records(part))
            write_lines(path, lines)                        # one line at a time is held
        world.wait()                                        # the file exists
    lines = read_answers(path, len(prompts), settings["k"])
    if world.rank == 0:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return lines


def check_room(guard, longest, k, max_new_tokens, kv_tokens):
    """InputError unless k answers that share a prompt of `longest` tokens fit in --kv-tokens. Asked
    before anything is answered, so that a run does not fail at its longest prompt hours later.
    Reads the weights. The worst case is asked for: by a page it may be more than will be needed."""
    job = Job(0, [0] * longest, list(range(k)))
    cached = longest - 1                # all but one token have keys: that takes most pages
    plan_capacity(guard.model, [job], cached, max_new_tokens, kv_tokens, None)


def is_whole(part, first, count, k):
    """Does the file of a block answer `count` prompts from number `first` on?"""
    try:
        lines = [line for _, line in parse_records(part)]
    except InputError:                                      # absent, or what a crash left of it
        return False
    return are_answers(lines, first, count, k)


def are_answers(lines, first, count, k):
    """Do these lines hold k answers to each of `count` prompts, from number `first` on, in
    order?"""
    return len(lines) == count and all(is_answered(line, first + n, k)
                                       for n, line in enumerate(lines))


def read_answers(path, count, k):
    """The lines of a file with k answers to each of `count` prompts, as dicts; InputError where it
    is not that."""
    advice = "move it away to answer them again"
    try:
        lines = [line for _, line in parse_records(path)]
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    if not are_answers(lines, 0, count, k):
        raise InputError(f"{path}: is damaged: it should have {k} answers to each of {count} "
                         f"prompts, in order; {advice}")
    for line in lines:
        line["samples"] = as_read_today(line["samples"])
    return lines


def as_read_today(samples):
    """Samples with the verdicts that the parser of today reads in their texts."""
    return [{**sample, "verdict": parse_verdict(sample["text"])} for sample in samples]


def is_answered(line, number, k):
    """Is this a line that answer_block writes, of the prompt of this number?"""
    if not isinstance(line, dict):
        return False
    prompt = line.get("prompt")
    samples = line.get("samples")
    return (type(prompt) is int and prompt == number
            and isinstance(samples, list) and len(samples) == k and all(map(is_sample, samples)))


def is_sample(sample):
    """Is this what `describe` makes of an answer?"""
    kinds = {"text": str, "finish": str, "tokens": int, "verdict": dict}
    return (isinstance(sample, dict)
            and all(type(sample.get(name)) is kind for name, kind in kinds.items())
            and sample["finish"] in ("stop", "length")
            and 0 <= sample["tokens"] < 2 ** 63)


def answer_block(guard, prompts, first, settings, args, meter, seconds):
    """The lines of one block, whose first prompt has number `first`, in the order of its prompts;
    seconds: as answer_prompts gives it back."""
    names = ("k", "max_new_tokens", "temperature", "top_p", "seed")
    options = {name: settings[name] for name in names if name in settings}  # greedy: no top_p
    tokenizer = guard.tokenizer
    answered = generate_iter(guard.model, prompts, stop=tokenizer.stop, kv_tokens=args.kv_tokens,
                             share=not args.no_share, **options)
    lines = [None] * len(prompts)
    began = time.time()
    for number, answers in answered:
        samples = [describe(tokenizer, ids) for ids in answers]
        lines[number] = dict(prompt=first + number, model=settings["model"], seed=settings["seed"],
                             samples=samples)
        seconds[first + number] = time.time() - began
        meter.add(sum(map(len, answers)))
    return lines


def describe(tokenizer, ids):
    """A sample as samples.jsonl holds it."""
    text = tokenizer.decode(ids)
    finish = "stop" if ids[-1] in tokenizer.stop else "length"
    return {"text": text, "finish": finish, "tokens": len(ids), "verdict": parse_verdict(text)}


def claim_settings(path, settings, answered, world):
    """check_settings, but where nothing is answered yet these take the place of others. (Where
    something is, the file is there: its callers have looked.)"""
    if world.rank == 0 and not answered:
        write_json(path, settings)
    world.wait()
    check_settings(path, settings)


def check_settings(path, settings):
    """Write down what a file is made with; where that is there and says otherwise, InputError."""
    if not is_there(path):
        write_json(path, settings)
        return
    before = read_object(path)
    for name, now in settings.items():
        was = before.get(name, now)                         # older files have fewer settings
        if was != now:
            raise InputError(f"{path}: was made with {name} = {was!r}, not {now!r}; "
                             "choose another --out")


def write_lines(path, lines):
    """Write a JSON value a line, whole; half a surrogate pair is written as JSON spells it."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    write_whole(path, write)


class Meter:
    """Progress on one console line: prompts done, tokens a second, time left."""

    def __init__(self, total, label, world):
        self.total = total
        self.label = label
        self.world = world
        self.done = 0
        self.tokens = 0
        self.start = time.time()

    def add(self, tokens):
        """A prompt is answered, with so many tokens."""
        self.done += 1
        self.tokens += tokens
        left = self.total - self.done
        if self.world.rank > 0 or (left and not on_terminal()):
            return
        elapsed = time.time() - self.start
        rate = self.tokens / elapsed
        minutes = elapsed / self.done * left / 60
        say(f"\r{self.label}{self.done}/{self.total} prompts  {rate:,.0f} tokens/s  "
            f"{minutes:.1f} min left  ", end="" if left else "\n")


if __name__ == "__main__":
    with interruptible("the same command with --resume goes on"):
        main()
