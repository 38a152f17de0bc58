"""Real base models side by side: size, characters per token, bits per byte, minimal pairs, speed.

The first model is the original; others are compared with it on the same items. Finished ones are kept.
"Code" is `benchmarks.code`'s.

    python -m benchmarks.real data/results/real_smollm2.csv original=FOLDER adapted=FOLDER \
        --text ru=ru.txt --text en=en.txt --tasks $RUADAPT_REAL/tasks
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from benchmarks import code
from benchmarks.measuring import measured
from paper.results import LANGUAGES
from ruadapt.data_sets import read_texts
from ruadapt.evaluation.jobs import collect, evaluate_job
from ruadapt.evaluation.models import load
from ruadapt.evaluation.speed import measure_speed
from ruadapt.evaluation.statistics import ratio_estimate, speed_ratios
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import atomic_write, take_characters, write_jsonl
from ruadapt.reporting.report import written
from ruadapt.vocab import load_tokenizer, measure, rows

Row = dict[str, Any]
SHORT = ["rows", "parameters", "characters per token, Russian", "characters per token, English"]
SHORT += ["characters per second, writing, Russian"]
SHORT += [f"bits per byte, {name}" for name in ("Russian", "English", "code")]
SHORT += ["minimal pairs, Russian", "minimal pairs, English"]


def compared(
    over: np.ndarray, under: np.ndarray, first: np.ndarray | None, relative: bool
) -> dict[str, float]:
    """Return a ratio of sums with its 95 % interval, and its change against `first`, paired by item.

    Args:
        over, under: `(items,)`.
        first: `over` of the original.
        relative: whether the change is a share of the original's; else it is a difference.
    """
    row = ratio_estimate(over, under).row()
    found = {name: row[name] for name in ("value", "low", "high")}
    if first is not None:
        row = (ratio_estimate(over, first) if relative else ratio_estimate(over - first, under)).row()
        names = {"change": "value", "change_low": "low", "change_high": "high"}
        found |= {name: row[end] - relative for name, end in names.items()}
    return found


def sizes(folder: Path) -> Iterator[Row]:
    """Yield rows, parameters, and what the model takes on the disk and in memory, opened for evaluation."""

    def work() -> int:
        return sum(parameter.numel() for parameter in load(folder)[0].parameters())

    found = measured(work)
    yield {"measure": "rows", "value": rows(load_tokenizer(folder))}
    yield {"measure": "parameters", "value": found["result"]}
    disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    yield {"measure": "megabytes on disk", "value": disk / 1e6}
    yield {"measure": "gigabytes in use", "value": found["peak_gigabytes"]}


def scores(folder: Path, kept: Path, benchmark: Benchmark, texts: Mapping[str, Path]) -> Iterator[Row]:
    """Yield bits and bytes of every document, and right and asked of every minimal pair (`over`, `under`)."""
    labels = dict.fromkeys(["model", "stage", "vocabulary", "method", "calibration", "seed"], "")
    options: dict[str, Any] = {"benchmark": benchmark, "texts": texts}
    evaluate_job(folder, kept, labels | {"model": kept.name}, **options)
    bits, items = collect([kept], "bits"), collect([kept], "items")
    for language, part in bits.groupby("language", sort=False):
        yield {"measure": "bits per byte", "language": language, "over": part["bits"], "under": part["size"]}
    for language, part in items.groupby("language", sort=False):
        asked = pd.Series(1.0, part.index)
        yield {"measure": "minimal pairs", "language": language, "over": part["score"], "under": asked}


def speeds(folders: Mapping[str, Path], texts: Mapping[str, Sequence[str]], repeats: int) -> Iterator[Row]:
    """Yield characters per second of reading and of writing, one thread, with their ratio to the first's."""
    dialogues = {
        language: [(lines[0][:60], " ".join(lines[1:])[:150])]
        for language, lines in texts.items()
        if language in LANGUAGES
    }
    torch.set_num_threads(1)
    timed = measure_speed(folders, dialogues, repeats=repeats)
    for phase in ("writing", "reading"):
        column = timed[f"{phase}_characters_per_second"]
        for row in speed_ratios(timed.assign(characters_per_second=column), "model").to_dict("records"):
            yield {
                "model": row["model"],
                "measure": f"characters per second, {phase}",
                "language": row["language"],
                "items": repeats,
                "value": row["characters_per_second"],
                "change": row["ratio"] - 1,
                "change_low": row["low"] - 1,
                "change_high": row["high"] - 1,
            }


def shown(row: Mapping[str, Any]) -> str:
    """Return a value, and in brackets its change against the original with the 95 % interval."""
    text = f"{row['value']:,.0f}" if row["value"] >= 1_000 else f"{row['value']:.3g}"
    if row["model"] == "original" or pd.isna(row["change"]):
        return text
    return f"{text} ({changed(row)})"


