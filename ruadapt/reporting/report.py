"""Tables for readers: as Markdown, each number with its interval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ruadapt.files import atomic_write

_MEASURED = ("value", "difference", "ratio")


def save_table(table: pd.DataFrame, path: Path, title: str, note: str = "") -> None:
    """Write `path`.csv (every number in full) and `path`.md (as `markdown`, between title and note)."""
    atomic_write(Path(f"{path}.csv"), table.to_csv(index=False, lineterminator="\n"))
    atomic_write(Path(f"{path}.md"), f"# {title}\n\n{markdown(table)}\n\n{note}".rstrip() + "\n")


def markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown, each number `written`, its interval in the same cell."""
    ends = [name for name in table if str(name).endswith(("_low", "_high"))]
    ends += ["low", "high"] if {*_MEASURED} & set(table) else []
    columns = [str(name) for name in table if name not in ends]
    rows = [columns, ["---"] * len(columns)]
    rows += [[written(row, name) for name in columns] for row in table.to_dict("records")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written(row: Mapping[str, Any], name: str = "value", form: str = ".3f") -> str:
    """Write one cell of a row for a reader: `−0.053 [−0.087, −0.020]`.

    The interval is that of the columns `name_low` and `name_high`, of a value, difference or ratio also `low`
    and `high`. Empty cells are "–"; needed numbers of items and seeds are whole, "none" where no number is
    enough.

    Args:
        form: format of the numbers.
    """
    value = row[name]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value) or "–"
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "none"
    if name.startswith(("items_to_", "seeds_to_")):
        return f"{value:,.0f}"
    at = "" if name in _MEASURED and f"{name}_low" not in row else f"{name}_"
    numbers = [value, *(row.get(f"{at}{end}") for end in ("low", "high"))]
    told = [
        format(number, form).replace("-", "−").replace("%", " %")
        for number in numbers
        if isinstance(number, float) and np.isfinite(number)
    ]
    return told[0] + (f" [{', '.join(told[1:])}]" if len(told) == 3 else "")
