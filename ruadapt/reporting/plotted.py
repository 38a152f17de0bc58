"""What a picture shows, as numbers: to compare pictures by their data and not by their bytes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator


def plotted(figure: Figure) -> list[dict[str, Any]]:
    """Return what each panel of a figure draws, numbers to six significant digits.

    Of each panel: its `title` and axis labels, the names on its axes (`x_names`, `y_names`), `lines` (label
    and points), `bars` (left, bottom, width, height), `errors` (ends of error bars), `areas` (corners of
    bands) and `texts`; what a panel lacks is left out.
    """
    return [_panel(ax) for ax in figure.axes]


def _panel(ax: Axes) -> dict[str, Any]:
    spans = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    bands = [drawn for drawn in ax.collections if drawn not in spans]
    found = {
        "title": ax.get_title(),
        "x": ax.get_xlabel(),
        "y": ax.get_ylabel(),
        "x_names": _names(ax.xaxis),
        "y_names": _names(ax.yaxis),
        "lines": [_line(line) for line in ax.lines],
        "bars": [_rounded(bar.get_bbox().bounds) for bar in ax.patches if isinstance(bar, Rectangle)],
        "errors": [_rounded(np.ravel(part)) for drawn in spans for part in drawn.get_segments()],
        "areas": [_rounded(np.ravel(path.vertices)) for drawn in bands for path in drawn.get_paths()],
        "texts": [text.get_text() for text in ax.texts],
    }
    return {name: value for name, value in found.items() if value}


def _line(line: Line2D) -> dict[str, Any]:
    label = str(line.get_label())
    points = {"x": _rounded(line.get_xdata()), "y": _rounded(line.get_ydata())}
    return points if label.startswith("_") else {"label": label, **points}  # matplotlib's own begin with _


def _names(axis: Axis) -> list[str]:
    """Return the names that were given to ticks; numbers follow from the data."""
    given = isinstance(axis.get_major_locator(), FixedLocator)
    return [label.get_text() for label in axis.get_majorticklabels()] if given else []


def _rounded(values: Any) -> list[float | None]:
    numbers = np.asarray(values, dtype=float)
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in numbers]
