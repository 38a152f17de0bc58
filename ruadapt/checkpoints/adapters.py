"""Peft adapter folders on model folders: trained rows, whole matrices and LoRA, merged as a stream.

peft merges into a model that is loaded whole. Here memory is that of the adapter and one block of one tensor.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from ruadapt.checkpoints.model_folders import HEAD_NAMES, Layout, read_layout, write_rows
from ruadapt.checkpoints.tensor_files import RowFunction, map_tensor, read_tensors
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json

CONFIG = "adapter_config.json"
# Initialisations that leave the base's weights as they are; the others move a part of them into the adapter.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Config entries that change what an adapter computes without leaving a trace in its tensors.
OTHER_FORMS = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "velora_config")
# A module, and what is stored of it.
KEY = re.compile(
    r"base_model\.model\.(.+?)(?:\.token_adapter)?(?:\.base_layer)?"
    r"\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]|trainable_tokens_delta|weight))"
)


class Adapter:
    """An adapter folder as changes of named tensors.

    Attributes:
        parts: by module, its tensors by kind: `weight` where it was trained whole, LoRA's two factors, rows.

    Raises:
        RuadaptError: the folder is incomplete, or holds something that is neither LoRA on a matrix, nor whole
            modules, nor trained token rows; it is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        form, start = self.config.get("peft_type"), self.config.get("init_lora_weights", True)
        if form not in ("LORA", "TRAINABLE_TOKENS"):
            raise RuadaptError(f"{folder} is a {form} adapter; LORA and TRAINABLE_TOKENS can be merged")
        odd = [name for name in OTHER_FORMS if self.config.get(name)]
        odd += [] if start in PLAIN_STARTS else [f"init_lora_weights={start!r}"]
        if odd:
            raise RuadaptError(
                f"{folder}: {', '.join(odd)} cannot be merged here; "
                "merge it with peft and give the merged model"
            )
        self.parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(self.folder / "adapter_model.safetensors").items():
            if key.endswith((".modules_to_save.weight", ".original_module.weight")):
                continue  # peft writes copies
            if not (found := KEY.fullmatch(key)):
                raise RuadaptError(f"{folder}: {key} is no part of a plain LoRA adapter; merge it with peft")
            module, *kinds = found.groups()
            self.parts.setdefault(module, {})[kinds[0] or kinds[1]] = tensor

    def changed(self) -> set[str]:
        """Return the names of the tensors that the adapter changes."""
        return {f"{module}.weight" for module in self.parts}

    def body(self, layout: Layout) -> set[str]:
        """Return those of them beside embeddings and head."""
        return {name for name in self.changed() - {layout.input_name} if not name.endswith(HEAD_NAMES)}

    def height(self, layout: Layout) -> int:
        """Rows of the embeddings with the adapter merged: its own where it holds whole matrices.

        Raises:
            RuadaptError: input and head would differ in height.
        """
        names = layout.stored.keys() - layout.body().keys()
        own = {name: self._parts(name).get("weight") for name in names}
        heights = {name: layout.height() if matrix is None else len(matrix) for name, matrix in own.items()}
        if len(set(heights.values())) > 1:
            raise RuadaptError(
                f"{self.folder} on {layout.folder} gives matrices of unequal heights: {heights}"
            )
        return heights[layout.input_name]

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
        stored, parts = stored or name, self._parts(name)
        if stored not in layout.stored:
            raise RuadaptError(f"{self.folder} changes {stored}, which {layout.folder} does not hold")
        base = map_tensor(layout.stored[stored])
        matrix = parts.get("weight", base)
        fixed = 0 if stored in layout.body() else 1
        if matrix.shape[fixed:] != base.shape[fixed:]:
            raise RuadaptError(
                f"{self.folder}: {name} is {tuple(matrix.shape)}, in {layout.folder} {tuple(base.shape)}"
            )
        ids, trained = torch.empty(0, dtype=torch.long), parts.get("trainable_tokens_delta")
        if trained is not None:
            ids = self._token_ids(name)
            if trained.shape != (len(ids), matrix.shape[1]) or int(ids.max()) >= len(matrix):
                raise RuadaptError(
                    f"{self.folder}: {tuple(trained.shape)} trained rows of {len(ids)} tokens up to "
                    f"{int(ids.max())} do not fit {name}, {tuple(matrix.shape)}"
                )
        factors = self._factors(name, dtype) if any("lora" in kind for kind in parts) else None
        if factors and (len(factors[0]), factors[1].shape[1]) != tuple(matrix.shape):
            raise RuadaptError(
                f"{self.folder}: LoRA on {name} is {len(factors[0])} × {factors[1].shape[1]}, the tensor of "
                f"{layout.folder} {' × '.join(map(str, matrix.shape))}"
            )

        def rows(first: int, last: int) -> Tensor:
            block = matrix[first:last]
            if trained is not None:
                here = (ids >= first) & (ids < last)
                block = block.float().index_copy(0, ids[here] - first, trained[here].float())
            if factors:
                block = block.to(dtype) + factors[0][first:last] @ factors[1]
            return block

        return rows

    def _parts(self, name: str) -> dict[str, Tensor]:
        return self.parts.get(name.removesuffix(".weight"), {})

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Left `[V, r]` and right `[r, d]` factors of what is added to a tensor as it is stored."""
        parts, module = self._parts(name), name.removesuffix(".weight")
        kind = "lora_embedding_{}" if "lora_embedding_A" in parts else "lora_{}"
        first, second = (parts.get(kind.format(letter)) for letter in "AB")
        if first is None or second is None:
            raise RuadaptError(f"{self.folder}: {module} lacks one of its two LoRA matrices")
        transposed = "embedding" in kind or self.config.get("fan_in_fan_out")
        left, right = (first.T, second.T) if transposed else (second, first)
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        own = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        rank = math.sqrt(len(right)) if self.config.get("use_rslora") else len(right)
        return left.to(dtype), right.to(dtype) * ((own or [self.config["lora_alpha"]])[0] / rank)

    def _token_ids(self, name: str) -> Tensor:
        given = self.config.get("trainable_token_indices", self.config.get("token_indices"))
        if isinstance(given, dict):
            named = [ids for pattern, ids in given.items() if f".{name}".endswith(f".{pattern}.weight")]
            given = named[0] if named else None
        if given is None:
            raise RuadaptError(f"{self.folder}: {CONFIG} does not say which rows of {name} were trained")
        return torch.tensor(given, dtype=torch.long)


def is_adapter(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def merge(source: Path, adapter: Adapter, target: Path, tokenizer: Path, *, body: bool = True) -> None:
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
    if layout.tied:
        _require_tied(adapter, layout, made["input"], height)
    left_out: dict[str, RowFunction | None] = dict.fromkeys(layout.body())
    changed = {name: adapter.rows(layout, name) for name in adapter.body(layout)}
    write_rows(source, target, height, made, tokenizer, body=changed if body else left_out)


def _require_tied(adapter: Adapter, layout: Layout, rows: RowFunction, height: int) -> None:
    """Refuse an adapter whose training gave a tied model two different matrices."""
    name = layout.input_name
    heads = [head for head in adapter.changed() if head.endswith(HEAD_NAMES)]
    if heads:
        head = adapter.rows(layout, heads[0], stored=name)
        parts = [(first, min(first + 4096, height)) for first in range(0, height, 4096)]
        if all(torch.equal(rows(*part).float(), head(*part).float()) for part in parts):
            return
    elif adapter._parts(name).keys() <= {"trainable_tokens_delta"}:
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
