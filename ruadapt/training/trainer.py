"""Pre-training and continued pre-training on transformers' Trainer: the whole model, or its embeddings only.

METHOD section 4: weights stay float32 while they are trained, matrix products run in bfloat16 where the
hardware multiplies it natively, and the result is saved in the dtype of the checkpoint it started from.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel
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
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import LengthGroupedSampler

from ruadapt.devices import bfloat16_is_native
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, hash_path
from ruadapt.freshness import set_aside
from ruadapt.training.losses import choose_loss, chunked_loss
from ruadapt.training.packing import collate_blocks, digest
from ruadapt.training.recording import (
    EvaluationHook,
    Recorder,
    claim_checkpoints,
    in_turn,
    join_processes,
    last_checkpoint,
    out_of_memory,
    own_share,
    summary_writer,
)
from ruadapt.training.saving import empty_copy, keep_ties, load_whole, write_model
from ruadapt.training.saving import save_model as save_model
from ruadapt.training.trainable import (
    TrainingOptions,
    add_adapters,
    embedding_parameters,
    freeze_body,
    halve_frozen_layers,
    slow_rows,
    split_embeddings,
)

if TYPE_CHECKING:  # slow to import, and the benchmark does without
    from datasets import Dataset


def load_for_training(model: Path | PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, torch.dtype]:
    """Return the float32 model of a folder, or a new one of a configuration, and the dtype to save it in.

    Raises:
        RuadaptError: the folder is not a checkpoint that transformers can read.
    """
    join_processes()  # before loading, which may depend on it
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


def pretrain(
    model: Path | PreTrainedConfig,
    tokenizer_folder: Path,
    blocks: "Dataset",
    target: Path,
    options: TrainingOptions,
    evaluate: EvaluationHook | None = None,
    checkpoints: Path | None = None,
    logs: Path | None = None,
    new_rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train a causal language model on packed blocks and write the model folder `target`.

    Under `accelerate launch` every process calls this with the same arguments; the main one writes.

    Args:
        model: the folder to start from, or the configuration of a model to start from random weights.
        tokenizer_folder: the tokenizer that made `blocks`; its files are copied beside the weights.
        blocks: what `packing.pack` or `packing.focus_on_answers` returned. They are shuffled by the seed, and
            repeated where the steps need more.
        evaluate: called as `evaluate(model, step)` before the first step, each `evaluate_every` steps and
            after the last; what it returns goes into the report's `evaluations`. Every process calls it.
        checkpoints: folder for `save_every`; training goes on from its last checkpoint, bit for bit, if
            that was made with the same options, model and blocks. Removed once `target` is whole.
        logs: folder for TensorBoard: loss, learning rate and what `evaluate` returned, by step.
        new_rows: ids whose rows `train="new_rows"` trains, and `new_rows_learning_rate_factor` speeds up.

    Returns:
        `{"loss": [{"step", "loss", "learning_rate"}], "evaluations": [{"step", "tokens", ...}], "steps",
        "tokens", "seconds", "tokens_per_second", "parameters", "trained_parameters", "bf16", "processes",
        "chunked_loss"}`; loss in nats per token; the time without that of `evaluate`, and after a resumption
        that of the rest; `chunked_loss` is the reason where a wish for it could not be met. With LoRA or
        `train="new_rows"`, `target` is the model with all merged, and `target/adapter` what peft trained.

    Raises:
        RuadaptError: the tokenizer has more tokens than the model rows, the blocks hold ids beyond them,
            there are too few blocks for one batch, the loss became NaN or infinite, or memory ran out.
    """
    network, dtype = load_for_training(model, options.seed)
    if isinstance(model, PreTrainedConfig) and (Path(tokenizer_folder) / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(tokenizer_folder)
    _check_vocabulary(network, tokenizer_folder, blocks)
    # The Trainer seeds the generators again: adapters made here do not change the order of the data.
    trained = add_adapters(network, options, new_rows)
    block_size = len(blocks[0]["input_ids"])
    identity = None
    if checkpoints is not None:
        source = model.to_json_string() if isinstance(model, PreTrainedConfig) else hash_path(model)
        identity = {"model": source, "blocks": digest(blocks), "new_rows": list(new_rows or [])}
    report = fit(
        trained,
        blocks,
        collate_blocks,
        options,
        evaluate=evaluate,
        checkpoints=checkpoints,
        identity=identity,
        tokens_per_sequence=block_size,
        logs=logs,
        dtype=dtype,
        new_rows=new_rows or (),
    )
    state = PartialState()
    if state.is_main_process:
        with atomic_folder(target) as folder:
            if trained is not network:
                trained.float().save_pretrained(folder / "adapter", save_embedding_layers=False)
                # In float32, cast once: sums of bfloat16 weights and adapters would be rounded twice.
                network = trained.merge_and_unload()
            write_model(network, tokenizer_folder, folder, dtype)
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)
    state.wait_for_everyone()
    return report


class _Trainer(Trainer):
    """The Trainer with the embeddings at a multiple of the learning rate, and one order of the data.

    transformers groups rows by length into the batches of one process: several would see other batches.
    """

    embedding_factor = 1.0
    new_rows: Sequence[int] = ()
    new_rows_factor = 1.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
        return sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        network: Any = model or self.model
        own = embedding_parameters(network)
        if (factor := self.embedding_factor * self.new_rows_factor) != 1:
            split_embeddings(optimizer, own, factor)
        if self.new_rows_factor != 1:
            matrices = [parameter for parameter in network.parameters() if id(parameter) in own]
            old = torch.ones(len(matrices[0]), dtype=torch.bool)
            old[list(self.new_rows)] = False
            slow_rows(optimizer, matrices, old.nonzero().flatten(), 1 / self.new_rows_factor)
        return optimizer


