"""What the repository promises about itself: versions, notebooks, profiles, layers."""

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ruadapt.pipeline.runner import Pipeline
from ruadapt.pipeline.stages import find_stage, find_stages, read_stage

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "ruadapt").rglob("*.py"))
# A module imports from layers above its own, or from its own.
LAYERS = [
    ["errors", "files", "freshness", "devices", "console", "data_sets", "hub"],
    ["lep"],
    ["vocab"],
    ["checkpoints"],
    ["training"],
    ["evaluation"],
    ["reporting"],
    ["pipeline"],
    ["commands"],
    ["cli"],
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# Places of one machine, and mistakes this project does not repeat.
FORBIDDEN = [r"/(?:work|tmp|home|root)/", r"trust_remote_code\s*=\s*True", r"cuda:\d"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_environment_repeats_the_versions_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    groups = project["optional-dependencies"].items()
    extras = itertools.chain.from_iterable(lines for name, lines in groups if name != "gguf")
    assert pip == [*project["dependencies"], *extras, "-e ."]
    assert "python=3.11" in environment["dependencies"]
    assert project["requires-python"] == ">=3.11"


def test_every_library_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[=~<>]", line)[0].replace("-", "_") for line in lines}
    declared |= {"yaml", "sklearn"}  # imported by another name
    used = {name.split(".")[0] for module in MODULES for name, _ in imports(module)}
    standard = set(sys.stdlib_module_names)
    assert used - standard - {"ruadapt"} - declared == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_are_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert text == json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    # read_stage refuses anything but one cell of literals tagged `parameters`.
    assert re.match(r"\d\d_", path.name) is None or next(iter(read_stage(path).defaults)) == "run_dir"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_what_the_modules_have(path: Path) -> None:
    """Also in branches that the embedded default does not reach, such as those of real tokenizers."""
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    known = {}
    for node in imports:
        if node.module.split(".")[0] in ("ruadapt", "paper", "benchmarks", "data"):
            source = importlib.import_module(node.module)
            for alias in node.names:
                place = f"{node.module}.{alias.name}"
                module = not hasattr(source, alias.name) or isinstance(
                    getattr(source, alias.name), ModuleType
                )
                known[alias.asname or alias.name] = importlib.import_module(place) if module else None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and known.get(node.value.id):
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)


def test_a_parameter_has_one_type_in_all_notebooks() -> None:
    stages = find_stages(ROOT / "notebooks")
    for stage, other in itertools.combinations(stages, 2):
        for name in stage.defaults.keys() & other.defaults.keys():
            assert type(stage.defaults[name]) is type(other.defaults[name]), (
                f"{name}: {stage.name}, {other.name}"
            )


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_fit_the_notebooks(path: Path) -> None:
    pipeline = Pipeline(path.stem)
    assert pipeline.last is None or find_stage(pipeline.last, pipeline.stages) > 0
    assert pipeline.values["run_dir"] == f"runs/{path.stem}"


def imports(module: Path) -> list[tuple[str, int]]:
    """Return the absolute name of every import of a module, and its line."""
    found = []
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from ruadapt import files` names the module after `import`.
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "ruadapt" else [name]
            found += [(name, node.lineno) for name in names]
    return found


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_modules_import_one_way(module: Path) -> None:
    if module == ROOT / "ruadapt" / "__init__.py":
        return
    own = module.relative_to(ROOT / "ruadapt").parts[0].removesuffix(".py")
    assert own in LAYER, f"{own} has no layer yet"
    for name, line in imports(module):
        parts = name.split(".")
        if parts[0] == "ruadapt" and len(parts) > 1 and not parts[1].startswith("__"):
            assert LAYER[parts[1]] <= LAYER[own], f"line {line}: {own} may not import {name}"
            found = ROOT.joinpath(*parts)  # mypy takes a module that is missing for one without types
            assert found.is_dir() or found.with_suffix(".py").exists(), f"line {line}: there is no {name}"


def test_the_mathematics_knows_no_models() -> None:
    modules = [module for module in MODULES if module.parent.name == "lep"]
    assert len(modules) > 1
    names = {name.split(".")[0] for module in modules for name, _ in imports(module)}
    assert not names & {"transformers", "tokenizers", "peft", "safetensors"}


def test_help_imports_nothing_that_takes_seconds() -> None:
    names = {"torch", "transformers", "pandas", "scipy", "datasets", "papermill"}
    code = f"import sys, ruadapt.cli; print(*{names!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def shipped_texts() -> list[Path]:
    """Return the text files of the repository: tracked ones, and new ones git does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    kinds = (".py", ".ipynb", ".yaml", ".yml", ".toml", ".md", "Makefile", "run")
    names = {name for name in listed.stdout.splitlines() if name.endswith(kinds)}
    return sorted(path for path in (ROOT / name for name in names) if path.is_file())


def test_nothing_names_one_machine() -> None:
    pattern = re.compile("|".join(FORBIDDEN))
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in shipped_texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []
