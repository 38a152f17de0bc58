"""The corpus stage: what the later stages read, from the generated world or from a person's own text."""

import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from ruadapt.data_sets import Row
from ruadapt.errors import RuadaptError
from ruadapt.files import read_texts, take_characters, write_jsonl
from ruadapt.world import TASKS, World, chat_rows, documents, evaluation_items

COPY_TASKS = tuple(task for task in TASKS if task.startswith("copy"))
OTHER_TASKS = tuple(task for task in TASKS if task not in COPY_TASKS)
FEW_SHOTS = 5


def mix_languages(
    russian: Iterator[Row], english: Iterator[Row], rows: int, russian_share: float
) -> Iterator[Row]:
    """Yield `rows` rows, `russian_share` of them Russian, evenly interleaved."""
    for number in range(rows):
        is_russian = int((number + 1) * russian_share) > int(number * russian_share)
        yield next(russian if is_russian else english)


def write_world_corpus(
    world: World,
    target: Path,
    *,
    seed: int,
    characters: dict[str, int],
    heldout_documents: int,
    chat_count: int,
    prompt_count: int,
    russian_share: float,
    items_per_task: int,
) -> None:
    """Write the corpus of the generated world into the folder `target`.

    Training text and chat rows use people, wordings and combinations of the train split, few-shot examples
    those of the dev split, held-out text and evaluation items those of the test split. `characters` are those
    of `ru` and `en` text, `russian_share` that of chat rows and prompts.

    Raises:
        RuadaptError: no characters are asked for in one of the languages.
    """
    if min(characters.values()) < 1:
        raise RuadaptError(f"the world has no end: give the characters of each language, not {characters}")
    name = f"adaptation-{seed}"
    for language, wanted in tqdm(characters.items(), desc="text of the world"):
        texts = take_characters(documents(world, language, "train", name), wanted)
        heldout = islice(documents(world, language, "test", name), heldout_documents)
        _write_parts(target, language, texts, heldout)
    for file, tasks, count in (
        ("chat", OTHER_TASKS, chat_count),
        ("chat_copy", COPY_TASKS, chat_count),
        ("prompts", OTHER_TASKS, prompt_count),
    ):
        russian, english = (chat_rows(world, name, "train", f"{file}-{seed}", tasks) for name in ("ru", "en"))
        rows = mix_languages(russian, english, count, russian_share)
        if file == "prompts":
            rows = (row | {"messages": row["messages"][:1]} for row in rows)
        write_jsonl(target / f"{file}.jsonl", rows)
    for file, split, count in (("tasks", "test", items_per_task), ("fewshot", "dev", FEW_SHOTS)):
        items = (evaluation_items(world, language, split, seed, count) for language in ("en", "ru"))
        write_jsonl(target / f"{file}.jsonl", chain.from_iterable(items))


def write_text_corpus(
    source: Path, target: Path, language: str, *, characters: int, heldout_documents: int, seed: int
) -> None:
    """Split a person's own text into `{language}_train.jsonl` and `{language}_heldout.jsonl` in `target`.

    Documents (lines of a text file, `text` of JSON lines) that occur twice are kept once, so that no held-out
    document is trained on. `characters` limits the training part; 0 takes all.

    Raises:
        RuadaptError: nothing readable in `source`, or too little for the held-out part.
    """
    texts = list(dict.fromkeys(tqdm(read_texts(source), desc=f"reading {language}", unit=" documents")))
    if len(texts) < 2 * heldout_documents:
        raise RuadaptError(
            f"{source} has {len(texts)} different documents, too few to hold out {heldout_documents}; "
            "give more text or set heldout_documents lower"
        )
    random.Random(seed).shuffle(texts)
    kept = take_characters(texts[heldout_documents:], characters)
    _write_parts(target, language, kept, texts[:heldout_documents])


def _write_parts(target: Path, language: str, train: Iterable[str], heldout: Iterable[str]) -> None:
    for part, texts in (("train", train), ("heldout", heldout)):
        write_jsonl(target / f"{language}_{part}.jsonl", ({"text": text} for text in texts))
