"""Generation speed in characters per second: original against adapted, same prompts, same text."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import load, maximum_length


def generation_speed(
    folders: Mapping[str, Path],
    dialogues: Mapping[str, Sequence[tuple[str, str]]],
    *,
    repeats: int = 5,
    threads: int = 1,
    device: str | None = None,
) -> pd.DataFrame:
    """Time how fast several instruct models write the same answers to the same prompts, in one run.

    Each model generates token by token as always, but is dictated the answer: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. A first
    pass, not timed, warms up. The models take turns prompt by prompt, in an order that turns with each
    repeat, so that a busy moment of the machine hits all of them.

    Args:
        folders: instruct model folders by name of the vocabulary.
        dialogues: pairs of a user's message and its answer, by language.
        repeats: timed passes.
        threads: CPU threads while measuring.
        device: as in `load`.

    Returns:
        columns `vocabulary, language, repeat, characters_per_second, tokens_per_second, characters, seconds`,
        one row per model, language and repeat (all answers of the language together; the time includes
        reading the prompts).

    Raises:
        RuadaptError: nothing to measure, a model without a chat template, or an answer that does not fit the
            context.
    """
    if not folders or not dialogues or not all(dialogues.values()) or repeats < 1:
        raise RuadaptError("speed needs models, prompts with answers in every language, and one repeat")
    rows = []
    with _threads(threads):
        writers = {name: _Writer(name, *load(folder, device)) for name, folder in folders.items()}
        tasks = {
            language: [{name: writer.task(*pair) for name, writer in writers.items()} for pair in pairs]
            for language, pairs in dialogues.items()
        }
        for repeat in tqdm(range(-1, repeats), desc="speed", leave=False):
            for language, pairs in dialogues.items():
                seconds = dict.fromkeys(writers, 0.0)
                for place, task in enumerate(tasks[language]):
                    for name in _rotated(list(writers), repeat + place):
                        seconds[name] += writers[name].time(*task[name])
                if repeat < 0:
                    continue
                characters = sum(len(answer) for _, answer in pairs)
                for name in writers:
                    tokens = sum(len(task[name][1]) for task in tasks[language])
                    rows.append(
                        {
                            "vocabulary": name,
                            "language": language,
                            "repeat": repeat,
                            "characters_per_second": characters / seconds[name],
                            "tokens_per_second": tokens / seconds[name],
                            "characters": characters,
                            "seconds": seconds[name],
                        }
                    )
    return pd.DataFrame(rows)


class _Dictation(LogitsProcessor):
    """Puts the next token of a given answer in front of all others."""

    def __init__(self, answer: list[int], prompt_length: int) -> None:
        self._answer = answer
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self._answer[input_ids.shape[1] - self._prompt_length]] = float("inf")
        return scores


class _Writer:
    """One model that writes what it is told."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise RuadaptError(f"{name}: speed is measured on instruct models, this one has no chat template")
        self._name = name
        self._model = model
        self._tokenizer = tokenizer

    def task(self, prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
        """Return the ids of the prompt in its chat format, `[1, length]`, and those of the answer."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids, dictated = self._tokenizer([str(text), answer], add_special_tokens=False)["input_ids"]
        if not dictated or len(ids) + len(dictated) > maximum_length(self._model):
            raise RuadaptError(
                f"{self._name}: an answer of {len(dictated)} tokens to a prompt of {len(ids)} cannot be "
                f"written within {maximum_length(self._model)} positions; give other answers"
            )
        return torch.tensor([ids], device=self._model.device), dictated

    def time(self, ids: torch.Tensor, answer: list[int]) -> float:
        """Return the seconds it takes to read the prompt and write the answer."""
        self._wait()
        start = time.perf_counter()
        self.write(ids, answer)
        self._wait()
        return time.perf_counter() - start

    def write(self, ids: torch.Tensor, answer: list[int]) -> list[int]:
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=len(answer),
                logits_processor=[_Dictation(answer, ids.shape[1])],
                pad_token_id=answer[0],
            )
        return output[0, ids.shape[1] :].tolist()

    def _wait(self) -> None:
        if self._model.device.type != "cpu":
            torch.accelerator.synchronize()


def _rotated(names: list[str], by: int) -> list[str]:
    turn = by % len(names)
    return names[turn:] + names[:turn]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