def changed(row: Mapping[str, Any]) -> str:
    """Return the change against the original with its interval: a share, of minimal pairs a difference."""
    return written(row, "change", "+.3f" if row["measure"] == "minimal pairs" else "+.1%")


def markdown(table: pd.DataFrame) -> str:
    """Return the table that `read` read as Markdown: a row a measure, a column a model."""
    cells: dict[str, Row] = {}
    for row in table.to_dict("records"):
        cells.setdefault(row["what"], {})[row["model"]] = row["shown"]
    models = list(table["model"].unique())
    lines = [f"| | {' | '.join(models)} |", "| --- " * (1 + len(models)) + "|"]
    lines += [f"| {what} | {' | '.join(row.get(m, '–') for m in models)} |" for what, row in cells.items()]
    return "\n".join(lines)


def changes(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return a short Markdown table of several originals, as `read` read them: adapted model and control.

    Sizes are given before and after. All else is the change against the original with its interval.
    """
    lines = [f"| | {' | '.join(f'{name}, adapted | its control' for name in tables)} |"]
    lines.append("| --- " * (1 + 2 * len(tables)) + "|")
    for what in SHORT:
        cells = []
        for table in tables.values():
            models = table[table["what"] == what].set_index("model").to_dict("index")
            adapted = models.get("adapted") or models["initialised"]  # the same speed: the same vocabulary
            if pd.isna(adapted["change"]):
                cells += [f"{models['original']['shown']} → {adapted['shown']}", "–"]
            else:
                cells += [changed(row) if row else "–" for row in (adapted, models.get("control"))]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> pd.DataFrame:
    """Read a table that `main` wrote, with `what` is measured, in words, and the value as `shown`."""
    table = pd.read_csv(path)
    language = table["language"].replace(LANGUAGES)
    table["what"] = table["measure"] + (", " + language).fillna("")
    return table.assign(shown=[shown(row) for row in table.to_dict("records")])


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """Return the paths behind `=` by the names before it."""
    return {name: Path(path) for name, _, path in (one.partition("=") for one in given)}


def held_out(
    paths: Mapping[str, Path], characters: int, work: Path
) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Return the documents of the first characters of each text and of code, and their files in `work`."""
    texts = {
        language: list(take_characters(read_texts(path), characters)) for language, path in paths.items()
    }
    texts["code"] = list(take_characters(code.held_out(), characters))
    files = {language: work / f"{language}-{characters}.jsonl" for language in texts}
    for language, documents in texts.items():
        write_jsonl(files[language], ({"text": document} for document in documents))
    return texts, files


def main(
    results: Annotated[Path, typer.Argument(help="The table to write.")],
    models: Annotated[list[str], typer.Argument(metavar="NAME=FOLDER...", help="The original first.")],
    tasks: Annotated[Path, typer.Option(help="Folder of blimp.jsonl.gz and rublimp.jsonl.gz.")],
    text: Annotated[list[str], typer.Option(metavar="LANGUAGE=PATH", help="Held-out text.")],
    items: Annotated[int, typer.Option(help="Minimal pairs of a language.")] = 500,
    characters: Annotated[int, typer.Option(help="Of each text, for bits.")] = 20_000,
    repeats: Annotated[int, typer.Option(help="Timed passes.")] = 5,
    work: Annotated[Path, typer.Option(help="Where finished models are kept.")] = Path("runs/real"),
) -> None:
    """Measure real models and write one table."""
    folders, paths = named_paths(models), named_paths(text)
    texts, files = held_out(paths, characters, work)
    table: list[Row] = []
    # First of all: a child of this process holds what the process holds.
    for name, folder in folders.items():
        table += [{"model": name, **row} for row in sizes(folder)]
    for name, folder in folders.items():
        for language, path in paths.items():
            value = measure(load_tokenizer(folder), read_texts(path))["characters_per_token"]
            label = {"model": name, "measure": "characters per token", "language": language}
            table.append(label | {"value": value})
    # Models of one vocabulary take the same time.
    heights = {rows(load_tokenizer(folder)): name for name, folder in reversed(folders.items())}
    table += speeds({name: folders[name] for name in folders if name in heights.values()}, texts, repeats)
    benchmark = Benchmark(["blimp", "rublimp"], str(tasks), chat=False, items_per_task=items)
    firsts: dict[tuple[str, str], np.ndarray] = {}
    for name, folder in folders.items():
        print(name, flush=True)
        for row in scores(folder, work / results.stem / name, benchmark, files):
            over, under = (row.pop(part).to_numpy(float) for part in ("over", "under"))
            place = row["measure"], row["language"]
            found = compared(over, under, firsts.get(place), row["measure"] != "minimal pairs")
            firsts.setdefault(place, over)
            table.append({"model": name, **row, "items": len(over), **found})
    atomic_write(results, pd.DataFrame(table).to_csv(index=False, float_format="%.9g"))


if __name__ == "__main__":
    typer.run(main)
