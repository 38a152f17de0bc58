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
from ruadapt.lep import fit as fit_module
from ruadapt.lep import products as sums

OLD, NEW, WIDTH, SHARED = 60, 90, 8, 40
# Methods that fit a map.
FITTED = [name for name, method in lep.METHODS.items() if method.rows is not None]


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
        transfer=dense.to_sparse_coo().coalesce(),
        overlap_new=torch.arange(SHARED),
        overlap_old=old,
        fit_mask=fit_mask,
        ordinary=torch.ones(OLD, dtype=torch.bool),
        copied_new=torch.tensor([0, 1]),
        copied_rows=torch.full((2, WIDTH), 3.0, dtype=dtype),
    )


def rows_alone(rows: Tensor, difference: Tensor) -> lep.LepInputs:
    """Inputs whose new vocabulary is the old one: every fit is of `difference` on `rows`."""
    count = torch.arange(len(rows))
    return lep.LepInputs(
        base=rows,
        instruct=rows + difference,
        adapted=rows,
        transfer=torch.eye(len(rows), dtype=torch.float64).to_sparse_coo().coalesce(),
        overlap_new=count,
        overlap_old=count,
        fit_mask=torch.ones(len(rows), dtype=torch.bool),
        ordinary=torch.ones(len(rows), dtype=torch.bool),
        copied_new=count[:0],
        copied_rows=rows[:0],
    )


def solve(rows: Tensor | np.ndarray, difference: Tensor | np.ndarray) -> lep.Fit:
    inputs = rows_alone(torch.as_tensor(rows), torch.as_tensor(difference))
    return lep.Fitter(inputs, folds=2).fit("bypass")


def change(fit: lep.Fit) -> Tensor:
    assert fit.change is not None
    return fit.change


def propagate(method: str, inputs: lep.LepInputs) -> Tensor:
    return lep.propagate(lep.Fitter(inputs).fit(method), inputs)


def report(method: str, inputs: lep.LepInputs, pieces: Tensor | None = None) -> dict:
    fitter = lep.Fitter(inputs)
    return lep.fit_report(fitter, method, fitter.fit(method), no_pieces() if pieces is None else pieces)


def no_pieces() -> Tensor:
    return torch.zeros(OLD, OLD, dtype=torch.float64).to_sparse_coo().coalesce()


def close(first: Tensor, second: Tensor | np.ndarray, tolerance: float = 1e-10) -> bool:
    return bool(np.allclose(first.numpy(), np.asarray(second), rtol=tolerance, atol=tolerance))


