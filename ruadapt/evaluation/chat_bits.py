"""Bits per character of given chat answers: a measure of instruct skill that compares vocabularies."""

import math
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids
from ruadapt.evaluation.models import require_room


def answer_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the bits that a chat model spends on given answers, and the answers' characters.

    What the chat template puts behind an answer (its end) is spent on, too. The characters don't depend on
    the tokenizer, so bits per character compare vocabularies.

    Args:
        rows: chat rows with `messages`; the last, the assistant's, is scored.

    Returns:
        Float64 and int64 `(rows,)`.

    Raises:
        RuadaptError: a row without a prompt or an answer, or one longer than the model's positions.
    """
    bits = np.zeros(len(rows))
    for number, row in enumerate(rows):
        whole = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt = chat_ids(tokenizer, row["messages"][:-1])
        # Tokens that reach over the border belong to the answer.
        read = len(commonprefix([prompt, ids]))  # noqa: RUF071 (ids, no paths)
        if not prompt or read == len(ids):
            raise RuadaptError(f"chat row {number}: a prompt and an answer are needed")
        require_room(model, read, len(ids) - read)
        batch = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=batch, use_cache=False).logits[0, read - 1 : -1].float()
            spent = functional.cross_entropy(logits, batch[0, read:], reduction="sum")
        bits[number] = float(spent) / math.log(2)
    return bits, np.array([len(row["messages"][-1]["content"]) for row in rows])
