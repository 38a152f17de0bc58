"""What the vocabulary engine promises for real tokenizers, in one run: `python -m benchmarks.vocab`.

For every original: extend it, certify the result, send random Unicode through it, map it to the original.
Needs `RUADAPT_REFERENCE`. Times are wall clock of this machine; run it while nothing else does.

With `--curves data/results` instead: characters per token against added rows, for text, for donors and for
both; `make figures` draws them from there.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from tokenizers import Tokenizer
from tqdm import tqdm

from ruadapt import vocab
from ruadapt.data_sets import read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.vocab.spec import build, read_spec

ORIGINALS = ("qwen2.5", "llama-3", "mistral-nemo", "llama-2", "mistral-7b-v0.1", "gemma")
# Code points are drawn from these ranges in turn, so that rare planes don't crowd out what people write.
RANGES = (
    (0x20, 0x7F),
    (0x00, 0x20),
    (0x400, 0x530),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x590, 0x1100),
    (0x2000, 0x2C00),
    (0x3040, 0xA000),
    (0xAC00, 0xD7A4),
    (0xE000, 0x10000),
    (0x1F000, 0x1FB00),
    (0x10000, 0x110000),
)
SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 42_950, 64_000, 128_000)
DONORS = {
    "Unigram 48k": "darulm_20_05_24_part1-2_48000_unigram_hf",
    "BPE 48k": "darulm_20_05_24_part1-2_48000_bpe_hf",
}
SEED = 0
_CHUNK = 20_000
_REPEATS = 3


def random_texts(count: int, seed: int) -> list[str]:
    """Return strings of 1 to 24 random code points (no surrogates), the same for one seed."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 25, count)
    low, high = np.array(RANGES)[draw.integers(0, len(RANGES), lengths.sum())].T
    letters = iter(map(chr, draw.integers(low, high).tolist()))
    return ["".join(islice(letters, length)) for length in lengths.tolist()]


def examine(
    original: Path, texts: list[str], heldout: dict[str, list[str]], added_rows: int, random: int
) -> dict[str, Any]:
    """Return one original's numbers; `heldout` is {name: lines} with the languages in the names."""
    extend_seconds, new = _timed(lambda: vocab.extend(original, texts, added_rows), time.perf_counter)
    old = vocab.load_tokenizer(original)
    with tempfile.TemporaryDirectory() as folder:
        vocab.save_tokenizer(folder, new, original)
        certificate = vocab.certify(folder, original, heldout, added_rows)
        pair = {"new": (Path(folder), new), "old": (original, old)}
        load = {
            key: min(_timed(partial(vocab.load_tokenizer, path))[0] for _ in range(_REPEATS))
            for key, (path, _) in pair.items()
        }
        sizes = {key: (path / "tokenizer.json").stat().st_size for key, (path, _) in pair.items()}
    speed = {
        name: min(_encoding(old, lines) for _ in range(_REPEATS))
        / min(_encoding(new, lines) for _ in range(_REPEATS))
        for name, lines in heldout.items()
        if "ru" in name.split("_")
    }
    mapped = min(
        _timed(lambda: vocab.conversion_matrix(new, old), time.perf_counter)[0] for _ in range(_REPEATS)
    )
    strings = random_texts(random, SEED)
    lost = [
        text
        for start in range(0, len(strings), _CHUNK)
        for text in vocab.changed_texts(new, strings[start : start + _CHUNK])
    ]
    ratio = load["new"] / load["old"]
    return {
        "rows": vocab.rows(new),
        "extend, s": extend_seconds,
        "broken promises": vocab.broken(certificate) or "none",
        "random strings kept": f"{random - len(lost):,} of {random:,}",
        "lost": lost[:5],
        "matrix, s": mapped,
        "load per row": ratio * vocab.rows(old) / vocab.rows(new),
        "load per byte": ratio * sizes["old"] / sizes["new"],
        **{f"{name} speed": value for name, value in speed.items()},
        **{
            f"{name} ch/token": vocab.measure(new, lines)["characters_per_token"]
            for name, lines in heldout.items()
        },
    }


