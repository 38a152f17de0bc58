"""What a propagation starts from, read in blocks of rows; means of rows and comparisons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ruadapt.errors import RuadaptError

BLOCK = 16_384
"""Rows that are worked on at a time: 128 MB in float32 at a hidden size of 2,048."""

# Rows this much shorter than the median, or equal to this many others, were never trained.
SHORT, COPIES = 1e-3, 2


@dataclass(frozen=True)
class LepInputs:
    """What every method may use, for one matrix of the model. Matrices may lie in mapped files.

    Attributes:
        base: E_b, `[V, d]`.
        instruct: E_i, `[V, d]`, row for row with `base` (rows that the base lacks are left out).
        adapted: E_b^ru, `[V_new, d]`, the base after continued pre-training on the new vocabulary.
        transfer: T, sparse `[V_new, V]` float64, coalesced, a new token's shares of old rows; rows sum to 1.
        overlap_new, overlap_old: ids `[O]` of the tokens that both vocabularies have.
        fit_mask: bool `[V_new]`, false for rows that must not steer a fit (special tokens, padding).
        ordinary: bool `[V]`, true for old rows of ordinary tokens (neither special nor padding).
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
    ordinary: Tensor
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
            "ordinary": (rows,),
            "copied_rows": (self.copied_new.shape[0], width),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise RuadaptError(
                    f"LEP: {name} has shape {tuple(getattr(self, name).shape)}, expected {shape} "
                    f"beside base {(rows, width)} and adapted {(new_rows, width)}"
                )

    def change(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """`E_i − E_b` of some old rows, `[n, d]`: small beside both, so the difference comes first."""
        return self.instruct[ids].to(dtype) - self.base[ids].to(dtype)


def blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def small_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of rows that fit into a cache in float64, for work that reads each of them often."""
    return blocks(matrix.shape[0], max(16, 2**17 // matrix.shape[1]))


def mix(matrix: Tensor, block: slice, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `matrix[block] @ (all rows)`, reading only the rows that the block names.

    Args:
        matrix: sparse `[n, m]`, coalesced.
        rows: gives the rows `[k, d]` of some ids `[k]`; their dtype is the result's.
    """
    places, columns = matrix.indices()
    edges = torch.searchsorted(places, torch.arange(block.start, block.stop + 1))
    entries = slice(int(edges[0]), int(edges[-1]))
    wanted, position = columns[entries].unique(return_inverse=True)
    dense = rows(wanted)
    if not len(wanted):
        return dense.new_zeros(block.stop - block.start, dense.shape[1])
    weights = matrix.values()[entries].to(dense.dtype)
    return embedding_bag(position, dense, edges[:-1] - edges[0], mode="sum", per_sample_weights=weights)


def untrained(matrix: Tensor) -> Tensor:
    """Find rows that no training has shaped, bool `[V]`: (nearly) zero ones, and any that more share."""
    size = matrix.shape[1] * matrix.element_size()
    word = torch.uint8 if size % 8 else torch.int64
    random = torch.Generator().manual_seed(0)
    draw = torch.randint(-(2**62), 2**62, (size // word.itemsize,), generator=random)
    norms, prints = [], []
    for block in small_blocks(matrix):
        rows = matrix[block].contiguous()
        norms.append(rows.float().norm(dim=1))
        # Integers add up to the same sum in any order: equal rows have equal fingerprints.
        prints.append((rows.view(word) * draw).sum(dim=1))
    length = torch.cat(norms)
    _, which, counts = torch.cat(prints).unique(return_inverse=True, return_counts=True)
    return (length <= SHORT * length.median()) | (counts[which] > COPIES)


def initialise(
    old: Tensor, transfer: Tensor, *, norm_correction: bool = False, part: slice | None = None
) -> Tensor:
    """Give new rows as means of old ones, `T E_old` (METHOD section 3), `[V_new, d]` in the dtype of `old`.

    Args:
        old: `[V, d]`.
        transfer: T, sparse `[V_new, V]` float64, coalesced.
        part: only these new rows.
        norm_correction: scale each row to the mean norm of the rows it was made of. A mean of k unlike
            vectors is shorter than they are, and so are its logits; a copied row does not change.
    """
    part = part or slice(0, transfer.shape[0])
    result = old.new_empty(part.stop - part.start, old.shape[1])
    for place in blocks(len(result)):
        block = slice(part.start + place.start, part.start + place.stop)
        rows = mix(transfer, block, lambda ids: old[ids].double())
        if norm_correction:
            wanted = mix(transfer, block, lambda ids: old[ids].double().norm(dim=1, keepdim=True))
            found = rows.norm(dim=1, keepdim=True)
            rows *= torch.where(found > 0, wanted / found, 1.0)
        result[place] = rows
    return result


def compare(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare two matrices of equal shape row by row: mean cosine, and `‖second − first‖_F / ‖first‖_F`.

    Rows that are zero in either matrix (padding) have no direction and stay out of the cosine.
    """
    return summary(measure(first, second))


def measure(truth: Tensor, rows: Tensor) -> Tensor:
    """Return for each row `[n, 3]`: squared error, squared norm of the truth, cosine (NaN for zero rows)."""
    result = torch.empty(len(truth), 3, dtype=torch.float64)
    for block in small_blocks(truth):
        wanted, found = truth[block].double(), rows[block].double()
        error, scale = found - wanted, torch.linalg.vecdot(wanted, wanted)
        lengths = (scale * torch.linalg.vecdot(found, found)).sqrt()
        cosine = torch.where(lengths > 0, torch.linalg.vecdot(wanted, found) / lengths, torch.nan)
        result[block] = torch.stack([torch.linalg.vecdot(error, error), scale, cosine], dim=1)
    return result


def summary(measured: Tensor) -> dict[str, float]:
    """Add up rows of `measure`; rows without a direction stay out of the cosine."""
    error, scale = measured[:, :2].sum(dim=0).tolist()
    cosine = float(measured[:, 2].nanmean())
    return {
        "mean_cosine": 1.0 if cosine != cosine else cosine,
        "relative_frobenius": (error / scale) ** 0.5 if scale else 0.0,
    }
