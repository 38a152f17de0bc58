"""Estimates of a run: published sizes of models, memory computed by hand, what is missing."""

import json

import pytest
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.commands.estimates import estimate
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


def test_memory_agrees_with_a_calculation_by_hand() -> None:
    settings = ["pretraining_batch_size=4", "pretraining_block_size=1000"]
    found = estimate("qwen2.5-3b", settings)["memory_gigabytes"]["pretraining"]
    hidden, body = 2048, 3_085_938_688 - 151_936 * 2048
    states = 4 * (body + 199_936 * hidden) + 12 * 199_936 * hidden
    # Gradient checkpointing: one layer's activations, 2 bytes for each layer; logits of 1 GiB.
    logits = 10 * (1 << 28)
    batch = 34 * 4 * 1000 * hidden * (1 + 2 * 36 / 34) + logits
    assert found == pytest.approx((states + batch) / 1e9, abs=0.01)


def test_downloads_are_named_before_anything_starts() -> None:
    result = CliRunner().invoke(app, ["run", "llama-2-7b-saiga", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["downloads"]["data_sets"] == [
        "HuggingFaceFW/fineweb",
        "IlyaGusev/saiga_scored",
        "RefalMachine/darumeru",
        "dichspace/daru_treeway_eval",
        "dichspace/darulm",
    ]
    assert [*report["downloads"]["models_gigabytes"]] == ["meta-llama/Llama-2-7b-hf"]  # Saiga is an adapter
    assert report["disk"]["gigabytes"] > 100 and set(report["disk"]) >= {"free_gigabytes", "enough"}
    with pytest.raises(RuadaptError, match="no/model is no folder and could not be had"):
        estimate("qwen2.5-0.5b", ["base_model=no/model"])


def test_the_embedded_pair_downloads_nothing() -> None:
    report = estimate("mini")
    assert report["downloads"]["models_gigabytes"] == {}
    assert report["disk"]["gigabytes"] < 2
