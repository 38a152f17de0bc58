"""Peft adapter folders on model folders: trained rows, whole matrices and LoRA, merged as a stream."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from ruadapt.checkpoints.model_folders import (
    HEAD_NAMES,
    Layout,
    read_layout,
    read_tensor,
    rows_of,
    write_rows,
)
from ruadapt.checkpoints.tensor_files import RowFunction, read_tensors
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# Initialisations that leave the base's weights as they are; the others move a part of them into the adapter.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Config entries that change what an adapter computes without leaving a trace in its tensors.
OTHER_FORMS = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "velora_config")


class Adapter:
    """An adapter folder as changes of named tensors.

    Attributes:
        lora: names of the tensors that LoRA adds to.
        whole: names of the tensors that were trained whole or by rows.

    Raises:
        RuadaptError: the folder is incomplete, or holds something that is neither LoRA on a matrix, nor whole
            modules, nor trained token rows; it is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        form = self.config.get("peft_type")
        odd = [name for name in OTHER_FORMS if self.config.get(name)]
        if form not in ("LORA", "TRAINABLE_TOKENS"):
            raise RuadaptError(f"{folder} is a {form} adapter; LORA and TRAINABLE_TOKENS can be merged")
        if odd or self.config.get("init_lora_weights", True) not in PLAIN_STARTS:
            start = self.config.get("init_lora_weights")
            raise RuadaptError(
                f"{folder}: {', '.join(odd) or f'init_lora_weights={start!r}'} cannot be merged here; "
                "merge it with peft and give the merged model"
            )
        stored = read_tensors(self.folder / "adapter_model.safetensors")
        self._tensors = {
            key.removeprefix(PREFIX): tensor
            for key, tensor in stored.items()
            if not key.endswith((".modules_to_save.weight", ".original_module.weight"))  # peft writes copies
        }
        endings = r"\.(lora_A|lora_B|token_adapter\.base_layer|base_layer)\.weight|\.lora_embedding_[AB]"
        endings += r"|(\.token_adapter)?\.trainable_tokens_delta|\.weight"
        self.lora, self.whole = set[str](), set[str]()
        for key in self._tensors:
            found = re.search(rf"({endings})$", key)
            if found is None:
                raise RuadaptError(f"{folder}: {key} is no part of a plain LoRA adapter; merge it with peft")
            target = key[: found.start()] + ".weight"
            (self.lora if ".lora_" in found.group() else self.whole).add(target)

    def height(self, layout: Layout) -> int:
        """Rows of the embeddings with the adapter merged: its own where it holds whole matrices.

        Raises:
            RuadaptError: input and head would differ in height.
        """
        own = {name: self._matrix(name.removesuffix(".weight")) for name in layout.embedding_names()}
        heights = {name: layout.height() if matrix is None else len(matrix) for name, matrix in own.items()}
        if len(set(heights.values())) > 1:
            raise RuadaptError(
                f"{self.folder} on {layout.folder} gives matrices of unequal heights: {heights}"
            )
        return heights[layout.input_name]

    def body(self, layout: Layout) -> set[str]:
        """Return the names of the tensors that the adapter changes beside embeddings and head."""
        changed = self.lora | self.whole
        return {
            name for name in changed if name not in layout.embedding_names() and not name.endswith(HEAD_NAMES)
        }

    def rows(
        self, layout: Layout, name: str, stored: str | None = None, dtype: torch.dtype = torch.float32
    ) -> RowFunction:
        """Give the rows of a tensor with the adapter merged, `W + (alpha / r) B A`.

        Args:
            layout: the model that the adapter was trained on.
            stored: the tensor of the layout to start from, where it is not `name` (a tied head).
            dtype: what LoRA's product and sum are computed in.

        Raises:
            RuadaptError: shapes do not fit, or the layout lacks the tensor.
        """
        module, stored = name.removesuffix(".weight"), stored or name
        if stored not in layout.files:
            raise RuadaptError(f"{self.folder} changes {stored}, which {layout.folder} does not hold")
        base, own = read_tensor(layout, stored), self._matrix(module)
        matrix = base if own is None else own
        fixed = 1 if stored in layout.embedding_names() else 0
        if matrix.shape[fixed:] != base.shape[fixed:]:
            raise RuadaptError(
                f"{self.folder}: {name} is {tuple(matrix.shape)}, in {layout.folder} {tuple(base.shape)}"
            )
        rows = rows_of(matrix)
        trained = self._first(module, "token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
        if trained is not None:
            ids = self._token_ids(module)
            if trained.shape != (len(ids), matrix.shape[1]) or int(ids.max()) >= len(matrix):
                raise RuadaptError(
                    f"{self.folder}: {tuple(trained.shape)} trained rows of {len(ids)} tokens up to "
                    f"{int(ids.max())} do not fit {name}, {tuple(matrix.shape)}"
                )
            rows = _with_rows(rows, ids, trained)
        if name in self.lora:
            left, right = self._factors(module)
            if (left.shape[0], right.shape[1]) != tuple(matrix.shape):
                raise RuadaptError(
                    f"{self.folder}: LoRA on {name} is {left.shape[0]} × {right.shape[1]}, the tensor of "
                    f"{layout.folder} {' × '.join(map(str, matrix.shape))}"
                )
            rows = _with_product(rows, left, right.to(dtype) * self._scale(module, right.shape[0]))
        return rows

    def holds(self, name: str) -> bool:
        return name in self._tensors

    def _matrix(self, module: str) -> Tensor | None:
        return self._first(module, "weight", "base_layer.weight", "token_adapter.base_layer.weight")

    def _first(self, module: str, *endings: str) -> Tensor | None:
        found = [self._tensors[key] for ending in endings if (key := f"{module}.{ending}") in self._tensors]
        return found[0] if found else None

    def _factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Left `[V, r]` and right `[r, d]` factors of what is added to a tensor as it is stored."""
        embedding = self._first(module, "lora_embedding_A") is not None
        kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
        first, second = (self._first(module, kind.format(letter)) for letter in "AB")
        if first is None or second is None:
            raise RuadaptError(f"{self.folder}: {module} lacks one of its two LoRA matrices")
        transposed = embedding or self.config.get("fan_in_fan_out")
        return (first.T, second.T) if transposed else (second, first)

    def _scale(self, module: str, rank: int) -> float:
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        own = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        alpha = own[0] if own else self.config["lora_alpha"]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _token_ids(self, module: str) -> Tensor:
        given = self.config.get("trainable_token_indices", self.config.get("token_indices"))
        if isinstance(given, dict):
            named = [ids for pattern, ids in given.items() if f".{module}".endswith(f".{pattern}")]
            given = named[0] if named else None
        if given is None:
            raise RuadaptError(f"{self.folder}: {CONFIG} does not say which rows of {module} were trained")
        return torch.tensor(given, dtype=torch.long)


def _with_rows(rows: RowFunction, ids: Tensor, trained: Tensor) -> RowFunction:
    def changed(first: int, last: int) -> Tensor:
        block = rows(first, last).float()
        here = (ids >= first) & (ids < last)
        return block.index_copy(0, ids[here] - first, trained[here].float())

    return changed


def _with_product(rows: RowFunction, left: Tensor, right: Tensor) -> RowFunction:
    return lambda first, last: rows(first, last).to(right) + left[first:last].to(right) @ right


def is_adapter(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def merge(
    source: Path,
    adapter: Adapter,
    target: Path,
    tokenizer: Path,
    *,
    body: bool = True,
) -> None:
    """Write a model folder with a peft adapter merged, one block of one tensor in memory at a time.

    Args:
        source: the model that the adapter was trained on.
        tokenizer: folder of the tokenizer that goes with the merged embeddings.
        body: write the body, too; a folder without one is enough for `propagate`.

    Raises:
        RuadaptError: the adapter does not fit the model, or it untied a tied head.
    """
    layout = read_layout(source)
    names = {"input": layout.input_name} | ({} if layout.tied else {"head": str(layout.head_name)})
    height = adapter.height(layout)
    made = {role: adapter.rows(layout, name) for role, name in names.items()}
    _require_tied(adapter, layout, made["input"], height)
    others: dict[str, RowFunction | None] = dict.fromkeys(layout.files.keys() - layout.embedding_names())
    changed = {name: adapter.rows(layout, name) for name in adapter.body(layout)}
    write_rows(source, target, height, made, tokenizer, body=changed if body else others)


def _require_tied(adapter: Adapter, layout: Layout, rows: RowFunction, height: int) -> None:
    """Refuse an adapter whose training gave a tied model two different matrices."""
    if not layout.tied:
        return
    name = layout.input_name
    heads = [head for head in adapter.lora | adapter.whole if head.endswith(HEAD_NAMES)]
    if heads:
        head = adapter.rows(layout, heads[0], stored=name)
        parts = [(first, min(first + 4096, height)) for first in range(0, height, 4096)]
        if all(torch.equal(rows(*part).float(), head(*part).float()) for part in parts):
            return
    elif name not in adapter.lora and not adapter.holds(name):
        return  # trained token rows serve a tied head, too
    raise RuadaptError(
        f"{layout.folder} has a tied head, but {adapter.folder} trained the input embeddings apart from it; "
        "train with ensure_weight_tying=True, or untie the model first"
    )


def trained_on(adapter: Adapter, given: Path | None) -> Path:
    """Return the folder of the model that an adapter belongs to: as given, or as its config names it.

    Raises:
        RuadaptError: there is no such folder.
    """
    folder = given or Path(adapter.config.get("base_model_name_or_path") or "")
    if not (folder / "config.json").is_file():
        raise RuadaptError(
            f"{adapter.folder} was trained on {folder}, which is no model folder; name its base"
        )
    return folder
