"""Stray scripts: letters in an answer whose script its prompt does not have, and how often they come."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer
from ruadapt.evaluation.script_mask import character_scripts

ANY = "any"
IGNORED = "Latin"
"""The script that does not count as stray in total: names, code and formulas are Latin everywhere."""


def stray_letters(prompt: str, answer: str) -> Counter[str]:
    """Count an answer's characters by script, for every script that the prompt does not have."""
    known = {name for character in set(prompt) for name in character_scripts(character)}
    return Counter(name for character in answer for name in character_scripts(character) if name not in known)


def stray_table(
    prompts: Sequence[str], answers: Sequence[Answer], listed: Collection[str] = ()
) -> pd.DataFrame:
    """Tell how often answers slip into other scripts, one answer a prompt.

    Returns:
        a row for `ANY` script but `IGNORED`, then one a script found (that one too) or `listed`:
        `script`, `answers`, `strayed` (answers with such a letter), their `share` with `share_low,
        share_high` (95 %, Wilson), `per_1000` (such letters in 1,000 characters of all answers), and of the
        answers how many are `empty` and `cut`, and the worst as `example`.

    Raises:
        RuadaptError: there is no answer, or all are empty.
    """
    lengths = np.array([len(answer.text) for answer in answers])
    if not lengths.any():
        raise RuadaptError(
            "all answers are empty; see whether the model's chat template and weights are whole"
        )
    found = [stray_letters(asked, answer.text) for asked, answer in zip(prompts, answers, strict=True)]
    totals = sum(found, Counter[str]())
    rows = []
    for name in dict.fromkeys([ANY, *(script for script, _ in totals.most_common()), *listed]):
        wanted = set(totals) - {IGNORED} if name == ANY else {name}
        letters = np.array([sum(counts[script] for script in wanted) for counts in found])
        strayed = int((letters > 0).sum())
        share = binomtest(strayed, len(answers)).proportion_ci(0.95, method="wilson")
        rows.append(
            {"script": name, "answers": len(answers), "strayed": strayed, "share": strayed / len(answers)}
            | {"share_low": float(share.low), "share_high": float(share.high)}
            | {"per_1000": 1000 * int(letters.sum()) / int(lengths.sum())}
            | {"empty": int((lengths == 0).sum()), "cut": sum(answer.cut for answer in answers)}
            | {"example": answers[int(letters.argmax())].text[:200] if strayed else ""}
        )
    return pd.DataFrame(rows)
