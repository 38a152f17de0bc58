"""What the vocabulary engine promises for real tokenizers, in one run: `python -m ruadapt.benchmarks.vocab`.

For every original: extend it, certify the result, send random Unicode through it, map it to the original.
Needs `RUADAPT_REFERENCE`. Times are wall clock of this machine; run it while nothing else does.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ruadapt import vocab
from ruadapt.errors import RuadaptError
from ruadapt.files import read_texts, write_json
from ruadapt.vocab.measure import changed_texts

ORIGINALS = ("qwen2.5", "llama-3", "mistral-nemo", "llama-2", "mistral-7b-v0.1", "gemma")
# Code points are drawn from these ranges in turn, so that rare planes don't crowd out what people write.
RANGES = (
    (0x20, 0x7F),
    (0x00, 0x20),
    (0x400, 0x530),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x590, 0x1100),
    (0x2000, 0x2C00),
    (0x3040, 0xA000),
    (0xAC00, 0xD7A4),
    (0xE000, 0x10000),
    (0x1F000, 0x1FB00),
    (0x10000, 0x110000),
)
_CHUNK = 20_000


def random_texts(count: int, seed: int) -> list[str]:
    """Return strings of 1 to 24 random code points (no surrogates), the same for one seed."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 25, count)
    low, high = np.array(RANGES)[draw.integers(0, len(RANGES), lengths.sum())].T
    letters = iter(map(chr, draw.integers(low, high).tolist()))
    return ["".join(islice(letters, length)) for length in lengths.tolist()]


def examine(
    original: Path, texts: list[str], heldout: dict[str, list[str]], added_rows: int, random: int
) -> dict[str, Any]:
    """Return one original's numbers; `heldout` is {name: lines} with the languages in the names."""
    started = time.perf_counter()
    new = vocab.extend(original, texts, added_rows)
    extend_seconds = time.perf_counter() - started
    old = vocab.load_tokenizer(original)
    with tempfile.TemporaryDirectory() as folder:
        vocab.save_tokenizer(folder, new, original)
        report = vocab.certify(folder, original, heldout, added_rows=added_rows, extended=True)
    mapped = []
    for _ in range(3):
        started = time.perf_counter()
        vocab.conversion_matrix(new, old)
        mapped.append(time.perf_counter() - started)
    strings = random_texts(random, seed=0)
    lost = [
        text
        for start in range(0, len(strings), _CHUNK)
        for text in changed_texts(new, strings[start : start + _CHUNK])
    ]
    speed = report["times"]["characters_per_second"]
    return {
        "rows": report["rows"]["new"],
        "extend, s": extend_seconds,
        "guarantees": "hold" if report["passed"] else "FAIL",
        "failed": [row for row in report["guarantees"] if row["promised"] and not row["holds"]],
        "random strings kept": f"{random - len(lost):,} of {random:,}",
        "lost": lost[:5],
        "matrix, s": min(mapped),
        "load per row": report["times"]["load_seconds"]["ratio_per_row"],
        **{f"{name} speed": values["ratio"] for name, values in speed.items() if "ru" in name.split("_")},
        **{f"{name} ch/token": values["new"] for name, values in report["texts"].items()},
    }


def main(
    added_rows: Annotated[int, typer.Option(help="Rows to add to each original.")] = 42_950,
    characters: Annotated[int, typer.Option(help="Characters of training text; 0 takes all.")] = 0,
    random: Annotated[int, typer.Option(help="Random strings for each original.")] = 200_000,
    original: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Print the numbers of every original, one block each."""
    reference = vocab.reference_folder()
    if reference is None:
        raise RuadaptError("no reference tokenizers; set RUADAPT_REFERENCE to their folder")
    texts: list[str] = []
    for path in sorted((reference / "text").glob("train_ru_*")):
        texts += read_texts(path)
    if characters:
        share = characters / sum(map(len, texts))
        texts = texts[:: max(1, round(1 / share))]
    heldout = {
        path.stem.removeprefix("heldout_"): list(read_texts(path))
        for path in sorted((reference / "text").glob("heldout_*.txt"))
    }
    numbers: dict[str, Any] = {}
    for name in original or ORIGINALS:
        numbers[name] = examine(reference / "tokenizers" / name, texts, heldout, added_rows, random)
        typer.echo(name)
        for key, value in numbers[name].items():
            if value != []:
                typer.echo(f"    {key:<26} {f'{value:.3f}' if isinstance(value, float) else value}")
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
