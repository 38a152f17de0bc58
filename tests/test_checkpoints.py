"""Model folders: written, reloaded and compared; and the ways to spoil them, which `test_surgery` tries."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, SPECIAL_TOKENS, TinyPair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import lep
from ruadapt.checkpoints import drift, initialise, propagate, propagation, read_embeddings, verify
from ruadapt.checkpoints.model_folders import INDEX, write_rows
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path
from ruadapt.vocab import extend, load_tokenizer, save_tokenizer, train_replacement

TEXTS = (RUSSIAN + "\n" + ENGLISH).splitlines() * 3


def tokenizer_folder(folder: Path, original: Path, kind: str) -> Path:
    if kind == "extended":
        tokenizer = extend(original, TEXTS, 60)
    else:
        tokenizer = train_replacement(TEXTS, original, "bpe", 500)
    return save_tokenizer(folder, tokenizer, original)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def moved(folder: Path, scale: float = 0.1) -> None:
    """Stand in for continued pre-training: move the embeddings a little."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        random = torch.Generator().manual_seed(3)
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            noise = torch.randn(tensors[name].shape, generator=random).to(tensors[name].dtype)
            tensors[name] = tensors[name] + noise * scale * tensors[name].std()

    edit_weights(folder, change)


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tiny_pair: TinyPair, tiny_pair_untied: TinyPair) -> TinyPair:
    return tiny_pair if request.param == "tied" else tiny_pair_untied


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, pair: TinyPair) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    initialise(pair.base, tokenizer_folder(folder / "tokenizer", pair.base, "replaced"), folder / "model")
    moved(folder / "model")
    return folder / "model"


def copied(pair: TinyPair, adapted: Path, folder: Path) -> dict[str, Path]:
    """Copies of the three models that a test may spoil."""
    models = {"base": pair.base, "instruct": pair.instruct, "adapted": adapted}
    return {name: Path(shutil.copytree(path, folder / name)) for name, path in models.items()}


def test_reading_gives_the_embeddings_alone(pair: TinyPair) -> None:
    embeddings = read_embeddings(pair.base)
    model = AutoModelForCausalLM.from_pretrained(pair.base)
    assert torch.equal(embeddings.input, model.get_input_embeddings().weight)
    assert embeddings.tied == model.config.tie_word_embeddings
    if "head" in embeddings.matrices():
        assert torch.equal(embeddings.matrices()["head"], model.lm_head.weight)


@pytest.mark.parametrize("kind", ["extended", "replaced"])
def test_initialised_folder_reloads(tmp_path: Path, pair: TinyPair, kind: str) -> None:
    vocabulary = tokenizer_folder(tmp_path / "tokenizer", pair.base, kind)
    report = initialise(pair.base, vocabulary, tmp_path / "model")
    found = verify(tmp_path / "model", pair.base)
    assert found["rows"] == report["rows"] == found["tokens"] == (660 if kind == "extended" else 500)
    assert found["eos"] == ["<|end|>", "<|endoftext|>"]
    assert found["compared_with_source"] and found["chat"]

    old, new = read_embeddings(pair.base), read_embeddings(tmp_path / "model")
    old_tokenizer, new_tokenizer = load_tokenizer(pair.base), load_tokenizer(vocabulary)
    for token in (*SPECIAL_TOKENS, "Ġthe"):
        old_id, new_id = old_tokenizer.token_to_id(token), new_tokenizer.token_to_id(token)
        assert torch.equal(new.input[new_id], old.input[old_id]), token
    fresh = next(t for t in new_tokenizer.get_vocab() if old_tokenizer.token_to_id(t) is None)
    text = new_tokenizer.decode([new_tokenizer.token_to_id(fresh)])
    pieces = [old_tokenizer.token_to_id(token) for token in fresh]
    if "�" not in text:
        row = new.input[new_tokenizer.token_to_id(fresh)]
        span = old.input[old_tokenizer.encode(text, add_special_tokens=False).ids]
        assert torch.allclose(row, span.mean(dim=0)) or torch.allclose(row, old.input[pieces].mean(dim=0))
    if kind == "extended":
        assert torch.equal(new.input[: len(old.input)], old.input)
        text = "The baker lives in a small town."
        original, extended = (
            AutoModelForCausalLM.from_pretrained(f) for f in (pair.base, tmp_path / "model")
        )
        ids = torch.tensor([AutoTokenizer.from_pretrained(pair.base)(text).input_ids])
        assert torch.allclose(original(ids).logits, extended(ids).logits[..., : len(old.input)])


