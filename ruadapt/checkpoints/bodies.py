"""What continued pre-training did to the body of a base, carried to the instruct model (METHOD section 5).

Embeddings that were trained with a body belong to it. So every tensor of the body that training changed
becomes `W_i + α (W_b^ru − W_b)`; the other tensors stay the instruct model's own.
"""

from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ruadapt.checkpoints.model_folders import Layout
from ruadapt.checkpoints.tensor_files import FLOATS, RowFunction, row_blocks, same_bytes
from ruadapt.errors import RuadaptError


def carry(
    base: Layout, adapted: Layout, instruct: Layout, scale: float
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
    _require_one_form([base, adapted, instruct])
    looked_at = tqdm(names, desc="bodies compared", disable=None)
    different = [name for name in looked_at if not same_bytes(base.tensors[name], adapted.tensors[name])]
    report["relative_change"] = 0.0
    if not different:
        return {}, report

    def blocks(name: str, first: int, last: int) -> list[Tensor]:
        """Rows of the three models, a scalar being one row."""
        matrices = (torch.atleast_1d(model.tensors[name]) for model in (base, adapted, instruct))
        return [matrix[first:last].double() for matrix in matrices]

    def moved(name: str, first: int, last: int) -> Tensor:
        before, after, own = blocks(name, first, last)
        return own + scale * (after - before)

    total, changed = torch.zeros(4, dtype=torch.float64), []
    for name in tqdm(names, desc="bodies measured", disable=None):
        if base.tensors[name].dtype not in FLOATS:
            changed += [name] if name in different else []
            continue
        sums = torch.zeros(4, dtype=torch.float64)
        for part in row_blocks(base.tensors[name]):
            before, after, own = (rows.flatten() for rows in blocks(name, *part))
            change, drift = after - before, own - before
            sums += torch.stack([before @ before, change @ change, drift @ drift, change @ drift])
        total += sums
        # Other bytes may be the same numbers, of another dtype.
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


def _require_one_form(layouts: list[Layout]) -> None:
    """Refuse bodies whose tensors differ in name or shape."""
    bodies = {layout.folder: layout.body() for layout in layouts}
    for name in sorted(set().union(*bodies.values())):
        shapes = {path: str(list(body[name].shape)) for path, body in bodies.items() if name in body}
        if len(set(shapes.values())) > 1 or len(shapes) < len(bodies):
            told = ", ".join(f"{shapes.get(path, 'missing')} in {path}" for path in bodies)
            raise RuadaptError(f"{name} is {told}; give models of one architecture, or body scale 0")
