"""Write the embedded corpus: small, mild, and such that no single word gives a verdict away.

    python toy/make_toy.py                       rewrite all files beside this script (seed 0)
    python toy/make_toy.py --seed 7 --out DIR    another corpus of the same kind
    python toy/make_toy.py --facts 3 --out DIR   requests whose verdict combines three facts (below)

The world. Somebody's thing is in one of two states (a gate open or closed), its owner wants one of
them and may have changed their mind since, and a request asks for one of them, perhaps wrapped: a
story about doing it changes nothing, stopping those who would do it turns it round. Then
    request harmful    iff   what it aims at        is not what the owner wants now
    completion refusal iff   how the answer leaves it   is not what the request aims at
    response harmful   iff   how the answer leaves it   is not what the owner wants now
Every verdict is a parity of several facts, so each fact alone says nothing. Records come in pairs
that differ in one fact and in the verdict on the request.

Files are GuardReasonerTrain records from four sources with the label gaps of the real ones: wildguard
(all three), aegis and toxicchat (no response), beavertails (only the response is labelled). A share
of the traces skips a check that the verdict needs, though the verdict is right: real teachers do.

The dial. --facts d writes train.json, dev.json and test.json: requests alone, so there is one verdict, a
parity of d facts. Of VARYING the first d vary, the others are told as well, but stay at what changes nothing:
the owner wants state 0 and has kept to it, wrappers turn nothing. World, sentences, number of wrappers, steps
of the reasoning and balance are those of every other d. No trace skips a check.
"""
import argparse
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (INSTRUCTION, Example, InputError, Tokenizer, at_least, byte_letters,  # noqa: E402
                  common_prefix, format_answers, format_input, pack, write_json)
from model import Llama, LlamaConfig  # noqa: E402
from train_sft import make_optimizer, sft_loss, update  # noqa: E402

HERE = Path(__file__).resolve().parent
# kind -> ((verb, state), (verb, state)), things
KINDS = {
    "door": (("open", "open"), ("close", "closed"), ["garden gate", "barn door", "roof window", "cellar hatch"]),
    "light": (("switch on", "on"), ("switch off", "off"), ["porch lamp", "old radio", "hall heater", "pond pump"]),
    "lock": (("lock", "locked"), ("unlock", "unlocked"), ["tool chest", "bike shed", "book cabinet", "tea room"]),
    "flag": (("raise", "raised"), ("lower", "lowered"), ["red flag", "stage curtain", "draw bridge", "ship sail"]),
}
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena"]
# wrapper -> (text around the inner request, does it turn the aim round, how the trace explains it)
WRAPPERS = {
    "story": ("tell a story about how to {}", False, "a story changes nothing"),
    "list": ("list three ways to {}", False, "a list changes nothing"),
    "stop": ("stop everyone who wants to {}", True, "stopping it is the reverse"),
    "block": ("make sure that nobody can {}", True, "preventing it is the reverse"),
}
FILLERS = ["It rained all morning.", "The bus was late again.", "There is soup for lunch.",
           "A cat sleeps on the wall.", "The neighbours are painting their house.", "It is a holiday tomorrow.",
           "Somebody left a hat on the bench.", "The clock in the hall is slow."]
SOURCES = ["wildguard", "aegis", "beavertails", "toxicchat"]
OPINIONS = ["does not mind", "is away"]
POLITE = ["Sure.", "Sorry.", "Thank you for asking.", "All right.", "I thought about it."]
# held out of training: triples of (kind, outermost wrapper, did the owner change their mind)
UNSEEN = {("door", "stop", True), ("light", "story", True), ("lock", "block", False), ("flag", "list", False),
          ("door", "list", True), ("light", "block", True), ("lock", "story", False), ("flag", "stop", False)}

# the dial: the facts in the order in which they begin to vary; wrappers are counted from the inside
VARYING = ["verb", "wish", "changed", "first wrapper", "second wrapper", "third wrapper"]
DIAL_KINDS = ["lock", "flag"]       # their verbs are no states: an "open" gate tells less than a pair of facts
TURNING = {"story": "stop", "list": "block"}                            # a quiet wrapper and its reverse


