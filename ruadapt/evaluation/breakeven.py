"""What timings say: speed against the original, and how many rows pay.

Predicted before anything is trained: speed-up = fertility gain x (1 - vocabulary tax).

A forward pass that writes one token takes `t(V) = a + b V` seconds for a matrix of `V` rows: the body's share
does not know the vocabulary, the head multiplies every row. More rows make a pass longer (the tax,
`1 - t(V) / t(V + added)`) and passes fewer (the fertility gain, the ratio of characters per token).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import interval
from ruadapt.vocab import characters_per_token, load_tokenizer, rows, truncate

ORIGINAL = "original"
"""The name of the first model in every table; the taller copy's name begins with it."""


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


def fertility(folders: Mapping[str, Path], vocabulary: Path | None, texts: list[str]) -> pd.DataFrame | None:
    """Return the fertility curve of the largest extension of the original; None where there is none.

    Args:
        folders: models by name, `ORIGINAL` among them.
        vocabulary: the extension; by default the largest of `folders`.

    Raises:
        RuadaptError: `vocabulary` does not extend the original's.
    """
    original = load_tokenizer(folders[ORIGINAL])
    known = original.get_vocab(with_added_tokens=True).items()
    candidates = map(load_tokenizer, [vocabulary] if vocabulary else folders.values())
    extended = [tokenizer for tokenizer in candidates if known < tokenizer.get_vocab().items()]
    if vocabulary and not extended:
        raise RuadaptError(
            f"{vocabulary} does not extend the original's vocabulary; see `ruadapt tokenizer extend`"
        )
    return fertility_curve(original, max(extended, key=rows), texts) if extended else None


def predictions(curve: pd.DataFrame, timed: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit the tax for each batch size to the original's two heights; predict speed-ups along the curve.

    Args:
        curve: of `fertility_curve`.
        timed: columns `model, rows, batch_size, repeat, seconds_per_written_token`.

    Returns:
        `break_even` for each `batch_size`, and for each the fit and the best size; `enough_added_rows` is the
        smallest vocabulary within 2 % of the best speed-up.
    """
    predicted, fits = [], []
    written = timed[timed["model"].str.startswith(ORIGINAL)]
    written = written.rename(columns={"seconds_per_written_token": "seconds"})
    for size, part in written.groupby("batch_size"):
        height = int(part["rows"].min())
        table = break_even(curve, height, part[["rows", "repeat", "seconds"]]).assign(batch_size=size)
        medians = part.groupby("rows")["seconds"].median()
        fixed, per_row = fit_pass_time(medians.index.to_list(), medians.to_list())
        best = table.loc[table["speed_up"].idxmax()]
        enough = table[table["speed_up"] >= 0.98 * best["speed_up"]]
        fit = {"rows": height, "milliseconds_fixed": 1e3 * fixed, "nanoseconds_per_row": 1e9 * per_row}
        found = best[["speed_up", "speed_up_low", "speed_up_high"]].to_dict()
        sizes = {
            "best_added_rows": int(best["added_rows"]),
            "enough_added_rows": int(enough["added_rows"].min()),
        }
        fits.append({"batch_size": size} | fit | found | sizes)
        predicted.append(table)
    return pd.concat(predicted, ignore_index=True), pd.DataFrame(fits)
