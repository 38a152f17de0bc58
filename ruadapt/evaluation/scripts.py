"""Stray scripts: letters in an answer whose script its prompt does not have, and tokens that write them."""

import codecs
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.vocab.surface import letter_script, token_bytes

ANY = "any"
IGNORED = "Latin"
"""The script that does not count as stray in total: names, code and formulas are Latin everywhere."""


@lru_cache(maxsize=65536)
def character_scripts(character: str) -> frozenset[str]:
    """Return the scripts of a character's letters as `vocab` names them ("Cyrillic", "Cjk", "Arabic", …).

    Compatibility forms count as what they stand for (NFKC): a full-width A is Latin, ㈱ holds a Han letter.
    Digits, punctuation (。 too) and signs have none.
    """
    return frozenset(map(letter_script, unicodedata.normalize("NFKC", character))) - {"", "Modifier"}


def forbidden_tokens(tokenizer: PreTrainedTokenizerBase, scripts: Collection[str]) -> list[int]:
    """Return the tokens that write letters of some scripts, for `generate(suppress_tokens=…)`.

    A byte-level token may be half a character: those whose half begins letters of these scripts alone are
    among them (0xE5 begins Han alone). Beginnings that other letters share (0xE3: kana, too) are not, so
    letters behind them, such as Han's rare extensions, can still be spelled byte by byte.

    Args:
        tokenizer: a fast tokenizer, byte-level or with byte fallback.
        scripts: names as `character_scripts` gives them.

    Raises:
        RuadaptError: no script, or none of its letters can be written by the vocabulary.
    """
    wanted = frozenset(scripts)
    own: set[bytes] = set()
    others: set[bytes] = set()
    # The surrogates are no characters, and no letter lies beyond plane 3.
    for character in map(chr, (*range(0x80, 0xD800), *range(0xE000, 0x40000))):
        if found := character_scripts(character):
            data = character.encode()
            (own if found & wanted else others).update(data[:length] for length in range(1, len(data)))
    alone, chosen = own - others, []
    for number, surface in enumerate(token_bytes(tokenizer.backend_tokenizer)):
        text, used = codecs.utf_8_decode(surface or b"", "replace", False)
        opened = (surface or b"")[used:]
        if opened in alone or any(character_scripts(c) & wanted for c in text):
            chosen.append(number)
    if not chosen:
        raise RuadaptError(
            f"no token writes a letter of {', '.join(scripts) or 'no script'}; "
            'scripts are spelled as Unicode does, such as "Cjk", "Hangul", "Arabic"'
        )
    return chosen


def stray_letters(prompt: str, answer: str) -> Counter[str]:
    """Count an answer's characters by script, for every script that the prompt does not have."""
    known = {name for character in set(prompt) for name in character_scripts(character)}
    return Counter(name for character in answer for name in character_scripts(character) if name not in known)


def stray_table(prompts: Sequence[str], answers: Sequence[str], listed: Collection[str] = ()) -> pd.DataFrame:
    """Tell how often answers slip into other scripts, one answer a prompt.

    Returns:
        a row for `ANY` script but `IGNORED`, then one a script found (that one too) or `listed`: `script`,
        `answers`, `empty` (of these), `strayed` (answers with such a letter), their `share` with `share_low,
        share_high` (95 %, Wilson), and the worst as `example`.

    Raises:
        RuadaptError: there is no answer, or all are empty.
    """
    from scipy.stats import binomtest  # slow to import, and of no use to who only forbids tokens

    if not any(answers):
        raise RuadaptError(
            "all answers are empty; see whether the model's chat template and weights are whole"
        )
    found = [stray_letters(asked, answer) for asked, answer in zip(prompts, answers, strict=True)]
    totals, rows = sum(found, Counter[str]()), []
    for name in dict.fromkeys([ANY, *(script for script, _ in totals.most_common()), *listed]):
        wanted = set(totals) - {IGNORED} if name == ANY else {name}
        letters = np.array([sum(counts[script] for script in wanted) for counts in found])
        strayed = int((letters > 0).sum())
        share = binomtest(strayed, len(answers)).proportion_ci(0.95, method="wilson")
        rows.append(
            {"script": name, "answers": len(answers), "empty": answers.count(""), "strayed": strayed}
            | {
                "share": strayed / len(answers),
                "share_low": float(share.low),
                "share_high": float(share.high),
            }
            | {"example": answers[int(letters.argmax())][:200] if strayed else ""}
        )
    return pd.DataFrame(rows)
