"""Speed in characters per second: original against adapted, same prompts, same text, in one run.

Reading is told from writing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import chat_ids, question
from ruadapt.evaluation.models import embedding_rows, load, require_room

Dialogues = Sequence[tuple[str, str]]
"""Prompts, and the answers to write."""


def measure_speed(
    folders: Mapping[str, Path], dialogues: Mapping[str, Dialogues], *, repeats: int = 5
) -> pd.DataFrame:
    """Time reading and writing apart: the same prompts and answers for all models, in turns, in one run.

    Each model reads token by token what it is dictated, as if it had chosen it: whatever it would have said,
    and whenever it would have stopped, all models write the same characters, each in its own tokens. The
    models take turns prompt by prompt, in an order that turns with each repeat, so that a busy moment of the
    machine hits all of them. One prompt is read at a time. CPU threads are as many as torch uses.

    Args:
        folders: model folders by name, the original first; prompts are in the chat format of those that have
            one.
        dialogues: pairs of a user's message and its answer, by language.
        repeats: timed passes; one more warms up.

    Returns:
        columns `model, language, repeat, rows, characters, reading_seconds, writing_seconds,
        characters_per_second, reading_characters_per_second, writing_characters_per_second,
        seconds_per_written_token`, one row per model, language and repeat (all answers of the language
        together). `rows` is the height of the embeddings. `characters_per_second` is what a user sees:
        characters of the answers over the time of reading the prompts and writing. The next two know
        characters of the prompts and reading alone, and writing alone, without the first token, which comes
        with the reading.

    Raises:
        RuadaptError: nothing to measure, an answer that does not fit the context, or one of a single token.
    """
    if not folders or not all(dialogues.values()):
        raise RuadaptError("speed needs models, and prompts with answers")
    lines = [(language, *pair) for language, pairs in dialogues.items() for pair in pairs]
    models, tasks = {}, {}
    for name, folder in folders.items():
        models[name], tokenizer = load(folder)
        tasks[name] = [task(models[name], tokenizer, prompt, answer) for _, prompt, answer in lines]
    rows: list[dict[str, Any]] = []
    tokens = sum(len(dictated) for own in tasks.values() for _, dictated in own)
    with tqdm(desc="speed", total=tokens * (repeats + 1), unit="token", leave=False) as bar:
        for repeat, place in product(range(-1, repeats), range(len(lines))):  # the first pass warms up
            language, prompt, answer = lines[place]
            turn = (repeat + place) % len(models)
            for name in [*models][turn:] + [*models][:turn]:
                ids, dictated = tasks[name][place]
                reading, writing = phases(models[name], ids, dictated, bar.update)
                passes = len(dictated) - 1  # the first token came with the reading
                rows.append(
                    {"model": name, "language": language, "repeat": repeat, "characters": len(answer)}
                    | {"rows": embedding_rows(models[name]), "asked": len(prompt), "passes": passes}
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


def task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt (in the chat format if there is one), and those of the answer.

    Raises:
        RuadaptError: as `measure_speed`.
    """
    ids, dictated = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)
    )
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, question(prompt))
    if len(dictated) < 2:
        raise RuadaptError(f"the answer to {prompt[:60]!r} is too short to be timed; give a longer one")
    require_room(model, len(ids), len(dictated))
    return ids, dictated


@torch.inference_mode()
def phases(
    model: PreTrainedModel, ids: Sequence[int], answer: Sequence[int], tick: Callable[..., Any]
) -> tuple[float, float]:
    """Return the seconds of reading a prompt and of writing an answer; `tick` is told of every token."""
    cache, times = None, [time.perf_counter()]
    for part in [ids, *([token] for token in answer[:-1])]:
        rows = torch.tensor([part], device=model.device)
        output = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        output.logits.argmax(-1).tolist()  # the next token is chosen, which waits for a GPU
        times.append(time.perf_counter())
        tick()
    return times[1] - times[0], times[-1] - times[1]
