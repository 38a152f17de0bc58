"""Safetensors files read by ranges and written as a stream: no file is ever whole in memory."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EINVAL, ENOSYS, EOPNOTSUPP, EXDEV
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ruadapt.errors import RuadaptError

# Large enough for the disk and for matrix products, small beside one matrix of a model.
BLOCK_BYTES = 1 << 24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
READABLE = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
# Rows first…last (exclusive) of a matrix, `[last − first, d]`.
RowFunction = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `size` bytes from byte `start`; dtype as safetensors spells it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Blocks:
    """A tensor `[V, …]` made while it is written, some rows at a time; cast to `dtype`.

    The rows of a scalar are asked for as those of a vector of one number.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: RowFunction

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises:
        RuadaptError: it is missing, truncated or corrupted.
    """
    try:
        # Checks the header against the file's size. For numpy it maps without claiming memory; for torch it
        # would claim as much as the file is long, which the system may refuse.
        with safe_open(path, framework="np"):
            return parse_header(raw_header(path), path)
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} is missing; download the model again") from error
    except SafetensorError as error:
        raise RuadaptError(f"{path} is truncated or corrupted ({error}); download it again") from error


def map_tensor(stored: Stored) -> Tensor:
    """Return a stored tensor, mapped: only what is read of it takes memory.

    Raises:
        RuadaptError: its dtype is none of `READABLE`.
    """
    if stored.dtype not in READABLE:
        known = ", ".join(READABLE)
        raise RuadaptError(f"{stored.path}: a tensor of {stored.dtype} cannot be read, only of {known}")
    if not stored.size:
        return torch.empty(stored.shape, dtype=READABLE[stored.dtype])
    # Copied on write, so the file stays as it is.
    mapped = np.memmap(stored.path, np.uint8, "c", stored.start, (stored.size,))
    return torch.from_numpy(mapped).view(READABLE[stored.dtype]).view(stored.shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, mapped."""
    return {name: map_tensor(stored) for name, stored in read_header(path)[0].items()}


def raw_header(path: Path) -> bytes:
    """Return the first bytes of a safetensors file, up to its first tensor."""
    with path.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def parse_header(raw: bytes, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    header = json.loads(raw[8:])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), len(raw) + start, end - start)
    return tensors, metadata


def write_tensors(
    path: Path,
    parts: Mapping[str, Stored | Blocks],
    metadata: Mapping[str, str],
    wrote: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write a safetensors file in the order given. Stored tensors are copied byte for byte.

    The order of another file keeps that file's alignment: the library sorts by dtype, wide ones first, then
    by name.

    Args:
        wrote: called with the number of bytes after each piece, for a progress bar.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.size
        entries[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    write_parts(path, len(header).to_bytes(8, "little") + header, parts.values(), wrote)


def write_parts(
    path: Path,
    header: bytes,
    parts: Iterable[Stored | Blocks],
    wrote: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write a header as it is and the bytes of tensors behind it; they are copied while blocks are made."""
    end = len(header)
    with path.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as copier:
        _write(stream, header, 0)
        copies, made = [], []
        for part in parts:
            if isinstance(part, Stored):
                copies.append(copier.submit(_copy, part, stream, end, wrote))
            else:
                made.append((part, end))
            end += part.size
        try:
            for part, place in made:
                _write_blocks(part, stream, place, wrote)
            for copy in copies:
                copy.result()
        except BaseException:
            copier.shutdown(cancel_futures=True)
            raise
        if os.fstat(stream.fileno()).st_size != end:
            raise RuntimeError(f"{path}: the blocks of a tensor do not have its shape")


def row_blocks(part: Stored | Blocks) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the blocks of rows that a tensor is worked on in; a scalar is one row."""
    height = part.shape[0] if part.shape else 1
    step = max(1, BLOCK_BYTES * height // max(part.size, 1))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def _write_blocks(part: Blocks, stream: Any, place: int, wrote: Callable[[int], Any]) -> None:
    end = place + part.size
    for first, last in row_blocks(part):
        block = part.rows(first, last).to(DTYPES[part.dtype]).contiguous()
        place = _write(stream, block.reshape(-1).view(torch.uint8).numpy(), place)
        wrote(block.nbytes)
    if place != end:
        raise RuntimeError(f"{stream.name}: the blocks of a tensor do not have its shape")


def _copy(part: Stored, stream: Any, place: int, wrote: Callable[[int], Any]) -> None:
    with part.path.open("rb") as source:
        copy_bytes(source, stream, part.start, part.size, place, wrote)


def _write(stream: Any, data: Any, place: int) -> int:
    """Write all of `data` from byte `place` on; return where it ends."""
    view = memoryview(data)
    while view:  # a part only may be taken, as when the disk is nearly full
        done = os.pwrite(stream.fileno(), view, place)
        view, place = view[done:], place + done
    return place


def same_bytes(first: Stored, second: Stored) -> bool:
    """Compare two stored tensors bit for bit, block by block: NaN equals NaN, 0.0 does not equal -0.0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.path.samefile(second.path) and first.start == second.start:
        return True  # a hard link
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        sizes = [min(BLOCK_BYTES, first.size - done) for done in range(0, first.size, BLOCK_BYTES)]
        return all(one.read(size) == other.read(size) for size in sizes)


def copy_bytes(
    source: BinaryIO,
    target: Any,
    start: int,
    size: int,
    place: int,
    wrote: Callable[[int], Any] = lambda size: None,
) -> None:
    """Copy `size` bytes from `start` on to `place`; inside the system, which may share them, where it can.

    Args:
        target: a file opened without a buffer.

    Raises:
        OSError: the source is shorter, or the disk is full.
    """
    inside = hasattr(os, "copy_file_range")
    while size:
        count = min(size, BLOCK_BYTES)
        try:
            if inside:
                done = os.copy_file_range(source.fileno(), target.fileno(), count, start, place)
            else:
                done = os.pwrite(target.fileno(), os.pread(source.fileno(), count, start), place)
        except OSError as error:
            if not inside or error.errno not in (EXDEV, EINVAL, ENOSYS, EOPNOTSUPP):
                raise
            inside = False
            continue
        if not done:
            raise OSError(f"{source.name} ended {size} bytes early")
        start, place, size = start + done, place + done, size - done
        wrote(done)


def place_file(
    source: Path, target: Path, *, link: bool, wrote: Callable[[int], Any] = lambda size: None
) -> None:
    """Give `target` the content of `source`: by a hard link where asked and possible, else as a copy."""
    if link:
        try:
            return os.link(source.resolve(), target)  # hub caches hold symbolic links
        except OSError:  # another file system, or one without links
            pass
    with source.open("rb") as stream, target.open("wb", buffering=0) as copy:
        copy_bytes(stream, copy, 0, source.stat().st_size, 0, wrote)
