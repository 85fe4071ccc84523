"""LLaMA in one file: the plain model first, then the same mathematics faster.

Part I can be read alone; where it calls a fast twin, it says what that computes.
    errors, devices, files        what all scripts share
    LlamaConfig                   config.json of a Hugging Face folder
    rms_norm, apply_rope          the operations, one equation each
    tree_plan, attention          one mask rule for packing, shared prefixes and forks
    token_logprobs                log-probabilities without ever holding all logits
    Llama                         the module, weights in and out
    draw_token, generate_plain    a sampler without a cache, the twin of the engine
Part II holds fast twins; each names the plain function that it must equal.
    BlockAttention                attention in plain products, block by block
    kernels                       attention and log-probabilities on CUDA, in Triton
    generate, generate_iter       paged key/value cache that shares prompts among samples

Letters: T tokens of a stream, N scored ones (kernels: rows that ask), D width, H query heads, G key/value
heads, R = H / G, E head width, F hidden width, V vocabulary, B rows decoded (kernels: of a block); x' is x.T
"""
import argparse
import atexit
import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ errors, devices, files
class InputError(SystemExit):
    """An error that a user can cause and mend: a script ends with this one line on stderr."""

def at_least(low, kind=int):
    """An argparse type: a finite number that is not below `low`."""
    def number(text):
        if low <= kind(text) < math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"must be at least {low}")
    return number

def pick_device(name=None):
    """The torch.device to run on: `name` if given, else CUDA, else Apple's MPS, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None

def pick_dtype(device, name=None):
    """The dtype of products: `name` if given, else bfloat16 where the hardware multiplies it."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":       # is_bf16_supported() also says True where bf16 is only emulated
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and native() else torch.float32

def join_ranks(name=None):
    """(device, rank, ranks) of this process: alone, or one of those that torchrun started."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"                              # nobody touches another's GPU
    device = pick_device(name)
    if ranks > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:                                              # with NCCL it would wait for a rank that failed
            atexit.register(dist.destroy_process_group)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    return device, dist.get_rank() if ranks > 1 else 0, ranks

def all_sum(value, device):
    """The sum of a number or tensor over all ranks: a float, or a tensor in float64 on the CPU."""
    total = torch.as_tensor(value, dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        total = total.to(device, copy=True)                # all_reduce writes into what it is given
        dist.all_reduce(total)
    return total.cpu() if total.dim() else total.item()

def check_memory(need, device, advice):
    """InputError with `advice` if the device cannot hold `need` bytes: better now than in an hour."""
    torch.cuda.empty_cache()                               # what torch has kept for later counts as free
    there = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else
             os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if need > there:
        raise InputError(f"needs {need / 2 ** 30:.1f} GiB, {there / 2 ** 30:.1f} are there: {advice}")

@contextlib.contextmanager
def writing(path):
    """Make a full disk, or a folder that cannot be written, one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot write: {getattr(error, 'strerror', None) or error}") from None

def write_whole(path, write):
    """Call `write(temporary path)`, then rename: `path` is either absent, old, or complete."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)

def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def read_text(path):
    """The text of a UTF-8 file; InputError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8: {error}"
        raise InputError(f"{path}: cannot read: {reason}") from None

def parse_json(place, text):
    """The value of a JSON text; InputError names its place (a file, or a line of it) and the mistake."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None

def read_json(path):
    """The value in a JSON file."""
    return parse_json(path, read_text(path))

# ------------------------------------------------------------------ configuration
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
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None           # None, or the Llama 3.1 / 3.2 fields
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    torch_dtype: str = "float32"        # how save_pretrained stores the weights

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Read config.json in either spelling (`rope_scaling`, or `rope_parameters` since 2025)."""
        raw = read_json(path)
        if raw.get("model_type") != "llama":
            raise InputError(f"{path}: model_type is {raw.get('model_type')!r}, only 'llama' is known")
        for name, usual in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            if (raw.get(name) or usual) != usual:
                raise InputError(f"{path}: {name} is {raw[name]!r}, only {usual!r} is known")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"{path}: rope scaling {kind!r} is unknown, only 'llama3' is")
        raw["rope_scaling"] = rope if kind == "llama3" else None
        raw["torch_dtype"] = raw.get("torch_dtype") or raw.get("dtype") or "float32"
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
        try:
            config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
            rope_frequencies(config)
        except (TypeError, KeyError) as error:
            what = str(error).split("__init__() ")[-1]
            raise InputError(f"{path}: {what} (absent or of another type)") from None
        return config

    def to_json(self):
        """The dict to store as config.json, loadable by transformers and vLLM."""
        scaling = self.rope_scaling and {"rope_type": "llama3", **self.rope_scaling}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **vars(self), "rope_scaling": scaling}

# ------------------------------------------------------------------ the plain operations
def full_precision(x):
    """x in float32, or in float64 if it has that already: for sums, exponentials and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def rms_norm(x, weight, eps):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension   (Zhang & Sennrich 2019, Eq. 4)
    x (..., D), weight (D,) -> (..., D); the mean is taken in at least float32."""
    wide = full_precision(x)
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * unit.to(x.dtype)

def rope_frequencies(config, device="cpu"):
    """Angles per position, (E/2,) in float64: theta^(-2i/E), stretched as Llama 3.1 and 3.2 do.
    Waves longer than original/low are slowed down by `factor`, those shorter than original/high are
    kept, and between the two the change is linear in original/wavelength."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequency = config.rope_theta ** (-i / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)      # 1: a short wave, 0: a long one
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]

def rope_tables(config, position, dtype):
    """cos and sin (T, 1, E/2) of position (T,) x frequency (E/2,), for apply_rope."""
    exact = position.cpu() if position.device.type == "mps" else position      # MPS has no float64
    angle = exact.double()[:, None, None] * rope_frequencies(config, exact.device)
    return angle.cos().to(position.device, dtype), angle.sin().to(position.device, dtype)

def apply_rope(x, cos, sin):
    """Turn each pair (x_i, x_{i+E/2}) by its position's angle   (Su et al. 2021, Eq. 34)
    x (T, H, E), cos and sin (T, 1, E/2) -> (T, H, E). Hugging Face weights pair the two *halves* of
    a head; Meta's original weights pair neighbours instead, and are not what these files hold."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

# ------------------------------------------------------------------ the prefix tree
@dataclass(eq=False)            # hashed by identity: part II caches what follows from a plan
class TreePlan:
    """What every layer needs to know of a stream, computed once from `end` by tree_plan."""
    end: torch.Tensor           # (T,) on the host: the first row that no longer sees a token's key
    position: torch.Tensor      # (T,) how many keys a row sees before itself
    skip: int                   # so many first tokens are cached: keys without a query (Engine.read)

