"""What a vocabulary costs and holds: characters per token, whole words, scripts, rows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import cuts
from ruadapt.vocab.mapping import shared_specials, shared_tokens
from ruadapt.vocab.spec import as_list, rows
from ruadapt.vocab.surface import script, token_bytes

if TYPE_CHECKING:
    import pandas as pd  # slow to import: here only where a table is made


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Measure a tokenizer on texts, each on its own, without special tokens.

    Returns `characters_per_token` (characters / tokens, characters without newlines), `tokens`,
    `characters`, `tokens_per_word` (tokens / words between white space) and `whole_words`, the share of
    running words (letters only) that are one token inside a sentence.

    Raises:
        RuadaptError: no text.
    """
    lines = as_list(texts)
    tokens = sum(map(len, cuts(tokenizer, lines)))
    characters = sum(len(line) - line.count("\n") for line in lines)
    words = count_words(lines)
    # A word after another one, so that every family puts its own kind of space before it.
    before = len(tokenizer.encode("а", add_special_tokens=False))
    found = cuts(tokenizer, [f"а {word}" for word in words])
    whole = sum(count for ids, count in zip(found, words.values(), strict=True) if len(ids) == before + 1)
    return {
        "characters_per_token": characters / tokens,
        "tokens": tokens,
        "characters": characters,
        "tokens_per_word": tokens / sum(len(line.split()) for line in lines),
        "whole_words": whole / max(words.total(), 1),
    }


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Count the runs of letters in texts."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(r"[^\W\d_]+", text))
    return words


def composition(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the number of tokens of each script (see `surface.script`), most frequent first."""
    return dict(Counter(map(script, token_bytes(tokenizer))).most_common())


def row_report(new: Tokenizer, old: Tokenizer) -> dict[str, int]:
    """Count rows: `old`, `new`, `kept` (same surface or special), `added`, `dropped`, `saved` (old - new)."""
    kept = len(shared_tokens(new, old)) + len(shared_specials(new, old))
    before, after = rows(old), rows(new)
    changes = {"added": after - kept, "dropped": before - kept, "saved": before - after}
    return {"old": before, "new": after, "kept": kept, **changes}


def agreement(target: Tokenizer, draft: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Return how far a draft model's vocabulary speaks for a target's, as speculative decoding needs it.

    `ids`: the share of the target's ids that mean the same token in the draft; `text`: the share of the
    characters of `texts` in lines whose ids are the same in both. Engines refuse a draft, or translate every
    token through text, unless `ids` is 1.

    Raises:
        RuadaptError: no text.
    """
    lines = as_list(texts)
    total = rows(target)
    same = sum(target.id_to_token(number) == draft.id_to_token(number) for number in range(total))
    pairs = zip(lines, cuts(target, lines), cuts(draft, lines), strict=True)
    agreed = sum(len(line) for line, mine, other in pairs if mine == other)
    return {"ids": same / total, "text": agreed / sum(map(len, lines))}


def compare(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[tuple[str, str], Iterable[str]]
) -> "pd.DataFrame":
    """Measure tokenizers on texts.

    Args:
        tokenizers: {vocabulary: tokenizer}.
        texts: {(language, name of the text): lines}.

    Returns one row for each pair: `vocabulary, language, text` and the columns of `measure`.

    Raises:
        RuadaptError: nothing to compare.
    """
    import pandas as pd

    if not tokenizers or not texts:
        raise RuadaptError("nothing to compare; give at least one tokenizer and one text")
    listed = {key: as_list(lines) for key, lines in texts.items()}
    return pd.DataFrame(
        {"vocabulary": vocabulary, "language": language, "text": name, **measure(tokenizer, lines)}
        for (language, name), lines in listed.items()
        for vocabulary, tokenizer in tokenizers.items()
    )