def references(inputs: lep.LepInputs) -> dict[str, np.ndarray]:
    """Every method's rows by dense NumPy in float64; ridge and low rank for the setting that was chosen."""
    base, instruct, adapted = (m.double().numpy() for m in (inputs.base, inputs.instruct, inputs.adapted))
    transfer = inputs.transfer.to_dense().numpy()
    moved, before = transfer @ (instruct - base), transfer @ base
    rows, targets = before[2:], (transfer @ instruct)[2:]
    shared = inputs.overlap_old.numpy()[2:]
    fitter, eye = lep.Fitter(inputs), np.eye(WIDTH)

    def mapped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(x, y, rcond=None)[0]

    conversion = mapped(rows, targets)
    ridge = fitter.fit("ridge").facts["setting"] * np.trace(rows.T @ rows) / WIDTH
    ridge_rows = np.concatenate([rows, np.sqrt(ridge) * eye])
    affine = mapped(np.hstack([rows, np.ones((len(rows), 1))]), targets)
    left, _, right = np.linalg.svd(rows.T @ targets)
    root = np.array([1 / (1 + transfer[i].nonzero()[0].max()) for i in range(2, NEW)])[:, None] ** 0.5
    kept = max(1, round(WIDTH * fitter.fit("low_rank").facts["setting"]))
    directions = np.linalg.svd(rows @ (conversion - eye))[2][:kept]
    return {
        "swap": adapted,
        "overlap": adapted @ mapped(base[shared], instruct[shared]),
        "conversion": adapted @ conversion,
        "bypass": adapted @ mapped(base, instruct),
        "delta": adapted + moved,
        "residual": adapted @ conversion + transfer @ instruct - before @ conversion,
        "ridge": adapted @ mapped(ridge_rows, np.concatenate([targets, np.sqrt(ridge) * eye])),
        "affine": adapted @ affine[:-1] + affine[-1],
        "procrustes": adapted @ left @ right,
        "weighted": adapted @ mapped(root * rows, root * targets),
        "low_rank": adapted + adapted @ (conversion - eye) @ directions.T @ directions,
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
        reference[:2] = 3.0
        result = propagate(method, inputs)
        assert result.dtype == dtype
        wide = replace(inputs, copied_rows=inputs.copied_rows.double())
        assert close(propagate(method, wide), reference), method


def test_an_exact_map_is_recovered() -> None:
    inputs = make_inputs()
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = replace(inputs, instruct=inputs.base @ weight)
    for method in ("overlap", "conversion", "bypass", "residual", "affine", "weighted"):
        assert close(change(lep.Fitter(inputs).fit(method)) + torch.eye(WIDTH), weight)
    for method in ("overlap", "conversion"):
        assert close(propagate(method, inputs)[2:], (inputs.adapted @ weight)[2:])
        found = report(method, inputs)
        assert found["held_out"]["relative_frobenius"] < 1e-10
        assert found["explained"] == pytest.approx(1)


def test_an_instruct_model_equal_to_its_base_makes_every_method_swap() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, instruct=inputs.base)
    for method in lep.METHODS:
        # The polar factor of a gram is the identity but for rounding.
        assert close(
            propagate(method, inputs), propagate("swap", inputs), 1e-12 if method == "procrustes" else 0
        )
        assert report(method, inputs)["drift"]["relative_frobenius"] == 0


def test_delta_gives_the_instruct_rows_where_the_base_has_not_moved() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, adapted=inputs.transfer @ inputs.base)
    result = propagate("delta", inputs)
    assert close(result[2:], (inputs.transfer @ inputs.instruct)[2:])
    assert close(result[2:SHARED], inputs.instruct[inputs.overlap_old[2:]])


def test_inputs_are_not_changed() -> None:
    inputs = make_inputs()
    before = inputs.adapted.clone()
    for method in lep.METHODS:
        propagate(method, inputs)
    assert torch.equal(inputs.adapted, before)


def test_rows_outside_the_fit_do_not_steer_it() -> None:
    inputs = make_inputs()
    # New token 1 is old token 58: spoil it, and every new token made of it.
    touched = inputs.transfer.to_dense()[:, OLD - 2] > 0
    ordinary = torch.arange(OLD) != OLD - 2
    inputs = replace(inputs, fit_mask=inputs.fit_mask & ~touched, ordinary=ordinary)
    instruct = inputs.instruct.clone()
    instruct[OLD - 2] = 1e6
    spoilt = replace(inputs, instruct=instruct)
    for method in FITTED:
        fits = [lep.Fitter(found).fit(method) for found in (inputs, spoilt)]
        assert torch.equal(*map(change, fits)), method


def test_fit_of_fewer_rows_than_columns_has_least_norm() -> None:
    random = np.random.default_rng(0)
    rows, difference = random.normal(size=(5, WIDTH)), random.normal(size=(5, WIDTH))
    fit = solve(rows, difference)
    assert fit.facts["rank"] == 5
    assert close(change(fit), np.linalg.pinv(rows) @ difference)


