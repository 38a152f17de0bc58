"""Pre-training and continued pre-training on transformers' Trainer: the whole model, or its embeddings only.

METHOD section 4: weights stay float32 while they are trained, matrix products run in bfloat16 where the
hardware multiplies it natively, and the result is saved in the dtype of the checkpoint it started from.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, read_json, write_json
from ruadapt.model_folders import TOKENIZER_FILES
from ruadapt.packing import collate_blocks, digest
from ruadapt.recording import EvaluationHook, Recorder


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the papers' (METHOD section 4) at the size of the embedded pair.

    `steps` optimiser steps over `batch_size * accumulation` sequences each; `warmup_steps` of linear warm-up
    (at most a tenth of `steps`), then a cosine to zero. `train="embeddings"` freezes everything but the input
    embeddings and the output head. `evaluate_every`, `save_every`: steps, 0 for never. `compile` runs the
    model through torch.compile (needs a C++ compiler; worth it for hours). `progress` shows a bar.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    train: Literal["all", "embeddings"] = "all"
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


def bfloat16_is_native() -> bool:
    """Whether the training device multiplies bfloat16 in hardware; elsewhere it would only cost time."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def load_for_training(model: Path | PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, torch.dtype]:
    """Return the float32 model of a folder, or a new one of a configuration, and the dtype to save it in.

    Raises:
        RuadaptError: the folder is not a checkpoint that transformers can read.
    """
    set_seed(seed)
    # On a CPU the fused attention's backward pass takes longer than plain products: a sixth of a step.
    options: dict[str, Any] = {"dtype": torch.float32}
    if not torch.accelerator.is_available():
        options["attn_implementation"] = "eager"
    if isinstance(model, PreTrainedConfig):
        dtype = _dtype(model)  # building the model writes its own into the configuration
        return AutoModelForCausalLM.from_config(model, **options), dtype
    try:
        config = AutoConfig.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise RuadaptError(f"{model} is not a readable model folder: {error}") from error
    return network, _dtype(config)


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = config.dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def freeze_body(model: PreTrainedModel) -> None:
    """Leave only the input embeddings and the output head (one tensor where they are tied) trainable.

    Frozen tensors get neither weight gradients nor optimiser state; gradients still flow through them.
    """
    model.requires_grad_(False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(True)


def save_model(model: Any, tokenizer_folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a complete model folder: weights in `dtype`, configuration, generation settings, tokenizer.

    The written folder is loaded again before it takes its place: every weight must be the model's own, bit
    for bit, and a tied head must be tied (merging adapters has untied it: peft#2777).

    Raises:
        RuadaptError: a weight is NaN or infinite, the reloaded model differs, or the disk refuses.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise RuadaptError(f"{name} holds NaN or infinite values after training; lower the learning rate")
    model.config.use_cache = True
    with atomic_folder(target) as folder:
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


def pretrain(
    model: Path | PreTrainedConfig,
    tokenizer_folder: Path,
    blocks: Dataset,
    target: Path,
    options: TrainingOptions,
    evaluate: EvaluationHook | None = None,
    checkpoints: Path | None = None,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Train a causal language model on packed blocks and write the model folder `target`.

    Args:
        model: the folder to start from, or the configuration of a model to start from random weights.
        tokenizer_folder: the tokenizer that made `blocks`; its files are copied beside the weights.
        blocks: what `packing.pack` or `packing.focus_on_answers` returned. They are shuffled by the seed, and
            repeated where the steps need more.
        evaluate: called as `evaluate(model, step)` before the first step, each `evaluate_every` steps and
            after the last; what it returns goes into the report's `evaluations`.
        checkpoints: folder for `save_every`; training goes on from its last checkpoint, bit for bit, if
            that was made with the same options, model and blocks. Removed once `target` is whole.
        logs: folder for TensorBoard: loss, learning rate and what `evaluate` returned, by step.

    Returns:
        `{"loss": [{"step", "loss", "learning_rate"}], "evaluations": [{"step", "tokens", ...}], "steps",
        "tokens", "seconds", "tokens_per_second", "parameters", "trained_parameters", "bf16"}`; loss in nats
        per token; the time without that of `evaluate`, and after a resumption that of the rest.

    Raises:
        RuadaptError: the tokenizer has more tokens than the model rows, there are too few blocks for one
            batch, or the loss became NaN or infinite.
    """
    network, dtype = load_for_training(model, options.seed)
    if isinstance(model, PreTrainedConfig) and (Path(tokenizer_folder) / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(tokenizer_folder)
    _check_vocabulary(network, tokenizer_folder)
    source = model.to_json_string() if isinstance(model, PreTrainedConfig) else str(model)
    block_size = len(blocks[0]["input_ids"])
    report = fit(
        network,
        blocks,
        collate_blocks,
        options,
        evaluate=evaluate,
        checkpoints=checkpoints,
        identity={"model": source, "blocks": digest(blocks)} if checkpoints else None,
        tokens_per_sequence=block_size,
        logs=logs,
    )
    save_model(network, tokenizer_folder, target, dtype)
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def fit(
    network: PreTrainedModel,
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    options: TrainingOptions,
    evaluate: EvaluationHook | None = None,
    checkpoints: Path | None = None,
    identity: dict[str, Any] | None = None,
    tokens_per_sequence: int = 0,
    by_length: bool = False,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Train `network` in place with transformers' Trainer; the common part of `pretrain` and `finetune`.

    With `train="embeddings"` the body is frozen here; with "all", the caller says what requires gradients.
    `identity` is what checkpoints depend on besides the options. `by_length` puts rows of similar length
    (column `length`) into the same batch. `logs`: as in `pretrain`.

    Raises:
        RuadaptError: as `pretrain`.
    """
    if len(rows) < options.batch_size:
        raise RuadaptError(
            f"{len(rows)} sequences do not fill one batch of {options.batch_size}; "
            "give more text or a smaller batch"
        )
    if options.train == "embeddings":
        freeze_body(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    bf16 = bfloat16_is_native()
    with _training_folder(checkpoints, {"options": asdict(options), **(identity or {})}) as folder:
        last = last_checkpoint(folder)
        if logs is not None and last is None:
            shutil.rmtree(logs, ignore_errors=True)  # of a training that was killed
        writer = SummaryWriter(str(logs)) if logs is not None else None
        tokens = tokens_per_sequence * options.batch_size * options.accumulation
        recorder = Recorder(evaluate, options.evaluate_every, tokens, writer, options.progress)
        trainer = Trainer(
            model=network,
            args=_arguments(options, folder, bf16, by_length),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[recorder, *([TensorBoardCallback(writer)] if writer else [])],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=last)
        finally:
            if writer is not None:
                writer.close()
    # The Trainer leaves its autocast around the model's forward, in place.
    trainer.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    history: list[dict[str, Any]] = trainer.state.log_history
    return {
        "loss": [
            {key: row[key] for key in ("step", "loss", "learning_rate")} for row in history if "loss" in row
        ],
        "evaluations": [{"step": row["step"], **row["evaluation"]} for row in history if "evaluation" in row],
        "steps": options.steps,
        "tokens": tokens * options.steps,
        "seconds": recorder.seconds,
        "tokens_per_second": recorder.tokens_per_step * recorder.steps / max(recorder.seconds, 1e-9),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "bf16": bf16,
    }


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a Trainer folder: the state file is the last to be written."""
    complete = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(complete)[1] if complete else None


def _arguments(options: TrainingOptions, folder: Path, bf16: bool, by_length: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(options.warmup_steps, options.steps // 10),
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_epsilon=options.epsilon,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        torch_compile=options.compile,
        logging_steps=min(options.log_every, options.steps),
        # The filter would hide a NaN loss behind the running mean; here it stops the training.
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or options.steps,
        save_total_limit=2,
        dataloader_drop_last=True,
        train_sampling_strategy="group_by_length" if by_length else "random",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=["labels"],
        report_to="none",
    )


@contextmanager
def _training_folder(checkpoints: Path | None, identity: dict[str, Any]) -> Iterator[Path]:
    """Yield where the Trainer writes; checkpoints of another training are removed first."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    marker = checkpoints / "identity.json"
    wanted = json.loads(json.dumps(identity))
    if checkpoints.exists() and not (marker.exists() and read_json(marker) == wanted):
        shutil.rmtree(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(marker, wanted)
    yield checkpoints


def _check_vocabulary(network: Any, tokenizer_folder: Path) -> None:
    tokens = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    rows = len(network.get_input_embeddings().weight)
    if tokens > rows:
        raise RuadaptError(
            f"the tokenizer {tokenizer_folder} has {tokens} tokens but the model {rows} embedding rows; "
            "initialise the model's embeddings for this tokenizer first"
        )
