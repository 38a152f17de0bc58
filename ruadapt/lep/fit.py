"""The methods: a map of rows, a transferred residual, or both, in one general form (METHOD section 5).

`E_i^ru = E_b^ru + strength · (E_b^ru D + b + [T(E_i − E_b) − (T E_b) D − b])`, the bracket where the method
transfers residuals. Swap has neither, delta no D.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ruadapt.errors import RuadaptError
from ruadapt.lep.products import (
    SMALL,
    TOLERANCE,
    Basis,
    Products,
    Selection,
    Sums,
    accumulate,
    hold_out_mixed,
    refine,
)
from ruadapt.lep.rows import LepInputs, blocks, mix, untrained

# Estimated relative error of W beyond which the products of float64 rows are refined.
TOLERANCE_FLOAT64 = 1e-11


@dataclass(frozen=True)
class Options:
    """What a user may set.

    Attributes:
        strength: factor of every change; 0 is swap.
        weights: `[V_new]`, how often each new token occurs, for "weighted"; else Zipf's law by old id.
        norm_correction: give each row the adapted row's norm, times what its old rows' norms changed by.
    """

    strength: float = 1.0
    weights: Tensor | None = None
    norm_correction: bool = False


@dataclass(frozen=True)
class Fit:
    """A method's parts: D `[d, d]` and b `[d]` float64 (or none), whether residuals move; its working dtype.

    `facts` are for the report: rows, rank, condition and effective rank of what was fitted on.
    """

    change: Tensor | None = None
    bias: Tensor | None = None
    residual: bool = False
    strength: float = 1.0
    dtype: torch.dtype = torch.float64
    facts: dict[str, Any] = field(default_factory=dict)


def apply(fit: Fit, adapted: Tensor, moved: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Give the instruct model's rows for a block of adapted ones, `[n, d]` in the fit's working dtype.

    Swap may give the block itself: the result is to be read, not changed.

    Args:
        adapted: the block of E_b^ru, `[n, d]`.
        moved: its rows of `T (E_i − E_b)`; only where the fit moves residuals.
        before: its rows of `T E_b`; only where it has a D besides.
    """
    rows = adapted.to(fit.dtype) if fit.change is None else adapted.to(fit.change.device, fit.dtype)
    if fit.change is not None:
        mapped = rows if before is None else rows - before
        rows = torch.addmm(rows, mapped, fit.change.to(fit.dtype), alpha=fit.strength)
    added = fit.bias if moved is None else moved
    return rows if added is None else rows.add(added.to(rows), alpha=fit.strength)


def residuals(fit: Fit, inputs: LepInputs, shares: Tensor, block: slice) -> tuple[Tensor, Tensor | None]:
    """Give `moved` and `before` of `apply` for the rows `block` of sparse `shares` `[n, V]`."""
    moved = mix(shares, block, lambda ids: inputs.change(ids, fit.dtype))
    if fit.change is None:
        return moved, None
    return moved, mix(shares, block, lambda ids: inputs.rows(ids, fit.dtype))


def solve(products: Products, *, ridge: float = 0.0) -> Tensor:
    """Solve `argmin_D Σ w ‖x D − y‖²` (plus ridge · ‖D‖²) by the normal equations, `[d, d]`, of least norm.

    Solving for `D = W − I` against `E_i − E_b` keeps the digits that a fit of W against E_i would spend on
    the identity, leaves directions that no row uses unchanged, and lets a ridge pull towards the identity.
    """
    gram = products.gram.double().clone()
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    floor = len(gram) * torch.finfo(torch.float64).eps * gram.diagonal().max()
    if not failed and factor.diagonal().square().min() > 1e3 * floor:
        return torch.cholesky_solve(products.cross.double(), factor)
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > floor, 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ products.cross.double()))


