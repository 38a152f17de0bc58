"""The job that evaluates one model of a run and keeps the result."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ruadapt.data_sets import read_texts
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import answer_bits, text_bits
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import read_jsonl
from ruadapt.freshness import cached, key_of

ANSWER_COLUMNS = ["language", "task", "id", "score", "exact", "answer", "cut", "used_shots"]
CONTEXT, STRIDE = 512, 256
"""Windows of `text_bits`, in tokens."""


def evaluate_job(
    folder: Path,
    target: Path,
    labels: Mapping[str, Any],
    *,
    benchmark: Benchmark,
    texts: Mapping[str, Path],
    chats: Mapping[str, Path] | None = None,
) -> str:
    """Evaluate one model into `target`: `items.csv`, `answers.jsonl`, and `bits.csv` of texts and chats.

    `bits.csv` has `id, bits, size` of each document (`size` in bytes) or held-out answer (in characters).

    Done again only if the model, the data or the code changed (`freshness.cached`). Picklable.

    Args:
        folder: the model.
        target: folder of the results.
        labels: values of `model, stage, vocabulary, method, calibration, seed`.
        benchmark: the tasks, for instruct models or for bases.
        texts: held-out text by language, for bases.
        chats: held-out chats by language, for chat models.

    Returns:
        the target, as text.
    """
    texts = {} if benchmark.chat else dict(texts)
    chats = dict(chats or {}) if benchmark.chat else {}
    key = key_of({"labels": labels, "model": folder, "asks": benchmark.asks, "texts": texts | chats})

    def build(temporary: Path) -> None:
        model, tokenizer = load(folder)
        scored = benchmark.evaluate(model, tokenizer).assign(**labels)
        scored[ITEM_COLUMNS].to_csv(temporary / "items.csv", index=False)
        # Answers hold whatever characters a model wrote, carriage returns too: not for CSV.
        answers = temporary / "answers.jsonl"
        scored[ANSWER_COLUMNS].to_json(answers, orient="records", lines=True, force_ascii=False)
        spent = []
        for language, path in texts.items():
            windows = {"context": CONTEXT, "stride": STRIDE}
            bits, sizes = text_bits(model, tokenizer, list(read_texts(path)), **windows)
            spent.append({**labels, "language": language, "of": "text", "bits": bits, "size": sizes})
        for language, path in chats.items():
            bits, sizes = answer_bits(model, tokenizer, list(read_jsonl(path)))
            spent.append({**labels, "language": language, "of": "answers", "bits": bits, "size": sizes})
        if spent:
            pd.concat(map(pd.DataFrame, spent)).to_csv(temporary / "bits.csv", index_label="id")

    return str(cached(target, key, build, "evaluate"))


def collect(targets: Iterable[Path], name: str) -> pd.DataFrame:
    """Read one table (`items` or `bits`) of several evaluated models into one."""
    files = [Path(target) / f"{name}.csv" for target in targets]
    tables = [pd.read_csv(file, keep_default_na=False) for file in files if file.exists()]
    return pd.concat(tables, ignore_index=True)
