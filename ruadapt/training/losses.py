"""The next-token loss, and trl's way to take it without ever holding all logits of a batch.

4,096 tokens of a 262,144-row vocabulary make 4.3 GB of float32 logits, and the plain loss holds four such
matrices. trl's head takes them in tiles of 4,096 tokens and 32,768 rows, and computes each twice. On a CPU
the loss then takes twice the time (1,024 tokens, 60,000 rows, width 512, one thread: 7.8 against 4.0
seconds), so it is used where logits are many.
"""

from typing import Any

from ruadapt.training.trainable import without_adapters

MUCH_LOGITS = 1 << 30
"""Bytes of float32 logits from which they are not held at once."""


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
