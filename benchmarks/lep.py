"""LEP from folders to a verified folder: `python -m benchmarks.lep NEW_TOKENIZER ORIGINAL_TOKENIZER FOLDER`.

Base and instruct models are made in FOLDER with random embeddings at full size, real tokenizers, and bodies
of full size that are holes in the files: reading them costs less than with a real model, writing costs the
same. Each step runs in a process of its own. Run it while the machine does nothing else.
"""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer

from benchmarks.measuring import measured, show
from ruadapt import checkpoints
from ruadapt.files import write_json
from ruadapt.vocab import conversion_matrix, load_tokenizer, special_ids

# Rows, hidden size, tied or not, bytes of the body beside the embeddings and in a shard of its own.
SHAPES = {
    "qwen2.5-3b": (151_936, 2_048, True, 3_300_000_000, 2_250_000_000),
    "llama-3-8b": (128_256, 4_096, False, 2_800_000_000, 11_160_000_000),
    "llama-3-70b": (128_256, 8_192, False, 400_000_000, 136_500_000_000),
}
CONDITION, DRIFT, RANK = 30.0, 0.05, 16
"""Condition number of the rows; what tuning changes, in part by a map of RANK that all rows share."""
BLOCK = 8_192


def make_model(folder: Path, tokenizer: Path, shape: str, drift: float) -> None:
    """Write a base, or with a drift its instruct model: two shards, their index, config and tokenizer."""
    height, width, tied, beside, alone = SHAPES[shape]
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": height}
    write_json(folder / "config.json", config | {"hidden_size": width, "tie_word_embeddings": tied})
    names = ["model.embed_tokens.weight", "lm_head.weight"][: 1 if tied else 2]
    first = dict.fromkeys(names, (height, width)) | {"model.beside": (beside // 2,)}
    second = {"model.body": (alone // 2,)}
    weight_map = {}
    for file, shapes in (("first.safetensors", first), ("second.safetensors", second)):
        header, end = {}, 0
        for name, each in shapes.items():
            begin, end = end, end + 2 * torch.Size(each).numel()
            header[name] = {"dtype": "BF16", "shape": each, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for seed in range(len(names) if shapes is first else 0):
                write_rows(stream, height, width, seed, drift)
            stream.truncate(8 + len(text) + end)  # the body is a hole
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_rows(stream: BinaryIO, height: int, width: int, seed: int, drift: float) -> None:
    """Write a random matrix in bfloat16 by blocks of rows; one seed gives related base and instruct rows."""
    scale = 0.02 * torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), width)
    maps = torch.randn(2, width, RANK, generator=torch.Generator().manual_seed(seed)) / RANK**0.5
    random = torch.Generator().manual_seed(seed + 1_000)
    for first in range(0, height, BLOCK):
        rows, noise = torch.randn(2, min(BLOCK, height - first), width, generator=random) * scale
        rows = rows + drift * (noise + rows @ maps[0] @ maps[1].T / width**0.5)
        stream.write(rows.bfloat16().view(torch.uint8).numpy())


def plain(base: Path, instruct: Path, adapted: Path, result: Path) -> dict[str, float]:
    """Conversion as a script would do it, for the input embeddings: one tokenizer call for each token, whole
    matrices in float64 and one dense least-squares solution.

    The calls count, but the rows are those of the conversion matrix, which is right about bytes, too: so the
    results can be compared.

    Returns:
        Seconds until the map is there, and the share of ordinary entries that equal those of `result`.
    """
    old, new = load_tokenizer(base), load_tokenizer(adapted)
    before, after = (checkpoints.read_embeddings(folder).input for folder in (base, instruct))
    transfer = conversion_matrix(new, old, len(before))
    started = time.perf_counter()
    for number in range(new.get_vocab_size()):
        old.encode(new.decode([number]), add_special_tokens=False)
    rows, targets = transfer @ before.double(), transfer @ after.double()
    special = [*special_ids(new).values()]
    rows[special], targets[special] = 0.0, 0.0
    weight = torch.linalg.lstsq(rows, targets).solution
    seconds = time.perf_counter() - started
    del rows, targets
    matrix, found = (checkpoints.read_embeddings(folder).input for folder in (adapted, result))
    ordinary = torch.ones(len(matrix), dtype=torch.bool)
    ordinary[special] = False
    equal = (matrix.double() @ weight).to(matrix.dtype) == found
    return {"fit": seconds, "equal_entries": float(equal[ordinary].double().mean())}


def main(
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    original: Annotated[Path, typer.Argument(help="Folder of the original's tokenizer.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the models.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen2.5-3b",
    method: Annotated[str, typer.Option(help="A method of `ruadapt lep`.")] = "conversion",
    device: Annotated[str, typer.Option(help="Where matrices are multiplied.")] = "cpu",
    compare_plain: Annotated[bool, typer.Option("--plain", help="Also the plain way.")] = False,
) -> None:
    """Time initialisation, LEP and their verification; print a line of JSON a step."""
    base, instruct, adapted, result = (folder / name for name in ("base", "instruct", "adapted", "result"))
    steps: dict[str, Callable[[], Any]] = {
        "make base": partial(make_model, base, original, shape, 0.0),
        "make instruct": partial(make_model, instruct, original, shape, DRIFT),
        "init": lambda: checkpoints.initialise(base, tokenizer, adapted) and None,
        "verify init": lambda: checkpoints.verify(adapted, base, kept="shared", reload=False) and None,
        "lep": lambda: checkpoints.propagate(base, instruct, adapted, result, method, device=device) and None,
        "verify lep": lambda: checkpoints.verify(result, instruct, reload=False) and None,
    }
    if compare_plain:
        steps["plain"] = partial(plain, base, instruct, adapted, result)
    for name, work in steps.items():
        show(name, measured(work))


if __name__ == "__main__":
    typer.run(main)
