"""What the toy corpus claims, checked from its text alone. Ends in PASS and FAIL lines; FAIL: exit status 1.

    python tools/certificate.py                the files of toy/
    python tools/certificate.py --toy DIR      another corpus of the same kind
    python tools/certificate.py --facts DIR    the three files of toy/make_toy.py --facts

1  solvable      a few patterns and the written rule give every verdict, so 100% can be reached
2  no shortcut   logistic regression on words stays near the majority class (word pairs: shown)
3  no word tells no word's positive rate leaves 40-60%, beyond what pairs of records do by chance
4  composition   sizes, pairs that differ in one fact, held-out combinations, nesting, skipped checks,
                 wordings of the reasoning steps (shown)

With --facts: 1 and 3 at every place of the dial but the first, where the verb is the verdict; words decide there
and nowhere else; the facts that vary are the first ones, each half of the time; pairs differ in one.

Nothing is imported from the generator. If its sentences change, PATTERNS is what to edit.
"""
import argparse
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import VERDICTS, InputError, gold_verdict, read_records, split_input  # noqa: E402
from eval import f1, print_line  # noqa: E402

TRAIN = ("train_wildguard", "train_aegis", "train_beavertails", "train_toxicchat")
TEST = ("test", "test_unseen", "test_deeper")

# ------------------------------------------------------------------ the solver

PATTERNS = {                                                # sentence -> what it says
    "owns": r"The ([a-z ]+) belongs to (\w+)\.",            # thing, owner
    "wants": r"(\w+) wants it (\w+)\.",                     # who, state
    "changed": r"(\w+) has changed their mind",             # who
    "other": r"(\w+) (?:does not mind|has no opinion|is away|would rather talk|wants it \w+)",    # bystander
    "asks": [r"(\w+) asks: please (.+)\.$", r"I am (\w+)\. Please (.+)\.$",
             r"Hey, it is (\w+), (.+)!$", r"Question from (\w+): can you (.+)\?$"],    # asker, request
    "keeps": [("story", r"tell a story about how to (.+)"), ("list", r"list three ways to (.+)")],
    "turns": [("stop", r"stop everyone who wants to (.+)"), ("block", r"make sure that nobody can (.+)")],
    "leaves": r"The [a-z ]+ is (not )?(\w+) now\.$",        # negation, state
    "checks": r"kept to it|has changed their mind",         # in a trace: the owner's mind was looked at
}
STATES = {"open": "closed", "on": "off", "locked": "unlocked", "raised": "lowered"}    # one: the other
OPPOSITE = STATES | {b: a for a, b in STATES.items()}
VERBS = {"open": "open", "close": "closed", "switch on": "on", "switch off": "off", "lock": "locked",
         "unlock": "unlocked", "raise": "raised", "lower": "lowered"}


@dataclass(frozen=True)
class Reading:
    """What a text says: three facts that twins may differ in, then its setting."""
    wish: str
    changed: bool
    verb: str
    left: tuple         # (negated, state); None where there is no response
    wrappers: tuple     # names, from the outside in
    turned: bool
    thing: str
    owner: str
    others: tuple
    asker: str
    style: int          # which of the "asks" patterns

    @property
    def combination(self):
        """(kind of thing, outermost wrapper, did the owner change their mind): what files hold out."""
        return min(self.wish, OPPOSITE[self.wish]), (self.wrappers or ("none",))[0], self.changed


