"""Intervals: known coverage, pairing, seeds, and refusals."""

import re

import numpy as np
import pandas as pd
import pytest

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import (
    ITEM_COLUMNS,
    SCORE_COLUMNS,
    interval,
    paired_differences,
    resampled_means,
    task_scores,
    verdict,
)


def items(
    scores: dict[str, np.ndarray], seed: object = 0, model: str = "m", group: str = "knowledge"
) -> pd.DataFrame:
    rows = [
        {
            "model": model,
            "stage": "lep",
            "vocabulary": "extended",
            "method": "swap",
            "calibration": "",
            "seed": seed,
            "shots": 0,
            "language": "ru",
            "group": group if task != "copy" else "copy",
            "task": task,
            "metric": "choice",
            "id": f"{task}{number}",
            "score": float(score),
        }
        for task, values in scores.items()
        for number, score in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


def value(table: pd.DataFrame, group: str, task: str = "", column: str = "value") -> float:
    return float(table[(table["group"] == group) & (table["task"] == task)][column].item())


def test_bootstrap_spread_is_the_standard_error_of_the_mean() -> None:
    scores = np.random.default_rng(0).random(400)
    draws = resampled_means(scores, 4000, seed=1)
    assert draws.mean() == pytest.approx(scores.mean(), abs=2e-3)
    assert draws.std() == pytest.approx(scores.std() / 20, rel=0.05)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        low, high = np.percentile(resampled_means(rng.random(60) < 0.6, 400, seed=trial), (2.5, 97.5))
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 198


def test_groups_and_micro_average_are_means_over_tasks() -> None:
    rng = np.random.default_rng(0)
    table = task_scores(items({"a": rng.random(10), "b": rng.random(50), "copy": rng.random(5)}))
    assert list(table.columns) == SCORE_COLUMNS
    a, b, copy = (value(table, g, t) for g, t in [("knowledge", "a"), ("knowledge", "b"), ("copy", "copy")])
    assert value(table, "knowledge") == pytest.approx((a + b) / 2)
    assert value(table, "micro") == pytest.approx((a + b + copy) / 3)
    assert value(table, "micro", column="items") == 65
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_the_same_seed_gives_the_same_table() -> None:
    data = items({"a": np.random.default_rng(0).random(20)})
    pd.testing.assert_frame_equal(task_scores(data, seed=3), task_scores(data.sample(frac=1), seed=3))
    assert not task_scores(data, seed=3).equals(task_scores(data, seed=4))


def test_seeds_widen_the_interval() -> None:
    base = np.random.default_rng(0).random(300) * 0.2
    apart = pd.concat(
        [items({"a": base + shift}, seed, f"m{seed}") for seed, shift in enumerate((0, 0.4, 0.8))]
    )
    alike = pd.concat([items({"a": base + 0.4}, seed, f"m{seed}") for seed in range(3)])
    wide, narrow = (task_scores(data, over_seeds=True) for data in (apart, alike))
    assert value(wide, "micro") == pytest.approx(value(narrow, "micro"))
    assert (wide["high"] - wide["low"]).min() > 5 * (narrow["high"] - narrow["low"]).max()
    assert value(wide, "micro", column="items") == 300
    assert len(task_scores(apart)) == 3 * len(wide)


def test_unfit_items_are_refused() -> None:
    data = items({"a": np.ones(5)})
    with pytest.raises(RuadaptError, match="no score"):
        task_scores(data.assign(score=[1, 1, 1, 1, np.nan]))
    with pytest.raises(RuadaptError, match="twice"):
        task_scores(pd.concat([data, data]))
    with pytest.raises(RuadaptError, match="missing"):
        task_scores(data.drop(columns="metric"))
    with pytest.raises(RuadaptError, match="seeds"):
        task_scores(pd.concat([data, data.iloc[1:].assign(seed=1)]), over_seeds=True)


def test_paired_differences_are_those_of_the_same_item_by_seed() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(40)
    first = pd.concat([items({"a": base + 0.1 * seed}, seed, f"m{seed}") for seed in (1, 2)])
    second = pd.concat([items({"a": base}, seed, f"o{seed}") for seed in (1, 2)]).sample(
        frac=1, random_state=0
    )
    paired = paired_differences(first, second)
    assert paired.groupby("seed")["score"].agg(["min", "max"]).to_numpy().ravel() == pytest.approx(
        [0.1, 0.1, 0.2, 0.2]
    )
    one = paired_differences(first, items({"a": base}, "", "original"))
    assert one["score"].to_list() == pytest.approx(paired["score"].to_list())
    with pytest.raises(RuadaptError, match="different items"):
        paired_differences(first, items({"a": base[1:]}, "", "original"))


def test_pairing_is_what_makes_small_differences_visible() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(300)
    better = items({"a": base + 0.02 + 0.01 * rng.standard_normal(300)})
    paired = task_scores(paired_differences(better, items({"a": base}, model="o"))).iloc[0]
    assert paired["low"] > 0
    alone = task_scores(better).iloc[0]
    assert alone["high"] - alone["low"] > 10 * (paired["high"] - paired["low"])


def test_the_interval_of_a_difference_covers_no_difference() -> None:
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        difference = (rng.random(60) < 0.5).astype(float) - (rng.random(60) < 0.5)
        low, high = interval(resampled_means(difference, 400, seed=trial))
        covered += low <= 0 <= high
    assert 180 <= covered <= 198


def test_what_would_have_been_needed_would_have_sufficed() -> None:
    """Simulated: with the named number of items the difference is seen about four times out of five."""
    rng = np.random.default_rng(4)
    said = verdict(0.02, -0.05, 0.09, 200)
    needed = int(re.findall(r"([\d,]+) items \(or", said)[0].replace(",", ""))
    spread = 0.14 / (2 * 1.96) * np.sqrt(200)
    draws = 0.02 + spread / np.sqrt(needed) * rng.standard_normal(20_000)
    seen = np.mean(draws > 1.96 * spread / np.sqrt(needed))
    assert said.startswith("no difference detected") and seen == pytest.approx(0.8, abs=0.01)
    assert "a difference of 0.100)" in said  # 2.8 standard errors of 0.0357
    assert "a difference of 0.100 would" in verdict(0.0, -0.07, 0.07, 200)
    assert verdict(0.0, 0.0, 0.0, 200) == "no difference at all (200 items)"
    assert verdict(0.1, 0.01, 0.2, 200) == "difference detected (200 items)"
    assert verdict(0.5, 0.5, 0.5, 6) == "too few items to tell (6 shown)"
