"""Answers of chat models on this machine, greedy or sampled, as they come out batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.training.generation import generate, maximum_length

Messages = Sequence[dict[str, str]]
"""A conversation of `role` and `content`."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, whether the limit cut it off, and why a server gave nothing ("" where it did)."""

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
    if not tokenizer.chat_template:
        raise RuadaptError(
            f"{tokenizer.name_or_path} has no chat template, so it can't be asked; give an instruct model"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise RuadaptError(f"the chat template of {tokenizer.name_or_path} refuses this: {error}") from error
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends an answer: those of the generation config, and the tokenizer's eos."""
    named = model.generation_config.eos_token_id
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise RuadaptError(f"{tokenizer.name_or_path} names no eos token; set one in generation_config.json")
    return sorted(ids)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    processors: Sequence[LogitsProcessor] = (),
    description: str = "answers",
) -> Iterator[Answer]:
    """Ask a model through its chat template and yield the answers in order.

    Args:
        max_tokens: limit of an answer, less where the context ends earlier.
        temperature: 0 is greedy; above, tokens are drawn from the whole distribution (no top-k, no top-p). A
            repetition penalty in the model's own generation config stays.
        seed: of the draws. The same conversations, batch size and device give the same answers; the global
            random state stays as it was.
        processors: change the logits before the choice, such as `script_mask.ScriptMask`.

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
    with tqdm(desc=description, total=len(encoded), unit="answer", leave=False) as progress:
        written = generate(
            model,
            encoded,
            ends,
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            processors=[*processors, _Progress(progress)],
        )
        for ids in written:
            cut = ids[-1] not in ends
            text = tokenizer.decode(
                ids if cut else ids[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            progress.update()
            yield Answer(str(text), cut)


class _Progress(LogitsProcessor):
    """Says how many steps a batch has written, so that a long one is seen to go on."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._progress.set_postfix_str(f"at token {input_ids.shape[1]:,}", refresh=False)
        self._progress.update(0)
        return scores
