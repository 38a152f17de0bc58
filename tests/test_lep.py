"""The mathematics against closed forms and NumPy references in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ruadapt import lep
from ruadapt.errors import RuadaptError

OLD, NEW, WIDTH, SHARED = 60, 90, 8, 40


def make_inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> lep.LepInputs:
    """New tokens 0…39 are old tokens 59…20, the others are means of two old ones; two rows are copied."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(OLD, WIDTH, generator=random, dtype=torch.float64).to(dtype)
    dense = torch.zeros(NEW, OLD, dtype=torch.float64)
    old = torch.arange(OLD - 1, OLD - 1 - SHARED, -1)
    dense[torch.arange(SHARED), old] = 1
    for row in range(SHARED, NEW):
        dense[row, torch.randperm(OLD, generator=random)[:2]] = 0.5
    noise = torch.randn(OLD, WIDTH, generator=random, dtype=torch.float64)
    adapted = dense @ base.double() + 0.1 * torch.randn(NEW, WIDTH, generator=random, dtype=torch.float64)
    fit_mask = torch.ones(NEW, dtype=torch.bool)
    fit_mask[:2] = False
    return lep.LepInputs(
        base=base,
        instruct=(base.double() + 0.1 * noise).to(dtype),
        adapted=adapted.to(dtype),
        transfer=dense.to_sparse_coo(),
        overlap_new=torch.arange(SHARED),
        overlap_old=old,
        fit_mask=fit_mask,
        copied_new=torch.tensor([0, 1]),
        copied_rows=torch.full((2, WIDTH), 3.0, dtype=dtype),
    )


def no_pieces() -> Tensor:
    return torch.zeros(OLD, OLD, dtype=torch.float64).to_sparse_coo()


def close(first: Tensor, second: Tensor | np.ndarray, tolerance: float = 1e-10) -> bool:
    return bool(np.allclose(first.numpy(), np.asarray(second), rtol=tolerance, atol=tolerance))


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_methods_equal_numpy_references(seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(seed, dtype)
    base, instruct, adapted = (m.double().numpy() for m in (inputs.base, inputs.instruct, inputs.adapted))
    transfer = inputs.transfer.to_dense().numpy()
    shared = inputs.overlap_old.numpy()[2:]
    expected = {
        "swap": adapted,
        "overlap": adapted @ np.linalg.lstsq(base[shared], instruct[shared], rcond=None)[0],
        "conversion": adapted
        @ np.linalg.lstsq((transfer @ base)[2:], (transfer @ instruct)[2:], rcond=None)[0],
        "delta": adapted + transfer @ (instruct - base),
    }
    for method, reference in expected.items():
        reference[:2] = 3.0
        result = lep.propagate(method, inputs)
        assert result.dtype == torch.float64
        assert close(result, reference), method


def test_an_exact_map_is_recovered() -> None:
    inputs = make_inputs()
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = replace(inputs, instruct=inputs.base @ weight)
    for method in ("overlap", "conversion"):
        assert close(lep.FITS[method](inputs).change + torch.eye(WIDTH), weight)
        assert close(lep.propagate(method, inputs)[2:], (inputs.adapted @ weight)[2:])
        report = lep.fit_report(method, inputs, no_pieces())
        assert report["held_out"]["relative_frobenius"] < 1e-10
        assert report["explained"] == pytest.approx(1)


def test_an_instruct_model_equal_to_its_base_makes_every_method_swap() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, instruct=inputs.base)
    for method in lep.METHODS:
        assert torch.equal(lep.propagate(method, inputs), lep.propagate("swap", inputs)), method
        assert lep.fit_report(method, inputs, no_pieces())["drift"]["relative_frobenius"] == 0


def test_delta_gives_the_instruct_rows_where_the_base_has_not_moved() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, adapted=inputs.transfer @ inputs.base)
    result = lep.propagate("delta", inputs)
    assert close(result[2:], (inputs.transfer @ inputs.instruct)[2:])
    assert close(result[2:SHARED], inputs.instruct[inputs.overlap_old[2:]])


def test_inputs_are_not_changed() -> None:
    inputs = make_inputs()
    before = inputs.adapted.clone()
    for method in lep.METHODS:
        lep.propagate(method, inputs)
    assert torch.equal(inputs.adapted, before)


def test_rows_outside_the_fit_do_not_steer_it() -> None:
    inputs = make_inputs()
    # New token 1 is old token 58: spoil it, and every new token made of it.
    touched = inputs.transfer.to_dense()[:, OLD - 2] > 0
    inputs = replace(inputs, fit_mask=inputs.fit_mask & ~touched)
    instruct = inputs.instruct.clone()
    instruct[OLD - 2] = 1e6
    spoilt = replace(inputs, instruct=instruct)
    for method in lep.FITS:
        assert torch.equal(lep.FITS[method](inputs).change, lep.FITS[method](spoilt).change)


