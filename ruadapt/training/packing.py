"""Text packed into blocks of tokens without padding."""

from array import array
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.training.encoding import start_token


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, file: Path | None = None
) -> Dataset:
    """Tokenise documents, join them, and cut the stream into blocks without padding.

    Each document follows its `start_token`. The tokens behind the last whole block are dropped. With `file`
    the blocks are written there (Arrow) as they come and mapped, not held: memory does not grow with the
    text.

    Returns:
        A dataset with the column `input_ids`: int32 lists of exactly `block_size` ids, in numpy format.

    Raises:
        RuadaptError: as `start_token`, or the texts fill no block.
    """
    separator = start_token(tokenizer)
    schema = pa.schema([("input_ids", pa.list_(pa.int32(), block_size))])
    sink = pa.BufferOutputStream() if file is None else pa.OSFile(str(file), "wb")
    stream = array("i")
    documents, blocks = iter(texts), 0
    with pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(documents, 1000)):
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]:
                stream.append(separator)
                stream.extend(ids)
            if whole := len(stream) // block_size:
                values = pa.array(np.array(stream[: whole * block_size], dtype=np.int32))
                part = pa.FixedSizeListArray.from_arrays(values, block_size)
                writer.write_batch(pa.record_batch([part], schema=schema))
                blocks, stream = blocks + whole, stream[whole * block_size :]
    if not blocks:
        raise RuadaptError(f"the texts give {len(stream)} tokens, fewer than one block of {block_size}")
    if file is None:
        return Dataset.from_buffer(sink.getvalue()).with_format("numpy")
    sink.close()
    return read_blocks(file)


def read_blocks(file: Path) -> Dataset:
    """Map the blocks that `pack` wrote into a file."""
    return Dataset.from_file(str(file)).with_format("numpy")
