"""Chats as tokens: the model's own template, labels on the assistant's turns, batches, and what they cost."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError

IGNORED = -100
"""The label of a token that carries no loss."""
PADDING = 16
Messages = Sequence[dict[str, str]]
"""A conversation of `role` and `content`."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: bool, name: str = "a conversation"
) -> str:
    """Return a conversation in the model's chat format, up to where an answer begins if `prompt`.

    Raises:
        RuadaptError: there is no chat template, or it refuses the conversation, which is called `name`.
    """
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        )
    except (TemplateError, TypeError, LookupError, ValueError) as error:
        place = tokenizer.name_or_path
        raise RuadaptError(f"{name} cannot be rendered by the chat template of {place}: {error}") from error


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
        RuadaptError: as `render`; a row without `messages` or an assistant's turn, or one whose earlier turns
            the template renders otherwise once an answer follows.
    """
    return [_encode(row, f"chat row {number}", tokenizer, last_only) for number, row in enumerate(rows)]


def _encode(
    row: dict[str, Any], name: str, tokenizer: PreTrainedTokenizerBase, last_only: bool
) -> dict[str, Any]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not any(m.get("role") == "assistant" for m in messages):
        raise RuadaptError(f"{name} has no `messages` with a turn of the assistant")
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    labels: list[int] = []
    for place in turns[-1:] if last_only else turns:
        prompt = render(tokenizer, messages[:place], True, name)
        conversation = render(tokenizer, messages[: place + 1], False, name)
        before, ids = tokenizer([prompt, conversation], add_special_tokens=False)["input_ids"]
        # Tokens that reach over the border belong to the answer.
        shared = len(commonprefix([before, ids]))  # noqa: RUF071 (ids, no paths)
        labels += [IGNORED] * (shared - len(labels)) + ids[shared:]
        if not conversation.startswith(prompt) or len(labels) != len(ids):
            raise RuadaptError(
                f"{name}: the chat template changes the prompt once an answer follows, so the answer cannot "
                "be told from it"
            )
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def collate_chats(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right to a multiple of 16 tokens, int64 [batch, length]; labels of padding are -100.

    The CPU's kernels are made anew for every shape, and kept: few shapes save a fifth of the time and a third
    of the memory.

    Padding stands behind every real token, where causal attention never looks: no attention mask is needed,
    and the fast attention kernels stay in use.
    """
    length = -(-max(len(row["input_ids"]) for row in rows) // PADDING) * PADDING
    return {
        name: torch.tensor([list(row[name]) + [value] * (length - len(row[name])) for row in rows])
        for name, value in {"input_ids": 0, "labels": IGNORED}.items()
    }


@torch.inference_mode()
def answer_nats(model: Any, examples: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Return the nats that a model spends on the labelled tokens of each example, float64 `(examples,)`.

    Args:
        examples: as `encode_chats` returns them.
    """
    spent = []
    for example in examples:
        ids, labels = (torch.tensor(example[name], device=model.device) for name in ("input_ids", "labels"))
        counted = labels[1:] != IGNORED
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][counted].float()
        spent.append(float(cross_entropy(logits, labels[1:][counted], reduction="sum")))
    return np.array(spent)
