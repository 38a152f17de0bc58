"""One notebook, executed through papermill in a kernel that is watched and never left behind."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.pipeline.stages import Stage
from ruadapt.pipeline.timing import Estimate
from ruadapt.reporting.provenance import ProcessTree

# The machine may stand still for half a minute while a kernel starts.
KERNEL_START_SECONDS = 180
SAMPLE_SECONDS = 0.5
HEARTBEAT_SECONDS = 30.0


class StageFailed(RuadaptError):
    """A notebook stopped with an error; the message names the notebook, the cell and the log."""

    exit_code = 1


def execute_notebook(
    stage: Stage,
    parameters: Mapping[str, Any],
    root: Path,
    run_dir: Path,
    processes: ProcessTree,
    announce: Callable[[str], None],
    estimate: Estimate,
) -> None:
    """Execute a stage's notebook in a kernel of this environment, with `root` as its working folder.

    Leaves `run_dir/notebooks/NAME.ipynb` and `run_dir/logs/NAME.log`, also of a notebook that failed; ends
    every process the notebook started. papermill runs in a thread of its own, so that Ctrl-C reaches this one
    as KeyboardInterrupt: in the main thread nbclient takes the signal and reports a dead kernel.

    Raises:
        StageFailed: a cell raised an error, or the kernel died or did not start.
    """
    executed = run_dir / "notebooks" / f"{stage.name}.ipynb"
    log = run_dir / "logs" / f"{stage.name}.log"
    partial = executed.with_name(f".{stage.name}.part.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    errors: list[BaseException] = []
    with log.open("w", encoding="utf-8") as stream, _environment(), _interruptible():
        import papermill

        def work() -> None:
            try:
                papermill.execute_notebook(
                    stage.notebook,
                    partial,
                    parameters,
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    stdout_file=stream,
                    stderr_file=stream,
                    start_timeout=KERNEL_START_SECONDS,
                    cwd=root,
                    # Its warnings are for those who configure kernels.
                    extra_arguments=["--IPKernelApp.log_level=ERROR"],
                )
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, name=stage.name, daemon=True)
        thread.start()
        try:
            _watch(thread, stage, log, processes, announce, estimate)
        finally:
            processes.end()
            thread.join()
            if partial.exists():
                os.replace(partial, executed)
    if errors:
        raise _failure(stage, executed, log, errors[0]) from errors[0]


def _watch(
    thread: threading.Thread,
    stage: Stage,
    log: Path,
    processes: ProcessTree,
    announce: Callable[[str], None],
    estimate: Estimate,
) -> None:
    """Sample memory and show progress until `thread` ends: a line that changes, or one now and then."""
    clock = shown = time.monotonic()
    live = sys.stderr.isatty()
    while thread.is_alive():
        thread.join(SAMPLE_SECONDS)
        processes.sample()
        now = time.monotonic()
        parts = [duration(now - clock), estimate.left(stage.name, now - clock), _last_line(log)]
        line = "  ".join([stage.name, *filter(None, parts)])
        if live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        elif now - shown >= HEARTBEAT_SECONDS:
            shown = now
            announce(line)
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    """Return the last thing written to the log; progress bars end in a carriage return."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        lines = stream.read().decode("utf-8", errors="ignore").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a plain `kill`, and a terminal that is closed, do what Ctrl-C does: leave no process behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    # What is ignored already, as by nohup, stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set what the kernel inherits: no hub unless asked for, and this environment's own `python3` kernel."""
    added = {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        # One library's notes to the authors of another.
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _failure(stage: Stage, executed: Path, log: Path, error: BaseException) -> StageFailed:
    """Turn what stopped papermill into one message: notebook, cell, error, where to read on."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        known = error.ename == RuadaptError.__name__
        text = error.evalue if known else f"{error.ename}: {error.evalue}"
    elif isinstance(error, DeadKernelError):
        text = "the kernel died (killed, or out of memory)"
    else:
        text = f"{type(error).__name__}: {error}"
    where = f"{stage.notebook.name}{_failed_cell(stage, executed)}"
    return StageFailed(f"{where}: {text}\n  executed notebook: {executed}\n  log: {log}")


def _failed_cell(stage: Stage, executed: Path) -> str:
    """Return `, cell N` for the last cell that started, counted from 1 in the notebook as written."""
    if not executed.exists():
        return ""
    started = [
        cell.get("id")
        for cell in read_json(executed)["cells"]
        # papermill calls every cell behind a dead kernel completed; only those that ran have a start.
        if cell["metadata"].get("papermill", {}).get("start_time")
    ]
    written = [cell.get("id") for cell in read_json(stage.notebook)["cells"]]
    numbers = [written.index(name) + 1 for name in started if name in written]
    return f", cell {max(numbers)}" if numbers else ""
