"""LLaMA in one file: the plain model, then the same mathematics faster, then a sampling engine.

Part I has all of the mathematics and can be read alone. Where it calls a fast twin, read instead
    for attention                   attention_by_mask           (part II's twin always runs)
    for token_logprobs              token_logprobs_at_once      (part II's twin always runs)
    for rope                        apply_rope                  (part II's twin runs on CUDA)
    in draw_token                   what follows the call       (part II's twin runs on CUDA)
    in RMSNorm                      rms_norm                    (torch's own runs on CUDA)
It defines
    LlamaConfig                     config.json of a Hugging Face folder
    rms_norm, apply_rope            the operations, one equation each
    tree_plan, attention_by_mask    the one mask rule of a stream (see data.py, the tree packer)
    token_logprobs_at_once          log-probabilities of given tokens
    Llama                           the module; weights in and out
    draw_token, generate_plain      a sampler without a cache
Part II has fast twins; each names the plain function that it must equal:
    TokenLogprobs                   log-probabilities without ever holding all logits
    TileAttention                   attention in plain products, tile by tile
    Triton kernels                  on CUDA the two above, apply_rope and draw_token
Part III decodes many samples at once:
    generate_iter                   admit, reserve, compact, decode, finish
    number_reads, PagePool          a paged cache of keys and values that shares prompts
    attend_pages, join_results      attention over it
    Engine                          what generate_iter calls, in the same order
Machinery: what can be wrong with a folder; devices, ranks, memory; arguments that scripts share.
Simpler than elsewhere: LLaMA alone, without biases, dropout or quantized weights.

Letters (x' is x.T):
    everywhere      T tokens of a stream, N scored ones; D width, F hidden width, V vocabulary;
                    H query heads, G key/value heads, R = H / G, E head width; p probabilities
    in attention    N rows that ask
    in the engine   B samples being decoded, S most results of one of them; in attend_pages p pages,
                    w readers of each
    in kernels      B rows of a tile, P keys of a page; C and M how much a program takes at a time
"""
import argparse
import atexit
import contextlib
import hashlib
import math
import os
import re
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data import (FORMATS, InputError, at_least, common_prefix, deal, is_there, read_object,
                  reading, send, tell, write_json, write_whole)

# ================================================================== part I: the model


@dataclass
class LlamaConfig:
    """The fields of a LLaMA config.json that shape the computation, under Hugging Face's names."""
    vocab_size: int                     # V
    hidden_size: int                    # D
    intermediate_size: int              # F
    num_hidden_layers: int
    num_attention_heads: int            # H
    num_key_value_heads: int            # G, divides H
    head_dim: int = None                # E
    rms_norm_eps: float = 1e-5          # (from_json: 1e-6 where the file has none)
    rope_theta: float = 10000.0
    rope_scaling: dict = None           # None, or the Llama 3.1 / 3.2 fields
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    torch_dtype: str = "float32"        # how save_pretrained stores the weights

    def __post_init__(self):
        sizes = (self.hidden_size, self.num_attention_heads)
        # where a size is no positive int, config_fault will say so
        if not self.head_dim and all(type(n) is int and n > 0 for n in sizes):
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Read config.json in either spelling (`rope_scaling`, or `rope_parameters` since 2025).
        InputError for another kind of model, and where a field is absent."""
        raw = read_object(path)
        check_llama(path, raw)
        raw.setdefault("rms_norm_eps", 1e-6)                # as transformers has it
        raw.update(read_rope(path, raw))
        raw["torch_dtype"] = read_dtype(path, raw)
        raw["tie_word_embeddings"] = raw.get("tie_word_embeddings") or False
        raw["num_key_value_heads"] = (raw.get("num_key_value_heads")
                                      or raw.get("num_attention_heads"))
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        try:
            config = cls(**known)
            fault = config_fault(config)
        except (TypeError, KeyError, ValueError, ArithmeticError) as error:
            what = str(error).split("__init__() ")[-1]      # a TypeError names what is absent
            raise InputError(f"{path}: {what} (absent or of another type)") from None
        if fault:
            raise InputError(f"{path}: {fault}")
        return config

    def to_json(self):
        """The dict to store as config.json, loadable by transformers and vLLM."""
        stored = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **vars(self)}
        if self.rope_scaling:
            stored["rope_scaling"] = {"rope_type": "llama3", **self.rope_scaling}
        return stored


# ------------------------------------------------------------------ the plain operations
def full_precision(x):
    """x in float32, or in float64 if it has that already: for sums, exponentials and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension   (Zhang et al. 2019, Eq. 4)
    x (..., D), weight (D,) of any dtype -> (..., D) in x's dtype; the mean is taken in
    full_precision: in float32, as squares of float16 overflow, and float64 stays float64."""
    wide = full_precision(x)
    mean = wide.square().mean(-1, keepdim=True)
    unit = wide * torch.rsqrt(mean + eps)
    return weight.to(x.dtype) * unit.to(x.dtype)


def rope_frequencies(config, device="cpu"):
    """Angles per position, (E/2,) in float64 on `device`: f_i = theta^(-2i/E), i = 0 .. E/2 - 1,
    with E and theta of config.head_dim and config.rope_theta. Where config.rope_scaling is not
    None, they are stretched as Llama 3.1 and 3.2 do, by its fields factor, low_freq_factor,
    high_freq_factor and original_max_position_embeddings.

    A wave of frequency f turns original * f / 2 pi times in the original context. Waves that turn
    less often than `low` are slowed down to f / factor, those that turn more often than `high` are
    kept, and between the two it is keep f + (1 - keep) f / factor, where keep grows linearly in the
    number of turns, from 0 at `low` to 1 at `high`."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequency = config.rope_theta ** (-i / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    turns = original * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)       # 1: a short wave, 0: a long one
    slowed = (1 - keep) * frequency / scaling["factor"]
    return keep * frequency + slowed


def rope_tables(config, position, dtype):
    """cos and sin (T, 1, E/2) of position (T,) x frequency (E/2,), for apply_rope."""
    exact = position
    if position.device.type == "mps":                       # which has no float64
        exact = position.cpu()
    frequency = rope_frequencies(config, exact.device)
    angle = exact.double()[:, None, None] * frequency
    cos = angle.cos().to(position.device, dtype)
    sin = angle.sin().to(position.device, dtype)
    return cos, sin


def apply_rope(x, cos, sin):
    """Turn each pair (x_i, x_{i+E/2}) by its position's angle   (Su et al. 2021, Eq. 34)
    x (T, H, E), cos and sin (T, 1, E/2) -> (T, H, E): a pair (a, b) becomes
    (a cos - b sin, b cos + a sin). Hugging Face weights pair the two *halves* of a head; Meta's
    original weights pair neighbours instead, and are not what these files hold."""
    a, b = x.chunk(2, -1)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat([turned_a, turned_b], -1)


# ------------------------------------------------------------------ the prefix tree
# A stream holds a forest, written depth first, and end[j] is the first row after all that
# continues token j (data.py draws an example). Row i sees key j  iff  j <= i < end[j].
@dataclass(eq=False)            # hashed by identity: part II caches what follows from a plan
class TreePlan:
    """What every layer needs to know of a stream, computed once from `end` by tree_plan."""
    end: torch.Tensor           # (T,) on the host
    position: torch.Tensor      # (T,) how many keys a row sees before its own
    skip: int                   # 0 in training and in part I. The engine (part III) has fed the
                                # first `skip` tokens before: they have keys, but no query


def tree_plan(end, skip=0, device=None):
    """Check `end` and compute the positions: end (T,) int64 -> TreePlan(end, position, skip), end
    on the host, position (T,) int64 on `device` (None: the host), skip as it was given.

    ValueError where check_nesting finds a mistake. With I the instruction, p q a prompt, a b and
    x y its answers:             I p q a b x y
                      end        7 7 7 5 5 7 7
                      closed     0 0 0 0 0 2 2     keys with end <= i: their subtree is over
                      position   0 1 2 3 4 3 4     = i - closed"""
    T = len(end)
    end = end.cpu()                                         # FSDP moves it to a GPU
    check_nesting(end.tolist())
    ending = torch.bincount(end, minlength=T + 1)           # how many keys have end = i
    closed = ending.cumsum(0)[:T]                           # end <= i: i sees them no longer
    position = torch.arange(T) - closed
    return TreePlan(end, send(position, device), skip)


def check_nesting(end):
    """ValueError unless every subtree ends inside the one around it; end: a list of T numbers.
    That is: i < end[i] <= T, and where i < j < end[i], end[j] <= end[i]. Takes time linear in T."""
    open_ends = [len(end)]                                  # of the subtrees around row i
    for i, stop in enumerate(end):
        while open_ends[-1] <= i:
            open_ends.pop()
        if not i < stop <= open_ends[-1]:
            raise ValueError(f"end[{i}] = {stop} does not nest")
        open_ends.append(stop)


def attention_by_mask(q, k, v, plan):
    """softmax(q k' / sqrt(E)) v over the keys that a row sees   (Vaswani et al. 2017, Eq. 1)
    q (T, H, E), k and v (T, G, E) -> (T, H, E); query head h reads key head h G // H. Row i sees
    key j  iff  j <= i < plan.end[j]. The whole mask at once, to read and for tests; all tokens have
    a query here, whatever plan.skip is."""
    assert len(q) == len(k)
    i = torch.arange(len(q), device=q.device)[:, None]
    j = torch.arange(len(k), device=q.device)[None, :]
    end = plan.end.to(q.device)[None, :]
    sees = (j <= i) & (i < end)                             # (T, T)
    q = q.transpose(0, 1)                                   # (H, T, E)
    k = k.transpose(0, 1)                                   # (G, T, E)
    v = v.transpose(0, 1)                                   # (G, T, E)
    out = functional.scaled_dot_product_attention(q, k, v, sees, enable_gqa=True)
    return out.transpose(0, 1)


def token_logprobs_at_once(hidden, head, targets):
    """log p(target) = z[target] - log sum exp(z),  z = head @ h, with all logits: for tests.
    hidden (N, D), head (V, D), targets (N,) -> (N,)."""
    z = hidden @ head.to(hidden.dtype).T                    # (N, V)
    log_p = full_precision(z).log_softmax(-1)               # (N, V)
    return log_p.gather(-1, targets[:, None])[:, 0]


# ------------------------------------------------------------------ where part I hands over
def rope(x, cos, sin):
    """What apply_rope computes, on CUDA by its twin of part II: x (T, H, E), cos and sin
    (T, 1, E/2) -> (T, H, E)."""
    if use_kernels(x) and x.shape[-1] in KERNEL_WIDTHS:
        return KernelRope.apply(x, cos, sin)
    return apply_rope(x, cos, sin)


def attention(q, k, v, plan):
    """What attention_by_mask computes, by one of its fast twins of part II, for tokens that have a
    query: q (T - skip, H, E), k and v (T, G, E) -> (T - skip, H, E)."""
    if use_kernels(q) and q.shape[-1] in KERNEL_WIDTHS:
        return TreeAttention.apply(q, k, v, plan)
    return TileAttention.apply(q, k, v, plan)


def token_logprobs(hidden, head, targets):
    """log p(target | what its row sees) in nats, float32 or more: hidden (N, D), head (V, D),
    targets (N,) -> (N,). What token_logprobs_at_once computes, by its twin of part II."""
    return TokenLogprobs.apply(hidden, head, targets)


# ------------------------------------------------------------------ the model
def recomputed(f, *inputs):
    """f(*inputs), keeping only the inputs: the backward pass calls f again for the tensors in
    between, and torch breaks that call off as soon as it has them all."""
    if not torch.is_grad_enabled():
        return f(*inputs)
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """y = x W', x (..., in) -> (..., out); the weight is cast to x's dtype for the product."""

    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """rms_norm with its weight: x (T, D) -> (T, D). On CUDA (unless --kernels torch) by torch's own
    kernel, which keeps one number a row for the backward pass and wants the weight in x's dtype."""

    def forward(self, x):
        if use_kernels(x):
            weight = self.weight.to(x.dtype)
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        return recomputed(rms_norm, x, self.weight, self.eps)


