"""Real models side by side: size, characters per token, bits, minimal pairs, chat answers, speed.

The first model is the original; others are compared with it on the same items. Finished ones are kept.

    python -m benchmarks.real data/results/real_smollm2.csv original=FOLDER extended=FOLDER \
        --text ru=ru.txt --text en=en.txt --tasks $RUADAPT_REAL/tasks --chats FOLDER
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.measuring import measured
from ruadapt.evaluation.chat_bits import answer_bits
from ruadapt.evaluation.jobs import collect, evaluate_job
from ruadapt.evaluation.models import load
from ruadapt.evaluation.speed import measure_speed
from ruadapt.evaluation.statistics import speed_ratios
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import atomic_write, read_jsonl, read_texts, take_characters, write_jsonl
from ruadapt.vocab import load_tokenizer, measure, rows

RESAMPLES = 2_000


def bootstrap(over: np.ndarray, under: np.ndarray, first: np.ndarray | None, ratio: bool) -> dict[str, float]:
    """Return a ratio of sums with its 95 % interval, and its change against `first`, paired by item.

    Args:
        over, under: `(items,)`.
        first: `over` of the original.
        ratio: whether the change is relative; else it is a difference.
    """
    draws = np.random.default_rng(0).multinomial(len(over), [1 / len(over)] * len(over), RESAMPLES)
    sums = draws @ over, draws @ under
    found = {"value": over.sum() / under.sum()}
    found |= zip(("low", "high"), np.percentile(sums[0] / sums[1], (2.5, 97.5)), strict=True)
    if first is not None:
        other = draws @ first
        changes = sums[0] / other - 1 if ratio else (sums[0] - other) / sums[1]
        whole = over.sum() / first.sum() - 1 if ratio else (over.sum() - first.sum()) / under.sum()
        ends = np.percentile(changes, (2.5, 97.5))
        found |= {"change": whole, "change_low": ends[0], "change_high": ends[1]}
    return {name: float(value) for name, value in found.items()}


def size(folder: Path) -> dict[str, float]:
    """Return rows, parameters, and what the model takes on the disk and in memory, opened for evaluation."""

    def work() -> int:
        return sum(parameter.numel() for parameter in load(folder)[0].parameters())

    found = measured(work)
    disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "rows": rows(load_tokenizer(folder)),
        "parameters": found["result"],
        "megabytes on disk": disk / 1e6,
        "gigabytes in use": found["peak_gigabytes"],
    }


def shown(row: pd.Series) -> str:
    """Return a value, and in brackets its change against the original with the 95 % interval."""
    text = f"{row['value']:,.0f}" if row["value"] >= 1_000 else f"{row['value']:.3g}"
    if not pd.notna(row["change"]) or row["model"] == "original":
        return text
    unit = "points" if row["measure"] == "minimal pairs" else "%"
    change, low, high = (100 * row[name] for name in ("change", "change_low", "change_high"))
    return f"{text} ({change:+.0f} {unit} [{low:+.0f}, {high:+.0f}])"


def markdown(folder: Path) -> str:
    """Return the table of docs/real_models.md: the results in `folder`, a row a measure, a column a model."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for name, base in {"smollm2": "SmolLM2-135M", "gemma": "Gemma-3-270M"}.items():
        table = pd.read_csv(folder / f"real_{name}.csv")
        table[["language", "of"]] = table[["language", "of"]].fillna("")
        for _, row in table.iterrows():
            what = ", ".join(
                filter(None, [row["measure"], {"ru": "Russian", "en": "English"}.get(row["language"])])
            )
            cells.setdefault(what, {})[base, row["model"]] = shown(row)
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [
        "| | " + " | ".join(" ".join(column) for column in columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for what, row in cells.items():
        lines.append(f"| {what} | " + " | ".join(row.get(column, "–") for column in columns) + " |")
    return "\n".join(lines)


def main(
    results: Annotated[Path, typer.Argument(help="The table to write.")],
    models: Annotated[list[str], typer.Argument(metavar="NAME=FOLDER...", help="The original first.")],
    tasks: Annotated[Path, typer.Option(help="Folder of blimp.jsonl.gz and rublimp.jsonl.gz.")],
    text: Annotated[list[str], typer.Option(metavar="LANGUAGE=PATH", help="Held-out text.")],
    chats: Annotated[Path | None, typer.Option(help="Folder of LANGUAGE_chat_heldout.jsonl.")] = None,
    items: Annotated[int, typer.Option(help="Minimal pairs of a language.")] = 500,
    characters: Annotated[int, typer.Option(help="Of each text, for bits.")] = 20_000,
    answers: Annotated[int, typer.Option(help="Held-out answers of a language.")] = 60,
    repeats: Annotated[int, typer.Option(help="Timed passes.")] = 5,
    work: Annotated[Path, typer.Option(help="Where finished models are kept.")] = Path("runs/real"),
) -> None:
    """Measure real models and write one table."""
    folders = {name: Path(path) for name, _, path in (given.partition("=") for given in models)}
    texts, heldout = {}, {}
    for given in text:
        language, _, path = given.partition("=")
        texts[language, Path(path).stem] = Path(path)
        part = work / f"{language}-{Path(path).stem}-{characters}.jsonl"
        cut = take_characters(read_texts(Path(path)), characters)
        write_jsonl(part, ({"text": line} for line in cut))
        heldout[f"{language} {Path(path).stem}"] = part
    asked: dict[str, list[dict[str, Any]]] = {}
    if chats:
        for code in ("ru", "en"):
            asked[code] = list(read_jsonl(chats / f"{code}_chat_heldout.jsonl"))[:answers]
    # First of all: a child of this process holds what the process holds.
    sizes = {
        name: [{"model": name, "measure": what, "value": value} for what, value in size(folder).items()]
        for name, folder in folders.items()
    }
    table: list[dict[str, Any]] = []
    firsts: dict[tuple[str, str, str], np.ndarray] = {}
    blank = dict.fromkeys(["stage", "vocabulary", "method", "calibration", "seed"], "")
    benchmark = Benchmark(["blimp", "rublimp"], str(tasks), chat=False, items_per_task=items)
    for name, folder in folders.items():
        print(name, flush=True)
        table += sizes[name]
        for (language, stem), file in texts.items():
            value = measure(load_tokenizer(folder), read_texts(file))["characters_per_token"]
            where_ = {"measure": "characters per token", "language": language, "of": stem}
            table.append({"model": name, **where_, "value": value})
        options: dict[str, Any] = {
            "benchmark": benchmark,
            "asked": benchmark.fingerprints(),
            "texts": heldout,
        }
        done = [work / "plain" / name]
        evaluate_job(folder, done[0], blank | {"model": name}, **options)
        bits, scores = collect(done, "bits"), collect(done, "items")
        for language, given_chats in asked.items():
            spent, size_ = answer_bits(*load(folder), given_chats)
            part = pd.DataFrame({"bits": spent, "size": size_, "language": language, "of": "answers"})
            bits = pd.concat([bits, part])
        groups = [
            (
                "bits per byte" if of == "text" else "bits per character of chat answers",
                *where.partition(" ")[::2],
                part,
            )
            for (of, where), part in bits.groupby(["of", "language"], sort=False)
        ]
        pairs = scores[scores["group"] == "grammar"].assign(bits=lambda t: t["score"], size=1)
        groups += [("minimal pairs", str(code), "", part) for code, part in pairs.groupby("language")]
        for kind, language, of, part in groups:
            over, under = part["bits"].to_numpy(float), part["size"].to_numpy(float)
            found = bootstrap(over, under, firsts.get((kind, language, of)), kind != "minimal pairs")
            firsts.setdefault((kind, language, of), over)
            label: dict[str, Any] = {"model": name, "measure": kind, "language": language, "of": of}
            table.append(label | {"items": len(part)} | found)
    dialogues = {
        language: [(lines[0][:60], " ".join(lines[1:])[:150])]
        for (language, _), path in texts.items()
        if (lines := list(take_characters(read_texts(path), 400)))
    }
    timed = measure_speed(folders, dialogues, repeats=repeats, threads=1)
    for measure_name, column in {
        "characters per second, writing": "writing_characters_per_second",
        "characters per second, reading": "reading_characters_per_second",
    }.items():
        ratios = speed_ratios(timed.assign(characters_per_second=timed[column]), "model")
        for row in ratios.to_dict("records"):
            label = {"model": row["model"], "measure": measure_name, "language": row["language"]}
            change = {
                "change": row["ratio"] - 1,
                "change_low": row["low"] - 1,
                "change_high": row["high"] - 1,
            }
            table.append(label | {"items": repeats, "value": row["characters_per_second"]} | change)
    atomic_write(results, pd.DataFrame(table).to_csv(index=False, float_format="%.9g"))


if __name__ == "__main__":
    typer.run(main)
