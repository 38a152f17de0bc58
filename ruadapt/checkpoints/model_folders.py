"""Hugging Face model folders as tensors: embeddings in and out, everything else copied, no model loaded.

What counts is what transformers loads from a folder. Embeddings are mapped from safetensors, so that only the
rows in use take memory; results are streamed beside the target and renamed. Sources are never changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from ruadapt.checkpoints.model_configs import copy_files, new_configs
from ruadapt.checkpoints.tensor_files import FLOATS, RowFunction, map_tensors, same_bytes, write_tensors
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, read_json, require_disk_space, write_json
from ruadapt.vocab import load_tokenizer

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
# The last two parts of the names that architectures give to these matrices.
ENDINGS = {
    "input": ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"),
    "head": ("lm_head.weight", "embed_out.weight"),
}


@dataclass(frozen=True)
class Layout:
    """The tensors of a folder, mapped.

    Attributes:
        files: the name of each tensor's file.
        names: the tensors' names of `input` and, where it is a matrix of its own, `head`.
    """

    folder: Path
    tensors: dict[str, Tensor]
    files: dict[str, str]
    names: dict[str, str]

    @property
    def input(self) -> Tensor:
        """`[V, d]`."""
        return self.tensors[self.names["input"]]

    @property
    def tied(self) -> bool:
        """Whether transformers takes the input embeddings for the head."""
        return "head" not in self.names

    def matrices(self) -> dict[str, Tensor]:
        """Return `input` and, where it is a matrix of its own, `head`."""
        return {role: self.tensors[name] for role, name in self.names.items()}

    def body(self) -> dict[str, Tensor]:
        """Return all tensors but embeddings and head."""
        embeddings = self.names.values()
        return {name: tensor for name, tensor in self.tensors.items() if name not in embeddings}

    def height(self) -> int:
        return len(self.input)

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_layout(folder: Path) -> Layout:
    """Map the tensors of a model folder: a broken shard is found before any work.

    Raises:
        RuadaptError: a file is missing, truncated or pickled, the weights are quantised, the embeddings have
            unknown names, other tensors have a row for each token, too, or heights do not fit together.
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
    mapped = _map_files(folder)
    tensors = {name: tensor for part in mapped.values() for name, tensor in part.items()}
    found = {role: [name for name in tensors if name.endswith(ends)] for role, ends in ENDINGS.items()}
    names = {role: min(fitting, key=len) for role, fitting in found.items() if fitting}
    if "input" not in names:
        known = ", ".join(ENDINGS["input"])
        raise RuadaptError(f"{folder} has no input embeddings of a known name ({known})")
    height = len(tensors[names["input"]])
    for name, tensor in tensors.items():
        beside = height in tensor.shape[:1] + tensor.shape[-1:] or "embed_tokens_per_layer" in name
        if beside and name not in names.values():
            raise RuadaptError(
                f"{folder}: {name} has a row for each token, too (a bias, embeddings of a layer, a copy for "
                "multi-token prediction, MTP), and would not fit another vocabulary; take a model without "
                "it (a copy for MTP goes when transformers loads and saves the model)"
            )
    kinds = (getattr(part, "tie_word_embeddings", None) for part in (config, config.get_text_config()))
    tied = next((bool(kind) for kind in kinds if kind is not None), False)
    if not tied and "head" not in names:
        raise RuadaptError(f"{folder}: config.json says that the head is not tied, but no head is stored")
    # transformers does not tie a stored head that differs; an equal one is the same matrix once more.
    if tied and "head" in names and same_bytes(*(tensors[name] for name in names.values())):
        del tensors[names.pop("head")]
    if len({tensors[name].shape for name in names.values()}) > 1:
        raise RuadaptError(f"{folder}: head and input embeddings differ in shape")
    if (said := config.get_text_config().vocab_size) != height:
        raise RuadaptError(f"{folder}: config.json says {said} rows, the embeddings have {height}")
    files = {name: shard for shard, part in mapped.items() for name in part}
    return Layout(folder, tensors, files, names)


def _map_files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of weights."""
    if (folder / WEIGHTS).is_file():  # transformers, too, prefers it to an index beside it
        return {WEIGHTS: map_tensors(folder / WEIGHTS)}
    if not (folder / INDEX).is_file():
        raise RuadaptError(f"{folder} holds no {WEIGHTS}; convert pickled weights, which can run code, first")
    files: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
    if outside := [name for name in files.values() if Path(name).name != name]:
        raise RuadaptError(f"{folder / INDEX} names files outside the folder: {outside[:3]}")
    mapped = {shard: map_tensors(folder / shard) for shard in sorted(set(files.values()))}
    if absent := [name for name, shard in files.items() if name not in mapped[shard]]:
        raise RuadaptError(f"{folder / files[absent[0]]} lacks {absent[:3]}, which {INDEX} says it holds")
    return mapped


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
        RuadaptError: as `read_layout`; a row is NaN or infinite.
    """
    layout = read_layout(folder)
    for name, matrix in layout.matrices().items():
        finite = torch.cat([block.isfinite().all(dim=1) for block in matrix.split(4096)])
        if broken := (~finite).nonzero()[:, 0].tolist():
            raise RuadaptError(f"{folder}: {name} has NaN or infinite values in rows {broken[:5]}")
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
    if matrices.keys() != layout.names.keys():
        raise RuadaptError(f"{source} is {tying(layout.tied)}, the new embeddings are not")
    embeddings = {layout.names[role]: rows for role, rows in matrices.items()}
    made = {**(body or {}), **embeddings}
    for name in made:
        if (kind := layout.tensors[name].dtype) not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise RuadaptError(f"{source}: {name} is {kind}; {known} can be changed")
    empty = {name: layout.tensors[name].new_empty(height, layout.input.shape[1]) for name in embeddings}
    tensors = layout.tensors | empty
    size = sum(tensor.nbytes for tensor in tensors.values())
    shards: dict[str, list[str]] = {}
    for name in tensors:
        shards.setdefault(layout.files[name], []).append(name)
    require_disk_space(target, size)
    with atomic_folder(target) as folder:
        for shard, names in tqdm(shards.items(), desc=f"{target.name} written", disable=None):
            anew = {name: made[name] for name in names if name in made}
            write_tensors(folder / shard, {name: tensors[name] for name in names}, anew)
        if [*shards] != [WEIGHTS]:
            files = {name: layout.files[name] for name in tensors}
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
        for name, value in configs.items():
            write_json(folder / name, value)
        copy_files(source, words, folder)


def tying(tied: bool) -> str:
    return "tied" if tied else "untied"
