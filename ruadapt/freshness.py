"""What each result depends on, declared here and nowhere else, and finished work that is found again.

A unit of work (`cached`) is done once for its key, the code that computes it and the libraries that shape it.
A stage is a notebook: what it reads, the units it makes, the code it computes with, the code that only draws.
Code is declared by folder where it can be; a test follows the imports and fails where one is not declared.
"""

import ast
import hashlib
import itertools
import json
import linecache
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, hash_path, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
KEY = "key.json"
PICTURE_SUFFIXES = (".png", ".pdf")

# Code: folders and modules of ruadapt/ (or paths from the root), `-` before one takes it out again.
TOKENIZERS = "vocab/spec vocab/surface vocab/mapping"
SURGERY = f"checkpoints lep/rows {TOKENIZERS} -checkpoints/propagation"
TRAINING = "training -training/corpora -training/mixing -training/parallel -training/calibration"
TRAINING += " -training/preference -training/chats pipeline/adaptation"
TUNING = f"{TRAINING} training/calibration"
PERPLEXITY = "evaluation/perplexity evaluation/models training/generation"
SCORING = "evaluation/backend evaluation/documents evaluation/jobs"
SCORING += f" evaluation/scoring evaluation/tasks evaluation/lm_eval_tasks world {PERPLEXITY}"
PICTURES = "reporting/plots vocab/registry"
EVERYWHERE = "files devices"
TORCH = "torch transformers tokenizers safetensors numpy"


@dataclass(frozen=True)
class Unit:
    """What computes a kind of unit: code, and distributions besides those of `TORCH`."""

    code: str
    libraries: str = ""


@dataclass(frozen=True)
class Stage:
    """What a notebook depends on besides its parameters and cells; names are separated by spaces.

    Attributes:
        reads: earlier stages whose results it reads, or one file of them.
        units: kinds of units that it makes.
        code: what its cells compute with outside of units.
        draws: what shapes pictures and pages, and no number that a later stage reads.
        variables: environment variables that name inputs, with the default relative to the repository.
    """

    reads: str = ""
    units: str = ""
    code: str = ""
    draws: str = PICTURES
    variables: Mapping[str, str] = field(default_factory=dict)


UNITS = {
    "corpus": Unit("world training/corpora training/mixing data_sets", "datasets datasketch"),
    "completed_pair": Unit(SURGERY),
    "vocabulary": Unit("vocab"),
    "initialise": Unit(SURGERY),
    "pack": Unit("training/packing training/recording training/trainable pipeline/adaptation", "datasets"),
    "pretrain": Unit(f"{TRAINING} {PERPLEXITY} {TOKENIZERS}", "peft accelerate"),
    "propagate": Unit(f"checkpoints lep {TOKENIZERS}", "scipy"),
    "chats": Unit("training/chats data_sets", "datasets"),
    "answer": Unit(TUNING),
    "calibrate": Unit(TUNING, "peft accelerate"),
    "prefer": Unit(f"{TUNING} training/preference training/chats data_sets", "peft trl accelerate"),
    "evaluate": Unit(SCORING, "lm-eval"),
    "speed": Unit("evaluation/speed evaluation/answers evaluation/models training/generation"),
    "ask": Unit("evaluation/answers evaluation/models training/generation"),
    "mask": Unit("evaluation/script_mask vocab/surface vocab/spec"),
}

PAIR = "02_model_pair/pair.json"
REPORTS = "reporting vocab/registry data/published data/results/coverage.csv data/results/vocabulary_rows.csv"
STAGES = {
    "01_corpus": Stage(units="corpus"),
    "02_model_pair": Stage(
        reads="01_corpus",
        units="completed_pair",
        code="checkpoints/hub",
        # It looks at the pair and asks it the tasks; later stages read which pair it is.
        draws=f"{PICTURES} lep vocab checkpoints evaluation world {PERPLEXITY}",
    ),
    "03_tokenizers": Stage(
        reads=f"01_corpus {PAIR}",
        units="vocabulary",
        draws=f"{REPORTS} evaluation/statistics evaluation/plan",
        variables={"RUADAPT_REFERENCE": "../shared/reference"},
    ),
    "04_initialisation": Stage(reads=f"{PAIR} 03_tokenizers", units="initialise"),
    "05_continued_pretraining": Stage(reads=f"01_corpus {PAIR} 04_initialisation", units="pretrain pack"),
    "06_lep": Stage(
        reads=f"01_corpus {PAIR} 05_continued_pretraining",
        units="propagate",
        draws=f"{PICTURES} {PERPLEXITY}",
    ),
    "07_calibration": Stage(
        reads=f"01_corpus {PAIR} 06_lep", units="chats answer calibrate prefer", code="checkpoints/hub"
    ),
    "08_evaluation": Stage(
        reads=f"01_corpus {PAIR} 03_tokenizers 04_initialisation"
        " 05_continued_pretraining 06_lep 07_calibration",
        units="evaluate speed",
        code="evaluation vocab",
        draws=f"{PICTURES} reporting/results reporting/report",
    ),
    "09_figures": Stage(
        reads=f"{PAIR} 03_tokenizers 05_continued_pretraining 08_evaluation",
        code="evaluation/plan evaluation/statistics evaluation/breakeven",
        draws=REPORTS,
    ),
}


