"""Which models of a run are evaluated, and the job that evaluates one of them and keeps the result."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import bits_per_byte
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.evaluation.tasks import Item, evaluate, read_items
from ruadapt.files import cached, hash_path, read_texts, write_jsonl

ORIGINAL = "original"
ANSWER_COLUMNS = ["language", "task", "id", "score", "exact", "answer", "cut", "used_shots"]
BITS_COLUMNS = [
    *("model", "stage", "vocabulary", "method", "calibration", "seed"),
    *("language", "bits_per_byte", "bytes", "documents"),
]


@dataclass(frozen=True)
class Subject:
    """One model to evaluate: `shots` examples for a base, the chat template (zero-shot) for `chat`."""

    folder: Path
    model: str
    stage: str
    vocabulary: str = ORIGINAL
    method: str = ""
    calibration: str = ""
    seed: int | str = ""
    shots: int = 0

    @property
    def chat(self) -> bool:
        """Whether the model is asked through its chat template."""
        return self.shots == 0

    def job(self, target: Path, **options: Any) -> dict[str, Any]:
        """Return the arguments of `evaluate_job` for this model; results go to a folder inside `target`."""
        labels = {name: value for name, value in asdict(self).items() if name not in ("folder", "shots")}
        return {
            "folder": self.folder,
            "target": Path(target) / self.model,
            "labels": labels,
            "shots": self.shots,
            **options,
        }


def subjects(
    run: Path,
    base: Path,
    instruct: Path,
    *,
    vocabularies: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    calibration_vocabularies: Sequence[str],
    calibration_data: Sequence[str],
    lep_method: str,
    shots: int = 5,
) -> list[Subject]:
    """List the models that a run's parameters promise, in the order of the pipeline.

    Args:
        run: the run's folder.
        base: the original base model.
        instruct: the original instruct model.
        vocabularies, methods, seeds, calibration_vocabularies, calibration_data, lep_method: as in the
            notebooks that made the models. The original vocabulary (control of continued pre-training and of
            LEP, by `lep_method`, and of calibration, except "self", whose answers are its own) is always in.
        shots: examples for base models.

    Raises:
        RuadaptError: a promised model does not exist; the message names the stage that makes it.
    """
    new = [name for name in vocabularies if name != ORIGINAL]
    few: dict[str, Any] = {"shots": shots}
    found = [
        Subject(base, "original-base", ORIGINAL, **few),
        Subject(instruct, "original-instruct", ORIGINAL),
    ]
    found += [
        Subject(run / "04_initialisation" / name, f"initialised-{name}", "initialised", name, **few)
        for name in new
    ]
    found += [
        Subject(
            run / "05_continued_pretraining" / name / f"seed{seed}",
            *(f"adapted-{name}-seed{seed}", "adapted", name),
            seed=seed,
            **few,
        )
        for name in [ORIGINAL, *new]
        for seed in seeds
    ]
    found += [
        Subject(
            run / "06_lep" / name / method / f"seed{seed}",
            *(f"lep-{name}-{method}-seed{seed}", "lep", name, method),
            seed=seed,
        )
        for name, method in [(ORIGINAL, lep_method), *itertools.product(new, methods)]
        for seed in seeds
    ]
    found += [
        Subject(
            run / "07_calibration" / name / data / f"seed{seed}",
            *(f"calibrated-{name}-{data}-seed{seed}", "calibrated", name),
            method="" if name == ORIGINAL else lep_method,
            calibration=data,
            seed=seed,
        )
        for name in dict.fromkeys([ORIGINAL, *calibration_vocabularies])
        for data in calibration_data
        if calibration_vocabularies and (name, data) != (ORIGINAL, "self")
        for seed in seeds
    ]
    for subject in found:
        if not (subject.folder / "config.json").exists():
            made_by = (
                subject.folder.relative_to(run).parts[0] if subject.folder.is_relative_to(run) else "the pair"
            )
            raise RuadaptError(
                f"{subject.folder} has no model, which the parameters promise: run {made_by} with them first"
            )
    return found


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
    `ruadapt.parallel.run_jobs`.

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
