"""Formulas of the scores, and the scorers that a task's YAML names (`process_results`), one for each metric.

A scorer takes a document and what the model gave: `(log-likelihood, greedy)` of each choice, or one text. It
returns `score`, 0 … 1, or `[unit, points]` where several documents make one score, as the aggregation in the
YAML says. Its name is the metric's.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pymorphy3
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError

Document = Mapping[str, Any]
Scores = dict[str, Any]

COPIED_SHARE = 0.99
EXAM_POINTS = 34
_ENGLISH_ARTICLES = frozenset(("a", "an", "the"))


def chosen(document: Document, results: Sequence[Any]) -> str:
    """Return the choice of the highest log-likelihood (the first of equals).

    Raises:
        RuadaptError: a choice has no finite probability.
    """
    likelihoods = [float(likelihood) for likelihood, _ in results]
    if not all(map(math.isfinite, likelihoods)):
        raise RuadaptError(f"item {document['id']}: no finite probability; the model's weights are broken")
    return str(document["choices"][likelihoods.index(max(likelihoods))])


def choice(document: Document, results: Sequence[Any]) -> Scores:
    """Score 1 if the right choice is the most probable one."""
    return {"score": float(chosen(document, results) == document["answer"])}


def classes(document: Document, results: Sequence[Any]) -> Scores:
    """Score as `choice`; the choices are classes, so that `macro_f1` sees the right and the chosen one."""
    return choice(document, results) | {"f1_macro": [document["answer"], chosen(document, results)]}


def macro_f1(pairs: Iterable[Sequence[str]]) -> float:
    """Return the mean F1 of the classes in pairs (right class, chosen class)."""
    from sklearn.metrics import f1_score  # takes a second to import

    return float(f1_score(*zip(*pairs, strict=True), average="macro"))


def both_orders(document: Document, results: Sequence[Any]) -> Scores:
    """Give a question in one order of its choices to its unit; `mean_of_pairs` tells what both make."""
    return {"score": [document["unit"], choice(document, results)["score"]]}


def words(text: str) -> list[str]:
    """Split into comparable words: lower case, `ё` as `е`, no punctuation or symbols, no English articles."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("ё", "е")
    plain = "".join(" " if unicodedata.category(c)[0] in "PSCZ" else c for c in folded)
    return [word for word in plain.split() if word not in _ENGLISH_ARTICLES]


def word_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of `words`, 0 … 1 (SQuAD paper, sec. 4).

    Two texts without a single word are equal (1.0); one without a word against one with words scores 0.0.
    """
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))


def f1(document: Document, results: Sequence[Any]) -> Scores:
    """Score `word_f1` against the best of the right answers, and whether the words are `exact` one's."""
    said, right = str(results[0]), document["answers"]
    same = any(words(said) == words(answer) for answer in right)
    return {"score": max(word_f1(said, answer) for answer in right), "exact": float(same)}


def ifeval(document: Document, results: Sequence[Any]) -> Scores:
    """Score the share of a prompt's instructions that the answer follows, strictly, by the harness's
    checkers; `exact` if all.
    """
    import nltk  # whose data the checkers download as they are imported; what is missing is left out

    with patch.object(nltk, "download"):
        from lm_eval.tasks.ifeval.utils import process_results
    kept = process_results(document, results)["inst_level_strict_acc"]
    return {"score": sum(kept) / len(kept), "exact": float(all(kept))}


@cache
def rouge_scorer() -> Any:
    """Return a scorer on Russian words as lemmas (pymorphy3's most probable reading), others stemmed."""
    from nltk.stem.porter import PorterStemmer  # slow to import, as rouge_score
    from rouge_score.rouge_scorer import RougeScorer

    morphology, stemmer = pymorphy3.MorphAnalyzer(lang="ru"), PorterStemmer()

    @cache
    def lemma(word: str) -> str:
        if re.search("[а-я]", word):
            return str(morphology.parse(word)[0].normal_form.replace("ё", "е"))
        return str(stemmer.stem(word))

    def lemmas(text: str) -> list[str]:
        return [lemma(word) for word in re.findall(r"\w+", text.lower().replace("ё", "е"))]

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=SimpleNamespace(tokenize=lemmas))


def rouge(document: Document, results: Sequence[Any]) -> Scores:
    """Score the mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L on lemmas (METHOD, sec. 7)."""
    found = rouge_scorer().score(document["answer"], str(results[0])).values()
    return {"score": float(sum(score.fmeasure for score in found) / len(found))}


def copy_sentence(document: Document, results: Sequence[Any]) -> Scores:
    """Score `min(p/s, s/p)` of the lengths of answer and source, in tokens of the evaluated model.

    Source: METHOD, sec. 7 (DaruCopy, sentences).
    """
    tokenizer = _tokenizer(document["tokenizer"])
    texts = (str(results[0]), document["answer"])
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return {"score": min(lengths) / max(lengths)}


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if not name:
        raise RuadaptError(
            "the length of a copied sentence is counted in the model's own tokens: name its tokenizer, "
            """`--metadata '{"tokenizer": "FOLDER"}'`"""
        )
    return AutoTokenizer.from_pretrained(name)


def copy_paragraph(document: Document, results: Sequence[Any]) -> Scores:
    """Score 1 if the blocks of a sequence match cover ≥ 0.99 of the source's characters, else 0.

    Source: METHOD, sec. 7 (DaruCopy, paragraphs and documents); `difflib.SequenceMatcher` without its junk
    heuristic, which would drop frequent letters in texts of 200 characters and more.
    """
    said, source = str(results[0]), document["answer"]
    needed = COPIED_SHARE * len(source)
    # The characters in common, order ignored, bound the blocks from above: most wrong answers are told by
    # them, without the quadratic match.
    if (Counter(said) & Counter(source)).total() < needed:
        return {"score": 0.0}
    blocks = SequenceMatcher(None, source, said, autojunk=False).get_matching_blocks()
    return {"score": float(sum(block.size for block in blocks) >= needed)}


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


def exam(document: Document, results: Sequence[Any]) -> Scores:
    """Give the `exam_points` of one answer to its exam."""
    points = exam_points(str(results[0]), document["answer"], document["kind"], document["number"])
    return {"score": [document["unit"], points]}


def mean_of_pairs(scores: Iterable[tuple[str, float]]) -> float:
    """Aggregate both orders: the share of questions that are right in both."""
    return _mean_of_units(scores, min)


def mean_of_exams(points: Iterable[tuple[str, float]]) -> float:
    """Aggregate graded answers: the mean over exams of their share of all `EXAM_POINTS`."""
    return _mean_of_units(points, lambda earned: sum(earned) / EXAM_POINTS)


def _mean_of_units(values: Iterable[tuple[str, float]], score: Callable[[list[float]], float]) -> float:
    units = defaultdict(list)
    for unit, value in values:
        units[unit].append(value)
    return sum(map(score, units.values())) / len(units)
