"""What timings say: which vocabulary's size pays, and the pictures of it."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.breakeven import break_even, fertility_curve, fit_pass_time
from ruadapt.evaluation.speed import GENERATION
from ruadapt.reporting import plots
from ruadapt.vocab import load_tokenizer, rows

ORIGINAL = "original"
"""The name of the first model in every table; the taller copy's name begins with it."""


def fertility(folders: Mapping[str, Path], vocabulary: Path | None, texts: list[str]) -> pd.DataFrame | None:
    """Return the fertility curve of the largest extension of the original; None where there is none."""
    original = load_tokenizer(folders[ORIGINAL])
    known = original.get_vocab(with_added_tokens=True).items()
    candidates = (
        [vocabulary] if vocabulary else [folder for name, folder in folders.items() if name != ORIGINAL]
    )
    extended = [
        tokenizer for tokenizer in map(load_tokenizer, candidates) if known < tokenizer.get_vocab().items()
    ]
    if vocabulary and not extended:
        raise RuadaptError(
            f"{vocabulary} does not extend the original's vocabulary; see `ruadapt tokenizer extend`"
        )
    return fertility_curve(original, max(extended, key=rows), texts) if extended else None


def predictions(curve: pd.DataFrame, timed: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit the tax for each batch size to the original's two heights; predict speed-ups along the curve.

    `enough_added_rows` is the smallest vocabulary within 2 % of the best speed-up.
    """
    predicted, fits = [], []
    written = timed[timed["phase"] == GENERATION].assign(
        seconds=lambda table: table["seconds"] / table["passes"]
    )
    own = written[written["model"].str.startswith(ORIGINAL)]
    for size, part in own.groupby("batch_size"):
        height = int(part["rows"].min())
        table = break_even(curve, height, part[["rows", "repeat", "seconds"]]).assign(batch_size=size)
        medians = part.groupby("rows")["seconds"].median()
        fixed, per_row = fit_pass_time(medians.index.to_list(), medians.to_list())
        best = table.loc[table["speed_up"].idxmax()]
        enough = table[table["speed_up"] >= 0.98 * best["speed_up"]]
        fits.append(
            {"batch_size": size, "rows": height, "milliseconds_fixed": 1e3 * fixed}
            | {"nanoseconds_per_row": 1e9 * per_row, "best_added_rows": int(best["added_rows"])}
            | {"speed_up": best["speed_up"], "speed_up_low": best["speed_up_low"]}
            | {"speed_up_high": best["speed_up_high"], "enough_added_rows": int(enough["added_rows"].min())}
        )
        predicted.append(table)
    return pd.concat(predicted, ignore_index=True), pd.DataFrame(fits)


def draw_speed(table: pd.DataFrame, out: Path) -> None:
    phases = list(dict.fromkeys(table["phase"]))
    figure, axes = plots.panels(len(phases), width=plots.DOUBLE, height=2.6)
    for ax, phase in zip(axes, phases, strict=True):
        part = table[table["phase"] == phase].rename(columns={"ratio_low": "low", "ratio_high": "high"})
        part = part.assign(batch="batch " + part["batch_size"])
        plots.grouped_bars(ax, part, "batch", "model", "ratio", "speed, original = 1", title=phase)
    plots.legend(figure, axes)
    plots.save_figure(figure, out / "speed")


def draw_break_even(tables: Mapping[str, pd.DataFrame], timed: pd.DataFrame, out: Path) -> None:
    """Draw gain and predicted speed-up against added rows, and what the adapted models reached."""
    curve = tables["break_even"]
    names = [f"batch {size}" for size in curve["batch_size"].unique()]
    looks = plots.looks(names)
    figure, ax = plots.panels(height=2.8)
    gain = curve.drop_duplicates("added_rows")
    heights = timed.groupby("model")["rows"].first()
    measured = tables["speed"][tables["speed"]["phase"] == GENERATION]
    measured = measured[~measured["model"].str.startswith(ORIGINAL)]
    with plots.style():
        ax.plot(gain["added_rows"], gain["gain"], color="0.4", linestyle="--", label="fertility gain, no tax")
        for name, (size, part) in zip(names, curve.groupby("batch_size"), strict=True):
            look = looks[name]
            ax.plot(
                part["added_rows"],
                part["speed_up"],
                color=look.color,
                linestyle=look.linestyle,
                label=f"predicted, {name}",
            )
            ends = (part["speed_up_low"], part["speed_up_high"])
            ax.fill_between(part["added_rows"], *ends, color=look.color, alpha=0.2, linewidth=0)
            for row in measured[measured["batch_size"] == str(size)].itertuples():
                spans = [[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]]
                ax.errorbar(
                    [heights[row.model] - heights[ORIGINAL]],
                    [row.ratio],
                    spans,
                    fmt=look.marker,
                    color=look.color,
                    markeredgecolor="0.1",
                    markeredgewidth=0.4,
                    elinewidth=0.9,
                    capsize=2,
                    label=f"{row.model}, {name}",
                )
        ax.axhline(1, color="0.35", linewidth=0.8)
        ax.set_xlabel("added rows of the vocabulary")
        ax.set_ylabel("writing speed, original = 1")
    plots.legend(figure, ax, columns=2)
    plots.save_figure(figure, out / "break_even")
