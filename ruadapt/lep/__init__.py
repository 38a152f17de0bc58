"""Learned Embedding Propagation as mathematics: tensors in, tensors out (METHOD sections 3 and 5).

`V` rows of a vocabulary, `d` hidden size, row vectors. One call serves the input embeddings or the head.
Matrices are read in blocks, in their own dtype, and may lie in mapped files; memory beside them is O(d²).
"""

from ruadapt.lep.methods import METHODS, Map, fit, named, propagate
from ruadapt.lep.report import fit_report
from ruadapt.lep.rows import LepInputs, compare, initialise, measure, norms
from ruadapt.lep.sums import Sums
