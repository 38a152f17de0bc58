"""One style for every picture: column widths of a paper, readable without colour, saved reproducibly.

The chart functions draw tidy tables (one row a mark) on given axes, so that a notebook composes its panels.
Where a table has the columns `low` and `high` (unit of the value), they are drawn as the interval.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ruadapt.files import project_root
from ruadapt.vocab.registry import VOCABULARIES, Look

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
_WHISKERS = {"ecolor": "0.1", "elinewidth": 0.8, "capsize": 1.8}
_BAR: dict[str, Any] = {"alpha": 0.75, "edgecolor": "0.2", "error_kw": _WHISKERS}
DOT: dict[str, Any] = {"markersize": 5, "markeredgecolor": "0.15", "markeredgewidth": 0.4}
DOT |= {"elinewidth": 1.0, "capsize": 1.8}

# Of whatever is drawn where this module is imported.
plt.switch_backend(plt.get_backend())  # before the style, which it may change
sns.set_style("whitegrid")
sns.set_context("paper")
plt.style.use(project_root() / "data" / "paper.mplstyle")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each name its look; a vocabulary keeps its own in every chart, other names follow in order."""
    own = {shown: entry.look for name, entry in VOCABULARIES.items() for shown in (name, entry.label)}
    others = iter(_OTHER_LOOKS * 5)
    return {name: own.get(name) or next(others) for name in dict.fromkeys(names)}


def panels(columns: int = 1, width: float = COLUMN, height: float = 2.3, **options: Any) -> Any:
    """Return `(figure, axes)` of `plt.subplots` in the project's style, laid out without overlaps.

    `axes` is one Axes for one panel, else a flat list. `width` and `height` in inches are the whole figure's.
    """
    figure, grid = plt.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    flat = list(grid.flat)
    return figure, flat[0] if len(flat) == 1 else flat


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write `path`.png (200 dots per inch) and `path`.pdf: the same data give the same bytes.

    `path` has no suffix; its folder is made where it is missing.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png", dpi=200, metadata={"Software": None})
    unstamped: dict[str, Any] = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    figure.savefig(f"{path}.pdf", dpi=200, metadata=unstamped)


def bars(
    ax: Axes,
    data: pd.DataFrame,
    group: str,
    hue: str,
    value: str,
    label: str,
    number: str = "{:.2f}",
    title: str = "",
    horizontal: bool = False,
) -> None:
    """Draw a bar for each pair of `group` and `hue`, with its interval and its number.

    Args:
        data: at most one row for each pair; groups and hues keep their order.
        label: of the axis of values.
        number: format of the value behind the bar; "" for none.
        horizontal: groups from top to bottom, for long names.
    """
    table, groups, width = _placed(data, group, hue, 0.8)
    turn = 90 if len(table) > 10 and not horizontal else 0
    draw, reach = (ax.barh, "xerr") if horizontal else (ax.bar, "yerr")
    for name, look in looks(table[hue]).items():
        part = table[table[hue] == name]
        own: dict[str, Any] = {"label": name, "color": look.color, "hatch": look.hatch}
        own[reach] = _spans(part, value)
        drawn = draw(part["place"], part[value], width, **own, **_BAR)
        if number:
            ax.bar_label(drawn, fmt=number, fontsize=6, padding=2, rotation=turn)
    top = 1.25 * float(table[[end for end in (value, "high") if end in table]].max(axis=None))
    if horizontal:
        ax.set_yticks(range(len(groups)), [textwrap.fill(name, 34) for name in groups])
        ax.set(xlabel=label, title=title, xlim=(0, top), ylim=(len(groups) - 0.4, -0.6))
    else:
        slant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
        text: dict[str, Any] = slant if len("".join(groups)) > 40 else {}
        ax.set_xticks(range(len(groups)), groups, **text)
        ax.set(ylabel=label, title=title, ylim=(0, top))
    ax.grid(axis="y" if horizontal else "x", visible=False)


def dots(
    ax: Axes,
    data: pd.DataFrame,
    group: str,
    hue: str,
    value: str,
    label: str = "",
    reference: float | None = None,
    title: str = "",
) -> None:
    """Draw a dot with its interval for each pair of `group` (rows, first on top) and `hue`.

    `reference` is a value to compare with, drawn as a dashed vertical line.
    """
    table, groups, _ = _placed(data, group, hue, 0.7)
    if reference is not None:
        ax.axvline(reference, color="0.35", linestyle="--", linewidth=0.9, zorder=1)
    for name, look in looks(table[hue]).items():
        part = table[table[hue] == name]
        own = {"label": name, "color": look.color, "fmt": look.marker, **DOT}
        ax.errorbar(part[value], part["place"], xerr=_spans(part, value), **own)
    for edge in range(1, len(groups)):
        ax.axhline(edge - 0.5, color="0.8", linewidth=0.4)
    ax.set_yticks(range(len(groups)), groups)
    ax.set(xlabel=label, title=title, ylim=(len(groups) - 0.45, -0.55))
    ax.locator_params(axis="x", nbins=5)  # small numbers are long
    ax.grid(axis="y", visible=False)


def lines(
    ax: Axes, data: pd.DataFrame, x: str, y: str, hue: str, xlabel: str, ylabel: str, title: str = ""
) -> None:
    """Draw one line a `hue`: the mean of `y` over rows (seeds) with equal `x`, in a band.

    The band is the interval where `data` has one. Else it goes from the least to the greatest: with a
    handful of seeds the range is the whole evidence.
    """
    low, high = ("low", "high") if "low" in data else (y, y)
    for name, look in looks(data[hue].astype(str)).items():
        part = data[data[hue].astype(str) == name].groupby(x)
        mean = part[y].mean()
        (line,) = ax.plot(mean.index, mean, color=look.color, linestyle=look.linestyle, label=name)
        line.set(marker=look.marker, markevery=max(1, len(mean) // 8))
        band = part[low].min(), part[high].max()
        ax.fill_between(mean.index, *band, color=look.color, alpha=0.2, linewidth=0)
    if data[x].abs().max() >= 10_000:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)


def legend(figure: Figure, axes: Axes | Sequence[Axes], columns: int = 5) -> None:
    """Put one legend for all `axes` below the panels, each label once, where it covers no data."""
    handles: dict[str, Any] = {}
    for ax in [axes] if isinstance(axes, Axes) else axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(columns, max(1, len(handles)))}
    figure.legend(list(handles.values()), list(handles), frameon=False, **place)


def _placed(data: pd.DataFrame, group: str, hue: str, room: float) -> tuple[pd.DataFrame, list[str], float]:
    """Return the data with the `place` of each mark, the groups on places 0, 1, …, and a mark's width.

    The marks of a group stand around its place, in the order of all hues.
    """
    table = data.reset_index(drop=True)
    table[hue], groups = table[hue].astype(str), list(dict.fromkeys(table[group]))
    hues, own = list(dict.fromkeys(table[hue])), table[group]
    among = table[hue].map(hues.index).groupby(own).rank(method="first") - 1
    rivals = own.map(own.value_counts())
    width = room / int(rivals.max())
    table["place"] = own.map(groups.index) + (among - (rivals - 1) / 2) * width
    return table, [str(name) for name in groups], width


def _spans(table: pd.DataFrame, value: str) -> np.ndarray | None:
    """Return how far intervals reach below and above their values, `(2, rows)`; None without intervals."""
    if "low" not in table:
        return None
    return np.stack([table[value] - table["low"], table["high"] - table[value]]).astype(float).clip(0)