@pytest.mark.parametrize("method", list(lep.METHODS))
def test_propagated_folder_reloads(tmp_path: Path, pair: TinyPair, adapted: Path, method: str) -> None:
    report = propagate(pair.base, pair.instruct, adapted, tmp_path / "model", method)
    found = verify(tmp_path / "model", pair.instruct)
    tied = read_embeddings(pair.base).tied
    assert found["tied"] == tied
    assert report.keys() == ({"input", "body"} if tied else {"input", "head", "body"})
    assert report["input"]["drift"] == drift(pair.base, pair.instruct)["input"]
    assert report["input"]["drift"]["mean_cosine"] > 0.99

    result, source = read_embeddings(tmp_path / "model"), read_embeddings(pair.instruct)
    old, new = load_tokenizer(pair.instruct), load_tokenizer(adapted)
    for name, matrix in result.matrices().items():
        for token in SPECIAL_TOKENS:
            expected = source.matrices()[name][old.token_to_id(token)]
            assert torch.equal(matrix[new.token_to_id(token)], expected), token
        change = matrix - read_embeddings(adapted).matrices()[name]
        ordinary = [i for token, i in new.get_vocab().items() if token not in SPECIAL_TOKENS]
        assert change[ordinary].any() == (method != "swap")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision(tmp_path: Path, pair: TinyPair, dtype: torch.dtype) -> None:
    for name in ("base", "instruct"):
        model = AutoModelForCausalLM.from_pretrained(getattr(pair, name), dtype=dtype)
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        AutoTokenizer.from_pretrained(pair.base).save_pretrained(tmp_path / name)
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1
    vocabulary = tokenizer_folder(tmp_path / "tokenizer", pair.base, "extended")
    initialise(tmp_path / "base", vocabulary, tmp_path / "adapted")
    propagate(tmp_path / "base", tmp_path / "instruct", tmp_path / "adapted", tmp_path / "lep", "conversion")
    for folder, source in (("adapted", "base"), ("lep", "instruct")):
        found = verify(tmp_path / folder, tmp_path / source)
        assert found["dtype"] == str(dtype).removeprefix("torch.")
        assert [p.name for p in sorted((tmp_path / folder).glob("*.safetensors"))] == [p.name for p in shards]
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        total = 0
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / folder / file, framework="pt") as weights:
                total += weights.get_tensor(name).nbytes
        assert index["metadata"]["total_size"] == total


def test_instruct_model_with_padding_and_rows_of_its_own(tmp_path: Path, pair: TinyPair) -> None:
    """As OpenChat: chat tokens that the base lacks, and a matrix taller than the tokenizer."""
    instruct = Path(shutil.copytree(pair.instruct, tmp_path / "instruct"))
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.add_special_tokens({"eos_token": "<|end_of_turn|>"})
    tokenizer.save_pretrained(instruct)
    own = torch.full((8, 32), 0.25)

    def taller(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name] = torch.cat([tensors[name], own])

    edit_weights(instruct, taller)
    edit_json(instruct / "config.json", vocab_size=608, eos_token_id=600)
    edit_json(instruct / "generation_config.json", eos_token_id=[600, 3])

    vocabulary = tokenizer_folder(tmp_path / "tokenizer", instruct, "replaced")
    initialise(pair.base, vocabulary, tmp_path / "adapted")
    propagate(pair.base, instruct, tmp_path / "adapted", tmp_path / "lep", "overlap")
    found = verify(tmp_path / "lep", instruct)
    assert found["eos"] == ["<|end_of_turn|>", "<|end|>"]
    new_id = load_tokenizer(tmp_path / "lep").token_to_id("<|end_of_turn|>")
    assert new_id < found["rows"] == 500
    for matrix in read_embeddings(tmp_path / "lep").matrices().values():
        assert torch.equal(matrix[new_id], own[0])

    without = tokenizer_folder(tmp_path / "other", pair.base, "replaced")
    initialise(pair.base, without, tmp_path / "short")
    with pytest.raises(RuadaptError, match=r"lacks '<\|end_of_turn\|>'.*instruct model's tokenizer"):
        propagate(pair.base, instruct, tmp_path / "short", tmp_path / "no", "overlap")
    assert not (tmp_path / "no").exists()


