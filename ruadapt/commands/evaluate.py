"""`ruadapt evaluate`: tasks and bits per byte of several models, told in one report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import typer

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_texts

if TYPE_CHECKING:
    from ruadapt.commands.comparison import Measured

# What takes seconds to import (the harness, plots) is imported where it is used: all commands load this file.


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names.")],
    against: Annotated[str | None, typer.Option(help="The original to compare with.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Task or group names with commas; world, darumeru, both also with _base.")
    ] = "world",
    data: Annotated[Path | None, typer.Option(help="Local copy of the tasks' data.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Texts for bits per byte; repeatable.")
    ] = None,
    items_per_task: Annotated[int, typer.Option(min=0, help="First items of each task; 0: all.")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Through the chat template or not; else by task.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report and of kept results.")] = Path(
        "runs/evaluation"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 64,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window for bits per byte.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")] = False,
) -> None:
    """Evaluate models on tasks and bits per byte, with intervals and one report; goes on where it stopped."""
    from ruadapt.commands.comparison import default_texts, measure_models
    from ruadapt.evaluation.catalogue import Catalogue
    from ruadapt.evaluation.models import locate

    names = list(dict.fromkeys([*([against] if against else []), *models]))
    short = [Path(name).name for name in names]
    shown = {name: end if short.count(end) == 1 else name for name, end in zip(names, short, strict=True)}
    folders = {shown[name]: locate(name) for name in names}
    catalogue = Catalogue([name for name in tasks.split(",") if name], str(data or ""))
    texts = {} if text else default_texts()
    for given in text or ():
        name, found, path = given.partition("=")
        if not found or not name.isidentifier():
            raise RuadaptError(f"--text {given}: give NAME=PATH, such as ru=my/heldout")
        texts[name] = list(read_texts(Path(path)))
    measured = measure_models(
        *(folders, catalogue, texts, out / "results"),
        items_per_task=items_per_task,
        chat=chat,
        batch_size=batch_size,
        context=context,
    )
    tables = write_report(measured, out, shown[against] if against else "")
    if as_json:
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        typer.echo(json.dumps(records, ensure_ascii=False, indent=2))
    else:
        typer.echo((out / "report.md").read_text(encoding="utf-8"))
    if len(tables["errors"]):
        raise typer.Exit(1)


def write_report(measured: "Measured", target: Path, against: str = "") -> dict[str, pd.DataFrame]:
    """Write `report.md`, its tables as CSV and its picture into `target`, and return the tables."""
    from ruadapt.commands import comparison
    from ruadapt.evaluation.statistics import sentence

    tables = {
        "scores": comparison.score_table(measured),
        "secondary": comparison.secondary_table(measured),
        "differences": comparison.difference_table(measured, against),
        "bits_per_byte": comparison.bits_table(measured, against),
        "counts": comparison.count_table(measured),
        "errors": comparison.error_table(measured),
    }
    for name, table in tables.items():
        atomic_write(target / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    parts = [
        "# Evaluation",
        "95 % intervals over items within tasks; those of bits per byte over documents.",
    ]
    scores, differences = _labelled(tables["scores"]), _labelled(tables["differences"])
    if len(scores):
        shown = scores.assign(
            shown=[f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in scores.itertuples()]
        )
        index = ["score", "metric", "items"]
        wide = shown.pivot_table(index=index, columns="model", values="shown", aggfunc="first", sort=False)
        parts += ["## Scores", _markdown(wide.fillna("error").reset_index())]
        # The original last, so that the others look the same in both panels.
        ordered = scores.sort_values("model", key=lambda model: model == against, kind="stable")
        if _draw(ordered, differences, target, against):
            parts += ["![scores](scores.png)"]
    if len(beside := tables["secondary"]):
        parts += ["Besides, in no mean:", _markdown(_intervals(beside, "value"))]
    if len(differences):
        rows = _summarised(differences)
        parts += [f"## Differences to {against}", "Paired: both models answered the same items."]
        shown = _intervals(rows, "value").assign(found=[sentence(row) for row in rows.to_dict("records")])
        parts += [_markdown(shown[["model", "score", "value", "found"]])]
    if len(bits := tables["bits_per_byte"]):
        shown = _intervals(bits, "value", "difference") if "difference" in bits else _intervals(bits, "value")
        parts += ["## Bits per byte", _markdown(shown)]
        parts += [
            "All bytes of the same documents; `start` stands in front of each, so that its first byte counts."
        ]
    parts += ["## Answers", _markdown(tables["counts"]) if len(tables["counts"]) else "None."]
    parts += ["## Errors", _markdown(tables["errors"]) if len(tables["errors"]) else "None: every task ran."]
    if len(tables["errors"]):
        parts += ["A mean that lacks one of these tasks is not shown."]
    atomic_write(target / "report.md", "\n\n".join(parts) + "\n")
    return tables


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column `score`: what a row is a score of."""
    from ruadapt.evaluation.statistics import MICRO

    groups = table["group"].where(table["group"] != MICRO, table["asked"] + ", micro average")
    return table.assign(score=table["task"].where(table["task"] != "", groups))


def _summarised(table: pd.DataFrame) -> pd.DataFrame:
    """Keep means over tasks, and tasks that were asked for by themselves."""
    return table[(table["task"] == "") | (table["task"] == table["asked"])]


def _intervals(table: pd.DataFrame, *values: str) -> pd.DataFrame:
    """Write each of `values` as text with its interval, whose columns go."""
    shown = table.copy()
    for value in values:
        ends = ("low", "high") if value == "value" else (f"{value}_low", f"{value}_high")
        rows = table[[value, *ends]].itertuples(index=False)
        shown[value] = ["" if pd.isna(v) else f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in rows]
        shown = shown.drop(columns=list(ends))
    return shown


def _markdown(table: pd.DataFrame) -> str:
    from ruadapt.reporting.report import markdown

    def safe(cell: object) -> object:  # a bar or a line break would end the cell
        return cell.replace("|", r"\|").replace("\n", " ") if isinstance(cell, str) else cell

    return markdown(table.map(safe))


def _draw(scores: pd.DataFrame, differences: pd.DataFrame, target: Path, against: str) -> bool:
    from ruadapt.reporting import plots

    shown = [table for table in map(_summarised, (scores, differences)) if len(table)]
    if not shown:
        return False
    height = 1.2 + 0.18 * shown[0]["score"].nunique() * shown[0]["model"].nunique() ** 0.5
    figure, axes = plots.panels(len(shown), width=plots.DOUBLE, height=height, sharey=len(shown) > 1)
    axes = axes if isinstance(axes, list) else [axes]
    texts = (("score, mean over tasks", None), (f"difference to {against}", 0.0))
    for ax, table, (label, reference) in zip(axes, shown, texts, strict=False):
        plots.dots(ax, table, "score", "model", "value", label, reference=reference)
    plots.legend(figure, axes)
    plots.save_figure(figure, target / "scores")
    return True
