"""What a vocabulary costs and holds: characters per token, tokens per word, whole words, scripts, rows."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import project_root
from ruadapt.vocab.mapping import overlap
from ruadapt.vocab.spec import as_list, rows, special_ids
from ruadapt.vocab.surface import script, token_bytes

_WORD = re.compile(r"[^\W\d_]+")
_BATCH = 2000


def reference_folder() -> Path | None:
    """Return the folder of real tokenizers (`RUADAPT_REFERENCE`, else ../shared/reference), None without."""
    named = os.environ.get("RUADAPT_REFERENCE")
    folder = Path(named) if named else project_root().parent / "shared" / "reference"
    return folder if (folder / "tokenizers").is_dir() else None


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Measure a tokenizer on texts, each on its own, without special tokens.

    Returns a dict: `characters_per_token` (characters / tokens, characters without newlines), `tokens`,
    `characters`, `tokens_per_word` (tokens / words between white space), `whole_words` (share of the words of
    letters that are one token with a space before them).
    """
    lines = as_list(texts)
    tokens = 0
    for start in range(0, len(lines), _BATCH):
        batch = tokenizer.encode_batch_fast(lines[start : start + _BATCH], add_special_tokens=False)
        tokens += sum(map(len, batch))
    characters = sum(len(line) - line.count("\n") for line in lines)
    return {
        "characters_per_token": characters / tokens,
        "tokens": tokens,
        "characters": characters,
        "tokens_per_word": tokens / sum(len(line.split()) for line in lines),
        "whole_words": whole_words(tokenizer, lines),
    }


def characters_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return characters (without newlines) divided by tokens (without specials), each text on its own."""
    return measure(tokenizer, texts)["characters_per_token"]


def whole_words(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of running words (letters only) that are one token inside a sentence."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(text))
    if not words:
        return 0.0
    # A word after another one, so that every family puts its own kind of space before it.
    before = len(tokenizer.encode("а", add_special_tokens=False))
    encodings = tokenizer.encode_batch_fast([f"а {word}" for word in words], add_special_tokens=False)
    whole = sum(
        count
        for encoding, count in zip(encodings, words.values(), strict=True)
        if len(encoding) == before + 1
    )
    return whole / words.total()


def composition(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the number of tokens of each script (see `surface.script`), most frequent first."""
    return dict(Counter(map(script, token_bytes(tokenizer))).most_common())


def row_report(new: Tokenizer, old: Tokenizer) -> dict[str, int]:
    """Count rows: `old`, `new`, `kept` (same surface or special), `added`, `dropped`, `saved` (old - new)."""
    shared = special_ids(new).keys() & special_ids(old).keys()
    kept = len(overlap(new, old)[0]) + len(shared)
    old_rows, new_rows = rows(old), rows(new)
    return {
        "old": old_rows,
        "new": new_rows,
        "kept": kept,
        "added": new_rows - kept,
        "dropped": old_rows - kept,
        "saved": old_rows - new_rows,
    }


def same_ids(new: Tokenizer, old: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Return (texts whose ids are identical, texts)."""
    lines = as_list(texts)
    pairs = zip(
        new.encode_batch(lines, add_special_tokens=False),
        old.encode_batch(lines, add_special_tokens=False),
        strict=True,
    )
    return sum(left.ids == right.ids for left, right in pairs), len(lines)


def round_trips(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Return (texts that decode to themselves after the tokenizer's own normaliser, texts)."""
    lines = as_list(texts)
    encodings = tokenizer.encode_batch(lines, add_special_tokens=False)
    decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    # Prepending a space is undone by the decoder; composing characters (NFC) is not.
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    good = sum(
        after == before or normal(after) == normal(before)
        for after, before in zip(decoded, lines, strict=True)
    )
    return good, len(lines)


def compare(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[tuple[str, str], Iterable[str]]
) -> pd.DataFrame:
    """Measure tokenizers on texts.

    Args:
        tokenizers: {vocabulary: tokenizer}.
        texts: {(language, name of the text): lines}.

    Returns one row for each pair: `vocabulary, language, text` and the columns of `measure`.

    Raises:
        RuadaptError: nothing to compare.
    """
    if not tokenizers or not texts:
        raise RuadaptError("nothing to compare; give at least one tokenizer and one text")
    found: list[dict[str, Any]] = []
    for (language, name), lines in texts.items():
        listed = as_list(lines)
        for vocabulary, tokenizer in tokenizers.items():
            found.append(
                {"vocabulary": vocabulary, "language": language, "text": name, **measure(tokenizer, listed)}
            )
    return pd.DataFrame(found)
