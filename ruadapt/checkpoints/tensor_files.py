"""Safetensors files read by ranges and written as a stream: no file is ever whole in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

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


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `size` bytes from byte `start`; dtype as safetensors spells it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes, block by block."""
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            for done in range(0, self.size, BLOCK_BYTES):
                yield stream.read(min(BLOCK_BYTES, self.size - done))


@dataclass(frozen=True)
class Made:
    """A tensor `[V, …]` made while it is written, some rows at a time; cast to `dtype`.

    The rows of a scalar are asked for as those of a vector of one number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: RowFunction

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes, block by block.

        Raises:
            RuadaptError: a number is NaN or infinite.
        """
        for first, last in row_blocks(self):
            block = self.rows(first, last).to(DTYPES[self.dtype]).contiguous()
            if not block.isfinite().all():  # finite in float32 may be infinite in float16
                raise RuadaptError(f"{self.name}: NaN or infinite values in the new rows from {first} on")
            yield block.flatten().view(torch.uint8).numpy().data


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


def write_tensors(path: Path, parts: Mapping[str, Stored | Made], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the order given. Stored tensors are copied byte for byte.

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
        for name, part in tqdm(parts.items(), desc=f"{path.name} written", disable=None):
            start = stream.tell()
            stream.writelines(part.chunks())
            if stream.tell() - start != part.size:
                raise RuntimeError(f"{path}: the blocks of {name} do not have its shape")


def row_blocks(part: Stored | Made) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the blocks of rows that a tensor is worked on in; a scalar is one row."""
    height = part.shape[0] if part.shape else 1
    step = max(1, BLOCK_BYTES * height // max(part.size, 1))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def same_bytes(first: Stored, second: Stored) -> bool:
    """Compare two stored tensors bit for bit, block by block: NaN equals NaN, 0.0 does not equal -0.0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(one == other for one, other in zip(first.chunks(), second.chunks(), strict=True))
