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
    prompt_rows: int,
    texts: dict[str, Path],
    copy_rows: int,
    seed: int,
) -> dict[str, int]:
    """Write `chat.jsonl`, `prompts.jsonl` and `chat_copy.jsonl` into the folder `target`.

    Args:
        dataset, min_score: as `read_chats`; the first `rows` of them are taken, 0 for all.
        prompt_rows: questions of `dataset`, the prompts of self-calibration; 0 for all.
        texts: corpora by language (`ru`, `en`) whose text is to be copied.
        copy_rows: rows of the copy task.

    Returns:
        How many rows each file has.

    Raises:
        RuadaptError: as `read_chats`, or a data set without the needed turns.
    """
    chats = list(tqdm(islice(read_chats(dataset, min_score=min_score), rows or None), desc="chats"))
    found = {
        "chat": [row for row in chats if row["messages"][-1]["role"] == "assistant"],
        "prompts": list(islice(questions(chats), prompt_rows or None)),
        "chat_copy": list(copies(texts, copy_rows, seed)),
    }
    for name, part in found.items():
        if not part:
            raise RuadaptError(f"{dataset} gives no rows for {name}.jsonl")
        write_jsonl(target / f"{name}.jsonl", part)
    return {name: len(part) for name, part in found.items()}


def write_preferences(target: Path, dataset: str | Path, heldout: int, seed: int) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, pairs of answers that have no prompt in common.

    Raises:
        RuadaptError: as `read_preferences`, or too few pairs to hold out `heldout` of them.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in tqdm(read_preferences(dataset), desc="pairs"):
        by_prompt.setdefault(str(row["prompt"]), []).append(row)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    if not heldout or len(groups) < 2 * heldout:
        raise RuadaptError(
            f"{dataset} has pairs for {len(groups)} prompts, too few to hold out {heldout}; "
            "give more or hold out fewer, at least one"
        )
    for name, part in (("heldout", groups[:heldout]), ("train", groups[heldout:])):
        write_jsonl(target / f"{name}.jsonl", (row for group in part for row in group))


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

    Languages and lengths take turns. A text is cut at white space; the corpus begins again at its end.

    Args:
        texts: corpora by language, keys of `COPY_REQUESTS`.

    Raises:
        RuadaptError: a corpus has no text that is long enough.
    """
    generator = random.Random(seed)
    streams: dict[str, Iterator[str]] = {language: iter(()) for language in texts}
    for number in range(rows):
        language = list(texts)[number % len(texts)]
        length = COPY_LENGTHS[number // len(texts) % len(COPY_LENGTHS)]
        piece = next(_pieces(streams[language], length), None)
        if piece is None:
            streams[language] = read_texts(texts[language])
            piece = next(_pieces(streams[language], length), None)
        if piece is None:
            raise RuadaptError(f"{texts[language]} has no text of {SHORTEST_COPY} characters to copy")
        question = f"{generator.choice(COPY_REQUESTS[language])}\n\n{piece}"
        turns = (("user", question), ("assistant", piece))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def _pieces(texts: Iterable[str], length: int) -> Iterator[str]:
    for text in texts:
        short = text if len(text) <= length else re.sub(r"\s+\S*$", "", text[: length + 1])
        if len(short.strip()) >= SHORTEST_COPY:
            yield short.strip()
