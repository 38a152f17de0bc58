"""Peft adapter folders on model folders: trained rows, whole matrices and LoRA, merged as a stream.

peft merges into a model that is loaded whole. Here memory is that of the adapter and one block of one tensor.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from ruadapt.checkpoints.model_folders import HEAD_NAMES, Layout, read_layout, write_rows
from ruadapt.checkpoints.tensor_files import RowFunction, map_tensor, read_header
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
        odd = [name for name in (*OTHER_FORMS, "fan_in_fan_out") if self.config.get(name)]
        odd += [] if start in PLAIN_STARTS else [f"init_lora_weights={start!r}"]
        if odd:
            raise RuadaptError(
                f"{folder}: {', '.join(odd)} cannot be merged here; "
                "merge it with peft and give the merged model"
            )
        self.parts: dict[str, dict[str, Tensor]] = {}
        for key, stored in read_header(self.folder / "adapter_model.safetensors")[0].items():
            if key.endswith((".modules_to_save.weight", ".original_module.weight")):
                continue  # peft writes copies
            if not (found := KEY.fullmatch(key)):
                raise RuadaptError(f"{folder}: {key} is no part of a plain LoRA adapter; merge it with peft")
            module, factor, other = found.groups()
            self.parts.setdefault(module, {})[factor or other] = map_tensor(stored)

    def changed(self) -> set[str]:
        """Return the names of the tensors that the adapter changes."""
        return {f"{module}.weight" for module in self.parts}

    def height(self, name: str, layout: Layout) -> int:
        """Return the height of embeddings or head with the adapter merged: its own if it holds them whole."""
        parts = self.parts.get(name.removesuffix(".weight"), {})
        return len(parts["weight"]) if "weight" in parts else layout.height()

    def rows(self, layout: Layout, name: str, stored: str | None = None) -> RowFunction:
        """Give the rows of a tensor with the adapter merged, `W + (alpha / r) B A` in float32.

        Args:
            layout: the model that the adapter was trained on.
            stored: the tensor of the layout to start from, where it is not `name` (a tied head).

        Raises:
            RuadaptError: shapes do not fit, or the layout lacks the tensor.
        """
        stored, parts = stored or name, self.parts.get(name.removesuffix(".weight"), {})
        if stored not in layout.stored:
            raise RuadaptError(f"{self.folder} changes {stored}, which {layout.folder} does not hold")
        base, whole, tokens = layout.stored[stored], parts.get("weight"), parts.get("trainable_tokens_delta")
        shape = base.shape if whole is None else tuple(whole.shape)
        fits = shape[1:] == base.shape[1:] and (shape == base.shape or stored not in layout.body())
        if tokens is not None:
            ids = self._token_ids(name)
            fits &= tokens.shape == (len(ids), shape[1]) and int(ids.max()) < shape[0]
        if lora := any("lora" in kind for kind in parts):
            left, right, scale = self._factors(name)
            fits &= (len(left), right.shape[1]) == shape
        if not fits:
            held = {kind: list(tensor.shape) for kind, tensor in parts.items()}
            raise RuadaptError(
                f"{self.folder} does not fit {name}, {list(base.shape)} in {layout.folder}: it holds {held}"
            )

        def rows(first: int, last: int) -> Tensor:
            block = (map_tensor(base) if whole is None else whole)[first:last]
            if tokens is not None:
                here = (ids >= first) & (ids < last)
                block = block.float().index_copy(0, ids[here] - first, tokens[here].float())
            if lora:
                block = block.float() + left[first:last].float() @ (right.float() * scale)
            return block

        return rows

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Left `[V, r]` and right `[r, d]` factors of what is added to a stored tensor, and its scale."""
        module = name.removesuffix(".weight")
        parts = self.parts[module]
        kind = "lora_embedding_{}" if "lora_embedding_A" in parts else "lora_{}"
        first, second = (parts.get(kind.format(letter)) for letter in "AB")
        if first is None or second is None:
            raise RuadaptError(f"{self.folder}: {module} lacks one of its two LoRA matrices")
        left, right = (first.T, second.T) if "embedding" in kind else (second, first)
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        own = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        rank = math.sqrt(len(right)) if self.config.get("use_rslora") else len(right)
        return left, right, (own or [self.config["lora_alpha"]])[0] / rank

    def _token_ids(self, name: str) -> Tensor:
        given = self.config.get("trainable_token_indices", self.config.get("token_indices"))
        if isinstance(given, dict):
            given = next((ids for end, ids in given.items() if f".{name}".endswith(f".{end}.weight")), None)
        if given is None:
            raise RuadaptError(f"{self.folder}: {CONFIG} does not say which rows of {name} were trained")
        return torch.tensor(given, dtype=torch.long)


def is_adapter(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def merge(source: Path, adapter: Adapter, target: Path, tokenizer: Path) -> None:
    """Write a model folder with a peft adapter merged, one block of one tensor in memory at a time.

    Args:
        source: the model that the adapter was trained on.
        tokenizer: folder of the tokenizer that goes with the merged embeddings.

    Raises:
        RuadaptError: the adapter does not fit the model, or it untied a tied head.
    """
    layout = read_layout(source)
    names = {"input": layout.input_name} | ({} if layout.tied else {"head": str(layout.head_name)})
    made = {role: adapter.rows(layout, name) for role, name in names.items()}
    heights = {name: adapter.height(name, layout) for name in names.values()}
    height = heights[layout.input_name]
    if set(heights.values()) != {height}:
        raise RuadaptError(f"{adapter.folder} on {source} gives matrices of unequal heights: {heights}")
    if layout.tied:
        _require_tied(adapter, layout, made["input"], height)
    body = {
        name: adapter.rows(layout, name)
        for name in adapter.changed() - {layout.input_name}
        if not name.endswith(HEAD_NAMES)
    }
    write_rows(source, target, height, made, tokenizer, body)


def _require_tied(adapter: Adapter, layout: Layout, rows: RowFunction, height: int) -> None:
    """Refuse an adapter whose training gave a tied model two different matrices."""
    name = layout.input_name
    if heads := [head for head in adapter.changed() if head.endswith(HEAD_NAMES)]:
        head = adapter.rows(layout, heads[0], stored=name)
        parts = [(first, min(first + 4096, height)) for first in range(0, height, 4096)]
        same = all(torch.equal(rows(*part).float(), head(*part).float()) for part in parts)
    else:  # trained token rows serve a tied head, too
        same = adapter.parts.get(name.removesuffix(".weight"), {}).keys() <= {"trainable_tokens_delta"}
    if not same:
        raise RuadaptError(
            f"{layout.folder} has a tied head, but {adapter.folder} trained the input embeddings apart from "
            "it; train with ensure_weight_tying=True, or untie the model first"
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
