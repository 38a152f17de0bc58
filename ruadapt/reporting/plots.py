"""One style for every picture: column widths of a paper, readable without colour, saved reproducibly.

The chart functions draw tidy tables (one row a mark) on given axes, so that a notebook composes its panels.
"""

import textwrap
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ruadapt.vocab.registry import VOCABULARIES, Look, by_label

COLUMN, DOUBLE = 3.4, 7.0
"""Widths of a figure in inches: one column of a paper, both columns."""

# A vocabulary's look is in its registry; whatever else is drawn has its own, so that legends are clear.
_OTHER_LOOKS = (
    Look("#009e73", "P", "-", ""),
    Look("#cc79a7", "X", "--", "---"),
    Look("#332288", "<", "-.", "++"),
    Look("#999933", "p", ":", "oo"),
    Look("#882255", ">", (0, (8, 2)), "||"),
)

# A backend that is loaded within a style shows the first figure of a notebook and no other.
plt.switch_backend(plt.get_backend())


def looks(names: Collection[str]) -> dict[str, Look]:
    """Give each name its look; a vocabulary keeps its own in every chart, other names follow in order."""
    found = {name: entry.look for name in names if (entry := by_label(name))}
    others = [name for name in dict.fromkeys(names) if name not in found]
    return found | {name: _OTHER_LOOKS[place % len(_OTHER_LOOKS)] for place, name in enumerate(others)}


