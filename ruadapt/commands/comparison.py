"""Models measured on the same tasks and texts, result by result kept, and compared with intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.catalogue import Catalogue, Named, asks_to_chat, fingerprint, shorten
from ruadapt.evaluation.documents import f1_macro
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import bits_per_byte
from ruadapt.evaluation.statistics import (
    FINDING_COLUMNS,
    ITEM_COLUMNS,
    MICRO,
    estimate,
    interval,
    paired_differences,
    resampled_ratios,
    task_differences,
    task_scores,
)
from ruadapt.evaluation.tasks import ask
from ruadapt.files import hash_path, project_root, read_jsonl, write_jsonl
from ruadapt.freshness import cached
from ruadapt.training.generation import maximum_length
from ruadapt.world import documents, load_world

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

TEXT_DOCUMENTS = 100
RESAMPLES = 1000
_SHOWN = ["group", "task", "metric", "value", "low", "high", "items"]


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        items: one row a scored unit, `statistics.ITEM_COLUMNS` and `answer, cut, empty, used_shots`;
            `language` holds the name the task was asked for by.
        bits: one row a document, `model, text, document, bits, bytes, tokens, start`.
        errors: what did not run, `model, task, asked, group, error`.
    """

    items: pd.DataFrame
    bits: pd.DataFrame
    errors: pd.DataFrame


def default_texts() -> dict[str, list[str]]:
    """Return held-out texts of the generated world in Russian and English, and this package's own code."""
    root = project_root()
    world = load_world(root / "data" / "world")
    texts = {}
    for language in ("ru", "en"):
        stream = documents(world, language, "test", "evaluation")
        texts[language] = [next(stream) for _ in range(TEXT_DOCUMENTS)]
    files = sorted((root / "ruadapt" / "lep").glob("*.py"))
    return texts | {"code": [file.read_text(encoding="utf-8") for file in files]}


def measure_models(
    models: Mapping[str, Path],
    catalogue: Catalogue,
    texts: Mapping[str, Sequence[str]],
    cache: Path,
    *,
    items_per_task: int = 0,
    chat: bool | None = None,
    batch_size: int = 64,
    context: int = 512,
) -> Measured:
    """Ask every model every task and text; what was measured before is read from `cache`.

    A result is kept under the model's hash and the task, and is valid for the task's version, documents and
    settings, and for the code that scores it. A task that fails is a row of `errors`; the others go on.

    Args:
        models: shown name → folder.
        catalogue: the tasks.
        texts: documents for bits per byte by name.
        cache: where results are kept.
        items_per_task: first items (pairs and exams whole) of each task; 0: all.
        chat: ask through the chat template; None: where the task is made for it.
        batch_size: prompts (windows) per forward pass.
        context: tokens a window of `bits_per_byte` holds; windows advance by half of it.
    """
    rows: list[dict[str, Any]] = []
    bits: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    total = len(models) * (len(catalogue.tasks) + len(texts))
    with tqdm(total=total, desc="tasks and texts") as progress:
        for name, folder in models.items():
            key, opened = hash_path(folder), _once(folder)
            kept = cache / key[:16]
            for task in catalogue.tasks:
                progress.set_postfix_str(f"{name}, {task.name}")
                asking = (items_per_task, chat, batch_size)
                try:
                    found = _task_rows(kept, key, folder, opened, catalogue, task, *asking)
                    rows += [{"model": name, "language": task.asked, "group": task.group} | r for r in found]
                except Exception as error:  # whatever breaks one task belongs into the report, not on top
                    errors.append(_failure(name, task.name, task.asked, task.group, error))
                progress.update()
            for text, given in texts.items():
                progress.set_postfix_str(f"{name}, {text}")
                try:
                    found = _text_rows(kept, key, opened, text, given, context, batch_size)
                    bits += [{"model": name, "text": text} | row for row in found]
                except Exception as error:
                    errors.append(_failure(name, text, "bits per byte", "", error))
                progress.update()
    blank = dict.fromkeys(("stage", "vocabulary", "method", "calibration", "seed"), "")
    empty = pd.DataFrame(columns=[*ITEM_COLUMNS, "exact", "classes"])
    items = pd.DataFrame(rows).assign(**blank) if rows else empty
    columns = ["model", "task", "asked", "group", "error"]
    spent = pd.DataFrame(bits, columns=["model", "text", "document", "bits", "bytes", "tokens", "start"])
    return Measured(items, spent, pd.DataFrame(errors, columns=columns))


