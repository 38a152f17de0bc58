"""What more text and more calibration give: vocabularies trained on several amounts, up to a chat model.

Each amount is a training of its own, whose rate falls to zero at its end, as a run of that length would be.
All else is the profile's. Stages 1 to 4 of the run come first. Finished models are kept beside the run's.

    ruadapt run gemma-3-270m --to 04
    python -m benchmarks.text_curve gemma-3-270m data/results/gemma_text.csv optimized=150000:96 \
        --text ru=ru.txt --text en=en.txt --tasks $RUADAPT_REAL/tasks
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from benchmarks.real import Row, compared, held_out, named_paths, scores
from paper.results import LANGUAGES
from ruadapt import checkpoints
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import answer_bits
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import atomic_write, project_root, read_json, read_jsonl, write_json
from ruadapt.freshness import cached, result_hash
from ruadapt.pipeline.adaptation import adapt, calibrate
from ruadapt.pipeline.runner import Pipeline, Run
from ruadapt.reporting import provenance

SHARED = ["batch_size", "accumulation", "learning_rate", "epsilon", "warmup_steps", "hidden_state_weight"]
"""Options of both trainings, under one name in the parameters of stages 5 and 7."""


def options(values: Row, stage: str) -> Row:
    """Return the options of a training from the parameters of its stage."""
    shared = {name: values[f"{stage}_{name}"] for name in SHARED}
    factor = {"new_rows_learning_rate_factor": values[f"{stage}_new_rows_factor"]}
    return shared | factor | {"seed": values["seeds"][0], "save_every": 500}


def parameters(pipeline: Pipeline) -> Row:
    """Return the parameters of all stages of a profile."""
    return {name: value for stage in pipeline.stages for name, value in pipeline.parameters(stage).items()}


def write_record(results: Path, values: Row, about: Row) -> None:
    """Write beside a table what made it: `about`, the parameters of trainings, versions and the machine."""
    used = ("pretraining_", "calibration_", "lep_method", "copy_share", "seeds")
    record = about | {"parameters": {name: value for name, value in values.items() if name.startswith(used)}}
    record |= {"versions": provenance.versions(), "machine": provenance.machine()}
    write_json(results.with_suffix(".json"), provenance.without_places(record))


def adapted(
    run: Run, values: Row, vocabulary: str, characters: int, steps: int, work: Path
) -> tuple[Row, Path, Path]:
    """Do what stages 5, 6 and 7 do with so many characters and steps of calibration, either perhaps 0.

    Returns:
        `tokens` and `seconds` of stage 5, and how many `chats` calibration had; the base; the chat model.
    """
    pair = read_json(run.needs("02_model_pair") / "pair.json")
    base, instruct = run.path(pair["base"]), run.path(pair["instruct"])
    corpus, trained = run.needs("01_corpus"), run.needs("04_initialisation") / vocabulary
    place, about = work / f"{vocabulary}-{characters}", {"tokens": 0, "seconds": 0, "chats": 0}
    trained = trained if trained.is_dir() else base
    if characters:
        own = {"train": values["pretraining_train"], "weight_decay": values["pretraining_weight_decay"]}
        report = adapt(
            trained,
            place / "base",
            corpus / "ru_train.jsonl",
            {language: corpus / f"{language}_heldout.jsonl" for language in LANGUAGES},
            characters,
            values["pretraining_epochs"],
            values["curve_points"],
            values["curve_documents"],
            values["pretraining_block_size"],
            options(values, "pretraining") | own,
            original=base,
            replay=corpus / "en_train.jsonl",
            replay_share=values["pretraining_replay_share"],
        )
        trained = place / "base"
        about |= {"tokens": report["tokens"], "seconds": round(report["seconds"])}

    def build(folder: Path) -> None:
        found = checkpoints.propagate(base, instruct, trained, folder, values["lep_method"])
        checkpoints.verify(folder, instruct, changed=found["body"]["tensors"])

    chat = instruct
    if trained != base:
        key = {"base": result_hash(trained), "method": values["lep_method"]}
        chat = cached(place / "lep", key, build, "propagate")
    if steps:
        own = {"train": "all", "max_length": values["calibration_max_length"], "steps": steps}
        report = calibrate(
            chat,
            place / f"chat-{steps}",
            [corpus / "chats" / "chat.jsonl"],
            corpus / "chats" / "chat_copy.jsonl",
            values["copy_share"],
            options(values, "calibration") | own,
            original=instruct,
        )
        chat, about["chats"] = place / f"chat-{steps}", report["rows"]
    return about, trained, chat


def measured(
    base: Path, chat: Path, chats: Path, kept: Path, benchmark: Benchmark, texts: dict[str, Path]
) -> Iterator[Row]:
    """Yield what `real.scores` gives of a base, and bits and characters of a chat model's given answers."""
    yield from scores(base, kept, benchmark, texts)
    model, tokenizer = load(chat)
    for language in LANGUAGES:
        bits, sizes = answer_bits(
            model, tokenizer, list(read_jsonl(chats / f"{language}_chat_heldout.jsonl"))
        )
        yield {"measure": "chat", "language": language, "over": pd.Series(bits), "under": pd.Series(sizes)}


