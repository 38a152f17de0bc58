"""Learned Embedding Propagation as mathematics: tensors in, tensors out.

`V` rows of a vocabulary, `d` hidden size, row vectors, as in METHOD sections 3 and 5. One call serves the
input embeddings or the head. Everything is computed and returned in float64; the caller casts to its
checkpoint's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ruadapt.errors import RuadaptError

# Normal equations square the condition number: beyond 1e8 (matrix: 1e4) they lose half of float64's digits,
# so the fit goes through the singular values of the rows themselves.
GRAM_CONDITION_LIMIT = 1e8


@dataclass(frozen=True)
class LepInputs:
    """What every method may use, for one matrix of the model.

    Attributes:
        base: E_b, `[V, d]`.
        instruct: E_i, `[V, d]`, row for row with `base` (rows that the base lacks are left out).
        adapted: E_b^ru, `[V_new, d]`, the base after continued pre-training on the new vocabulary.
        transfer: T, sparse `[V_new, V]` float64, a new token's shares of the old rows; rows sum to 1.
        overlap_new, overlap_old: ids `[O]` of the tokens that both vocabularies have.
        fit_mask: bool `[V_new]`, false for rows that must not steer a fit (special tokens, padding).
        copied_new: ids `[C]` of the new rows that are taken over from the instruct model as they are.
        copied_rows: these rows, `[C, d]`.
    """

    base: Tensor
    instruct: Tensor
    adapted: Tensor
    transfer: Tensor
    overlap_new: Tensor
    overlap_old: Tensor
    fit_mask: Tensor
    copied_new: Tensor
    copied_rows: Tensor

    def __post_init__(self) -> None:
        rows, width = self.base.shape
        new_rows = self.adapted.shape[0]
        expected = {
            "instruct": (rows, width),
            "adapted": (new_rows, width),
            "transfer": (new_rows, rows),
            "overlap_old": tuple(self.overlap_new.shape),
            "fit_mask": (new_rows,),
            "copied_rows": (self.copied_new.shape[0], width),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise RuadaptError(
                    f"LEP: {name} has shape {tuple(getattr(self, name).shape)}, expected {shape} "
                    f"beside base {(rows, width)} and adapted {(new_rows, width)}"
                )


@dataclass(frozen=True)
class LinearFit:
    """`change` is D in `rows (I + D) ≈ rows + difference`, `[d, d]` float64; condition: of its directions."""

    change: Tensor
    rank: int
    condition: float


def solve(rows: Tensor, difference: Tensor) -> LinearFit:
    """Fit the map from base to instruct rows: `argmin_D ‖rows D − difference‖_F`, of least norm.

    Solving for `D = W − I` against `E_i − E_b` keeps the digits that a fit of W against E_i would spend on
    the identity, and leaves directions that no row uses unchanged instead of projecting them away.

    Args:
        rows: base rows, `[n, d]`; any float dtype.
        difference: instruct minus base rows, `[n, d]`.

    Raises:
        RuadaptError: no rows to fit on.
    """
    if not rows.shape[0]:
        raise RuadaptError("LEP has no rows to fit on: the vocabularies share no token besides special ones")
    rows, difference = rows.double(), difference.double()
    gram = rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram)
    if eigenvalues[0] * GRAM_CONDITION_LIMIT > eigenvalues[-1]:
        change = torch.cholesky_solve(rows.T @ difference, torch.linalg.cholesky(gram))
        return LinearFit(change, gram.shape[0], float((eigenvalues[-1] / eigenvalues[0]).sqrt()))
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > singular[0] * torch.finfo(torch.float64).eps * max(rows.shape)
    rank = int(kept.sum())
    if not rank:
        return LinearFit(torch.zeros_like(gram), 0, 1.0)
    change = right[kept].T @ ((left[:, kept].T @ difference) / singular[kept, None])
    return LinearFit(change, rank, float(singular[0] / singular[kept][-1]))


def _difference(inputs: LepInputs) -> Tensor:
    return inputs.instruct.double() - inputs.base.double()


def overlap_fit(inputs: LepInputs) -> LinearFit:
    """Fit on the tokens that both vocabularies have (LEP paper, "vocabulary intersection")."""
    kept = inputs.overlap_old[inputs.fit_mask[inputs.overlap_new]]
    return solve(inputs.base[kept], _difference(inputs)[kept])


def conversion_fit(inputs: LepInputs) -> LinearFit:
    """Fit on every new token, `T E_b` against `T E_i` (LEP paper, "vocabulary conversion")."""
    rows = (inputs.transfer @ inputs.base.double())[inputs.fit_mask]
    return solve(rows, (inputs.transfer @ _difference(inputs))[inputs.fit_mask])


def swap(inputs: LepInputs) -> Tensor:
    """`E_i^ru = E_b^ru`."""
    return inputs.adapted.double()


def overlap(inputs: LepInputs) -> Tensor:
    """`E_i^ru = E_b^ru W`, W fitted on the shared tokens."""
    adapted = inputs.adapted.double()
    return adapted + adapted @ overlap_fit(inputs).change


def conversion(inputs: LepInputs) -> Tensor:
    """`E_i^ru = E_b^ru W`, W fitted on all new tokens through T."""
    adapted = inputs.adapted.double()
    return adapted + adapted @ conversion_fit(inputs).change


def delta(inputs: LepInputs) -> Tensor:
    """`E_i^ru = E_b^ru + T (E_i − E_b)`: each new row changes as the old rows it was made of."""
    return inputs.adapted.double() + inputs.transfer @ _difference(inputs)


METHODS: dict[str, Callable[[LepInputs], Tensor]] = {
    "swap": swap,
    "overlap": overlap,
    "conversion": conversion,
    "delta": delta,
}
FITS: dict[str, Callable[[LepInputs], LinearFit]] = {"overlap": overlap_fit, "conversion": conversion_fit}


def _require_known(method: str) -> None:
    if method not in METHODS:
        raise RuadaptError(f"unknown LEP method {method!r}; known: {', '.join(METHODS)}")


def propagate(method: str, inputs: LepInputs) -> Tensor:
    """Give the instruct model's rows for the new vocabulary, `[V_new, d]` float64.

    The rows `copied_new` are the instruct model's own, whatever the method.

    Raises:
        RuadaptError: the method is unknown.
    """
    _require_known(method)
    # The clone keeps a method that returns its input from changing the adapted model's tensor.
    result = METHODS[method](inputs).clone()
    result[inputs.copied_new] = inputs.copied_rows.double()
    return result


def initialise(old: Tensor, transfer: Tensor, *, norm_correction: bool = False) -> Tensor:
    """Give new rows as means of old ones, `T E_old` (METHOD section 3), `[V_new, d]` float64.

    Args:
        old: `[V, d]`.
        transfer: T, sparse `[V_new, V]` float64.
        norm_correction: scale each row to the mean norm of the rows it was made of. A mean of k unlike
            vectors is shorter than they are, and so are its logits; a copied row does not change.
    """
    rows = transfer @ old.double()
    if norm_correction:
        wanted = transfer @ old.double().norm(dim=1, keepdim=True)
        found = rows.norm(dim=1, keepdim=True)
        rows = rows * torch.where(found > 0, wanted / found, 1.0)
    return rows


def compare(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare two matrices of equal shape row by row: mean cosine, and `‖second − first‖_F / ‖first‖_F`.

    Rows that are zero in either matrix (padding) have no direction and stay out of the cosine.
    """
    first, second = first.double(), second.double()
    norms = first.norm(dim=1) * second.norm(dim=1)
    used = norms > 0
    cosine = ((first * second).sum(dim=1)[used] / norms[used]).mean() if used.any() else torch.tensor(1.0)
    scale = float(first.norm())
    distance = float((second - first).norm())
    return {"mean_cosine": float(cosine), "relative_frobenius": distance / scale if scale else 0.0}


