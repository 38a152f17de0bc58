"""Parts of a model that train: LoRA beside the embeddings, frozen layers, memory."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.training import losses, trainer
from ruadapt.training.encoding import pack
from ruadapt.training.trainable import TrainingOptions, choose_trained, speed_up_rows
from ruadapt.training.trainer import fit

OPTIONS = TrainingOptions(
    steps=8, batch_size=4, learning_rate=0.03, seed=3, log_every=1, train="embeddings", weight_decay=0.0
)


@pytest.fixture(scope="module")
def blocks(tiny_pair: TinyPair) -> Dataset:
    texts = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6
    return pack(texts, AutoTokenizer.from_pretrained(tiny_pair.base), 32)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_lora_beside_the_embeddings_is_merged(
    kind: str,
    tiny_pair: TinyPair,
    tiny_pair_untied: TinyPair,
    blocks: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unmerged_logits: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    pair = tiny_pair if kind == "tied" else tiny_pair_untied
    monkeypatch.setattr(losses, "MUCH_LOGITS", 0)
    ids = torch.arange(480, 540)[None]
    kept = unmerged_logits(ids)
    report = fit(pair.base, blocks, tmp_path / "out", replace(OPTIONS, lora_rank=4))
    assert report["loss"][-1]["loss"] < report["loss"][0]["loss"]
    before = load_file(pair.base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()  # a tied head is not stored apart
    for name, tensor in after.items():
        assert (tensor != before[name]).any() == (tensor.dim() == 2), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, kept["logits"], atol=1e-4)


def test_checkpointing_and_chunks_change_memory_not_results(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name, much, checkpointing in (("plain", 1 << 40, False), ("chunks", 0, False), ("both", 0, True)):
        monkeypatch.setattr(losses, "MUCH_LOGITS", much)
        options = replace(OPTIONS, train="all", accumulation=2, learning_rate=1e-3)
        options = replace(options, gradient_checkpointing=checkpointing)
        report = fit(tiny_pair.base, blocks, tmp_path / name, options)
        found[name] = [row["loss"] for row in report["loss"]]
    assert found["chunks"] == pytest.approx(found["plain"], rel=2e-3)
    assert found["both"] == pytest.approx(found["plain"], rel=2e-3)


def test_frozen_layers_of_a_bfloat16_checkpoint_stay_bfloat16(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_pair.base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_pair.base).save_pretrained(tmp_path / "half")
    options, found = replace(OPTIONS, bf16=True), []

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, bool]:
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {kinds[name] for name in kinds if "_proj" not in name} == {torch.float32}
        return {"halved": {kinds[name] for name in kinds if "_proj" in name} == {torch.bfloat16}}

    for halved in (True, False):
        if not halved:
            monkeypatch.setattr(trainer, "halve_frozen_layers", lambda *_: None)
        target = tmp_path / str(halved)
        report = fit(tmp_path / "half", blocks, target, options, evaluate)
        assert report["evaluations"][0]["halved"] is halved
        found.append([row["loss"] for row in report["loss"]])
    assert found[0] == found[1]  # bit for bit


def test_lora_beside_all_weights_is_refused(tiny_pair: TinyPair) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_pair.base)
    with pytest.raises(RuadaptError, match="LoRA beside training all weights"):
        choose_trained(network, replace(OPTIONS, train="all", lora_rank=4))


def test_new_rows_learn_faster_and_no_copy_of_the_others_is_held() -> None:
    matrix = torch.nn.Parameter(torch.zeros(6, 3))
    optimizer = torch.optim.SGD([matrix], lr=0.1)
    speed_up_rows(optimizer, [matrix], [4, 5], 5.0)
    for step in (1, 2):
        matrix.grad = torch.ones(6, 3)
        optimizer.step()
        torch.testing.assert_close(matrix[:4].detach(), torch.full((4, 3), -0.1 * step))
        torch.testing.assert_close(matrix[4:].detach(), torch.full((2, 3), -0.5 * step))
        assert not [held for held in gc.get_objects() if torch.is_tensor(held) and held.shape == (4, 3)]
