"""Other forms of HS-DPO's loss, for tools/ablation.py: all k answers of a prompt, or a part of the
tokens of a pair.

    L(prompt) = mean over its pairs (w, l) of -alpha log sigmoid(beta [m(w) - m(l)])
                + sft x mean over its correct answers w of -log pi_w / |w|

m(y) = log pi_y - log ref_y, summed over the tokens of y that the form counts; log pi_w over those
that it fits. HS-DPO itself is one pair and all tokens: then this is train_dpo.py's loss.

    after_difference    the tokens after the first one in which the two answers differ
    differing           tokens that the other answer does not have too, in the same order
    verdicts            the Answers block
    step                the first step whose conclusion differs: the one that errs
    erring              that step and the Answers block

What two answers share before their first difference has one context, so it cancels in m(w) - m(l):
counting after_difference alone *is* HS-DPO, and its SFT term is what pushes the shared part. The
arm after_difference therefore leaves that part out of the SFT term, too.
"""
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Example, Tokenizer, common_prefix, pack  # noqa: E402
from model import Llama  # noqa: E402
from train_dpo import block_start, dpo_loss  # noqa: E402
from train_sft import batches, lr_at, make_optimizer, update  # noqa: E402

MAX_TOKENS = 8192           # of a pack


@dataclass
class Group:
    """A prompt with k answers, the first `correct` of them right, the others wrong."""
    example: Example
    correct: int
    weight: float
    counted: list           # of each answer (tokens,): 1.0 where the preference counts it, else 0.0
    fitted: list            # of each answer (tokens,): the same for the SFT term


# ------------------------------------------------------------------ which tokens
def ones(ids):
    return torch.ones(len(ids))


def whole(tokenizer, chosen, rejected):
    """All tokens of a pair, given as ids: two masks."""
    return ones(chosen), ones(rejected)


def after_difference(tokenizer, chosen, rejected):
    """0.0 for the tokens that both begin with, 1.0 from the first difference on."""
    same = common_prefix([chosen, rejected])
    masks = []
    for ids in (chosen, rejected):
        mask = ones(ids)
        mask[:same] = 0
        masks.append(mask)
    return tuple(masks)


def differing(tokenizer, chosen, rejected):
    """0.0 for the runs of tokens that difflib finds in both, in the same order, else 1.0."""
    masks = ones(chosen), ones(rejected)
    matcher = difflib.SequenceMatcher(None, chosen, rejected, autojunk=False)
    for block in matcher.get_matching_blocks():
        masks[0][block.a:block.a + block.size] = 0
        masks[1][block.b:block.b + block.size] = 0
    return masks


def verdicts(tokenizer, chosen, rejected):
    """1.0 in the Answers block alone; nowhere in an answer without one."""
    masks = []
    for ids in (chosen, rejected):
        mask = ones(ids)
        mask[:block_start(tokenizer, ids)] = 0
        masks.append(mask)
    return tuple(masks)


def step(tokenizer, chosen, rejected):
    """1.0 in the first reasoning step whose last word differs, in no other line: a step of these
    traces ends in what it concludes. What follows it in the rejected answer may well be right,
    given the step. Lines are matched by number; where the answers' sections part before a step
    does, nothing is counted."""
    masks = 0 * ones(chosen), 0 * ones(rejected)
    texts = [tokenizer.decode(ids).split("\n") for ids in (chosen, rejected)]
    for line, pair in enumerate(zip(*texts)):
        conclusions = [text.split()[-1:] for text in pair]
        if conclusions[0] != conclusions[1]:
            if not all("Reasoning Step" in text for text in pair):
                break
            for mask, ids in zip(masks, (chosen, rejected)):
                mask[lines_of(tokenizer, ids) == line] = 1
            break
    return masks


def erring(tokenizer, chosen, rejected):
    """1.0 where `step` or `verdicts` has it."""
    both = zip(step(tokenizer, chosen, rejected), verdicts(tokenizer, chosen, rejected))
    return tuple(torch.maximum(*masks) for masks in both)


def lines_of(tokenizer, ids):
    """(tokens,) the line in which each token begins."""
    numbers = []
    line = 0
    for token in ids:
        numbers.append(line)
        line += tokenizer.decode([token]).count("\n")
    return torch.tensor(numbers)


