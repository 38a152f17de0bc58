"""How well a method predicts instruct rows that it has not seen, and which method does so best."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ruadapt.lep.fit import METHODS, Fit, Fitter, apply, require_known, residuals
from ruadapt.lep.rows import compare, measure, summary

AUTO = "auto"
# Held-out tokens that are predicted, at most: predicting all would cost as much as the fit.
TESTED = 20_000
# A method must explain this much more of the drift than a simpler one to be preferred to it.
MARGIN = 0.01
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

Groups = Mapping[str, tuple[Sequence[str], Tensor]]
"""By what to split a report: name → (names of the groups, int64 `[V]`, each old token's place in them)."""


def _held_out(fitter: Fitter, name: str, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predict instruct rows of shared tokens by fits that have not seen them.

    Returns:
        Old ids `[n]`, then `measure` of the predictions and of the base rows (swap), `[n, 3]` each.
    """
    inputs = fitter.inputs
    found = []
    for number in range(fitter.folds):
        ids = fitter.tokens[fitter.fold[fitter.tokens] == number][: -(-TESTED // fitter.folds)]
        fit = fitter.fit(name, without=number)
        moved = before = None
        if fit.residual:
            shares = pieces.index_select(0, ids).coalesce()
            made = torch.bincount(shares.indices()[0], minlength=len(ids)) > 0
            ids, shares = ids[made], shares.index_select(0, made.nonzero()[:, 0]).coalesce()
            moved, before = residuals(fit, inputs, shares, slice(0, len(ids)))
        base, truth = inputs.base[ids], inputs.instruct[ids]
        predicted = apply(fit, base, moved, before)
        found.append((ids, measure(truth, predicted.to(truth.device)), measure(truth, base)))
    empty = torch.empty(0, 3, dtype=torch.float64)
    columns = zip(*found, strict=True) if found else ((fitter.tokens[:0],), (empty,), (empty,))
    ids, predictions, swapped = (torch.cat(column) for column in columns)
    return ids, predictions, swapped


def _explained(predictions: Tensor, swapped: Tensor) -> float | None:
    drift = float(swapped[:, 0].sum())
    return 1 - float(predictions[:, 0].sum()) / drift if drift else None


def fit_report(
    fitter: Fitter,
    name: str,
    fit: Fit,
    pieces: Tensor,
    groups: Groups | None = None,
    drift: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Say how well a method predicts instruct rows it has not seen, beside doing nothing (swap).

    Truth exists for the shared tokens only: their instruct rows are known. A fit is repeated without each
    fold of them (conversion's also without the new tokens made of them), of products already summed. Methods
    that move residuals are tested on the shared tokens that the old vocabulary makes of others, as if these
    were their pieces. At most TESTED tokens are predicted. A setting was chosen on the same folds, which
    flatters ridge and low_rank a little.

    Args:
        fit: of this method, on all rows.
        pieces: sparse `[V, V]` float64, coalesced: each old token's shares of other old tokens, if any.
        groups: labels of the old tokens to split the figures by.
        drift: `compare` of base and instruct, where that is known already.

    Returns:
        `drift` (instruct against base over all rows), `untrained_rows` (left out of every fit), `fit`
        (rows, rank, condition, effective rank, chosen setting, precision; null where nothing is fitted),
        `held_out` and `baseline` (tokens, mean_cosine, relative_frobenius of prediction and of the base rows
        against the truth; null where no token can be tested), `explained`, the share of the squared drift
        that the prediction explains (R²: 1 is perfect, 0 is swap, negative is worse), and `groups`, the last
        three for each group.
    """
    ids, predictions, swapped = _held_out(fitter, name, pieces)

    def figures(chosen: Tensor) -> dict[str, Any]:
        return {
            "held_out": {"tokens": int(chosen.sum()), **summary(predictions[chosen])},
            "baseline": {"tokens": int(chosen.sum()), **summary(swapped[chosen])},
            "explained": _explained(predictions[chosen], swapped[chosen]),
        }

    rows = [
        {"by": by, "group": group, **figures(labels[ids] == place)}
        for by, (names, labels) in (groups or {}).items()
        for place, group in enumerate(names)
        if (labels[ids] == place).any()
    ]
    nothing = {"held_out": None, "baseline": None, "explained": None}
    return {
        "method": name,
        "strength": fit.strength,
        "drift": drift or compare(fitter.inputs.base, fitter.inputs.instruct),
        "untrained_rows": int((~fitter.trained).sum()),
        "fit": fit.facts or None,
        **(figures(torch.ones(len(ids), dtype=torch.bool)) if len(ids) else nothing),
        "groups": rows,
    }


def choose(fitter: Fitter, pieces: Tensor, candidates: Sequence[str] = tuple(METHODS)) -> tuple[str, str]:
    """Choose the method with the least held-out error, or the simplest one that is as good within noise.

    All are compared on the same tokens: those with pieces, where there are any; else methods that move
    residuals can't be tested and are not chosen.

    Returns:
        The method, and the reason as a sentence.

    Raises:
        RuadaptError: a candidate is unknown.
    """
    for name in candidates:
        require_known(name)
    errors: dict[str, Tensor] = {}
    tested = torch.bincount(pieces.indices()[0], minlength=len(fitter.trained)) > 0
    if not tested[fitter.tokens].any():
        tested = torch.ones_like(tested)
    drift = torch.empty(0)
    for name in tqdm(candidates, desc="methods compared", leave=False, disable=None):
        ids, predictions, swapped = _held_out(fitter, name, pieces)
        if len(ids):
            errors[name] = predictions[tested[ids], 0]
            drift = swapped[tested[ids], 0]
    if not errors or not drift.sum() > 0:
        first = candidates[0]
        return first, f"{first}: no shared token that moved can be held out, so nothing was compared"
    best = min(errors, key=lambda name: float(errors[name].sum()))
    for name, error in errors.items():
        loss = error - errors[best]
        noise = 2 * float(loss.std()) * len(loss) ** 0.5 if len(loss) > 1 else 0.0
        if name == best or float(loss.sum()) <= max(noise, MARGIN * float(drift.sum())):
            break
    shares = {name: 1 - float(errors[name].sum() / drift.sum()) for name in errors}
    reason = f"{name} explains {shares[name]:.1%} of the drift of {len(drift)} held-out tokens"
    if name != best:
        return name, f"{reason}; {best}, with {shares[best]:.1%}, is not clearly better"
    others = [f"{other} {share:.1%}" for other, share in shares.items() if other != name]
    return name, f"{reason}, more than any other method ({', '.join(others)})"


def norm_quantiles(lengths: Tensor) -> dict[str, float]:
    """Return quantiles of `norms` of rows, as `{"0.01": …, …, "0.99": …}`."""
    values = lengths.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {str(at): value for at, value in zip(QUANTILES, values, strict=True)}