def test_directions_that_no_row_uses_stay_unchanged() -> None:
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[:, -1] = 0
    fit = solve(rows, 0.1 * rows)
    assert fit.facts["rank"] == WIDTH - 1
    unused = torch.zeros(WIDTH, dtype=torch.float64)
    unused[-1] = 1
    assert close(unused + unused @ change(fit), unused)
    assert fit.facts["condition"] < 10


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_ill_conditioned_fits_keep_their_digits(condition: float) -> None:
    random = np.random.default_rng(2)
    left = np.linalg.qr(random.normal(size=(80, WIDTH)))[0]
    right = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    rows = left * np.geomspace(1, 1 / condition, WIDTH) @ right
    weight = random.normal(size=(WIDTH, WIDTH))
    fit = solve(rows, rows @ weight)
    error = np.linalg.norm(change(fit).numpy() - weight) / np.linalg.norm(weight)
    assert error < max(1e-8, 1e-14 * condition)
    assert fit.facts["condition"] == pytest.approx(condition, rel=1e-3)
    assert fit.facts["rank"] == WIDTH


def test_rows_that_were_never_trained_are_left_out() -> None:
    rows = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    difference = rows @ torch.randn(
        WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    expected = change(solve(rows[:30], difference[:30]))
    rows[30:32] = 0
    rows[32:35] = rows[35]
    rows[36:] *= 1e-5
    difference[30:] = 7
    fitter = lep.Fitter(rows_alone(rows, difference))
    assert fitter.trained.tolist() == [True] * 30 + [False] * 10
    for method in ("overlap", "conversion", "bypass"):
        assert close(change(fitter.fit(method)), expected)
    assert lep.fit_report(fitter, "swap", fitter.fit("swap"), fitter.inputs.transfer)["untrained_rows"] == 10


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
        found = report(method, inputs)
        assert found["held_out"]["tokens"] == SHARED - 2
        assert found["explained"] < 0, method
        assert found["fit"]["rank"] == WIDTH
    seen = change(lep.Fitter(inputs).fit("overlap"))
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
    found = report("delta", replace(inputs, instruct=instruct), dense.to_sparse_coo().coalesce())
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
        lep.Fitter(inputs).fit("swop")
    with pytest.raises(RuadaptError, match=r"instruct has shape \(60, 7\)"):
        replace(inputs, instruct=inputs.instruct[:, :-1])
    with pytest.raises(RuadaptError, match="transfer has shape"):
        replace(inputs, adapted=inputs.adapted[:-1])
    with pytest.raises(RuadaptError, match=r"weights have shape \(3,\).*each of the 90 new rows"):
        lep.Fitter(inputs, lep.Options(weights=torch.ones(3)))
    with pytest.raises(RuadaptError, match="no rows to fit on"):
        propagate("overlap", replace(inputs, fit_mask=torch.zeros(NEW, dtype=torch.bool)))


def wide_inputs(dtype: torch.dtype, condition: float, rows: int = 3000, width: int = 64) -> lep.LepInputs:
    """Inputs of some size: a spectrum of `condition`, a drift of 4 %, half of it linear."""
    random = torch.Generator().manual_seed(11)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    turn = torch.linalg.qr(noise(width, width))[0]
    base = (noise(rows, width) * torch.logspace(0, -np.log10(condition), width, dtype=torch.float64)) @ turn
    base[-20:] = 0
    spread = base.std()
    instruct = base + 0.03 * (base @ noise(width, width) / width**0.5 + spread * noise(rows, width))
    pieces = torch.randint(0, 200, (1000, 4), generator=random)
    dense = torch.zeros(rows + 1000, rows, dtype=torch.float64)
    dense[torch.arange(rows), torch.arange(rows)] = 1
    dense[rows:].scatter_add_(1, pieces, torch.full((1000, 4), 0.25, dtype=torch.float64))
    adapted = dense @ base + 0.1 * spread * noise(rows + 1000, width)
    everything, copied = torch.ones(rows + 1000, dtype=torch.bool), torch.arange(3)
    everything[copied] = False
    return lep.LepInputs(
        base=base.to(dtype),
        instruct=instruct.to(dtype),
        adapted=adapted.to(dtype),
        transfer=dense.to_sparse_coo().coalesce(),
        overlap_new=torch.arange(rows),
        overlap_old=torch.arange(rows),
        fit_mask=everything,
        ordinary=torch.ones(rows, dtype=torch.bool),
        copied_new=copied,
        copied_rows=instruct[:3].to(dtype),
    )


def dense_conversion(inputs: lep.LepInputs) -> Tensor:
    """D of conversion by a singular value decomposition of all rows, in float64."""
    transfer = inputs.transfer.to_dense()[inputs.fit_mask]
    base, instruct = inputs.base.double(), inputs.instruct.double()
    return torch.linalg.lstsq(transfer @ base, transfer @ (instruct - base), driver="gelsd").solution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("condition", "precision"), [(3, "float32"), (30, "float32"), (1e4, "float64")])
