"""The benchmarks run, at sizes where their numbers mean nothing."""

import json
import multiprocessing
from pathlib import Path

import pytest
from conftest import tiny_tokenizer

from benchmarks import corpora, lep, training


def steps(capfd: pytest.CaptureFixture[str]) -> dict[str, dict]:
    return {row["step"]: row for row in map(json.loads, capfd.readouterr().out.splitlines())}


def test_lep_equals_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(lep.SHAPES, "tiny", (608, 32, True, 4_000, 40_000))
    for rows in (600, 700):
        tiny_tokenizer(rows).save_pretrained(tmp_path / str(rows))
    lep.main(tmp_path / "700", tmp_path / "600", tmp_path / "models", "tiny", compare_plain=True)
    assert steps(capfd)["plain"]["result"]["equal_entries"] > 0.999


def tiny_training() -> None:
    training.SHAPES["tiny"] = (32, 1, 2, 1, 64, 3_000)
    sizes = {"batch": 2, "block": 16, "steps": 2, "rounds": 1, "tokens": 64, "rows": 2_000, "width": 16}
    training.main(shape="tiny", modes="embeddings", **sizes)


def test_the_chunked_loss_is_the_plain_one(capfd: pytest.CaptureFixture[str]) -> None:
    # A benchmark forks for each step, and threads with which other tests have trained can't be forked.
    process = multiprocessing.get_context("spawn").Process(target=tiny_training)
    process.start()
    process.join()
    assert process.exitcode == 0
    found = steps(capfd)
    assert max(found["relative differences"]["result"].values()) < 1e-5
    assert found["embeddings"]["result"]["trained_parameters"] == 3_000 * 32


def test_corpora_are_built_and_packed(capfd: pytest.CaptureFixture[str]) -> None:
    corpora.main([1])
    assert steps(capfd)["its tokens, 1 MB"]["result"] > 100
