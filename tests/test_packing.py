"""Blocks without padding: what is in them, and where the loss is taken."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import TinyPair
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import project_root, take_characters
from ruadapt.training.packing import collate_blocks, focus_on_answers, pack
from ruadapt.world import documents, load_world
from ruadapt.world.pair import base_config, pretraining_texts, train_base_tokenizer

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


def test_pair_tokenizer_is_english_heavy_and_the_mix_is_kept() -> None:
    world = load_world(project_root() / "data" / "world")
    texts = list(pretraining_texts(world, 100_000, 0.5, 0))
    russian = sum(len(text) for text in texts if any("а" <= letter <= "я" for letter in text))
    assert abs(russian / sum(map(len, texts)) - 0.5) < 0.03


def test_pair_starts_from_a_tied_llama(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = load_world(project_root() / "data" / "world")
    folder = train_base_tokenizer(world, tmp_path_factory.mktemp("pair") / "tokenizer", 700, 60, 240, 512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    density = {}
    for language in ("en", "ru"):
        sample = list(islice(documents(world, language, "test", 0), 40))
        tokens = sum(len(ids) for ids in tokenizer(sample)["input_ids"])
        density[language] = sum(map(len, sample)) / tokens
        assert tokenizer.batch_decode(tokenizer(sample)["input_ids"]) == sample
    assert density["en"] > 1.3 * density["ru"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Привет"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>Привет<|end|><|assistant|>"
    config = base_config(folder, 32, 2, 4, 2, 64)
    assert config.tie_word_embeddings and config.vocab_size == len(tokenizer) == 700
