"""The tidy results behind every figure and table, in one small folder that a repository can hold.

A run's stages leave their results where they were made; `collect` gathers what pictures and tables need, and
everything is drawn from that folder alone. So a clone draws the same pictures without a run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.files import atomic_folder, read_json, write_json

TABLES = {
    "bits_per_byte": ("08_evaluation", ["stage", "vocabulary", "seed", "language", "bits_per_byte"]),
    "characters_per_token": (
        "08_evaluation",
        ["vocabulary", "language", "text", "characters", "tokens"],
    ),
    "curves": ("05_continued_pretraining", ["vocabulary", "seed", "tokens", "language", "bits_per_byte"]),
    "speed": (
        "08_evaluation",
        [
            *("vocabulary", "rows", "language", "repeat", "characters_per_second"),
            *("writing_characters_per_second", "seconds_per_written_token"),
        ],
    ),
    "real": ("03_tokenizers", ["vocabulary", "language", "characters", "tokens"]),
}
"""Each table, the stage that makes it and its columns."""

OPTIONAL = ("real",)
"""Tables that a run may lack: real tokenizers are measured where they are given."""

_DIGITS = 6


def collect(run: Path, target: Path) -> None:
    """Gather the results of a run into `target`, whole or not at all.

    Writes `items.parquet` (every scored item), the `TABLES` as CSV, `pair.json` (the names of the models) and
    `provenance.json`: what each stage was made of, by name of the stage, without paths of the machine.

    Args:
        run: the run's folder.
        target: replaced where it holds nothing but an earlier collection.

    Raises:
        RuadaptError: a table, or a column of one, is missing; `target` holds other files.
    """
    known = {"items.parquet", "pair.json", "provenance.json", *(f"{name}.csv" for name in TABLES)}
    others = sorted({path.name for path in target.iterdir()} - known) if target.is_dir() else []
    if others:
        raise RuadaptError(
            f"{target} holds other files ({', '.join(others[:3])}); give results_dir a folder of its own"
        )
    with atomic_folder(target) as folder:
        items = read_table(run / "08_evaluation", "items", ITEM_COLUMNS)
        _write_items(items, folder / "items.parquet")
        for name, (stage, columns) in TABLES.items():
            if name in OPTIONAL and not (run / stage / f"{name}.csv").exists():
                continue
            table = read_table(run / stage, name, columns)[columns]
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.7g", lineterminator="\n")
        names = read_json(run / "02_model_pair" / "pair.json").get("names")
        write_json(folder / "pair.json", {"names": _told(names)})
        records = sorted((run / "provenance").glob("*.json"))
        write_json(
            folder / "provenance.json",
            {path.stem: _told(read_json(path)) for path in records if path.stem < "09"},
        )


def read_table(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read one tidy CSV; text columns stay text and empty cells stay "".

    Raises:
        RuadaptError: the file or a column is missing, or it has no rows.
    """
    path = Path(folder) / f"{name}.csv"
    if not path.exists():
        raise RuadaptError(f"{path} does not exist; run the stage that writes it first")
    table = pd.read_csv(path, keep_default_na=False, low_memory=False)
    _require(path, table, columns)
    return table


def read_collected(folder: Path, name: str) -> pd.DataFrame:
    """Read one of the `TABLES` of a collection.

    Raises:
        RuadaptError: as `read_table`.
    """
    return read_table(folder, name, TABLES[name][1])


def read_items(folder: Path) -> pd.DataFrame:
    """Read every scored item of a collection, columns `ITEM_COLUMNS`, scores in 0 … 1.

    Raises:
        RuadaptError: the file or a column is missing, or it has no rows.
    """
    path = Path(folder) / "items.parquet"
    if not path.exists():
        raise RuadaptError(
            f"{path} does not exist; run notebook 09 with collect_results on a finished run, or give "
            "results_dir a folder that holds collected results"
        )
    table = pd.read_parquet(path)
    _require(path, table, ITEM_COLUMNS)
    texts = [name for name in ITEM_COLUMNS if name not in ("shots", "score")]
    scores = table["score"].astype(float).round(_DIGITS)
    return table.astype(dict.fromkeys(texts, str)).assign(score=scores)


def _write_items(items: pd.DataFrame, path: Path) -> None:
    """Write items small: names by dictionary, scores in single precision."""
    small = {name: items[name].astype(str).astype("category") for name in ITEM_COLUMNS}
    small["shots"] = pd.to_numeric(items["shots"]).astype("int16")
    small["score"] = items["score"].astype(float).round(_DIGITS).astype("float32")
    pd.DataFrame(small).to_parquet(path, index=False, compression="zstd", compression_level=19)


def _require(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in table]
    if missing or table.empty:
        raise RuadaptError(f"{path} lacks {', '.join(missing) or 'any row'}; run its stage again")


def _told(value: Any) -> Any:
    """Return a record without paths of the machine: of an absolute one only its own name is left."""
    if isinstance(value, dict):
        return {_told(name): _told(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_told(part) for part in value]
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(": ")]
    return ": ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)
