"""Independent units of work: over the processes of this machine, or each by `accelerate launch`.

At the size of the embedded pair two one-thread processes do more than one process of two threads.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write
from ruadapt.freshness import cached

Function = Callable[..., Any]


def run_jobs(
    function: Function, jobs: Sequence[dict[str, Any]], processes: int, description: str
) -> list[Any]:
    """Call `function(**job)` for every job with joblib, `processes` at once.

    Each worker computes with its share of the processor's cores. The first failure stops the other jobs, and
    workers end with this process; finished units are found again by the next call. With `processes` 0 jobs
    whose target is missing are written as files for `accelerate launch`, and the error says the commands.

    Returns:
        The results in the order of `jobs`.

    Raises:
        RuadaptError: a job raised it (the message names the job), a worker was killed, or units wait for
            `accelerate launch`.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError
    from tqdm import tqdm

    if processes < 1 and (missing := [job for job in jobs if not job["target"].exists()]):
        raise RuadaptError(_launches(function, missing))
    work = (delayed(_call)(os.getpid(), function, job) for job in jobs)
    count = max(1, min(processes, len(jobs)))
    try:
        results = Parallel(n_jobs=count, return_as="generator")(work)
        return list(tqdm(results, total=len(jobs), desc=description, unit="job"))
    except TerminatedWorkerError as error:
        raise RuadaptError(
            f"{description}: a worker process was killed (out of memory?); run again, with fewer processes "
            "if memory is short; what is finished is kept"
        ) from error


def _call(parent: int, function: Function, job: dict[str, Any]) -> Any:
    if parent != os.getpid() and "watch" not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=_watch, args=(parent,), name="watch", daemon=True).start()
    try:
        return function(**job)
    except RuadaptError as error:
        raise RuadaptError(f"{_name(job)}: {error}") from error


def _watch(parent: int) -> None:
    """End this worker when its parent is gone: killed kernels leave no orphans."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _name(job: dict[str, Any]) -> str:
    """Name a job by its short arguments; texts and options would fill pages."""
    return ", ".join(f"{key}={value}" for key, value in job.items() if isinstance(value, str | int | Path))


def _launches(function: Function, jobs: Sequence[dict[str, Any]]) -> str:
    lines = []
    for job in jobs:
        file = job["target"].with_name(f"{job['target'].name}.job.json")
        content = {"function": f"{function.__module__}:{function.__qualname__}", "arguments": job}
        atomic_write(file, json.dumps(content, default=lambda path: {"path": str(path)}, indent=1))
        lines.append(f"  accelerate launch -m ruadapt.training.parallel {file}")
    return "\n".join(["processes is 0: train each unit, then run the same again", *lines])


def launched(file: Path) -> None:
    """Do the job of a file in one of the processes of `accelerate launch`; the main one writes.

    Raises:
        RuadaptError: the unit is finished.
    """
    _processes()
    content = file.read_text(encoding="utf-8")
    job = json.loads(
        content, object_hook=lambda part: Path(part["path"]) if part.keys() == {"path"} else part
    )
    module, _, name = job["function"].partition(":")
    getattr(import_module(module), name)(**job["arguments"])


def _processes() -> Any:
    """Return the state of all processes of `accelerate launch`, joined where they are not yet."""
    import torch
    from accelerate import PartialState

    # They wait while the main one packs a corpus or writes a model: torch's ten minutes can be too short.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))


def built_together(target: Path, key: dict[str, Any], build: Callable[[Path], None], unit: str) -> Path:
    """Do what `freshness.cached` does where every process of `accelerate launch` has a part in building.

    The main process keeps what it builds; the others build into a folder that is thrown away.
    """
    state = _processes()
    if state.num_processes > 1 and target.exists():
        raise RuadaptError(f"{target} is finished; `ruadapt run` finds it, or move it away to train it anew")
    if state.is_main_process:
        cached(target, key, build, unit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
    state.wait_for_everyone()
    return target


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