def score_table(measured: Measured) -> pd.DataFrame:
    """Return scores with 95 % intervals: `model, asked, group, task, metric, value, low, high, items`.

    Rows without a task are means over the tasks of a group, and of all tasks (`micro`). A mean that lacks a
    task which failed is left out: it would be of something else.
    """
    if measured.items.empty:
        return pd.DataFrame(columns=["model", "asked", *_SHOWN])
    table = task_scores(measured.items).rename(columns={"language": "asked"})
    return _without_holes(table, measured.errors)[["model", "asked", *_SHOWN]]


def difference_table(measured: Measured, against: str) -> pd.DataFrame:
    """Return paired differences to the model `against`, as `score_table` and with `FINDING_COLUMNS`."""
    tables = []
    by_model = dict(iter(measured.items.groupby("model", sort=False))) if len(measured.items) else {}
    reference = by_model.pop(against, pd.DataFrame(columns=ITEM_COLUMNS))
    failed = measured.errors[measured.errors["model"] == against]
    for name, own in by_model.items():
        shared = own[own["task"].isin(reference["task"])]
        if shared.empty:
            continue
        paired = paired_differences(shared, reference[reference["task"].isin(own["task"])])
        table = task_differences(paired).rename(columns={"language": "asked"})
        tables.append(_without_holes(table, pd.concat([measured.errors, failed.assign(model=name)])))
    if not tables:
        return pd.DataFrame(columns=["model", "asked", *_SHOWN, *FINDING_COLUMNS])
    return pd.concat(tables, ignore_index=True)[["model", "asked", *_SHOWN, *FINDING_COLUMNS]]


def bits_table(measured: Measured, against: str = "") -> pd.DataFrame:
    """Return bits per byte with 95 % intervals over documents, and paired differences to `against`.

    Returns:
        columns `model, text, value, low, high, documents, bytes, tokens, start` (what stands in front of each
        document) and, with `against`, `difference, difference_low, difference_high`.
    """
    rows = []
    kept: dict[tuple[str, str], Any] = {}
    for (model, text), part in measured.bits.groupby(["model", "text"], sort=False):
        spent, size = (part[name].to_numpy(float) for name in ("bits", "bytes"))
        # The same documents are drawn for bits and for bytes, and for all models.
        draws = resampled_ratios(spent, size, RESAMPLES, 0, str(text))
        kept[model, text] = (spent.sum() / size.sum(), draws)
        low, high = interval(draws)
        value = kept[model, text][0]
        row = {"model": model, "text": text, "value": value, "low": low, "high": high}
        row |= {"documents": len(part), "bytes": int(size.sum()), "tokens": int(part["tokens"].sum())}
        rows.append(row | {"start": part["start"].iloc[0]})
    for row in rows:
        other = kept.get((against, row["text"]))
        if other and row["model"] != against:
            value, draws = kept[row["model"], row["text"]]
            low, high = interval(draws - other[1])
            row |= {"difference": value - other[0], "difference_low": low, "difference_high": high}
    return pd.DataFrame(rows)


def secondary_table(measured: Measured) -> pd.DataFrame:
    """Return what stands beside a score: exact match of short answers, macro F1 of classes.

    Returns:
        columns `model, task, measure, value, low, high, items`; 95 % intervals over items, those of macro F1
        by bootstrap.
    """
    rows = []
    for (model, task), part in measured.items.groupby(["model", "task"], sort=False):
        exact, classes = part["exact"].dropna().to_numpy(float), part["classes"].dropna().to_list()
        if len(exact):
            low, high = map(float, estimate([exact[None]]).interval())
            rows.append([model, task, "exact match", float(exact.mean()), low, high, len(exact)])
        if classes:
            drawn = np.random.default_rng(0).integers(len(classes), size=(RESAMPLES, len(classes)))
            draws = np.array([f1_macro([classes[place] for place in places]) for places in drawn])
            rows.append([model, task, "macro F1", f1_macro(classes), *interval(draws), len(classes)])
    return pd.DataFrame(rows, columns=["model", "task", "measure", "value", "low", "high", "items"])


