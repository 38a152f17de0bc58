"""Safetensors files read by ranges and written as a stream: no file is ever whole in memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ruadapt.errors import RuadaptError

# Large enough for the disk and for matrix products, small beside one matrix of a model.
BLOCK_BYTES = 1 << 22
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
# Rows first…last (exclusive) of a matrix, `[last − first, d]`.
RowFunction = Callable[[int, int], Tensor]
Progress = Callable[[int], Any]


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
        with safe_open(path, framework="np"), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} is missing; download the model again") from error
    except SafetensorError as error:
        raise RuadaptError(f"{path} is truncated or corrupted ({error}); download it again") from error
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors, metadata


def map_tensor(stored: Stored) -> Tensor:
    """Return a stored tensor, mapped: only what is read of it takes memory.

    Raises:
        RuadaptError: its dtype is none of `DTYPES`.
    """
    if stored.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise RuadaptError(f"{stored.path}: a tensor of {stored.dtype} cannot be read, only of {known}")
    if not stored.size:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    # Copied on write, so the file stays as it is.
    mapped = np.memmap(stored.path, np.uint8, "c", stored.start, (stored.size,))
    return torch.from_numpy(mapped).view(DTYPES[stored.dtype]).view(stored.shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, mapped."""
    return {name: map_tensor(stored) for name, stored in read_header(path)[0].items()}


def write_tensors(
    path: Path,
    parts: Mapping[str, Stored | Blocks],
    metadata: Mapping[str, str],
    wrote: Progress = lambda size: None,
) -> None:
    """Write a safetensors file in the order given. Stored tensors are copied byte for byte.

    Args:
        wrote: is told the bytes of each block that is written.

    Raises:
        RuadaptError: a number that was made is NaN or infinite.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.size
        entries[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, part in parts.items():
            start = stream.tell()
            if isinstance(part, Stored):
                with part.path.open("rb") as source:
                    source.seek(part.start)
                    copy_bytes(source, stream, part.size, wrote)
            else:
                for first, last in row_blocks(part):
                    block = part.rows(first, last).to(DTYPES[part.dtype]).contiguous()
                    if not block.isfinite().all():  # finite in float32 may be infinite in float16
                        raise RuadaptError(f"{name}: NaN or infinite values in the new rows from {first} on")
                    stream.write(block.flatten().view(torch.uint8).numpy().data)
                    wrote(block.nbytes)
            if stream.tell() - start != part.size:
                raise RuntimeError(f"{path}: the blocks of {name} do not have its shape")


def row_blocks(part: Stored | Blocks) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the blocks of rows that a tensor is worked on in; a scalar is one row."""
    height = part.shape[0] if part.shape else 1
    step = max(1, BLOCK_BYTES * height // max(part.size, 1))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def is_float(stored: Stored) -> bool:
    return stored.dtype in FLOATS


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


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int, wrote: Progress) -> None:
    """Copy the next `size` bytes of a file, in blocks.

    Raises:
        OSError: the source is shorter, or the disk is full.
    """
    while size:
        block = source.read(min(size, BLOCK_BYTES))
        if not block:
            raise OSError(f"{source.name} ended {size} bytes early")
        target.write(block)
        size -= len(block)
        wrote(len(block))


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Give `target` the content of `source`: by a hard link where asked and possible, else as a copy."""
    if link:
        try:
            return os.link(source.resolve(), target)  # hub caches hold symbolic links
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
