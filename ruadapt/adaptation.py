"""The units of work of stages 5 and 7, as functions that worker processes can import.

Each is one model folder, built once (`files.cached`): continued pre-training of a base with its bits-per-byte
curve, self-calibration answers, calibration of an instruct model.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ruadapt import files
from ruadapt.calibration import TuningOptions, answer_prompts, finetune
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.perplexity import bits_per_byte
from ruadapt.launching import built_together
from ruadapt.packing import pack, take_characters
from ruadapt.recording import EvaluationHook
from ruadapt.training import TrainingOptions, pretrain

REPORT = "training.json"


def adapt(
    source: Path,
    target: Path,
    corpus: Path,
    heldout: dict[str, Path],
    characters: int,
    epochs: int,
    evaluations: int,
    documents: int,
    block_size: int,
    options: dict[str, Any],
    logs: Path | None = None,
) -> dict[str, Any]:
    """Continue pre-training of `source` on the first `characters` of a corpus; write the model to `target`.

    Args:
        source: a base with the vocabulary to train, tokenizer included.
        heldout: corpus of held-out text by language; the first `documents` of each make the curve.
        epochs: passes over the text; they, not a number of steps, make vocabularies comparable.
        evaluations: how many points the curve has after its first.
        options: of `TrainingOptions`, without `steps` and `evaluate_every`.
        logs: folder for TensorBoard.

    Returns:
        The report of `pretrain`, with `characters` and `documents` of the text and
        `evaluations: [{"step", "tokens", "ru", "en", …}]` in bits per byte.

    Raises:
        RuadaptError: as `pretrain`; the text is shorter than one batch.
    """
    key = {
        "source": files.hash_path(source),
        "corpus": files.hash_path(corpus),
        "heldout": {language: files.hash_path(path) for language, path in heldout.items()},
        "characters": characters,
        "epochs": epochs,
        "evaluations": evaluations,
        "documents": documents,
        "block_size": block_size,
        "options": options,
    }

    def build(folder: Path) -> None:
        texts = list(take_characters(files.read_texts(corpus), characters))
        blocks = pack(texts, AutoTokenizer.from_pretrained(source), block_size)
        steps = epochs * len(blocks) // options["batch_size"]
        if not steps:
            raise RuadaptError(
                f"{corpus}: {len(texts)} texts make {len(blocks)} blocks of {block_size} tokens, less than "
                f"one batch of {options['batch_size']}; give more text or a smaller batch"
            )
        every = max(1, steps // evaluations)
        report = pretrain(
            source,
            source,
            blocks,
            folder,
            TrainingOptions(steps=steps, evaluate_every=every, **options),
            evaluate=_curve(source, heldout, documents, block_size),
            checkpoints=target.with_name(f".{target.name}.checkpoints"),
            logs=logs,
        )
        report |= {"characters": sum(map(len, texts)), "documents": len(texts)}
        files.write_json(folder / REPORT, report)

    result: dict[str, Any] = files.read_json(files.cached(target, key, build) / REPORT)
    return result


def _curve(folder: Path, heldout: dict[str, Path], documents: int, context: int) -> EvaluationHook:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {language: list(files.read_texts(path))[:documents] for language, path in heldout.items()}

    def evaluate(model: PreTrainedModel, step: int) -> dict[str, Any]:
        return {
            language: bits_per_byte(model, tokenizer, part, context=context, stride=context // 2).value
            for language, part in texts.items()
        }

    return evaluate


def answer(
    model: Path, prompts: Path, target: Path, part: int, parts: int, max_new_tokens: int
) -> dict[str, int]:
    """Let the original instruct model answer each `parts`-th prompt from `part`; write `target/rows.jsonl`.

    Returns:
        What `answer_prompts` counted.

    Raises:
        RuadaptError: as `answer_prompts`.
    """
    key = {
        "model": files.hash_path(model),
        "prompts": files.hash_path(prompts),
        "part": [part, parts],
        "max_new_tokens": max_new_tokens,
    }

    def build(folder: Path) -> None:
        mine = list(files.read_jsonl(prompts))[part::parts]
        rows, counts = answer_prompts(model, mine, max_new_tokens=max_new_tokens)
        files.write_jsonl(folder / "rows.jsonl", rows)
        files.write_json(folder / "counts.json", counts)

    counts: dict[str, int] = files.read_json(files.cached(target, key, build) / "counts.json")
    return counts


def mix(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], share: float, seed: int
) -> list[dict[str, Any]]:
    """Return `rows` with `others` as exactly `share` of the whole (rounded); what is too many is left out.

    Raises:
        RuadaptError: `share` is not between 0 and 1, or one of the two is empty.
    """
    if not 0 < share < 1 or not rows or not others:
        raise RuadaptError(f"cannot mix {len(others)} rows as a share of {share} into {len(rows)} rows")
    total = min(len(rows) / (1 - share), len(others) / share)
    generator = random.Random(seed)
    return generator.sample(list(rows), max(1, round(total * (1 - share)))) + generator.sample(
        list(others), max(1, round(total * share))
    )


def calibrate(
    source: Path,
    target: Path,
    data: list[Path],
    copies: Path | None,
    share: float,
    options: dict[str, Any],
    logs: Path | None = None,
) -> dict[str, Any]:
    """Tune the instruct model `source` on chat rows; write the model to `target`.

    Args:
        data: files of chat rows, joined.
        copies: rows of the copy task, mixed in as `share` of all rows; None for none.
        options: of `TuningOptions`.
        logs: folder for TensorBoard.

    Returns:
        The report of `finetune`.

    Raises:
        RuadaptError: as `finetune` and `mix`.
    """
    key = {
        "source": files.hash_path(source),
        "data": [files.hash_path(path) for path in data],
        "copies": copies and files.hash_path(copies),
        "share": share if copies else 0,
        "options": options,
    }

    def build(folder: Path) -> None:
        chosen = TuningOptions(**options)
        rows = [row for path in data for row in files.read_jsonl(path)]
        if copies is not None:
            rows = mix(rows, list(files.read_jsonl(copies)), share, chosen.seed)
        report = finetune(source, rows, folder, chosen, logs=logs)
        files.write_json(folder / REPORT, report | {"options": asdict(chosen)})

    result: dict[str, Any] = files.read_json(built_together(target, key, build) / REPORT)
    return result
