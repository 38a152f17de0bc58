"""The mathematics against closed forms and NumPy references in float64."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ruadapt import lep
from ruadapt.errors import RuadaptError
from ruadapt.lep import rows as rows_module
from ruadapt.lep.methods import apply

OLD, NEW, WIDTH, SHARED = 60, 90, 8, 40
# Methods that fit a map.
FITTED = ["overlap", "conversion", "residual"]


def sparse(dense: Tensor) -> Tensor:
    return dense.to_sparse_coo().coalesce()


def no_pieces(rows: int = OLD) -> Tensor:
    return sparse(torch.zeros(rows, rows, dtype=torch.float64))


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
    return lep.LepInputs(
        base=base,
        instruct=(base.double() + 0.1 * noise).to(dtype),
        adapted=adapted.to(dtype),
        transfer=sparse(dense),
        fitted=torch.arange(NEW) >= 2,
        shared=old[2:],
        copied_new=torch.tensor([0, 1]),
        copied_rows=torch.full((2, WIDTH), 3.0, dtype=dtype),
        pieces=no_pieces(),
    )


def rows_alone(rows: Tensor, difference: Tensor) -> lep.LepInputs:
    """Inputs whose new vocabulary is the old one: every fit is of `difference` on `rows`."""
    count = torch.arange(len(rows))
    return lep.LepInputs(
        base=rows,
        instruct=rows + difference,
        adapted=rows,
        transfer=sparse(torch.eye(len(rows), dtype=torch.float64)),
        fitted=count >= 0,
        shared=count,
        copied_new=count[:0],
        copied_rows=rows[:0],
        pieces=no_pieces(len(rows)),
    )


def fit(method: str, inputs: lep.LepInputs) -> lep.Map:
    return lep.fit(method, lep.Sums(inputs))


def solve(rows: Tensor | np.ndarray, difference: Tensor | np.ndarray) -> lep.Map:
    return fit("overlap", rows_alone(torch.as_tensor(rows), torch.as_tensor(difference)))


def facts(found: lep.Map) -> dict[str, float]:
    assert found.fitted_on is not None
    return found.fitted_on.facts()


def change(found: lep.Map) -> Tensor:
    assert found.change is not None
    return found.change


def propagate(method: str, inputs: lep.LepInputs) -> Tensor:
    return lep.propagate(fit(method, inputs), inputs)


def report(method: str, inputs: lep.LepInputs) -> dict:
    sums = lep.Sums(inputs)
    found = lep.fit_report(sums, method, lep.fit(method, sums))
    json.dumps(found, allow_nan=False)
    return found


def close(first: Tensor, second: Tensor | np.ndarray, tolerance: float = 1e-10) -> bool:
    return bool(np.allclose(first.numpy(), np.asarray(second), rtol=tolerance, atol=tolerance))


def references(inputs: lep.LepInputs) -> dict[str, np.ndarray]:
    """Every method's rows by dense NumPy in float64."""
    base, instruct, adapted = (m.double().numpy() for m in (inputs.base, inputs.instruct, inputs.adapted))
    transfer = inputs.transfer.to_dense().numpy()
    moved, before = transfer @ (instruct - base), transfer @ base
    rows, targets = before[2:], (transfer @ instruct)[2:]
    shared = inputs.shared.numpy()

    def mapped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(x, y, rcond=None)[0]

    conversion = mapped(rows, targets)
    return {
        "swap": adapted,
        "overlap": adapted @ mapped(base[shared], instruct[shared]),
        "conversion": adapted @ conversion,
        "delta": adapted + moved,
        "residual": adapted @ conversion + transfer @ instruct - before @ conversion,
    }


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None)
def test_methods_equal_numpy_references(seed: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(seed, dtype)
    expected = references(inputs)
    assert expected.keys() == lep.METHODS.keys()
    for method, reference in expected.items():
        exact = apply(fit(method, inputs), inputs, inputs.adapted, inputs.transfer)
        assert close(exact, reference), method
        result = propagate(method, inputs)
        assert result.dtype == dtype and torch.equal(result[2:], exact[2:].to(dtype))
        assert torch.equal(result[:2], inputs.copied_rows)
        assert torch.equal(lep.propagate(fit(method, inputs), inputs, 1, 50), result[1:50])


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs()
    whole = [propagate(method, inputs) for method in lep.METHODS]
    monkeypatch.setattr(rows_module.blocks, "__defaults__", (7,))
    for method, expected in zip(lep.METHODS, whole, strict=True):
        assert close(propagate(method, inputs), expected)


def test_an_exact_map_is_recovered() -> None:
    inputs = make_inputs()
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = replace(inputs, instruct=inputs.base @ weight)
    for method in ("overlap", "conversion", "residual"):
        assert close(change(fit(method, inputs)) + torch.eye(WIDTH), weight)
    for method in ("overlap", "conversion"):
        assert close(propagate(method, inputs)[2:], (inputs.adapted @ weight)[2:])
        found = report(method, inputs)
        assert found["held_out"]["relative_frobenius"] < 1e-10
        assert found["explained"] == pytest.approx(1)


def test_an_instruct_model_equal_to_its_base_makes_every_method_swap() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, instruct=inputs.base)
    for method in lep.METHODS:
        assert torch.equal(propagate(method, inputs), propagate("swap", inputs))
        assert report(method, inputs)["drift"]["relative_frobenius"] == 0


