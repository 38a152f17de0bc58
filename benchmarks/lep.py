"""LEP from folders to a finished, verified folder: `python -m benchmarks.lep NEW_TOKENIZER ORIGINAL`.

Base and instruct folders are made with random embeddings at full size, real tokenizers, and bodies of full
size that are holes in the files: reading them costs less than with a real model, writing costs the same. Each
step runs in a process of its own, whose peak memory, mapped files included, is printed. Run it while the
machine does nothing else.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.measuring import measured
from ruadapt import checkpoints, lep
from ruadapt.checkpoints import patches
from ruadapt.checkpoints.model_folders import INDEX, read_embeddings
from ruadapt.checkpoints.tensor_files import Blocks, RowFunction, parse_header, raw_header, write_tensors
from ruadapt.files import require_new_folder, write_json
from ruadapt.vocab import conversion_matrix, load_tokenizer, special_ids

# Rows, hidden size, tied or not, bytes of the body beside the embeddings and in a shard of its own.
SHAPES = {
    "qwen2.5-3b": (151_936, 2_048, True, 3_300_000_000, 2_250_000_000),
    "llama-3-8b": (128_256, 4_096, False, 2_800_000_000, 11_160_000_000),
    "llama-3-70b": (128_256, 8_192, False, 400_000_000, 136_500_000_000),
}
# Condition number of the rows; what fine-tuning changes, in part by a map of RANK that all rows share.
CONDITION, DRIFT, RANK = 30.0, 0.05, 16
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def random_rows(width: int, seed: int, drift: float) -> RowFunction:
    """Rows of one seed: those of a base, or with a drift those of its instruct model."""
    scale = 0.02 * torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), width)
    maps = torch.randn(2, width, RANK, generator=torch.Generator().manual_seed(seed)) / RANK**0.5

    def rows(first: int, last: int) -> Tensor:
        random = torch.Generator().manual_seed(seed + first + 1)
        block = torch.randn(last - first, width, generator=random) * scale
        noise = torch.randn(last - first, width, generator=random) * scale
        return block + drift * (noise + block @ maps[0] @ maps[1].T / width**0.5)

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
    raw = raw_header(path)
    header = json.loads(raw[8:])
    end = sum(tensor.size for tensor in parse_header(raw, path)[0].values())
    header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    with path.open("rb") as content, path.with_suffix(".part").open("wb") as stream:
        content.seek(len(raw))
        stream.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(content, stream, 1 << 24)
        stream.truncate(stream.tell() + size)
    path.with_suffix(".part").rename(path)


def plain(base: Path, instruct: Path, adapted: Path) -> tuple[Tensor, float]:
    """Conversion as a script would do it, for the input embeddings: one tokenizer call for each token, whole
    matrices in float64 and one dense least-squares solution.

    The calls count, but the rows are those of the conversion matrix, which is right about bytes, too: so the
    results can be compared.

    Returns:
        The instruct model's new rows, special ones not put back, and the seconds until the map was there.
    """
    old, new = load_tokenizer(base), load_tokenizer(adapted)
    before, after = (read_embeddings(folder).input for folder in (base, instruct))
    transfer = conversion_matrix(new, old, len(before))
    started = time.perf_counter()
    for number in range(new.get_vocab_size()):
        old.encode(new.decode([number]), add_special_tokens=False)
    rows, targets = transfer @ before.double(), transfer @ after.double()
    special = torch.tensor([*special_ids(new).values()])
    rows[special], targets[special] = 0.0, 0.0
    weight = torch.linalg.lstsq(rows, targets).solution
    seconds = time.perf_counter() - started
    del rows, targets
    matrix = read_embeddings(adapted).input
    return (matrix.double() @ weight).to(matrix.dtype), seconds


def product_rate(device: str, size: int) -> float:
    """Return multiplications and additions per second of a square float32 product, the best of three."""
    matrix = torch.randn(size, size, device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def copy_rate(source: Path, target: Path) -> float:
    """Return bytes per second of copying a file inside the system, as a body is copied."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    seconds = time.perf_counter() - started
    target.unlink()
    return source.stat().st_size / seconds


def _bytes_written(folder: Path) -> int:
    files = [path.stat() for path in folder.glob("*.safetensors")]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def _lep(
    base: Path, instruct: Path, adapted: Path, result: Path, method: str, device: str, link: bool
) -> dict[str, float]:
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    checkpoints.propagate(base, instruct, adapted, result, method, device=device, link=link, seconds=seconds)
    seconds["all but verify"] = time.perf_counter() - started
    checkpoints.verify(result, instruct, reload=False)
    return seconds


