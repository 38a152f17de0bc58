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
from ruadapt.training.packing import collate_blocks, focus_on_answers, pack

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


def test_loss_is_on_the_answers_and_their_ends(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.base)
    blocks = focus_on_answers(DOCUMENTS * 8, tokenizer, 64, other_share=0.0, seed=0)
    ids = np.concatenate([row["input_ids"] for row in blocks])
    labels = np.concatenate([row["labels"] for row in blocks])
    assert np.array_equal(labels[labels != -100], ids[labels != -100])
    text = tokenizer.decode(labels[labels != -100], skip_special_tokens=False)
    # This tokenizer has no token for an empty line: the first line break ends the answer.
    assert text.startswith("<|endoftext|>home<|endoftext|><|endoftext|>кот и пёс\nдома" * 2)
    more = focus_on_answers(DOCUMENTS * 8, tokenizer, 64, other_share=0.5, seed=0)
    kept = np.mean([(row["labels"] != -100).mean() for row in more])
    assert 0.5 < kept < 1
    batch = collate_blocks([more[0], more[1]])
    assert batch["labels"].shape == (2, 64) and batch["labels"].dtype == torch.int64
    assert (batch["labels"] == -100).any()
