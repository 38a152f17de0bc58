"""How sure the scores are: bootstrap intervals over items and seeds."""

import zlib

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ruadapt.errors import RuadaptError

MODEL_COLUMNS = ["model", "stage", "vocabulary", "method", "calibration", "seed", "shots", "language"]
ITEM_COLUMNS = [*MODEL_COLUMNS, "group", "task", "metric", "id", "score"]
UNIT_COLUMNS = ["language", "group", "task", "metric", "id"]
SCORE_COLUMNS = [*MODEL_COLUMNS, "group", "task", "metric", "value", "low", "high", "items"]
MICRO = "micro"
_PERCENTILES = (2.5, 97.5)
# Normal quantiles: a two-sided test at 5 %, and a chance of 80 % to see what is there.
_SIDED, _POWER = 1.959964, 0.841621
_FEWEST = 20

Draws = NDArray[np.float64]


def interval(draws: Draws) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap draws `(resamples,)`."""
    low, high = np.percentile(draws, _PERCENTILES)
    return float(low), float(high)


def resampled_means(scores: NDArray[np.float64], resamples: int, seed: int, name: str = "") -> Draws:
    """Draw bootstrap means of `scores`, `(items,)` of one run or `(seeds, items)` of several.

    With several seeds each resample draws seeds and, within them, items (the same items for every seed), so
    the spread holds both sources. The items drawn depend only on `seed`, `name` and the number of items: two
    models scored on the same items get the same draws, which makes their difference a paired bootstrap.

    Returns:
        float64 `(resamples,)`.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    runs, items = table.shape
    means = table @ _item_weights(items, resamples, seed, name).T
    # Seeds are drawn apart from tasks: in one resample the same seeds stand for every task.
    run_weights = np.random.default_rng([seed, runs]).multinomial(
        runs, np.full(runs, 1 / runs), size=resamples
    )
    return np.einsum("sr,rs->r", means, run_weights / runs)