def test_fit_of_fewer_rows_than_columns_has_least_norm() -> None:
    random = np.random.default_rng(0)
    rows, difference = random.normal(size=(5, WIDTH)), random.normal(size=(5, WIDTH))
    fit = lep.solve(torch.tensor(rows), torch.tensor(difference))
    assert fit.rank == 5
    assert close(fit.change, np.linalg.pinv(rows) @ difference)


def test_directions_that_no_row_uses_stay_unchanged() -> None:
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[:, -1] = 0
    fit = lep.solve(rows, 0.1 * rows)
    assert fit.rank == WIDTH - 1
    unused = torch.zeros(WIDTH, dtype=torch.float64)
    unused[-1] = 1
    assert close(unused + unused @ fit.change, unused)
    assert fit.condition < 10


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_ill_conditioned_fits_keep_their_digits(condition: float) -> None:
    random = np.random.default_rng(2)
    left = np.linalg.qr(random.normal(size=(80, WIDTH)))[0]
    right = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    rows = left * np.geomspace(1, 1 / condition, WIDTH) @ right
    weight = random.normal(size=(WIDTH, WIDTH))
    fit = lep.solve(torch.tensor(rows), torch.tensor(rows @ weight))
    error = np.linalg.norm(fit.change.numpy() - weight) / np.linalg.norm(weight)
    assert error < max(1e-8, 1e-14 * condition)
    assert fit.condition == pytest.approx(condition, rel=1e-3)
    assert fit.rank == WIDTH


def test_rows_of_zeros_change_nothing() -> None:
    fit = lep.solve(torch.zeros(4, WIDTH), torch.ones(4, WIDTH))
    assert fit.rank == 0
    assert not fit.change.any()


def test_initialise_is_the_mean_of_old_rows() -> None:
    inputs = make_inputs()
    rows = lep.initialise(inputs.base, inputs.transfer)
    assert close(rows, inputs.transfer.to_dense().numpy() @ inputs.base.numpy())
    assert torch.equal(rows[:SHARED], inputs.base[inputs.overlap_old])


def test_norm_correction_gives_means_the_norm_of_their_parts() -> None:
    inputs = make_inputs()
    plain = lep.initialise(inputs.base, inputs.transfer)
    corrected = lep.initialise(inputs.base, inputs.transfer, norm_correction=True)
    norms = inputs.transfer.to_dense() @ inputs.base.norm(dim=1)
    assert close(corrected.norm(dim=1), norms)
    assert close(corrected[:SHARED], plain[:SHARED])
    assert close(torch.nn.functional.cosine_similarity(corrected, plain), np.ones(NEW))
    assert torch.equal(
        lep.initialise(torch.zeros(OLD, 2), inputs.transfer, norm_correction=True)[0], torch.zeros(2)
    )


def test_held_out_rows_are_not_seen_by_the_fit() -> None:
    """Pure noise cannot be predicted: a fit that saw the held-out rows would explain some of it."""
    inputs = make_inputs()
    for method in ("overlap", "conversion"):
        report = lep.fit_report(method, inputs, no_pieces())
        assert report["held_out"]["tokens"] == SHARED - 2
        assert report["explained"] < 0, method
        assert report["fit"]["rank"] == WIDTH
    seen = lep.overlap_fit(inputs).change
    rows, truth = inputs.base[inputs.overlap_old[2:]], inputs.instruct[inputs.overlap_old[2:]]
    assert (rows + rows @ seen - truth).norm() < (rows - truth).norm()


def test_delta_is_tested_on_tokens_with_pieces() -> None:
    inputs = make_inputs()
    # Old tokens 50 and 51 are joined from 20 and 21, and move exactly as they do on average.
    instruct = inputs.instruct.clone()
    difference = instruct - inputs.base
    instruct[50:52] = inputs.base[50:52] + (difference[20] + difference[21]) / 2
    dense = torch.zeros(OLD, OLD, dtype=torch.float64)
    dense[50:52, 20:22] = 0.5
    report = lep.fit_report("delta", replace(inputs, instruct=instruct), dense.to_sparse_coo())
    assert report["held_out"]["tokens"] == 2
    assert report["explained"] == pytest.approx(1)
    assert report["fit"] is None
    assert lep.fit_report("delta", inputs, no_pieces())["held_out"] is None


def test_compare_knows_direction_and_length() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    assert lep.compare(rows, 2 * rows) == {"mean_cosine": 1.0, "relative_frobenius": 1.0}
    assert lep.compare(rows, -rows) == {"mean_cosine": -1.0, "relative_frobenius": 2.0}


def test_bad_input_is_named() -> None:
    inputs = make_inputs()
    with pytest.raises(RuadaptError, match="unknown LEP method 'swop'; known: swap, overlap"):
        lep.propagate("swop", inputs)
    with pytest.raises(RuadaptError, match=r"instruct has shape \(60, 7\)"):
        replace(inputs, instruct=inputs.instruct[:, :-1])
    with pytest.raises(RuadaptError, match="transfer has shape"):
        replace(inputs, adapted=inputs.adapted[:-1])
    with pytest.raises(RuadaptError, match="no rows to fit on"):
        lep.propagate("overlap", replace(inputs, fit_mask=torch.zeros(NEW, dtype=torch.bool)))
