"""Calibration after LEP: chat fine-tuning on answers, with LoRA or whole.

METHOD section 6: the propagated model is tuned on answers of the ORIGINAL instruct model (self-calibration),
or on instruction data with or without a copy task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from ruadapt.errors import RuadaptError
from ruadapt.training.encoding import collate_chats, encode_chats
from ruadapt.training.trainable import TrainingOptions, embeddings, lora_config
from ruadapt.training.trainer import fit


@dataclass(frozen=True)
class TuningOptions(TrainingOptions):
    """How to tune. `lora_rank` None tunes the weights themselves; otherwise LoRA on all linear layers.

    `train_embeddings` trains the embeddings (and an untied head) too: with LoRA beside the adapters, without
    it as part of the whole. Rows longer than `max_length` tokens are left out, never cut: a cut answer would
    teach to stop early or not at all. The LoRA defaults are METHOD's (rank 32, alpha 32).
    """

    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    lora_rank: int | None = 32
    lora_dropout: float = 0.0
    train_embeddings: bool = True
    max_length: int = 512


def finetune(
    model_folder: Path,
    rows: Sequence[dict[str, Any]],
    target: Path,
    options: TuningOptions,
    words: Path | None = None,
    **places: Any,
) -> dict[str, Any]:
    """Tune a chat model on conversations and write the model folder `target`, adapters merged.

    Args:
        model_folder: the model to tune; its own tokenizer and chat template are used.
        rows: chat rows with `messages`; the loss is taken on the assistant's turns only.
        words: folder of another tokenizer, template and generation settings, for a base that lacks them.
        places: `logs`, `checkpoints` and `teacher` of `trainer.fit`; the teacher reads the same chats.

    Returns:
        What `trainer.fit` reports, and `rows`, `dropped_rows`.

    Raises:
        RuadaptError: no chat template, a row it cannot render or without an answer, too few rows short
            enough, or as `trainer.fit`; `target` is then left as it was.
    """
    encoded = encode_chats(rows, AutoTokenizer.from_pretrained(words or model_folder))
    kept = [example for example in encoded if example["length"] <= options.max_length]
    if not kept:
        raise RuadaptError(
            f"every one of {len(rows)} chat rows is longer than max_length {options.max_length}"
        )

    def choose(network: PreTrainedModel) -> Any:
        if options.lora_rank is not None:
            return get_peft_model(network, lora_config(network, options, options.train_embeddings))
        for module in embeddings(network):
            module.requires_grad_(options.train_embeddings)
        return network

    report = fit(
        model_folder,
        Dataset.from_list(kept),
        target,
        options,
        choose=choose,
        collate=collate_chats,
        words=words,
        **places,
    )
    return report | {"rows": len(kept), "dropped_rows": len(rows) - len(kept)}
