"""What timings say: which vocabulary's size pays, and the pictures of it."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.breakeven import break_even, fertility_curve, fit_pass_time
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
    own = timed[timed["model"].str.startswith(ORIGINAL)]
    own = own.rename(columns={"seconds_per_written_token": "seconds"})
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
    """Draw how fast each model reads and writes, times the original, by batch size."""
    phases = list(dict.fromkeys(table["phase"]))
    figure, _ = plots.panels(len(phases), width=plots.DOUBLE, height=2.6)
    table = table.rename(columns={"ratio_low": "low", "ratio_high": "high"})
    table["batch"] = "batch " + table["batch_size"].astype(str)
    for ax, phase in zip(figure.axes, phases, strict=True):
        part = table[table["phase"] == phase]
        plots.grouped_bars(ax, part, "batch", "model", "ratio", "speed, original = 1", title=phase)
    plots.legend(figure, figure.axes)
    plots.save_figure(figure, out / "speed")


def draw_break_even(tables: Mapping[str, pd.DataFrame], timed: pd.DataFrame, out: Path) -> None:
    """Draw gain and predicted speed-up against added rows, and what the adapted models reached."""
    curve, measured = tables["break_even"], tables["speed"]
    measured = measured[(measured["phase"] == "writing") & ~measured["model"].str.startswith(ORIGINAL)]
    heights = timed.groupby("model")["rows"].first()
    figure, ax = plots.panels(height=2.8)
    with plots.style():
        gain = curve.drop_duplicates("added_rows")
        ax.plot(gain["added_rows"], gain["gain"], color="0.4", linestyle="--", label="fertility gain, no tax")
        looks = plots.looks([f"batch {size}" for size in curve["batch_size"].unique()])
        for (name, look), (size, part) in zip(looks.items(), curve.groupby("batch_size"), strict=True):
            line = {"color": look.color, "linestyle": look.linestyle, "label": f"predicted, {name}"}
            ax.plot(part["added_rows"], part["speed_up"], **line)
            ends = (part["speed_up_low"], part["speed_up_high"])
            ax.fill_between(part["added_rows"], *ends, color=look.color, alpha=0.2, linewidth=0)
            for row in measured[measured["batch_size"] == size].itertuples():
                point = ([heights[row.model] - heights[ORIGINAL]], [row.ratio])
                spans = [[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]]
                drawn = {"fmt": look.marker, "color": look.color, "label": f"{row.model}, {name}"}
                ax.errorbar(*point, spans, capsize=2, **drawn)
        ax.axhline(1, color="0.35", linewidth=0.8)
        ax.set(xlabel="added rows of the vocabulary", ylabel="writing speed, original = 1")
    plots.legend(figure, ax, columns=2)
    plots.save_figure(figure, out / "break_even")
