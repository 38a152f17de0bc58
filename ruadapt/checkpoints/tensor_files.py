"""Safetensors files by their library: mapped, so that no file is ever whole in memory, and written anew."""

import json
from collections.abc import Callable, Iterator, Mapping
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


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in the order of their bytes, mapped.

    Memory holds what is read of them, and only until the system wants it back. The file stays as it is.

    Raises:
        RuadaptError: it is missing, truncated or corrupted, or has a dtype that torch lacks.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} is missing; download the model again") from error
    except SafetensorError as error:
        raise RuadaptError(f"{path} is truncated or corrupted ({error}); download it again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], made: Mapping[str, RowFunction]) -> None:
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
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # of the system's, in the library's words
        raise OSError(str(error)) from error
    with path.open("r+b") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
        for name, rows in tqdm(made.items(), desc=f"{path.name} made", disable=None):
            stream.seek(start + header[name]["data_offsets"][0])
            for first, last in row_blocks(tensors[name]):
                block = rows(first, last).to(tensors[name].dtype)
                block = block.reshape(last - first, *tensors[name].shape[1:]).contiguous()
                if not block.isfinite().all():  # finite in float32 may be infinite in float16
                    raise RuadaptError(f"{name}: NaN or infinite values in the new rows from {first} on")
                stream.write(block.flatten().view(torch.uint8).numpy().data)


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of rows of a tensor, small ones; a scalar is one row."""
    height = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK_BYTES * height // max(tensor.nbytes, 1))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors bit for bit: NaN equals NaN, 0.0 does not equal -0.0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))
