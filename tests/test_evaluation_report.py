"""`ruadapt evaluate` on a tiny pair: one report, paired differences, results kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.evaluation import jobs

TASKS = "world_knowledge_ru,world_copy_en"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_one_report_compares_models_and_keeps_results(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = [tiny_pair.instruct, "--against", tiny_pair.base, "--tasks", TASKS, "--items-per-task", 2]
    asked += ["--out", out, "--json"]
    first = run(*asked)
    assert first.exit_code == 0, first.output
    tables = json.loads(first.stdout)
    assert {row["model"] for row in tables["scores"]} == {"base", "instruct"}
    assert {row["group"] for row in tables["scores"]} == {"knowledge", "copy", "micro"}
    assert {row["model"] for row in tables["differences"]} == {"instruct"}
    assert all(
        row["found"] == "too few items to tell (2 shown)" for row in tables["differences"] if row["task"]
    )
    # A random model never ends: all its free answers are cut, and counted.
    cuts = {row["task"]: row["cut"] for row in tables["answers"] if row["model"] == "base"}
    assert cuts["copy_sentence"] == 2 and cuts["people"] == 0
    assert "found" in (out / "differences.md").read_text()
    # The second time no model is opened.
    monkeypatch.setattr(jobs, "load", lambda folder: pytest.fail("opened again"))
    assert json.loads(run(*asked).stdout) == tables


def test_bases_are_asked_with_examples_and_read_texts(tiny_pair: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Пекарь живёт у реки.\nThe baker lives by the river.\n" * 3, encoding="utf-8")
    asked = [tiny_pair.base, "--tasks", "world", "--few-shot", "--items-per-task", 1, "--text", f"ru={text}"]
    result = run(*asked, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    tables = json.loads(result.stdout)
    (bits,) = tables["bits_per_byte"]
    assert bits["bytes"] == len(text.read_bytes()) - 6 and bits["bits_per_byte"] > 0
    assert {row["shots"] for row in tables["scores"]} == {5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--tasks", "world"], "is no folder and"),
        (["nobody/nothing"], "is no folder and"),
        (["PAIR", "--tasks", "wurld"], "there is no task wurld"),
        (["PAIR", "--tasks", "world,world_copy_ru"], "at a time"),
        (["PAIR", "--text", "my/text"], "NAME=PATH"),
        (["PAIR", "--few-shot", "--text", "ru=nowhere.txt"], "NAME=PATH"),
        (["PAIR", "--few-shot", *["--text", f"ru={__file__}"] * 2], "each text its own name"),
    ],
)
def test_mistakes_are_told_before_work(tiny_pair: Any, arguments: list[str], message: str) -> None:
    result = run(*[str(tiny_pair.base) if part == "PAIR" else part for part in arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
