"""Characters per token against rows added to a real vocabulary: table and picture of a finished measurement.

`benchmarks.vocab --curves` measures them, with real tokenizers, into `data/results`.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ruadapt.files import project_root
from ruadapt.reporting import plots

NAME = "vocabulary_rows"


def curves_path() -> Path:
    """Return the path of the measured curves: `rule, text, added_rows, characters_per_token, low, high`."""
    return project_root() / "data" / "results" / f"{NAME}.csv"


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
        labels = ("added rows", "characters per Russian token")
        # As many lines as can be told apart: what BPE donors give is in the table.
        drawn = part[(part["added_rows"] > 0) & ~part["rule"].str.startswith("BPE")]
        ax.set_xscale("log")
        plots.lines(ax, drawn, "added_rows", "characters_per_token", "rule", *labels, str(text))
        for rule, look in plots.looks(list(dict.fromkeys(drawn["rule"]))).items():
            ends = drawn[drawn["rule"] == rule]
            ax.fill_between(ends["added_rows"], ends["low"], ends["high"], color=look.color, alpha=0.15, lw=0)
    plots.legend(figure, axes, columns=4)
    return figure
