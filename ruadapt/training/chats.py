"""Chat data for calibration from real data sets: conversations, prompts to be answered, and the copy task."""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.files import read_texts, write_jsonl
from ruadapt.training.chat_schemas import read_chats, read_preferences

Row = dict[str, Any]
# The text follows a blank line. Lengths in characters: a sentence, a paragraph, a short document.
COPY_REQUESTS = {
    "ru": (
        "Повтори этот текст слово в слово, ничего не добавляя.",
        "Перепиши следующий текст без единого изменения.",
        "Скопируй текст ниже точно, знак в знак.",
    ),
    "en": (
        "Repeat this text word for word and add nothing.",
        "Write the following text again without a single change.",
        "Copy the text below exactly, character by character.",
    ),
}
COPY_LENGTHS = (150, 600, 2_000)
PREFERENCE_METHODS = ("dpo", "kto", "simpo")
SHORTEST_COPY = 20


def write_chat_data(
    target: Path,
    *,
    dataset: str | Path,
    min_score: int,
    rows: int,
    prompts: str | Path,
    prompt_rows: int,
    texts: dict[str, Path],
    copy_rows: int,
    seed: int,
) -> dict[str, int]:
    """Write `chat.jsonl`, `prompts.jsonl` and `chat_copy.jsonl` into the folder `target`.

    Args:
        dataset, min_score: as `read_chats`; the first `rows` of them are taken, 0 for all.
        prompts: data set whose questions are the prompts of self-calibration; empty takes `dataset`'s.
        texts: corpora by language (`ru`, `en`) whose text is to be copied.
        copy_rows: rows of the copy task.

    Returns:
        How many rows each file has.

    Raises:
        RuadaptError: as `read_chats`, or a data set without the needed turns.
    """
    chats = list(_first(read_chats(dataset, min_score=min_score), rows, "chats"))
    asked = chats if not prompts else read_chats(prompts)
    found = {
        "chat": [row for row in chats if row["messages"][-1]["role"] == "assistant"],
        "prompts": list(_first(questions(asked), prompt_rows, "prompts")),
        "chat_copy": list(copies(texts, copy_rows, seed)),
    }
    for name, part in found.items():
        if not part:
            raise RuadaptError(
                f"{dataset if name == 'chat' else prompts or dataset} gives no rows for {name}.jsonl"
            )
        write_jsonl(target / f"{name}.jsonl", part)
    return {name: len(part) for name, part in found.items()}


def write_preferences(target: Path, dataset: str | Path, rows: int, heldout: int, seed: int) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, pairs of answers that have no prompt in common.

    Raises:
        RuadaptError: as `read_preferences`, or too few pairs to hold out `heldout` of them.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in _first(read_preferences(dataset), rows, "pairs"):
        by_prompt.setdefault(str(row["prompt"]), []).append(row)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    pairs = [row for group in groups for row in group]
    cut = sum(map(len, groups[:heldout]))
    if not heldout or len(groups) < 2 * heldout:
        raise RuadaptError(
            f"{dataset} has pairs for {len(groups)} prompts, too few to hold out {heldout}; "
            "give more or hold out fewer, at least one"
        )
    write_jsonl(target / "heldout.jsonl", pairs[:cut])
    write_jsonl(target / "train.jsonl", pairs[cut:])


def questions(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield conversations up to the first question, system turn included, each question once."""
    seen = set()
    for row in rows:
        messages = row["messages"]
        places = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if places and (text := messages[places[0]]["content"]) not in seen:
            seen.add(text)
            yield {"messages": messages[: places[0] + 1]}


def copies(texts: dict[str, Path], rows: int, seed: int) -> Iterator[Row]:
    """Yield `rows` rows of the copy task (METHOD section 6): a request, and the text that must come back.

    Languages and lengths take turns. A text is cut at white space, and is used once as long as there are
    enough of them.

    Args:
        texts: corpora by language, keys of `COPY_REQUESTS`.
    """
    generator = random.Random(seed)
    streams = {language: _Pieces(path) for language, path in texts.items()}
    for number in range(rows):
        language = list(streams)[number % len(streams)]
        text = streams[language].next(COPY_LENGTHS[number // len(streams) % len(COPY_LENGTHS)])
        request = generator.choice(COPY_REQUESTS[language])
        yield {
            "messages": [
                {"role": "user", "content": f"{request}\n\n{text}"},
                {"role": "assistant", "content": text},
            ]
        }


class _Pieces:
    """Texts of a corpus cut to a wanted length, from the start again at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: Iterator[str] = iter(())

    def next(self, length: int) -> str:
        for _ in range(2):
            for text in self.texts:
                short = text if len(text) <= length else re.sub(r"\s+\S*$", "", text[: length + 1])
                piece = short.strip()
                if len(piece) >= SHORTEST_COPY:
                    return piece
            self.texts = read_texts(self.path)
        raise RuadaptError(f"{self.path} has no text of {SHORTEST_COPY} characters to copy")


def _first(rows: Iterable[Row], count: int, title: str) -> Iterator[Row]:
    yield from tqdm(islice(rows, count or None), desc=title, unit=" rows", disable=None)
