"""The next-token loss, and trl's way to take it without ever holding all logits of a batch.

4,096 tokens of a 262,144-row vocabulary make 4.3 GB of float32 logits, and the plain loss holds four such
matrices. trl's head takes them in tiles of 4,096 tokens and 32,768 rows, and computes each twice. On a CPU
the loss then takes twice the time (1,024 tokens, 60,000 rows, width 512, one thread: 7.8 against 4.0
seconds), so it is used where logits are many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad

from ruadapt.training.encoding import IGNORED
from ruadapt.training.trainable import without_adapters

MUCH_LOGITS = 1 << 30
"""Bytes of float32 logits from which they are not held at once."""
TILE = 64
"""The head reads tokens by this multiple: the CPU's kernels are made anew for every shape."""


@contextmanager
def only_counted(head: torch.nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a model's head read only the tokens whose next one carries loss: in chats half of them do not.

    The loss is the same: `inputs` get `shift_labels`, which transformers takes as they are.

    Args:
        inputs: of the model, `labels` int64 [batch, tokens] among them.
    """
    following = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places = (following != IGNORED).nonzero()[:, 0]
    padding = (0, -len(places) % TILE)
    inputs["shift_labels"] = pad(following[places], padding, value=IGNORED)[None]
    places = pad(places, padding)
    hook = head.register_forward_pre_hook(lambda _, read: read[0].flatten(0, 1)[places][None])
    try:
        yield
    finally:
        hook.remove()


def fuse_head(network: Any, tokens: int) -> bool:
    """Give a model trl's fused head if the logits of `tokens` are many, and say whether it got it.

    It is used where the model is called with `fused_lm_head=True` and labels; then there are no logits.
    """
    model = without_adapters(network)
    many = 4 * tokens * len(model.get_output_embeddings().weight) > MUCH_LOGITS
    if many:
        from trl.trainer import add_fused_lm_head  # takes seconds, and most trainings go without it

        add_fused_lm_head(model)
    return many
