"""Words to learn from: counted in a corpus and read from a donor vocabulary.

A word is a run of letters of the wanted scripts with the space before it, if there is one. Punctuation stays
outside: a merge that takes it along would touch text in other scripts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, load_tokenizer, read_spec, steps
from ruadapt.vocab.surface import fallback_tokens, letter_script, token_bytes

_RUN = re.compile(f"[ {SPACE_MARK}]?[^\\W\\d_]+")  # letters of any script; sorted out once per distinct run
_LEAST = 20  # count of a donor's rarest word where nothing else is counted


def learnable_words(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    scripts: Sequence[str],
    donor: Path | str | None,
    donor_weight: float,
) -> dict[str, int]:
    """Return {word in the model's spelling: count}, from a stream of texts, a donor, or both.

    With both, a word weighs (1 - w) · its share of the corpus + w · the donor's share, w = `donor_weight`.

    Raises:
        RuadaptError: nothing to learn from, or no word in the wanted scripts; a share outside 0 to 1.
    """
    if not 0 < donor_weight < 1:
        raise RuadaptError(f"donor_weight is {donor_weight}; choose a share between 0 and 1")
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(_RUN.findall(_normal(tokenizer, text)))
    if not runs and donor is None:
        raise RuadaptError("the corpus holds no text; give at least one non-empty line")
    words = _of_scripts(runs, scripts, "the corpus") if runs else {}
    if donor is not None:
        # Behind a digit, so that no normaliser puts a space before the word.
        found: Counter[str] = Counter()
        for word, share in read_donor(donor).items():
            found[_normal(tokenizer, f"0{word}").partition("0")[2]] += share  # type: ignore[assignment]
        shares = _of_scripts(found, scripts, str(donor))
        words = (
            _mixed(words, shares, donor_weight) if words else _scaled(shares, _LEAST / min(shares.values()))
        )
    return _in_model_spelling(tokenizer, {word: round(weight) for word, weight in words.items()})


def read_donor(path: Path | str) -> dict[str, float]:
    """Return {surface: expected share of running tokens} of a BPE or Unigram vocabulary, best first.

    A Unigram score is the logarithm of a share. A BPE vocabulary has no scores: token number r gets 1 / r
    (Zipf), for merges are learned in the order of their counts. Half characters, special and byte tokens are
    left out. The donor's normaliser is not asked: what counts are the surfaces of its tokens.

    Args:
        path: tokenizer.json or a folder with one.

    Raises:
        RuadaptError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(path)
    model = read_spec(tokenizer)["model"]
    byte_tokens = set(fallback_tokens(tokenizer).values())
    shares: Counter[str] = Counter()
    for number, surface in enumerate(token_bytes(tokenizer)):
        text = (surface or b"").decode(errors="replace")
        if text and "\ufffd" not in text and number not in byte_tokens:
            unigram = model["type"] == "Unigram"
            shares[text] += math.exp(model["vocab"][number][1]) if unigram else 1 / (number + 1)  # type: ignore[assignment]
    return dict(shares)


def _mixed(words: Mapping[str, float], shares: Mapping[str, float], donor_weight: float) -> dict[str, float]:
    total = sum(words.values())
    mixed = _scaled(words, 1 - donor_weight)
    for word, count in _scaled(shares, total * donor_weight / sum(shares.values())).items():
        mixed[word] = mixed.get(word, 0) + count
    return mixed


def _scaled(weights: Mapping[str, float], factor: float) -> dict[str, float]:
    return {word: weight * factor for word, weight in weights.items()}


def _normal(tokenizer: Tokenizer, text: str) -> str:
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)


def _of_scripts(runs: Mapping[str, float], scripts: Sequence[str], source: str) -> dict[str, float]:
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


def _in_model_spelling(tokenizer: Tokenizer, words: Mapping[str, int]) -> Counter[str]:
    """Cut words by the tokenizer's own pre-tokenizer and spell them as its model does."""
    if all(step["type"] == "Metaspace" for step in steps(tokenizer, "pre_tokenizer")):
        return Counter({word.replace(" ", SPACE_MARK): count for word, count in words.items()})
    result: Counter[str] = Counter()
    for word, count in words.items():
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            result[piece] += count
    return result
