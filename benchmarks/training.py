"""What training costs: `python -m benchmarks.training`, on a CPU or with `--device cuda`.

The chunked loss against torch's plain one, in values, gradients, time and peak memory; and training of the
embeddings alone against that of all weights, in turn, on one random model. Every measurement has a process
of its own. Numbers to reach: a quarter of the plain loss's memory with gradients equal to 1e-5; embeddings
alone at 1.35 times the tokens per second and 0.6 times the peak memory. Needs no network and no data sets.
"""

import gc
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaConfig

from benchmarks.measuring import measured
from ruadapt.files import write_json
from ruadapt.training.losses import chunked_cross_entropy
from ruadapt.training.packing import collate_blocks
from ruadapt.training.trainable import TrainingOptions, add_adapters
from ruadapt.training.trainer import fit, load_for_training

# hidden size, layers, heads, key-value heads, intermediate size, rows, tied. The first is the embedded pair's
# architecture widened, with a body four times its embeddings, as real models have it.
SHAPES = {
    "wide": (512, 44, 8, 4, 4_096, 150_000, True),
    "shallow": (512, 4, 8, 4, 1_280, 150_000, True),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4_864, 194_615, True),
    "qwen2.5-3b": (2_048, 36, 16, 2, 11_008, 194_615, True),
}
MODES = ("all", "embeddings", "new_rows")


def apart(work: Callable[..., dict[str, Any]], device: str, *arguments: Any) -> dict[str, Any]:
    """Run in a process of its own; return its result with its peak memory, the GPU's where one is used."""
    found = measured(lambda: work(device, *arguments))
    where = "device_gigabytes" if device == "cuda" else "peak_gigabytes"
    result: dict[str, Any] = found["result"]
    return result | {"peak_gigabytes": found[where]}


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def loss(device: str, chunked: bool, tokens: int, rows: int, width: int, target: Path) -> dict[str, Any]:
    """Take the loss and its gradients once in float32, and keep them in the file `target`."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).to(device).requires_grad_()
    weight = (torch.randn(rows, width, generator=random) * 0.02).to(device).requires_grad_()
    labels = torch.randint(0, rows, (tokens,), generator=random).to(device)
    held, started = _peak(device), _now(device)
    if chunked:
        value = chunked_cross_entropy(hidden, weight, labels)
    else:
        value = functional.cross_entropy(hidden @ weight.T, labels)
    value.backward()
    seconds, peak = _now(device) - started, _peak(device)
    parts = {"value": value, "hidden": hidden.grad, "weight": weight.grad}
    save_file({name: part.detach().cpu() for name, part in parts.items() if part is not None}, target)
    return {"seconds": seconds, "gigabytes": peak - held}


def compare_losses(device: str, tokens: int, rows: int, width: int) -> dict[str, Any]:
    """Measure both losses; `differences` are relative ones of the value and of both gradients."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("plain", "chunked")}
        numbers = {
            name: apart(loss, device, name == "chunked", tokens, rows, width, file)
            for name, file in files.items()
        }
        # Apart, too: a process that has computed on several threads can't be forked any more.
        differences = measured(lambda: _differences(*files.values()))["result"]
    ratio = numbers["chunked"]["gigabytes"] / numbers["plain"]["gigabytes"]
    return numbers | {"memory_ratio": ratio, "differences": differences}


def _differences(plain: Path, chunked: Path) -> list[float]:
    expected, found = load_file(plain), load_file(chunked)
    return [float((expected[name] - found[name]).norm() / expected[name].norm()) for name in expected]


def train(
    device: str, mode: str, shape: str, batch: int, block: int, steps: int, chunked: bool
) -> dict[str, Any]:
    """Train a random model for `steps`; the first is not timed."""
    width, layers, heads, pairs, between, rows, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        intermediate_size=between,
        tie_word_embeddings=tied,
    )
    network: Any
    network, _ = load_for_training(config, seed=0)
    with torch.no_grad():  # as if from a bfloat16 checkpoint
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16())
    gc.collect()
    what: Any = mode
    options = TrainingOptions(
        steps=steps, batch_size=batch, train=what, evaluate_every=1, chunked_loss=chunked, log_every=1
    )
    if mode == "new_rows":
        network = add_adapters(network, options, range(rows - rows // 4, rows))
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, rows, (batch * steps, block), generator=random).numpy()
    data: Any = [{"input_ids": ids} for ids in blocks]
    report = fit(
        network,
        data,
        collate_blocks,
        options,
        evaluate=lambda model, step: {"time": _now(device)},
        tokens_per_sequence=block,
        dtype=torch.bfloat16,
    )
    times = [row["time"] for row in report["evaluations"]]
    return {
        "tokens_per_second": batch * block * (steps - 1) / (times[-1] - times[1]),
        "parameters": report["parameters"],
        "trained_parameters": report["trained_parameters"],
        "bf16": report["bf16"],
        "loss": report["loss"][-1]["loss"],
    }


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[
        str, typer.Option(help=f"One of {', '.join(SHAPES)}; none leaves training out.")
    ] = "wide",
    modes: Annotated[str, typer.Option(help=f"Some of {','.join(MODES)}.")] = "all,embeddings",
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps; the first is not timed.")] = 4,
    rounds: Annotated[int, typer.Option(help="Measurements of each mode, in turn.")] = 3,
    chunked: Annotated[bool, typer.Option(help="Take the loss of training in chunks.")] = True,
    tokens: Annotated[int, typer.Option(help="Tokens of the loss; 0 leaves it out.")] = 4_096,
    rows: Annotated[int, typer.Option(help="Rows of the loss.")] = 200_000,
    width: Annotated[int, typer.Option(help="Hidden size of the loss.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Measure and print; the ratios are medians over the rounds."""
    numbers: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "shape": shape}
    if tokens:
        numbers["loss"] = found = compare_losses(device, tokens, rows, width)
        for name in ("plain", "chunked"):
            typer.echo("{:<11} loss {seconds:8.2f} s {gigabytes:7.2f} GB".format(name, **found[name]))
        worst = max(found["differences"])
        typer.echo(f"memory × {found['memory_ratio']:.3f}, relative differences at most {worst:.1e}")
    if shape != "none":
        wanted = modes.split(",")
        taken: dict[str, list[dict[str, Any]]] = {mode: [] for mode in wanted}
        for _ in range(rounds):
            for mode in wanted:
                result = apart(train, device, mode, shape, batch, block, steps, chunked)
                taken[mode].append(result)
                line = "{:<11} {tokens_per_second:9.1f} tokens/s {peak_gigabytes:7.2f} GB"
                typer.echo(line.format(mode, **result))
        numbers["training"] = taken
        for mode in wanted[1:]:
            ratios = {
                name: sorted(
                    own[name] / full[name] for own, full in zip(taken[mode], taken[wanted[0]], strict=True)
                )[rounds // 2]
                for name in ("tokens_per_second", "peak_gigabytes")
            }
            numbers[f"{mode}_to_{wanted[0]}"] = ratios
            typer.echo(
                f"{mode} to {wanted[0]}: tokens/s × {ratios['tokens_per_second']:.2f}, "
                f"peak memory × {ratios['peak_gigabytes']:.2f}"
            )
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
