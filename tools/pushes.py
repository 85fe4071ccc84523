"""Why HS-DPO ties SFT on the chosen: what each arm of one trained cell did to which tokens.

    python tools/pushes.py CELL --arms chosen hs_dpo swapped step

CELL is a folder that tools/ablation.py wrote, with its models: OUT/s0.5_corpus201_seed1, say. Its
pairs are those of k = 4, on which the arms trained; held out are the prompts that only 8 answers
show to be hard. Three tables:

1  how far each arm moved the weights, and the cosine with the way that the first arm went
2  log-probabilities by part of an answer, before (R-SFT) and how each arm changed them. Parts:
       prefix      what both answers begin with (one context, so one figure)
       first       the first token that differs
       both        later tokens of the reasoning that the other answer has too, in the same order
       one         later tokens of the reasoning that it has not
       answers     the Answers block
3  gradients at the R-SFT model, mean over the 32 pairs of a step: of log pi of the chosen (g_w) and
   of the rejected answer (g_l), in each part; what the push on the rejected leaves of the other
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import mine_hard  # noqa: E402
import preferences  # noqa: E402
from ablation_table import markdown  # noqa: E402
from data import (Extend, InputError, Tokenizer, at_least, common_prefix, parse_records,  # noqa: E402
                  read_json, read_records)
from eval import print_line  # noqa: E402
from files import folder_path  # noqa: E402
from model import Llama  # noqa: E402
from preferences import logprobs_by_token  # noqa: E402
from train_sft import batches  # noqa: E402

STEP = 32           # pairs
PARTS = ["prefix", "first", "both", "one", "answers"]
SIDES = ["chosen", "rejected"]


def parts_of(tokenizer, chosen, rejected):
    """For each of a pair's two answers, ids: (tokens,) the number in PARTS of each token."""
    same = common_prefix([chosen, rejected])
    alone = preferences.differing(tokenizer, chosen, rejected)
    blocks = preferences.verdicts(tokenizer, chosen, rejected)
    found = []
    for one, block in zip(alone, blocks):
        part = torch.full((len(one),), PARTS.index("both"))
        part[one > 0] = PARTS.index("one")
        part[block > 0] = PARTS.index("answers")
        part[:same] = PARTS.index("prefix")
        part[same] = PARTS.index("first")
        found.append(part)
    return found


def by_part(values, parts):
    """(pairs, 2, parts) sums of values, a (tokens,) tensor for each answer, by part."""
    sums = torch.zeros(len(values), len(PARTS), dtype=torch.float64)
    for row, value, part in zip(sums, values, parts):
        row.index_add_(0, part, value.double())
    return sums.view(-1, 2, len(PARTS))


def load(folder):
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no model here; let tools/ablation.py train this arm")
    return Llama.from_pretrained(folder, "cpu", torch.float32)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def pairs_of_cell(cell, seed):
    """(pairs on which the arms trained, held-out pairs) of a cell."""
    trained = read_json(cell / "hs_dpo_pairs.json")
    pool = read_records(cell / "pool.json")
    samples = {}
    for _, line in parse_records(cell / "mined_k8/samples.jsonl"):
        samples[line["prompt"]] = line["samples"]
    pairs, _ = mine_hard.select(pool, ["pool"] * len(pool), [("r_sft", samples)], "all", "random",
                                0.2, seed)
    known = {pair["input"] for pair in trained}
    return trained, [pair for pair in pairs if pair["input"] not in known]


# ------------------------------------------------------------------ the tables
def weight_table(base, arms):
    """Length of each arm's way from the base's weights, and its cosine with the first arm's."""
    start = flat(base.parameters())
    moves = {name: flat(model.parameters()) - start for name, model in arms.items()}
    first = next(iter(moves.values()))
    rows = []
    for name, move in moves.items():
        cosine = torch.cosine_similarity(move, first, 0)
        rows.append([name, f"{move.norm():.3f}", f"{cosine:.3f}"])
    beside = next(iter(moves))
    return markdown("arm", ["moved by", f"cosine with {beside}"], rows)


