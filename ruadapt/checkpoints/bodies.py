"""What continued pre-training did to the body of a base, carried to the instruct model (METHOD section 5).

Embeddings that were trained with a body belong to it. So every tensor of the body that training changed
becomes `W_i + α (W_b^ru − W_b)`; the other tensors stay the instruct model's own.
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ruadapt.checkpoints.adapters import Adapter
from ruadapt.checkpoints.model_folders import Layout, rows_of
from ruadapt.checkpoints.tensor_files import RowFunction, is_float, map_tensor, row_blocks, same_bytes
from ruadapt.errors import RuadaptError

WAY_OUT = "give models of one architecture, or body scale 0 to leave the instruct model's body as it is"


@dataclass(frozen=True)
class AdaptedBody:
    """Where an adapted base's body is: in a model folder, or in a peft adapter that was trained on it."""

    layout: Layout
    adapter: Adapter | None = None

    def changed(self, base: Layout) -> list[str]:
        """Return the names of the tensors that are not, byte for byte, those of a base.

        Raises:
            RuadaptError: one of them is missing in one of the two models, or differs in shape.
        """
        _require_one_form([base, self.layout])
        before, after = base.body(), self.layout.body()
        names = sorted(before)
        trained = self.adapter.body(self.layout) if self.adapter else set()
        if unknown := sorted(trained.difference(names)):
            raise RuadaptError(
                f"{self.layout.folder}: its adapter changes {unknown[0]}, no tensor of the body"
            )
        looked_at = tqdm(names, desc="bodies compared", disable=None)
        return [name for name in looked_at if name in trained or not same_bytes(before[name], after[name])]

    def open(self, name: str) -> RowFunction:
        """Map a tensor and give its rows; an adapter's are summed in float64."""
        if self.adapter and name in self.adapter.body(self.layout):
            return self.adapter.rows(self.layout, name, dtype=torch.float64)
        return _open(self.layout, name)


def carry(
    base: Layout, adapted: AdaptedBody, instruct: Layout, scale: float
) -> tuple[dict[str, RowFunction], dict[str, Any]]:
    """Compare the bodies of base and adapted base, and make the instruct model's from the difference.

    Sums are in float64 and rounded once. Memory is that of one block of one tensor. Where base and adapted
    base are equal, nothing of the instruct model is read.

    Args:
        scale: α. With 0 no body is looked at.

    Returns:
        The rows of each tensor that changes, `W_i + α (W_b^ru − W_b)` in float64; and a report of `scale`,
        `changed` (a number of tensors) `of` all tensors of the body, `relative_change`
        `‖W_b^ru − W_b‖ / ‖W_b‖` and `relative_drift` `‖W_i − W_b‖ / ‖W_b‖` over the whole body (Frobenius),
        the `cosine` of change and drift, and the changed `tensors` by name. What was not measured is null:
        everything with α = 0, drift and cosine where nothing changed.

    Raises:
        RuadaptError: a tensor is missing in one of the three models, or differs in shape.
    """
    names = sorted(base.body())
    report: dict[str, Any] = {"scale": scale, "changed": 0, "of": len(names), "tensors": []}
    report |= dict.fromkeys(("relative_change", "relative_drift", "cosine"))
    if not scale:
        return {}, report
    _require_one_form([base, adapted.layout, instruct])
    different = set(adapted.changed(base))
    report["relative_change"] = 0.0
    if not different:
        return {}, report

    def blocks(name: str, first: int, last: int) -> list[Tensor]:
        """Rows of base, adapted base and instruct model; mapped anew, so that what was read can be let go."""
        opened = _open(base, name), adapted.open(name), _open(instruct, name)
        return [rows(first, last).double() for rows in opened]

    def moved(name: str, first: int, last: int) -> Tensor:
        before, after, own = blocks(name, first, last)
        return own + scale * (after - before)

    total, changed = torch.zeros(4, dtype=torch.float64), []
    for name in tqdm(names, desc="bodies measured", disable=None):
        if not is_float(base.stored[name]):
            changed += [name] if name in different else []
            continue
        sums = torch.zeros(4, dtype=torch.float64)
        for part in row_blocks(base.stored[name]):
            before, after, own = (rows.flatten() for rows in blocks(name, *part))
            change, drift = after - before, own - before
            sums += torch.stack([before @ before, change @ change, drift @ drift, change @ drift])
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
    return {name: partial(moved, name) for name in changed}, report


def _open(layout: Layout, name: str) -> RowFunction:
    """Map a stored tensor and give its rows; a scalar is one row."""
    return rows_of(torch.atleast_1d(map_tensor(layout.stored[name])))


def _require_one_form(layouts: list[Layout]) -> None:
    """Refuse bodies whose tensors differ in name or shape."""
    bodies = [layout.body() for layout in layouts]
    for name in sorted(set().union(*bodies)):
        holders = [layout.folder for layout, body in zip(layouts, bodies, strict=True) if name in body]
        if missing := [layout.folder for layout in layouts if layout.folder not in holders]:
            raise RuadaptError(f"{missing[0]} lacks {name}, which {holders[0]} holds; {WAY_OUT}")
        shapes = [body[name].shape for body in bodies]
        if len(set(shapes)) > 1:
            pairs = zip(shapes, holders, strict=True)
            told = ", ".join(f"{list(shape)} in {folder}" for shape, folder in pairs)
            raise RuadaptError(f"{name} differs in shape: {told}; {WAY_OUT}")
