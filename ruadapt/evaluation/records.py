"""JSON lines that grow record by record: what is there is never made again, and knows what made it."""

import fcntl
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ruadapt.errors import RuadaptError
from ruadapt.files import read_jsonl
from ruadapt.freshness import changes, said


def digest(*parts: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


class Records:
    """Records of one file by their `key`: `done` holds those that were made as they would be made now.

    A line `{"maker": id, "key": {…}, "code": {…}, "versions": {…}}` says once for many records
    (`"made_by": id`) what made them. Records of other makers stay in the file, whatever happens.
    """

    def __init__(self, path: Path, stream: BinaryIO, maker: Mapping[str, Any]) -> None:
        self._path, self._stream, self._maker = path, stream, json.loads(json.dumps(maker))
        self._id = digest(self._maker)[:16]
        self._cut_off_fragment()
        makers: dict[str, dict[str, Any]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self._stale: dict[str, dict[str, Any]] = {}
        for row in read_jsonl(path):
            if "maker" in row:
                makers[row["maker"]] = row
            elif row.get("made_by") == self._id:
                self.done[row["key"]] = row
            else:
                self._stale[row.get("key", "")] = makers.get(row.get("made_by", ""), {})
        if self._id not in makers:
            self._write({"maker": self._id, **self._maker})

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return the places of keys without a record, the first of equal ones; say why records are stale."""
        places = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self.done}
        found = Counter(
            said(changes(self._stale[key], self._maker, self._maker)) for key in places if key in self._stale
        )
        for reasons, count in found.items():
            logging.getLogger(__name__).warning(
                "%s: %d records are stale: %s; they are made anew, the old ones stay",
                *(self._path, count, reasons),
            )
        return sorted(places.values())

    def add(self, key: str, **content: Any) -> None:
        """Write a record at once."""
        self.done[key] = {"key": key, "made_by": self._id, **content}
        self._write(self.done[key])

    def _write(self, row: Mapping[str, Any]) -> None:
        self._stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self._stream.flush()

    def _cut_off_fragment(self) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logging.getLogger(__name__).warning(
                "%s: %d bytes of a half-written record are dropped", self._path, len(content) - whole
            )
            self._stream.truncate(whole)


@contextmanager
def open_records(path: Path, maker: Mapping[str, Any]) -> Iterator[Records]:
    """Open a file of records (made where it is missing) for this process alone.

    A last line without its end, as a killed process leaves it, is dropped.

    Args:
        maker: what the records depend on besides their own keys: `key` (the model, its sampling), and
            `code` and `versions` as `freshness.unit_state` gives them.

    Raises:
        RuadaptError: another process adds to it, a line before the last is broken, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Records(path, stream, maker)
    except BlockingIOError as error:
        raise RuadaptError(f"{path} is in use by another run; wait for it or give another folder") from error
    except OSError as error:
        raise RuadaptError(f"cannot write {path}: {error}; check the disk and its permissions") from error
