"""Scores of answers: token F1, ROUGE on lemmas, copying, graded exams, questions asked in both orders."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

import pymorphy3

from ruadapt.errors import RuadaptError

COPIED_SHARE = 0.99
EXAM_POINTS = 34
_ENGLISH_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(r"\w+", re.UNICODE)


def words(text: str) -> list[str]:
    """Split into comparable words: lower case, `ё` as `е`, no punctuation or symbols, no English articles."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("ё", "е")
    plain = "".join(" " if unicodedata.category(c)[0] in "PSCZ" else c for c in folded)
    return [word for word in plain.split() if word not in _ENGLISH_ARTICLES]


def exact(prediction: str, reference: str) -> float:
    """Return 1.0 if both texts have the same words in the same order (`words`), else 0.0."""
    return float(words(prediction) == words(reference))


def f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of `words`, 0 … 1 (SQuAD paper, sec. 4).

    Two texts without a single word are equal (1.0); one without a word against one with words scores 0.0.
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


class Lemmas:
    """Tokenizer for the `rouge-score` package: Russian words as lemmas, others stemmed (Porter), lower case.

    Lemmas come from pymorphy3's most probable reading; each word form is analysed once per object.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # slow to import, as rouge_score below

        self._morphology = pymorphy3.MorphAnalyzer(lang="ru")
        self._stemmer = PorterStemmer()
        self._seen: dict[str, str] = {}

    def tokenize(self, text: str) -> list[str]:
        """Return the lemmas of the words of `text`, `ё` read as `е`."""
        return [self._lemma(word) for word in _WORD.findall(text.lower().replace("ё", "е"))]

    def _lemma(self, word: str) -> str:
        if word not in self._seen:
            if re.search("[а-я]", word):
                self._seen[word] = self._morphology.parse(word)[0].normal_form.replace("ё", "е")
            else:
                self._seen[word] = self._stemmer.stem(word)
        return self._seen[word]


class Rouge:
    """ROUGE on lemmas (METHOD, sec. 7): the mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._types = ["rouge1", "rouge2", "rougeL"]
        self._scorer = RougeScorer(self._types, tokenizer=Lemmas())

    def __call__(self, prediction: str, reference: str) -> float:
        """Return the score of `prediction` against `reference`, 0 … 1."""
        scores = self._scorer.score(reference, prediction)
        return sum(scores[name].fmeasure for name in self._types) / len(self._types)


def copy_sentence(predicted_tokens: int, source_tokens: int) -> float:
    """Return `min(p/s, s/p)` of the lengths in tokens of the evaluated model; 0.0 for an empty answer.

    Source: METHOD, sec. 7 (DaruCopy, sentences).

    Raises:
        RuadaptError: the source has no token.
    """
    if source_tokens < 1:
        raise RuadaptError("a copy task has an empty source; remove the item")
    if predicted_tokens == 0:
        return 0.0
    return min(predicted_tokens / source_tokens, source_tokens / predicted_tokens)


def copy_paragraph(prediction: str, source: str) -> float:
    """Return 1.0 if the blocks of a sequence match cover ≥ 0.99 of the source's characters, else 0.0.

    Source: METHOD, sec. 7 (DaruCopy, paragraphs and documents); `difflib.SequenceMatcher` without its junk
    heuristic, which would drop frequent letters in texts of 200 characters and more.

    Raises:
        RuadaptError: the source is empty.
    """
    if not source:
        raise RuadaptError("a copy task has an empty source; remove the item")
    # The characters in common, order ignored, bound the matching blocks from above: most wrong answers are
    # told here, without the quadratic match.
    if (Counter(prediction) & Counter(source)).total() < COPIED_SHARE * len(source):
        return 0.0
    blocks = SequenceMatcher(None, source, prediction, autojunk=False).get_matching_blocks()
    return float(sum(block.size for block in blocks) >= COPIED_SHARE * len(source))


def both_orders(right: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Score pairs of questions that differ in the order of their choices: 1.0 only if both are right.

    Args:
        right: for each pair, the scores (0 or 1) of its two questions.

    Raises:
        RuadaptError: a pair does not consist of exactly two questions.
    """
    for pair, scores in right.items():
        if len(scores) != 2:
            raise RuadaptError(f"pair {pair!r} has {len(scores)} questions instead of both orders of one")
    return {pair: float(min(scores) == 1.0) for pair, scores in right.items()}


def exam_points(prediction: str, reference: str, kind: str, number: str = "") -> int:
    """Return the points of one answer of the unified state exam (USE in METHOD, sec. 7; graded as in MERA).

    Answers are lists with commas. `matching`: a point for each place that holds the right number, none if the
    lengths differ. `text`: 1 if the letters of the answer, joined, are one of the right words. Other kinds:
    1 if exactly the right numbers are named, in any order; question 16: as many points as numbers are
    right, and one less for each number too many.
    """
    named, right = ([part.strip() for part in text.split(",")] for text in (prediction, reference))
    if kind == "matching":
        return sum(a == b for a, b in zip(named, right, strict=True)) if len(named) == len(right) else 0
    if kind == "text":
        return int("".join(c for c in prediction.lower() if c.isalpha()) in right)
    if number == "16":
        common = len(set(named) & set(right))
        return max(0, common - max(0, len(named) - len(right)))
    return int(set(named) == set(right))


def exams(points: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Score exams: the points of each one's answers over the `EXAM_POINTS` of a whole exam."""
    return {exam: sum(values) / EXAM_POINTS for exam, values in points.items()}


UNITS: dict[str, Callable[[Mapping[str, Sequence[float]]], dict[str, float]]] = {
    "both_orders": both_orders,
    "exam": exams,
}
"""Metrics whose unit is several answers, and how these make one score."""


def f1_macro(right: Sequence[str], chosen: Sequence[str]) -> float:
    """Return the mean over classes (all that occur on either side) of `2 hits / (right + chosen)`."""
    hits = Counter(a for a, b in zip(right, chosen, strict=True) if a == b)
    totals = Counter(right) + Counter(chosen)
    return sum(2 * hits[name] / total for name, total in totals.items()) / len(totals)
