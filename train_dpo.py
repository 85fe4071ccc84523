"""Stage 3, HS-DPO: weighted direct preference optimization on the hard samples
(GuardReasoner, Eq. 2).

    python train_dpo.py                                             after `python mine_hard.py`
    python train_dpo.py --model DIR --data hard.jsonl --out DIR     yours
    torchrun --nproc_per_node 4 train_dpo.py ...                    the same on four GPUs

    R-SFT model folder + hard.jsonl  ->  OUT (a model folder), OUT/metrics.jsonl, OUT/step-000120

DPO raises the margin of a pair: by how much the gap log p(chosen) - log p(rejected) has grown since
the reference, the model we start from. (Both may fall.) A step pushes the margin with a force of
alpha beta sigmoid(-beta margin), which is alpha beta / 2 at first and falls as the margin grows. A
pair is one tree: instruction, prompt, and two answers, so the prompt is computed once. The
reference's log-probabilities are computed before the first step, and no second model is ever held.
At the first step the model is still the reference, every margin is 0, and -log sigmoid(0) = ln 2:
the loss is mean(alpha) ln 2, plus the SFT term.

    dpo_loss, answer_sums, pairs_loss, reference_logprobs  the method
    main                                                   the run: train_sft.py's, but for the loss
                                                           and its reference
    machinery                                              what metrics.jsonl has beside the loss
"""
import argparse
from bisect import bisect_left
from itertools import islice

import torch
from torch.nn import functional

from data import (Extend, InputError, Tokenizer, answers_heading, at_least, deal, encode_records,
                  pack, read_records, warn)
from model import answer_logprobs, folder_name, join_ranks, read_arguments
from train_sft import (Interrupts, Log, batches, finish_step, fit_memory, identify_run,
                       load_for_training, lr_at, make_optimizer, resume, save_final, start_run,
                       token_counts, training_arguments, update)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, weight):
    """-alpha log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)])
    Rafailov et al. 2023, Eq. 7, weighted by alpha (GuardReasoner, Eq. 2).

    chosen = log pi_w, rejected = log pi_l, ref_... = log ref_...: (B,), one number a pair, a
    log-probability *summed* over an answer's tokens, end mark included; weight = alpha, (B,).
    -> (B,), finite for any margin."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)          # (B,)
    return -weight * functional.logsigmoid(beta * margin)


def answer_sums(logprobs, answer, n):
    """Sum the log-probabilities (N,) of each answer: answer (N,) numbers them 0 .. n-1, in any
    order; -> (n,) in the dtype of logprobs, 0 for an answer without a token."""
    return logprobs.new_zeros(n).index_add(0, answer, logprobs)


def pairs_loss(policy, reference, length, weight, beta, sft):
    """loss = dpo_loss + sft * (-log pi_w / |w|), of each pair.

    A pair's loss is made of that pair alone: which others its pack holds hangs on --max-tokens and
    on the ranks. What needs the whole batch is computed before main's loop over packs.

    policy, reference (B, 2): log-probabilities of chosen w and rejected l, summed over the answer;
    length (B,): |w|, its tokens; weight (B,): alpha, of the first term alone. -> a dict of what
    metrics.jsonl reports, each (B,): loss, preference (its first term), accuracy (1.0 where the
    margin is above 0, else 0.0), margin (beta times [(log pi_w - log ref_w) - (log pi_l -
    log ref_l)]), chosen_logprob and rejected_logprob (policy's)."""
    chosen, rejected = policy.unbind(1)
    ref_chosen, ref_rejected = reference.unbind(1)
    preference = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, weight)
    loss = preference + sft * -chosen / length
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return dict(loss=loss, preference=preference,
                accuracy=(margin > 0).to(loss.dtype),
                margin=beta * margin,           # as metrics.jsonl has it; README's is without beta
                chosen_logprob=chosen, rejected_logprob=rejected)


def reference_logprobs(model, examples, args, world):
    """log ref(answer) of every pair, (pairs, 2) in float64 on the CPU: chosen, rejected. examples:
    one a pair, with two answers; packs hold args.max_tokens, and each answer has a copy of the
    prompt where args.no_share. A run that is resumed computes them again: it starts from the same
    model before it loads its checkpoint."""
    logprobs = []
    for first in range(0, len(examples), 1024):             # packs of so many exist at a time
        some = examples[first:first + 1024]
        packs = pack(some, args.max_tokens, not args.no_share)
        total = answer_logprobs(model, packs, 2 * len(some), world)
        logprobs.append(total.view(-1, 2))
    return torch.cat(logprobs)


