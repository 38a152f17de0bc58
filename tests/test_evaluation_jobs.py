"""From model folders to tidy tables: which models, cached results, a wrong folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.jobs import BITS_COLUMNS, collect, evaluate_job, first_items
from ruadapt.evaluation.plan import ORIGINAL, Plan, subjects
from ruadapt.evaluation.statistics import ITEM_COLUMNS, task_scores


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def entry(task: str, metric: str, number: int) -> dict[str, Any]:
    choices = ["дом", "река"] if metric in ("choice", "both_orders") else []
    return {
        "messages": [{"role": "user", "content": f"Вопрос {number}: где живёт врач?"}],
        "inputs": "",
        "outputs": "дом",
        "meta": {
            "id": f"{task}{number}",
            "task": task,
            "group": "knowledge",
            "language": "ru",
            "metric": metric,
            "choices": choices,
            "pair": f"p{number // 2}" if metric == "both_orders" else "",
        },
    }


KINDS = {"a": "choice", "b": "both_orders", "c": "f1"}
ITEMS = [entry(task, metric, number) for task, metric in KINDS.items() for number in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {
        "items": write_lines(tmp_path / "tasks.jsonl", ITEMS),
        "examples": write_lines(tmp_path / "fewshot.jsonl", ITEMS),
        "texts": {"ru": write_lines(tmp_path / "ru.jsonl", [{"text": "Пекарь живёт у реки."}])},
    }


def test_a_few_items_of_each_task_keep_pairs_whole() -> None:
    kept = first_items(ITEMS, 2)
    assert [item["meta"]["id"] for item in kept] == ["a0", "a1", "b0", "b1", "b2", "b3", "c0", "c1"]
    assert first_items(ITEMS, 0) == ITEMS


def test_a_job_writes_tidy_tables_once(tiny_pair: Any, tmp_path: Path, data: dict[str, Any]) -> None:
    labels = {"model": "original-base", "stage": "original", "vocabulary": "original"}
    labels |= {"method": "", "calibration": "", "seed": ""}
    arguments = {"folder": tiny_pair.base, "target": tmp_path / "out", "labels": labels, **data}
    target = Path(evaluate_job(**arguments, shots=1, items_per_task=2, context=64, stride=32))
    items, bits = collect([target], "items"), collect([target], "bits_per_byte")
    assert list(items.columns)[: len(ITEM_COLUMNS)] == ITEM_COLUMNS
    assert items.groupby("task").size().to_dict() == {"a": 2, "b": 2, "c": 2}
    assert list(bits.columns) == BITS_COLUMNS
    assert bits["bytes"].item() == len("Пекарь живёт у реки.".encode())
    assert len(task_scores(items)) == 3 + 1 + 1
    written = (target / "items.csv").stat().st_mtime_ns
    evaluate_job(**arguments, shots=1, items_per_task=2, context=64, stride=32)
    assert (target / "items.csv").stat().st_mtime_ns == written
    evaluate_job(**arguments, shots=1, items_per_task=1, context=64, stride=32)
    assert collect([target], "items").groupby("task").size().to_dict() == {"a": 1, "b": 1, "c": 1}


def test_a_run_without_a_promised_model_is_refused(tiny_pair: Any, tmp_path: Path) -> None:
    plan = Plan(
        vocabularies=["extended"],
        methods=["conversion"],
        calibration_vocabularies=["extended"],
        calibration_data=["self", "instruct"],
        seeds=[1],
    )
    with pytest.raises(RuadaptError, match="run 04_initialisation"):
        subjects(plan, tmp_path, tiny_pair.base, tiny_pair.instruct)
    promised = [
        "04_initialisation/extended",
        "05_continued_pretraining/original/seed1",
        "05_continued_pretraining/extended/seed1",
        "06_lep/original/conversion/seed1",
        "06_lep/extended/conversion/seed1",
        "07_calibration/original/instruct/seed1",
        "07_calibration/extended/self/seed1",
        "07_calibration/extended/instruct/seed1",
    ]
    for name in promised:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    found = subjects(plan, tmp_path, tiny_pair.base, tiny_pair.instruct)
    made = {
        subject.folder.relative_to(tmp_path).as_posix() for subject in found if subject.name[:8] != ORIGINAL
    }
    assert made == set(promised)
    assert [subject.system.stage for subject in found] == [
        *("original", "original", "initialised", "adapted", "adapted", "lep", "lep"),
        *("calibrated", "calibrated", "calibrated"),
    ]
    few_shot = {subject.system.stage for subject in found if subject.system.few_shot}
    assert few_shot == {"original", "initialised", "adapted"}
    assert len({subject.name for subject in found}) == len(found)
    control = next(s for s in found if s.name == "calibrated-original-instruct-seed1")
    assert control.labels() == {
        **{"model": control.name, "stage": "calibrated", "vocabulary": "original", "method": ""},
        **{"calibration": "instruct", "seed": 1},
    }