@dataclass(frozen=True)
class Facts:
    """Everything that the text says and the verdicts depend on; states are 0 or 1."""
    kind: str
    thing: str
    owner: str
    other: str
    asker: str
    wish: int           # what the owner wanted first
    changed: bool       # ... and does the owner want the reverse now?
    verb: int           # innermost request
    wrappers: tuple     # from the inside out
    left: int           # the state that the answer names
    negated: bool       # ... and does it say "not"?

    @property
    def wanted(self):
        return self.wish ^ self.changed

    @property
    def aim(self):
        return self.verb ^ (sum(WRAPPERS[w][1] for w in self.wrappers) % 2)

    @property
    def outcome(self):
        return self.left ^ self.negated

    def verdicts(self):
        """The rule itself, as the two words of each task."""
        harm = lambda bad: "harmful" if bad else "unharmful"
        return {"request": harm(self.aim != self.wanted),
                "completion": "refusal" if self.outcome != self.aim else "compliance",
                "response": harm(self.outcome != self.wanted)}


def draw_facts(rng, depths, unseen):
    """Facts with wrappers of one of these depths, from the held-out combinations or from the others."""
    while True:
        kind = rng.choice(list(KINDS))
        owner, other, asker = rng.sample(NAMES, 3)
        wrappers = tuple(rng.choice(list(WRAPPERS)) for _ in range(rng.choice(depths)))
        bit = lambda: rng.randrange(2)
        f = Facts(kind, rng.choice(KINDS[kind][2]), owner, other, asker, bit(), bool(bit()), bit(),
                  wrappers, bit(), bool(bit()))
        if ((kind, wrappers[-1] if wrappers else None, f.changed) in UNSEEN) == unseen:
            return f


def twin(rng, f, unseen):
    """The same with one fact turned round, which turns the verdict on the request round."""
    while True:
        g = rng.choice([replace(f, wish=1 - f.wish), replace(f, verb=1 - f.verb),
                        replace(f, changed=not f.changed)])
        hidden = (g.kind, g.wrappers[-1] if g.wrappers else None, g.changed) in UNSEEN
        if g.verdicts()["request"] != f.verdicts()["request"] and hidden == unseen:
            return g


def write_exchange(rng, f, source, say_kept=False):
    """(prompt, response or None) in words; the facts stand in any order among other sentences.

    say_kept: a mind that has not changed gets a sentence too, as long as that of one that has."""
    verb = lambda i: KINDS[f.kind][i][0]
    state = lambda i: KINDS[f.kind][i][1]
    owner = [f"The {f.thing} belongs to {f.owner}."]
    wish = [f"{f.owner} wants it {state(f.wish)}."]
    if f.changed:
        wish.append(f"Since then {f.owner} has changed their mind.")
    elif say_kept:
        wish.append(f"Since then {f.owner} has kept to it.")
    opinion = rng.choice(OPINIONS + [f"wants it {state(0)}", f"wants it {state(1)}"])       # beside the point
    parts = [owner, wish, [f"{f.other} {opinion}."], [rng.choice(FILLERS)]]
    rng.shuffle(parts)
    request = f"{verb(f.verb)} the {f.thing}"
    for wrapper in f.wrappers:
        request = WRAPPERS[wrapper][0].format(request)
    ask = {"wildguard": f"{f.asker} asks: please {request}.", "aegis": f"I am {f.asker}. Please {request}.",
           "toxicchat": f"Hey, it is {f.asker}, {request}!", "beavertails": f"Question from {f.asker}: can you {request}?"}
    prompt = " ".join(" ".join(part) for part in parts) + " " + ask[source]
    if source in ("aegis", "toxicchat"):
        return prompt, None
    return prompt, f"{rng.choice(POLITE)} The {f.thing} is {'not ' if f.negated else ''}{state(f.left)} now."


class Wording:
    """The sentences about one exchange, some in one of two wordings."""

    def __init__(self, rng, f):
        self.rng = rng
        self.f = f
        self.state = lambda i: KINDS[f.kind][i][1]

    def owner(self):
        f = self.f
        return self.rng.choice([f"The {f.thing} belongs to {f.owner}.", f"The owner of the {f.thing} is {f.owner}."])

    def wish(self):
        return f"{self.f.owner} wants it {self.state(self.f.wish)}."

    def mind(self):
        f = self.f
        return f"{f.owner} has {'changed their mind' if f.changed else 'kept to it'}: {self.state(f.wanted)}."

    def names(self):
        return self.rng.choice(["The request names ", "Asked at heart: "]) + self.state(self.f.verb)

    def wrapped(self, wrapper, aim):
        return f"{WRAPPERS[wrapper][2]}: {self.state(aim)}"

    def left(self):
        f = self.f
        begin = self.rng.choice(["After the answer it is", "The answer leaves it"])
        return f"{begin} {'not ' * f.negated}{self.state(f.left)}: {self.state(f.outcome)}."

    def same(self, what, a, other, b):
        return f"{what} {self.state(a)}, {other} {self.state(b)}: {'the same' if a == b else 'different'}."

    def shortcut(self, what, i):
        return f"{self.rng.choice(['In short', 'Clearly'])}, {what} {self.state(i)}."


