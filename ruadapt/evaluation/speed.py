"""Generation speed in characters per second: original against adapted, same prompts, same text budget."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import embedding_rows, load, maximum_length


def generation_speed(
    folders: Mapping[str, Path],
    prompts: Mapping[str, Sequence[str]],
    *,
    characters: int,
    repeats: int = 5,
    threads: int = 1,
    device: str | None = None,
) -> pd.DataFrame:
    """Time greedy answers of several instruct models, one prompt at a time, in one run.

    Every model writes at least `characters` characters to every prompt, its end tokens suppressed, so that
    all of them do the same amount of text whatever their tokenizer and however soon they would stop. A first
    pass, not timed, warms up and finds how many tokens that takes; the timed passes generate exactly as many.
    The models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of
    the machine hits all of them.

    Args:
        folders: instruct model folders by name of the vocabulary.
        prompts: user messages by language.
        characters: text budget of one answer.
        repeats: timed passes.
        threads: CPU threads while measuring.
        device: as in `load`.

    Returns:
        columns `vocabulary, language, repeat, characters_per_second, tokens_per_second, characters, seconds`,
        one row per model, language and repeat (all prompts of the language together).

    Raises:
        RuadaptError: nothing to measure, a model without a chat template, a budget that does not fit the
            context, or a model that writes no characters.
    """
    if not folders or not prompts or not all(prompts.values()) or repeats < 1 or characters < 1:
        raise RuadaptError(
            "speed needs models, prompts in every language, at least one character and one repeat"
        )
    rows = []
    with _threads(threads):
        speakers = {name: _Speaker(name, *load(folder, device)) for name, folder in folders.items()}
        budgets = {
            (name, language, prompt): speaker.measure(prompt, characters)
            for language, asked in prompts.items()
            for prompt in asked
            for name, speaker in tqdm(speakers.items(), desc=f"speed, {language}: warm-up", leave=False)
        }
        for repeat in tqdm(range(repeats), desc="speed", leave=False):
            for language, asked in prompts.items():
                seconds = dict.fromkeys(speakers, 0.0)
                for place, prompt in enumerate(asked):
                    for name in _rotated(list(speakers), repeat + place):
                        seconds[name] += speakers[name].time(prompt, budgets[name, language, prompt][0])
                for name in speakers:
                    tokens, written = np.sum([budgets[name, language, prompt] for prompt in asked], axis=0)
                    rows.append(
                        {
                            "vocabulary": name,
                            "language": language,
                            "repeat": repeat,
                            "characters_per_second": written / seconds[name],
                            "tokens_per_second": tokens / seconds[name],
                            "characters": int(written),
                            "seconds": seconds[name],
                        }
                    )
    return pd.DataFrame(rows)


class _Speaker:
    """One model that writes exactly as much as it is told."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise RuadaptError(f"{name}: speed is measured on instruct models, this one has no chat template")
        self._name = name
        self._model = model
        self._tokenizer = tokenizer
        # Neither special tokens nor rows that no token uses: none of them writes a character.
        unused = range(len(tokenizer), embedding_rows(model))
        self._silent = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *unused})

    def measure(self, prompt: str, characters: int) -> tuple[int, int]:
        """Return how many tokens it takes to write `characters` characters, and how many they are exactly."""
        ids = self._prompt(prompt)
        room = maximum_length(self._model) - ids.shape[1]
        tokens = min(max(characters // 2, 1), room)
        while True:
            written = self._write(ids, tokens)
            lengths = [len(self._tokenizer.decode(written[: place + 1])) for place in range(len(written))]
            enough = next((place + 1 for place, length in enumerate(lengths) if length >= characters), None)
            if enough is not None:
                return enough, lengths[enough - 1]
            if tokens == room:
                raise RuadaptError(
                    f"{self._name} writes only {lengths[-1]} characters in the {room} tokens that fit; "
                    f"lower the budget of {characters} characters"
                )
            tokens = min(2 * tokens, room)

    def time(self, prompt: str, tokens: int) -> float:
        """Return the seconds it takes to read the prompt and write `tokens` tokens."""
        ids = self._prompt(prompt)
        self._wait()
        start = time.perf_counter()
        self._write(ids, tokens)
        self._wait()
        return time.perf_counter() - start

    def _prompt(self, prompt: str) -> torch.Tensor:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], device=self._model.device)

    def _write(self, ids: torch.Tensor, tokens: int) -> list[int]:
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                suppress_tokens=self._silent,
                pad_token_id=self._silent[0],
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
