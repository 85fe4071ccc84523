"""Write golden_llama.json: logits of small random LLaMAs as transformers computes them.

    python tests/make_golden.py      (needs transformers; run once, the result is committed)

Weights are drawn by numpy from a seed, so the file holds only the logits.
"""
import json
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


def random_weights(shapes, seed=0):
    """{name: float32 tensor} for {name: shape}, in the order of names; norms near 1, the rest near 0."""
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy((rng.standard_normal(shape) * 0.15 + ("norm" in name)).astype(np.float32))
            for name, shape in sorted(shapes.items())}


def main():
    from transformers import LlamaConfig, LlamaForCausalLM
    golden = {}
    for name, fields in CONFIGS.items():
        model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).float().eval()
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()
                  if not (n == "lm_head.weight" and fields["tie_word_embeddings"])}
        model.load_state_dict(random_weights(shapes), strict=False)
        model.tie_weights()
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0]
        golden[name] = {"shapes": {n: list(s) for n, s in shapes.items()},
                        "logits": [[round(x, 5) for x in logits[r, :24].tolist()] for r in ROWS]}
    Path(__file__).with_name("golden_llama.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
