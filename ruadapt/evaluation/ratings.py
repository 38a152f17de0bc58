"""Ratings from pairwise battles: Bradley-Terry by scikit-learn's logistic regression.

For a battle of `i` and `j` with strengths `b`, log odds of `P(i wins) = 1 / (1 + exp(b_j - b_i))`. A tie is
half a win for either.
"""

import math

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
