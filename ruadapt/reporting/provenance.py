"""What a stage's result was made of: code, inputs, versions, time and memory."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

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


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes a result; None where one is missing."""
    return {"python": platform.python_version()} | {name: library_version(name) for name in RECORDED_PACKAGES}


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
