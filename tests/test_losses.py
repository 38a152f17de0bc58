"""The loss in chunks against torch's plain one: values, gradients, and where it must not be used."""

import copy
from typing import Any

import pytest
import torch
from conftest import TinyPair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, LlamaConfig

from ruadapt.training import losses
from ruadapt.training.losses import chunked_cross_entropy, chunked_loss


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(2, 60),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_the_plain_loss(
    tokens: int, rows: int, chunk: int, ignored: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 7, generator=random, requires_grad=True)
    weight = torch.randn(rows, 7, generator=random, requires_grad=True)
    labels = torch.randint(0, rows, (tokens,), generator=random)
    labels[1:][torch.rand(tokens - 1, generator=random) < ignored] = -100
    plain = functional.cross_entropy(hidden.double() @ weight.double().T, labels)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(losses, "CHUNK_BYTES", 4 * rows * chunk)
        loss = chunked_cross_entropy(hidden, weight, labels)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-6)
    for made, wanted in zip((hidden.grad, weight.grad), expected, strict=True):
        assert (made - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6


def test_items_divide_the_sum_and_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    labels = torch.tensor([1, 2, -100, 3, 8, 0])
    total = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    loss = chunked_cross_entropy(hidden, weight, labels, items=20)
    assert loss.item() == pytest.approx(total.item() / 20, rel=1e-6)
    loss.backward()
    assert weight.grad is None
    nothing = chunked_cross_entropy(hidden, weight, torch.full((6,), -100), items=20)
    assert nothing.item() == 0


def test_under_autocast_the_loss_stays_float32() -> None:
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(99, 16, requires_grad=True)
    labels = torch.randint(0, 99, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels)
        plain = functional.cross_entropy(functional.linear(hidden, weight).float(), labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(functional.cross_entropy(hidden @ weight.T, labels), weight)[0]
    assert (weight.grad - exact).norm() < 0.01 * exact.norm()


def test_a_bfloat16_head_sums_its_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 20 * 2)
    hidden = torch.randn(4096, 8).bfloat16().abs()
    weight = torch.randn(20, 8).bfloat16().requires_grad_()
    labels = torch.randint(0, 20, (4096,))
    chunked_cross_entropy(hidden, weight, labels).backward()
    exact = weight.detach().float().requires_grad_()
    functional.cross_entropy(hidden.float() @ exact.T, labels).backward()
    assert weight.grad is not None and exact.grad is not None and weight.grad.dtype == torch.bfloat16
    assert (weight.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_model_computes_the_same_loss_and_gradients_in_chunks(
    kind: str, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "MUCH_LOGITS", 0)
    model = AutoModelForCausalLM.from_pretrained((tiny_pair if kind == "tied" else tiny_pair_untied).base)
    other = copy.deepcopy(model)
    ids = torch.arange(60).reshape(3, 20) * 7 % 600
    labels = torch.where(ids % 5 == 0, -100, ids)
    model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss.backward()
    with chunked_loss(other, 60) as chunked:
        assert chunked is True
        out = other(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(50))
        assert other(input_ids=ids).logits.shape == (3, 20, 600)
    out.loss.backward()
    assert out.logits is None
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (first.grad - second.grad).norm() <= 1e-5 * first.grad.norm(), name
    assert other(input_ids=ids, labels=ids).logits is not None


def test_heads_that_do_more_than_a_product_keep_the_plain_loss() -> None:
    small: dict[str, Any] = {"vocab_size": 50, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 0}
    llama = small | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    capped = AutoModelForCausalLM.from_config(
        Gemma2Config(**llama, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0)
    )
    scaled = AutoModelForCausalLM.from_config(CohereConfig(**llama, logit_scale=0.0625, pad_token_id=0))
    biased = AutoModelForCausalLM.from_config(GPTJConfig(**small, n_embd=16, n_head=2, rotary_dim=4))
    for model in (capped, scaled, biased):
        with chunked_loss(model, 1 << 30) as reason:
            assert isinstance(reason, str) and "its logits are more than" in reason
        assert model.training and not model.get_decoder()._forward_hooks
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**llama))
    for tokens, wanted in ((1 << 20, False), (1 << 23, True)):  # 200 MB are held at once
        with chunked_loss(plain, tokens) as chunked:
            assert chunked is wanted
