"""Pre-training on the Trainer: what is trained, what is not, and the same weights after any interruption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.training.encoding import pack
from ruadapt.training.recording import last_checkpoint
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import fit

OPTIONS = TrainingOptions(steps=12, batch_size=4, learning_rate=5e-3, seed=3)
NEW = range(500, 600)
TEXTS = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6


@pytest.fixture(scope="module")
def blocks(tiny_pair: TinyPair) -> Dataset:
    return pack(TEXTS, AutoTokenizer.from_pretrained(tiny_pair.base), 32)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if torch.equal(first[name], second[name])}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_embeddings_only_leaves_the_body_bit_equal(
    kind: str, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    pair = tiny_pair if kind == "tied" else tiny_pair_untied
    options = replace(OPTIONS, train="embeddings", log_every=1, learning_rate=0.03)
    report = fit(pair.base, blocks, tmp_path / "out", options)
    before, after = weights(pair.base), weights(tmp_path / "out")
    embeddings = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "untied" else set())
    assert before.keys() - equal(before, after) == embeddings
    assert report["trained_parameters"] == sum(before[name].numel() for name in embeddings)
    assert report["loss"][-1]["loss"] < 0.95 * report["loss"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "tied")


class _Killed(Exception):
    pass


def test_frozen_tensors_get_no_optimiser_state(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    def stop(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 3:
            raise _Killed
        return {}

    options = replace(OPTIONS, train="embeddings", save_every=2, evaluate_every=1)
    with pytest.raises(_Killed):
        fit(tiny_pair.base, blocks, tmp_path / "out", options, stop, tmp_path / "kept")
    state = torch.load(tmp_path / "kept" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert [tuple(value["exp_avg"].shape) for value in state.values()] == [(600, 32)]


def test_a_training_shorter_than_its_steps_between_checkpoints_has_checkpoints(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    def stop(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 5:
            raise _Killed
        return {}

    options = replace(OPTIONS, steps=10, save_every=500, evaluate_every=1)
    with pytest.raises(_Killed):
        fit(tiny_pair.base, blocks, tmp_path / "out", options, stop, tmp_path / "kept")
    assert str(last_checkpoint(tmp_path / "kept")).endswith("checkpoint-4")
    with pytest.raises(_Killed):  # 0 asks for none
        fit(tiny_pair.base, blocks, tmp_path / "out", replace(options, save_every=0), stop, tmp_path / "none")
    assert last_checkpoint(tmp_path / "none") is None


def test_full_training_moves_every_matrix_and_keeps_dtype_and_settings(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.base, dtype=torch.bfloat16)
    model.save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_pair.base).save_pretrained(half)
    fit(half, blocks, tmp_path / "out", OPTIONS)
    before, after = weights(half), weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert not [name for name in equal(before, after) if before[name].dim() == 2]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (half / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (half, tmp_path / "out"))
    assert new == old


def test_same_seed_same_weights_and_another_seed_others(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        torch.rand(7)  # the state of the caller's generator must not matter
        fit(tiny_pair.base, blocks, tmp_path / name, replace(OPTIONS, steps=4, seed=seed))
    first, second, third = (weights(tmp_path / name) for name in ("first", "second", "third"))
    assert equal(first, second) == first.keys()
    assert "model.embed_tokens.weight" not in equal(first, third)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "all", "new_rows_learning_rate_factor": 3.0},
        {"train": "embeddings"},
        {"train": "embeddings", "lora_rank": 4},
    ],
    ids=["all", "embeddings", "lora"],
)
def test_a_resumed_training_ends_with_the_same_weights_and_curve(
    changes: dict[str, Any], tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    options = replace(OPTIONS, save_every=4, evaluate_every=2, log_every=2, **changes)

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == killed_at:
            raise _Killed
        return {"norm": float(model.get_input_embeddings().weight.norm())}

    seen: list[int] = []

    def watch(model: torch.nn.Module, step: int) -> dict[str, float]:
        seen.append(step)
        return evaluate(model, step)

    def run(name: str) -> dict[str, Any]:
        folders = (tmp_path / name, options, watch, tmp_path / "checkpoints")
        return fit(tiny_pair.base, blocks, *folders, new_rows=NEW)

    checkpoints, killed_at = tmp_path / "checkpoints", -1
    whole = run("whole")
    killed_at = 10
    with pytest.raises(_Killed):
        run("resumed")
    assert not (tmp_path / "resumed").exists()
    # A kill while the next checkpoint is written leaves it without its state: it must not be used.
    (checkpoints / "checkpoint-9").mkdir()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8")
    killed_at = -1
    seen.clear()
    report = run("resumed")
    assert seen == [10, 12]
    assert report["evaluations"] == whole["evaluations"]
    assert [row["step"] for row in report["evaluations"]] == [0, 2, 4, 6, 8, 10, 12]
    assert report["loss"] == whole["loss"]
    first = weights(tmp_path / "whole")
    assert equal(first, weights(tmp_path / "resumed")) == first.keys()
    assert not checkpoints.exists()


def test_the_evaluation_hook_does_not_disturb_training(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {}

    options = replace(OPTIONS, steps=4, evaluate_every=1)
    report = fit(tiny_pair.base, blocks, tmp_path / "hooked", options, evaluate)
    fit(tiny_pair.base, blocks, tmp_path / "plain", options)
    first = weights(tmp_path / "plain")
    assert equal(first, weights(tmp_path / "hooked")) == first.keys()
    assert [row["tokens"] for row in report["evaluations"]] == [128 * step for step in range(5)]


def test_a_nan_loss_stops_and_leaves_nothing(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    def poison(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 3:
            model.model.norm.weight.data.fill_(float("nan"))
        return {}

    options = replace(OPTIONS, evaluate_every=1, log_every=2)
    with pytest.raises(RuadaptError, match=r"loss became nan .* step 4; lower .* last good checkpoint: none"):
        fit(tiny_pair.base, blocks, tmp_path / "out", options, poison)
    assert not list(tmp_path.iterdir())
    # Saved more often than logged: the broken weights reach no checkpoint, and the last good one is named.
    kept = tmp_path / "checkpoints"
    options = replace(options, save_every=2, log_every=10)
    with pytest.raises(RuadaptError, match=rf"step 4; .* last good checkpoint: {kept}/checkpoint-2"):
        fit(tiny_pair.base, blocks, tmp_path / "out", options, poison, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(kept / "checkpoint-2").values())


def test_a_gradient_that_is_nan_is_not_saved(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    def poison(model: torch.nn.Module, step: int) -> dict[str, float]:
        if step == 3:
            weight = model.get_input_embeddings().weight
            weight.register_hook(lambda gradient: gradient * float("nan"))
        return {}

    kept = tmp_path / "checkpoints"
    options = replace(OPTIONS, evaluate_every=1, save_every=1)
    with pytest.raises(RuadaptError, match=r"grad_norm became nan .*/checkpoint-3"):
        fit(tiny_pair.base, blocks, tmp_path / "out", options, poison, kept)


def test_mistakes_are_named(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="do not fill one batch of 5000"):
        fit(tiny_pair.base, blocks, tmp_path / "out", replace(OPTIONS, batch_size=5000))
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_losses(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    options = TrainingOptions(steps=4, batch_size=2, log_every=2)
    folder = tmp_path / "logs"
    report = fit(tiny_pair.base, blocks, tmp_path / "out", options, logs=folder)
    events = EventAccumulator(str(folder)).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in report["loss"]]
