"""Independent units of work: over the processes of this machine by joblib, or each by `accelerate launch`.

At the size of the embedded pair two one-thread processes do more than one process of two threads.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from joblib import Parallel, delayed
from joblib.externals.loky import process_executor
from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_json, write_json
from ruadapt.freshness import cached

REPORT = "training.json"
KEPT = "RUADAPT_KEPT_STATES"
"""Environment variable: the folder in which the workers of `run_jobs` share what they compute alike."""


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[dict[str, Any]], processes: int, description: str
) -> list[Any]:
    """Call `function(**job)` for every job with joblib, `processes` at once; return the results in order.

    Each worker computes with its share of the processor's cores. The first failure stops the other jobs, and
    workers end with this process; finished units are found again by the next call. With `processes` 0 jobs
    whose target is missing are written as files for `accelerate launch`.

    Raises:
        RuadaptError: a job raised it (the message names its target), or units wait for `accelerate launch`.
    """
    if processes < 1 and (missing := [job for job in jobs if not job["target"].exists()]):
        command = "\n  accelerate launch -m ruadapt.training.parallel "
        commands = (f"{command}{_written(function, job)}" for job in missing)
        raise RuadaptError("processes is 0: train each unit, then run the same again" + "".join(commands))
    count = max(1, min(processes, len(jobs)))
    with tempfile.TemporaryDirectory() as kept:
        options = {"initializer": _begin, "initargs": (os.getpid(), kept)}
        workers = Parallel(count, return_as="generator", **(options if count > 1 else {}))
        results = workers(delayed(_done)(function, job) for job in jobs)
        return list(tqdm(results, total=len(jobs), desc=description, unit="job"))


def _done(function: Callable[..., Any], job: dict[str, Any]) -> Any:
    try:
        return function(**job)
    except RuadaptError as error:
        raise RuadaptError(f"{job['target']}: {error}") from error


def _begin(parent: int, kept: str) -> None:
    """End this worker when its parent is gone: a killed kernel leaves no training that another repeats.

    Workers share what a teacher reads: all seeds train on the same rows.
    """
    os.environ[KEPT] = kept
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would wait for the other worker's core
    # A worker that has held a model keeps its memory. Joblib would take that for a leak and begin another,
    # which takes ten seconds to import what it needs.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    threading.Thread(target=lambda: (psutil.Process(parent).wait(), os._exit(1)), daemon=True).start()


def _written(function: Callable[..., Any], job: dict[str, Any]) -> Path:
    file: Path = job["target"].with_name(f"{job['target'].name}.job.json")
    content = {"function": [function.__module__, function.__qualname__], "arguments": job}
    atomic_write(file, json.dumps(content, default=lambda path: {"path": str(path)}, indent=1))
    return file


def launched(file: Path) -> None:
    """Do the job of a file in one of the processes of `accelerate launch`; the main one writes."""
    content = file.read_text(encoding="utf-8")
    job = json.loads(content, object_hook=lambda part: Path(part["path"]) if [*part] == ["path"] else part)
    module, name = job["function"]
    getattr(import_module(module), name)(**job["arguments"])


def built_together(
    target: Path, key: dict[str, Any], build: Callable[[Path, Path], dict[str, Any]], unit: str
) -> dict[str, Any]:
    """Do what `freshness.cached` does where every process of `accelerate launch` has a part in building.

    Args:
        build: gets the folder to build in, and one that outlives a kill, for checkpoints. The main process
            keeps what it builds; the folders of the others are thrown away.

    Returns:
        The report that `build` returned, which is kept beside the model.

    Raises:
        RuadaptError: there are several processes, and the unit is finished.
    """
    # Slow to import, and workers import this module.
    import torch
    from accelerate import PartialState

    from ruadapt.training.recording import checkpoint_folder

    # They wait while the main one packs a corpus or writes a model: torch's ten minutes can be too short.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    if state.num_processes > 1 and target.exists():
        raise RuadaptError(f"{target} is finished; `ruadapt run` finds it, or move it away to train it anew")
    checkpoints = checkpoint_folder(target, key, unit)
    if state.is_main_process:
        cached(target, key, lambda folder: write_json(folder / REPORT, build(folder, checkpoints)), unit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), checkpoints)
    state.wait_for_everyone()
    report: dict[str, Any] = read_json(target / REPORT)
    return report


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
