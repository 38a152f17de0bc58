"""`ruadapt evaluate | speed | scripts | arena`: is it as good, faster, free of stray scripts, preferred.

Models, plots and scikit-learn take seconds to import, so each command imports what it needs: the others and
`--help` stay quick.
"""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import typer

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_jsonl, read_texts, write_json

Prompts = Annotated[
    Path, typer.Option(help="One prompt a line (.txt), or JSON lines in arena-hard's or Darumeru's columns.")
]
Limit = Annotated[int, typer.Option(help="Use the first prompts only; 0: all.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Limit of an answer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time, of models on this machine.")]
Out = Annotated[Path, typer.Option(help="Folder of tables, pictures and answers; a stopped command goes on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names.")],
    against: Annotated[str | None, typer.Option(help="The original to compare with.")] = None,
    tasks: Annotated[
        str, typer.Option(help="world, darumeru, or names of their parts, with commas.")
    ] = "world",
    few_shot: Annotated[
        bool,
        typer.Option("--few-shot", help="As raw text with examples (base models), not through the chat."),
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Local copy of the tasks' data.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Texts for bits per byte, with --few-shot; repeatable."),
    ] = None,
    items_per_task: Annotated[int, typer.Option(min=0, help="First items of each task; 0: all.")] = 0,
    out: Out = Path("runs/evaluation"),
    as_json: AsJson = False,
) -> None:
    """Evaluate models on tasks and bits per byte, with 95 % intervals and paired differences."""
    from tqdm import tqdm

    from ruadapt.evaluation.jobs import Benchmark, evaluate_job
    from ruadapt.evaluation.models import locate
    from ruadapt.reporting import plots

    names = list(dict.fromkeys([*([against] if against else []), *models]))
    short = [Path(name).name for name in names]
    shown = {name: end if short.count(end) == 1 else name for name, end in zip(names, short, strict=True)}
    folders = {shown[name]: locate(name) for name in names}
    texts = {name: Path(path) for name, _, path in (given.partition("=") for given in text or ())}
    for name, path in texts.items():
        if not (name and path.exists() and few_shot):
            raise RuadaptError(
                f"--text {name}={path}: give NAME=PATH of a text, such as ru=my/heldout, for bases"
            )
    benchmark = Benchmark(tasks.split(","), str(data or ""), chat=not few_shot, items_per_task=items_per_task)
    asked, results = benchmark.fingerprints(), {}
    for name, folder in tqdm(folders.items(), "models", leave=False):
        labels = {
            "model": name,
            **dict.fromkeys(("stage", "vocabulary", "method", "calibration", "seed"), ""),
        }
        target = out / "models" / name.replace("/", "_")
        evaluate_job(folder, target, labels, benchmark=benchmark, asked=asked, texts=texts)
        results[name] = target
    tables = _compared(results, shown[against] if against else "", bool(texts))
    means = tables["scores"].query("task == ''")
    means = means.assign(score=means["group"] + ", " + means["language"])
    figure, ax = plots.panels(height=1.2 + 0.18 * means["score"].nunique() * len(names) ** 0.5)
    plots.dots(ax, means, "score", "model", "value", "score, mean over tasks")
    plots.legend(figure, ax)
    plots.save_figure(figure, out / "scores")
    _show(tables, {"tasks": tasks, "few_shot": few_shot}, out, as_json)


def speed(
    original: Annotated[Path, typer.Argument(help="Folder of the original model.")],
    prompts: Prompts,
    adapted: Annotated[
        list[str] | None, typer.Argument(metavar="[[NAME=]FOLDER]...", help="Adapted models.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="As in 1,8,32.")] = "1",
    characters: Annotated[int, typer.Option(min=2, help="An answer's characters are cut to so many.")] = 400,
    repeats: Annotated[int, typer.Option(min=2, help="Timed passes.")] = 7,
    limit: Limit = 8,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="Extended tokenizer to choose a size for; else the largest extension in ADAPTED."),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="vLLM has to be installed.")
    ] = "transformers",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, …; by default the accelerator, if there is one.")
    ] = None,
    out: Out = Path("runs/speed"),
    as_json: AsJson = False,
) -> None:
    """Compare reading and writing speed in characters per second, and choose a vocabulary's size."""
    from ruadapt.evaluation.asking import read_sources
    from ruadapt.evaluation.breakeven import ORIGINAL, fertility, predictions, speed_ratios
    from ruadapt.evaluation.speed import measure_speed
    from ruadapt.reporting import plots
    from ruadapt.reporting.added_rows import draw_break_even

    models = [f"{ORIGINAL}={original}", *(adapted or [])]
    folders = {source.name: Path(str(source.place)) for source in read_sources(models)}
    if not all(size.isdecimal() and int(size) for size in batch_sizes.split(",")):
        raise RuadaptError(f"--batch-sizes {batch_sizes}: whole numbers with commas between, as in 1,8")
    dialogues = _dialogues(prompts, limit, original, characters, out)
    curve = None
    if engine == "transformers":
        curve = fertility(folders, vocabulary, [answer for _, answer in dialogues])
    timed = measure_speed(
        folders,
        {"": dialogues},
        batch_sizes=[int(size) for size in batch_sizes.split(",")],
        repeats=repeats,
        taller_by=0 if curve is None else int(curve["added_rows"].max()),
        device=device,
        engine=engine,
    )
    paces = {phase: timed[f"{phase}_characters_per_second"] for phase in ("reading", "writing")}
    ratios = pd.concat(
        speed_ratios(timed.assign(characters_per_second=pace), "model", "batch_size").assign(phase=phase)
        for phase, pace in paces.items()
    )
    tables = {"speed": ratios}
    if engine == "transformers":
        sizes = ["rows", "weights_bytes", "working_bytes"]
        tables["memory"] = timed.groupby(["model", "batch_size"], sort=False)[sizes].max().reset_index()
    if curve is not None:
        tables["break_even"], tables["tax"] = predictions(curve, timed)
    atomic_write(out / "timings.csv", timed.to_csv(index=False))
    shown = ratios.assign(batch="batch " + ratios["batch_size"].astype(str))
    figure, axes = plots.panels(len(paces), width=plots.DOUBLE, height=2.6)
    for ax, phase in zip(axes, paces, strict=True):
        part = shown[shown["phase"] == phase]
        plots.bars(ax, part, "batch", "model", "ratio", "speed, original = 1", title=phase)
    plots.legend(figure, axes)
    plots.save_figure(figure, out / "speed")
    if curve is not None:
        heights = timed.groupby("model")["rows"].first()
        added = {name: int(heights[name] - heights[ORIGINAL]) for name in folders if name != ORIGINAL}
        written = ratios[ratios["phase"] == "writing"]
        plots.save_figure(draw_break_even(tables["break_even"], written, added), out / "break_even")
    _show(tables, {"prompts": len(dialogues), "engine": engine}, out, as_json)


