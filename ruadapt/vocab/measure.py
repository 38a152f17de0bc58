"""What a vocabulary costs and holds: characters per token, whole words and stems, scripts, rows."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import project_root
from ruadapt.vocab.mapping import overlap
from ruadapt.vocab.spec import as_list, rows, special_ids
from ruadapt.vocab.surface import script, token_bytes

DEFAULT_MEASURES = ("characters_per_token", "tokens", "characters", "tokens_per_word", "whole_words")
OTHER_MEASURES = (
    "bytes_per_token",
    "context_characters",
    "boundary_precision",
    "boundary_recall",
    "stems_whole",
)
_BOUNDARY_MEASURES = frozenset(OTHER_MEASURES[2:])
_WORD = re.compile(r"[^\W\d_]+")
_BATCH = 2000


def reference_folder() -> Path | None:
    """Return the folder of real tokenizers (`RUADAPT_REFERENCE`, else ../shared/reference), None without."""
    named = os.environ.get("RUADAPT_REFERENCE")
    folder = Path(named) if named else project_root().parent / "shared" / "reference"
    return folder if (folder / "tokenizers").is_dir() else None


def measure(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    language: str = "ru",
    context: int = 4096,
) -> dict[str, float]:
    """Measure a tokenizer on texts, each on its own, without special tokens.

    Returns {measure: value} for the `measures` asked for: `characters_per_token` (characters / tokens,
    characters without newlines), `tokens`, `characters`, `tokens_per_word` (tokens / words between white
    space), `whole_words` (share of the words of letters that are one token with a space before them),
    `bytes_per_token` (UTF-8, without newlines), `context_characters` (characters that a context of
    `context` tokens holds), and those of `boundary_agreement`.

    Raises:
        RuadaptError: no text; an unknown measure; a language whose stems are not known.
    """
    if unknown := set(measures) - {*DEFAULT_MEASURES, *OTHER_MEASURES}:
        raise RuadaptError(
            f"unknown measures {', '.join(sorted(unknown))}; choose from "
            f"{', '.join((*DEFAULT_MEASURES, *OTHER_MEASURES))}"
        )
    lines = as_list(texts)
    tokens = 0
    for start in range(0, len(lines), _BATCH):
        batch = tokenizer.encode_batch_fast(lines[start : start + _BATCH], add_special_tokens=False)
        tokens += sum(map(len, batch))
    characters = sum(len(line) - line.count("\n") for line in lines)
    found = {
        "characters_per_token": characters / tokens,
        "tokens": tokens,
        "characters": characters,
        "tokens_per_word": tokens / sum(len(line.split()) for line in lines),
        "bytes_per_token": sum(len(line.encode()) - line.count("\n") for line in lines) / tokens,
        "context_characters": context * characters / tokens,
    }
    if "whole_words" in measures:
        found["whole_words"] = whole_words(tokenizer, lines)
    if not _BOUNDARY_MEASURES.isdisjoint(measures):
        found |= boundary_agreement(tokenizer, lines, language)
    return {name: found[name] for name in measures}


def characters_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return characters (without newlines) divided by tokens (without specials), each text on its own."""
    return measure(tokenizer, texts, ("characters_per_token",))["characters_per_token"]