def style() -> AbstractContextManager[None]:
    """Return a context with the project's seaborn style, for what a notebook draws by itself."""
    sizes = {"axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
    rc: dict[Any, Any] = {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("paper"),
        **sizes,
        "font.size": 7,
        "legend.fontsize": 7,
        "legend.title_fontsize": 7,
        "axes.edgecolor": "0.3",
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.3,
        "lines.markersize": 4,
        "hatch.linewidth": 0.5,
        "patch.linewidth": 0.6,
        "xtick.bottom": True,
        "ytick.left": True,
        "pdf.fonttype": 42,
        "figure.dpi": 120,
    }
    return matplotlib.rc_context(rc)


def panels(
    columns: int = 1, rows: int = 1, width: float = COLUMN, height: float = 2.3, **options: Any
) -> Any:
    """Return `(figure, axes)` of `plt.subplots` in the project's style, laid out without overlaps.

    `axes` is one Axes for one panel, else a flat list. `width` and `height` in inches are the whole figure's.
    """
    with style():
        figure, grid = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
    flat = list(grid.flat)
    return figure, flat[0] if len(flat) == 1 else flat


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write `path`.png (200 dots per inch) and `path`.pdf: the same data give the same bytes.

    `path` has no suffix; its folder is made where it is missing.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unstamped: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix, metadata in unstamped.items():
        with style():
            figure.savefig(f"{path}.{suffix}", dpi=200, metadata=metadata)


def bars(
    ax: Axes,
    data: pd.DataFrame,
    label: str,
    value: str,
    xlabel: str,
    hue: str | None = None,
    number: str = "{:.3f}",
    title: str = "",
) -> None:
    """Draw one horizontal bar a row, first on top, with its number and (columns `low`, `high`) interval.

    Args:
        data: columns `label`, `value`, optionally `low`, `high` (same unit as `value`) and `hue` (the look).
        number: format of the value written behind the bar.
    """
    table = data.reset_index(drop=True)
    names = table[hue].astype(str).tolist() if hue else ["original"] * len(table)
    look, ends = looks(names), _ends(table, value)
    with style():
        for place, name in enumerate(names):
            ax.barh(place, table[value][place], height=0.7, **_filled(look[name]))
            text, end = number.format(table[value][place]), (ends[place], place)
            ax.annotate(text, end, (2, 0), textcoords="offset points", va="center", fontsize=6)
        if "low" in table:
            ax.errorbar(table[value], range(len(table)), xerr=_spans(table, value), **_WHISKERS)
        labels = [textwrap.fill(str(name), 34) for name in table[label]]
        ax.set_yticks(range(len(table)), labels, linespacing=0.9)
        ax.set_ylim(len(table) - 0.4, -0.6)
        ax.set_xlim(0, 1.25 * float(ends.max()))
        ax.set(xlabel=xlabel, title=title)
        ax.grid(axis="y", visible=False)


def grouped_bars(
    ax: Axes,
    data: pd.DataFrame,
    group: str,
    hue: str,
    value: str,
    ylabel: str,
    number: str | None = "{:.2f}",
    title: str = "",
) -> None:
    """Draw vertical bars, one cluster a `group`, one bar a `hue`, with intervals where `low`/`high` are set.

    Groups and hues keep their order of appearance in `data`, which has at most one row for each pair.
    """
    groups, hues = list(dict.fromkeys(data[group])), list(dict.fromkeys(data[hue]))
    look, width = looks([str(name) for name in hues]), 0.8 / len(hues)
    text: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 5.5}
    text["rotation"] = 90 if len(hues) > 2 else 0
    with style():
        for index, name in enumerate(hues):
            part = data[data[hue] == name].reset_index(drop=True)
            places = part[group].map(groups.index).to_numpy(float) + (index - (len(hues) - 1) / 2) * width
            ax.bar(places, part[value], width, label=str(name), **_filled(look[str(name)]))
            if "low" in part:
                ax.errorbar(places, part[value], yerr=_spans(part, value), **_WHISKERS)
            for place, end, height in zip(places, _ends(part, value), part[value], strict=True):
                if number:
                    above = {"textcoords": "offset points", **text}
                    ax.annotate(number.format(height), (place, end), (0, 1.5), **above)
        ax.set_xticks(range(len(groups)), [str(name) for name in groups])
        if sum(len(str(name)) for name in groups) > 40:
            plt.setp(ax.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
        ax.set_ylim(0, 1.18 * float(_ends(data, value).max()))
        ax.set(ylabel=ylabel, title=title)
        ax.grid(axis="x", visible=False)


def lines(
    ax: Axes, data: pd.DataFrame, x: str, y: str, hue: str, xlabel: str, ylabel: str, title: str = ""
) -> None:
    """Draw one line a `hue`: the mean of `y` over rows (seeds) with equal `x`, banded from least to greatest.

    With a handful of seeds the range is the whole evidence, so it is drawn instead of an interval.
    """
    names = sorted(dict.fromkeys(data[hue].astype(str)), key=_vocabulary_rank)
    with style():
        for name, look in looks(names).items():
            part = data[data[hue].astype(str) == name].groupby(x)[y].agg(["mean", "min", "max"])
            places = part.index.to_numpy(float)
            line = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "label": name}
            ax.plot(places, part["mean"], markevery=max(1, len(places) // 8), **line)
            ax.fill_between(places, part["min"], part["max"], color=look.color, alpha=0.2, linewidth=0)
        if data[x].abs().max() >= 10_000:
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)


def dots(
    ax: Axes,
    data: pd.DataFrame,
    group: str,
    hue: str,
    value: str,
    xlabel: str,
    reference: float | None = None,
    title: str = "",
) -> None:
    """Draw a dot with its interval (`low`, `high`) for each pair of `group` (rows, first on top) and `hue`.

    `reference` is a value to compare with, drawn as a dashed vertical line.
    """
    groups, hues = list(dict.fromkeys(data[group])), list(dict.fromkeys(data[hue]))
    look, step = looks([str(name) for name in hues]), 0.7 / len(hues)
    present = data.groupby(group)[hue].agg(set)
    drawing: dict[str, Any] = {"markersize": 5, "markeredgecolor": "0.15", "markeredgewidth": 0.4}
    drawing |= {"elinewidth": 1.0, "capsize": 1.8}
    with style():
        if reference is not None:
            ax.axvline(reference, color="0.35", linestyle="--", linewidth=0.9, zorder=1)
        for name in hues:
            part = data[data[hue] == name].reset_index(drop=True)
            # Around the middle of the row, among the hues that this row has.
            rivals = [[other for other in hues if other in present[place]] for place in part[group]]
            places = part[group].map(groups.index).to_numpy(float)
            places += [(among.index(name) - (len(among) - 1) / 2) * step for among in rivals]
            own = {"fmt": look[str(name)].marker, "color": look[str(name)].color, "label": str(name)}
            ax.errorbar(part[value], places, xerr=_spans(part, value), **own, **drawing)
        for edge in range(1, len(groups)):
            ax.axhline(edge - 0.5, color="0.8", linewidth=0.4)
        ax.set_yticks(range(len(groups)), [str(name) for name in groups])
        ax.set_ylim(len(groups) - 0.45, -0.55)
        ax.set(xlabel=xlabel, title=title)
        ax.grid(axis="y", visible=False)


def legend(figure: Figure, axes: Axes | Sequence[Axes], columns: int = 5) -> None:
    """Put one legend for all `axes` below the panels, each label once, where it covers no data."""
    handles: dict[str, Any] = {}
    for ax in [axes] if isinstance(axes, Axes) else axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(columns, max(1, len(handles)))}
    with style():
        figure.legend(list(handles.values()), list(handles), frameon=False, **place)


_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "0.1", "elinewidth": 0.8, "capsize": 1.8}


def _filled(look: Look) -> dict[str, Any]:
    return {"color": look.color, "alpha": 0.75, "hatch": look.hatch, "edgecolor": "0.2"}


def _spans(table: pd.DataFrame, value: str) -> np.ndarray:
    """Return how far an interval reaches below and above its value, `(2, rows)`; NaN where there is none."""
    return np.stack([table[value] - table["low"], table["high"] - table[value]]).astype(float).clip(0)


def _ends(table: pd.DataFrame, value: str) -> np.ndarray:
    return table[[name for name in (value, "high") if name in table]].max(axis=1).to_numpy(float)


def _vocabulary_rank(name: str) -> int:
    known, entry = list(VOCABULARIES.values()), by_label(name)
    return known.index(entry) if entry else len(known)
