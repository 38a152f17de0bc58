"""Speed in characters per second: original against adapted, same prompts, same text.

`phase_speed` tells reading from writing, over batch sizes, and can add the original with a taller matrix:
what that costs is the vocabulary tax. `generation_speed` is the plain comparison of a run, `vllm_speed` the
same in vLLM.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids, question
from ruadapt.evaluation.models import embedding_rows, load, locate
from ruadapt.training.generation import maximum_length

PREFILL, GENERATION = "prefill", "generation"

Dialogues = Sequence[tuple[str, str]]
"""Prompts, and the answers to write."""
Phases = tuple[float, float, float]
"""Seconds of reading, those of writing after the first token, and the bytes that CUDA took at its peak."""
Tick = Callable[..., Any]


def generation_speed(
    folders: Mapping[str, Path], dialogues: Mapping[str, Dialogues], *, repeats: int = 5
) -> pd.DataFrame:
    """Time how fast several instruct models write the same answers to the same prompts, one at a time, on one
    thread.

    Args:
        folders: instruct model folders by name of the vocabulary.
        dialogues: pairs of a user's message and its answer, by language.
        repeats: as in `phase_speed`.

    Returns:
        columns `vocabulary, rows, language, repeat, characters, reading_seconds, writing_seconds,
        characters_per_second, writing_characters_per_second, seconds_per_written_token`, one row per model,
        language and repeat (all answers of the language together). `characters_per_second` is what a user
        sees: characters of the answers over the time of reading the prompts and writing. The other two know
        writing alone, without the first token, which comes with the reading.

    Raises:
        RuadaptError: as `phase_speed`.
    """
    tables = []
    for language, pairs in dialogues.items():
        timed = phase_speed(folders, pairs, repeats=repeats, threads=1)
        keys = ["model", "rows", "repeat"]
        read, written = (timed[timed["phase"] == phase].set_index(keys) for phase in (PREFILL, GENERATION))
        characters = sum(len(answer) for _, answer in pairs)
        table = pd.DataFrame(
            {
                "language": language,
                "characters": characters,
                "reading_seconds": read["seconds"],
                "writing_seconds": written["seconds"],
                "characters_per_second": characters / (read["seconds"] + written["seconds"]),
                "writing_characters_per_second": written["characters_per_second"],
                "seconds_per_written_token": written["seconds"] / written["passes"],
            }
        )
        tables.append(table.reset_index().rename(columns={"model": "vocabulary"}))
    return pd.concat(tables, ignore_index=True)


def phase_speed(
    folders: Mapping[str, Path],
    dialogues: Dialogues,
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
    taller_by: int = 0,
    threads: int | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model generates token by token as always, but is dictated the answer: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. A batch of `b` is one prompt and its answer `b` times over, so that no row waits
    for a longer one (in a mixture of experts all rows take the same way, which flatters it). The first token
    of an answer comes with the reading of the prompt; writing is counted without it.

    Args:
        folders: model folders by name, the original first; prompts are in the chat format of those that have
            one.
        batch_sizes: how many at a time.
        repeats: timed passes; one more warms up.
        taller_by: time a copy of the original, too, whose matrices have so many more (untrained) rows.
        threads: CPU threads, None for torch's own choice.
        device: as in `load`; on an accelerator every time is taken after all its work is done.

    Returns:
        `model, rows, batch_size, phase, repeat, characters, passes, seconds, characters_per_second,
        weights_bytes, working_bytes`, where `passes` counts forward passes and `rows` is the height of the
        embeddings. `working_bytes` is what CUDA's allocator gave at its peak beside the weights (caches,
        logits); NaN elsewhere.

    Raises:
        RuadaptError: nothing to measure, an answer that does not fit the context, or one of a single token.
    """
    with _threads(threads):
        writers: dict[str, _Writer] = {
            name: _Writer(name, *load(folder, device)) for name, folder in folders.items()
        }
        if taller_by:
            first = next(iter(folders))
            model, tokenizer = load(folders[first], device)
            model.resize_token_embeddings(embedding_rows(model) + taller_by, mean_resizing=False)
            name = f"{first} + {taller_by} rows"
            writers[name] = _Writer(name, model, tokenizer)
        return _timed(writers, dialogues, batch_sizes, repeats, warm_up=1)


def vllm_speed(
    folders: Mapping[str, Path], dialogues: Dialogues, *, batch_sizes: Sequence[int] = (1,), repeats: int = 5
) -> pd.DataFrame:
    """Time the same in vLLM, where it is installed.

    An engine takes the whole accelerator, so the models come one after another instead of in turns. Instead
    of a dictated answer each writes freely, never ending early, as many tokens as it needs for the answer.
    Reading is timed as writing one token.

    Returns:
        as `phase_speed`, without rows and bytes.

    Raises:
        RuadaptError: vLLM is not installed; something is no model folder; answers are too short to be timed.
    """
    if find_spec("vllm") is None:
        raise RuadaptError("vLLM is not installed here; install it, or measure with transformers")
    tables = []
    for name, folder in {name: locate(str(folder)) for name, folder in folders.items()}.items():
        # In its first passes the engine still compiles.
        tables.append(_timed({name: _VLLM(name, folder)}, dialogues, batch_sizes, repeats, warm_up=3))
        gc.collect()  # ends the engine's process, which holds the memory
    return pd.concat(tables, ignore_index=True)