def whole_words(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of running words (letters only) that are one token inside a sentence."""
    words = _words(texts)
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


def boundary_agreement(tokenizer: Tokenizer, texts: Iterable[str], language: str = "ru") -> dict[str, float]:
    """Compare token boundaries inside running words with the boundary between stem and ending.

    The stem is the longest common beginning of all forms of the word's lexeme (pymorphy3, its likeliest
    reading; comparatives and superlatives aside, which change stems). Words that the dictionary lacks or
    whose forms share no two letters are left out.

    Returns `boundary_precision` (share of the token boundaries inside words that lie where the ending
    begins), `boundary_recall` (share of the words with an ending that are cut at all and are cut there),
    `stems_whole` (share of words whose stem no token boundary cuts).

    Raises:
        RuadaptError: a language other than "ru".
    """
    if language != "ru":
        raise RuadaptError(f"stems of {language!r} are not known; boundaries are measured for 'ru' only")
    words = _words(texts)
    stems = _stems(words)
    sizes = [len(surface or b"") for surface in token_bytes(tokenizer)]
    encodings = tokenizer.encode_batch_fast([f"а {word}" for word in stems], add_special_tokens=False)
    total = whole = boundaries = hits = with_ending = 0
    for encoding, (word, stem) in zip(encodings, stems.items(), strict=True):
        count, length, ending = words[word], len(word.encode()), len(word[stem:].encode())
        # Counted from the end: what stands before the word doesn't matter.
        ends = accumulate(sizes[number] for number in reversed(encoding.ids))
        cuts = list(takewhile(lambda end, length=length: end < length, ends))  # type: ignore[misc]
        total += count
        whole += count * all(cut <= ending for cut in cuts)
        boundaries += count * len(cuts)
        hits += count * (ending in cuts)
        with_ending += count * bool(ending and cuts)
    return {
        "boundary_precision": hits / max(boundaries, 1),
        "boundary_recall": hits / max(with_ending, 1),
        "stems_whole": whole / max(total, 1),
    }


def _words(texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(text))
    return words


def _stems(words: Iterable[str]) -> dict[str, int]:
    """Return the number of letters of each known word's stem."""
    from pymorphy3 import MorphAnalyzer  # loads its dictionary: only where it is used

    analyzer = MorphAnalyzer()
    lexemes: dict[tuple[str, str], str] = {}
    found = {}
    for word in words:
        if not analyzer.word_is_known(word.lower()):
            continue
        parse = analyzer.parse(word.lower())[0]
        key = parse.normal_form, str(parse.tag.POS)
        if key not in lexemes:
            forms = [form for form in parse.lexeme if not {"COMP", "Supr"} & form.tag.grammemes]
            lexemes[key] = _common_beginning([form.word.replace("ё", "е") for form in forms])
        stem = lexemes[key]
        if len(stem) > 1 and word.lower().replace("ё", "е").startswith(stem):
            found[word] = len(stem)
    return found


def _common_beginning(words: Sequence[str]) -> str:
    # What the first and the last word in sorted order share, all between them share.
    pairs = zip(min(words, default=""), max(words, default=""), strict=False)
    return "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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


def row_cost(rows: int, hidden_size: int, *, tied: bool, dtype: str = "bfloat16") -> dict[str, int]:
    """Return what `rows` embedding rows cost: `parameters` and `bytes`, with `lm_head` where it is untied.

    Raises:
        RuadaptError: a dtype that torch does not have.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise RuadaptError(f"unknown dtype {dtype!r}; give torch's name, such as bfloat16 or float32")
    parameters = rows * hidden_size * (1 if tied else 2)
    return {"parameters": parameters, "bytes": parameters * kind.itemsize}


def same_ids(new: Tokenizer, old: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Return (texts whose ids are identical, texts)."""
    lines = as_list(texts)
    return len(lines) - len(changed_ids(new, old, lines)), len(lines)


def changed_ids(new: Tokenizer, old: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts whose ids differ between two tokenizers."""
    encodings = (tokenizer.encode_batch_fast(texts, add_special_tokens=False) for tokenizer in (new, old))
    return [text for text, left, right in zip(texts, *encodings, strict=True) if left.ids != right.ids]


def round_trips(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Return (texts that decode to themselves after the tokenizer's own normaliser, texts)."""
    lines = as_list(texts)
    return len(lines) - len(changed_texts(tokenizer, lines)), len(lines)


def changed_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that do not decode to themselves (see `round_trips`)."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    # Prepending a space is undone by the decoder; composing characters (NFC) is not.
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer is not None else str
    return [
        before
        for after, before in zip(decoded, texts, strict=True)
        if after != before and normal(after) != normal(before)
    ]


def compare(
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[tuple[str, str], Iterable[str]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    context: int = 4096,
) -> pd.DataFrame:
    """Measure tokenizers on texts.

    Args:
        tokenizers: {vocabulary: tokenizer}.
        texts: {(language, name of the text): lines}.
        measures, context: as in `measure`.

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
            values = measure(tokenizer, listed, measures, language=language, context=context)
            found.append({"vocabulary": vocabulary, "language": language, "text": name, **values})
    return pd.DataFrame(found)
