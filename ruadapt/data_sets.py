"""Data sets by hub name or local path, read as streams: memory does not grow with them."""

import csv
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import data_files, read_jsonl, read_lines

Row = dict[str, Any]
LINES, CSV, TEXT = (".jsonl", ".jsonl.gz"), (".csv", ".csv.gz"), (".txt", ".txt.gz")
# The first kind that a folder has is its data: `.json` beside others describes them.
KINDS = ((".parquet",), (".arrow",), CSV, LINES + TEXT, (".json",))


def read_rows(
    source: str | Path, split: str = "", *, config: str = "", shuffled: int | None = None
) -> Iterator[Row]:
    """Yield the rows of a data set.

    Args:
        source: a file or folder of parquet, arrow, csv, jsonl and txt, or json (the files of the first of
            these kinds that a folder has, in whatever folders they lie), or a data set's name on the hub.
        split: "train" where none is given; with a folder, its files are told apart as the hub's are.
        config: of a data set on the hub.
        shuffled: seed of an order of its own: files, and 1,000 rows at a time, shuffled.

    Raises:
        RuadaptError: it can't be reached or read, or has no such split.
    """
    path = Path(source)
    local = _files(path) if path.exists() and not (split and path.is_dir()) else []
    try:
        if local and shuffled is None:
            yield from _local_rows(local)
            return
        from datasets import IterableDataset, disable_progress_bars, load_dataset  # slow to import

        disable_progress_bars()
        if local:
            data = IterableDataset.from_generator(_local_rows, gen_kwargs={"files": local})
        else:
            name = {"path": str(source), "name": config or None}
            data = load_dataset(**name, split=split or "train", streaming=True)
        yield from data if shuffled is None else data.shuffle(seed=shuffled, buffer_size=1_000)
    except RuadaptError:
        raise
    except Exception as error:  # whatever hub, network and file formats raise
        reason = " ".join(str(error).split())[:300]
        raise RuadaptError(
            f"data set {source} cannot be read ({type(error).__name__}: {reason}); check its name, config "
            f"{config!r} and split {split or 'train'!r}, log in for gated ones, set HF_HUB_OFFLINE=0 to go "
            "online, or give a local file in the same schema"
        ) from error


def read_column(
    source: str | Path, column: str, split: str = "", *, config: str = "", shuffled: int | None = None
) -> Iterator[str]:
    """Yield the texts of one column; a row without a text there gives an empty one.

    Raises:
        RuadaptError: as `read_rows`; there is no row, no such column, or something else than text in it.
    """
    empty = True
    for row in read_rows(source, split, config=config, shuffled=shuffled):
        if (empty and column not in row) or not isinstance(row.get(column), str | None):
            raise RuadaptError(
                f"data set {source} has no text in column {column!r}; its columns are {', '.join(row)}: "
                "name the one with the text as `column`"
            )
        empty = False
        yield row.get(column) or ""
    if empty:
        raise RuadaptError(f"data set {source}, split {split or 'train'}, is empty; name another split")


def read_texts(path: Path) -> Iterator[str]:
    """Yield the non-empty texts of a file or folder: lines of `.txt`, the field `text` of all other rows.

    Raises:
        RuadaptError: nothing there, no text in it, or as `read_column`.
    """
    if not Path(path).exists():
        raise RuadaptError(f"corpus {path} does not exist; give a file or folder with text")
    found = False
    for text in filter(str.strip, read_column(path, "text")):
        found = True
        yield text
    if not found:
        raise RuadaptError(f"corpus {path} holds no text; give a file or folder with some")


def _files(path: Path) -> list[Path]:
    for endings in KINDS:
        if found := [file for file in data_files(path, endings) if file.name.lower().endswith(endings)]:
            return found
    known = ", ".join(chain.from_iterable(KINDS))
    raise RuadaptError(f"{path} holds no rows; give a file or folder of {known}")


def _local_rows(files: list[Path]) -> Iterator[Row]:
    for file in files:
        name = file.name.lower()
        if name.endswith(LINES):  # not by datasets, which stops where a column's type changes
            yield from read_jsonl(file)
        elif name.endswith(TEXT):
            yield from ({"text": line.rstrip("\r\n")} for line in read_lines(file))
        elif name.endswith(CSV):
            csv.field_size_limit(sys.maxsize)
            yield from csv.DictReader(read_lines(file))
        else:
            from datasets import load_dataset

            yield from load_dataset(
                file.suffix[1:].lower(), data_files=str(file), split="train", streaming=True
            )
