"""Words to learn from: counted in a corpus and read from a donor vocabulary.

A word is a run of Cyrillic letters with the space before it, if there is one. Punctuation stays outside: a
merge that takes it along would touch text in other scripts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, load_tokenizer, read_spec, steps
from ruadapt.vocab.surface import fallback_tokens, token_bytes

# Letters that Unicode names Cyrillic.
_LETTERS = r"\u0400-\u0481\u048a-\u052f\u1c80-\u1c88\u1d2b\ua640-\ua66e\ua67f-\ua69b"
_WORD = re.compile(f"[ {SPACE_MARK}]?[{_LETTERS}]+")
_DONOR_WEIGHT = 0.5  # a donor's share of all weight beside text
_LEAST = 20  # count of a donor's rarest word where nothing else is counted


def learnable_words(tokenizer: Tokenizer, texts: Iterable[str], donor: Path | str | None) -> Counter[str]:
    """Return {word in the model's spelling: count}, from a stream of texts, a donor, or both.

    With both, a word weighs half its share of the corpus and half the donor's share.

    Raises:
        RuadaptError: there is no Cyrillic word.
    """
    normal = str if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(normal(text)))
    shares: dict[str, float] = {}
    for surface, share in (read_donor(donor) if donor is not None else {}).items():
        # Behind a digit, so that no normaliser puts a space before the word.
        for word in _WORD.findall(normal(f"0{surface}")):
            shares[word] = shares.get(word, 0) + share
    if not shares and (donor is not None or not words):
        raise RuadaptError(f"{donor or 'the text'} has no Cyrillic letter; give Russian text")
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