def fit(
    network: PreTrainedModel,
    rows: "Dataset",
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    options: TrainingOptions,
    evaluate: EvaluationHook | None = None,
    checkpoints: Path | None = None,
    identity: dict[str, Any] | None = None,
    tokens_per_sequence: int = 0,
    by_length: bool = False,
    logs: Path | None = None,
    dtype: torch.dtype = torch.float32,
    new_rows: Sequence[int] = (),
) -> dict[str, Any]:
    """Train `network` in place with transformers' Trainer; the common part of `pretrain` and `finetune`.

    Under `accelerate launch` every process calls this; a sharded network is whole again on the main one.
    With `train="embeddings"` and no LoRA the body is frozen here; else the caller says what requires
    gradients. `identity` is what checkpoints depend on besides the options. `by_length` puts rows of similar
    length (column `length`) into the same batch. `logs`: as in `pretrain`. `dtype`: that of the checkpoint
    that the weights came from.

    Raises:
        RuadaptError: as `pretrain`.
    """
    if len(rows) < options.batch_size:
        raise RuadaptError(
            f"{len(rows)} sequences do not fill one batch of {options.batch_size}; "
            "give more text or a smaller batch"
        )
    if options.train == "embeddings" and options.lora_rank is None:
        freeze_body(network)
    if options.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    bf16 = bfloat16_is_native() if options.bf16 is None else options.bf16
    tokens = tokens_per_sequence * options.batch_size * options.accumulation
    with _training_folder(checkpoints, {"options": asdict(options), **(identity or {})}) as folder:
        args = _arguments(options, folder, bf16, by_length)
        sequences = args.per_device_train_batch_size * tokens_per_sequence
        chunked, reason = choose_loss(network, options.chunked_loss, sequences)
        main = PartialState().is_main_process
        last = last_checkpoint(folder)
        if main and logs is not None and last is None and logs.exists():
            set_aside(logs)  # of a model that is stale, or of a training that was killed
        writer = summary_writer(logs) if main and logs is not None else None
        recorder = Recorder(evaluate, options.evaluate_every, tokens, writer, options.progress and main)
        trainer = _Trainer(
            model=network,
            args=args,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[recorder, *([TensorBoardCallback(writer)] if writer else [])],
        )
        trainer.embedding_factor = options.embedding_learning_rate_factor
        if options.train == "all" and new_rows:
            trainer.new_rows, trainer.new_rows_factor = new_rows, options.new_rows_learning_rate_factor
        trainer.remove_callback(PrinterCallback)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if sharded and trainer.new_rows_factor != 1:
            raise RuadaptError(
                "new_rows_learning_rate_factor works on whole matrices; use DDP, or set it to 1"
            )
        if trainer.is_deepspeed_enabled:  # whose third stage gives no weights back unless it is told to
            deepspeed = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if bf16 and dtype == torch.bfloat16 and not sharded:
            halve_frozen_layers(network, network.get_output_embeddings())
        whole = empty_copy(network) if sharded and main else None
        if trainer.is_fsdp_enabled and isinstance(network, PeftModel):
            if options.train == "new_rows":  # peft's own layers for them, which FSDP can't shard
                raise RuadaptError("train=new_rows does not work with FSDP; use DDP, or train=embeddings")
            keep_ties(network)
        try:
            with chunked_loss(network) if chunked else nullcontext():
                trainer.train(resume_from_checkpoint=last)
                if not sharded:
                    # The Trainer leaves its autocast around the model's forward, in place.
                    trainer.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
        except (RuntimeError, MemoryError) as error:
            advice = out_of_memory(error, options, args, chunked)
            if advice is None:
                raise
            raise advice from error
        finally:
            if writer is not None:
                writer.close()
    if trainer.is_deepspeed_enabled:
        unset_hf_deepspeed_config()  # else its third stage would share out models that one process loads, too
    if sharded:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if whole is not None:
            load_whole(whole, weights)
            network.__class__, network.__dict__ = whole.__class__, whole.__dict__
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
        "parameters": parameters,
        "trained_parameters": trained,
        "bf16": bf16,
        "processes": args.world_size,
        "chunked_loss": reason or chunked,
    }


def _arguments(options: TrainingOptions, folder: Path, bf16: bool, by_length: bool) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=own_share(options.batch_size, "sequences"),
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
        # Frozen tensors are not waited for; whatever trains has a part in every loss.
        ddp_find_unused_parameters=False,
    )
    if args.n_gpu > 1:
        raise RuadaptError(
            f"this process sees {args.n_gpu} devices; start it by `accelerate launch` to use all of them, or "
            "name one in CUDA_VISIBLE_DEVICES"
        )
    return args


@contextmanager
def _training_folder(checkpoints: Path | None, identity: dict[str, Any]) -> Iterator[Path]:
    """Yield where the Trainer writes; checkpoints of another training are removed first."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    with in_turn():
        claim_checkpoints(checkpoints, identity)
    yield checkpoints


def _check_vocabulary(network: Any, tokenizer_folder: Path, blocks: "Dataset") -> None:
    tokens = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    rows = len(network.get_input_embeddings().weight)
    if tokens > rows:
        raise RuadaptError(
            f"the tokenizer {tokenizer_folder} has {tokens} tokens but the model {rows} embedding rows; "
            "initialise the model's embeddings for this tokenizer first"
        )
    first = blocks[: 1 << 10]["input_ids"]
    if (greatest := int(first.max())) >= tokens:
        raise RuadaptError(
            f"the blocks hold token {greatest}, but {tokenizer_folder} has {tokens} tokens: they were packed "
            "with another tokenizer"
        )
