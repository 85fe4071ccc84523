"""Shared by all tests: a tiny model, the toy tokenizer, and the repository on the path."""
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "toy", "tests", "tools", "course")]
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

from data import Example, Tokenizer  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

CONFIG = LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                     num_attention_heads=6, num_key_value_heads=2)


def tiny_model(dtype=torch.float64, seed=1, scale=6):
    """A small untied LLaMA whose weights are large enough that its predictions differ clearly."""
    model = Llama.random(CONFIG, seed).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(scale)
    return model


def tiny_examples(root=9, shapes=((3, (5, 1)), (1, (7, 2)), (10, (4, 4)), (4, (1, 6))), seed=0):
    """Examples of random ids that share `root` first tokens; shapes:
    (rest of prompt, answer lengths)."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(CONFIG.vocab_size) for _ in range(n)]
    start = ids(root)
    return [Example(start + ids(n), [ids(m) for m in answers], root) for n, answers in shapes]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained("toy/model")


@pytest.fixture
def model():
    return tiny_model()
