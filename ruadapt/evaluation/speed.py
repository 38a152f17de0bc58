"""Speed in characters per second: original against adapted, same prompts, same text.

`phase_speed` tells reading from writing, over batch sizes, with memory, and can add the original with a
taller matrix: what that costs is the vocabulary tax. `generation_speed` is the plain comparison of a run.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids
from ruadapt.evaluation.models import embedding_rows, load, locate
from ruadapt.training.generation import maximum_length

PREFILL, GENERATION = "prefill", "generation"
_RESET_PEAK = Path("/proc/self/clear_refs")


def generation_speed(
    folders: Mapping[str, Path],
    dialogues: Mapping[str, Sequence[tuple[str, str]]],
    *,
    repeats: int = 5,
    threads: int = 1,
    device: str | None = None,
) -> pd.DataFrame:
    """Time how fast several instruct models write the same answers to the same prompts, one at a time.

    Args:
        folders: instruct model folders by name of the vocabulary.
        dialogues: pairs of a user's message and its answer, by language.
        repeats, threads, device: as in `phase_speed`.

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
        timed, _ = phase_speed(folders, pairs, repeats=repeats, threads=threads, device=device)
        keys = ["model", "rows", "repeat"]
        read, written = (timed[timed["phase"] == phase].set_index(keys) for phase in (PREFILL, GENERATION))
        table = pd.DataFrame(
            {
                "language": language,
                "characters": sum(len(answer) for _, answer in pairs),
                "reading_seconds": read["seconds"],
                "writing_seconds": written["seconds"],
            }
        )
        both = table["reading_seconds"] + table["writing_seconds"]
        table["characters_per_second"] = table["characters"] / both
        table["writing_characters_per_second"] = written["characters_per_second"]
        table["seconds_per_written_token"] = written["seconds"] / written["passes"]
        tables.append(table.reset_index().rename(columns={"model": "vocabulary"}))
    if not tables:
        raise RuadaptError("speed needs prompts with answers in one language at least")
    return pd.concat(tables, ignore_index=True)


