"""Speed in characters per second: original against adapted, same prompts, same text, in one run.

Reading is told from writing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids, question
from ruadapt.evaluation.models import embedding_rows, load, maximum_length

Dialogues = Sequence[tuple[str, str]]
"""Prompts, and the answers to write."""
Phases = tuple[float, float]
"""Seconds of reading, and those of writing after the first token."""


def measure_speed(
    folders: Mapping[str, Path],
    dialogues: Mapping[str, Dialogues],
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
    engine: str = "transformers",
) -> pd.DataFrame:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model reads token by token what it is dictated, as if it had chosen it: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. A batch of `b` is one prompt and its answer `b` times over, so that no row waits
    for a longer one. CPU threads are as many as torch uses.

    llama.cpp takes GGUF files and writes one answer at a time.

    Args:
        folders: model folders (GGUF files for llama.cpp) by name, the original first; prompts are in the chat
            format of those that have one.
        dialogues: pairs of a user's message and its answer, by language.
        batch_sizes: how many at a time.
        repeats: timed passes; one more warms up.
        engine: "transformers" or "llama.cpp".

    Returns:
        columns `model, language, batch_size, repeat, characters, reading_seconds, writing_seconds,
        characters_per_second, reading_characters_per_second, writing_characters_per_second,
        seconds_per_written_token, rows`, one row per model, language, batch size and repeat (all answers of
        the language together). `characters_per_second` is what a user sees: characters of the answers over
        the time of reading the prompts and writing. The next two know characters of the prompts and reading
        alone, and writing alone, without the first token, which comes with the reading.
        `seconds_per_written_token` is that of a forward pass, whatever the batch. `rows` is the height of the
        embeddings.

    Raises:
        RuadaptError: nothing to measure, an answer that does not fit the context, or one of a single token;
            llama.cpp is not installed.
    """
    if not folders or not all(dialogues.values()):
        raise RuadaptError("speed needs models, and prompts with answers")
    if engine == "llama.cpp" and {*batch_sizes} != {1}:
        raise RuadaptError("llama.cpp is timed with one answer at a time; leave --batch-sizes at 1")
    writers = {
        name: _LlamaCpp(name, folder) if engine == "llama.cpp" else _Writer(name, *load(folder))
        for name, folder in folders.items()
    }
    tasks = {
        (name, language): [writer.task(*pair) for pair in pairs]
        for name, writer in writers.items()
        for language, pairs in dialogues.items()
    }
    turns = list(product(range(-1, repeats), batch_sizes, dialogues))
    tokens = sum(len(answer) for task in tasks.values() for _, answer in task)
    rows: list[dict[str, Any]] = []
    with tqdm(desc="speed", total=tokens * len(turns) // len(dialogues), unit="token", leave=False) as bar:
        for repeat, size, language in turns:
            for place, (prompt, answer) in enumerate(dialogues[language]):
                turn = (repeat + place) % len(writers)
                for name in [*writers][turn:] + [*writers][:turn]:
                    ids, dictated = tasks[name, language][place]
                    read, written = writers[name].phases(ids, dictated, size, bar.update)
                    count = len(dictated)
                    rows.append(
                        {"model": name, "language": language, "batch_size": size, "repeat": repeat}
                        | {"characters": size * len(answer), "rows": writers[name].rows}
                        | {"reading_seconds": read, "writing_seconds": written, "passes": count - 1}
                        # Without the first token, which came with the reading.
                        | {"asked": size * len(prompt), "behind": size * len(answer) * (count - 1) / count}
                    )
    timed = pd.DataFrame([row for row in rows if row["repeat"] >= 0])  # the first pass warms up
    names = ["model", "language", "batch_size", "repeat", "rows"]
    table = timed.groupby(names, sort=False).sum().reset_index()
    reading, writing = table["reading_seconds"], table["writing_seconds"]
    table["characters_per_second"] = table["characters"] / (reading + writing)
    table["reading_characters_per_second"] = table.pop("asked") / reading
    table["writing_characters_per_second"] = table.pop("behind") / writing
    table["seconds_per_written_token"] = writing / table.pop("passes")
    return table


class _Writer:
    """One model that writes what it is told, by transformers."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._positions, self.rows = maximum_length(model), embedding_rows(model)

    def task(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt (in the chat format if there is one), and those of the answer."""
        ids, dictated = self._ids(prompt, answer)
        if len(dictated) < 2 or len(ids) + len(dictated) > self._positions:
            raise RuadaptError(
                f"{self._name}: {len(dictated)} tokens behind a prompt of {len(ids)} can't be timed; "
                f"give others, of two tokens or more, within {self._positions} positions"
            )
        return ids, dictated

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        ids, dictated = (
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
        )
        if self._tokenizer.chat_template:
            ids = chat_ids(self._tokenizer, question(prompt))
        return ids, dictated

    def phases(self, ids: list[int], answer: list[int], copies: int, tick: Callable[..., Any]) -> Phases:
        """Read the prompt `copies` times at once, and write the answer; `tick` is told of every token."""
        self._forget()
        start = time.perf_counter()
        self._read(ids, copies)
        read = time.perf_counter()
        for token in answer[:-1]:
            self._read([token], copies)
            tick()
        return read - start, time.perf_counter() - read

    def _forget(self) -> None:
        self._cache: Any = None

    @torch.inference_mode()
    def _read(self, ids: list[int], copies: int) -> None:
        """Read ids behind those before, and choose the next token, which waits for a GPU."""
        rows = torch.tensor([ids], device=self._model.device).expand(copies, -1)
        output = self._model(input_ids=rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        output.logits.argmax(-1).tolist()


class _LlamaCpp(_Writer):
    """One GGUF file that writes what it is told, by llama.cpp."""

    def __init__(self, name: str, file: Path) -> None:
        try:
            library, formats = map(import_module, ("llama_cpp", "llama_cpp.llama_chat_format"))
        except ImportError as error:
            raise RuadaptError(
                f"llama-cpp-python is not installed here ({error}); pip install 'ruadapt[gguf]', or measure "
                "with transformers"
            ) from error
        self._formatter = formats.Jinja2ChatFormatter
        self._name, self._positions = name, 2048
        threads = torch.get_num_threads()
        options = {"n_ctx": self._positions, "n_threads": threads, "n_threads_batch": threads}
        try:
            self._engine = library.Llama(str(file), verbose=False, **options)
        except ValueError as error:
            raise RuadaptError(f"{file}: {error}; llama.cpp takes files of `ruadapt export gguf`") from error
        self.rows = self._engine.n_vocab()

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        engine, template = self._engine, self._engine.metadata.get("tokenizer.chat_template")
        if template:
            spelled = (
                engine.detokenize([number], special=True).decode() if number >= 0 else ""
                for number in (engine.token_eos(), engine.token_bos())
            )
            prompt = self._formatter(template, *spelled)(messages=question(prompt)).prompt
        ids = engine.tokenize(prompt.encode(), add_bos=not template, special=True)
        return ids, engine.tokenize(answer.encode(), add_bos=False, special=False)

    def _forget(self) -> None:
        self._engine.reset()

    def _read(self, ids: list[int], copies: int) -> None:
        self._engine.eval(ids)
