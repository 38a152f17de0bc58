"""Hugging Face model folders as tensors: embeddings in and out, everything else copied, no model loaded.

Embeddings are mapped from safetensors, so that only the rows in use take memory; results are streamed beside
the target (`ruadapt.checkpoints.tensor_files`) and renamed. Sources are never changed.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from ruadapt.checkpoints.model_configs import copy_chat_template, new_configs
from ruadapt.checkpoints.tensor_files import (
    FLOATS,
    Blocks,
    RowFunction,
    Stored,
    is_float,
    map_tensor,
    place_file,
    read_header,
    write_tensors,
)
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, read_json, require_disk_space, write_json
from ruadapt.vocab import load_tokenizer, rows

# Rows that are looked at at a time.
BLOCK = 4096
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The last two parts of the names that architectures give to these matrices.
INPUT_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer_json.py",  # where `vocab.save_tokenizer` needs it
)


@dataclass(frozen=True)
class Embeddings:
    """`input` is `[V, d]`; `head` is `[V, d]` or None where it is tied to the input."""

    input: Tensor
    head: Tensor | None

    @property
    def tied(self) -> bool:
        return self.head is None

    def matrices(self) -> dict[str, Tensor]:
        """Return the distinct matrices by name: `input`, and `head` where it is a matrix of its own."""
        return {"input": self.input} if self.head is None else {"input": self.input, "head": self.head}


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps its tensors, from the headers alone, and the names of the embeddings."""

    folder: Path
    stored: dict[str, Stored]
    input_name: str
    head_name: str | None
    tied: bool

    def shards(self) -> list[str]:
        return sorted({tensor.path.name for tensor in self.stored.values()})

    def body(self) -> dict[str, Stored]:
        """Return all tensors but embeddings and head."""
        embeddings = (self.input_name, self.head_name)
        return {name: tensor for name, tensor in self.stored.items() if name not in embeddings}

    def height(self) -> int:
        return self.stored[self.input_name].shape[0]


def read_layout(folder: Path) -> Layout:
    """Read the headers of a model folder: a broken shard is found before any work.

    Raises:
        RuadaptError: a file is missing, truncated or pickled, or the embeddings have unknown names.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RuadaptError(f"{folder} is no model folder: config.json is missing")
    if (folder / INDEX).is_file():
        files: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
    elif (folder / WEIGHTS).is_file():
        files = dict.fromkeys(read_header(folder / WEIGHTS)[0], WEIGHTS)
    elif any((folder / name).exists() for name in PICKLES):
        raise RuadaptError(
            f"{folder} holds pickled weights only, which can run code when they are read; "
            "convert them to safetensors or take a revision that has them"
        )
    else:
        raise RuadaptError(f"{folder} holds no {WEIGHTS}")
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise RuadaptError(f"{folder / INDEX} names files outside the folder: {outside[:3]}")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(files.values())):
        stored |= read_header(folder / shard)[0]
    if absent := [name for name in files if name not in stored]:
        raise RuadaptError(f"{folder / files[absent[0]]} lacks {absent[:3]}, which {INDEX} says it holds")
    inputs = [name for name in stored if name.endswith(INPUT_NAMES)]
    heads = [name for name in stored if name.endswith(HEAD_NAMES)]
    if len(inputs) != 1 or len(heads) > 1:
        raise RuadaptError(
            f"{folder}: one input embedding ({', '.join(INPUT_NAMES)}) and at most one head "
            f"({', '.join(HEAD_NAMES)}) were expected, found {inputs} and {heads}"
        )
    tied = _config(folder).tie_word_embeddings
    if not tied and not heads:
        raise RuadaptError(f"{folder}: config.json says that the head is not tied, but no head is stored")
    return Layout(folder, stored, inputs[0], heads[0] if heads else None, tied)


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (ValueError, OSError) as error:
        raise RuadaptError(f"{folder}: config.json cannot be read: {error}") from error


def read_embeddings(folder: Path) -> Embeddings:
    """Read the input embeddings and the head of a model folder, and nothing else.

    Returns:
        Matrices in the checkpoint's own dtype.

    Raises:
        RuadaptError: a file is missing, truncated or pickled; names or heights do not fit together; the
            config's tying contradicts the tensors; a row is NaN or infinite.
    """
    layout = read_layout(folder)
    matrix = map_tensor(layout.stored[layout.input_name])
    head = map_tensor(layout.stored[layout.head_name]) if layout.head_name else None
    for name, value in ((layout.input_name, matrix), (layout.head_name, head)):
        if value is not None and (broken := _broken_rows(value)):
            raise RuadaptError(f"{folder}: {name} has NaN or infinite values in rows {broken[:5]}")
    if head is not None and head.shape != matrix.shape:
        raise RuadaptError(
            f"{folder}: head {tuple(head.shape)} and input embeddings {tuple(matrix.shape)} differ in shape"
        )
    if layout.tied and head is not None:
        # Some checkpoints store the tied matrix twice.
        if not torch.equal(head, matrix):
            raise RuadaptError(f"{folder}: config.json ties the head to the input, but their tensors differ")
        head = None
    height = _config(folder).vocab_size
    if height != matrix.shape[0]:
        raise RuadaptError(f"{folder}: config.json says {height} rows, the embeddings have {matrix.shape[0]}")
    return Embeddings(matrix, head)


def _broken_rows(matrix: Tensor) -> list[int]:
    broken: list[int] = []
    for first in range(0, len(matrix), BLOCK):
        block = matrix[first : first + BLOCK]
        finite = block.isfinite().reshape(len(block), -1).all(dim=1)
        broken += [first + row for row in (~finite).nonzero()[:, 0].tolist()]
    return broken


def require_rows(folder: Path, tokenizer: Tokenizer, height: int) -> None:
    """Refuse a tokenizer with more ids than there are rows.

    Raises:
        RuadaptError: `folder` names where the tokenizer was found.
    """
    if rows(tokenizer) > height:
        raise RuadaptError(
            f"{folder}: the tokenizer has {rows(tokenizer)} ids, the embeddings have {height} rows; "
            "this model belongs to another tokenizer"
        )


def rows_of(matrix: Tensor) -> RowFunction:
    """Give a matrix's rows as `write_rows` asks for them."""
    return lambda first, last: matrix[first:last]


