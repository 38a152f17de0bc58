"""How many rows pay: speed-up = fertility gain x (1 - vocabulary tax), before anything is trained.

A forward pass that writes one token takes `t(V) = a + b V` seconds for a matrix of `V` rows: the body's share
does not know the vocabulary, the head multiplies every row. More rows make a pass longer (the tax,
`1 - t(V) / t(V + added)`) and passes fewer (the fertility gain, the ratio of characters per token).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import interval
from ruadapt.vocab import characters_per_token, rows, truncate


def fit_pass_time(heights: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return `a` and `b` of `t(V) = a + b V`, the line through timings of one body (least squares).

    Raises:
        RuadaptError: fewer than two different heights.
    """
    if len(set(heights)) < 2:
        raise RuadaptError("the vocabulary tax needs timings at two heights of the matrix")
    per_row, fixed = np.polyfit(heights, seconds, 1)
    return float(fixed), float(per_row)


def fertility_curve(
    original: Tokenizer, extended: Tokenizer, texts: Iterable[str], points: int = 12
) -> pd.DataFrame:
    """Measure an extension of the original as it was after fewer rows.

    Returns:
        `added_rows` (0, then `points` values up to all, evenly apart on a log scale), `characters_per_token`,
        `gain` (over the original, 1 without rows).

    Raises:
        RuadaptError: no rows were added, or the extension is none of the original (see `vocab.truncate`).
    """
    added = rows(extended) - rows(original)
    if added < 1:
        raise RuadaptError("a fertility curve needs a vocabulary with more rows than the original's")
    documents = list(texts)
    counts = np.unique(np.geomspace(max(1, added // 256), added, points).round().astype(int))
    shorter = (truncate(extended, original, int(count)) for count in counts)
    pace = np.array([characters_per_token(tokenizer, documents) for tokenizer in (original, *shorter)])
    return pd.DataFrame({"added_rows": [0, *counts], "characters_per_token": pace, "gain": pace / pace[0]})


def break_even(
    curve: pd.DataFrame, height: int, timings: pd.DataFrame, *, resamples: int = 1000
) -> pd.DataFrame:
    """Predict the speed-up for every number of added rows.

    Args:
        curve: `added_rows, gain`, as `fertility_curve` gives them.
        height: rows of the original's matrix.
        timings: `rows, repeat, seconds` of one pass, each repeat at each height (measured in turns).

    Returns:
        the curve with `tax` and `speed_up`, medians over the repeats, each with its 95 % bootstrap interval
        over repeats (`tax_low`, `tax_high`, …).

    Raises:
        RuadaptError: a repeat lacks a height, or there are fewer than two heights.
    """
    table = timings.pivot(index="repeat", columns="rows", values="seconds")
    if table.isna().any(axis=None) or not len(table):
        raise RuadaptError("every repeat must time every height of the matrix")
    heights, seconds = table.columns.to_list(), table.to_numpy(dtype=np.float64)
    added, gain = curve["added_rows"].to_numpy(), curve["gain"].to_numpy(dtype=np.float64)

    def taxes(chosen: NDArray[np.float64]) -> NDArray[np.float64]:
        fixed, per_row = fit_pass_time(heights, np.median(chosen, axis=0).tolist())
        return 1 - (fixed + per_row * height) / (fixed + per_row * (height + added))

    best = taxes(seconds)
    drawn = np.random.default_rng(0).integers(len(seconds), size=(resamples, len(seconds)))
    low, high = np.array(
        [interval(column) for column in np.array([taxes(seconds[few]) for few in drawn]).T]
    ).T
    return curve.assign(
        tax=best,
        tax_low=low,
        tax_high=high,
        speed_up=gain * (1 - best),
        speed_up_low=gain * (1 - high),
        speed_up_high=gain * (1 - low),
    )