def tree_plan(end, skip=0, device=None):
    """Read a forest, written depth first, from `end`: query i sees key j iff j <= i < end[j].

    end (T,) int64, with i < end[i] <= T and subtrees nested; ValueError otherwise. Example, an
    instruction I, a prompt p q, and two answers:   I p q a b x y
                                           end      7 7 7 5 5 7 7
                                           position 0 1 2 3 4 3 4"""
    T, end, ends, still_open = len(end), end.cpu(), end.tolist(), [len(end)]       # FSDP sends end to a GPU
    for i, stop in enumerate(ends):                                    # still_open: subtrees around row i
        while still_open[-1] <= i:
            still_open.pop()
        if not i < stop <= still_open[-1]:
            raise ValueError(f"end[{i}] = {stop} does not nest")
        still_open.append(stop)
    closed = torch.bincount(end, minlength=T + 1).cumsum(0)[:T]        # (T,) how many keys have end <= i
    return TreePlan(end, (torch.arange(T) - closed).to(device), skip)  # row i sees the other i - closed[i]

def attention_by_mask(q, k, v, plan):
    """softmax(q k' / sqrt(E)) v over the keys that `end` lets a row see   (Vaswani et al. 2017, Eq. 1)
    q (T, H, E), k and v (T, G, E) -> (T, H, E). The whole rule at once, to read and for tests."""
    i = torch.arange(len(q), device=q.device)
    sees = (i[None] <= i[:, None]) & (i[:, None] < plan.end.to(q.device)[None])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))                       # (H or G, T, E)
    return F.scaled_dot_product_attention(q, k, v, sees, enable_gqa=True).transpose(0, 1)

def attention(q, k, v, plan):
    """What attention_by_mask computes, by one of its fast twins in part II, which leave out what is hidden:
    q (T - skip, H, E) holds the rows from plan.skip on (a prompt after a cached instruction)."""
    fast = TreeAttention if use_triton(q) and q.shape[-1] in WIDTHS else BlockAttention
    return fast.apply(q, k, v, plan)

# ------------------------------------------------------------------ log-probabilities
class TokenLogprobs(torch.autograd.Function):
    """log p(target) = z[target] - logsumexp(z),  z = head @ h;   dz = g * (onehot(target) - softmax(z))
    Logits exist for a part at a time: forward for some rows, backward, where they are computed again, for
    some of the vocabulary, so that the gradient of each row of the head is written once."""
    LOGITS = 2 ** 25                                                       # in a part: 64 MiB in bf16

    @staticmethod
    def forward(ctx, hidden, head, targets):
        picked, lse = full_precision(hidden.new_empty(2, len(hidden)))     # z[target], log sum exp(z)
        weight, step = head.to(hidden.dtype), max(1, TokenLogprobs.LOGITS // len(head))
        for some in (slice(n, n + step) for n in range(0, len(hidden), step)):
            z = hidden[some] @ weight.T                                    # (step, V)
            if use_triton(z):                                              # part II: the same in one kernel
                launch(row_totals, (len(z),), 4096, z, targets[some], picked[some], lse[some], len(head))
            else:                                                          # 32 rows at a time stay in cache
                picked[some] = z.gather(-1, targets[some, None])[:, 0]
                lse[some] = torch.cat([full_precision(rows).logsumexp(-1) for rows in z.split(32)])
        ctx.save_for_backward(hidden, head, targets, lse)
        return picked - lse

    @staticmethod
    def backward(ctx, grad):
        (hidden, head, targets, lse), grad = ctx.saved_tensors, grad.contiguous()
        d_hidden, d_head = full_precision(torch.zeros_like(hidden)), torch.empty_like(head)
        step = max(16, TokenLogprobs.LOGITS // max(1, len(hidden)) // 16 * 16)
        for some in (slice(v, v + step) for v in range(0, len(head), step)):
            weight, target = head[some].to(hidden.dtype), targets - some.start
            dz = hidden @ weight.T                                         # (N, step): logits, to become dz
            if use_triton(dz):
                grid = len(dz), -(-len(weight) // 4096)
                launch(row_gradients, grid, 4096, dz, target, lse, grad[:, None], len(weight))
            else:
                inside = target.clamp(0, len(weight) - 1)
                columns = (x[:, None].split(32) for x in (lse, inside, grad, grad * (inside == target)))
                for z, log_sum, t, g, hit in zip(dz.split(32), *columns):
                    p = (full_precision(z) - log_sum).exp_()
                    z.copy_(p.mul_(-g).scatter_add_(-1, t, hit))
            d_hidden += dz @ weight
            d_head[some] = dz.T @ hidden
        return d_hidden.to(hidden.dtype), d_head, None

def token_logprobs(hidden, head, targets):
    """log p(target | prefix) in nats: hidden (N, D), head (V, D), targets (N,) -> (N,), float32 or more."""
    return TokenLogprobs.apply(hidden, head, targets)

# ------------------------------------------------------------------ the model
def without_storing(f, *inputs):
    """f(*inputs), of which only the inputs are kept: the backward pass runs f again, and stops at the last
    tensor that a gradient needs, so before a matrix product that ends f."""
    return (checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled() else f(*inputs))

class Linear(nn.Linear):
    """y = x W', x (..., in) -> (..., out); the weight is cast to x's dtype for the product."""
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class RMSNorm(nn.RMSNorm):
    """rms_norm with its weight: x (T, D) -> (T, D)."""
    def forward(self, x):
        return without_storing(rms_norm, x, self.weight, self.eps)

class Attention(nn.Module):
    """o(attend(rope(q(x)), rope(k(x)), v(x))): x (T, D) -> (T, D); see Llama.hidden for `attend`."""
    def __init__(self, c):
        super().__init__()
        self.E = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * self.E, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * self.E, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * self.E, bias=False)
        self.o_proj = Linear(c.num_attention_heads * self.E, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, attend):
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, self.E)), cos, sin)   # (T, H, E)
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.E)), cos, sin)   # (T, G, E)
        v = self.v_proj(x).unflatten(-1, (-1, self.E))                         # (T, G, E)
        return self.o_proj(attend(q, k, v).flatten(1))                         # (T, D)

