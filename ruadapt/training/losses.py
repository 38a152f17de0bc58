"""The next-token loss taken in chunks, so that the logits of a batch never stand in memory at once.

4,096 tokens of a 200,000-row vocabulary make 3.3 GB of float32 logits, and the plain loss holds four such
matrices. Here a chunk's logits live until its gradients are taken, in the forward pass. torch's own
`linear_cross_entropy` does the same, but under mixed precision rounds the loss and sums the head's gradient
over the chunks in bfloat16; here both stay float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

IGNORED = -100
# Float32 logits of one chunk: an eighth of all, within bounds. The head's gradient is read and written once
# for each chunk, so that few large ones are faster.
CHUNKS = 8
LEAST_CHUNK_BYTES = 128 << 20
MUCH_LOGITS = 1 << 30  # bytes of float32 logits from which they are not held at once


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies; its gradients are complete after the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        summed = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=summed) if wants_weight else None
        factors = weight.to(dtype)
        # Float64: a sum over many thousand tokens keeps the precision of its terms.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for first in range(0, len(hidden), chunk):
            inputs, targets = hidden[first : first + chunk].to(dtype), labels[first : first + chunk]
            counted = targets != IGNORED
            columns = targets.where(counted, 0)[:, None]
            logits = (inputs @ factors.T).float()
            # In place: no second matrix of this size. The greatest logit is left out of the sum, so that loss
            # and gradient of a sure and right answer keep their digits.
            greatest, places = logits.max(1, keepdim=True)
            right = logits.sub_(greatest).gather(1, columns)
            others = logits.exp_().scatter_(1, places, 0).sum(1, keepdim=True)
            total += (others.log1p() - right)[counted].sum()
            if not (wants_hidden or wants_weight):
                continue
            # The gradient by the logits: probabilities, less one at the target, nothing where ignored.
            missed = torch.where(places == columns, -others, right.exp() - (1 + others))
            logits.scatter_(1, places, 1).scatter_(1, columns, missed)
            logits.mul_(counted[:, None] / (1 + others))
            gradient = logits.to(dtype)
            if hidden_grad is not None:
                hidden_grad[first : first + chunk] = gradient @ factors
            if weight_grad is not None:
                if dtype == summed:
                    weight_grad.addmm_(gradient.T, inputs)
                else:
                    weight_grad += gradient.T @ inputs
        ctx.gradients = hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)
        return total.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # In place, and once: the head's gradient is as large as the head.
        scaled = [None if made is None else made.mul_(gradient) for made in ctx.gradients]
        del ctx.gradients
        return *scaled, None, None, None


def chunk_tokens(tokens: int, rows: int) -> int:
    """Return the tokens whose logits over `rows` are held at once, of `tokens` in all."""
    budget = min(MUCH_LOGITS, max(LEAST_CHUNK_BYTES, 4 * tokens * rows // CHUNKS))
    return max(1, budget // (4 * rows))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: Tensor | int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T` against `labels`, without ever holding all logits.

    Args:
        hidden: outputs of the body, `[tokens, hidden size]`.
        weight: of the output head, `[rows, hidden size]`; its gradient is taken where it requires one.
        labels: int64 `[tokens]`, -100 where nothing counts; already shifted.
        items: what the sum is divided by instead of the number of labels that count: that of a whole batch
            of which this is a part.
        chunk: tokens whose logits are held at once; None takes `chunk_tokens`.

    Returns:
        The loss in nats per token, float32. Under autocast products run in its dtype, as a linear layer's do;
        logits, softmax and sums are float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    chunk = chunk or chunk_tokens(len(hidden), len(weight))
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, dtype, chunk)
    return total / ((labels != IGNORED).sum() if items is None else items)


def _head_weight(head: Any) -> Tensor:
    """Return the weight a head computes with; peft's trained rows are merged into it."""
    if hasattr(head, "get_merged_weights"):
        return head.get_merged_weights(head.active_adapters)
    return head.weight


@contextmanager
def chunked_loss(network: Any) -> Iterator[None]:
    """Let a causal language model, or peft's wrapper of one, compute its loss in chunks while this lasts.

    Only calls with labels change; they return no logits. The computation stays within the model's own
    forward, so that DDP, FSDP and gradient checkpointing see what they always see.
    """
    model = network.get_base_model() if hasattr(network, "get_base_model") else network
    plain = model.forward

    def forward(
        input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return plain(input_ids=input_ids, **kwargs)
        kwargs.pop("logits_to_keep", None)
        hidden = model.get_decoder()(input_ids=input_ids, **kwargs).last_hidden_state
        shifted = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        head = _head_weight(model.get_output_embeddings())
        loss = chunked_cross_entropy(hidden.flatten(0, 1), head, shifted.flatten(), num_items_in_batch)
        return CausalLMOutput(loss=loss)

    model.forward = forward
    try:
        yield
    finally:
        # Accelerate may have put its own wrapper around it, which goes with it.
        del model.forward


def choose_loss(network: Any, wished: bool | None, tokens: int) -> tuple[bool, str | None]:
    """Return whether to take the loss of `tokens` at once in chunks, and why not where that was wished for.

    `wished` None: where the logits would take more than 1 GB.
    """
    if wished is None:
        wished = 4 * tokens * len(_head_weight(network.get_output_embeddings())) > MUCH_LOGITS
    reason = _difference(network) if wished else None
    return wished and reason is None, reason


@torch.no_grad()
def _difference(network: Any) -> str | None:
    """Say what a model computes besides `last_hidden_state @ weight.T`: scales, caps, biases of its logits.

    Found by looking at what enters its head and putting large logits in the place of what leaves it, not by
    the model's name.
    """
    model = network.get_base_model() if hasattr(network, "get_base_model") else network
    head = model.get_output_embeddings()
    entered: list[Tensor] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        entered.append(inputs[0])
        return torch.linspace(-100, 100, logits.numel()).reshape(logits.shape).to(logits)

    ids = torch.arange(4, device=model.device)[None]
    was_training = network.training
    network.eval()
    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids).logits
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    except (AttributeError, TypeError) as error:
        return f"its decoder cannot be called apart from its head ({error})"
    finally:
        hook.remove()
        network.train(was_training)
    if getattr(head, "bias", None) is not None:
        return "its head has a bias"
    if len(entered) != 1 or not torch.allclose(entered[0], hidden):
        return "it changes hidden states on their way to the head"
    if not torch.equal(logits, replace(head, (hidden,), logits)):
        return "it scales or caps its logits"
    return None
