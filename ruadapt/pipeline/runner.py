"""The stages' folders as notebooks see them, and their execution through papermill.

A stage is skipped while what it was made of is unchanged. Inside a stage that runs again, finished units of
work are found by `ruadapt.freshness.cached`: a killed run goes on where it stopped, and nothing is removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruadapt import files, freshness
from ruadapt.checkpoints import hub
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, project_root, read_json, read_texts, write_json
from ruadapt.freshness import changes, result_hash, said
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
PLACES = ("run_dir", "figures_dir", "token_cache_dir")
RESULT_PLACE = "figures_dir"
STALE, DRAWS = "stale: ", "draws again: "


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
            if record.exists() and (reasons := _other_code(read_json(record)["key"], stage)):
                warnings.warn(f"{folder} is stale: {reasons}; run `{command}`", stacklevel=2)
            return folder
        raise RuadaptError(f"{folder} {problem}: stage {stage} comes first; run `{command}`")

    def stage(self, name: str) -> Path:
        """Return this stage's own folder, created where it is missing."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass
class Pipeline:
    """A profile's stages, its parameters, and what lies in its run folder.

    Attributes:
        last: the profile's last stage, None for all.
        results: hashes of what stages have written, forgotten where one runs.
    """

    profile: str
    stages: Sequence[Stage]
    values: Mapping[str, Any]
    last: str | None
    root: Path
    results: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.root / Path(self.values["run_dir"]).expanduser()

    def record_path(self, stage: str) -> Path:
        return self.folder / "provenance" / f"{stage}.json"

    def parameters(self, stage: Stage) -> dict[str, Any]:
        return {name: self.values.get(name, default) for name, default in stage.defaults.items()}

    def key(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage depends on, as JSON.

        Raises:
            RuadaptError: the stage is not declared in `ruadapt.freshness`.
        """
        state = freshness.stage_state(stage.name, self.parameters(stage), self.root)
        key = {
            "parameters": self.parameters(stage),
            "inputs": inputs(self.parameters(stage), freshness.STAGES[stage.name].variables, self.root),
            "cells": stage.cells,
            "reads": {name: self._result(name) for name in freshness.STAGES[stage.name].reads},
            **state,
        }
        key["drawing"] |= {"the text of the notebook": stage.page}
        found: dict[str, Any] = json.loads(json.dumps(key))
        return found

    def _result(self, place: str) -> str:
        if place not in self.results:
            self.results[place] = result_hash(self.folder / place)
        return self.results[place]

    def outputs(self, stage: Stage) -> dict[str, Any]:
        """Return the hash of what the stage has written, and the names of its pictures."""
        place = self.parameters(stage).get(RESULT_PLACE)
        folders = [self.folder / stage.name, *([self.root / Path(place).expanduser()] if place else [])]
        pictures = sorted(
            str(path.relative_to(folder))
            for folder in folders
            for path in folder.rglob("*")
            if path.suffix in freshness.PICTURE_SUFFIXES
        )
        parts = [self._result(stage.name), *map(result_hash, folders[1:])]
        return {
            "output_hash": hashlib.sha256(" ".join(parts).encode()).hexdigest(),
            "pictures": pictures,
        }

    def state(self, stage: Stage, key: Mapping[str, Any]) -> str:
        """Return why the stage has to run; an empty string where it is fresh."""
        if not self.record_path(stage.name).exists():
            return "not run yet"
        record = read_json(self.record_path(stage.name))
        if record["status"] != "done":
            return "failed before" if record["status"] == "failed" else "interrupted before"
        computing = [part for part in key if part != "drawing"]
        if stale := changes(record["key"], key, computing):
            return STALE + said(stale)
        found = self.outputs(stage)
        if record["output_hash"] != found["output_hash"]:
            return STALE + "its result was changed or removed"
        drawn = changes(record["key"], key, ["drawing"])
        missing = sorted({*record["pictures"]} - {*found["pictures"]})
        drawn += [f"{name} is missing" for name in missing]
        return DRAWS + said(drawn) if drawn else ""

    def states(self) -> dict[str, str]:
        """Return for every stage why a run would execute it; empty where it is fresh."""
        found: dict[str, str] = {}
        for stage in self.stages:
            reason = self.state(stage, self.key(stage))
            read = [place.partition("/")[0] for place in freshness.STAGES[stage.name].reads]
            behind = [name for name in read if found[name] and not found[name].startswith(DRAWS)]
            if behind and (not reason or reason.startswith(DRAWS)):
                reason = f"{STALE}reads {behind[0]}, which is stale"
            found[stage.name] = reason
        return found


def open_pipeline(profile: str, settings: Iterable[str] = (), root: Path | None = None) -> Pipeline:
    """Return a profile's pipeline, its parameters overridden by `settings`.

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """
    root = root or project_root()
    stages = find_stages(root / "notebooks")
    values = {
        "run_dir": f"runs/{profile}",
        **load_profile(root / "profiles", profile),
        **parse_settings(settings),
    }
    last = values.pop(UNTIL, None)
    return Pipeline(
        profile, stages, check_parameters(values, stages), None if last is None else str(last), root
    )


def states(profile: str, settings: Iterable[str] = (), root: Path | None = None) -> dict[str, str]:
    """Return for every stage why a run of the profile would execute it; empty where it is fresh.

    Raises:
        RuadaptError: as `open_pipeline`.
    """
    return open_pipeline(profile, settings, root).states()


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
        force: run the selected stages even where they are fresh; what they made before is kept in `stale/`.
        root: folder of `notebooks/`, `profiles/` and `data/`; the repository by default.
        announce: takes one line of progress.

    Returns:
        The names of the stages that were executed.

    Raises:
        RuadaptError: before any work for an unknown profile, stage or parameter, a value of a wrong type, an
            unreadable corpus, model or data set, a run folder that is locked or not writable, or a full disk.
        StageFailed: a notebook stopped.
    """
    pipeline = open_pipeline(profile, settings, root)
    chosen = select(pipeline.stages, first, last or pipeline.last)
    run_dir = pipeline.folder
    used = {name: value for name, value in pipeline.values.items() if any(name in s.defaults for s in chosen)}
    _check_corpora(used, pipeline.root)
    if "evaluation_tasks" in used:
        _check_evaluation(used["evaluation_tasks"], used.get("evaluation_data", ""))
    _check_real_inputs(used)
    files.require_disk_space(run_dir, NEEDED_BYTES)
    executed: list[str] = []
    with _locked(run_dir):
        reasons = pipeline.states()
        ahead = [s for s in chosen if force or (reasons[s.name] and not reasons[s.name].startswith(DRAWS))]
        machine = provenance.machine()
        estimate = timing.Estimate({})
        for position, stage in enumerate(chosen, start=1):
            key = pipeline.key(stage)
            reason = "asked for" if force else pipeline.state(stage, key)
            where = f"[{position}/{len(chosen)}] {stage.name}"
            if not reason:
                announce(f"{where}: fresh")
                estimate.finish(stage.name, 0.0)
                continue
            if not executed:
                machine["speed"] = timing.measured_speed()
                estimate = _estimate(pipeline, ahead, machine)
                announce(estimate.left().replace("left", "on this machine") or NO_ESTIMATE)
            announce(f"{where}: runs ({reason}) {estimate.left()}".rstrip())
            if force and (run_dir / stage.name).is_dir():
                announce(
                    f"{stage.name}: what was there is kept in {freshness.set_aside(run_dir / stage.name)}"
                )
            _execute(pipeline, stage, key, machine, estimate, announce)
            executed.append(stage.name)
    return executed


NO_ESTIMATE = "no estimate: this profile was not run before"


def _estimate(pipeline: Pipeline, ahead: Iterable[Stage], machine: Mapping[str, Any]) -> timing.Estimate:
    known = timing.timed_records(pipeline.root, pipeline.profile, pipeline.folder)
    return timing.Estimate(
        {
            stage.name: timing.expected_seconds(known[stage.name], pipeline.parameters(stage), machine)
            for stage in ahead
            if stage.name in known
        }
    )


def inputs(parameters: Mapping[str, Any], variables: Iterable[tuple[str, str]], root: Path) -> dict[str, str]:
    """Return the hashes of files and folders that parameters and environment variables name.

    Every text that names something counts, those in lists and in rows of data sets too, if it is no place to
    write to.
    """
    named = {variable: os.environ.get(variable, default) for variable, default in variables}
    for name, value in parameters.items():
        if name not in PLACES:
            for item in value if isinstance(value, list) else [value]:
                text = item.get("source", "") if isinstance(item, dict) else item
                named[f"{name}: {text}" if isinstance(value, list) else name] = text
    paths = {
        name: root / Path(text).expanduser() for name, text in named.items() if text and isinstance(text, str)
    }
    return {name: hash_path(path) for name, path in paths.items() if path.exists()}


def _other_code(key: Mapping[str, Any], stage: str) -> str:
    """Say what has changed of the code that made a stage's result."""
    known = freshness.stage_state(stage, key["parameters"]) if stage in freshness.STAGES else {}
    return said(changes(key, known, [part for part in known if part != "drawing"]))


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
    pipeline.results.clear()
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
