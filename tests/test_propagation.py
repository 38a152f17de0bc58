"""LEP on model folders beyond what test_checkpoints covers: options, the choice of a method, labels, cost."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL_TOKENS, TinyPair
from test_checkpoints import moved, tokenizer_folder

from ruadapt import lep
from ruadapt.checkpoints import initialise, propagate, read_embeddings, verify
from ruadapt.checkpoints.propagation import token_groups
from ruadapt.vocab import load_tokenizer


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_pair_untied: TinyPair) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    vocabulary = tokenizer_folder(folder / "tokenizer", tiny_pair_untied.base, "extended")
    initialise(tiny_pair_untied.base, vocabulary, folder / "model")
    moved(folder / "model")
    return folder / "model"


def test_auto_writes_what_the_chosen_method_writes(
    tmp_path: Path, tiny_pair_untied: TinyPair, adapted: Path
) -> None:
    pair = tiny_pair_untied
    report = propagate(pair.base, pair.instruct, adapted, tmp_path / "auto", lep.AUTO)
    verify(tmp_path / "auto", pair.instruct)
    for name, matrix in read_embeddings(tmp_path / "auto").matrices().items():
        chosen = report[name]["method"]
        assert report[name]["why"].startswith(f"{chosen} explains")
        propagate(pair.base, pair.instruct, adapted, tmp_path / chosen, chosen)
        assert torch.equal(matrix, read_embeddings(tmp_path / chosen).matrices()[name])
        assert report[name]["norms"]["propagated"] == lep.norm_quantiles(lep.norms(matrix))
        by = {"script", "frequency", "kind"}
        for label in by:
            tokens = [row["held_out"]["tokens"] for row in report[name]["groups"] if row["by"] == label]
            assert sum(tokens) == report[name]["held_out"]["tokens"], label
    json.dumps(report, allow_nan=False)


def test_options_reach_the_rows(tmp_path: Path, tiny_pair_untied: TinyPair, adapted: Path) -> None:
    pair, start = tiny_pair_untied, read_embeddings(adapted)
    for name, options in {
        "none": lep.Options(strength=0),
        "norms": lep.Options(norm_correction=True),
        "weights": lep.Options(weights=torch.arange(float(len(start.input)))),
    }.items():
        propagate(pair.base, pair.instruct, adapted, tmp_path / name, "weighted", options=options)
    results = {name: read_embeddings(tmp_path / name).input[4:] for name in ("none", "norms", "weights")}
    assert torch.equal(results["none"], start.input[4:])
    ratio = (results["norms"].norm(dim=1) / start.input[4:].norm(dim=1))[:500]
    old, new = (read_embeddings(folder).input[4:504].norm(dim=1) for folder in (pair.base, pair.instruct))
    assert torch.allclose(ratio, new / old, rtol=1e-5)
    assert not torch.equal(results["weights"], results["norms"])


def test_tokens_are_labelled_for_the_report(tiny_pair: TinyPair) -> None:
    tokenizer = load_tokenizer(tiny_pair.base)
    groups = token_groups(tokenizer, 610)

    def label(by: str, token: str) -> str | None:
        names, places = groups[by]
        place = int(places[tokenizer.token_to_id(token)])
        return None if place < 0 else names[place]

    assert {label(by, token) for by in groups for token in SPECIAL_TOKENS} == {None}
    assert label("script", "Ġthe") == "Latin" and label("kind", "Ġthe") == "word start"
    assert label("script", "ÐµÑĢ") == "Cyrillic" and label("kind", "ÐµÑĢ") == "inner piece"
    assert label("kind", ".") == label("kind", "Ñ") == "other"
    assert label("frequency", "!") == "first quarter"
    assert all((places[600:] == -1).all() for _, places in groups.values())
