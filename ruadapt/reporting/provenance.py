"""What a stage's result was made of: code, inputs, versions, time and memory."""

import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ruadapt.files import hash_path

RECORDED_PACKAGES = (
    "ruadapt",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "lm-eval",
    "papermill",
)
# The runner decides when and where a notebook runs, never what it computes: its changes make nothing stale.
WITHOUT_EFFECT = ("ruadapt.pipeline.runner",)


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes a result; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Return what the wall-clock depends on: processors, memory in bytes, operating system."""
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
    }


def git_state(root: Path) -> dict[str, Any]:
    """Return the commit of `root` and whether files differ from it or are new; None and None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def code_state(cells: Iterable[str], root: Path) -> dict[str, str]:
    """Describe the code a notebook runs, as far as its result can depend on it.

    Modules of the repository are followed through their imports. Comments, docstrings and layout do not
    count. Folders of `root/data` count when the code quotes their name, and so do the values of the
    environment variables `RUADAPT_*` it names.

    Args:
        cells: sources of the notebook's code cells, without its parameters.
        root: the repository root; modules are searched there.

    Returns:
        `code`: one hash of all code; `data/NAME` and `RUADAPT_NAME`: hash or value of each of these.
    """
    sources = {f"cell {number}": source for number, source in enumerate(cells)}
    waiting = [name for source in sources.values() for name in _imports(source, package="")]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name in WITHOUT_EFFECT:
            continue
        seen.add(name)
        file = _module_file(name, root)
        if file is None:
            continue
        sources[name] = file.read_text(encoding="utf-8")
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting.extend(_imports(sources[name], package))

    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0{_normalised(sources[name])}\0".encode())
    state = {"code": digest.hexdigest()}
    everything = "\n".join(sources.values())
    for folder in sorted((root / "data").glob("*")):
        if re.search(rf"""["'/]{re.escape(folder.name)}["'/]""", everything):
            state[f"data/{folder.name}"] = hash_path(folder)
    for variable in sorted(set(re.findall(r"\bRUADAPT_[A-Z_]+\b", everything))):
        value = os.environ.get(variable, "")
        state[variable] = f"{value} {hash_path(Path(value))}" if value and Path(value).exists() else value
    return state


def _imports(source: str, package: str) -> Iterator[str]:
    """Yield every module name that `source` may import, with the packages above each."""
    tree = _parsed(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import of level n starts n - 1 packages above the module's own.
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _module_file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _parsed(source: str) -> ast.Module | None:
    try:
        # Lines of notebook magic are no Python; the code beside them still is.
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE))
    except SyntaxError:
        return None


def _normalised(source: str) -> str:
    """Return `source` without comments, docstrings and layout; itself where it is not Python."""
    tree = _parsed(source)
    if tree is None:
        return source
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    magic = re.findall(r"^\s*[%!].*$", source, flags=re.MULTILINE)
    return ast.dump(tree) + json.dumps(magic)


class ProcessTree:
    """The processes started below this one since the object was made: their peak memory, and their end."""

    def __init__(self) -> None:
        self._self = psutil.Process()
        self._before = set(self._self.children(recursive=True))
        self._seen: set[psutil.Process] = set()
        self.peak_bytes = 0

    def sample(self) -> None:
        """Add up the resident memory of all these processes; pages they share count once for each."""
        total = 0
        for process in set(self._self.children(recursive=True)) - self._before:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
            self._seen.add(process)
        self.peak_bytes = max(self.peak_bytes, total)

    def end(self) -> None:
        """End what is left of them, workers of a dead kernel included, and kill what does not end.

        A launcher that is told to end, as srun, sees to its processes on other machines.
        """
        left = (set(self._self.children(recursive=True)) - self._before) | self._seen
        for end, seconds in ((psutil.Process.terminate, 3), (psutil.Process.kill, 10)):
            # A process identifier may have gone to a stranger: psutil compares the start time too.
            for process in (process for process in left if process.is_running()):
                with contextlib.suppress(psutil.Error):
                    end(process)
            _, left = map(set, psutil.wait_procs(left, timeout=seconds))