class Attention(nn.Module):
    """o(attend(rope(q(x)), rope(k(x)), v(x))): x (T, D) -> (T, D).

    attend(q, k, v): q (T, H, E), k and v (T, G, E) -> what the rows see, (T, H, E)."""

    def __init__(self, c):
        super().__init__()
        self.E = c.head_dim
        queries = c.num_attention_heads * self.E
        keys = c.num_key_value_heads * self.E
        self.q_proj = Linear(c.hidden_size, queries)
        self.k_proj = Linear(c.hidden_size, keys)
        self.v_proj = Linear(c.hidden_size, keys)
        self.o_proj = Linear(queries, c.hidden_size)

    def forward(self, x, cos, sin, attend):
        """x (T, D) -> (T, D). Queries, keys and values are x times the three projections, split
        into heads of E; rope turns queries and keys, cos and sin (T, 1, E/2); attend is
        called once; its heads, side by side, go through o_proj."""
        q = self.q_proj(x).unflatten(-1, (-1, self.E))      # (T, H, E)
        k = self.k_proj(x).unflatten(-1, (-1, self.E))      # (T, G, E)
        v = self.v_proj(x).unflatten(-1, (-1, self.E))      # (T, G, E)
        q = rope(q, cos, sin)
        k = rope(k, cos, sin)
        out = attend(q, k, v)                               # (T, H, E)
        return self.o_proj(out.flatten(1))                  # (T, D)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x (T, D) -> (T, D)   (SwiGLU, Shazeer 2020, Eq. 6)"""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def down(self, gate, up):
        """The second half of forward: down_proj(silu(gate) * up)."""
        return self.down_proj(functional.silu(gate) * up)

    def forward(self, x):
        """down(silu(gate(x)) * up(x)), by gate_proj, up_proj and down_proj: x (T, D) -> (T, D).
        `recomputed` saves memory and changes no number: gate and up are kept, silu(gate) * up is
        made again in the backward pass, and down_proj is not multiplied a second time."""
        gate = self.gate_proj(x)                            # (T, F)
        up = self.up_proj(x)                                # (T, F)
        return recomputed(self.down, gate, up)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), x (T, D) -> (T, D).
    Only `attend` mixes tokens; therefore trees are exact."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        """See the class. The first norm is input_layernorm, the second post_attention_layernorm;
        self_attn takes (x, cos, sin, attend)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """LLaMA under Hugging Face's weight names; see forward for what it computes."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size)
        self.compute_dtype = None       # None: that of the weights; training sets bf16 beside fp32
        # what the backward pass computes again instead of keeping it. True: all of a layer but its
        # input; False: only what is cheap, silu(gate) * up and, without kernels, the norms
        self.recompute = False

    @property
    def head(self):
        """The output matrix (V, D): the embedding itself where the two are tied."""
        if self.config.tie_word_embeddings:
            return self.model["embed_tokens"].weight
        return self.lm_head.weight

    @property
    def product_dtype(self):
        """The dtype of activations, and of keys and values."""
        return self.compute_dtype or self.head.dtype

    def hidden(self, tokens, position, attend):
        """Final hidden states (T, D) of tokens (T,) at position (T,). Attention in layer n calls
        attend(n, q, k, v), with n filled in: the engine (part III) caches keys layer by layer."""
        x = self.model["embed_tokens"](tokens)
        x = x.to(self.product_dtype)                        # (T, D)
        cos, sin = rope_tables(self.config, position, x.dtype)
        for n, layer in enumerate(self.model["layers"]):
            attend_here = partial(attend, n)
            if self.recompute:
                x = recomputed(layer, x, cos, sin, attend_here)
            else:
                x = layer(x, cos, sin, attend_here)
        return self.model["norm"](x)

    def logits(self, hidden):
        """What softmax makes the next token's probabilities of: hidden (N, D) -> (N, V)."""
        return hidden @ self.head.to(hidden.dtype).T

    def forward(self, tokens, end, rows=None, targets=None):
        """Run a stream: tokens (T,), end (T,) -> hidden (T, D).
        With rows (N,) and targets (N,): log p(targets[n] | what rows[n] sees), (N,) in nats. It is
        computed inside the module, where the weights of a sharded model are whole."""
        plan = tree_plan(end, device=tokens.device)

        def attend(n, q, k, v):                             # the same in every layer n
            return attention(q, k, v, plan)

        x = self.hidden(tokens, plan.position, attend)
        if rows is None:
            return x
        return token_logprobs(x[rows], self.head, targets)

    @classmethod
    def random(cls, config, seed=0, std=0.02):
        """A model with fresh weights: normal with deviation std, norms 1."""
        model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std, generator=generator)
        return model

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """Load a Hugging Face folder, strictly by name, one tensor at a time.
        dtype is both storage and products (default: pick_dtype). InputError names the file and the
        tensor that is missing, unexpected, cut short, quantized, or of another shape."""
        folder = Path(folder)
        device = pick_device(device)
        dtype = dtype or pick_dtype(device)
        config = LlamaConfig.from_json(folder / "config.json")
        with torch.device("meta"):                          # shapes without memory
            model = cls(config)
        need = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
        check_memory(need, device, f"{folder} does not fit on {device}")
        wanted = model.state_dict()
        found = {}
        files = weight_files(folder)
        name_others(folder, files)
        for path in files:
            for name, tensor in read_tensors(path):
                if "rotary_emb." in name:
                    continue                                # a buffer: follows from config.json
                check_tensor(path, name, tensor, wanted, config)
                if name in found:
                    raise InputError(f"{path}: tensor {name} is in another file, too")
                # copy=True: a file is only mapped into memory. It could change below a running
                # guard, and its tensors lie at odd addresses, which can change a product's last bit
                found[name] = tensor.to(device, dtype, copy=True)
        if config.tie_word_embeddings:
            join_tied(folder, found)
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            raise InputError(f"{folder}: {len(missing)} tensors are missing, "
                             f"the first is {missing[0]}")
        model.load_state_dict(found, assign=True)
        return model

    def save_pretrained(self, folder, dtype=None, state=None):
        """Write config.json and model.safetensors, as transformers and vLLM read them.
        dtype: of the file (default: config's). state: the weights to write where `self` holds only
        a part of them, on one of several ranks."""
        folder = Path(folder)
        dtype = dtype or getattr(torch, self.config.torch_dtype)
        stored = {}
        for name, tensor in (state or self.state_dict()).items():
            stored[name] = tensor.detach().to("cpu", dtype).contiguous()
            if not stored[name].isfinite().all():
                raise InputError(f"{folder}: not written, as {name} holds NaN or infinity in "
                                 f"{dtype}: lower --lr")
        write = partial(save_file, stored, metadata={"format": "pt"})
        write_whole(folder / "model.safetensors", write)
        write_json(folder / "config.json", self.config.to_json())


@torch.no_grad()
def answer_logprobs(model, packs, count, world):
    """log p of each answer, summed over its tokens: (count,) in float64 on the CPU. Answers are
    numbered as Pack.answer has them, from 0 to count - 1; one that is in no pack has 0.

    world: which of the run's processes this is (World, in the machinery). Each computes the packs
    that `deal` gives it, and all get the sum."""
    total = torch.zeros(count, dtype=torch.float64)
    for p in deal(packs, world.rank, world.ranks):
        answer = p.answer
        p = p.to(world.device)
        logprobs = model(p.tokens, p.end, p.rows, p.targets)
        total.index_add_(0, answer, logprobs.cpu().double())
    total = world.sum(total)
    if not total.isfinite().all():
        raise InputError("the model's log-probabilities are not numbers (NaN or infinity): its "
                         "weights are broken, or too large for this --dtype")
    return total


# ------------------------------------------------------------------ sampling
def hash32(*numbers):
    """A number of 32 bits that depends on every one of these numbers and on their order."""
    text = " ".join(map(str, numbers)).encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest, "little")


def sample_seed(seed, prompt, sample):
    """The seed of one sampled answer, by the run's seed, the prompt's ids, the sample's number."""
    return hash32(seed, sample, *prompt)


def uniform(seed, position, attempt):
    """Numbers in (0, 1), (B,), that depend on nothing but seed (B,), position (B,) and attempt.
    Integer arithmetic, then float64: the same bits on every device, in any batch."""
    x = mixed(seed + position * 0x9E3779B9 + attempt * 0x85EBCA6B)
    if x.device.type == "mps":                              # which has no float64
        x = x.cpu()
    return (x.double() + 0.5) / 2 ** 32


def mixed(x):
    # 32 bits, each of which depends on the lowest 32 of x, an int64: lowbias32 (Wellons 2018) with
    # all shifts 16: x ^= x >> 16 and a multiplication, twice, and a last x ^= x >> 16. draw_kernel
    # runs these lines, too
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x846CA68B
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


NEARLY_ZERO = 1e-5  # a temperature or top_p below it leaves only the likeliest token
BUCKET = 256        # tokens whose probabilities are added up as one: a running sum over all of V
                    # would cost as much as the softmax; a draw finds its bucket, then the token
                    # inside


def draw_token(logits, seed, position, temperature, top_p):
    """One token for each of B samples, from its nucleus: the likeliest tokens that together reach
    top_p (Holtzman et al. 2020), without sorting; a temperature or top_p of (nearly) 0 is argmax.

    logits (B, V), divided by temperature here; seed and position (B,) int64 -> (B,) int64. A
    token depends on its own logits, seed and position, not on other samples. Draw from the full
    softmax by inverting its sum (token_at) at one uniform number (uniform, attempt 0, 1, ...);
    accept if the mass of strictly likelier tokens is below top_p; else draw again. An accepted
    token is in the nucleus and has its right relative probability there. Where logits are NaN, it
    is any token."""
    if temperature < NEARLY_ZERO or top_p < NEARLY_ZERO:
        return logits.argmax(-1)
    if use_kernels(logits):
        return launch_draw_kernel(logits, seed, position, temperature, top_p)
    V = logits.shape[1]
    scaled = full_precision(logits) / temperature
    p = scaled.softmax(-1)                                  # (B, V)
    if V % BUCKET:
        # to whole buckets; these zeros stand for no token: `pick` is clamped to V - 1 below
        p = functional.pad(p, (0, -V % BUCKET))
    in_bucket = p.unflatten(1, (-1, BUCKET)).sum(-1)        # (B, V / 256)
    below = functional.pad(in_bucket.cumsum(-1), (1, 0))    # (B, V / 256 + 1)
    token = torch.empty_like(seed)
    left = torch.arange(len(p), device=p.device)            # samples without a token so far
    attempt = 0
    while len(left):
        some = left if attempt else slice(None)     # at first all of B: a slice does not copy p
        u = uniform(seed[some], position[some], attempt).to(p)
        p_some = p[some]
        pick = token_at(u, p_some, below[some]).clamp(max=V - 1)
        p_pick = p_some.gather(1, pick[:, None])
        likelier = torch.where(p_some > p_pick, p_some, 0).sum(-1)
        accepted = (likelier < top_p) & (p_pick[:, 0] != 0)     # rounding can hit a zero
        token[left[accepted]] = pick[accepted]
        left = left[~accepted]
        attempt += 1
    return token


def token_at(u, p, below):
    """The token at which the running sum of p passes its goal, u times the whole; in two searches:

        below     0        0.30            0.75   1     goal 0.5: bucket 1 begins at 0.30, so
        p         | . . . . | . . . . . . . | . . |     inside it, the token that passes 0.20

    u (B,), p (B, V) in whole buckets, below (B, V / 256 + 1): the mass before each -> (B,). Both
    searches are clamped: rounding can put `goal` at the end of all, or `rest` past its bucket."""
    goal = u[:, None] * below[:, -1:]                       # (B, 1), a mass
    buckets = below.shape[1] - 1
    after = torch.searchsorted(below, goal, right=True)
    bucket = after.clamp(max=buckets) - 1                   # (B, 1)
    rest = goal - below.gather(1, bucket)
    sample = torch.arange(len(p), device=p.device)
    by_bucket = p.unflatten(1, (-1, BUCKET))                # (B, V / 256, 256)
    inside = by_bucket[sample, bucket[:, 0]].cumsum(-1)     # (B, 256)
    nth = torch.searchsorted(inside, rest, right=True).clamp(max=BUCKET - 1)
    token = bucket * BUCKET + nth
    return token[:, 0]


