"""What the steps of a profile hold in memory at their peaks.

For each vocabulary a short continued pre-training, and LEP with a short calibration; then the evaluation of
the original chat model on two items a task. Each has a process of its own, in the environment of a run's
notebooks. Libraries and mapped files are counted. Stages 1 to 4 come first, and no model is kept.

    ruadapt run gemma-3-270m --to 04
    python -m benchmarks.peaks gemma-3-270m data/results/gemma_peaks.csv original optimized extended
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.measuring import measured, show
from benchmarks.text_curve import Row, adapted, parameters, write_record
from paper.results import LANGUAGES
from ruadapt.evaluation.jobs import evaluate_job
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import atomic_write, project_root, read_json
from ruadapt.pipeline.runner import ENVIRONMENT, Pipeline, Run
from ruadapt.reporting import provenance


def trained(*what: Any) -> Row:
    """Train one vocabulary; return its tokens and seconds of pre-training, and its chats."""
    return adapted(*what)[0]


def evaluated(run: Run, values: Row, work: Path) -> None:
    """Evaluate the original instruct model as stage 8 does."""
    instruct = run.path(read_json(run.needs("02_model_pair") / "pair.json")["instruct"])
    data = str(run.path(values["evaluation_data"])) if values["evaluation_data"] else ""
    chats = run.needs("01_corpus") / "chats"
    evaluate_job(
        instruct,
        work / "scores",
        dict.fromkeys(["model", "stage", "vocabulary", "method", "calibration", "seed"], ""),
        benchmark=Benchmark(values["evaluation_tasks"], data, chat=True, items_per_task=2),
        texts={},
        chats={language: chats / f"{language}_chat_heldout.jsonl" for language in LANGUAGES},
    )


def main(
    profile: Annotated[str, typer.Argument(help="Whose parameters hold, and whose run folder.")],
    results: Annotated[Path, typer.Argument(help="The table to write.")],
    vocabularies: Annotated[list[str], typer.Argument(help="`original` is the control.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    characters: Annotated[int, typer.Option(help="Of Russian text in pre-training.")] = 8_000,
    steps: Annotated[int, typer.Option(help="Of calibration.")] = 3,
) -> None:
    """Measure, and write one table: the peak in gigabytes and the seconds of each."""
    pipeline, state = Pipeline(profile, settings or ()), provenance.git_state(project_root())
    run, values = Run(pipeline.folder), parameters(pipeline)
    table = []

    def measure(name: str, work: Callable[[], Any]) -> None:
        found = measured(work)
        show(name, found)
        table.append({"step": name} | {part: found[part] for part in ("peak_gigabytes", "seconds")})

    for name in vocabularies:
        with tempfile.TemporaryDirectory(dir=pipeline.folder) as folder:
            # The second finds what the first has trained, as stage 7 does in a process of its own.
            for stage, amount in {"pre-training": 0, "LEP and calibration": steps}.items():
                work = partial(trained, run, values, name, characters, amount, Path(folder))
                measure(f"{name}, {stage}", work)
    with tempfile.TemporaryDirectory(dir=pipeline.folder) as folder:
        measure("evaluation", partial(evaluated, run, values, Path(folder)))
    atomic_write(results, pd.DataFrame(table).to_csv(index=False, float_format="%.4g"))
    about = {"profile": profile, "characters": characters, "steps": steps, "git": state}
    write_record(results, values, about | {"environment": ENVIRONMENT})


if __name__ == "__main__":
    # Glibc reads it when a process starts.
    if os.environ.get("GLIBC_TUNABLES") != ENVIRONMENT["GLIBC_TUNABLES"]:
        command = [sys.executable, "-m", "benchmarks.peaks", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ENVIRONMENT)
    typer.run(main)
