"""A base model with another vocabulary: `E_new = T E_old` (METHOD section 3), on model folders."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ruadapt import lep
from ruadapt.checkpoints.model_folders import read_embeddings, write_rows
from ruadapt.vocab import conversion_matrix, load_tokenizer


def initialise(base_folder: Path, tokenizer_folder: Path, target: Path) -> dict[str, Any]:
    """Write the base model with the vocabulary of `tokenizer_folder`, its rows `T E_old` (METHOD section 3).

    Input embeddings and, where it is untied, the head are each made from their own old rows. Memory holds the
    old rows that are in use and one block of new ones, whatever the size of the body.

    Returns:
        `rows`, `copied` (rows that are one old row), `mean_pieces` (different old rows in each other row).

    Raises:
        RuadaptError: unreadable or inconsistent input; nothing is written then.
    """
    old = read_embeddings(base_folder)
    old_tokenizer, new_tokenizer = load_tokenizer(base_folder), load_tokenizer(tokenizer_folder)
    transfer = conversion_matrix(new_tokenizer, old_tokenizer, old.height())
    matrices = {role: partial(lep.initialise, rows, transfer) for role, rows in old.matrices().items()}
    write_rows(base_folder, target, transfer.shape[0], matrices, tokenizer_folder)
    pieces = torch.bincount(transfer.indices()[0], minlength=transfer.shape[0])
    composed = pieces > 1
    return {
        "rows": transfer.shape[0],
        "copied": int((~composed).sum()),
        "mean_pieces": float(pieces[composed].double().mean()) if composed.any() else 1.0,
    }
