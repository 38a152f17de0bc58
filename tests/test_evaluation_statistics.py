"""Intervals: known coverage, parts of the variance, pairing, what would be needed, and refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.coverage import SCORES, SEEDS, SHARES, coverage
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import (
    FINDING_COLUMNS,
    ITEM_COLUMNS,
    SCORE_COLUMNS,
    Estimate,
    estimate,
    findings,
    holm,
    paired_differences,
    ratio_estimate,
    sentence,
    task_scores,
)
from ruadapt.files import project_root


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


def test_intervals_cover_the_truth_whatever_the_seeds_do() -> None:
    """3, 5 and 10 seeds, whose variance is negligible, equal or dominant: 93 to 97 % in every cell."""
    table = coverage(simulations=2000)
    assert len(table) == len(SCORES) * len(SEEDS) * len(SHARES)
    # Four standard errors of 2,000 simulations are 0.02; the committed table below has five times as many.
    assert table["coverage"].between(0.93 - 0.005, 0.97 + 0.005).all(), table.to_string()
    assert (table.groupby(["scores", "seeds"])["median_width"].apply(np.diff).apply(min) > 0).all()


def test_the_committed_coverage_is_what_documents_may_quote() -> None:
    table = pd.read_csv(project_root() / "data" / "results" / "coverage.csv")
    cells = set(zip(table["scores"], table["seeds"], table["seed_variance"], strict=True))
    assert cells == {(kind, seeds, share) for kind in SCORES for seeds in SEEDS for share in SHARES}
    assert (table["simulations"] >= 10_000).all()
    assert table["coverage"].between(0.93, 0.97).all()


def test_one_seed_is_the_textbook_t_interval() -> None:
    scores = np.random.default_rng(0).random(40)
    found = estimate([scores[None]])
    low, high = found.interval()
    wanted = stats.t.interval(0.95, 39, scores.mean(), stats.sem(scores))
    assert (low, high) == pytest.approx(wanted)
    assert found.seeds == 1 and found.seed_part == found.mixed_part == 0


def test_intervals_of_ratios_cover_the_truth_from_twenty_documents_on() -> None:
    generator = np.random.default_rng(0)
    for documents, least in ((10, 0.91), (20, 0.92), (40, 0.93)):
        covered = []
        for _ in range(4_000):
            sizes = generator.lognormal(5, 0.6, documents)
            first = sizes * generator.normal(1.6, 0.25, documents)
            low, high = ratio_estimate(first * generator.normal(1.05, 0.08, documents), first).interval()
            covered.append(low <= 1.05 <= high)
        assert least <= np.mean(covered) <= 0.97


def test_a_ratio_to_equal_sizes_is_the_textbook_t_interval() -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.2, 30)
    low, high = ratio_estimate(scores, np.ones(30)).interval()
    assert np.allclose((low, high), stats.t.interval(0.95, 29, scores.mean(), stats.sem(scores)))
    one = ratio_estimate(np.array([3.0]), np.array([2.0]))  # one document says nothing of others
    assert one.value == 1.5 and np.isnan(one.interval()).all()
    two = [np.array([[0.5]]), np.array([[1.0]])]  # nor do two tasks of one item
    alone = estimate(two).row(difference=True)
    assert alone["value"] == 0.75 and np.isnan([alone["low"], alone["high"], alone["p"]]).all()
    assert not alone["detected"] and not alone["no_worse"]


def test_seeds_alone_are_the_textbook_t_interval() -> None:
    values = [0.40, 0.42, 0.47]
    wanted = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert estimate([np.array(values)[:, None]]).interval() == pytest.approx(wanted)
    # Items that don't differ add nothing.
    same = estimate([np.repeat(np.array(values)[:, None], 30, axis=1)])
    assert same.interval() == pytest.approx(wanted)
    assert np.isnan(estimate([np.array([[0.4]])]).interval()).all()  # one seed says nothing of others


def test_parts_of_the_variance_are_found() -> None:
    """Their means over many simulations are the variances that were put in; together they are the truth."""
    generator = np.random.default_rng(1)
    shape, of_seed, of_item, noise = (4000, 4, 1), 0.03, 0.3, 0.2
    tasks = [
        of_item * generator.standard_normal((4000, 1, count))
        + noise * generator.standard_normal((4000, 4, count))
        for count in (30, 60)
    ]
    shift = of_seed * generator.standard_normal(shape)
    found = estimate([task + shift for task in tasks])
    per_item = (1 / 30 + 1 / 60) / 4
    assert np.mean(found.item_part) == pytest.approx(of_item**2 * per_item, rel=0.03)
    together = found.seed_part + found.mixed_part
    assert np.mean(together) == pytest.approx(of_seed**2 / 4 + noise**2 / 4 * per_item, rel=0.03)
    assert np.var(found.value) == pytest.approx(np.mean(found.variance), rel=0.05)


def test_groups_and_micro_average_are_means_over_tasks_and_seeds_widen_intervals() -> None:
    rng = np.random.default_rng(0)
    scores = {"a": 0.2 * rng.random(10), "b": 0.2 * rng.random(50), "copy": 0.2 * rng.random(5)}
    table = task_scores(items(scores))
    assert list(table.columns) == SCORE_COLUMNS
    a, b, copy = (value(table, g, t) for g, t in [("knowledge", "a"), ("knowledge", "b"), ("copy", "copy")])
    assert value(table, "knowledge") == pytest.approx((a + b) / 2)
    assert value(table, "micro") == pytest.approx((a + b + copy) / 3)
    assert value(table, "micro", column="items") == 65
    apart = pd.concat(
        items({name: part + shift for name, part in scores.items()}, seed, f"m{seed}")
        for seed, shift in enumerate((0, 0.4, 0.8))
    )
    wide = task_scores(apart, over_seeds=True)
    assert value(wide, "micro") == pytest.approx(value(table, "micro") + 0.4)
    assert value(wide, "micro", column="items") == 65 and len(task_scores(apart)) == 3 * len(wide)
    assert (wide["high"] - wide["low"]).min() > 3 * (table["high"] - table["low"]).max()


def test_the_order_of_rows_does_not_matter() -> None:
    data = pd.concat([items({"a": np.arange(20.0) + seed}, seed, f"m{seed}") for seed in (1, 2)])
    first, second = (task_scores(rows, over_seeds=True) for rows in (data, data.iloc[::-1]))
    pd.testing.assert_frame_equal(first, second)


def test_unfit_items_are_refused() -> None:
    data = items({"a": np.ones(5)})
    with pytest.raises(RuadaptError, match="no score"):
        task_scores(data.assign(score=[1, 1, 1, 1, np.nan]))
    with pytest.raises(RuadaptError, match="twice"):
        task_scores(pd.concat([data, data]))
    with pytest.raises(RuadaptError, match="seeds"):
        task_scores(pd.concat([data, data.iloc[1:].assign(seed=1)]), over_seeds=True)
    more = items({"b": np.ones(5)}, seed=1)
    with pytest.raises(RuadaptError, match="seeds were not scored on the same items"):
        task_scores(
            pd.concat([data, items({"a": np.ones(5)}, seed=1), items({"b": np.ones(5)})]), over_seeds=True
        )
    with pytest.raises(RuadaptError, match="different items"):
        paired_differences(data, more)


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
    paired = task_scores(paired_differences(better, items({"a": base}, model="o")), difference=True).iloc[0]
    assert paired["low"] > 0 and paired["detected"] and paired["no_worse"] and paired["p"] < 1e-6
    assert np.isnan(paired["items_to_detect"])
    alone = task_scores(better).iloc[0]
    assert alone["high"] - alone["low"] > 10 * (paired["high"] - paired["low"])


def test_detected_and_no_worse_are_two_claims() -> None:
    for value, detected, no_worse in ((0.01, True, True), (-0.03, True, False), (0.001, False, True)):
        found = findings(Estimate(value, 0.0, 2e-5, 0.0, 1e-14, 5, 400))  # ± 0.009
        assert (found["detected"], found["no_worse"]) == (detected, no_worse)
    surely_worse_by_little = Estimate(-0.01, 0.0, 1e-6, 0.0, 1e-14, 5, 400)
    found = findings(surely_worse_by_little)
    assert found["detected"] and found["no_worse"] and list(found) == FINDING_COLUMNS


def shown(seeds: int, count: int, simulations: int = 4000) -> float:
    """Simulate how often a difference of 0.03 is detected with so many seeds and items."""
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(simulations // 500):
        shift = 0.01 * generator.standard_normal((500, seeds, 1))
        rest = 0.1 * generator.standard_normal((500, seeds, count))
        own = 0.2 * generator.standard_normal((500, 1, count))
        low, high = estimate([0.03 + shift + rest + own]).interval()
        found += int(np.sum((low > 0) | (high < 0)))
    return found / simulations


def test_what_would_have_been_needed_would_have_sufficed() -> None:
    """Simulated: with the named number of items, or of seeds, it is seen about four times out of five."""
    count, seeds = 100, 5
    parts = (0.01**2 / seeds, 0.2**2 / count, 0.1**2 / seeds / count)
    doubt = (parts[1] + parts[2]) ** 2 / (count - 1)
    measured = Estimate(0.03, *parts, doubt, seeds, count)
    needed = findings(measured)
    assert not needed["detected"] and count < needed["items_to_detect"] < 10_000
    assert shown(seeds, int(needed["items_to_detect"])) == pytest.approx(0.8, abs=0.05)
    # The items alone are too few for any number of seeds: 2.8 of their standard errors are 0.056.
    assert needed["seeds_to_detect"] == np.inf
    many = Estimate(0.03, 0.04**2 / seeds, 0.2**2 / 2000, 0.0, (0.2**2 / 2000) ** 2 / 1999, seeds, 2000)
    found = findings(many)
    assert found["items_to_detect"] == np.inf and 5 < found["seeds_to_detect"] < 40


def test_no_number_of_items_mends_a_value_beyond_the_margin() -> None:
    found = findings(Estimate(-0.03, 0.0, 0.03**2, 0.0, 1e-9, 5, 100))
    assert not found["no_worse"] and found["items_to_show_no_worse"] == np.inf
    alone = findings(Estimate(-0.01, 0.0, 0.03**2, 0.0, 1e-9, 1, 100))
    assert np.isfinite(alone["items_to_show_no_worse"]) and np.isnan(alone["seeds_to_show_no_worse"])


def test_findings_in_words() -> None:
    def said(estimated: Estimate) -> str:
        return sentence({**findings(estimated), "value": estimated.value, "items": estimated.items})

    assert said(Estimate(0.5, 0.0, 0.0, 0.0, 0.0, 1, 6)) == "too few items to tell (6 shown)"
    assert said(Estimate(0.1, 0.0, 1e-4, 0.0, 1e-10, 5, 200)) == (
        "difference detected; no worse by 0.02: shown"
    )
    words = said(Estimate(-0.01, 1e-5, 1e-4, 0.0, 1e-10, 5, 200))
    assert words.startswith("no difference detected (") and "no worse by 0.02: not shown (" in words
    assert "only more items and more seeds together would show the measured one" in words
    assert "nan" not in words and "inf" not in words
    worse = said(Estimate(-0.03, 0.0, 1e-3, 0.0, 1e-10, 5, 200))
    assert "items would show the measured one" in worse and worse.endswith("(the measured value is worse)")


def test_many_tests_are_corrected_for_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