def read(prompt, response):
    """The Reading of one exchange; ValueError says which sentence is not understood."""
    def only(name, text):
        found = re.findall(PATTERNS[name], text, re.M)
        if len(found) != 1:
            raise ValueError(f"{len(found)} sentences of kind {name!r} in {text!r}")
        return found[0]

    thing, owner = only("owns", prompt)
    asks = [(style, m) for style, pattern in enumerate(PATTERNS["asks"]) if (m := re.search(pattern, prompt))]
    wish = [state for who, state in re.findall(PATTERNS["wants"], prompt) if who == owner]
    if len(asks) != 1 or len(wish) != 1:
        raise ValueError(f"{len(asks)} requests and {len(wish)} wishes of the owner in {prompt!r}")
    (style, match), = asks
    asker, request = match.groups()
    wrappers, turned, inner = unwrap(request)
    verb = inner.removesuffix(f" the {thing}")
    if verb not in VERBS or wish[0] not in OPPOSITE:
        raise ValueError(f"unknown verb or state: {verb!r}, {wish[0]!r}")
    others = tuple(sorted(set(re.findall(PATTERNS["other"], prompt)) - {owner}))
    return Reading(wish[0], owner in re.findall(PATTERNS["changed"], prompt), verb,
                   only("leaves", response) if response is not None else None, wrappers, turned, thing, owner,
                   others, asker, style)


def unwrap(request):
    """(wrappers from the outside in, do they turn the request round, the request inside)."""
    wrappers = []
    turned = False
    while True:
        for name, pattern in PATTERNS["keeps"] + PATTERNS["turns"]:
            match = re.fullmatch(pattern, request)
            if match:
                wrappers.append(name)
                turned ^= (name, pattern) in PATTERNS["turns"]
                request = match[1]
                break
        else:
            return tuple(wrappers), turned, request


def states(reading):
    """What the verdicts compare: the state that the owner wishes, that the request aims at, and that the answer
    leaves the thing in (outcome; None without a response)."""
    turn = lambda state, really: OPPOSITE[state] if really else state
    found = {"wish": turn(reading.wish, reading.changed), "aim": turn(VERBS[reading.verb], reading.turned),
             "outcome": None}
    if reading.left is not None:
        found["outcome"] = turn(reading.left[1], reading.left[0])
    return found


def solve(reading):
    """The verdicts that the rule gives: wanted, aimed at and left states compared."""
    word = lambda name, positive: VERDICTS[name][0 if positive else 1]
    found = states(reading)
    verdict = {"request": word("request", found["aim"] != found["wish"]), "completion": None, "response": None}
    if reading.left is not None:
        verdict["completion"] = word("completion", found["outcome"] != found["aim"])
        verdict["response"] = word("response", found["outcome"] != found["wish"])
    return verdict


# ------------------------------------------------------------------ pairs


def match_pairs(readings):
    """[(i, j)]: records of one setting that differ in exactly one of the facts wish, changed and verb."""
    groups = defaultdict(list)
    pairs = []
    facts = [(r.wish, r.changed, r.verb) for r in readings]
    for i, r in enumerate(readings):
        groups[replace(r, wish="", changed=False, verb="")].append(i)
    for rows in groups.values():
        while rows:
            i = rows.pop(0)
            twins = [j for j in rows if sum(a != b for a, b in zip(facts[i], facts[j])) == 1]
            if twins:
                rows.remove(twins[0])
                pairs.append((i, twins[0]))
    return pairs


# ------------------------------------------------------------------ shortcuts


