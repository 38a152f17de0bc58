"""JSON lines that grow record by record: what a killed or failed run has is never done again."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import read_jsonl


def record_key(*parts: Any) -> str:
    """Return a hash of everything that a record depends on (JSON values)."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


class Records:
    """Finished records by their field `key`, in a file that one process at a time adds to."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle = handle
        self.dropped = self._cut_off_fragment()
        """Bytes of a half-written last record, removed."""
        self.done: dict[str, dict[str, Any]] = {}
        for number, record in enumerate(read_jsonl(path), start=1):
            if "key" not in record:
                raise RuadaptError(
                    f"{path}, record {number} has no key; another program wrote it, move it away"
                )
            self.done[record["key"]] = record

    def add(self, record: dict[str, Any]) -> None:
        """Write a record at once."""
        self.done[record["key"]] = record
        os.write(self._handle, (json.dumps(record, ensure_ascii=False) + "\n").encode())

    def _cut_off_fragment(self) -> int:
        size = os.fstat(self._handle).st_size
        whole = os.pread(self._handle, size, 0).rfind(b"\n") + 1
        os.ftruncate(self._handle, whole)
        return size - whole


@contextmanager
def open_records(path: Path) -> Iterator[Records]:
    """Open a file of records (made where it is missing) for this process alone.

    A last line without its end, as a killed process leaves it, is cut off; `Records.dropped` tells.

    Raises:
        RuadaptError: another process adds to it, a line before the last is broken (named by number), or the
            disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Records(handle, path)
        finally:
            os.close(handle)
    except BlockingIOError as error:
        raise RuadaptError(f"{path} is in use by another run; wait for it or give another folder") from error
    except OSError as error:
        raise RuadaptError(f"cannot write {path}: {error}; check the disk and its permissions") from error
