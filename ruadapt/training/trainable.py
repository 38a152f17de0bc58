"""What of a model is trained: all of it, or its embeddings, with or without LoRA on the body beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ruadapt.errors import RuadaptError


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the papers' (METHOD section 4) at the size of the embedded pair.

    `steps` optimiser steps over `batch_size * accumulation` sequences each, on however many processes;
    `warmup_steps` of linear warm-up (at most a tenth of `steps`), then a cosine to zero.

    `train`: all weights, the input embeddings and the output head alone, or the body alone. With `lora_rank`
    the body learns through LoRA on its linear layers; the embeddings are whole beside it ("embeddings") or
    stay as they are ("body"). With `train="all"` the rows of new tokens learn at
    `new_rows_learning_rate_factor` times `learning_rate`: they start as means and have everything to learn,
    while all else has something to lose.

    `hidden_state_weight` times the distance to a teacher's hidden states (`losses.states_loss`) joins
    the loss; 0 asks for no teacher.

    `bf16`: matrix products in bfloat16; None does so where the hardware has them. `gradient_checkpointing`
    computes activations again in the backward pass, not kept. `evaluate_every`, `save_every`: steps, 0 for
    never; checkpoints lie a fifth of all steps apart at most. `compile`: torch.compile (needs a compiler).
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    train: Literal["all", "embeddings", "body"] = "all"
    accumulation: int = 1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    epsilon: float = 1e-5
    evaluate_every: int = 0
    save_every: int = 0
    log_every: int = 10
    compile: bool = False
    new_rows_learning_rate_factor: float = 1.0
    hidden_state_weight: float = 0.0
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    bf16: bool | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TuningOptions(TrainingOptions):
    """How to tune on chats after LEP (METHOD section 6).

    Rows longer than `max_length` tokens are left out, never cut: a cut answer would teach to stop early or
    not at all. `passes`: how often a row is read at most, so few rows make few steps; 0 for no limit.
    """

    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    lora_dropout: float = 0.0
    max_length: int = 512
    passes: float = 0


def attention() -> str | None:
    """Return what transformers is to compute attention with in training; None leaves it to transformers.

    On a CPU these are plain products: the backward pass of the fused attention takes a sixth of a step more,
    and with them a row's states do not depend on the rows and the padding beside it.
    """
    return None if torch.accelerator.is_available() else "eager"


def without_adapters(network: Any) -> PreTrainedModel:
    """Return the model inside peft's wrapper, or the model itself where it has none."""
    model: PreTrainedModel = network.get_base_model() if hasattr(network, "peft_config") else network
    return model


def embeddings(network: Any) -> list[nn.Module]:
    """Return the input embeddings, and the output head where it is a matrix of its own."""
    tied = network.config.tie_word_embeddings
    return [network.get_input_embeddings(), *([] if tied else [network.get_output_embeddings()])]


def choose_trained(network: PreTrainedModel, options: TrainingOptions) -> Any:
    """Return the model with only what `options` name requiring gradients, in peft's wrapper for LoRA.

    Frozen tensors get neither weight gradients nor optimiser state; gradients still flow through them.

    Raises:
        RuadaptError: LoRA is to train beside all weights.
    """
    if options.lora_rank is not None:
        if options.train == "all":
            raise RuadaptError("LoRA beside training all weights has no effect; train embeddings or body")
        return get_peft_model(network, lora_config(network, options))
    network.requires_grad_(options.train != "embeddings")
    for module in embeddings(network):
        module.requires_grad_(options.train != "body")
    return network


def lora_config(network: PreTrainedModel, options: TrainingOptions) -> LoraConfig:
    """Return LoRA on all linear layers, the embeddings trained whole beside it or not at all."""
    own, whole = embeddings(network), options.train == "embeddings"
    names = [name for name, module in network.named_modules() if any(module is one for one in own)]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank or 0,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        modules_to_save=names if whole else None,
        # Without it the merge would give a tied model a head of its own (peft#2777).
        ensure_weight_tying=whole and bool(network.config.tie_word_embeddings),
    )


def halve_frozen_layers(network: nn.Module, head: nn.Module) -> None:
    """Keep the frozen linear layers in bfloat16, which autocast would make of them in each forward pass.

    Half their memory, no casts, the same numbers: only for weights that come from a bfloat16 checkpoint. The
    head keeps its dtype: where it is tied, hidden states start from it.
    """
    kept = set(head.modules())
    for module in network.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.Linear) and module not in kept and frozen:
            module.to(torch.bfloat16)


def speed_up_rows(
    optimizer: torch.optim.Optimizer, matrices: Sequence[nn.Parameter], rows: Sequence[int], factor: float
) -> None:
    """Let `rows` of the matrices `[V, d]` learn at `factor` times the learning rate of all else.

    An optimiser has one learning rate for a matrix, and Adam's steps do not depend on a gradient's scale. So
    the matrices get groups of their own at the high rate, and of each step their other rows take the share
    `1 / factor`.
    """
    own = {id(matrix) for matrix in matrices}
    for group in list(optimizer.param_groups):
        fast = [parameter for parameter in group["params"] if id(parameter) in own]
        if fast:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.param_groups.append({**group, "params": fast, "lr": group["lr"] * factor})
    old = torch.ones(len(matrices[0]), dtype=torch.bool)
    old[list(rows)] = False
    slow = old.nonzero().flatten()
    before: list[torch.Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [matrix.data[slow] for matrix in matrices]

    def shrink(*_: Any) -> None:
        for matrix in matrices:  # in place, and nothing is kept: for a large model these are gigabytes
            matrix.data[slow] = before.pop(0).lerp_(matrix.data[slow], 1 / factor)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(shrink)
