"""Estimates of a run: published sizes of models, hand-computed operations and memory, what is missing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.commands.estimates import Machine, estimate
from ruadapt.errors import RuadaptError


@pytest.mark.parametrize(
    ("profile", "billions"),
    # Parameters as the models' own pages give them.
    [("qwen2.5-3b", 3.09), ("qwen2.5-0.5b", 0.49), ("llama-3-8b", 8.03), ("mistral-7b-openchat", 7.24)],
)
def test_downloads_have_the_size_of_the_models(profile: str, billions: float) -> None:
    sizes = estimate(profile)["downloads"]["models_gigabytes"]
    assert len(sizes) == 2
    assert list(sizes.values()) == pytest.approx([2 * billions] * 2, rel=0.02)


def test_operations_and_memory_agree_with_a_calculation_by_hand() -> None:
    settings = ["pretraining_epochs=2", "text_characters_ru=1_000_000_000"]
    settings += ["pretraining_batch_size=2", "pretraining_block_size=1000"]
    with pytest.raises(RuadaptError, match=r"pretraining_batch_size counts .* 2 is no multiple of 4"):
        estimate("qwen2.5-3b", settings, Machine(devices=4))
    settings[-2] = "pretraining_batch_size=4"
    report = estimate("qwen2.5-3b", settings, Machine(devices=4, teraflops=100, utilisation=0.5))
    training = report["trainings"][0]
    # The control with the old vocabulary at 2.5 characters a token, and the extended one at 3.7.
    tokens = [2e9 / 2.5, 2e9 / 3.7]
    assert training["models"] == 2 and training["tokens"] == pytest.approx(sum(tokens), abs=2)
    hidden, body = 2048, 3_085_938_688 - 151_936 * 2048
    flops = sum(
        count * (6 * (body + height * hidden) + 2 * height * hidden)
        for count, height in zip(tokens, (151_936, 199_936), strict=True)
    )
    assert training["petaflops"] == pytest.approx(flops / 1e15, rel=1e-3)
    assert training["device_hours"] == pytest.approx(flops / (100e12 * 0.5) / 3600, abs=0.01)
    states = 4 * (body + 199_936 * hidden) + 12 * 199_936 * hidden
    # Gradient checkpointing: one layer's activations, 2 bytes for each layer; an eighth of the logits.
    batch = (34 * 4 * 1000 * hidden * (1 + 2 * 36 / 34) + 10 * 4000 * 199_936 / 8) / 4
    assert training["memory_gigabytes"] == pytest.approx((states + batch) / 1e9, abs=0.01)
    assert training["memory_gigabytes_sharded"] == pytest.approx((states / 4 + batch) / 1e9, abs=0.01)
    total = report["total"]
    assert total["wall_clock_hours"] == pytest.approx(total["device_hours"] / 4, abs=0.01)


def test_gates_and_missing_parameters_are_named_before_anything_starts(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "llama-2-7b-saiga", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert "GATED" in report["licences"]["meta-llama/Llama-2-7b-hf"]
    assert report["downloads"]["data_sets"] == [
        "HuggingFaceFW/fineweb",
        "IlyaGusev/saiga_preferences",
        "IlyaGusev/saiga_scored",
        "RefalMachine/darumeru",
        "dichspace/daru_treeway_eval",
        "dichspace/darulm",
    ]
    assert report["disk"]["gigabytes"] > 100 and set(report["disk"]) >= {"free_gigabytes", "enough"}
    # A local corpus tells its length; a model that is nowhere is an error.
    (tmp_path / "ru.txt").write_text("слово " * 3000)
    text = ["corpus_mix=[]", f"corpus_ru={tmp_path / 'ru.txt'}", f"corpus_en={tmp_path}"]
    short = estimate("qwen2.5-0.5b", text)["trainings"][0]["tokens"]
    assert short == pytest.approx(18_000 / 2.5 + 18_000 / 3.7, rel=0.05)
    with pytest.raises(RuadaptError, match="configuration of no/model can't be had"):
        estimate("qwen2.5-0.5b", ["base_model=no/model"])


def test_the_embedded_pair_downloads_nothing() -> None:
    report = estimate("mini")
    assert report["still_to_be_given"] == [] and report["downloads"]["models_gigabytes"] == {}
    assert report["disk"]["gigabytes"] < 2 and report["total"]["device_hours"] < 1
