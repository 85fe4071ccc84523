"""The plain model against transformers' figures, numbers worked by hand, and itself."""
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, tiny_model, tiny_examples
from make_golden import CONFIGS, QUESTIONS, ROWS, TOKENS, random_weights
from safetensors.torch import save_file

from data import INSTRUCTION, InputError, Tokenizer, format_input, pack
from model import (Engine, Llama, LlamaConfig, PagePool, RMSNorm, apply_rope, attention,
                   attention_by_mask, draw_token, generate, generate_plain, number_reads,
                   rms_norm, rope_frequencies, rope_tables, row_tiles, sample_seed, token_logprobs,
                   tree_plan, uniform, whole_prompts)

GOLDEN = json.loads(Path(__file__).with_name("golden_llama.json").read_text())


def write_folder(folder, name, shards=1, spelling="rope_scaling"):
    """A Hugging Face folder of one of the golden models."""
    fields = dict(CONFIGS[name], model_type="llama")
    if spelling == "rope_parameters":
        fields["rope_parameters"] = {**(fields.pop("rope_scaling") or {"rope_type": "default"}),
                                     "rope_theta": fields.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = random_weights(GOLDEN[name]["shapes"])
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    where = {tensor: files[i % shards] for i, tensor in enumerate(weights)}
    for file in files:
        save_file({t: w for t, w in weights.items() if where[t] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards, spelling", [(1, "rope_scaling"), (3, "rope_parameters")])
def test_logits_equal_transformers(tmp_path, name, shards, spelling):
    model = Llama.from_pretrained(write_folder(tmp_path, name, shards, spelling), "cpu", torch.float32)
    with torch.no_grad():
        hidden = model(torch.tensor(TOKENS), torch.full((len(TOKENS),), len(TOKENS)))
    logits = (hidden @ model.head.T)[ROWS, :24]
    assert (logits - torch.tensor(GOLDEN[name]["logits"])).abs().max() < 1e-3


@pytest.mark.skipif("GUARD_SMOLLM2" not in os.environ, reason="GUARD_SMOLLM2 names no SmolLM2-135M-Instruct folder")
def test_smollm2_equals_transformers():
    """Real weights and the real tokenizer: logits to 1e-3, and 16 greedy answers token for token."""
    folder, golden = os.environ["GUARD_SMOLLM2"], GOLDEN["smollm2"]
    model, tokenizer = Llama.from_pretrained(folder, "cpu", torch.float32), Tokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(torch.tensor(TOKENS), torch.full((len(TOKENS),), len(TOKENS)))
    assert ((hidden @ model.head.T)[ROWS, :64] - torch.tensor(golden["logits"])).abs().max() < 1e-3
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    prompts = [[start, *tokenizer.encode(f"user\n{question}"), end, *tokenizer.encode("\n"), start,
                *tokenizer.encode("assistant\n")] for question in QUESTIONS]
    assert prompts == [entry["prompt"] for entry in golden["greedy"]]
    answers = generate(model, prompts, max_new_tokens=32, temperature=0, stop=tokenizer.stop)
    assert [a for a, in answers] == [entry["new"] for entry in golden["greedy"]]


def test_parameter_counts_of_the_real_models():
    shapes = dict(vocab_size=128256, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        one = Llama(LlamaConfig(**{**shapes, "head_dim": 64}, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                num_attention_heads=32, tie_word_embeddings=True))
        three = Llama(LlamaConfig(**shapes, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                                  num_attention_heads=24, tie_word_embeddings=True))
        eight = Llama(LlamaConfig(**shapes, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  num_attention_heads=32))
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert [count(m) for m in (one, three, eight)] == [1_235_814_400, 3_212_749_824, 8_030_261_248]


def test_rms_norm_by_hand():
    # mean of squares of (3, 4) is 12.5, so (3, 4) / 3.5355 = (0.8485, 1.1314), times weights (1, 10)
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0]), 0.0)
    assert torch.allclose(y, torch.tensor([0.848528, 11.313708]))
    x, norm = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), RMSNorm(5, 0.1).double()
    norm.weight.data.normal_()
    assert torch.allclose(norm(x), rms_norm(x, norm.weight, 0.1), atol=1e-12)
    assert torch.autograd.gradcheck(norm, (x,))                 # though nothing is kept but x


