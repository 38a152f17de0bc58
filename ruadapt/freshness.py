"""What each result depends on, declared here and nowhere else, and finished work that is found again.

A unit of work (`cached`) is done once for its key, the code that computes it and the libraries that shape it.
A stage is a notebook: what it reads, the units it makes, the code it computes with, the code that only draws.
A test runs every kind of unit and fails where code takes part that is not declared.
"""

import ast
import hashlib
import itertools
import json
import linecache
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, hash_path, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
KEY = "key.json"
PICTURE_SUFFIXES = (".png", ".pdf")


def _modules(folder: str, names: str) -> tuple[str, ...]:
    """Return `ruadapt/folder/name.py` for each of the names, which spaces separate."""
    return tuple(f"ruadapt/{folder}/{name}.py" for name in names.split())


FILES = ("ruadapt/files.py", "ruadapt/devices.py")
WORLD = _modules("world", "russian splits lexicon stories tasks corpus")
TOKENIZERS = _modules("vocab", "spec surface mapping")
VOCABULARIES = (*TOKENIZERS, *_modules("vocab", "donor extend matching prune registry save train words"))
FOLDERS = _modules("checkpoints", "__init__ model_configs model_folders tensor_files verification")
PROPAGATION = (
    *FOLDERS,
    *_modules("checkpoints", "bodies propagation"),
    *_modules("lep", "fit products report rows"),
)
TRAINING = _modules("training", "trainer trainable losses recording saving packing")
CALIBRATION = (*TRAINING, *_modules("training", "calibration generation"))
PERPLEXITY = (*_modules("evaluation", "perplexity models"), *_modules("training", "generation"))
SCORING = (
    *_modules("evaluation", "catalogue backend documents scoring tasks"),
    "ruadapt/evaluation/lm_eval_tasks",
)
READING = ("ruadapt/data_sets.py", *_modules("training", "chat_schemas"))
STATISTICS = _modules("evaluation", "statistics")
PLANS = _modules("evaluation", "plan")
BREAK_EVEN = "ruadapt/evaluation/breakeven.py"
UNITS_OF_TRAINING = _modules("pipeline", "adaptation")
PICTURES = (*_modules("reporting", "plots"), *_modules("vocab", "registry"))
REPORTS = (
    *PICTURES,
    *_modules("reporting", "collected headline plotted report results row_curves"),
    "data/published",
    "data/results/coverage.csv",
    "data/results/vocabulary_rows.csv",
)

TORCH = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Unit:
    """What computes a kind of unit: files and folders of the repository, and distributions."""

    files: tuple[str, ...]
    packages: tuple[str, ...] = TORCH


@dataclass(frozen=True)
class Stage:
    """What a notebook depends on besides its parameters and cells.

    Attributes:
        reads: earlier stages whose results it reads, or one file of them.
        units: kinds of units that it makes.
        optional: kinds of units that it makes where a parameter is set, with the parameter's name.
        files: what its cells compute with outside of units.
        draws: what shapes pictures and pages, and no number that a later stage reads.
        variables: environment variables that name inputs, with the default relative to the repository.
    """

    reads: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    optional: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()
    draws: tuple[str, ...] = PICTURES
    variables: tuple[tuple[str, str], ...] = ()


UNITS = {
    "corpus": Unit(
        (*FILES, *WORLD, *_modules("training", "corpora mixing"), "ruadapt/data_sets.py"),
        ("datasets", "datasketch", "numpy"),
    ),
    "completed pair": Unit((*FILES, *FOLDERS, *TOKENIZERS, *_modules("checkpoints", "completion adapters"))),
    "vocabulary": Unit((*FILES, *VOCABULARIES), ("tokenizers", "transformers", "numpy", "scipy")),
    "initialise": Unit((*FILES, *FOLDERS, *TOKENIZERS, *_modules("lep", "rows"))),
    "pack": Unit(
        (*FILES, *UNITS_OF_TRAINING, *_modules("training", "packing recording")), (*TORCH, "datasets")
    ),
    "pretrain": Unit(
        (*FILES, *UNITS_OF_TRAINING, *TRAINING, *PERPLEXITY, *TOKENIZERS), (*TORCH, "peft", "accelerate")
    ),
    "propagate": Unit((*FILES, *PROPAGATION, *TOKENIZERS), (*TORCH, "scipy")),
    "chats": Unit((*FILES, *READING, *_modules("training", "chats")), ("datasets",)),
    "answer": Unit((*FILES, *UNITS_OF_TRAINING, *CALIBRATION)),
    "calibrate": Unit((*FILES, *UNITS_OF_TRAINING, *CALIBRATION), (*TORCH, "peft", "accelerate")),
    "prefer": Unit(
        (*FILES, *CALIBRATION, *_modules("training", "preference")), (*TORCH, "peft", "trl", "accelerate")
    ),
    "evaluate": Unit(
        (*FILES, *_modules("evaluation", "jobs"), *SCORING, *PERPLEXITY, *WORLD), (*TORCH, "lm-eval")
    ),
    "compare": Unit(
        (*FILES, *_modules("commands", "comparison"), *SCORING, *PERPLEXITY, *WORLD), (*TORCH, "lm-eval")
    ),
    "speed": Unit(
        (*FILES, *_modules("evaluation", "speed answers models"), *_modules("training", "generation"))
    ),
}

