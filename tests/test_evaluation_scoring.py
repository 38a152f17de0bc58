"""Scorers against hand-computed cases, and their properties."""

import random
import string
from typing import Any

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
    document = {"answers": [reference, "zebra"]}
    assert scoring.f1(document, [prediction]) == {"score": pytest.approx(f1), "exact": exact}


@given(TEXT, TEXT)
def test_f1_is_symmetric_and_bounded(a: str, b: str) -> None:
    assert scoring.word_f1(a, b) == scoring.word_f1(b, a)
    assert 0 <= scoring.word_f1(a, b) <= 1
    assert scoring.word_f1(a, a) == 1


def scored(metric: str, said: str, answer: str, **more: str) -> Any:
    """Return what a scorer gives for one answer."""
    document = {"id": "x", "answer": answer, "answers": [answer], "unit": "u"} | more
    return getattr(scoring, metric)(document, [said])["score"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("кошку видел врач", "Врач видел кошку", (1 + 0 + 1 / 3) / 3),
        ("врачи видели кошек", "Врач видел кошку", 1.0),
        # unigrams 2 of 2 and 4: F = 2/3; bigrams 1 of 1 and 3: 1/2; longest common subsequence 2: 2/3
        ("старый дом", "старый дом у реки", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("", "старый дом", 0.0),
        ("two horses", "Two horse", 1.0),
        ("Кошки видели зелёных рыб, 7", "кошка видеть зеленый рыба 7", 1.0),
    ],
)
def test_rouge_is_the_mean_of_three_on_lemmas(prediction: str, reference: str, expected: float) -> None:
    assert scored("rouge", prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "score"), [("река " * 10, 1.0), ("река " * 5, 0.5), ("река " * 20, 0.5), ("", 0.0)]
)
def test_copied_sentences_by_length_in_the_models_tokens(
    tiny_pair: Any, predicted: str, score: float
) -> None:
    found = scored("copy_sentence", predicted, "река " * 10, tokenizer=str(tiny_pair.base))
    assert found == pytest.approx(score, abs=0.02)  # the last space makes one token


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
    assert scored("copy_paragraph", prediction, SOURCE) == score


@settings(max_examples=30, deadline=None)
@given(TEXT.filter(bool))
def test_the_quick_bound_never_refuses_a_whole_copy(source: str) -> None:
    assert scored("copy_paragraph", source, source) == 1.0
    assert scored("copy_paragraph", "!" + source + "?", source) == 1.0


def test_pairs_count_only_if_both_orders_are_right() -> None:
    for right, share in (([1, 1], 1.0), ([1, 0], 0.0), ([0, 0], 0.0)):
        assert scoring.mean_of_pairs([("a", score) for score in right]) == share
    scores = [("a", 1.0), ("b", 1.0), ("a", 1.0), ("b", 0.0)]
    assert scoring.mean_of_pairs(scores) == 0.5


def test_macro_f1_is_the_mean_over_classes() -> None:
    assert scoring.macro_f1([("1", "1"), ("2", "1")]) == pytest.approx((2 / 3 + 0) / 2)


def test_a_copy_with_one_place_changed_is_judged_by_what_is_missing() -> None:
    rng = random.Random(9)
    for _ in range(1000):
        source = "".join(rng.choices("абвгдежзиклмнопрст ", k=rng.randint(100, 220)))
        place, size = rng.randrange(len(source)), rng.randint(0, 4)
        prediction = source[:place] + "Z" * rng.randint(0, 5) + source[place + size :]
        missing = len(source[place : place + size])
        assert scored("copy_paragraph", prediction, source) == (len(source) - missing >= 0.99 * len(source))


@pytest.mark.parametrize(
    ("prediction", "reference", "kind", "number", "points"),
    [
        ("4, 2,1,3", "4,2,1,3", "matching", "8", 4),
        ("4,2,3,1", "4,2,1,3", "matching", "8", 2),
        ("4,2,1", "4,2,1,3", "matching", "8", 0),
        ("4213", "4,2,1,3", "matching", "8", 0),
        ("Кота.", "кот,кота", "text", "4", 1),
        ("не смотря", "несмотря", "text", "14", 1),
        ("собака", "кот,кота", "text", "4", 0),
        ("3, 1", "1,3", "multiple_choice_based_on_text", "2", 1),
        ("1,3,4", "1,3", "multiple_choice_based_on_text", "2", 0),
        ("1,3", "1,3", "multiple_choice_independent_options", "16", 2),
        ("1", "1,3", "multiple_choice_independent_options", "16", 1),
        ("1,3,4", "1,3", "multiple_choice_independent_options", "16", 1),
        ("1,2,4,5", "1,3", "multiple_choice_independent_options", "16", 0),
        ("", "1,3", "multiple_choice_independent_options", "16", 0),
    ],
)
def test_exam_answers_are_graded(
    prediction: str, reference: str, kind: str, number: str, points: int
) -> None:
    assert scoring.exam_points(prediction, reference, kind, number) == points


def test_an_exam_is_its_share_of_all_points() -> None:
    assert scoring.mean_of_exams([("a", 4), ("b", 0), ("a", 13)]) == pytest.approx(17 / 34 / 2)


def test_choices_by_probability_and_short_answers_by_the_best_reference() -> None:
    document = {
        "id": "x",
        "choices": ["да", "нет"],
        "answer": "нет",
        "unit": "u",
        "answers": ["Ока", "река Ока"],
    }
    likelier = [(-2.0, False), (-1.0, True)]
    assert scoring.choice(document, likelier) == {"score": 1.0}
    assert scoring.classes(document, likelier) == {"score": 1.0, "f1_macro": ["нет", "нет"]}
    assert scoring.both_orders(document, likelier[::-1]) == {"score": ["u", 0.0]}
    assert scoring.f1(document, ["река Ока"]) == {"score": 1.0, "exact": 1.0}
    with pytest.raises(RuadaptError, match="weights are broken"):
        scoring.choice(document, [(float("nan"), False), (-1.0, True)])
