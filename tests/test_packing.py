"""Blocks without padding: what is in them, and where the loss is taken."""

import numpy as np
import pytest
import torch
from conftest import TinyPair
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import take_characters
from ruadapt.training.encoding import collate, pack


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1), st.integers(0, 60))
def test_taken_texts_are_whole_and_reach_the_characters(texts: list[str], characters: int) -> None:
    chosen = list(take_characters(texts, characters))
    assert chosen == texts[: len(chosen)]
    if len(chosen) < len(texts):
        assert sum(map(len, chosen)) >= characters > sum(map(len, chosen[:-1]))
    if not characters:
        assert chosen == texts


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="аб в.cd1", max_size=40), min_size=1, max_size=8), block=st.integers(1, 9)
)
def test_packed_blocks_are_the_joined_documents(tiny_pair: TinyPair, texts: list[str], block: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.base)
    stream = [i for text in texts for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    if len(stream) < block:
        with pytest.raises(RuadaptError, match="fewer than one block"):
            pack(texts, tokenizer, block)
        return
    packed = pack(texts, tokenizer, block)
    assert str(packed.features["input_ids"].feature.dtype) == "int32"
    assert np.asarray(packed["input_ids"]).reshape(-1).tolist() == stream[: len(stream) // block * block]


def test_a_batch_has_its_ids_for_labels_or_those_of_its_column() -> None:
    rows = [{"input_ids": np.arange(16, dtype=np.int32) + n} for n in range(2)]
    batch = collate(rows)
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[*range(16)], [*range(1, 17)]]
    batch = collate([row | {"labels": np.full(16, -100)} for row in rows])
    assert batch["labels"].dtype == torch.int64 and (batch["labels"] == -100).all()
