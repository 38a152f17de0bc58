"""Adapter folders become whole models with the same logits, or are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import tokenizer_folder
from test_families import FAMILIES, make_pair
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ruadapt.checkpoints import initialise, propagate, read_embeddings, verify
from ruadapt.checkpoints.adapters import merge
from ruadapt.cli import app
from ruadapt.errors import RuadaptError

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base: Path, folder: Path, config: Any) -> Path:
    """Write an adapter whose every trained number has moved."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = get_peft_model(model, config)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    adapter.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            torch.arange(0, min(660, model.get_input_embeddings().weight.shape[0]), 7)[None]
        ).logits
    return found


def assert_same_answers(base: Path, adapter: Path, merged: Path) -> None:
    """The merged folder answers as the model with its adapter beside it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
    "whole modules": lambda: lora(modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "token rows": lambda: lora(trainable_token_indices=[5, 600, 9]),
    "token rows of each": lambda: lora(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [7]}),
    "token rows alone": lambda: TrainableTokensConfig(token_indices=[5, 6], task_type="CAUSAL_LM"),
    "lora on embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
}


@pytest.fixture
def adapted(tmp_path: Path, tiny_pair_untied: TinyPair) -> Path:
    """The untied base with an extended vocabulary, 660 rows."""
    base = tiny_pair_untied.base
    initialise(base, tokenizer_folder(tmp_path / "tokenizer", base, "extended"), tmp_path / "initialised")
    return tmp_path / "initialised"


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_models_answer_as_with_the_adapter(tmp_path: Path, adapted: Path, name: str) -> None:
    folder = trained(adapted, tmp_path / "adapter", CONFIGS[name]())
    merge(adapted, folder, tmp_path / "merged", adapted)
    assert_same_answers(adapted, folder, tmp_path / "merged")
    found, source = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", adapted))
    assert found.keys() == source.keys()
    assert not all(torch.equal(found[key], source[key]) for key in found)
    if name == "token rows alone":
        same = [number not in (5, 6) for number in range(660)]
        rows = "model.embed_tokens.weight"
        assert torch.equal(found[rows][same], source[rows][same])
    assert verify(tmp_path / "merged")["rows"] == 660


def test_half_precision_is_the_rounded_float64_sum(tmp_path: Path, tiny_pair: TinyPair) -> None:
    base = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_pair.base, dtype=torch.bfloat16).save_pretrained(base)
    for path in tiny_pair.base.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    folder = trained(tiny_pair.base, tmp_path / "adapter", lora())
    merge(base, folder, tmp_path / "merged", base)
    source, found = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    weights = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    left, right = (weights[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
    exact = (source[f"{name}.weight"].double() + 2 * left @ right).bfloat16()
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert (found[f"{name}.weight"] == exact).double().mean() > 0.999


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_lep_from_an_adapter(tmp_path: Path, tiny_pair_untied: TinyPair, adapted: Path, scale: float) -> None:
    """Embeddings as from the merged model; what LoRA and trained norms changed, scaled, on its body."""
    pair = tiny_pair_untied
    folder = trained(adapted, tmp_path / "adapter", lora(modules_to_save=["embed_tokens", "lm_head", "norm"]))
    arguments = ["lep", pair.base, pair.instruct, folder, tmp_path / "lep", "--body-scale", scale, "--json"]
    needs = CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])
    assert json.loads(needs.stdout)["reads"].keys() == {"base", "instruct", "adapted"}
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "initialised", "lep", "tokenizer"]

    merge(adapted, folder, tmp_path / "merged", adapted)
    propagate(pair.base, pair.instruct, tmp_path / "merged", tmp_path / "expected", "conversion")
    found, expected = read_embeddings(tmp_path / "lep"), read_embeddings(tmp_path / "expected")
    assert torch.equal(found.input, expected.input)
    assert torch.equal(found.matrices()["head"], expected.matrices()["head"])
    old, new = (load_file(path / "model.safetensors") for path in (adapted, tmp_path / "merged"))
    instruct, result_tensors = (load_file(p / "model.safetensors") for p in (pair.instruct, tmp_path / "lep"))
    for name in old.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        wanted = instruct[name] + scale * (new[name] - old[name])
        torch.testing.assert_close(result_tensors[name], wanted, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "lep" / "ruadapt.json").read_text())["report"]["body"]
    changed = {name for name in old if not torch.equal(result_tensors[name], instruct.get(name))}
    assert set(record["tensors"]) == changed - {"model.embed_tokens.weight", "lm_head.weight"}
    assert record["changed"] == (19 if scale else 0) and record["of"] == 19
    told = CliRunner().invoke(app, ["verify", str(tmp_path / "lep"), str(pair.instruct)])
    assert told.exit_code == 0, told.output


def test_what_cannot_be_merged_is_named(tmp_path: Path, adapted: Path) -> None:
    folder = trained(adapted, tmp_path / "adapter", lora(modules_to_save=["norm"]))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(path.name for path in tmp_path.iterdir())
    wide = {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(9, 4)}
    save_file(tensors | wide, path)
    with pytest.raises(RuadaptError, match="peft cannot merge"):
        merge(adapted, folder, tmp_path / "no", adapted)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(RuadaptError, match="a pickled adapter"):
        merge(adapted, folder, tmp_path / "no", adapted)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_tied_heads_stay_tied_or_are_refused(tmp_path: Path, tiny_pair: TinyPair) -> None:
    base = tiny_pair.base
    for name, options, fits in (
        ("apart", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False}, False),
        ("lora on one", {"target_modules": ["embed_tokens"]}, False),
        ("together", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ("rows", {"trainable_token_indices": [3, 4]}, True),
    ):
        folder, merged = trained(base, tmp_path / name, lora(**options)), tmp_path / f"{name} merged"
        if fits:
            merge(base, folder, merged, base)
            assert_same_answers(base, folder, merged)
            assert verify(merged)["tied"]
        else:
            with pytest.raises(RuadaptError, match="ensure_weight_tying=True"):
                merge(base, folder, merged, base)
            assert not merged.exists()


def test_what_is_stored_in_parts_is_merged(tmp_path: Path) -> None:
    """Files have an expert a tensor, transformers one tensor for all of them: its change must not be lost."""
    base, _ = make_pair(FAMILIES["Qwen3-MoE"], tmp_path)
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    folder = trained(base, tmp_path / "adapter", config)
    merge(base, folder, tmp_path / "merged", base)
    assert verify(tmp_path / "merged")["reloaded"]
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before, expected = logits(plain), logits(PeftModel.from_pretrained(plain, folder))
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    # The files hold 16 bits.
    assert (after - expected).norm() < 0.02 * (expected - before).norm()
    found, source = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", base))
    assert found.keys() == source.keys()
    assert any("experts" in name and not torch.equal(found[name], source[name]) for name in found)