# ------------------------------------------------------------------ the script
def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=folder_name, default="out/sft",
                   help="folder of the R-SFT model; also the reference")
    p.add_argument("--data", nargs="+", action=Extend, metavar="FILE", help="hard samples")
    p.add_argument("--out", type=folder_name, default="out/dpo",
                   help="folder for the trained model")
    p.add_argument("--lr", type=at_least(0, float), default=5e-6, help="peak rate (paper: 5e-6)")
    p.add_argument("--epochs", type=at_least(1), default=2, help="passes over the pairs (paper: 2)")
    p.add_argument("--batch-size", type=at_least(1), default=256,
                   help="pairs in a step (paper: 256)")
    p.add_argument("--beta", type=at_least(0, float, 1e6), default=0.01,
                   help="DPO temperature (paper: 0.01)")
    p.add_argument("--sft", type=at_least(0, float, 1e6), default=2.0,
                   help="factor of the SFT term (paper: 2.0)")
    training_arguments(p)
    # without --data the demo runs: these values replace the defaults above. (read_arguments also
    # adds --seed, --limit, --dtype and others)
    return read_arguments(p, argv, data=["out/hard/hard.jsonl"],
                          lr=3e-5, batch_size=32, beta=0.02,
                          dtype="float32")


def read_pairs(tokenizer, args):
    """(examples with two answers each, chosen and rejected; alpha of each, (pairs,) in float64).
    Pairs whose answers are equal, as they are encoded, are left out and counted."""
    fields = ("instruction", "input", "chosen", "rejected")
    records = []
    for path in args.data:
        some = read_records(path, fields)[:args.limit]
        read_weights(path, some)
        records += some
    examples, records = encode_records(tokenizer, records, args.max_length,
                                       ("chosen", "rejected"))
    pairs = []
    alphas = []
    for example, record in zip(examples, records):
        chosen, rejected = example.answers
        if chosen != rejected:
            pairs.append(example)
            alphas.append(record["weight"])
    warn(len(examples) - len(pairs), "pairs left out: their two answers are equal")
    if not pairs:
        raise InputError(f"{' '.join(args.data)}: no pair has two different answers")
    return pairs, torch.tensor(alphas, dtype=torch.float64)