def _plain(base: Path, instruct: Path, adapted: Path, result: Path) -> dict[str, float]:
    rows, seconds = plain(base, instruct, adapted)
    found = read_embeddings(result).input
    ordinary = torch.ones(len(rows), dtype=torch.bool)
    ordinary[list(special_ids(load_tokenizer(adapted)).values())] = False
    return {"fit": seconds, "equal_entries": float((rows == found)[ordinary].double().mean())}


def main(
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    original: Annotated[Path, typer.Argument(help="Folder of the original's tokenizer.")],
    folder: Annotated[Path, typer.Option(help="New folder for the models.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    method: Annotated[str, typer.Option(help=f"{lep.AUTO}, {', '.join(lep.METHODS)}.")] = "conversion",
    device: Annotated[str, typer.Option(help="Where matrices are multiplied.")] = "cpu",
    link: Annotated[bool, typer.Option("--link", help="Share shards without embeddings.")] = False,
    patch: Annotated[bool, typer.Option("--patch", help="Also make and apply a patch.")] = False,
    compare_plain: Annotated[
        bool, typer.Option("--plain", help="Also the plain way, and the difference.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Time init, LEP with its verification, patches and the plain way, beside what the machine can do."""
    lep.require_known(method, lep.AUTO)
    require_new_folder(folder)
    base, instruct, adapted, result = (folder / name for name in ("base", "instruct", "adapted", "result"))
    steps: dict[str, Callable[[], Any]] = {
        "make base": lambda: make_model(base, original, shape, 0.0),
        "make instruct": lambda: make_model(instruct, original, shape, DRIFT),
        "product rate": lambda: product_rate(device, SHAPES[shape][1]),
        "init": lambda: checkpoints.initialise(base, tokenizer, adapted, link=link) and None,
        "verify init": lambda: checkpoints.verify(adapted, base, kept="shared", reload=False) and None,
        "copy rate": lambda: copy_rate(adapted / "first.safetensors", folder / "copy"),
        "lep and verify": lambda: _lep(base, instruct, adapted, result, method, device, link),
    }
    if compare_plain:
        steps["plain"] = lambda: _plain(base, instruct, adapted, result)
    if patch:
        steps["patch make"] = lambda: patches.make(base, adapted, folder / "patch") and None
        steps["patch apply"] = lambda: (
            patches.apply(folder / "patch", base, folder / "applied", link=link) and None
        )
    numbers: dict[str, Any] = {"shape": shape, "method": method, "threads": torch.get_num_threads()}
    # In a child, too: a process that has used a GPU cannot fork.
    numbers["device"] = measured(lambda: _device_name(device))["result"]
    for name, work in steps.items():
        numbers[name] = measured(work)
        typer.echo("{:<14} {seconds:7.1f} s {peak_gigabytes:6.2f} GB".format(name, **numbers[name]))
    numbers |= _shares(numbers, SHAPES[shape], adapted, result)
    for key in [key for key, value in numbers.items() if not isinstance(value, dict)]:
        typer.echo(f"    {key:<26} {numbers[key]}")
    typer.echo(json.dumps(numbers["lep and verify"], indent=2))
    if out is not None:
        write_json(out, numbers)


def _device_name(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def _shares(
    numbers: dict[str, Any], shape: tuple[int, int, bool, int, int], adapted: Path, result: Path
) -> dict[str, float]:
    """Work and bytes of the LEP step, and its time beside the least that they take at the measured rates."""
    height, width, tied, _, _ = shape
    new = read_embeddings(adapted).input.shape[0]
    # The gram is symmetric: half of its products are enough.
    flops = (3 * height + 2 * new) * width**2 * (1 if tied else 2)
    written = _bytes_written(result)
    rates = {name: numbers[f"{name} rate"]["result"] for name in ("product", "copy")}
    least = flops / rates["product"] + written / rates["copy"]
    seconds = numbers["lep and verify"]["seconds"]
    found = {
        "gigaflops_per_second": rates["product"] / 1e9,
        "copied_megabytes_per_second": rates["copy"] / 1e6,
        "teraflops": flops / 1e12,
        "gigabytes_written": written / 1e9,
        "least_seconds": least,
        "over_least": seconds / least,
    }
    if "plain" in numbers:
        found["plain_fit_over_lep"] = numbers["plain"]["result"]["fit"] / seconds
        found["equal_entries"] = numbers["plain"]["result"]["equal_entries"]
    return found


if __name__ == "__main__":
    typer.run(main)