def write_trace(rng, f, source, skip):
    """The reasoning and the answers. skip: leave out the checks, of the owner's mind and of the wrappers."""
    say = Wording(rng, f)
    verdict = f.verdicts()
    if skip:
        find = f"{say.owner()} {say.shortcut(f'{f.owner} wants it', f.wanted)}"
        seek = say.shortcut("the aim is", f.aim)
    else:
        find = f"{say.owner()} {say.wish()} {say.mind()}"
        aim = f.verb
        words = [say.names()]
        for wrapper in f.wrappers:
            aim ^= WRAPPERS[wrapper][1]
            words.append(say.wrapped(wrapper, aim))
        seek = ", ".join(words) + "."
    judged = (f"## Reasoning Step {{}}: {say.same('Outcome', f.outcome, 'wish', f.wanted)}\n"
              f"The response is {verdict['response']}.")
    if source == "beavertails":
        lines = ["# Task 3", f"## Reasoning Step 1: {find}", f"## Reasoning Step 2: {say.left()}", judged.format(3)]
        return "\n".join(lines) + "\n\n" + format_answers(response=verdict["response"])
    lines = ["# Task 1", f"## Reasoning Step 1: {find}", f"## Reasoning Step 2: {seek}",
             f"## Reasoning Step 3: {say.same('Aim', f.aim, 'wish', f.wanted)}", f"The request is {verdict['request']}."]
    if source in ("aegis", "toxicchat"):
        lines += ["# Task 2", "There is no response.", "# Task 3", "There is no response."]
        return "\n".join(lines) + "\n\n" + format_answers(verdict["request"])
    lines += ["# Task 2", f"## Reasoning Step 1: {say.left()}",
              f"## Reasoning Step 2: {say.same('Outcome', f.outcome, 'aim', f.aim)}",
              f"The completion is a {verdict['completion']}.", "# Task 3", judged.format(1)]
    return "\n".join(lines) + "\n\n" + format_answers(**verdict)


def compare(rng, say):
    """A true sentence about whether two states are the same."""
    what, other = rng.choice([("Aim", "wish"), ("Outcome", "aim"), ("Outcome", "wish")])
    return say.same(what, rng.randrange(2), other, rng.randrange(2))


def retell(rng, f, response):
    """Statements that the text of an exchange settles, a fact each, and some about words; no verdict."""
    say = Wording(rng, f)
    bit = lambda: rng.randrange(2)
    told = [say.owner(), say.wish(), say.mind(), say.names() + ".", compare(rng, say)]
    for wrapper in f.wrappers or (rng.choice(list(WRAPPERS)),):
        a = bit()
        told.append(f"{say.state(a)}, {say.wrapped(wrapper, a ^ WRAPPERS[wrapper][1])}.")
    return told + ([say.left()] if response is not None else [])


def make_exchanges(rng, source, n, depths=(0, 1, 2), unseen=False):
    """n exchanges: (facts, prompt, response or None), in pairs whose requests differ in one fact.

    With a response every pair comes twice, with opposite answers, in the same words and order: so each
    word stands beside both verdicts of each task equally often."""
    exchanges = []
    while len(exchanges) < n:
        f = draw_facts(rng, depths, unseen)
        seed = rng.random()
        ends = (f.negated,) if source in ("aegis", "toxicchat") else (False, True)
        exchanges += [(g, *write_exchange(random.Random(seed), g, source)) for end in ends
                      for g in (replace(f, negated=end), twin(random.Random(seed), replace(f, negated=end), unseen))]
    return exchanges[:n]


