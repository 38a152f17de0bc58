"""Model folders opened for evaluation, their room, and the tokens that end their answers."""

from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.devices import bfloat16_is_native
from ruadapt.errors import RuadaptError


def load(
    folder: Path, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model folder for evaluation; nothing comes from the network.

    Weights keep the checkpoint's own dtype, except that bfloat16 becomes float32 where the processor has no
    bfloat16 products: there they take eight times as long, and float32 holds the same weights exactly.

    Args:
        folder: a complete model folder (config, safetensors, tokenizer).
        device: where to put it; None takes the accelerator if there is one, else the CPU.

    Raises:
        RuadaptError: the folder is missing or incomplete, or its tokenizer has ids beyond the embeddings.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise RuadaptError(f"cannot open the model folder {folder}: {error}") from error
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if model.dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not bfloat16_is_native():
        model = model.float()
    if len(tokenizer) > embedding_rows(model):
        raise RuadaptError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embeddings only "
            f"{embedding_rows(model)} rows"
        )
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def maximum_length(model: PreTrainedModel) -> int:
    """Return the most tokens the model's position embeddings take; 2^31 where the config states no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def require_room(model: PreTrainedModel, prompt: int, answer: int) -> None:
    """Refuse a prompt and an answer of so many tokens that do not fit the model's positions together.

    Raises:
        RuadaptError: they do not; nothing is ever cut off.
    """
    if prompt + answer > maximum_length(model):
        raise RuadaptError(
            f"{model.name_or_path}: a prompt of {prompt} tokens leaves no room for an answer of {answer} in "
            f"{maximum_length(model)} positions; leave it out, or use fewer examples (shots)"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the height of the input embeddings, unused rows included."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends an answer: those of the generation config, and the tokenizer's eos.

    Raises:
        RuadaptError: neither names one.
    """
    named = model.generation_config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise RuadaptError(f"{tokenizer.name_or_path} names no eos token; set one in generation_config.json")
    return sorted(ids)
