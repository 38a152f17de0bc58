"""Data sets by hub name or local path, read as streams: memory does not grow with them."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError

Row = dict[str, Any]
KINDS = {
    "json": (".jsonl", ".jsonl.gz", ".json"),
    "parquet": (".parquet",),
    "csv": (".csv",),
    "text": (".txt", ".txt.gz"),
}


def read_rows(
    source: str | Path, split: str = "", *, config: str = "", shuffled: int | None = None
) -> Iterator[Row]:
    """Yield the rows of a data set.

    Args:
        source: a file or folder of jsonl, parquet, csv or txt (the files of the first of these kinds that a
            folder has, in whatever folders they lie), or the name of a data set on the hub.
        split: "train" where none is given; with a folder, its files are told apart as the hub's are.
        config: of a data set on the hub.
        shuffled: seed of an order of its own: shards, and 1,000 rows at a time, shuffled.

    Raises:
        RuadaptError: it can't be reached or read, or has no such split.
    """
    # Takes seconds to import: only where it is used.
    from datasets import disable_progress_bars, load_dataset

    where = _location(Path(source), split) or {"path": str(source), "name": config or None}
    disable_progress_bars()
    try:
        data = load_dataset(**where, split=split or "train", streaming=True)
        yield from data if shuffled is None else data.shuffle(seed=shuffled, buffer_size=1_000)
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
    rows = read_rows(source, split, config=config, shuffled=shuffled)
    first = next(rows, None)
    if first is None:
        raise RuadaptError(f"data set {source}, split {split or 'train'}, is empty; name another split")
    for row in chain([first], rows):
        if column not in row or not isinstance(row[column], str | None):
            raise RuadaptError(
                f"data set {source} has no text in column {column!r}; its columns are {', '.join(row)}: "
                "name the one with the text as `column`"
            )
        yield row[column] or ""


def _location(path: Path, split: str) -> dict[str, Any] | None:
    """Return where local rows lie as arguments of `load_dataset`; None leaves it to `load_dataset`."""
    if not path.exists() or (split and path.is_dir()):
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for kind, endings in KINDS.items():
        if found := [str(file) for file in files if file.name.endswith(endings)]:
            return {"path": kind, "data_files": found}
    known = ", ".join(chain.from_iterable(KINDS.values()))
    raise RuadaptError(f"{path} holds no rows; give a file or folder of {known}")