def main(argv=None):
    args = parse_arguments(argv)
    interrupts = Interrupts()
    world = join_ranks(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    examples, alphas = read_pairs(tokenizer, args)

    schedule = batches(len(examples), args.batch_size, args.epochs, args.seed)
    schedule = list(islice(schedule, args.max_steps))
    steps = len(schedule)
    identify_run(args, world, examples, schedule, alphas.tolist())      # adds hashes to args
    checkpoint = start_run(args, world)             # ends the script where all is done
    args.max_tokens = fit_memory(args, world, examples)
    model = load_for_training(args, world)
    # before reference_logprobs: that leaves embedding and head whole, where a model is sharded
    optimizer = make_optimizer(model, args.lr)
    reference = reference_logprobs(model, examples, args, world)
    lengths, starts = measure_answers(tokenizer, examples)      # starts: for the log alone
    done = resume(checkpoint, model, optimizer) if checkpoint else 0

    world.wait()            # no rank writes into --out before all have seen that it is free
    interrupts.wait_for_step = True    # from here on a signal ends the run after a whole step
    log = Log(args, done, steps, world)
    for step in range(done + 1, steps + 1):
        numbers = schedule[step - 1]
        batch = [examples[i] for i in numbers]
        pairs = len(batch)
        packs = pack(batch, args.max_tokens, not args.no_share)
        packs = deal(packs, world.rank, world.ranks)
        totals = {}
        for p in packs:
            # answers are numbered through the batch: 2 i and 2 i + 1 are pair i's chosen, rejected.
            # No example is torn apart (see pack): p holds both of a pair, or neither
            in_batch = torch.unique(p.answer // 2)          # (B,) which pairs of the batch p holds
            in_data = torch.tensor(numbers)[in_batch]       # (B,) their numbers in `examples`
            p = p.to(world.device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)                # (N,)
            sums = answer_sums(logprobs, p.answer, 2 * pairs)       # (2 pairs,), 0 if not in p
            policy = sums.view(-1, 2)[in_batch]             # (B, 2), chosen and rejected
            ref = reference[in_data].to(policy)             # (B, 2), on its device, in its dtype
            answer_lengths = lengths[in_data].to(policy)    # (B, 2)
            alpha = alphas[in_data].to(policy)
            part = pairs_loss(policy, ref, answer_lengths[:, 0], alpha, args.beta, args.sft)
            # for metrics.jsonl alone: no gradient changes
            verdict_part = verdict_sums(logprobs.detach(), p.answer, starts[numbers])
            verdict_part = verdict_part.view(-1, 2)[in_batch]               # (B, 2), as policy
            part.update(watched(part["loss"], policy, verdict_part, answer_lengths))
            (part["loss"].sum() * world.ranks / pairs).backward()   # FSDP averages over the ranks
            for name, values in part.items():
                totals[name] = totals.get(name, 0) + values.detach().sum()
        lr = lr_at(step - 1, steps, args.lr)
        norm = update(model, optimizer, lr)

        means = world.sum(torch.stack(list(totals.values()))) / pairs
        counts = token_counts(batch, packs, world)          # sums over the ranks: all must call it
        figures = dict(zip(totals, means.tolist()), lr=lr, grad_norm=norm, pairs=pairs, **counts)
        log.write(step, figures)

        finish_step(args, step, steps, model, optimizer, world, interrupts)
    save_final(args, model, tokenizer, world)


# ================================================================== machinery
# ------------------------------------------------------------------ the weights of pairs
def read_weights(path, records):
    """Give each record of a file its alpha as `weight`: what it has there, or under the released
    name sample_weight; else 1, which is said if others of the file have one."""
    missing = 0
    for record in records:
        names = [name for name in ("weight", "sample_weight") if name in record]
        missing += not names
        weight = record[names[0]] if names else 1.0
        if type(weight) not in (int, float) or not 0 <= weight <= 1e6:
            begins = record["input"].strip()[:60]
            raise InputError(f"{path}: a weight is {repr(weight)[:40]}; it must be a number from 0 "
                             f"to 1,000,000 (the pair's input begins {begins!r})")
        record["weight"] = weight
    if missing < len(records):
        warn(missing, f"pairs of {path} have no weight: they count 1")


# ------------------------------------------------------------------ figures beside the loss
def measure_answers(tokenizer, examples):
    """(tokens of each answer, its block_start): both (pairs, 2), chosen and rejected."""
    lengths = [[len(ids) for ids in e.answers] for e in examples]
    starts = [[block_start(tokenizer, ids) for ids in e.answers] for e in examples]
    return torch.tensor(lengths), torch.tensor(starts)


def watched(loss, policy, verdict_part, lengths):
    """What metrics.jsonl reports beside the loss, each (B,), of chosen and rejected answers.

    push: -d loss / d log pi, how hard a step pushes an answer up. verdict_part (B, 2): the part of
    log pi that the Answers block has; the rest is the reasoning's. lengths (B, 2): tokens."""
    gradient, = torch.autograd.grad(loss.sum(), policy, retain_graph=True)
    figures = {}
    for column, which in enumerate(("chosen", "rejected")):
        figures[f"{which}_push"] = -gradient[:, column]
        figures[f"{which}_verdict"] = verdict_part[:, column]
        figures[f"{which}_length"] = lengths[:, column]
    return figures


def verdict_sums(logprobs, answer, starts):
    """answer_sums over the Answers blocks alone, where the verdicts are; the tokens of an answer
    stand together, in order. starts (pairs, 2): which of them is the first of its block."""
    starts = starts.flatten().to(answer.device)
    place = torch.arange(len(answer), device=answer.device)     # of each scored (row, next token)
    first = place.new_full((len(starts),), len(answer))
    first = first.scatter_reduce(0, answer, place, "amin")      # where each answer begins
    nth = place - first[answer]                                 # which token of its answer
    is_in_block = nth >= starts[answer]
    return answer_sums(logprobs * is_in_block, answer, len(starts))


def block_start(tokenizer, ids):
    """Which token of an answer is the first of its Answers block; len(ids) where it has none."""
    text = tokenizer.decode(ids)
    heading = answers_heading(text)
    if heading is None:
        return len(ids)
    block = text[heading.start():]

    def cuts_block(start):
        """Is some of the block lost if the answer is read from this token on?"""
        return len(tokenizer.decode(ids[start:])) < len(block)

    # the token before is the last that keeps the whole block, which may begin inside it
    first_that_cuts = bisect_left(range(len(ids)), True, key=cuts_block)
    return first_that_cuts - 1


if __name__ == "__main__":
    main()
