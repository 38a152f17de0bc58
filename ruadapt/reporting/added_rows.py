"""What added rows buy: characters per token of real vocabularies, and the speed-up that timings predict.

`benchmarks.vocab --curves` measures the first into `data/results`, `ruadapt speed` the second.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ruadapt.files import project_root
from ruadapt.reporting import plots

NAME = "vocabulary_rows"
CURVES = project_root() / "data" / "results" / f"{NAME}.csv"
"""The measured curves: `rule, text, added_rows, characters_per_token, low, high`."""


def curve_table(table: pd.DataFrame) -> str:
    """Return the curves as a Markdown table: a row for each rule, "first text / second text" in each cell."""
    keys = ["rule", "added_rows", "text"]
    cells = table.set_index(keys)["characters_per_token"].map("{:.2f}".format).unstack(sort=False)
    cells = cells.fillna("–").agg(" / ".join, axis=1).unstack(sort=False).sort_index(axis=1)
    cells = cells.fillna(" / ".join("–" for _ in table["text"].unique()))
    rows = [["added rows", *(f"{size:,}" for size in cells)], ["---"] * (len(cells.columns) + 1)]
    rows += [[rule, *row] for rule, row in zip(cells.index, cells.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_curves(table: pd.DataFrame) -> Figure:
    """Draw the curves, one panel a text, with their intervals."""
    figure, axes = plots.panels(columns=table["text"].nunique(), width=plots.DOUBLE, height=2.8, sharey=True)
    for ax, (text, part) in zip(figure.axes, table.groupby("text", sort=False), strict=True):
        # As many lines as can be told apart: what BPE donors give is in the table.
        drawn = part[(part["added_rows"] > 0) & ~part["rule"].str.startswith("BPE")]
        ax.set_xscale("log")
        labels = ("added rows", "characters per Russian token", str(text))
        plots.lines(ax, drawn, "added_rows", "characters_per_token", "rule", *labels)
    plots.legend(figure, axes, columns=4)
    return figure


def draw_break_even(curve: pd.DataFrame, measured: pd.DataFrame, added_rows: Mapping[str, int]) -> Figure:
    """Draw gain and predicted speed-up against added rows, and what the adapted models reached.

    Args:
        curve: for each batch size, as `evaluation.breakeven.predictions` gives it.
        measured: `speed_ratios` of writing, by `model` and `batch_size`.
        added_rows: of each adapted model; others are not drawn.
    """
    predicted = curve.drop(columns="gain").rename(
        columns={"speed_up": "gain", "speed_up_low": "low", "speed_up_high": "high"}
    )
    predicted["line"] = "predicted, batch " + predicted["batch_size"].astype(str)
    bound = curve.drop_duplicates("added_rows").assign(
        line="fertility gain, no tax", low=curve["gain"], high=curve["gain"]
    )
    figure, ax = plots.panels(height=2.8)
    labels = ("added rows of the vocabulary", "writing speed, original = 1")
    plots.lines(ax, pd.concat([predicted, bound]), "added_rows", "gain", "line", *labels)
    with plots.style():
        for row in measured[measured["model"].isin(list(added_rows))].itertuples():
            spans = [[row.ratio - row.low], [row.high - row.ratio]]
            look = plots.looks(predicted["line"])[f"predicted, batch {row.batch_size}"]
            drawn = {"fmt": look.marker, "color": look.color, "markeredgecolor": "0.15", "capsize": 2}
            name = f"{row.model}, batch {row.batch_size}"
            ax.errorbar([added_rows[row.model]], [row.ratio], spans, label=name, **drawn)
        ax.axhline(1, color="0.35", linewidth=0.8)
    plots.legend(figure, ax, columns=2)
    return figure