def phase_speed(
    folders: Mapping[str, Path],
    dialogues: Sequence[tuple[str, str]],
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
    taller_by: int = 0,
    raw: bool = False,
    threads: int | None = None,
    device: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model generates token by token as always, but is dictated the answer: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. A batch of `b` is one prompt and its answer `b` times over, so that no row waits
    for a longer one (in a mixture of experts all rows take the same way, which flatters it). The first token
    of an answer comes with the reading of the prompt; writing is counted without it.

    Args:
        folders: model folders by name, the original first.
        dialogues: prompts and the answers to write.
        batch_sizes: how many at a time.
        repeats: timed passes; one more warms up.
        taller_by: time a copy of the original, too, whose matrices have so many more (untrained) rows.
        raw: the prompts are plain text, without the chat format.
        threads: CPU threads, None for torch's own choice.
        device: as in `load`; on an accelerator every time is taken after all its work is done.

    Returns:
        `model, rows, batch_size, phase, repeat, characters, passes, seconds, characters_per_second`, where
        `passes` counts forward passes and `rows` is the height of the embeddings; and, of the pass that warms
        up, `model, rows, batch_size, weights_bytes, working_bytes`: what generating took at its peak beside
        the weights (caches, logits), from CUDA's allocator. On a CPU it is the growth of the process (Linux,
        else NaN), to some megabytes.

    Raises:
        RuadaptError: nothing to measure, a model without a chat template, an answer that does not fit the
            context, or one of a single token.
    """
    if not folders or not dialogues or repeats < 1 or min(batch_sizes, default=0) < 1:
        raise RuadaptError("speed needs models, prompts with answers, batch sizes and repeats of 1 or more")
    loaded = {name: load(folder, device) for name, folder in folders.items()}
    if taller_by:
        first = next(iter(folders))
        model, tokenizer = load(folders[first], device)
        model.resize_token_embeddings(embedding_rows(model) + taller_by, mean_resizing=False)
        loaded[f"{first} + {taller_by} rows"] = (model, tokenizer)
    rows, memory = [], []
    with _threads(threads or torch.get_num_threads()):
        writers = {name: _Writer(name, *pair, raw=raw) for name, pair in loaded.items()}
        tasks = [{name: writer.task(*pair) for name, writer in writers.items()} for pair in dialogues]
        if any(len(answer) < 2 for task in tasks for _, answer in task.values()):
            raise RuadaptError("an answer of one token can't be timed; give longer answers")
        letters = {PREFILL: [len(p) for p, _ in dialogues], GENERATION: [len(a) for _, a in dialogues]}
        turns = [(size, repeat) for repeat in range(-1, repeats) for size in batch_sizes]
        for size, repeat in tqdm(turns, desc="speed", leave=False):
            seconds = {name: [0.0, 0.0] for name in writers}
            peaks = dict.fromkeys(writers, 0.0)
            for place, task in enumerate(tasks):
                for name in _rotated(list(writers), repeat + place):
                    with _working_memory(writers[name].device, repeat < 0) as peak:
                        times = writers[name].phases(*task[name], size)
                    seconds[name] = [total + new for total, new in zip(seconds[name], times, strict=True)]
                    peaks[name] = float(np.maximum(peaks[name], peak[0]))  # NaN stays NaN
            for name, (model, _) in loaded.items():
                labels = {"model": name, "rows": embedding_rows(model), "batch_size": size}
                if repeat < 0:
                    weights = sum(part.nbytes for part in model.parameters())
                    memory.append({**labels, "weights_bytes": weights, "working_bytes": peaks[name]})
                    continue
                lengths = [len(task[name][1]) for task in tasks]
                written = [count * (n - 1) / n for count, n in zip(letters[GENERATION], lengths, strict=True)]
                measured = {
                    PREFILL: (sum(letters[PREFILL]), len(tasks), seconds[name][0]),
                    GENERATION: (sum(written), sum(lengths) - len(tasks), seconds[name][1]),
                }
                for phase, (characters, passes, spent) in measured.items():
                    counts = {"characters": characters * size, "passes": passes, "seconds": spent}
                    pace = {"characters_per_second": characters * size / spent}
                    rows.append({**labels, "phase": phase, "repeat": repeat, **counts, **pace})
    return pd.DataFrame(rows), pd.DataFrame(memory)


def vllm_speed(
    folders: Mapping[str, Path],
    dialogues: Sequence[tuple[str, str]],
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the same in vLLM, where it is installed.

    An engine takes the whole accelerator, so the models come one after another instead of in turns. Instead
    of a dictated answer each writes freely, never ending early, as many tokens as it needs for the answer.
    Reading is timed as writing one token.

    Returns:
        as `phase_speed`, `rows` left out.

    Raises:
        RuadaptError: vLLM is not installed; something is no model folder; answers are too short to be timed.
    """
    try:
        vllm: Any = import_module("vllm")
    except ImportError as error:
        raise RuadaptError("vLLM is not installed here; install it, or measure with transformers") from error
    rows = []
    for name, folder in {name: locate(str(folder)) for name, folder in folders.items()}.items():
        engine = vllm.LLM(model=str(folder), trust_remote_code=False, enable_prefix_caching=False)
        tokenizer = engine.get_tokenizer()
        lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for _, answer in dialogues]
        chats = [[{"role": "user", "content": prompt}] for prompt, _ in dialogues]
        for repeat in range(-3, repeats):
            for size in batch_sizes:
                seconds = {PREFILL: 0.0, GENERATION: 0.0}
                for chat, length in zip(chats, lengths, strict=True):
                    for phase, count in ((PREFILL, 1), (GENERATION, length)):
                        options = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
                        start = time.perf_counter()
                        engine.chat([chat] * size, options, use_tqdm=False)
                        seconds[phase] += time.perf_counter() - start
                seconds[GENERATION] -= seconds[PREFILL]
                if repeat < 0:  # first passes, in which the engine still compiles
                    continue
                if seconds[GENERATION] <= 0:
                    raise RuadaptError(
                        f"{name}: writing takes no longer than reading, so it cannot be timed; give longer "
                        "answers (--characters) or leave the machine to itself"
                    )
                for phase, place in ((PREFILL, 0), (GENERATION, 1)):
                    count = size * sum(len(pair[place]) for pair in dialogues)
                    pace = {"seconds": seconds[phase], "characters_per_second": count / seconds[phase]}
                    labels = {"model": name, "batch_size": size, "phase": phase, "repeat": repeat}
                    rows.append({**labels, "characters": count, **pace})
        del engine
        gc.collect()  # ends the engine's process, which holds the memory
    return pd.DataFrame(rows)


