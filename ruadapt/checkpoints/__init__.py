"""The steps of the method on Hugging Face model folders: initialise and propagate.

Base, instruct and adapted models are folders. Their embeddings are made anew, and with them the tensors of
the body that training changed (`bodies`); everything else is copied (`model_folders`). The mathematics is in
`ruadapt.lep`, the mapping between vocabularies in `ruadapt.vocab`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ruadapt import lep
from ruadapt.checkpoints.model_folders import Embeddings, read_embeddings, require_rows, write_rows
from ruadapt.checkpoints.propagation import drift, propagate
from ruadapt.checkpoints.tensor_files import RowFunction
from ruadapt.checkpoints.verification import verify, verify_initialised, verify_propagated
from ruadapt.vocab import conversion_matrix, load_tokenizer

__all__ = [
    "Embeddings",
    "drift",
    "initialise",
    "propagate",
    "read_embeddings",
    "verify",
    "verify_initialised",
    "verify_propagated",
]


def initialise(
    base_folder: Path,
    tokenizer_folder: Path,
    target: Path,
    *,
    norm_correction: bool = False,
    decay: float = 0.0,
    space_weight: float = 1.0,
    head_from_input: bool = False,
    link: bool = False,
) -> dict[str, Any]:
    """Write the base model with the vocabulary of `tokenizer_folder`, its rows `T E_old` (METHOD section 3).

    Input embeddings and, where it is untied, the head are each made from their own old rows. Memory holds the
    old rows that are in use and one block of new ones, whatever the size of the body.

    Args:
        decay, space_weight: weights of a token's pieces, see `vocab.conversion_matrix`.
        head_from_input: the head's rows are made from the old input rows, too (the reference's `tie`).
        link: see `write_rows`.

    Returns:
        `rows`, `copied` (rows that are one old row), `mean_pieces` (different old rows in each other row).

    Raises:
        RuadaptError: unreadable or inconsistent input; nothing is written then.
    """
    old = read_embeddings(base_folder)
    old_tokenizer, new_tokenizer = load_tokenizer(base_folder), load_tokenizer(tokenizer_folder)
    require_rows(base_folder, old_tokenizer, old)
    transfer = conversion_matrix(
        new_tokenizer, old_tokenizer, old.input.shape[0], decay=decay, space_weight=space_weight
    )

    def rows_from(matrix: Tensor) -> RowFunction:
        return lambda first, last: lep.initialise(
            matrix, transfer, norm_correction=norm_correction, part=slice(first, last)
        )

    matrices = {
        name: rows_from(old.input if head_from_input else matrix) for name, matrix in old.matrices().items()
    }
    write_rows(
        base_folder,
        target,
        transfer.shape[0],
        matrices,
        tokenizer_folder,
        link=link,
        tokenizers=(old_tokenizer, new_tokenizer),
    )
    pieces = torch.bincount(transfer.indices()[0], minlength=transfer.shape[0])
    composed = pieces > 1
    return {
        "rows": transfer.shape[0],
        "copied": int((~composed).sum()),
        "mean_pieces": float(pieces[composed].double().mean()) if composed.any() else 1.0,
    }
