"""Texts and chats as tokens: blocks of text, the model's own template, labels on answers, batches, costs."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError

IGNORED = -100
"""The label of a token that carries no loss."""
PADDING = 16
LOGITS = 1 << 26
"""Logits that are held at once where a batch can be made smaller: 256 MB of float32."""
Messages = Sequence[dict[str, str]]
"""A conversation of `role` and `content`."""


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id put before a raw text: BOS, or EOS as its substitute (many models have no BOS).

    Raises:
        RuadaptError: the tokenizer names neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise RuadaptError("the tokenizer names neither a bos nor an eos token; set one in tokenizer_config.json")


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, file: Path | None = None
) -> Dataset:
    """Tokenise documents, join them, and cut the stream into blocks without padding.

    Each document follows its `start_token`. The tokens behind the last whole block are dropped. With `file`
    the blocks are written there (Arrow) as they come and mapped, not held: memory does not grow with the
    text.

    Returns:
        A dataset with the column `input_ids`: int32 lists of exactly `block_size` ids, in numpy format.

    Raises:
        RuadaptError: as `start_token`, or the texts fill no block.
    """
    separator = start_token(tokenizer)
    schema = pa.schema([("input_ids", pa.list_(pa.int32(), block_size))])
    sink = pa.BufferOutputStream() if file is None else pa.OSFile(str(file), "wb")
    stream = array("i")
    documents, blocks = iter(texts), 0
    with pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(documents, 1000)):
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]:
                stream.append(separator)
                stream.extend(ids)
            if whole := len(stream) // block_size:
                values = pa.array(np.array(stream[: whole * block_size], dtype=np.int32))
                part = pa.FixedSizeListArray.from_arrays(values, block_size)
                writer.write_batch(pa.record_batch([part], schema=schema))
                blocks, stream = blocks + whole, stream[whole * block_size :]
    if not blocks:
        raise RuadaptError(f"the texts give {len(stream)} tokens, fewer than one block of {block_size}")
    if file is None:
        return Dataset.from_buffer(sink.getvalue()).with_format("numpy")
    sink.close()
    return read_blocks(file)


def read_blocks(file: Path) -> Dataset:
    """Map the blocks that `pack` wrote into a file."""
    return Dataset.from_file(str(file)).with_format("numpy")


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
    encoded = []
    for number, row in enumerate(rows):
        name, messages = f"chat row {number}", row.get("messages")
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
                    f"{name}: the chat template changes the prompt once an answer follows, so the answer "
                    "cannot be told from it"
                )
        encoded.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return encoded


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack examples, padded on the right to a multiple of 16 tokens: `input_ids` and `labels`, int64.

    Labels of padding are -100. Packed blocks have no labels: theirs are the ids, which the model shifts.
    The CPU's kernels are made anew for every shape, and kept: few shapes save a fifth of the time and a third
    of the memory.

    Padding stands behind every real token, where causal attention never looks: no attention mask is needed,
    and the fast attention kernels stay in use.
    """
    length = -(-max(len(row["input_ids"]) for row in rows) // PADDING) * PADDING
    batch = {}
    for name, padding in {"input_ids": 0, "labels": IGNORED}.items():
        found = [torch.as_tensor(row.get(name, row["input_ids"]), dtype=torch.int64) for row in rows]
        batch[name] = torch.stack([pad(part, (0, length - len(part)), value=padding) for part in found])
    return batch


@torch.no_grad()  # not inference mode: FSDP goes on to use the tensors it gathers here
def labelled_nats(model: Any, examples: Sequence[dict[str, Any]], batch_size: int = 8) -> NDArray[np.float64]:
    """Return the nats that a model spends on the labelled tokens of each example, float64 `(examples,)`.

    Log-softmax in float32, sums in float64. A token of probability 0 costs nothing where it does not occur.

    Args:
        model: a causal language model, its logits `(batch, length, rows)`.
        examples: as `encode_chats` returns them.
        batch_size: examples per forward pass, fewer where their logits would be more than `LOGITS`.
    """
    nats = np.zeros(len(examples))
    # Examples of like length share a batch, so little is padded; but for rounding the order changes nothing.
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number]["input_ids"]))
    longest, rows = len(examples[order[0]]["input_ids"]), model.config.get_text_config().vocab_size
    batch_size = min(batch_size, max(1, LOGITS // (longest * rows)))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids = [torch.tensor(examples[number]["input_ids"][:-1]) for number in batch]
        inputs = pad_sequence(ids, batch_first=True).to(model.device)  # behind all that counts: no mask
        logits = model(input_ids=inputs, use_cache=False).logits
        for number, own in zip(batch, logits, strict=True):
            labels = torch.tensor(examples[number]["labels"][1:], device=model.device)
            counted = (labels != IGNORED).nonzero().flatten()
            spent = cross_entropy(own[counted].float(), labels[counted], reduction="none")
            nats[number] = float(spent.double().sum())
    return nats
