"""Learned Embedding Propagation on model folders: three in, one instruct model of the new vocabulary out."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ruadapt import lep
from ruadapt.checkpoints.bodies import carry
from ruadapt.checkpoints.model_folders import (
    Layout,
    read_embeddings,
    read_layout,
    require_rows,
    tying,
    write_rows,
)
from ruadapt.errors import RuadaptError
from ruadapt.vocab import conversion_matrix, load_tokenizer, shared_tokens
from ruadapt.vocab.spec import read_spec

# Fine-tuned pairs have a mean cosine of base and instruct rows near 0.99, strangers near 0.
STRANGERS_COSINE = 0.5
# How much nearer an adapted row is to its own token's old row than to another's: 0 with a wrong tokenizer.
OWN_ROWS_MARGIN = 0.1
# Rows that are looked at for these, at most about.
LOOKED_AT = 10_000


def propagate(
    base: Path,
    instruct: Path,
    adapted: Path,
    target: Path,
    method: str,
    *,
    force: bool = False,
    body_scale: float = 1.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the instruct model with the adapted base's vocabulary: LEP, METHOD section 5.

    The body is the instruct model's with the change that training made to the base's, `bodies.carry`; bit for
    bit its own where the base's was left as it is. Rows of its special and added tokens are its own.

    Args:
        method: a name in `lep.METHODS`.
        force: see `lep_inputs`.
        body_scale: α, the share of the body's change that is made; 0 leaves the instruct model's body.
        device: where matrices are multiplied and solved ("cpu", "cuda"); it needs float64.

    Returns:
        `lep.fit_report` for `input` and, where it is untied, `head`; for `body` the report of `bodies.carry`.

    Raises:
        RuadaptError: the three models do not belong together, or one is unreadable; nothing is written then.
    """
    lep.named(method)
    inputs = lep_inputs(base, instruct, adapted, force=force, device=device)

    rows, report = {}, {}
    for role, given in inputs.items():
        sums = lep.Sums(given)
        found = lep.fit(method, sums)
        report[role] = lep.fit_report(sums, method, found)
        rows[role] = partial(lep.propagate, replace(found, fitted_on=None), given)
        del sums, found  # d² numbers each, not needed for the rows

    before, after, own = map(read_layout, (base, adapted, instruct))
    body, report["body"] = carry(before, after, own, body_scale)
    write_rows(instruct, target, after.height(), rows, adapted, body)
    return report


def lep_inputs(
    base: Path, instruct: Path, adapted: Path, *, force: bool = False, device: str = "cpu"
) -> dict[str, lep.LepInputs]:
    """Read what LEP starts from, for `input` and, where it is untied, `head`; matrices stay mapped.

    Where base and instruct differ in height, the rows that both have are used; what the instruct model adds
    belongs to its added tokens.

    Args:
        force: go on although base and instruct look like strangers, or the adapted rows like another
            vocabulary's.

    Raises:
        RuadaptError: the three models do not belong together, or one is unreadable.
    """
    models = _read(base=base, instruct=instruct, adapted=adapted)
    old, own, new = (load_tokenizer(model.folder) for model in models.values())
    for model, tokenizer in zip(models.values(), (old, own, new), strict=True):
        require_rows(model.folder, tokenizer, model.height())
    common, height = min(models["base"].height(), models["instruct"].height()), models["adapted"].height()
    transfer = conversion_matrix(new, old, common, height)
    overlap_new, overlap_old = torch.tensor(shared_tokens(new, old), dtype=torch.long).reshape(-1, 2).T
    copied_new, copied_old = _copied(models, own, new)
    fitted = torch.zeros(height, dtype=torch.bool)
    fitted[transfer.indices()[0]] = True
    fitted[copied_new] = False
    pieces = _pieces(old, common)
    inputs = {}
    for role in models["base"].matrices():
        before, after, trained = (model.matrices()[role] for model in models.values())
        inputs[role] = lep.LepInputs(
            base=before[:common],
            instruct=after[:common],
            adapted=trained,
            transfer=transfer,
            fitted=fitted,
            shared=overlap_old[fitted[overlap_new]],
            copied_new=copied_new,
            copied_rows=after[copied_old],
            pieces=pieces,
            device=device,
        )
        if not force:
            _require_pair(models, role, inputs[role])
            _require_own_rows(models["adapted"].folder, inputs[role], overlap_new, overlap_old)
    return inputs