def solve_refined(products: Products, basis: Basis, rows: int) -> tuple[Tensor, Tensor, int]:
    """Solve of products in a basis (`refine`): D of least norm, the rows' singular values, their rank."""
    eps = torch.finfo(torch.float64).eps
    values, vectors = torch.linalg.eigh(products.gram)
    root = values.clamp_min(0).sqrt()
    kept = values > values[-1] * len(values) * eps
    # rows = Q R with orthonormal Q: R by the eigenvectors, Qᵀ y by the cross products.
    right = torch.where(kept, root, 0.0)[:, None] * (vectors.T @ basis.inverse)
    target = torch.where(kept, 1 / root, 0.0)[:, None] * (vectors.T @ products.cross)
    left, singular, turned = torch.linalg.svd(right)
    used = singular > singular[0] * eps * max(rows, len(singular))
    change = turned[used].T @ ((left[:, used].T @ target) / singular[used, None])
    return change, singular, int(used.sum())


def centred(products: Products) -> Products:
    """Move the rows' and the changes' means to zero, so that D needs no bias."""
    rows, change, weight = products.rows.double(), products.change.double(), products.weight.double()
    return Products(
        products.gram - torch.outer(rows, rows) / weight,
        products.cross - torch.outer(rows, change) / weight,
        torch.zeros_like(rows),
        torch.zeros_like(change),
        products.squares - change @ change / weight,
        products.weight,
    )


def _least_squares(products: Products, setting: float) -> Tensor:
    return solve(products)


def _ridge(products: Products, setting: float) -> Tensor:
    return solve(products, ridge=setting * float(products.gram.diagonal().mean()))


def _procrustes(products: Products, setting: float) -> Tensor:
    """The orthogonal W nearest to the map: the polar factor of `Xᵀ (X + Y)`."""
    left, _, right = torch.linalg.svd(products.gram.double() + products.cross.double())
    return left @ right - torch.eye(len(left), dtype=torch.float64, device=left.device)


def _low_rank(products: Products, setting: float) -> Tensor:
    """The best D of a share of the full rank: the solution on the directions of what it predicts."""
    change = solve(products)
    predicted = change.T @ products.gram.double() @ change
    kept = max(1, round(setting * len(change)))
    directions = torch.linalg.eigh(predicted)[1][:, -kept:]
    return change @ directions @ directions.T


def _overlap(inputs: LepInputs, trained: Tensor, options: Options) -> Selection:
    """The tokens that both vocabularies have (LEP paper, "vocabulary intersection")."""
    shared = inputs.overlap_old[inputs.fit_mask[inputs.overlap_new]]
    return _selection(shared.bincount(minlength=len(trained)).double() * trained)


def _old(inputs: LepInputs, trained: Tensor, options: Options) -> Selection:
    """The whole old vocabulary."""
    return _selection((inputs.ordinary & trained).double())


def _conversion(inputs: LepInputs, trained: Tensor, options: Options, *, weighted: bool = False) -> Selection:
    """Every new token (LEP paper, "vocabulary conversion"); weighted by occurrence where asked for.

    Without counts the weight is Zipf's, one over the old id of the token's rarest piece: vocabularies are
    numbered by frequency, more or less.
    """
    places, columns = inputs.transfer.indices()
    values = inputs.transfer.values()
    count = len(inputs.fit_mask)
    usable = inputs.fit_mask & (torch.bincount(places[~trained[columns]], minlength=count) == 0)
    pieces = torch.bincount(places, minlength=count)
    weights = torch.ones(count, dtype=torch.float64)
    if weighted and options.weights is not None:
        weights = options.weights.double()
    elif weighted:
        # Entries of a row are sorted: its last one is the rarest piece.
        weights[pieces > 0] = 1 / (1 + columns[pieces.cumsum(0)[pieces > 0] - 1].double())
    usable &= weights > 0
    single = (usable & (pieces == 1))[places]
    alone = torch.zeros(len(trained), dtype=torch.float64)
    alone.index_add_(0, columns[single], weights[places[single]] * values[single] ** 2)
    several = usable & (pieces > 1)
    number = several.cumsum(0) - 1
    kept = several[places]
    indices = torch.stack([number[places[kept]], columns[kept]])
    return Selection(alone, _sparse(indices, values[kept], int(several.sum()), len(alone)), weights[several])


def _selection(alone: Tensor) -> Selection:
    none = torch.empty(0, dtype=torch.float64)
    return Selection(alone, _sparse(torch.empty(2, 0, dtype=torch.int64), none, 0, len(alone)), none)


def _sparse(indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, (rows, columns), check_invariants=True).coalesce()


