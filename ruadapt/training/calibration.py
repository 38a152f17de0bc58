"""Calibration after LEP: chat fine-tuning on answers, with LoRA or whole.

METHOD section 6: the propagated model is tuned on answers of the ORIGINAL instruct model (self-calibration),
or on instruction data with or without a copy task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import get_peft_model
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.training.losses import IGNORED
from ruadapt.training.trainable import TrainingOptions, embeddings, lora_config
from ruadapt.training.trainer import fit, load_for_training

PADDING = 16
Message = dict[str, str]


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
    logs: Path | None = None,
    checkpoints: Path | None = None,
    teacher: Path | None = None,
    words: Path | None = None,
) -> dict[str, Any]:
    """Tune a chat model on conversations and write the model folder `target`, adapters merged.

    Args:
        model_folder: the model to tune; its own tokenizer and chat template are used.
        words: folder of another tokenizer, template and generation settings, for a base that lacks them.
        rows: chat rows with `messages`; the loss is taken on the assistant's turns only.
        logs: folder for TensorBoard.
        checkpoints, teacher: as in `trainer.pretrain`; the teacher reads the same chats.

    Returns:
        What `trainer.fit` reports, and `rows`, `dropped_rows`,
        `answer_tokens` (of one pass over the rows).

    Raises:
        RuadaptError: no chat template, a row it cannot render or without an answer, too few rows short
            enough, or as `trainer.pretrain`; `target` is then left as it was.
    """
    encoded = encode_chats(rows, AutoTokenizer.from_pretrained(words or model_folder))
    kept = [example for example in encoded if len(example["input_ids"]) <= options.max_length]
    if not kept:
        raise RuadaptError(
            f"every one of {len(rows)} chat rows is longer than max_length {options.max_length}"
        )

    def build() -> Any:
        network = load_for_training(model_folder, options.seed)
        if words is not None:
            network.generation_config = GenerationConfig.from_pretrained(words)
        if options.lora_rank is not None:
            return get_peft_model(network, lora_config(network, options, options.train_embeddings))
        for module in embeddings(network):
            module.requires_grad_(options.train_embeddings)
        return network

    report = fit(
        build,
        model_folder,
        Dataset.from_list(kept),
        collate_chats,
        target,
        options,
        tokenizer_folder=words or model_folder,
        checkpoints=checkpoints,
        logs=logs,
        teacher=teacher,
    )
    answer_tokens = sum(label != IGNORED for example in kept for label in example["labels"])
    return report | {
        "rows": len(kept),
        "dropped_rows": len(rows) - len(kept),
        "answer_tokens": answer_tokens,
    }


def encode_chats(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, last_only: bool = False
) -> list[dict[str, Any]]:
    """Tokenise conversations by the tokenizer's chat template, with labels on the assistant's turns only.

    With `last_only` they are on the last of them alone, as pairs of answers need it.

    An assistant's turn is what the template adds behind the generation prompt, its end token included: the
    tokens of the conversation up to this turn that do not begin the prompt's tokens.

    Returns:
        For each row `{"input_ids": ids, "labels": ids or -100, "length": their number}`.

    Raises:
        RuadaptError: no chat template, a row without `messages` or an assistant's turn, or one whose earlier
            turns the template renders otherwise once an answer follows.
    """
    if not tokenizer.chat_template:
        raise RuadaptError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
    turns: list[tuple[int, str, str]] = []
    for number, row in enumerate(rows):
        found = _turns(row, number, tokenizer)
        turns += [(number, *turn) for turn in (found[-1:] if last_only else found)]
    prompts, conversations = (
        tokenizer([turn[place] for turn in turns], add_special_tokens=False)["input_ids"] for place in (1, 2)
    )
    examples: list[dict[str, Any]] = [{} for _ in rows]
    for (number, _, _), prompt, ids in zip(turns, prompts, conversations, strict=True):
        # Tokens that reach over the border belong to the answer.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
        earlier = examples[number].get("labels", [])
        labels = earlier + [IGNORED] * (shared - len(earlier)) + ids[shared:]
        if len(labels) != len(ids):
            raise RuadaptError(f"chat row {number}: the turns' tokens do not follow one another")
        examples[number] = {"input_ids": ids, "labels": labels, "length": len(ids)}
    return examples


def _turns(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Return (prompt, prompt with answer) as text for each assistant's turn."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not any(m.get("role") == "assistant" for m in messages):
        raise RuadaptError(f"chat row {number} has no `messages` with a turn of the assistant")
    turns = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:place], tokenizer, number, prompt=True)
            conversation = render(messages[: place + 1], tokenizer, number, prompt=False)
            if not conversation.startswith(prompt):
                raise RuadaptError(
                    f"chat row {number}: the chat template changes the prompt once an answer follows, "
                    "so the answer cannot be told from it"
                )
            turns.append((prompt, conversation))
    return turns


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, number: int, prompt: bool) -> str:
    """Return a conversation as text, with the generation prompt if `prompt`; `number` names it in errors."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError, KeyError) as error:
        raise RuadaptError(f"chat row {number} cannot be rendered by the chat template: {error}") from error


def collate_chats(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right to a multiple of 16 tokens, int64 [batch, length]; labels of padding are -100.

    The CPU's kernels are made anew for every shape, and kept: few shapes save a fifth of the time and a third
    of the memory.

    Padding stands behind every real token, where causal attention never looks: no attention mask is needed,
    and the fast attention kernels stay in use.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    missing = -batch["input_ids"].shape[1] % PADDING
    return {
        name: pad(rows, (0, missing), value=IGNORED if name == "labels" else 0)
        for name, rows in batch.items()
    }
