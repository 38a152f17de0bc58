"""What continued pre-training did to the body of a base, carried to the instruct model (METHOD section 5).

Embeddings that were trained with a body belong to it. So every tensor of the body that training changed
becomes `W_i + α (W_b^ru − W_b)`; the other tensors stay the instruct model's own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ruadapt.checkpoints.adapters import Adapter
from ruadapt.checkpoints.model_folders import Layout, rows_of
from ruadapt.checkpoints.tensor_files import (
    DTYPES,
    RowFunction,
    Stored,
    map_tensor,
    row_blocks,
    same_bytes,
)
from ruadapt.errors import RuadaptError

# Numbers that are added up at a time: in float64 they stay in the processor's cache.
PIECE = 1 << 18
WAY_OUT = "give models of one architecture, or body scale 0 to leave the instruct model's body as it is"


@dataclass(frozen=True)
class AdaptedBody:
    """Where an adapted base's body is: in a model folder, or in a peft adapter that was trained on it."""

    layout: Layout
    adapter: Adapter | None = None

    @cached_property
    def stored(self) -> dict[str, Stored]:
        return self.layout.stored()

    @cached_property
    def trained(self) -> set[str]:
        """Names of the tensors that the adapter changes."""
        return self.adapter.body(self.layout) if self.adapter else set()

    def open(self, name: str) -> RowFunction:
        """Map a tensor and give its rows; an adapter's are summed in float64."""
        if self.adapter is None or name not in self.trained:
            return _open(self.stored[name])
        return self.adapter.rows(self.layout, name, dtype=torch.float64)


def carry(
    base: Layout, adapted: AdaptedBody, instruct: Layout, scale: float
) -> tuple[dict[str, RowFunction], dict[str, Any]]:
    """Compare the bodies of base and adapted base, and make the instruct model's from the difference.

    Sums are in float64 and rounded once. Memory is that of one block of one tensor. Where base and adapted
    base are equal, nothing of the instruct model is read.

    Args:
        scale: α. With 0 no body is looked at.

    Returns:
        The rows of each tensor that changes, `W_i + α (W_b^ru − W_b)`, in its dtype; and a report of
        `scale`, `changed` (a number of tensors) `of` all tensors of the body, `relative_change`
        `‖W_b^ru − W_b‖ / ‖W_b‖` and `relative_drift` `‖W_i − W_b‖ / ‖W_b‖` over the whole body (Frobenius),
        the `cosine` of change and drift, and the changed `tensors` by name. What was not measured is null:
        everything with α = 0, drift and cosine where nothing changed.

    Raises:
        RuadaptError: a tensor is missing in one of the three models, or differs in shape.
    """
    stored = {"base": base.stored(), "adapted": adapted.stored, "instruct": instruct.stored()}
    names = sorted(stored["base"].keys() - base.embedding_names())
    report: dict[str, Any] = {
        "scale": scale,
        "changed": 0,
        "of": len(names),
        "relative_change": None,
        "relative_drift": None,
        "cosine": None,
        "tensors": [],
    }
    if not scale:
        return {}, report
    _require_one_form({"base": base, "adapted": adapted.layout, "instruct": instruct}, stored)
    if unknown := sorted(adapted.trained.difference(names)):
        raise RuadaptError(
            f"{adapted.layout.folder}: its adapter changes {unknown[0]}, no tensor of the body"
        )

    def differs(name: str) -> bool:
        return name in adapted.trained or not same_bytes(stored["base"][name], stored["adapted"][name])

    different = {name for name in tqdm(names, desc="bodies compared", disable=None) if differs(name)}
    report["relative_change"] = 0.0
    if not different:
        return {}, report
    total, changed = torch.zeros(4, dtype=torch.float64), []
    for name in tqdm(names, desc="bodies measured", disable=None):
        if not _is_float(stored["base"][name]):
            changed += [name] if name in different else []
            continue
        trained = partial(adapted.open, name) if name in different else None
        sums = _sums(stored["base"][name], stored["instruct"][name], trained)
        total += sums
        # Other bytes may be the same numbers: another dtype, or LoRA that was never trained.
        if sums[1] != 0:
            changed.append(name)
    own, change, drift, product = total.tolist()
    report |= {
        "changed": len(changed),
        "relative_change": sqrt(change / own) if own else None,
        "relative_drift": sqrt(drift / own) if own else None,
        "cosine": product / sqrt(change * drift) if change and drift else None,
        "tensors": changed,
    }
    return {name: _moved(stored, adapted, name, scale) for name in changed}, report


def _open(stored: Stored) -> RowFunction:
    """Map a stored tensor and give its rows; a scalar is one row."""
    return rows_of(torch.atleast_1d(map_tensor(stored)))


def _pieces(stored: Stored, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a block of rows into pieces of about PIECE numbers."""
    step = max(1, PIECE * stored.shape[0] // max(1, prod(stored.shape))) if stored.shape else 1
    for start in range(first, last, step):
        yield start, min(start + step, last)


def _moved(
    stored: Mapping[str, Mapping[str, Stored]], adapted: AdaptedBody, name: str, scale: float
) -> RowFunction:
    base, instruct = stored["base"][name], stored["instruct"][name]

    def rows(first: int, last: int) -> Tensor:
        # Opened anew for each block, so that what was read of a mapped file can be let go.
        before, own, after = _open(base), _open(instruct), adapted.open(name)
        made = torch.empty_like(own(first, last))
        for piece in _pieces(instruct, first, last):
            change = after(*piece).to(torch.float64, copy=True).sub_(before(*piece))
            made[piece[0] - first : piece[1] - first] = change.mul_(scale).add_(own(*piece))
        return made

    return rows


def _sums(base: Stored, instruct: Stored, adapted: Callable[[], RowFunction] | None) -> Tensor:
    """Add up squares of base, change and drift, and the product of change and drift: `[4]`, float64.

    Args:
        adapted: opens the adapted tensor; None where it is the base's.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for block in row_blocks(base):
        before, own, after = _open(base), _open(instruct), adapted() if adapted else None
        for piece in _pieces(base, *block):
            weights = before(*piece).double().reshape(-1)
            drift = own(*piece).double().reshape(-1).sub_(weights)
            total[0] += weights @ weights
            total[2] += drift @ drift
            if after is not None:
                change = weights.neg_().add_(after(*piece).reshape(-1))
                total[1] += change @ change
                total[3] += change @ drift
    return total


def _is_float(stored: Stored) -> bool:
    return stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point


def _require_one_form(layouts: Mapping[str, Layout], stored: Mapping[str, Mapping[str, Stored]]) -> None:
    """Refuse bodies whose tensors differ in name or shape."""
    bodies = {role: found.keys() - layouts[role].embedding_names() for role, found in stored.items()}
    for name in sorted(set().union(*bodies.values())):
        shapes = {role: stored[role][name].shape for role in bodies if name in bodies[role]}
        if missing := [role for role in bodies if role not in shapes]:
            holder = layouts[next(iter(shapes))].folder
            raise RuadaptError(f"{layouts[missing[0]].folder} lacks {name}, which {holder} holds; {WAY_OUT}")
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{list(shape)} in {layouts[role].folder}" for role, shape in shapes.items())
            raise RuadaptError(f"{name} differs in shape: {told}; {WAY_OUT}")
