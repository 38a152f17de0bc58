"""A corpus weighed to look like a donor's: closed forms, bounds, and what a stream of passages adds up to."""

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import RUSSIAN, TinyPair
from scipy import sparse
from tokenizers import Tokenizer, models

from ruadapt.vocab import load_tokenizer
from ruadapt.vocab.matching import cut, passage_factors, rake, whole_words

words_module = importlib.import_module("ruadapt.vocab.words")


def test_words_are_cut_by_the_likeliest_path() -> None:
    shares = {"а": 0.2, "б": 0.2, "аб": 0.1, "ба": 0.01}
    # аб: 0.1 > 0.2 · 0.2; баб: 0.2 · 0.1 > 0.01 · 0.2.
    found = cut(["аб", "баб", "бя", ""], shares).toarray()
    assert found.tolist() == [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_raking_reaches_shares_within_its_bounds() -> None:
    words = ["а", "б", "я"]
    cuts = cut(words, {"а": 0.6, "б": 0.4})
    weights = np.array([40.0, 60.0, 100.0])
    found = rake(weights, cuts, np.array([0.6, 0.4]))
    assert found.sum() == pytest.approx(200)
    # The odds of the two move from 2/3 to 3/2, as far as eight damped steps go: log odds shrink by 0.7 each.
    expected = np.log(1.5) - 2 * np.log(1.5) * 0.7**8
    assert np.log(found[0] / found[1]) == pytest.approx(expected, abs=1e-9)
    far = rake(np.array([1.0, 1.0]), cut(["а", "б"], {"а": 0.999, "б": 0.001}), np.array([0.999, 0.001]))
    assert 1 < far[0] / far[1] <= 16.0 + 1e-9
    already = rake(np.array([60.0, 40.0, 7.0]), cuts, np.array([0.6, 0.4]))
    assert np.allclose(already, [60, 40, 7])


def test_tokens_count_as_often_as_they_are_whole_words() -> None:
    cuts = cut(["дом", "домик", "ик", "лес"], {"дом": 0.4, "ик": 0.2, "лес": 0.2, "мир": 0.2})
    found = whole_words(np.array([6.0, 2.0, 0.0, 4.0]), cuts)
    # дом 6 of 8, ик 0 of 2, лес 4 of 4, мир unseen; 10 of 14 in all, and one of each before anything is seen.
    usual = 11 / 15
    expected = [(6 + 3 * usual) / 11, 3 * usual / 5, (4 + 3 * usual) / 7, usual]
    assert np.allclose(found, np.sqrt(expected))


def test_passages_like_the_donor_weigh_more() -> None:
    cuts = cut(["дом", "лес"], {"дом": 0.5, "лес": 0.5})
    shares = np.array([0.5, 0.5])
    even = sparse.csr_matrix([[5.0, 5.0], [50.0, 50.0]])
    assert np.allclose(passage_factors(even, cuts, shares), 1)
    factors = passage_factors(sparse.csr_matrix([[100.0, 0.0], [0.0, 10.0]]), cuts, shares)
    # One step of the exact mixture: half the mass each, against 10/11 and 1/11; the square root of that.
    assert np.allclose(factors, np.sqrt([0.5 / (10 / 11), 0.5 / (1 / 11)]))


def test_the_number_of_passages_does_not_change_the_counts(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = load_tokenizer(tiny_pair.base)
    texts = RUSSIAN.splitlines() * 3
    whole = words_module.learnable_words(original, texts, {})
    monkeypatch.setattr(words_module, "_PASSAGE", 40)
    monkeypatch.setattr(words_module, "_PASSAGES", 3)
    names, counts = words_module._passages(original, texts)
    assert counts.shape[0] <= 4 and len(names) == len(set(names))
    assert words_module.learnable_words(original, iter(texts), {}) == whole


def test_a_donor_moves_a_corpus_towards_its_own_words(tiny_pair: TinyPair, tmp_path: Path) -> None:
    pieces = [("<unk>", -100.0), ("▁дом", -1.0), ("▁лес", -5.0), *((letter, -9.0) for letter in "▁домлес")]
    Tokenizer(models.Unigram(pieces, 0, False)).save(str(tmp_path / "tokenizer.json"))
    original = load_tokenizer(tiny_pair.base)
    texts = [" дом лес" * 500, " лес" * 500]
    plain, beside = Counter[str](), Counter[str]()
    for learning, found in (({}, plain), ({"donor": tmp_path, "donor_weight": 0.01}, beside)):
        for word, count in words_module.learnable_words(original, texts, learning).items():
            found[original.decode([original.token_to_id(letter) for letter in word])] += count
    assert plain == {" дом": 500, " лес": 1000}
    assert beside[" дом"] / beside[" лес"] > 0.55 > plain[" дом"] / plain[" лес"]