class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x (T, D) -> (T, D)   (SwiGLU, Shazeer 2020, Eq. 6)"""
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        down = lambda gate, up: self.down_proj(F.silu(gate) * up)
        return without_storing(down, self.gate_proj(x), self.up_proj(x))       # (T, F) each

class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); only `attend` mixes tokens: trees are exact."""
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """LLaMA under Hugging Face's weight names; see forward for what it computes."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        self.compute_dtype = None       # None: that of the weights; training sets bfloat16 beside fp32
        self.recompute = False          # True: keep only the input of each layer for the backward pass

    @property
    def head(self):
        """The output matrix (V, D): the embedding itself where the two are tied."""
        return (self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, tokens, position, attend):
        """Final hidden states (T, D) of tokens (T,) at position (T,). attend(n, q, k, v) of layer n takes
        q (T, H, E), k and v (T, G, E) and returns what the rows see, (T, H, E)."""
        x = self.model["embed_tokens"](tokens)
        x = x.to(self.compute_dtype or x.dtype)                                # (T, D)
        cos, sin = rope_tables(self.config, position, x.dtype)
        for n, layer in enumerate(self.model["layers"]):
            run = partial(without_storing, layer) if self.recompute else layer
            x = run(x, cos, sin, partial(attend, n))
        return self.model["norm"](x)

    def forward(self, tokens, end, rows=None, targets=None):
        """Run a stream that holds a forest (see tree_plan): tokens (T,), end (T,) -> hidden (T, D).
        With rows (N,) and targets (N,): log p(targets[n] | all that rows[n] sees), (N,) in nats."""
        plan = tree_plan(end, device=tokens.device)
        x = self.hidden(tokens, plan.position, lambda n, *qkv: attention(*qkv, plan))
        return x if rows is None else token_logprobs(x[rows], self.head, targets)

    @classmethod
    def random(cls, config, seed=0, std=0.02):
        """A model with fresh weights: normal with deviation std, norms 1."""
        model, generator = cls(config), torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std, generator=generator)
        return model

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """Load a Hugging Face folder, strictly by name, one tensor at a time.
        dtype is both storage and products (default: pick_dtype). InputError names the file and the
        tensor that is missing, unexpected, cut short or of another shape."""
        device, folder = pick_device(device), Path(folder)
        dtype = dtype or pick_dtype(device)
        config = LlamaConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        need = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
        check_memory(need, device, f"{folder} does not fit on {device}")
        wanted, found = model.state_dict(), {}
        for path in weight_files(folder):
            for name, tensor in read_tensors(path):
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue                                                   # a copy that some files carry
                if name not in wanted:
                    raise InputError(f"{path}: tensor {name} is not part of a LLaMA with this config.json")
                if (shape := list(tensor.shape)) != (told := list(wanted[name].shape)):
                    raise InputError(f"{path}: tensor {name} has shape {shape}, config.json says {told}")
                found[name] = tensor.to(device, dtype)
        if missing := sorted(wanted.keys() - found.keys()):
            raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
        model.load_state_dict(found, assign=True)
        return model

    def save_pretrained(self, folder, dtype=None, state=None):
        """Write config.json and model.safetensors for transformers and vLLM; dtype: default config's.
        state: the weights to write where `self` holds only a part of them (see train_sft.save)."""
        folder, dtype = Path(folder), dtype or getattr(torch, self.config.torch_dtype)
        state = {name: tensor.detach().to("cpu", dtype).contiguous()
                 for name, tensor in (state or self.state_dict()).items()}
        write_whole(folder / "model.safetensors", partial(save_file, state, metadata={"format": "pt"}))
        write_json(folder / "config.json", self.config.to_json())

def weight_files(folder):
    """The safetensors files of a folder: one file, or the shards its index names."""
    index = folder / "model.safetensors.index.json"
    names = read_json(index)["weight_map"].values() if index.exists() else ["model.safetensors"]
    return [folder / name for name in sorted(set(names))]

def weights_time(folder):
    """When the weights of a folder were written, in UTC: at another time, other weights."""
    times = [path.stat().st_mtime for path in Path(folder).glob("*.safetensors")]
    return time.asctime(time.gmtime(max(times, default=0)))

def read_tensors(path):
    """Yield (name, tensor) of a safetensors file; InputError where it is absent or damaged."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; a model folder holds config.json and safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or cut short ({error}); fetch or write it again") from None

# ------------------------------------------------------------------ sampling
def row_key(seed, prompt, sample):
    """A number of 32 bits for one sampled answer: a hash of (seed, prompt ids, sample number)."""
    text = f"{seed} {sample} {' '.join(map(str, prompt))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")

def uniform(key, position, draw):
    """Numbers in (0, 1) that depend on nothing but key (B,), position (B,) and the draw's number.
    A 32-bit integer mixer in int64 arithmetic: the same bits on every device, in any batch."""
    x = key + position * 0x9E3779B9 + draw * 0x85EBCA6B
    for multiplier in (0x7FEB352D, 0x846CA68B, 1):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * multiplier
    return (x.to(torch.float32 if x.device.type == "mps" else torch.float64) + 0.5) / 2 ** 32

