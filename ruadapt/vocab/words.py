"""Words to learn from: counted in a corpus, in a word list and in a donor vocabulary.

A word is a run of letters of the wanted scripts with the space before it, if there is one. Punctuation stays
outside: a merge that takes it along would touch text in other scripts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, steps
from ruadapt.vocab.surface import letter_script

_RUN = re.compile(f"[ {SPACE_MARK}]?[^\\W\\d_]+")  # letters of any script; sorted out once per distinct run
_PASSAGE = 250_000  # characters


def corpus_runs(tokenizer: Tokenizer, texts: Iterable[str], dispersion: float = 1.0) -> dict[str, float]:
    """Count runs of letters, normalised, in texts that may be a stream: read once and never held whole.

    Counts within a passage are raised to the power `dispersion` before they are added up: below 1, a word
    that fills one book weighs less than one that is as frequent and occurs everywhere.
    """
    runs: dict[str, float] = {}
    passage: Counter[str] = Counter()
    characters = 0
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    for text in chain(texts, [None]):
        if text is not None:
            passage.update(_RUN.findall(normal(text)))
            characters += len(text)
        if text is None or characters >= _PASSAGE:
            for run, count in passage.items():
                runs[run] = runs.get(run, 0) + (count if dispersion == 1 else count**dispersion)
            passage.clear()
            characters = 0
    return runs


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