def drift(base: Path, instruct: Path) -> dict[str, dict[str, float]]:
    """Say how far the instruct model's rows moved from the base's: `lep.compare` of input and untied head.

    Raises:
        RuadaptError: a folder is unreadable, or hidden sizes or tying differ.
    """
    models = _read(base=base, instruct=instruct)
    rows = slice(min(model.height() for model in models.values()))
    before, after = (model.matrices() for model in models.values())
    return {role: lep.compare(before[role][rows], after[role][rows]) for role in before}


def _read(**folders: Path) -> dict[str, Layout]:
    """Read the models' embeddings; refuse those of another hidden size or tying."""
    models = {name: read_embeddings(folder) for name, folder in folders.items()}
    widths: dict[str, Any] = {name: model.input.shape[1] for name, model in models.items()}
    heads: dict[str, Any] = {name: tying(model.tied) for name, model in models.items()}
    for what, values in (("hidden size", widths), ("tying of the head", heads)):
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RuadaptError(f"the models differ in {what}: {found}; LEP needs models of one architecture")
    return models


def _require_pair(models: dict[str, Layout], role: str, inputs: lep.LepInputs) -> None:
    """Refuse an instruct model that was not tuned from the base."""
    base, instruct = models["base"].folder, models["instruct"].folder
    some = slice(None, None, max(1, len(inputs.base) // LOOKED_AT))
    cosine = lep.compare(inputs.base[some], inputs.instruct[some])["mean_cosine"]
    if cosine < STRANGERS_COSINE:
        raise RuadaptError(
            f"{instruct} is not tuned from {base}: the mean cosine of {role} rows is {cosine:.2f}, under "
            f"{STRANGERS_COSINE} (tuned models have about 0.99); use force to go on"
        )


def _require_own_rows(adapted: Path, inputs: lep.LepInputs, new_ids: Tensor, old_ids: Tensor) -> None:
    """Refuse an adapted model whose rows do not follow its tokenizer's tokens."""
    some = slice(None, None, max(1, len(old_ids) // LOOKED_AT))
    old, new = inputs.base[old_ids[some]], inputs.adapted[new_ids[some]]
    own, another = (lep.compare(old, rows)["mean_cosine"] for rows in (new, new.roll(1, dims=0)))
    if len(old) > 1 and own - another < OWN_ROWS_MARGIN:
        raise RuadaptError(
            f"{adapted}: rows of shared tokens resemble the base's rows of the same tokens no more "
            f"(cosine {own:.2f}) than those of others ({another:.2f}): the model was adapted with another "
            "tokenizer; use force to go on"
        )


def _copied(models: dict[str, Layout], instruct: Tokenizer, adapted: Tokenizer) -> tuple[Tensor, Tensor]:
    """New and old ids of the instruct tokenizer's added tokens that have a row.

    Raises:
        RuadaptError: the adapted vocabulary lost a special token: chat could not work.
    """
    pairs = []
    for old_id, token in instruct.get_added_tokens_decoder().items():
        new_id = adapted.token_to_id(token.content)
        if old_id >= models["instruct"].height():
            continue
        if new_id is not None and new_id < models["adapted"].height():
            pairs.append((new_id, old_id))
        elif token.special:
            raise RuadaptError(
                f"the adapted vocabulary lacks {token.content!r}, a special token of "
                f"{models['instruct'].folder}; build the new vocabulary from the instruct model's tokenizer"
            )
    ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]


def _pieces(tokenizer: Tokenizer, rows: int) -> Tensor:
    """Sparse `[rows, rows]` halves: the two tokens that a BPE merge makes a third of; none without merges."""
    vocabulary = tokenizer.get_vocab()
    made: dict[int, tuple[int, int]] = {}
    for left, right in read_spec(tokenizer)["model"].get("merges", []):
        made.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
    pairs = [(token, part) for token, parts in made.items() for part in parts]
    places = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    halves = torch.full((len(pairs),), 0.5, dtype=torch.float64)
    return torch.sparse_coo_tensor(places, halves, (rows, rows), check_invariants=True).coalesce()
