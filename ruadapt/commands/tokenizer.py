"""The commands `ruadapt tokenizer …`: extend, replace, optimize, certify, measure.

Each imports `vocab`, which takes seconds, when it is called: `--help` stays quick.
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ruadapt.console import Group
from ruadapt.data_sets import read_column
from ruadapt.errors import RuadaptError
from ruadapt.files import (
    atomic_folder,
    read_json,
    read_texts,
    require_new_folder,
    take_characters,
    write_jsonl,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ruadapt.vocab.words import Learning

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Extend, replace, shrink, certify and measure tokenizers."
)

Original = Annotated[Path, typer.Argument(help="Folder with the original's tokenizer.json.")]
Target = Annotated[Path, typer.Argument(help="New or empty folder for the result.")]
Rows = Annotated[int, typer.Option(help="Exact number of rows to add.")]
Texts = Annotated[
    list[Path] | None, typer.Option("--text", help="File or folder of .txt, .txt.gz, .jsonl; repeatable.")
]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:SPLIT]", help="A data set to stream: hub name, folder, .parquet, .jsonl or .csv file."
    ),
]
Column = Annotated[str, typer.Option(help="The column of the data set that holds its text.")]
Characters = Annotated[
    int | None, typer.Option(min=1, help="Stop reading the data set after so many characters.")
]
Scripts = Annotated[
    list[str] | None, typer.Option("--script", help="Script of new tokens as Unicode names it; Cyrillic.")
]
Frequency = Annotated[int | None, typer.Option(help="A merge must occur at least so often; 2.")]
Donor = Annotated[Path | None, typer.Option(help="A vocabulary whose tokens are wanted.")]
DonorWeight = Annotated[float | None, typer.Option(help="The donor's share of all weight beside text.")]
WordCounts = Annotated[Path | None, typer.Option(help="JSON object {word: count} beside text.")]
MaxCharacters = Annotated[int | None, typer.Option(help="Longest new token.")]
ModelType = Annotated[
    str | None,
    typer.Option(help="Architecture it will serve, such as qwen2; else ORIGINAL's config.json says."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def extend(
    original: Original,
    target: Target,
    added_rows: Rows,
    text: Texts = None,
    dataset: Dataset = None,
    column: Column = "text",
    characters: Characters = None,
    script: Scripts = None,
    min_frequency: Frequency = None,
    donor: Donor = None,
    donor_weight: DonorWeight = None,
    word_counts: WordCounts = None,
    max_characters: MaxCharacters = None,
    model_type: ModelType = None,
    as_json: AsJson = False,
) -> None:
    """Append new tokens and their merges; every old id stays."""
    from ruadapt import vocab

    learning = _learning(script, min_frequency, donor, donor_weight, word_counts, max_characters)
    texts = chain(_read(text), _stream(dataset, column, characters))
    _write(
        original, target, lambda: vocab.extend(original, texts, added_rows, **learning), model_type, as_json
    )


@app.command()
def replace(
    original: Original,
    target: Target,
    vocab_size: Annotated[int, typer.Option(help="Exact number of rows, special tokens included.")],
    model: Annotated[str, typer.Option(help="bpe or unigram.")] = "unigram",
    text: Texts = None,
    dataset: Dataset = None,
    column: Column = "text",
    characters: Characters = None,
    model_type: ModelType = None,
    as_json: AsJson = False,
) -> None:
    """Train a whole new vocabulary under the original's rules."""
    from ruadapt import vocab

    kind: Any = model
    texts = chain(_read(text), _stream(dataset, column, characters))
    _write(
        original,
        target,
        lambda: vocab.train_replacement(texts, original, kind, vocab_size),
        model_type,
        as_json,
    )


@app.command()
def optimize(
    original: Original,
    target: Target,
    added_rows: Rows,
    keep_rows: Annotated[
        int | None, typer.Option(help="Ordinary tokens of the original that stay; all if left out.")
    ] = None,
    text: Texts = None,
    dataset: Dataset = None,
    column: Column = "text",
    characters: Characters = None,
    used_on: Annotated[
        list[Path] | None, typer.Option(help="Text whose most used tokens stay; repeatable.")
    ] = None,
    drop_script: Annotated[
        list[str] | None, typer.Option(help="Script to drop, such as Cjk or Hangul; repeatable.")
    ] = None,
    script: Scripts = None,
    min_frequency: Frequency = None,
    donor: Donor = None,
    donor_weight: DonorWeight = None,
    word_counts: WordCounts = None,
    max_characters: MaxCharacters = None,
    model_type: ModelType = None,
    as_json: AsJson = False,
) -> None:
    """Shrink the original's vocabulary, then extend it."""
    from ruadapt import vocab

    learning = _learning(script, min_frequency, donor, donor_weight, word_counts, max_characters)
    texts = chain(_read(text), _stream(dataset, column, characters))
    used = _read(used_on) if used_on else None
    drop = tuple(drop_script or ())
    _write(
        original,
        target,
        lambda: vocab.optimize(
            original, texts, keep_rows, added_rows, used_on=used, drop_scripts=drop, **learning
        ),
        model_type,
        as_json,
    )


