"""Peft adapters made whole models: peft merges, the result is checked, and transformers writes it."""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from ruadapt.checkpoints.model_configs import copy_files, read_chat_template, write_chat_template
from ruadapt.checkpoints.model_folders import ADAPTER, read_layout
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, require_disk_space

WEIGHTS = "adapter_model.safetensors"
# Relative difference of logits that sums in another order may leave in float32.
TOLERANCE = 1e-3


def is_adapter(folder: Path) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def trained_on(adapter: Path) -> Path:
    """Return the folder of the model that an adapter belongs to, as its config names it.

    Raises:
        RuadaptError: there is no such folder.
    """
    folder = Path(read_json(adapter / ADAPTER).get("base_model_name_or_path") or "")
    if not (folder / "config.json").is_file():
        raise RuadaptError(
            f"{adapter} was trained on {folder}, which is no model folder; write the folder's place into "
            f"{ADAPTER}, as base_model_name_or_path"
        )
    return folder


def merge(source: Path, adapter: Path, target: Path, tokenizer: Path) -> None:
    """Write a model folder with a peft adapter merged. Memory holds the whole model, in float32.

    Sums are rounded once, to the source's dtype. The merged model must give the logits of the model with its
    adapter, which a tied head does not where the input embeddings were trained apart from it.

    Args:
        source: the model that the adapter was trained on.
        tokenizer: folder of the tokenizer that goes with the merged embeddings.

    Raises:
        RuadaptError: the adapter is pickled, does not fit the model or can't be merged into it, or the model
            does not fit in memory or on the disk.
    """
    from peft import PeftModel  # of the extra `training`: nothing else of surgery needs it

    if not (adapter / WEIGHTS).is_file():
        raise RuadaptError(
            f"{adapter} holds no {WEIGHTS}; a pickled adapter (.bin) can run code: save it with "
            "peft's safe_serialization=True first"
        )
    layout = read_layout(source)
    needed = 4 * sum(tensor.numel() for tensor in layout.tensors.values())
    if needed > psutil.virtual_memory().available:
        raise RuadaptError(f"merging {adapter} needs {needed / 1e9:.0f} GB of memory; merge it elsewhere")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
        network = PeftModel.from_pretrained(model, adapter).eval()
        probe = torch.arange(0, layout.height(), max(1, layout.height() // 256))[None]
        with torch.no_grad():
            before = network(probe).logits
            merged = network.merge_and_unload()
            after = merged(probe).logits
    except (ValueError, RuntimeError, KeyError) as error:
        raise RuadaptError(f"peft cannot merge {adapter} into {source}: {error}") from error
    untied = merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    if (layout.tied and untied) or not (after - before).norm() <= TOLERANCE * before.norm():
        raise RuadaptError(
            f"{adapter} cannot be merged into {source}: logits would change, or the head would be untied; "
            "train a tied head with ensure_weight_tying=True, or untie the model first"
        )
    for name, tensor in (*merged.named_parameters(), *merged.named_buffers()):
        tensor.data = tensor.to(layout.tensors.get(name, layout.input).dtype)
    require_disk_space(target, layout.size())
    merged.save_pretrained(target)
    copy_files(source, tokenizer, target)


def complete_instruct(base: Path, adapter: Path, chat_template: str, target: Path) -> None:
    """Merge an instruct model that was published as an adapter onto `base`, and write the whole model.

    Args:
        adapter: its tokenizer is taken where it has one, else the base's.
        chat_template: a Jinja file for an adapter that came without one; empty keeps what there is.

    Raises:
        RuadaptError: the template is missing, or as `merge`.
    """
    words = adapter if (adapter / "tokenizer.json").is_file() else base
    template = read_chat_template(words, chat_template)
    merge(base, adapter, target, words)
    if template is not None:
        write_chat_template(target, template)
