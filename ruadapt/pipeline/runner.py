"""The stages' folders as notebooks see them, and their execution through papermill.

A stage is skipped while what it was made of is unchanged. Inside a stage that runs again, finished units of
work are found by `ruadapt.freshness.cached`: a killed run goes on where it stopped, and nothing is removed.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from ruadapt import files, freshness
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, located, project_root, read_json, source_named, write_json
from ruadapt.freshness import changes
from ruadapt.pipeline import stages, timing
from ruadapt.pipeline.stages import Stage
from ruadapt.reporting import provenance

NEEDED_BYTES = 3_000_000_000
# Parameters that name places to write to; every other text that names something is an input.
PLACES = ("run_dir", "figures_dir", "results_dir")
STALE, DRAWS = "stale: ", "draws again: "
# The machine may stand still for half a minute while a kernel starts.
KERNEL_START_SECONDS = 180
# What a kernel inherits: no hub unless asked for, this environment's own `python3`, no notes for authors, and
# large pages for glibc's memory: a training step of the embedded pair takes an eighth less time. Blocks under
# 32 MB stay with the process, which saves another twentieth.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=4294967296",
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class Run:
    """The folders of one run, as a notebook sees them.

    Args:
        run_dir: the run's folder; a relative path starts at the repository root, wherever the notebook runs.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = located(run_dir)

    path, source = staticmethod(located), staticmethod(source_named)

    def needs(self, stage: str) -> Path:
        """Return the folder of an earlier stage; warn where the code that made it has changed since.

        Raises:
            RuadaptError: that stage left nothing here, or did not finish; the message tells how to run it.
        """
        folder, place = self.folder / stage, self.folder / "provenance" / f"{stage}.json"
        record: dict[str, Any] = read_json(place, {"status": "done"})
        command = f"run `ruadapt run {self.folder.name} --to {stage}`"
        if record["status"] != "done" or not folder.is_dir() or not any(folder.iterdir()):
            raise RuadaptError(f"{folder} is missing or not finished: stage {stage} comes first; {command}")
        if "key" in record and (reasons := changes(record["key"], freshness.stage_state(stage))):
            warnings.warn(f"{folder} is stale: {reasons}; {command}", stacklevel=2)
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
        settings: `name=value` overrides of its parameters.
        root: folder of `notebooks/`, `profiles/` and `data/`; the repository by default.

    Raises:
        RuadaptError: an unknown profile or parameter, or a value of a wrong type.
    """

    def __init__(self, profile: str, settings: Iterable[str] = (), root: Path | None = None) -> None:
        self.root = root or project_root()
        self.stages = stages.find_stages(self.root / "notebooks")
        given = stages.read_values(self.root / "profiles", profile, settings, self.stages)
        self.last: str | None = given.pop(stages.UNTIL, None)
        self.missing = sorted(name for name, value in given.items() if value is None)
        self.values = {"run_dir": f"runs/{profile}"} | {k: v for k, v in given.items() if v is not None}
        self.folder = located(self.values["run_dir"], self.root)
        self.hash, self.hash_input = cache(freshness.result_hash), cache(hash_path)

    def record_path(self, stage: str) -> Path:
        return self.folder / "provenance" / f"{stage}.json"

    def parameters(self, stage: Stage) -> dict[str, Any]:
        return {name: self.values.get(name, default) for name, default in stage.defaults.items()}

    def made_of(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage depends on: `key` for its results, `drawing` for its pictures alone.

        Inputs are the files and folders that parameters name, those in lists and in rows of data sets too.

        Raises:
            RuadaptError: the stage is not declared in `ruadapt.freshness`.
        """
        key = freshness.stage_state(stage.name, self.root)
        declared = freshness.STAGES[stage.name]
        named: dict[str, str] = {}
        for name, value in self.parameters(stage).items():
            for item in value if isinstance(value, list) else [value]:
                text = item.get("source") if isinstance(item, dict) else item
                if isinstance(text, str) and name not in PLACES:
                    named[f"{name}: {text}" if isinstance(value, list) else name] = text
        paths = {name: located(text, self.root) for name, text in named.items() if text}
        key |= {
            "parameters": self.parameters(stage),
            "inputs": {name: self.hash_input(path) for name, path in paths.items() if os.path.exists(path)},
            "cells": stage.cells,
            "reads": {place: self.hash(self.folder / place) for place in declared.reads.split()},
        }
        drawing = freshness.code(declared.draws, self.root) | {"the text of the notebook": stage.page}
        made: dict[str, Any] = json.loads(json.dumps({"key": key, "drawing": {"code": drawing}}))
        return made

    def outputs(self, stage: Stage) -> dict[str, Any]:
        """Return the hash of what the stage has written, and the names of its pictures."""
        folder = self.folder / stage.name
        pictures = sorted(p.name for p in folder.rglob("*") if p.suffix in freshness.PICTURE_SUFFIXES)
        return {"output_hash": self.hash(folder), "pictures": pictures}

    def state(self, stage: Stage) -> str:
        """Return why the stage has to run; an empty string where it is fresh."""
        record = read_json(self.record_path(stage.name), {})
        if record.get("status") != "done":
            return "did not finish" if record else "not run yet"
        made_of, found = self.made_of(stage), self.outputs(stage)
        stale = changes(record["key"], made_of["key"])
        if stale or record["output_hash"] != found["output_hash"]:
            return STALE + (stale or "its result was changed or removed")
        drawn = changes(record.get("drawing", {}), made_of["drawing"])
        if not drawn and record["pictures"] != found["pictures"]:
            drawn = "a picture is missing"
        return drawn and DRAWS + drawn

    def states(self) -> dict[str, str]:
        """Return for every stage why a run would execute it; empty where it is fresh."""
        found: dict[str, str] = {}
        for stage in self.stages:
            reason = self.state(stage)
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
    """Execute the stages of a profile that are not fresh, in order; return their names.

    Args:
        profile, settings, root: as of `Pipeline`.
        first: stage to start at, None for the first.
        last: stage to stop after, None for the profile's `until` or the last.
        force: run the selected stages even where they are fresh; what they made before is kept in `stale/`.
        announce: takes one line of progress.

    Raises:
        RuadaptError: before any work for an unknown profile, stage or parameter, a value of a wrong type, an
            unreadable corpus, model or data set, a run folder that is locked or not writable, or a full disk;
            after it where a notebook stopped: the message names the notebook and the cell.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    pipeline = Pipeline(profile, settings, root)
    start = stages.find_stage(first, pipeline.stages) if first else 0
    stop = stages.find_stage(last or pipeline.last or pipeline.stages[-1].name, pipeline.stages)
    chosen = pipeline.stages[start : stop + 1]
    if not chosen:
        raise RuadaptError(f"stage {first} comes after {pipeline.stages[stop].name}; nothing would run")
    _check_inputs(pipeline, chosen)
    with _locked(pipeline.folder):
        reasons = pipeline.states()
        ahead = {s.name: pipeline.parameters(s) for s in chosen if force or _computes(reasons[s.name])}
        machine = provenance.machine() | ({"speed": timing.measured_speed()} if ahead else {})
        records = {path.stem: read_json(path) for path in pipeline.record_path("").parent.glob("*.json")}
        for committed in (pipeline.root / "data" / "results" / profile).glob("provenance.json"):
            records |= read_json(committed)
        if ahead:
            told = timing.left(ahead, records, machine)
            announce(told.replace("left", "on this machine") or "no estimate: not run before")
        executed = []
        for position, stage in enumerate(chosen, start=1):
            reason = "asked for" if force else pipeline.state(stage)
            where = f"[{position}/{len(chosen)}] {stage.name}"
            told = timing.left(ahead, records, machine)
            announce(f"{where}: runs ({reason}) {told}".rstrip() if reason else f"{where}: fresh")
            if force and (pipeline.folder / stage.name).is_dir():
                kept = freshness.set_aside(pipeline.folder / stage.name)
                announce(f"{stage.name}: what was there is kept in {kept}")
            if reason:
                seconds = _execute(pipeline, stage, machine)
                executed.append(stage.name)
                announce(f"{stage.name}: done in {seconds // 60:.0f}:{seconds % 60:02.0f}")
            ahead.pop(stage.name, None)
    return executed


def _check_inputs(pipeline: Pipeline, chosen: Sequence[Stage]) -> None:
    """Look at own text, models, a row of each data set and the tasks before anything starts."""
    # Slow to import, and of no use before the parameters are right.
    from ruadapt import hub
    from ruadapt.checkpoints.adapters import is_adapter
    from ruadapt.checkpoints.model_configs import read_chat_template
    from ruadapt.data_sets import read_column
    from ruadapt.evaluation.tasks import Benchmark
    from ruadapt.training.chats import read_chats

    if pipeline.missing:
        name = pipeline.missing[0]
        raise RuadaptError(f"parameter {name} has no value in this profile: add --set {name}=...")
    used = {name for stage in chosen for name in stage.defaults}
    values = {name: value for name, value in pipeline.values.items() if name in used and value}
    named = {name: source_named(str(value), pipeline.root) for name, value in values.items()}
    models = {
        name: hub.fetch_model(named[name]) for name in ("base_model", "instruct_model") if name in named
    }
    for text in (named[name] for name in ("corpus_ru", "corpus_en") if name in named):
        next(read_column(text, "text"))
    chats = [source_named(str(row.get("source")), pipeline.root) for row in values.get("chats", [])]
    for source in [*chats, *(named[name] for name in ["calibration_dataset"] if name in named)]:
        if next(read_chats(source), None) is None:
            raise RuadaptError(f"{source} has no usable chat")
    if "evaluation_tasks" in values:
        Benchmark(values["evaluation_tasks"], named.get("evaluation_data", ""), chat=False).build()
    instruct = models.get("instruct_model") if "calibration_data" in used else None
    if instruct and not is_adapter(instruct) and not read_chat_template(instruct):
        raise RuadaptError(
            f"instruct_model: {instruct} has no chat template, so it is no instruct model; without "
            "instruct_model stage 2 tunes one from base_model on chats"
        )
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


def _execute(pipeline: Pipeline, stage: Stage, machine: Mapping[str, Any]) -> float:
    """Execute one notebook, leave it and its provenance, whatever its end; return the seconds it took."""
    import papermill  # slow to import
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    executed, place = pipeline.folder / "notebooks" / f"{stage.name}.ipynb", pipeline.record_path(stage.name)
    executed.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "status": "did not finish",
        **pipeline.made_of(stage),
        "versions": provenance.versions(),
        "git": provenance.git_state(pipeline.root),
        "machine": machine,
        # Units of an earlier execution may be in the folder: then the wall-clock is not that of the whole.
        "resumed": (pipeline.folder / stage.name).exists(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(place, record)
    clock = time.monotonic()
    # papermill takes braces in a path for names of parameters.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (stage.notebook, executed)]
    try:
        papermill.execute_notebook(
            *paths,
            {name: pipeline.values[name] for name in stage.defaults if name in pipeline.values},
            kernel_name="python3",
            language="python",
            progress_bar=False,
            stderr_file=sys.stderr,
            start_timeout=KERNEL_START_SECONDS,
            cwd=pipeline.root,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # its warnings are for who configures kernels
        )
        pipeline.hash.cache_clear()
        pipeline.hash_input.cache_clear()
        record |= {"status": "done", **pipeline.outputs(stage)}
    except PapermillExecutionError as error:
        text = error.evalue if error.ename == RuadaptError.__name__ else f"{error.ename}: {error.evalue}"
        raise RuadaptError(
            f"{stage.notebook.name}: {text}\n  In [{error.exec_count}] of {executed}"
        ) from error
    except DeadKernelError as error:
        raise RuadaptError(
            f"{stage.notebook.name}: the kernel ended (interrupted, killed, or out of memory); the same "
            f"command goes on from here\n  {executed}"
        ) from error
    finally:
        record["wall_clock_seconds"] = round(time.monotonic() - clock, 1)
        write_json(place, record)
    return float(record["wall_clock_seconds"])
