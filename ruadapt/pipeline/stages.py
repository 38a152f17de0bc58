"""The pipeline's stages, read from the notebooks, and the parameters a profile gives them."""

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.freshness import code_hash

UNTIL = "until"  # what a profile calls the stage it stops after
FOLDERS = {
    "initialised": "04_initialisation",
    "adapted": "05_continued_pretraining",
    "lep": "06_lep",
    "calibrated": "07_calibration",
}
"""The stage that makes each kind of model, in the order of the pipeline."""


@dataclass(frozen=True)
class Stage:
    """One notebook of the pipeline."""

    name: str  # file name without suffix, `03_tokenizers`
    notebook: Path
    defaults: dict[str, Any]  # names and literals of its cell tagged `parameters`
    cells: dict[str, str]  # hash of each other code cell by its id, without comments and layout
    page: str  # hash of all that a reader of the notebook sees, prose included


def find_stages(folder: Path) -> list[Stage]:
    """Read every `NN_name.ipynb` of `folder`, in the order of their numbers.

    Raises:
        RuadaptError: no notebook there, or one without exactly one cell of literals tagged `parameters`.
    """
    paths = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise RuadaptError(f"{folder} holds no notebook named like 01_corpus.ipynb; is this the repository?")
    return [read_stage(path) for path in paths]


def read_stage(path: Path) -> Stage:
    """Read one notebook as a stage.

    Raises:
        RuadaptError: not exactly one cell of literals tagged `parameters`.
    """
    cells = read_json(path)["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    try:
        (parameters,) = tagged
        lines: list[Any] = ast.parse("".join(parameters["source"])).body
        defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (AttributeError, SyntaxError, ValueError) as error:
        raise RuadaptError(
            f"{path} needs one cell tagged `parameters`, of literals only, each `name = value`: {error}"
        ) from error
    code = (cell for cell in cells if cell["cell_type"] == "code" and cell not in tagged)
    hashes = {cell["id"]: code_hash("".join(cell["source"])) for cell in code}
    page = json.dumps([(cell["cell_type"], "".join(cell["source"])) for cell in cells])
    return Stage(path.stem, path, defaults, hashes, hashlib.sha256(page.encode()).hexdigest())


def find_stage(name: str, stages: Sequence[Stage]) -> int:
    """Return the position of the only stage with `name` in its own: `03_tokenizers`, `tokenizers`, `3`.

    Raises:
        RuadaptError: none or several; the message lists all.
    """
    found = [position for position, stage in enumerate(stages) if name in stage.name]
    if len(found) != 1:
        raise _unknown("stage", name, [stage.name for stage in stages])
    return found[0]


def read_values(
    folder: Path, profile: str, settings: Iterable[str], stages: Sequence[Stage]
) -> dict[str, Any]:
    """Return the values of `folder/profile.yaml` and of `name=value` settings, with the notebooks' own types.

    A setting of a text is the text as it was typed, if need be in quotes; other settings are YAML. A whole
    number stands for a real one, a number for text; None is a value that is still to be given.

    Raises:
        RuadaptError: no such profile, a name no notebook has (the message lists all), no `=`, no YAML, or a
            value of another type.
    """
    known = {path.stem: path for path in sorted(Path(folder).glob("*.yaml"))}
    if profile not in known:
        raise _unknown("profile", profile, [*known])
    values = _yaml(known[profile].read_text(encoding="utf-8"), str(known[profile]))
    if not isinstance(values, dict):
        raise RuadaptError(f"{known[profile]} must hold lines `name: value`")
    defaults = {name: value for stage in stages for name, value in stage.defaults.items()} | {UNTIL: ""}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise RuadaptError(f"--set {setting!r}: write --set name=value")
        typed = isinstance(defaults.get(name), str) and text[:1] not in ("'", '"')
        values[name] = text if typed else _yaml(text, f"--set {setting}")
    for name in values:
        if name not in defaults:
            raise _unknown("parameter", name, sorted(defaults))
        try:
            values[name] = None if values[name] is None else _fitted(values[name], defaults[name])
        except (TypeError, ValueError):
            raise RuadaptError(
                f"parameter {name}: {values[name]!r} does not fit; it must be like {defaults[name]!r}"
            ) from None
    return values


def _fitted(value: Any, example: Any) -> Any:
    """Return `value` as the type of `example`; TypeError or ValueError where it is another type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(example, float) and (number or isinstance(value, str)):
        return float(value)  # YAML reads 1e-3, without a point, as text
    if isinstance(example, str) and number:
        return str(value)
    if type(value) is not type(example):
        raise TypeError
    return [_fitted(item, example[0]) for item in value] if isinstance(example, list) and example else value


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RuadaptError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def _unknown(kind: str, name: str, known: Sequence[str]) -> RuadaptError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return RuadaptError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or 'none'}")
