"""Models asked through their chat format, on this machine or behind a server; answers are found again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, chat_ids, generate
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.evaluation.models import load
from ruadapt.evaluation.script_mask import forbidden_tokens
from ruadapt.files import hash_path, read_json, write_json
from ruadapt.freshness import cached
from ruadapt.hub import fetch_model

# Conversations that are answered, kept and found again together.
PART = 64


def read_sources(specs: Sequence[str], served: bool = False) -> dict[str, Path | Endpoint]:
    """Read `[NAME=]MODEL` and, if `served`, `[NAME=]MODEL@URL`; unnamed, a model is called by its last part.

    A GGUF file is taken as it is. Returns folders and endpoints by name.

    Raises:
        RuadaptError: as `hub.fetch_model`, a folder without a model, or two of one name.
    """
    found: dict[str, Path | Endpoint] = {}
    place: Path | Endpoint
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not separator or "/" in name or "@" in name:
            name, rest = "", spec
        model, _, url = rest.partition("@")
        if served and "://" in url:
            name, place = name or model.rpartition("/")[2], Endpoint(url, model)
        else:
            file = rest.endswith(".gguf") and Path(rest).is_file()
            folder = Path(rest) if file else fetch_model(rest)
            if not file and not (folder / "config.json").exists():
                raise RuadaptError(
                    f"{rest} is not a model folder (no config.json); give another, or a hub name"
                )
            name, place = name or Path(rest).resolve().name, folder
        if name in found:
            raise RuadaptError(f"each model needs its own name, two are called {name}; write NAME=MODEL")
        found[name] = place
    return found


def ask_once(
    folder: Path,
    place: Path | Endpoint,
    conversations: Sequence[Messages],
    *,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    parallel: int = 4,
    forbidden: Sequence[str] = (),
) -> list[Answer]:
    """Return the answers to conversations in order, those that a server refused among them.

    They are kept in `folder` by parts of PART, each a unit of `freshness.cached`: a stopped run goes on with
    the next part, and what another model, sampling or code has answered is made anew.

    Args:
        max_tokens: limit of an answer.
        temperature, seed: sampling of a local model; a server answers greedily.
        batch_size: conversations a local model answers at a time.
        parallel: requests to a server under way at a time.
        forbidden: scripts that a local model must not write.

    Raises:
        RuadaptError: as `chat_ids`, `generate` and `Endpoint.ask_all`.
    """
    opened = cache(load)
    sampling = {"temperature": temperature, "batch_size": batch_size}
    about: dict[str, Any] = {"max_tokens": max_tokens}
    if isinstance(place, Endpoint):
        about |= {"url": place.url, "model": place.model}
    else:
        about |= {"model": hash_path(place), "seed": seed, "forbidden": sorted(forbidden), **sampling}
    found: list[Answer] = []
    for first in range(0, len(conversations), PART):
        part = conversations[first : first + PART]

        def build(target: Path, part: Sequence[Messages] = part, first: int = first) -> None:
            if isinstance(place, Endpoint):
                rows: list[Any] = place.ask_all(part, max_tokens, parallel)
            else:
                model, tokenizer = opened(place)
                mask = forbidden_tokens(tokenizer, forbidden) if forbidden else []
                encoded = [chat_ids(tokenizer, messages) for messages in part]
                options: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed + first, **sampling}
                written = generate(model, tokenizer, encoded, suppress_tokens=mask or None, **options)
                rows = [astuple(answer) for _, answer in written]
            write_json(target / "answers.json", rows)

        asked = hashlib.sha256(json.dumps(part).encode()).hexdigest()
        unit = "served" if isinstance(place, Endpoint) else "ask"
        kept = cached(folder / f"part{first}", about | {"asked": asked}, build, unit)
        found += [Answer(*row) for row in read_json(kept / "answers.json")]
    return found
