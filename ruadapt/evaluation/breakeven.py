"""What timings say: speed against the original, and how many rows pay.

Predicted before anything is trained: speed-up = fertility gain x (1 - vocabulary tax).

A forward pass that writes one token takes `t(V) = a + b V` seconds for a matrix of `V` rows: the body's share
does not know the vocabulary, the head multiplies every row. More rows make a pass longer (the tax,
`1 - t(V) / t(V + added)`) and passes fewer (the fertility gain, the ratio of characters per token).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import ORIGINAL
from ruadapt.evaluation.statistics import interval
from ruadapt.vocab import characters_per_token, load_tokenizer, rows, truncate


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
        if ORIGINAL not in table or len(table) < 2 or table.isna().any(axis=None):
            raise RuadaptError(
                f"{place}: the original and two repeats of every model are needed; time them again"
            )
        drawn = np.random.default_rng(0).integers(len(table), size=(2000, len(table)))
        for name in part[model].unique():
            ratios = (table[name] / table[ORIGINAL]).to_numpy(float)
            low, high = interval(np.median(ratios[drawn], axis=1))
            pace = float(table[name].median())
            labels = part.loc[part[model] == name, [model, *np.atleast_1d(by)]].iloc[0].to_dict()
            row = {"characters_per_second": pace, "ratio": float(np.median(ratios)), "low": low, "high": high}
            found.append(labels | row | {"repeats": len(table)})
    return pd.DataFrame(found)


def fertility_curve(
    original: Path, extensions: Sequence[Path], texts: Sequence[str], points: int = 12
) -> pd.DataFrame | None:
    """Measure the largest extension of the original's vocabulary as it was after fewer rows.

    Args:
        original: folder of its tokenizer.
        extensions: folders of tokenizers; those that do not keep all of the original's ids are passed over.

    Returns:
        `added_rows` (0, then `points` values up to all, evenly apart on a log scale), `characters_per_token`,
        `gain` (over the original, 1 without rows); None where nothing extends the original.
    """
    old = load_tokenizer(original)
    known = old.get_vocab(with_added_tokens=True).items()
    larger = [one for one in map(load_tokenizer, extensions) if known < one.get_vocab().items()]
    if not larger:
        return None
    extended = max(larger, key=rows)
    added = rows(extended) - rows(old)
    counts = np.unique(np.geomspace(max(1, added // 256), added, points).round().astype(int))
    shorter = (truncate(extended, old, int(count)) for count in counts)
    pace = np.array([characters_per_token(tokenizer, texts) for tokenizer in (old, *shorter)])
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
    if table.isna().any(axis=None) or table.shape[1] < 2:
        raise RuadaptError("the vocabulary tax needs every repeat timed at two heights of the matrix")
    heights, seconds = table.columns.to_numpy(float), table.to_numpy(float)
    added, gain = curve["added_rows"].to_numpy(), curve["gain"].to_numpy(float)

    def tax(medians: NDArray[np.float64]) -> NDArray[np.float64]:
        per_row, fixed = np.polyfit(heights, medians, 1)
        return 1 - (fixed + per_row * height) / (fixed + per_row * (height + added))

    best = tax(np.median(seconds, axis=0))
    drawn = np.random.default_rng(0).integers(len(seconds), size=(resamples, len(seconds)))
    taxes = np.array([tax(medians) for medians in np.median(seconds[drawn], axis=1)])
    low, high = np.percentile(taxes, (2.5, 97.5), axis=0)
    return curve.assign(
        tax=best,
        tax_low=low,
        tax_high=high,
        speed_up=gain * (1 - best),
        speed_up_low=gain * (1 - high),
        speed_up_high=gain * (1 - low),
    )
