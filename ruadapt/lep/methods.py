"""The methods (METHOD section 5), each a function of Gram matrices that gives a map of rows.

A new method is a function here and its name in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ruadapt.errors import RuadaptError
from ruadapt.lep.rows import LepInputs, mix, pick
from ruadapt.lep.sums import Gram, Sums, solve

# Ridges that are tried, as shares of the mean squared length of a column.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Map:
    """`E_i^ru = E_b^ru + strength · (E_b^ru D + [T (E_i − E_b) − T E_b D])`, brackets where it is `residual`.

    Attributes:
        change: `D = W − I`, `[d, d]` float64; None for no map.
        residual: whether what the map leaves unexplained of the old tokens' moves is carried over, too.
        fitted_on: the sums that D was fitted on, for a report.
    """

    change: Tensor | None = None
    residual: bool = False
    strength: float = 1.0
    fitted_on: Gram | None = None


def fitted(sums: Gram, *, ridge: float = 0.0, residual: bool = False) -> Map:
    """Give the map of least squares over some sums."""
    return Map(solve(sums, ridge), residual, fitted_on=sums)


def swap(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru`."""
    return Map()


def overlap(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖E_b[O] W − E_i[O]‖_F` over the tokens O of both vocabularies."""
    return fitted(sums.over("shared"))


def conversion(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖T E_b W − T E_i‖_F` over all new tokens."""
    return fitted(sums.over("new"))


def bypass(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖E_b W − E_i‖_F` over the whole old vocabulary."""
    return fitted(sums.over("old"))


def delta(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru + T (E_i − E_b)`."""
    return Map(residual=True)


def residual(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W + T E_i − T E_b W` with the W of conversion."""
    return fitted(sums.over("new"), residual=True)


def ridge(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖T E_b W − T E_i‖² + λ ‖W − I‖²`, λ the best on held-out tokens."""
    (seen, held), found = sums.parts("new"), sums.over("new")
    tried = [share * float(found.xx.diagonal().mean()) for share in RIDGES]
    return fitted(found, ridge=min(tried, key=lambda size: held.error(solve(seen, size))))


# Simplest first: where held-out rows can't tell two apart, "auto" takes the one that stands earlier.
METHODS: dict[str, Callable[[Sums], Map]] = {
    method.__name__: method for method in (swap, overlap, conversion, bypass, delta, residual, ridge)
}


def require_known(method: str, *others: str) -> None:
    """Refuse a method that is neither in METHODS nor one of `others`.

    Raises:
        RuadaptError: the message lists the known ones.
    """
    if method not in (*METHODS, *others):
        raise RuadaptError(f"unknown LEP method {method!r}; known: {', '.join((*METHODS, *others))}")


def fit(method: str, sums: Sums, strength: float = 1.0) -> Map:
    """Fit a method of METHODS.

    Args:
        strength: factor of the change; 0 is swap.

    Raises:
        RuadaptError: the method is unknown, or has no rows to fit on.
    """
    require_known(method)
    return replace(METHODS[method](sums), strength=strength)


def apply(found: Map, inputs: LepInputs, adapted: Tensor, shares: Tensor) -> Tensor:
    """Give the instruct model's rows for some adapted ones by the formula of `Map`, `[n, d]` float64.

    Args:
        adapted: rows of E_b^ru, `[n, d]`.
        shares: the same rows of T, sparse `[n, V]`.
    """
    rows = adapted.to(inputs.device, torch.float64)
    change = torch.zeros_like(rows) if found.change is None else rows @ found.change
    if found.residual:
        change += mix(shares, inputs.moves)
        if found.change is not None:
            change -= mix(shares, inputs.rows) @ found.change
    return rows + found.strength * change


def propagate(found: Map, inputs: LepInputs, first: int = 0, last: int | None = None) -> Tensor:
    """Give the instruct model's rows for the new vocabulary, `[last − first, d]` in its own dtype.

    The rows `copied_new` are the instruct model's own, whatever the method.
    """
    part, last = slice(first, last), len(inputs.adapted) if last is None else last
    rows = apply(found, inputs, inputs.adapted[part], pick(inputs.transfer, part))
    rows = rows.to("cpu", inputs.instruct.dtype)
    inside = (inputs.copied_new >= first) & (inputs.copied_new < last)
    rows[inputs.copied_new[inside] - first] = inputs.copied_rows[inside]
    return rows
