"""Safetensors files by their library: mapped, so that no file is ever whole in memory, and written anew."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ruadapt.errors import RuadaptError

# Large enough for the disk and for matrix products, small beside one matrix of a model.
BLOCK_BYTES = 1 << 22
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Rows first…last (exclusive) of a matrix, `[last − first, d]`.
RowFunction = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `size` is in bytes."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises:
        RuadaptError: it is missing, truncated or corrupted, or has a dtype that torch lacks.
    """
    try:
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.offset_keys()}
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} is missing; download the model again") from error
    except SafetensorError as error:
        raise RuadaptError(f"{path} is truncated or corrupted ({error}); download it again") from error
    stored = {
        name: Stored(path, name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        for name, tensor in mapped.items()
    }
    return stored, metadata


def map_tensor(stored: Stored) -> Tensor:
    """Return a stored tensor, mapped: only what is read of it takes memory, and its file stays as it is."""
    with safe_open(stored.path, framework="pt") as file:
        found: Tensor = file.get_tensor(stored.name)
    return found


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    made: Mapping[str, RowFunction],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file. Memory is that of one block of rows beside `tensors`.

    Args:
        tensors: by name; mapped ones are copied byte for byte.
        made: the rows of some of them, made while they are written and cast to the dtype given in `tensors`;
            the rows of a scalar are asked for as those of a vector of one number.

    Raises:
        RuadaptError: a number that was made is NaN or infinite.
        OSError: the disk is full.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # of the system's, in the library's words
        raise OSError(str(error)) from error
    with path.open("r+b") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
        for name, rows in tqdm(made.items(), desc=f"{path.name} made", disable=None):
            stream.seek(start + header[name]["data_offsets"][0])
            for first, last in row_blocks(tensors[name].shape, tensors[name].nbytes):
                block = rows(first, last).to(tensors[name].dtype)
                block = block.reshape(last - first, *tensors[name].shape[1:]).contiguous()
                if not block.isfinite().all():  # finite in float32 may be infinite in float16
                    raise RuadaptError(f"{name}: NaN or infinite values in the new rows from {first} on")
                stream.write(block.flatten().view(torch.uint8).numpy().data)


def row_blocks(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of rows of a tensor of `size` bytes, small ones; a scalar is one row."""
    height = shape[0] if shape else 1
    step = max(1, BLOCK_BYTES * height // max(size, 1))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def same_bytes(first: Stored, second: Stored) -> bool:
    """Compare two stored tensors bit for bit, block by block: NaN equals NaN, 0.0 does not equal -0.0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    whole = (map_tensor(each).flatten().view(torch.uint8) for each in (first, second))
    blocks = zip(*(tensor.split(BLOCK_BYTES) for tensor in whole), strict=True)
    return all(one.numpy().tobytes() == other.numpy().tobytes() for one, other in blocks)
