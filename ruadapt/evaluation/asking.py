"""Models asked through their chat format, on this machine or behind a server; no question is asked twice."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import SuppressTokensLogitsProcessor

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, answers
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.evaluation.models import load, locate
from ruadapt.evaluation.script_mask import forbidden_tokens
from ruadapt.files import hash_path, read_json, read_jsonl, write_json
from ruadapt.freshness import KEY, changes, set_aside, state

RECORDS = "answers.jsonl"


@dataclass(frozen=True)
class Source:
    """A model that answers: a folder, or a model behind an endpoint."""

    name: str
    place: Path | Endpoint


def read_sources(specs: Sequence[str], served: bool = False) -> list[Source]:
    """Read `[NAME=]MODEL` and, if `served`, `[NAME=]MODEL@URL`; unnamed, a model is called by its last part.

    Raises:
        RuadaptError: as `locate`, or two of one name.
    """
    found: list[Source] = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not separator or "/" in name or "@" in name:
            name, rest = "", spec
        model, _, url = rest.partition("@")
        if served and "://" in url:
            found.append(Source(name or model.rpartition("/")[2], Endpoint(url, model)))
        else:
            found.append(Source(name or Path(rest).resolve().name, locate(rest)))
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise RuadaptError(f"each model needs its own name, not {', '.join(names)}; write NAME=MODEL")
    return found


def ask_once(
    folder: Path,
    source: Source,
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

    Each answer is a line of `folder/answers.jsonl` at once, and is not asked for again. What made them
    (model, sampling, code, versions) is `folder/key.json`; where that changed, the folder moves to `stale/`.

    Args:
        max_tokens: limit of an answer.
        temperature, seed: sampling of a local model; a server answers greedily.
        batch_size: conversations a local model answers at a time. A stopped run goes on at the beginning of
            a batch: sampled answers depend on all that is drawn with them.
        parallel: requests to a server under way at a time.
        forbidden: scripts that a local model must not write.

    Raises:
        RuadaptError: as `answers` and `Endpoint.ask_all`; another run asks into this folder.
    """
    place = source.place
    about: dict[str, Any] = {"max_tokens": max_tokens}
    if isinstance(place, Endpoint):
        code = state("evaluation/endpoint")
        about |= {"url": place.url, "model": place.model}
    else:
        code = state("mask" if forbidden else "ask")
        about |= {"model": hash_path(place), "temperature": temperature, "seed": seed}
        about |= {"forbidden": sorted(forbidden)}
    together = batch_size if temperature else 1
    starts = [number - number % together for number in range(len(conversations))]
    keys = [
        _digest(conversations[start : start + together], number if temperature else 0)
        for number, start in enumerate(starts)
    ]
    with _records(folder, {"key": about, **code}) as path:
        rows: Iterable[dict[str, Any]] = read_jsonl(path) if path.exists() else ()
        found = {row["key"]: Answer(row["answer"], row["cut"]) for row in rows}
        missing = [n for n, key in enumerate(keys) if key not in found and keys.index(key) == n]
        if temperature and missing:
            missing = list(range(starts[missing[0]], len(keys)))
        chosen = [conversations[number] for number in missing]
        replies: Iterable[tuple[int, Answer]] = ()
        if isinstance(place, Endpoint):
            replies = place.ask_all(chosen, max_tokens, parallel)
            replies = tqdm(replies, source.name, len(chosen), unit="answer", leave=False)
        elif missing:
            model, tokenizer = load(place)
            options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
            options |= {"seed": seed + missing[0], "batch_size": batch_size}
            if mask := forbidden_tokens(tokenizer, forbidden) if forbidden else []:
                options["processors"] = [SuppressTokensLogitsProcessor(mask, str(model.device))]
            replies = enumerate(answers(model, tokenizer, chosen, **options))
        with path.open("a", encoding="utf-8", buffering=1) as stream:
            for number, reply in replies:
                key, asked = keys[missing[number]], chosen[number][-1]["content"]
                if not reply.failed and key not in found:
                    row = {"key": key, "asked": asked, "answer": reply.text, "cut": reply.cut}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                found[key] = reply
    return [found[key] for key in keys]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def _records(folder: Path, maker: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the file of records that `maker` makes, for this process alone; others' are set aside."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    maker = json.loads(json.dumps(maker))
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if folder.exists():
                known = read_json(folder / KEY) if (folder / KEY).exists() else {}
                if known != maker:
                    reasons, kept = changes(known, maker), set_aside(folder)
                    logging.getLogger(__name__).warning(
                        "%s is stale: %s; all is asked anew, the old answers are in %s", folder, reasons, kept
                    )
            write_json(folder / KEY, maker)
            path = folder / RECORDS
            if path.exists():  # a killed run may have left half a line
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            yield path
    except Timeout as error:
        raise RuadaptError(
            f"{folder} is in use by another run; wait for it or give another folder"
        ) from error
