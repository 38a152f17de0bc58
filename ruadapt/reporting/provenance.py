"""What a result was made with: versions, machine, commit and files."""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ruadapt.files import hash_path
from ruadapt.freshness import library_version

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
DRAWING_PACKAGES = ("matplotlib", "numpy", "pandas", "scipy", "seaborn")


def versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes a result; None where one is missing."""
    return {"python": platform.python_version()} | {name: library_version(name) for name in packages}


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


def manifest(sources: Iterable[Path], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder of figures was drawn from: parameters, versions, the hash of each source."""
    packages = (*RECORDED_PACKAGES, *DRAWING_PACKAGES)
    hashes = {f"{path.parent.name}/{path.name}": hash_path(path) for path in sources}
    return {"parameters": dict(parameters), "versions": versions(packages), "made_from": hashes}