def fit_report(method: str, inputs: LepInputs, pieces: Tensor, *, folds: int = 5) -> dict[str, Any]:
    """Say how well `method` predicts instruct rows it has not seen, beside doing nothing (swap).

    Truth exists for the shared tokens only: their instruct rows are known. Methods that fit a map are
    refitted without each fold of them (conversion also without the new tokens made of them). Methods that fit
    nothing are tested on the assumption of `delta`, that a token changes as the mean of its pieces: on the
    shared tokens that the old vocabulary makes of other tokens.

    Args:
        pieces: sparse `[V, V]` float64, each old token's shares of other old tokens; an empty row has none.
        folds: parts of the cross-validation, fewer where there are fewer shared tokens.

    Returns:
        `drift` (instruct against base over all rows), `fit` (rank and condition; null where nothing is
        fitted), `held_out` and `baseline` (tokens, mean_cosine, relative_frobenius of prediction against
        truth; null where no token can be tested), and `explained`, the share of the squared drift that the
        prediction explains: 1 is perfect, 0 is swap, negative is worse than swap.

    Raises:
        RuadaptError: the method is unknown.
    """
    _require_known(method)
    fit = FITS[method](inputs) if method in FITS else None
    report: dict[str, Any] = {
        "method": method,
        "drift": compare(inputs.base, inputs.instruct),
        "fit": {"rank": fit.rank, "condition": fit.condition} if fit else None,
        "held_out": None,
        "baseline": None,
        "explained": None,
    }
    held_out = _refitted if method in FITS else _from_pieces
    tokens, predicted = held_out(method, inputs, pieces, folds)
    if len(tokens):
        truth, unchanged = inputs.instruct[tokens].double(), inputs.base[tokens].double()
        report["held_out"] = {"tokens": len(tokens), **compare(truth, predicted)}
        report["baseline"] = {"tokens": len(tokens), **compare(truth, unchanged)}
        drift = float((truth - unchanged).square().sum())
        error = float((truth - predicted).square().sum())
        report["explained"] = 1 - error / drift if drift else None
    return report