def draw_token(logits, key, position, temperature, top_p):
    """One token a row from the nucleus: the likeliest tokens that together reach top_p
    (Holtzman et al. 2020), without sorting; temperature 0 is argmax.

    logits (B, V), key (B,), position (B,) -> (B,). Draw from the full softmax by inverting its sum
    at one uniform number; accept if the mass of strictly likelier tokens is below top_p; else draw
    again. An accepted token is in the nucleus and has its right relative probability there."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (full_precision(logits) if temperature == 1 else full_precision(logits) / temperature).softmax(-1)
    B, V = p.shape                                                         # draw a block, then a token:
    blocks = (F.pad(p, (0, -V % 256)) if V % 256 else p).view(B, -1, 256)
    sums = F.pad(blocks.sum(-1).cumsum(-1), (1, 0))                        # (B, blocks + 1), 0 first
    token, left, draw = torch.empty_like(key), torch.arange(B, device=p.device), 0
    while len(left):
        u = uniform(key[left], position[left], draw).to(p.dtype)[:, None] * sums[left, -1:]
        block = torch.searchsorted(sums[left], u, right=True).clamp(max=blocks.shape[1]) - 1
        rest = u - sums[left].gather(1, block)
        inside = blocks[left, block[:, 0]].cumsum(-1)
        offset = torch.searchsorted(inside, rest, right=True).clamp(max=255)
        pick = (block * 256 + offset).clamp(max=V - 1)[:, 0]
        mine = p[left, pick][:, None]
        others = p[left] if len(left) < B else p                           # no copy in the first round
        likelier = torch.where(others > mine, others, 0).sum(-1)
        ok = (likelier < top_p) & (mine[:, 0] != 0)                        # rounding can hit a zero
        token[left[ok]], left, draw = pick[ok], left[~ok], draw + 1
    return token

@torch.inference_mode()
def generate_plain(model, prompts, k=1, max_new_tokens=256, temperature=1.0, top_p=0.95, stop=(), seed=0):
    """`generate` without a cache, one token of one sample at a time: slow, and what it must equal."""
    answers = [[[] for _ in range(k)] for _ in prompts]
    for prompt, samples in zip(prompts, answers):
        for sample, answer in enumerate(samples):
            key = torch.tensor([row_key(seed, prompt, sample)], device=model.head.device)
            while len(answer) < max_new_tokens and not (answer and answer[-1] in stop):
                tokens = torch.tensor(prompt + answer, device=model.head.device)
                last = model(tokens, torch.full((len(tokens),), len(tokens)))[-1:]
                logits, position = last @ model.head.to(last.dtype).T, key * 0 + len(tokens)
                answer.append(draw_token(logits, key, position, temperature, top_p).item())
    return answers

# ================================================================== part II: the same, faster
# ------------------------------------------------------------------ attention in plain products
ROWS = 128      # of a block at most: large products, yet few of their scores are hidden

@lru_cache(1)
def row_blocks(plan):
    """[(rows, keys, masked)]: a slice of n asking rows; the m keys that any of them sees, of which the first
    m - h are seen by all; masked (n, h), bool: which of the last h keys a row does not see."""
    T, start, end, stops = len(plan.end), plan.skip, plan.end, set(plan.end.tolist())
    blocks = []
    while start < T:                                           # a block ends with a subtree where it can
        stop = max((e for e in stops if ROWS // 4 < e - start <= ROWS), default=min(start + ROWS, T))
        i, j = torch.arange(start, stop)[:, None], torch.arange(stop)[end[:stop] > start]
        by_all = (j <= start) & (end[j] >= stop)               # which keys every row of the block sees
        keys, j = torch.cat([j[by_all], j[~by_all]]), j[~by_all]
        masked, rows = (j > i) | (i >= end[j]), slice(start - plan.skip, stop - plan.skip)
        blocks.append((rows, keys.to(plan.position.device), masked.to(plan.position.device)))
        start = stop
    return blocks

class BlockAttention(torch.autograd.Function):
    """out = p v,  p = softmax(q k'),  where q is already q / sqrt(E);   backward, with p computed again:
    dv = p' do,  ds = p (do v' - delta),  delta = sum(do out),  dk = ds' q,  dq = ds k / sqrt(E)"""
    @staticmethod
    def by_group(x, G):
        """(T, H, E) -> (G, R, T, E): side by side the R query heads that share a key head."""
        return x.unflatten(1, (G, -1)).permute(1, 2, 0, 3).contiguous()

    @staticmethod
    def visits(plan, q, k, v):
        """Yield for n rows that see m keys: rows, keys, q (G, R n, E), k and v (G, m, E), p (G, R n, m)."""
        for rows, keys, masked in row_blocks(plan):
            some_q, some_k, some_v = q[:, :, rows].flatten(1, 2), k[:, keys], v[:, keys]
            s = (some_q @ some_k.mT).unflatten(1, (q.shape[1], -1))        # (G, R, n, m)
            s[..., len(keys) - masked.shape[1]:].masked_fill_(masked, -math.inf)
            yield rows, keys, some_q, some_k, some_v, s.softmax(-1).flatten(1, 2)

    @staticmethod
    def forward(ctx, q, k, v, plan):
        q = BlockAttention.by_group(q * q.shape[-1] ** -0.5, k.shape[1])   # from here on q / sqrt(E)
        k, v = (x.transpose(0, 1).contiguous() for x in (k, v))            # (G, T, E)
        out = torch.empty_like(q)
        for rows, _, _, _, some_v, p in BlockAttention.visits(plan, q, k, v):
            out[:, :, rows] = (p @ some_v).unflatten(1, (q.shape[1], -1))
        out = out.permute(2, 0, 1, 3).flatten(1, 2)                        # (T, H, E)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out = ctx.saved_tensors
        delta = BlockAttention.by_group((do * out).sum(-1, keepdim=True), len(k))
        do, dq = BlockAttention.by_group(do, len(k)), torch.empty_like(q)
        dk, dv = (full_precision(torch.zeros_like(x)) for x in (k, v))
        for rows, keys, some_q, some_k, some_v, p in BlockAttention.visits(ctx.plan, q, k, v):
            some_do, some_delta = do[:, :, rows].flatten(1, 2), delta[:, :, rows].flatten(1, 2)
            ds = (some_do @ some_v.mT).sub_(some_delta).mul_(p)
            dq[:, :, rows] = (ds @ some_k).unflatten(1, (q.shape[1], -1))
            dk.index_add_(1, keys, (ds.mT @ some_q).to(dk.dtype))
            dv.index_add_(1, keys, (p.mT @ some_do).to(dv.dtype))
        dq = (dq * q.shape[-1] ** -0.5).permute(2, 0, 1, 3).flatten(1, 2)
        return dq, *(x.transpose(0, 1).to(q.dtype) for x in (dk, dv)), None

# ------------------------------------------------------------------ kernels
# A kernel says what one program does with a tile of rows; the grid says how many programs run. Sums are
# float32, and "ieee" keeps float32 operands whole. TRITON_INTERPRET=1 runs the same code on a CPU, for tests.
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    jit = triton.jit(do_not_specialize=("N", "T", "W", "TARGET", "PICKED", "TOTAL", "GRAD"))
except ImportError:                                     # no wheel for this system: the twins do the work
    triton, jit, constexpr = None, lambda kernel: kernel, None
KERNELS = "triton" if triton else "torch"               # see choose_kernels
WIDTHS = (16, 32, 64, 128)                              # head widths E that the attention kernels know

def choose_kernels(name):
    """Use "triton" (where it is installed) or "torch" (the twins everywhere) from now on."""
    global KERNELS
    KERNELS = name

def use_triton(x):
    """Is this tensor for the kernels: are they switched on, and do they know its device and dtype?"""
    device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return KERNELS == "triton" and device and x.dtype in (torch.bfloat16, torch.float16, torch.float32)

