"""The stages' folders as notebooks see them, and their execution through papermill.

A stage is skipped while what it was made of is unchanged. Inside a stage that runs again, finished units of
work are found by `ruadapt.files.cached`, so a killed run goes on where it stopped.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruadapt import files
from ruadapt.checkpoints import hub
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, project_root, read_json, read_texts, write_json
from ruadapt.pipeline.execution import duration, execute_notebook
from ruadapt.pipeline.stages import (
    UNTIL,
    Stage,
    check_parameters,
    find_stages,
    load_profile,
    parse_settings,
    select,
)
from ruadapt.reporting import provenance
from ruadapt.training.chat_schemas import read_chats, read_preferences

NEEDED_BYTES = 3_000_000_000


class Run:
    """The folders of one run, as a notebook sees them.

    Args:
        run_dir: the run's folder; a relative path starts at the repository root, wherever the notebook runs.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = self.path(run_dir)

    @staticmethod
    def path(name: str | Path) -> Path:
        """Return the path a parameter names; a relative one starts at the repository root."""
        return project_root() / Path(name).expanduser()

    @staticmethod
    def source(name: str) -> str:
        """Return the path a parameter names if something is there, else the parameter: a name of the hub."""
        return str(Run.path(name)) if name and Run.path(name).exists() else name

    def needs(self, stage: str) -> Path:
        """Return the folder of an earlier stage.

        Raises:
            RuadaptError: that stage left nothing here, or did not finish; the message tells how to run it.
        """
        folder = self.folder / stage
        record = self.folder / "provenance" / f"{stage}.json"
        if not folder.is_dir() or not any(folder.iterdir()):
            problem = "is missing"
        elif record.exists() and read_json(record)["status"] != "done":
            problem = "is not finished"
        else:
            return folder
        command = f"ruadapt run {self.folder.name} --until {stage}"
        raise RuadaptError(f"{folder} {problem}: stage {stage} comes first; run `{command}`")

    def stage(self, name: str) -> Path:
        """Return this stage's own folder, created where it is missing."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def run_profile(
    profile: str,
    first: str | None = None,
    last: str | None = None,
    settings: Iterable[str] = (),
    force: bool = False,
    root: Path | None = None,
    announce: Callable[[str], None] = print,
) -> list[str]:
    """Execute the stages of a profile that are not fresh, in order, into its run folder.

    Args:
        profile: name of a file in `profiles/`; its `until`, if any, is the last stage unless `last` is given.
        first: stage to start at, None for the first.
        last: stage to stop after, None for the profile's or the last.
        settings: `name=value` overrides of the profile's parameters, values in YAML.
        force: run the selected stages even where they are fresh, from nothing.
        root: folder of `notebooks/`, `profiles/` and `data/`; the repository by default.
        announce: takes one line of progress.

    Returns:
        The names of the stages that were executed.

    Raises:
        RuadaptError: before any work for an unknown profile, stage or parameter, a value of a wrong type, an
            unreadable corpus, model or data set, a run folder that is locked or not writable, or a full disk.
        StageFailed: a notebook stopped.
    """
    root = root or project_root()
    stages = find_stages(root / "notebooks")
    values, last_of_profile = profile_values(profile, stages, settings, root)
    chosen = select(stages, first, last or last_of_profile)
    run_dir = root / str(values["run_dir"])
    used = {name: value for name, value in values.items() if any(name in stage.defaults for stage in chosen)}
    _check_corpora(used, root)
    if "evaluation_tasks" in used:
        _check_evaluation(used["evaluation_tasks"], used.get("evaluation_data", ""))
    _check_real_inputs(used)
    files.require_disk_space(run_dir, NEEDED_BYTES)
    executed = []
    with _locked(run_dir):
        _sweep(run_dir)
        for position, stage in enumerate(chosen, start=1):
            key = stage_key(stage, stages, values, root, run_dir)
            reason = "asked for" if force else staleness(stage, key, root, run_dir)
            if not reason:
                announce(f"[{position}/{len(chosen)}] {stage.name}: fresh")
                continue
            anew = force or _code_changed(stage, key, run_dir)
            announce(f"[{position}/{len(chosen)}] {stage.name}: runs {'anew ' if anew else ''}({reason})")
            if anew:
                shutil.rmtree(run_dir / stage.name, ignore_errors=True)
            _execute(stage, key, values, root, run_dir, announce)
            executed.append(stage.name)
    return executed


def freshness(profile: str, settings: Iterable[str] = (), root: Path | None = None) -> dict[str, str]:
    """Return for every stage why a run of the profile would execute it; empty where it is fresh.

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """
    root = root or project_root()
    stages = find_stages(root / "notebooks")
    values, _ = profile_values(profile, stages, settings, root)
    run_dir = root / str(values["run_dir"])
    return {
        stage.name: staleness(stage, stage_key(stage, stages, values, root, run_dir), root, run_dir)
        for stage in stages
    }


def profile_values(
    profile: str, stages: Sequence[Stage], settings: Iterable[str], root: Path
) -> tuple[dict[str, Any], str | None]:
    """Return a profile's parameters, overridden by `settings`, and its last stage (None for all).

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """
    values = {
        "run_dir": f"runs/{profile}",
        **load_profile(root / "profiles", profile),
        **parse_settings(settings),
    }
    last = values.pop(UNTIL, None)
    return check_parameters(values, stages), None if last is None else str(last)


def stage_key(
    stage: Stage, stages: Sequence[Stage], values: Mapping[str, Any], root: Path, run_dir: Path
) -> dict[str, Any]:
    """Return what the stage's result depends on, as JSON: parameters, code, prose, inputs, earlier stages.

    A text parameter that names an existing file or folder is an input, unless its own name ends in `_dir`:
    that is a place to write to.
    """
    parameters = {name: values.get(name, default) for name, default in stage.defaults.items()}
    inputs = {}
    for name, value in parameters.items():
        # A list may name data sets, some of them local.
        rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
        for text in [value] if isinstance(value, str) else [row.get("source", "") for row in rows]:
            if text and not name.endswith("_dir") and (root / text).exists():
                inputs[name if text == value else f"{name}: {text}"] = hash_path(root / text)
    earlier = [other.name for other in stages if other.name < stage.name]
    return {
        "parameters": parameters,
        "code": provenance.code_state(stage.cells, root),
        "text": stage.text_hash,
        "inputs": inputs,
        "earlier": {name: hash_path(run_dir / name) for name in earlier if (run_dir / name).is_dir()},
    }


def staleness(stage: Stage, key: Mapping[str, Any], root: Path, run_dir: Path) -> str:
    """Return why a stage has to run, or an empty string where its result is fresh."""
    record = _record(stage, run_dir)
    if record is None:
        return "not run yet"
    if record["status"] != "done":
        return "failed before" if record["status"] == "failed" else "interrupted before"
    old = record["key"]
    names = {"code": "code", "inputs": "input", "earlier": "result of", "text": "text of the notebook"}
    for part, label in {"parameters": "parameter", **names}.items():
        if old[part] != key[part]:
            changed = (
                _differences(old[part], key[part]) if isinstance(key[part], dict) and part != "code" else ""
            )
            return f"{label} {changed}".strip() + " changed"
    if record["output_hash"] != _output_hash(stage, key["parameters"], run_dir, root):
        return "its result was changed or removed"
    return ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name)))


def _record(stage: Stage, run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "provenance" / f"{stage.name}.json"
    return read_json(path) if path.exists() else None


def _code_changed(stage: Stage, key: Mapping[str, Any], run_dir: Path) -> bool:
    """Say whether finished units come from other code; their own keys do not know it."""
    record = _record(stage, run_dir)
    return record is not None and record["key"]["code"] != key["code"]


def _output_hash(stage: Stage, parameters: Mapping[str, Any], run_dir: Path, root: Path) -> str:
    """Hash the stage's folder and every other place its parameters tell it to write to."""
    places = [name for name in sorted(parameters) if name.endswith("_dir") and name != "run_dir"]
    folders = [run_dir / stage.name, *(root / parameters[name] for name in places if parameters[name])]
    return " ".join(hash_path(folder) if folder.exists() else "none" for folder in folders)


