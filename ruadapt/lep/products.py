"""Sums of products over the rows of a fit: all that its solution and its folds need, in O(d²) memory.

Every fit is over rows `x` of base and `y` of instruct minus base. Through T both are mixtures of old rows, so
`Σ w x xᵀ = E_bᵀ M E_b` with the sparse `M = Tᵀ diag(w) T` of the old vocabulary. M is diagonal but for the
few old tokens that make up new ones: one pass over the old rows does, however many new rows they make.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from ruadapt.lep.rows import LepInputs, blocks, mix

# Under this many multiplications a pass in float64 takes a second at most.
SMALL = 3e10
# Relative error of W that products may leave; beyond it the next precision is taken.
TOLERANCE = 3e-6


@dataclass(frozen=True)
class Basis:
    """Columns `[d, d]` in which the rows are nearly orthonormal, and their inverse."""

    columns: Tensor
    inverse: Tensor


@dataclass
class Products:
    """Sums over weighted rows x (base) and y (instruct minus base).

    `gram` Σwxxᵀ and `cross` Σwxyᵀ `[d, d]`, `rows` Σwx and `change` Σwy `[d]`, `squares` Σw|y|², `weight` Σw.
    """

    gram: Tensor
    cross: Tensor
    rows: Tensor
    change: Tensor
    squares: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, width: int, dtype: torch.dtype, device: str) -> "Products":
        shapes = ((width, width), (width, width), (width,), (width,), (), ())
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    def _values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def __iadd__(self, other: "Products") -> "Products":
        for mine, more in zip(self._values(), other._values(), strict=True):
            mine += more
        return self

    def mirror(self) -> None:
        """Complete a gram of which only the upper triangle was summed."""
        self.gram = self.gram.triu() + self.gram.triu(1).T

    def __sub__(self, other: "Products") -> "Products":
        return Products(*(a - b for a, b in zip(self._values(), other._values(), strict=True)))


@dataclass(frozen=True)
class Selection:
    """Which rows a fit uses.

    Attributes:
        alone: float64 `[V]`, the weight of each old row by itself.
        mixed: sparse float64 `[m, V]`, rows of T made of several old ones.
        weights: float64 `[m]`, theirs.
    """

    alone: Tensor
    mixed: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return int((self.alone > 0).sum()) + len(self.weights)


@dataclass(frozen=True)
class Sums:
    """Products of a selection: of all rows, and of those each fold's tokens are part of (`hold_out_mixed`).

    `singular` are the singular values of the weighted rows, greatest first (in `basis`, where one is given),
    `dtype` that of the multiplications, `error` the estimated relative error of a W solved from `total`.
    """

    total: Products
    held: list[Products]
    singular: Tensor
    dtype: torch.dtype
    error: float
    basis: Basis | None = None


def accumulate(
    inputs: LepInputs, selection: Selection, fold: Tensor, folds: int, *, basis: Basis | None = None
) -> Sums:
    """Sum the products of a selection in blocks of rows, in as much precision as its solution needs.

    Block products are float32, exact to 2⁻²⁴ of their own size, and added in float64. Where the rows are so
    ill-conditioned that this would show in W, they are computed again in float64.

    Args:
        fold: `[V]`, the fold in which each old row is held out, −1 for never.
    """
    small = len(selection) * inputs.base.shape[1] ** 2 < SMALL
    if basis is None and not small and inputs.base.dtype != torch.float64:
        sums = _accumulate(inputs, selection, fold, folds, torch.float32, None)
        if sums.error <= TOLERANCE:
            return sums
        del sums
    return _accumulate(inputs, selection, fold, folds, torch.float64, basis)


def _accumulate(
    inputs: LepInputs, selection: Selection, fold: Tensor, folds: int, dtype: torch.dtype, basis: Basis | None
) -> Sums:
    width = inputs.base.shape[1]
    # The last one is for rows that no fold holds out.
    parts = [Products.zeros(width, torch.float64, inputs.device) for _ in range(folds + 1)]
    for block in tqdm([*blocks(len(selection.alone))], desc="rows summed", leave=False, disable=None):
        for number in range(-1, folds):
            chosen = (selection.alone[block] > 0) & (fold[block] == number)
            ids = block.start + chosen.nonzero()[:, 0]
            if not len(ids):
                continue
            weights = selection.alone[ids].to(inputs.device, dtype)
            rows, change = inputs.pairs(ids, dtype)
            if basis is not None:
                rows = rows @ basis.columns
            plain = bool((weights == 1).all())
            weighted = (rows, change) if plain else (weights[:, None] * rows, weights[:, None] * change)
            parts[number] += _block(rows, change, *weighted, weights.sum())
    for products in parts:
        products.mirror()
    *held, total = parts
    for products in held:
        total += products
    total += _mixed(inputs, selection, torch.ones(len(selection.weights), dtype=torch.bool), dtype, basis)
    eigenvalues = torch.linalg.eigvalsh(total.gram)
    error = _error(total, eigenvalues, len(selection), dtype)
    return Sums(total, held, eigenvalues.clamp_min(0).sqrt().flip(0), dtype, error, basis)


def hold_out_mixed(inputs: LepInputs, selection: Selection, fold: Tensor, sums: Sums) -> None:
    """Add to each fold of `sums` the mixed rows its tokens are part of: only cross-validation needs them."""
    places, columns = selection.mixed.indices()
    for number, held in enumerate(sums.held):
        touched = torch.zeros(len(selection.weights), dtype=torch.bool)
        touched[places[fold[columns] == number]] = True
        held += _mixed(inputs, selection, touched, sums.dtype, sums.basis)


def _mixed(
    inputs: LepInputs, selection: Selection, chosen: Tensor, dtype: torch.dtype, basis: Basis | None
) -> Products:
    """Sum the products of the `chosen` mixed rows, bool `[m]`, over the old rows that they are made of."""
    result = Products.zeros(inputs.base.shape[1], dtype, inputs.device)
    matrix, used = _mixture(selection, chosen)
    for block in blocks(len(used)):
        ids = used[block]
        rows, change = inputs.pairs(ids, dtype)
        weighted = mix(matrix, block, lambda ids: inputs.rows(ids, dtype))
        weighted_change = mix(matrix, block, lambda ids: inputs.change(ids, dtype))
        if basis is not None:
            rows, weighted = rows @ basis.columns, weighted @ basis.columns
        edges = torch.searchsorted(matrix.indices()[0], torch.tensor([block.start, block.stop]))
        weight = matrix.values()[edges[0] : edges[1]].sum()
        result += _block(rows, change, weighted, weighted_change, weight)
    result.mirror()
    return result


def _mixture(selection: Selection, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return `Tᵀ diag(w) T` of the chosen mixed rows, and the old ids of its rows.

    Its rows are only the old rows in use; its columns are all old rows.
    """
    places, columns = selection.mixed.indices()
    kept = chosen[places]
    places, columns, values = places[kept], columns[kept], selection.mixed.values()[kept]
    used, position = columns.unique(return_inverse=True)
    # Every pair of pieces of one new token: each entry beside all entries of its row.
    sizes = torch.bincount(places, minlength=len(selection.weights))
    repeats = sizes[places]
    first = torch.repeat_interleave(repeats)
    partner = torch.arange(len(first)) - (repeats.cumsum(0) - repeats)[first]
    second = (sizes.cumsum(0) - sizes)[places[first]] + partner
    matrix = torch.sparse_coo_tensor(
        torch.stack([position[first], columns[second]]),
        values[first] * values[second] * selection.weights[places[first]],
        (len(used), selection.mixed.shape[1]),
        check_invariants=True,
    )
    return matrix.coalesce(), used


