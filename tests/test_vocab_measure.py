"""Measures of tokenizers, and real tokenizers where the reference folder is at hand."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from benchmarks.stems import stems_whole
from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    agreement,
    changed_ids,
    changed_texts,
    compare,
    composition,
    extend,
    fetch_tokenizer,
    load_tokenizer,
    measure,
    optimize,
    reachable,
    rows,
    save_tokenizer,
)
from ruadapt.vocab.spec import BYTE_LETTERS, read_spec, special_ids, spell


def lines(path: Path, limit: int | None = None) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        return [line.rstrip("\n") for line in stream if line.strip()][:limit]


def test_measure_counts_by_hand(tiny_pair: TinyPair) -> None:
    tokenizer = load_tokenizer(tiny_pair.base)
    texts = ["The baker lives\nin a town.", "кот"]
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    found = measure(tokenizer, texts)
    assert found["tokens"] == tokens
    assert found["characters"] == len("The baker lives") + len("in a town.") + 3
    assert found["characters_per_token"] == pytest.approx(found["characters"] / tokens)
    assert found["tokens_per_word"] == pytest.approx(tokens / 7)
    words = ["The", "baker", "lives", "in", "a", "town", "кот"]
    whole = sum(len(tokenizer.encode(" " + word).ids) == 1 for word in words)
    assert found["whole_words"] == pytest.approx(whole / 7)


def test_a_draft_agrees_with_its_own_family_alone(tiny_pair: TinyPair) -> None:
    original = load_tokenizer(tiny_pair.base)
    adapted = extend(tiny_pair.base, RUSSIAN.splitlines() * 2, 60)
    texts = {"ru": RUSSIAN.splitlines(), "en": ENGLISH.splitlines()}
    for lines in texts.values():
        assert agreement(original, original, lines) == {"ids": 1, "text": 1}
    shares = {language: agreement(adapted, original, lines) for language, lines in texts.items()}
    assert shares["ru"]["ids"] == shares["en"]["ids"] == pytest.approx(rows(original) / rows(adapted))
    assert shares["en"]["text"] == 1  # old text keeps its ids
    kept = [line for line in texts["ru"] if original.encode(line).ids == adapted.encode(line).ids]
    assert shares["ru"]["text"] == sum(map(len, kept)) / sum(map(len, texts["ru"])) < 0.5
    assert agreement(original, adapted, texts["en"])["ids"] == 1


def test_compare_is_tidy(tiny_pair: TinyPair) -> None:
    tokenizer = load_tokenizer(tiny_pair.base)
    table = compare(
        {"a": tokenizer, "b": tokenizer},
        {("ru", "text"): RUSSIAN.splitlines(), ("en", "text"): ENGLISH.splitlines()},
    )
    assert list(table.columns[:4]) == ["vocabulary", "language", "text", "characters_per_token"]
    assert len(table) == 4 and set(table["language"]) == {"ru", "en"}
    assert changed_texts(tokenizer, RUSSIAN.splitlines()) == []
    assert sum(composition(tokenizer).values()) == rows(tokenizer)
    with pytest.raises(RuadaptError, match="nothing to compare"):
        compare({}, {})


@pytest.mark.parametrize(
    ("name", "russian", "english"), [("qwen2.5", 2.60, 4.03), ("mistral-7b-v0.1", 2.36, 3.70)]
)
def test_characters_per_token_of_originals(
    reference: Path, name: str, russian: float, english: float
) -> None:
    tokenizer = load_tokenizer(reference / "tokenizers" / name)
    ru, en = (lines(reference / "text" / f"heldout_{part}.txt") for part in ("ru_gsd_taiga", "en_ewt"))
    assert round(measure(tokenizer, ru)["characters_per_token"], 2) == russian
    assert round(measure(tokenizer, en)["characters_per_token"], 2) == english


def check_extension(new: Tokenizer, old: Tokenizer, added: int) -> None:
    before, after = read_spec(old)["model"], read_spec(new)["model"]
    assert rows(new) == rows(old) + added and special_ids(new) == special_ids(old)
    assert after["merges"][: len(before["merges"])] == before["merges"]
    assert before["vocab"].items() <= after["vocab"].items()
    start = rows(old)
    assert all(reachable(new, map(new.id_to_token, range(start, start + added))).values())


def test_extended_qwen_keeps_english_and_loads_in_a_qwen2_folder(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "original"
    shutil.copytree(reference / "tokenizers" / "qwen2.5", source)
    source.chmod(0o755)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    old = load_tokenizer(source)
    new = extend(source, lines(reference / "text" / "train_ru_modern.txt.gz", 1500), 2000)
    check_extension(new, old, 2000)
    english = lines(reference / "text" / "heldout_en_ewt.txt")
    assert changed_ids(new, old, english) == []
    russian = lines(reference / "text" / "heldout_ru_gsd_taiga.txt")
    assert changed_texts(new, russian) == []
    assert measure(new, russian)["characters_per_token"] > 2.70
    folder = save_tokenizer(tmp_path / "new", new, source)
    shutil.copy(source / "config.json", folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    for line in [*russian[:100], *english[:100]]:
        assert loaded(line, add_special_tokens=False)["input_ids"] == new.encode(line).ids


def test_sentencepiece_bpe_is_extended_and_pruned_too(reference: Path) -> None:
    source = reference / "tokenizers" / "llama-2"
    old = load_tokenizer(source)
    corpus = lines(reference / "text" / "train_ru_modern.txt.gz", 800)
    english = lines(reference / "text" / "heldout_en_ewt.txt", 500)
    russian = lines(reference / "text" / "heldout_ru_gsd_taiga.txt", 500)
    new = extend(source, corpus, 1000)
    check_extension(new, old, 1000)
    assert changed_ids(new, old, english) == []
    assert changed_texts(new, russian) == []
    small = optimize(source, corpus, 12_000, 1000)
    assert rows(small) == 12_000 + 3 + 1000
    assert changed_texts(small, [*russian, *english, "你好 🙂"]) == []


def test_fetch_takes_folders_and_names_the_way_out_when_offline(tiny_pair: TinyPair) -> None:
    assert fetch_tokenizer(str(tiny_pair.base)).get_vocab() == load_tokenizer(tiny_pair.base).get_vocab()
    with pytest.raises(RuadaptError, match=r"nobody/nothing is no folder .* HF_HUB_OFFLINE=0"):
        fetch_tokenizer("nobody/nothing")


def pieces_of(*tokens: str) -> Tokenizer:
    """A byte-level tokenizer with these tokens beside the bytes, cut by the longest token first."""
    vocabulary = [(letter, -9.0) for letter in BYTE_LETTERS]
    vocabulary += [(spell(token.encode()), -1.0) for token in tokens]
    tokenizer = Tokenizer(models.Unigram(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_stems_by_hand() -> None:
    """The stem of учителями is учител by all forms of the word; книг|а; кот has no ending; zzz is unknown."""
    texts = ["учителями учителями книга кот zzz"]
    assert stems_whole(pieces_of(" учител", "ями", " книг", "а", " кот"), texts) == 1.0
    assert stems_whole(pieces_of(" учи", "телями", " книга", " кот"), texts) == 0.5
    assert stems_whole(pieces_of(" учи", "тел", "ями", " книга"), texts) == 0.25
