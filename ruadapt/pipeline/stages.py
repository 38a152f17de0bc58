"""The pipeline's stages, read from the notebooks, and the parameters a profile gives them."""

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.freshness import normalised

UNTIL = "until"


@dataclass(frozen=True)
class Stage:
    """One notebook of the pipeline.

    Attributes:
        name: file name without suffix, `03_tokenizers`.
        notebook: the notebook's path.
        defaults: names and literals of its cell tagged `parameters`.
        cells: hash of each code cell by its id, without the parameters, comments and layout.
        page: hash of all that a reader of the notebook sees, prose included.
    """

    name: str
    notebook: Path
    defaults: dict[str, Any]
    cells: dict[str, str]
    page: str


def find_stages(folder: Path) -> list[Stage]:
    """Read every `NN_name.ipynb` of `folder`, in the order of their numbers.

    Raises:
        RuadaptError: no notebook there, or one without exactly one cell of literals tagged `parameters`.
    """
    paths = sorted(path for path in Path(folder).glob("*.ipynb") if re.match(r"\d\d_", path.name))
    if not paths:
        raise RuadaptError(f"{folder} holds no notebook named like 01_corpus.ipynb; is this the repository?")
    return [read_stage(path) for path in paths]


def read_stage(path: Path) -> Stage:
    """Read one notebook as a stage.

    Raises:
        RuadaptError: not exactly one cell of literals tagged `parameters`.
    """
    cells = [
        (cell["id"], cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in read_json(path)["cells"]
    ]
    parameters = [source for _, _, source, tags in cells if "parameters" in tags]
    if len(parameters) != 1:
        raise RuadaptError(f"{path} has {len(parameters)} cells tagged `parameters`; one is needed")
    code = {name: source for name, kind, source, tags in cells if kind == "code" and "parameters" not in tags}
    page = json.dumps([(kind, source) for _, kind, source, _ in cells])
    hashes = {name: _digest(normalised(source)) for name, source in code.items()}
    return Stage(path.stem, path, _literals(parameters[0], path), hashes, _digest(page))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _literals(source: str, path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                raise ValueError(f"line {node.lineno} is not `name = value`")
            values[node.targets[0].id] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as error:
        raise RuadaptError(f"{path}: the cell tagged `parameters` may hold literals only: {error}") from error
    return values


def one_of(kind: str, name: str, known: Sequence[str]) -> RuadaptError:
    """Return the error for an unknown name: what is known, and what may have been meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return RuadaptError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or 'none'}")


def find_stage(name: str, stages: Sequence[Stage]) -> int:
    """Return the position of the stage called `name`: `03_tokenizers`, `tokenizers`, `03` or `3`.

    Raises:
        RuadaptError: no such stage; the message lists them.
    """
    for position, stage in enumerate(stages):
        number, _, title = stage.name.partition("_")
        if name in (stage.name, title, number, number.lstrip("0")):
            return position
    raise one_of("stage", name, [stage.name for stage in stages])


def select(stages: Sequence[Stage], first: str | None, last: str | None) -> list[Stage]:
    """Return the stages from `first` to `last`, both included; None leaves that end open.

    Raises:
        RuadaptError: an unknown stage, or `first` behind `last`.
    """
    start = find_stage(first, stages) if first else 0
    stop = find_stage(last, stages) if last else len(stages) - 1
    if start > stop:
        raise RuadaptError(f"stage {stages[start].name} comes after {stages[stop].name}; nothing would run")
    return list(stages[start : stop + 1])


def load_profile(folder: Path, name: str) -> dict[str, Any]:
    """Read `folder/name.yaml`: names and values, as `papermill -f` takes them.

    Raises:
        RuadaptError: no such profile (the message lists them), or not a flat mapping.
    """
    known = sorted(path.stem for path in Path(folder).glob("*.yaml"))
    if name not in known:
        raise one_of("profile", name, known)
    path = Path(folder) / f"{name}.yaml"
    values = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise RuadaptError(f"{path} must hold lines `name: value`")
    return values


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Turn `name=value` into names and values; a value is read as YAML: `[1, 2]`, `0.5`, `true`, text.

    Raises:
        RuadaptError: no `=` in it, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise RuadaptError(f"--set {setting!r}: write --set name=value")
        values[name.strip()] = _yaml(value, f"--set {setting}") if value else ""
    return values


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RuadaptError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


def check_parameters(values: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """Return `values` with the types of the notebooks' own, which they must fit.

    A whole number stands for a real one, a number for text. None fits nothing, so that a profile can ask for
    a value to be given.

    Raises:
        RuadaptError: a name no notebook has (the message lists all), a value missing or of another type.
    """
    defaults = {name: value for stage in stages for name, value in stage.defaults.items()}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in defaults:
            raise one_of("parameter", name, sorted(defaults))
        if value is None:
            raise RuadaptError(f"parameter {name} has no value in this profile: add --set {name}=...")
        try:
            checked[name] = _fitted(value, defaults[name])
        except (TypeError, ValueError):
            raise RuadaptError(
                f"parameter {name}: {value!r} does not fit; a value like {defaults[name]!r} is expected"
            ) from None
    return checked


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