def _block(
    rows: Tensor, change: Tensor, weighted: Tensor, weighted_change: Tensor, weight: Tensor
) -> Products:
    """Multiply one block; of the symmetric gram only what its upper triangle needs, in strips."""
    width = rows.shape[1]
    gram = rows.new_zeros(width, width)
    for strip in blocks(width, max(256, width // 8)):
        gram[: strip.stop, strip] = rows[:, : strip.stop].T @ weighted[:, strip]
    return Products(
        gram,
        rows.T @ weighted_change,
        # Rows of T sum to 1, so this is the sum over new rows whether or not they are mixtures.
        weighted.sum(dim=0),
        weighted_change.sum(dim=0),
        (change * weighted_change).sum(),
        weight,
    )


def _error(total: Products, eigenvalues: Tensor, rows: int, dtype: torch.dtype) -> float:
    """Estimate the relative Frobenius error of W that rounding of the products leaves.

    Matrix products add up some 400 terms before they round the sum again, so each entry of gram and cross is
    off by about `unit √(400 / n)` of its row's and column's lengths, and all of them by about one unit in one
    direction (products of short numbers tie often); the solution divides by the eigenvalues.
    """
    factor, failed = torch.linalg.cholesky_ex(total.gram)
    if failed or eigenvalues[0] <= 0:
        return float("inf")
    change = torch.cholesky_solve(total.cross, factor)
    length, width = total.gram.diagonal().mean(), len(eigenvalues)
    random = min(1.0, 400 / rows) * (total.squares / length + change.square().sum()) / 12
    unit = torch.finfo(dtype).eps * length * (1 / eigenvalues).norm() / width**0.5
    return float(unit * (random + 4 * change.square().sum() / width).sqrt())


def refine(inputs: LepInputs, selection: Selection, sums: Sums) -> Sums:
    """Sum again where the gram, whose condition is the rows' squared, has lost the weak directions.

    In the basis of its own eigenvectors, scaled to unit length, the second gram is near the identity and
    keeps what the first one lost: as accurate as a singular value decomposition of the rows, in O(d²) memory.
    """
    values, vectors = torch.linalg.eigh(sums.total.gram)
    if values[-1] <= 0:
        return sums
    floor = values[-1] * len(values) * torch.finfo(torch.float64).eps
    scale = values.clamp_min(floor).sqrt()
    basis = Basis(vectors / scale, scale[:, None] * vectors.T)
    never = torch.full_like(selection.alone, -1)
    return accumulate(inputs, selection, never, 0, basis=basis)
