"""What a vocabulary costs and holds: characters per token, whole words and stems, scripts, rows."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import project_root
from ruadapt.vocab.mapping import shared_tokens
from ruadapt.vocab.spec import as_list, rows, special_ids
from ruadapt.vocab.surface import script, token_bytes

if TYPE_CHECKING:
    import pandas as pd  # slow to import: here only where a table is made

_WORD = re.compile(r"[^\W\d_]+")
_BATCH = 2000


def reference_folder() -> Path | None:
    """Return the folder of real tokenizers (`RUADAPT_REFERENCE`, else ../shared/reference), None without."""
    named = os.environ.get("RUADAPT_REFERENCE")
    folder = Path(named) if named else project_root().parent / "shared" / "reference"
    return folder if (folder / "tokenizers").is_dir() else None


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Measure a tokenizer on texts, each on its own, without special tokens.

    Returns `characters_per_token` (characters / tokens, characters without newlines), `tokens`,
    `characters`, `tokens_per_word` (tokens / words between white space) and `whole_words` (see there).

    Raises:
        RuadaptError: no text.
    """
    lines = as_list(texts)
    batches = (lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH))
    encoded = (tokenizer.encode_batch_fast(batch, add_special_tokens=False) for batch in batches)
    tokens = sum(map(len, chain.from_iterable(encoded)))
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
    words = _words(texts)
    # A word after another one, so that every family puts its own kind of space before it.
    before = len(tokenizer.encode("а", add_special_tokens=False))
    encodings = tokenizer.encode_batch_fast([f"а {word}" for word in words], add_special_tokens=False)
    counts = zip(encodings, words.values(), strict=True)
    whole = sum(count for encoding, count in counts if len(encoding) == before + 1)
    return whole / max(words.total(), 1)


def stems_whole(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of running Russian words whose stem no token boundary cuts.

    The stem is the longest common beginning of all forms of the word's lexeme (pymorphy3, its likeliest
    reading; comparatives and superlatives aside, which change stems). Words that the dictionary lacks or
    whose forms share no two letters are left out.
    """
    words = _words(texts)
    stems = _stems(words)
    sizes = [len(surface or b"") for surface in token_bytes(tokenizer)]
    encodings = tokenizer.encode_batch_fast([f"а {word}" for word in stems], add_special_tokens=False)
    total = whole = 0
    for encoding, (word, stem) in zip(encodings, stems.items(), strict=True):
        length, ending = len(word.encode()), len(word[stem:].encode())
        # Counted from the end: what stands before the word doesn't matter.
        ends = accumulate(sizes[number] for number in reversed(encoding.ids))
        total += words[word]
        whole += words[word] * all(end <= ending or end >= length for end in ends)
    return whole / max(total, 1)


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
    kept = len(shared_tokens(new, old)) + len(shared)
    old_rows, new_rows = rows(old), rows(new)
    return {
        "old": old_rows,
        "new": new_rows,
        "kept": kept,
        "added": new_rows - kept,
        "dropped": old_rows - kept,
        "saved": old_rows - new_rows,
    }


def changed_ids(new: Tokenizer, old: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts whose ids differ between two tokenizers."""
    encodings = (tokenizer.encode_batch_fast(texts, add_special_tokens=False) for tokenizer in (new, old))
    return [text for text, left, right in zip(texts, *encodings, strict=True) if left.ids != right.ids]


def changed_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that do not decode to themselves after the tokenizer's own normaliser."""
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
    *,
    stems: bool = False,
) -> "pd.DataFrame":
    """Measure tokenizers on texts.

    Args:
        tokenizers: {vocabulary: tokenizer}.
        texts: {(language, name of the text): lines}.
        stems: add the column `stems_whole`, for Russian texts only.

    Returns one row for each pair: `vocabulary, language, text` and the columns of `measure`.

    Raises:
        RuadaptError: nothing to compare.
    """
    import pandas as pd

    if not tokenizers or not texts:
        raise RuadaptError("nothing to compare; give at least one tokenizer and one text")
    found: list[dict[str, Any]] = []
    for (language, name), lines in texts.items():
        listed = as_list(lines)
        for vocabulary, tokenizer in tokenizers.items():
            values = measure(tokenizer, listed)
            if stems and language == "ru":
                values["stems_whole"] = stems_whole(tokenizer, listed)
            found.append({"vocabulary": vocabulary, "language": language, "text": name, **values})
    return pd.DataFrame(found)
