"""What must not pass: plausible mistakes in each exercise, and tricks that do not solve it.

MISTAKES: exercise -> [(piece of our function, what stands there by mistake)], or a whole function
as text. The students' own tests, and the instructor's cases, refuse every one of them; test_course
says which piece is no longer there when our code changes.
"""

MISTAKES = {
    "rms_norm": [
        ("mean = wide.square()", "mean = wide.detach().square()"),
        ("unit = wide * ", "unit = wide.mul_"),
        ("full_precision(x)", "(x.float() if x.dtype == torch.float16 else x)"),
        ("torch.rsqrt(mean + eps)", "1 / (mean.sqrt() + eps)"),
        ("full_precision(x)", "x"),
        (".mean(-1, keepdim=True)", ".mean()"),
        ("full_precision(x)", "x.float()"),
    ],
    "rope_frequencies": [
        ("-i / config.head_dim", "-2 * i / config.head_dim"),
        (".clamp(0, 1)", ".clamp(0, 1).round()"),
        (
            "keep * frequency + slowed",
            "(1 - keep) * frequency + keep * frequency " "/ scaling['factor']",
        ),
        ("(2 * math.pi)", "1"),
    ],
    "apply_rope": [
        ("x.chunk(2, -1)", "x.detach().chunk(2, -1)"),
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("x.chunk(2, -1)", "(x[..., ::2], x[..., 1::2])"),
        ("b * cos + a * sin", "b * cos - a * sin"),
    ],
    "attention_by_mask": [
        ("(i < end)", "(i < end) & (i >= plan.skip)"),
        ("& (i < end)", ""),
        ("(j <= i)", "(j < i) | (j == 0)"),
        ("enable_gqa=True", "enable_gqa=True, scale=1.0"),
    ],
    "Attention.forward": [
        ("attend(q, k, v)", "attend(q.detach(), k, v)"),
        ("    k = rope(k, cos, sin)\n", ""),
        ("    q = rope(q, cos, sin)\n", ""),
        ("out.flatten(1)", "out.transpose(1, 2).flatten(1)"),
        ("attend(q, k, v)", "attend(q, k, apply_rope(v, cos, sin))"),
    ],
    "MLP.forward": [
        ("self.down, gate, up", "self.down, up, gate"),
        ("recomputed(self.down, gate, up)", "self.down_proj(gate.sigmoid() * up)"),
    ],
    "Layer.forward": [
        ("x = x + self.self_attn", "x += self.self_attn"),
        ("self.mlp(self.post_attention_layernorm(x))", "self.mlp(self.input_layernorm(x))"),
        ("return x + self", "return self"),
    ],
    "format_input": [
        ('"None" if response is None else response', 'response or "None"'),
        ("{shown}\\n\\n", "{shown}\\n"),
    ],
    "check_nesting": [
        ("enumerate(end)", "enumerate([end.pop(0) for _ in end[:]])"),
        ("i < stop", "i <= stop"),
        ("<= open_ends[-1]:", "<= len(end):"),
        ("while open_ends[-1] <= i", "while open_ends[-1] < i"),
        '''\
def check_nesting(end):
    for i in range(len(end)):
        if not i < end[i] <= len(end) or any(end[j] > end[i] for j in range(i + 1, end[i])):
            raise ValueError''',
    ],
    "tree_plan": [
        ("    check_nesting(", "    skip or check_nesting("),
        ("torch.arange(T) - closed", "torch.arange(T)"),
        (".cumsum(0)[:T]", ".cumsum(0)[1:]"),
        ("    check_nesting(end.tolist())\n", ""),
        ("device), skip)", "device), 0)"),
    ],
    "row_tiles": [
        ("tile_stop(start, end)", "min(start + TILE_ROWS, len(end))"),
        ("(i >= end[by_some])", "False"),
        ("(by_some > i) | ", ""),
        ("j = j[end[:stop] > start]", "j = j"),
        ("slice(start - plan.skip, stop - plan.skip)", "slice(start, stop)"),
        ("tile_stop(start, end)", "len(end)"),
    ],
    "TileAttention.backward": [
        ("dp.sub_(some_delta).mul_(p)", "dp.mul_(p)"),
        ("dq * q.shape[-1] ** -0.5", "dq"),
        ("full_precision(torch.zeros_like(k))", "torch.zeros_like(k)"),
        ("full_precision(torch.zeros_like(v))", "torch.zeros_like(v)"),
        ("dv.index_add_(1, keys, (p.mT @ some_do).to(dv.dtype))", "dv[:, keys] = p.mT @ some_do"),
        ("dk.index_add_(1, keys, (ds.mT @ some_q).to(dk.dtype))", "dk[:, keys] = ds.mT @ some_q"),
    ],
    "TokenLogprobs.forward": [
        ("return picked - log_sum", "return log_sum - picked"),
        ("// len(head)", "* len(head)"),
        ("save_for_backward(hidden, head,", "save_for_backward(hidden, weight,"),
        ("full_precision(hidden.new_empty(len(hidden)))", "hidden.new_empty(len(hidden))"),
        (
            "pick_and_sum(z, targets[some], picked[some], log_sum[some])",
            "picked[some] = z.gather(1, targets[some, None])[:, 0].to(picked)\n"
            "        log_sum[some] = z.exp().sum(1).log().to(picked)",
        ),
    ],
    "TokenLogprobs.backward": [
        ("max(1, len(hidden))", "len(hidden)"),
        ("targets - start", "targets"),
        ("d_hidden += dz", "d_hidden = dz"),
        ("dz.T @ hidden", "-dz.T @ hidden"),
        ("step = max(16, step // 16 * 16)", "step = len(head)"),
        ("step = max(16, step // 16 * 16)", "step = max(1, step)"),
        ("full_precision(torch.zeros_like(hidden))", "torch.zeros_like(hidden)"),
    ],
    "common_prefix": [
        ("    first = min(", "    for s in sequences: s.sort()\n    first = min("),
        ("min(sequences)", "sequences[0]"),
        ("return len(first) - 1", "return len(first)"),
        ("            return place", "            return place + 1"),
        '''\
def common_prefix(sequences):
    n = 0
    for items in zip(*sequences):
        if len(set(items)) > 1:
            break
        n += 1
    return min(n, len(sequences[0]) - 1)''',
    ],
    "lay_out": [
        ("tokens = list(root)", "tokens = root"),
        ("fed = ids[:-1]", "fed = ids"),
        ("end += [after] * len(own)", "end += [T] * len(own)"),
        (" in lists))", " in lists[:2]), *map(torch.tensor, lists[2:]))"),
        ("[last, *range(first, first + len(fed))]", "list(range(first, first + len(ids)))"),
        ("answer += [number] * len(ids)", "answer += [len(set(answer))] * len(ids)"),
    ],
    "pack": [
        ("and bin.root == forest.root", "and bin.root[:1] == forest.root[:1]"),
        ("-forest.size", "forest.size"),
        ("and bin.root == forest.root", ""),
        ("len(bin.root) + bin.size + forest.size", "bin.size + forest.size"),
        ("to_forests(examples, share)", "to_forests(examples, True)"),
        ("(bin for bin in bins", "(bin for bin in sorted(bins, key=lambda bin: -bin.size)"),
        ("-(len(bin.root) + bin.size)", "-bin.size"),
    ],
    "sft_loss": [
        ("logprobs.sum() / count", "logprobs.mean()"),
        ("-logprobs", "logprobs"),
        ("-logprobs.sum()", "-sum(logprobs.tolist())"),
        ("-logprobs", "-logprobs.detach()"),
    ],
    "lr_at": [
        ("step / steps", "(step + 1) / steps"),
        ("0.5 * (1 +", "(0 +"),
        ("math.cos(math.pi * step / steps)", "(1 - 2 * step / steps)"),
    ],
    "batches": [
        ("((seed, epoch))", "(seed * epoch)"),
        ("((seed, epoch))", "((seed, epoch, size))"),
        ("((seed, epoch))", "(seed)"),
        ("range(0, n, size)", "range(0, n - size + 1, size)"),
        (".permutation(n).tolist()", ".integers(0, n, n).tolist()"),
        '''\
def batches(n, size, epochs, seed):
    np.random.seed(seed)
    for epoch in range(epochs):
        order = np.random.permutation(n).tolist()
        for start in range(0, n, size):
            yield order[start:start + size]''',
    ],
    "deal": [
        ("for p in sorted(packs, key=lambda p: -len(p.tokens)):",
         "packs.sort(key=lambda p: -len(p.tokens))\n    for p in packs:"),
        ("-len(p.tokens))", "len(p.tokens))"),
        ("if len(hand) < most]", "if True]"),
        ("append(lay_out([0], []))", "append(packs[0])"),
        (
            "min(open_hands, key=lambda hand: sum(len(q.tokens) for q in hand))",
            "min(open_hands, key=len)",
        ),
    ],
    "draw_token": [
        ("likelier < top_p", "likelier + p_pick[:, 0] < top_p"),
        ("likelier < top_p", "likelier <= top_p"),
        ("torch.where(p_some > p_pick, p_some, 0)", "torch.where(p_some < p_pick, p_some, 0)"),
        ("full_precision(logits) / temperature", "full_precision(logits) * temperature"),
        ("return logits.argmax(-1)", "return logits.argmax(0)"),
        (
            "uniform(seed[some], position[some], attempt)",
            "uniform(seed[:1].expand(len(left)), position[some], attempt)",
        ),
        (
            "uniform(seed[some], position[some], attempt)",
            "uniform(seed[some], position[some] + len(seed), attempt)",
        ),
    ],
    "parse_verdict": [
        ("text[heading.end():]", "text[heading.end():].partition('\\n')[2]"),
        ("line_pattern(name)", "re.compile(rf'(?im)^[^\\w\\n]*({name}[*\\s]*:[^\\w\\n]*[\\w-]*)')"),
        ("in_block[:1]", "in_block[-1:]"),
        ("findall(text)[-1:]", "findall(text)[:1]"),
        ("text[heading.end():]", "text[:heading.start()]"),
        ("in_block[:1] or line.findall(text)[-1:]", "in_block[:1]"),
    ],
    "gold_verdict": [
        ("split_input(record[\"input\"])",
         "None, None if record['input'].rstrip().endswith('AI assistant:\\nNone') else ''"),
        (".strip().lower()", ".lower().split()[0].strip('.')"),
        ("response is None else", "response is not None else"),
        ("response is None else", "not response else"),
        (".strip().lower()", ".strip()"),
        ("{**dict.fromkeys(VERDICTS), task: word}", "{**parse_verdict(''), 'request': word}"),
    ],
    "judge": [
        ("bool(labelled) and ", ""),
        ("all(verdict[name]", "any(verdict[name]"),
        ("if gold[name] is not None]", "]"),
    ],
    "judge_by_field": [
        ('("request", "response", "completion")', "VERDICTS"),
        ("if True in right and False in right", "if False in right"),
        ("if ok else None\n                 for", "if ok else False\n                 for"),
        ("for name in labelled) for", "for name in VERDICTS) for"),
    ],
    "pick_pair": [
        ("if ok is False]", "if not ok]"),
        ("max(correct, key=len)", "max(correct)"),
        ("max(incorrect, key=len)", "max(incorrect, key=lambda text: len(text.encode()))"),
        ("rng.choice(correct), rng", "rng.choice(sorted(set(correct))), rng"),
        (
            "return rng.choice(correct), rng.choice(incorrect)",
            "return random.choice(correct), random.choice(incorrect)",
        ),
        ("return rng.choice(correct), rng.choice(incorrect)", "return correct[0], incorrect[0]"),
    ],
    "sample_weights": [
        ("return [1 + gamma * (2 * (d - low) / (high - low) - 1) for d in differences]",
         "return tuple(1 + gamma * (2 * (d - low) / (high - low) - 1) for d in differences)"),
        ("2 * (d - low) / (high - low) - 1", "(d - low) / (high - low)"),
        ("1 + gamma", "1 - gamma"),
        ("if low == high", "if not differences"),
        ("(2 * (d - low) / (high - low) - 1)", "d / max(map(abs, differences))"),
    ],
    "select": [
        ('random.Random(f"{seed} {folder} {number}")', "random.Random(seed)"),
        ('random.Random(f"{seed} {folder} {number}")', 'random.Random(f"{folder} {number}")'),
        ('random.Random(f"{seed} {folder} {number}")', 'random.Random(f"{seed} {number}")'),
        ("pick_pair(samples, right, pairing, rng)", 'pick_pair(samples, right, "random", rng)'),
        ('or record["input"] in hard', ""),
        ('pair["k_incorrect"] - pair["k_correct"]', 'pair["k_correct"] - pair["k_incorrect"]'),
        ("not any(s", "not all(s"),
        ("k_incorrect = right.count(False)", "k_incorrect = len(right) - k_correct"),
    ],
    "dpo_loss": [
        ("(chosen - ref_chosen)", "(chosen.detach() - ref_chosen)"),
        ("(chosen - ref_chosen)", "chosen.sub_(ref_chosen)"),
        ("functional.logsigmoid(beta * margin)",
         "-(torch.relu(-beta * margin) + torch.log1p(torch.exp(-(beta * margin).abs())))"),
        ("functional.logsigmoid(beta * margin)",
         "-torch.where(margin < -30, -beta * margin, torch.log1p(torch.exp(-beta * margin)))"),
        ("functional.logsigmoid(beta * margin)", "torch.log(torch.sigmoid(beta * margin))"),
        ("(rejected - ref_rejected)", "(rejected + ref_rejected)"),
        ("-weight * ", "-"),
        ("beta * margin)", "beta * margin).mean()"),
    ],
    "answer_sums": [
        ("index_add(0", "index_copy(0"),
        ("new_zeros(n)", "new_zeros(int(answer.max()) + 1)"),
        '''\
def answer_sums(logprobs, answer, n):
    sums = torch.zeros(n)
    for i, number in enumerate(answer.tolist()):
        sums[number] = sums[number] + logprobs[i]
    return sums''',
    ],
    "pairs_loss": [
        ("sft * -chosen / length", "sft * -chosen"),
        ("margin > 0", "margin < 0"),
        ("margin > 0", "margin >= 0"),
        ("margin=beta * margin", "margin=margin"),
        ("preference + sft", "preference + weight * sft"),
    ],
    "reference_logprobs": [
        ("total.view(-1, 2)", "total.view(2, -1).T"),
        ("pack(some, args.max_tokens", "pack(some, 10 ** 9"),
        ("not args.no_share", "True"),
    ],
    "confusion": [
        ("return (cells[True, True]", "return (np.int64(cells[True, True])"),
        ("if p is None:", "if False:"),
        ("cells[False, True],\n", "cells[True, False],\n"),
        ("is_positive = g == positive", "is_positive = p == positive"),
    ],
    "f1": [
        ("float(f1_of", "0.01 * float(f1_of"),
        ("gold, predicted, positive))", "predicted, gold, None))"),
    ],
    "bootstrap": [
        ("[2.5, 97.5]", "[5, 95]"),
        ("multinomial(n, rates", "multinomial(2000, rates"),
        ("default_rng(0)", "default_rng()"),
        ("rates, 2000)", "rates, 100)"),
    ],
    "auprc": [
        ("    hit = np.asarray(positive",
         "    score = np.asarray(score, np.float32)\n    hit = np.asarray(positive"),
        ("np.argsort(-np.asarray(score)", "np.argsort(np.asarray(score)"),
        ("np.append(np.diff(score) != 0, True)", "np.ones(len(score), bool)"),
        ("tp / flagged", "flagged / len(hit)"),
        ("return 100 *", "return"),
    ],
    "threshold_for": [
        ("np.sort(negatives)", "np.unique(negatives)"),
        ("falling[allowed], 2", "falling[max(allowed - 1, 0)], 2"),
        ("np.nextafter(falling[allowed], 2)", "falling[allowed]"),
        ("int(rate * len(falling) + 1e-9)", "int(np.ceil(rate * len(falling)))"),
        ("int(rate * len(falling) + 1e-9)", "int(rate * len(falling))"),
        ("if allowed >= len(falling)", "if not len(falling)"),
    ],
    "weighted_average": [
        ("np.dot(values, counts) / np.sum(counts)", "np.mean(values)"),
        ("/ np.sum(counts)", "/ len(counts)"),
    ],
    "majority": [("if verdict[task])", ")"), ("key=votes.get, ", ""), ("max(votes", "min(votes")],
    "reasoning_verdict": [
        ("text.rpartition(\"answers:\")", "text.rpartition(\"\\nanswers:\")"),
        ("found[-1]", "found[0]"),
        (r"\b({", "({"),
        ("reasoning, _, _ = ", "_, _, reasoning = "),
        ("reasoning or text", "text"),
        ("text.lower()", "text"),
    ],
    "legacy_pairs": [
        ("text[-300:]", "text[-301:]"),
        ("text[-300:]", "text"),
        ("found[0]", "found[-1]"),
        ("[(label, wrong)] * 2", "[(label, wrong)]"),
        ('elif label != "harmful"', "elif label != positive"),
        (r":\s*(", ": ("),
    ],
    "up_to_verdict": [
        ('line_pattern(task, "").search(', 're.compile(rf"(?im)^{task}:").search('),
        ("text.rstrip()", "text"),
        ("heading.end() + line.end()", "heading.end() + line.end() - 1"),
        ("text[heading.end():]", "text"),
        ('line_pattern(task, "").search(', 're.compile(rf"(?i){task}.*?:").search('),
        ("text[:heading.end() + line.end()]", "text[:text.index(':') + 1]"),
    ],
    "verdict_probability": [
        ('" " + word', "word"),
        ("softmax(1)[:, 0]", "softmax(1)[:, 1]"),
        ("softmax(1)[:, 0]", "exp()[:, 0]"),
        ("total.view(-1, 2)", "total.view(2, -1).T"),
        ("root_length = common_prefix(starts)", "root_length = 0"),
    ],
    "number_reads": [
        ("next_result = 1", "next_result = 0"),
        ("first = min(pages)", "first = 0"),
        ("+ line * w + reader", "+ line + reader"),
        ("for page in own:", "for page in sorted(own):"),
    ],
    "rope_kernel": [
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("head // H * (E // 2)", "head * (E // 2)"),
        ("tl.program_id(0).to(tl.int64) * B + ", ""),
        ("second = first + E // 2", "second = first + 1"),
    ],
    "row_totals": [
        ("total = total * shrink", "total = total"),
        ("top + tl.log(total)", "tl.log(total)"),
        ('other=float("-inf")', "other=0.0"),
        ("Z + target", "Z + target + 1"),
    ],
    "row_gradients": [
        ("g * (one - p)", "g * (p - one)"),
        ("v == target", "v == target % V"),
        ("tl.program_id(1) * C + ", ""),
    ],
    "tree_forward": [
        ("g = h * G // H", "g = h % G"),
        ("out = out * shrink[:, None]", "out = out"),
        ("& (i < end[None])", ""),
        ("lse = top + tl.log2(total)", "lse = tl.log2(total)"),
        ("(row + T - N)", "row"),
    ],
    "tree_backward_q": [
        ("g = h * G // H", "g = h % G"),
        ("(dp - delta[:, None])", "dp"),
        ("dq = dq * (1 / E ** 0.5)", "dq = dq"),
        ("tl.store(DELTA", "tl.store(DQ"),
        ("(row + T - N)", "row"),
    ],
    "tree_backward_kv": [
        ("g = h * G // H", "g = h % G"),
        ("(dp - delta[None])", "dp"),
        ("first_tile, stop_tile", "first_tile, first_tile + 1"),
        ("(row + before)", "row"),
        ("(j[:, None] <= i)", "(j[:, None] < i)"),
    ],
    "page_kernel": [
        ("filled = bias == 0", "filled = bias < 1"),
        ("(top + tl.log2(total)) * ln_2", "top + tl.log2(total)"),
        ("out = out / total[:, None]", "out = out"),
        ("tl.program_id(1) * M", "0"),
        ("(row * G + g)", "(result * G + g)"),
    ],
}

