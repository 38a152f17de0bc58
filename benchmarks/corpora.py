"""Memory of the corpus stage: `python -m benchmarks.corpora 50 200` (megabytes of text).

Writes random text of Russian words, builds a corpus of it (filters, duplicates, held-out part) and packs that
with the embedded pair's tokenizer, each in a process of its own. Peak memory must not grow with the text.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from benchmarks.measuring import measured
from ruadapt.files import project_root, read_texts, write_json
from ruadapt.training.mixing import Filters, Source, write_mixed_corpus
from ruadapt.training.packing import pack
from ruadapt.world import documents, load_world

WORDS = 200  # of a document: about 2.4 kilobytes


def write_text(file: Path, megabytes: int) -> None:
    """Write documents of random words of the world, a tenth of them twice."""
    world = documents(load_world(project_root() / "data" / "world"), "ru", "train", 0)
    known = sorted({word for _ in range(2_000) for word in next(world).split()})
    generator, written = random.Random(0), 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            text = " ".join(generator.choices(known, k=WORDS))
            for _ in range(1 + (generator.random() < 0.1)):
                written += len(text.encode())
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main(
    megabytes: Annotated[list[int], typer.Argument(help="Sizes of the text.")],
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Build and pack corpora of each size; print seconds and peak memory, libraries included."""
    numbers: dict[str, Any] = {}
    for size in megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_text(folder / "text.jsonl", size)

            def build(folder: Path = folder) -> None:
                write_mixed_corpus(
                    [Source("text.jsonl", "ru")],
                    folder,
                    "ru",
                    root=folder,
                    characters=0,
                    heldout_documents=100,
                    heldout_share=0.01,
                    filters=Filters(),
                    seed=0,
                )

            def tokens(folder: Path = folder) -> None:
                tokenizer = AutoTokenizer.from_pretrained(project_root() / "data" / "pair" / "base")
                blocks = pack(read_texts(folder / "ru_train.jsonl"), tokenizer, 512, folder / "blocks.arrow")
                started = time.perf_counter()
                read = sum(int(blocks[place]["input_ids"][0] >= 0) for place in range(0, len(blocks), 50))
                typer.echo(f"{read} blocks read in {time.perf_counter() - started:.1f} s")

            steps: dict[str, Callable[[], None]] = {"corpus": build, "pack": tokens}
            numbers[str(size)] = {step: measured(work) for step, work in steps.items()}
            for step, result in numbers[str(size)].items():
                line = "{} MB  {:<7} {seconds:7.1f} s {peak_gigabytes:6.2f} GB"
                typer.echo(line.format(size, step, **result))
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