def scripts(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER...", help="Models to ask.")],
    prompts: Prompts,
    mask: Annotated[
        list[str] | None,
        typer.Option(help='Ask again with this script forbidden, such as "Cjk"; repeatable.'),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 1.0,
    max_tokens: MaxTokens = 256,
    limit: Limit = 0,
    batch_size: BatchSize = 8,
    out: Out = Path("runs/scripts"),
    as_json: AsJson = False,
) -> None:
    """Count answers that slip into a script the prompt does not have, greedy and sampled."""
    from ruadapt.evaluation.answers import question
    from ruadapt.evaluation.asking import ask_once, read_sources
    from ruadapt.evaluation.scripts import ANY, stray_table
    from ruadapt.reporting import plots

    asked = [prompt for prompt, _ in _read(prompts, limit)]
    decodings = {"greedy": 0.0, f"sampled at {temperature:g}": temperature}
    parts = []
    for source, masked, (decoding, heat) in product(
        read_sources(models), [(), tuple(mask)] if mask else [()], decodings.items()
    ):
        labels = {"model": source.name, "masked": " ".join(masked), "decoding": decoding}
        found = ask_once(
            out / "answers" / " ".join(filter(None, labels.values())).replace("/", "_"),
            source,
            [question(prompt) for prompt in asked],
            max_tokens=max_tokens,
            temperature=heat,
            batch_size=batch_size,
            forbidden=masked,
        )
        parts.append(pd.DataFrame([labels]).merge(stray_table(asked, found, mask or ()), how="cross"))
    table = pd.concat(parts, ignore_index=True)
    watched = mask[0] if mask else ANY
    shown = table[table["script"] == watched].rename(columns={"share_low": "low", "share_high": "high"})
    shown["asked"] = shown["decoding"] + shown["masked"].map(lambda names: f", no {names}" * bool(names))
    figure, ax = plots.panels(height=1.2 + 0.35 * shown["model"].nunique())
    plots.dots(ax, shown, "model", "asked", "share", f"share of answers with letters of {watched} script")
    plots.legend(figure, ax, columns=2)
    plots.save_figure(figure, out / "stray_scripts")
    _show({"stray_scripts": table}, {"prompts": len(asked)}, out, as_json)


def arena(
    questions: Annotated[Path, typer.Argument(help="JSON lines in arena-hard's columns.")],
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FOLDER|[NAME=]MODEL@URL...", help="Two models or more.")
    ],
    judge: Annotated[str, typer.Option(help="The model that judges: FOLDER, or MODEL@URL on a server.")],
    against: Annotated[str | None, typer.Option(help="Battles against this model only.")] = None,
    max_tokens: MaxTokens = 1024,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Limit of a judgment.")] = 1024,
    limit: Limit = 0,
    batch_size: BatchSize = 8,
    parallel: Annotated[int, typer.Option(min=1, help="Requests to a server at a time.")] = 4,
    out: Out = Path("runs/arena"),
    as_json: AsJson = False,
) -> None:
    """Let a judge compare models two by two, and rate them: at most 2 × questions × pairs judgments."""
    from ruadapt.evaluation import arena as battles
    from ruadapt.evaluation.asking import read_sources
    from ruadapt.reporting import plots

    asked = battles.read_questions(questions, limit)
    fighters = read_sources(models, served=True)
    (referee,) = read_sources([judge], served=True)
    pairs = battles.pairs([fighter.name for fighter in fighters], against)
    options: dict[str, Any] = {"batch_size": batch_size, "parallel": parallel}
    answered = battles.answer_all(fighters, asked, out / "answers", max_tokens=max_tokens, **options)
    judgments = out / "judgments" / referee.name.replace("/", "_")
    fought, summary = battles.judge_all(
        asked, answered, pairs, referee, judgments, max_tokens=judge_tokens, **options
    )
    atomic_write(out / "battles.csv", fought.to_csv(index=False))
    board = battles.leaderboard(fought, answered)
    figure, ax = plots.panels(height=1.2 + 0.35 * len(board))
    shown = [
        board[["model", *columns]].set_axis(["model", "rating", "low", "high"], axis=1).assign(answers=label)
        for columns, label in (
            (["rating", "rating_low", "rating_high"], "as given"),
            (["same_length", "same_length_low", "same_length_high"], "at equal length"),
        )
    ]
    label = "rating, Elo points (95 % interval)"
    plots.dots(ax, pd.concat(shown), "model", "answers", "rating", label, reference=1000)
    plots.legend(figure, ax)
    plots.save_figure(figure, out / "leaderboard")
    worth = dict(zip(("value", "low", "high"), board.attrs["length"], strict=True))
    about = {"questions": len(asked), "longer_answer_points": worth, **summary}
    _show({"leaderboard": board}, about, out, as_json)


