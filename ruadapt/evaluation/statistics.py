"""How sure the scores are: intervals of means over seeds and items, differences, and what would show them.

Scores `x[s, i]` belong to seeds `s` and to items `i` within fixed tasks; every seed answers the same items.
The micro average is the mean over T tasks of the mean over items. Three pieces make up its variance:

    A = variance over seeds of the seed's micro average / S                 (seeds and noise)
    B = sum over tasks of the variance over items of the item's mean / I_t T^2    (items and noise)
    C = sum over tasks of the variance of what neither explains / S I_t T^2       (the noise, in both)

    variance = A + max(0, B - C)
    1 / degrees of freedom = (A / variance)^(4/3) / (S - 1) + (spread of B - C) / variance^2

The second line is Satterthwaite's but for one thing: he squares the seeds' share. Squared, intervals of
three seeds cover the truth in 92 % where the seeds' variance dominates, because it is estimated too small and
of too many degrees at once; with 4/3 all of them cover it in 93 to 97 % (`benchmarks.coverage`). With
one seed only the items count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from ruadapt.errors import RuadaptError

MODEL_COLUMNS = ["model", "stage", "vocabulary", "method", "calibration", "seed", "shots", "language"]
ITEM_COLUMNS = [*MODEL_COLUMNS, "group", "task", "metric", "id", "score"]
UNIT_COLUMNS = ["language", "group", "task", "metric", "id"]
SCORE_COLUMNS = [*MODEL_COLUMNS, "group", "task", "metric", "value", "low", "high", "items"]
FINDING_COLUMNS = ["detected", "no_worse", "items_to_detect", "seeds_to_detect"]
FINDING_COLUMNS += ["items_to_show_no_worse", "seeds_to_show_no_worse", "p"]
MICRO = "micro"
NO_WORSE_MARGIN = 0.02
"""A model is called no worse where the 95 % interval of its difference lies above minus this."""
FEWEST_ITEMS = 20
"""Fewer items bear no claim: their spread itself is hardly known."""
SHARE_POWER = 4 / 3
"""Power of the seeds' share of the variance in the degrees of freedom; see above."""
_POWER = 0.8
_MORE = np.geomspace(1, 1e6, 700)  # times as many: in steps of two percent, as far as anybody would go

Floats = NDArray[np.float64]
Number = Any  # a float, or an array with one float for each of many estimates


@dataclass(frozen=True)
class Estimate:
    """A mean with the parts of its variance; numbers, or arrays of one shape with many means.

    Attributes:
        value: the mean.
        seed_part: variance that only more seeds lower.
        item_part: variance that only more items lower.
        mixed_part: variance that both lower: noise of single answers.
        item_noise: how badly `item_part` is known, as a squared variance over its degrees of freedom.
        seeds, items: how many seeds, and items of one seed.
    """

    value: Number
    seed_part: Number
    item_part: Number
    mixed_part: Number
    item_noise: Number
    seeds: Number
    items: int

    @property
    def variance(self) -> Number:
        """The variance of the mean."""
        return self.seed_part + self.item_part + self.mixed_part

    @property
    def degrees(self) -> Number:
        """Degrees of freedom of the variance; not below those of the seeds, where there are several."""
        total = np.maximum(self.variance, np.finfo(float).tiny ** 0.5)
        of_seeds = np.maximum(1, np.asarray(self.seeds) - 1)
        share = (self.seed_part + self.mixed_part) / total
        inverse = self.item_noise / total**2 + share**SHARE_POWER / of_seeds
        return 1 / np.clip(inverse, 1e-9, 1 / of_seeds)

    def reach(self, power: float = 0.5) -> Number:
        """Return the distance that a two-sided test at 5 % detects with this power."""
        quantiles = stdtrit(self.degrees, 0.975) + stdtrit(self.degrees, power)
        return quantiles * np.sqrt(self.variance)

    def interval(self) -> tuple[Number, Number]:
        """Return the ends of the 95 % interval."""
        half = self.reach()
        return self.value - half, self.value + half

    def row(self, difference: bool = False) -> dict[str, Any]:
        """Return `value, low, high` (95 %), `items, seeds`, and what a `difference` shows (`findings`)."""
        low, high = map(float, self.interval())
        row = {"value": float(self.value), "low": low, "high": high, "items": self.items}
        return row | (findings(self) if difference else {}) | {"seeds": self.seeds}

    def chance(self) -> float:
        """Return the two-sided p value of the mean being 0."""
        if self.variance == 0:
            return float(self.value == 0)
        return float(2 * stdtr(self.degrees, -abs(self.value) / np.sqrt(self.variance)))

    def needed(self, distance: float) -> dict[str, float]:
        """Return how many `items` of the same seeds, or `seeds` of the same items, show `distance` four times
        out of five (within 2 %).

        Infinity where no number does, since the other part alone is too large; NaN for seeds where there is
        one, which says nothing about others.
        """
        fewer = {"item_part": self.item_part / _MORE, "mixed_part": self.mixed_part / _MORE}
        items = replace(self, **fewer, item_noise=self.item_noise / _MORE**3)
        seeds = np.unique(np.ceil(2 * _MORE))
        less = self.seeds / seeds
        fewer = {"seed_part": self.seed_part * less, "mixed_part": self.mixed_part * less}
        tried = {"items": (np.ceil(self.items * _MORE - 1e-6), items)}
        tried["seeds"] = (seeds, replace(self, **fewer, seeds=seeds))
        found = {}
        for name, (numbers, estimates) in tried.items():
            enough = estimates.reach(power=_POWER) <= distance
            found[name] = float(numbers[enough.argmax()]) if enough.any() else float("inf")
        return found if self.seeds > 1 else found | {"seeds": float("nan")}


