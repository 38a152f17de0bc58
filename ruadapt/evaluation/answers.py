"""Answers of chat models to prompts, greedy or sampled, as they come out batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import maximum_length


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and whether the limit cut it off."""

    text: str
    cut: bool


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a user's message in the model's chat format, up to where the answer begins.

    Raises:
        RuadaptError: the model has no chat template.
    """
    if not tokenizer.chat_template:
        raise RuadaptError(
            f"{tokenizer.name_or_path} has no chat template, so it can't be asked; give an instruct model"
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
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
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    processors: Sequence[LogitsProcessor] = (),
    description: str = "answers",
) -> Iterator[Answer]:
    """Ask a model every prompt through its chat template and yield the answers in order.

    Args:
        max_new_tokens: limit of an answer in tokens, less where the context ends earlier.
        temperature: 0 is greedy; above, tokens are drawn from the whole distribution (no top-k, no top-p). A
            repetition penalty in the model's own generation config stays.
        seed: of the draws. The same prompts, batch size and device give the same answers; the global random
            state stays as it was.
        processors: change the logits before the choice, such as `scripts.ScriptMask`.

    Raises:
        RuadaptError: a model without a chat template or an end token, or a prompt that fills the context.
    """
    ends = end_tokens(model, tokenizer)
    encoded = [chat_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    if longest >= maximum_length(model):
        raise RuadaptError(
            f"{tokenizer.name_or_path}: a prompt of {longest} tokens leaves no room for an answer within "
            f"{maximum_length(model)} positions; leave it out"
        )
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with tqdm(total=len(prompts), desc=description, leave=False) as progress:
        for first in range(0, len(encoded), batch_size):
            batch = encoded[first : first + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[ends[0]] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(seed + first)
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    do_sample=bool(temperature),
                    max_new_tokens=min(max_new_tokens, maximum_length(model) - width),
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                    logits_processor=list(processors),
                    **sampling,
                )
            for row in output[:, width:].tolist():
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                text = tokenizer.decode(
                    row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                yield Answer(str(text), cut=end == len(row))
            progress.update(len(batch))
