"""Ratings: known strengths come back within their intervals, ties count as they should."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from ruadapt.evaluation.arena import MEAN, POINTS, rate

STRENGTHS = np.array([-120.0, -20.0, 40.0, 100.0])  # points, mean 0


def simulate(seed: int, count: int) -> pd.DataFrame:
    """Draw battles without ties from Bradley and Terry's model."""
    generator = np.random.default_rng(seed)
    first = generator.integers(len(STRENGTHS), size=count)
    second = (first + generator.integers(1, len(STRENGTHS), size=count)) % len(STRENGTHS)
    chance = 1 / (1 + np.exp((STRENGTHS[second] - STRENGTHS[first]) / POINTS))
    return pd.DataFrame(
        {"question": np.arange(count), "outcome": (generator.random(count) < chance).astype(float)}
        | {"first": [f"m{number}" for number in first], "second": [f"m{number}" for number in second]}
    )


def test_known_strengths_come_back_in_95_percent_of_simulations() -> None:
    # 39 resamples: the least and the greatest are the ends that leave 2.5 % outside on either side.
    covered = np.zeros(len(STRENGTHS))
    for seed in range(40):
        table = rate(simulate(seed, 2_000), resamples=39).set_index("model")
        for number, strength in enumerate(STRENGTHS):
            low, high = table.loc[f"m{number}", ["rating_low", "rating_high"]]
            covered[number] += low <= strength + MEAN <= high
    assert covered.mean() >= 0.93 * 40, covered


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    battles = simulate(0, 3000)
    battles.loc[::5, "outcome"] = 0.5  # half a win for either
    first, second = (battles[side].str[1:].astype(int).to_numpy() for side in ("first", "second"))
    outcome = battles["outcome"].to_numpy()

    def loss(strengths: np.ndarray) -> float:
        gap = strengths[first] - strengths[second]
        return float(np.sum(outcome * np.logaddexp(0, -gap) + (1 - outcome) * np.logaddexp(0, gap)))

    best = minimize(loss, np.zeros(len(STRENGTHS)), method="BFGS").x
    table = rate(battles, resamples=2).set_index("model")
    for number, strength in enumerate(best - best.mean()):
        assert table.loc[f"m{number}", "rating"] == pytest.approx(MEAN + strength * POINTS, abs=0.5)


def test_two_models_give_the_log_odds_of_their_points() -> None:
    battles = pd.DataFrame(
        {"first": "a", "second": "b", "question": range(100), "outcome": [1.0] * 80 + [0.0] * 20}
    )
    table = rate(battles, resamples=200).set_index("model")
    gap = table.loc["a", "rating"] - table.loc["b", "rating"]
    assert gap == pytest.approx(400 * math.log10(80 / 20), abs=1)
    assert table["battles"].tolist() == [100, 100] and table["rating"].mean() == pytest.approx(MEAN)
    more = rate(pd.concat([battles, battles.assign(outcome=0.5)]), resamples=2).set_index("model")
    gap = more.loc["a", "rating"] - more.loc["b", "rating"]
    assert gap == pytest.approx(400 * math.log10(130 / 70), abs=1)  # a tie is half a win


def test_degenerate_battles_stay_finite() -> None:
    ties = pd.DataFrame({"first": "a", "second": "b", "question": range(5), "outcome": 0.5})
    assert rate(ties, resamples=10)["rating"].tolist() == pytest.approx([MEAN, MEAN])
    wins = ties.assign(outcome=1.0)
    table = rate(wins, resamples=10)
    assert table["model"].tolist() == ["a", "b"]
    assert np.isfinite(table[["rating", "rating_low", "rating_high"]].to_numpy()).all()


def test_verdicts_on_one_question_are_drawn_together() -> None:
    alone = simulate(1, 400)
    fourfold = pd.concat([alone] * 4, ignore_index=True)
    first, again = (rate(battles, resamples=200) for battles in (alone, fourfold))
    assert again["rating_high"].to_numpy() == pytest.approx(first["rating_high"].to_numpy(), abs=0.5)
    as_if_new = rate(fourfold.assign(question=range(1600)), resamples=200)
    assert (as_if_new["rating_high"] - as_if_new["rating_low"]).mean() < 0.6 * (
        first["rating_high"] - first["rating_low"]
    ).mean()
