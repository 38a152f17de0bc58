"""Hugging Face model folders as tensors: embeddings in and out, everything else copied, no model loaded.

Weights are read from safetensors, one tensor or one shard at a time; results are written beside the target
and renamed. Sources are never changed.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, read_json, require_disk_space, write_json
from ruadapt.vocab import load_tokenizer, rows

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

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    def matrices(self) -> dict[str, Tensor]:
        """Return the distinct matrices by name: `input`, and `head` where it is a matrix of its own."""
        return {"input": self.input} if self.head is None else {"input": self.input, "head": self.head}


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps its tensors: shard file by tensor name, and the names of the embeddings."""

    folder: Path
    files: dict[str, str]
    input_name: str
    head_name: str | None
    tied: bool

    def shards(self) -> list[str]:
        return sorted(set(self.files.values()))

    def embedding_names(self) -> set[str]:
        return {self.input_name} | ({self.head_name} if self.head_name else set())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} is missing; download the model again") from error
    except SafetensorError as error:
        raise RuadaptError(f"{path} is truncated or corrupted ({error}); download it again") from error


def read_layout(folder: Path) -> Layout:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RuadaptError(f"{folder} is no model folder: config.json is missing")
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map", {})
    elif (folder / WEIGHTS).is_file():
        with _open(folder / WEIGHTS) as weights:
            files = dict.fromkeys(weights.keys(), WEIGHTS)
    elif any((folder / name).exists() for name in PICKLES):
        raise RuadaptError(
            f"{folder} holds pickled weights only, which can run code when they are read; "
            "convert them to safetensors or take a revision that has them"
        )
    else:
        raise RuadaptError(f"{folder} holds no {WEIGHTS}")
    # Opening reads the headers and compares the sizes: a broken shard is found before any work.
    for shard in sorted(set(files.values())):
        with _open(folder / shard) as weights:
            absent = {name for name, file in files.items() if file == shard} - set(weights.keys())
        if absent:
            raise RuadaptError(f"{folder / shard} lacks {sorted(absent)[:3]}, which {INDEX} says it holds")
    inputs = [name for name in files if name.endswith(INPUT_NAMES)]
    heads = [name for name in files if name.endswith(HEAD_NAMES)]
    if len(inputs) != 1 or len(heads) > 1:
        raise RuadaptError(
            f"{folder}: one input embedding ({', '.join(INPUT_NAMES)}) and at most one head "
            f"({', '.join(HEAD_NAMES)}) were expected, found {inputs} and {heads}"
        )
    tied = _config(folder).tie_word_embeddings
    if not tied and not heads:
        raise RuadaptError(f"{folder}: config.json says that the head is not tied, but no head is stored")
    return Layout(folder, files, inputs[0], heads[0] if heads else None, tied)


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (ValueError, OSError) as error:
        raise RuadaptError(f"{folder}: config.json cannot be read: {error}") from error


def read_tensor(layout: Layout, name: str) -> Tensor:
    with _open(layout.folder / layout.files[name]) as weights:
        try:
            return weights.get_tensor(name)
        except SafetensorError as error:
            raise RuadaptError(f"{layout.folder}: {name} cannot be read: {error}") from error


