"""What the mathematics of LEP costs at the shapes of real models: `python -m ruadapt.benchmarks.lep`.

One matrix of random bfloat16 rows with a drift of 5 %; an extended vocabulary whose new tokens are made of
two to six of 5,000 old ones. Times are wall clock of this machine; run it while nothing else does.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import Tensor

from ruadapt import lep
from ruadapt.errors import RuadaptError
from ruadapt.files import write_json

# Old rows, new rows, hidden size.
SHAPES = {"qwen2.5-3b": (151_936, 194_615, 2_048), "llama-3-8b": (128_256, 171_206, 4_096)}
# Condition number of the random rows.
CONDITION = 30.0
PIECES, PIECES_OF_A_TOKEN = 5_000, (2, 7)


def random_inputs(old: int, new: int, width: int) -> tuple[lep.LepInputs, Tensor]:
    """Return inputs of these sizes, the first 200 tokens special, and pieces `[old, old]` for the report."""
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), width)
    mapping = torch.randn(width, width, generator=random) * 0.03 / width**0.5
    matrices = [torch.empty(rows, width, dtype=torch.bfloat16) for rows in (old, old, new)]
    sizes = torch.randint(*PIECES_OF_A_TOKEN, (new - old,), generator=random)
    made = torch.repeat_interleave(torch.arange(old, new), sizes)
    pieces = torch.randint(300, 300 + PIECES, (len(made),), generator=random)
    kept = torch.arange(old)
    transfer = torch.sparse_coo_tensor(
        torch.stack([torch.cat([kept, made]), torch.cat([kept, pieces])]),
        torch.cat([torch.ones(old), 1 / torch.repeat_interleave(sizes, sizes)]).double(),
        (new, old),
        check_invariants=True,
    ).coalesce()
    base, instruct, adapted = matrices
    for block in torch.arange(old).split(8192):
        rows = torch.randn(len(block), width, generator=random) * scale
        base[block] = rows.bfloat16()
        noise = torch.randn(len(block), width, generator=random) * scale
        instruct[block] = (base[block].float() + rows @ mapping + 0.04 * noise).bfloat16()
    adapted[:] = lep.initialise(base, transfer)
    for block in torch.arange(new).split(8192):
        adapted[block] += torch.randn(len(block), width, generator=random).mul(0.1 * scale).bfloat16()
    special = torch.arange(200)
    mask, ordinary = torch.ones(new, dtype=torch.bool), torch.ones(old, dtype=torch.bool)
    mask[special] = ordinary[special] = False
    inputs = lep.LepInputs(
        base, instruct, adapted, transfer, kept[200:], kept[200:], mask, ordinary, special, instruct[:200]
    )
    halves = torch.randint(300, old, (2, old), generator=random)
    merged = torch.sparse_coo_tensor(
        torch.stack([kept.repeat(2), halves.flatten()]),
        torch.full((2 * old,), 0.5, dtype=torch.float64),
        (old, old),
        check_invariants=True,
    )
    return inputs, merged.coalesce()


class Meter:
    """Times phases and the most memory that each took beyond what lay there before the first."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self.process.memory_info().rss
        self.phases: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any], flops: float = 0.0) -> Any:
        peak, done = [self.start], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                peak.append(self.process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started, used = time.perf_counter(), time.process_time()
        try:
            result = work()
        finally:
            seconds = time.perf_counter() - started
            done.set()
            watcher.join()
        self.phases[name] = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - used,
            "gigabytes": (max(peak) - self.start) / 1e9,
            "flops": flops,
        }
        return result


def measured_peak(dtype: torch.dtype, size: int) -> float:
    """Return multiplications and additions per second of a square product, the best of three."""
    matrix = torch.randn(size, size, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def plain(inputs: lep.LepInputs) -> tuple[Tensor, Tensor]:
    """Conversion as a script would do it: whole matrices in float64 and one dense least-squares solution."""
    base, instruct = inputs.base.double(), inputs.instruct.double()
    rows = (inputs.transfer @ base)[inputs.fit_mask]
    targets = (inputs.transfer @ instruct)[inputs.fit_mask]
    del base, instruct
    weight = torch.linalg.lstsq(rows, targets).solution
    del rows, targets
    result = (inputs.adapted.double() @ weight).to(inputs.adapted.dtype)
    result[inputs.copied_new] = inputs.copied_rows
    return weight, result


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    method: Annotated[str, typer.Option(help=f"One of {', '.join(lep.METHODS)}.")] = "conversion",
    compare_plain: Annotated[
        bool, typer.Option("--plain", help="Also the plain way (20 GB), and the difference.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Print seconds, work, share of the measured peak and memory of each phase."""
    lep.require_known(method)
    if shape not in SHAPES:
        raise RuadaptError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    old, new, width = SHAPES[shape]
    inputs, pieces = random_inputs(old, new, width)
    peak = measured_peak(torch.float32, width)
    meter, square = Meter(), width**2
    fitter = meter("prepare", lambda: lep.Fitter(inputs))
    # The gram is symmetric: half of its products are enough.
    fit = meter("fit", lambda: fitter.fit(method), 3 * old * square)
    rows = meter("apply", lambda: lep.propagate(fit, inputs), 2 * new * square)
    report = meter("report", lambda: lep.fit_report(fitter, method, fit, pieces), 2 * 20_000 * square)
    phases = meter.phases
    numbers: dict[str, Any] = {
        "shape": shape,
        "rows": [old, new, width],
        "method": method,
        "threads": torch.get_num_threads(),
        "peak_gflops_float32": peak / 1e9,
        "phases": phases,
        "fit": fit.facts,
        "explained": report["explained"],
        "fit_and_apply_seconds": sum(phases[name]["seconds"] for name in ("prepare", "fit", "apply")),
    }
    if compare_plain:
        weight, expected = meter("plain", lambda: plain(inputs))
        numbers["plain_over_fit_and_apply"] = phases["plain"]["seconds"] / numbers["fit_and_apply_seconds"]
        if method == "conversion" and fit.change is not None:
            found = fit.change + torch.eye(width, dtype=torch.float64)
            numbers["relative_error_of_w"] = float((found - weight).norm() / weight.norm())
            numbers["equal_entries"] = float((rows == expected).double().mean())
    typer.echo(f"{shape}: {old:,} old rows, {new:,} new ones, {width:,} wide; {method}")
    typer.echo(f"float32 products: {peak / 1e9:.0f} GFLOP/s measured, {torch.get_num_threads()} threads")
    for name, phase in phases.items():
        share = phase["flops"] / phase["seconds"] / peak
        typer.echo(
            f"    {name:<8} {phase['seconds']:7.2f} s, {phase['cpu_seconds']:7.2f} s of cores"
            f"   {phase['gigabytes']:5.2f} GB above the inputs"
            + (f"   {phase['flops'] / 1e12:5.2f} TFLOP, {share:.0%} of peak" if share else "")
        )
    for key, value in numbers.items():
        if key not in ("phases", "shape", "rows", "method", "threads", "peak_gflops_float32"):
            typer.echo(f"    {key:<26} {value}")
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
