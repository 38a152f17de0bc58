"""How well a method predicts instruct rows that it has not seen."""

from typing import Any

import torch

from ruadapt.lep.methods import Map, apply, fit
from ruadapt.lep.rows import compare, pick
from ruadapt.lep.sums import Sums

# Held-out tokens that are predicted, at most: predicting all would cost as much as the fit.
TESTED = 20_000


def fit_report(sums: Sums, method: str, found: Map) -> dict[str, Any]:
    """Say what a method was fitted on, and how well it predicts rows of held-out shared tokens.

    The prediction is by a fit without these tokens and without new tokens made of them. Methods that carry
    residuals are tested on the tokens that the old vocabulary makes of others, as if these were their pieces.

    Args:
        found: the method's fit on all rows.

    Returns:
        `method`; `drift`, `compare` of base and instruct; `untrained_rows` (left out of every fit); `fit`
        (`Gram.facts`; null where nothing is fitted); `held_out` and `baseline` (tokens, mean_cosine,
        relative_frobenius of the predictions and of the base rows (swap) against the truth); `explained`, the
        share of the squared drift that the prediction explains (R²: 1 is perfect, 0 is swap, negative is
        worse). The last three are null where no token can be tested.
    """
    inputs, ids = sums.inputs, sums.held[:TESTED]
    report: dict[str, Any] = {
        "method": method,
        "drift": compare(inputs.base, inputs.instruct),
        "untrained_rows": int((~sums.trained).sum()),
        "fit": found.fitted_on.facts() if found.fitted_on else None,
    }
    shares = pick(inputs.pieces, ids)
    if found.residual:
        made = torch.bincount(shares.indices()[0], minlength=len(ids)) > 0
        ids, shares = ids[made], pick(shares, made)
    if not len(ids):
        return report | dict.fromkeys(("held_out", "baseline", "explained"))
    base, truth = inputs.base[ids], inputs.instruct[ids]
    blind = fit(method, sums.blind())
    predicted = compare(truth, apply(blind, inputs, base, shares).to(truth.device))
    swapped = compare(truth, base)
    moved = swapped["relative_frobenius"] ** 2
    return report | {
        "held_out": {"tokens": len(ids), **predicted},
        "baseline": {"tokens": len(ids), **swapped},
        "explained": 1 - predicted["relative_frobenius"] ** 2 / moved if moved else None,
    }
