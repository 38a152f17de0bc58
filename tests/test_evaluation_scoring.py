"""Scorers against hand-computed cases, and their properties."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring

TEXT = st.text(alphabet=string.ascii_lowercase + "абвгдеё ,.!", max_size=40)


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "exact"),
    [
        ("The baker.", "baker", 1.0, 1.0),
        ("in the old house", "old house", 2 * 2 / 5, 0.0),
        ("Учитель живёт в доме", "учитель живет в школе", 3 / 4, 0.0),
        ("ёж, ёж", "еж", 2 / 3, 0.0),
        ("река", "море", 0.0, 0.0),
        ("", "море", 0.0, 0.0),
        ("25 книг", "25 КНИГ!", 1.0, 1.0),
        ("рыба рыба кот", "рыба кот кот", 2 / 3, 0.0),
    ],
)
def test_f1_and_exact_match(prediction: str, reference: str, f1: float, exact: float) -> None:
    assert scoring.f1(prediction, reference) == pytest.approx(f1)
    assert scoring.exact(prediction, reference) == exact


@given(TEXT, TEXT)
def test_f1_is_symmetric_and_bounded(a: str, b: str) -> None:
    assert scoring.f1(a, b) == scoring.f1(b, a)
    assert 0 <= scoring.f1(a, b) <= 1
    assert scoring.f1(a, a) == 1
    assert scoring.exact(a, b) <= scoring.f1(a, b)


@pytest.fixture(scope="module")
def rouge() -> scoring.Rouge:
    return scoring.Rouge()


def test_lemmas_of_both_languages() -> None:
    lemmas = scoring.Lemmas()
    assert lemmas.tokenize("Кошки видели зелёных рыб, 7") == ["кошка", "видеть", "зеленый", "рыба", "7"]
    assert lemmas.tokenize("Horses running") == ["hors", "run"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("кошку видел врач", "Врач видел кошку", (1 + 0 + 1 / 3) / 3),
        ("врачи видели кошек", "Врач видел кошку", 1.0),
        # unigrams 2 of 2 and 4: F = 2/3; bigrams 1 of 1 and 3: 1/2; longest common subsequence 2: 2/3
        ("старый дом", "старый дом у реки", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("", "старый дом", 0.0),
        ("two horses", "Two horse", 1.0),
    ],
)
def test_rouge_is_the_mean_of_three_on_lemmas(
    rouge: scoring.Rouge, prediction: str, reference: str, expected: float
) -> None:
    assert rouge(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "source", "score"), [(10, 10, 1.0), (5, 10, 0.5), (20, 10, 0.5), (0, 10, 0.0)]
)
def test_copied_sentences_by_length(predicted: int, source: int, score: float) -> None:
    assert scoring.copy_sentence(predicted, source) == score


SOURCE = " ".join(f"{n * n} рыб" for n in range(60))[:300]  # no part occurs twice; 3 characters may differ


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (SOURCE, 1.0),
        (SOURCE[3:], 1.0),
        (SOURCE[4:], 0.0),
        ("Вот: " + SOURCE + " Конец.", 1.0),
        (SOURCE[:100] + "ууу" + SOURCE[103:], 1.0),
        (SOURCE[150:] + SOURCE[:150], 0.0),
        (SOURCE[::-1], 0.0),
        ("", 0.0),
    ],
)
def test_copied_paragraphs_by_matching_blocks(prediction: str, score: float) -> None:
    assert scoring.copy_paragraph(prediction, SOURCE) == score


def test_the_order_of_a_copy_matters() -> None:
    source = "Первый абзац о море и рыбах. Второй рассказ про лес, грибы и ягоды!"
    assert scoring.copy_paragraph(source[30:] + source[:30], source) == 0.0


@settings(max_examples=30, deadline=None)
@given(TEXT.filter(bool))
def test_the_quick_bound_never_refuses_a_whole_copy(source: str) -> None:
    assert scoring.copy_paragraph(source, source) == 1.0
    assert scoring.copy_paragraph("!" + source + "?", source) == 1.0


def test_empty_sources_are_refused() -> None:
    with pytest.raises(RuadaptError, match="empty source"):
        scoring.copy_paragraph("x", "")
    with pytest.raises(RuadaptError, match="empty source"):
        scoring.copy_sentence(1, 0)


def test_pairs_count_only_if_both_orders_are_right() -> None:
    assert scoring.both_orders({"a": [1, 1], "b": [1, 0], "c": [0, 0]}) == {"a": 1.0, "b": 0.0, "c": 0.0}
    with pytest.raises(RuadaptError, match="'a' has 3"):
        scoring.both_orders({"a": [1, 1, 1]})