class _Dictation(LogitsProcessor):
    """Puts the next token of a given answer in front of all others."""

    def __init__(
        self, answer: list[int], prompt_length: int, once_read: Callable[[], None] | None = None
    ) -> None:
        self._answer = answer
        self._prompt_length = prompt_length
        self._once_read = once_read

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._once_read is not None:
            self._once_read()
            self._once_read = None
        scores[:, self._answer[input_ids.shape[1] - self._prompt_length]] = float("inf")
        return scores


class _Writer:
    """One model that writes what it is told."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, raw: bool = False
    ) -> None:
        if not (raw or tokenizer.chat_template):
            raise RuadaptError(f"{name}: speed is measured on instruct models, this one has no chat template")
        self._raw = raw
        self._name = name
        self._model = model
        self._tokenizer = tokenizer

    def task(self, prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
        """Return the ids of the prompt in its chat format, `[1, length]`, and those of the answer."""

        def plain(text: str) -> list[int]:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

        ids, dictated = plain(prompt) if self._raw else chat_ids(self._tokenizer, prompt), plain(answer)
        if not dictated or len(ids) + len(dictated) > maximum_length(self._model):
            raise RuadaptError(
                f"{self._name}: an answer of {len(dictated)} tokens to a prompt of {len(ids)} cannot be "
                f"written within {maximum_length(self._model)} positions; give other answers"
            )
        return torch.tensor([ids], device=self._model.device), dictated

    def phases(self, ids: torch.Tensor, answer: list[int], copies: int) -> tuple[float, float]:
        """Return the seconds until the prompt, `copies` times, is read, and those of all writing after it."""
        times = []

        def mark() -> None:
            self._wait()
            times.append(time.perf_counter())

        mark()
        self.write(ids.expand(copies, -1), answer, mark)
        mark()
        start, read, end = times
        return read - start, end - read

    def write(
        self, ids: torch.Tensor, answer: list[int], once_read: Callable[[], None] | None = None
    ) -> list[int]:
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=len(answer),
                logits_processor=[_Dictation(answer, ids.shape[1], once_read)],
                pad_token_id=answer[0],
            )
        return output[0, ids.shape[1] :].tolist()

    @property
    def device(self) -> torch.device:
        return self._model.device

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


@contextmanager
def _working_memory(device: torch.device, wanted: bool) -> Iterator[list[float]]:
    """Yield a list that gets the bytes by which memory grew at its peak within the block."""
    found: list[float] = []
    if wanted and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        yield found
        found.append(float(torch.cuda.max_memory_allocated(device) - allocated))
    elif wanted and _RESET_PEAK.exists():
        with suppress(AttributeError):  # glibc's: give back what is free, so that taking it again shows
            ctypes.CDLL(None).malloc_trim(0)
        _RESET_PEAK.write_text("5")  # the highest resident size is what it is now
        before = _resident("VmRSS")
        yield found
        found.append(max(0.0, _resident("VmHWM") - before))
    else:
        yield found
        found.append(float("nan"))


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024
