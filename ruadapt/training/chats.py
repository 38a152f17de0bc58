"""Chat data from data sets of Saiga's and Vikhr's schemas: conversations, prompts, the copy task."""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from ruadapt.data_sets import Row, read_rows, read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import write_jsonl

# Names of one thing in different data sets: Saiga's and Vikhr's columns and roles, and the usual ones.
CONVERSATIONS = ("messages", "conversation", "conversations")
ROLES = {"bot": "assistant", "human": "user", "gpt": "assistant"}
SCORE, FLAG = "opus_score", "is_bad_by_regex"
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
SHORTEST_COPY = 20
LONGEST_HELDOUT = 1_000
"""Characters of a held-out chat, so that it fits small contexts in every vocabulary."""


def read_chats(source: str | Path, min_score: int = 0) -> Iterator[Row]:
    """Yield `{"messages": [{"role", "content"}]}` of an instruction data set.

    Columns and roles of `IlyaGusev/saiga_scored` (`messages`, `bot`, `opus_score`, `is_bad_by_regex`) and
    `Vikhrmodels/GrandMaster-PRO-MAX` (`conversation`) are understood, from the hub or a local file. Rows
    flagged as bad are left out, and so are those with an `opus_score` below `min_score`.

    Raises:
        RuadaptError: unreachable, or a row that is no conversation or has no score.
    """
    for number, row in enumerate(read_rows(source)):
        if row.get(FLAG):
            continue
        where = f"{source}, row {number}"
        if min_score and SCORE not in row:
            raise RuadaptError(f"{where} lacks {SCORE}, by which min_score {min_score} selects")
        if min_score and (row[SCORE] or 0) < min_score:
            continue
        turns = next((row[name] for name in CONVERSATIONS if name in row), None)
        try:
            kept = [(turn["role"], turn["content"]) for turn in turns or ()]
        except (TypeError, LookupError):
            kept = []
        if not kept or not all(isinstance(content, str) for _, content in kept):
            raise RuadaptError(
                f"{where}: a column {' or '.join(CONVERSATIONS)} with `role` and `content` was expected; "
                f"its columns are {', '.join(row)}"
            )
        yield {"messages": [{"role": ROLES.get(role, role), "content": said} for role, said in kept]}


def write_chats(
    target: Path,
    sources: Sequence[Row],
    *,
    heldout: int = 0,
    min_score: int = 0,
    prompt_rows: int,
    texts: dict[str, Path],
    copy_rows: int,
    seed: int,
) -> dict[str, int]:
    """Write `chat.jsonl`, `prompts.jsonl` and `chat_copy.jsonl` into the folder `target`.

    With `heldout` `{language}_chat_heldout.jsonl` gets so many questions of each language, those whose hashes
    are the least, with the first of their answers that is short enough (`LONGEST_HELDOUT`). No other answer
    to them is used.

    Args:
        sources, min_score: `{"source": hub name or file, "language": "ru"}`, each as `read_chats` takes it.
        prompt_rows: how many questions, drawn from all languages, self-calibration asks; 0 for all.
        texts: corpora by language (`ru`, `en`) whose text is to be copied.
        copy_rows: rows of the copy task.

    Returns:
        How many rows each file has.

    Raises:
        RuadaptError: as `read_chats`, a data set without the needed turns, or too few to hold out so many.
    """
    kept: list[Row] = []
    for language in dict.fromkeys(source.get("language", "") for source in sources):
        own = (source["source"] for source in sources if source.get("language", "") == language)
        rows = list(tqdm(chain.from_iterable(read_chats(one, min_score) for one in own), desc="chats"))
        apart = _held_out(rows, heldout, language)
        if heldout:
            write_jsonl(target / f"{language}_chat_heldout.jsonl", apart.values())
        kept += (row for row in rows if _question(row) not in apart)
    found = {
        "chat": [row for row in kept if row["messages"][-1]["role"] == "assistant"],
        "prompts": list(islice(questions(random.Random(seed).sample(kept, len(kept))), prompt_rows or None)),
        "chat_copy": list(copies(texts, copy_rows, seed)),
    }
    for name, part in found.items():
        if not part:
            listed = ", ".join(str(source["source"]) for source in sources)
            raise RuadaptError(f"{listed} (min_score {min_score}) gives no rows for {name}.jsonl")
        write_jsonl(target / f"{name}.jsonl", part)
    return {name: len(part) for name, part in found.items()}


def _held_out(rows: Sequence[Row], wanted: int, language: str) -> dict[str, Row]:
    """Return `wanted` questions by their hashes, each with the first answer that is short enough."""
    answered = [row for row in rows if _question(row) and row["messages"][-1]["role"] == "assistant"]
    short: dict[str, Row] = {}
    for row in answered:
        if sum(len(message["content"]) for message in row["messages"]) <= LONGEST_HELDOUT:
            short.setdefault(_question(row), row)
    apart = sorted(short, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:wanted]
    asked = len({_question(row) for row in answered})
    if wanted and not len(apart) == wanted < asked:
        raise RuadaptError(
            f"chats, {language}: of {asked} questions {len(apart)} have an answer short enough, "
            f"and {wanted} are to be held out; give more chats or hold out fewer"
        )
    return {text: short[text] for text in apart}


def _question(row: Row) -> str:
    """Return the first question of a conversation, nothing where nobody asks."""
    return next((message["content"] for message in row["messages"] if message["role"] == "user"), "")


def questions(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield conversations up to the first question, system turn included, each question once."""
    seen = {""}
    for row in rows:
        if (text := _question(row)) not in seen:
            seen.add(text)
            place = [message["role"] for message in row["messages"]].index("user")
            yield {"messages": row["messages"][: place + 1]}


def copies(texts: dict[str, Path], rows: int, seed: int) -> Iterator[Row]:
    """Yield `rows` rows of the copy task (METHOD section 6): a request, and the text that must come back.

    Languages and lengths take turns. A text is cut at white space; the corpus begins again at its end.

    Args:
        texts: corpora by language, keys of `COPY_REQUESTS`.

    Raises:
        RuadaptError: a corpus has no text that is long enough.
    """
    generator = random.Random(seed)
    streams = {language: _endless(path) for language, path in texts.items()}
    for number in range(rows):
        language = list(texts)[number % len(texts)]
        length = COPY_LENGTHS[number // len(texts) % len(COPY_LENGTHS)]
        piece = next(streams[language])
        if len(piece) > length:
            piece = re.sub(r"\s+\S*$", "", piece[: length + 1])
        question = f"{generator.choice(COPY_REQUESTS[language])}\n\n{piece}"
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": piece}]}


def _endless(path: Path) -> Iterator[str]:
    found = True
    while found:
        found = False
        for text in map(str.strip, read_texts(path)):
            if len(text) >= SHORTEST_COPY:
                found = True
                yield text
    raise RuadaptError(f"{path} has no text of {SHORTEST_COPY} characters to copy")
