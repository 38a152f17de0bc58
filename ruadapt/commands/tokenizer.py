"""The commands `ruadapt tokenizer …`: extend, replace, optimize, certify, measure."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from tokenizers import Tokenizer

from ruadapt import vocab
from ruadapt.console import AsJson, show
from ruadapt.data_sets import read_column
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, require_new_folder, take_characters

app = typer.Typer(no_args_is_help=True, help="Extend, replace, shrink, certify and measure tokenizers.")

Original = Annotated[Path, typer.Argument(help="Folder with the original's tokenizer.json.")]
Target = Annotated[Path, typer.Argument(help="New or empty folder for the result.")]
Rows = Annotated[int, typer.Option(help="Exact number of rows to add.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="File, folder or data set of the hub, read as a stream; repeatable."),
]
Column = Annotated[str, typer.Option(help="What holds the text in rows other than lines of .txt.")]
Characters = Annotated[int, typer.Option(min=0, help="Stop reading text after so many characters; 0: never.")]
Donor = Annotated[Path | None, typer.Option(help="A vocabulary whose tokens are wanted.")]


@app.command()
def extend(
    original: Original,
    target: Target,
    added_rows: Rows,
    text: Texts = None,
    column: Column = "text",
    characters: Characters = 0,
    donor: Donor = None,
    as_json: AsJson = False,
) -> None:
    """Append new tokens and their merges; every old id stays."""
    texts = _texts(text, column, characters)
    _write(original, target, as_json, partial(vocab.extend, original, texts, added_rows, donor=donor))


@app.command()
def replace(
    original: Original,
    target: Target,
    vocab_size: Annotated[int, typer.Option(help="Exact number of rows, special tokens included.")],
    model: Annotated[
        Literal["bpe", "unigram"] | None,
        typer.Option(help="Kind of vocabulary; else unigram, or bpe where ORIGINAL joins digits."),
    ] = None,
    text: Texts = None,
    column: Column = "text",
    characters: Characters = 0,
    as_json: AsJson = False,
) -> None:
    """Train a whole new vocabulary under the original's rules."""
    texts = _texts(text, column, characters)
    kind = model or ("bpe" if vocab.joined_numbers(vocab.load_tokenizer(original)) else "unigram")
    _write(original, target, as_json, partial(vocab.train_replacement, texts, original, kind, vocab_size))


@app.command()
def optimize(
    original: Original,
    target: Target,
    added_rows: Rows,
    keep_rows: Annotated[
        int | None, typer.Option(help="Ordinary tokens of the original that stay; all if left out.")
    ] = None,
    text: Texts = None,
    column: Column = "text",
    characters: Characters = 0,
    used_on: Annotated[
        list[str] | None, typer.Option(help="Text whose most used tokens stay; repeatable.")
    ] = None,
    drop_script: Annotated[
        list[str] | None, typer.Option(help="Script to drop, such as Cjk or Hangul; repeatable.")
    ] = None,
    donor: Donor = None,
    as_json: AsJson = False,
) -> None:
    """Shrink the original's vocabulary, then extend it."""
    texts = _texts(text, column, characters)
    pruning: Any = {"used_on": _texts(used_on) if used_on else None, "drop_scripts": drop_script or ()}
    build = partial(vocab.optimize, original, texts, keep_rows, added_rows, **pruning, donor=donor)
    _write(original, target, as_json, build, added_rows)


@app.command()
def certify(
    new: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    against: Annotated[Path, typer.Argument(help="Folder of the original.")],
    text: Texts = None,
    added_rows: Annotated[int | None, typer.Option(help="Rows that an extension was to add.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a promise is broken.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove what a new vocabulary changed and what it did not."""
    texts = {path: _texts([path]) for path in text or ()}
    certificate = vocab.certify(new, against, texts, added_rows)
    broken = vocab.broken(certificate)
    checks = {name: row["counterexamples"] or row["found"] for name, row in certificate.items()}
    show({"passed": not broken, "checks": checks}, as_json)
    if strict and broken:
        raise typer.Exit(1)


@app.command()
def measure(
    tokenizers: Annotated[list[str], typer.Argument(help="Folders or hub names.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="LANGUAGE=PATH", help="Held-out text; repeatable.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A draft model's: how much of ids and text it has in common with each.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokenizers on texts: characters per token and more."""
    texts = {}
    for item in text or ():
        language, separator, path = item.partition("=")
        if not separator:
            raise RuadaptError(f"--text {item}: write the language before the path, as in ru=news.txt")
        texts[language, path] = list(_texts([path]))
    loaded = {name: vocab.fetch_tokenizer(name) for name in tokenizers}
    table = vocab.compare(loaded, texts)
    rows = {name: vocab.rows(tokenizer) for name, tokenizer in loaded.items()}
    table.insert(1, "rows", table["vocabulary"].map(rows))
    if draft is not None:
        other = vocab.fetch_tokenizer(draft)
        shared = [
            vocab.agreement(loaded[row.vocabulary], other, texts[row.language, row.text])
            for row in table.itertuples()
        ]
        for part in ("ids", "text"):
            table[f"draft_{part}"] = [one[part] for one in shared]
    if as_json:
        scripts = {name: vocab.composition(tokenizer) for name, tokenizer in loaded.items()}
        show({"measures": table.to_dict(orient="records"), "scripts": scripts}, as_json)
    else:
        typer.echo(table.round(3).to_string(index=False))


def _texts(sources: list[str] | None, column: str = "text", characters: int = 0) -> Iterator[str]:
    """Yield the texts of files, folders and data sets, up to `characters`."""
    texts = chain.from_iterable(read_column(source, column) for source in sources or ())
    return take_characters(filter(str.strip, texts), characters)


def _write(
    original: Path, target: Path, as_json: bool, build: Callable[[], Tokenizer], learned: int = 0
) -> None:
    """Build a tokenizer, write its folder whole or not at all, and show what it holds and what it breaks."""
    require_new_folder(target)
    old = vocab.load_tokenizer(original)
    vocab.require_tokens(vocab.load_as_transformers(original), old, original)
    new = build()
    with atomic_folder(target) as folder:
        vocab.save_tokenizer(folder, new, original)
    report: dict[str, Any] = {"folder": str(target), **vocab.row_report(new, old)}
    if again := max(0, learned - report["added"]):
        report["note"] = (
            f"of the {learned:,} rows learned, {again:,} are tokens that the original had and pruning "
            "dropped: they count as kept, like the special tokens, and get their old embeddings again"
        )
    certificate = vocab.certify(target, original, {})
    if broken := vocab.broken(certificate):
        report["broken"] = {name: certificate[name]["counterexamples"] for name in broken}
    show(report, as_json)
    if broken:
        raise typer.Exit(1)
