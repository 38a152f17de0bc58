"""Ratings from pairwise battles: Bradley-Terry with ties, by scikit-learn's logistic regression.

Davidson's form of the model (JASA 65, 1970): for a battle of `i` and `j` with strengths `b` (log odds),

    P(i wins) : P(tie) : P(j wins) = exp((b_i - b_j) / 2) : nu : exp((b_j - b_i) / 2),

so that the odds of a decided battle are Bradley and Terry's, however often the judge calls a tie. It is what
a multinomial regression gives without constraints when each battle is told twice, once from either side: the
likelihood is then symmetric, and so is its only maximum.
"""

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from ruadapt.errors import RuadaptError

POINTS = 400 / math.log(10)
"""Elo points of one unit of log odds: 400 points are odds of 10 : 1."""
MEAN = 1000.0
"""The mean of all ratings."""
# Keeps the rating of a model that wins (or loses) every battle finite; of no weight beside a hundred battles.
_PRIOR = 1000 / POINTS

Array = NDArray[np.float64]


def rate(
    battles: pd.DataFrame, *, length_controlled: bool = False, resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Rate models by their battles, with 95 % bootstrap intervals over questions.

    Args:
        battles: one row a verdict: `first`, `second` (names), `outcome` of the first (1 won, 0.5 tie, 0 lost)
            and `question` (all verdicts on one question are drawn together: they depend on each other).
            With `length_controlled` also `first_length` and `second_length` (characters of the answers).
        length_controlled: estimate what a longer answer is worth, `(l_i - l_j) / (l_i + l_j)` as a
            covariate, and rate as if all answers were equally long.
        resamples, seed: of the bootstrap. The same seed draws the same questions.

    Returns:
        one row a model, best first: `model`, `rating` with `rating_low, rating_high` (Elo points, mean
        `MEAN`), `difference` with its ends (from the model named first in `battles`, in the same resamples)
        and `battles, won, tied, lost`; `attrs["length"]` holds (points per unit of the covariate,
        low, high) where length is controlled. A model that won or lost every battle has no finite strength:
        a weak prior holds its rating, and its interval means nothing.

    Raises:
        RuadaptError: no battles, a model against itself, an outcome other than these, or models that no
            chain of battles connects.
    """
    names = list(dict.fromkeys(battles[["first", "second"]].to_numpy().ravel())) if len(battles) else []
    _check(battles, names)
    outcomes = battles["outcome"].to_numpy(dtype=np.float64)
    design = np.zeros((len(battles), len(names) + length_controlled))
    rows = np.arange(len(battles))
    for side, sign in (("first", 1.0), ("second", -1.0)):
        design[rows, battles[side].map(names.index).to_numpy()] = sign
    if length_controlled:
        lengths = battles[["first_length", "second_length"]].to_numpy(dtype=np.float64)
        # To two decimals, so that many battles are alike.
        design[:, -1] = ((lengths[:, 0] - lengths[:, 1]) / lengths.sum(axis=1).clip(min=1)).round(2)
    # Equal battles are one row with a weight: a few rows stand for any number of battles.
    table, kinds = np.unique(np.column_stack([design, outcomes]), axis=0, return_inverse=True)
    questions, asked = np.unique(battles["question"].astype(str).to_numpy(), return_inverse=True)
    generator = np.random.default_rng(seed)
    draws = np.empty((resamples, design.shape[1]))
    best = _fit(table, np.bincount(kinds, minlength=len(table)))
    # Checks of the same table over again would be a third of the time.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for number in tqdm(range(resamples), desc="bootstrap", leave=False):
            drawn = generator.multinomial(len(questions), np.full(len(questions), 1 / len(questions)))
            draws[number] = _fit(table, np.bincount(kinds, drawn[asked], len(table)))
    count = len(names)
    ratings, spread = best[:count] + MEAN, draws[:, :count] + MEAN
    result = pd.DataFrame(
        [
            {"model": name, "rating": ratings[place]}
            | dict(zip(("rating_low", "rating_high"), _interval(spread[:, place]), strict=True))
            | {"difference": ratings[place] - ratings[0]}
            | dict(
                zip(
                    ("difference_low", "difference_high"),
                    _interval(spread[:, place] - spread[:, 0]),
                    strict=True,
                )
            )
            | _counts(battles, outcomes, name)
            for place, name in enumerate(names)
        ]
    )
    if length_controlled:
        result.attrs["length"] = (float(best[-1]), *_interval(draws[:, -1]))
    return result.sort_values("rating", ascending=False, kind="stable", ignore_index=True)


def _fit(table: Array, weights: NDArray[Any]) -> Array:
    """Return coefficients in points for distinct battles (design and outcome) that occur `weights` times."""
    held = weights > 0
    design, outcomes, weights = table[held, :-1], table[held, -1], weights[held]
    if np.all(outcomes == 0.5):
        return np.zeros(design.shape[1])
    model = LogisticRegression(C=_PRIOR**2, tol=1e-7, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(
            np.vstack([design, -design]),
            (2 * np.concatenate([outcomes, 1 - outcomes])).astype(int),
            np.concatenate([weights, weights]) / 2,
        )
    # Losing, (a tie,) winning; with two classes the one row is the log odds itself.
    log_odds = model.coef_[0] if len(model.coef_) == 1 else model.coef_[-1] - model.coef_[0]
    return np.asarray(log_odds, dtype=np.float64) * POINTS


def _interval(draws: Array) -> tuple[float, float]:
    # Each end has 2.5 % beyond it for any number of draws; numpy's default is too narrow for a few hundred.
    low, high = np.percentile(draws, (2.5, 97.5), method="weibull")
    return float(low), float(high)


def _counts(battles: pd.DataFrame, outcomes: Array, name: str) -> dict[str, int]:
    own = np.concatenate(
        [
            outcomes[(battles["first"] == name).to_numpy()],
            1 - outcomes[(battles["second"] == name).to_numpy()],
        ]
    )
    sums = {"won": own == 1, "tied": own == 0.5, "lost": own == 0}
    return {"battles": len(own)} | {label: int(mask.sum()) for label, mask in sums.items()}


def _check(battles: pd.DataFrame, names: list[str]) -> None:
    if not names:
        raise RuadaptError("there is not one judged battle to rate by; see what the judge answered")
    if not battles["outcome"].isin([0, 0.5, 1]).all():
        raise RuadaptError("outcomes of battles are 1, 0.5 and 0; others have no meaning here")
    if (battles["first"] == battles["second"]).any():
        raise RuadaptError("a model fought itself; give every model its own name")
    groups = {name: {name} for name in names}
    for first, second in battles[["first", "second"]].drop_duplicates().itertuples(index=False):
        joined = groups[first] | groups[second]
        groups.update(dict.fromkeys(joined, joined))
    if len(groups[names[0]]) < len(names):
        apart = sorted(set(names) - groups[names[0]])
        raise RuadaptError(f"no battles connect {names[0]} with {', '.join(apart)}; let them fight")
