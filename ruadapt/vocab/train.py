"""Replacing a vocabulary: a new BPE or Unigram one under the original's rules (METHOD, sec. 2)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import cuts
from ruadapt.vocab.spec import (
    BYTE_LETTERS,
    SEPARATOR,
    SPACE_MARK,
    Spec,
    as_list,
    build,
    by_id,
    is_byte_level,
    learn_bpe,
    load_tokenizer,
    place,
    read_spec,
    special_ids,
    spell,
    unspell,
    with_model,
)
from ruadapt.vocab.surface import BYTE_TOKENS, fallback_tokens, token_bytes

_RARE_CHARACTER = 1e-5  # a character below this share of the text is left to byte tokens
_FALLBACK_WORDS = r"▁+(?=▁)|▁?[\p{L}\p{M}]+|\p{N}|▁?[^▁\p{L}\p{M}\p{N}]+|▁"
_DIGITS = frozenset("0123456789")
_BYTE_PENALTY = 10.0  # log probability below the least likely piece: bytes are the last resort


def train_replacement(
    texts: Iterable[str], original_folder: Path | str, model: Literal["bpe", "unigram"], vocab_size: int
) -> Tokenizer:
    """Train a vocabulary that replaces the original's whole.

    Normaliser, pre-tokenizer, decoder, post-processor and added tokens are the original's own. Special tokens
    keep their ids where those are below `vocab_size`, else they take the last rows. All 256 bytes are tokens
    (letters of the byte-level alphabet, or `<0x..>`), so every text that the original gives back round-trips.
    Where a BPE original has tokens of several digits, all its tokens of digits stay with their merges, and
    numbers are no text to learn from. A Unigram model then cuts numbers as before where each is one token
    (LLaMA-3 has those of three digits); it can't imitate merges in longer ones, which a certificate tells.

    Args:
        texts: the training corpus.
        original_folder: folder with the original's tokenizer.json.
        model: the kind of the new vocabulary.
        vocab_size: exact number of rows, special tokens included.

    Raises:
        RuadaptError: an original without byte tokens; no text; a budget too small for bytes, numbers and
            special tokens, or larger than the corpus can fill (the message says how many were possible).
    """
    original = load_tokenizer(original_folder)
    spec, specials = read_spec(original), special_ids(original)
    if not is_byte_level(original) and not fallback_tokens(original):
        instead = "extend it instead" if spec["model"]["type"] == "BPE" else "adapt a model that has them"
        raise RuadaptError(f"{original_folder} has no byte tokens to fall back to; {instead}")
    numbers = joined_numbers(original)
    budget = vocab_size - len(specials)
    if budget < 256 + len(numbers):
        raise RuadaptError(
            f"vocab_size {vocab_size} is too small: 256 bytes, {len(numbers)} numbers and {len(specials)} "
            f"special tokens need {256 + len(numbers) + len(specials)} rows"
        )
    words = _words(as_list(texts), original)
    if numbers:
        words = Counter({word: count for word, count in words.items() if _DIGITS.isdisjoint(word)})
    known = set(numbers)
    merges = [pair for pair in spec["model"].get("merges", []) if "".join(pair) in known]
    if model == "unigram":
        scores = _unigram(words, original, budget - len(known - _DIGITS))
        # Whole numbers beat their parts, as merges would have it where every number is a token.
        scores |= {token: sum(map(scores.__getitem__, token)) + len(token) - 1 for token in numbers}
        pieces = list(scores)
    else:
        pieces, learned = _bpe(words, original, budget - len(known - _DIGITS), known & _DIGITS)
        learned["merges"] = [*merges, *learned["merges"]]
        pieces = list(dict.fromkeys([*pieces, *numbers]))
    kept = [piece for piece in pieces if piece not in specials]
    if len(kept) != budget:
        raise RuadaptError(
            f"the corpus gives {len(kept) + len(specials)} rows, vocab_size {vocab_size} was asked for; "
            "lower it or give more text"
        )
    ids = place(kept, specials)
    trained = {**learned, "vocab": ids} if model == "bpe" else _unigram_model(ids, scores, original)
    return build(with_model(spec, trained, ids))


def joined_numbers(original: Tokenizer) -> list[str]:
    """Return the tokens of digits of a BPE vocabulary by id, [] where none has several digits."""
    byte_ids, surfaces = {*fallback_tokens(original).values()}, enumerate(token_bytes(original))
    digits = (number for number, surface in surfaces if surface and surface.strip(b" ").isdigit())
    numbers = [str(original.id_to_token(number)) for number in digits if number not in byte_ids]
    joined = any(sum(letter in _DIGITS for letter in token) > 1 for token in numbers)
    return numbers if joined and read_spec(original)["model"]["type"] == "BPE" else []


def _bpe(words: Counter[str], original: Tokenizer, budget: int, digits: set[str]) -> tuple[list[str], Spec]:
    """Return the tokens, bytes and `digits` among them, and the model with its merges."""
    if is_byte_level(original):
        learned = learn_bpe(words, budget, BYTE_LETTERS)
        return by_id(learned["vocab"]), learned
    words, alphabet = _frequent(words)
    learned = learn_bpe(words, budget - 256, sorted(alphabet | digits))
    model = {**read_spec(original)["model"], "merges": learned["merges"]}
    return [*BYTE_TOKENS, *by_id(learned["vocab"])], model


def _unigram(words: Counter[str], original: Tokenizer, budget: int) -> dict[str, float]:
    """Train on characters, then spell the pieces as the original does: only bytes are half characters."""
    byte_level = is_byte_level(original)
    if byte_level:
        texts: Counter[str] = Counter()
        for word, count in words.items():
            texts[unspell(word).decode(errors="replace")] += count
        words = texts
    words, alphabet = _frequent(words)
    if not byte_level:
        # Text that spells a byte token must be cheaper letter by letter than as that token.
        alphabet |= set("<>x0123456789ABCDEF")
    room = budget - 256 + (sum(character.isascii() for character in alphabet) if byte_level else 0)
    if room < len(alphabet):
        raise RuadaptError(f"{budget} rows are too few for a Unigram model of {len(alphabet)} characters")
    fitted = _fit(words, sorted(alphabet), room)
    scores = {spell(piece.encode()): score for piece, score in fitted.items()} if byte_level else fitted
    lowest = min(scores.values()) - _BYTE_PENALTY
    for token in BYTE_LETTERS if byte_level else BYTE_TOKENS:
        scores.setdefault(token, lowest if byte_level else lowest * 100)
    return scores


def _unigram_model(ids: Mapping[str, int], scores: Mapping[str, float], original: Tokenizer) -> Spec:
    # Special tokens need an entry at their id; added tokens are matched before the model sees a text.
    never = 100 * min(scores.values())
    vocabulary = [[token, scores.get(token, never)] for token in by_id(ids)]
    byte_level = is_byte_level(original)
    unk_id = None if byte_level else ids[original.model.unk_token]
    return {"type": "Unigram", "unk_id": unk_id, "vocab": vocabulary, "byte_fallback": not byte_level}


def _fit(words: Mapping[str, int], alphabet: list[str], room: int) -> dict[str, float]:
    """Fit a Unigram model of `room` pieces: {piece: log probability} (Kudo 2018, sec. 3.2, Viterbi counts).

    The candidates are the tokens of a BPE four times as large, which holds whole words and their parts alike.
    Learning them and cutting by them stay native; each round drops the quarter of pieces whose absence costs
    the least likelihood. Single characters always stay.

    sentencepiece's trainer (0.2.3; four settings) on Qwen2.5, 20,000 rows from 5.6 MB: up to 2.98 / 3.37
    characters per token and 0.67 / 0.85 of stems whole (news / literature) against 3.08 / 3.87 and
    0.59 / 0.82 here. The tokenizers library's, 48,000 rows: 3.00 / 3.42 characters against 3.51 / 4.25.
    """
    candidates = by_id(learn_bpe(words, 4 * room, alphabet)["vocab"])
    scores = dict.fromkeys(candidates, -10.0)  # at first: fewest pieces
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
            if (score := scores.get(piece[start:end])) is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def _words(texts: list[str], original: Tokenizer) -> Counter[str]:
    """Count the words that may become tokens, in the model's spelling.

    The words are the pre-tokenizer's. A SentencePiece model has none in its file, so its habits are restored:
    a space begins a word, letters and other characters are apart, digits are single.
    """
    byte_level = is_byte_level(original)
    cutter = original.pre_tokenizer
    if not byte_level:
        cutter = pre_tokenizers.Split(Regex(_FALLBACK_WORDS), "isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        if original.normalizer is not None:
            text = original.normalizer.normalize_str(text)
        text = text if byte_level else text.replace(" ", SPACE_MARK)
        counts.update(word for word, _ in cutter.pre_tokenize_str(text))
    return counts


def _frequent(words: Counter[str]) -> tuple[Counter[str], set[str]]:
    """Return the words without rare characters, which are left to byte tokens, and their alphabet."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    least = max(2.0, _RARE_CHARACTER * counts.total())
    alphabet = {character for character, count in counts.items() if count >= least} - {SEPARATOR}
    return Counter({word: count for word, count in words.items() if set(word) <= alphabet}), alphabet
