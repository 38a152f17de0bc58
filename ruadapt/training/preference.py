"""Preference tuning after calibration: DPO, KTO and SimPO through trl, each a LoRA that is merged.

METHOD section 6: the reference's pipelines go SFT → KTO → SimPO. A link of that chain is one call here; the
next starts from the folder that it wrote.
"""

import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback

from ruadapt import files, freshness
from ruadapt.devices import bfloat16_is_native
from ruadapt.errors import RuadaptError
from ruadapt.training.calibration import IGNORED, collate_chats, encode_chats, lora_config, merge_lora
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.launching import built_together
from ruadapt.training.recording import (
    claim_checkpoints,
    in_turn,
    last_checkpoint,
    own_share,
    summary_writer,
)
from ruadapt.training.trainer import load_for_training, save_model

REPORT = "training.json"
Pair = dict[str, Any]


@dataclass(frozen=True)
class PreferenceOptions:
    """How to tune on pairs of answers.

    `steps` optimiser steps over `batch_size * accumulation` pairs (KTO: single answers, two of each pair),
    those of all processes together.
    `beta` scales the rewards: `beta (log p − log p_reference)` in DPO and KTO, `beta log p / tokens` in
    SimPO, which wants the chosen one `gamma` above. Pairs longer than `max_length` tokens are left out.
    `merge_scale`: as `TuningOptions.merge_scale`. `save_every`: steps, 0 for never.
    """

    steps: int
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-6
    seed: int = 0
    beta: float = 0.1
    gamma: float = 0.5
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    lora_rank: int = 32
    lora_alpha: int = 32
    merge_scale: float = 1.0
    max_length: int = 2048
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 0
    progress: bool = False