def read_embeddings(folder: Path) -> Embeddings:
    """Read the input embeddings and the head of a model folder, and nothing else.

    Returns:
        Matrices in the checkpoint's own dtype.

    Raises:
        RuadaptError: a file is missing, truncated or pickled; names or heights do not fit together; the
            config's tying contradicts the tensors; a row is NaN or infinite.
    """
    layout = read_layout(folder)
    matrix = read_tensor(layout, layout.input_name)
    head = read_tensor(layout, layout.head_name) if layout.head_name else None
    for name, value in ((layout.input_name, matrix), (layout.head_name, head)):
        if value is not None and not value.isfinite().all():
            broken = (~value.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
            raise RuadaptError(
                f"{folder}: {name} has NaN or infinite values in {len(broken)} rows: {broken[:5]}"
            )
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


def require_rows(folder: Path, tokenizer: Tokenizer, embeddings: Embeddings) -> None:
    """Refuse a tokenizer with more ids than `embeddings` has rows.

    Raises:
        RuadaptError: `folder` names where the tokenizer was found.
    """
    found = embeddings.input.shape[0]
    if rows(tokenizer) > found:
        raise RuadaptError(
            f"{folder}: the tokenizer has {rows(tokenizer)} ids, the embeddings have {found} rows; "
            "this model belongs to another tokenizer"
        )


def _moved_ids(values: dict[str, Any], old: Tokenizer, new: Tokenizer, where: str) -> dict[str, Any]:
    """Return a config whose `…_token_id` entries name the same tokens under the new ids."""

    def moved(key: str, value: int) -> int:
        token = old.id_to_token(value)
        found = new.token_to_id(token) if token is not None else None
        if found is None:
            raise RuadaptError(
                f"{where}: {key} is {value} ({token!r}), which the new tokenizer lacks; "
                "build the vocabulary with this token kept, or correct the config"
            )
        return found

    result = dict(values)
    for key, value in values.items():
        if not key.endswith("_token_id"):
            continue
        if isinstance(value, list):
            result[key] = [moved(key, item) for item in value]
        elif isinstance(value, int) and value >= 0:  # some configs say -1 for "none"
            result[key] = moved(key, value)
    return result


def write_model(
    source_folder: Path, target_folder: Path, embeddings: Embeddings, tokenizer_folder: Path
) -> None:
    """Write the source model with other embeddings and another tokenizer.

    Every other tensor is copied, one shard in memory at a time; shards without embeddings are copied as
    files. The embeddings are cast to the source's dtype. `vocab_size` and the token ids of both configs
    follow the new tokenizer. The chat template is the source's, or the tokenizer folder's where the source
    has none.

    Raises:
        RuadaptError: the parts do not fit together; the target is then left as it was.
    """
    source_folder, tokenizer_folder = Path(source_folder), Path(tokenizer_folder)
    layout = read_layout(source_folder)
    if layout.tied != embeddings.tied:
        raise RuadaptError(f"{source_folder} is {tying(layout.tied)}, the new embeddings are not")
    for name, matrix in embeddings.matrices().items():
        if not matrix.isfinite().all():
            raise RuadaptError(f"the new {name} embeddings for {target_folder} have NaN or infinite values")
    new, old = load_tokenizer(tokenizer_folder), load_tokenizer(source_folder)
    require_rows(tokenizer_folder, new, embeddings)
    configs = {"config.json": read_json(source_folder / "config.json")}
    if (source_folder / "generation_config.json").is_file():
        configs["generation_config.json"] = read_json(source_folder / "generation_config.json")
    configs = {
        name: _moved_ids(value, old, new, f"{source_folder / name}") for name, value in configs.items()
    }
    configs["config.json"]["vocab_size"] = embeddings.input.shape[0]

    replaced = {layout.input_name: embeddings.input}
    if layout.head_name and embeddings.head is not None:
        replaced[layout.head_name] = embeddings.head
    dropped = layout.embedding_names() - set(replaced)  # a tied head that was stored twice
    size = sum((source_folder / shard).stat().st_size for shard in layout.shards())
    require_disk_space(
        Path(target_folder).parent, size + sum(m.numel() * m.element_size() for m in replaced.values())
    )
    with atomic_folder(Path(target_folder)) as folder:
        total = 0
        for shard in layout.shards():
            total += _write_shard(layout, shard, folder, replaced, dropped)
        if (source_folder / INDEX).is_file():
            weight_map = {name: file for name, file in layout.files.items() if name not in dropped}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, value in configs.items():
            write_json(folder / name, value)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        _copy_chat_template(source_folder, folder)


def _write_shard(
    layout: Layout, shard: str, folder: Path, replaced: dict[str, Tensor], dropped: set[str]
) -> int:
    """Write one shard and return the bytes of its tensors."""
    names = [name for name, file in layout.files.items() if file == shard]
    with _open(layout.folder / shard) as weights:
        if not layout.embedding_names() & set(names):
            shutil.copyfile(layout.folder / shard, folder / shard)
            return _stored_bytes(layout.folder / shard)
        try:
            tensors = {name: weights.get_tensor(name) for name in names if name not in dropped}
        except SafetensorError as error:
            raise RuadaptError(f"{layout.folder / shard}: {error}") from error
    for name in replaced.keys() & tensors.keys():
        tensors[name] = replaced[name].to(tensors[name].dtype).contiguous()
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / shard).chmod(0o644)  # the library makes it private
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _copy_chat_template(source: Path, target: Path) -> None:
    """Give the target the source's chat template, from its own file or from the tokenizer's config."""
    template = None
    if (source / "chat_template.jinja").is_file():
        template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    elif (source / "tokenizer_config.json").is_file():
        template = read_json(source / "tokenizer_config.json").get("chat_template")
    if template is None:
        return
    config = (
        read_json(target / "tokenizer_config.json") if (target / "tokenizer_config.json").is_file() else {}
    )
    config.pop("chat_template", None)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    if isinstance(template, str):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:  # several named templates
        config["chat_template"] = template
    write_json(target / "tokenizer_config.json", config)


def _stored_bytes(path: Path) -> int:
    """Bytes of a safetensors file without its header, whose length stands in the first eight bytes."""
    with path.open("rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def tying(tied: bool) -> str:
    return "tied" if tied else "untied"
