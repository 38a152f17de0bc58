"""`ruadapt evaluate | speed | scripts | arena`: is it as good, faster, free of stray scripts, preferred.

Models and scikit-learn take seconds to import, so each command imports what it needs: the others and
`--help` stay quick.
"""

import json
import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ruadapt.console import AsJson
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_jsonl, write_json

Models = Annotated[list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Model folders or hub names.")]
Prompts = Annotated[
    Path,
    typer.Option(help="One prompt a line (.txt), or JSON lines with `prompt` or in arena-hard's columns."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Limit of an answer.")]
Out = Annotated[Path, typer.Option(help="Folder of tables and answers; a stopped command goes on.")]


def evaluate(
    models: Models,
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
    import pandas as pd

    from ruadapt.evaluation.asking import read_sources
    from ruadapt.evaluation.jobs import collect, evaluate_job
    from ruadapt.evaluation.statistics import paired_differences, sentence, task_scores
    from ruadapt.evaluation.tasks import Benchmark

    sources = read_sources(list(dict.fromkeys([*([against] if against else []), *models])))
    texts: dict[str, Path] = {}
    for name, _, path in (given.partition("=") for given in text or ()):
        if not (name and os.path.exists(path) and few_shot and name not in texts):
            raise RuadaptError(
                f"--text {name}={path}: give NAME=PATH of a text, such as ru=my/heldout, for bases, "
                "and each text its own name"
            )
        texts[name] = Path(path)
    benchmark = Benchmark(tasks.split(","), str(data or ""), chat=not few_shot, items_per_task=items_per_task)
    blank, results = ["stage", "vocabulary", "method", "calibration", "seed"], []
    for name, place in sources.items():
        labels = {"model": name, **dict.fromkeys(blank, "")}
        target = out / "models" / name
        evaluate_job(Path(place), target, labels, benchmark=benchmark, texts=texts)
        results.append(target)
    items = collect(results, "items")
    given = pd.concat(
        pd.DataFrame(read_jsonl(one / "answers.jsonl")).assign(model=one.name) for one in results
    )
    given["empty"] = ~given["answer"].str.strip().astype(bool)
    counted = given.groupby(["model", "language", "task"], sort=False)
    counts = {"answers": ("id", "size"), "empty": ("empty", "sum"), "cut": ("cut", "sum")}
    answers = counted.agg(**counts, exact_match=("exact", "mean")).reset_index()
    tables = {"scores": task_scores(items), "answers": answers}
    parts = dict(iter(items.groupby("model", sort=False)))
    if against and len(parts) > 1:
        original = parts.pop(next(iter(sources)))
        paired = pd.concat(paired_differences(part, original) for part in parts.values())
        found = task_scores(paired, difference=True)
        tables["differences"] = found.assign(found=[sentence(row) for row in found.to_dict("records")])
    if texts:
        bits = collect(results, "bits").rename(columns={"size": "bytes"})
        bits = bits.groupby(["model", "language"], sort=False)[["bits", "bytes"]].sum()
        tables["bits_per_byte"] = bits.assign(bits_per_byte=bits["bits"] / bits["bytes"]).reset_index()
    tables = {name: table.drop(columns=blank, errors="ignore") for name, table in tables.items()}
    _show(tables, {"tasks": tasks, "few_shot": few_shot}, out, as_json)


def speed(
    original: Annotated[str, typer.Argument(help="The original model.")],
    prompts: Prompts,
    adapted: Annotated[list[str] | None, typer.Argument(metavar="[[NAME=]MODEL]...")] = None,
    characters: Annotated[int, typer.Option(min=2, help="An answer's characters are cut to so many.")] = 400,
    repeats: Annotated[int, typer.Option(min=2, help="Timed passes.")] = 7,
    engine: Annotated[
        Literal["transformers", "llama.cpp"],
        typer.Option(help="llama.cpp has to be installed; it takes GGUF files, not folders."),
    ] = "transformers",
    out: Out = Path("runs/speed"),
    as_json: AsJson = False,
) -> None:
    """Compare reading and writing speed in characters per second."""
    import pandas as pd

    from ruadapt.evaluation.asking import ask_once, read_questions, read_sources
    from ruadapt.evaluation.speed import measure_speed
    from ruadapt.evaluation.statistics import speed_ratios

    sources = read_sources([f"original={original}", *(adapted or [])])
    asked = read_questions(prompts)
    # The original writes the answers that the file lacks.
    missing = [prompt for prompt, answer in asked if answer is None]
    if missing and engine == "llama.cpp":
        raise RuadaptError(f"{prompts}: llama.cpp is dictated answers; give each prompt its `answer`")
    written = iter(ask_once(out / "answers", sources["original"], missing, max_tokens=characters))
    dialogues = [
        (prompt, (next(written) if answer is None else answer)[:characters]) for prompt, answer in asked
    ]
    folders = {name: Path(place) for name, place in sources.items()}
    timed = measure_speed(folders, {"": dialogues}, repeats=repeats, engine=engine)
    atomic_write(out / "timings.csv", timed.to_csv(index=False))
    ratios = pd.concat(
        speed_ratios(
            timed.assign(characters_per_second=timed[f"{phase}_characters_per_second"], phase=phase),
            "model",
            "phase",
        )
        for phase in ("reading", "writing")
    )
    _show({"speed": ratios}, {"prompts": len(dialogues), "engine": engine}, out, as_json)


def scripts(
    models: Models,
    prompts: Prompts,
    max_tokens: MaxTokens = 256,
    mask: Annotated[
        list[str] | None,
        typer.Option(help='Ask again with this script forbidden, such as "Cjk"; repeatable.'),
    ] = None,
    out: Out = Path("runs/scripts"),
    as_json: AsJson = False,
) -> None:
    """Count answers that slip into a script the prompt does not have, greedy and sampled."""
    import pandas as pd

    from ruadapt.evaluation.asking import ask_once, read_questions, read_sources
    from ruadapt.evaluation.scripts import stray_table

    asked = [text for text, _ in read_questions(prompts)]
    parts = []
    decodings = {"greedy": 0.0, "sampled at 1": 1.0}.items()
    for (name, place), masked, (decoding, heat) in product(
        read_sources(models).items(), [(), tuple(mask)] if mask else [()], decodings
    ):
        labels = {"model": name, "masked": " ".join(masked), "decoding": decoding}
        kept = out / "answers" / " ".join(filter(None, labels.values()))
        found = ask_once(kept, place, asked, max_tokens=max_tokens, temperature=heat, forbidden=masked)
        parts.append(pd.DataFrame([labels]).merge(stray_table(asked, found, mask or ()), how="cross"))
    table = pd.concat(parts, ignore_index=True)
    _show({"stray_scripts": table}, {"prompts": len(asked)}, out, as_json)


def arena(
    questions: Annotated[Path, typer.Argument(help="JSON lines in arena-hard's columns.")],
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL|[NAME=]MODEL@URL...", help="Two models or more.")
    ],
    judge: Annotated[str, typer.Option(help="The model that judges: MODEL, or MODEL@URL on a server.")],
    max_tokens: MaxTokens = 1024,
    out: Out = Path("runs/arena"),
    as_json: AsJson = False,
) -> None:
    """Let a judge compare models two by two, and rate them: 2 × questions × pairs judgments."""
    from ruadapt.evaluation.arena import judge_all, rate
    from ruadapt.evaluation.asking import ask_once, read_questions, read_sources

    asked = [text for text, _ in read_questions(questions)]
    fighters, referees = read_sources(models), read_sources([judge])
    if len(fighters) < 2:
        raise RuadaptError("an arena needs two models or more")
    answered = {
        name: ask_once(out / "answers" / name, place, asked, max_tokens=max_tokens)
        for name, place in fighters.items()
    }
    ((name, referee),) = referees.items()
    battles, about = judge_all(asked, answered, referee, out / "judgments" / name, max_tokens)
    atomic_write(out / "battles.csv", battles.to_csv(index=False))
    board = rate(battles)
    answers = [answered[name] for name in board["model"]]
    board["characters"] = [sum(map(len, own)) / len(own) for own in answers]
    board["empty"] = [sum(not text.strip() for text in own) for own in answers]
    _show({"leaderboard": board}, {"questions": len(asked), **about}, out, as_json)


def _show(tables: Mapping[str, Any], about: Mapping[str, Any], out: Path, as_json: bool) -> None:
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