def test_rows_outside_the_fit_do_not_steer_it() -> None:
    inputs = make_inputs()
    # New token 1 is old token 58: spoil it, and every new token made of it.
    touched = inputs.transfer.to_dense()[:, OLD - 2] > 0
    inputs = replace(inputs, fitted=inputs.fitted & ~touched)
    instruct = inputs.instruct.clone()
    instruct[OLD - 2] = 1e6
    spoilt = replace(inputs, instruct=instruct)
    for method in FITTED:
        assert torch.equal(*(change(fit(method, found)) for found in (inputs, spoilt))), method


def test_fit_of_fewer_rows_than_columns_has_least_norm() -> None:
    random = np.random.default_rng(0)
    rows, difference = random.normal(size=(5, WIDTH)), random.normal(size=(5, WIDTH))
    found = solve(rows, difference)
    assert facts(found)["rank"] == 5
    assert close(change(found), np.linalg.pinv(rows) @ difference)


def test_directions_that_no_row_uses_stay_unchanged() -> None:
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[:, -1] = 0
    found = solve(rows, 0.1 * rows)
    assert facts(found)["rank"] == WIDTH - 1
    unused = torch.zeros(WIDTH, dtype=torch.float64)
    unused[-1] = 1
    assert close(unused + unused @ change(found), unused)
    assert facts(found)["condition"] < 10


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_fits_keep_their_digits(condition: float) -> None:
    random = np.random.default_rng(2)
    left = np.linalg.qr(random.normal(size=(80, WIDTH)))[0]
    right = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    rows = left * np.geomspace(1, 1 / condition, WIDTH) @ right
    weight = random.normal(size=(WIDTH, WIDTH))
    found = solve(rows, rows @ weight)
    # What rounding of the Gram matrix costs: the square of the condition.
    assert np.linalg.norm(change(found).numpy() - weight) / np.linalg.norm(weight) < 1e-15 * condition**2
    assert facts(found)["condition"] == pytest.approx(condition, rel=1e-3)
    assert facts(found)["rank"] == WIDTH


def test_rows_that_were_never_trained_are_left_out() -> None:
    random = torch.Generator().manual_seed(4)
    rows = torch.randn(40, WIDTH, generator=random, dtype=torch.float64)
    difference = rows @ torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64)
    expected = change(solve(rows[:30], difference[:30]))
    rows[30:32] = 0
    rows[32:35] = rows[35]
    rows[36:] *= 1e-5
    difference[30:] = 7
    inputs = rows_alone(rows, difference)
    sums = lep.Sums(inputs)
    assert sums.trained.tolist() == [True] * 30 + [False] * 10
    for method in ("overlap", "conversion"):
        assert close(change(lep.fit(method, sums)), expected)
    assert report("swap", inputs)["untrained_rows"] == 10


def test_initialise_is_the_mean_of_old_rows() -> None:
    inputs = make_inputs()
    rows = lep.initialise(inputs.base, inputs.transfer)
    assert close(rows, inputs.transfer.to_dense().numpy() @ inputs.base.numpy())
    assert torch.equal(rows[:2], inputs.base[[OLD - 1, OLD - 2]])
    signed = lep.initialise(torch.full((OLD, 2), -0.0), inputs.transfer)
    assert signed[:2].signbit().all()  # copied bit by bit
    assert torch.equal(lep.initialise(inputs.base, inputs.transfer, 30, 50), rows[30:50])


