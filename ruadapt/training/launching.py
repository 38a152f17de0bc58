"""Training jobs through `accelerate launch`: as many processes and machines as its configuration says.

A job is `function(**arguments)`, arguments and result JSON or paths. Every process calls it with the same
arguments; the function sees to it that only the main one writes.
"""

import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json
from ruadapt.freshness import cached
from ruadapt.training.parallel import job_name, place, run_jobs

LAUNCH = "RUADAPT_LAUNCH"
"""Environment variable with the command that starts a job's processes, or `none`."""
# Lines of a failed job's output that its error repeats.
TAIL = 12


def launcher() -> list[str]:
    """Return the command in front of a job, empty where jobs run in worker processes.

    It is the value of RUADAPT_LAUNCH (`none` for none); without one `accelerate launch` if the user's own
    configuration (`accelerate config`) asks for more than one process or machine.

    Raises:
        RuadaptError: the value is no command line.
    """
    given = os.environ.get(LAUNCH, "").strip()
    if given:
        try:
            return [] if given == "none" else shlex.split(given)
        except ValueError as error:
            raise RuadaptError(f"{LAUNCH}={given!r} is no command line: {error}") from error
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return []
    found = load_config_from_file(None)
    several = (getattr(found, "num_processes", 1) or 1) > 1 or (getattr(found, "num_machines", 1) or 1) > 1
    return [sys.executable, "-m", "accelerate.commands.launch"] if several else []


def launch_jobs(
    function: Callable[..., Any] | str, jobs: Sequence[dict[str, Any]], processes: int, description: str
) -> list[Any]:
    """Run training jobs: `parallel.run_jobs` where there is no `launcher()`, else through it, one by one.

    What a launched job prints is printed here as it comes; its training shows a progress bar. Where this
    process ends, so do the job's.

    Returns:
        The results in the order of `jobs`.

    Raises:
        RuadaptError: a job raised it, or its processes ended otherwise: the message has the exit code and the
            last lines. Finished jobs and checkpoints are kept, so that the same call goes on from there.
    """
    command = launcher()
    if not command:
        return run_jobs(function, jobs, processes, description)
    results = []
    for number, job in enumerate(jobs, start=1):
        print(f"{description}: {number} of {len(jobs)}, {job_name(job)}", flush=True)
        if isinstance(job.get("options"), dict):
            job = job | {"options": job["options"] | {"progress": True}}
        results.append(_launch(command, place(function), job, description))
    return results


def _launch(command: list[str], function: str, job: dict[str, Any], description: str) -> Any:
    # Beside the results, so that the processes of other machines, which share that folder, can read it.
    target = job.get("target")
    if target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".job-", dir=target and Path(target).parent) as name:
        folder = Path(name)
        write_json(folder / "job.json", _encoded(job))
        process = subprocess.Popen(
            [*command, "-m", "ruadapt.training.launching", function, str(folder)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends: see `main`
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            tail = _stream(process)
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        errors = sorted(folder.glob("error-*.txt"))
        where = f"{description}, {job_name(job)}"
        if errors:
            raise RuadaptError(f"{where}: {errors[0].read_text(encoding='utf-8')}")
        result = folder / "result.json"
        if code or not result.exists():
            end = "\n  ".join(tail)
            raise RuadaptError(
                f"{where}: {shlex.join(command)} ended with exit code {code} (killed, out of memory, or an "
                f"error of its own); run again, it goes on from the last checkpoint\n  {end}"
            )
        return read_json(result)


def _stream(process: subprocess.Popen[bytes]) -> list[str]:
    """Print what the process prints, as it comes, and return its last lines."""
    seen = b""
    assert process.stdout is not None
    while chunk := process.stdout.read1():  # type: ignore[attr-defined]
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()
        seen = (seen + chunk)[-8000:]
    lines = seen.decode(errors="replace").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip()][-TAIL:]


def _encoded(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if isinstance(value, dict):
        return {"dict": {key: _encoded(part) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        kind, part = next(iter(value.items()))
        return Path(part) if kind == "path" else {key: _decoded(inner) for key, inner in part.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def built_together(target: Path, key: dict[str, Any], build: Callable[[Path], None], unit: str) -> Path:
    """Do what `freshness.cached` does where every process of a launched job has a part in building.

    The main process keeps what it builds; the others build into a folder that is thrown away.
    """
    # Slow to import: only where something is built.
    from accelerate.utils import broadcast_object_list

    from ruadapt.training.recording import join_processes

    state = join_processes()
    started = []

    def start(folder: Path) -> None:
        started.extend(broadcast_object_list([True]))
        build(folder)

    # Only the main process looks: another might find what the main one has finished meanwhile.
    if state.is_main_process:
        cached(target, key, start, unit)
        if not started:
            broadcast_object_list([False])
    elif broadcast_object_list([None])[0]:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
    state.wait_for_everyone()
    return target


def main(place: str, folder: Path) -> None:
    """Call a job's function in this process; the main process writes the result."""
    # The pipe has no writer left once the notebook is gone: then so is this process.
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_watch, daemon=True).start()
    rank = os.environ.get("RANK", "0")
    module, _, name = place.partition(":")
    try:
        result = getattr(import_module(module), name)(**_decoded(read_json(folder / "job.json")))
    except RuadaptError as error:
        (folder / f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
        raise
    if rank == "0":
        write_json(folder / "result.json", result)


def _watch() -> None:
    while os.read(0, 4096):  # no lock of Python's own, which an ending process would want
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
