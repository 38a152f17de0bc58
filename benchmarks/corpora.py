"""Memory of the corpus stage: `python -m benchmarks.corpora 50 200` (megabytes of text).

Writes random text of Russian words, builds a corpus of it (filters, duplicates, held-out part) and packs that
with the embedded pair's tokenizer, each in a process of its own. Peak memory must not grow with the text.
"""

import json
import random
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from benchmarks.measuring import measured, show
from ruadapt.data_sets import read_texts
from ruadapt.files import project_root
from ruadapt.training.encoding import pack
from ruadapt.training.mixing import Source, write_mixed_corpus

WORDS = 200  # of a document: about 2.4 kilobytes


def write_text(file: Path, megabytes: int) -> None:
    """Write documents of random words of the embedded corpus, a tenth of them twice."""
    embedded = read_texts(project_root() / "data" / "world" / "corpus" / "ru_train.jsonl.gz")
    known = sorted({word for text in islice(embedded, 2_000) for word in text.split()})
    generator, written = random.Random(0), 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            text = " ".join(generator.choices(known, k=WORDS))
            for _ in range(1 + (generator.random() < 0.1)):
                written += len(text.encode())
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def build(folder: Path) -> None:
    """Build the Russian corpus."""
    write_mixed_corpus(
        [Source(str(folder / "text.jsonl"), "ru")],
        folder,
        characters={"ru": 0},
        heldout_documents=100,
        seed=0,
    )


def tokens(folder: Path) -> int:
    """Pack it, and read all blocks once."""
    tokenizer = AutoTokenizer.from_pretrained(project_root() / "data" / "pair" / "base")
    blocks = pack(read_texts(folder / "ru_train.jsonl"), tokenizer, 512, folder / "blocks.arrow")
    return sum(int(block["input_ids"][0] >= 0) for block in blocks)


def main(megabytes: Annotated[list[int], typer.Argument(help="Sizes of the text.")]) -> None:
    """Build and pack corpora of each size; print seconds and peak memory, libraries included."""
    for size in megabytes:
        with tempfile.TemporaryDirectory() as name:
            write_text(Path(name) / "text.jsonl", size)
            show(f"corpus of {size} MB", measured(partial(build, Path(name))))
            show(f"its tokens, {size} MB", measured(partial(tokens, Path(name))))


if __name__ == "__main__":
    typer.run(main)