def _compared(results: Mapping[str, Path], against: str, texts: bool) -> dict[str, pd.DataFrame]:
    """Return the tables of evaluated models: their folders by name, one of them to compare with."""
    from ruadapt.evaluation.jobs import collect
    from ruadapt.evaluation.statistics import paired_differences, sentence, task_scores

    items = collect(results.values(), "items")
    given = pd.DataFrame(
        {"model": name} | row
        for name, target in results.items()
        for row in read_jsonl(target / "answers.jsonl")
    )
    given["empty"] = ~given["answer"].str.strip().astype(bool)
    counted = given.groupby(["model", "language", "task"], sort=False)
    counts = {"answers": ("id", "size"), "empty": ("empty", "sum"), "cut": ("cut", "sum")}
    tables = {
        "scores": task_scores(items),
        "answers": counted.agg(**counts, exact_match=("exact", "mean")).reset_index(),
    }
    parts = dict(iter(items.groupby("model", sort=False)))
    if against and len(parts) > 1:
        original = parts.pop(against)
        paired = pd.concat(paired_differences(part, original) for part in parts.values())
        found = task_scores(paired, difference=True)
        tables["differences"] = found.assign(found=[sentence(row) for row in found.to_dict("records")])
    if texts:
        tables["bits_per_byte"] = collect(results.values(), "bits_per_byte")
    blank = ["stage", "vocabulary", "method", "calibration", "seed"]
    return {name: table.drop(columns=blank, errors="ignore") for name, table in tables.items()}


def _read(path: Path, limit: int) -> list[tuple[str, str | None]]:
    """Return prompts and their answers, None where the file has none."""
    found: list[tuple[str, str | None]] = []
    lines = path.suffix != ".jsonl"
    rows = ({"prompt": line} for line in read_texts(path)) if lines else read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        turns = row.get("turns") or row.get("messages") or [{"content": row.get("prompt")}]
        prompt, answer = turns[0].get("content"), row.get("outputs") or row.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RuadaptError(f"{path}, line {number}: no prompt in turns, messages or prompt")
        found.append((prompt, answer))
    return found[: limit or None]


def _dialogues(path: Path, limit: int, original: Path, characters: int, out: Path) -> list[tuple[str, str]]:
    """Return prompts and answers of at most `characters`; the original writes those that the file lacks."""
    from ruadapt.evaluation.answers import question
    from ruadapt.evaluation.asking import Source, ask_once

    pairs = _read(path, limit)
    missing = [question(prompt) for prompt, answer in pairs if answer is None]
    source, folder = Source("original", original), out / "answers" / "original"
    written = iter(ask_once(folder, source, missing, max_tokens=characters) if missing else ())
    dialogues = [
        (prompt, (next(written).text if answer is None else answer)[:characters]) for prompt, answer in pairs
    ]
    for prompt, answer in dialogues:
        if len(answer.strip()) < 2:
            raise RuadaptError(f"the answer to {prompt[:60]!r} is empty; give others, or answers with them")
    return dialogues


def _show(tables: Mapping[str, pd.DataFrame], about: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """Write each table as CSV and Markdown and all of it as JSON; print the tables, or the JSON."""
    from ruadapt.reporting import report

    whole = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    whole |= dict(about)
    for name, table in tables.items():
        report.save_table(table, out / name, name.replace("_", " ").capitalize(), json.dumps(about))
    write_json(out / "report.json", whole)
    if as_json:
        return typer.echo(json.dumps(whole, ensure_ascii=False, indent=2))
    for name, table in tables.items():
        typer.echo(f"{name}\n{report.markdown(table)}\n")
    typer.echo("\n".join(f"{name}: {value}" for name, value in about.items()))
