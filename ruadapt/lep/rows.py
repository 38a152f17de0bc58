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
        device: where rows are multiplied; the matrices stay where they are.
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
    device: str = "cpu"

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

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the base rows of some old ids, `[n, d]`, on the device."""
        return self.base.index_select(0, ids).to(self.device, dtype)

    def pairs(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the base rows of some old ids and `E_i − E_b`: small beside both, so it comes first."""
        rows = self.rows(ids, dtype)
        return rows, self.instruct.index_select(0, ids).to(rows).sub_(rows)

    def change(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `E_i − E_b` of some old ids, `[n, d]`, on the device."""
        return self.pairs(ids, dtype)[1]


def blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def small_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of rows that fit into a cache, for work that reads each of them often."""
    return blocks(matrix.shape[0], max(16, 2**18 // matrix.shape[1]))


def mix(matrix: Tensor, block: slice, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `matrix[block] @ (all rows)`, reading only the rows that the block names.

    Args:
        matrix: sparse `[n, m]`, coalesced.
        rows: gives the rows `[k, d]` of some ids `[k]`; their dtype and device are the result's.
    """
    places, columns = matrix.indices()
    edges = torch.searchsorted(places, torch.arange(block.start, block.stop + 1))
    entries = slice(int(edges[0]), int(edges[-1]))
    wanted, position = columns[entries].unique(return_inverse=True)
    dense = rows(wanted)
    if not len(wanted):
        return dense.new_zeros(block.stop - block.start, dense.shape[1])
    starts, weights = edges[:-1] - edges[0], matrix.values()[entries].to(dense)
    return embedding_bag(
        position.to(dense.device), dense, starts.to(dense.device), mode="sum", per_sample_weights=weights
    )


def untrained(matrix: Tensor) -> Tensor:
    """Find rows that no training has shaped, bool `[V]`: (nearly) zero ones, and any that more share."""
    length = norms(matrix)
    # Equal rows begin equally: only those few whose first numbers occur again are compared whole.
    shared = _shared(matrix[:, :4].contiguous().view(torch.uint8))
    again = shared.nonzero()[:, 0]
    shared[again] = _shared(matrix[again].view(torch.uint8))
    return (length <= SHORT * length.median()) | shared


def _shared(rows: Tensor) -> Tensor:
    """Which rows have more than COPIES copies, bool `[n]`."""
    _, which, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    return counts[which] > COPIES


def norms(matrix: Tensor) -> Tensor:
    """Return the norms of the rows of `[V, d]`, float32 `[V]`."""
    lengths = [torch.linalg.vector_norm(matrix[block].float(), dim=1) for block in small_blocks(matrix)]
    return torch.cat(lengths) if lengths else torch.empty(0)


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
    """Return for each row `[n, 3]`: squared error, squared norm of the truth, cosine (NaN for zero rows).

    The result is float64; sums over one row are float32 unless the rows themselves are float64.
    """
    result = torch.empty(len(truth), 3, dtype=torch.float64)
    dtype = torch.promote_types(torch.promote_types(truth.dtype, rows.dtype), torch.float32)
    for block in small_blocks(truth):
        wanted, found = truth[block].to(dtype), rows[block].to(dtype)
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