@torch.inference_mode()
def generate_plain(model, prompts, k=1, max_new_tokens=256, temperature=1.0, top_p=0.95, stop=(),
                   seed=0):
    """What `generate` must equal, without a cache: one token of one sample at a time, and slow."""
    device = model.head.device
    answers = []
    for prompt in prompts:
        answers.append([])
        for sample in range(k):
            answer = []
            own_seed = torch.tensor([sample_seed(seed, prompt, sample)], device=device)
            for _ in range(max_new_tokens):
                tokens = torch.tensor(prompt + answer, device=device)
                T = len(tokens)
                end = torch.full((T,), T)
                last = model(tokens, end)[-1:]                                 # (1, D)
                logits = model.logits(last)                                    # (1, V)
                position = torch.tensor([T], device=device)
                token = draw_token(logits, own_seed, position, temperature, top_p)
                answer.append(token.item())
                if answer[-1] in stop:
                    break
            answers[-1].append(answer)
    return answers


# ================================================================== part II: the same, faster
# ------------------------------------------------------------------ log-probabilities by parts
class TokenLogprobs(torch.autograd.Function):
    """log p(target) = z[target] - log sum exp(z),  z = head @ h
    backward:  dz = g (onehot(target) - softmax(z))

    The twin of token_logprobs_at_once. Logits exist for a part at a time: in the forward pass for
    some rows; in the backward pass, where they are computed again, for some of the vocabulary, so
    that the gradient of each row of the head is written once."""
    LOGITS = 2 ** 25                                        # in a part: 64 MiB in bf16
    ON_CUDA = 8                                             # times as many: 512 MiB

    @staticmethod
    def logits_in_part(device):
        """How many logits exist at a time. A CPU is at its best with few; a GPU's products want
        some thousand rows: 2,048 of the 128,256 logits of Llama 3."""
        return TokenLogprobs.LOGITS * (TokenLogprobs.ON_CUDA if device.type == "cuda" else 1)

    @staticmethod
    def forward(ctx, hidden, head, targets):
        """hidden (N, D), head (V, D), which is cast to hidden's dtype, targets (N,) -> log p, (N,)
        in at least float32; N may be 0. Rows are taken `step` at a time, as many as have step V <=
        logits_in_part, but at least one. Saves hidden, head, targets and log sum exp(z), (N,)."""
        picked = full_precision(hidden.new_empty(len(hidden)))      # z[target]
        log_sum = torch.empty_like(picked)                          # log sum exp(z)
        weight = head.to(hidden.dtype)
        step = max(1, TokenLogprobs.logits_in_part(hidden.device) // len(head))
        if step > 128:
            step -= step % 128                                      # whole tiles of a GPU's product
        for start in range(0, len(hidden), step):
            some = slice(start, start + step)
            z = hidden[some] @ weight.T                             # (step, V)
            pick_and_sum(z, targets[some], picked[some], log_sum[some])
            del z                                                   # before there is another part
        ctx.save_for_backward(hidden, head, targets, log_sum)
        return picked - log_sum

    @staticmethod
    def backward(ctx, grad):
        """grad (N,) -> gradients of hidden and of head, in their shapes and dtypes, and None for
        targets: dz head, and dz' hidden; N may be 0. The vocabulary is taken `step` tokens at a
        time, as many as have N step <= logits_in_part, but at least 16; z is computed again (see
        logit_gradients)."""
        hidden, head, targets, log_sum = ctx.saved_tensors
        grad = grad.contiguous()
        d_hidden = full_precision(torch.zeros_like(hidden))
        d_head = torch.empty_like(head)
        step = TokenLogprobs.logits_in_part(hidden.device) // max(1, len(hidden))
        step = max(16, step // 16 * 16)                             # 16: what matrix units multiply
        for start in range(0, len(head), step):
            some = slice(start, start + step)
            weight = head[some].to(hidden.dtype)
            z = hidden @ weight.T                                   # (N, step)
            dz = logit_gradients(z, targets - start, log_sum, grad)
            d_hidden += dz @ weight
            d_head[some] = dz.T @ hidden
            del z, dz                                               # before there is another part
        return d_hidden.to(hidden.dtype), d_head, None


CACHED_ROWS = 32        # of logits, which then stay in a CPU's cache from one operation to the next


def pick_and_sum(z, target, picked, log_sum):
    """Write z[target] and log sum exp(z) of logits z (N, V) into picked and log_sum, both (N,)."""
    if use_kernels(z):
        return launch_row_totals(z, target, picked, log_sum)
    at_target = z.gather(-1, target[:, None])               # (N, 1)
    picked.copy_(at_target[:, 0])
    parts = zip(z.split(CACHED_ROWS), log_sum.split(CACHED_ROWS))
    for some_z, some_sum in parts:
        some_sum.copy_(full_precision(some_z).logsumexp(-1))


def logit_gradients(z, target, log_sum, grad):
    """z <- grad (onehot(target) - exp(z - log_sum)), in place. z (N, n): logits of n neighbouring
    tokens of the vocabulary; target (N,), counted from the first of them, adds nothing where it is
    outside. log_sum and grad are (N,)."""
    if use_kernels(z):
        return launch_row_gradients(z, target, log_sum, grad)
    inside = target.clamp(0, z.shape[1] - 1)                # a column of z; target, if that is one
    hit = grad * (inside == target)                         # grad onehot(target): 0 if outside
    for start in range(0, len(z), CACHED_ROWS):
        some = slice(start, start + CACHED_ROWS)
        dz = full_precision(z[some]) - log_sum[some, None]
        dz.exp_()                                           # p
        dz.mul_(-grad[some, None])                          # - grad p
        dz.scatter_add_(-1, inside[some, None], hit[some, None])
        z[some] = dz
    return z


# ------------------------------------------------------------------ attention in plain products
TILE_ROWS = 128         # of a tile at most: large products, yet few of their scores are masked


@lru_cache(1)
def row_tiles(plan):
    """The rows that ask, cut into tiles: [(rows, keys, masked)].

    rows: a slice of n of them, counted from plan.skip on; the slices follow each other to the end,
    each as long as tile_stop says. keys (m,): all that any of them sees, beginning with the m - h
    that all see. masked (n, h), bool: which of the last h keys a row does not see. Both on the
    device of plan.position. The example of tree_plan in one tile, n = m = 7 and h = 6 (#: True):

        keys         I   p q a b x y
        masked   I       # # # # # #
                 p       . # # # # #
                 q       . . # # # #
                 a       . . . # # #
                 b       . . . . # #
                 x       . . # # . #     x skips the sibling, a b
                 y       . . # # . ."""
    end = plan.end
    device = plan.position.device
    tiles = []
    start = plan.skip
    while start < len(end):
        stop = tile_stop(start, end)
        i = torch.arange(start, stop)[:, None]
        j = torch.arange(stop)
        j = j[end[:stop] > start]                           # seen by a row of the tile
        by_all = (j <= start) & (end[j] >= stop)
        by_some = j[~by_all]
        keys = torch.cat([j[by_all], by_some])
        masked = (by_some > i) | (i >= end[by_some])
        rows = slice(start - plan.skip, stop - plan.skip)
        tiles.append((rows, keys.to(device), masked.to(device)))
        start = stop
    return tiles


def tile_stop(start, end):
    """The row after the tile that begins at `start`. It ends with a subtree where it can: then no
    row of the next tile has to hide that subtree's keys. But products of few rows are slow, so only
    where the tile is more than a quarter full. Else it is full, or the stream is over."""
    size = end - start                                      # of a tile that stops at this end
    fits = (size > TILE_ROWS // 4) & (size <= TILE_ROWS)
    within = end[fits]
    if len(within):
        return within.max().item()
    return min(start + TILE_ROWS, len(end))


class TileAttention(torch.autograd.Function):
    """The twin of attention_by_mask, tile by tile. Here q is the given one divided by sqrt(E), and
    dq the gradient of the given one:

    forward:                      out = p v,  p = softmax(q k')
    backward, p computed again:   dv = p' do,  ds = p (do v' - delta),  delta = sum(do out),
                                  dk = ds' q,  dq = ds k / sqrt(E)"""

    @staticmethod
    def by_group(x, G):
        """(T, H, E) -> (G, R, T, E): side by side the R query heads that share a key head."""
        grouped = x.unflatten(1, (G, -1))                           # (T, G, R, E)
        return grouped.permute(1, 2, 0, 3).contiguous()

    @staticmethod
    def by_row(x):
        """(G, R, T, E) -> (T, H, E), the reverse."""
        return x.permute(2, 0, 1, 3).flatten(1, 2)

    @staticmethod
    def probabilities(q, k, masked):
        """p (G, R, n, m) of q (G, R, n, E), k (G, m, E), masked (n, h): keys as in row_tiles."""
        s = q.flatten(1, 2) @ k.mT                                  # (G, R n, m)
        s = s.unflatten(1, q.shape[1:3])
        seen_by_all = s.shape[-1] - masked.shape[1]
        s[..., seen_by_all:].masked_fill_(masked, -math.inf)
        return s.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, plan):
        G = k.shape[1]
        q = TileAttention.by_group(q * q.shape[-1] ** -0.5, G)      # from here on q / sqrt(E)
        k = k.transpose(0, 1).contiguous()                          # (G, T, E)
        v = v.transpose(0, 1).contiguous()
        out = torch.empty_like(q)
        for rows, keys, masked in row_tiles(plan):
            some_q = q[:, :, rows]                                  # (G, R, n, E)
            p = TileAttention.probabilities(some_q, k[:, keys], masked)
            some_out = p.flatten(1, 2) @ v[:, keys]                 # (G, R n, E)
            out[:, :, rows] = some_out.view_as(some_q)
        out = TileAttention.by_row(out)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, do):
        """do (N, H, E) -> dq (N, H, E), dk and dv (T, G, E), in the dtype of q, and None for plan.

        forward saved q (G, R, N, E), divided by sqrt(E), k and v (G, T, E), out (N, H, E), and
        ctx.plan; N = T - plan.skip. Keys are in many tiles: sums of dk and dv in full_precision."""
        q, k, v, out = ctx.saved_tensors
        G, R = q.shape[:2]
        delta = (do * out).sum(-1, keepdim=True)                    # (N, H, 1)
        delta = TileAttention.by_group(delta, G)
        do = TileAttention.by_group(do, G)
        dq = torch.empty_like(q)
        dk = full_precision(torch.zeros_like(k))
        dv = full_precision(torch.zeros_like(v))
        for rows, keys, masked in row_tiles(ctx.plan):
            some_q = q[:, :, rows].flatten(1, 2)                    # (G, R n, E)
            some_do = do[:, :, rows].flatten(1, 2)
            some_delta = delta[:, :, rows].flatten(1, 2)            # (G, R n, 1)
            some_k = k[:, keys]                                     # (G, m, E)
            p = TileAttention.probabilities(q[:, :, rows], some_k, masked)
            p = p.flatten(1, 2)                                     # (G, R n, m)
            dp = some_do @ v[:, keys].mT
            ds = dp.sub_(some_delta).mul_(p)
            some_dq = ds @ some_k                                   # (G, R n, E)
            dq[:, :, rows] = some_dq.unflatten(1, (R, -1))
            dk.index_add_(1, keys, (ds.mT @ some_q).to(dk.dtype))
            dv.index_add_(1, keys, (p.mT @ some_do).to(dv.dtype))
        dq = TileAttention.by_row(dq * q.shape[-1] ** -0.5)
        dk = dk.transpose(0, 1).to(q.dtype)
        dv = dv.transpose(0, 1).to(q.dtype)
        return dq, dk, dv, None


# ------------------------------------------------------------------ Triton kernels
# A kernel says what one program does with one tile; the grid says how many programs run. Sums are
# float32, and "ieee" keeps float32 operands whole. Attention's exponentials are powers of two, as
# `scores` multiplies by log2(e); those of logits, and join_kernel's, are natural.
# TRITON_INTERPRET=1 runs the same code on a CPU, for tests.
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    # for these Triton is not to compile anew where a number is 1 or a multiple of 16, or where a
    # tensor begins at another address
    VARYING = ("N", "S", "T", "W", "TARGET", "PICKED", "LOG_SUM", "GRAD")
    jit = triton.jit(do_not_specialize=VARYING)
    KERNELS = "triton"                                              # see choose_kernels
except ImportError:                     # no wheel for this system: the twins do the work
    triton = constexpr = None
    KERNELS = "torch"

    def jit(kernel):
        return kernel

KERNEL_WIDTHS = (16, 32, 64, 128)       # head widths E that the kernels know
LOGITS_OF_PROGRAM = 4096                # of one row: 16 a thread of 8 warps; not tuned


def choose_kernels(name):
    """Use "triton" (where it is installed) or "torch" (the twins everywhere) from now on."""
    global KERNELS
    KERNELS = name


def use_kernels(x):
    """Is x for the kernels: are they switched on, and do they know its device and dtype?"""
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return KERNELS == "triton" and runs and known


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def launch(kernel, grid, warps, x, *args):
    """Run a kernel on the device of x, which need not be the current one. warps: how many groups of
    32 threads share a program's work; of a product on matrix units (bf16, float16) each takes 16
    rows at least, so 64 rows have work for four."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, num_warps=warps, num_stages=2)


@jit
def load_rows(X, rows, N, head, heads: constexpr, E: constexpr):
    """These rows (B,) of one head of X (N, heads, E): (B, E), zero from row N on."""
    begin = (rows[:, None] * heads + head) * E
    at = begin + tl.arange(0, E)
    return tl.load(X + at, mask=rows[:, None] < N, other=0.0)


@jit
def store_rows(X, x, rows, N, head, heads: constexpr, E: constexpr):
    """The reverse of load_rows: rows from N on are not written."""
    begin = (rows[:, None] * heads + head) * E
    at = begin + tl.arange(0, E)
    tl.store(X + at, x, mask=rows[:, None] < N)


@jit
def scores(q, k, sees):
    """q k' / sqrt(E), times log2(e) so that powers of two do; -inf where a row does not see."""
    log2_e = 1.4426950408889634
    scale = log2_e / q.shape[1] ** 0.5
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(sees, s, float("-inf"))


@jit
def tree_forward(Q, K, V, OUT, LSE,
                 END, FIRST, TILES,
                 N, T, H: constexpr, G: constexpr, E: constexpr, B: constexpr):
    # out = softmax(q k' / sqrt(E)) v and its log-sum-exp: program (row tile a, head h). Of the keys
    # so far: top is the largest score s, total = sum 2^(s - top), out = sum 2^(s - top) v
    # (Milakov & Gimelshein 2018). Q and OUT (N, H, E), K and V (T, G, E); LSE (H, N), as `scores`:
    # in powers of two. END (T, padded); row tile a reads key tiles TILES[FIRST[a]:FIRST[a + 1]]
    a = tl.program_id(0)
    h = tl.program_id(1)
    g = h * G // H
    row = a * B + tl.arange(0, B)                       # in q, which holds the last N of T rows
    i = (row + T - N)[:, None]
    q = load_rows(Q, row, N, h, H, E)
    top = tl.full((B,), -1e30, tl.float32)              # finite: -inf less -inf is not a number
    total = tl.zeros((B,), tl.float32)
    out = tl.zeros((B, E), tl.float32)
    first = tl.load(FIRST + a)
    stop = tl.load(FIRST + a + 1)
    for n in range(first, stop):
        j = tl.load(TILES + n) * B + tl.arange(0, B)
        end = tl.load(END + j)
        k = load_rows(K, j, T, g, G, E)
        v = load_rows(V, j, T, g, G, E)
        sees = (j[None] <= i) & (i < end[None])
        s = scores(q, k, sees)                          # (rows, keys)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        out = out * shrink[:, None]
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new
    out = out / total[:, None]
    store_rows(OUT, out, row, N, h, H, E)
    lse = top + tl.log2(total)
    tl.store(LSE + h * N + row, lse, mask=row < N)


@jit
def tree_backward_q(Q, K, V, DO, OUT, LSE, DELTA, DQ,
                    END, FIRST, TILES,
                    N, T, H: constexpr, G: constexpr, E: constexpr, B: constexpr):
    # dq = ds k / sqrt(E),  ds = p (do v' - delta),  p = 2^(s - lse),  delta = sum(do out):
    # program (row tile a, head h). Shapes as in tree_forward; writes DQ (N, H, E) and DELTA (H, N)
    a = tl.program_id(0)
    h = tl.program_id(1)
    g = h * G // H
    row = a * B + tl.arange(0, B)
    i = (row + T - N)[:, None]
    q = load_rows(Q, row, N, h, H, E)
    do = load_rows(DO, row, N, h, H, E)
    out = load_rows(OUT, row, N, h, H, E)
    delta = tl.sum(do.to(tl.float32) * out, 1)
    tl.store(DELTA + h * N + row, delta, mask=row < N)  # for tree_backward_kv
    lse = tl.load(LSE + h * N + row, mask=row < N, other=0.0)
    dq = tl.zeros((B, E), tl.float32)
    first = tl.load(FIRST + a)
    stop = tl.load(FIRST + a + 1)
    for n in range(first, stop):
        j = tl.load(TILES + n) * B + tl.arange(0, B)
        end = tl.load(END + j)
        k = load_rows(K, j, T, g, G, E)
        v = load_rows(V, j, T, g, G, E)
        sees = (j[None] <= i) & (i < end[None])
        p = tl.exp2(scores(q, k, sees) - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = dq * (1 / E ** 0.5)
    store_rows(DQ, dq, row, N, h, H, E)


@jit
def tree_backward_kv(Q, K, V, DO, LSE, DELTA, DK, DV, END,
                     N, T, H: constexpr, G: constexpr, E: constexpr, B: constexpr, C: constexpr):
    # dv = p' do,  dk = ds' q / sqrt(E), what head h adds to them: program (head h, tile b of C
    # keys); the roots' tiles, which all rows see, take longest and come first. Depth first, the
    # rows that see a key are neighbours: from the key itself to its end. Shapes as
    # in tree_forward; DELTA (H, N) is there; writes DK and DV (T, H, E), float32, for each head h
    h = tl.program_id(0)
    b = tl.program_id(1)
    g = h * G // H
    j = b * C + tl.arange(0, C)
    end = tl.load(END + j, mask=j < T, other=0)
    k = load_rows(K, j, T, g, G, E)
    v = load_rows(V, j, T, g, G, E)
    dk = tl.zeros((C, E), tl.float32)
    dv = tl.zeros((C, E), tl.float32)
    before = T - N                                      # keys without a row that asks
    first_tile = tl.maximum(b * C - before, 0) // B     # of the first row that sees a key of b
    last_end = tl.max(end, 0)
    stop_tile = tl.cdiv(tl.maximum(last_end - before, 0), B)
    for a in range(first_tile, stop_tile):
        row = a * B + tl.arange(0, B)
        i = (row + before)[None]
        q = load_rows(Q, row, N, h, H, E)
        do = load_rows(DO, row, N, h, H, E)
        lse = tl.load(LSE + h * N + row, mask=row < N, other=0.0)
        delta = tl.load(DELTA + h * N + row, mask=row < N, other=0.0)
        sees = (j[:, None] <= i) & (i < end[:, None])
        p = tl.exp2(scores(k, q, sees) - lse[None])     # scores, transposed: (keys, rows)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk = dk * (1 / E ** 0.5)
    store_rows(DK, dk, j, T, h, H, E)
    store_rows(DV, dv, j, T, h, H, E)


@lru_cache(1)
def tree_tiles(plan, B):
    """Where rows look, in tiles of B rows and B keys, as int32: end, filled up with zeros to whole
    tiles (no row sees a key that ends at 0); first (row tiles + 1,); tiles, row tile by row tile
    the numbers of the key tiles it sees: of row tile a, tiles[first[a]:first[a + 1]]."""
    T = len(plan.end)
    device = plan.position.device
    end = functional.pad(plan.end, (0, -T % B))                     # whole tiles
    first_row = torch.arange(plan.skip, T, B)[:, None]              # of each row tile
    first_key = torch.arange(0, T, B)                               # of each key tile
    last_end = end.view(-1, B).amax(1)
    sees = (first_key < first_row + B) & (first_row < last_end)     # (row tiles, key tiles)
    count = sees.sum(1)                                             # of each row tile's key tiles
    first = functional.pad(count.cumsum(0), (1, 0))
    tiles = sees.nonzero()[:, 1]
    return [send(x.int(), device) for x in (end, first, tiles)]


class TreeAttention(torch.autograd.Function):
    """The twin of attention_by_mask as kernels that visit only what `end` leaves visible; a rerun
    gives the same bits."""

    @staticmethod
    def tile_sizes(q):
        """(rows of a tile, warps; keys of a tile of tree_backward_kv, warps): what registers hold.
        128 keys read q and do half as often as 64, and give eight warps 16 rows each. float32
        products ("ieee") use no matrix units: there a warp may have fewer rows."""
        E = q.shape[-1]
        if q.element_size() == 4:
            warps = max(4, E // 16)
            return 32, warps, 32, warps
        if E == 128:
            return 64, 4, 128, 8
        return 64, 4, 64, 4

    @staticmethod
    def forward(ctx, q, k, v, plan):
        N, H, E = q.shape
        T, G, _ = k.shape
        assert k.shape == v.shape == (len(plan.end), G, E)
        assert N == T - plan.skip
        assert H % G == 0
        assert E in KERNEL_WIDTHS
        assert q.dtype == k.dtype == v.dtype
        assert use_kernels(q)
        assert T * H * E < 2 ** 31, "places in a tensor are 32-bit numbers"
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
        B, warps, _, _ = TreeAttention.tile_sizes(q)
        ctx.end, ctx.first, ctx.tiles = tree_tiles(plan, B)
        ctx.sizes = N, T, H, G, E, B
        out = torch.empty_like(q)
        lse = q.new_empty(H, N, dtype=torch.float32)
        launch(tree_forward, (cdiv(N, B), H), warps,
               q, k, v, out, lse,
               ctx.end, ctx.first, ctx.tiles,
               *ctx.sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        N, T, H, G, E, B = ctx.sizes
        _, warps, C, warps_kv = TreeAttention.tile_sizes(q)
        do = do.contiguous()
        dq = torch.empty_like(q)
        delta = torch.empty_like(lse)
        launch(tree_backward_q, (cdiv(N, B), H), warps,
               q, k, v, do, out, lse, delta, dq,
               ctx.end, ctx.first, ctx.tiles,
               *ctx.sizes)
        by_head = q.new_empty(2, T, H, E, dtype=torch.float32)      # dk and dv
        launch(tree_backward_kv, (H, cdiv(T, C)), warps_kv,
               q, k, v, do, lse, delta, *by_head, ctx.end,
               *ctx.sizes, C)
        dk, dv = by_head.unflatten(2, (G, -1)).sum(3).to(k.dtype)   # over heads that share a key
        return dq, dk, dv, None


@jit
def rope_kernel(X, COS, SIN, OUT, N, H: constexpr, E: constexpr, B: constexpr):
    # apply_rope: program n turns B of the N = T H heads, head n B and those after it, as far as
    # there are any; products and sums in float32. X and OUT (T, H, E), COS and SIN (T, E/2)
    head = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    i = tl.arange(0, E // 2)[None]
    inside = head < N
    angle = head // H * (E // 2) + i                    # of the head's token
    cos = tl.load(COS + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=inside, other=0.0).to(tl.float32)
    first = head * E + i
    second = first + E // 2
    a = tl.load(X + first, mask=inside, other=0.0)
    b = tl.load(X + second, mask=inside, other=0.0)
    tl.store(OUT + first, a * cos - b * sin, mask=inside)
    tl.store(OUT + second, b * cos + a * sin, mask=inside)


def launch_rope_kernel(x, cos, sin):
    """apply_rope by rope_kernel: a program for 32 heads (not tuned)."""
    T, H, E = x.shape
    B = 32
    x = x.contiguous()
    out = torch.empty_like(x)
    launch(rope_kernel, (cdiv(T * H, B),), 4,
           x, cos, sin, out,
           T * H, H, E, B)
    return out


class KernelRope(torch.autograd.Function):
    """The twin of apply_rope. Its gradient turns by the same angles the other way: -sin."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return launch_rope_kernel(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return launch_rope_kernel(grad, cos, -sin), None, None


@jit
def row_totals(Z, TARGET, PICKED, LOG_SUM, V, C: constexpr):
    # z[target] and log sum exp(z) of one row of logits, read once; total = sum exp(z - top) so far.
    # Program n: row n of Z (N, V), C logits at a time, the last part shorter; TARGET (N,) int64;
    # writes PICKED and LOG_SUM (N,), float32
    n = tl.program_id(0)
    Z += n.to(tl.int64) * V
    top = float("-inf")                 # unlike in tree_forward: every part has a finite logit
    total = 0.0
    for start in range(0, V, C):
        v = start + tl.arange(0, C)
        z = tl.load(Z + v, mask=v < V, other=float("-inf"))
        z = z.to(tl.float32)
        new = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - new)
        p = tl.exp(z - new)
        total = total * shrink + tl.sum(p, 0)
        top = new
    target = tl.load(TARGET + n)
    picked = tl.load(Z + target)
    tl.store(PICKED + n, picked.to(tl.float32))
    tl.store(LOG_SUM + n, top + tl.log(total))


@jit
def row_gradients(Z, TARGET, LOG_SUM, GRAD, V, C: constexpr):
    # z <- g (onehot(target) - exp(z - log_sum)), in place, for C logits of one row: program (row,
    # part), part 0, 1, ... while it begins before V. Z (N, V): V neighbouring tokens, rarely all of
    # the vocabulary, see logit_gradients; TARGET (N,) int64, counted from the first of them, adds
    # nothing where it is outside of 0 .. V - 1; LOG_SUM (N,), of all the vocabulary; GRAD (N,): g
    n = tl.program_id(0)
    v = tl.program_id(1) * C + tl.arange(0, C)
    Z += n.to(tl.int64) * V
    z = tl.load(Z + v, mask=v < V, other=0.0)
    z = z.to(tl.float32)
    log_sum = tl.load(LOG_SUM + n)
    p = tl.exp(z - log_sum)
    target = tl.load(TARGET + n)
    one = tl.where(v == target, 1.0, 0.0)
    g = tl.load(GRAD + n)
    tl.store(Z + v, g * (one - p), mask=v < V)


def launch_row_totals(z, target, picked, log_sum):
    """pick_and_sum by row_totals: one program a row."""
    N, V = z.shape
    C = LOGITS_OF_PROGRAM
    launch(row_totals, (N,), 8,
           z, target, picked, log_sum,
           V, C)


def launch_row_gradients(z, target, log_sum, grad):
    """logit_gradients by row_gradients: one program for C logits of each row."""
    N, V = z.shape
    C = LOGITS_OF_PROGRAM
    launch(row_gradients, (N, cdiv(V, C)), 8,
           z, target, log_sum, grad,
           V, C)
    return z


mixed_by_kernel = jit(mixed)


@jit
def scaled_logits(Z, start, V, temperature, C: constexpr):
    # z / temperature of C logits of one row from `start` on, float32; -inf from V on
    v = start + tl.arange(0, C)
    z = tl.load(Z + v, mask=v < V, other=float("-inf"))
    return z.to(tl.float32) / temperature


@jit
def draw_kernel(Z, SEED, POSITION, TOKEN, V, temperature, top_p, C: constexpr):
    # draw_token: program n draws for row n of Z (N, V), C logits at a time. Nothing is divided by
    # `total`: here p is exp(z - top), and `mass`, `before`, `goal` and `likelier` are sums of p, so
    # top_p becomes top_p total. SEED and POSITION (N,) int64; writes TOKEN (N,) int64
    n = tl.program_id(0)
    Z += n.to(tl.int64) * V
    top = -1e30                                         # finite, as a whole part can be -inf
    total = 0.0
    for start in range(0, V, C):
        z = scaled_logits(Z, start, V, temperature, C)
        new = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        top = new
    x = tl.load(SEED + n) + tl.load(POSITION + n) * 0x9E3779B9
    rejected = True
    while rejected:
        u = (mixed_by_kernel(x).to(tl.float64) + 0.5) / 4294967296
        goal = u.to(tl.float32) * total
        x += 0x85EBCA6B                                 # of the next attempt
        start = 0
        before = 0.0                                    # the mass before `start`
        p = tl.exp(scaled_logits(Z, start, V, temperature, C) - top)
        mass = tl.sum(p, 0)
        while (before + mass <= goal) & (start + C < V):
            before += mass
            start += C
            p = tl.exp(scaled_logits(Z, start, V, temperature, C) - top)
            mass = tl.sum(p, 0)
        passed = before + tl.cumsum(p, 0) <= goal       # the token is the first that is not
        pick = start + tl.sum(passed.to(tl.int32), 0)
        pick = tl.minimum(pick, V - 1)                  # rounding can put `goal` at the end of all
        mine = tl.load(Z + pick).to(tl.float32) / temperature
        likelier = 0.0
        for start in range(0, V, C):
            z = scaled_logits(Z, start, V, temperature, C)
            p = tl.exp(z - top)
            likelier += tl.sum(tl.where(z > mine, p, 0.0), 0)
        rejected = (likelier >= top_p * total) | (tl.exp(mine - top) == 0)
        rejected = rejected & (total > 0)               # false where total is NaN: any token then
        tl.store(TOKEN + n, pick.to(tl.int64))


def launch_draw_kernel(logits, seed, position, temperature, top_p):
    """draw_token by draw_kernel: one program a row."""
    N, V = logits.shape
    token = torch.empty_like(seed)
    launch(draw_kernel, (N,), 8,
           logits.contiguous(), seed.contiguous(), position.contiguous(), token,
           V, float(temperature), float(top_p), LOGITS_OF_PROGRAM)
    return token


# ================================================================== part III: the sampling engine
# The k samples of a prompt share its keys and values, and all prompts share those of what they
# begin with, which is called the instruction. So the cache is a pool of pages of 64 keys, and a
# page belongs to the instruction, to one prompt, or to one sample. A *job* is a prompt with those
# of its samples that are decoded together, a *slot* where one of them is decoded. The slots in use
# advance together, a token a step: they are the *rows* of a batch, in the order of their jobs.
# Every `poll` steps there is a *look* at what has ended (finish).
#
# Prompts A and B with two samples each, in rows 0 (A0), 1 (A1), 2 (B0), 3 (B1); the instruction,
# each prompt and each sample fill one page:
#
#     page       0             1        2        3 4 5     6    7    8    9
#     holds      instruction   A        B        free      B1   B0   A1   A0
#     readers    0 1 2 3       0 1      2 3                3    2    1    0      rows that read it
#     results    1 2 3 4       5 6      7 8                9    10   11   12
#
# In a step each page is taken once, for all its readers: a softmax over its keys gives each reader
# one *result*, a log-sum-exp and a mean of values. A second softmax, over the results of a row
# (row 0: results 1, 5 and 12), joins them to what attention over all its keys would give. Result 0
# is the empty one, of weight 0: it fills up the lists of rows that read fewer pages.
PAGE = 64                   # keys of a page
NO_KEY = -3e4               # added to the score of a key that is not there; finite: no nan


@dataclass
class Sampling:
    """How answers are drawn; see generate_iter."""
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: list
    seed: int


@dataclass
class Capacity:
    """What an Engine holds; see plan_capacity."""
    pages: int
    slots: int
    width: int                  # samples of a job
    poll: int                   # tokens between two looks at what is finished


@dataclass
class Job:
    """A prompt and those of its samples that are decoded together, all equally far."""
    number: int                                     # which prompt
    prompt: list                                    # its ids
    samples: list                                   # sample numbers; each gets a slot
    slots: dict = field(default_factory=dict)       # slot -> sample number, while it is decoded
    pages: list = field(default_factory=list)       # of the prompt, after the instruction
    drawn: int = 0                                  # tokens drawn so far, in each slot


@torch.inference_mode()
def generate_iter(model, prompts, k=1, max_new_tokens=256, temperature=1.0, top_p=0.95, stop=(),
                  seed=0, kv_tokens=None, max_slots=None, share=True):
    """Yield (prompt number, k lists of new ids) as prompts finish; equals generate_plain.

    prompts: lists of ids. A list that ends in a `stop` id is complete, else it was ended at
    max_new_tokens. kv_tokens: keys held at once (default: what 2 GiB hold on a CPU, 70% of what is
    free on a GPU); jobs that do not fit wait. max_slots: samples decoded at once (default: 1,024 on
    a GPU, 128 elsewhere; k at least). share=False keeps a copy of the prompt for each sample.
    InputError if kv_tokens cannot hold one job."""
    if not prompts:
        return
    sampling = Sampling(max_new_tokens, temperature, top_p, list(stop), seed)
    if share:
        # what all prompts begin with: the instruction, or more if they have more in common; of a
        # single prompt all but its last token
        instruction = prompts[0][:common_prefix(prompts)]
        together = [list(range(k))]                         # the samples of each job
    else:
        instruction = []
        together = [[sample] for sample in range(k)]
    jobs = [Job(number, ids, samples)
            for number, ids in enumerate(prompts)
            for samples in together]
    capacity = plan_capacity(model, jobs, len(instruction), max_new_tokens, kv_tokens, max_slots)
    engine = Engine(model, instruction, sampling, capacity)
    waiting = jobs[::-1]                                    # a stack: the next job on top
    answers = [{} for _ in prompts]
    finished = []                                           # at the look before
    while waiting or engine.jobs:
        engine.admit(waiting)
        waiting += engine.reserve()
        engine.compact()
        engine.decode()
        yield from whole_prompts(answers, finished, k)      # while a GPU is decoding
        finished = engine.finish()
    yield from whole_prompts(answers, finished, k)


def whole_prompts(answers, finished, k):
    """Note finished samples in answers, a dict for each prompt; yield the prompts that are whole:
    (prompt number, k lists of ids)."""
    for number, sample, ids in finished:
        own = answers[number]
        if sample not in own:           # a job that was put back draws its ended samples again
            own[sample] = ids
            if len(own) == k:
                yield number, [own[sample] for sample in range(k)]


def pages_for(tokens):
    """How many pages hold so many keys."""
    return cdiv(tokens, PAGE)


def places_in(pages, count):
    """Where the first `count` keys go that fill these pages: [(page, offset)]."""
    return [(pages[n // PAGE], n % PAGE) for n in range(count)]


def number_reads(groups):
    """Number the results of a step: which row of the batch reads which page, and where its results
    lie.

    groups: pairs (w, reads), of the instruction's pages, of the prompts' and of the samples'. w is
    how many rows can read one page of the group. reads has an entry for each row of the batch: (the
    pages it reads, its place among their readers, 0 ... w - 1). Returned are

    tables     of each group that has pages (first, readers): readers[n] are the w rows that read
               page first + n. A place that no row has holds row 0: that result is computed, and
               nobody uses it
    results    of each row the numbers of its results. A group numbers them page by page, in a page
               place by place; the first group begins with 1, the next where it stopped

    The drawing above:
        groups   (4, [([0], 0), ([0], 1), ([0], 2), ([0], 3)])
                 (2, [([1], 0), ([1], 1), ([2], 0), ([2], 1)])
                 (1, [([9], 0), ([8], 0), ([7], 0), ([6], 0)])
        tables   (0, [[0, 1, 2, 3]])   (1, [[0, 1], [2, 3]])   (6, [[3], [2], [1], [0]])
        results  [1, 5, 12]   [2, 6, 11]   [3, 7, 10]   [4, 8, 9]"""
    rows = len(groups[0][1])
    tables = []
    results = [[] for _ in range(rows)]
    next_result = 1
    for w, reads in groups:
        assert len(reads) == rows
        pages = {page for own, _ in reads for page in own}
        if not pages:
            continue
        first = min(pages)
        last = max(pages)
        readers = [[0] * w for _ in range(first, last + 1)]
        for row, (own, reader) in enumerate(reads):
            for page in own:
                line = page - first
                readers[line][reader] = row
                results[row].append(next_result + line * w + reader)
        tables.append((first, readers))
        next_result += len(readers) * w
    return tables, results


class PagePool:
    """Keys and values in pages: k and v (layers, pages, G, 64, E), bias (pages, 64). A page is free
    or has one owner: the instruction, a job, or a slot."""

    def __init__(self, config, pages, dtype, device):
        c = config
        shape = (c.num_hidden_layers, pages, c.num_key_value_heads, PAGE, c.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.bias = self.k.new_full((pages, PAGE), NO_KEY)  # 0 where a key is
        self.free = list(range(pages))                      # always sorted

    def take_lowest(self, count):
        """Claim pages for the instruction or a prompt. The lowest: their readers are many, and so
        they lie in a short range."""
        return [self.free.pop(0) for _ in range(count)]

    def take_highest(self, count):
        """Claim pages for one sample. The highest, so that the other range stays short."""
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages):
        """Pages that nobody reads any more, empty again."""
        self.bias[pages] = NO_KEY
        self.free = sorted(self.free + pages)
        assert len(set(self.free)) == len(self.free), "a page had two owners"

    def move(self, moved):
        """Copy pages, {page: another that was claimed to take its place}, and free them."""
        old, new = torch.tensor(list(moved.items()), device=self.bias.device).T
        for k, v in zip(self.k, self.v):                    # by layer: the copies are short
            k[new] = k[old]
            v[new] = v[old]
        self.bias[new] = self.bias[old]
        self.give_back(list(moved))

    def fill(self, page, offset):
        """From now on there are keys at these places; page, offset: (n,)."""
        zeros = self.bias.new_zeros(len(page))              # a plain 0 would come from the host
        self.bias.index_put_((page, offset), zeros)

    def write(self, layer, page, offset, k, v):
        """Store k and v (n, G, E) of a layer at these places, page and offset (n,). Where two
        tensors of indices have a slice between them, their n comes first: (n, G, E)."""
        self.k[layer][page, :, offset] = k
        self.v[layer][page, :, offset] = v

    def first(self, layer, page_count, count):
        """k and v (count, G, E) of the first `count` keys of the lowest `page_count` pages."""
        k = self.k[layer, :page_count].transpose(1, 2).flatten(0, 1)    # (pages x 64, G, E)
        v = self.v[layer, :page_count].transpose(1, 2).flatten(0, 1)
        return k[:count], v[:count]


def attend_pages(q, readers, k, v, bias, lse, out):
    """Attention of the w readers of each of p pages to its keys. q (B, G, R, E); readers (p, w):
    which rows of q; k and v (p, G, 64, E); bias (p, 64): 0 or NO_KEY. With s = q k' / sqrt(E) +
    bias, log sum exp(s) is written to lse (p w, G, R), and softmax(s) v to out (p w, G, R, E)."""
    E = q.shape[-1]
    fits = E * q.element_size() < 512                       # else too much for a T4's shared memory
    if use_kernels(q) and E in KERNEL_WIDTHS and fits:
        return launch_page_kernel(q, readers, k, v, bias, lse, out)
    p, w = readers.shape
    some_q = q[readers].transpose(1, 2).flatten(2, 3)       # (p, G, w R, E)
    s = (some_q * E ** -0.5) @ k.mT                         # (p, G, w R, 64)
    s.add_(bias[:, None, None])
    probability = s.softmax(-1, dtype=lse.dtype)
    # the largest probability is exp(max s - lse); solved for lse, it saves a second sum of exp(s)
    some_lse = s.amax(-1) - probability.amax(-1).log()
    some_out = probability.to(v.dtype) @ v
    by_reader = some_lse.unflatten(2, (w, -1)).transpose(1, 2)                     # (p, w, G, R)
    lse.unflatten(0, (p, w)).copy_(by_reader)
    by_reader = some_out.unflatten(2, (w, -1)).transpose(1, 2)                     # (p, w, G, R, E)
    out.unflatten(0, (p, w)).copy_(by_reader)


@jit
def page_kernel(Q, READERS, K, V, BIAS, LSE, OUT, W,
                G: constexpr, R: constexpr, E: constexpr, P: constexpr, M: constexpr):
    # attend_pages: program (page and key head n, M of its W = w R queries), where query i is that
    # of reader i // R, head i % R. Q (B, G, R, E); READERS (pages, w) int64, which rows of Q; K and
    # V (pages, G, P, E), BIAS (pages, P), 0 where a key is; writes LSE (pages, w, G, R), a natural
    # log, and OUT (pages, w, G, R, E). A page without a key: LSE below -2e4, OUT any finite number
    n = tl.program_id(0).to(tl.int64)
    page = n // G
    g = n % G
    i = tl.program_id(1) * M + tl.arange(0, M)
    asks = i < W
    result = page * (W // R) + i // R                   # of the group: page by page
    row = tl.load(READERS + result, mask=asks, other=0)
    column = tl.arange(0, E)[None]
    place = (row * G + g) * R + i % R                   # of the query in Q
    q = tl.load(Q + place[:, None] * E + column, mask=asks[:, None], other=0.0)
    j = tl.arange(0, P)
    key = n * P + j
    key_stop = (n + 1) * P
    k = load_rows(K, key, key_stop, 0, 1, E)
    v = load_rows(V, key, key_stop, 0, 1, E)
    bias = tl.load(BIAS + page * P + j)
    filled = bias == 0
    s = scores(q, k, filled[None])                      # (queries, keys)
    top = tl.maximum(tl.max(s, 1), -1e30)
    p = tl.exp2(s - top[:, None])
    total = tl.maximum(tl.sum(p, 1), 1.0)               # less only where no key is
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    out = out / total[:, None]
    at = (result * G + g) * R + i % R                   # of the query in OUT and LSE
    tl.store(OUT + at[:, None] * E + column, out, mask=asks[:, None])
    ln_2 = 0.6931471805599453
    lse = (top + tl.log2(total)) * ln_2
    tl.store(LSE + at, lse, mask=asks)


def launch_page_kernel(q, readers, k, v, bias, lse, out):
    """attend_pages by page_kernel: a program for M queries of each page and key head."""
    _, G, R, E = q.shape
    p, w = readers.shape
    W = w * R
    M = 16 if W <= 16 or q.element_size() == 4 else 64      # 64 float32 rows would spill registers
    launch(page_kernel, (p * G, cdiv(W, M)), 4,
           q.contiguous(), readers, k.contiguous(), v.contiguous(), bias,
           lse, out,
           W, G, R, E, PAGE, M)


def join_results(lse, out, terms, count, dtype):
    """Join what each query head of each row found in its pages: lse (results, G, R) and out
    (results, G, R, E) -> (B H, E) in dtype. terms (B H, S), S the most results of a row: line
    b H + h says where head h of row b finds its results, as places in lse.flatten(), where head h
    of result r lies at r H + h. The first count[b] are real; the others name the empty result,
    which join_kernel skips."""
    E = out.shape[-1]
    if use_kernels(lse) and E in KERNEL_WIDTHS:
        return launch_join_kernel(lse, out, terms, count, dtype)
    lse[0].fill_(-math.inf)                                 # the empty result
    out[0].zero_()
    weight = lse.flatten()[terms].softmax(-1)                                      # (B H, S)
    # a row of joined is the sum of out's rows in that row of terms, each times its weight
    joined = functional.embedding_bag(
        terms,
        out.flatten(0, 2),                                                         # (results H, E)
        mode="sum",
        per_sample_weights=weight)                                                 # (B H, E)
    return joined.to(dtype)


@jit
def join_kernel(LSE, OUT, TERMS, COUNT, JOINED, S, H: constexpr, E: constexpr, C: constexpr):
    # join_results: program n joins the results of one query head of one row, C at a time; as in
    # tree_forward, top is the largest log-sum-exp so far. LSE (results H,), OUT (results H, E),
    # float32; TERMS (B H, S), COUNT (B,) int64; writes JOINED (B H, E)
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(COUNT + n // H)
    column = tl.arange(0, E)[None]
    top = -1e30
    total = 0.0
    joined = tl.zeros((E,), tl.float32)
    for start in range(0, count, C):
        s = start + tl.arange(0, C)
        there = s < count
        term = tl.load(TERMS + n * S + s, mask=there, other=0)
        lse = tl.load(LSE + term, mask=there, other=float("-inf"))
        out = tl.load(OUT + term[:, None] * E + column, mask=there[:, None], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        shrink = tl.exp(top - new)
        weight = tl.exp(lse - new)
        joined = joined * shrink + tl.sum(weight[:, None] * out, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new
    tl.store(JOINED + n * E + tl.arange(0, E), joined / total)


def launch_join_kernel(lse, out, terms, count, dtype):
    """join_results by join_kernel: a program for each query head of each row, of one warp, as
    there are thousands."""
    rows, S = terms.shape
    E = out.shape[-1]
    H = rows // len(count)
    joined = out.new_empty(rows, E, dtype=dtype)
    launch(join_kernel, (rows,), 1,
           lse, out, terms, count, joined,
           S, H, E, 16)
    return joined


@dataclass
class PageGroup:
    """Neighbouring pages, taken together in a step for w readers each."""
    pages: slice
    readers: torch.Tensor       # (pages, w) which rows of the batch, see number_reads
    results: slice              # where the pages x w results lie


@dataclass
class Batch:
    """All live slots between two looks, a row each, as tensors on the device."""
    slot: torch.Tensor          # (B,)
    length: torch.Tensor        # (B,) of the prompt
    drawn: torch.Tensor         # (B,) tokens drawn so far
    own: torch.Tensor           # (B, most) the slot's own pages, filled up with what is never read
    groups: list                # of PageGroup
    result_count: int           # of a step, the empty one included
    terms: torch.Tensor         # (B H, S) which (result, query head) each query head adds up
    count: torch.Tensor         # (B,) how many of them; the rest of S is the empty result


class Engine:
    """Decodes many samples at once over a paged cache. Jobs are started by `admit`, get room for
    their next tokens by `reserve`, lie close by `compact`, advance by `decode` and leave by
    `finish`: see generate_iter."""
    # a pass takes prompts until it has so many tokens, or more: enough that products are large, and
    # few enough that what the layers hold of them is small beside the cache
    PREFILL = 4096

    def __init__(self, model, instruction, sampling, capacity):
        c = model.config
        self.model = model
        self.device = model.head.device
        self.sampling = sampling
        self.capacity = capacity
        self.G = c.num_key_value_heads
        self.R = c.num_attention_heads // self.G            # query heads that share a key head
        self.pool = PagePool(c, capacity.pages, model.product_dtype, self.device)
        self.stop = self.ints(sampling.stop)
        self.seeds = self.ints([0] * capacity.slots)        # see sample_seed
        longest = sampling.max_new_tokens + capacity.poll
        self.history = torch.zeros(capacity.slots, longest, dtype=torch.long,
                                   device=self.device)      # ids drawn in each slot
        # was ever the largest logit of a step infinite, or NaN (which amax puts above all)?
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)
        self.free_slots = list(range(capacity.slots))
        self.owned = {}                                     # live slot -> its own pages
        self.jobs = []                                      # under way, the oldest first
        self.cached = 0                 # how many first tokens of every prompt have keys: none yet
        self.shared = self.pool.take_lowest(pages_for(len(instruction)))
        assert self.shared == list(range(len(self.shared)))         # see PagePool.first
        if instruction:
            T = len(instruction)
            self.feed(instruction, [T] * T, places_in(self.shared, T))
            self.cached = T                                 # from now on the instruction's

    def ints(self, values):
        """Python's ints as int64 on the device."""
        return send(torch.tensor(values, dtype=torch.long), self.device)

    def rectangle(self, lists):
        """Lists of ints as one tensor; zeros fill up the shorter ones."""
        longest = max(map(len, lists))
        return self.ints([own + [0] * (longest - len(own)) for own in lists])

    # ---- admit
    def admit(self, waiting):
        """Move jobs from the stack into the cache, as many as fit, and draw their first tokens."""
        while waiting and self.fits(waiting[-1]):
            jobs = []
            tokens = 0
            while waiting and self.fits(waiting[-1]) and tokens < self.PREFILL:
                job = waiting.pop()
                self.assign(job)
                jobs.append(job)
                tokens += len(job.prompt) - self.cached
            self.jobs += jobs
            self.prefill(jobs)

    def fits(self, job):
        """Is there room for a job: its slots, its prompt, and a first page of every answer?"""
        slots = len(job.samples)
        pages = pages_for(len(job.prompt) - self.cached) + slots
        return len(self.free_slots) >= slots and len(self.pool.free) >= pages

    def assign(self, job):
        """Give a job its slots and pages."""
        job.slots = {self.free_slots.pop(): sample for sample in job.samples}
        job.pages = self.pool.take_lowest(pages_for(len(job.prompt) - self.cached))
        for slot in job.slots:
            self.owned[slot] = self.pool.take_highest(1)

    def prefill(self, jobs):
        """Run the prompts of these jobs as one forest, after the instruction; draw first tokens."""
        tokens = []
        end = []
        places = []
        firsts = []                 # (slot, seed, where in `tokens` its prompt ends, length)
        for job in jobs:
            own = job.prompt[self.cached:]
            tokens += own
            end += [len(tokens)] * len(own)
            places += places_in(job.pages, len(own))
            job.drawn = 1
            for slot, sample in job.slots.items():
                seed = sample_seed(self.sampling.seed, job.prompt, sample)
                firsts.append((slot, seed, len(tokens) - 1, len(job.prompt)))
        slot, seed, last, length = self.ints(firsts).T
        self.seeds[slot] = seed
        hidden = self.feed(tokens, end, places)
        self.draw(slot, hidden[last], length, 0)

    def feed(self, tokens, end, places):
        """Hidden states of a forest that follows what is cached, at first nothing; its keys go to
        `places`."""
        page, offset = self.ints(places).T
        self.pool.fill(page, offset)
        skip = self.cached
        T = skip + len(tokens)
        whole = [T] * skip + [skip + e for e in end]
        plan = tree_plan(torch.tensor(whole), skip, self.device)

        def attend(n, q, k, v):
            self.pool.write(n, page, offset, k, v)
            before_k, before_v = self.pool.first(n, len(self.shared), skip)
            k = torch.cat([before_k, k])                    # (T, G, E)
            v = torch.cat([before_v, v])
            return attention(q, k, v, plan)

        return self.model.hidden(self.ints(tokens), plan.position[skip:], attend)

    def draw(self, slot, hidden, length, drawn):
        """Draw the next token of each slot, after a prompt of `length` and an answer of `drawn`
        tokens: hidden (B, D), slot and length (B,), drawn an int or (B,)."""
        logits = self.model.logits(hidden)                                         # (B, V)
        self.broken |= ~logits.amax().isfinite()
        position = length + drawn
        s = self.sampling
        token = draw_token(logits, self.seeds[slot], position, s.temperature, s.top_p)
        self.history[slot, drawn] = token

    # ---- reserve
    def reserve(self):
        """Give every slot pages for its next `poll` tokens. Where none are left, the youngest jobs
        make room, so that the oldest finish; they are returned, and when one starts again, it draws
        the same (see sample_seed), samples that had ended included: a job goes back whole. The
        youngest may be the very job that asks: it has no slots then and needs nothing."""
        put_back = []
        for job in list(self.jobs):
            # the last token that decode draws is fed in the next call: its key needs its place now
            need = pages_for(job.drawn + self.capacity.poll)
            while sum(need - len(self.owned[slot]) for slot in job.slots) > len(self.pool.free):
                youngest = self.jobs[-1]
                put_back.append(youngest)
                self.release(youngest.slots)
            for slot in job.slots:
                own = self.owned[slot]
                own += self.pool.take_highest(need - len(own))
        return put_back

    def release(self, slots):
        """Free these slots, their pages, and the pages of prompts that nobody reads any more."""
        pages = []
        for slot in slots:
            pages += self.owned.pop(slot)
        self.free_slots += slots
        for job in self.jobs:
            job.slots = {slot: sample for slot, sample in job.slots.items()
                         if slot in self.owned}
            if not job.slots:
                pages += job.pages
        self.jobs = [job for job in self.jobs if job.slots]
        self.pool.give_back(pages)

    # ---- compact
    def compact(self):
        """Fill the holes that finished samples left, as a step takes all pages from the first to
        the last of its group, free ones too: the highest page of a prompt moves to the lowest free
        one below it, the lowest page of a sample to the highest free one above it."""
        prompt_pages = sorted(page for job in self.jobs for page in job.pages)
        sample_pages = sorted(page for own in self.owned.values() for page in own)
        free = self.pool.free                               # what is popped is claimed
        moved = {}
        while prompt_pages and free and free[0] < prompt_pages[-1]:
            moved[prompt_pages.pop()] = free.pop(0)
        while sample_pages and free and free[-1] > sample_pages[0]:
            moved[sample_pages.pop(0)] = free.pop()
        if not moved:
            return
        self.pool.move(moved)
        for job in self.jobs:
            job.pages = [moved.get(page, page) for page in job.pages]
        self.owned = {slot: [moved.get(page, page) for page in own]
                      for slot, own in self.owned.items()}

    # ---- decode
    def decode(self):
        """Draw `poll` tokens in every slot. What is drawn changes no shape and no address, only
        what `history` and `drawn` hold; so a step can be recorded and replayed, until the next call
        makes another batch."""
        batch = self.make_batch()
        step = partial(self.step, batch)
        for n in range(self.capacity.poll):
            if n == 1:
                # step 0 ran as written, which loaded all kernels; on CUDA the others are replayed
                step = self.record(step)
            hidden = step()
            self.draw(batch.slot, hidden, batch.length, batch.drawn)
            batch.drawn += 1                                # in place: a replay reads it again
        for job in self.jobs:
            job.drawn += self.capacity.poll

    def step(self, batch):
        """Feed the last drawn token of each slot, and store its key: hidden states (B, D)."""
        last = batch.drawn - 1
        nth = last // PAGE                                  # of the slot's own pages
        page = batch.own.gather(1, nth[:, None])[:, 0]
        offset = last % PAGE
        self.pool.fill(page, offset)

        def attend(n, q, k, v):
            self.pool.write(n, page, offset, k, v)
            return self.attend_cache(n, q, batch)

        tokens = self.history[batch.slot, last]
        return self.model.hidden(tokens, batch.length + last, attend)

    def attend_cache(self, n, q, batch):
        """Attention in layer n of one token a slot, q (B, H, E), over all pages that it reads."""
        heads = q.unflatten(1, (self.G, self.R))                                   # (B, G, R, E)
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(batch.result_count, self.G, self.R, dtype=dtype)
        out = q.new_empty(batch.result_count, *heads.shape[1:], dtype=dtype)
        for group in batch.groups:
            k = self.pool.k[n, group.pages]                                        # (p, G, 64, E)
            v = self.pool.v[n, group.pages]
            bias = self.pool.bias[group.pages]                                     # (p, 64)
            attend_pages(heads, group.readers, k, v, bias,
                         lse[group.results], out[group.results])
        joined = join_results(lse, out, batch.terms, batch.count, q.dtype)         # (B H, E)
        return joined.view_as(q)

    def make_batch(self):
        """The Batch of all live slots, in one order everywhere: that of `live`, job by job."""
        live = [(job, reader, slot)
                for job in self.jobs
                for reader, slot in enumerate(job.slots)]
        known = [(slot, len(job.prompt), job.drawn) for job, _, slot in live]
        slot, length, drawn = self.ints(known).T
        owned = [self.owned[slot] for _, _, slot in live]
        tables, results = number_reads(self.page_reads(live))
        for (job, _, _), own, read in zip(live, owned, results, strict=True):
            assert len(own) >= pages_for(job.drawn + self.capacity.poll), "see reserve"
            assert len(read) == len(self.shared) + len(job.pages) + len(own), "another order"
        groups = []
        next_result = 1                                     # as number_reads numbered them
        for first, readers in tables:
            pages = slice(first, first + len(readers))
            stop = next_result + len(readers) * len(readers[0])
            group = PageGroup(pages, self.ints(readers), slice(next_result, stop))
            groups.append(group)
            next_result = stop
        return Batch(
            slot=slot,
            length=length,
            drawn=drawn,
            own=self.rectangle(owned),
            groups=groups,
            result_count=next_result,
            terms=self.make_terms(results),
            count=self.ints(list(map(len, results))))

    def page_reads(self, live):
        """The groups for number_reads: who reads the pages of the instruction, of the prompts, and
        of the slots themselves. live: [(job, which reader of its prompt, slot)]."""
        instruction = [(self.shared, reader) for reader in range(len(live))]
        prompts = [(job.pages, reader) for job, reader, _ in live]
        samples = [(self.owned[slot], 0) for _, _, slot in live]
        return [(len(live), instruction),
                (self.capacity.width, prompts),
                (1, samples)]

    def make_terms(self, results):
        """(B H, S) of each row's results, filled up with the empty one: result r of query head h of
        all H lies at r H + h, as memory holds (results, G, R). Of row 0 in the drawing, which has
        results 1, 5, 12, two heads would make two lines: 2 10 24 and 3 11 25."""
        H = self.G * self.R
        result = self.rectangle(results)                            # (B, S)
        head = torch.arange(H, device=self.device)[:, None]         # (H, 1)
        terms = result[:, None] * H + head                          # (B, H, S)
        return terms.flatten(0, 1)

    def record(self, step):
        """`step`, on CUDA as a graph: the same kernels on the same memory, without Python."""
        keys = self.pool.k
        if not (keys.is_cuda and use_kernels(keys)):
            return step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            hidden = step()                                 # recorded, not computed

        def replay():
            graph.replay()
            return hidden

        return replay

    # ---- finish
    def finish(self):
        """Take out the samples that are done: [(prompt number, sample number, ids)].
        InputError where a logit was no number."""
        if self.broken:
            raise InputError("the model's logits are not numbers (NaN or infinity): its weights "
                             "are broken, or too large for this --dtype")
        known = [(slot, job.drawn) for job in self.jobs for slot in job.slots]
        slot, drawn = self.ints(known).T                    # (B,)
        # The newest `poll` ids of each slot, and one more: at a job's first look nobody has looked
        # at it yet, as prefill drew it; at later ones it is known not to end the answer
        back = torch.arange(-self.capacity.poll - 1, 0, device=self.device)
        column = drawn[:, None] + back                      # (B, poll + 1), places in history
        ids = self.history[slot[:, None], column]
        ends = torch.isin(ids, self.stop)
        ends |= column == self.sampling.max_new_tokens - 1
        never = self.history.shape[1] + 1                   # more ids than a slot can hold
        length = torch.where(ends, column + 1, never).amin(1)       # up to the first end
        done = {slot: count for (slot, _), count in zip(known, length.tolist()) if count < never}
        answers = self.answers(done)
        self.release(done)
        return answers

    def answers(self, done):
        """[(prompt number, sample number, ids)] of slots that are done: {slot: how many ids}."""
        longest = max(done.values(), default=0)
        drawn = self.history[list(done), :longest].tolist()
        ids = {slot: own[:done[slot]] for slot, own in zip(done, drawn)}
        return [(job.number, sample, ids[slot])
                for job in self.jobs
                for slot, sample in job.slots.items()
                if slot in done]


def plan_capacity(model, jobs, cached, max_new_tokens, kv_tokens, max_slots):
    """The Capacity for these jobs, whose prompts begin with `cached` tokens that have keys;
    InputError where kv_tokens cannot hold the largest of them alone, or memory not kv_tokens."""
    if model.head.is_cuda:
        poll = 32               # steps between two looks, each of which waits for the GPU
        slots = 1024            # rows for which weights are read once a step
    else:
        poll = 4                # a look waits for nothing; a sample that has ended costs until then
        slots = 128             # more rows are hardly faster
    poll = max(1, min(poll, max_new_tokens - 1))
    width = len(jobs[0].samples)
    slots = max(width, max_slots or slots)
    slots = min(slots, len(jobs) * width)
    answer_pages = pages_for(max_new_tokens + poll)                                # at most
    prompt_pages = [pages_for(len(job.prompt) - cached) for job in jobs]
    is_given = kv_tokens is not None
    kv_tokens = kv_tokens or default_kv_tokens(model)
    held = kv_tokens // PAGE
    need = pages_for(cached) + max(prompt_pages) + width * answer_pages
    if held < need:
        longest = max(len(job.prompt) for job in jobs)
        raise InputError(f"--kv-tokens {kv_tokens}: a prompt of {longest} tokens and its samples "
                         f"may need {need * PAGE}; raise it or lower --max-new-tokens")
    largest = sorted(prompt_pages)[-slots:]                     # no more are under way at a time
    held = min(held, pages_for(cached) + sum(largest) + slots * answer_pages)
    if is_given:
        history = 8 * slots * (max_new_tokens + poll)           # bytes, see Engine
        check_memory(held * PAGE * bytes_of_key(model) + history, model.head.device,
                     "lower --kv-tokens or --max-new-tokens")
    return Capacity(held, slots, width, poll)


def default_kv_tokens(model):
    """How many keys 2 GiB hold on a CPU, and 70% of what is free on a GPU: the rest is for what a
    pass over prompts holds, and for what is lost between blocks."""
    memory = 2 ** 31
    if model.head.is_cuda:
        memory = 0.7 * free_on_gpu(model.head.device)
    return int(memory / bytes_of_key(model))


def bytes_of_key(model):
    """What a token's keys and values take in all layers."""
    c = model.config
    elements = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return elements * model.product_dtype.itemsize


def generate(model, prompts, k=1, **options):
    """For each prompt k lists of new ids; see generate_iter for the options."""
    finished = generate_iter(model, prompts, k, **options)
    return [answers for _, answers in sorted(finished)]


# ================================================================== machinery
# ------------------------------------------------------------------ a folder, and its mistakes
STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")       # what a model is stored in


def read_rope(path, raw):
    """{"rope_theta", "rope_scaling"} of a config.json, whose spelling has changed over the years;
    InputError for a kind of scaling that is not known."""
    told = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    readings = [rope_of(path, raw, rope) for rope in told or [{}]]
    if readings[0] != readings[-1]:
        raise InputError(f"{path}: rope_parameters and rope_scaling say two different things")
    return readings[0]


def rope_of(path, raw, rope):
    """read_rope of one of the two spellings."""
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope scaling {rope!r} is unknown, only 'llama3' is")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if raw.get("rope_theta") not in (None, theta):
        raise InputError(f"{path}: rope_theta is {raw['rope_theta']!r} and {theta!r}")
    check_usual(path, rope)
    rope = {name: value for name, value in rope.items() if name != "rope_theta"}
    kind = rope.get("rope_type") or rope.get("type")
    plain = kind == "default" or kind is None and not any(rope.values())
    if kind != "llama3" and not plain:
        raise InputError(f"{path}: rope scaling {kind or rope!r} is unknown, only 'llama3' is")
    return {"rope_theta": theta, "rope_scaling": None if plain else rope}


def read_dtype(path, raw):
    """The name of the dtype that a config.json wants weights stored in, as torch spells it."""
    names = []
    for field_name in ("torch_dtype", "dtype"):
        told = str(raw.get(field_name) or "float32").removeprefix("torch.")
        names.append(name_of(getattr(torch, told, told)))   # half is float16
        if names[-1] not in STORED_DTYPES:
            raise InputError(f"{path}: dtype {told!r} is unknown, only {STORED_DTYPES} are")
    return names[0] if raw.get("torch_dtype") else names[1]


def check_llama(path, raw):
    """InputError where config.json describes what this file does not compute; what it lets pass,
    LlamaConfig.to_json must write."""
    kind = raw.get("model_type")
    if kind != "llama":
        raise InputError(f"{path}: model_type is {kind!r}, only 'llama' is known")
    if raw.get("quantization_config"):
        raise InputError(f"{path}: has a quantization_config; quantized weights are not known")
    check_usual(path, raw)


USUAL = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
         "rope_interleaved": False, "partial_rotary_factor": 1.0}


def check_usual(path, told):
    """InputError where a dict of config.json has another value than the only one that is known."""
    for name, value in USUAL.items():
        given = told.get(name) or value
        if given != value:
            raise InputError(f"{path}: {name} is {given!r}, only {value!r} is known")


def config_fault(c):
    """What is wrong with the fields of a LlamaConfig, or None: can there be such a model?"""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim"):
        size = getattr(c, name)
        most = 1000 if name == "num_hidden_layers" else 2 ** 19
        if type(size) is not int or not 0 < size <= most:
            return f"{name} is {size!r}, not a whole number from 1 to {most}"
    if c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        return "heads must be a multiple of key/value heads, and head_dim even"
    context = c.max_position_embeddings
    if type(context) is not int or not 0 < context < 2 ** 31:
        return f"max_position_embeddings is {context!r}, not a whole number from 1 to 2^31 - 1"
    if type(c.tie_word_embeddings) is not bool:
        return f"tie_word_embeddings is {c.tie_word_embeddings!r}, neither true nor false"
    numbers = {"rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta}
    if c.rope_scaling:
        for name in ("factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings"):
            numbers[name] = c.rope_scaling[name]
    for name, number in numbers.items():
        if type(number) not in (int, float) or not 0 < number <= torch.finfo(torch.float64).max:
            return f"{name} is {number!r}, not a number above 0"
    if c.rope_scaling and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        return "low_freq_factor is not below high_freq_factor"
    frequencies = rope_frequencies(c)
    if not (frequencies > 0).all() or not frequencies.isfinite().all():
        return f"rope_scaling {c.rope_scaling} turns by angles that are no numbers"
    return None


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, else the shards that an index names."""
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if is_there(whole):
        return [whole]
    if not is_there(index):
        raise InputError(f"{whole}: no such file; nor is {index.name} there, which would name its "
                         "parts, all of them safetensors")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not str(name).endswith(".safetensors") or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is no safetensors file of this folder")
    return [folder / name for name in sorted(set(weight_map.values()))]


def name_others(folder, read):
    """Say on stderr which weights of a folder are not read: another set, an adapter."""
    others = set(folder.glob("*.safetensors")) - {*read, folder / "optimizer.safetensors"}
    if others:
        names = ", ".join(sorted(path.name for path in others)[:3])
        tell(f"{folder}: two sets of weights; {read[0].name} is read, and not {len(others)} more: "
             f"{names}")


def weights_hash(folder):
    """A fingerprint of the weights of a folder: of what is in the files, not of when they were
    written."""
    digest = hashlib.blake2b(digest_size=16)
    for path in weight_files(Path(folder)):
        check_is_there(path)
        with reading(path), open(path, "rb") as file:
            while chunk := file.read(2 ** 22):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(sequences):
    """A number of 32 bits that depends on every item of these sequences."""
    # 0, 0: so that it stays what the folders of earlier runs hold
    return hash32(0, 0, *(hash32(0, 0, *items) for items in sequences))


def config_hash(folder):
    """A fingerprint of all fields of a folder's LlamaConfig, as they are spelled."""
    config = LlamaConfig.from_json(Path(folder) / "config.json")
    return fingerprint([vars(config).items()])


def check_is_there(path):
    """InputError where there is no such file of weights."""
    if not is_there(path):
        raise InputError(f"{path}: no such file; fetch or write it again")
    # may it be read? of one that may not, safetensors would say that it is damaged
    with reading(path), open(path, "rb"):
        pass


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file; InputError where it is absent or damaged."""
    check_is_there(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or cut short ({error}); "
                         "fetch or write it again") from None


EMBEDDING = "model.embed_tokens.weight"


def check_tensor(path, name, tensor, wanted, config):
    """InputError where a file's tensor is none of the model's, has another shape, is quantized, or
    holds what is no number."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        wanted = {name: wanted[EMBEDDING]}                  # the embedding under another name
    if name not in wanted:
        raise InputError(f"{path}: tensor {name} is not part of a LLaMA with this config.json")
    shape = list(tensor.shape)
    told = list(wanted[name].shape)
    if shape != told:
        raise InputError(f"{path}: tensor {name} has shape {shape}, config.json says {told}")
    dtype = name_of(tensor.dtype)
    if dtype not in STORED_DTYPES:
        raise InputError(f"{path}: tensor {name} is {dtype}; quantized weights are not known")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: tensor {name} holds NaN or infinity; fetch or train it again")


def join_tied(folder, found):
    """Where embedding and head are one matrix: it may be stored under either name, or twice."""
    head = found.pop("lm_head.weight", None)
    if head is None:
        return
    if not torch.equal(found.setdefault(EMBEDDING, head), head):
        raise InputError(f"{folder}: config.json says tie_word_embeddings, but {EMBEDDING} and "
                         "lm_head.weight differ")


# ------------------------------------------------------------------ devices and ranks
def pick_device(name=None):
    """The torch.device to run on: `name` if given, else CUDA, else Apple's MPS, else the CPU."""
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if str(name).split(":")[0] not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device {name}: is neither cuda, mps nor cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: {reason}") from None


def name_of(dtype):
    """How a run's settings and arguments call a torch.dtype."""
    return str(dtype).removeprefix("torch.")


def pick_dtype(device, name=None):
    """The dtype of products: `name` if given, else bfloat16 where the hardware multiplies it."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":           # is_bf16_supported() is True where it is only emulated
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        native = device.type == "cpu" and supported()
    return torch.bfloat16 if native else torch.float32


@dataclass
class World:
    """What a process knows of all processes of this run, which torchrun calls ranks."""
    device: torch.device
    rank: int = 0               # this process
    ranks: int = 1              # how many there are

    def sum(self, value):
        """The sum over all ranks of a number or tensor: a float, or float64 on the CPU."""
        if isinstance(value, torch.Tensor):
            total = value.cpu().double()
        else:
            total = torch.tensor(value, dtype=torch.float64)
        if self.ranks > 1:
            total = total.to(self.device, copy=True)        # all_reduce writes into it
            dist.all_reduce(total)
        if total.dim() == 0:
            return total.item()
        return total.cpu()

    def wait(self):
        """Go on when all ranks have come here."""
        self.sum(0)


def join_ranks(name=None):
    """The World of this process: alone, or one of those that torchrun started. name: --device."""
    told = os.environ.get("WORLD_SIZE") or "1"
    if told == "1":
        return World(pick_device(name))
    others = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [variable for variable in others if not os.environ.get(variable)]
    if not told.isdecimal() or told == "0" or missing:
        reason = f"{', '.join(missing)} not set" if missing else "which is no number of processes"
        raise InputError(f"WORLD_SIZE is {told} in the environment, {reason}: start with torchrun, "
                         "or unset WORLD_SIZE")
    ranks = int(told)
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"           # nobody touches another's GPU
    device = pick_device(name)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "nccl"
        else:
            backend = "gloo"
            atexit.register(dist.destroy_process_group)     # (NCCL's would wait for a lost rank)
        dist.init_process_group(backend, timeout=timedelta(days=2))
    return World(device, dist.get_rank(), ranks)


GIB = 2 ** 30


def free_on_gpu(device):
    """Bytes that are free on a GPU."""
    torch.cuda.empty_cache()                                # what torch keeps for later is free
    free, _ = torch.cuda.mem_get_info(device)
    return free


def free_on_host():
    """Bytes that one rank can have of this machine: a share of its memory, or of what its container
    may hold (cgroup v2), and no more than is not taken, where these are told."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks]
    with contextlib.suppress(OSError, ValueError):          # "max": no bound
        bounds.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / ranks)
    with contextlib.suppress(OSError):
        told = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        if told:
            bounds.append(1024 * int(told[1]))
    return min(bounds)


def check_memory(need, device, advice):
    """InputError with `advice` if the device cannot hold `need` bytes: better now than later."""
    there = free_on_gpu(device) if device.type == "cuda" else free_on_host()
    if need > there:
        raise InputError(f"needs {need / GIB:.1f} GiB, "
                         f"{there / GIB:.1f} are there: {advice}")


# ------------------------------------------------------------------ arguments
def read_arguments(p, argv, **demo):
    """The arguments of a script whose own are in p: those that mean the same everywhere are added
    here. Only without --data, the values in `demo` take the place of the paper's as defaults."""
    p.add_argument("--seed", type=at_least(0), default=42,
                   help="of all that is drawn (paper: 42)")
    p.add_argument("--limit", type=at_least(1),
                   help="use the first N records of each file")
    p.add_argument("--format", choices=FORMATS,
                   help="prompt template (default: what the model folder says)")
    p.add_argument("--dtype", choices=["bfloat16", "float32", "float64"],
                   help="of products (default: bfloat16 where the hardware has it; "
                   "training keeps fp32 weights)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--kernels", default=KERNELS,
                   choices=["triton", "torch"] if triton else ["torch"],
                   help="triton: on CUDA")
    p.add_argument("--no-share", action="store_true",
                   help="give every answer its own copy of the prompt")
    args = p.parse_args(argv)
    if demo and not args.data:
        if args.model != p.get_default("model"):
            p.error("--data FILE... is missing (the demo runs without --model and --data)")
        files = Path("toy").glob("train_*.json")
        corpus = sorted(map(str, files))
        p.set_defaults(data=corpus or ["toy/train_*.json"])
        p.set_defaults(**demo)
        args = p.parse_args(argv)
    choose_kernels(args.kernels)
    return args


def folder_name(text):
    """An argparse type: a folder's name as it is compared and remembered; DIR/ is DIR."""
    if not text:                                            # of a shell variable that is not set
        raise argparse.ArgumentTypeError("is empty")
    return str(Path(text))
