"""Words to learn from: counted in a corpus, in a word list and in a donor vocabulary.

A word is a run of letters of the wanted scripts with the space before it, if there is one. Punctuation stays
outside: a merge that takes it along would touch text in other scripts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypedDict

import numpy as np
from scipy import sparse
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.donor import read_donor
from ruadapt.vocab.matching import cut, passage_factors, rake, whole_words
from ruadapt.vocab.spec import SPACE_MARK, steps
from ruadapt.vocab.surface import letter_script

MIN_FREQUENCY = 2
# Chosen, as those in `matching`, on parts of a training text kept back from learning.
DONOR_WEIGHT = 0.5
RAKED = 0.4  # share of the corpus that is raked to the donor
DISPERSION = 0.7
_ALONE = 0.65  # power of a donor's shares where nothing else is given; training text can't tell 0.5 from 0.8
_RUN = re.compile(f"[ {SPACE_MARK}]?[^\\W\\d_]+")  # letters of any script; sorted out once per distinct run
_PASSAGE = 100_000  # characters, more in a corpus of more than _PASSAGES of them
_PASSAGES = 1000


class Learning(TypedDict, total=False):
    """What new tokens are learned from beside a corpus, and how; the options of `extend` and `optimize`.

    Keys:
        scripts: names as Unicode spells them ("Cyrillic", "Greek", "Georgian", …); Cyrillic by default.
        min_frequency: a merge must occur at least so often.
        donor: another vocabulary of the language to learn from: see `donor.read_donor`.
        donor_weight: the donor's share (0 to 1) of all weight where there is a corpus or a word list as well.
        word_counts: {word: count}, added to the corpus's; a word that follows another begins with a space.
        max_characters: longest new token, its space included.
        dispersion: power of the counts in each passage of the corpus, before they are added up; below 1, a
            word that fills one book weighs less than one that is as frequent and occurs everywhere. By
            default 1 without a donor and DISPERSION beside one.
    """

    scripts: Sequence[str]
    min_frequency: int
    donor: Path | str
    donor_weight: float
    word_counts: Mapping[str, float]
    max_characters: int
    dispersion: float


def learnable_words(tokenizer: Tokenizer, texts: Iterable[str], learning: Learning) -> Counter[str]:
    """Add up the words of all sources, in the model's spelling.

    Beside a donor the corpus is weighed first: see `ruadapt.vocab.matching`. The donor's own tokens, as often
    as they are whole words, then have the share `donor_weight`.

    Raises:
        RuadaptError: nothing to learn from, or no word in the wanted scripts; a share outside 0 to 1.
    """
    scripts = learning.get("scripts", ("Cyrillic",))
    donor = learning.get("donor")
    donor_weight = learning.get("donor_weight", DONOR_WEIGHT)
    if not 0 < donor_weight < 1:
        raise RuadaptError(f"donor_weight is {donor_weight}; choose a share between 0 and 1")
    names, counts = _passages(tokenizer, texts)
    listed = listed_runs(tokenizer, learning.get("word_counts", {}))
    if not names and not listed and donor is None:
        raise RuadaptError("the corpus holds no text; give at least one non-empty line")
    shares: dict[str, float] = {}
    factors = np.ones(counts.shape[0])
    if donor is not None:
        shares = of_scripts(listed_runs(tokenizer, read_donor(donor)), scripts, str(donor))
        if names:
            factors = passage_factors(counts, cut(names, shares), _values(shares))
    dispersion = learning.get("dispersion", 1.0 if donor is None else DISPERSION)
    dispersed = counts if dispersion == 1 else counts.power(dispersion)
    runs = dict(zip(names, (factors @ dispersed).tolist(), strict=True))
    for run, count in listed.items():
        runs[run] = runs.get(run, 0) + count
    words = of_scripts(runs, scripts, "the corpus") if runs else {}
    if shares and words:
        running = counts.sum() + sum(listed.values())
        words = _beside_donor(words, shares, donor_weight, running)
    elif shares:
        # Alone there is no count of what the donor's tail is worth: damped, more of its words fit.
        words = {word: share**_ALONE for word, share in shares.items()}
        scale = 10 * learning.get("min_frequency", MIN_FREQUENCY) / min(words.values())
        words = {word: weight * scale for word, weight in words.items()}
    return in_model_spelling(tokenizer, {word: round(weight) for word, weight in words.items()})


def _beside_donor(
    words: Mapping[str, float], shares: Mapping[str, float], donor_weight: float, running: float
) -> dict[str, float]:
    """Add up a corpus, the corpus raked to the donor, and the donor's own words, `running` words in all."""
    counts, own = _values(words), _values(shares)
    cuts = cut(list(words), shares)
    raked = rake(counts, cuts, own)
    own *= whole_words(raked, cuts)
    mixed = (counts * (1 - RAKED) + raked * RAKED) * ((1 - donor_weight) / counts.sum())
    result = dict(zip(words, mixed.tolist(), strict=True))
    for word, share in zip(shares, (own * (donor_weight / own.sum())).tolist(), strict=True):
        result[word] = result.get(word, 0) + share
    return {word: weight * running for word, weight in result.items()}


