"""An arena: a judge compares models' answers two by two and in both orders, and battles give ratings.

Ratings are Bradley and Terry's strengths `b`: `P(i wins against j) = 1 / (1 + exp(b_j - b_i))`. A tie is half
a win for either. scikit-learn's logistic regression fits them.
"""

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
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.asking import ask_once
from ruadapt.files import project_root

# Russian judges write their own letters: А and В look the same.
OUTCOMES = {"A": 1.0, "А": 1.0, "B": 0.0, "В": 0.0, "=": 0.5}
"""What a verdict says of the answer shown first."""
POINTS = 400 / math.log(10)
"""Elo points of one unit of log odds: 400 points are odds of 10 : 1."""
MEAN = 1000.0
"""The mean of all ratings."""
# Keeps the rating of a model that wins (or loses) every battle finite; of no weight beside a hundred battles.
_PRIOR = 1000 / POINTS


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


def rate(battles: pd.DataFrame, *, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Rate models by their battles, with 95 % bootstrap intervals over questions.

    Args:
        battles: one row a verdict: `first`, `second` (names), `outcome` of the first (1 won, 0.5 tie, 0 lost)
            and `question` (all verdicts on one question are drawn together: they depend on each other). Every
            model is tied to every other by a chain of battles, so there is one at least.
        resamples, seed: of the bootstrap. The same seed draws the same questions.

    Returns:
        one row a model, best first: `model`, `rating, rating_low, rating_high` (Elo points, mean `MEAN`) and
        `battles`. A model that won or lost every battle has no finite strength: a weak prior holds its
        rating, and its interval means nothing.
    """
    codes, names = pd.factorize(battles[["first", "second"]].to_numpy().ravel())
    first, second = codes.reshape(-1, 2).T
    design = np.eye(len(names))[first] - np.eye(len(names))[second]
    outcomes = battles["outcome"].to_numpy(dtype=np.float64)
    sides, won = np.vstack([design, design]), np.repeat([1, 0], len(battles))
    regression = LogisticRegression(C=_PRIOR**2, fit_intercept=False, tol=1e-7, max_iter=1000)

    def rating(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return points for battles of these weights; each is told twice, as won and as lost."""
        regression.fit(sides, won, np.concatenate([weights * outcomes, weights * (1 - outcomes)]))
        return MEAN + POINTS * regression.coef_[0]

    asked, questions = pd.factorize(battles["question"])
    generator, even = np.random.default_rng(seed), np.full(len(questions), 1 / len(questions))
    draws = [
        rating(generator.multinomial(len(questions), even)[asked].astype(float))
        for _ in tqdm(range(resamples), desc="bootstrap", leave=False)
    ]
    # Each end has 2.5 % beyond it for any number of draws; numpy's default is too narrow for a few.
    low, high = np.percentile(draws, (2.5, 97.5), axis=0, method="weibull")
    ratings = {"rating": rating(np.ones(len(battles))), "rating_low": low, "rating_high": high}
    table = pd.DataFrame({"model": names, **ratings, "battles": np.bincount(codes)})
    return table.sort_values("rating", ascending=False, kind="stable", ignore_index=True)