def test_held_out_rows_are_not_seen_by_the_fit() -> None:
    """Pure noise cannot be predicted: a fit that saw the held-out rows would explain some of it."""
    inputs = make_inputs()
    sums = lep.Sums(inputs)
    assert len(sums.held) == (SHARED - 2) // 5 and set(sums.held.tolist()) <= set(inputs.shared.tolist())
    for method in ("overlap", "conversion"):
        found = report(method, inputs)
        assert found["held_out"]["tokens"] == len(sums.held)
        assert found["explained"] < 0, method
        # The definition: no row that is made of a held-out token, predictions by what is left.
        hidden = torch.zeros(OLD, 1, dtype=torch.float64)
        hidden[sums.held] = 1
        left = replace(
            inputs,
            fitted=inputs.fitted & ((inputs.transfer @ hidden)[:, 0] == 0),
            shared=torch.tensor([n for n in inputs.shared.tolist() if n not in sums.held.tolist()]),
        )
        rows, truth = inputs.base[sums.held], inputs.instruct[sums.held]
        predicted = rows + rows @ change(fit(method, left))
        error = float((predicted - truth).norm() / truth.norm())
        assert found["held_out"]["relative_frobenius"] == pytest.approx(error)
        drift = float((rows - truth).norm() / truth.norm())
        assert found["explained"] == pytest.approx(1 - (error / drift) ** 2)


def test_delta_is_tested_on_tokens_with_pieces() -> None:
    inputs = make_inputs()
    first, second = lep.Sums(inputs).held[:2].tolist()
    # Two held-out tokens are joined from 0 and 1, and move exactly as they do on average.
    instruct = inputs.instruct.clone()
    mean = (instruct - inputs.base)[:2].mean(dim=0)
    instruct[[first, second]] = inputs.base[[first, second]] + mean
    dense = torch.zeros(OLD, OLD, dtype=torch.float64)
    dense[[first, second], :2] = 0.5
    found = report("delta", replace(inputs, instruct=instruct, pieces=sparse(dense)))
    assert found["held_out"]["tokens"] == 2
    assert found["explained"] == pytest.approx(1)
    assert found["fit"] is None
    assert report("delta", inputs)["held_out"] is None


def test_compare_knows_direction_and_length() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    assert lep.compare(rows, 2 * rows) == {"mean_cosine": 1.0, "relative_frobenius": 1.0}
    assert lep.compare(rows, -rows) == {"mean_cosine": -1.0, "relative_frobenius": 2.0}


def test_bad_input_is_named() -> None:
    inputs = make_inputs()
    with pytest.raises(RuadaptError, match="unknown LEP method 'swop'; known: swap, overlap"):
        fit("swop", inputs)
    with pytest.raises(RuadaptError, match="no rows to fit on"):
        propagate("overlap", replace(inputs, shared=inputs.shared[:0]))


def test_pieces_that_many_tokens_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of four of ten pieces, one of them twice, in blocks that cut through them."""
    monkeypatch.setattr(rows_module.blocks, "__defaults__", (7,))
    random = torch.Generator().manual_seed(11)
    pieces = torch.randint(0, 10, (200, 4), generator=random)
    dense = torch.zeros(200, OLD, dtype=torch.float64)
    dense.scatter_add_(1, pieces, torch.full((200, 4), 0.25, dtype=torch.float64))
    inputs = make_inputs()
    inputs = replace(
        inputs,
        adapted=dense @ inputs.base,
        transfer=sparse(dense),
        fitted=torch.arange(200) >= 3,
        copied_new=inputs.copied_new[:0],
        copied_rows=inputs.copied_rows[:0],
    )
    rows, targets = (dense[3:] @ matrix for matrix in (inputs.base, inputs.instruct))
    weight = torch.linalg.lstsq(rows, targets).solution
    assert facts(fit("conversion", inputs))["rows"] == 197
    assert close(propagate("conversion", inputs), inputs.adapted @ weight)


@pytest.mark.parametrize("condition", [30.0, 1e4])
def test_half_precision_rows_are_fitted_as_well_as_by_lstsq(condition: float) -> None:
    """Also where rows are bad: the normal equations square their condition number."""
    random, width = torch.Generator().manual_seed(3), 64
    turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    scale = torch.logspace(0, -float(np.log10(condition)), width)

    def rows(count: int) -> Tensor:
        return torch.randn(count, width, generator=random) * scale @ turn

    base = rows(2_000)
    moved = base + 0.05 * (base @ torch.randn(width, width, generator=random) / 8 + rows(2_000))
    inputs = rows_alone(base.bfloat16(), torch.zeros(()))
    inputs = replace(inputs, instruct=moved.bfloat16(), adapted=rows(2_000).bfloat16())
    x, y = inputs.base.double(), inputs.instruct.double()
    best = torch.linalg.lstsq(x, y).solution
    made = torch.eye(width) + change(fit("conversion", inputs))
    least, left = (float((x @ weight - y).norm()) for weight in (best, made))
    assert left < least * (1 + 1e-9)
    wanted = (inputs.adapted.double() @ best).bfloat16()
    assert (propagate("conversion", inputs) == wanted).double().mean() > 0.9999