def test_rope_pairs_the_halves_of_a_head():
    # E = 4: pairs (0, 2) and (1, 3). At position 1 the first pair turns by 1 radian, the second by 1/100
    config = replace(CONFIG, head_dim=4, rope_theta=10000.0)
    cos, sin = rope_tables(config, torch.tensor([1]), torch.float64)
    y = apply_rope(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]], dtype=torch.float64), cos, sin)[0, 0]
    want = [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]
    assert torch.allclose(y, torch.tensor(want, dtype=torch.float64))


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    score = lambda i, j: (apply_rope(q, *rope_tables(CONFIG, torch.tensor([i]), q.dtype))
                          * apply_rope(k, *rope_tables(CONFIG, torch.tensor([j]), q.dtype))).sum()
    assert torch.allclose(score(3, 1), score(103, 101))


def test_llama3_rope_scaling_slows_long_waves_only():
    # Llama 3.2: theta 500000, factor 32, original context 8192; wave i = 2 pi / frequency
    scaling = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain = rope_frequencies(replace(CONFIG, head_dim=64, rope_theta=5e5))
    scaled = rope_frequencies(replace(CONFIG, head_dim=64, rope_theta=5e5, rope_scaling=scaling))
    wave = 2 * math.pi / plain
    assert torch.equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    assert torch.allclose(scaled[wave > 8192], plain[wave > 8192] / 32)
    between = (wave >= 8192 / 4) & (wave <= 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 32))[between].all()


# ------------------------------------------------------------------ the tree

EXAMPLE = torch.tensor([7, 7, 7, 5, 5, 7, 7])       # I p q a b x y


def test_tree_plan_of_the_readme_example():
    plan = tree_plan(EXAMPLE)
    assert plan.position.tolist() == [0, 1, 2, 3, 4, 3, 4]
    (rows, keys, hidden), = row_tiles(plan)                     # small enough to be one tile
    assert rows == slice(0, 7) and keys.tolist() == [0, 1, 2, 3, 4, 5, 6] and hidden.shape == (7, 6)
    assert (~hidden[3:]).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0],      # a, b: I is seen by all
                                            [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]      # x, y skip a, b


def test_tiles_end_where_siblings_do(monkeypatch):
    monkeypatch.setattr("model.TILE_ROWS", 4)
    plan = tree_plan(torch.tensor([9, 9, 5, 5, 5, 9, 9, 9, 9]), skip=2)
    rows, keys, hidden = zip(*row_tiles(plan))
    assert rows == (slice(0, 3), slice(3, 7))                # 2 .. 4 and 5 .. 8, counted from the first that asks
    # a tile for each branch
    assert [k.tolist() for k in keys] == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 7, 8]]
    assert hidden[0].tolist() == [[True, True], [False, True], [False, False]]           # 2 is seen by 2, 3 and 4


@pytest.mark.parametrize("end", [[1, 1], [2, 5], [4, 2, 4, 3], [2, 3, 3]])
def test_tree_plan_refuses_what_does_not_nest(end):
    assert tree_plan(torch.tensor([3, 2, 3])).position.tolist() == [0, 1, 1]         # for contrast
    with pytest.raises(ValueError):
        tree_plan(torch.tensor(end))


def random_forest(rng, start, stop, depth=0):
    """end of rows start..stop of a random forest, depth first."""
    end = []
    while start < stop:
        size = min(stop - start, int(torch.randint(1, 40, (1,), generator=rng)))
        own = int(torch.randint(1, size + 1, (1,), generator=rng))
        inner = random_forest(rng, start + own, start + size, depth + 1) if depth < 4 else None
        end += [start + size] * own + (inner if inner is not None else [start + size] * (size - own))
        start += size
    return end


@pytest.mark.parametrize("rows", [1, 7, 32, 128])
@pytest.mark.parametrize("seed", range(6))
def test_attention_by_tiles_equals_the_mask(seed, rows, monkeypatch):
    monkeypatch.setattr("model.TILE_ROWS", rows)
    rng = torch.Generator().manual_seed(seed)
    end = torch.tensor(random_forest(rng, 0, 120))
    q, k, v = (torch.randn(120, heads, 8, dtype=torch.float64, generator=rng, requires_grad=True) for heads in (6, 2, 2))
    want, weight = attention_by_mask(q, k, v, tree_plan(end)), torch.randn(120, 6, 8, dtype=torch.float64, generator=rng)
    for first in (0, 1, 17, 119):                    # only the last rows ask, as after a cached prefix
        got = attention(q[first:], k, v, tree_plan(end, first))
        assert torch.allclose(got, want[first:], atol=1e-12)
        for a, b in zip(*(torch.autograd.grad((x * weight[first:]).sum(), (q, k, v), retain_graph=True)
                          for x in (got, want[first:]))):
            assert torch.allclose(a, b, atol=1e-12)


