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
_DONOR_WEIGHT = 0.5  # a donor's share of all weight beside text
_LEAST = 20  # count of a donor's rarest word where nothing else is counted


def learnable_words(
    tokenizer: Tokenizer, texts: Iterable[str], scripts: Sequence[str], donor: Path | str | None
) -> Counter[str]:
    """Return {word in the model's spelling: count}, from a stream of texts, a donor, or both.

    With both, a word weighs half its share of the corpus and half the donor's share.

    Raises:
        RuadaptError: nothing to learn from, or no word in the wanted scripts.
    """
    normal = str if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(_RUN.findall(normal(text)))
    if not runs and donor is None:
        raise RuadaptError("the corpus holds no text; give at least one non-empty line")
    words = _of_scripts(runs, scripts, "the corpus") if runs else {}
    if donor is not None:
        found: dict[str, float] = {}
        for word, share in read_donor(donor).items():
            # Behind a digit, so that no normaliser puts a space before the word.
            word = normal(f"0{word}").partition("0")[2]
            found[word] = found.get(word, 0) + share
        shares = _of_scripts(found, scripts, str(donor))
        factor = _LEAST / min(shares.values())
        if words:
            factor = sum(words.values()) * _DONOR_WEIGHT / sum(shares.values())
            words = {word: count * (1 - _DONOR_WEIGHT) for word, count in words.items()}
        for word, share in shares.items():
            words[word] = words.get(word, 0) + share * factor
    # Spelled as the model does, behind the tokenizer's own pre-tokenizer.
    spelled: Counter[str] = Counter()
    cutter = tokenizer.pre_tokenizer if steps(tokenizer, "pre_tokenizer") - {"Metaspace"} else None
    for word, weight in words.items():
        cut = cutter.pre_tokenize_str(word) if cutter else [(word.replace(" ", SPACE_MARK), None)]
        for piece, _ in cut:
            spelled[piece] += round(weight)
    return spelled


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
    shares: dict[str, float] = {}
    for number, surface in enumerate(token_bytes(tokenizer)):
        text = (surface or b"").decode(errors="replace")
        if text and "\ufffd" not in text and number not in byte_tokens:
            unigram = model["type"] == "Unigram"
            share = math.exp(model["vocab"][number][1]) if unigram else 1 / (number + 1)
            shares[text] = shares.get(text, 0) + share
    return shares


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
