"""What a picture shows, as numbers: to compare pictures by their data and not by their bytes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection, LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

_DIGITS = 6


def plotted(figure: Figure) -> list[dict[str, Any]]:
    """Return what each panel of a figure draws, numbers to six significant digits.

    Of each panel: its `title` and axis labels, the names on its axes (`x_names`, `y_names`), `lines` (label
    and points), `bars` (left, bottom, width, height), `points` (offsets), `errors` (ends of error bars),
    `areas` (corners of bands), `cells` (values of a map) and `texts`; what a panel lacks is left out.
    """
    return [_panel(ax) for ax in figure.axes]


def _panel(ax: Axes) -> dict[str, Any]:
    kinds: dict[str, list[Any]] = {"errors": [], "points": [], "areas": [], "cells": []}
    for drawn in ax.collections:
        kind, values = _collection(drawn)
        kinds[kind] += values
    found = {
        "title": ax.get_title(),
        "x": ax.get_xlabel(),
        "y": ax.get_ylabel(),
        "x_names": _names(ax.xaxis),
        "y_names": _names(ax.yaxis),
        "lines": [_line(line) for line in ax.lines],
        "bars": [
            _rounded([*bar.get_xy(), bar.get_width(), bar.get_height()])
            for bar in ax.patches
            if isinstance(bar, Rectangle)
        ],
        **kinds,
        "texts": [text.get_text() for text in ax.texts],
    }
    return {name: value for name, value in found.items() if value}


def _line(line: Line2D) -> dict[str, Any]:
    label = str(line.get_label())
    # matplotlib numbers what has no label.
    points = {"x": _rounded(line.get_xdata()), "y": _rounded(line.get_ydata())}
    return points if label.startswith("_") else {"label": label, **points}


def _collection(drawn: Collection) -> tuple[str, list[Any]]:
    if isinstance(drawn, LineCollection):
        return "errors", [_rounded(np.ravel(segment)) for segment in drawn.get_segments()]
    if isinstance(drawn, PathCollection):
        return "points", [_rounded(point) for point in np.asarray(drawn.get_offsets())]
    if (values := drawn.get_array()) is not None:
        return "cells", _rounded(np.ravel(np.ma.filled(values, np.nan)))
    return "areas", [_rounded(np.ravel(np.asarray(path.vertices))) for path in drawn.get_paths()]


def _names(axis: Axis) -> list[str]:
    """Return the names that were given to ticks; numbers follow from the data."""
    given = isinstance(axis.get_major_locator(), FixedLocator)
    return [label.get_text() for label in axis.get_majorticklabels()] if given else []


def _rounded(values: Any) -> list[float | None]:
    numbers = np.asarray(values, dtype=float)
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in numbers]