def _passages(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[list[str], sparse.csr_matrix]:
    """Count runs of letters, normalised, in texts that may be a stream: read once and never held whole.

    Returns the runs in the order in which they first occur, and their counts in each passage of the text,
    `[passages, runs]` float64. Passages grow with the corpus, so that their number stays within bounds.
    """
    numbers: dict[str, int] = {}
    passages: list[tuple[np.ndarray, np.ndarray]] = []
    passage: Counter[str] = Counter()
    size, characters = _PASSAGE, 0
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    for text in chain(texts, [None]):
        if text is not None:
            passage.update(_RUN.findall(normal(text)))
            characters += len(text)
        if text is None or characters >= size:
            ids = [numbers.setdefault(run, len(numbers)) for run in passage]
            passages.append((np.array(ids, dtype=np.int64), np.array([*passage.values()], dtype=float)))
            passage.clear()
            characters = 0
        if len(passages) > _PASSAGES:
            passages = [_joined(*pair) for pair in zip(passages[::2], passages[1::2], strict=False)] + (
                passages[-1:] if len(passages) % 2 else []
            )
            size *= 2
    found, counts = (np.concatenate(parts) for parts in zip(*passages, strict=True))
    ends = np.cumsum([0, *(len(part) for part, _ in passages)])
    return list(numbers), sparse.csr_matrix((counts, found, ends), (len(passages), len(numbers)))


def _joined(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    found, places = np.unique(np.concatenate([first[0], second[0]]), return_inverse=True)
    return found, np.bincount(places, weights=np.concatenate([first[1], second[1]]))


def _values(weights: Mapping[str, float]) -> np.ndarray:
    return np.fromiter(weights.values(), float, len(weights))


def listed_runs(tokenizer: Tokenizer, weights: Mapping[str, float]) -> dict[str, float]:
    """Return listed words and their weights, normalised as the tokenizer does in the middle of a text."""
    runs: dict[str, float] = {}
    for word, weight in weights.items():
        if tokenizer.normalizer is not None:
            # Behind a digit, so that no normaliser puts a space before the word.
            word = tokenizer.normalizer.normalize_str(f"0{word}").partition("0")[2]
        runs[word] = runs.get(word, 0) + weight
    return runs


def of_scripts(runs: Mapping[str, float], scripts: Sequence[str], source: str) -> dict[str, float]:
    """Return the words in `scripts` that runs of letters hold, with the space before them.

    Raises:
        RuadaptError: there is none.
    """
    letters = {letter for letter in set().union(*map(set, runs)) if letter_script(letter) in scripts}
    if not letters:
        raise RuadaptError(
            f"{source} has no letter of {', '.join(scripts)}; give text in that script or other `scripts`"
        )
    pattern = re.compile(f"[ {SPACE_MARK}]?[{''.join(map(re.escape, sorted(letters)))}]+")
    words: dict[str, float] = {}
    for run, weight in runs.items():
        for word in pattern.findall(run):
            words[word] = words.get(word, 0) + weight
    return words


def in_model_spelling(tokenizer: Tokenizer, words: Mapping[str, int]) -> Counter[str]:
    """Cut words by the tokenizer's own pre-tokenizer and spell them as its model does."""
    if all(step["type"] == "Metaspace" for step in steps(tokenizer, "pre_tokenizer")):
        return Counter({word.replace(" ", SPACE_MARK): count for word, count in words.items()})
    result: Counter[str] = Counter()
    for word, count in words.items():
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            result[piece] += count
    return result
