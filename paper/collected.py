"""The tidy results behind every figure and table, in one small folder that a repository can hold.

A run's stages leave their results where they were made; `collect` gathers what pictures and tables need, and
everything is drawn from that folder alone. So a clone draws the same pictures without a run.
"""

from pathlib import Path

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.files import atomic_folder, read_json, write_json
from ruadapt.reporting.provenance import without_places

LABELS = ["stage", "vocabulary", "method", "calibration", "seed"]
SPEEDS = ["characters_per_second", "writing_characters_per_second", "seconds_per_written_token"]
TABLES = {
    "items": ("08_evaluation", ITEM_COLUMNS),
    "bits_per_byte": ("08_evaluation", ["stage", "vocabulary", "seed", "language", "bits_per_byte"]),
    "characters_per_token": ("08_evaluation", ["vocabulary", "language", "text", "characters", "tokens"]),
    "curves": ("05_continued_pretraining", ["vocabulary", "seed", "tokens", "language", "bits_per_byte"]),
    "speed": ("08_evaluation", ["vocabulary", "rows", "language", "repeat", *SPEEDS]),
    "real": ("03_tokenizers", ["vocabulary", "language", "characters", "tokens"]),
    "bits": ("08_evaluation", [*LABELS, "language", "of", "id", "bits", "size"]),
}
"""Each table, the stage that makes it and its columns."""
OPTIONAL = ("real", "bits")
"""Tables that a run without real tokenizers, or without held-out chats, does not have."""


def collect(run: Path, target: Path) -> None:
    """Gather the results of a run into `target`, whole or not at all: those of the stages that it ran.

    Writes the `TABLES` as CSV (the scored items as Parquet), `pair.json` (the names of the models) and
    `provenance.json`: what each stage was made of, by name of the stage, without paths of the machine.

    Args:
        run: the run's folder.
        target: replaced where it holds nothing but an earlier collection.

    Raises:
        RuadaptError: a table is missing or has no rows, or `target` holds other files.
    """
    known = {"items.parquet", "pair.json", "provenance.json", *(f"{name}.csv" for name in TABLES)}
    others = sorted({path.name for path in target.iterdir()} - known) if target.is_dir() else []
    if others:
        raise RuadaptError(
            f"{target} holds other files ({', '.join(others[:3])}); give results_dir a folder of its own"
        )
    with atomic_folder(target) as folder:
        for name, (stage, columns) in TABLES.items():
            missing = name in OPTIONAL and not (run / stage / f"{name}.csv").exists()
            if missing or not (run / stage).exists():
                continue
            table = read(run / stage, name)[columns]
            if name != "items":
                table.to_csv(folder / f"{name}.csv", index=False, float_format="%.7g", lineterminator="\n")
                continue
            small = table.astype({column: "category" for column in columns if column != "score"})
            small["score"] = small["score"].astype("float32")
            small.to_parquet(folder / "items.parquet", index=False, compression="zstd", compression_level=19)
        write_json(
            folder / "pair.json", {"names": read_json(run / "02_model_pair" / "pair.json").get("names")}
        )
        records = sorted((run / "provenance").glob("0[1-8]_*.json"))
        told = {path.stem: without_places(read_json(path)) for path in records}
        write_json(folder / "provenance.json", told)


def read(folder: Path, name: str) -> pd.DataFrame:
    """Read one of the `TABLES` of a collection, or of the stage that makes it.

    Text columns stay text and empty cells stay "".

    Raises:
        RuadaptError: the file is missing, or it has no rows.
    """
    path = next(iter(Path(folder).glob(f"{name}.parquet")), Path(folder) / f"{name}.csv")
    if not path.exists():
        raise RuadaptError(
            f"{path} does not exist; finish the run and let notebook 09 collect_results, or give results_dir "
            "a folder that holds collected results"
        )
    if path.suffix == ".csv":
        table = pd.read_csv(path, keep_default_na=False, low_memory=False)
    else:
        table = pd.read_parquet(path)
    if table.empty:
        raise RuadaptError(f"{path} has no rows; run its stage again")
    if name == "items":
        table = table.astype({column: str for column in ITEM_COLUMNS if column not in ("shots", "score")})
        table["score"] = table["score"].astype(float).round(6)
    return table
