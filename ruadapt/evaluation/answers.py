"""Answers of chat models on this machine, greedy or sampled, as they come out batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import end_tokens
from ruadapt.training.generation import generate, maximum_length

Messages = Sequence[dict[str, str]]
"""A conversation of `role` and `content`."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, whether the limit cut it off, and why a server refused ("" where it did not)."""

    text: str
    cut: bool = False
    failed: str = ""


def question(text: str) -> Messages:
    """Return the conversation in which a user asks one thing."""
    return [{"role": "user", "content": text}]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the ids of a conversation in the model's chat format, up to where the answer begins.

    Raises:
        RuadaptError: the model has no chat template, or one that refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError) as error:  # it forbids a role, or there is none
        raise RuadaptError(f"{tokenizer.name_or_path} can't be asked in its chat format: {error}") from error
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    max_tokens: int = 512,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Iterator[Answer]:
    """Ask a model through its chat template and yield the answers in order.

    An answer ends with any eos token of the generation config or the tokenizer. A repetition penalty in the
    model's own generation config stays.

    Args:
        max_tokens: limit of an answer, less where the context ends earlier.
        processors, options: those of `training.generation.generate`, such as `temperature` and `seed`.

    Raises:
        RuadaptError: a model without a chat template or an end token, or a prompt that fills the context.
    """
    ends = end_tokens(model, tokenizer)
    encoded = [chat_ids(tokenizer, messages) for messages in conversations]
    longest, limit = max(map(len, encoded), default=0), maximum_length(model)
    if longest >= limit:
        raise RuadaptError(
            f"{tokenizer.name_or_path}: a prompt of {longest} tokens leaves no room for an answer within "
            f"{limit} positions; leave it out"
        )
    with tqdm(desc="answers", total=len(encoded) * max_tokens, unit="token", leave=False) as progress:
        told = [*processors, _Steps(progress)]
        written = generate(model, encoded, ends, max_new_tokens=max_tokens, processors=told, **options)
        for number, ids in enumerate(written, start=1):
            # Short answers leave tokens over that are never written.
            progress.update(max(0, number * max_tokens - progress.n))
            cut = ids[-1] not in ends
            text = tokenizer.decode(
                ids if cut else ids[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            yield Answer(str(text), cut)


class _Steps(LogitsProcessor):
    """Counts tokens while a batch is written, so that something moves within seconds."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._progress.update(len(input_ids))
        return scores
