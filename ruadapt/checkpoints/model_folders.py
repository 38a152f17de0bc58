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
from transformers import AutoConfig

from ruadapt.checkpoints.model_configs import new_configs, read_chat_template, write_chat_template
from ruadapt.checkpoints.tensor_files import (
    FLOATS,
    Made,
    RowFunction,
    Stored,
    map_tensor,
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

    def body(self) -> dict[str, Stored]:
        """Return all tensors but embeddings and head."""
        embeddings = (self.input_name, self.head_name)
        return {name: tensor for name, tensor in self.stored.items() if name not in embeddings}

    def height(self) -> int:
        return self.stored[self.input_name].shape[0]

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.size for tensor in self.stored.values())


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
        if value is not None:
            finite = torch.cat([block.isfinite().all(dim=1) for block in value.split(BLOCK)])
            if broken := (~finite).nonzero()[:, 0].tolist():
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


def write_rows(
    source_folder: Path,
    target_folder: Path,
    height: int,
    matrices: Mapping[str, RowFunction],
    tokenizer_folder: Path,
    body: Mapping[str, RowFunction] | None = None,
) -> None:
    """Write the source model with other embeddings, made block by block, and another tokenizer.

    Every other tensor is copied byte for byte, into a shard of the same name. `vocab_size` and the token ids
    of both configs follow the new tokenizer. The chat template is the source's, or the tokenizer folder's
    where the source has none. Memory is that of one block, whatever the model's size.

    Args:
        height: V, rows of each new matrix.
        matrices: `input` and, where the source is untied, `head`: rows first…last, `[last − first, d]`, of
            any float dtype; they are cast to the source's.
        body: other tensors that are not copied, made in the same way.

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
    shards = _plan(layout, height, matrices, body or {})
    sizes = {name: part.size for parts in shards.values() for name, part in parts.items()}
    require_disk_space(target_folder.parent, sum(sizes.values()))
    with atomic_folder(target_folder) as folder:
        for shard, parts in shards.items():
            _, metadata = read_header(source_folder / shard)
            write_tensors(folder / shard, parts, metadata or {"format": "pt"})
        if (source_folder / INDEX).is_file():
            files = {name: shard for shard, parts in shards.items() for name in parts}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            write_json(folder / INDEX, index)
        for name, value in configs.items():
            write_json(folder / name, value)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        if (template := read_chat_template(source_folder)) is not None:
            write_chat_template(folder, template)


def _plan(
    layout: Layout,
    height: int,
    matrices: Mapping[str, RowFunction],
    body: Mapping[str, RowFunction],
) -> dict[str, dict[str, Stored | Made]]:
    """The tensors of each shard that `write_rows` writes, in order."""
    if layout.tied != ("head" not in matrices):
        raise RuadaptError(f"{layout.folder} is {tying(layout.tied)}, the new embeddings are not")
    made: dict[str, RowFunction | None] = {**body, layout.input_name: matrices["input"]}
    if layout.head_name:  # a tied head that was stored twice is left out
        made[layout.head_name] = matrices.get("head")
    shards: dict[str, dict[str, Stored | Made]] = {}
    for name, tensor in layout.stored.items():
        part: Stored | Made = tensor
        if (rows := made.get(name)) is not None:
            if tensor.dtype not in FLOATS:
                raise RuadaptError(
                    f"{tensor.path}: {name} is {tensor.dtype}; {', '.join(FLOATS)} can be changed"
                )
            shape = tensor.shape if name in body else (height, *tensor.shape[1:])
            part = Made(name, tensor.dtype, shape, rows)
        if rows is not None or name not in made:
            shards.setdefault(tensor.path.name, {})[name] = part
    return shards


def tying(tied: bool) -> str:
    return "tied" if tied else "untied"
