"""The next-token loss taken in chunks, so that the logits of a batch never stand in memory at once.

4,096 tokens of a 262,144-row vocabulary make 4.3 GB of float32 logits, and the plain loss holds four such
matrices. Here a chunk's logits live until its gradients are taken, in the forward pass: softmax less one at
the label. `torch.utils.checkpoint` over chunks is shorter, but computes the logits twice: 1.75 times the time
(1,024 tokens, 100,000 rows, width 512, one thread). torch's `linear_cross_entropy` sums the head's gradient
in bfloat16 where products run in it: 4,096 tokens in 64 chunks are 0.7 % off, here 0.2 %. Fused kernels
(liger-kernel, cut-cross-entropy) need triton, so they don't run on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

IGNORED = -100
MUCH_LOGITS = 1 << 30  # bytes of float32 logits from which they are not held at once
CHUNK_BYTES = 1 << 28  # float32 logits of one chunk


class _SummedLoss(torch.autograd.Function):
    """Σ −log softmax(h Wᵀ)[label] over the counted tokens; its gradients are complete after the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.gradients = hidden_gradient, weight_gradient = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad[:2], strict=True)
        ]
        ctx.dtypes = hidden.dtype, weight.dtype
        factors = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk = chunk_tokens(len(weight))
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            inputs, counted = hidden[part].to(dtype), labels[part, None] != IGNORED
            targets = labels[part, None].where(counted, 0)
            logits = (inputs @ factors.T).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            total += ((normaliser - logits.gather(1, targets)) * counted).sum()
            # In place: no second matrix of this size.
            gradient = logits.sub_(normaliser).exp_()
            gradient.scatter_add_(1, targets, torch.full_like(normaliser, -1)).mul_(counted)
            gradient = gradient.to(dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ factors
            if weight_gradient is not None:
                weight_gradient += gradient.T @ inputs
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        made = zip(ctx.gradients, ctx.dtypes, strict=True)
        # In place, and so once: the head's gradient is as large as the head.
        return *(None if g is None else g.mul_(outer[0]).to(dtype) for g, dtype in made), None, None


def chunk_tokens(rows: int) -> int:
    """Return how many tokens' logits over `rows` are held at once."""
    return max(1, CHUNK_BYTES // (4 * rows))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor | int | None = None
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T` against `labels`, without ever holding all logits.

    Args:
        hidden: outputs of the body, `[tokens, hidden size]`.
        weight: of the output head, `[rows, hidden size]`; its gradient is taken where it requires one.
        labels: int64 `[tokens]`, -100 where nothing counts; already shifted.
        items: what the sum is divided by instead of the number of labels that count: that of a whole batch
            of which this is a part.

    Returns:
        The loss in nats per token, float32. Under autocast products run in its dtype, as a linear layer's do;
        logits, softmax and sums are float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    total: Tensor = _SummedLoss.apply(hidden, weight, labels, dtype)
    return total / ((labels != IGNORED).sum() if items is None else items)


@contextmanager
def chunked_loss(network: Any, tokens: int) -> Iterator[str | bool]:
    """Let a model compute its loss on `tokens` at once in chunks while this lasts, if their logits are many.

    Only calls with labels change; they return no logits. The computation stays within the model's own
    forward, so that DDP, FSDP and gradient checkpointing see what they always see.

    Yields:
        Whether it does, or why not where that would be of use.
    """
    model = network.get_base_model() if hasattr(network, "get_base_model") else network
    chunked = 4 * tokens * len(model.get_output_embeddings().weight) > MUCH_LOGITS
    reason = _difference(model) if chunked else None
    if not chunked or reason:
        yield reason or False
        return
    plain = model.forward

    def forward(
        input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return plain(input_ids=input_ids, **kwargs)
        states = model.get_decoder()(input_ids=input_ids, **kwargs)
        hidden = states.last_hidden_state.flatten(0, 1)
        shifted = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        head = model.get_output_embeddings().weight
        loss = chunked_cross_entropy(hidden, head, shifted, num_items_in_batch)
        return CausalLMOutput(loss=loss, hidden_states=states.hidden_states)

    model.forward = forward
    try:
        yield True
    finally:
        del model.forward  # with whatever accelerate has put around it


@torch.no_grad()
def _difference(model: Any) -> str | None:
    """Say where a model computes more than `hidden @ weight.T`: scales, caps and biases of its logits."""
    was_training, ids = model.training, torch.arange(16, device=model.device)[None]
    head = model.get_output_embeddings()
    hook = None
    model.eval()
    try:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        # A cap shows on large logits only.
        hook = model.get_decoder().register_forward_hook(lambda *call: _enlarged(call[2], 100))
        logits = model(input_ids=ids).logits
    except (AttributeError, TypeError) as error:
        return f"its decoder cannot be called apart from its head ({error})"
    finally:
        if hook is not None:
            hook.remove()
        model.train(was_training)
    plain = 100 * hidden @ head.weight.T
    same = torch.allclose(logits, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    if same and getattr(head, "bias", None) is None:
        return None
    return "its logits are more than the head's weight times hidden states: scaled, capped or with a bias"


def _enlarged(output: Any, factor: float) -> Any:
    output.last_hidden_state = output.last_hidden_state * factor
    return output
