"""Blocks without padding: what is in them, and where the loss is taken."""

import numpy as np
import pytest
import torch
from conftest import TinyPair
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import take_characters
from ruadapt.training.packing import collate_blocks, pack

DOCUMENTS = [
    "Anna went home.\nWhere did Anna go?\nAnswer:\nhome",
    "No question here.",
    "Кто это?\nОтвет:\nкот и пёс\n\nГде он?\nОтвет:\nдома",
]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1), st.integers(0, 60))
def test_taken_texts_are_whole_and_reach_the_characters(texts: list[str], characters: int) -> None:
    chosen = list(take_characters(texts, characters))
    assert chosen == texts[: len(chosen)]
    if len(chosen) < len(texts):
        assert sum(map(len, chosen)) >= characters > sum(map(len, chosen[:-1]))
    if not characters:
        assert chosen == texts


def test_blocks_hold_every_document_in_order(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.base)
    blocks = pack(DOCUMENTS * 5, tokenizer, 16)
    stream = np.concatenate([row["input_ids"] for row in blocks])
    text = tokenizer.decode(stream, skip_special_tokens=False)
    whole = "".join(tokenizer.bos_token + document for document in DOCUMENTS * 5)
    assert whole.startswith(text) and len(whole) - len(text) < 120
    with pytest.raises(RuadaptError, match="fewer than one block of 10000"):
        pack(DOCUMENTS, tokenizer, 10_000)


def test_a_batch_has_its_ids_for_labels_or_those_of_its_column() -> None:
    rows = [{"input_ids": np.arange(4, dtype=np.int32) + n} for n in range(2)]
    batch = collate_blocks(rows)
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    batch = collate_blocks([row | {"labels": np.full(4, -100)} for row in rows])
    assert batch["labels"].dtype == torch.int64 and (batch["labels"] == -100).all()
