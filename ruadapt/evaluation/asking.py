"""Models asked through their chat format, on this machine or behind a server; no question is asked twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, answers
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.evaluation.models import load
from ruadapt.evaluation.records import digest, open_records
from ruadapt.evaluation.script_mask import ScriptMask
from ruadapt.files import hash_path
from ruadapt.freshness import unit_state

# So many failures before the first answer are a server that doesn't work.
_GIVE_UP = 8


@dataclass(frozen=True)
class Source:
    """A model that answers: a folder, or a model behind an endpoint."""

    name: str
    place: Path | Endpoint


def read_sources(specs: Sequence[str], served: bool = False) -> list[Source]:
    """Read `[NAME=]FOLDER` and, if `served`, `[NAME=]MODEL@URL`; unnamed, a model is called by its last part.

    Raises:
        RuadaptError: a folder that is none, or two of one name.
    """
    found: list[Source] = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not separator or "/" in name or "@" in name:
            name, rest = "", spec
        model, separator, url = rest.partition("@")
        if served and separator and "://" in url:
            found.append(Source(name or model, Endpoint(url, model)))
        elif (Path(rest) / "config.json").exists():
            found.append(Source(name or Path(rest).resolve().name, Path(rest)))
        else:
            way = "give one, or MODEL@URL for a model on a server" if served else "give one"
            raise RuadaptError(f"{rest} is no model folder (no config.json); {way}")
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise RuadaptError(f"each model needs its own name, not {', '.join(names)}; write NAME=FOLDER")
    return found


def ask_once(
    path: Path,
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
    """Return the answers to conversations in order, those that a server failed to give among them.

    Each answer is written to the records at `path` at once; what stands there, made by the same model,
    sampling and code, is not asked for again.

    Args:
        max_tokens: limit of an answer.
        temperature, seed: sampling of a local model; a server answers greedily.
        batch_size: conversations a local model answers at a time. A stopped run goes on at the beginning of
            a batch: sampled answers depend on all that is drawn with them.
        parallel: requests to a server under way at a time.
        forbidden: scripts that a local model must not write.

    Raises:
        RuadaptError: as `answers` and `Endpoint.ask`; none of a server's first replies came.
    """
    place = source.place
    about: dict[str, Any] = {"max_tokens": max_tokens}
    if isinstance(place, Endpoint):
        state = unit_state(declared="evaluation/endpoint")
        about |= {"url": place.url, "model": place.model}
    else:
        state = unit_state("ask", *(["mask"] if forbidden else []))
        about |= {"model": hash_path(place), "temperature": temperature, "seed": seed}
        about |= {"forbidden": sorted(forbidden)}
    keys = _keys(conversations, batch_size if temperature else 0)
    found: dict[str, Answer] = {}
    with open_records(path, {"key": about, **state}) as records:
        missing = records.missing(keys)
        if temperature and missing:
            missing = list(range(missing[0] - missing[0] % batch_size, len(keys)))
        chosen = [conversations[number] for number in missing]
        if not chosen:
            replies: Iterable[tuple[int, Answer]] = ()
        elif isinstance(place, Endpoint):
            replies = place.ask_all(chosen, max_tokens, parallel)
            replies = tqdm(replies, source.name, len(chosen), unit="answer", leave=False)
        else:
            network, tokenizer = load(place)
            written = answers(
                *(network, tokenizer, chosen),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed + missing[0],
                batch_size=batch_size,
                processors=[ScriptMask(tokenizer, forbidden)] if forbidden else [],
                description=source.name,
            )
            replies = enumerate(written)
        for number, reply in replies:
            key = keys[missing[number]]
            found[key] = reply
            if not reply.failed and key not in records.done:
                asked = chosen[number][-1]["content"]
                records.add(key, asked=asked, answer=reply.text, cut=reply.cut)
            elif len(found) == _GIVE_UP and all(answer.failed for answer in found.values()):
                raise RuadaptError(
                    f"{source.name} answered none of the first {len(found)} questions ({reply.failed}); see "
                    "the log of its server"
                )
        found |= {key: Answer(row["answer"], row["cut"]) for key, row in records.done.items()}
    return [found[key] for key in keys]


def _keys(conversations: Sequence[Messages], drawn_together: int) -> list[str]:
    """Return what each answer depends on besides the model: what is asked, and what is drawn with it."""
    if not drawn_together:
        return [digest(messages) for messages in conversations]
    starts = [place - place % drawn_together for place in range(len(conversations))]
    return [digest(conversations[s : s + drawn_together], place) for place, s in enumerate(starts)]
