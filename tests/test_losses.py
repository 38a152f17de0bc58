"""Two heads that do less than the models' own, against it: values, gradients, and when they are used."""

import copy
from typing import Any

import pytest
import torch
from conftest import TinyPair
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, LlamaConfig

from ruadapt.training import losses
from ruadapt.training.losses import fuse_head, only_counted

SMALL: dict[str, Any] = {"vocab_size": 50, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = SMALL | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def model_of(kind: str, pairs: dict[str, TinyPair]) -> Any:
    if kind in pairs:
        return AutoModelForCausalLM.from_pretrained(pairs[kind].base)
    capped = Gemma2Config(**LLAMA, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0)
    scaled = CohereConfig(**LLAMA, logit_scale=0.0625, pad_token_id=0)
    biased = GPTJConfig(**SMALL, n_embd=16, n_head=2, rotary_dim=4)
    return AutoModelForCausalLM.from_config({"capped": capped, "scaled": scaled, "biased": biased}[kind])


@pytest.mark.parametrize("kind", ["tied", "untied", "capped", "scaled", "biased"])
def test_a_model_computes_the_same_loss_and_gradients(
    kind: str, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "MUCH_LOGITS", 0)
    model = model_of(kind, {"tied": tiny_pair, "untied": tiny_pair_untied}).train(False)
    other, rows = copy.deepcopy(model), model.config.vocab_size
    ids = torch.arange(60).reshape(3, 20) * 7 % rows
    batch = {"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)}
    loss = model(**batch, num_items_in_batch=torch.tensor(50)).loss
    loss.backward()
    assert fuse_head(other, 60)
    out = other(**batch, num_items_in_batch=torch.tensor(50), fused_lm_head=True)
    out.loss.backward()
    assert not hasattr(out, "logits") and out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    require_equal_gradients(model, other)
    assert other(**batch).logits.shape == (3, 20, rows)


def require_equal_gradients(model: Any, other: Any) -> None:
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (first.grad - second.grad).norm() <= 1e-5 * first.grad.norm() + 1e-8, name


@pytest.mark.parametrize("kind", ["tied", "untied", "capped", "scaled", "biased"])
@pytest.mark.parametrize("items", [None, torch.tensor(50)])
def test_the_head_reads_counted_tokens_alone_and_the_loss_is_the_same(
    kind: str, items: Any, tiny_pair: TinyPair, tiny_pair_untied: TinyPair
) -> None:
    model = model_of(kind, {"tied": tiny_pair, "untied": tiny_pair_untied}).train(False)
    other, rows = copy.deepcopy(model), model.config.vocab_size
    ids = torch.arange(600).reshape(3, 200) * 7 % rows
    batch = {"input_ids": ids, "labels": torch.where(ids % 4 < 3, -100, ids), "num_items_in_batch": items}
    counted = int((batch["labels"][:, 1:] >= 0).sum())
    loss = model(**batch).loss
    loss.backward()
    with only_counted(other.get_output_embeddings(), batch):
        found = other(**batch)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    require_equal_gradients(model, other)
    assert counted <= found.logits.shape[1] < counted + losses.TILE
    assert other(input_ids=ids).logits.shape == (3, 200, rows)


def test_the_head_is_fused_where_logits_are_many() -> None:
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    assert not fuse_head(plain, 1 << 20)  # 200 MB are held at once
    assert fuse_head(plain, 1 << 23)
