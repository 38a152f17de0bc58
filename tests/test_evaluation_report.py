"""`ruadapt evaluate` on a tiny pair: one report, results kept, and every mishap named and counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.commands import comparison
from ruadapt.commands.comparison import (
    Measured,
    bits_table,
    difference_table,
    error_table,
    score_table,
    secondary_table,
)
from ruadapt.commands.evaluate import write_report
from ruadapt.evaluation.statistics import ITEM_COLUMNS

TASKS = "world_people_ru,world_yes_no_ru,world_reading_ru,world_copy_sentence_en"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Пекарь живёт у реки.\nThe baker lives by the river.\n" * 3, encoding="utf-8")
    return path


def test_one_report_compares_models_and_keeps_results(
    tiny_pair: Any, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = [tiny_pair.instruct, "--against", tiny_pair.base, "--tasks", TASKS, "--items-per-task", 2]
    asked += ["--text", f"ru={text}", "--out", out, "--context", 32, "--json"]
    first = run(*asked)
    assert first.exit_code == 0, first.output
    tables = json.loads(first.stdout)
    assert {row["model"] for row in tables["scores"]} == {"base", "instruct"}
    assert [row["model"] for row in tables["differences"]] == ["instruct"] * len(tables["differences"])
    assert all(row["no_worse"] in (True, False) for row in tables["differences"])
    bits = {row["model"]: row for row in tables["bits_per_byte"]}
    assert bits["instruct"]["difference"] == pytest.approx(bits["instruct"]["value"] - bits["base"]["value"])
    assert bits["base"]["bytes"] == len(text.read_bytes()) - 6 and bits["base"]["start"] == "<|endoftext|>"
    # A random model never ends: all its free answers are cut, and counted.
    assert {row["cut"] for row in tables["counts"] if "reading" in row["asked"]} == {2}
    assert tables["errors"] == [] and len(tables["scores"]) == 8 and len(tables["differences"]) == 4
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "## Differences to base" in report and "| too few items to tell (2 shown) |" in report
    assert "| world_people_ru | choice | 2 |" in report
    # The second time no model is opened.
    monkeypatch.setattr(comparison, "load", lambda folder: pytest.fail("opened again"))
    assert json.loads(run(*asked).stdout) == tables


def test_groups_get_a_picture_and_paired_differences(tiny_pair: Any, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    asked = [
        tiny_pair.instruct,
        "--against",
        tiny_pair.base,
        "--tasks",
        "world_knowledge_en,world_knowledge_ru",
    ]
    result = run(*asked, "--items-per-task", 8, "--text", f"ru={text}", "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "scores.png").stat().st_size > 5_000
    assert "| instruct | world_knowledge_en |" in result.stdout
    assert "difference detected" in result.stdout and "; no worse by 0.02: " in result.stdout


def test_a_failed_task_is_an_error_and_no_smaller_mean(tiny_pair: Any, tmp_path: Path, text: Path) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(tiny_pair.instruct, silent)
    (silent / "chat_template.jinja").unlink()
    asked = ["--tasks", "world_copy_ru,darumeru_rwsd", "--items-per-task", 1, "--text", f"ru={text}"]
    out = tmp_path / "out"
    result = run(silent, tiny_pair.base, *asked, "--out", out, "--json")
    assert result.exit_code == 1
    tables = json.loads(result.stdout)
    found = {(row["model"], row["number"]): row["error"] for row in tables["errors"]}
    assert "has no chat template" in found["silent", 2]
    assert "--data DIR" in found["base", 1] and "darumeru_rwsd" in json.dumps(tables["errors"])
    assert {row["model"] for row in tables["scores"]} == {"base"}
    assert {row["model"] for row in tables["bits_per_byte"]} == {"silent", "base"}
    assert sum(row["number"] for row in tables["errors"]) == 4


def test_a_damaged_result_is_named_and_done_again_once_removed(
    tiny_pair: Any, tmp_path: Path, text: Path
) -> None:
    asked = [tiny_pair.base, "--tasks", "world_people_ru", "--items-per-task", 1, "--text", f"ru={text}"]
    asked += ["--out", tmp_path / "out", "--json"]
    tables = json.loads(run(*asked).stdout)
    (kept,) = (tmp_path / "out").glob("results/*/world_people_ru/rows.jsonl")
    kept.write_text('{"id": "half', encoding="utf-8")
    broken = run(*asked)
    assert broken.exit_code == 1
    assert "rows.jsonl, line 1: not JSON" in json.loads(broken.stdout)["errors"][0]["error"]
    shutil.rmtree(kept.parent)
    assert json.loads(run(*asked).stdout) == tables


def test_a_changed_model_or_text_is_measured_anew(tiny_pair: Any, tmp_path: Path, text: Path) -> None:
    asked = ["--tasks", "", "--text", f"ru={text}", "--out", tmp_path / "out", "--json"]
    model = tmp_path / "model"
    shutil.copytree(tiny_pair.base, model)
    before = json.loads(run(model, *asked).stdout)["bits_per_byte"]
    shutil.copy(tiny_pair.instruct / "model.safetensors", model)
    after = json.loads(run(model, *asked).stdout)["bits_per_byte"]
    assert before[0]["value"] != after[0]["value"]
    text.write_text("Ж" * 50, encoding="utf-8")
    assert json.loads(run(model, *asked).stdout)["bits_per_byte"][0]["bytes"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--tasks", "world"], "not a model folder"),
        (["nobody/nothing"], "no folder and not in the hub's cache"),
        (["PAIR", "--tasks", "world,world_base"], "at a time"),
        (["PAIR", "--text", "my/text"], "NAME=PATH"),
        (["PAIR", "--text", "ru=nowhere.txt"], "does not exist"),
    ],
)
def test_mistakes_are_told_before_work(tiny_pair: Any, arguments: list[str], message: str) -> None:
    result = run(*[str(tiny_pair.base) if part == "PAIR" else part for part in arguments])
    assert result.exit_code == 2
    assert message in result.output


def rows(model: str, task: str, scores: list[float]) -> list[dict[str, Any]]:
    blank = dict.fromkeys(ITEM_COLUMNS, "")
    named = {"model": model, "language": "world", "group": "part", "task": task, "metric": "f1", "shots": 0}
    more = {"cut": False, "empty": False, "used_shots": 0, "exact": float("nan"), "classes": None}
    return [blank | named | more | {"id": str(n), "score": score} for n, score in enumerate(scores)]


def test_means_with_a_hole_are_left_out_of_scores_and_differences() -> None:
    table = pd.DataFrame([*rows("a", "x", [1, 0]), *rows("a", "y", [1, 1]), *rows("b", "x", [0, 0])])
    lost = {"model": "b", "task": "y", "asked": "world", "group": "part", "error": "broken"}
    errors = pd.DataFrame([lost, lost | {"task": "z"}])
    measured = Measured(table, pd.DataFrame(columns=["model", "text"]), errors)
    scores = score_table(measured)
    assert scores[scores["model"] == "a"]["task"].to_list() == ["x", "y", "", ""]
    assert scores[scores["model"] == "b"]["task"].to_list() == ["x"]
    for against in "ab":
        assert difference_table(measured, against)["task"].to_list() == ["x"]
    assert error_table(measured).iloc[0].to_dict() == {
        **{"model": "b", "error": "broken", "number": 2, "tasks": "y, z"}
    }


def test_a_report_of_nothing_but_mishaps_is_still_written(tiny_pair: Any, tmp_path: Path, text: Path) -> None:
    text.write_text("x", encoding="utf-8")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pair.base, broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    asked = ["--tasks", "world_copy_ru", "--text", f"ru={text}", "--out", tmp_path / "out"]
    result = run(broken, *asked)
    assert result.exit_code == 1
    assert (
        "| broken |" in result.stdout
        and "world_copy_sentence_ru, world_copy_paragraph_ru, ru" in result.stdout
    )
    holed = pd.DataFrame(rows("a", "x", [1, 0]))
    lost = {"model": "a", "task": "y", "asked": "world", "group": "part", "error": "a|b\nc"}
    empty = pd.DataFrame(columns=["model", "text"])
    tables = write_report(Measured(holed, empty, pd.DataFrame([lost])), tmp_path / "holed")
    assert tables["scores"]["task"].to_list() == ["x"]
    assert r"a\|b c" in (tmp_path / "holed" / "report.md").read_text(encoding="utf-8")


def test_exact_match_and_macro_f1_stand_beside_the_scores() -> None:
    table = pd.DataFrame([*rows("a", "x", [1, 0]), *rows("a", "y", [1, 0])])
    table["exact"] = [1.0, 0.0, None, None]
    table["classes"] = pd.Series([None, None, ["1", "1"], ["2", "1"]], dtype=object)
    found = secondary_table(Measured(table, pd.DataFrame(), pd.DataFrame())).set_index("measure")
    assert found["value"].to_dict() == {"exact match": 0.5, "macro F1": pytest.approx(1 / 3)}
    assert found.loc["exact match", "high"] == pytest.approx(
        0.5 + 12.706205 * 0.5
    )  # two items: the t quantile of 1 degree
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()


def test_bits_of_two_models_are_compared_on_the_same_documents() -> None:
    rng = pd.Series(range(1, 21), dtype=float)
    table = pd.concat(
        pd.DataFrame(
            {"model": m, "text": "ru", "bits": rng * f, "bytes": 10 * rng, "tokens": 3, "start": "<s>"}
        )
        for m, f in (("original", 10.0), ("adapted", 12.0))
    )
    measured = Measured(pd.DataFrame(columns=ITEM_COLUMNS), table, pd.DataFrame())
    found = bits_table(measured, "original").set_index("model")
    assert found["value"].to_list() == [1.0, 1.2]
    ends = found.loc["adapted", ["difference", "difference_low", "difference_high"]].to_list()
    assert ends == pytest.approx([0.2, 0.2, 0.2])  # a constant ratio: no spread