@dataclass(frozen=True)
class Method:
    """`rows` selects what D is fitted on (nothing: no D), `solver` gives D of products and one of `settings`.

    `settings` has several values where the best one is chosen on held-out rows.
    """

    rows: Callable[[LepInputs, Tensor, Options], Selection] | None = None
    solver: Callable[[Products, float], Tensor] = _least_squares
    settings: tuple[float, ...] = (0.0,)
    bias: bool = False
    residual: bool = False


# Simplest first: where held-out rows can't tell two apart, "auto" takes the one that stands earlier.
METHODS: dict[str, Method] = {
    "swap": Method(),
    "overlap": Method(_overlap),
    "conversion": Method(_conversion),
    "bypass": Method(_old),
    "delta": Method(residual=True),
    "residual": Method(_conversion, residual=True),
    "ridge": Method(_conversion, _ridge, settings=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)),
    "affine": Method(_conversion, bias=True),
    "procrustes": Method(_conversion, _procrustes),
    "weighted": Method(partial(_conversion, weighted=True)),
    "low_rank": Method(_conversion, _low_rank, settings=(1 / 256, 1 / 64, 1 / 16, 1 / 4)),
}


def require_known(method: str, *others: str) -> None:
    """Refuse a method that is neither in METHODS nor one of `others`.

    Raises:
        RuadaptError: the message lists the known ones.
    """
    if method not in (*METHODS, *others):
        raise RuadaptError(f"unknown LEP method {method!r}; known: {', '.join((*METHODS, *others))}")


class Fitter:
    """Fits of one matrix: products are summed once for all methods, folds and settings that share their rows.

    Attributes:
        trained: bool `[V]`, false for old rows that no training has shaped; no fit uses them.
        tokens: old ids `[n]` of the shared tokens whose instruct rows can be held out, in random order.
        fold: `[V]`, the fold in which an old token is held out, −1 for never.

    Raises:
        RuadaptError: the weights do not fit the new rows.
    """

    def __init__(self, inputs: LepInputs, options: Options | None = None, *, folds: int = 5) -> None:
        self.inputs, self.options = inputs, options or Options()
        weights = self.options.weights
        new = inputs.fit_mask.shape
        if weights is not None and (weights.shape != new or not (weights >= 0).all()):
            raise RuadaptError(
                f"LEP: weights have shape {tuple(weights.shape)}; give one of 0 or more for each of the "
                f"{new[0]} new rows"
            )
        self.trained = ~untrained(inputs.base)
        usable = inputs.fit_mask[inputs.overlap_new] & self.trained[inputs.overlap_old]
        shared = inputs.overlap_old[usable]
        self.tokens = shared[torch.randperm(len(shared), generator=torch.Generator().manual_seed(0))]
        self.fold = torch.full((len(self.trained),), -1)
        parts = self.tokens.chunk(min(folds, len(shared))) if len(shared) > 1 else ()
        for number, part in enumerate(parts):
            self.fold[part] = number
        self.folds = len(parts)
        self._sums: dict[Any, tuple[Selection, Sums]] = {}
        self._folded: set[Any] = set()
        self._settings: dict[str, float] = {}

    def _products(self, method: Method, *, folds: bool) -> tuple[Selection, Sums]:
        """Sum what a method needs, once; with `folds` also the mixed rows of each fold."""
        if method.rows not in self._sums:
            assert method.rows is not None
            selection = method.rows(self.inputs, self.trained, self.options)
            if not len(selection):
                raise RuadaptError(
                    "LEP has no rows to fit on: the vocabularies share no token besides special ones"
                )
            self._sums[method.rows] = selection, accumulate(self.inputs, selection, self.fold, self.folds)
        selection, sums = self._sums[method.rows]
        if folds and method.rows not in self._folded:
            hold_out_mixed(self.inputs, selection, self.fold, sums)
            self._folded.add(method.rows)
        return selection, sums

    def fit(self, name: str, *, without: int | None = None) -> Fit:
        """Fit a method, to all rows or to those that the tokens of one fold are no part of.

        Raises:
            RuadaptError: the method is unknown, or has no rows to fit on.
        """
        require_known(name)
        method = METHODS[name]
        if method.rows is None:
            small = self.inputs.adapted.numel() * self.inputs.adapted.shape[1] < SMALL
            exact = small or self.inputs.base.dtype == torch.float64
            dtype = torch.float64 if exact else torch.float32
            return Fit(None, None, method.residual, self.options.strength, dtype)
        folds = without is not None or len(method.settings) > 1
        selection, sums = self._products(method, folds=folds)
        setting = self._setting(name, sums)
        products = sums.total if without is None else sums.total - sums.held[without]
        tolerance = TOLERANCE_FLOAT64 if self.inputs.base.dtype == torch.float64 else TOLERANCE
        if without is None and sums.error > tolerance and method.solver is _least_squares:
            sums = refine(self.inputs, selection, sums)
            products = sums.total
        rows, moved = products.rows / products.weight, products.change / products.weight
        if method.bias:
            products = centred(products)
        if sums.basis is None:
            singular = sums.singular
            change = method.solver(products, setting)
            rank = int(
                (singular**2 > singular[0] ** 2 * len(singular) * torch.finfo(torch.float64).eps).sum()
            )
        else:
            rows = rows @ sums.basis.inverse
            change, singular, rank = solve_refined(products, sums.basis, len(selection))
        facts = {
            "rows": len(selection),
            "rank": rank,
            "condition": float(singular[0] / singular[rank - 1]) if rank else 1.0,
            "effective_rank": _effective_rank(singular),
            "setting": setting if len(method.settings) > 1 else None,
            "precision": str(sums.dtype).removeprefix("torch."),
        }
        bias = moved - rows @ change if method.bias else None
        return Fit(change, bias, method.residual, self.options.strength, sums.dtype, facts)

    def _setting(self, name: str, sums: Sums) -> float:
        """Choose the setting whose fits leave the least squared error on rows that they have not seen."""
        method = METHODS[name]
        if len(method.settings) == 1 or not sums.held:
            return method.settings[0]
        if name not in self._settings:
            errors = dict.fromkeys(method.settings, 0.0)
            for held in sums.held:
                training = sums.total - held
                for setting in method.settings:
                    change = method.solver(training, setting)
                    errors[setting] += float((change * (held.gram.double() @ change - 2 * held.cross)).sum())
            self._settings[name] = min(errors, key=errors.__getitem__)
        return self._settings[name]


