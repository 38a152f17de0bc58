"""Scorers against hand-computed cases, and their properties."""

import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

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


def random_texts(count: int) -> list[tuple[str, str]]:
    """Pairs of short texts that share many words, punctuation, articles and empty ones among them."""
    rng = random.Random(11)
    known = [
        "the",
        "A",
        "an",
        "кот",
        "Ёж",
        "еж,",
        "река!",
        "25",
        "old",
        "house.",
        "дом",
        "—",
        "дом-музей",
        "",
    ]

    def text() -> str:
        return " ".join(rng.choices(known, k=rng.randint(0, 8)))

    return [(text(), text()) for _ in range(count)]


def squad_f1(prediction: str, reference: str) -> float:
    """F1 as SQuAD's paper describes it, on folded words: counts removed one by one."""

    def folded(text: str) -> list[str]:
        spaced = re.sub(r"[^\w\s]|_", " ", text.lower().replace("ё", "е"))
        return [word for word in spaced.split() if word not in ("a", "an", "the")]

    predicted, expected = folded(prediction), folded(reference)
    left, hits = list(expected), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            hits += 1
    if not predicted or not expected:
        return float(predicted == expected)
    if not hits:
        return 0.0
    precision, recall = hits / len(predicted), hits / len(expected)
    return 2 * precision * recall / (precision + recall)


def test_f1_agrees_with_an_independent_one() -> None:
    for prediction, reference in random_texts(1500):
        assert scoring.f1(prediction, reference) == pytest.approx(squad_f1(prediction, reference))


def test_rouge_agrees_with_the_package_on_prepared_lemmas(rouge: scoring.Rouge) -> None:
    """rouge-score's own tokenizer on lemmas spelt in Latin letters, against ours on the words."""
    rng = random.Random(3)
    forms = ["кот", "кота", "коты", "дом", "дома", "рекой", "река", "зелёных", "видели", "horses", "7"]
    lemmas = scoring.Lemmas()
    spelt = {lemma: f"w{number}" for number, lemma in enumerate({lemmas.tokenize(form)[0] for form in forms})}
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for _ in range(1000):
        texts = [" ".join(rng.choices(forms, k=rng.randint(0, 9))) for _ in range(2)]
        prediction, reference = (" ".join(spelt[word] for word in lemmas.tokenize(text)) for text in texts)
        expected = sum(score.fmeasure for score in plain.score(reference, prediction).values()) / 3
        assert rouge(*texts) == pytest.approx(expected)


def test_macro_f1_agrees_with_scikit_learn() -> None:
    rng = random.Random(5)
    for _ in range(1000):
        names = "12345"[: rng.randint(1, 5)]
        right, chosen = (rng.choices(names, k=1 + rng.randrange(12)) for _ in range(2))
        size = min(len(right), len(chosen))
        right, chosen = right[:size], chosen[:size]
        assert scoring.f1_macro(right, chosen) == pytest.approx(f1_score(right, chosen, average="macro"))


def test_a_copy_with_one_place_changed_is_judged_by_what_is_missing() -> None:
    rng = random.Random(9)
    for _ in range(1000):
        source = "".join(rng.choices("абвгдежзиклмнопрст ", k=rng.randint(100, 220)))
        place, size = rng.randrange(len(source)), rng.randint(0, 4)
        prediction = source[:place] + "Z" * rng.randint(0, 5) + source[place + size :]
        missing = len(source[place : place + size])
        assert scoring.copy_paragraph(prediction, source) == float(
            len(source) - missing >= 0.99 * len(source)
        )


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
    assert scoring.exams({"a": [4, 1, 12], "b": [0]}) == {"a": 0.5, "b": 0.0}
