"""The commands `ruadapt speed | scripts | arena`: is it faster, does it slip into Chinese, is it liked.

Models, plots and scikit-learn take seconds to import, so each command imports what it needs: the others and
`--help` stay quick.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import typer

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, hash_path, read_jsonl, read_texts, write_json
from ruadapt.reporting import report

Prompts = Annotated[
    Path, typer.Option(help="One prompt a line (.txt), or JSON lines in arena-hard's or Darumeru's columns.")
]
Limit = Annotated[int, typer.Option(help="Use the first prompts only; 0: all.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, …; by default the accelerator, if there is one.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]
Out = Annotated[Path | None, typer.Option(help="Folder for tables, plots and what was answered.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


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
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts without the chat format (base models).")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm where it is installed.")
    ] = "transformers",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare reading and writing speed in characters per second, and choose a vocabulary's size."""
    from ruadapt.evaluation.speed import phase_speed, vllm_speed
    from ruadapt.reporting.speed_report import ORIGINAL, draw_break_even, draw_speed, fertility, predictions

    folders = {ORIGINAL: original} | _named(adapted or [], taken=ORIGINAL)
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise RuadaptError(
            f"--batch-sizes {batch_sizes}: whole numbers with commas between, as in 1,8"
        ) from None
    if engine not in ("transformers", "vllm"):
        raise RuadaptError(f"--engine {engine}: transformers or vllm")
    if raw and engine == "vllm":
        raise RuadaptError("--raw is for transformers; vLLM is asked through the chat template")
    dialogues = _dialogues(prompts, limit, original, characters, raw, device)
    if engine == "vllm":
        timed, memory, curve = vllm_speed(folders, dialogues, batch_sizes=sizes, repeats=repeats), None, None
    else:
        curve = fertility(folders, vocabulary, [answer for _, answer in dialogues])
        timed, memory = phase_speed(
            folders,
            dialogues,
            batch_sizes=sizes,
            repeats=repeats,
            taller_by=0 if curve is None else int(curve["added_rows"].max()),
            raw=raw,
            threads=threads,
            device=device,
        )
    labelled = timed.assign(language=timed["phase"] + ", batch " + timed["batch_size"].astype(str))
    ratios = report.speed_ratios(labelled.rename(columns={"model": "vocabulary"}))
    ratios = ratios.rename(columns={"low": "ratio_low", "high": "ratio_high"})
    ratios[["phase", "batch_size"]] = ratios.pop("language").str.split(", batch ", expand=True)
    tables = {"speed": ratios.rename(columns={"vocabulary": "model"})}
    if memory is not None:
        tables["memory"] = memory
    if curve is not None:
        tables["break_even"], tables["tax"] = predictions(curve, timed)
    if out is not None:
        atomic_write(out / "timings.csv", timed.to_csv(index=False))
        draw_speed(tables["speed"], out)
        if curve is not None:
            draw_break_even(tables, timed, out)
    _show(tables, {"prompts": len(dialogues), "engine": engine}, out, as_json)