def prefer(
    source: Path,
    target: Path,
    pairs: Path,
    heldout: Path,
    method: str,
    options: dict[str, Any],
    logs: Path | None = None,
) -> dict[str, Any]:
    """Tune the chat model `source` on pairs of answers; write the model to `target`. Done once per input.

    Args:
        pairs, heldout: JSON Lines of `prompt`, `chosen`, `rejected`, lists of messages each.
        method: `dpo`, `kto` or `simpo`.
        options: of `PreferenceOptions`.
        logs: folder for TensorBoard.

    Returns:
        `loss` by step, `steps`, `pairs`, `dropped_pairs`, `before` and `after`: `margins` of the held-out
        pairs.

    Raises:
        RuadaptError: unknown method, no pair short enough, a chat template that cannot render a pair, a loss
            that became NaN, or memory ran out; `target` is then left as it was.
    """
    key = {
        "source": freshness.result_hash(source),
        "pairs": files.hash_path(pairs),
        "heldout": files.hash_path(heldout),
        "method": method,
        "options": options,
    }
    checkpoints = target.with_name(f".{target.name}.checkpoints")

    def build(folder: Path) -> None:
        report = tune(
            source,
            list(files.read_jsonl(pairs)),
            list(files.read_jsonl(heldout)),
            folder,
            method,
            PreferenceOptions(**options),
            checkpoints,
            logs,
        )
        if report is not None:
            files.write_json(folder / REPORT, report)

    report: dict[str, Any] = files.read_json(built_together(target, key, build, "prefer") / REPORT)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def tune(
    source: Path,
    pairs: Sequence[Pair],
    heldout: Sequence[Pair],
    target: Path,
    method: str,
    options: PreferenceOptions,
    checkpoints: Path,
    logs: Path | None = None,
) -> dict[str, Any] | None:
    """Tune a chat model on pairs of answers by one method; see `prefer`. None on all but the main process.

    The reference of DPO and KTO is the model itself without its adapters, so no second one is held.
    Training goes on from the last checkpoint in `checkpoints` if it was made by the same call.
    """
    if method not in PREFERENCE_METHODS:
        raise RuadaptError(f"unknown preference method {method!r}; known: {', '.join(PREFERENCE_METHODS)}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    kept, tested = (_short(part, tokenizer, options.max_length) for part in (pairs, heldout))
    if len(kept) < options.batch_size or not tested:
        raise RuadaptError(
            f"{len(kept)} of {len(pairs)} pairs and {len(tested)} of {len(heldout)} held-out ones fit into "
            f"max_length {options.max_length}; a batch needs {options.batch_size}, the margin one: "
            "give more pairs or a greater length"
        )
    if tokenizer.pad_token is None:  # trl wants one; attention never looks at padding
        tokenizer.pad_token = tokenizer.eos_token
    network, dtype = load_for_training(source, options.seed)
    own = [
        (part, name, getattr(part, name, None))
        for part in (network.config, network.generation_config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    ]
    state = PartialState()
    identity = {"source": freshness.result_hash(source), "method": method, **asdict(options)}
    with in_turn():
        # The main process alone may have the weights: FSDP can leave the others' empty until it shards them.
        before = _measured(network, tokenizer, tested) if state.is_main_process else {}
        claim_checkpoints(checkpoints, identity)
    writer = summary_writer(logs) if logs is not None and state.is_main_process else None
    trainer = _trainer(method, network, tokenizer, kept, options, checkpoints, writer)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuadaptError(
            f"out of memory with {options.batch_size} pairs of up to {options.max_length} tokens; lower "
            "batch_size (and raise accumulation) or max_length, or set gradient_checkpointing; training goes "
            "on from the last checkpoint"
        ) from error
    finally:
        if writer is not None:
            writer.close()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if state.is_main_process:
            network, _ = load_for_training(source, options.seed)
            trained = get_peft_model(network, lora_config(network, options.lora_rank, options.lora_alpha))
            trained.load_state_dict(weights)
    if not state.is_main_process:
        return None
    merged = merge_lora(trained, options.merge_scale)
    # The trainers write the tokenizer's special tokens into the configurations: a chat model would lose the
    # token that ends its answers where that is not the tokenizer's own end token.
    for part, name, value in own:
        setattr(part, name, value)
    after = _measured(merged, tokenizer, tested)
    save_model(merged, source, target, dtype)
    history = trainer.state.log_history
    return {
        "method": method,
        "loss": [
            {key: row[key] for key in ("step", "loss", "learning_rate")} for row in history if "loss" in row
        ],
        "steps": trainer.state.global_step,
        "pairs": len(kept),
        "dropped_pairs": len(pairs) - len(kept),
        "before": before,
        "after": after,
        "options": asdict(options),
    }


@torch.inference_mode()
def margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 8
) -> dict[str, float]:
    """Say how much more likely a model finds the chosen answers than the rejected ones.

    Returns:
        Means over the pairs: `margin`, `log p(chosen) − log p(rejected)` in nats of the whole answers with
        their end; `margin_per_token`, the same of the means over tokens; `accuracy`, the share of pairs with
        a positive margin; and `pairs`, their number.
    """
    rows = [{"messages": [*pair["prompt"], *pair[name]]} for pair in pairs for name in ("chosen", "rejected")]
    examples = encode_chats(rows, tokenizer, last_only=True)
    was_training = model.training
    model.eval()
    sums, counts = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        batch = collate_chats(examples[start : start + batch_size])
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits[:, :-1].float()
        labels = batch["labels"][:, 1:].to(logits.device)
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        sums[start : start + batch_size] = -losses.sum(dim=1).double().cpu()
        counts[start : start + batch_size] = (labels != IGNORED).sum(dim=1).double().cpu()
    model.train(was_training)
    margin = sums[::2] - sums[1::2]
    per_token = (sums / counts)[::2] - (sums / counts)[1::2]
    return {
        "margin": float(margin.mean()),
        "margin_per_token": float(per_token.mean()),
        "accuracy": float((margin > 0).double().mean()),
        "pairs": len(pairs),
    }


def _measured(network: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, float]:
    """Take the margins on the accelerator, if any, and bring the model back to where it was."""
    place = network.device
    if torch.accelerator.is_available():
        network.to(torch.accelerator.current_accelerator())
    found = margins(network, tokenizer, pairs)
    network.to(place)
    return found


def _short(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """Leave out pairs with an answer that would be cut; their rendering is checked on the way."""
    if not pairs:
        return []
    rows = [{"messages": [*pair["prompt"], *pair[name]]} for pair in pairs for name in ("chosen", "rejected")]
    lengths = [example["length"] for example in encode_chats(rows, tokenizer, last_only=True)]
    fits = [max(two) <= max_length for two in zip(lengths[::2], lengths[1::2], strict=True)]
    return [pair for pair, fit in zip(pairs, fits, strict=True) if fit]


def _trainer(
    method: str,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    options: PreferenceOptions,
    folder: Path,
    writer: Any,
) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": own_share(options.batch_size, "pairs"),
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(options.warmup_steps, options.steps // 10),
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "data_seed": options.seed,
        "bf16": bfloat16_is_native(),
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": options.gradient_checkpointing,
        "max_length": options.max_length + 1,  # an end token may be added; nothing is cut
        "beta": options.beta,
        "logging_steps": min(options.log_every, options.steps),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if options.save_every else "no",
        "save_steps": options.save_every or options.steps,
        "save_total_limit": 2,
        "disable_tqdm": not options.progress or not PartialState().is_main_process,
        "remove_unused_columns": method != "simpo",  # whose collator takes them all
        "report_to": "none",
    }
    rows: list[dict[str, Any]] = list(pairs)
    # trl takes seconds to import, and most runs go without it.
    if method == "simpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        # cpo_alpha weighs a likelihood term that SimPO does not have.
        arguments: Any = CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=options.gamma, **common)
        kind: Any = CPOTrainer
    elif method == "dpo":
        from trl import DPOConfig, DPOTrainer

        arguments, kind = DPOConfig(**common), DPOTrainer
    else:
        from trl import KTOConfig, KTOTrainer

        arguments, kind = KTOConfig(**common), KTOTrainer
        rows = [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for name in ("chosen", "rejected")
            for pair in pairs
        ]
        # trl takes them in their order: whatever else, a batch of good answers alone, and then of bad ones.
        random.Random(options.seed).shuffle(rows)
    config = lora_config(network, options.lora_rank, options.lora_alpha)
    # KTO pairs prompts with other answers within what it takes for one process's batch, which may be a single
    # answer: it is to see the batch of all processes.
    share = arguments.per_device_train_batch_size
    arguments.per_device_train_batch_size = options.batch_size
    trainer = kind(
        model=network,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[_StopAtNan(), *([TensorBoardCallback(writer)] if writer else [])],
    )
    arguments.per_device_train_batch_size = trainer._train_batch_size = share
    trainer.remove_callback(PrinterCallback)
    return trainer


class _StopAtNan(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise RuadaptError(
                f"the loss became {loss} at or shortly before step {state.global_step}; lower the learning "
                f"rate ({args.learning_rate}); the last good checkpoint, if any, is kept"
            )
