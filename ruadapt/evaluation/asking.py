"""Questions, and models that answer them in their chat format; answers are kept and found again."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ruadapt.data_sets import LINES, read_texts
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, chat_ids, generate, question
from ruadapt.evaluation.models import load
from ruadapt.evaluation.scripts import forbidden_tokens
from ruadapt.files import hash_path, read_json, read_jsonl, write_json
from ruadapt.freshness import cached
from ruadapt.hub import fetch_model

# Conversations that are answered, kept and found again together.
PART = 64


def read_questions(path: Path) -> list[tuple[str, str | None]]:
    """Return the questions of a file, each with its answer where the file has one.

    A text file has a question a line, JSON lines have `prompt` or arena-hard's `turns`, and perhaps `answer`.
    Either may be gzipped.

    Raises:
        RuadaptError: no question, or an empty one.
    """
    lines = path.name.endswith(LINES)
    rows = read_jsonl(path) if lines else ({"prompt": text} for text in read_texts(path))
    found = []
    for number, row in enumerate(rows, 1):
        text = row["turns"][0]["content"] if "turns" in row else row.get("prompt", "")
        if not text.strip():
            raise RuadaptError(f"{path}, question {number}: there is no text in `prompt`, nor in `turns`")
        found.append((text, row.get("answer")))
    if not found:
        raise RuadaptError(f"{path} holds no question")
    return found


def read_sources(specs: Sequence[str]) -> dict[str, Path | str]:
    """Read `[NAME=]MODEL` and `[NAME=]MODEL@URL`; unnamed, a model is called by its last part.

    Returns:
        by name a model's folder, a GGUF file, or `MODEL@URL` of one on a server.

    Raises:
        RuadaptError: as `hub.fetch_model`, a folder without a model, or two of one name.
    """
    found: dict[str, Path | str] = {}
    for spec in specs:
        name, separator, model = spec.partition("=")
        if not separator or "/" in name or "@" in name:  # a path, or an address, may hold the sign as well
            name, model = "", spec
        name = name or Path(model.partition("@")[0]).resolve().name
        if name in found:
            raise RuadaptError(f"each model needs its own name, two are called {name}; write NAME=MODEL")
        place: Path | str = model if "://" in model else Path(model)
        if isinstance(place, Path) and not (place.suffix == ".gguf" and place.is_file()):
            place = fetch_model(model)
            if not (place / "config.json").exists():
                raise RuadaptError(
                    f"{model} is not a model folder (no config.json); give another, or a hub name"
                )
        found[name] = place
    return found


def ask_once(
    folder: Path, place: Path | str, prompts: Sequence[str], *, system: str = "", **options: Any
) -> list[str]:
    """Return the answers to prompts of a user in order, "" where a server refused.

    Args:
        system: what each conversation begins with, if anything.
        folder, place, options: as of `answers_to`.
    """
    instructions = [{"role": "system", "content": system}] if system else []
    conversations = [[*instructions, *question(prompt)] for prompt in prompts]
    return [answer.text for answer in answers_to(folder, place, conversations, **options)]


def answers_to(
    folder: Path,
    place: Path | str,
    conversations: Sequence[Messages],
    *,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    forbidden: Sequence[str] = (),
    batch_size: int = 8,
) -> list[Answer]:
    """Return a model's answers to conversations in order; of a server's only the text is known.

    They are kept in `folder` by parts of PART, each a unit of `freshness.cached`: a stopped run goes on with
    the next part, and what another model, limit, temperature or code has answered is made anew.

    Args:
        place: a model's folder, or `MODEL@URL`.
        max_tokens: limit of an answer.
        temperature: 0 is greedy.
        forbidden: scripts that a model on this machine must not write.
        batch_size: answers that such a model writes at once.

    Raises:
        RuadaptError: as `chat_ids`, `generate` and `ask_server`.
    """
    opened, found = cache(load), list[Answer]()
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    about = options | {"model": hash_path(place) if isinstance(place, Path) else place}
    about |= {"forbidden": list(forbidden)}
    for first in range(0, len(conversations), PART):
        part = list(conversations[first : first + PART])

        def build(target: Path, part: Sequence[Messages] = part, first: int = first) -> None:
            answers: Sequence[Answer | str]
            if isinstance(place, Path):
                model, tokenizer = opened(place)
                encoded = [chat_ids(tokenizer, messages) for messages in part]
                mask = forbidden_tokens(tokenizer, forbidden) if forbidden else ()
                own: Any = {"seed": first, "suppress": mask, "batch_size": batch_size}
                answers = generate(model, tokenizer, encoded, **options, **own)
            else:
                from ruadapt.evaluation.endpoint import ask_server  # slow to import

                answers = ask_server(place, part, **options)
            write_json(target / "answers.json", answers)

        asked = hashlib.sha256(json.dumps(part).encode()).hexdigest()
        unit = "ask" if isinstance(place, Path) else "served"
        kept = cached(folder / f"part{first}", about | {"asked": asked}, build, unit)
        for said in read_json(kept / "answers.json"):
            found.append(Answer([], said, False) if isinstance(said, str) else Answer(*said))
    return found