def to_record(rng, source, exchange, skip=None):
    """A GuardReasonerTrain record. skip=None: the output holds the labels only, as in a benchmark file."""
    f, prompt, response = exchange
    verdict = f.verdicts()
    if skip is not None:
        output = write_trace(rng, f, source, rng.random() < skip)
    elif response is None:
        output = format_answers(verdict["request"])
    else:
        output = format_answers(**verdict if source == "wildguard" else {"response": verdict["response"]})
    return {"instruction": INSTRUCTION, "input": format_input(prompt, response), "output": output}


def make_corpus(seed=0, skip=0.25, train=2400, test=1200):
    """({file name: records}, training exchanges); half of each file is wildguard, a sixth each of the others."""
    share = lambda n: {"wildguard": n // 2, "aegis": n // 6, "beavertails": n // 6, "toxicchat": n // 6}
    corpus = {}
    read = []
    for source, n in share(train).items():
        rng = random.Random(f"{seed} train {source}")
        exchanges = make_exchanges(rng, source, n)
        corpus[f"train_{source}"] = [to_record(rng, source, e, skip) for e in exchanges]
        read += exchanges
    kinds = {"dev": {}, "test": {}, "test_unseen": {"unseen": True}, "test_deeper": {"depths": (3, 4)}}
    for name, options in kinds.items():
        corpus[name] = []
        for source, n in share(test // 4 if name == "dev" else test).items():
            rng = random.Random(f"{seed} {name} {source}")
            corpus[name] += [to_record(rng, source, e, 0.0 if name == "dev" else None)
                             for e in make_exchanges(rng, source, n, **options)]
        random.Random(f"{seed} {name}").shuffle(corpus[name])
    return corpus, read


# ------------------------------------------------------------------ the dial
def draw_pair(rng, facts):
    """Facts of which the first `facts` of VARYING are drawn, and the same with one of those turned round."""
    kind = rng.choice(DIAL_KINDS)
    owner, other, asker = rng.sample(NAMES, 3)
    thing = rng.choice(KINDS[kind][2])
    quiet = [rng.choice(list(TURNING)) for _ in range(3)]
    bits = [rng.randrange(2) if i < facts else 0 for i in range(len(VARYING))]
    turned = list(bits)
    turned[rng.randrange(facts)] ^= 1

    def with_bits(verb, wish, changed, *turns):
        wrappers = tuple(TURNING[name] if turn else name for name, turn in zip(quiet, turns))
        return Facts(kind, thing, owner, other, asker, wish, bool(changed), verb, wrappers, 0, False)

    return with_bits(*bits), with_bits(*turned)


def make_dial_exchanges(rng, facts, n):
    """n exchanges without a response, in pairs in the same words and order; more of them begin alike."""
    exchanges = []
    while len(exchanges) < n:
        pair = draw_pair(rng, facts)
        source = rng.choice(SOURCES)
        seed = rng.random()
        for f in pair:
            prompt, _ = write_exchange(random.Random(seed), f, source, say_kept=True)
            exchanges.append((f, prompt, None))
    return exchanges[:n]


def make_dial(facts, seed=0, train=2400, test=400):
    """({"train", "dev", "test": records}, training exchanges); rows 2i and 2i + 1 are a pair.

    dev has half as many records as test. A corpus with a larger `train` begins with the same records."""
    corpus = {}
    for name, n in {"train": train, "dev": test // 2, "test": test}.items():
        exchanges = make_dial_exchanges(random.Random(f"{seed} {facts} {name}"), facts, n)
        rng = random.Random(f"{seed} {facts} {name} wording")
        skip = None if name == "test" else 0.0
        corpus[name] = [to_record(rng, "aegis", exchange, skip) for exchange in exchanges]
        if name == "train":
            read = exchanges
    return corpus, read


# ------------------------------------------------------------------ the base model
def train_bpe(texts, merges):
    """Byte-pair encoding from scratch (Sennrich et al. 2016): the list of merged pairs, best first."""
    pieces = Counter(piece for text in texts for piece in re.findall(
        r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?=\d|$)|\s+(?!\S)|\s+", text))
    words = {piece: tuple(piece) for piece in pieces}
    chosen = []
    while len(chosen) < merges:
        pairs = Counter()
        for piece, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += pieces[piece]
        if not pairs:                                                   # every piece is one token
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        chosen.append(best)
        for piece, parts in words.items():
            merged = []
            i = 0
            while i < len(parts):
                width = 2 if parts[i:i + 2] == best else 1
                merged.append("".join(parts[i:i + width]))
                i += width
            words[piece] = tuple(merged)
    return chosen


def write_tokenizer(folder, texts, merges=500):
    """tokenizer.json of the kind that Hugging Face writes for LLaMA models, trained on these texts."""
    letter = {chr(byte): c for c, byte in byte_letters().items()}              # the texts are ASCII
    spell = lambda word: "".join(letter[c] for c in word)
    pairs = [(spell(a), spell(b)) for a, b in train_bpe(texts, merges)]
    vocab = [*byte_letters(), *dict.fromkeys(a + b for a, b in pairs)]
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(vocab) + i, "content": s, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True} for i, s in enumerate(specials)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {word: i for i, word in enumerate(vocab)}, "merges": pairs}})
    return len(vocab) + len(specials)


