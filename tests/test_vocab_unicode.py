"""Random Unicode through the extensions of real originals: nothing is lost."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.vocab import ORIGINALS, random_texts
from ruadapt.files import read_texts
from ruadapt.vocab import extend
from ruadapt.vocab.measure import changed_texts


@pytest.fixture(scope="module", params=ORIGINALS)
def extended(reference: Path, request: pytest.FixtureRequest) -> Tokenizer:
    lines = list(read_texts(reference / "text" / "heldout_ru_gsd_taiga.txt"))[:200]
    return extend(reference / "tokenizers" / request.param, lines, 50)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=20, max_size=20))
def test_any_text_comes_back(extended: Tokenizer, texts: list[str]) -> None:
    assert changed_texts(extended, texts) == []


def test_random_strings_come_back(extended: Tokenizer) -> None:
    assert changed_texts(extended, random_texts(2000, seed=1)) == []


def test_random_strings_are_seeded_and_valid() -> None:
    first = random_texts(500, seed=3)
    assert first == random_texts(500, seed=3) != random_texts(500, seed=4)
    assert len("".join(first).encode()) > 500  # no surrogates: they can't be encoded
    assert {len(text) for text in first} == set(range(1, 25))