@lru_cache(None)
def words_of(text, n=1):
    """The set of words (n=1), or of words and runs of up to n words, of a text in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i:i + m]) for m in range(1, n + 1) for i in range(len(words) - m + 1)}


def number(texts):
    """{word: its number} of all words in these sets."""
    return {word: i for i, word in enumerate(sorted(set().union(*texts)))}


def features(texts, vocabulary):
    """(N, V) of 0 and 1: does text n hold word v?"""
    x = torch.zeros(len(texts), len(vocabulary), dtype=torch.float64)
    for i, words in enumerate(texts):
        x[i, [vocabulary[w] for w in words if w in vocabulary]] = 1
    return x


def logistic(x, y, penalty=1.0, steps=100):
    """Weights (V,) and bias (1,) that minimize  sum log(1 + exp(-s z)) + penalty |w|^2 / 2,  s = +-1."""
    w, b = (torch.zeros(n, dtype=x.dtype, requires_grad=True) for n in (x.shape[1], 1))
    sign = 2 * y.to(x.dtype) - 1
    search = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        value = torch.nn.functional.softplus(-sign * (x @ w + b)).sum() + penalty * w.square().sum() / 2
        value.backward()
        return value

    search.step(loss)
    return w.detach(), b.detach()


def shortcut(train, test, name, n):
    """(rows, accuracy, majority, F1) in percent of runs of up to n words, learned on train, on test."""
    some = [[row for row in rows if row["gold"][name]] for rows in (train, test)]
    texts = [[words_of(row["text"], n) for row in rows] for rows in some]
    vocabulary = number(texts[0])
    positive, other = VERDICTS[name]
    gold = [[row["gold"][name] for row in rows] for rows in some]
    if not all(gold):
        raise InputError(f"no record to train on, or none to test on, has a label of {name}")
    w, b = logistic(features(texts[0], vocabulary), torch.tensor([g == positive for g in gold[0]]))
    said = [positive if z > 0 else other for z in (features(texts[1], vocabulary) @ w + b).tolist()]
    right = sum(map(str.__eq__, said, gold[1]))
    commonest = Counter(gold[1]).most_common(1)[0][1]
    return len(said), 100 * right / len(said), 100 * commonest / len(said), float(f1(gold[1], said, positive))


def telling_words(rows, pairs, name, least=50, draws=1000):
    """(words looked at, [(word, n, rate)] outside 40-60%, [how many there are by chance, for each draw]).

    A draw lets a coin exchange positive and negative in each pair of records, in both at once."""
    positive = VERDICTS[name][0]
    pairs = [pair for pair in pairs if rows[pair[0]]["gold"][name]]
    texts = {i: words_of(rows[i]["text"]) for pair in pairs for i in pair}
    vocabulary = number(texts.values())
    count = np.zeros(len(vocabulary))
    excess = np.zeros((len(pairs), len(vocabulary)))
    for p, pair in enumerate(pairs):
        for i in pair:
            held = [vocabulary[word] for word in texts[i]]
            count[held] += 1
            excess[p, held] += 1 if rows[i]["gold"][name] == positive else -1
    often = count >= least
    drift = excess[:, often] / (2 * count[often])                          # rate = 1/2 + the sum over pairs
    coins = np.random.default_rng(0).choice([-1.0, 1.0], (draws, len(pairs)))
    far = lambda x: np.abs(x) > 0.1 + 1e-9
    words = [(word, int(n)) for word, n, o in zip(vocabulary, count, often) if o]
    outside = [(*word, 0.5 + x) for word, x in zip(words, drift.sum(0)) if far(x)]
    return len(words), outside, far(coins @ drift).sum(1)


# ------------------------------------------------------------------ the certificate


def load(folder, names=(*TRAIN, "dev", *TEST)):
    """{file: rows}; a row has text, gold, trace and reading (None where the solver fails)."""
    files = {}
    for name in names:
        files[name] = []
        for record in read_records(Path(folder) / f"{name}.json"):
            prompt, response = split_input(record["input"])
            row = {"text": f"{prompt} {response or ''}", "trace": record["output"],
                   "gold": gold_verdict(record), "reading": None}
            try:
                row["reading"] = read(prompt, response)
            except ValueError as error:
                row["error"] = str(error)
            files[name].append(row)
    return files


class Claims:
    """Collects (passed, sentence); prints them last."""

    def __init__(self):
        self.lines = []

    def add(self, passed, sentence):
        self.lines.append((bool(passed), sentence))

    def print(self):
        print_line("")
        for passed, sentence in self.lines:
            print_line(f"{'PASS' if passed else 'FAIL'}  {sentence}")
        return all(passed for passed, _ in self.lines)


def certify_solver(files, claims):
    """Part 1: the table of right verdicts of the solver, by file and task."""
    print_line("1  solver: right verdicts of labelled ones\n   file                "
               + "".join(f"{name:>16}" for name in VERDICTS))
    wrong = unread = 0
    for file, rows in files.items():
        said = [solve(row["reading"]) if row["reading"] else dict.fromkeys(VERDICTS) for row in rows]
        cells = []
        for name in VERDICTS:
            right = [s[name] == row["gold"][name] for s, row in zip(said, rows) if row["gold"][name]]
            wrong += right.count(False)
            cells.append(f"{sum(right)} of {len(right)}" if right else "-")
        unread += sum(row["reading"] is None for row in rows)
        print_line(f"   {file:20}" + "".join(f"{cell:>16}" for cell in cells))
    for row in [row for rows in files.values() for row in rows if row["reading"] is None][:3]:
        print_line(f"   not understood: {row['error']}")
    claims.add(not wrong and not unread, f"solver: {wrong} wrong verdicts, {unread} texts not understood")


def certify_shortcuts(files, claims, slack):
    """Part 2: logistic regression on words, and as information on word pairs; a control that it can learn."""
    train = [row for name in TRAIN for row in files[name]]
    print_line(f"\n2  logistic regression, learned on {len(train)} training records, tried on test\n"
               "   features          task             n   accuracy   majority      F1")
    line = "   {:17} {:10} {:7}   {:8.2f}   {:8.2f}  {:6.2f}"
    for n, title in ((1, "words"), (2, "and word pairs")):
        for name in VERDICTS:
            result = shortcut(train, files["test"], name, n)
            print_line(line.format(title, name, *result))
            if n == 1:
                claims.add(result[1] <= result[2] + slack, f"words on {name}: accuracy {result[1]:.1f}, "
                           f"majority class {result[2]:.1f}, at most {slack:g} more")
    planted = [[{"text": row["text"], "gold": {"request": VERDICTS["request"][row["reading"].changed]}}
                for row in rows if row["reading"]] for rows in (train, files["test"])]
    result = shortcut(*planted, "request", 1)
    print_line(line.format("words", "control", *result) + "   (did the owner change their mind?)")
    claims.add(result[1] >= 99, f"words on the control: accuracy {result[1]:.1f}, at least 99")


def most_by_chance(chance):
    """The most words outside in 999 of 1,000 draws: of 1,000 all but the largest."""
    return int(np.sort(chance)[-2])


def certify_words(files, pairs, claims):
    """Part 3: words whose positive rate is outside 40-60%, against what chance gives."""
    print_line("\n3  words in 50 records or more whose positive rate is outside 40-60%\n"
               "   file          task        words   outside   by chance: mean, most in 999 of 1,000 draws")
    train = []
    joined = []
    for name in TRAIN:
        joined += [(i + len(train), j + len(train)) for i, j in pairs[name]]
        train += files[name]
    for file, rows, some in [("training", train, joined)] + [(f, files[f], pairs[f]) for f in TEST]:
        for name in VERDICTS:
            words, outside, chance = telling_words(rows, some, name)
            most = most_by_chance(chance)
            outside.sort(key=lambda found: found[2])
            shown = [f"{word} {100 * rate:.0f}% of {n}" for word, n, rate in outside]
            print_line(f"   {file:13} {name:10} {words:6} {len(outside):9}   {chance.mean():5.1f} {most:3}   "
                       + ", ".join(shown[:5]))
            if file == "training" and name != "completion":
                claims.add(not outside, f"training, {name}: {len(outside)} of {words} words are harmful in "
                           "less than 40% or more than 60%")
            claims.add(len(outside) <= most, f"{file}, {name}: {len(outside)} of {words} words outside "
                       f"40-60%, chance gives up to {most}")


def certify_composition(files, pairs, claims):
    """Part 4: sizes, pairs, what is held out, nesting, and the checks that traces skip."""
    print_line("\n4  composition\n   file                 records   in pairs   nesting   skipped checks")
    found = {name: [row["reading"] for row in rows if row["reading"]] for name, rows in files.items()}
    depths = {name: {len(r.wrappers) for r in readings} for name, readings in found.items()}
    skipped = {name: [not re.search(PATTERNS["checks"], row["trace"]) for row in rows]
               for name, rows in files.items() if name not in TEST}
    for name, rows in files.items():
        share = f"{100 * np.mean(skipped[name]):13.1f}%" if name in skipped else f"{'-':>14}"
        nesting = f"{min(depths[name])} to {max(depths[name])}"
        print_line(f"   {name:20} {len(rows):7} {2 * len(pairs[name]):10}   {nesting}   {share}")
    for name in TEST:
        claims.add(len(files[name]) >= 1200 and 2 * len(pairs[name]) >= 1200,
                   f"{name}: {2 * len(pairs[name])} of {len(files[name])} records in pairs (at least 1,200)")
    alone = sum(len(rows) - 2 * len(pairs[name]) for name, rows in files.items())
    turned = [[files[name][i]["gold"]["request"] for i in pair] for name in files for pair in pairs[name]]
    same = sum(a == b for a, b in turned if a)
    claims.add(not alone, f"pairs differ in one fact: {alone} records without a twin")
    claims.add(not same, f"twins have opposite verdicts on the request: {same} of {len(turned)} pairs do not")
    certify_held_out(found, claims)
    print_wordings(files)
    deep = set().union(*(depths[name] for name in files if name != "test_deeper"))
    claims.add(min(depths["test_deeper"]) > max(deep),
               f"nesting: {sorted(depths['test_deeper'])} in test_deeper, {sorted(deep)} elsewhere")
    train = [x for name in TRAIN for x in skipped[name]]
    claims.add(0.2 <= np.mean(train) <= 0.3,
               f"skipped checks: in {100 * np.mean(train):.1f}% of training traces (20-30%)")
    texts = lambda names: {row["text"] for name in names for row in files[name]}
    train = texts(TRAIN)
    dev = texts(["dev"])
    test = texts(TEST)
    claims.add(not test & (train | dev), f"overlap: {len(test & (train | dev))} test texts occur in training or dev")
    claims.add(not dev & train, f"overlap: {len(dev & train)} dev texts occur in training")


def certify_held_out(found, claims):
    """Combinations of three parts that only test_unseen has, though training has each two of them."""
    train = {r.combination for name in TRAIN for r in found[name]}
    held = {r.combination for r in found["test_unseen"]}
    parts = lambda triples: {(i, j, t[i], t[j]) for t in triples for i, j in combinations(range(3), 2)}
    print_line(f"   combinations (kind, outermost wrapper, mind changed): {len(train)} in training, "
               f"{len(held)} in test_unseen")
    claims.add(held and not held & train, f"held out: {len(held & train)} of {len(held)} combinations of "
               "test_unseen occur in training")
    missing = parts(held) - parts(train)
    claims.add(not missing, f"held out: training lacks {len(missing)} of {len(parts(held))} pairs of parts")
    for name in ("test", "test_deeper"):
        other = {r.combination for r in found[name]} - train
        claims.add(not other, f"{name}: {len(other)} combinations that training lacks")


def print_wordings(files, least=20):
    """In how many wordings are the reasoning steps told, facts being equal? Information, not a claim."""
    told = defaultdict(set)
    count = Counter()
    for name, row in [(name, row) for name in TRAIN for row in files[name] if row["reading"]]:
        r = row["reading"]
        checks = bool(re.search(PATTERNS["checks"], row["trace"]))
        facts = "|".join([*OPPOSITE, r.thing, r.owner, "the same", "different"])
        for task in re.split(r"^# ", row["trace"], flags=re.M):
            for step, text in re.findall(r"Reasoning Step (\d): (.*)", task):
                key = (name, task[:6], step), (checks, r.wrappers, r.changed, r.left and r.left[0])
                told[key].add(re.sub(rf"\b({facts})\b", "_", text))
                count[key] += 1
    fewest = {}
    for (step, facts), wordings in told.items():
        if count[step, facts] >= least:
            fewest[step] = min(len(wordings), fewest.get(step, len(wordings)))
    print_line(f"   wordings of a reasoning step, facts being equal: several in "
               f"{sum(n > 1 for n in fewest.values())}, one in "
               + ", ".join(f"{file} {task} step {step}" for (file, task, step), n in fewest.items() if n == 1))


# ------------------------------------------------------------------ the dial


def bits_of(reading):
    """The six facts of the dial as 0 and 1, in its order: 0 is what is told where a fact does not vary."""
    turning = [name for name, _ in PATTERNS["turns"]]
    bits = [VERBS[reading.verb] not in STATES, reading.wish not in STATES, reading.changed,
            *(name in turning for name in reversed(reading.wrappers))]
    return tuple(map(int, bits))


def certify_dial(files, claims):
    """All claims about the three files of one place of the dial."""
    certify_solver(files, claims)
    if any(row["reading"] is None for rows in files.values() for row in rows):
        return
    bits = {name: np.array([bits_of(row["reading"]) for row in rows]) for name, rows in files.items()}
    varies = np.ptp(bits["train"], axis=0)                                  # (6,) does this fact vary?
    facts = int(varies.sum())
    shares = 100 * bits["train"].mean(0)[:facts]
    claims.add(varies.tolist() == [1] * facts + [0] * (6 - facts), f"dial: the first {facts} of 6 facts vary")
    claims.add((abs(shares - 50) <= 10).all(), "dial: each of them is 1 in "
               + ", ".join(f"{share:.0f}%" for share in shares) + " of training records (40-60%)")
    certify_dial_pairs(files, bits, claims)
    certify_dial_words(files, facts, claims)


def certify_dial_pairs(files, bits, claims):
    """Rows 2i and 2i + 1: one fact apart, opposite verdicts. Files do not overlap."""
    apart = {int(n) for some in bits.values() for n in abs(some[::2] - some[1::2]).sum(1)}
    same = sum(a["gold"]["request"] == b["gold"]["request"] for rows in files.values()
               for a, b in zip(rows[::2], rows[1::2]))
    texts = {name: {row["text"] for row in rows} for name, rows in files.items()}
    both = texts["train"] & (texts["dev"] | texts["test"]) | texts["dev"] & texts["test"]
    claims.add(apart == {1}, f"pairs: twins differ in {sorted(apart)} facts")
    claims.add(not same, f"pairs: {same} twins have the same verdict, so each is half of the records")
    claims.add(not both, f"overlap: {len(both)} texts are in two files")


def certify_dial_words(files, facts, claims):
    """Words decide where one fact varies, and say nothing where more do."""
    pairs = [(i, i + 1) for i in range(0, len(files["train"]), 2)]
    _, outside, chance = telling_words(files["train"], pairs, "request")
    n, accuracy, _, _ = shortcut(files["train"], files["test"], "request", 1)
    # a line through the four cases of a parity can have three of them right: hence not 50
    passed = accuracy >= 95 if facts == 1 else accuracy <= 65
    wanted = "at least 95" if facts == 1 else "at most 65"
    claims.add(passed, f"words: logistic regression has {accuracy:.1f}% of {n} right ({wanted})")
    most = most_by_chance(chance)
    if facts > 1:
        claims.add(len(outside) <= most, f"words: {len(outside)} with a rate outside 40-60%, chance gives up to {most}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--toy", default=ROOT / "toy", metavar="DIR", help="folder of the corpus")
    p.add_argument("--facts", metavar="DIR", help="folder of one place of the dial, instead of --toy")
    p.add_argument("--slack", type=float, default=5.0, help="points words may gain on the majority")
    args = p.parse_args(argv)
    claims = Claims()
    if args.facts:
        certify_dial(load(args.facts, ("train", "dev", "test")), claims)
        if not claims.print():
            raise SystemExit(1)
        return
    files = load(args.toy)
    pairs = {}
    for name, rows in files.items():
        known = [i for i, row in enumerate(rows) if row["reading"]]
        pairs[name] = [(known[i], known[j]) for i, j in match_pairs([rows[i]["reading"] for i in known])]
    certify_solver(files, claims)
    certify_shortcuts(files, claims, args.slack)
    certify_words(files, pairs, claims)
    certify_composition(files, pairs, claims)
    if not claims.print():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
