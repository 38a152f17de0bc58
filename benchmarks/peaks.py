"""What the steps of a profile hold in memory at their peaks.

For each vocabulary a short continued pre-training, LEP and calibration; then the evaluation of the original
chat model on two items a task. Each has a process of its own, in the environment of a run's notebooks.
Libraries and mapped files are counted. Stages 1 to 4 of the run come first, and no model is kept.

    ruadapt run gemma-3-270m --to 04
    python -m benchmarks.peaks gemma-3-270m original optimized extended
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import measured, show
from benchmarks.text_curve import Row, adapted, parameters
from paper.results import LANGUAGES
from ruadapt.evaluation.jobs import evaluate_job
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import read_json
from ruadapt.pipeline.runner import ENVIRONMENT, Pipeline, Run


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
    vocabularies: Annotated[list[str], typer.Argument(help="`original` is the control.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    characters: Annotated[int, typer.Option(help="Of Russian text in pre-training.")] = 8_000,
    steps: Annotated[int, typer.Option(help="Of calibration.")] = 3,
) -> None:
    """Measure, and print a line of JSON a vocabulary."""
    pipeline = Pipeline(profile, settings or ())
    run, values = Run(pipeline.folder), parameters(pipeline)
    for name in vocabularies:
        with tempfile.TemporaryDirectory(dir=pipeline.folder) as work:
            show(name, measured(partial(trained, run, values, name, characters, steps, Path(work))))
    with tempfile.TemporaryDirectory(dir=pipeline.folder) as work:
        show("evaluation", measured(partial(evaluated, run, values, Path(work))))


if __name__ == "__main__":
    # Glibc reads it when a process starts.
    if os.environ.get("GLIBC_TUNABLES") != ENVIRONMENT["GLIBC_TUNABLES"]:
        command = [sys.executable, "-m", "benchmarks.peaks", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ENVIRONMENT)
    typer.run(main)