def alone(model, prompt, answer):
    """log p of an answer's tokens, from one plain sequence."""
    ids = torch.tensor(prompt + answer[:-1])
    hidden = model(ids, torch.full((len(ids),), len(ids)))
    return (hidden @ model.head.T).log_softmax(-1)[torch.arange(len(prompt) - 1, len(ids)), torch.tensor(answer)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [10 ** 6, 40, 1])
def test_packed_trees_equal_one_sequence_at_a_time(model, share, max_tokens):
    examples = tiny_examples()
    want = [alone(model, e.prompt, a) for e in examples for a in e.answers]
    torch.cat(want).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for p in pack(examples, max_tokens, share):
        logprobs = model(p.tokens, p.end, p.rows, p.targets)
        logprobs.square().sum().backward()
        for a in p.answer.unique().tolist():
            assert (logprobs[p.answer == a] - want[a]).abs().max() < 1e-9
    for got, parameter in zip(gradients, model.parameters()):
        assert (got - parameter.grad).abs().max() < 1e-9 * max(1, got.abs().max())


def test_recompute_changes_nothing(model):
    p = pack(tiny_examples(), 10 ** 6)[0]
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(p.tokens, p.end, p.rows, p.targets).sum().backward()
        gradients.append([q.grad.clone() for q in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_token_logprobs_and_its_gradient(monkeypatch):
    monkeypatch.setattr("model.TokenLogprobs.LOGITS", 80)            # 2 rows at a time, last 1; 16 columns, last 5
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(37, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 36, 15, 16, 31, 0, 32])
    want = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(token_logprobs(hidden, head, targets), want)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets), (hidden, head))