def estimate(tasks: Sequence[Floats]) -> Estimate:
    """Estimate the mean over tasks of the mean over seeds and items, and its variance.

    Args:
        tasks: scores of each task, float `(…, seeds, items)`; seeds stand in the same order in all tasks.
            A task of one item, such as bits per byte of a fixed text, adds nothing to the variance that items
            give. Where nothing gives any (one seed, and one item in each task), the variance is NaN: one
            number says nothing of others.
    """
    share = 1 / len(tasks) ** 2
    seeds = tasks[0].shape[-2]
    averages = np.mean([task.mean(axis=-1) for task in tasks], axis=0)  # of each seed
    from_seeds = averages.var(axis=-1, ddof=1) / seeds if seeds > 1 else np.zeros(averages.shape[:-1])
    from_items, noise, doubt = (np.zeros_like(from_seeds) for _ in range(3))
    for task in tasks:
        items = task.shape[-1]
        if items < 2:
            continue
        of_items = task.mean(axis=-2)
        here = share * of_items.var(axis=-1, ddof=1) / items
        from_items, doubt = from_items + here, doubt + here**2 / (items - 1)
        if seeds > 1:
            rest = task - of_items[..., None, :] - task.mean(axis=-1, keepdims=True)
            rest = rest + of_items.mean(axis=-1)[..., None, None]
            freedom = (seeds - 1) * (items - 1)
            here = share * (rest**2).sum(axis=(-2, -1)) / freedom / (seeds * items)
            noise, doubt = noise + here, doubt + here**2 / freedom
    if seeds == 1 and all(task.shape[-1] == 1 for task in tasks):
        from_items = np.full_like(from_seeds, np.nan)
    mixed = np.minimum(from_seeds, noise)
    parts = (averages.mean(axis=-1), from_seeds - mixed, np.maximum(0, from_items - noise), mixed, doubt)
    return Estimate(*parts, seeds, sum(task.shape[-1] for task in tasks))


def ratio_estimate(over: Floats, under: Floats) -> Estimate:
    """Estimate a ratio of two sums over items: bits over bytes, or one model's bits over another's.

    To first order the ratio's deviations are the items' own `over - ratio * under`, in units of the mean of
    `under` (the delta method). For documents of unequal length its intervals cover the truth in 93 to 95 %
    from 20 documents on, and in 92 % for 10 (a test simulates it). One item says nothing of others: its
    interval is NaN.

    Args:
        over, under: float `(items,)`, of the same items.
    """
    ratio, items = over.sum() / under.sum(), len(over)
    deviations = (over - ratio * under) / under.mean()
    variance = float(deviations.var(ddof=1)) / items if items > 1 else float("nan")
    return Estimate(float(ratio), 0.0, variance, 0.0, variance**2 / max(1, items - 1), 1, items)