def launch(kernel, grid, width, x, *args):
    """Run a kernel whose tiles are `width` wide, on the device of x, which need not be the current one."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, num_warps=min(8, max(4, width // 16)), num_stages=2)

@jit
def load_rows(X, rows, N, head, heads: constexpr, E: constexpr):
    """These rows (B,) of one head of X (N, heads, E): (B, E), zero from row N on."""
    at = (rows[:, None] * heads + head) * E + tl.arange(0, E)
    return tl.load(X + at, mask=rows[:, None] < N, other=0.0)

@jit
def store_rows(X, x, rows, N, head, heads: constexpr, E: constexpr):
    """The reverse of load_rows: rows from N on are not written."""
    tl.store(X + (rows[:, None] * heads + head) * E + tl.arange(0, E), x, mask=rows[:, None] < N)

@jit
def scores(q, k, sees):
    """q k' / sqrt(E), times log2(e) so that powers of two will do; -inf where a query does not see a key."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (1.4426950408889634 / q.shape[1] ** 0.5)
    return tl.where(sees, s, float("-inf"))

@jit
def tree_forward(Q, K, V, OUT, LSE, END, FIRST, BLOCKS, N, T,
                 H: constexpr, G: constexpr, E: constexpr, B: constexpr):
    # out = softmax(q k' / sqrt(E)) v and its log-sum-exp: program (row block a, head h). Of the keys so far:
    # top is the largest score s, total = sum 2^(s - top), out = sum 2^(s - top) v   (Milakov 2018)
    a, h = tl.program_id(0), tl.program_id(1)
    row = a * B + tl.arange(0, B)                       # in q, which holds the last N of T rows
    i, q = (row + T - N)[:, None], load_rows(Q, row, N, h, H, E)
    top = tl.full((B,), -1e30, tl.float32)              # finite: -inf less -inf is not a number
    total, out = tl.zeros((B,), tl.float32), tl.zeros((B, E), tl.float32)
    for n in range(tl.load(FIRST + a), tl.load(FIRST + a + 1)):
        j = tl.load(BLOCKS + n) * B + tl.arange(0, B)
        k, v = load_rows(K, j, T, h * G // H, G, E), load_rows(V, j, T, h * G // H, G, E)
        s = scores(q, k, (j[None] <= i) & (i < tl.load(END + j)[None]))           # (rows, keys)
        new = tl.maximum(top, tl.max(s, 1))
        p, old = tl.exp2(s - new[:, None]), tl.exp2(top - new)
        out = tl.dot(p.to(v.dtype), v, out * old[:, None], input_precision="ieee")
        top, total = new, total * old + tl.sum(p, 1)
    store_rows(OUT, out / total[:, None], row, N, h, H, E)
    tl.store(LSE + h * N + row, top + tl.log2(total), mask=row < N)

@jit
def tree_backward_q(Q, K, V, DO, OUT, LSE, DELTA, DQ, END, FIRST, BLOCKS, N, T,
                    H: constexpr, G: constexpr, E: constexpr, B: constexpr):
    # dq = ds k / sqrt(E),  ds = p (do v' - delta),  p = 2^(s - lse),  delta = sum(do out): program (a, h)
    a, h = tl.program_id(0), tl.program_id(1)
    row = a * B + tl.arange(0, B)
    i, q, do = (row + T - N)[:, None], load_rows(Q, row, N, h, H, E), load_rows(DO, row, N, h, H, E)
    delta = tl.sum(do.to(tl.float32) * load_rows(OUT, row, N, h, H, E), 1)
    tl.store(DELTA + h * N + row, delta, mask=row < N)                     # for tree_backward_kv
    lse, dq = tl.load(LSE + h * N + row, mask=row < N, other=0.0), tl.zeros((B, E), tl.float32)
    for n in range(tl.load(FIRST + a), tl.load(FIRST + a + 1)):
        j = tl.load(BLOCKS + n) * B + tl.arange(0, B)
        k, v = load_rows(K, j, T, h * G // H, G, E), load_rows(V, j, T, h * G // H, G, E)
        p = tl.exp2(scores(q, k, (j[None] <= i) & (i < tl.load(END + j)[None])) - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(DQ, dq * (1 / E ** 0.5), row, N, h, H, E)

@jit
def tree_backward_kv(Q, K, V, DO, LSE, DELTA, DK, DV, END, N, T,
                     H: constexpr, G: constexpr, E: constexpr, B: constexpr):
    # dv = p' do,  dk = ds' q / sqrt(E), what head h adds to them; all transposed: program (key block b, h).
    # Depth first, the rows that see a key are neighbours: from the key itself to its end
    b, h = tl.program_id(0), tl.program_id(1)
    j = b * B + tl.arange(0, B)
    k, v, end = load_rows(K, j, T, h * G // H, G, E), load_rows(V, j, T, h * G // H, G, E), tl.load(END + j)
    dk, dv = tl.zeros((B, E), tl.float32), tl.zeros((B, E), tl.float32)
    for a in range(tl.maximum(b * B - T + N, 0) // B, tl.cdiv(tl.maximum(tl.max(end, 0) - T + N, 0), B)):
        row = a * B + tl.arange(0, B)
        i, q, do = (row + T - N)[None], load_rows(Q, row, N, h, H, E), load_rows(DO, row, N, h, H, E)
        lse = tl.load(LSE + h * N + row, mask=row < N, other=0.0)
        delta = tl.load(DELTA + h * N + row, mask=row < N, other=0.0)
        p = tl.exp2(scores(k, q, (j[:, None] <= i) & (i < end[:, None])) - lse[None])   # (keys, rows)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(DK, dk * (1 / E ** 0.5), j, T, h, H, E)
    store_rows(DV, dv, j, T, h, H, E)

@lru_cache(1)
def tree_tiles(plan, B):
    """Where rows look, in blocks of B: row block a sees key blocks blocks[first[a]:first[a + 1]]."""
    T = len(plan.end)
    end = F.pad(plan.end, (0, -T % B))                                     # whole blocks
    row = torch.arange(plan.skip, T, B)[:, None]                           # first of each row block
    sees = (torch.arange(0, T, B) < row + B) & (row < end.view(-1, B).amax(1))         # (row, key blocks)
    first, blocks = F.pad(sees.sum(1).cumsum(0), (1, 0)), sees.nonzero()[:, 1]
    return [x.to(plan.position.device, torch.int32) for x in (end, first, blocks)]

class TreeAttention(torch.autograd.Function):
    """`attention` as kernels that visit only what `end` leaves visible; a rerun gives the same bits."""
    @staticmethod
    def forward(ctx, q, k, v, plan):
        (N, H, E), (T, G, _) = q.shape, k.shape
        assert k.shape == v.shape == (len(plan.end), G, E) and N == T - plan.skip and H % G == 0
        assert q.dtype == k.dtype == v.dtype and use_triton(q) and T * H * E < 2 ** 31 and E in WIDTHS
        q, k, v, B = q.contiguous(), k.contiguous(), v.contiguous(), 64 if q.element_size() == 2 else 32
        ctx.visits, ctx.sizes = tree_tiles(plan, B), (N, T, H, G, E, B)
        out, lse = torch.empty_like(q), q.new_empty(H, N, dtype=torch.float32)
        launch(tree_forward, (-(-N // B), H), E, q, k, v, out, lse, *ctx.visits, *ctx.sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, do):
        (q, k, v, out, lse), (N, T, H, G, E, B) = ctx.saved_tensors, ctx.sizes
        do, dq, delta, end = do.contiguous(), torch.empty_like(q), torch.empty_like(lse), ctx.visits[0]
        launch(tree_backward_q, (-(-N // B), H), E, q, k, v, do, out, lse, delta, dq, *ctx.visits, *ctx.sizes)
        dk, dv = q.new_empty(2, T, H, E, dtype=torch.float32)
        launch(tree_backward_kv, (-(-T // B), H), E, q, k, v, do, lse, delta, dk, dv, end, *ctx.sizes)
        return dq, *(x.view(T, G, -1, E).sum(2).to(k.dtype) for x in (dk, dv)), None

@jit
def row_totals(Z, TARGET, PICKED, TOTAL, V):
    # z[target] and log sum exp(z) of one row of logits, read once: the sum shrinks when the maximum grows
    n = tl.program_id(0)
    Z += n.to(tl.int64) * V
    top, total = float("-inf"), 0.0
    for start in range(0, V, 4096):
        v = start + tl.arange(0, 4096)
        z = tl.load(Z + v, mask=v < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(z, 0))
        top, total = new, total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
    tl.store(PICKED + n, tl.load(Z + tl.load(TARGET + n)).to(tl.float32))
    tl.store(TOTAL + n, top + tl.log(total))

@jit
def row_gradients(Z, TARGET, TOTAL, GRAD, V):
    # z <- g (onehot(target) - softmax(z)), in place, for 4096 logits of one row
    n, v = tl.program_id(0), tl.program_id(1) * 4096 + tl.arange(0, 4096)
    Z += n.to(tl.int64) * V
    p = tl.exp(tl.load(Z + v, mask=v < V, other=0.0).to(tl.float32) - tl.load(TOTAL + n))
    tl.store(Z + v, tl.load(GRAD + n) * (tl.where(v == tl.load(TARGET + n), 1.0, 0.0) - p), mask=v < V)

@jit
def page_kernel(Q, K, V, BIAS, OUT, LSE, W, G: constexpr, E: constexpr, P: constexpr, M: constexpr):
    # attend_pages: program (page and key head n, M of its W queries)
    n, m, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, P)
    row, stop = n * W + m, (n + 1) * W
    q = load_rows(Q, row, stop, 0, 1, E)
    k, v = load_rows(K, n * P + j, (n + 1) * P, 0, 1, E), load_rows(V, n * P + j, (n + 1) * P, 0, 1, E)
    s = scores(q, k, (tl.load(BIAS + n // G * P + j) == 0)[None])          # (queries, keys)
    top = tl.maximum(tl.max(s, 1), -1e30)
    p = tl.exp2(s - top[:, None])
    total = tl.maximum(tl.sum(p, 1), 1.0)                                  # less only where no key is
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
    store_rows(OUT, out, row, stop, 0, 1, E)
    tl.store(LSE + row, (top + tl.log2(total)) * 0.6931471805599453, mask=row < stop)

# ------------------------------------------------------------------ generation
# The cache is a pool of pages of 64 keys. A page belongs to the instruction, which every row reads, to a
# prompt, which its k samples read, or to one sample. Attention takes a page once, for all its readers.

@dataclass
class Job:
    """A prompt and those of its samples that are decoded together, all equally long."""
    number: int                                 # which prompt
    prompt: list                                # its ids
    samples: list                               # sample numbers; each becomes a row
    rows: dict = field(default_factory=dict)    # row -> sample number, while it is decoded
    pages: list = field(default_factory=list)   # where the prompt's keys lie
    count: int = 0                              # tokens drawn, in each row

def attend_pages(q, k, v, bias):
    """Attention within pages: q (p, G, W, E), k and v (p, G, P, E), bias (p, P), 0 or -3e4 for no key ->
    log sum exp(s), (p, G, W), and softmax(s) v, (p, G, W, E), where s = q k' / sqrt(E) + bias."""
    (p, G, W, E), P = q.shape, k.shape[2]
    if use_triton(q) and E in WIDTHS and E * q.element_size() < 512:      # more is too much for a T4
        M = 16 if W <= 16 or q.element_size() == 4 else 64                 # 64 rows in float32 would spill
        out = q.new_empty(q.shape, dtype=torch.float32)
        lse = out.new_empty(p, G, W)
        q, k, v = (x.contiguous() for x in (q, k, v))
        launch(page_kernel, (p * G, -(-W // M)), E, q, k, v, bias, out, lse, W, G, E, P, M)
        return lse, out
    s = ((q * E ** -0.5) @ k.mT).add_(bias[:, None, None])
    weight = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32))
    return s.amax(-1) - weight.amax(-1).log(), weight.to(v.dtype) @ v      # max weight = exp(max s - lse)

class Engine:
    """Decodes many rows at once over a paged cache; looks which ones are done after every `poll` tokens."""
    PAGE = 64           # keys a page
    PREFILL = 4096      # prompt tokens in one pass

    def __init__(self, model, instruction, width, max_rows, pages, max_new_tokens, poll, stop, seed, draw):
        c, self.model, self.device, self.max_new = model.config, model, model.head.device, max_new_tokens
        self.width, self.poll, self.seed, self.draw = width, poll, seed, draw      # width: samples of a job
        self.G, E = c.num_key_value_heads, c.head_dim
        self.R = c.num_attention_heads // self.G                # query heads that share a key
        shape = c.num_hidden_layers, pages, self.G, self.PAGE, E
        self.k = torch.zeros(shape, dtype=model.compute_dtype or model.head.dtype, device=self.device)
        self.v, self.nothing = torch.zeros_like(self.k), full_precision(self.k.new_zeros(self.R, E))
        self.bias = self.k.new_full((pages, self.PAGE), -3e4)   # 0, or -3e4: no key yet (finite: no nan)
        self.key, self.stop = self.ints([0] * max_rows), self.ints(list(stop))     # key: see row_key
        self.history = self.key[:, None].repeat(1, max_new_tokens + poll)          # ids drawn; -1: not yet
        self.free_rows, self.free_pages = list(range(max_rows)), list(range(pages))
        self.owned, self.jobs, self.start = {}, [], 0           # live row -> its pages; jobs under way
        self.common = self.take_pages(self.pages_for(len(instruction)), 0)
        if n := len(instruction):
            self.read(instruction, [n] * n, self.places(self.common, n))
            self.start = n                                      # so much of every prompt is there already

    @staticmethod
    def pages_for(tokens):
        """How many pages hold so many keys."""
        return -(-tokens // Engine.PAGE)

    def ints(self, values):
        """Python's numbers as int64 on the device."""
        return torch.tensor(values, dtype=torch.long, device=self.device)

    # ---- rows and pages, on the host
    def take_pages(self, n, at):
        """Claim n free pages: the lowest for a prompt (at 0), the highest for answers (at -1), so that the
        pages with several readers and those with one lie apart, and the ranges visited are short."""
        return [self.free_pages.pop(at) for _ in range(n)]

    def free(self, rows):
        """Give back these rows, their pages, and the pages of prompts that nobody reads any more."""
        pages = [page for row in rows for page in self.owned.pop(row)]
        self.free_rows += rows
        for job in self.jobs:
            job.rows = {row: sample for row, sample in job.rows.items() if row in self.owned}
            pages += [] if job.rows else job.pages
        self.jobs = [job for job in self.jobs if job.rows]
        self.free_pages, self.bias[pages] = sorted(self.free_pages + pages), -3e4         # without keys again

    def fits(self, job):
        """Is there room to start this job: its rows, its prompt, and a first page for every answer?"""
        need = self.pages_for(len(job.prompt) - self.start) + len(job.samples)
        return len(self.free_rows) >= len(job.samples) and len(self.free_pages) >= need

    def start_some(self, waiting):
        """Move jobs from the stack into the cache, as many as fit, and draw their first tokens."""
        while waiting and self.fits(waiting[-1]):
            jobs, tokens = [], 0
            while waiting and self.fits(waiting[-1]) and tokens < self.PREFILL:
                jobs.append(job := waiting.pop())
                n = len(job.prompt) - self.start
                job.rows = {self.free_rows.pop(): sample for sample in job.samples}
                job.pages = self.take_pages(self.pages_for(n), 0)
                self.owned.update({row: self.take_pages(1, -1) for row in job.rows})
                tokens += n
            self.jobs += jobs
            self.prefill(jobs)

    def reserve(self):
        """Give every row pages for its next `poll` tokens; return the jobs put back where none are left: the
        youngest, so that the oldest finish. One that starts again draws the same (see row_key)."""
        back = []
        for job, row in [(job, row) for job in self.jobs for row in job.rows]:
            need = self.pages_for(job.count + self.poll)
            while job.rows and need > len(self.owned[row]) + len(self.free_pages):
                back.append(self.jobs[-1])
                self.free(list(back[-1].rows))
            if job.rows and need > len(self.owned[row]):
                self.owned[row] += self.take_pages(need - len(self.owned[row]), -1)
        return back

    def finish(self):
        """Take out the rows that are done; return [(prompt number, sample number, ids)]."""
        rows, column = list(self.owned), torch.arange(self.history.shape[1], device=self.device)
        history = self.history[rows]
        last = torch.isin(history, self.stop) | (column >= self.max_new - 1) & (history >= 0)
        length = torch.where(last.any(1), last.int().argmax(1) + 1, 0)
        done = {row: n for row, n in zip(rows, length.tolist()) if n}
        answers = [(job.number, sample, self.history[row, :done[row]].tolist())
                   for job in self.jobs for row, sample in job.rows.items() if row in done]
        self.free(list(done))
        return answers

    # ---- the model, on the device
    def places(self, pages, n):
        """Where the n keys go that fill these pages: [(page, offset)]."""
        return [(page, offset) for page in pages for offset in range(self.PAGE)][:n]

    def read(self, tokens, end, places):
        """Hidden states of a forest after the instruction; its keys and values go to these places."""
        I, (page, offset) = self.start, self.ints(places).T
        self.bias[page, offset] = 0
        plan = tree_plan(torch.tensor([I + len(tokens)] * I + [I + e for e in end]), I, self.device)

        def attend(n, q, k, v):
            self.k[n][page, :, offset], self.v[n][page, :, offset] = k, v
            before = (x[n, :len(self.common)].transpose(1, 2).flatten(0, 1)[:I] for x in (self.k, self.v))
            return attention(q, *(torch.cat(both) for both in zip(before, (k, v))), plan)

        return self.model.hidden(self.ints(tokens), plan.position[I:], attend)

    def prefill(self, jobs):
        """Run the prompts of these jobs, after the instruction, as one forest; draw first tokens."""
        tokens, end, place, rows = [], [], [], []
        for job in jobs:
            rest, job.count = job.prompt[self.start:], 1
            tokens += rest
            end += [len(tokens)] * len(rest)
            place += self.places(job.pages, len(rest))
            rows += [(row, row_key(self.seed, job.prompt, sample), len(tokens) - 1, len(job.prompt))
                     for row, sample in job.rows.items()]
        rows, key, last, length = self.ints(rows).T
        self.key[rows], self.history[rows] = key, -1
        self.append(rows, self.read(tokens, end, place)[last], length, 0)

    def append(self, rows, hidden, length, count):
        """Draw the next token of each row, its number `count` after a prompt of `length`: hidden (B, D)."""
        logits = hidden @ self.model.head.to(hidden.dtype).T                       # (B, V)
        self.history[rows, count] = self.draw(logits, self.key[rows], length + count)

    def parts(self):
        """What `attend` reads of instruction, prompts, answers: parts [(range of pages, readers (pages, w))],
        the rows that read each page, row 0 where fewer than w do. terms (B G R, S): which results each query
        head adds up, by number: R empty ones (to pad with), then those of (parts, pages, G, w, R), flat."""
        kinds = [(len(self.owned), [(self.common, b) for b in range(len(self.owned))]),
                 (self.width, [(job.pages, i) for job in self.jobs for i in range(len(job.rows))]),
                 (1, [(self.owned[row], 0) for job in self.jobs for row in job.rows])]
        parts, found, before = [], [[] for _ in self.owned], self.R        # so many results before this part
        for w, reads in kinds:
            pages = sorted({page for pages, _ in reads for page in pages}) or [0]
            readers = [[0] * w for _ in range(pages[0], pages[-1] + 1)]
            for b, (own, i) in enumerate(reads):                # live row b is reader i of the pages `own`
                for n in (page - pages[0] for page in own):
                    readers[n][i] = b
                    found[b].append((before + (n * self.G * w + i) * self.R, w * self.R))
            parts.append((slice(pages[0], pages[-1] + 1), self.ints(readers)))
            before += len(readers) * w * self.G * self.R
        most = max(map(len, found))
        first, stride = self.ints([x + [(0, 0)] * (most - len(x)) for x in found])[:, None, None].unbind(-1)
        g, r = torch.arange(self.G, device=self.device)[:, None, None], self.ints(range(self.R))[:, None]
        return parts, (first + stride * g + r).flatten(0, 2)

    def decode(self):
        """Advance every row by `poll` tokens; nothing here depends on what is drawn, only on counts."""
        rows = [(row, len(job.prompt), job.count) for job in self.jobs for row in job.rows]
        (rows, length, count), own = self.ints(rows).T, [self.owned[row] for row, _, _ in rows]
        own = self.ints([pages + pages[-1:] * (max(map(len, own)) - len(pages)) for pages in own])
        parts, terms = self.parts()

        def step():
            last = count - 1                                # the last drawn token is fed, its key stored
            page, offset = own.gather(1, last[:, None] // self.PAGE)[:, 0], last % self.PAGE
            self.bias.index_put_((page, offset), self.bias.new_zeros(len(page)))   # a plain 0 is the host's
            attend = partial(self.attend, page=page, offset=offset, parts=parts, terms=terms)
            return self.model.hidden(self.history[rows, last], length + last, attend)

        for n in range(self.poll):
            step = self.record(step) if n == 1 else step    # it has run once: its kernels are loaded
            self.append(rows, step(), length, count)
            count += 1                                      # in place: a recorded step reads it again
        for job in self.jobs:
            job.count += self.poll

    def record(self, step):
        """step, on CUDA as a graph: its hundreds of kernels on the same memory, launched without Python."""
        if not (self.k.is_cuda and use_triton(self.k)):
            return step
        with torch.cuda.device(self.device), torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            hidden = step()                                 # recorded, not computed
        return lambda: graph.replay() or hidden

    def attend(self, n, q, k, v, page, offset, parts, terms):
        """`attention` of one new token a row, q (B, H, E), over instruction, prompt and own pages: a softmax
        over each page, and then over pages, whose weights are softmax(lse). New keys go to (page, offset)."""
        self.k[n][page, :, offset], self.v[n][page, :, offset] = k, v
        heads = q.unflatten(1, (self.G, self.R))                                   # (B, G, R, E)
        results = [(self.nothing[:, 0] - math.inf, self.nothing)]
        for pages, readers in parts:                                               # p pages, w readers each
            some = heads[readers].transpose(1, 2).flatten(2, 3)                    # (p, G, w R, E)
            lse, out = attend_pages(some, self.k[n, pages], self.v[n, pages], self.bias[pages])
            results.append((lse.flatten(), out.flatten(0, 2)))
        lse, out = map(torch.cat, zip(*results))
        weight = lse[terms].softmax(-1)                                            # (B G R, S)
        return F.embedding_bag(terms, out, mode="sum", per_sample_weights=weight).view_as(q).to(q.dtype)

def common_prefix(sequences):
    """How many first items all sequences share, leaving at least one item of each."""
    first, last = min(sequences), max(sequences)       # in dictionary order, these two differ earliest
    same = [a == b for a, b in zip(first, last)]
    return min([*same, False].index(False), len(first) - 1, len(last) - 1)

@torch.inference_mode()
def generate_iter(model, prompts, k=1, max_new_tokens=256, temperature=1.0, top_p=0.95, stop=(), seed=0,
                  kv_tokens=None, max_rows=None, share=True):
    """Yield (prompt number, k lists of new ids) as prompts finish; equals generate_plain.

    prompts: lists of ids. A list that ends in a `stop` id is complete, else it was cut off at
    max_new_tokens. kv_tokens: keys held at once (default: what 2 GiB hold on a CPU, 70% of what is
    free on a GPU); jobs that do not fit wait. share=False keeps a copy of the prompt for every sample.
    InputError if kv_tokens cannot hold one job."""
    if not prompts:
        return
    c, device, start = model.config, model.head.device, common_prefix(prompts) if share else 0
    groups, width = ([list(range(k))], k) if share else ([[sample] for sample in range(k)], 1)
    jobs = [Job(i, prompt, group) for i, prompt in enumerate(prompts) for group in groups]
    if kv_tokens is None:
        item = (model.compute_dtype or model.head.dtype).itemsize
        torch.cuda.empty_cache()                           # of the blocks before this one
        free = torch.cuda.mem_get_info(device)[0] * 0.7 if device.type == "cuda" else 2 ** 31
        kv_tokens = int(free / (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * item))
    poll = max(1, min(32 if device.type == "cuda" else 4, max_new_tokens - 1))     # steps between two looks
    answer, common = width * Engine.pages_for(max_new_tokens + poll), Engine.pages_for(start)
    most = [Engine.pages_for(len(job.prompt) - start) + answer for job in jobs]    # pages of each job
    pages, need = kv_tokens // Engine.PAGE, common + max(most)
    if pages < need:
        longest = len(jobs[most.index(max(most))].prompt)
        raise InputError(f"--kv-tokens {kv_tokens}: a prompt of {longest} tokens and its samples may need "
                         f"{need * Engine.PAGE}; raise it or lower --max-new-tokens")
    max_rows = max(width, max_rows or (1024 if device.type == "cuda" else 128))
    draw = partial(draw_token, temperature=temperature, top_p=top_p)
    pages = min(pages, common + sum(most))
    engine = Engine(model, prompts[0][:start], width, max_rows, pages, max_new_tokens, poll, stop, seed, draw)
    waiting, answers = jobs[::-1], [{} for _ in prompts]                           # the next job on top
    while waiting or engine.jobs:
        engine.start_some(waiting)
        waiting += engine.reserve()
        engine.decode()
        for number, sample, ids in engine.finish():
            answers[number][sample] = ids
            if len(answers[number]) == k:
                yield number, [answers[number][s] for s in range(k)]

def generate(model, prompts, k=1, **options):
    """For each prompt k lists of new ids; see generate_iter for the options."""
    return [answers for _, answers in sorted(generate_iter(model, prompts, k, **options))]