def likelihood_table(base, arms, groups, parts):
    """Mean sum of log p by side and part, before, and how each arm changed it; last, the change of
    the margin, chosen less rejected."""
    examples = [group.example for group in groups]
    tokens = by_part([torch.ones(len(part)) for part in parts], parts).mean(0)
    changes = {}
    with torch.no_grad():
        before = by_part(logprobs_by_token(base, examples), parts).mean(0)
        for name, model in arms.items():
            after = by_part(logprobs_by_token(model, examples), parts).mean(0)
            changes[name] = after - before                              # (2, parts)
    rows = []
    for s, side in enumerate(SIDES):
        for p, part in enumerate(PARTS):
            row = [f"{side}, {part}"]
            row.append(f"{tokens[s, p]:.1f}")
            row.append(f"{before[s, p]:.3f}")
            for change in changes.values():
                row.append(f"{change[s, p]:+.3f}")
            rows.append(row)
    margins = [change[0].sum() - change[1].sum() for change in changes.values()]
    rows.append(["margin", "", "", *[f"{margin:+.3f}" for margin in margins]])
    return markdown("sum of log p", ["tokens", "R-SFT", *arms], rows)


def gradients(model, groups, parts):
    """[side][part] -> the gradient of the mean over pairs of that part's log p, flat."""
    policy = logprobs_by_token(model, [group.example for group in groups])
    found = []
    for side in range(len(SIDES)):
        row = []
        for part in range(len(PARTS)):
            value = 0.0
            for logprobs, of_part in zip(policy[side::2], parts[side::2]):
                value = value + logprobs[of_part == part].sum()
            value = value / len(groups)
            row.append(flat(torch.autograd.grad(value, model.parameters(), retain_graph=True)))
        found.append(row)
    return found


def gradient_table(chosen, rejected):
    """|g_w|, |g_l|, their cosine, and the length of g_w - g_l in |g_w|, by part and in all."""
    sides = list(zip(PARTS, chosen, rejected))
    sides.append(("all", sum(chosen), sum(rejected)))
    rows = []
    for name, w, l in sides:
        cosine = torch.cosine_similarity(w, l, 0)
        left = (w - l).norm() / w.norm()
        row = [name]
        for figure, digits in ((w.norm(), 1), (l.norm(), 1), (cosine, 3), (left, 2)):
            row.append(f"{figure:.{digits}f}")
        rows.append(row)
    columns = ["length of g_w", "length of g_l", "cosine", "g_w - g_l, in lengths of g_w"]
    return markdown("gradient of log p", columns, rows)


def gradient_lines(w, l, groups):
    """How close HS-DPO's gradient is to that of SFT on the chosen: its cosine with g_w, by beta."""
    length = sum(len(group.example.answers[0]) for group in groups) / len(groups)
    alpha = sum(group.weight for group in groups) / len(groups)
    lines = []
    for factor in (1, 10, 100):
        beta = factor * 0.01 * 257 / length
        push = alpha * beta / 2
        gradient = (2 / length + push) * w - push * l
        cosine = torch.cosine_similarity(gradient, w, 0)
        lines.append(f"beta {beta:.4f}: cosine of the gradient with that of SFT on the chosen "
                     f"{cosine:.3f}")
    return lines


def show(lines):
    """Print a block, and an empty line after it."""
    print_line("\n".join([*lines, ""]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cell", type=folder_path, metavar="CELL", help="folder of one cell, with its models")
    p.add_argument("--arms", nargs="+", action=Extend, default=["chosen", "hs_dpo", "swapped"],
                   help="model folders in it; ways are compared with the first's")
    p.add_argument("--seed", type=at_least(0), default=1, help="the cell's mining seed")
    args = p.parse_args(argv)
    base = load(args.cell / "r_sft")
    arms = {name: load(args.cell / name) for name in args.arms}
    tokenizer = Tokenizer.from_pretrained(args.cell / "r_sft")
    show(weight_table(base, arms))
    for title, pairs in zip(("trained", "held out"), pairs_of_cell(args.cell, args.seed)):
        if not pairs:
            continue
        groups = preferences.pairs_of(tokenizer, pairs)
        parts = []
        for group in groups:
            parts += parts_of(tokenizer, *group.example.answers)
        print_line(f"{len(pairs)} pairs, {title}\n")
        show(likelihood_table(base, arms, groups, parts))
        if title == "trained":
            numbers = next(batches(len(groups), STEP, 1, args.seed))        # the arms' first step
            first = [groups[i] for i in numbers]
            first_parts = [parts[2 * i + side] for i in numbers for side in range(2)]
            chosen, rejected = gradients(base, first, first_parts)
            show(gradient_table(chosen, rejected))
            show(gradient_lines(sum(chosen), sum(rejected), groups))


if __name__ == "__main__":
    main()