def main(
    profile: Annotated[str, typer.Argument(help="Whose parameters hold, and whose run folder.")],
    results: Annotated[Path, typer.Argument(help="The table to write.")],
    amounts: Annotated[list[str], typer.Argument(metavar="VOCABULARY=CHARACTERS:STEPS...")],
    tasks: Annotated[Path, typer.Option(help="Folder of blimp.jsonl.gz and rublimp.jsonl.gz.")],
    text: Annotated[list[str], typer.Option(metavar="LANGUAGE=PATH", help="Held-out text.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    items: Annotated[int, typer.Option(help="Minimal pairs of a language.")] = 300,
    characters: Annotated[int, typer.Option(help="Of each text, for bits.")] = 12_000,
) -> None:
    """Train on each amount and write one table, with the changes against the original and the amount before.

    Both are paired by item; the second ones are called gains.
    """
    pipeline, state = Pipeline(profile, settings or ()), provenance.git_state(project_root())
    values = parameters(pipeline)
    run, work = Run(pipeline.folder), pipeline.folder / "text"
    _, files = held_out(named_paths(text), characters, work)
    benchmark = Benchmark(["blimp", "rublimp"], str(tasks), chat=False, items_per_task=items)
    todo = ["original=0:0", *amounts]  # the first is what others are compared with
    table: list[Row] = []
    firsts: dict[tuple[str, str], np.ndarray] = {}
    lasts: dict[tuple[str, str], np.ndarray] = {}
    for vocabulary, _, amount in (one.partition("=") for one in todo):
        read, steps = map(int, amount.split(":"))
        about, base, chat = adapted(run, values, vocabulary, read, steps, work)
        about = {"vocabulary": vocabulary, "characters": read, "steps": steps} | about
        kept = work / f"{vocabulary}-{read}" / "scores"
        for row in measured(base, chat, pipeline.folder / "01_corpus" / "chats", kept, benchmark, files):
            over, under = (row.pop(part).to_numpy(float) for part in ("over", "under"))
            place = row["measure"], row["language"]
            relative = row["measure"] != "minimal pairs"
            found = compared(over, under, firsts.get(place), relative)
            if place in lasts:
                gained = compared(over, under, lasts[place], relative)
                found |= {name.replace("change", "gain"): gained[name] for name in gained if "change" in name}
            firsts.setdefault(place, over)
            lasts[place] = over
            table.append(about | row | {"items": len(over)} | found)
        atomic_write(results, pd.DataFrame(table).to_csv(index=False, float_format="%.7g"))
    about = {"profile": profile, "amounts": amounts, "items": items, "characters": characters}
    write_record(results, values, about | {"git": state})


if __name__ == "__main__":
    typer.run(main)
