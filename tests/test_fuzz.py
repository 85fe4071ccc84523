"""A small part of tests/fuzz.py, and texts whose length alone is the attack."""
import time

import pytest
from fuzz import fuzz

from data import parse_verdict


def test_two_thousand_random_and_adversarial_strings():
    assert fuzz(2000, seed=1) > 100_000


@pytest.mark.parametrize("letter", [" ", "\n", "a", "^", "\u200b"])
def test_a_million_equal_characters_are_encoded(tokenizer, letter):
    assert tokenizer.decode(tokenizer.encode(letter * 1_000_000)) == letter * 1_000_000


def test_reading_a_verdict_takes_time_linear_in_the_text():
    start = time.process_time()
    for text in ("\n" * 200_000, "- \r\n" * 50_000, "Request:\n" * 20_000, "Request: " + "-\n" * 100_000):
        assert parse_verdict(text)["completion"] is None
    assert time.process_time() - start < 5                                         # quadratic: hours