def findings(difference: Estimate) -> dict[str, float | bool]:
    """Return what a difference shows, and what would have shown it: `FINDING_COLUMNS`.

    It is detected where its 95 % interval excludes 0, and no worse where the interval lies above
    -`NO_WORSE_MARGIN`. `items_to_detect` items of the same seeds, or `seeds_to_detect` seeds of the same
    items, would show the measured difference four times out of five; likewise for "no worse". NaN: it is
    shown, or (seeds) nothing is known about seeds. Infinity: no number is enough, as the other part alone is
    too large, or as the measured value itself lies on the wrong side. `p` is that of one two-sided test of 0.
    """
    low, high = difference.interval()
    claims = {
        "detect": (bool(low > 0 or high < 0), abs(difference.value)),
        "show_no_worse": (bool(low > -NO_WORSE_MARGIN), difference.value + NO_WORSE_MARGIN),
    }
    detected, no_worse = (shown for shown, _ in claims.values())
    found: dict[str, float | bool] = {"detected": detected, "no_worse": no_worse}
    for goal, (shown, distance) in claims.items():
        needed = dict.fromkeys(("items", "seeds"), float("nan" if shown else "inf"))
        if not shown and distance > 0:
            needed = difference.needed(distance)
        found |= {f"{name}_to_{goal}": number for name, number in needed.items()}
    return found | {"p": difference.chance()}


def sentence(row: Mapping[str, Any] | pd.Series) -> str:
    """Say in words what a row of differences shows: `value`, `items` and `FINDING_COLUMNS`."""
    if row["items"] < FEWEST_ITEMS:
        return f"too few items to tell ({row['items']:,} shown)"

    def needed(goal: str) -> str:
        numbers = {name: row[f"{name}_to_{goal}"] for name in ("items", "seeds")}
        told = [f"{number:,.0f} {name}" for name, number in numbers.items() if np.isfinite(number)]
        return " or ".join(told) or "only more items and more seeds together"

    said = "difference detected" if row["detected"] else "no difference detected"
    if not row["detected"] and row["value"]:
        said += f" ({needed('detect')} would show the measured one)"
    said += f"; no worse by {NO_WORSE_MARGIN}: "
    if row["no_worse"]:
        return said + "shown"
    worse = row["value"] <= -NO_WORSE_MARGIN
    why = "the measured value is worse" if worse else f"{needed('show_no_worse')} would show it"
    return f"{said}not shown ({why})"


