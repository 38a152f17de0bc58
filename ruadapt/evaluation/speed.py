"""Speed in characters per second: original against adapted, same prompts, same text, in one run.

Reading is told from writing.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids, question
from ruadapt.evaluation.models import embedding_rows, load
from ruadapt.training.generation import maximum_length

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
    threads: int | None = None,
    engine: str = "transformers",
) -> pd.DataFrame:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model generates token by token as always, but is dictated the answer: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. A batch of `b` is one prompt and its answer `b` times over, so that no row waits
    for a longer one.

    llama.cpp takes GGUF files, is dictated the answers alike, and writes one at a time. An engine of vLLM
    takes the whole accelerator, so there the models come one after another. Instead of a dictated answer
    each writes freely, never ending early, as many tokens as it needs for the answer. Reading is timed as
    writing one token.

    Args:
        folders: model folders (GGUF files for llama.cpp) by name, the original first; prompts are in the chat
            format of those that have one.
        dialogues: pairs of a user's message and its answer, by language.
        batch_sizes: how many at a time.
        repeats: timed passes; one more warms up (three in vLLM, which still compiles in the first).
        threads: CPU threads, None for torch's own choice.
        engine: "transformers", "llama.cpp" or "vllm", which chooses its threads itself.

    Returns:
        columns `model, language, batch_size, repeat, characters, reading_seconds, writing_seconds,
        characters_per_second, reading_characters_per_second, writing_characters_per_second,
        seconds_per_written_token, rows`, one row per model, language, batch size and repeat (all answers of
        the language together). `characters_per_second` is what a user sees: characters of the answers over
        the time of reading the prompts and writing. The next two know characters of the prompts and reading
        alone, and writing alone, without the first token, which comes with the reading.
        `seconds_per_written_token` is that of a forward pass, whatever the batch. `rows` is the height of the
        embeddings (0 in vLLM).

    Raises:
        RuadaptError: nothing to measure, an answer that does not fit the context, one of a single token or
            too short to be timed; vLLM is not installed.
    """
    if not folders or not all(dialogues.values()):
        raise RuadaptError("speed needs models, and prompts with answers")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        writers: dict[str, _Writer] = {}
        if engine == "llama.cpp":
            if {*batch_sizes} != {1}:
                raise RuadaptError("llama.cpp is timed with one answer at a time; leave --batch-sizes at 1")
            used = torch.get_num_threads()
            writers = {name: _LlamaCpp(name, file, used) for name, file in folders.items()}
        elif engine == "transformers":
            writers = {name: _Writer(name, *load(folder)) for name, folder in folders.items()}
        groups = _engines(folders) if engine == "vllm" else [writers]
        warm_up = 3 if engine == "vllm" else 1
        rows = [row for group in groups for row in _timed(group, dialogues, batch_sizes, repeats, warm_up)]
    finally:
        torch.set_num_threads(before)
    return pd.DataFrame(rows)


def _engines(folders: Mapping[str, Path]) -> "Iterator[dict[str, _Writer]]":
    vllm = _library("vllm", "vLLM", "install it")
    for name, folder in folders.items():
        yield {name: _VLLM(name, folder, vllm)}
        gc.collect()  # ends the engine's process, which holds the memory


