"""Rows of matrices, read in blocks: means of them (METHOD section 3), and comparisons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that are worked on at a time: 128 MB in float64 at a hidden size of 2,048.
BLOCK = 8_192
# Rows this much shorter than the median, or equal to more than this many others, were never trained.
SHORT, COPIES = 1e-3, 2


@dataclass(frozen=True)
class LepInputs:
    """What every method may use, for one matrix of the model. Matrices may lie in mapped files.

    Attributes:
        base: E_b, `[V, d]`.
        instruct: E_i, `[V, d]`, row for row with `base` (rows that the base lacks are left out).
        adapted: E_b^ru, `[V_new, d]`, the base after continued pre-training on the new vocabulary.
        transfer: T, sparse `[V_new, V]` float64, coalesced, a new token's shares of old rows; rows sum to 1.
        fitted: bool `[V_new]`, false for rows that must not steer a fit (special tokens, padding).
        shared: old ids `[O]` of the ordinary tokens that both vocabularies have.
        copied_new: ids `[C]` of the new rows that are taken over from the instruct model as they are.
        copied_rows: these rows, `[C, d]`.
        pieces: sparse `[V, V]` float64, each old token's shares of the old tokens that make it up, if any.
        device: where rows are multiplied; the matrices stay where they are.
    """

    base: Tensor
    instruct: Tensor
    adapted: Tensor
    transfer: Tensor
    fitted: Tensor
    shared: Tensor
    copied_new: Tensor
    copied_rows: Tensor
    pieces: Tensor
    device: str = "cpu"

    def rows(self, ids: Tensor) -> Tensor:
        """Return the base rows of some old ids, `[n, d]` float64, on the device."""
        return self.base[ids].to(self.device, torch.float64)

    def moves(self, ids: Tensor) -> Tensor:
        """Return `E_i − E_b` of some old ids, `[n, d]` float64, on the device."""
        return self.instruct[ids].to(self.device, torch.float64) - self.rows(ids)


def blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def pick(matrix: Tensor, rows: Tensor | slice) -> Tensor:
    """Return some rows of a sparse matrix, by ids `[k]`, bool `[n]` or a slice; coalesced."""
    ids = torch.arange(matrix.shape[0])[rows]
    return matrix.index_select(0, ids).coalesce()


def mix(matrix: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `matrix @ (all rows)` for a sparse matrix, reading only the rows that it names.

    Args:
        rows: gives the rows `[k, d]` of some ids `[k]`; their dtype and device are the result's.
    """
    places, columns = matrix.indices()
    wanted, position = columns.unique(return_inverse=True)
    found = rows(wanted)
    shape = (matrix.shape[0], len(wanted))
    named = torch.stack([places, position])
    small = torch.sparse_coo_tensor(named, matrix.values(), shape, check_invariants=True)
    mixed = torch.sparse.mm(small.to(found), found)
    copied = (torch.bincount(places, minlength=len(mixed))[places] == 1) & (matrix.values() == 1)
    mixed[places[copied]] = found[position[copied]]  # a sum would make 0.0 of -0.0
    return mixed


def initialise(old: Tensor, transfer: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Give new rows as means of old ones, `T E_old` (METHOD section 3), in the dtype of `old`.

    Args:
        old: `[V, d]`.
        transfer: T, sparse `[V_new, V]` float64, coalesced.
        first, last: only these new rows, `[last − first, d]`.
    """
    return mix(pick(transfer, slice(first, last)), lambda ids: old[ids].double()).to(old.dtype)


def norms(matrix: Tensor) -> Tensor:
    """Return the norms of the rows of `[V, d]`, float32 `[V]`."""
    return torch.cat([matrix[block].float().norm(dim=1) for block in blocks(len(matrix))])


def untrained(matrix: Tensor) -> Tensor:
    """Find rows that no training has shaped, bool `[V]`: (nearly) zero ones, and any that more share."""
    length = norms(matrix)
    # Rows are taken for equal by their norms and first numbers.
    key = torch.cat([length[:, None], matrix[:, :4].float()], dim=1)
    _, which, counts = key.unique(dim=0, return_inverse=True, return_counts=True)
    return (length <= SHORT * length.median()) | (counts[which] > COPIES)


def measure(truth: Tensor, rows: Tensor) -> Tensor:
    """Return for each row, `[n, 3]` float64: squared error, squared norm of the truth, cosine.

    Sums over a row are float32 unless a matrix is float64. The cosine of a row that is zero in either matrix
    (padding) is NaN.
    """
    result = torch.empty(len(truth), 3, dtype=torch.float64)
    dtype = torch.promote_types(torch.promote_types(truth.dtype, rows.dtype), torch.float32)
    for block in blocks(len(truth), 256):  # small enough for the processor's cache
        wanted, found = truth[block].to(dtype), rows[block].to(dtype)
        error, scale = found - wanted, torch.linalg.vecdot(wanted, wanted)
        lengths = (scale * torch.linalg.vecdot(found, found)).sqrt()
        cosine = torch.linalg.vecdot(wanted, found) / lengths
        result[block] = torch.stack([torch.linalg.vecdot(error, error), scale, cosine], dim=1)
    return result


def compare(truth: Tensor, rows: Tensor) -> dict[str, float]:
    """Compare two matrices of equal shape row by row: mean cosine, and `‖rows − truth‖_F / ‖truth‖_F`.

    Rows that are zero in either matrix have no direction and stay out of the cosine.
    """
    measured = measure(truth, rows)
    error, scale = measured[:, :2].sum(dim=0).tolist()
    cosine = float(measured[:, 2].nanmean())
    return {
        "mean_cosine": 1.0 if cosine != cosine else cosine,
        "relative_frobenius": (error / scale) ** 0.5 if scale else 0.0,
    }
