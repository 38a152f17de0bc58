"""One notebook, executed by papermill in a kernel of this environment."""

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from ruadapt.errors import RuadaptError
from ruadapt.pipeline.stages import Stage

# The machine may stand still for half a minute while a kernel starts.
KERNEL_START_SECONDS = 180
# What the kernel inherits: no hub unless asked for, this environment's own `python3` kernel, and no notes of
# one library to the authors of another.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class StageFailed(RuadaptError):
    """A notebook stopped with an error; the message names the notebook, the cell and the log."""

    exit_code = 1


class StageInterrupted(StageFailed):
    """The kernel ended before the notebook did."""


class _Both:
    """Shows progress bars and warnings of cells while they are written to the log."""

    def __init__(self, log: TextIO) -> None:
        self.streams = (log, sys.stderr)

    def write(self, text: str) -> None:
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


class Processes(threading.Thread):
    """The processes started below this one: their peak memory together, in bytes, and none left behind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._done = 0, threading.Event()
        self._before = set(psutil.Process().children(recursive=True))
        self._seen: set[psutil.Process] = set()

    def run(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for process in {*psutil.Process().children(recursive=True)} - self._before:
                with suppress(psutil.Error):  # it has ended
                    total += process.memory_info().rss
                    self._seen.add(process)
            self.peak_bytes = max(self.peak_bytes, total)

    def __enter__(self) -> "Processes":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()
        for process in self._seen:
            with suppress(psutil.Error):
                process.kill()


def execute_notebook(stage: Stage, parameters: Mapping[str, Any], root: Path, run_dir: Path) -> int:
    """Execute a stage's notebook with `root` as its working folder; return the peak memory in bytes.

    Leaves `run_dir/notebooks/NAME.ipynb` and `run_dir/logs/NAME.log`, also of a notebook that failed. Ctrl-C
    and a plain kill reach nbclient, which ends the kernel and the processes it started.

    Raises:
        StageFailed: a cell raised an error.
        StageInterrupted: the kernel ended.
    """
    executed = run_dir / "notebooks" / f"{stage.name}.ipynb"
    log = run_dir / "logs" / f"{stage.name}.log"
    for path in (executed, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with log.open("w", encoding="utf-8") as stream, Processes() as processes:
        try:
            papermill.execute_notebook(
                stage.notebook,
                executed,
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=stream,
                stderr_file=_Both(stream),
                start_timeout=KERNEL_START_SECONDS,
                cwd=root,
                extra_arguments=[
                    "--IPKernelApp.log_level=ERROR"
                ],  # its warnings are for who configures kernels
            )
        except PapermillExecutionError as error:
            known = error.ename == RuadaptError.__name__
            text = error.evalue if known else f"{error.ename}: {error.evalue}"
            where = f"  In [{error.exec_count}] of {executed}\n  log: {log}"
            raise StageFailed(f"{stage.notebook.name}: {text}\n{where}") from error
        except DeadKernelError as error:
            raise StageInterrupted(
                f"{stage.notebook.name}: the kernel ended (interrupted, killed, or out of memory); the same "
                f"command goes on from here\n  log: {log}"
            ) from error
    return processes.peak_bytes
