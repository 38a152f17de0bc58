"""The stages' folders as notebooks see them, and their execution through papermill.

A stage is skipped while what it was made of is unchanged. Inside a stage that runs again, finished units of
work are found by `ruadapt.freshness.cached`: a killed run goes on where it stopped, and nothing is removed.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from ruadapt import files, freshness
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, located, project_root, read_json, write_json
from ruadapt.freshness import changes, said
from ruadapt.pipeline import stages, timing
from ruadapt.pipeline.stages import Stage
from ruadapt.reporting import provenance

NEEDED_BYTES = 3_000_000_000
# Parameters that name places to write to; every other text that names something is an input.
RESULT_PLACES = ("figures_dir", "results_dir")
PLACES = ("run_dir", "token_cache_dir", *RESULT_PLACES)
COMPUTING = ("parameters", "inputs", "cells", "code", "versions", "reads")
STALE, DRAWS = "stale: ", "draws again: "


class Run:
    """The folders of one run, as a notebook sees them.

    Args:
        run_dir: the run's folder; a relative path starts at the repository root, wherever the notebook runs.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = located(run_dir)

    @staticmethod
    def path(name: str | Path) -> Path:
        """Return the path a parameter names; a relative one starts at the repository root."""
        return located(name)

    @staticmethod
    def source(name: str) -> str:
        """Return the path a parameter names if something is there, else the parameter: a name of the hub."""
        return str(located(name)) if name and located(name).exists() else name

    def needs(self, stage: str) -> Path:
        """Return the folder of an earlier stage; warn where the code that made it has changed since.

        Raises:
            RuadaptError: that stage left nothing here, or did not finish; the message tells how to run it.
        """
        folder, place = self.folder / stage, self.folder / "provenance" / f"{stage}.json"
        record = read_json(place) if place.exists() else None
        command = f"run `ruadapt run {self.folder.name} --to {stage}`"
        if not folder.is_dir() or not any(folder.iterdir()):
            raise RuadaptError(f"{folder} is missing: stage {stage} comes first; {command}")
        if record and record["status"] != "done":
            raise RuadaptError(f"{folder} is not finished: stage {stage} comes first; {command}")
        if record and (reasons := changes(record["key"], freshness.stage_state(stage), ("code", "versions"))):
            warnings.warn(f"{folder} is stale: {said(reasons)}; {command}", stacklevel=2)
        return folder

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
        complete: refuse where the profile asks for a parameter that is not given; else `missing` names it.

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """

    def __init__(
        self, profile: str, settings: Iterable[str] = (), root: Path | None = None, complete: bool = True
    ) -> None:
        self.profile, self.root = profile, root or project_root()
        self.stages = stages.find_stages(self.root / "notebooks")
        given = stages.load_profile(self.root / "profiles", profile) | stages.parse_settings(settings)
        self.last: str | None = given.pop(stages.UNTIL, None)
        self.missing = [] if complete else sorted(name for name, value in given.items() if value is None)
        given = {name: value for name, value in given.items() if name not in self.missing}
        self.values = stages.check_parameters({"run_dir": f"runs/{profile}"} | given, self.stages)
        self.folder = self.path(self.values["run_dir"])
        self._hashes: dict[Path, str] = {}

    def path(self, name: str | Path) -> Path:
        return located(name, self.root)

    def record_path(self, stage: str) -> Path:
        return self.folder / "provenance" / f"{stage}.json"

    def parameters(self, stage: Stage) -> dict[str, Any]:
        return {name: self.values.get(name, default) for name, default in stage.defaults.items()}

    def inputs(self, stage: Stage) -> dict[str, str]:
        """Return the hashes of files and folders that parameters and environment variables name.

        Every text that names something counts, those in lists and in rows of data sets too, if it is no place
        to write to.
        """
        variables = freshness.STAGES[stage.name].variables
        named = {variable: os.environ.get(variable, default) for variable, default in variables.items()}
        for name, value in self.parameters(stage).items():
            for item in value if isinstance(value, list) else [value]:
                text = item.get("source") if isinstance(item, dict) else item
                if isinstance(text, str) and name not in PLACES:
                    named[f"{name}: {text}" if isinstance(value, list) else name] = text
        paths = {name: self.path(text) for name, text in named.items() if text}
        return {name: hash_path(path) for name, path in paths.items() if path.exists()}

    def key(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage depends on, as JSON.

        Raises:
            RuadaptError: the stage is not declared in `ruadapt.freshness`.
        """
        state = freshness.stage_state(stage.name, self.root)
        state["drawing"]["the text of the notebook"] = stage.page
        reads = freshness.STAGES[stage.name].reads.split()
        state |= {"parameters": self.parameters(stage), "inputs": self.inputs(stage), "cells": stage.cells}
        state["reads"] = {place: self._hash(self.folder / place) for place in reads}
        found: dict[str, Any] = json.loads(json.dumps(state))
        return found

    def _hash(self, place: Path) -> str:
        if place not in self._hashes:
            self._hashes[place] = freshness.result_hash(place)
        return self._hashes[place]

    def outputs(self, stage: Stage) -> dict[str, Any]:
        """Return the hash of what the stage has written, and the names of its pictures."""
        parameters = self.parameters(stage)
        places = [self.path(parameters[name]) for name in RESULT_PLACES if parameters.get(name)]
        folders = [self.folder / stage.name, *places]
        pictures = {
            path.relative_to(folder).as_posix()
            for folder in folders
            for path in folder.rglob("*")
            if path.suffix in freshness.PICTURE_SUFFIXES
        }
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
            behind = [name for name in read if _computes(found[name])]
            if behind and not _computes(reason):
                reason = f"{STALE}reads {behind[0]}, which is stale"
            found[stage.name] = reason
        return found


