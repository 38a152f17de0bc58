"""A budget of rows, shared out between tokens that stay and tokens that are new.

`vocab.optimize` builds each vocabulary from the texts of `RUADAPT_REFERENCE` and `benchmarks.code`, as a run
of a real model does, from text alone and with a donor beside it. All have the same number of rows, so a model
has the same number of parameters with any of them.

    python -m benchmarks.kept_rows data/results/kept_rows.csv --model gemma --rows 73600
"""

import os
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from tqdm import tqdm

from benchmarks import code
from benchmarks.vocab import DONORS, characters_per_token
from ruadapt import vocab
from ruadapt.data_sets import read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, take_characters, write_json
from ruadapt.reporting.provenance import versions

NEW = (8_000, 16_000, 24_000, 32_000, 40_000)


def main(
    out: Annotated[Path, typer.Argument(help="The table; a .json of what it came from lies beside it.")],
    model: Annotated[str, typer.Option(help="A tokenizer of RUADAPT_REFERENCE.")] = "gemma",
    rows: Annotated[int, typer.Option(help="Rows of every vocabulary, special tokens included.")] = 73_600,
    characters: Annotated[int, typer.Option(help="Of the text of each language.")] = 10_000_000,
) -> None:
    """Write a row for each way of sharing, each text and each rule of learning."""
    reference = Path(os.environ.get("RUADAPT_REFERENCE", ""))
    original = reference / "tokenizers" / model
    if not original.is_dir():
        raise RuadaptError(f"there is no {original}; RUADAPT_REFERENCE names the folder with tokenizers/")
    russian, english = (
        list(chain(*(take_characters(read_texts(path), characters // 2) for path in sorted(paths))))
        for paths in ((reference / "text").glob(f"train_{language}_*") for language in ("ru", "en"))
    )
    used_on = [*russian, *english, *take_characters(code.training(), characters // 5)]
    heldout = {
        path.stem.removeprefix("heldout_"): list(read_texts(path))
        for path in sorted((reference / "text").glob("heldout_*.txt"))
    }
    heldout["code"] = list(take_characters(code.held_out(), 200_000))
    old = vocab.load_tokenizer(original)
    donor = next(iter(DONORS))
    rules: dict[str, dict[str, Any]] = {
        "text": {},
        f"{donor} + text": {"donor": reference / "tokenizers" / DONORS[donor]},
    }
    found = [
        {"rule": "original", "new_rows": 0, "kept_rows": vocab.rows(old), "text": name}
        | characters_per_token(old, lines)
        for name, lines in heldout.items()
    ]
    for rule, learning in rules.items():
        for new in tqdm(NEW, desc=rule):
            kept = rows - new - len(vocab.special_ids(old))
            made = vocab.optimize(original, russian, kept, new, used_on=used_on, **learning)
            row = {"rule": rule, "new_rows": new, "kept_rows": kept}
            found += [
                row | {"text": name} | characters_per_token(made, lines) for name, lines in heldout.items()
            ]
    table = pd.DataFrame(found)
    atomic_write(out, table.to_csv(index=False))
    about = {"original": model, "rows": rows, "characters": characters, "donor": DONORS[donor]}
    write_json(out.with_suffix(".json"), about | {"versions": versions()})
    typer.echo(table.to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