def _effective_rank(singular: Tensor) -> float:
    """exp(entropy) of the shares of the singular values: how many directions the rows fill evenly."""
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((-torch.special.xlogy(shares, shares).sum()).exp()) if shares.any() else 0.0


def _norms(matrix: Tensor, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return matrix[ids].to(dtype).norm(dim=1, keepdim=True)


def propagate(
    fit: Fit, inputs: LepInputs, *, norm_correction: bool = False, part: slice | None = None
) -> Tensor:
    """Give the instruct model's rows for the new vocabulary, `[V_new, d]`, block by block in its own dtype.

    The rows `copied_new` are the instruct model's own, whatever the method.

    Args:
        part: only these new rows.
    """
    part = part or slice(0, len(inputs.adapted))
    transfer = inputs.transfer
    result = inputs.copied_rows.new_empty(part.stop - part.start, inputs.adapted.shape[1])
    for place in blocks(len(result)):
        block = slice(part.start + place.start, part.start + place.stop)
        adapted = inputs.adapted[block]
        moved = before = None
        if fit.residual:
            moved, before = residuals(fit, inputs, transfer, block)
        rows = apply(fit, adapted, moved, before)
        if norm_correction:
            old, new = (
                mix(transfer, block, partial(_norms, matrix, fit.dtype))
                for matrix in (inputs.base, inputs.instruct)
            )
            wanted = adapted.to(fit.dtype).norm(dim=1, keepdim=True) * torch.where(old > 0, new / old, 1.0)
            found = rows.norm(dim=1, keepdim=True)
            rows = rows * torch.where(found > 0, wanted.to(rows) / found, 1.0)
        result[place] = rows
    inside = (inputs.copied_new >= part.start) & (inputs.copied_new < part.stop)
    result[inputs.copied_new[inside] - part.start] = inputs.copied_rows[inside]
    return result