def write_rows(
    source_folder: Path,
    target_folder: Path,
    height: int,
    matrices: Mapping[str, RowFunction],
    tokenizer_folder: Path,
    *,
    body: Mapping[str, RowFunction | None] | None = None,
    link: bool = False,
) -> None:
    """Write the source model with other embeddings, made block by block, and another tokenizer.

    Every other tensor is copied byte for byte; shards without embeddings are copied as files. `vocab_size`
    and the token ids of both configs follow the new tokenizer. The chat template is the source's, or the
    tokenizer folder's where the source has none. Memory is that of one block, whatever the model's size.

    Args:
        height: V, rows of each new matrix.
        matrices: `input` and, where the source is untied, `head`: rows first…last, `[last − first, d]`, of
            any float dtype; they are cast to the source's.
        body: other tensors that are not copied: made in the same way, or left out where None.
        link: share files that stay as they are by hard links where source and target are on one file
            system. They are then the same files: to change one in place changes both folders.

    Raises:
        RuadaptError: the parts do not fit together, a row is NaN or infinite, or the disk is full; the
            target is then left as it was.
    """
    source_folder, target_folder, tokenizer_folder = map(
        Path, (source_folder, target_folder, tokenizer_folder)
    )
    layout = read_layout(source_folder)
    old, new = load_tokenizer(source_folder), load_tokenizer(tokenizer_folder)
    require_rows(tokenizer_folder, new, height)
    configs = new_configs(source_folder, old, new, height)
    shards = plan(layout, height, matrices, body)
    needed = planned_bytes(layout, shards, link=link)
    require_disk_space(target_folder.parent, needed)
    with (
        atomic_folder(target_folder) as folder,
        tqdm(total=needed, unit="B", unit_scale=True, desc=target_folder.name, disable=None) as bar,
    ):
        for shard, parts in shards.items():
            if _as_it_is(layout, shard, parts):
                place_file(source_folder / shard, folder / shard, link=link)
                bar.update(0 if link else sum(part.size for part in parts.values()))
            elif parts:
                _, metadata = read_header(source_folder / shard)
                write_tensors(folder / shard, parts, metadata or {"format": "pt"}, bar.update)
        if (source_folder / INDEX).is_file():
            headers = {path.name: read_header(path)[0] for path in sorted(folder.glob("*.safetensors"))}
            total = sum(tensor.size for header in headers.values() for tensor in header.values())
            weight_map = {name: file for file, header in headers.items() for name in header}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, value in configs.items():
            write_json(folder / name, value)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        copy_chat_template(source_folder, folder)


Parts = dict[str, Stored | Blocks]
Plan = dict[str, Parts]


def plan(
    layout: Layout,
    height: int,
    matrices: Mapping[str, RowFunction],
    body: Mapping[str, RowFunction | None] | None = None,
) -> Plan:
    """Return the tensors of each shard that `write_rows` writes, in order."""
    if layout.tied != ("head" not in matrices):
        raise RuadaptError(f"{layout.folder} is {tying(layout.tied)}, the new embeddings are not")
    made = {**(body or {}), layout.input_name: matrices["input"]}
    if layout.head_name:  # a tied head that was stored twice is left out
        made[layout.head_name] = matrices.get("head")
    shards: Plan = {shard: {} for shard in layout.shards()}
    for name, tensor in layout.stored.items():
        parts, rows = shards[tensor.path.name], made.get(name)
        if name not in made:
            parts[name] = tensor
        elif rows is not None:
            if not is_float(tensor):
                raise RuadaptError(
                    f"{tensor.path}: {name} is {tensor.dtype}; {', '.join(FLOATS)} can be changed"
                )
            shape = tensor.shape if name in layout.body() else (height, *tensor.shape[1:])
            parts[name] = Blocks(tensor.dtype, shape, rows)
    return shards


def _as_it_is(layout: Layout, shard: str, parts: Parts) -> bool:
    """Say whether a shard keeps all its tensors."""
    own = {name: tensor for name, tensor in layout.stored.items() if tensor.path.name == shard}
    return own == parts


def planned_bytes(layout: Layout, shards: Plan, *, link: bool) -> int:
    """Return the bytes of tensors that a plan writes; shards that are linked cost none."""
    return sum(
        part.size
        for shard, parts in shards.items()
        if not (link and _as_it_is(layout, shard, parts))
        for part in parts.values()
    )


def tying(tied: bool) -> str:
    return "tied" if tied else "untied"
