"""What of a model is trained: all of it, its embeddings, its new rows, and LoRA on the body beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ruadapt.errors import RuadaptError


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the papers' (METHOD section 4) at the size of the embedded pair.

    `steps` optimiser steps over `batch_size * accumulation` sequences each, on however many processes;
    `warmup_steps` of linear warm-up (at most a tenth of `steps`), then a cosine to zero.

    `train`: all weights; or the input embeddings and the output head alone; or only those of their rows that
    are new. Embeddings and new rows may be joined by LoRA of `lora_rank` on the linear layers of the body.
    The embeddings (and the head) learn at `embedding_learning_rate_factor` times `learning_rate`, and with
    `train="all"` the rows of new tokens at `new_rows_learning_rate_factor` times that: they start as means
    and have everything to learn, while all else has something to lose.

    `chunked_loss`: never hold all logits of a batch (`losses`); None does so where they would take more than
    1 GB. `bf16`: matrix products in bfloat16; None does so where the hardware has them.
    `gradient_checkpointing` computes activations again in the backward pass instead of keeping them.
    `evaluate_every`, `save_every`: steps, 0 for never. `compile` runs the model through torch.compile (needs
    a C++ compiler; worth it for hours). `progress` shows a bar.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    train: Literal["all", "embeddings", "new_rows"] = "all"
    accumulation: int = 1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-5
    max_grad_norm: float = 1.0
    evaluate_every: int = 0
    save_every: int = 0
    log_every: int = 10
    compile: bool = False
    progress: bool = False
    embedding_learning_rate_factor: float = 1.0
    new_rows_learning_rate_factor: float = 1.0
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    chunked_loss: bool | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False


def freeze_body(model: PreTrainedModel) -> None:
    """Leave only the input embeddings and the output head (one tensor where they are tied) trainable.

    Frozen tensors get neither weight gradients nor optimiser state; gradients still flow through them.
    """
    model.requires_grad_(False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(True)


def add_adapters(network: PreTrainedModel, options: TrainingOptions, new_rows: Sequence[int] | None) -> Any:
    """Return the model to train: `network`, or peft's wrapper where rows or LoRA train.

    New rows are parameters of their own, so that old rows get no optimiser state; peft copies them into the
    matrix in each forward pass, which costs one more matrix and its gradient.

    Raises:
        RuadaptError: LoRA is to train beside all weights, or it is not known which rows are new.
    """
    if options.train == "all" and options.lora_rank is not None:
        raise RuadaptError("LoRA beside training all weights has no effect; set train to embeddings")
    if options.train == "new_rows" and not new_rows:
        raise RuadaptError(
            "train=new_rows needs the new rows; name the original tokenizer, and one that adds"
        )
    if options.lora_rank is None and options.train != "new_rows":
        return network
    tied = bool(network.config.tie_word_embeddings)
    own = [network.get_input_embeddings(), *([] if tied else [network.get_output_embeddings()])]
    names = [name for name, module in network.named_modules() if any(module is part for part in own)]
    rows = list(new_rows or [])
    if options.lora_rank is None:
        return get_peft_model(
            network, TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=names, token_indices=rows)
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        modules_to_save=names if options.train == "embeddings" else None,
        trainable_token_indices=dict.fromkeys(names, rows) if options.train == "new_rows" else None,
        # Without it the merge would give a tied model a head of its own.
        ensure_weight_tying=tied and options.train == "embeddings",
    )
    return get_peft_model(network, config)


def embedding_parameters(network: Any) -> set[int]:
    """Return the identities of the parameters that belong to the input embeddings or the output head."""
    modules = (network.get_input_embeddings(), network.get_output_embeddings())
    return {id(parameter) for module in modules for parameter in module.parameters()}


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


def split_embeddings(optimizer: torch.optim.Optimizer, embeddings: set[int], factor: float) -> None:
    """Put the embeddings into parameter groups of their own, at `factor` times the learning rate."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in embeddings]
        rest = [parameter for parameter in group["params"] if id(parameter) not in embeddings]
        if own and rest:
            optimizer.param_groups.append({**group, "params": own, "lr": group["lr"] * factor})
            group["params"] = rest
        elif own:
            group["lr"] *= factor


def slow_rows(
    optimizer: torch.optim.Optimizer, matrices: Sequence[nn.Parameter], rows: torch.Tensor, share: float
) -> None:
    """Let `rows` of the matrices take only `share` of each step that the optimiser makes.

    An optimiser has one learning rate for a matrix, and Adam's steps do not depend on a gradient's scale.

    Args:
        rows: int64 `[n]`, ids of the same rows in every matrix `[V, d]`.
        share: 0 keeps the rows, 1 changes nothing.
    """
    before: list[torch.Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [matrix.data[rows] for matrix in matrices]

    def shrink(*_: Any) -> None:
        for matrix, old in zip(matrices, before, strict=True):
            matrix.data[rows] = torch.lerp(old, matrix.data[rows], share)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(shrink)
