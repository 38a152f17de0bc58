"""Every notebook, executed on the smallest profile through the runner; a second run must do nothing."""

from pathlib import Path

import pandas as pd
import pytest

from ruadapt import files
from ruadapt.pipeline.runner import run_profile
from ruadapt.pipeline.stages import find_stages


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    run_profile("smoke", settings=[f"run_dir={folder}"])
    return folder


def test_every_stage_is_executed_and_traced(smoke: Path) -> None:
    names = [stage.name for stage in find_stages(files.project_root() / "notebooks")]
    assert len(names) == 9
    for name in names:
        record = files.read_json(smoke / "provenance" / f"{name}.json")
        assert record["status"] == "done"
        assert record["wall_clock_seconds"] > 0
        assert {"torch", "transformers", "tokenizers"} <= set(record["versions"])
        assert (smoke / "notebooks" / f"{name}.ipynb").exists()


def test_results_cover_what_the_parameters_promise(smoke: Path) -> None:
    scores = pd.read_csv(smoke / "08_evaluation" / "scores.csv")
    lep = scores[(scores["stage"] == "lep") & (scores["group"] == "micro")]
    parameters = files.read_json(smoke / "provenance" / "08_evaluation.json")["key"]["parameters"]
    # The control, the original vocabulary, is propagated by one method.
    kinds = len(parameters["vocabularies"]) * len(parameters["methods"]) + 1
    assert len(lep) == kinds * len(parameters["seeds"]) * 2
    assert scores["value"].between(0, 1).all() and (scores["low"] <= scores["high"]).all()
    bits = pd.read_csv(smoke / "08_evaluation" / "bits_per_byte.csv")
    assert set(bits["language"]) == {"en", "ru"} and (bits["bits_per_byte"] > 0).all()
    for name in ("figure1", "figure2", "characters_per_token", "speed"):
        for suffix in ("png", "pdf"):
            assert (smoke / "09_figures" / f"{name}.{suffix}").stat().st_size > 2000
    for name in ("table2", "table3", "table4"):
        assert (smoke / "09_figures" / f"{name}.csv").exists() and (
            smoke / "09_figures" / f"{name}.md"
        ).exists()


def test_extended_vocabulary_keeps_english_and_shortens_russian(smoke: Path) -> None:
    measures = pd.read_csv(smoke / "08_evaluation" / "characters_per_token.csv")
    heldout = measures[measures["text"] == "held-out text"].set_index(["vocabulary", "language"])
    density = heldout["characters_per_token"]
    assert density["extended", "en"] == density["original", "en"]
    assert density["extended", "ru"] >= 1.6 * density["original", "ru"]


def test_a_second_run_does_nothing(smoke: Path) -> None:
    lines: list[str] = []
    assert run_profile("smoke", settings=[f"run_dir={smoke}"], announce=lines.append) == []
    assert all(line.endswith("fresh") for line in lines if line.startswith("["))