# ------------------------------------------------------------------ groups
def encode(tokenizer, records):
    """[Example] of records with instruction, input and answers, a list of texts. All prompts have one
    root: the ids that all of them begin with."""
    examples = []
    for record in records:
        prompt = tokenizer.prompt_ids(record["instruction"], record["input"])
        examples.append(Example(prompt, [tokenizer.answer_ids(text) for text in record["answers"]]))
    root_length = common_prefix([example.prompt for example in examples])
    for example in examples:
        example.root_length = root_length
    return examples


def pairs_of(tokenizer, pairs, counted=whole, fitted=whole):
    """A Group of each line of hard.jsonl. counted, fitted: which tokens, functions of this file."""
    records = [{**pair, "answers": [pair["chosen"], pair["rejected"]]} for pair in pairs]
    groups = []
    for example, pair in zip(encode(tokenizer, records), pairs):
        groups.append(Group(example, 1, pair["weight"], counted(tokenizer, *example.answers),
                            fitted(tokenizer, *example.answers)))
    return groups


def all_answers(tokenizer, prompts):
    """A Group of each prompt: records with the lists correct and incorrect, and a weight."""
    records = [{**prompt, "answers": prompt["correct"] + prompt["incorrect"]} for prompt in prompts]
    groups = []
    for example, prompt in zip(encode(tokenizer, records), prompts):
        masks = [ones(ids) for ids in example.answers]
        groups.append(Group(example, len(prompt["correct"]), prompt["weight"], masks, masks))
    return groups


# ------------------------------------------------------------------ the loss and its run
def logprobs_by_token(model, examples):
    """log p of each token of each answer: [(tokens,)], in order through all examples' answers."""
    found = [None] * sum(len(example.answers) for example in examples)
    for p in pack(examples, MAX_TOKENS):
        logprobs = model(p.tokens, p.end, p.rows, p.targets)
        numbers, sizes = torch.unique_consecutive(p.answer, return_counts=True)
        for number, part in zip(numbers.tolist(), logprobs.split(sizes.tolist())):
            found[number] = part
    return found


def group_loss(group, policy, reference, beta, sft):
    """L of one prompt, see above; policy, reference: of each answer, (tokens,) log-probabilities.
    -> (); with beta 0 the SFT term and a constant."""
    moved = []
    for p, r, mask in zip(policy, reference, group.counted):
        moved.append(((p - r) * mask).sum())
    moved = torch.stack(moved)
    k = len(moved)
    chosen = moved[:group.correct].repeat_interleave(k - group.correct)
    rejected = moved[group.correct:].repeat(group.correct)
    nothing = torch.zeros_like(chosen)          # the reference is taken off already
    preference = dpo_loss(chosen, rejected, nothing, nothing, beta, group.weight)
    fit = []
    for p, mask in zip(policy[:group.correct], group.fitted):
        fit.append(-(p * mask).sum() / len(p))
    return preference.mean() + sft * torch.stack(fit).mean()


def deal_out(values, groups):
    """The values of all answers in order, as a list for each group."""
    dealt = []
    first = 0
    for group in groups:
        after = first + len(group.example.answers)
        dealt.append(values[first:after])
        first = after
    return dealt


def train(folder, out, make_groups, lr, beta, sft, seed, epochs=2, size=32):
    """Train the model of `folder` on make_groups(tokenizer) and write it to `out`; schedule,
    optimizer and batches are train_dpo.py's. -> the mean loss of each step."""
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, "cpu", torch.float32)
    groups = make_groups(tokenizer)
    with torch.no_grad():
        reference = logprobs_by_token(model, [group.example for group in groups])
    reference = deal_out(reference, groups)
    optimizer = make_optimizer(model, lr)
    schedule = list(batches(len(groups), size, epochs, seed))
    losses = []
    for done, numbers in enumerate(schedule):
        batch = [groups[i] for i in numbers]
        policy = logprobs_by_token(model, [group.example for group in batch])
        loss = 0.0
        for i, group, parts in zip(numbers, batch, deal_out(policy, batch)):
            loss = loss + group_loss(group, parts, reference[i], beta, sft) / len(batch)
        loss.backward()
        update(model, optimizer, lr_at(done, len(schedule), lr))
        losses.append(loss.item())
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return losses
