"""The job that evaluates one model of a run and keeps the result."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import bits_per_byte
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.evaluation.tasks import Item, evaluate, read_items
from ruadapt.files import cached, hash_path, read_texts, write_jsonl

ANSWER_COLUMNS = ["language", "task", "id", "score", "exact", "answer", "cut", "used_shots"]
BITS_COLUMNS = [
    *("model", "stage", "vocabulary", "method", "calibration", "seed"),
    *("language", "bits_per_byte", "bytes", "documents"),
]


def first_items(items: Iterable[Item], per_task: int) -> list[Item]:
    """Return the first `per_task` units (items or whole pairs) of each task and language; 0: all."""
    kept: list[Item] = []
    seen: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for item in items:
        meta = item["meta"]
        known = seen[meta["task"], meta["language"]]
        unit = meta["pair"] or meta["id"]
        if unit in known or not per_task or len(known) < per_task:
            known[unit] = None
            kept.append(item)
    return kept


def evaluate_job(
    folder: Path,
    target: Path,
    labels: Mapping[str, Any],
    *,
    items: Path,
    examples: Path,
    texts: Mapping[str, Path],
    shots: int,
    items_per_task: int = 0,
    context: int = 512,
    stride: int = 256,
    batch_size: int = 64,
) -> str:
    """Evaluate one model into `target`: `items.csv`, `answers.jsonl`; bases also into `bits_per_byte.csv`.

    Done again only if the model, the data or an option changed (`files.cached`). Picklable, for
    `ruadapt.training.parallel.run_jobs`.

    Args:
        folder: the model.
        target: folder of the results.
        labels: values of `model, stage, vocabulary, method, calibration, seed`.
        items: evaluation items; `examples`: few-shot examples; `texts`: held-out text by language.
        shots: examples for a base model; 0 asks through the chat template.
        items_per_task: as in `first_items`.
        context, stride: windows of `bits_per_byte`, in tokens.
        batch_size: prompts (windows) per forward pass.

    Returns:
        the target, as text.

    Raises:
        RuadaptError: as `evaluate` and `bits_per_byte`.
    """
    texts = dict(texts) if shots else {}
    key = {
        "labels": dict(labels),
        "model": hash_path(folder),
        "data": {
            str(name): hash_path(path)
            for name, path in {"items": items, "examples": examples, **texts}.items()
        },
        "options": [shots, items_per_task, context, stride],
    }

    def build(temporary: Path) -> None:
        model, tokenizer = load(folder)
        scored = evaluate(
            model,
            tokenizer,
            first_items(read_items(items), items_per_task),
            chat=not shots,
            shots=shots,
            examples=read_items(examples) if shots else (),
            batch_size=batch_size,
        )
        scored = scored.assign(**labels)
        scored[ITEM_COLUMNS].to_csv(temporary / "items.csv", index=False)
        # Answers hold whatever characters a model wrote, carriage returns too: not for CSV.
        answers = json.loads(scored[ANSWER_COLUMNS].to_json(orient="records", force_ascii=False))
        write_jsonl(temporary / "answers.jsonl", answers)
        rows = []
        for language, path in texts.items():
            result = bits_per_byte(
                *(model, tokenizer, list(read_texts(path))), context=context, stride=stride, batch_size=8
            )
            counts = {"bits_per_byte": result.value, "bytes": result.bytes, "documents": result.documents}
            rows.append({**labels, "language": language, **counts})
        pd.DataFrame(rows, columns=BITS_COLUMNS).to_csv(temporary / "bits_per_byte.csv", index=False)

    return str(cached(target, key, build))


def collect(targets: Iterable[Path], name: str) -> pd.DataFrame:
    """Read one table (`items` or `bits_per_byte`) of several evaluated models into one."""
    parts = [pd.read_csv(Path(target) / f"{name}.csv", keep_default_na=False) for target in targets]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)
