"""How often the 95 % intervals hold the truth, simulated: `python -m benchmarks.coverage`.

Seeds and items are drawn from populations whose mean is known, and every seed has its own noise on every
item. Scores are 0 or 1, paired differences of two such models, or any number. The seeds' part of the variance
of the mean is a hundredth of the part of items and noise together, as large, or ten times as large.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray

from ruadapt.evaluation.statistics import estimate
from ruadapt.files import atomic_write, project_root

SCORES = ("binary", "paired", "continuous")
SEEDS = (3, 5, 10)
SHARES = {"negligible": 0.01, "equal": 1.0, "dominant": 10.0}
TASKS = {20: 0.4, 21: 0.6, 40: 0.4, 41: 0.6, 60: 0.4, 61: 0.6}
"""Items of each task, and its mean."""
EASE = 0.2
"""An item's chance lies up to this above or below the mean of its task."""
_CHUNK = 500

Array = NDArray[np.float64]


def coverage(simulations: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Simulate every kind of scores, number of seeds and share of the seeds.

    Returns:
        columns `scores, seeds, seed_variance, seed_to_item_variance, simulations, coverage, median_width`;
        `coverage` is the share of intervals that hold the truth.
    """
    rows = []
    for kind, scores in enumerate(SCORES):
        for seeds in SEEDS:
            for share, ratio in SHARES.items():
                generator = np.random.default_rng([seed, kind, seeds, int(100 * ratio)])
                parts = list(_intervals(scores, seeds, ratio, simulations, generator))
                low, high = np.concatenate(parts, axis=1)
                truth = 0.0 if scores == "paired" else 0.5
                row = {"scores": scores, "seeds": seeds, "seed_variance": share}
                row |= {"seed_to_item_variance": ratio, "simulations": simulations}
                row |= {"coverage": float(np.mean((low <= truth) & (truth <= high)))}
                rows.append(row | {"median_width": float(np.median(high - low))})
    return pd.DataFrame(rows)


def _intervals(
    scores: str, seeds: int, ratio: float, simulations: int, generator: np.random.Generator
) -> Iterator[Array]:
    """Yield the ends of the intervals of some simulations at a time, `(2, count)`."""
    # Variance of one answer: of its item, which all seeds share, and of its noise.
    of_item, of_noise = EASE**2 / 3, 0.24 - EASE**2 / 3
    if scores == "paired":  # the same items are hard for both models
        of_item, of_noise = 0.0, 2 * of_noise
    per_item = sum(1 / items for items in TASKS) / len(TASKS) ** 2
    spread = np.sqrt(ratio * seeds * per_item * (of_item + of_noise / seeds))
    for start in range(0, simulations, _CHUNK):
        count = min(_CHUNK, simulations - start)
        shift = spread * generator.standard_normal((count, seeds, 1))
        tasks = []
        for items, mean in TASKS.items():
            chance = mean + generator.uniform(-EASE, EASE, (count, 1, items))
            if scores == "continuous":
                noise = np.sqrt(of_noise) * generator.standard_normal((count, seeds, items))
                tasks.append(chance + shift + noise)
                continue
            # Chances beyond 0 and 1 are as rare on both sides: the truth stays what it is.
            answers = (generator.random((count, seeds, items)) < chance + shift).astype(float)
            if scores == "paired":
                answers -= generator.random((count, seeds, items)) < chance
            tasks.append(answers)
        yield np.stack(estimate(tasks).interval())


def main(
    out: Annotated[Path | None, typer.Option(help="Folder to write coverage.csv to.")] = None,
    simulations: Annotated[int, typer.Option(min=1, help="Of each combination.")] = 10_000,
) -> None:
    """Write the table of coverage, and print it."""
    table = coverage(simulations)
    target = (out or project_root() / "data" / "results") / "coverage.csv"
    atomic_write(target, table.round(6).to_csv(index=False, lineterminator="\n"))
    shown = table.pivot_table(
        index=["scores", "seeds"], columns="seed_variance", values="coverage", sort=False
    )
    typer.echo(shown.round(4).to_string())


if __name__ == "__main__":
    typer.run(main)
