"""What bench.py compares with: transformers, TRL, vLLM and torch's own kernels, as a plain user has them.

Each takes the same Bench (see there) and the same batches. The packages are imported inside: none is needed
before --peers asks for it, and one that is absent is named. Padded peers compute ROWS rows at once.
"""
import os
import tempfile
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F

from data import InputError, Tokenizer

ROWS = 4                # sequences, pairs or prompts


def load(b):
    """transformers' own LLaMA, all in the dtype of products."""
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as Config
    if not b.args.shape:
        return AutoModelForCausalLM.from_pretrained(b.args.model, dtype=b.products).to(b.device)
    with b.device:
        return AutoModelForCausalLM.from_config(Config.from_dict(b.config.to_json()), dtype=b.products)


def padded(rows, value, left=False):
    """A list of lists of numbers as one matrix."""
    fill = [[value] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])


def sft(b):
    """A plain loop: transformers, padded batches, labels of -100 over prompts, AdamW."""
    batches, _ = b.batches()
    model = load(b).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)

    def step(batch):
        count = sum(len(e.answers[0]) for e in batch)
        loss = 0.0
        for some in (batch[i:i + ROWS] for i in range(0, len(batch), ROWS)):
            rows = [e.prompt + e.answers[0] for e in some]
            labels = padded([[-100] * len(e.prompt) + e.answers[0] for e in some], -100)
            mask = padded([[1] * len(row) for row in rows], 0)
            part = model(input_ids=padded(rows, 0).to(b.device), attention_mask=mask.to(b.device),
                         labels=labels.to(b.device), use_cache=False, num_items_in_batch=count).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return b.train(step, batches)


def trl_rows(b, batches, records, pairs):
    """What a TRL trainer is given: our token ids for SFT, or the text of pairs."""
    if not pairs:                                                  # twice: packing may need more
        return [{"input_ids": e.prompt + e.answers[0],
                 "labels": [-100] * len(e.prompt) + e.answers[0]}
                for some in batches * 2 for e in some]
    t = Tokenizer.from_pretrained(b.args.model)

    def prompt(record):
        text = record["instruction"] + "\n" + record["input"]
        return t.before + (text.strip() if t.trim else text) + t.after

    return [{"prompt": prompt(r), "chosen": r["chosen"] + t.end_mark, "rejected": r["rejected"] + t.end_mark}
            for some in records for r in some]


def trl(b, pairs, **options):
    """TRL's SFTTrainer on our token ids, or its DPOTrainer on the same text; options go to its config.
    The latter tokenizes prompt and answer together, which can add a token ("seen_tokens" counts its own)."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    datasets.disable_caching()
    batches, records = b.batches(pairs)
    warm = b.args.warm
    size = b.args.batch_size
    packing = options.get("packing", False)
    seen = []
    clock = {"reference": 0.0}

    class Clock(TrainerCallback):
        def on_step_begin(self, _, state, control, **others):
            clock.setdefault("start" if state.global_step == warm else "warm-up", b.now())

        def on_step_end(self, *_, **others):
            clock["stop"] = b.now()

    class TimedDPO(DPOTrainer):
        def _precompute_ref_logps(self, *inputs):
            began = b.now()
            result = super()._precompute_ref_logps(*inputs)
            clock["reference"] += b.now() - began
            return result

    if size > ROWS and size % ROWS:
        raise InputError(f"--batch-size {size}: TRL's micro-batches have {ROWS}; take a multiple")
    rows = 1 if packing else min(ROWS, size)                       # a packed row holds about four sequences
    each = max(1, size // (ROWS if packing else rows))             # micro-batches in a step
    config = partial(SFTConfig, learning_rate=5e-5)
    if pairs:
        config = partial(DPOConfig, beta=0.01, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0])
    config = config(
        per_device_train_batch_size=rows, gradient_accumulation_steps=each, max_length=2048,
        max_steps=len(batches), lr_scheduler_type="constant", train_sampling_strategy="sequential",
        use_cpu=b.device.type == "cpu", bf16=b.products == torch.bfloat16, save_strategy="no",
        model_init_kwargs={"dtype": str(b.products).removeprefix("torch.")}, output_dir=tempfile.mkdtemp(),
        report_to="none", logging_steps=1, dataloader_pin_memory=False, disable_tqdm=True, **options)
    data = datasets.Dataset.from_list(trl_rows(b, batches, records, pairs))
    trainer = (TimedDPO if pairs else SFTTrainer)(
        model=b.args.model, args=config, train_dataset=data, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(b.args.model))
    collate = trainer.data_collator

    def counted(examples):
        batch = collate(examples)
        mask = batch.get("attention_mask")
        seen.append(batch["input_ids"].numel() if mask is None else mask.sum().item())
        return batch

    trainer.data_collator = counted
    trainer.train()
    if options.get("precompute_ref_log_probs") and not clock["reference"]:
        raise RuntimeError("this TRL computes its reference elsewhere: time it there")
    timed = [e for some in batches[warm:] for e in some]
    tokens = sum(seen[warm * each:len(batches) * each])
    result = b.trained(timed, 8, "pairs") if pairs else b.trained(timed, 6, "tokens")
    if packing:                                                    # the packer chose other sequences
        result.update(units=tokens, tokens=tokens, flops=6 * b.parameters * tokens)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {**result, "seen_tokens": tokens, "losses": losses[warm:],
            "seconds": clock["stop"] - clock["start"] + clock["reference"] * b.args.steps / len(batches)}


@torch.inference_mode()
def sample(b, prompts_a_call=ROWS, sort=False, stops=False):
    """transformers' generate, left padded; prompts_a_call 0: all of them."""
    prompts = b.prompts()
    model = load(b).eval()
    ends = []
    new = b.args.new_tokens
    if stops:
        ends = Tokenizer.from_pretrained(b.args.model).stop
        new = 2 * new
    model.generation_config.eos_token_id = ends or None
    if sort:
        prompts.sort(key=len)

    def run(prompts, new):
        ids = padded(prompts, 0, left=True)
        mask = padded([[1] * len(p) for p in prompts], 0, left=True)
        rows = model.generate(input_ids=ids.to(b.device), attention_mask=mask.to(b.device), do_sample=True,
                              max_new_tokens=new, temperature=1.0, top_p=0.95, top_k=0, pad_token_id=0,
                              num_return_sequences=b.args.k)[:, ids.shape[1]:].tolist()
        return sum(next((n for n, i in enumerate(row, 1) if i in ends), len(row)) for row in rows)

    run(prompts[:2], 4)
    began = b.now()
    size = prompts_a_call or len(prompts)
    tokens = sum(run(prompts[i:i + size], new) for i in range(0, len(prompts), size))
    return {"unit": "tokens", "units": tokens, "seconds": b.now() - began, "flops": 2 * b.parameters * tokens}


