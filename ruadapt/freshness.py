"""What each result depends on, declared here and nowhere else, and finished work that is found again.

A unit of work (`cached`) is done once for its key, the code that computes it and the libraries that shape it.
A stage is a notebook: what it reads, the units it makes, the code it computes with, the code that only draws.
A test follows the imports and fails where one is not declared.
"""

import ast
import hashlib
import itertools
import json
import linecache
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, data_files, hash_path, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
KEY = "key.json"
PICTURE_SUFFIXES = (".png", ".pdf")

# Code: modules and folders of ruadapt/, or paths from the root; after `@` distributions, by their versions.
BASE = "files data_sets devices @torch @transformers @tokenizers @safetensors @numpy"
TOKENIZERS = f"{BASE} vocab/spec vocab/surface vocab/mapping"
SURGERY = f"{TOKENIZERS} lep/rows vocab/save vocab/sentencepiece_file checkpoints/bodies"
SURGERY += " checkpoints/initialisation checkpoints/model_configs checkpoints/model_folders"
SURGERY += " checkpoints/tensor_files checkpoints/verification"
TRAINING = f"{TOKENIZERS} training/trainer training/trainable training/losses training/encoding"
TRAINING += " training/recording checkpoints/model_configs pipeline/adaptation"
TRAINING += " @accelerate @datasets @peft @trl"
PERPLEXITY = f"{BASE} evaluation/perplexity evaluation/models training/encoding"
SCORING = f"{PERPLEXITY} evaluation/backend evaluation/documents evaluation/jobs evaluation/scoring"
SCORING += " evaluation/tasks evaluation/lm_eval_tasks evaluation/answers hub @lm-eval"
SCORING += " data/world/corpus/tasks.jsonl.gz data/world/corpus/fewshot.jsonl.gz"
ANSWERS = f"{BASE} evaluation/answers evaluation/models training/encoding"
PICTURES = (
    "reporting paper/plots.py vocab/registry data/paper.mplstyle data/published data/results/coverage.csv"
    " data/results/vocabulary_rows.csv data/results/budget.csv"
)
PAIR = "02_model_pair/pair.json"

UNITS = {
    "corpus": f"{BASE} training/mixing @datasets @datasketch",
    "chat_form": f"{BASE} checkpoints/model_configs",
    "completed_pair": f"{SURGERY} checkpoints/adapters @peft",
    "vocabulary": f"{BASE} vocab @sentencepiece",
    "initialise": SURGERY,
    "pretrain": f"{TRAINING} {PERPLEXITY}",
    "propagate": f"{SURGERY} checkpoints/propagation lep @scipy",
    "chats": f"{BASE} training/chats @datasets",
    "calibrate": TRAINING,
    "evaluate": SCORING,
    "speed": f"{ANSWERS} evaluation/speed",
    "ask": f"{ANSWERS} evaluation/scripts vocab/surface vocab/spec",
    "served": "evaluation/endpoint",
}


@dataclass(frozen=True)
class Stage:
    """What a notebook depends on besides its parameters and cells."""

    reads: str = ""  # earlier stages whose results it reads, or one file of them
    units: str = ""  # kinds of units that it makes
    code: str = ""  # what its cells compute with outside of units
    draws: str = PICTURES  # what shapes pictures and pages, and no number that a later stage reads


STAGES = {
    "01_corpus": Stage(units="corpus chats", code="hub"),
    "02_model_pair": Stage(
        reads="01_corpus",
        units="completed_pair chat_form calibrate",
        code="hub",
        # It looks at the pair and asks it the tasks; later stages read which pair it is.
        draws=f"{PICTURES} {SCORING} lep vocab checkpoints evaluation/statistics",
    ),
    "03_tokenizers": Stage(f"01_corpus {PAIR}", "vocabulary"),
    "04_initialisation": Stage(f"{PAIR} 03_tokenizers", "initialise"),
    "05_continued_pretraining": Stage(f"01_corpus {PAIR} 04_initialisation", "pretrain"),
    "06_lep": Stage(
        f"01_corpus {PAIR} 05_continued_pretraining", "propagate", draws=f"{PICTURES} {PERPLEXITY}"
    ),
    "07_calibration": Stage(f"01_corpus {PAIR} 06_lep", "chats ask calibrate", "hub"),
    "08_evaluation": Stage(
        reads=f"01_corpus {PAIR} 03_tokenizers 04_initialisation"
        " 05_continued_pretraining 06_lep 07_calibration",
        units="evaluate speed",
        code="evaluation vocab paper/plan.py",
        draws=f"{PICTURES} paper/results.py",
    ),
    "09_figures": Stage(
        reads=f"{PAIR} 03_tokenizers 05_continued_pretraining 08_evaluation",
        code="evaluation/statistics",
        draws=f"{PICTURES} paper",
    ),
}


