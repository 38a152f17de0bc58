"""Stray scripts: letters in an answer whose script its prompt does not have, and how often they come."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ruadapt.errors import RuadaptError
from ruadapt.vocab.surface import letter_script

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


def stray_letters(prompt: str, answer: str) -> Counter[str]:
    """Count an answer's characters by script, for every script that the prompt does not have."""
    known = {name for character in set(prompt) for name in character_scripts(character)}
    return Counter(name for character in answer for name in character_scripts(character) if name not in known)


def stray_table(prompts: Sequence[str], answers: Sequence[str]) -> pd.DataFrame:
    """Tell how often answers slip into other scripts, one answer a prompt.

    Returns:
        a row for `ANY` script but `IGNORED`, then one a script found (that one too): `script`, `answers`,
        `empty` (of these), `strayed` (answers with such a letter), their `share` with `share_low,
        share_high` (95 %, Wilson), and the worst as `example`.

    Raises:
        RuadaptError: there is no answer, or all are empty.
    """
    if not any(answers):
        raise RuadaptError(
            "all answers are empty; see whether the model's chat template and weights are whole"
        )
    found = [stray_letters(asked, answer) for asked, answer in zip(prompts, answers, strict=True)]
    totals, rows = sum(found, Counter[str]()), []
    for name in [ANY, *(script for script, _ in totals.most_common())]:
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
