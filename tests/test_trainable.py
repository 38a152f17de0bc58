"""Parts of a model that train: new rows, LoRA beside the embeddings, their rates, their saved forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.training.packing import collate_blocks, pack
from ruadapt.training.trainable import TrainingOptions, add_adapters, embedding_parameters, split_embeddings
from ruadapt.training.trainer import fit, load_for_training, pretrain

OPTIONS = TrainingOptions(
    steps=8, batch_size=4, learning_rate=0.03, seed=3, log_every=1, train="embeddings", weight_decay=0.0
)
NEW = list(range(500, 600))
KINDS = [
    {"train": "new_rows"},
    {"train": "new_rows", "lora_rank": 4},
    {"train": "embeddings", "lora_rank": 4},
]


@pytest.fixture(scope="module")
def blocks(tiny_pair: TinyPair) -> Dataset:
    texts = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6
    return pack(texts, AutoTokenizer.from_pretrained(tiny_pair.base), 32)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("changes", KINDS, ids=["rows", "rows and lora", "lora"])
def test_what_trained_is_saved_merged_and_as_an_adapter(
    kind: str,
    changes: dict[str, Any],
    tiny_pair: TinyPair,
    tiny_pair_untied: TinyPair,
    blocks: Dataset,
    tmp_path: Path,
) -> None:
    pair = tiny_pair if kind == "tied" else tiny_pair_untied
    options = replace(OPTIONS, **changes, chunked_loss=True)
    report = pretrain(pair.base, pair.base, blocks, tmp_path / "out", options, new_rows=NEW)
    assert report["loss"][-1]["loss"] < report["loss"][0]["loss"] and report["chunked_loss"] is True
    before = load_file(pair.base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()  # a tied head is not stored apart
    for name, tensor in after.items():
        changed = (tensor != before[name]).reshape(len(tensor), -1).any(dim=1)
        if "embed_tokens" in name or "lm_head" in name:
            rows = set(changed.nonzero().flatten().tolist())
            # A head's every row moves, an input row where the text has its token.
            possible = set(NEW) if options.train == "new_rows" else set(range(600))
            everywhere = kind == "tied" or "lm_head" in name
            assert rows == possible if everywhere else set() < rows < possible
        else:
            assert changed.any() == (options.lora_rank is not None and tensor.dim() == 2)
    # The adapter says the same as the merged folder, by peft's own reading of it …
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(480, 540)[None]
    assert torch.allclose(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5)
    # … and goes through LEP as the merged folder does.
    found = []
    for number, adapted_folder in enumerate((tmp_path / "out", tmp_path / "out" / "adapter")):
        folders = (pair.base, pair.instruct, adapted_folder, tmp_path / f"lep{number}")
        result = CliRunner().invoke(app, ["lep", *map(str, folders), "--method", "swap"])
        assert result.exit_code == 0, result.output
        found.append(load_file(tmp_path / f"lep{number}" / "model.safetensors"))
    for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if kind == "untied" else [])):
        assert torch.equal(found[0][name], found[1][name])


def test_new_rows_alone_have_optimiser_state(tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=3, save_every=2, train="new_rows")
    network = add_adapters(load_for_training(tiny_pair.base, 0)[0], options, NEW)
    fit(network, blocks, collate_blocks, options, checkpoints=tmp_path / "kept")
    state = torch.load(tmp_path / "kept" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert [tuple(value["exp_avg"].shape) for value in state.values()] == [(len(NEW), 32)]


def test_embeddings_learn_at_a_multiple_of_the_rate(tiny_pair_untied: TinyPair) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair_untied.base)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0.5
    )
    split_embeddings(optimizer, embedding_parameters(model), 10.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert rates == {id(p): 5.0 if any(p is e for e in own) else 0.5 for p in model.parameters()}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1, 0.1]


def test_a_rate_of_zero_for_the_embeddings_leaves_them(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    options = replace(OPTIONS, steps=2, train="all", embedding_learning_rate_factor=0.0)
    pretrain(tiny_pair.base, tiny_pair.base, blocks, tmp_path / "out", options)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_pair.base, tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


def test_checkpointing_and_chunks_change_memory_not_results(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    reports = {}
    for name, changes in {
        "plain": {"chunked_loss": False},
        "chunked": {"chunked_loss": True},
        "activations": {"gradient_checkpointing": True},
    }.items():
        options = replace(OPTIONS, train="all", accumulation=2, learning_rate=1e-3, **changes)
        reports[name] = pretrain(tiny_pair.base, tiny_pair.base, blocks, tmp_path / name, options)
    plain = [row["loss"] for row in reports["plain"]["loss"]]
    for name in ("chunked", "activations"):
        assert [row["loss"] for row in reports[name]["loss"]] == pytest.approx(plain, rel=2e-3)
    assert reports["plain"]["chunked_loss"] is False and reports["chunked"]["chunked_loss"] is True


def test_frozen_layers_of_a_bfloat16_checkpoint_stay_bfloat16(
    tiny_pair: TinyPair, blocks: Dataset, tmp_path: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_pair.base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    for options in (OPTIONS, replace(OPTIONS, train="new_rows", chunked_loss=True)):
        losses = []
        for dtype in (torch.float32, torch.bfloat16):
            network = load_for_training(tmp_path / "half", 0)[0]
            network = add_adapters(network, options, NEW)
            options = replace(options, bf16=True)
            report = fit(network, blocks, collate_blocks, options, dtype=dtype)
            losses.append([row["loss"] for row in report["loss"]])
            kinds = {name: p.dtype for name, p in network.named_parameters()}
            assert {kinds[n] for n in kinds if "_proj" in n} == {dtype}
            assert {kinds[n] for n in kinds if "_proj" not in n} == {torch.float32}
        assert losses[0] == losses[1]  # bit for bit


def test_mistakes_are_named(tiny_pair: TinyPair) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_pair.base)
    with pytest.raises(RuadaptError, match="needs the new rows"):
        add_adapters(network, replace(OPTIONS, train="new_rows"), [])
    with pytest.raises(RuadaptError, match="LoRA beside training all weights"):
        add_adapters(network, replace(OPTIONS, train="all", lora_rank=4), None)
