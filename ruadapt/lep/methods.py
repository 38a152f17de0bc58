"""The methods (METHOD section 5), each a function of Gram matrices that gives a map of rows.

A new method is a function here and its name in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ruadapt.errors import RuadaptError
from ruadapt.lep.rows import LepInputs, mix, pick
from ruadapt.lep.sums import Gram, Sums, solve


@dataclass(frozen=True)
class Map:
    """`E_i^ru = E_b^ru + E_b^ru D + [T (E_i − E_b) − T E_b D]`, brackets where it is `residual`.

    Attributes:
        change: `D = W − I`, `[d, d]` float64; None for no map.
        residual: whether what the map leaves unexplained of the old tokens' moves is carried over, too.
        fitted_on: the sums that D was fitted on, for a report.
    """

    change: Tensor | None = None
    residual: bool = False
    fitted_on: Gram | None = None


def fitted(sums: Gram, *, residual: bool = False) -> Map:
    """Give the map of least squares over some sums."""
    return Map(solve(sums), residual, sums)


def swap(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru`."""
    return Map()


def overlap(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖E_b[O] W − E_i[O]‖_F` over the tokens O of both vocabularies."""
    return fitted(sums.over("shared"))


def conversion(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W`, `W = argmin ‖T E_b W − T E_i‖_F` over all new tokens."""
    return fitted(sums.over("new"))


def delta(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru + T (E_i − E_b)`."""
    return Map(residual=True)


def residual(sums: Sums) -> Map:
    """`E_i^ru = E_b^ru W + T E_i − T E_b W` with the W of conversion."""
    return fitted(sums.over("new"), residual=True)


METHODS: dict[str, Callable[[Sums], Map]] = {
    method.__name__: method for method in (swap, overlap, conversion, delta, residual)
}


def named(method: str) -> Callable[[Sums], Map]:
    """Return a method of METHODS; RuadaptError for another name."""
    if method not in METHODS:
        raise RuadaptError(f"unknown LEP method {method!r}; known: {', '.join(METHODS)}")
    return METHODS[method]


def fit(method: str, sums: Sums) -> Map:
    """Fit a method of METHODS; RuadaptError where it is unknown, or has no rows to fit on."""
    return named(method)(sums)


def apply(found: Map, inputs: LepInputs, adapted: Tensor, shares: Tensor) -> Tensor:
    """Give the instruct model's rows for some adapted ones by the formula of `Map`, `[n, d]` float64.

    Args:
        adapted: rows of E_b^ru, `[n, d]`.
        shares: the same rows of T, sparse `[n, V]`.
    """
    rows = adapted.to(inputs.device, torch.float64)
    change = torch.zeros_like(rows)
    if found.change is not None:
        change += rows @ found.change
    if found.residual:
        change += mix(shares, inputs.moves)
        if found.change is not None:
            change -= mix(shares, inputs.rows) @ found.change
    return rows + change


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
