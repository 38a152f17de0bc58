"""Learned Embedding Propagation as mathematics: tensors in, tensors out (METHOD sections 3 and 5).

`V` rows of a vocabulary, `d` hidden size, row vectors. One call serves the input embeddings or the head.
Matrices are read in blocks, in their own dtype, and may lie in mapped files; memory beside them is O(d²).
"""

from ruadapt.lep.fit import METHODS, Fit, Fitter, Options, apply, propagate, require_known
from ruadapt.lep.report import AUTO, Groups, choose, fit_report, norm_quantiles
from ruadapt.lep.rows import LepInputs, compare, initialise, norms

__all__ = [
    "AUTO",
    "METHODS",
    "Fit",
    "Fitter",
    "Groups",
    "LepInputs",
    "Options",
    "apply",
    "choose",
    "compare",
    "fit_report",
    "initialise",
    "norm_quantiles",
    "norms",
    "propagate",
    "require_known",
]