PAIR = "02_model_pair/pair.json"
STAGES = {
    "01_corpus": Stage(units=("corpus",)),
    "02_model_pair": Stage(
        reads=("01_corpus",),
        optional=(("completed pair", "base_model"),),
        files=_modules("checkpoints", "hub"),
        # It looks at the pair and asks it the tasks; later stages read which pair it is.
        draws=(*PICTURES, *PROPAGATION, *TOKENIZERS, *STATISTICS, *UNITS["evaluate"].files),
    ),
    "03_tokenizers": Stage(
        reads=("01_corpus", PAIR),
        units=("vocabulary",),
        files=_modules("vocab", "measure certify"),
        draws=REPORTS,
        variables=(("RUADAPT_REFERENCE", "../shared/reference"),),
    ),
    "04_initialisation": Stage(reads=(PAIR, "03_tokenizers"), units=("initialise",)),
    "05_continued_pretraining": Stage(
        reads=("01_corpus", PAIR, "04_initialisation"), units=("pretrain", "pack")
    ),
    "06_lep": Stage(
        reads=("01_corpus", PAIR, "05_continued_pretraining"),
        units=("propagate",),
        draws=(*PICTURES, *PERPLEXITY),
    ),
    "07_calibration": Stage(
        reads=("01_corpus", PAIR, "06_lep"),
        units=("chats", "answer", "calibrate", "prefer"),
        files=_modules("checkpoints", "hub"),
    ),
    "08_evaluation": Stage(
        reads=(
            *("01_corpus", PAIR, "03_tokenizers", "04_initialisation"),
            *("05_continued_pretraining", "06_lep", "07_calibration"),
        ),
        units=("evaluate", "speed"),
        files=(*PLANS, *STATISTICS, *TOKENIZERS, *_modules("vocab", "measure extend"), BREAK_EVEN),
        draws=(*PICTURES, *_modules("reporting", "results")),
    ),
    "09_figures": Stage(
        reads=(PAIR, "03_tokenizers", "05_continued_pretraining", "08_evaluation"),
        files=(*PLANS, *STATISTICS),
        draws=REPORTS,
    ),
}