def _shared(inputs: LepInputs) -> tuple[Tensor, Tensor]:
    usable = inputs.fit_mask[inputs.overlap_new]
    return inputs.overlap_new[usable], inputs.overlap_old[usable]


def _from_pieces(method: str, inputs: LepInputs, pieces: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """Old ids `[n]` that have pieces, and the rows `[n, d]` predicted from the change of the pieces."""
    old = _shared(inputs)[1]
    shares = pieces @ torch.ones(pieces.shape[1], 1, dtype=torch.float64)
    old = old[shares[old, 0] > 0]
    everywhere = torch.ones(inputs.base.shape[0], dtype=torch.bool)
    as_new = replace(inputs, adapted=inputs.base, transfer=pieces, fit_mask=everywhere)
    return old, METHODS[method](as_new)[old]


def _refitted(method: str, inputs: LepInputs, pieces: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """Old ids `[n]` of the shared tokens, and the rows `[n, d]` predicted by fits that have not seen them."""
    new, old = _shared(inputs)
    base = inputs.base.double()
    if len(old) < 2:
        return old[:0], base[:0]
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))
    predicted = torch.empty(len(old), base.shape[1], dtype=torch.float64)
    for part in order.chunk(min(folds, len(old))):
        seen = torch.ones(len(old), dtype=torch.bool)
        seen[part] = False
        hidden = torch.zeros(len(base), 1, dtype=torch.float64)
        hidden[old[part]] = 1
        untouched = (inputs.transfer @ hidden)[:, 0] == 0
        training = replace(
            inputs, overlap_new=new[seen], overlap_old=old[seen], fit_mask=inputs.fit_mask & untouched
        )
        rows = base[old[part]]
        predicted[part] = rows + rows @ FITS[method](training).change
    return old, predicted
