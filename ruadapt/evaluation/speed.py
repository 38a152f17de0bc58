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

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids, question
from ruadapt.evaluation.models import embedding_rows, load, maximum_length


def measure_speed(
    folders: Mapping[str, Path],
    dialogues: Mapping[str, Sequence[tuple[str, str]]],
    *,
    repeats: int = 5,
    engine: str = "transformers",
) -> pd.DataFrame:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model reads token by token what it is dictated, as if it had chosen it: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. One prompt is read at a time. CPU threads are as many as torch uses.

    Args:
        folders: model folders (GGUF files for llama.cpp) by name, the original first; prompts are in the chat
            format of those that have one.
        dialogues: pairs of a user's message and its answer, by language.
        repeats: timed passes; one more warms up.
        engine: "transformers" or "llama.cpp".

    Returns:
        columns `model, language, repeat, rows, characters, reading_seconds, writing_seconds,
        characters_per_second, reading_characters_per_second, writing_characters_per_second,
        seconds_per_written_token`, one row per model, language and repeat (all answers of the language
        together). `rows` is the height of the embeddings. `characters_per_second` is what a user sees:
        characters of the answers over the time of reading the prompts and writing. The next two know
        characters of the prompts and reading alone, and writing alone, without the first token, which comes
        with the reading.

    Raises:
        RuadaptError: nothing to measure, an answer that does not fit the context, or one of a single token;
            llama.cpp is not installed.
    """
    if not folders or not all(dialogues.values()):
        raise RuadaptError("speed needs models, and prompts with answers")
    lines = [(language, *pair) for language, pairs in dialogues.items() for pair in pairs]
    reader = _LlamaCpp if engine == "llama.cpp" else _Transformers
    readers = {name: reader(folder) for name, folder in folders.items()}
    tasks = {
        name: [task(model, prompt, answer) for _, prompt, answer in lines] for name, model in readers.items()
    }
    rows: list[dict[str, Any]] = []
    tokens = sum(len(dictated) for own in tasks.values() for _, dictated in own)
    with tqdm(desc="speed", total=tokens * (repeats + 1), unit="token", leave=False) as bar:
        for repeat, place in product(range(-1, repeats), range(len(lines))):  # the first pass warms up
            language, prompt, answer = lines[place]
            turn = (repeat + place) % len(readers)
            for name in [*readers][turn:] + [*readers][:turn]:
                ids, dictated = tasks[name][place]
                reading, writing = phases(readers[name], ids, dictated, bar.update)
                passes = len(dictated) - 1  # the first token came with the reading
                rows.append(
                    {"model": name, "language": language, "repeat": repeat, "characters": len(answer)}
                    | {"rows": readers[name].rows, "asked": len(prompt), "passes": passes}
                    | {"reading_seconds": reading, "writing_seconds": writing}
                    | {"behind": len(answer) * passes / len(dictated)}
                )
    timed = pd.DataFrame(rows).query("repeat >= 0")
    table = timed.groupby(["model", "language", "repeat", "rows"], sort=False).sum().reset_index()
    reading, writing = table["reading_seconds"], table["writing_seconds"]
    table["characters_per_second"] = table["characters"] / (reading + writing)
    table["reading_characters_per_second"] = table.pop("asked") / reading
    table["writing_characters_per_second"] = table.pop("behind") / writing
    table["seconds_per_written_token"] = writing / table.pop("passes")
    return table


class _Transformers:
    """A model folder that reads ids behind those that it has read before."""

    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer = load(folder)
        self.positions, self.rows = maximum_length(self._model), embedding_rows(self._model)

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt (in the chat format if there is one), and those of the answer."""
        ids, dictated = (
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
        )
        if self._tokenizer.chat_template:
            ids = chat_ids(self._tokenizer, question(prompt))
        return ids, dictated

    def forget(self) -> None:
        self._cache: Any = None

    @torch.inference_mode()
    def read(self, ids: list[int]) -> None:
        rows = torch.tensor([ids], device=self._model.device)
        output = self._model(input_ids=rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        output.logits.argmax(-1).tolist()  # the next token is chosen, which waits for a GPU


class _LlamaCpp:
    """A GGUF file that does the same by llama.cpp."""

    def __init__(self, file: Path) -> None:
        try:
            library, formats = map(import_module, ("llama_cpp", "llama_cpp.llama_chat_format"))
        except ImportError as error:
            raise RuadaptError(
                f"llama-cpp-python is not installed here ({error}); pip install 'ruadapt[gguf]', or measure "
                "with transformers"
            ) from error
        self._formatter, self.positions, threads = formats.Jinja2ChatFormatter, 2048, torch.get_num_threads()
        options = {"n_ctx": self.positions, "n_threads": threads, "n_threads_batch": threads}
        try:
            self._engine = library.Llama(str(file), verbose=False, **options)
        except ValueError as error:
            raise RuadaptError(f"{file}: {error}; llama.cpp takes files of `ruadapt export gguf`") from error
        self.rows, self.forget, self.read = self._engine.n_vocab(), self._engine.reset, self._engine.eval

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        engine, template = self._engine, self._engine.metadata.get("tokenizer.chat_template")
        if template:
            spelled = (
                engine.detokenize([number], special=True).decode() if number >= 0 else ""
                for number in (engine.token_eos(), engine.token_bos())
            )
            prompt = self._formatter(template, *spelled)(messages=question(prompt)).prompt
        ids = engine.tokenize(prompt.encode(), add_bos=not template, special=True)
        return ids, engine.tokenize(answer.encode(), add_bos=False, special=False)


def task(reader: _Transformers | _LlamaCpp, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids that a reader is given as prompt and as answer.

    Raises:
        RuadaptError: as `measure_speed`.
    """
    ids, dictated = reader.encode(prompt, answer)
    if len(dictated) < 2 or len(ids) + len(dictated) > reader.positions:
        raise RuadaptError(
            f"{len(dictated)} tokens of an answer behind {prompt[:60]!r} can't be timed; give one of two "
            f"tokens or more, within {reader.positions} positions"
        )
    return ids, dictated


def phases(
    reader: _Transformers | _LlamaCpp, ids: list[int], answer: list[int], tick: Callable[..., Any]
) -> tuple[float, float]:
    """Return the seconds of reading a prompt and of writing an answer; `tick` is told of every token."""
    reader.forget()
    times = [time.perf_counter()]
    for part in [ids, *([token] for token in answer[:-1])]:
        reader.read(part)
        times.append(time.perf_counter())
        tick()
    return times[1] - times[0], times[-1] - times[1]