def test_sources_are_not_touched_and_an_old_result_is_replaced(
    tmp_path: Path, pair: TinyPair, adapted: Path
) -> None:
    before = [hash_path(folder) for folder in (pair.base, pair.instruct, adapted)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.txt").write_text("old")
    propagate(pair.base, pair.instruct, adapted, tmp_path / "model", "delta")
    assert [hash_path(folder) for folder in (pair.base, pair.instruct, adapted)] == before
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_delta_is_tested_on_the_old_merges(tmp_path: Path, pair: TinyPair, adapted: Path) -> None:
    report = propagate(pair.base, pair.instruct, adapted, tmp_path / "model", "delta")["input"]
    assert 0 < report["held_out"]["tokens"] < 600 - 256
    assert report["held_out"]["relative_frobenius"] == pytest.approx(
        report["baseline"]["relative_frobenius"] * (1 - report["explained"]) ** 0.5
    )


def embeddings_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["model.embed_tokens.weight"]


def spoil_truncated(folders: dict[str, Path]) -> None:
    path = folders["instruct"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_pickle(folders: dict[str, Path]) -> None:
    (folders["instruct"] / "model.safetensors").rename(folders["instruct"] / "pytorch_model.bin")


def spoil_nan(folders: dict[str, Path]) -> None:
    edit_weights(folders["instruct"], lambda tensors: embeddings_of(tensors)[7].fill_(float("nan")))


def spoil_stranger(folders: dict[str, Path]) -> None:
    edit_weights(
        folders["instruct"], lambda tensors: embeddings_of(tensors).normal_(generator=torch.Generator())
    )


def spoil_width(folders: dict[str, Path]) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name] = tensors[name][:, :16].contiguous()

    edit_weights(folders["adapted"], narrow)


def spoil_height(folders: dict[str, Path]) -> None:
    edit_json(folders["base"] / "config.json", vocab_size=601)


def spoil_tokenizer_too_long(folders: dict[str, Path]) -> None:
    shutil.copyfile(folders["base"] / "tokenizer.json", folders["adapted"] / "tokenizer.json")


def spoil_ids(folders: dict[str, Path]) -> None:
    """Another vocabulary of the same size: the ids of the rows no longer name their tokens."""
    path = folders["adapted"] / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    ordinary = [token for token in spec["model"]["vocab"] if token not in SPECIAL_TOKENS]
    for token, other in zip(ordinary, ordinary[1:] + ordinary[:1], strict=True):
        spec["model"]["vocab"][token] = 4 + ordinary.index(other)
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


def spoil_eos(folders: dict[str, Path]) -> None:
    old, new = (load_tokenizer(folders[name]) for name in ("instruct", "adapted"))
    lost = next(i for token, i in old.get_vocab().items() if new.token_to_id(token) is None)
    edit_json(folders["instruct"] / "generation_config.json", eos_token_id=[3, lost])


SPOILERS: dict[str, tuple[Callable[[dict[str, Path]], object], str]] = {
    "no config": (lambda f: (f["base"] / "config.json").unlink(), "base is no model folder"),
    "no weights": (lambda f: (f["base"] / "model.safetensors").unlink(), "base holds no model.safetensors"),
    "no tokenizer": (lambda f: (f["adapted"] / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "broken tokenizer": (
        lambda f: (f["adapted"] / "tokenizer.json").write_text("{"),
        "tokenizer.json is not a readable",
    ),
    "broken config": (lambda f: (f["base"] / "config.json").write_text("{"), "config.json"),
    "truncated": (spoil_truncated, "truncated or corrupted"),
    "pickle": (spoil_pickle, "convert pickled weights"),
    "nan": (spoil_nan, r"NaN or infinite values in rows \[7\]"),
    "stranger": (spoil_stranger, "not tuned from .*mean cosine .*use force"),
    "width": (spoil_width, "differ in hidden size: base 32, instruct 32, adapted 16"),
    "height": (spoil_height, "config.json says 601 rows, the embeddings have 600"),
    "longer tokenizer": (spoil_tokenizer_too_long, "600 ids, the embeddings have 500 rows"),
    "other tokenizer": (spoil_ids, "adapted with another tokenizer"),
    "eos lost": (spoil_eos, "eos_token_id is .*new tokenizer lacks"),
}


def test_tied_and_untied_do_not_mix(tmp_path: Path, tiny_pair: TinyPair, tiny_pair_untied: TinyPair) -> None:
    with pytest.raises(RuadaptError, match="tying of the head: base tied, instruct untied"):
        drift(tiny_pair.base, tiny_pair_untied.instruct)
    rows = {"input": lambda first, last: torch.zeros(last - first, 32)}
    with pytest.raises(RuadaptError, match="is untied"):
        write_rows(tiny_pair_untied.base, tmp_path / "no", 600, rows, tiny_pair.base)
    # A stored head that differs stays one of its own, as transformers loads it, whatever the config says.
    own = Path(shutil.copytree(tiny_pair_untied.base, tmp_path / "own"))
    edit_json(own / "config.json", tie_word_embeddings=True)
    initialise(own, tokenizer_folder(tmp_path / "tokenizer", own, "extended"), tmp_path / "model")
    assert not verify(tmp_path / "model", own)["tied"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_matrix_stored_twice_is_written_once(tmp_path: Path, tiny_pair: TinyPair) -> None:
    twice = Path(shutil.copytree(tiny_pair.base, tmp_path / "twice"))
    edit_weights(twice, lambda tensors: tensors.update({"lm_head.weight": embeddings_of(tensors).clone()}))
    initialise(twice, tokenizer_folder(tmp_path / "tokenizer", twice, "extended"), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert verify(tmp_path / "model", twice)["tied"]


def test_a_missing_shard_is_named(tmp_path: Path, tiny_pair: TinyPair) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shutil.copyfile(tiny_pair.base / "tokenizer.json", tmp_path / "sharded" / "tokenizer.json")
    index = tmp_path / "sharded" / INDEX
    content = index.read_text()
    index.write_text(content.replace('"model-00001', '"../model-00001'))
    with pytest.raises(RuadaptError, match="names files outside the folder"):
        initialise(tmp_path / "sharded", tiny_pair.base, tmp_path / "no")
    index.write_text(content)
    last = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(RuadaptError, match=f"{last.name} is missing"):
        initialise(tmp_path / "sharded", tiny_pair.base, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_verify_finds_a_changed_body_and_a_wrong_eos(tmp_path: Path, tiny_pair: TinyPair) -> None:
    broken = Path(shutil.copytree(tiny_pair.base, tmp_path / "broken"))
    edit_weights(broken, lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    edit_json(broken / "generation_config.json", eos_token_id=7)
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(RuadaptError, match="1 tensors differ") as caught:
        verify(broken, tiny_pair.base)
    assert "generation_config.json differs" in str(caught.value) and "eos_token_id" in str(caught.value)
    assert "chat template renders other text" in str(caught.value)
    assert verify(tiny_pair.instruct)["compared_with_source"] is False


def test_force_overrides_the_check_for_strangers(tmp_path: Path, tiny_pair: TinyPair) -> None:
    stranger = Path(shutil.copytree(tiny_pair.instruct, tmp_path / "stranger"))
    spoil_stranger({"instruct": stranger})
    initialise(
        tiny_pair.base,
        tokenizer_folder(tmp_path / "tokenizer", tiny_pair.base, "extended"),
        tmp_path / "model",
    )
    assert drift(tiny_pair.base, stranger)["input"]["mean_cosine"] < propagation.STRANGERS_COSINE
    propagate(tiny_pair.base, stranger, tmp_path / "model", tmp_path / "result", "delta", force=True)
    verify(tmp_path / "result", stranger)
