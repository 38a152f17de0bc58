"""What models on this machine write, greedy or sampled: behind any prompts, or asked in their chat format."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ruadapt.evaluation.models import end_tokens, maximum_length, require_room
from ruadapt.training.encoding import Messages, render

MANY = 64
"""Tokens from which on what all prompts of a batch begin with is read once for all of them."""


class Answer(NamedTuple):
    """The ids that a model wrote, their text without special tokens, and whether the limit cut it off."""

    ids: list[int]
    text: str
    cut: bool


def question(text: str) -> Messages:
    """Return the conversation in which a user asks one thing."""
    return [{"role": "user", "content": text}]


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the ids of a conversation in the model's chat format, up to where the answer begins.

    Raises:
        RuadaptError: as `render`.
    """
    return list(tokenizer(render(tokenizer, messages, True), add_special_tokens=False)["input_ids"])


def read_beginning(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], left: int = 1
) -> tuple[torch.Tensor, DynamicCache]:
    """Return prompts as one batch, and a cache that has read what all begin with: the examples of a task.

    It has read nothing where that is fewer than MANY tokens, or where the model's attention has a window,
    which would count the padding behind them.

    Returns:
        int64 [prompts, tokens], padding -1; it stands behind what was read. At least `left` tokens of each
        prompt are left to read.
    """
    begin = commonprefix([[*prompt[:-left]] for prompt in prompts])  # noqa: RUF071 (ids, no paths)
    read = DynamicCache(config=model.config)
    if len(begin) < MANY or not all(type(layer) is DynamicLayer for layer in read.layers):
        begin = []
    else:
        once = torch.tensor([begin], device=model.device)
        model(input_ids=once, past_key_values=read, use_cache=True, logits_to_keep=1)
        read.batch_repeat_interleave(len(prompts))
    rest = [torch.tensor(prompt[len(begin) :]) for prompt in prompts]
    ids = pad_sequence(rest, batch_first=True, padding_side="left", padding_value=-1)
    return torch.cat([torch.tensor([begin] * len(ids), dtype=torch.int64), ids], dim=1), read


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    until: Sequence[str] = (),
    suppress: Sequence[int] = (),
) -> list[Answer]:
    """Return what a model writes behind each prompt; the longest are asked first, so that batches are even.

    An answer ends with any eos token of the generation config or the tokenizer, or before a string of
    `until`, each for itself. A repetition penalty in the model's own generation config stays.

    Args:
        prompts: token ids, with their special tokens.
        max_tokens: limit of an answer, less where the model's positions end earlier.
        temperature: 0 is greedy; above, tokens are drawn from the whole distribution (no top-k, no top-p).
        seed: of the draws, for each batch; the global random state stays as it was.
        suppress: tokens that are never written.

    Returns:
        In order the answers, their ids up to and with the one that ends them.

    Raises:
        RuadaptError: a model without an end token, or a prompt that fills its positions.
    """
    ends = end_tokens(model, tokenizer)
    require_room(model, max(map(len, prompts), default=0), 1)
    # Each token adds a byte at least, so that a string ends within as many tokens as it has bytes.
    longest = 1 + max((len(string.encode()) for string in until), default=0)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    progress = tqdm(desc="answers", total=len(prompts) * max_tokens, unit="token", leave=False)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    said: dict[int, Answer] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        with torch.inference_mode():
            ids, read = read_beginning(model, [prompts[number] for number in numbers])

        def stopped(written: torch.Tensor, *_: Any, length: int = ids.shape[1], **__: Any) -> torch.Tensor:
            progress.update(len(written))  # something moves within seconds
            behind = written[:, max(length, written.shape[1] - longest) :]
            texts = tokenizer.batch_decode(behind) if until else [""] * len(written)
            found = [any(string in text for string in until) for text in texts]
            return torch.tensor(found, device=written.device)

        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed + first)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.masked_fill(ids < 0, ends[0]).to(model.device),
                attention_mask=(ids >= 0).long().to(model.device),
                do_sample=bool(temperature),
                num_beams=1,
                max_new_tokens=min(max_tokens, maximum_length(model) - ids.shape[1]),
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                stopping_criteria=[stopped],
                suppress_tokens=list(suppress) or None,
                past_key_values=read if read.get_seq_length() else None,
                **sampling,
            )
        # Short answers leave tokens over that are never written.
        progress.update(max(0, (first + len(ids)) * max_tokens - progress.n))
        for number, row in zip(numbers, output[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            text = str(
                tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
            stops = [text.index(string) for string in until if string in text]
            ended = row if end is None else row[: end + 1]
            said[number] = Answer(ended, text[: min(stops, default=None)], end is None and not stops)
    progress.close()
    return [said[number] for number in range(len(prompts))]