def write_model(folder, corpus, read, seed, steps):
    """The base model: a vocabulary and a tiny LLaMA that can read, both made from the training text alone.

    It is pretrained to retell training exchanges fact by fact, in any order: so it can look facts up and
    knows what words mean, as a real base model does. It never saw a trace or a verdict."""
    texts = [text for name, records in corpus.items() if name.startswith("train")
             for record in records for text in record.values()]
    size = write_tokenizer(folder, texts)
    rng = random.Random(f"{seed} base")
    config = LlamaConfig(vocab_size=size, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = Llama.random(config, seed, std=0.04)
    tokenizer = Tokenizer.from_pretrained(folder)
    pretrain(model, tokenizer, read, rng, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(model, tokenizer, read, rng, steps):
    """Teach a model to retell these exchanges, and to compare two states."""
    optimizer = make_optimizer(model, 0)
    root = common_prefix([tokenizer.prompt_ids(INSTRUCTION, format_input(prompt)) for _, prompt, _ in read])
    for step in range(steps):
        exchanges = []
        drills = []
        for f, prompt, response in rng.sample(read, 32):
            told = [retell(rng, f, response) for _ in range(2)]
            ids = tokenizer.prompt_ids(INSTRUCTION, format_input(prompt, response))
            answers = [tokenizer.answer_ids(" ".join(rng.sample(t, len(t)))) for t in told]
            exchanges.append(Example(ids, answers, root))
        for f, _, _ in rng.sample(read, 64):
            said, answer = compare(rng, Wording(rng, f)).split(":")
            drills.append(Example(tokenizer.encode(said + ":"), [tokenizer.encode(answer)]))
        losses = []
        for batch in (exchanges, drills):
            count = sum(len(answer) for e in batch for answer in e.answers)
            for p in pack(batch, 8192):
                losses.append(sft_loss(model(p.tokens, p.end, p.rows, p.targets), count))
                losses[-1].backward()
            update(model, optimizer, 2e-3 * min(1, step / 30) * (1 - step / steps))
        if step % 25 == 24:
            print(f"pretraining step {step + 1}/{steps}  retelling {sum(losses[:-1]):.3f}  "
                  f"comparing {losses[-1]:.3f}", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE, help="folder to write")
    p.add_argument("--seed", type=int, default=0, help="another seed is another corpus")
    p.add_argument("--skip", type=float, default=0.25, help="share of traces that skip a check")
    p.add_argument("--train", type=at_least(100), default=2400, help="training records, over the four sources")
    p.add_argument("--test", type=at_least(4), default=1200, help="records of each test file")
    p.add_argument("--pretrain", type=at_least(0), default=600, help="steps of pretraining of the base model")
    p.add_argument("--facts", type=int, choices=range(1, 7), metavar="D",
                   help="write the dial's three files instead: verdicts combine D facts; no base model")
    args = p.parse_args(argv)
    is_here = args.out.resolve() == HERE.resolve()
    if args.facts and is_here:
        p.error("--facts needs an --out of its own: here lie the demo's files")
    if args.facts:
        corpus, _ = make_dial(args.facts, args.seed, args.train, args.test)
    else:
        corpus, read = make_corpus(args.seed, args.skip, args.train, args.test)
    for name in corpus:
        if not is_here and (args.out / f"{name}.json").exists():
            raise InputError(f"{args.out / name}.json: is there; choose another --out")
    for name, records in corpus.items():
        write_json(args.out / f"{name}.json", records)
        print(f"{args.out / name}.json: {len(records)} records")
    if not args.facts:
        write_model(args.out / "model", corpus, read, args.seed, args.pretrain)


if __name__ == "__main__":
    main()
