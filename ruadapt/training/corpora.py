"""The corpus stage: what the later stages read, from the generated world or from a person's own text."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, read_texts, take_characters, write_json, write_jsonl
from ruadapt.training.mixing import LETTERS, Filters, Source, write_mixed_corpus
from ruadapt.world import TASKS, World, chat_rows, documents, evaluation_items

COPY_TASKS = tuple(task for task in TASKS if task.startswith("copy"))
OTHER_TASKS = tuple(task for task in TASKS if task not in COPY_TASKS)
FEW_SHOTS = 5
Row = dict[str, Any]


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
    russian_characters: int,
    english_characters: int,
    heldout_documents: int,
    chat_count: int,
    prompt_count: int,
    russian_share: float,
    items_per_task: int,
) -> None:
    """Write the corpus of the generated world into the folder `target`.

    Training text and chat rows use people, wordings and combinations of the train split, few-shot examples
    those of the dev split, held-out text and evaluation items those of the test split. `russian_share` is
    that of chat rows and prompts.

    Raises:
        RuadaptError: no characters are asked for in one of the languages.
    """
    name = f"adaptation-{seed}"
    sizes = {"ru": russian_characters, "en": english_characters}
    if min(sizes.values()) < 1:
        raise RuadaptError(
            f"the world has no end: give the characters of its text in each language, not {sizes}"
        )
    for language, characters in tqdm(sizes.items(), desc="text of the world"):
        texts = take_characters(documents(world, language, "train", name), characters)
        write_jsonl(target / f"{language}_train.jsonl", ({"text": text} for text in texts))
        heldout = islice(documents(world, language, "test", name), heldout_documents)
        write_jsonl(target / f"{language}_heldout.jsonl", ({"text": text} for text in heldout))
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
        items = (
            item
            for language in ("en", "ru")
            for item in evaluation_items(world, language, split, seed, count)
        )
        write_jsonl(target / f"{file}.jsonl", items)


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
    heldout, rest = texts[:heldout_documents], texts[heldout_documents:]
    kept = take_characters(rest, characters)
    write_jsonl(target / f"{language}_train.jsonl", ({"text": text} for text in kept))
    write_jsonl(target / f"{language}_heldout.jsonl", ({"text": text} for text in heldout))


def mixed(
    corpus_mix: Sequence[Row],
    root: Path,
    characters: dict[str, int],
    *,
    filters: Filters,
    heldout_documents: int,
    heldout_share: float,
    seed: int,
) -> tuple[Row, Callable[[Path], None]]:
    """Return key and builder of a corpus of data sets, for `freshness.cached`.

    The builder writes both languages as `mixing.write_mixed_corpus` does, and `domains.json`: its rows, with
    each domain's `share` of its language's characters and what part of the documents read was `left out`, in
    percent.

    Raises:
        RuadaptError: an entry of the mix is wrong, two share a domain, or a language has none.
    """
    sources = [Source.of(entry) for entry in corpus_mix]
    if missing := [language for language in LETTERS if language not in {s.language for s in sources}]:
        raise RuadaptError(f"corpus_mix has no source with language {' or '.join(missing)}; both are needed")
    names = [(source.language, source.name) for source in sources]
    if len(set(names)) < len(names):
        raise RuadaptError(f"corpus_mix: every source of a language needs a domain of its own, not {names}")
    settings: Row = {
        "filters": filters,
        "heldout_documents": heldout_documents,
        "heldout_share": heldout_share,
        "seed": seed,
    }
    paths = {s.source: root / Path(s.source).expanduser() for s in sources}
    local = {name: hash_path(path) for name, path in paths.items() if path.exists()}
    key = settings | {"filters": asdict(filters), "sources": [asdict(s) for s in sources], "local": local}

    def build(folder: Path) -> None:
        rows = []
        for language, wanted in characters.items():
            own = [source for source in sources if source.language == language]
            made = write_mixed_corpus(own, folder, language, root=root, characters=wanted, **settings)
            total = sum(row["characters"] for row in made)
            for row in made:
                left = row["read"] - row["kept"] - row["heldout"]
                row["share"] = 100 * row["characters"] / total
                row["left out"] = 100 * left / max(1, row["read"])
            rows += made
        write_json(folder / "domains.json", rows)

    return key | {"characters": characters}, build
