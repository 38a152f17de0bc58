"""What a result was made with: versions, machine and commit."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from ruadapt.freshness import installed_version

RECORDED_PACKAGES = ["ruadapt", "torch", "transformers", "tokenizers", "peft", "datasets", "lm-eval"]
RECORDED_PACKAGES += ["papermill"]


def versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes a result; None where one is missing."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in packages}


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

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def without_places(record: Any) -> Any:
    """Return a record in which of a place on this machine only the last name is left."""
    return json.loads(re.sub(r'(?<=[" ])/(?:[^"/]+/)*', "", json.dumps(record, ensure_ascii=False)))
