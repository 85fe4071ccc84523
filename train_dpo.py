"""Stage 3, HS-DPO: weighted direct preference optimization on the hard samples (GuardReasoner, Eq. 2).

    python train_dpo.py                                             after `python mine_hard.py`
    python train_dpo.py --model DIR --data hard.jsonl --out DIR     yours
    torchrun --nproc_per_node 4 train_dpo.py ...                    the same on four GPUs

    R-SFT model folder + hard.jsonl  ->  OUT (a model folder), OUT/metrics.jsonl, OUT/step-000120

A pair is one tree: instruction, prompt, and two branches, so the prompt is computed once. The reference
is the model we start from; its log-probabilities are computed before the first step, and no second
model is ever held. The first loss is therefore mean(alpha) ln 2, plus the SFT term.
"""
import argparse

import torch
import torch.nn.functional as F

from data import Tokenizer, answer_logprobs, deal, encode_records, pack, read_arguments, read_records
from model import InputError, all_sum, at_least, join_ranks, weights_time
from train_sft import common_arguments, load, lr_at, make_optimizer, run_steps, start_run, update

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, weight):
    """-alpha log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)])
    Rafailov et al. 2023, Eq. 7, weighted by alpha (GuardReasoner, Eq. 2). All (B,): log-probabilities
    *summed* over an answer's tokens, end mark included; w is the chosen, l the rejected answer."""
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)             # (B,)
    return -weight * F.logsigmoid(beta * margin)

def answer_sums(logprobs, answer, n):
    """Sum the log-probabilities (N,) of each answer: answer (N,) numbers them 0 .. n-1; -> (n,)."""
    return logprobs.new_zeros(n).index_add(0, answer, logprobs)

def pairs_loss(logprobs, answer, samples, reference, weight, args):
    """loss = dpo_loss + sft * (-log pi_w / |w|), summed over a pack's pairs; and (6,) sums to log: loss,
    preference term, accuracy, beta x margin, log pi of chosen and rejected. Pair i: answers 2i, chosen, and
    2i + 1. logprobs and answer (N,) are the pack's; reference (pairs, 2) and weight (pairs,) the step's."""
    pairs = torch.unique(answer // 2)                                      # of this pack
    policy = answer_sums(logprobs, answer, 2 * len(samples)).view(-1, 2)[pairs]    # (pairs, 2): w, l
    ref = reference.to(policy)[pairs]                                      # (pairs, 2)
    length = policy.new_tensor([len(s.answers[0]) for s in samples])[pairs]
    preference = dpo_loss(*policy.T, *ref.T, args.beta, weight.to(policy)[pairs])
    loss = preference + args.sft * -policy[:, 0] / length
    margin = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    seen = torch.stack([loss, preference, (margin > 0).to(loss), args.beta * margin, *policy.T])
    return loss.sum(), seen.detach().sum(1).cpu().double()

def reference_logprobs(model, samples, args, rank_info):
    """log ref(answer) of every pair, (pairs, 2) on the CPU: chosen, rejected. A run that is resumed computes
    them again: it starts from the same model before it loads its checkpoint."""
    packs = pack(samples, args.max_tokens, not args.no_share)
    return answer_logprobs(model, packs, 2 * len(samples), rank_info).view(-1, 2)

def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/sft", help="folder of the R-SFT model; also the reference")
    p.add_argument("--data", nargs="+", metavar="FILE", help="hard samples")
    p.add_argument("--out", default="out/dpo", help="folder for the trained model")
    p.add_argument("--lr", type=at_least(0, float), default=5e-6, help="peak learning rate (paper: 5e-6)")
    p.add_argument("--epochs", type=at_least(1), default=2, help="passes over the pairs (paper: 2)")
    p.add_argument("--batch-size", type=at_least(1), default=256, help="pairs in a step (paper: 256)")
    p.add_argument("--beta", type=at_least(0, float), default=0.01, help="DPO temperature (paper: 0.01)")
    p.add_argument("--sft", type=at_least(0, float), default=2.0, help="factor of the SFT term (paper: 2.0)")
    common_arguments(p)
    return read_arguments(p, argv, data=["out/hard/hard.jsonl"], lr=3e-5, batch_size=32, beta=0.02,
                          dtype="float32")

def main(argv=None):
    args = parse_arguments(argv)
    rank_info = device, rank, ranks = join_ranks(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model, args.format)
    fields = ("instruction", "input", "chosen", "rejected")
    records = [record for path in args.data for record in read_records(path, fields)][:args.limit]
    samples, records = encode_records(tokenizer, records, args.max_length, ("chosen", "rejected"))
    weights = [r.get("weight", r.get("sample_weight", 1.0)) for r in records]      # the released name
    if wrong := [w for w in weights if not (isinstance(w, (int, float)) and 0 <= w < float("inf"))]:
        raise InputError(f"{' '.join(args.data)}: a weight is {wrong[0]!r}; it must be a number from 0 on")
    weights = torch.tensor(weights, dtype=torch.float64)
    args.weights = weights_time(args.model)                 # --resume refuses another reference
    checkpoint = start_run(args, samples)
    model = load(args, rank_info, samples)
    optimizer = make_optimizer(model, args.lr)              # before a forward pass gathers sharded weights
    reference = reference_logprobs(model, samples, args, rank_info)
    run = run_steps(args, len(samples), model, tokenizer, optimizer, checkpoint, rank_info)
    for step, steps, batch, log in run:
        lr, drawn = lr_at(step - 1, steps, args.lr), [samples[i] for i in batch]
        count, totals = len(batch), torch.zeros(6, dtype=torch.float64)
        packs = deal(pack(drawn, args.max_tokens, not args.no_share), rank, ranks)
        for p in packs:
            p = p.to(device)
            logprobs = model(p.tokens, p.end, p.rows, p.targets)
            part, seen = pairs_loss(logprobs, p.answer, drawn, reference[batch], weights[batch], args)
            (part * ranks / count).backward()                # FSDP averages gradients over the ranks
            totals += seen
        norm = update(model, optimizer, lr)
        loss, preference, accuracy, margin, chosen, rejected = (all_sum(totals, device) / count).tolist()
        log(device, step=step, loss=loss, lr=lr, grad_norm=norm,
            tokens=sum(len(s.prompt) + len(a) for s in drawn for a in s.answers),
            computed=int(all_sum(sum(len(p.tokens) for p in packs), device)),
            loss_tokens=sum(len(a) for s in drawn for a in s.answers), pairs=count, preference=preference,
            accuracy=accuracy, margin=margin, chosen_logprob=chosen, rejected_logprob=rejected)

if __name__ == "__main__":
    main()