def test_large_fits_have_the_accuracy_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, condition: float, precision: str
) -> None:
    monkeypatch.setattr(sums, "SMALL", 0)
    inputs = wide_inputs(dtype, condition)
    fit = lep.Fitter(inputs).fit("conversion")
    assert fit.facts["rows"] == len(inputs.fit_mask) - 3 - 20
    expected = dense_conversion(inputs)
    weight = torch.eye(len(expected), dtype=torch.float64) + expected
    assert (change(fit) - expected).norm() / weight.norm() < 3e-6
    exact = inputs.adapted.double() @ weight
    exact[:3] = inputs.copied_rows.double()
    result = lep.propagate(fit, inputs)
    assert (result == exact.to(dtype)).double().mean() > (0.999 if dtype == torch.bfloat16 else 0.5)
    assert close(result.double(), exact, {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])
    if dtype == torch.float32 or condition < 1e4:  # bfloat16 rounding fills the weak directions
        assert fit.facts["precision"] == precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", [10, 100])
def test_the_error_of_float32_is_known(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, condition: float
) -> None:
    monkeypatch.setattr(sums, "SMALL", 0)
    monkeypatch.setattr(sums, "TOLERANCE", float("inf"))
    inputs = wide_inputs(dtype, condition)
    fitter = lep.Fitter(inputs)
    _, found = fitter._products(lep.METHODS["conversion"], folds=False)
    assert found.dtype == torch.float32
    exact = dense_conversion(inputs)
    error = (fit_module.solve(found.total) - exact).norm() / (torch.eye(len(exact)) + exact).norm()
    assert 0.2 * error < found.error < 10 * error


def test_folds_of_large_fits_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = wide_inputs(torch.bfloat16, 10)
    exact = [change(lep.Fitter(inputs).fit("conversion", without=fold)) for fold in range(5)]
    monkeypatch.setattr(sums, "SMALL", 0)
    fitter = lep.Fitter(inputs)
    for fold in range(5):
        found = fitter.fit("conversion", without=fold)
        assert found.facts["precision"] == "float32"
        assert (change(found) - exact[fold]).norm() / exact[fold].norm() < 1e-4
    # The definition: no new token that is made of a held-out one.
    hidden = (inputs.transfer @ (fitter.fold == 2).double()[:, None])[:, 0] > 0
    apart = replace(inputs, fit_mask=inputs.fit_mask & ~hidden)
    assert (change(lep.Fitter(apart).fit("conversion")) - exact[2]).norm() / exact[2].norm() < 1e-4


def test_report_is_split_by_groups() -> None:
    inputs = make_inputs()
    # Instruct rows of odd old tokens are an exact map of the base's, the others noise.
    odd = torch.arange(OLD) % 2 == 1
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    instruct = torch.where(odd[:, None], inputs.base @ weight, inputs.instruct)
    inputs = replace(
        inputs, instruct=instruct, fit_mask=inputs.fit_mask & (inputs.transfer @ (~odd).double() == 0)
    )
    inputs = replace(inputs, overlap_old=inputs.overlap_old[:20], overlap_new=inputs.overlap_new[:20])
    fitter = lep.Fitter(inputs)
    labels = torch.where(torch.arange(OLD) < 50, 0, 2)
    found = lep.fit_report(
        fitter, "overlap", fitter.fit("overlap"), no_pieces(), {"place": (["front", "none", "back"], labels)}
    )
    assert [(row["by"], row["group"]) for row in found["groups"]] == [("place", "front"), ("place", "back")]
    assert sum(row["held_out"]["tokens"] for row in found["groups"]) == found["held_out"]["tokens"] == 9
    for row in found["groups"]:
        ids = fitter.tokens[labels[fitter.tokens] == (0 if row["group"] == "front" else 2)]
        assert row["baseline"] == {"tokens": len(ids), **lep.compare(instruct[ids], inputs.base[ids])}
    json.dumps(found, allow_nan=False)