def code(declared: str, root: Path = ROOT) -> dict[str, str]:
    """Return the hash of every file of a declaration by its path from `root`; Python's as `code_hash`."""
    found = {}
    for name in {*declared.split()}:
        places = (root / "ruadapt" / f"{name}.py", root / "ruadapt" / name, root / name)
        place = next((path for path in places if path.exists()), root)
        for path in data_files(place) if place != root else ():
            if "__pycache__" not in path.parts:
                own = code_hash(path.read_text(encoding="utf-8")) if path.suffix == ".py" else hash_path(path)
                found[path.relative_to(root).as_posix()] = own
    return found


def state(*declared: str, root: Path = ROOT) -> dict[str, Any]:
    """Return `{"code": {file: hash}, "versions": {distribution: version}}` of units or declarations."""
    names = " ".join(UNITS.get(name, name) for name in declared)
    libraries = sorted({name[1:] for name in names.split() if name.startswith("@")})
    return {"code": code(names, root), "versions": {name: installed_version(name) for name in libraries}}


def stage_state(stage: str, root: Path = ROOT) -> dict[str, Any]:
    """Return the `state` of a stage, its units included.

    Raises:
        RuadaptError: the stage is not declared here.
    """
    if stage not in STAGES:
        raise RuadaptError(
            f"{stage} is not declared: say in ruadapt/freshness.py what it reads and computes with"
        )
    return state(*STAGES[stage].units.split(), STAGES[stage].code, root=root)


SAID = {"key": "parameter ", "parameters": "parameter ", "inputs": "input ", "cells": "cell "}
SAID |= {"reads": "result of ", "versions": "version of "}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs between two states in the parts of the new one, the first few; nothing for nothing."""
    if not old.keys() >= new.keys():
        return "nothing here tells what it was made of"
    found = []
    for part in new:
        before, after = _flat(old[part]), _flat(new[part])
        for name in sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
            values = f" ({before.get(name)} → {after.get(name)})" if part == "versions" else ""
            found.append(f"{SAID.get(part, '')}{name} changed{values}")
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def cached(folder: Path, key: Mapping[str, Any], build: Callable[[Path], None], unit: str) -> Path:
    """Return `folder`, built by `build(temporary folder)` unless it was built of the same before.

    The unit of resumption: a killed build leaves nothing, a finished one is never done twice. `key` holds
    what the content depends on besides code and libraries (parameters, seeds, hashes of inputs); with these
    it is stored as `key.json`. What is stale is named, and kept aside once its successor is whole.

    Raises:
        RuadaptError: this process may run code that has been changed on the disk since it was loaded.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps({"key": key, **state(unit)}))
    for name in wanted["code"]:
        if name in LOADED and (ROOT / name).stat().st_mtime_ns != LOADED[name]:
            raise RuadaptError(
                f"{name} was changed after this process started; restart the kernel, then run again"
            )
    if build.__module__ == "__main__":
        cell = "".join(linecache.getlines(build.__code__.co_filename))
        wanted["code"]["the cell that builds it"] = code_hash(cell)
    found = read_json(folder / KEY, {})
    if found == wanted:
        return folder
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied:
        logging.getLogger(__name__).warning(
            "%s is stale: %s; it is made anew, the old one kept", folder, changes(found, wanted)
        )
    with atomic_folder(folder) as temporary:
        build(temporary)
        write_json(temporary / KEY, wanted)
        if occupied:
            set_aside(folder)
    return folder


def key_of(arguments: Mapping[str, Any], besides: Collection[str] = ()) -> dict[str, Any]:
    """Return a function's arguments as a key of `cached`: paths by what is there, none of those `besides`."""

    def hashed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: hashed(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [hashed(part) for part in value]
        return result_hash(value) if isinstance(value, Path) else value

    return {name: hashed(value) for name, value in arguments.items() if name not in besides}


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

    def record(name: Path) -> bool:
        told = name.suffix in PICTURE_SUFFIXES or name.name in (KEY, "training.json")
        return told or "tensorboard" in name.parts

    return hash_path(folder, besides=record) if Path(folder).exists() else ""


@cache
def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code_hash(source: str) -> str:
    """Return the SHA-256 of Python without comments, layout and the text of docstrings."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a notebook's magic
        return hashlib.sha256(source.encode()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


# This module is imported near the start of a process, before most of what computes.
LOADED = {
    path.relative_to(ROOT).as_posix(): path.stat().st_mtime_ns for path in (ROOT / "ruadapt").rglob("*.py")
}
