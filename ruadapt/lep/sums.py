"""Least squares from Gram matrices: all that a fit of any number of rows needs, in O(d²) memory."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ruadapt.errors import RuadaptError
from ruadapt.lep.rows import LepInputs, blocks, mix, pick, untrained

# One in so many of the shared tokens is held out of a fit, to see how well the fit predicts it.
HELD_OUT = 5


@dataclass(frozen=True)
class Gram:
    """`xx` X'X and `xy` X'(Y − X), `[d, d]` float64, of `rows` rows X of the base, Y of the instruct model.

    A map is fitted as `D = W − I` on `Y − X`. That keeps the digits which a fit of W on Y would spend on the
    identity, and leaves directions that no row uses unchanged.
    """

    rows: int
    xx: Tensor
    xy: Tensor

    def __add__(self, other: "Gram") -> "Gram":
        return Gram(self.rows + other.rows, self.xx + other.xx, self.xy + other.xy)

    def facts(self) -> dict[str, float]:
        """Return how many rows there are, their rank and condition number."""
        values = torch.linalg.eigvalsh(self.xx)
        kept = values[values > _floor(self.xx)]
        condition = float((kept[-1] / kept[0]).sqrt()) if len(kept) else 1.0
        return {"rows": self.rows, "rank": len(kept), "condition": condition}


def gram(inputs: LepInputs, shares: Tensor) -> Gram:
    """Sum the Gram matrices of `X = S E_b` and `Y = S E_i` over blocks of rows.

    All is float64: a solution multiplies the errors of X'X by the square of the rows' condition number.

    Args:
        shares: S, sparse `[n, V]` float64, coalesced.
    """
    width = inputs.base.shape[1]
    xx, xy = torch.zeros(2, width, width, dtype=torch.float64, device=inputs.device)
    for block in blocks(len(shares)):
        part = pick(shares, block)
        rows, moves = mix(part, inputs.rows), mix(part, inputs.moves)
        for strip in blocks(width, max(256, width // 4)):  # X'X is symmetric: its upper half is enough
            xx[: strip.stop, strip] += rows[:, : strip.stop].T @ rows[:, strip]
        xy += rows.T @ moves
    return Gram(len(shares), xx.triu() + xx.triu(1).T, xy)


def solve(sums: Gram) -> Tensor:
    """Solve `argmin_D ‖X D − (Y − X)‖²` by the normal equations, `[d, d]`, of least norm."""
    factor, failed = torch.linalg.cholesky_ex(sums.xx)
    if not failed and factor.diagonal().square().min() > 1e3 * _floor(sums.xx):
        return torch.cholesky_solve(sums.xy, factor)
    values, vectors = torch.linalg.eigh(sums.xx)
    inverse = torch.where(values > _floor(sums.xx), 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ sums.xy))


def _floor(matrix: Tensor) -> Tensor:
    """Eigenvalues up to this are rounding."""
    return len(matrix) * torch.finfo(torch.float64).eps * matrix.diagonal().max()


class Sums:
    """The Gram matrices of one matrix of the model, each summed when a method first asks for it.

    Attributes:
        trained: bool `[V]`, false for old rows that no training has shaped; no sum uses them.
        held: old ids of the shared tokens that are held out of `blind` sums, in random order.
    """

    def __init__(self, inputs: LepInputs) -> None:
        self.inputs, self.trained = inputs, ~untrained(inputs.base)
        self.shared = inputs.shared[self.trained[inputs.shared]]
        order = torch.randperm(len(self.shared), generator=torch.Generator().manual_seed(0))
        self.held = self.shared[order[: len(order) // HELD_OUT]]
        self._parts: dict[str, list[Gram]] = {}
        self._blind = False

    def blind(self) -> "Sums":
        """Return the same sums without the rows that held-out tokens are part of."""
        other = copy.copy(self)
        other._blind = True
        return other

    def over(self, tokens: str) -> Gram:
        """Return the sums over the `new` tokens (as rows of T), or the tokens `shared` by both vocabularies.

        Raises:
            RuadaptError: there are no rows to fit on.
        """
        if tokens not in self._parts:
            shares = self._shares(tokens)
            if not len(shares):
                raise RuadaptError("LEP has no rows to fit on: the vocabularies share no ordinary token")
            apart = _touch(shares, self.held)
            self._parts[tokens] = [gram(self.inputs, pick(shares, rows)) for rows in (~apart, apart)]
        seen, others = self._parts[tokens]
        return seen if self._blind else seen + others

    def _shares(self, tokens: str) -> Tensor:
        """Return the rows of a fit as shares of old rows, sparse `[n, V]`."""
        if tokens == "new":
            odd = _touch(self.inputs.transfer, ~self.trained)
            return pick(self.inputs.transfer, self.inputs.fitted & ~odd)
        count = len(self.shared)
        ones = torch.ones(count, dtype=torch.float64)
        places, shape = torch.stack([torch.arange(count), self.shared]), (count, len(self.trained))
        return torch.sparse_coo_tensor(places, ones, shape, check_invariants=True).coalesce()


def _touch(shares: Tensor, columns: Tensor) -> Tensor:
    """Say which rows have a share of some columns, bool `[n]`."""
    marks = torch.zeros(shares.shape[1], 1, dtype=torch.float64)
    marks[columns] = 1
    return (shares @ marks)[:, 0] > 0
