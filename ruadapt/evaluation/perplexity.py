"""Bits of texts and of given chat answers: scores that are comparable across tokenizers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import maximum_length, require_room
from ruadapt.training.encoding import IGNORED, encode_chats, labelled_nats, start_token


def text_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the bits that a model spends on whole documents, and the documents' UTF-8 bytes.

    The bits of a document are `-Σ log2 p(token | at most `context` tokens before it)`. Bits per byte are the
    sum of all bits over the sum of all bytes.

    Every document begins with BOS (EOS as its named substitute), so that its first byte is scored as well;
    the token behind the last one (end of text) is not scored, since it stands for no byte. A document longer
    than `context` is read in windows of `context` inputs that advance by `stride`; each window scores what
    the one before did not, so every token counts once and sees at least `context - stride` tokens before it.
    On the embedded base, windows of 96 that advance by 24 give within 2 % what one window for the whole
    document (up to 500 tokens) gives. Nothing is truncated, and the bytes counted do not depend on the
    tokenizer. Source: bits per byte as in The Pile, sec. 3.1; windows as in the transformers perplexity
    guide.

    Args:
        model: a causal language model, its logits `(batch, length, rows)`.
        tokenizer: its tokenizer.
        texts: the documents, the same for every model that is compared.
        context: inputs per window, in tokens, BOS included.
        stride: tokens by which windows advance, 1 … `context`.
        batch_size: windows per forward pass.

    Returns:
        Float64 and int64 `(documents,)`.

    Raises:
        RuadaptError: no text, an empty text, a text the tokenizer cannot spell (unknown token), or a window
            that does not fit the model.
    """
    if not 1 <= stride <= context <= maximum_length(model):
        raise RuadaptError(
            f"windows of {context} tokens that advance by {stride}: they must fit the model's "
            f"{maximum_length(model)} positions and leave nothing out"
        )
    if not texts or not all(texts):
        raise RuadaptError("there is no text to score, or one is empty")
    start = start_token(tokenizer)
    owners, windows = [], []  # the document of each window, and the window with its last ids labelled
    for document, text in enumerate(texts):
        ids = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids[1:]:
            raise RuadaptError(
                f"document {document} holds characters the tokenizer cannot spell (unknown token): "
                "its bytes cannot be scored; use a tokenizer with byte fallback"
            )
        last = len(ids) - 1
        for done, end in pairwise([0, *range(context, last, stride), last]):
            window = ids[max(0, end - context) : end + 1]
            labels = [IGNORED] * (len(window) - end + done) + window[done - end :]
            owners.append(document)
            windows.append({"input_ids": window, "labels": labels})
    bits = np.zeros(len(texts))
    np.add.at(bits, owners, labelled_nats(model, windows, batch_size) / math.log(2))
    if not np.isfinite(bits).all():
        raise RuadaptError("the model gives infinite or undefined log-probabilities; its weights are broken")
    return bits, np.array([len(text.encode()) for text in texts])


def answer_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the bits that a chat model spends on given answers, and the answers' characters.

    What the chat template puts behind an answer (its end) is spent on, too. The characters don't depend on
    the tokenizer, so bits per character compare vocabularies.

    Args:
        rows: chat rows with `messages`; the assistant's last is scored.

    Returns:
        Float64 and int64 `(rows,)`.

    Raises:
        RuadaptError: as `encode_chats`, or a row is longer than the model's positions.
    """
    examples = encode_chats(rows, tokenizer, last_only=True)
    require_room(model, max(example["length"] for example in examples), 0)
    said = [[turn["content"] for turn in row["messages"] if turn["role"] == "assistant"][-1] for row in rows]
    return labelled_nats(model, examples) / math.log(2), np.array(list(map(len, said)))
