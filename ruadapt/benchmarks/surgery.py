"""Surgery on folders of true shapes: `python -m ruadapt.benchmarks.surgery NEW_TOKENIZER ORIGINAL`.

Base and instruct folders are made with random embeddings at full size. Their bodies are zero bytes in two
shards, of full size, which take no place on the disk until they are copied: reading them costs less than with
a real model, writing costs the same. Each step runs in a process of its own, whose peak memory is printed.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ruadapt import checkpoints, patches
from ruadapt.errors import RuadaptError
from ruadapt.files import require_new_folder, write_json
from ruadapt.model_folders import INDEX
from ruadapt.tensor_files import Blocks, RowFunction, write_tensors

# Rows, hidden size, tied or not, bytes of the body beside the embeddings and in shards of its own.
SHAPES = {
    "qwen2.5-3b": (151_936, 2_048, True, 3_300_000_000, 2_250_000_000),
    "llama-3-8b": (128_256, 4_096, False, 2_800_000_000, 11_160_000_000),
    "llama-3-70b": (128_256, 8_192, False, 400_000_000, 136_500_000_000),
}
DRIFT = 0.05
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def random_rows(width: int, seed: int, drift: float) -> RowFunction:
    """Rows of one seed: those of a base, or with a drift those of its instruct model."""

    def rows(first: int, last: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(seed + first)
        block = torch.randn(last - first, width, generator=random) * 0.02
        return block + drift * 0.02 * torch.randn(last - first, width, generator=random)

    return rows


def make_model(folder: Path, original: Path, shape: str, drift: float) -> None:
    """Write a model folder: config, the original's tokenizer, two shards and their index."""
    height, width, tied, beside, alone = SHAPES[shape]
    folder.mkdir(parents=True)
    shutil.copyfile(original / "tokenizer.json", folder / "tokenizer.json")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": height}
    write_json(folder / "config.json", config | {"hidden_size": width, "tie_word_embeddings": tied})
    names = NAMES[: 1 if tied else 2]
    parts = {
        name: Blocks("BF16", (height, width), random_rows(width, seed * 10**9, drift))
        for seed, name in enumerate(names)
    }
    weight_map = dict.fromkeys([*names, "model.beside"], "first.safetensors") | {
        "model.body": "second.safetensors"
    }
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_tensors(folder / "first.safetensors", parts, {})
    _add_zeros(folder / "first.safetensors", "model.beside", beside)
    write_tensors(folder / "second.safetensors", {}, {})
    _add_zeros(folder / "second.safetensors", "model.body", alone)


def _add_zeros(path: Path, name: str, size: int) -> None:
    """Put a tensor of zeros behind the others, as a hole in the file."""
    content = path.open("rb")
    length = int.from_bytes(content.read(8), "little")
    header = json.loads(content.read(length))
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    with path.with_suffix(".part").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(content, stream, 1 << 24)
        stream.truncate(stream.tell() + size)
    path.with_suffix(".part").rename(path)


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Run in a child of this process; return its seconds and peak memory, libraries included."""
    started = time.perf_counter()
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuadaptError("a step failed; its message is above")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - started, "peak_gigabytes": usage.ru_maxrss * unit / 1e9}


def main(
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    original: Annotated[Path, typer.Argument(help="Folder of the original's tokenizer.")],
    folder: Annotated[Path, typer.Option(help="New folder for the models.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    method: Annotated[str, typer.Option(help="A method of LEP; none to leave that step out.")] = "conversion",
    link: Annotated[bool, typer.Option("--link", help="Share shards without embeddings.")] = False,
    patch: Annotated[bool, typer.Option("--patch", help="Also make and apply a patch.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Time init, LEP, verification and patches from folders to finished folders."""
    require_new_folder(folder)
    base, instruct, adapted, result = (folder / name for name in ("base", "instruct", "adapted", "result"))
    steps: dict[str, Callable[[], Any]] = {
        "make base": lambda: make_model(base, original, shape, 0.0),
        "make instruct": lambda: make_model(instruct, original, shape, DRIFT),
        "init": lambda: checkpoints.initialise(base, tokenizer, adapted, link=link),
        "verify init": lambda: checkpoints.verify(adapted, base, kept="shared", reload=False),
    }
    if method != "none":
        steps["lep"] = lambda: checkpoints.propagate(base, instruct, adapted, result, method)
        steps["verify lep"] = lambda: checkpoints.verify(result, instruct, reload=False)
    if patch:
        steps["patch make"] = lambda: patches.make(base, adapted, folder / "patch")
        steps["patch apply"] = lambda: patches.apply(folder / "patch", base, folder / "applied", link=link)
    numbers: dict[str, Any] = {"shape": shape, "threads": torch.get_num_threads()}
    for name, work in steps.items():
        numbers[name] = measured(work)
        typer.echo("{:<14} {seconds:7.1f} s {peak_gigabytes:6.2f} GB".format(name, **numbers[name]))
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