def _timed(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[float, Any]:
    """Return seconds and the result; processor time, unless told otherwise: what else runs matters less."""
    started = clock()
    result = call()
    return clock() - started, result


def _encoding(tokenizer: Tokenizer, lines: list[str]) -> float:
    """Return the seconds that lines take; first the model must forget the words that it has cut."""
    tokenizer.model._clear_cache()
    return _timed(lambda: tokenizer.encode_batch_fast(lines, add_special_tokens=False))[0]


def truncate(extended: Tokenizer, original: Tokenizer, added_rows: int) -> Tokenizer:
    """Return an extension as it was after its first `added_rows` tokens: a curve costs one extension.

    Raises:
        RuadaptError: the extension has fewer rows.
    """
    end = vocab.rows(original) + added_rows
    if end > vocab.rows(extended):
        raise RuadaptError(
            f"added_rows {added_rows}: the extension has {vocab.rows(extended) - vocab.rows(original)}"
        )
    spec = read_spec(extended)
    vocabulary = {token: number for token, number in spec["model"]["vocab"].items() if number < end}
    merges = [pair for pair in spec["model"]["merges"] if vocabulary.keys() >= {*pair, "".join(pair)}]
    return build({**spec, "model": {**spec["model"], "vocab": vocabulary, "merges": merges}})


def curves(
    original: Path, texts: list[str], donors: Mapping[str, Path], heldout: Mapping[str, list[str]]
) -> pd.DataFrame:
    """Measure what `original` gains by rows learned from text, from each donor, and from both.

    Args:
        donors: {name: a donor's path}.
        heldout: {name: lines}.

    Returns one row for each rule, text and number of rows in SIZES (as far as a rule finds so many tokens):
    `rule, text, added_rows, characters_per_token, low, high`; 95 % bootstrap intervals over lines.
    """
    rules: dict[str, tuple[list[str], dict[str, Any]]] = {"text": (texts, {})}
    for name, donor in donors.items():
        rules |= {name: ([], {"donor": donor}), f"{name} + text": (texts, {"donor": donor})}
    old = vocab.load_tokenizer(original)
    found: list[dict[str, Any]] = []
    for rule, (lines, learning) in tqdm(rules.items(), desc="rules"):
        # One extension holds every smaller one: its merges stand in the order in which they were learned.
        largest = vocab.extend(original, lines, SIZES[-1], exact=False, **learning)
        for size in (0, *SIZES):
            if size > vocab.rows(largest) - vocab.rows(old):
                break
            tokenizer = truncate(largest, old, size) if size else old
            for text, held in heldout.items():
                found.append(
                    {"rule": rule, "text": text, "added_rows": size, **characters_per_token(tokenizer, held)}
                )
    return pd.DataFrame(found)


def characters_per_token(tokenizer: Tokenizer, lines: list[str]) -> dict[str, float]:
    """Return `characters_per_token` of lines with the 95 % bootstrap interval over them, `low, high`."""
    encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    counts = np.array([(len(line), len(encoding)) for line, encoding in zip(lines, encodings, strict=True)])
    draws = np.random.default_rng([SEED, 0, len(lines)])
    weights = draws.multinomial(len(lines), np.full(len(lines), 1 / len(lines)), size=1000) / len(lines)
    low, high = np.percentile(np.divide(*(counts.T @ weights.T)), (2.5, 97.5))
    characters, tokens = counts.sum(axis=0)
    return {"characters_per_token": characters / tokens, "low": low, "high": high}


def write_curves(folder: Path, table: pd.DataFrame, made_from: Mapping[str, Any]) -> None:
    """Write the curves into a folder: `vocabulary_rows.csv`, and `.json` with what they came from."""
    atomic_write(folder / "vocabulary_rows.csv", table.to_csv(index=False))
    write_json(folder / "vocabulary_rows.json", dict(made_from))


def main(
    added_rows: Annotated[int, typer.Option(help="Rows to add to each original.")] = 42_950,
    characters: Annotated[int, typer.Option(help="Characters of training text; 0 takes all.")] = 0,
    random: Annotated[int, typer.Option(help="Random strings for each original.")] = 200_000,
    original: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.")] = None,
    curves_to: Annotated[
        Path | None, typer.Option("--curves", help="Write Qwen2.5's curves of added rows here, nothing else.")
    ] = None,
) -> None:
    """Print the numbers of every original, one block each."""
    reference = Path(os.environ.get("RUADAPT_REFERENCE", ""))
    if not (reference / "tokenizers").is_dir():
        raise RuadaptError("no reference tokenizers; set RUADAPT_REFERENCE to their folder")
    texts: list[str] = []
    for path in sorted((reference / "text").glob("train_ru_*")):
        texts += read_texts(path)
    if characters:
        share = characters / sum(map(len, texts))
        texts = texts[:: max(1, round(1 / share))]
    heldout = {
        path.stem.removeprefix("heldout_"): list(read_texts(path))
        for path in sorted((reference / "text").glob("heldout_*.txt"))
    }
    if curves_to is not None:
        start, donors = reference / "tokenizers" / (original or ORIGINALS)[0], {}
        for shown, name in DONORS.items():
            donors[shown] = reference / "tokenizers" / name
        russian = {name: lines for name, lines in heldout.items() if name.startswith("ru")}
        table = curves(start, texts, donors, russian)
        made_from = {"original": start.name, "donors": DONORS, "text": "train_ru_*", "characters": characters}
        write_curves(curves_to, table, made_from | {"seed": SEED, "versions": versions()})
        typer.echo(table.to_string(index=False))
        return
    numbers: dict[str, Any] = {}
    for name in original or ORIGINALS:
        numbers[name] = examine(reference / "tokenizers" / name, texts, heldout, added_rows, random)
        typer.echo(name)
        for key, value in numbers[name].items():
            if value != []:
                typer.echo(f"    {key:<26} {f'{value:.3f}' if isinstance(value, float) else value}")
    if out is not None:
        write_json(out, numbers)


if __name__ == "__main__":
    typer.run(main)
