"""The steps of the method on Hugging Face model folders: initialise and propagate.

Base, instruct and adapted models are folders. Their embeddings are made anew, and with them the tensors of
the body that training changed (`bodies`); everything else is copied (`model_folders`). The mathematics is in
`ruadapt.lep`, the mapping between vocabularies in `ruadapt.vocab`.
"""

from ruadapt.checkpoints.initialisation import initialise
from ruadapt.checkpoints.model_folders import Layout, read_embeddings
from ruadapt.checkpoints.propagation import drift, lep_inputs, propagate
from ruadapt.checkpoints.verification import verify
