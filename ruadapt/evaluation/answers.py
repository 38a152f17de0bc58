"""Answers of chat models to prompts, greedy or sampled, as they come out batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.records import Records, record_key
from ruadapt.training.generation import generate, maximum_length


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
    written = generate(
        model,
        encoded,
        ends,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        processors=processors,
    )
    for ids in tqdm(written, description, len(encoded), leave=False):
        cut = ids[-1] not in ends
        text = tokenizer.decode(
            ids if cut else ids[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        yield Answer(str(text), cut)


def answers_once(
    records: Records,
    about: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[Answer]:
    """Yield what `answers` does, each answer written to `records` at once and never asked for again.

    A stopped run goes on at the beginning of a batch: sampled answers depend on all that is drawn with them.

    Args:
        about: what the answers depend on beside prompts, seed and batch size (the model's hash, the limit,
            the temperature, names of processors), written into every record.
    """
    key = record_key(about, list(prompts), seed, batch_size)
    keys = [f"{key}-{number}" for number in range(len(prompts))]
    done = next((n for n, name in enumerate(keys) if name not in records.done), len(keys))
    start = done if done == len(keys) else done - done % batch_size
    for name in keys[:start]:
        yield Answer(records.done[name]["answer"], records.done[name]["cut"])
    rest = answers(model, tokenizer, prompts[start:], seed=seed + start, batch_size=batch_size, **options)
    for name, prompt, answer in zip(keys[start:], prompts[start:], rest, strict=True):
        if name not in records.done:
            said = {"prompt": prompt, "answer": answer.text, "cut": answer.cut}
            records.add({"key": name, "seed": seed, **about, **said})
        yield answer
