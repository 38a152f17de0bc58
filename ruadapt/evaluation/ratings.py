"""Ratings from pairwise battles: Bradley-Terry with ties, by scikit-learn's logistic regression.

Davidson's form of the model (JASA 65, 1970): for a battle of `i` and `j` with strengths `b` (log odds),

    P(i wins) : P(tie) : P(j wins) = exp((b_i - b_j) / 2) : nu : exp((b_j - b_i) / 2),

so that the odds of a decided battle are Bradley and Terry's, however often the judge calls a tie. It is what
a multinomial regression gives without constraints when each battle is told twice, once from either side: the
likelihood is then symmetric, and so is its only maximum.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

POINTS = 400 / math.log(10)
"""Elo points of one unit of log odds: 400 points are odds of 10 : 1."""
MEAN = 1000.0
"""The mean of all ratings."""
# Keeps the rating of a model that wins (or loses) every battle finite; of no weight beside a hundred battles.
_PRIOR = 1000 / POINTS

Array = NDArray[np.float64]


def rate(battles: pd.DataFrame, *, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Rate models by their battles, with 95 % bootstrap intervals over questions.

    Args:
        battles: one row a verdict: `first`, `second` (names), `outcome` of the first (1 won, 0.5 tie, 0 lost)
            and `question` (all verdicts on one question are drawn together: they depend on each other). Every
            model is tied to every other by a chain of battles, so there is one at least.
        resamples, seed: of the bootstrap. The same seed draws the same questions.

    Returns:
        one row a model, best first: `model`, `rating` with `rating_low, rating_high` (Elo points, mean
        `MEAN`), `difference` with its ends (from the model named first in `battles`, in the same resamples)
        and `battles, won, tied, lost`. A model that won or lost every battle has no finite strength: a weak
        prior holds its rating, and its interval means nothing.
    """
    codes, names = pd.factorize(battles[["first", "second"]].to_numpy().ravel())
    sides, count = codes.reshape(-1, 2), len(names)
    outcomes = battles["outcome"].to_numpy(dtype=np.float64)
    design = np.eye(count)[sides[:, 0]] - np.eye(count)[sides[:, 1]]
    # Equal battles are one row with a weight: a few rows stand for any number of battles.
    table, kinds = np.unique(np.column_stack([design, outcomes]), axis=0, return_inverse=True)
    asked, questions = pd.factorize(battles["question"].astype(str), sort=True)
    generator = np.random.default_rng(seed)
    even = np.full(len(questions), 1 / len(questions))
    best = _fit(table, np.bincount(kinds))
    draws = np.array(
        [
            _fit(table, np.bincount(kinds, generator.multinomial(len(questions), even)[asked]))
            for _ in tqdm(range(resamples), desc="bootstrap", leave=False)
        ]
    )
    result = pd.DataFrame({"model": names})
    # A rating is told from 0 as MEAN, a difference from the first model in the same resample.
    for column, zero, zeros in (("rating", -MEAN, -MEAN), ("difference", best[0], draws[:, :1])):
        result[column] = best - zero
        # Each end has 2.5 % beyond it for any number of draws; numpy's default is too narrow for a few.
        ends = np.percentile(draws - zeros, (2.5, 97.5), axis=0, method="weibull")
        result[f"{column}_low"], result[f"{column}_high"] = ends
    result["battles"] = np.bincount(codes)
    for name, score in {"won": 1.0, "tied": 0.5, "lost": 0.0}.items():
        own = np.stack([outcomes, 1 - outcomes], axis=1).ravel() == score
        result[name] = np.bincount(codes[own], minlength=count)
    return result.sort_values("rating", ascending=False, kind="stable", ignore_index=True)


def _fit(table: Array, weights: NDArray[Any]) -> Array:
    """Return coefficients in points for distinct battles (design and outcome) that occur `weights` times."""
    held = weights > 0
    design, outcomes, weights = table[held, :-1], table[held, -1], weights[held]
    if np.all(outcomes == 0.5):
        return np.zeros(design.shape[1])
    model = LogisticRegression(C=_PRIOR**2, tol=1e-7, max_iter=1000)
    model.fit(
        np.vstack([design, -design]),
        (2 * np.concatenate([outcomes, 1 - outcomes])).astype(int),
        np.concatenate([weights, weights]) / 2,
    )
    # Losing, (a tie,) winning; with two classes the one row is the log odds itself.
    log_odds = model.coef_[0] if len(model.coef_) == 1 else model.coef_[-1] - model.coef_[0]
    return np.asarray(log_odds, dtype=np.float64) * POINTS
