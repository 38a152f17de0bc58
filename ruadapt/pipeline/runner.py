"""The stages' folders as notebooks see them, and their execution through papermill.

A stage is skipped while what it was made of is unchanged. Inside a stage that runs again, finished units of
work are found by `ruadapt.freshness.cached`: a killed run goes on where it stopped, and nothing is removed.
"""

import contextlib
import fcntl
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruadapt import files, freshness
from ruadapt.checkpoints import hub
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, project_root, read_json, read_texts, write_json
from ruadapt.freshness import changes, said
from ruadapt.pipeline import timing
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
# Parameters that name places to write to; every other text that names something is an input.
RESULT_PLACES = ("figures_dir", "results_dir")
PLACES = ("run_dir", "token_cache_dir", *RESULT_PLACES)
COMPUTING = ("parameters", "inputs", "cells", "code", "versions", "reads")
STALE, DRAWS = "stale: ", "draws again: "
NO_ESTIMATE = "no estimate: this profile was not run before"


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

        Warns where the code that made it has changed since.

        Raises:
            RuadaptError: that stage left nothing here, or did not finish; the message tells how to run it.
        """
        folder = self.folder / stage
        record = self.folder / "provenance" / f"{stage}.json"
        command = f"ruadapt run {self.folder.name} --until {stage}"
        if not folder.is_dir() or not any(folder.iterdir()):
            problem = "is missing"
        elif record.exists() and read_json(record)["status"] != "done":
            problem = "is not finished"
        else:
            key = read_json(record)["key"] if record.exists() and stage in freshness.STAGES else None
            now = key and freshness.stage_state(stage)
            if key and now and (reasons := changes(key, now, ("code", "versions"))):
                warnings.warn(f"{folder} is stale: {said(reasons)}; run `{command}`", stacklevel=2)
            return folder
        raise RuadaptError(f"{folder} {problem}: stage {stage} comes first; run `{command}`")

    def stage(self, name: str) -> Path:
        """Return this stage's own folder, created where it is missing."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Pipeline:
    """A profile's stages, its parameters, and what lies in its run folder.

    Args:
        profile: name of a file in `profiles/`.
        settings: `name=value` overrides of its parameters, values in YAML.
        root: folder of `notebooks/`, `profiles/` and `data/`; the repository by default.

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """

    def __init__(self, profile: str, settings: Iterable[str] = (), root: Path | None = None) -> None:
        self.profile, self.root = profile, root or project_root()
        self.stages = find_stages(self.root / "notebooks")
        given = load_profile(self.root / "profiles", profile) | parse_settings(settings)
        last = given.pop(UNTIL, None)
        self.last = None if last is None else str(last)
        self.values = check_parameters({"run_dir": f"runs/{profile}"} | given, self.stages)
        self.folder = self.root / Path(self.values["run_dir"]).expanduser()
        self._hashes: dict[Path, str] = {}

    def record_path(self, stage: str) -> Path:
        return self.folder / "provenance" / f"{stage}.json"

    def parameters(self, stage: Stage) -> dict[str, Any]:
        return {name: self.values.get(name, default) for name, default in stage.defaults.items()}

    def key(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage depends on, as JSON.

        Raises:
            RuadaptError: the stage is not declared in `ruadapt.freshness`.
        """
        parameters = self.parameters(stage)
        state = freshness.stage_state(stage.name, self.root)
        declared = freshness.STAGES[stage.name]
        state["drawing"] |= {"the text of the notebook": stage.page}
        state |= {"parameters": parameters, "inputs": inputs(parameters, declared.variables, self.root)}
        reads = {place: self._hash(self.folder / place) for place in declared.reads.split()}
        found: dict[str, Any] = json.loads(json.dumps(state | {"cells": stage.cells, "reads": reads}))
        return found

    def _hash(self, place: Path) -> str:
        if place not in self._hashes:
            self._hashes[place] = freshness.result_hash(place)
        return self._hashes[place]

    def outputs(self, stage: Stage) -> dict[str, Any]:
        """Return the hash of what the stage has written, and the names of its pictures."""
        places = [place for name in RESULT_PLACES if (place := self.parameters(stage).get(name))]
        folders = [self.folder / stage.name, *(self.root / Path(place).expanduser() for place in places)]
        written = [(folder, path) for folder in folders for path in folder.rglob("*.*")]
        pictures = [
            str(path.relative_to(folder))
            for folder, path in written
            if path.suffix in freshness.PICTURE_SUFFIXES
        ]
        return {"output_hash": " ".join(map(self._hash, folders)), "pictures": sorted(pictures)}

    def state(self, stage: Stage, key: Mapping[str, Any]) -> str:
        """Return why the stage has to run; an empty string where it is fresh."""
        if not self.record_path(stage.name).exists():
            return "not run yet"
        record = read_json(self.record_path(stage.name))
        if record["status"] != "done":
            return "failed before" if record["status"] == "failed" else "interrupted before"
        if stale := changes(record["key"], key, COMPUTING):
            return STALE + said(stale)
        found = self.outputs(stage)
        if record["output_hash"] != found["output_hash"]:
            return STALE + "its result was changed or removed"
        missing = sorted({*record["pictures"]} - {*found["pictures"]})
        drawn = changes(record["key"], key, ["drawing"]) + [f"{name} is missing" for name in missing]
        return DRAWS + said(drawn) if drawn else ""

    def states(self) -> dict[str, str]:
        """Return for every stage why a run would execute it; empty where it is fresh."""
        found: dict[str, str] = {}
        for stage in self.stages:
            reason = self.state(stage, self.key(stage))
            read = [place.partition("/")[0] for place in freshness.STAGES[stage.name].reads.split()]
            behind = [name for name in read if found[name] and not found[name].startswith(DRAWS)]
            if behind and (not reason or reason.startswith(DRAWS)):
                reason = f"{STALE}reads {behind[0]}, which is stale"
            found[stage.name] = reason
        return found


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
        profile, settings, root: as of `Pipeline`.
        first: stage to start at, None for the first.
        last: stage to stop after, None for the profile's `until` or the last.
        force: run the selected stages even where they are fresh; what they made before is kept in `stale/`.
        announce: takes one line of progress.

    Returns:
        The names of the stages that were executed.

    Raises:
        RuadaptError: before any work for an unknown profile, stage or parameter, a value of a wrong type, an
            unreadable corpus, model or data set, a run folder that is locked or not writable, or a full disk.
        StageFailed: a notebook stopped.
    """
    pipeline = Pipeline(profile, settings, root)
    chosen = select(pipeline.stages, first, last or pipeline.last)
    _check_inputs(pipeline, chosen)
    executed: list[str] = []
    with _locked(pipeline.folder):
        reasons = pipeline.states()
        ahead = [s for s in chosen if force or (reasons[s.name] and not reasons[s.name].startswith(DRAWS))]
        machine, estimate = provenance.machine(), timing.Estimate({})
        for position, stage in enumerate(chosen, start=1):
            key, folder = pipeline.key(stage), pipeline.folder / stage.name
            reason = "asked for" if force else pipeline.state(stage, key)
            where = f"[{position}/{len(chosen)}] {stage.name}"
            if not reason:
                announce(f"{where}: fresh")
                estimate.finish(stage.name, 0.0)
                continue
            if not executed:
                machine["speed"] = timing.measured_speed()
                known = timing.timed_records(pipeline.root, profile, pipeline.folder)
                asked = {s.name: pipeline.parameters(s) for s in ahead if s.name in known}
                estimate = timing.Estimate(
                    {n: timing.expected_seconds(known[n], given, machine) for n, given in asked.items()}
                )
                announce(estimate.left().replace("left", "on this machine") or NO_ESTIMATE)
            announce(f"{where}: runs ({reason}) {estimate.left()}".rstrip())
            if force and folder.is_dir():
                announce(f"{stage.name}: what was there is kept in {freshness.set_aside(folder)}")
            _execute(pipeline, stage, key, machine, estimate, announce)
            executed.append(stage.name)
    return executed


def inputs(parameters: Mapping[str, Any], variables: Mapping[str, str], root: Path) -> dict[str, str]:
    """Return the hashes of files and folders that parameters and environment variables name.

    Every text that names something counts, those in lists and in rows of data sets too, if it is no place to
    write to.
    """
    named = {variable: os.environ.get(variable, default) for variable, default in variables.items()}
    for name, value in parameters.items():
        for item in value if isinstance(value, list) else [value]:
            text = item.get("source") if isinstance(item, dict) else item
            if isinstance(text, str) and name not in PLACES:
                named[f"{name}: {text}" if isinstance(value, list) else name] = text
    paths = {name: root / Path(text).expanduser() for name, text in named.items() if text}
    return {name: hash_path(path) for name, path in paths.items() if path.exists()}


def _check_inputs(pipeline: Pipeline, chosen: Sequence[Stage]) -> None:
    """Read own text, get a real pair's models and look at a row of each data set before anything starts."""
    used = {name for stage in chosen for name in stage.defaults}
    values = {name: value for name, value in pipeline.values.items() if name in used and value}
    for name in ("corpus_ru", "corpus_en"):
        if name in values:
            for _ in read_texts(pipeline.root / Path(values[name]).expanduser()):
                pass
    if "evaluation_tasks" in values:
        _check_evaluation(values["evaluation_tasks"], values.get("evaluation_data", ""))
    for role in ("base", "instruct"):
        if name := values.get(f"{role}_model", ""):
            hub.fetch_model(Run.source(name), values.get(f"{role}_revision", ""))
    for name, read in (("calibration", read_chats), ("preference", read_preferences)):
        if source := values.get(f"{name}_dataset"):
            next(iter(read(Run.source(source))))
    files.require_disk_space(pipeline.folder, NEEDED_BYTES)


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


def _execute(
    pipeline: Pipeline,
    stage: Stage,
    key: Mapping[str, Any],
    machine: Mapping[str, Any],
    estimate: timing.Estimate,
    announce: Callable[[str], None],
) -> None:
    """Execute one notebook and leave its provenance, whatever its end."""
    record: dict[str, Any] = {
        "stage": stage.name,
        "status": "running",
        "key": key,
        "seeds": {name: value for name, value in key["parameters"].items() if "seed" in name},
        "versions": provenance.versions(),
        "git": provenance.git_state(pipeline.root),
        "machine": machine,
        # Units of an earlier execution may be in the folder: then the wall-clock is not that of the whole.
        "resumed": (pipeline.folder / stage.name).exists(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(pipeline.record_path(stage.name), record)
    clock, processes = time.monotonic(), provenance.ProcessTree()
    given = {name: pipeline.values[name] for name in stage.defaults if name in pipeline.values}
    pipeline._hashes.clear()
    try:
        execute_notebook(stage, given, pipeline.root, pipeline.folder, processes, announce, estimate)
    except BaseException as error:
        record |= {
            "status": "failed" if isinstance(error, Exception) else "interrupted",
            "error": str(error) or type(error).__name__,
        }
        raise
    else:
        record |= {"status": "done", **pipeline.outputs(stage)}
    finally:
        seconds = time.monotonic() - clock
        record |= {"wall_clock_seconds": round(seconds, 1), "peak_memory_bytes": processes.peak_bytes}
        write_json(pipeline.record_path(stage.name), record)
    estimate.finish(stage.name, seconds)
    announce(f"{stage.name}: done in {duration(seconds)}, {processes.peak_bytes / 1e9:.1f} GB")
