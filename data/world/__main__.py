"""Write the embedded corpus, which the default run reads: `python -m data.world [FOLDER]`.

Training text and chat rows use people, wordings and combinations of the train split, few-shot examples those
of the dev split, held-out text and evaluation items those of the test split.
"""

import gzip
import json
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.world import FOLDER, TASKS, World, chat_rows, documents, evaluation_items, mix_languages
from ruadapt.files import take_characters

SEED = 0
CHARACTERS = {"ru": 3_000_000, "en": 1_000_000}
HELDOUT_DOCUMENTS = 150
CHAT_ROWS, PROMPT_ROWS = 6_000, 2_000
RUSSIAN_SHARE = 0.8  # of chat rows and prompts
ITEMS, EXAMPLES = 50, 5  # of each task and language
COPY_TASKS = tuple(task for task in TASKS if task.startswith("copy"))
OTHER_TASKS = tuple(task for task in TASKS if task not in COPY_TASKS)


def write(target: Path) -> None:
    """Write `NAME.jsonl.gz` into the folder `target`, the same bytes every time."""
    world, name = World(), f"adaptation-{SEED}"
    target.mkdir(parents=True, exist_ok=True)
    for language, wanted in CHARACTERS.items():
        train = take_characters(documents(world, language, "train", name), wanted)
        heldout = islice(documents(world, language, "test", name), HELDOUT_DOCUMENTS)
        for part, texts in (("train", train), ("heldout", heldout)):
            _write(target / f"{language}_{part}", ({"text": text} for text in texts))
    for file, tasks, count in (
        ("chat", OTHER_TASKS, CHAT_ROWS),
        ("chat_copy", COPY_TASKS, CHAT_ROWS),
        ("prompts", OTHER_TASKS, PROMPT_ROWS),
    ):
        russian, english = (chat_rows(world, code, "train", f"{file}-{SEED}", tasks) for code in ("ru", "en"))
        rows = mix_languages(russian, english, count, RUSSIAN_SHARE)
        if file == "prompts":
            rows = (row | {"messages": row["messages"][:1]} for row in rows)
        _write(target / file, rows)
    for file, split, count in (("tasks", "test", ITEMS), ("fewshot", "dev", EXAMPLES)):
        items = (evaluation_items(world, code, split, SEED, count) for code in ("en", "ru"))
        _write(target / file, chain.from_iterable(items))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.with_name(f"{path.name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else FOLDER / "corpus")
