"""Batch generation by transformers: what a causal model writes behind prompts of unequal length."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


def maximum_length(model: PreTrainedModel) -> int:
    """Return the most tokens the model's position embeddings take; 2^31 where the config states no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    processors: Sequence[LogitsProcessor] = (),
    until: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[list[int]]:
    """Yield the ids written behind each prompt, in order, up to and with the one that ends them.

    Args:
        prompts: token ids, with their special tokens.
        ends: ids that end an answer; the first fills up short prompts, unseen.
        max_new_tokens: limit of an answer, less where the model's positions end earlier.
        temperature: 0 is greedy; above, tokens are drawn from the whole distribution (no top-k, no top-p).
        seed: of the draws, for each batch; the global random state stays as it was.
        processors: change the logits before the choice.
        until, tokenizer: strings that end an answer, each for itself, and what decodes it.
    """
    # Each token adds a byte at least, so that a string ends within as many tokens as it has bytes.
    longest = 1 + max((len(string.encode()) for string in until), default=0)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    for first in range(0, len(prompts), batch_size):
        batch = [torch.tensor(ids) for ids in prompts[first : first + batch_size]]
        ids = pad_sequence(batch, batch_first=True, padding_side="left", padding_value=ends[0])
        seen = [torch.ones(len(row), dtype=torch.long) for row in batch]
        mask = pad_sequence(seen, batch_first=True, padding_side="left")

        def stopped(written: torch.Tensor, *_: Any, length: int = ids.shape[1], **__: Any) -> torch.Tensor:
            behind = written[:, max(length, written.shape[1] - longest) :]
            texts = tokenizer.batch_decode(behind) if tokenizer else []
            found = [any(string in text for string in until) for text in texts]
            return torch.tensor(found, device=written.device)

        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed + first)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=bool(temperature),
                num_beams=1,
                max_new_tokens=min(max_new_tokens, maximum_length(model) - ids.shape[1]),
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                logits_processor=list(processors),
                stopping_criteria=[stopped] if until else [],
                **sampling,
            )
        for row in output[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield row[: end + 1]
