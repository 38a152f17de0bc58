"""What training did to a body reaches the instruct model: W_i + α (W_b^ru − W_b), against float64."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_weights, moved, tokenizer_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import checkpoints
from ruadapt.checkpoints import model_folders, tensor_files
from ruadapt.checkpoints.bodies import carry
from ruadapt.checkpoints.model_folders import read_layout
from ruadapt.checkpoints.tensor_files import map_tensors
from ruadapt.errors import RuadaptError

EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
NORM, PROJECTION = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tiny_pair: TinyPair, tiny_pair_untied: TinyPair) -> TinyPair:
    return tiny_pair if request.param == "tied" else tiny_pair_untied


def trained_body(tensors: Tensors) -> None:
    """Move every tensor of a body but one."""
    random = torch.Generator().manual_seed(8)
    for name in sorted(tensors.keys() - EMBEDDINGS - {PROJECTION}):
        noise = torch.randn(tensors[name].shape, generator=random) * 0.02
        tensors[name] = (tensors[name] + noise).to(tensors[name].dtype)


@pytest.fixture
def adapted(tmp_path: Path, pair: TinyPair) -> Path:
    """The base with another vocabulary and trained embeddings; its body is still the base's."""
    words = tokenizer_folder(tmp_path / "words", pair.base, "extended")
    checkpoints.initialise(pair.base, words, tmp_path / "adapted")
    moved(tmp_path / "adapted")
    return tmp_path / "adapted"


def body(folder: Path) -> Tensors:
    """All tensors of a body, from one file or many shards."""
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if name not in EMBEDDINGS}


def expected(base: Tensors, adapted: Tensors, instruct: Tensors, scale: float) -> Tensors:
    """The formula in float64, rounded once."""
    return {
        name: (own.double() + scale * (adapted[name].double() - base[name].double())).to(own.dtype)
        for name, own in instruct.items()
    }


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_trained_body_is_carried(tmp_path: Path, pair: TinyPair, adapted: Path, scale: float) -> None:
    edit_weights(adapted, trained_body)
    out = tmp_path / "out"
    report = checkpoints.propagate(pair.base, pair.instruct, adapted, out, "delta", body_scale=scale)
    base, instruct, after = body(pair.base), body(pair.instruct), body(adapted)
    assert_same(body(out), expected(base, after, instruct, scale))
    found = report["body"]
    changed = base.keys() - {PROJECTION} if scale else set()
    assert set(found["tensors"]) == changed and found["changed"] == len(changed) and found["of"] == len(base)
    assert checkpoints.verify(out, pair.instruct, changed=found["tensors"])["changed"] == len(changed)
    if not scale:
        assert found["relative_change"] is None
        return
    own, change, drift = (
        torch.cat([tensors[name].double().reshape(-1) - zero[name].double().reshape(-1) for name in base])
        for tensors, zero in (
            (base, {name: torch.zeros(1) for name in base}),
            (after, base),
            (instruct, base),
        )
    )
    assert found["relative_change"] == pytest.approx(float(change.norm() / own.norm()), rel=1e-9)
    assert found["relative_drift"] == pytest.approx(float(drift.norm() / own.norm()), rel=1e-9)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(change, drift, dim=0)), rel=1e-9)
    # No other tensor may differ, and those that may keep their form.
    with pytest.raises(RuadaptError, match="1 tensors differ"):
        checkpoints.verify(out, pair.instruct, changed=sorted(changed)[1:])
    with pytest.raises(RuadaptError, match=r"no\.tensor was meant to change"):
        checkpoints.verify(out, pair.instruct, changed=[*changed, "no.tensor"])
    edit_weights(out, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    with pytest.raises(RuadaptError, match=f"1 tensors differ .*{NORM}"):
        checkpoints.verify(out, pair.instruct, changed=changed, reload=False)


def test_an_untrained_body_is_copied(tmp_path: Path, pair: TinyPair, adapted: Path) -> None:
    report = checkpoints.propagate(pair.base, pair.instruct, adapted, tmp_path / "out", "swap")["body"]
    assert_same(body(tmp_path / "out"), body(pair.instruct))
    assert report["changed"] == 0 and report["relative_change"] == 0.0 and report["relative_drift"] is None
    # The same numbers in another dtype are no change.
    edit_weights(adapted, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()}))
    layouts = [read_layout(path) for path in (pair.base, adapted, pair.instruct)]
    rows, wide = carry(*layouts, 1.0)
    assert rows == {} and wide["changed"] == 0 and wide["relative_drift"] > 0


