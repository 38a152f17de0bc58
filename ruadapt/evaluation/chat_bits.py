"""Bits per character of given chat answers: a measure of instruct skill that compares vocabularies."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.training.calibration import encode_chats
from ruadapt.training.generation import maximum_length
from ruadapt.training.losses import IGNORED


def answer_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the bits that a chat model spends on given answers, and the answers' characters.

    What the chat template puts behind an answer (its end) is spent on, too. The characters don't depend on
    the tokenizer, so bits per character compare vocabularies.

    Args:
        rows: chat rows with `messages`; only the assistant's turns are scored.

    Returns:
        Float64 and int64 `(rows,)`.

    Raises:
        RuadaptError: as `encode_chats`; a chat is longer than the model's positions.
    """
    bits = np.zeros(len(rows))
    for number, example in enumerate(encode_chats(rows, tokenizer)):
        if example["length"] > maximum_length(model):
            raise RuadaptError(
                f"chat row {number} has {example['length']} tokens, more than the model's positions"
            )
        ids = torch.tensor([example["input_ids"]], device=model.device)
        labels = torch.tensor(example["labels"], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            counted = labels[1:] != IGNORED
            spent = functional.cross_entropy(logits[counted].float(), labels[1:][counted], reduction="sum")
        bits[number] = float(spent) / math.log(2)
    turns = [[turn for turn in row["messages"] if turn["role"] == "assistant"] for row in rows]
    return bits, np.array([sum(len(turn["content"]) for turn in answers) for answers in turns])