def count_table(measured: Measured) -> pd.DataFrame:
    """Count per model and benchmark: answers, empty ones, cut ones, those with fewer examples than asked."""
    if measured.items.empty:
        return pd.DataFrame()
    items = measured.items.assign(fewer_examples=measured.items["used_shots"] < measured.items["shots"])
    items = items.rename(columns={"language": "asked"})
    counts = items.groupby(["model", "asked"], sort=False)[["empty", "cut", "fewer_examples"]].sum()
    counts.insert(0, "scored", items.groupby(["model", "asked"], sort=False).size())
    return counts.astype(int).reset_index()


def error_table(measured: Measured) -> pd.DataFrame:
    """Return errors, alike ones together: `model, error, tasks` (names), `number`."""
    grouped = measured.errors.groupby(["model", "error"], sort=False)["task"].agg(["size", ", ".join])
    return grouped.reset_index().set_axis(["model", "error", "number", "tasks"], axis=1)


def _without_holes(table: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """Drop means over tasks one of which failed, and means of a single task or group, which stand there."""
    for error in errors.itertuples():
        holed = (table["model"] == error.model) & (table["asked"] == error.asked) & (table["task"] == "")
        table = table[~(holed & table["group"].isin([error.group, MICRO]))]
    single = table["asked"].isin(table["task"]) & (table["task"] == "")
    alone = table["asked"].isin(table["group"]) & (table["group"] == MICRO)
    return table[~(single | alone)]


def _once(folder: Path) -> Callable[[], Loaded]:
    """Open a model when it is first needed: never, where all its results are known."""
    opened: list[Loaded] = []

    def get() -> Loaded:
        if not opened:
            opened.append(load(folder))
        return opened[0]

    return get


def _failure(model: str, task: str, asked: str, group: str, error: Exception) -> dict[str, str]:
    what = str(error) if isinstance(error, RuadaptError) else f"{type(error).__name__}: {error}"
    return {"model": model, "task": task, "asked": asked, "group": group, "error": what}


def _task_rows(
    kept: Path,
    key: str,
    folder: Path,
    opened: Callable[[], Loaded],
    catalogue: Catalogue,
    named: Named,
    units: int,
    chat: bool | None,
    batch_size: int,
) -> list[dict[str, Any]]:
    tasks = catalogue.build(named, tokenizer=str(folder))
    for task in tasks.values():
        shorten(task, units)
    talk = all(map(asks_to_chat, tasks.values())) if chat is None else chat
    asked = {name: fingerprint(task) for name, task in tasks.items()}

    def build(temporary: Path) -> None:
        backend = Backend(*opened(), batch_size, quiet=True)
        found = ask(backend, tasks, {name: {"task": name} for name in tasks}, talk)
        write_jsonl(temporary / "rows.jsonl", (row for name in tasks for row in found[name]))

    target = cached(kept / named.name, {"model": key, "tasks": asked, "chat": talk}, build, "compare")
    return list(read_jsonl(target / "rows.jsonl"))


def _text_rows(
    kept: Path,
    key: str,
    opened: Callable[[], Loaded],
    name: str,
    texts: Sequence[str],
    context: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    digest = sha256(json.dumps(list(texts)).encode()).hexdigest()

    def build(temporary: Path) -> None:
        model, tokenizer = opened()
        window = min(context, maximum_length(model))
        options = {"context": window, "stride": max(1, window // 2), "batch_size": max(1, batch_size // 8)}
        score = bits_per_byte(model, tokenizer, texts, **options)
        columns = zip(score.document_bits, score.document_bytes, score.document_tokens, strict=True)
        rows = [
            {"document": n, "bits": float(b), "bytes": int(s), "tokens": int(t), "start": score.start}
            for n, (b, s, t) in enumerate(columns)
        ]
        write_jsonl(temporary / "rows.jsonl", rows)

    target = cached(
        kept / f"bits_{name}", {"model": key, "texts": digest, "context": context}, build, "compare"
    )
    return list(read_jsonl(target / "rows.jsonl"))