def code(declared: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return the hash of every file of the declarations, by its path from `root`.

    Comments, docstrings and layout of Python do not count.
    """
    files: set[Path] = set()
    for declaration in declared:
        own: set[Path] = set()
        for name in declaration.split():
            found = set(_files(name.removeprefix("-"), root))
            own = own - found if name.startswith("-") else own | found
        files |= own
    return {path.relative_to(root).as_posix(): _hash(path) for path in sorted(files)}


def unit_state(*units: str, declared: str = "", root: Path = ROOT) -> dict[str, Any]:
    """Return `{"code": {file: hash}, "versions": {distribution: version}}` of kinds of units."""
    libraries = " ".join([TORCH, *(UNITS[unit].libraries for unit in units)]) if units else ""
    return {
        "code": code([declared, *(f"{EVERYWHERE} {UNITS[unit].code}" for unit in units)], root),
        "versions": {name: library_version(name) for name in sorted({*libraries.split()})},
    }


def stage_state(stage: str, root: Path = ROOT) -> dict[str, Any]:
    """Return the same of a stage, its units included, and `drawing`: the hashes of what only draws.

    Raises:
        RuadaptError: the stage is not declared here.
    """
    if stage not in STAGES:
        raise RuadaptError(
            f"{stage} is not declared: say in ruadapt/freshness.py what it reads and computes with"
        )
    declared = STAGES[stage]
    return unit_state(*declared.units.split(), declared=declared.code, root=root) | {
        "drawing": code([declared.draws], root)
    }


SAID = {"key": "parameter {}", "parameters": "parameter {}", "inputs": "input {}", "cells": "cell {}"}
SAID |= {"reads": "result of {}", "versions": "version of {}"}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """Name what differs between two states, part by part: files, versions, parameters, inputs."""
    found = []
    for part in parts:
        if not isinstance(old.get(part), dict):
            return ["made by an earlier version of ruadapt"]
        for name, before, after in _differences(old[part], new[part]):
            values = f" ({before} → {after})" if part == "versions" else ""
            found.append(f"{SAID.get(part, '{}').format(name)} changed{values}")
    return list(dict.fromkeys(found))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after)
        elif before != after:
            yield name, before, after


def said(reasons: list[str], shown: int = 4) -> str:
    """Join reasons for people, the first few of them."""
    more = f" and {len(reasons) - shown} more" if len(reasons) > shown else ""
    return ", ".join(reasons[:shown]) + more


def cached(folder: Path, key: Mapping[str, Any], build: Callable[[Path], None], unit: str) -> Path:
    """Return `folder`, built by `build(temporary folder)` unless it was built of the same before.

    The unit of resumption: a killed build leaves nothing, a finished one is never done twice. `key` holds
    what the content depends on besides code and libraries (parameters, seeds, hashes of inputs); with these
    it is stored as `key.json`. What is stale is named, and kept aside once its successor is whole.

    Raises:
        RuadaptError: this process may run code that has been changed on the disk since it was loaded.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps({"key": key, **unit_state(unit)}))
    for name in wanted["code"]:
        if name in LOADED and _modified(ROOT / name) != LOADED[name]:
            raise RuadaptError(
                f"{name} was changed after this process started; restart the kernel, then run again"
            )
    wanted["code"] |= _cell(build)
    found = read_json(folder / KEY) if (folder / KEY).exists() else {}
    if found == wanted:
        return folder
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied:
        reasons = said(changes(found, wanted, wanted) if found else [f"it holds no {KEY}"])
        logging.getLogger(__name__).warning(
            "%s is stale: %s; it is made anew, the old one kept", folder, reasons
        )
    with atomic_folder(folder) as temporary:
        build(temporary)
        write_json(temporary / KEY, wanted)
        if occupied:
            set_aside(folder)
    return folder


def set_aside(folder: Path) -> Path:
    """Rename a folder to a free name under `stale/`, beside the stage it lies in, else beside itself."""
    stage = next((path for path in (folder, *folder.parents) if path.name in STAGES), folder)
    place = stage.parent / "stale" / folder.relative_to(stage.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    names = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    os.replace(folder, kept)
    return kept


def result_hash(folder: Path) -> str:
    """Return the SHA-256 of a result's names and contents, or of one file of it, "" for none.

    Pictures, logs, hidden files and the records of how and when it was made are no part of the result.
    """
    folder = Path(folder)
    if folder.is_file():
        return hash_path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        record = path.suffix in PICTURE_SUFFIXES or path.name in (KEY, "training.json")
        hidden = "tensorboard" in parts or any(part.startswith(".") for part in parts)
        if path.is_file() and not record and not hidden:
            digest.update("/".join(parts).encode() + b"\0" + hash_path(path).encode())
    return digest.hexdigest() if folder.exists() else ""


@cache
def library_version(name: str) -> str | None:
    """Return the version of a distribution; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def normalised(source: str) -> str:
    """Return Python `source` without comments, layout and the text of docstrings; other text as it is."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a notebook's magic
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.dump(tree)


@cache
def _python_hash(source: str) -> str:
    return hashlib.sha256(normalised(source).encode()).hexdigest()


def _hash(path: Path) -> str:
    return _python_hash(path.read_text(encoding="utf-8")) if path.suffix == ".py" else hash_path(path)


def _files(name: str, root: Path) -> Iterator[Path]:
    places = (root / "ruadapt" / f"{name}.py", root / "ruadapt" / name, root / name)
    place = next((path for path in places if path.exists()), root / name)
    for path in (place, *place.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _cell(build: Callable[[Path], None]) -> dict[str, str]:
    """Return the hash of the notebook's cell that defines `build`; nothing for a function of a module."""
    if build.__module__ != "__main__":
        return {}
    source = "".join(linecache.getlines(build.__code__.co_filename))
    return {"the cell that builds it": _python_hash(source)}


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


# This module is imported near the start of a process, before most of what computes.
LOADED = {path.relative_to(ROOT).as_posix(): _modified(path) for path in (ROOT / "ruadapt").rglob("*.py")}