def code(declared: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return the hash of every declared file by its path from `root`; a folder stands for all in it.

    Comments, docstrings and layout of Python do not count.
    """
    return {name: _hash(path) for name, path in sorted(_files(declared, root))}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each distribution; None where one is missing."""
    return {package: _version(package) for package in sorted(set(packages))}


def unit_state(unit: str, root: Path = ROOT) -> dict[str, Any]:
    """Return `{"code": {file: hash}, "versions": {distribution: version}}` of a kind of unit."""
    return {"code": code(UNITS[unit].files, root), "versions": versions(UNITS[unit].packages)}


def stage_state(stage: str, parameters: Mapping[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """Return the same of a stage, its units included, and `drawing`: the hashes of what only draws.

    Raises:
        RuadaptError: the stage is not declared here.
    """
    if stage not in STAGES:
        raise RuadaptError(
            f"{stage} is not declared: say in ruadapt/freshness.py what it reads and computes with"
        )
    declared = STAGES[stage]
    chosen = [*declared.units, *(unit for unit, switch in declared.optional if parameters.get(switch))]
    units = [UNITS[name] for name in chosen]
    return {
        "code": code([*declared.files, *(name for unit in units for name in unit.files)], root),
        "versions": versions(name for unit in units for name in unit.packages),
        "drawing": code(declared.draws, root),
    }


_NAMED = {"key": "parameter {}", "parameters": "parameter {}", "inputs": "input {}"}
_NAMED |= {"cells": "cell {}", "reads": "result of {}"}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """Name what differs between two states, part by part: files, versions, parameters, inputs."""
    found = []
    for part in parts:
        if not isinstance(old.get(part), dict):
            return ["made by an earlier version of ruadapt"]
        for name, before, after in _differences(old[part], new[part]):
            if part == "versions":
                found.append(f"version of {name} changed ({before} → {after})")
            else:
                found.append(f"{_NAMED.get(part, '{}').format(name)} changed")
    return list(dict.fromkeys(found))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after)
        elif before != after:
            yield name, before, after


def cached(folder: Path, key: Mapping[str, Any], build: Callable[[Path], None], unit: str) -> Path:
    """Return `folder`, built by `build(temporary folder)` unless it was built of the same before.

    The unit of resumption: a killed build leaves nothing, a finished one is never done twice. `key` holds
    what the content depends on besides code and libraries (parameters, seeds, hashes of inputs); with these
    it is stored as `key.json`. What is stale is named, and kept aside once its successor is whole.

    Raises:
        RuadaptError: this process runs code that has been changed on the disk since it was loaded.
    """
    folder = Path(folder)
    _refuse_old_code(unit)
    wanted = json.loads(json.dumps({"key": key, **unit_state(unit)}))
    wanted["code"] |= _cell(build)
    marker = folder / KEY
    found = read_json(marker) if marker.exists() else {}
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


def said(reasons: list[str], shown: int = 4) -> str:
    """Join reasons for people, the first few of them."""
    more = f" and {len(reasons) - shown} more" if len(reasons) > shown else ""
    return ", ".join(reasons[:shown]) + more


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
    if Path(folder).is_file():
        return hash_path(folder)
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        parts = path.relative_to(folder).parts
        ignored = (
            path.suffix in PICTURE_SUFFIXES or path.name in (KEY, "training.json") or "tensorboard" in parts
        )
        if path.is_file() and not ignored and not any(part.startswith(".") for part in parts):
            digest.update("/".join(parts).encode() + b"\0" + hash_path(path).encode())
    return digest.hexdigest() if Path(folder).exists() else ""


def _files(declared: Iterable[str], root: Path) -> set[tuple[str, Path]]:
    found = set()
    for name in declared:
        paths = (root / name).rglob("*") if (root / name).is_dir() else [root / name]
        found |= {path for path in paths if path.is_file() and "__pycache__" not in path.parts}
    return {(path.relative_to(root).as_posix(), path) for path in found}


def _cell(build: Callable[[Path], None]) -> dict[str, str]:
    """Return the hash of the notebook's cell that defines `build`; nothing for a function of a module."""
    if build.__module__ != "__main__":
        return {}
    source = "".join(linecache.getlines(build.__code__.co_filename))
    return {"the cell that builds it": _python_hash(source.encode())}


def _hash(path: Path) -> str:
    return _python_hash(path.read_bytes()) if path.suffix == ".py" else hash_path(path)


@cache
def _python_hash(source: bytes) -> str:
    return hashlib.sha256(normalised(source.decode()).encode()).hexdigest()


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def normalised(source: str) -> str:
    """Return Python `source` without comments, docstrings and layout; itself where it is not Python."""
    try:
        # Lines of notebook magic are no Python; the code beside them still is.
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE))
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree) + json.dumps(re.findall(r"^\s*[%!].*$", source, flags=re.MULTILINE))


def _changed_at() -> dict[str, int]:
    declared = itertools.chain.from_iterable(unit.files for unit in UNITS.values())
    return {name: path.stat().st_mtime_ns for name, path in _files(declared, ROOT)}


_LOADED = _changed_at()


def _refuse_old_code(unit: str) -> None:
    """Refuse where a loaded module was changed since this one was imported, which is near the start."""
    for name, path in _files(UNITS[unit].files, ROOT):
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if module in sys.modules and path.stat().st_mtime_ns != _LOADED.get(name):
            raise RuadaptError(
                f"{name} was changed after this process loaded it; restart the kernel, then run again"
            )
