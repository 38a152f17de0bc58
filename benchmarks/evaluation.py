"""The world's tasks on the embedded pair: seconds, and what the harness adds to the model's forward passes.

To reach on two cores: 60 s for one model, 25 % on top of its forward passes.
"""

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ruadapt.evaluation.models import load
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import project_root


def timed(folder: Path, items_per_task: int) -> dict[str, Any]:
    """Evaluate one model: wall seconds, CPU seconds in all and of forward passes, mean score.

    The overhead is of CPU seconds, which other processes on the machine do not stretch.
    """
    model, tokenizer = load(folder)
    spent, began = [0.0], [0.0]

    def before(*_: Any) -> None:
        began[0] = time.process_time()

    def after(*_: Any) -> None:
        spent[0] += time.process_time() - began[0]

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)
    start, start_cpu = time.perf_counter(), time.process_time()
    benchmark = Benchmark(["world"], chat=folder.name == "instruct", items_per_task=items_per_task)
    table = benchmark.evaluate(model, tokenizer)
    wall, total = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "model": folder.name,
        "scored": len(table),
        "seconds": wall,
        "cpu_seconds": total,
        "forward_cpu_seconds": spent[0],
        "overhead": total / spent[0] - 1,
        "score": float(table["score"].mean()),
    }


def main(
    threads: Annotated[int, typer.Option(help="Threads of one forward pass.")] = 1,
    items_per_task: Annotated[int, typer.Option(help="Items of each task and language.")] = 40,
    repeats: Annotated[int, typer.Option(help="Measurements of each model, taking turns.")] = 3,
) -> None:
    """Print one JSON line a measurement: the instruct model zero-shot, the base with five examples."""
    torch.set_num_threads(threads)
    # Once a process: the world's items, and more than a second of imports for nltk.
    Benchmark(["world"], chat=True).build()
    import_module("rouge_score.rouge_scorer")
    for _ in range(repeats):
        for name in ("instruct", "base"):
            typer.echo(json.dumps(timed(project_root() / "data" / "pair" / name, items_per_task)))


if __name__ == "__main__":
    typer.run(main)
