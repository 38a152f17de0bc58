"""An arena: models answer questions, a judge compares the answers two by two and in both orders."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.asking import ask_once
from ruadapt.files import project_root

# Russian judges write their own letters: А and В look the same.
OUTCOMES = {"A": 1.0, "А": 1.0, "B": 0.0, "В": 0.0, "=": 0.5}
"""What a verdict says of the answer shown first."""


def verdict(reply: str) -> float:
    """Return the outcome for the answer shown first, NaN unless a reply gives one without contradiction."""
    # What a reasoning model thinks before its answer is no verdict.
    letters = re.findall(rf"\[\[\s*([{''.join(OUTCOMES)}])\s*\]\]", reply.rpartition("</think>")[2])
    found = {OUTCOMES[letter] for letter in letters}
    return found.pop() if len(found) == 1 else math.nan


def judge_all(
    questions: Sequence[str],
    answered: Mapping[str, Sequence[str]],
    judge: Path | str,
    folder: Path,
    max_tokens: int = 1024,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Let a judge compare every two models on every question, in both orders.

    It is told what to do in the words of `data/arena/judge_ru.yaml`.

    Args:
        answered: answers of each model by its name, one a question.
        judge: a model's folder, or `MODEL@URL`.
        folder: where its replies are kept.

    Returns:
        battles with a verdict, one row an order: `question` (its number), `first, second, outcome` (of the
        first: 1, 0.5, 0); and `battles` in all, how many are `without_verdict` (a reply without one clear
        verdict, or none), and `agreement`: the share of pairs of orders with the same verdict.

    Raises:
        RuadaptError: as `ask_once`, or no verdict can be read.
    """
    words = yaml.safe_load((project_root() / "data" / "arena" / "judge_ru.yaml").read_text(encoding="utf-8"))
    told = Template(words["user"])
    orders = [order for pair in combinations(answered, 2) for order in (pair, pair[::-1])]
    battles = [(number, *order) for number in range(len(questions)) for order in orders]
    prompts = [
        told.substitute(
            question=questions[number], answer_a=answered[first][number], answer_b=answered[second][number]
        )
        for number, first, second in battles
    ]
    replies = ask_once(folder, judge, prompts, system=words["system"], max_tokens=max_tokens)
    outcomes = np.array([verdict(reply) for reply in replies])
    table = pd.DataFrame(battles, columns=["question", "first", "second"]).assign(outcome=outcomes)
    judged = table.dropna(ignore_index=True)
    if judged.empty:
        raise RuadaptError(
            f"the judge gave no verdict that can be read in {len(table)} battles; its replies are in "
            f"{folder}; take a stronger one"
        )
    one, turned = outcomes.reshape(-1, 2).T
    both = np.isfinite(one + turned)
    agreement = float((one == 1 - turned)[both].mean()) if both.any() else None
    about = {"battles": len(table), "without_verdict": len(table) - len(judged), "agreement": agreement}
    return judged, about
