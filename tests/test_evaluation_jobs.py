"""From model folders to tidy tables: which models, cached results, a wrong folder."""

from pathlib import Path
from typing import Any

import pytest

from data.world import TASKS
from paper.plan import Plan, subjects
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.jobs import collect, evaluate_job
from ruadapt.evaluation.statistics import ITEM_COLUMNS, task_scores
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import write_jsonl


def test_a_job_writes_tidy_tables_once(tiny_pair: Any, tmp_path: Path) -> None:
    labels = {"model": "original-base", "stage": "original", "vocabulary": "original"}
    labels |= {"method": "", "calibration": "", "seed": ""}
    write_jsonl(tmp_path / "ru.jsonl", [{"text": "Пекарь живёт у реки."}])

    def run(items: int) -> Path:
        benchmark = Benchmark(["world"], chat=False, shots=1, items_per_task=items)
        folders = (tiny_pair.base, tmp_path / "out", labels)
        return Path(evaluate_job(*folders, texts={"ru": tmp_path / "ru.jsonl"}, benchmark=benchmark))

    target = run(2)
    items, bits = collect([target], "items"), collect([target], "bits")
    assert list(items.columns)[: len(ITEM_COLUMNS)] == ITEM_COLUMNS
    assert set(items.groupby(["task", "language"]).size()) == {2}
    assert set(items["task"]) == set(TASKS) and len(TASKS) == 11
    assert set(items["shots"]) == {1}
    assert list(bits.columns) == ["id", *labels, "language", "of", "bits", "size"]
    assert bits["size"].item() == len("Пекарь живёт у реки.".encode())
    assert len(task_scores(items)) == 2 * (11 + 4 + 1)
    written = (target / "items.csv").stat().st_mtime_ns
    run(2)
    assert (target / "items.csv").stat().st_mtime_ns == written
    run(1)
    assert set(collect([target], "items").groupby(["task", "language"]).size()) == {1}


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
    names = [labels["model"] for _, _, labels in found]
    made = {folder for folder, _, labels in found if labels["stage"] != "original"}
    assert made == {tmp_path / name for name in promised} and len(set(names)) == len(names)
    assert [(labels["stage"], few_shot) for _, few_shot, labels in found] == [
        *(("original", False), ("original", True), ("initialised", True)),
        *[("adapted", True)] * 2,
        *[("lep", False)] * 2,
        *[("calibrated", False)] * 3,
    ]
    assert found[names.index("calibrated-original-instruct-seed1")][2] == {
        **{"model": "calibrated-original-instruct-seed1", "stage": "calibrated", "vocabulary": "original"},
        **{"method": "", "calibration": "instruct", "seed": 1},
    }
