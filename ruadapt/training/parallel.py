"""Independent jobs over worker processes: the units of a stage, each in a process of its own.

At the size of the embedded pair two one-thread processes do more than one process of two threads.
"""

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ruadapt.errors import RuadaptError


def run_jobs(
    function: Callable[..., Any] | str, jobs: Sequence[dict[str, Any]], processes: int, description: str
) -> list[Any]:
    """Call `function(**job)` for every job in worker processes.

    The first failure stops the other jobs at once. Workers also end when this process does, however it ends.

    Args:
        function: importable by name (a module's, not a notebook's), or that name, `module:function`, where
            this process has no need of the module; arguments and results are pickled.
        processes: how many jobs run at once; each worker computes with its share of the processor's cores.
        description: what the progress bar and the errors call these jobs.

    Returns:
        The results in the order of `jobs`.

    Raises:
        RuadaptError: `processes` is below 1, a job raised it, or a worker died; the message names the job.
        RuntimeError: a job raised anything else, which is this error's cause.
    """
    if processes < 1:
        raise RuadaptError(f"processes is {processes}; {description} needs at least one")
    if not jobs:
        return []
    context = multiprocessing.get_context("forkserver")
    # Imported once, in a process that never computes, instead of once a worker: seconds each.
    context.set_forkserver_preload([place(function).partition(":")[0]])
    # Nobody writes: the workers' end becomes readable when this end is closed, or gone with this process.
    # (An Event would hang here once a worker was killed while it waited.)
    reader, alive = context.Pipe(duplex=False)
    threads = max(1, _cores() // processes)
    with tempfile.TemporaryDirectory() as folder:
        # A job's marker exists while it runs: this is how the jobs of a killed worker are known.
        markers = [Path(folder) / str(number) for number in range(len(jobs))]
        pool = ProcessPoolExecutor(
            min(processes, len(jobs)), context, initializer=_start_worker, initargs=(reader, threads)
        )
        try:
            numbers: dict[Future[Any], int] = {
                pool.submit(_run, place(function), marker, job): number
                for number, (marker, job) in enumerate(zip(markers, jobs, strict=True))
            }
            results: list[Any] = [None] * len(jobs)
            for future in tqdm(as_completed(numbers), total=len(jobs), desc=description, unit="job"):
                number = numbers[future]
                try:
                    results[number] = future.result()
                except BrokenProcessPool as error:
                    running = [job_name(jobs[n]) for n, marker in enumerate(markers) if marker.exists()]
                    raise RuadaptError(
                        f"{description}: a worker process was killed (out of memory?) during "
                        f"{' or '.join(running) or 'its start'}; run again, with fewer processes "
                        "if memory is short"
                    ) from error
                except RuadaptError as error:
                    raise RuadaptError(f"{description}, {job_name(jobs[number])}: {error}") from error
                except Exception as error:
                    name = type(error).__name__
                    raise RuntimeError(f"{description}, {job_name(jobs[number])}: {name}: {error}") from error
            return results
        except BaseException:
            alive.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            alive.close()
            reader.close()


def place(function: Callable[..., Any] | str) -> str:
    """Return `module:function`."""
    return function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"


def job_name(job: dict[str, Any]) -> str:
    """Name a job by its short arguments; texts and options would fill pages."""
    plain = {key: value for key, value in job.items() if isinstance(value, str | int | os.PathLike)}
    return "job " + ", ".join(f"{key}={value}" for key, value in plain.items())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(reader: Connection, threads: int) -> None:
    import torch  # slow, and of use in workers only
    from transformers.utils import logging

    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable_progress_bar()
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: Connection) -> None:
    """End this worker when the parent says so or is gone: killed kernels leave no orphans."""
    reader.poll(None)
    os._exit(1)


def _run(place: str, marker: Path, job: dict[str, Any]) -> Any:
    marker.touch()
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)(**job)
    finally:
        marker.unlink(missing_ok=True)