def test_an_empty_pack_has_zero_gradient(model):
    none = torch.zeros(0, dtype=torch.long)
    model(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long), none, none).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------ weights in and out


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_round_trip(tmp_path, tied):
    model = Llama.random(replace(CONFIG, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path, "cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert ("lm_head.weight" in again.state_dict()) == (not tied)


def broken_folder(tmp_path, what):
    folder = write_folder(tmp_path, "plain_gqa")
    path = folder / "model.safetensors"
    if what == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "no file":
        path.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "bad json":
        (folder / "config.json").write_text("{")
    elif what == "mistral":
        (folder / "config.json").write_text('{"model_type": "mistral"}')
    elif what == "no size":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif what == "shape":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace('"hidden_size": 48', '"hidden_size": 96'))
    else:
        weights = random_weights(GOLDEN["plain_gqa"]["shapes"])
        weights.pop("model.norm.weight") if what == "missing" else weights.update(extra=torch.zeros(1))
        save_file(weights, path)
    return folder


@pytest.mark.parametrize("what, says", [
    ("cut short", "model.safetensors: damaged or cut short"), ("no file", "model.safetensors: no such file"),
    ("no config", "config.json: cannot read"), ("bad json", "config.json is not valid JSON"),
    ("mistral", "only 'llama' is known"), ("no size", "config.json: missing"), ("shape", "has shape"),
    ("missing", "1 tensors are missing, the first is model.norm.weight"), ("extra", "tensor extra is not part")])
def test_broken_folders_say_what_is_wrong(tmp_path, what, says):
    with pytest.raises(InputError, match=says):
        Llama.from_pretrained(broken_folder(tmp_path, what), "cpu")


# ------------------------------------------------------------------ sampling


def test_greedy_and_sampled_generation_equal_no_cache():
    shapes = [(n, ()) for n in (1, 3, 70, 130, 64)]
    model, prompts = tiny_model(), [e.prompt for e in tiny_examples(shapes=shapes)]
    for temperature in (0, 1.0):
        options = dict(k=3, max_new_tokens=70, temperature=temperature, stop=list(range(12)))
        want = generate_plain(model, prompts, **options)
        assert len({len(ids) for answer in want for ids in answer}) > 2      # they stop at different places
        for more in ({}, {"kv_tokens": 700}, {"share": False}, {"max_slots": 3}):
            assert generate(model, prompts, **options, **more) == want, more
        assert generate(model, prompts[::-1], **options)[::-1] == want       # another composition
        assert [generate(model, [p], **options)[0] for p in prompts] == want


def test_the_toy_model_in_fp32_answers_as_without_a_cache():
    model, tokenizer = Llama.from_pretrained("toy/model", "cpu", torch.float32), Tokenizer.from_pretrained("toy/model")
    prompts = [tokenizer.prompt_ids(INSTRUCTION, format_input(text)) for text in ("The gate belongs to Ada. Please open the gate.", "Hi!", "")]
    for temperature in (0, 1.0):
        options = dict(k=2, max_new_tokens=12, temperature=temperature, stop=tokenizer.stop, seed=3)
        want = generate_plain(model, prompts, **options)
        for more in ({}, {"kv_tokens": 640}, {"share": False}, {"share": False, "kv_tokens": 640}):
            assert generate(model, prompts, **options, **more) == want, more


@pytest.mark.parametrize("tiny", [0, 1e-6, 1e-39, 1e-300])
def test_a_temperature_or_a_top_p_near_zero_leaves_the_likeliest_token(tiny):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    seed, position = torch.arange(50), torch.zeros(50, dtype=torch.long)
    for x in (logits, logits.double(), 1e4 * logits):
        assert torch.equal(draw_token(x, seed, position, tiny, 0.95), x.argmax(1))
        assert torch.equal(draw_token(x, seed, position, 1.0, tiny), x.argmax(1))


def test_generation_where_slots_end_between_two_looks_and_jobs_are_put_back():
    shapes = [(n, ()) for n in (65, 5, 64, 100, 5)]
    model, prompts = tiny_model(), [e.prompt for e in tiny_examples(shapes=shapes)]
    for options in ({"max_new_tokens": 2, "stop": list(range(40))}, {"max_new_tokens": 66}):
        want = generate_plain(model, prompts, **options)
        assert all(generate(model, prompts, **options, kv_tokens=64 * n) == want for n in (5, 6, 7, 8))


def test_a_prompt_whose_sample_was_drawn_again_is_yielded_once():
    """In bf16 a job that was put back may end in another order than at first."""
    answers = [{}]
    looks = [[(0, 0, [1])], [(0, 1, [2])], [(0, 0, [3])]]
    assert [whole for look in looks for whole in whole_prompts(answers, look, 2)] == [(0, [[1], [2]])]


def test_two_jobs_are_put_back_at_once_and_one_of_them_is_the_one_that_asks(monkeypatch):
    # 10 pages: an instruction, 3 prompts, 3 x 2 answers. When all answers fill their page, serving
    # the first job puts back the third, and serving the second puts back the second
    def noted(self):
        jobs = list(self.jobs)
        put_back.append(reserve(self))
        assert put_back[-1] in ([], jobs[:0:-1])
        return put_back[-1]

    put_back, reserve = [], Engine.reserve
    monkeypatch.setattr(Engine, "reserve", noted)
    model, prompts = tiny_model(), [e.prompt for e in tiny_examples(shapes=[(5, ())] * 3)]
    options = dict(k=2, max_new_tokens=66)
    want = generate_plain(model, prompts, **options)
    assert generate(model, prompts, **options, kv_tokens=640) == want
    assert max(map(len, put_back)) == 2


def test_after_compact_no_page_is_free_within_a_range_and_answers_are_the_same(monkeypatch):
    def noted(self):
        before = dict(self.owned)
        compact(self)
        prompts = [page for job in self.jobs for page in job.pages]
        samples = [page for own in self.owned.values() for page in own]
        assert all(max(prompts) < free < min(samples) for free in self.pool.free)
        assert len(set(prompts + samples)) == len(prompts + samples)        # an owner each
        assert (self.pool.bias[prompts] == 0).any(1).all()                  # their keys moved with them
        assert (self.pool.bias[self.pool.free] < 0).all()
        moved.append(before != self.owned)

    moved, compact = [], Engine.compact
    monkeypatch.setattr(Engine, "compact", noted)
    model, prompts = tiny_model(), [e.prompt for e in tiny_examples(shapes=[(n, ()) for n in (70, 150, 3, 200, 90, 66)])]
    options = dict(k=2, max_new_tokens=140, stop=[3, 7])                    # a page and more; they end at many places
    want = generate_plain(model, prompts, **options)
    assert len({len(ids) for answer in want for ids in answer}) > 6
    for kv_tokens in (None, 1600):                                          # all at once, and with some that wait
        moved.clear()
        assert generate(model, prompts, **options, kv_tokens=kv_tokens) == want
        assert sum(moved) > 3


def test_many_prompts_of_mixed_length_all_finish_under_a_small_budget():
    shapes = [(1 + (37 * i) % 150, ()) for i in range(200)]
    model = tiny_model(torch.float32)
    prompts = [e.prompt for e in tiny_examples(shapes=shapes)]
    got = generate(model, prompts, k=2, max_new_tokens=30, stop=[5], kv_tokens=1200)
    assert len(got) == 200 and all(len(a) == 2 and (a[0][-1] == 5 or len(a[0]) == 30) for a in got)
    with pytest.raises(InputError, match="--kv-tokens"):
        generate(model, prompts, k=2, max_new_tokens=3000, kv_tokens=1200)


def unread(tables, results):
    """The results of no row, after a check that every other one lies where its row reads."""
    reader = [row for _, lines in tables for line in lines for row in line]
    read = [r for own in results for r in own]
    assert len(set(read)) == len(read) and 0 not in read             # 0 is the empty result
    assert all(reader[r - 1] == row for row, own in enumerate(results) for r in own)
    return sorted(set(range(1, len(reader) + 1)) - set(read))


def test_number_reads_of_the_worked_example():
    tables, results = number_reads([
        (4, [([0], 0), ([0], 1), ([0], 2), ([0], 3)]),       # the instruction, for A0 A1 B0 B1
        (2, [([1], 0), ([1], 1), ([2], 0), ([2], 1)]),       # the prompts A and B
        (1, [([9], 0), ([8], 0), ([7], 0), ([6], 0)])])      # each sample's own
    assert tables == [(0, [[0, 1, 2, 3]]), (1, [[0, 1], [2, 3]]), (6, [[3], [2], [1], [0]])]
    assert results == [[1, 5, 12], [2, 6, 11], [3, 7, 10], [4, 8, 9]]
    assert unread(tables, results) == []


def test_number_reads_where_a_row_reads_no_page_of_the_instruction():
    # row 1 leaves its column of the table empty: results 2 and 5 are computed for row 0, unread
    tables, results = number_reads([(3, [([0, 1], 0), ([], 1), ([0, 1], 2)]),
                                    (1, [([4], 0), ([3], 0), ([2], 0)])])
    assert tables == [(0, [[0, 0, 2], [0, 0, 2]]), (2, [[2], [1], [0]])]
    assert results == [[1, 4, 9], [8], [3, 6, 7]]
    assert unread(tables, results) == [2, 5]
    # no row reads one: the group is left out, and the next begins with result 1
    tables, results = number_reads([(2, [([], 0), ([], 1)]), (2, [([0], 0), ([0], 1)])])
    assert tables == [(0, [[0, 1]])] and results == [[1], [2]]


def test_number_reads_where_pages_in_between_are_free():
    # prompts in pages 1 and 4, 2 and 3 free; the second prompt has one of two samples left
    tables, results = number_reads([(3, [([0], 0), ([0], 1), ([0], 2)]),
                                    (2, [([1], 0), ([1], 1), ([4], 0)]),
                                    (1, [([9, 7], 0), ([6], 0), ([5], 0)])])
    assert tables == [(0, [[0, 1, 2]]),
                      (1, [[0, 1], [0, 0], [0, 0], [2, 0]]),     # pages 1 to 4: results 4 to 11
                      (5, [[2], [1], [0], [0], [0]])]            # pages 5 to 9: results 12 to 16
    assert results == [[1, 4, 16, 14], [2, 5, 13], [3, 10, 12]]
    assert unread(tables, results) == [6, 7, 8, 9, 11, 15]


def test_a_page_is_never_handed_out_twice():
    rng, pool, held = random.Random(0), PagePool(CONFIG, 40, torch.float32, "cpu"), []
    for _ in range(1000):
        count, free = rng.randrange(6), list(pool.free)
        if held and (count > len(free) or rng.random() < 0.5):
            pages = held.pop(rng.randrange(len(held)))
            page = torch.tensor(pages, dtype=torch.long)
            pool.fill(page, torch.zeros_like(page))
            pool.give_back(pages)
        elif rng.random() < 0.5:
            held.append(pool.take_lowest(count))
            assert held[-1] == free[:count]
        else:
            held.append(pool.take_highest(count))
            assert held[-1] == free[::-1][:count]
        assert pool.free == sorted(pool.free)
        assert sorted(pool.free + sum(held, [])) == list(range(40))
        assert (pool.bias[pool.free] < 0).all()                      # empty
    with pytest.raises(AssertionError, match="two owners"):
        pool.give_back(pool.free[:1])


def test_top_p_draws_from_the_nucleus_with_the_right_frequencies():
    # p = .5 .3 .15 .05; top_p = 0.8 keeps the first two (the mass above the third, .8, is not below .8)
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    n = 20000
    drawn = draw_token(logits.expand(n, 4), torch.arange(n), torch.zeros(n, dtype=torch.long), 1.0, 0.8 - 1e-9)
    share = torch.bincount(drawn, minlength=4) / n
    assert share[0] == share[2] == 0
    assert abs(share[1] - 0.625) < 0.012 and abs(share[3] - 0.375) < 0.012       # 3.5 deviations


def test_sampling_covers_a_large_vocabulary_without_bias():
    logits = torch.zeros(1000, 1000)
    drawn = draw_token(logits, torch.arange(1000), torch.full((1000,), 7), 1.0, 1.0)
    assert drawn.min() < 10 and drawn.max() > 990 and abs(drawn.double().mean() - 499.5) < 35


def test_weights_that_are_not_numbers_do_not_draw_for_ever():
    logits = torch.tensor([[0.0, 1.0, 2.0], [math.nan] * 3])
    assert (draw_token(logits, torch.arange(2), torch.zeros(2, dtype=torch.long), 1.0, 0.95) < 3).all()


def test_random_numbers_belong_to_seed_prompt_sample_and_position():
    asked = [(0, [1, 2], 0), (1, [1, 2], 0), (0, [1, 2], 1), (0, [12], 0), (0, [1], 0)]
    assert len({sample_seed(*x) for x in asked}) == 5
    seed = torch.tensor([sample_seed(0, [1, 2], 0)])
    assert uniform(seed, seed * 0 + 5, 0) != uniform(seed, seed * 0 + 6, 0)
    u = uniform(torch.arange(100000), torch.zeros(100000, dtype=torch.long), 0)
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_is_the_one_that_was_read(tmp_path, name):
    (tmp_path / "a").mkdir()
    first = Llama.from_pretrained(write_folder(tmp_path / "a", name), "cpu", torch.float32)
    first.save_pretrained(tmp_path / "b")
    assert LlamaConfig.from_json(tmp_path / "b/config.json") == first.config


def test_temperature_divides_the_logits():
    # p = .2 .8; at temperature 1/2 p^2: .04 .64, so 1/17 of the draws are the first (times 1/2: 1/3)
    n, logits = 20000, torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    drawn = draw_token(logits.expand(n, 2), torch.arange(n), torch.zeros(n, dtype=torch.long), 0.5, 1.0)
    assert abs((drawn == 0).double().mean() - 1 / 17) < 0.01


def test_log_sums_of_bf16_logits_are_full_precision():
    hidden, head = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = (hidden @ head.T).double().log_softmax(-1).diagonal()
    assert (token_logprobs(hidden, head, torch.arange(40)) - want).abs().max() < 1e-5


def test_seed_temperature_and_top_p_reach_the_sampler(model):
    prompts, seen = [e.prompt for e in tiny_examples(shapes=[(1, ()), (5, ())])], []
    for more in ({}, {"seed": 3}, {"temperature": 0.5}, {"top_p": 0.3}):
        seen.append(generate(model, prompts, k=2, max_new_tokens=12, **more))
        assert seen[-1] == generate_plain(model, prompts, k=2, max_new_tokens=12, **more)
    assert all(got != seen[0] for got in seen[1:])
