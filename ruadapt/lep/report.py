"""How well a method predicts instruct rows that it has not seen, and which method does so best."""

from collections.abc import Mapping
from typing import Any

import torch

from ruadapt.lep.methods import METHODS, Map, apply, fit
from ruadapt.lep.rows import compare, pick
from ruadapt.lep.sums import Sums

AUTO = "auto"
# Held-out tokens that are predicted, at most: predicting all would cost as much as the fit.
TESTED = 20_000
# A method must explain this much more of the drift than a simpler one to be preferred to it.
MARGIN = 0.01


def held_out(sums: Sums, method: str, strength: float = 1.0) -> dict[str, Any]:
    """Predict instruct rows of held-out shared tokens by a fit that has not seen them.

    Methods that carry residuals are tested on the tokens that the old vocabulary makes of others, as if these
    were their pieces. The ridge was chosen on the tokens that it is tested on, which flatters it a little.

    Returns:
        `held_out` and `baseline` (tokens, mean_cosine, relative_frobenius of the predictions and of the base
        rows (swap) against the truth) and `explained`, the share of the squared drift that the prediction
        explains (R²: 1 is perfect, 0 is swap, negative is worse); null where no token can be tested.
    """
    inputs, ids = sums.inputs, sums.held[:TESTED]
    found = fit(method, sums.blind(), strength)
    shares = pick(inputs.pieces, ids)
    if found.residual:
        made = torch.bincount(shares.indices()[0], minlength=len(ids)) > 0
        ids, shares = ids[made], pick(shares, made)
    if not len(ids):
        return {"held_out": None, "baseline": None, "explained": None}
    base, truth = inputs.base[ids], inputs.instruct[ids]
    predicted = compare(truth, apply(found, inputs, base, shares).to(truth.device))
    swapped = compare(truth, base)
    moved = swapped["relative_frobenius"] ** 2
    return {
        "held_out": {"tokens": len(ids), **predicted},
        "baseline": {"tokens": len(ids), **swapped},
        "explained": 1 - predicted["relative_frobenius"] ** 2 / moved if moved else None,
    }


def fit_report(sums: Sums, method: str, found: Map, drift: Mapping[str, float]) -> dict[str, Any]:
    """Say what a method was fitted on, and how well it predicts rows it has not seen.

    Args:
        found: the method's fit on all rows.
        drift: `compare` of base and instruct.

    Returns:
        `method`, `strength`, `drift`, `untrained_rows` (left out of every fit), `fit` (`Gram.facts`; null
        where nothing is fitted), and what `held_out` returns.
    """
    return {
        "method": method,
        "strength": found.strength,
        "drift": drift,
        "untrained_rows": int((~sums.trained).sum()),
        "fit": found.fitted_on.facts() if found.fitted_on else None,
        **held_out(sums, method, found.strength),
    }


def choose(sums: Sums) -> tuple[str, str]:
    """Choose the method that explains most of the drift of held-out tokens, or the simplest that is as good.

    Returns:
        The method, and the reason as a sentence.
    """
    shares = {name: held_out(sums, name)["explained"] for name in METHODS}
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return "swap", "swap: no shared token that moved can be held out, so nothing was compared"
    name = next(name for name, share in known.items() if share >= max(known.values()) - MARGIN)
    told = ", ".join(f"{other} {share:.1%}" for other, share in known.items() if other != name)
    return name, f"{name} explains {known[name]:.1%} of the drift of held-out tokens; {told}"