def vllm(b, stops=False):
    """vLLM: prefix caching on, all sequences at once. Keys and values get 2 GiB of a CPU's memory, a setting
    that its peak memory holds; the engine runs in this process, so that its memory is counted."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_ENABLE_V1_MULTIPROCESSING="0",
                      VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM, SamplingParams
    ids = [{"prompt_token_ids": prompt} for prompt in b.prompts()]
    engine = LLM(b.args.model, dtype=str(b.products).removeprefix("torch."), enforce_eager=not b.cuda,
                 max_model_len=min(4096, b.config.max_position_embeddings), enable_prefix_caching=True, max_num_seqs=b.args.prompts * b.args.k)
    most = b.args.new_tokens * (2 if stops else 1)
    stop = Tokenizer.from_pretrained(b.args.model).stop if stops else None

    def run(prompts, most):
        sampling = SamplingParams(n=b.args.k, temperature=1.0, top_p=0.95, max_tokens=most,
                                  ignore_eos=not stops, stop_token_ids=stop)
        answers = [answer for result in engine.generate(prompts, sampling, use_tqdm=False)
                   for answer in result.outputs]
        return sum(len(answer.token_ids) for answer in answers)

    run(ids[:2], 4)
    engine.reset_prefix_cache()
    began = b.now()
    tokens = run(ids, most)
    return {"unit": "tokens", "units": tokens, "seconds": b.now() - began, "flops": 2 * b.parameters * tokens}


# ------------------------------------------------------------------ kernels

def lengths(plan):
    """Of the sequences that lie side by side in a stream."""
    return plan.end.unique_consecutive(return_counts=True)[1]


def one_by_one(plan):
    """F.scaled_dot_product_attention, a sequence at a time."""
    def attend(q, k, v):
        parts = zip(*(x.transpose(0, 1)[None].split(lengths(plan).tolist(), 2) for x in (q, k, v)))
        seen = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(seen, 2)[0].transpose(0, 1)
    return attend


def varlen(plan):
    """torch's own attention over sequences of several lengths (FlashAttention)."""
    from torch.nn.attention.varlen import varlen_attn
    sizes = lengths(plan)
    starts = F.pad(sizes.cumsum(0), (1, 0)).to("cuda", torch.int32)
    longest = sizes.max().item()
    known = signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    return lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest, **causal)


def flex(plan):
    """flex_attention, compiled, with our rule as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    T = len(plan.end)
    end = plan.end.to("cuda")
    attend = torch.compile(flex_attention)
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i < end[j]), None, None, T, T, device="cuda")
    return lambda *qkv: attend(*(x.transpose(0, 1)[None] for x in qkv), block_mask=mask,
                               enable_gqa=True)[0].transpose(0, 1)


def logprobs(hidden, head, targets):
    """All logits in fp32, as most trainers have them."""
    return -F.cross_entropy((hidden @ head.to(hidden.dtype).T).float(), targets, reduction="none")


def nucleus(logits, seed, position, temperature, top_p):
    """Top-p by sorting every row."""
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=True)
