"""Continued pre-training, and what all trainings share, on transformers' Trainer.

METHOD section 4: weights stay float32 while they are trained, matrix products run in bfloat16 where the
hardware multiplies it natively, and the result is saved in the dtype of the checkpoint it started from.
Under `accelerate launch` every process calls these functions with the same arguments; the main one writes.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ruadapt.checkpoints.model_configs import copy_files
from ruadapt.devices import bfloat16_is_native
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder
from ruadapt.training.encoding import collate
from ruadapt.training.losses import Teacher, fuse_head, only_counted
from ruadapt.training.recording import EvaluationHook, Recorder, last_checkpoint
from ruadapt.training.trainable import (
    TrainingOptions,
    attention,
    choose_trained,
    embeddings,
    halve_frozen_layers,
    speed_up_rows,
    without_adapters,
)


class _Trainer(transformers.Trainer):
    """The Trainer, with the rows of new tokens at a multiple of the learning rate, and with a teacher."""

    options: TrainingOptions
    new_rows: Sequence[int]
    fused: bool
    teacher: Teacher | None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **options: Any) -> Any:
        if self.teacher is None:
            return self._token_loss(model, inputs, options)
        read = inputs.pop("teacher_ids"), inputs.pop("teacher_positions")
        states: list[torch.Tensor] = []  # the fused head does not return them
        body = without_adapters(self.model).base_model
        hook = body.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
        loss = self._token_loss(model, inputs, options)
        hook.remove()
        # The loss of a part of an accumulated batch is its share of the whole.
        weight = self.options.hidden_state_weight / self.args.gradient_accumulation_steps
        return loss + weight * self.teacher.loss(states[0], *read)

    def _token_loss(self, model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        if self.fused:
            return super().compute_loss(model, inputs | {"fused_lm_head": True}, **options)
        if self.args.n_gpu > 1:  # without `accelerate launch` torch shares a batch out over the GPUs
            return super().compute_loss(model, inputs, **options)
        with only_counted(without_adapters(self.model).get_output_embeddings(), inputs):
            return super().compute_loss(model, inputs, **options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        factor = self.options.new_rows_learning_rate_factor
        if self.new_rows and factor != 1:
            matrices: list[Any] = [module.weight for module in embeddings(model or self.model)]
            speed_up_rows(optimizer, matrices, self.new_rows, factor)
        return optimizer


def fit(
    source: Path,
    rows: Dataset,
    target: Path,
    options: TrainingOptions,
    evaluate: EvaluationHook | None = None,
    checkpoints: Path | None = None,
    logs: Path | None = None,
    *,
    new_rows: Sequence[int] = (),
    teacher: Path | None = None,
    words: Path | None = None,
) -> dict[str, Any]:
    """Train a causal language model on transformers' Trainer and write the model folder `target`.

    Args:
        source: the folder to start from; its tokenizer, which made `rows`, is copied beside the weights.
        rows: what `encoding.pack` or `encode_chats` returned. They are shuffled by the seed, and
            repeated where the steps need more. With a column `length` batches are of similar length.
        evaluate: called as `evaluate(model, step)` before the first step, each `evaluate_every` steps and
            after the last; what it returns goes into the report's `evaluations`. Every process calls it.
        checkpoints: folder for `save_every`, of this training alone (`recording.checkpoint_folder`); it goes
            on from the last checkpoint there, bit for bit. Removed once `target` is whole.
        logs: folder for TensorBoard: loss and learning rate by step.
        new_rows: ids whose rows `new_rows_learning_rate_factor` speeds up.
        teacher: folder of the model that `hidden_state_weight` holds this one to, its tokenizer included.
        words: folder of another tokenizer and generation settings than the source's.

    Returns:
        `{"loss": [{"step", "loss", "learning_rate"}], "evaluations": [{"step", "tokens", ...}], "steps",
        "tokens", "seconds", "parameters", "trained_parameters", "bf16", "processes"}`; loss in nats per
        token, with what the teacher adds; tokens by the rows' mean length; the time without that of
        `evaluate`, and after a resumption that of the rest. LoRA is merged.

    Raises:
        RuadaptError: there are too few rows for one batch, the processes of `accelerate launch` can't share
            it out evenly, or the loss became NaN or infinite.
    """

    def build() -> Any:
        # The Trainer seeds the generators again: adapters made here do not change the order of the data.
        transformers.set_seed(options.seed)
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attention()
        )
        if words is not None:
            network.generation_config = transformers.GenerationConfig.from_pretrained(words)
        return choose_trained(network, options)

    tokenizer_folder = words or source
    if len(rows) < options.batch_size:
        raise RuadaptError(
            f"{len(rows)} sequences do not fill one batch of {options.batch_size}; "
            "give more text or a smaller batch"
        )
    if options.hidden_state_weight and teacher is None:
        raise RuadaptError("hidden_state_weight wants a teacher: the model before its vocabulary changed")
    processes = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    if options.batch_size % processes:
        raise RuadaptError(
            f"batch_size {options.batch_size} counts the sequences of all {processes} processes together; "
            f"give a multiple of {processes}"
        )
    by_length = "length" in rows.column_names
    sequence = round(sum(rows["length"]) / len(rows)) if by_length else len(rows[0]["input_ids"])
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    bf16 = bfloat16_is_native() if options.bf16 is None else options.bf16
    arguments = _arguments(options, options.batch_size // processes, bf16, by_length, checkpoints, logs)
    network = build()
    if options.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    if bf16 and dtype == torch.bfloat16 and "ACCELERATE_USE_FSDP" not in os.environ:
        halve_frozen_layers(network, network.get_output_embeddings())
    taught = None
    if teacher is not None and options.hidden_state_weight:
        precision = torch.bfloat16 if bf16 else torch.float32
        taught = Teacher(teacher, AutoTokenizer.from_pretrained(tokenizer_folder), precision)
    recorder = Recorder(evaluate, options.evaluate_every)
    trainer: Any = _Trainer(
        model=network,
        args=arguments,
        train_dataset=rows,
        data_collator=(lambda rows: collate(rows) | taught.read(rows)) if taught else collate,
        callbacks=[recorder],
    )
    trainer.options, trainer.new_rows, trainer.teacher = options, new_rows, taught
    trainer.fused = fuse_head(network, arguments.per_device_train_batch_size * sequence)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
    tuned = _train(trainer, options, checkpoints, build)
    if tuned is not None:
        _write(tuned, tokenizer_folder, target, dtype)
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)
    PartialState().wait_for_everyone()
    history: list[dict[str, Any]] = trainer.state.log_history
    tokens = sequence * options.batch_size * options.accumulation
    names = ("step", "loss", "learning_rate")
    return {
        "loss": [{name: row[name] for name in names} for row in history if "loss" in row],
        "evaluations": [
            {"step": row["step"], "tokens": tokens * row["step"], **row["evaluation"]}
            for row in history
            if "evaluation" in row
        ],
        "steps": options.steps,
        "tokens": tokens * options.steps,
        "seconds": recorder.seconds,
        "parameters": sum(count for count, _ in parameters),
        "trained_parameters": sum(count for count, trained in parameters if trained),
        "bf16": bf16,
        "processes": processes,
    }


def _arguments(
    options: TrainingOptions,
    batch_size: int,
    bf16: bool,
    by_length: bool,
    checkpoints: Path | None,
    logs: Path | None,
) -> transformers.TrainingArguments:
    """Return the Trainer's arguments for batches of `batch_size` on each device."""
    if logs is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    return transformers.TrainingArguments(
        output_dir=str(checkpoints or tempfile.gettempdir()),
        max_steps=options.steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(options.warmup_steps, options.steps // 10),
        weight_decay=options.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=options.epsilon,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=min(options.log_every, options.steps),
        # The filter would hide a NaN loss behind the running mean; here it stops the training.
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every and checkpoints else "no",
        save_steps=min(options.save_every, max(1, options.steps // 5)) or options.steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        train_sampling_strategy="group_by_length" if by_length else "random",
        remove_unused_columns=False,
        label_names=["labels"],
        torch_compile=options.compile,
        # Frozen tensors are not waited for; whatever trains has a part in every loss.
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none" if logs is None else "tensorboard",
    )


def _train(trainer: Any, options: TrainingOptions, checkpoints: Path | None, build: Callable[[], Any]) -> Any:
    """Train, from the last checkpoint if there is one; return the whole model, None beside the main process.

    Args:
        build: makes the model that takes what FSDP has trained.

    Raises:
        RuadaptError: the way of training over several devices is none that works here.
    """
    if trainer.is_deepspeed_enabled:
        raise RuadaptError("DeepSpeed is not supported; shard by FSDP, or use DDP (`accelerate config`)")
    if trainer.is_fsdp_enabled and options.new_rows_learning_rate_factor != 1:
        raise RuadaptError("new_rows_learning_rate_factor works on whole matrices; use DDP, or set it to 1")
    if trainer.is_fsdp_enabled and hasattr(trainer.model, "peft_config"):
        # accelerate ties emptied tensors by names that peft's wrappers have changed.
        raise RuadaptError("LoRA does not work with FSDP; use DDP: what it trains is small")
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoints and last_checkpoint(checkpoints))
    # The Trainer leaves its autocast around the model's forward, in place.
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    main = trainer.accelerator.is_main_process
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if main:
            network = build()
            network.load_state_dict(weights, strict=False)  # of tied tensors one is named
    return network if main else None


def _write(network: Any, tokenizer_folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a complete model folder: weights in `dtype`, configurations, tokenizer.

    Raises:
        RuadaptError: a weight is NaN or infinite, or a tied head is not tied any more.
    """
    with atomic_folder(target) as folder:
        if hasattr(network, "peft_config"):
            # In float32, cast once: sums of bfloat16 weights and adapters would be rounded twice.
            network = network.float().merge_and_unload()
        for name, tensor in network.named_parameters():
            if not torch.isfinite(tensor).all():
                raise RuadaptError(f"{name} is NaN or infinite after training; lower the learning rate")
        rows, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        if network.config.tie_word_embeddings and rows is not head:
            raise RuadaptError("the trained model's head is no longer tied to its embeddings")
        network.config.use_cache = True
        network.to(dtype).save_pretrained(folder)
        copy_files(tokenizer_folder, tokenizer_folder, folder)