def _library(name: str, called: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RuadaptError(
            f"{called} is not installed here ({error}); {install}, or measure with transformers"
        ) from error


def _timed(
    writers: "Mapping[str, _Writer]",
    dialogues: Mapping[str, Dialogues],
    batch_sizes: Sequence[int],
    repeats: int,
    warm_up: int,
) -> Iterator[dict[str, Any]]:
    """Let the models take turns on every prompt, and yield the rows of `measure_speed`."""
    tasks = {
        (name, language): [writer.task(*pair) for pair in pairs]
        for name, writer in writers.items()
        for language, pairs in dialogues.items()
    }
    turns = list(product(range(-warm_up, repeats), batch_sizes, dialogues))
    tokens = sum(len(answer) for task in tasks.values() for _, answer in task)
    total = tokens * len(turns) // len(dialogues)
    with tqdm(desc="speed", total=total, unit="token", leave=False) as progress:
        for repeat, size, language in turns:
            timed: dict[str, list[Phases]] = {name: [] for name in writers}
            for place in range(len(dialogues[language])):
                turn = (repeat + place) % len(writers)
                for name in [*writers][turn:] + [*writers][:turn]:
                    task = tasks[name, language][place]
                    timed[name].append(writers[name].phases(*task, size, progress.update))
            for name, writer in writers.items() if repeat >= 0 else ():
                lengths = [len(answer) for _, answer in tasks[name, language]]
                yield (
                    {"model": name, "language": language, "batch_size": size, "repeat": repeat}
                    | _paces(dialogues[language], lengths, size, timed[name])
                    | {"rows": writer.rows}
                )


def _paces(
    dialogues: Dialogues, lengths: Sequence[int], copies: int, timed: Iterable[Phases]
) -> dict[str, float]:
    """Return the times of answers of `lengths` tokens and what follows from them."""
    read, written = map(sum, zip(*timed, strict=True))
    if written <= 0:
        raise RuadaptError(
            "writing takes no longer than reading, so it can't be timed; give longer answers (--characters) "
            "or leave the machine to itself"
        )
    prompts = sum(len(prompt) for prompt, _ in dialogues)
    characters = sum(len(answer) for _, answer in dialogues)
    # Without the first token, which came with the reading.
    behind = sum(len(text) * (n - 1) / n for (_, text), n in zip(dialogues, lengths, strict=True))
    return {
        "characters": copies * characters,
        "reading_seconds": read,
        "writing_seconds": written,
        "characters_per_second": copies * characters / (read + written),
        "reading_characters_per_second": copies * prompts / read,
        "writing_characters_per_second": copies * behind / written,
        "seconds_per_written_token": written / (sum(lengths) - len(lengths)),
    }


class _Dictation(LogitsProcessor):
    """Puts the next token of a given answer in front of all others."""

    def __init__(self, answer: list[int], prompt_length: int, at_token: Callable[[], Any]) -> None:
        self._answer = answer
        self._prompt_length = prompt_length
        self._at_token = at_token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._at_token()
        scores[:, self._answer[input_ids.shape[1] - self._prompt_length]] = float("inf")
        return scores


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
        device, times = self._model.device, []
        prompts = torch.tensor([ids], device=device).expand(copies, -1)

        def mark() -> None:
            if device.type != "cpu":
                torch.accelerator.synchronize()  # all of its work is done
            times.append(time.perf_counter())

        def at_token() -> None:
            if len(times) == 1:  # the prompt is read
                mark()
            tick()

        mark()
        with torch.inference_mode():
            self._model.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=len(answer),
                logits_processor=[_Dictation(answer, len(ids), at_token)],
                pad_token_id=answer[0],
            )
        mark()
        start, read, end = times
        return read - start, end - read


class _LlamaCpp(_Writer):
    """One GGUF file that writes what it is told, by llama.cpp."""

    def __init__(self, name: str, file: Path, threads: int) -> None:
        library = _library("llama_cpp", "llama-cpp-python", "pip install 'ruadapt[gguf]'")
        self._formatter = _library("llama_cpp.llama_chat_format", "", "").Jinja2ChatFormatter
        self._name, self._positions = name, 2048
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

    def phases(self, ids: list[int], answer: list[int], copies: int, tick: Callable[..., Any]) -> Phases:
        self._engine.reset()
        times = [time.perf_counter()]
        self._engine.eval(ids)
        times.append(time.perf_counter())
        for token in answer[:-1]:
            self._engine.eval([token])
            tick()
        times.append(time.perf_counter())
        start, read, end = times
        return read - start, end - read


class _VLLM(_Writer):
    """One model that writes as many tokens as it is told, by vLLM."""

    rows = 0

    def __init__(self, name: str, folder: Path, vllm: Any) -> None:
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(str(folder), trust_remote_code=False, enable_prefix_caching=False)
        self._name, self._tokenizer = name, AutoTokenizer.from_pretrained(folder)
        self._positions = self._engine.llm_engine.model_config.max_model_len

    def phases(self, ids: list[int], answer: list[int], copies: int, tick: Callable[..., Any]) -> Phases:
        times = [time.perf_counter()]
        for count in (1, len(answer)):
            options = self._sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
            self._engine.generate([{"prompt_token_ids": ids}] * copies, options, use_tqdm=False)
            times.append(time.perf_counter())
        tick(len(answer))
        start, read, end = times
        return read - start, (end - read) - (read - start)