def test_auto_takes_what_held_out_rows_favour_and_the_simplest_of_equals() -> None:
    inputs = make_inputs()
    noise = lep.Fitter(inputs)
    method, reason = lep.choose(noise, no_pieces())
    assert method == "swap" and "of the drift of 38 held-out tokens" in reason
    weight = torch.eye(WIDTH, dtype=torch.float64) + 0.1 * torch.randn(
        WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    method, reason = lep.choose(lep.Fitter(replace(inputs, instruct=inputs.base @ weight)), no_pieces())
    assert method == "overlap" and reason.startswith("overlap explains 100.0%")
    # Changes that tokens share with their pieces, and no map explains.
    pieces = torch.zeros(OLD, OLD, dtype=torch.float64)
    pieces[torch.arange(20, OLD), torch.arange(20, OLD) % 20] = 1
    change = (inputs.instruct - inputs.base)[torch.arange(OLD) % 20]
    moved = replace(inputs, instruct=inputs.base + change)
    assert lep.choose(lep.Fitter(moved), pieces.to_sparse_coo().coalesce())[0] == "delta"
    with pytest.raises(RuadaptError, match="unknown LEP method"):
        lep.choose(noise, no_pieces(), ["swap", "swop"])
    same = lep.choose(lep.Fitter(replace(inputs, instruct=inputs.base)), no_pieces())
    assert same[0] == "swap" and "nothing was compared" in same[1]


@pytest.mark.parametrize("method", ["conversion", "affine", "delta", "residual"])
def test_strength_scales_the_change(method: str) -> None:
    inputs = make_inputs()
    full, half, none = (
        lep.propagate(lep.Fitter(inputs, lep.Options(strength=strength)).fit(method), inputs)[2:]
        for strength in (1, 0.5, 0)
    )
    assert torch.equal(none, inputs.adapted[2:])
    assert not torch.equal(full, none)
    assert close(half, (full + none) / 2)


def test_norm_correction_moves_norms_as_the_old_rows_norms_moved() -> None:
    inputs = make_inputs()
    inputs = replace(inputs, instruct=inputs.instruct * 3)
    result = lep.propagate(lep.Fitter(inputs).fit("swap"), inputs, norm_correction=True)
    shares = inputs.transfer.to_dense()
    wanted = (
        inputs.adapted.norm(dim=1)
        * (shares @ inputs.instruct.norm(dim=1))
        / (shares @ inputs.base.norm(dim=1))
    )
    assert close(result.norm(dim=1)[2:], wanted[2:])
    assert torch.equal(result[:2], inputs.copied_rows)


def test_weights_are_occurrences() -> None:
    """A weight of two is the same as the token twice; a weight of zero as none."""
    rows = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.tensor([2.0] * 10 + [1.0] * 25 + [0.0] * 5)
    found = lep.Fitter(rows_alone(rows, difference), lep.Options(weights=weights)).fit("weighted")
    repeated = torch.cat([torch.arange(10), torch.arange(35)])
    assert close(change(found), np.linalg.lstsq(rows[repeated], difference[repeated], rcond=None)[0])


def test_norm_quantiles_are_those_of_the_rows() -> None:
    rows = torch.diag(torch.arange(1.0, 102.0))
    found = lep.norm_quantiles(lep.norms(rows))
    assert found["0.5"] == 51 and found["0.01"] == pytest.approx(2) and found["0.99"] == pytest.approx(100)
