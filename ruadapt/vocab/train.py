"""Replacing a vocabulary: a new BPE or Unigram one under the original's rules (METHOD, sec. 2)."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import cuts
from ruadapt.vocab.spec import (
    SPACE_MARK,
    Spec,
    as_list,
    build,
    byte_letters,
    is_byte_level,
    load_tokenizer,
    place,
    read_spec,
    repeated,
    special_ids,
    spell,
    unspell,
    with_model,
)
from ruadapt.vocab.surface import fallback_tokens

Finish = Callable[[dict[str, int]], Spec]  # {token: id} to a model
_SEPARATOR = "\ue000"  # between words on their way into the trainer; no word may hold it
_RARE_CHARACTER = 1e-5  # a character below this share of the text is left to byte tokens
_FALLBACK_WORDS = r"▁+(?=▁)|▁?[\p{L}\p{M}]+|DIGITS|▁?[^▁\p{L}\p{M}\p{N}]+|▁"
_BYTE_PENALTY = 10.0  # log probability below the least likely piece: bytes are the last resort


def train_replacement(
    texts: Iterable[str], original_folder: Path | str, model: Literal["bpe", "unigram"], vocab_size: int
) -> Tokenizer:
    """Train a vocabulary that replaces the original's whole.

    Normaliser, pre-tokenizer, decoder, post-processor and added tokens are the original's own. Special tokens
    keep their ids where those are below `vocab_size`, else they take the last rows. All 256 bytes are tokens
    (letters of the byte-level alphabet, or `<0x..>`), so every text that the original gives back round-trips.

    Args:
        texts: the training corpus.
        original_folder: folder with the original's tokenizer.json.
        model: "bpe" or "unigram".
        vocab_size: exact number of rows, special tokens included.

    Raises:
        RuadaptError: an original without byte tokens; no text; a budget too small for bytes and special
            tokens, or larger than the corpus can fill (the message says how many rows were possible).
    """
    original = load_tokenizer(original_folder)
    if model not in ("bpe", "unigram"):
        raise RuadaptError(f"unknown model {model!r}; choose bpe or unigram")
    byte_level = is_byte_level(original)
    if not byte_level and not fallback_tokens(original):
        raise RuadaptError(f"{original_folder} has no byte tokens to fall back to; extend it instead")
    specials = special_ids(original)
    budget = vocab_size - len(specials)
    if budget < 256:
        raise RuadaptError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens need "
            f"{256 + len(specials)} rows"
        )
    train = _unigram if model == "unigram" else _bpe if byte_level else _fallback_bpe
    pieces, finish = train(as_list(texts), original, budget)
    kept = [piece for piece in pieces if piece not in specials]
    if len(kept) != budget:
        raise RuadaptError(
            f"the corpus gives {len(kept) + len(specials)} rows, vocab_size {vocab_size} was asked for; "
            "lower it or give more text"
        )
    ids = place(kept, specials)
    return build(with_model(read_spec(original), finish(ids), ids))


def _bpe(texts: list[str], original: Tokenizer, budget: int) -> tuple[list[str], Finish]:
    learner = Tokenizer(models.BPE())
    if original.normalizer is not None:
        learner.normalizer = original.normalizer
    learner.pre_tokenizer = original.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=budget, initial_alphabet=list(byte_letters()), min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    spec = json.loads(learner.to_str())["model"]
    pieces = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    return pieces, lambda ids: {**spec, "vocab": ids}


def _fallback_bpe(texts: list[str], original: Tokenizer, budget: int) -> tuple[list[str], Finish]:
    words, alphabet = _words(texts, original)
    learned = _learn(words, sorted(alphabet), budget - 256)
    vocabulary = learned["vocab"]
    pieces = [*_byte_tokens(original), *sorted(vocabulary, key=vocabulary.__getitem__)]
    model = {**read_spec(original)["model"], "merges": learned["merges"]}
    return pieces, lambda ids: {**model, "vocab": ids}


def _unigram(texts: list[str], original: Tokenizer, budget: int) -> tuple[list[str], Finish]:
    """Train on characters, then spell the pieces as the original does: only bytes are half characters."""
    words, alphabet = _words(texts, original)
    byte_level = is_byte_level(original)
    if not byte_level:
        # Text that spells a byte token must be cheaper letter by letter than as that token.
        alphabet |= set("<>x0123456789ABCDEF")
    room = budget - 256 + (sum(character.isascii() for character in alphabet) if byte_level else 0)
    if room < len(alphabet):
        raise RuadaptError(
            f"{budget} rows are too few for a Unigram vocabulary of a corpus with {len(alphabet)} characters"
        )
    fitted = _fit(words, sorted(alphabet), room)
    scores = {spell(piece.encode()): score for piece, score in fitted.items()} if byte_level else fitted
    lowest = min(scores.values()) - _BYTE_PENALTY
    for token in _byte_tokens(original):
        scores.setdefault(token, lowest if byte_level else lowest * 100)
    unknown = original.model.unk_token

    def finish(ids: dict[str, int]) -> Spec:
        # Special tokens need an entry at their id; added tokens are matched before the model sees a text.
        vocabulary = [[token, scores.get(token, lowest * 100)] for token in sorted(ids, key=ids.__getitem__)]
        unk_id = None if byte_level else ids[unknown]
        return {"type": "Unigram", "unk_id": unk_id, "vocab": vocabulary, "byte_fallback": not byte_level}

    return list(scores), finish


def _byte_tokens(original: Tokenizer) -> tuple[str, ...]:
    if is_byte_level(original):
        return byte_letters()
    return tuple(f"<0x{byte:02X}>" for byte in range(256))


def _fit(words: Mapping[str, int], alphabet: list[str], room: int) -> dict[str, float]:
    """Fit a Unigram model of `room` pieces: {piece: log probability} (Kudo 2018, sec. 3.2, Viterbi counts).

    The library's own UnigramTrainer proposes no word form that is not another word's beginning, and starves
    the parts of words once it does. Here the candidates are the tokens of a BPE four times as large, which
    holds whole words and their parts alike. Learning them and cutting by them stay native; each round drops
    the quarter of pieces whose absence costs the least likelihood. Single characters always stay.
    """
    vocabulary = _learn(words, alphabet, 4 * room)["vocab"]
    scores = dict.fromkeys(sorted(vocabulary, key=vocabulary.__getitem__), -10.0)  # at first: fewest pieces
    listed, times = list(words), np.array(list(words.values()))
    while True:
        for _ in range(2):
            model = Tokenizer(models.Unigram(list(scores.items())))
            found = list(cuts(model, listed))
            used = np.repeat(times, list(map(len, found)))
            counted = np.bincount(list(chain.from_iterable(found)), used, len(scores))
            scores = dict(zip(scores, np.log(counted.clip(0.5) / counted.sum()).tolist(), strict=True))
        if len(scores) <= room:
            return scores
        loss = {
            piece: count * (score - _without(piece, scores))
            for (piece, score), count in zip(scores.items(), counted.tolist(), strict=True)
            if len(piece) > 1
        }
        size = max(room, int(0.75 * len(scores))) - len(alphabet)
        kept = set(sorted(loss, key=loss.__getitem__, reverse=True)[:size])
        scores = {piece: score for piece, score in scores.items() if len(piece) == 1 or piece in kept}


def _without(piece: str, scores: Mapping[str, float]) -> float:
    """Return the best log probability of a piece as a sequence of other pieces."""
    best = [0.0] + [-math.inf] * len(piece)
    for start in range(len(piece)):
        for end in range(start + 1, len(piece) + (start > 0)):
            score = scores.get(piece[start:end])
            if score is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def _learn(words: Mapping[str, int], alphabet: list[str], rows: int) -> Spec:
    """Learn a BPE model of up to `rows` tokens from word counts."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(_SEPARATOR, "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=rows, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(repeated(words, _SEPARATOR), trainer)
    model: Spec = json.loads(learner.to_str())["model"]
    return model