def _check_corpora(values: Mapping[str, Any], root: Path) -> None:
    for name, value in values.items():
        if name.startswith("corpus_") and value and isinstance(value, str):
            for _ in read_texts(root / Path(value).expanduser()):
                pass


def _check_real_inputs(values: Mapping[str, Any]) -> None:
    """Get the models of a real pair and look at a row of each data set before anything starts."""
    for role in ("base", "instruct"):
        if name := values.get(f"{role}_model"):
            hub.fetch_model(Run.source(name), values.get(f"{role}_revision", ""))
    for name, read in (("calibration", read_chats), ("preference", read_preferences)):
        if source := values.get(f"{name}_dataset"):
            next(iter(read(Run.source(source))))


def _check_evaluation(tasks: Sequence[str], data: str) -> None:
    # The harness takes seconds to import: only where its tasks are named.
    from ruadapt.evaluation.catalogue import Benchmark

    for chat in (True, False):
        benchmark = Benchmark(tasks, data and str(Run.path(data)), chat=chat)
    if "darumeru" in tasks and not data and os.environ.get("HF_HUB_OFFLINE", "1") != "0":
        raise RuadaptError(
            "Darumeru's tasks are no local files; set HF_HUB_OFFLINE=0 to read them from the hub, or give a "
            "local copy: --set evaluation_data=..."
        )
    benchmark.build()


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process; the system lets it go when the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = (run_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RuadaptError(f"cannot write to {run_dir}: {error}; choose another run_dir") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise RuadaptError(
                f"{run_dir} is in use by another run (process {stream.read().strip()}); "
                "wait for it, or choose another folder with --set run_dir=..."
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _sweep(run_dir: Path) -> None:
    """Remove the temporary files and folders that killed runs left."""
    for pattern in (".*.part", ".*.old", ".*.part.ipynb"):
        for path in list(run_dir.rglob(pattern)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _execute(
    stage: Stage,
    key: Mapping[str, Any],
    values: Mapping[str, Any],
    root: Path,
    run_dir: Path,
    announce: Callable[[str], None],
) -> None:
    """Execute one notebook and leave its provenance, whatever its end."""
    record_path = run_dir / "provenance" / f"{stage.name}.json"
    record: dict[str, Any] = {
        "stage": stage.name,
        "status": "running",
        "key": key,
        "seeds": {name: value for name, value in key["parameters"].items() if "seed" in name},
        "versions": provenance.versions(),
        "git": provenance.git_state(root),
        "machine": provenance.machine(),
        # Units of an earlier execution may be in the folder: then the wall-clock is not that of the whole.
        "resumed": (run_dir / stage.name).exists(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(record_path, record)
    clock, processes = time.monotonic(), provenance.ProcessTree()
    given = {name: values[name] for name in stage.defaults if name in values}
    try:
        execute_notebook(stage, given, root, run_dir, processes, announce)
    except BaseException as error:
        record |= {
            "status": "failed" if isinstance(error, Exception) else "interrupted",
            "error": str(error) or type(error).__name__,
        }
        raise
    else:
        record |= {
            "status": "done",
            "output_hash": _output_hash(stage, key["parameters"], run_dir, root),
        }
    finally:
        record["wall_clock_seconds"] = round(time.monotonic() - clock, 1)
        record["peak_memory_bytes"] = processes.peak_bytes
        write_json(record_path, record)
    announce(
        f"{stage.name}: done in {duration(time.monotonic() - clock)}, {processes.peak_bytes / 1e9:.1f} GB"
    )
