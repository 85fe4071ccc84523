"""Write golden_llama.json, logits of LLaMAs as transformers computes them, in fp32, and golden_inputs.json, ids of
texts and prompts as tokenizers and transformers give them, and figures of scikit-learn.

    python tests/make_golden.py [SMOLLM2]      (needs transformers and scikit-learn; run once, the results are committed)

The weights of small random models are drawn by numpy from a seed, so the file holds only the logits.
SMOLLM2 is a folder with SmolLM2-135M-Instruct; its golden figures are kept where it is not given. The
tests compare with them where the environment's GUARD_SMOLLM2 names such a folder.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

CONFIGS = {
    "llama32_tied": dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                         num_attention_heads=8, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
                         rope_theta=500000.0, tie_word_embeddings=True, max_position_embeddings=131072,
                         rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                                           high_freq_factor=4.0, original_max_position_embeddings=64)),
    "llama31_untied": dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-6,
                           rope_theta=10000.0, tie_word_embeddings=False, max_position_embeddings=4096,
                           rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                             high_freq_factor=4.0, original_max_position_embeddings=32)),
    "plain_gqa": dict(vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                      num_attention_heads=6, num_key_value_heads=3, head_dim=8, rms_norm_eps=1e-5,
                      rope_theta=10000.0, tie_word_embeddings=True, max_position_embeddings=2048,
                      rope_scaling=None)}
TOKENS = [(7 * i * i + 3 * i + 11) % 251 for i in range(150)]
ROWS = [0, 1, 63, 64, 149]
QUESTIONS = ["Why is the sky blue?", "Name three rivers in Europe.", "What is 17 times 23?", "Write a haiku about rain.",
             "How do bees find their way home?", "Translate 'good morning' into French.", "What does a judge do?",
             "List the planets by size.", "Why do leaves turn red in autumn?", "Explain recursion to a child.",
             "What is the difference between a fork and a branch?", "Give me a recipe for soup.",
             "Who wrote Faust?", "Is 97 a prime number?", "Describe a lighthouse in one sentence.",
             "What should I pack for a hike?"]


def random_weights(shapes, seed=0):
    """{name: float32 tensor} for {name: shape}, in the order of names; norms near 1, the rest near 0."""
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy((rng.standard_normal(shape) * 0.15 + ("norm" in name)).astype(np.float32))
            for name, shape in sorted(shapes.items())}


def first_logits(model, tokens, columns):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return [[round(x, 5) for x in logits[r, :columns].tolist()] for r in ROWS]


def golden_inputs():
    """{folder: ids of inputs.TEXTS, of inputs.PROMPT where it has a template; the pieces its pre_tokenizer makes}"""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import inputs
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    golden = {}
    for name, fields in inputs.FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            inputs.write_folder(folder, **fields)
            bare = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
            entry = {"texts": [bare.encode(text, add_special_tokens=False).ids for text in inputs.TEXTS]}
            entry["pieces"] = [[place for _, place in bare.pre_tokenizer.pre_tokenize_str(text)] for text in inputs.TEXTS]
            if fields.get("template"):
                turn = [{"role": "user", "content": "\n".join(inputs.PROMPT)}]
                chat = AutoTokenizer.from_pretrained(folder)
                entry["prompt"] = list(chat.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
        golden[name] = entry
    return golden


def labels_and_scores(seed):
    """A benchmark of 40 to 400 rows: its labels (bool), predictions (bool), and scores, many of them equal."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(40, 400))
    hit = rng.random(n) < 0.3
    score = np.round(np.clip(rng.random(n) * 0.8 + 0.2 * hit, 0, 1), 2)
    return hit, score > 0.5, score


def golden_figures():
    """What scikit-learn says of labels_and_scores(0), (1), ...: precision, recall, F1, average precision, and the
    recall where at most 1% and 5% of the negatives are taken for positive."""
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_curve
    rows = []
    for seed in range(4):
        hit, said, score = labels_and_scores(seed)
        figures = [*precision_recall_fscore_support(hit, said, average="binary")[:3], average_precision_score(hit, score)]
        false, true, _ = roc_curve(hit, score, drop_intermediate=False)
        figures += [true[false <= rate].max() for rate in (0.01, 0.05)]
        rows.append([100 * float(x) for x in figures])
    return rows


def main():
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    made = {"folders": golden_inputs(), "figures": golden_figures()}
    Path(__file__).with_name("golden_inputs.json").write_text(json.dumps(made) + "\n")
    path = Path(__file__).with_name("golden_llama.json")
    golden = {"smollm2": json.loads(path.read_text()).get("smollm2")} if path.exists() else {}
    for name, fields in CONFIGS.items():
        model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).float().eval()
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()
                  if not (n == "lm_head.weight" and fields["tie_word_embeddings"])}
        model.load_state_dict(random_weights(shapes), strict=False)
        model.tie_weights()
        golden[name] = {"shapes": {n: list(s) for n, s in shapes.items()}, "logits": first_logits(model, TOKENS, 24)}
    for folder in sys.argv[1:]:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer, greedy = AutoTokenizer.from_pretrained(folder), []
        for question in QUESTIONS:
            ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            new = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids):]
            greedy.append({"prompt": ids, "new": new.tolist()})
        golden["smollm2"] = {"logits": first_logits(model, TOKENS, 64), "greedy": greedy}
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