@app.command()
def certify(
    new: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    against: Annotated[Path, typer.Argument(help="Folder of the original.")],
    text: Texts = None,
    added_rows: Annotated[int | None, typer.Option(help="Rows that were to be added.")] = None,
    extended: Annotated[
        bool | None, typer.Option("--extended/--replaced", help="What was promised; seen from the ids.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="Write the old pieces of each new token, as JSON lines.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a promised guarantee fails.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove what a new vocabulary changed and what it did not."""
    from ruadapt import vocab

    texts = {path.stem: read_texts(path) for path in text or ()}
    report = vocab.certify(new, against, texts, added_rows=added_rows, extended=extended)
    if mapping is not None:
        write_jsonl(mapping, vocab.mapping_log(vocab.load_tokenizer(new), vocab.load_tokenizer(against)))
    _show(report, vocab.render_certificate(report), as_json)
    if strict and not report["passed"]:
        raise typer.Exit(1)


@app.command()
def measure(
    tokenizers: Annotated[list[str], typer.Argument(help="Folders or hub names.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="LANGUAGE=PATH", help="Held-out text; repeatable.")
    ] = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", help="Another measure; repeatable.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a context, for context_characters.")] = 4096,
    hidden_size: Annotated[int | None, typer.Option(help="Show what the rows cost at this width.")] = None,
    tied: Annotated[bool, typer.Option(help="Input and head are one matrix.")] = True,
    dtype: Annotated[str, typer.Option(help="Type of the rows.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Measure tokenizers on texts: characters per token and more."""
    import pandas as pd

    from ruadapt import vocab

    texts = {}
    for item in text or ():
        language, separator, path = item.partition("=")
        if not separator:
            raise RuadaptError(f"--text {item}: write the language before the path, as in ru=news.txt")
        texts[language, Path(path).name] = read_texts(Path(path))
    loaded = {name: vocab.fetch_tokenizer(name) for name in tokenizers}
    table = vocab.compare(loaded, texts, tuple(measures or vocab.DEFAULT_MEASURES), context=context)
    report: dict[str, Any] = {
        "measures": table.to_dict(orient="records"),
        "scripts": {name: vocab.composition(tokenizer) for name, tokenizer in loaded.items()},
    }
    shown = table.round(3).to_string(index=False)
    if hidden_size is not None:
        report["cost"] = {
            name: {"rows": vocab.rows(tokenizer)}
            | vocab.row_cost(vocab.rows(tokenizer), hidden_size, tied=tied, dtype=dtype)
            for name, tokenizer in loaded.items()
        }
        costs = pd.DataFrame(report["cost"]).T.reset_index(names="vocabulary")
        shown += "\n\n" + costs.to_string(index=False)
    _show(report, shown, as_json)


def _write(
    original: Path, target: Path, build: Callable[[], "Tokenizer"], model_type: str | None, as_json: bool
) -> None:
    """Build a tokenizer, write its folder whole or not at all, and say what it holds."""
    from ruadapt import vocab

    require_new_folder(target)
    started = time.perf_counter()
    old = vocab.load_tokenizer(original)
    new = build()
    with atomic_folder(target) as folder:
        vocab.save_tokenizer(folder, new, original, model_type)
    report = {
        "folder": str(target),
        "seconds": round(time.perf_counter() - started, 1),
        **vocab.row_report(new, old),
    }
    _show(report, "\n".join(f"{name:<10} {value}" for name, value in report.items()), as_json)


def _read(paths: list[Path] | None) -> Iterator[str]:
    return chain.from_iterable(map(read_texts, paths or ()))


def _stream(name: str | None, column: str, characters: int | None) -> Iterator[str]:
    """Yield the texts of a data set, read as a stream, until `characters` have been read."""
    if name is None:
        return
    source, _, split = name.partition(":")
    yield from take_characters(read_column(source, column, split), characters or 0)


def _learning(
    scripts: list[str] | None,
    min_frequency: int | None,
    donor: Path | None,
    donor_weight: float | None,
    word_counts: Path | None,
    max_characters: int | None,
) -> "Learning":
    options = {
        "scripts": scripts,
        "min_frequency": min_frequency,
        "donor": donor,
        "donor_weight": donor_weight,
        "word_counts": None if word_counts is None else _read_counts(word_counts),
        "max_characters": max_characters,
    }
    given: Any = {name: value for name, value in options.items() if value is not None}
    return cast("Learning", given)


def _read_counts(path: Path) -> dict[str, int]:
    counts = read_json(path)
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise RuadaptError(f"{path}: a JSON object of words and whole numbers was expected")
    return counts


def _show(report: dict[str, Any], table: str, as_json: bool) -> None:
    typer.echo(json.dumps(report, ensure_ascii=False, indent=2) if as_json else table)