def test_shards_in_bfloat16_change_alone(tmp_path: Path, pair: TinyPair, adapted: Path) -> None:
    for name, path in (("base", pair.base), ("instruct", pair.instruct), ("adapted", adapted)):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        if name == "adapted":
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1.25)
        model.save_pretrained(tmp_path / f"sharded {name}", max_shard_size="20KB")
        AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / f"sharded {name}")
    base, instruct, after = (tmp_path / f"sharded {name}" for name in ("base", "instruct", "adapted"))
    out = tmp_path / "out"
    report = checkpoints.propagate(base, instruct, after, out, "conversion")
    assert report["body"]["tensors"] == [PROJECTION]
    assert_same(body(out), expected(body(base), body(after), body(instruct), 1.0))
    checkpoints.verify(out, instruct, changed=[PROJECTION])
    assert read_layout(out).files == read_layout(instruct).files


def test_bodies_of_another_form_are_refused(tmp_path: Path, tiny_pair: TinyPair) -> None:
    pair = tiny_pair

    def spoiled(source: Path, change: Any) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "spoiled", dirs_exist_ok=True))
        edit_weights(folder, change)
        return folder

    def lacking(tensors: Tensors) -> None:
        del tensors[NORM]

    def taller(tensors: Tensors) -> None:
        tensors[NORM] = torch.ones(33)

    for role in ("base", "adapted", "instruct"):
        for change, message in (
            (lacking, rf"{NORM} is .*missing in .*spoiled.* body scale 0"),
            (taller, rf"{NORM} is .*\[33\] in .*spoiled.* body scale 0"),
        ):
            paths = {"base": pair.base, "adapted": pair.base, "instruct": pair.instruct}
            paths[role] = spoiled(paths[role], change)
            with pytest.raises(RuadaptError, match=message):
                checkpoints.propagate(
                    paths["base"], paths["instruct"], paths["adapted"], tmp_path / "no", "swap"
                )
    checkpoints.propagate(pair.base, paths["instruct"], pair.base, tmp_path / "out", "swap", body_scale=0)
    assert_same(body(tmp_path / "out"), body(paths["instruct"]))
    # Integers that differ cannot be added up.
    counts = spoiled(pair.base, lambda tensors: tensors.update({NORM: torch.arange(32)}))
    other = Path(shutil.copytree(counts, tmp_path / "other"))
    edit_weights(other, lambda tensors: tensors.update({NORM: torch.arange(32) + 1}))
    with pytest.raises(RuadaptError, match=f"{NORM} is torch.int64"):
        checkpoints.propagate(counts, counts, other, tmp_path / "no", "swap")
    assert not (tmp_path / "no").exists()


def test_blocks_vectors_and_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any rank, in blocks smaller than a tensor, written as the formula says."""
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 64)
    random = torch.Generator().manual_seed(2)
    shapes = {"scalar": (), "vector": (50,), "matrix": (9, 7), "experts": (3, 4, 5)}
    folders = {}
    for number, role in enumerate(("base", "adapted", "instruct")):
        folders[role] = tmp_path / role
        folders[role].mkdir()
        tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        save_file(tensors | {"wte.weight": torch.ones(4, 2) * number}, folders[role] / "model.safetensors")
    layouts = {
        role: model_folders.Layout(path, map_tensors(path / "model.safetensors"), {}, {"input": "wte.weight"})
        for role, path in folders.items()
    }
    rows, report = carry(layouts["base"], layouts["adapted"], layouts["instruct"], 1.0)
    assert report["tensors"] == sorted(shapes)
    before, after, own = (load_file(path / "model.safetensors") for path in folders.values())
    tensor_files.write_tensors(tmp_path / "out.safetensors", own, rows)
    wanted = expected(before, after, own, 1.0) | {"wte.weight": own["wte.weight"]}
    assert_same(load_file(tmp_path / "out.safetensors"), wanted)
