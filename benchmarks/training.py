"""What training costs, on a CPU or the GPU that is there: `python -m benchmarks.training`.

trl's loss in tiles against torch's plain one, in values, gradients, time and peak memory; and training of the
embeddings alone against that of all weights, on one random model. Every measurement
has a process of its own. Numbers to reach: a quarter of the plain loss's memory with gradients equal to 1e-5;
embeddings alone at 1.35 times the tokens per second and 0.6 times the peak memory.
"""

import resource
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.kernels import ChunkedLogProbFunction

from benchmarks.measuring import UNIT, measured, show
from ruadapt.files import project_root
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import fit

# hidden size, layers, heads, key-value heads, intermediate size, rows. The first is the embedded pair's
# architecture widened, with a body four times its embeddings, as real models have it.
SHAPES = {
    "wide": (512, 44, 8, 4, 4_096, 150_000),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4_864, 194_615),
    "qwen2.5-3b": (2_048, 36, 16, 2, 11_008, 194_615),
}


def loss(chunked: bool, tokens: int, rows: int, width: int, target: Path) -> dict[str, float]:
    """Take the loss and its gradients once in float32, and keep them in the file `target`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).to(device).requires_grad_()
    weight = (torch.randn(rows, width, generator=random) * 0.02).to(device).requires_grad_()
    labels = torch.randint(0, rows, (tokens,), generator=random).to(device)

    def peak() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9

    held, started = peak(), time.perf_counter()
    if chunked:
        head = (hidden, weight, None, labels, 1.0, 32_768, None, 1.0, ("log_probs",))  # as its fused head
        value = -ChunkedLogProbFunction.apply(*head)[0].mean()
    else:
        value = functional.cross_entropy(hidden @ weight.T, labels)
    gradients = torch.autograd.grad(value, (hidden, weight))
    numbers = {"gigabytes": peak() - held, "seconds": time.perf_counter() - started}
    parts = dict(zip(("value", "hidden", "weight"), (value.detach(), *gradients), strict=True))
    save_file({name: part.cpu() for name, part in parts.items()}, target)
    return numbers


def differences(plain: Path, chunked: Path) -> dict[str, float]:
    """Return relative differences of the value and of both gradients."""
    expected, found = load_file(plain), load_file(chunked)
    return {name: float((part - found[name]).norm() / part.norm()) for name, part in expected.items()}


def train(mode: Any, shape: str, batch: int, block: int, steps: int) -> dict[str, float]:
    """Train a random bfloat16 model on random ids; the seconds are those of the steps."""
    width, layers, heads, pairs, between, rows = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        intermediate_size=between,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2_000, (batch * steps, block), generator=random)  # the pair's tokenizer has more
    blocks = Dataset.from_dict({"input_ids": ids.numpy()}).with_format("numpy")
    options = TrainingOptions(steps=steps, batch_size=batch, train=mode)
    with tempfile.TemporaryDirectory() as name:
        start = Path(name) / "start"
        AutoModelForCausalLM.from_config(config).save_pretrained(start)
        for path in (project_root() / "data" / "pair" / "base").glob("token*"):
            shutil.copyfile(path, start / path.name)
        report = fit(start, blocks, Path(name) / "model", options)
    kept = {name: report[name] for name in ("parameters", "trained_parameters", "bf16")}
    return kept | {"tokens_per_second": report["tokens"] / report["seconds"]}


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}; none: no training.")] = "wide",
    modes: Annotated[str, typer.Option(help="all, embeddings, or both.")] = "all,embeddings",
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measurements of each mode, in turn.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of the loss; 0 leaves it out.")] = 4_096,
    rows: Annotated[int, typer.Option(help="Rows of the loss.")] = 200_000,
    width: Annotated[int, typer.Option(help="Hidden size of the loss.")] = 256,
) -> None:
    """Measure, and print a line of JSON a measurement."""
    with tempfile.TemporaryDirectory() as folder:
        plain, chunked = Path(folder) / "plain", Path(folder) / "chunked"
        if tokens:
            show("plain loss", measured(partial(loss, False, tokens, rows, width, plain)))
            show("chunked loss", measured(partial(loss, True, tokens, rows, width, chunked)))
            show("relative differences", measured(partial(differences, plain, chunked)))
    for _ in range(rounds if shape != "none" else 0):
        for mode in modes.split(","):
            show(mode, measured(partial(train, mode, shape, batch, block, steps)))


if __name__ == "__main__":
    typer.run(main)
