"""Hugging Face model folders as tensors: embeddings in and out, everything else copied, no model loaded.

What counts is what transformers loads from a folder. Embeddings are mapped from safetensors, so that only the
rows in use take memory; results are streamed beside the target and renamed. Sources are never changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from ruadapt.checkpoints.model_configs import copy_files, new_configs
from ruadapt.checkpoints.tensor_files import (
    FLOATS,
    RowFunction,
    Stored,
    map_tensor,
    read_header,
    same_bytes,
    write_tensors,
)
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, read_json, require_disk_space, write_json
from ruadapt.vocab import load_tokenizer

# Rows that are looked at at a time.
BLOCK = 4096
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
# The last two parts of the names that architectures give to these matrices.
INPUT_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps its tensors, from the headers alone, and the names of the embeddings.

    Attributes:
        head_name: of the head that is stored, if any.
        tied: whether transformers takes the input embeddings for the head.
    """

    folder: Path
    stored: dict[str, Stored]
    input_name: str
    head_name: str | None
    tied: bool

    @property
    def input(self) -> Tensor:
        """`[V, d]`, mapped."""
        return map_tensor(self.stored[self.input_name])

    def matrices(self) -> dict[str, Tensor]:
        """Return the distinct matrices, mapped: `input`, and `head` where it is a matrix of its own."""
        return {"input": self.input} | (
            {} if self.tied else {"head": map_tensor(self.stored[str(self.head_name)])}
        )

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
        RuadaptError: a file is missing, truncated or pickled, the weights are quantised, the embeddings have
            unknown names, or other tensors have a row for each token, too.
    """
    folder = Path(folder)
    config = _config(folder)
    if getattr(config, "quantization_config", None):
        raise RuadaptError(f"{folder} is quantised; give the model it was made from, and quantise the result")
    if (folder / ADAPTER).is_file():
        raise RuadaptError(
            f"{folder} holds {ADAPTER}, so transformers takes it for an adapter and loads another model's "
            "weights; remove that file from a merged model, or merge the adapter first"
        )
    if (folder / WEIGHTS).is_file():  # transformers, too, prefers it to an index beside it
        stored = read_header(folder / WEIGHTS)[0]
    elif (folder / INDEX).is_file():
        stored = _read_shards(folder)
    else:
        raise RuadaptError(f"{folder} holds no {WEIGHTS}; convert pickled weights, which can run code, first")
    inputs = sorted((name for name in stored if name.endswith(INPUT_NAMES)), key=len)
    heads = sorted((name for name in stored if name.endswith(HEAD_NAMES)), key=len)
    if not inputs:
        raise RuadaptError(f"{folder} has no input embeddings of a known name ({', '.join(INPUT_NAMES)})")
    main, head, height = inputs[0], heads[0] if heads else None, stored[inputs[0]].shape[0]
    for name, tensor in stored.items():
        beside = height in tensor.shape[:1] + tensor.shape[-1:] or "embed_tokens_per_layer" in name
        if beside and name not in (main, head):
            raise RuadaptError(
                f"{folder}: {name} has a row for each token, too (a bias, embeddings of a layer, a copy for "
                "multi-token prediction, MTP), and would not fit another vocabulary; take a model without "
                "it (a copy for MTP goes when transformers loads and saves the model)"
            )
    kinds = (getattr(part, "tie_word_embeddings", None) for part in (config, config.get_text_config()))
    tied = next((bool(kind) for kind in kinds if kind is not None), False)
    if tied and head:  # transformers does not tie a stored head that differs
        tied = same_bytes(stored[main], stored[head])
    if not tied and not head:
        raise RuadaptError(f"{folder}: config.json says that the head is not tied, but no head is stored")
    return Layout(folder, stored, main, head, tied)


def _read_shards(folder: Path) -> dict[str, Stored]:
    files: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise RuadaptError(f"{folder / INDEX} names files outside the folder: {outside[:3]}")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(files.values())):
        stored |= read_header(folder / shard)[0]
    if absent := [name for name in files if name not in stored]:
        raise RuadaptError(f"{folder / files[absent[0]]} lacks {absent[:3]}, which {INDEX} says it holds")
    return stored


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise RuadaptError(f"{folder} is no model folder: config.json is missing")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        kind = read_json(folder / "config.json").get("model_type")
        raise RuadaptError(
            f"{folder}: transformers cannot read config.json without code of the folder; take a model of an "
            f"architecture that it has, which {kind!r} is not"
        ) from error


def read_embeddings(folder: Path) -> Layout:
    """Read a model folder's layout, and check its embeddings row by row; nothing else is read.

    Raises:
        RuadaptError: as `read_layout`; heights do not fit together; a row is NaN or infinite.
    """
    layout = read_layout(folder)
    for name, matrix in layout.matrices().items():
        finite = torch.cat([block.isfinite().all(dim=1) for block in matrix.split(BLOCK)])
        if broken := (~finite).nonzero()[:, 0].tolist():
            raise RuadaptError(f"{folder}: {name} has NaN or infinite values in rows {broken[:5]}")
        if matrix.shape != layout.input.shape:
            raise RuadaptError(f"{folder}: head and input embeddings differ in shape")
    height = _config(layout.folder).get_text_config().vocab_size
    if height != layout.height():
        raise RuadaptError(f"{folder}: config.json says {height} rows, the embeddings have {layout.height()}")
    return layout


def require_rows(folder: Path, tokenizer: Tokenizer, height: int) -> None:
    """Refuse a tokenizer with more ids than there are rows. Added tokens may lack one, as Gemma 3's last.

    Raises:
        RuadaptError: `folder` names where the tokenizer was found.
    """
    if (ids := 1 + max(tokenizer.get_vocab(with_added_tokens=False).values())) > height:
        raise RuadaptError(
            f"{folder}: the tokenizer has {ids} ids, the embeddings have {height} rows; "
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

    Every other tensor is copied byte for byte, into a shard of the same name. Sizes, tying and token ids in
    both configs follow. The chat template is the source's, or the tokenizer folder's where the source has
    none. Memory is that of one block, whatever the model's size.

    Args:
        height: V, rows of each new matrix.
        matrices: `input` and, where the source is untied, `head`: rows first…last, `[last − first, d]`, of
            any float dtype; they are cast to the source's.
        body: other tensors that are not copied, made in the same way.

    Raises:
        RuadaptError: the parts do not fit together, a row is NaN or infinite, or the disk is full; the
            target is then left as it was.
    """
    source, target, words = map(Path, (source_folder, target_folder, tokenizer_folder))
    layout = read_layout(source)
    old, new = load_tokenizer(source), load_tokenizer(words)
    require_rows(words, new, height)
    configs = new_configs(source, old, new, height, layout.tied)
    made = _made(layout, matrices, body or {})
    embeddings = {layout.input_name, layout.head_name}
    # A tied head that was stored twice is left out.
    sizes = {
        name: tensor.size // layout.height() * height if name in embeddings else tensor.size
        for name, tensor in layout.stored.items()
        if name in made or name not in embeddings
    }
    shards: dict[Path, list[str]] = {}
    for name in sizes:
        shards.setdefault(layout.stored[name].path, []).append(name)
    require_disk_space(target, sum(sizes.values()))
    with atomic_folder(target) as folder:
        for shard, names in tqdm(shards.items(), desc=f"{target.name} written", disable=None):
            tensors = {name: tensor for name, tensor in load_file(shard).items() if name in names}
            for name in set(names).intersection(embeddings):
                tensors[name] = torch.empty((height, *tensors[name].shape[1:]), dtype=tensors[name].dtype)
            _, metadata = read_header(shard)
            anew = {name: made[name] for name in names if name in made}
            write_tensors(folder / shard.name, tensors, anew, metadata or {"format": "pt"})
        if [shard.name for shard in shards] != [WEIGHTS]:
            files = {name: shard.name for shard, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            write_json(folder / INDEX, index)
        for name, value in configs.items():
            write_json(folder / name, value)
        copy_files(source, words, folder)


def _made(
    layout: Layout, matrices: Mapping[str, RowFunction], body: Mapping[str, RowFunction]
) -> dict[str, RowFunction]:
    """Return what makes the rows of each tensor that changes, by its name."""
    if layout.tied != ("head" not in matrices):
        raise RuadaptError(f"{layout.folder} is {tying(layout.tied)}, the new embeddings are not")
    made = {**body, layout.input_name: matrices["input"]}
    if not layout.tied:
        made[str(layout.head_name)] = matrices["head"]
    for name in made:
        if (tensor := layout.stored[name]).dtype not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise RuadaptError(f"{tensor.path}: {name} is {tensor.dtype}; {known} can be changed")
    return made


def tying(tied: bool) -> str:
    return "tied" if tied else "untied"