def _timed(
    writers: "Mapping[str, _Writer]",
    dialogues: Dialogues,
    batch_sizes: Sequence[int],
    repeats: int,
    warm_up: int,
) -> pd.DataFrame:
    """Let the models take turns on every prompt, and return `phase_speed`'s table."""
    if not writers or not dialogues:
        raise RuadaptError("speed needs models, and prompts with answers")
    tasks = [{name: writer.task(*pair) for name, writer in writers.items()} for pair in dialogues]
    turns = [(size, repeat) for repeat in range(-warm_up, repeats) for size in batch_sizes]
    tokens = sum(len(answer) for task in tasks for _, answer in task.values())
    rows = []
    with tqdm(desc="speed", total=len(turns) * tokens, unit="token", leave=False) as progress:
        for size, repeat in turns:
            timed: dict[str, list[Phases]] = {name: [] for name in writers}
            for place, task in enumerate(tasks):
                turn = (repeat + place) % len(writers)
                for name in [*writers][turn:] + [*writers][:turn]:
                    timed[name].append(writers[name].phases(*task[name], size, progress.update))
            for name, writer in writers.items() if repeat >= 0 else ():
                lengths = [len(task[name][1]) for task in tasks]
                # Without the first token, which came with the reading.
                written = sum(
                    len(text) * (n - 1) / n for (_, text), n in zip(dialogues, lengths, strict=True)
                )
                counts = {
                    PREFILL: (sum(len(prompt) for prompt, _ in dialogues), len(tasks)),
                    GENERATION: (written, sum(lengths) - len(tasks)),
                }
                *seconds, working = map(list, zip(*timed[name], strict=True))
                for (phase, (characters, passes)), spent in zip(
                    counts.items(), map(sum, seconds), strict=True
                ):
                    if spent <= 0:
                        raise RuadaptError(
                            f"{name}: writing takes no longer than reading, so it can't be timed; give "
                            "longer answers (--characters) or leave the machine to itself"
                        )
                    about = {"model": name, "batch_size": size, "phase": phase, "repeat": repeat}
                    pace = {"characters": characters * size, "passes": passes, "seconds": spent}
                    pace["characters_per_second"] = characters * size / spent
                    rows.append(about | pace | writer.about | {"working_bytes": max(working)})
    return pd.DataFrame(rows)


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
        self._positions = maximum_length(model)
        weights = sum(part.nbytes for part in model.parameters())
        self.about = {"rows": embedding_rows(model), "weights_bytes": weights}

    def task(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt (in the chat format if there is one), and those of the answer."""
        ids, dictated = (
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
        )
        if self._tokenizer.chat_template:
            ids = chat_ids(self._tokenizer, question(prompt))
        if len(dictated) < 2 or len(ids) + len(dictated) > self._positions:
            raise RuadaptError(
                f"{self._name}: {len(dictated)} tokens behind a prompt of {len(ids)} can't be timed; "
                f"give others, of two tokens or more, within {self._positions} positions"
            )
        return ids, dictated

    def phases(self, ids: list[int], answer: list[int], copies: int, tick: Tick) -> Phases:
        """Read the prompt `copies` times at once, and write the answer; `tick` is told of every token."""
        cuda = torch.cuda if self._model.device.type == "cuda" else None
        prompts = torch.tensor([ids], device=self._model.device).expand(copies, -1)
        times: list[float] = []

        def mark() -> None:
            if self._model.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter())

        def at_token() -> None:
            if len(times) == 1:  # the prompt is read
                mark()
            tick()

        if cuda:
            cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated() if cuda else 0
        mark()
        self.write(prompts, answer, at_token)
        mark()
        start, read, end = times
        return read - start, end - read, cuda.max_memory_allocated() - before if cuda else math.nan

    def write(self, prompts: torch.Tensor, answer: list[int], at_token: Callable[[], Any]) -> list[int]:
        """Return what was written behind prompts `(copies, length)`: the answer."""
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=len(answer),
                logits_processor=[_Dictation(answer, prompts.shape[1], at_token)],
                pad_token_id=answer[0],
            )
        return output[0, prompts.shape[1] :].tolist()


class _VLLM(_Writer):
    """One model that writes as many tokens as it is told, by vLLM."""

    def __init__(self, name: str, folder: Path) -> None:
        self._vllm: Any = import_module("vllm")
        self._engine = self._vllm.LLM(str(folder), trust_remote_code=False, enable_prefix_caching=False)
        self._name, self._tokenizer = name, AutoTokenizer.from_pretrained(folder)
        self._positions = self._engine.llm_engine.model_config.max_model_len
        self.about = {}

    def phases(self, ids: list[int], answer: list[int], copies: int, tick: Tick) -> Phases:
        times = [time.perf_counter()]
        for count in (1, len(answer)):
            options = self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            self._engine.generate([{"prompt_token_ids": ids}] * copies, options, use_tqdm=False)
            times.append(time.perf_counter())
        tick(len(answer))
        start, read, end = times
        return read - start, (end - read) - (read - start), math.nan


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
