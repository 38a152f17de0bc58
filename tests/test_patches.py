"""Vocabulary patches: both directions bit for bit, small where the vocabulary was extended, and checked."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyPair
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_weights, tokenizer_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.checkpoints import initialise, patches, propagate, read_embeddings
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path, read_json, write_json


def listing(folder: Path) -> dict[str, str]:
    return {path.name: hash_path(path) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["extended", "replaced"])
@pytest.mark.parametrize("link", [False, True])
def test_apply_and_revert_give_both_models_bit_for_bit(
    tmp_path: Path, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, kind: str, link: bool
) -> None:
    pair = tiny_pair_untied if kind == "replaced" else tiny_pair
    original, adapted = tmp_path / "original", tmp_path / "adapted"
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.bfloat16)
    model.save_pretrained(original, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(pair.base).save_pretrained(original)
    (original / "README.md").write_text("The original's card.")
    initialise(original, tokenizer_folder(tmp_path / "tokenizer", original, kind), adapted)
    before = {folder: listing(folder) for folder in (original, adapted)}

    report = patches.make(original, adapted, tmp_path / "patch")
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "patch").rglob("*") if p.is_file())
    counts = report["tensors"]["model.embed_tokens.weight"]
    if kind == "extended":
        assert counts == {"kept": 600, "new": 60, "dropped": 0}
        saved = load_file(tmp_path / "patch" / "adapted" / "rows.safetensors")
        assert torch.equal(saved["model.embed_tokens.weight"], read_embeddings(adapted).input[600:])
    else:
        assert counts["kept"] + counts["new"] == 500 and counts["new"] > 0 and counts["dropped"] > 0
        assert report["tensors"].keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    headers = list((tmp_path / "patch" / "adapted").glob("*.header"))
    assert 0 < len(headers) < len(list(original.glob("*.safetensors")))

    needs = patches.needs(tmp_path / "patch", "adapted", link=link)
    written = patches.apply(tmp_path / "patch", original, tmp_path / "again", link=link)
    assert listing(tmp_path / "again") == before[adapted]
    assert written["bytes"] == sum(path.stat().st_size for path in adapted.iterdir())
    assert (needs["written_bytes"] < written["bytes"]) == link
    patches.revert(tmp_path / "patch", tmp_path / "again", tmp_path / "back", link=link)
    assert listing(tmp_path / "back") == before[original]
    assert {folder: listing(folder) for folder in (original, adapted)} == before


def test_a_patch_of_a_tuned_body_holds_its_rows_too(tmp_path: Path, tiny_pair: TinyPair) -> None:
    adapted = tmp_path / "adapted"
    initialise(tiny_pair.base, tokenizer_folder(tmp_path / "tokenizer", tiny_pair.base, "extended"), adapted)

    def tuned(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][5] += 1
        tensors["model.norm.weight"][2] = float("nan")
        tensors["extra"] = torch.arange(6.0).reshape(3, 2).to(torch.float8_e4m3fn)

    edit_weights(adapted, tuned)
    counts = patches.make(tiny_pair.base, adapted, tmp_path / "patch")["tensors"]
    assert counts["model.layers.0.mlp.up_proj.weight"] == {"kept": 63, "new": 1, "dropped": 1}
    assert counts["model.norm.weight"] == {"kept": 0, "new": 1, "dropped": 1}
    assert counts["extra"] == {"kept": 0, "new": 3, "dropped": 0}
    patches.apply(tmp_path / "patch", tiny_pair.base, tmp_path / "again")
    assert listing(tmp_path / "again") == listing(adapted)
    patches.revert(tmp_path / "patch", adapted, tmp_path / "back")
    assert listing(tmp_path / "back") == listing(tiny_pair.base)


def test_models_of_two_families_can_be_patched(
    tmp_path: Path, tiny_pair: TinyPair, tiny_pair_untied: TinyPair
) -> None:
    """Nothing in common is needed: a tensor that one side lacks is stored whole."""
    patches.make(tiny_pair.base, tiny_pair_untied.base, tmp_path / "patch")
    patches.apply(tmp_path / "patch", tiny_pair.base, tmp_path / "untied")
    assert listing(tmp_path / "untied") == listing(tiny_pair_untied.base)
    patches.revert(tmp_path / "patch", tiny_pair_untied.base, tmp_path / "tied")
    assert listing(tmp_path / "tied") == listing(tiny_pair.base)


def test_another_original_and_a_damaged_patch_are_refused(tmp_path: Path, tiny_pair: TinyPair) -> None:
    source = Path(shutil.copytree(tiny_pair.base, tmp_path / "models--Owner--name" / "snapshots" / "abc"))
    adapted = tmp_path / "adapted"
    propagated = tokenizer_folder(tmp_path / "tokenizer", source, "extended")
    initialise(source, propagated, tmp_path / "initialised")
    propagate(source, tiny_pair.instruct, tmp_path / "initialised", adapted, "conversion")
    patch = tmp_path / "patch"
    patches.make(source, adapted, patch)
    assert read_json(patch / "patch.json")["original"]["name"] == "Owner/name"
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuadaptError, match=r"model\.safetensors is not the file .*Owner/name, revision abc"):
        patches.apply(patch, tiny_pair.instruct, tmp_path / "out")
    with pytest.raises(RuadaptError, match="is not the file"):
        patches.revert(patch, source, tmp_path / "out")
    rows = load_file(patch / "adapted" / "rows.safetensors")
    damaged = rows | {"model.embed_tokens.weight": rows["model.embed_tokens.weight"] + 1}
    save_file(damaged, patch / "adapted" / "rows.safetensors")
    with pytest.raises(RuadaptError, match=r"is damaged: model\.safetensors"):
        patches.apply(patch, source, tmp_path / "out")
    for name in ("config.json", "model.safetensors.header"):
        spoiled = Path(shutil.copytree(patch, tmp_path / "spoiled"))
        (spoiled / "adapted" / name).write_bytes(b"12345678{")
        with pytest.raises(RuadaptError, match="is damaged: "):
            patches.apply(spoiled, source, tmp_path / "out")
        (spoiled / "adapted" / name).unlink()
        with pytest.raises(RuadaptError, match="is damaged: "):
            patches.apply(spoiled, source, tmp_path / "out")
        shutil.rmtree(spoiled)
    outside = read_json(patch / "patch.json")
    outside["adapted"]["files"]["../escaped"] = outside["adapted"]["files"]["config.json"]
    write_json(patch / "patch.json", outside)
    with pytest.raises(RuadaptError, match=r"names a file outside its folder: \.\./escaped"):
        patches.apply(patch, source, tmp_path / "out")
    (patch / "patch.json").write_text('{"format": 0}')
    with pytest.raises(RuadaptError, match="no patch of format 1"):
        patches.apply(patch, source, tmp_path / "out")
    with pytest.raises(RuadaptError, match=r"patch\.json does not exist"):
        patches.apply(source, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == names
