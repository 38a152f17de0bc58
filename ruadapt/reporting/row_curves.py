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
    """Return the path of the measured curves, columns as `benchmarks.vocab.curves` returns them."""
    return project_root() / "data" / "results" / f"{NAME}.csv"


def curve_table(table: pd.DataFrame) -> str:
    """Return the curves as a Markdown table: a row for each rule, "first text / second text" in each cell."""
    sizes, texts = sorted(set(table["added_rows"])), list(dict.fromkeys(table["text"]))
    values = table.set_index(["rule", "added_rows", "text"])["characters_per_token"].to_dict()
    rows = [["added rows", *(f"{size:,}" for size in sizes)], ["---"] * (len(sizes) + 1)]
    for rule in dict.fromkeys(table["rule"]):
        cells = [
            " / ".join(
                f"{values[rule, size, text]:.2f}" if (rule, size, text) in values else "–" for text in texts
            )
            for size in sizes
        ]
        rows.append([rule, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_curves(table: pd.DataFrame) -> Figure:
    """Draw the curves, one panel a text, with their intervals."""
    figure, axes = plots.panels(columns=table["text"].nunique(), width=plots.DOUBLE, height=2.8, sharey=True)
    axes = axes if isinstance(axes, list) else [axes]
    for ax, (text, part) in zip(axes, table.groupby("text", sort=False), strict=True):
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