def _computes(reason: str) -> bool:
    return bool(reason) and not reason.startswith(DRAWS)


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
    chosen = stages.select(pipeline.stages, first, last or pipeline.last)
    _check_inputs(pipeline, chosen)
    with _locked(pipeline.folder):
        reasons = pipeline.states()
        ahead = {s.name: pipeline.parameters(s) for s in chosen if force or _computes(reasons[s.name])}
        machine = provenance.machine() | ({"speed": timing.measured_speed()} if ahead else {})
        committed = pipeline.root / "data" / "results" / profile / "provenance.json"
        estimate = timing.Estimate(ahead, [pipeline.folder / "provenance", committed], machine)
        if ahead:
            announce(estimate.left().replace("left", "on this machine") or "no estimate: not run before")
        executed = []
        for position, stage in enumerate(chosen, start=1):
            key, folder = pipeline.key(stage), pipeline.folder / stage.name
            reason = "asked for" if force else pipeline.state(stage, key)
            where = f"[{position}/{len(chosen)}] {stage.name}"
            announce(f"{where}: runs ({reason}) {estimate.left()}".rstrip() if reason else f"{where}: fresh")
            if force and folder.is_dir():
                announce(f"{stage.name}: what was there is kept in {freshness.set_aside(folder)}")
            seconds = None
            if reason:
                seconds = _execute(pipeline, stage, key, machine)
                executed.append(stage.name)
                announce(f"{stage.name}: done in {seconds // 60:.0f}:{seconds % 60:02.0f}")
            estimate.finish(stage.name, seconds)
    return executed


def _check_inputs(pipeline: Pipeline, chosen: Sequence[Stage]) -> None:
    """Look at own text, models, a row of each data set and the tasks before anything starts."""
    # Slow to import, and of no use before the parameters are right.
    from ruadapt.checkpoints import hub
    from ruadapt.evaluation.tasks import Benchmark
    from ruadapt.training.chats import read_chats, read_preferences

    used = {name for stage in chosen for name in stage.defaults}
    values = {name: value for name, value in pipeline.values.items() if name in used and value}
    for name in ("corpus_ru", "corpus_en"):
        if name in values:
            next(files.read_texts(pipeline.path(values[name])))
    for role in ("base", "instruct"):
        if name := values.get(f"{role}_model", ""):
            hub.fetch_model(Run.source(name))
    for name, read in (("calibration", read_chats), ("preference", read_preferences)):
        if source := values.get(f"{name}_dataset"):
            next(iter(read(Run.source(source))))
    if tasks := values.get("evaluation_tasks"):
        data = values.get("evaluation_data", "")
        if "darumeru" in tasks and not data and os.environ.get("HF_HUB_OFFLINE", "1") != "0":
            raise RuadaptError(
                "Darumeru's tasks are no local files; set HF_HUB_OFFLINE=0 to read them from the hub, "
                "or give a local copy: --set evaluation_data=..."
            )
        Benchmark(tasks, data and str(pipeline.path(data)), chat=False).build()
    files.require_disk_space(pipeline.folder, NEEDED_BYTES)


def _locked(run_dir: Path) -> AcquireReturnProxy:
    """Hold the run folder for this process; the system lets it go when the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        raise RuadaptError(
            f"{run_dir} is in use by another run; wait for it, or choose another folder: --set run_dir=..."
        ) from None
    except OSError as error:
        raise RuadaptError(f"cannot write to {run_dir}: {error}; choose another run_dir") from error


def _execute(pipeline: Pipeline, stage: Stage, key: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    """Execute one notebook, leave its provenance, whatever its end, and return the seconds it took."""
    from ruadapt.pipeline.execution import StageInterrupted, execute_notebook  # slow to import

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
    given = {name: pipeline.values[name] for name in stage.defaults if name in pipeline.values}
    clock = time.monotonic()
    try:
        record["peak_memory_bytes"] = execute_notebook(stage, given, pipeline.root, pipeline.folder)
        pipeline._hashes.clear()
        record |= {"status": "done", **pipeline.outputs(stage)}
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, StageInterrupted)
        record |= {"status": "failed" if failed else "interrupted", "error": str(error)}
        raise
    finally:
        record["wall_clock_seconds"] = round(time.monotonic() - clock, 1)
        write_json(pipeline.record_path(stage.name), record)
    return float(record["wall_clock_seconds"])