def resampled_ratios(
    over: NDArray[np.float64], under: NDArray[np.float64], resamples: int, seed: int, name: str = ""
) -> Draws:
    """Draw bootstrap ratios of two sums over the same items, `(items,)` each, as `resampled_means` does.

    Returns:
        float64 `(resamples,)`; 0 where nothing of `under` was drawn.
    """
    above, below = np.stack([over, under]) @ _item_weights(len(over), resamples, seed, name).T
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _item_weights(items: int, resamples: int, seed: int, name: str) -> Draws:
    """Return each item's share of each resample, `(resamples, items)`."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), items])
    return generator.multinomial(items, np.full(items, 1 / items), size=resamples) / items


def paired_differences(items: pd.DataFrame, against: pd.DataFrame) -> pd.DataFrame:
    """Return `items` with each score less the one of `against` for the same unit.

    By seed where `against` has several; otherwise its one run stands against each seed. `task_scores` of the
    result is a paired bootstrap over items (and seeds).

    Args:
        items: columns `ITEM_COLUMNS`, one configuration.
        against: the same of another.

    Raises:
        RuadaptError: the two were scored on different items.
    """
    units = [*UNIT_COLUMNS, *(["seed"] if against["seed"].nunique() > 1 else [])]
    right = against[[*units, "score"]].rename(columns={"score": "other"})
    joined = items.merge(right, on=units, how="left", validate="m:1")
    runs = 1 if "seed" in units else items["seed"].nunique()
    if joined["other"].isna().any() or len(right) * runs != len(joined):
        names = [" and ".join(map(str, table["model"].unique()[:2])) for table in (items, against)]
        raise RuadaptError(f"{names[0]} was scored on different items than {names[1]}; evaluate both again")
    return joined.assign(score=joined["score"] - joined["other"]).drop(columns="other")


def verdict(difference: float, low: float, high: float, items: int) -> str:
    """Say what an interval of a paired difference shows, and what would have been needed where it shows none.

    The standard error is that of the interval, `(high - low) / (2 · 1.96)`; it falls with the square root of
    the items. "Needed" means: seen by a two-sided test at 5 % four times out of five. Of several seeds it
    holds with as many seeds, whose own spread no item lowers. A handful of items bears no bootstrap.
    """
    if items < _FEWEST:
        return f"too few items to tell ({items:,} shown)"
    if low > 0 or high < 0:
        return f"difference detected ({items:,} items)"
    if low == high == difference:
        return f"no difference at all ({items:,} items)"
    reach = (_SIDED + _POWER) * (high - low) / (2 * _SIDED)
    more = ""
    if difference:
        more = f"{int(np.ceil(items * (reach / abs(difference)) ** 2)):,} items (or "
    return (
        f"no difference detected; {more}a difference of {reach:.3f}{')' if more else ''} would have been "
        f"needed ({items:,} items shown)"
    )


def task_scores(
    items: pd.DataFrame, *, resamples: int = 1000, seed: int = 0, over_seeds: bool = False
) -> pd.DataFrame:
    """Turn scored items into scores with 95 % intervals: tasks, groups (task "") and the micro average.

    A group is the mean over its tasks and the micro average the mean over all tasks of a language (METHOD,
    sec. 7), with items resampled within tasks. With `over_seeds` the adaptation seeds of one configuration
    are averaged (columns `model` and `seed` then say "all"), seeds and items resampled.

    Args:
        items: columns `ITEM_COLUMNS` (others are ignored), one row per scored unit.

    Returns:
        columns `SCORE_COLUMNS`; `items` counts the units of one seed.

    Raises:
        RuadaptError: no items, a missing column, an item without a finite score or scored twice, or a task
            whose items differ between seeds.
    """
    _check(items)
    keys = [column for column in MODEL_COLUMNS if not (over_seeds and column in ("model", "seed"))]
    rows: list[dict[str, object]] = []
    for key, part in items.groupby(keys, sort=False, dropna=False):
        base = {"model": "all", "seed": "all"} | dict(zip(keys, key, strict=True))
        tasks = _tasks(part, resamples, seed)
        for (group, task, metric), (value, draws, count) in tasks.items():
            rows.append(base | _row(group, task, metric, value, draws, count))
        groups = list(dict.fromkeys(group for group, _, _ in tasks))
        for group, members in [
            *((g, [t for k, t in tasks.items() if k[0] == g]) for g in groups),
            (MICRO, list(tasks.values())),
        ]:
            value, draws, count = _average(members)
            rows.append(base | _row(group, "", "", value, draws, count))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def _check(items: pd.DataFrame) -> None:
    missing = [column for column in ITEM_COLUMNS if column not in items]
    if missing or items.empty:
        raise RuadaptError(
            f"scores need items with the columns {ITEM_COLUMNS}; missing: {missing or 'every row'}"
        )
    if not np.isfinite(items["score"].astype(float)).all():
        raise RuadaptError("an item has no score; evaluate the model again instead of averaging the rest")
    if items.duplicated([*MODEL_COLUMNS, "group", "task", "id"]).any():
        raise RuadaptError("an item is scored twice for one model; drop the duplicate rows")


def _tasks(
    part: pd.DataFrame, resamples: int, seed: int
) -> dict[tuple[str, str, str], tuple[float, Draws, int]]:
    tasks = {}
    for (group, task, metric), rows in part.groupby(["group", "task", "metric"], sort=False):
        table = rows.assign(run=rows["model"].astype(str) + "/" + rows["seed"].astype(str))
        table = table.pivot(index="run", columns="id", values="score")
        if table.isna().any(axis=None):
            raise RuadaptError(
                f"task {task!r}: the seeds were not scored on the same items; evaluate them again"
            )
        scores = table.to_numpy(dtype=np.float64)
        name = f"{rows['language'].iat[0]}/{group}/{task}"
        draws = resampled_means(scores, resamples, seed, name)
        tasks[(group, task, metric)] = (float(scores.mean()), draws, scores.shape[1])
    return tasks


def _average(members: list[tuple[float, Draws, int]]) -> tuple[float, Draws, int]:
    values, draws, counts = zip(*members, strict=True)
    return float(np.mean(values)), np.mean(draws, axis=0), sum(counts)


def _row(group: str, task: str, metric: str, value: float, draws: Draws, count: int) -> dict[str, object]:
    low, high = interval(draws)
    labels = {"group": group, "task": task, "metric": metric}
    return {**labels, "value": value, "low": low, "high": high, "items": count}