def holm(chances: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in the same order."""
    order = np.argsort(chances)
    factors = len(chances) - np.arange(len(chances))
    corrected = np.maximum.accumulate(np.minimum(1, np.asarray(chances)[order] * factors))
    return corrected[np.argsort(order)].tolist()


def speed_ratios(
    speed: pd.DataFrame, model: str = "vocabulary", by: str | list[str] = "language"
) -> pd.DataFrame:
    """Compare generation speed with the original's: medians over repeats, with 95 % bootstrap intervals.

    The ratio is taken within each repeat, where the models took turns: a slow moment of the machine falls on
    both sides.

    Args:
        speed: columns `model`, `by`, `repeat`, `characters_per_second`.

    Returns:
        columns `model`, `by`, `characters_per_second, ratio, repeats`, and `low, high` of the ratio.

    Raises:
        RuadaptError: the original or a repeat is missing, or there are fewer than two repeats.
    """
    found = []
    for place, part in speed.groupby(by, sort=False):
        table = part.pivot(index="repeat", columns=model, values="characters_per_second")
        if "original" not in table or len(table) < 2 or table.isna().any(axis=None):
            raise RuadaptError(
                f"{place}: the original and two repeats of every model are needed; time them again"
            )
        ratios = table.div(table["original"], axis=0)
        drawn = np.random.default_rng(0).integers(len(table), size=(2000, len(table)))
        low, high = np.percentile(np.median(ratios.to_numpy()[drawn], axis=1), (2.5, 97.5), axis=0)
        pace = {"characters_per_second": table.median(), "ratio": ratios.median(), "low": low, "high": high}
        labels = part.drop_duplicates(model)[[model, *np.atleast_1d(by)]]
        found.append(labels.merge(pd.DataFrame(pace).assign(repeats=len(table)), on=model))
    return pd.concat(found, ignore_index=True)


def paired_differences(items: pd.DataFrame, against: pd.DataFrame) -> pd.DataFrame:
    """Return `items` with each score less the one of `against` for the same unit.

    By seed where `against` has several; otherwise its one run stands against each seed.

    Args:
        items: columns `ITEM_COLUMNS`, one configuration.
        against: the same of another.

    Raises:
        RuadaptError: the two were scored on different items, or with different seeds.
    """
    units = [*UNIT_COLUMNS, *(["seed"] if against["seed"].nunique() > 1 else [])]
    right = against[[*units, "score"]].rename(columns={"score": "other"})
    joined = items.merge(right, on=units, how="left", validate="m:1")
    runs = 1 if "seed" in units else items["seed"].nunique()
    if joined["other"].isna().any() or len(right) * runs != len(joined):
        names = [" and ".join(map(str, table["model"].unique()[:2])) for table in (items, against)]
        raise RuadaptError(f"{names[0]} was scored on different items than {names[1]}; evaluate both again")
    return joined.assign(score=joined["score"] - joined["other"]).drop(columns="other")


def task_scores(items: pd.DataFrame, *, over_seeds: bool = False, difference: bool = False) -> pd.DataFrame:
    """Turn scored items into scores with 95 % intervals: tasks, groups (task "") and the micro average.

    A group is the mean over its tasks and the micro average the mean over all tasks of a language. With
    `over_seeds` the adaptation seeds of one configuration are averaged (columns `model` and `seed` then say
    "all") and their spread is in the interval.

    Args:
        items: columns `ITEM_COLUMNS` (others are ignored), one row per scored unit.

    Returns:
        columns `SCORE_COLUMNS`, and with `difference` (of `paired_differences`) what they show in
        `FINDING_COLUMNS`; `items` counts the units of one seed.

    Raises:
        RuadaptError: as `by_task`.
    """
    keys = [name for name in MODEL_COLUMNS if not (over_seeds and name in ("model", "seed"))]
    rows = []
    for key, part in items.groupby(keys, sort=False, dropna=False):
        base = {"model": "all", "seed": "all"} | dict(zip(keys, key, strict=True))
        tasks = {label[1:]: table for label, table in by_task(part).items()}
        means = {label: [table] for label, table in tasks.items()}
        for (group, _, _), table in tasks.items():
            means.setdefault((group, "", ""), []).append(table)
        means[MICRO, "", ""] = list(tasks.values())
        for (group, task, metric), tables in means.items():
            labels = base | {"group": group, "task": task, "metric": metric}
            rows.append(labels | estimate(tables).row(difference))
    return pd.DataFrame(rows, columns=[*SCORE_COLUMNS, *(FINDING_COLUMNS if difference else [])])


def by_task(items: pd.DataFrame) -> dict[tuple[str, str, str, str], Floats]:
    """Return the scores of one configuration, `(seeds, items)`, by `(language, group, task, metric)`.

    Raises:
        RuadaptError: an item without a finite score or scored twice, or a task whose items differ between
            seeds.
    """
    if not np.isfinite(items["score"].astype(float)).all():
        raise RuadaptError("an item has no score; evaluate the model again instead of averaging the rest")
    items = items.assign(run=items["model"].astype(str) + "/" + items["seed"].astype(str))
    if items.duplicated(["run", *UNIT_COLUMNS]).any():
        raise RuadaptError("an item is scored twice for one model; drop the duplicate rows")
    tables = {}
    for label, rows in items.groupby(UNIT_COLUMNS[:-1], sort=False, observed=True):
        table = rows.pivot(index="run", columns="id", values="score")
        if table.isna().any(axis=None) or len(table) < items["run"].nunique():
            raise RuadaptError(
                f"task {label[2]!r}: the seeds were not scored on the same items; evaluate them again"
            )
        tables[label] = table.to_numpy(dtype=np.float64)
    return tables