def scripts(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER...", help="Models to ask.")],
    prompts: Prompts,
    mask: Annotated[
        list[str] | None,
        typer.Option(help='Ask again with this script forbidden, such as "Cjk"; repeatable.'),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Script that is not stray in total; Latin. Repeatable.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampled answers.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer.")] = 256,
    limit: Limit = 0,
    batch_size: BatchSize = 8,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Count answers that slip into a script the prompt does not have, greedy and sampled."""
    from ruadapt.evaluation.answers import answers_once
    from ruadapt.evaluation.models import load
    from ruadapt.evaluation.records import open_records
    from ruadapt.evaluation.scripts import ANY, IGNORED, ScriptMask, stray_table
    from ruadapt.reporting import plots

    questions = [question for question, _ in _read(prompts, limit)]
    parts = []
    with ExitStack() as stack:
        # Without a folder the answers are kept as long as the command runs.
        folder_out = out or Path(stack.enter_context(TemporaryDirectory()))
        records = stack.enter_context(open_records(folder_out / "answers.jsonl"))
        for name, folder in _named(models).items():
            model, tokenizer = load(folder, device)
            made_by = {"model_sha256": hash_path(folder), "max_new_tokens": max_new_tokens}
            variants: dict[str, list[Any]] = {"": []}
            if mask:
                variants[" ".join(mask)] = [ScriptMask(tokenizer, mask)]
            decodings = {"greedy": 0.0, f"sampled at {temperature:g}": temperature}
            for (masked, processors), (decoding, heat) in product(variants.items(), decodings.items()):
                labels = {"model": name, "masked": masked, "decoding": decoding}
                written = answers_once(
                    records,
                    labels | made_by,
                    *(model, tokenizer, questions),
                    max_new_tokens=max_new_tokens,
                    temperature=heat,
                    seed=seed,
                    batch_size=batch_size,
                    processors=processors,
                    description=f"{name}, {decoding}",
                )
                found = stray_table(questions, list(written), ignored=ignore or IGNORED, listed=mask or ())
                parts.append(found.assign(**labels))
            del model
    table = pd.concat(parts, ignore_index=True)
    table = table[[*labels, *(name for name in table if name not in labels)]]
    if out is not None:
        watched = mask[0] if mask else ANY
        shown = table[table["script"] == watched].rename(columns={"share_low": "low", "share_high": "high"})
        shown = shown.assign(
            asked=shown["decoding"] + shown["masked"].map(lambda name: f", no {name}" * bool(name))
        )
        figure, ax = plots.panels(height=1.2 + 0.35 * shown["model"].nunique())
        plots.dots(ax, shown, "model", "asked", "share", f"share of answers with letters of {watched} script")
        plots.legend(figure, ax, columns=2)
        plots.save_figure(figure, out / "stray_scripts")
    _show({"stray_scripts": table}, {"prompts": len(questions), "seed": seed}, out, as_json)


def arena(
    questions: Annotated[Path, typer.Argument(help="JSON lines in arena-hard's columns.")],
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FOLDER|[NAME=]MODEL@URL...", help="Two models or more.")
    ],
    judge: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server.")],
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")],
    out: Annotated[Path, typer.Option(help="Folder of answers, judgments and leaderboard; resumed.")] = Path(
        "arena"
    ),
    baseline: Annotated[str | None, typer.Option(help="Battles against this model only.")] = None,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="YAML with system and user; data/arena/judge_ru.yaml.")
    ] = None,
    key_variable: Annotated[
        str, typer.Option(help="Environment variable with the key of the servers.")
    ] = "OPENAI_API_KEY",
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer.")] = 1024,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Limit of a judgment.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds one request may take.")] = 120,
    retries: Annotated[int, typer.Option(min=0, help="Tries after the first, with growing pauses.")] = 4,
    parallel: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 4,
    limit: Limit = 0,
    resamples: Annotated[int, typer.Option(min=40, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    batch_size: BatchSize = 8,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let a judge compare models two by two, and rate them."""
    from ruadapt.evaluation import arena as battles
    from ruadapt.evaluation.endpoint import Endpoint
    from ruadapt.evaluation.ratings import rate
    from ruadapt.reporting import plots

    access: dict[str, Any] = {"key_variable": key_variable, "timeout": timeout, "retries": retries}
    asked = battles.read_questions(questions, limit)
    prompt = battles.read_judge_prompt(judge_prompt)
    fighters = battles.contestants(models, **access)
    referee = Endpoint(judge, judge_model, **access)
    if baseline is not None and baseline not in [fighter.name for fighter in fighters]:
        raise RuadaptError(f"--baseline {baseline}: none of the models has this name")
    given = {
        fighter.name: battles.answer_all(
            fighter,
            asked,
            out / "answers" / f"{fighter.name.replace('/', '_')}.jsonl",
            max_tokens=max_tokens,
            device=device,
            batch_size=batch_size,
            parallel=parallel,
        )
        for fighter in fighters
    }
    answered = {name: own for name, (own, _) in given.items()}
    fought, summary = battles.judge_all(
        asked,
        answered,
        referee,
        out / "judgments.jsonl",
        prompt=prompt,
        baseline=baseline,
        max_tokens=judge_tokens,
        parallel=parallel,
    )
    summary["dropped_bytes"] += sum(dropped for _, dropped in given.values())
    atomic_write(out / "battles.csv", fought.to_csv(index=False))
    write_json(out / "summary.json", summary)
    if summary["judged"] == summary["by_rule"] and summary["nonsense"]:
        raise RuadaptError(
            f"{judge_model} gave no verdict that can be read in {summary['nonsense']} battles; its replies "
            f"are in {out / 'judgments.jsonl'}; take a stronger judge"
        )
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    plain = rate(fought, **options)
    controlled = rate(fought, length_controlled=True, **options)
    one_sided = plain[(plain["won"] == plain["battles"]) | (plain["lost"] == plain["battles"])]
    summary["without_bound"] = one_sided["model"].to_list()
    worth = dict(zip(("value", "low", "high"), controlled.attrs["length"], strict=True))
    board = plain.merge(
        controlled[["model", "rating", "rating_low", "rating_high"]].rename(
            columns=lambda name: name.replace("rating", "same_length")
        ),
        on="model",
    )
    about = pd.DataFrame(
        [
            {"model": name, "characters": sum(len(answer.text) for answer in own.values()) / len(own)}
            | {"empty": sum(not answer.text.strip() for answer in own.values())}
            | {"cut": sum(answer.cut for answer in own.values())}
            for name, own in answered.items()
        ]
    )
    board = board.merge(about, on="model")
    figure, ax = plots.panels(height=1.2 + 0.35 * len(board))
    both = pd.concat([plain.assign(answers="as given"), controlled.assign(answers="at equal length")])
    both = both.rename(columns={"rating_low": "low", "rating_high": "high"})
    plots.dots(ax, both, "model", "answers", "rating", "rating, Elo points (95 % interval)", reference=1000)
    plots.legend(figure, ax)
    plots.save_figure(figure, out / "leaderboard")
    _show(
        {"leaderboard": board},
        {"questions": len(asked), "longer_answer_points": worth, **summary},
        out,
        as_json,
    )


def _named(specs: Sequence[str], taken: str = "") -> dict[str, Path]:
    """Read `[NAME=]FOLDER`; a folder without a name is called by its last part."""
    found: dict[str, Path] = {}
    for spec in specs:
        name, separator, folder = spec.partition("=")
        if not separator or "/" in name:
            name, folder = Path(spec).resolve().name, spec
        if name in found or name == taken:
            raise RuadaptError(f"two models would be called {name}; write NAME={folder}")
        found[name] = Path(folder)
    return found


def _read(path: Path, limit: int) -> list[tuple[str, str | None]]:
    """Return prompts and their answers, None where the file has none."""
    found: list[tuple[str, str | None]] = []
    if path.suffix == ".jsonl":
        for number, row in enumerate(read_jsonl(path), start=1):
            turns = row.get("turns") or row.get("messages") or [{"content": row.get("prompt")}]
            prompt, answer = turns[0].get("content"), row.get("outputs") or row.get("answer")
            if not isinstance(prompt, str) or not prompt.strip():
                raise RuadaptError(f"{path}, line {number}: no prompt in turns, messages or prompt")
            found.append((prompt, answer))
    else:
        found = [(line, None) for line in read_texts(path)]
    return found[: limit or None]


def _dialogues(
    path: Path, limit: int, original: Path, characters: int, raw: bool, device: str | None
) -> list[tuple[str, str]]:
    """Return prompts and answers of at most `characters`; the original writes those that the file lacks."""
    from ruadapt.evaluation.answers import answers
    from ruadapt.evaluation.models import load

    pairs = _read(path, limit)
    missing = [prompt for prompt, answer in pairs if answer is None]
    if missing and raw:
        raise RuadaptError(f"{path}: with --raw every prompt needs an answer; give JSON lines with `answer`")
    written = iter(
        answers(*load(original, device), missing, max_new_tokens=characters, description=original.name)
        if missing
        else ()
    )
    dialogues = [(prompt, (answer or next(written).text)[:characters]) for prompt, answer in pairs]
    empty = [prompt for prompt, answer in dialogues if len(answer.strip()) < 2]
    if empty:
        raise RuadaptError(
            f"the answer to {empty[0][:60]!r} is empty; give other prompts, or answers with them"
        )
    return dialogues


def _show(
    tables: Mapping[str, pd.DataFrame], about: Mapping[str, Any], out: Path | None, as_json: bool
) -> None:
    """Print tables, or everything as JSON; write each as CSV and Markdown, and the JSON beside them."""
    whole = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()} | dict(
        about
    )
    if out is not None:
        for name, table in tables.items():
            report.save_table(table, out / name, name.replace("_", " ").capitalize(), json.dumps(about))
        write_json(out / "report.json", whole)
    if as_json:
        typer.echo(json.dumps(whole, ensure_ascii=False, indent=2))
        return
    for name, table in tables.items():
        typer.echo(f"{name}\n{report.markdown(table)}\n")
    typer.echo("\n".join(f"{name}: {value}" for name, value in about.items()))
