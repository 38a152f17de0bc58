"""Words to learn from: counted in a corpus and read from a donor vocabulary.

A word is a run of letters of the wanted scripts with the space before it, if there is one. Punctuation stays
outside: a merge that takes it along would touch text in other scripts.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, load_tokenizer, read_spec, steps
from ruadapt.vocab.surface import fallback_tokens, letter_script, token_bytes

_DONOR_WEIGHT = 0.5  # a donor's share of all weight beside text
_LEAST = 20  # count of a donor's rarest word where nothing else is counted


def learnable_words(
    tokenizer: Tokenizer, texts: Iterable[str], scripts: Sequence[str], donor: Path | str | None
) -> Counter[str]:
    """Return {word in the model's spelling: count}, from a stream of texts, a donor, or both.

    With both, a word weighs half its share of the corpus and half the donor's share.

    Raises:
        RuadaptError: there is no word in the wanted scripts.
    """
    pattern = _words_of(tuple(scripts))
    normal = str if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
    words: Counter[str] = Counter()
    for text in texts:
        words.update(pattern.findall(normal(text)))
    shares: dict[str, float] = {}
    for surface, share in (read_donor(donor) if donor is not None else {}).items():
        # Behind a digit, so that no normaliser puts a space before the word.
        for word in pattern.findall(normal(f"0{surface}")):
            shares[word] = shares.get(word, 0) + share
    if not shares and (donor is not None or not words):
        raise RuadaptError(
            f"{donor or 'the text'} has no letter of {', '.join(scripts)}; give text in that script or other "
            "`scripts`"
        )
    counts: dict[str, float] = dict(words)
    if shares:
        factor = _LEAST / min(shares.values())
        if words:
            factor = words.total() * _DONOR_WEIGHT / sum(shares.values())
            counts = {word: count * (1 - _DONOR_WEIGHT) for word, count in words.items()}
        for word, share in shares.items():
            counts[word] = counts.get(word, 0) + share * factor
    # Spelled as the model does, behind the tokenizer's own pre-tokenizer.
    spelled: Counter[str] = Counter()
    cutter = tokenizer.pre_tokenizer if steps(tokenizer, "pre_tokenizer") - {"Metaspace"} else None
    for word, weight in counts.items():
        cut = cutter.pre_tokenize_str(word) if cutter else [(word.replace(" ", SPACE_MARK), None)]
        for piece, _ in cut:
            spelled[piece] += round(weight)
    return spelled


@cache
def _words_of(scripts: tuple[str, ...]) -> re.Pattern[str]:
    known = filter(str.isalpha, map(chr, range(sys.maxunicode + 1)))
    letters = [letter for letter in known if letter_script(letter) in scripts]
    if not letters:
        raise RuadaptError(f"no letter of {', '.join(scripts)} is known; name scripts as Unicode does")
    return re.compile(f"[ {SPACE_MARK}]?[{''.join(map(re.escape, letters))}]+")


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
