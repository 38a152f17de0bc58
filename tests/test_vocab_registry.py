"""One entry makes a vocabulary: built, certified, mapped, and drawn with its own look."""

from pathlib import Path

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair

from paper import plots
from ruadapt.errors import RuadaptError
from ruadapt.vocab import broken, certify, conversion_matrix, extend, load_tokenizer, rows, save_tokenizer
from ruadapt.vocab.registry import VOCABULARIES, Look, Materials, Vocabulary, vocabulary

SIZES = {"vocab_size": 640, "added_rows": 40, "keep_rows": 400}


@pytest.fixture
def materials(tiny_pair: TinyPair) -> Materials:
    russian, english = RUSSIAN.splitlines() * 2, ENGLISH.splitlines() * 2
    return Materials(tiny_pair.base, russian, english, used_on=russian + english, **SIZES)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_entry_has_the_rows_it_promises(materials: Materials, name: str) -> None:
    old, new = load_tokenizer(materials.original), vocabulary(name).build(materials)
    grown = {"original": 0, "extended": materials.added_rows}
    assert vocabulary(name).extends == (name in grown)
    assert rows(new) == (rows(old) + grown[name] if name in grown else materials.vocab_size)


def test_a_new_vocabulary_is_one_entry(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look("#000000", "*", "-", "//")
    toy = Vocabulary("First lines", look, lambda m: extend(m.original, m.russian[:5], 20))
    monkeypatch.setitem(VOCABULARIES, "first", toy)
    folder = save_tokenizer(tmp_path / "first", vocabulary("first").build(materials), materials.original)
    assert not broken(certify(folder, materials.original, {"ru": materials.russian}, added_rows=20))
    old, new = load_tokenizer(materials.original), load_tokenizer(folder)
    matrix = conversion_matrix(new, old)
    assert matrix.shape == (rows(old) + 20, rows(old))
    assert torch.allclose(matrix.sum(1).to_dense(), torch.ones(len(matrix), dtype=torch.float64))
    shown = plots.looks(["First lines", "extended", "swap"])
    assert shown["First lines"] is look is plots.looks(["first"])["first"]
    assert shown["extended"] == VOCABULARIES["extended"].look != shown["swap"]


def test_an_unknown_vocabulary_is_named() -> None:
    with pytest.raises(RuadaptError, match=r"unknown vocabulary 'bbpe'; choose from original, bpe"):
        vocabulary("bbpe")
