"""LEP on model folders beyond what test_checkpoints covers: the formula, and a new method."""

from pathlib import Path

import pytest
import torch
from conftest import TinyPair
from test_checkpoints import moved, tokenizer_folder

from ruadapt import lep
from ruadapt.checkpoints import initialise, lep_inputs, propagate, read_embeddings
from ruadapt.vocab import conversion_matrix, load_tokenizer


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_pair_untied: TinyPair) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    vocabulary = tokenizer_folder(folder / "tokenizer", tiny_pair_untied.base, "extended")
    initialise(tiny_pair_untied.base, vocabulary, folder / "model")
    moved(folder / "model")
    return folder / "model"


def test_conversion_of_folders_is_the_formula(
    tmp_path: Path, tiny_pair_untied: TinyPair, adapted: Path
) -> None:
    """From tokenizers and stored matrices alone; special tokens keep the instruct model's rows."""
    pair = tiny_pair_untied
    propagate(pair.base, pair.instruct, adapted, tmp_path / "out", "conversion")
    models = [read_embeddings(path) for path in (pair.base, pair.instruct, adapted, tmp_path / "out")]
    transfer = conversion_matrix(load_tokenizer(adapted), load_tokenizer(pair.base))
    for role in ("input", "head"):
        base, instruct, before, found = (model.matrices()[role] for model in models)
        rows, targets = ((transfer @ matrix.double())[4:] for matrix in (base, instruct))
        weight = torch.linalg.lstsq(rows, targets).solution
        expected = before.double() @ weight
        assert torch.equal(found[4:], expected[4:].float())
        assert torch.equal(found[:4], instruct[:4])


def test_special_tokens_and_padding_are_not_fitted(tiny_pair: TinyPair, adapted: Path) -> None:
    inputs = lep_inputs(tiny_pair.base, tiny_pair.instruct, tiny_pair.base)["input"]
    assert inputs.fitted.tolist() == [False] * 4 + [True] * 596
    assert inputs.shared.tolist() == [*range(4, 600)]


def test_a_new_method_is_a_function_in_one_place(
    tmp_path: Path, tiny_pair_untied: TinyPair, adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(sums: lep.Sums) -> lep.Map:
        """`E_i^ru = 2 E_b^ru`."""
        return lep.Map(torch.eye(len(sums.over("shared").xx), dtype=torch.float64))

    monkeypatch.setitem(lep.METHODS, "double", double)
    pair = tiny_pair_untied
    report = propagate(pair.base, pair.instruct, adapted, tmp_path / "out", "double")
    assert report["head"]["method"] == "double" and report["head"]["explained"] < 0
    before, after = (read_embeddings(folder).matrices() for folder in (adapted, tmp_path / "out"))
    for role, matrix in after.items():
        assert torch.equal(matrix[4:], 2 * before[role][4:])
