"""Trained models as complete folders, and whole again after training in shards."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ruadapt.checkpoints.model_folders import TOKENIZER_FILES
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder


def save_model(model: Any, tokenizer_folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a complete model folder: weights in `dtype`, configuration, generation settings, tokenizer.

    The written folder is loaded again before it takes its place: every weight must be the model's own, bit
    for bit, and a tied head must be tied (merging adapters has untied it: peft#2777).

    Raises:
        RuadaptError: a weight is NaN or infinite, the reloaded model differs, or the disk refuses.
    """
    with atomic_folder(target) as folder:
        write_model(model, tokenizer_folder, folder, dtype)


def write_model(model: Any, tokenizer_folder: Path, folder: Path, dtype: torch.dtype) -> None:
    """Do what `save_model` does in a folder that is not yet in its place."""
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise RuadaptError(f"{name} holds NaN or infinite values after training; lower the learning rate")
    model.config.use_cache = True
    model.to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(Path(tokenizer_folder) / name, folder / name)
    _check_reload(model, folder)


def _check_reload(model: Any, folder: Path) -> None:
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if model.config.tie_word_embeddings:
        rows, head = reloaded.get_input_embeddings().weight, reloaded.get_output_embeddings().weight
        if rows is not head:
            raise RuadaptError("the saved model's head is no longer tied to its embeddings")
    # Weights, not logits: casting the model also cast buffers that a reload computes in float32.
    written = reloaded.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.cpu(), written.get(name, torch.empty(0))):
            raise RuadaptError(f"{name} of the saved model differs from the trained one: it was not saved")


def empty_copy(network: PreTrainedModel) -> PreTrainedModel:
    """Copy the structure; its tensors take no memory before something is written into them."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in network.parameters()}
    return deepcopy(network, empty)


def keep_ties(network: nn.Module) -> None:
    """Let `tie_weights` tie what is one tensor now.

    FSDP calls it on emptied tensors; transformers' own ties by names that peft's wrappers have changed.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))

    def tie() -> None:
        for (module, name), *others in owners.values():
            for other, its_name in others:
                setattr(other, its_name, getattr(module, name))

    network.tie_weights = tie  # type: ignore[assignment]


def load_whole(network: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Fill a network with gathered weights, of which tied tensors may be named once.

    Raises:
        RuadaptError: a tensor is missing.
    """
    missing = network.load_state_dict(weights, strict=False).missing_keys
    parameters = dict(network.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[name]) for name in weights.keys() & parameters.keys()}
    if lost := [name for name in missing if id(parameters.get(name)) not in loaded]:  # tied ones are not lost
        raise RuadaptError(f"the processes' shards of the model lack {', '.join(lost)}: nothing was saved")