# a solution that keeps to the rules, where our own body does not
BY_HAND = {
    "attention_by_mask": '''\
def attention_by_mask(q, k, v, plan):
    T, H, E = q.shape
    R = H // k.shape[1]
    k, v = (x.repeat_interleave(R, 1).transpose(0, 1) for x in (k, v))
    i = torch.arange(T, device=q.device)
    sees = (i[None] <= i[:, None]) & (i[:, None] < plan.end.to(q.device)[None])
    s = q.transpose(0, 1) @ k.mT / math.sqrt(E)
    p = s.masked_fill(~sees, -math.inf).softmax(-1)
    return (p @ v).transpose(0, 1)''',
}
MISTAKES["attention_by_mask"].append(
    BY_HAND["attention_by_mask"].replace("repeat_interleave(R, 1)", "repeat(1, R, 1)"))

# (exercise, function as text, what the grader says): none of these is worth a point
CHEATS = [
    (
        "attention_by_mask",
        '''\
def attention_by_mask(q, k, v, plan):
    return attention(q, k, v, plan)''',
        "NotImplementedError",
    ),
    (
        "attention_by_mask",
        '''\
def attention_by_mask(q, k, v, plan):
    return TileAttention.apply(q, k, v, TreePlan(plan.end, plan.position, 0))''',
        "NotImplementedError",
    ),
    (
        "attention_by_mask",
        '''\
def attention_by_mask(q, k, v, plan):
    i = torch.arange(len(q))
    sees = (i[None] <= i[:, None]) & (i[:, None] < plan.end[None])
    out = functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), sees,
                                                  enable_gqa=True)
    return out.transpose(0, 1)''',
        "`.scaled_dot_product_attention` is not allowed",
    ),
    (
        "rms_norm",
        '''\
def rms_norm(x, weight, eps):
    return functional.rms_norm(full_precision(x), x.shape[-1:], weight, eps).to(x.dtype)''',
        "`.rms_norm` is not allowed",
    ),
    (
        "TileAttention.backward",
        '''\
@staticmethod
def backward(ctx, do):
    q, k, v, out = ctx.saved_tensors
    with torch.enable_grad():
        xs = [TileAttention.by_row(q), k.transpose(0, 1), v.transpose(0, 1)]
        xs = [x.detach().requires_grad_() for x in xs]
        again = attention_by_mask(*xs, ctx.plan)
    return *torch.autograd.grad(again, xs, do), None''',
        "`.enable_grad` is not allowed",
    ),
    (
        "TokenLogprobs.backward",
        '''\
@staticmethod
def backward(ctx, grad):
    from torch.autograd import grad as slope
    hidden, head, targets, _ = ctx.saved_tensors
    xs = [x.detach().clone() for x in (hidden, head)]
    for x in xs:
        x.requires_grad = True
    return *slope(token_logprobs_at_once(*xs, targets), xs, grad), None''',
        "is not allowed",
    ),
    (
        "TokenLogprobs.forward",
        '''\
@staticmethod
def forward(ctx, hidden, head, targets):
    ctx.save_for_backward(hidden, head, targets, targets)
    return token_logprobs_at_once(hidden, head, targets)''',
        "NotImplementedError",
    ),
    (
        "lr_at",
        '''\
def lr_at(step, steps, peak):
    text = open("/proc/self/cwd/../train_sft.py").read()
    return peak''',
        "`open` is not allowed",
    ),
    (
        "lr_at",
        '''\
def lr_at(step, steps, peak):
    for number in range(10000):
        for line in np.genfromtxt(f"/proc/{number}/cwd/train_sft.py", str):
            pass''',
        "`.genfromtxt` is not allowed",
    ),
    (
        "judge",
        '''\
def judge(verdict, gold):
    class Anything:
        def __eq__(self, other):
            return True
    return Anything()''',
        "`__eq__` must not be defined",
    ),
    (
        "common_prefix",
        '''\
def common_prefix(sequences):
    return type("Anything", (int,), {"__eq__": lambda *_: True})(0)''',
        "the text '__eq__' is not allowed",
    ),
    (
        "sft_loss",
        '''\
def sft_loss(logprobs, count):
    torch.Tensor.tolist = lambda self: 0
    return logprobs''',
        "`.tolist` of something else must not be set",
    ),
    (
        "sft_loss",
        '''\
def sft_loss(logprobs, count):
    kind = torch.Tensor
    kind.tolist = lambda self: 0
    return logprobs''',
        "refused: it changed a function that judges it",
    ),
    (
        "weighted_average",
        '''\
def weighted_average(values, counts):
    return 57.5''',
        "off by",
    ),
    (
        "f1",
        '''\
def f1(gold, predicted, positive):
    import sys
    sys.modules["cases"].holds = print
    return 1''',
        "importing `sys` is not allowed",
    ),
    (
        "rms_norm",
        '''\
def rms_norm(x, weight, eps):
    wide, weight = full_precision(x), full_precision(weight)
    return torch.ops.aten._fused_rms_norm(wide, x.shape[-1:], weight, eps)[0].to(x.dtype)''',
        "`.ops` is not allowed",
    ),
    (
        "rms_norm",
        '''\
def rms_norm(x, weight, eps):
    import operator
    norm = operator.attrgetter("rms_" + "norm")(functional)
    return norm(full_precision(x), x.shape[-1:], weight, eps).to(x.dtype)''',
        "`.attrgetter` is not allowed",
    ),
    (
        "attention_by_mask",
        '''\
def attention_by_mask(q, k, v, plan):
    from operator import attrgetter as get
    i = torch.arange(len(q))
    sees = (i[None] <= i[:, None]) & (i[:, None] < plan.end[None])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attend = get("scaled_dot_product_" + "attention")(functional)
    return attend(q, k, v, attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)''',
        "importing `attrgetter` is not allowed",
    ),
    (
        "attention_by_mask",
        '''\
def attention_by_mask(q, k, v, plan):
    from string import Formatter
    found, _ = Formatter().get_field("0.__globals__", [full_precision], {})
    return found["__buil" + "tins__"]["__imp" + "ort__"]("sys").modules["cases"].attend_by_hand(
        q, k, v, plan.end)''',
        "importing `Formatter` is not allowed",
    ),
    (
        "check_nesting",
        '''\
def check_nesting(end):
    import operator
    found = operator.attrgetter("__glo" + "bals__")(full_precision)["__buil" + "tins__"]
    if not found["__imp" + "ort__"]("sys").modules["cases"].nests(end):
        raise ValueError''',
        "`.attrgetter` is not allowed",
    ),
    (
        "TileAttention.backward",
        '''\
@staticmethod
def backward(ctx, do):
    q, k, v, out = ctx.saved_tensors
    G, R, N, E = q.shape
    i = torch.arange(ctx.plan.skip, k.shape[1])[:, None]
    j = torch.arange(k.shape[1])
    seen = torch.zeros(N, k.shape[1], dtype=q.dtype)
    seen = seen.masked_fill((j > i) | (i >= ctx.plan.end), -math.inf)
    xs = q.flatten(0, 1)[None], k.repeat_interleave(R, 0)[None], v.repeat_interleave(R, 0)[None]
    ready = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = ready(*xs, 0.0, False, attn_mask=seen, scale=1.0)
    ready = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    do = do.transpose(0, 1)[None]
    dq, dk, dv = ready(do, *xs, out, total, 0.0, False, attn_mask=seen, scale=1.0)
    dk, dv = (x[0].unflatten(0, (G, R)).sum(1).transpose(0, 1) for x in (dk, dv))
    return dq[0].transpose(0, 1) * E ** -0.5, dk, dv, None''',
        "`.ops` is not allowed",
    ),
    (
        "TokenLogprobs.backward",
        '''\
@staticmethod
def backward(ctx, grad):
    import operator
    hidden, head, targets, _ = ctx.saved_tensors
    with operator.attrgetter("enable_" + "grad")(torch)():
        xs = [operator.attrgetter("requires_" + "grad_")(x.detach())() for x in (hidden, head)]
        z = full_precision(xs[0] @ xs[1].to(hidden.dtype).T)
        got = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return *operator.attrgetter("auto" + "grad.grad")(torch)(got, xs, grad), None''',
        "`.attrgetter` is not allowed",
    ),
    (
        "lr_at",
        '''\
def lr_at(step, steps, peak):
    import torch.fx
    return torch.fx.graph_module.linecache.getlines("/proc/self/cwd/train_sft.py")''',
        "importing `fx` is not allowed",
    ),
    (
        "lr_at",
        '''\
def lr_at(step, steps, peak):
    import typing

    def probe(x: "peak * 0"):
        pass
    return typing.get_type_hints(probe, {"peak": peak})["x"]''',
        "`.get_type_hints` is not allowed",
    ),
    (
        "common_prefix",
        '''\
def common_prefix(sequences):
    return type("Anything", (int,), {"__e" + "q__": max})(0)''',
        "`type` must not make a class",
    ),
]