def _words(texts: list[str], original: Tokenizer) -> tuple[Counter[str], set[str]]:
    """Count the words that may become tokens, as text (`▁` for spaces where the model has it so).

    Returns words and their alphabet; words with rare characters are left to byte tokens. The words are the
    pre-tokenizer's. A SentencePiece model has none in its file, so its habits are restored: a space begins a
    word, letters and other characters are apart, digits are single where the original has them so.
    """
    byte_level = is_byte_level(original)
    cutter = original.pre_tokenizer
    if not byte_level:
        digits = r"\p{N}+" if _joins_digits(original) else r"\p{N}"
        cutter = pre_tokenizers.Split(Regex(_FALLBACK_WORDS.replace("DIGITS", digits)), "isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        if original.normalizer is not None:
            text = original.normalizer.normalize_str(text)
        text = text if byte_level else text.replace(" ", SPACE_MARK)
        counts.update(word for word, _ in cutter.pre_tokenize_str(text))
    words: Counter[str] = Counter()
    for word, count in counts.items():
        words[unspell(word).decode(errors="replace") if byte_level else word] += count
    alphabet = _alphabet(words)
    return Counter({word: count for word, count in words.items() if set(word) <= alphabet}), alphabet


def _joins_digits(original: Tokenizer) -> bool:
    return any(token.isdecimal() and len(token) > 1 for token in original.get_vocab())


def _alphabet(words: Counter[str]) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    least = max(2.0, _RARE_CHARACTER * counts.total())
    return {character for character, count in counts.items() if count >= least} - {_SEPARATOR}
