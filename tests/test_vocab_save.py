"""Saved tokenizers: transformers reads what was saved, or the saving is refused."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.vocab import (
    broken,
    certify,
    check_folder,
    extend,
    load_tokenizer,
    optimize,
    save_tokenizer,
    train_replacement,
)
from ruadapt.vocab.save import PROBES, READER_FILE

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2


@pytest.fixture(scope="module")
def variants(tiny_pair: TinyPair) -> dict[str, Tokenizer]:
    return {
        "bpe": train_replacement(CORPUS, tiny_pair.base, "bpe", 640),
        "unigram": train_replacement(CORPUS, tiny_pair.base, "unigram", 640),
        "extended": extend(tiny_pair.base, CORPUS, 100),
    }


def of_type(pair: TinyPair, folder: Path, model_type: str) -> Path:
    """The original's tokenizer beside the config of another architecture."""
    original = Path(shutil.copytree(pair.base, folder / "original"))
    (original / "config.json").write_text(json.dumps({"model_type": model_type}))
    return original


@pytest.mark.parametrize("name", ["bpe", "unigram", "extended", "optimized"])
def test_transformers_reads_the_ids_of_tokenizer_json(tiny_pair: TinyPair, tmp_path: Path, name: str) -> None:
    if name == "extended":
        tokenizer = extend(tiny_pair.base, CORPUS, 100)
    elif name == "optimized":
        tokenizer = optimize(tiny_pair.base, CORPUS, 400, 100)
    else:
        tokenizer = train_replacement(CORPUS, tiny_pair.base, name, 640)  # type: ignore[arg-type]
    folder = save_tokenizer(tmp_path / name, tokenizer, tiny_pair.base)
    shutil.copy(tiny_pair.base / "config.json", folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(tiny_pair.base)
    for text in (*PROBES, *RUSSIAN.splitlines()):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert loaded.decode(tokenizer.encode(text).ids) == text
    messages = [{"role": "user", "content": "Где живёт врач?"}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>Где живёт врач?<|end|><|assistant|>"
    assert loaded.special_tokens_map == original.special_tokens_map
    assert loaded.model_max_length == original.model_max_length == 512
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing half-written is left


@pytest.mark.parametrize("model", ["bpe", "unigram", "extended"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "gemma"])
def test_every_architecture_reads_the_ids_of_tokenizer_json(
    tiny_pair: TinyPair, tmp_path: Path, variants: dict[str, Tokenizer], model_type: str, model: str
) -> None:
    """transformers builds Qwen2Tokenizer in every qwen2 folder: Unigram or other rules would break there."""
    original = of_type(tiny_pair, tmp_path, model_type)
    folder = save_tokenizer(tmp_path / "new", variants[model], original)
    assert not (folder / "config.json").exists()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "config.json", tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*PROBES, *RUSSIAN.splitlines()):
        assert loaded(text)["input_ids"] == again(text)["input_ids"] == variants[model].encode(text).ids
    # Only where transformers would else rebuild the vocabulary.
    assert (folder / READER_FILE).exists() == (model_type == "qwen2")


def test_the_code_beside_a_tokenizer_reads_its_file(
    tiny_pair: TinyPair, tmp_path: Path, variants: dict[str, Tokenizer]
) -> None:
    """Serving stacks may allow a folder's code; then the class of tokenizer_json.py is taken."""
    folder = save_tokenizer(tmp_path / "new", variants["unigram"], of_type(tiny_pair, tmp_path, "qwen2"))
    names: dict[str, type] = {}
    exec((folder / READER_FILE).read_text(), names)
    loaded = names["TokenizerJson"].from_pretrained(folder)
    assert loaded(RUSSIAN)["input_ids"] == variants["unigram"].encode(RUSSIAN).ids
    reference = read_json(folder / "tokenizer_config.json")["auto_map"]["AutoTokenizer"][1]
    assert reference == f"{READER_FILE.removesuffix('.py')}.TokenizerJson"


@pytest.mark.parametrize("form", ["tokenizer_config.json", "added_tokens.json", "role"])
def test_tokens_that_tokenizer_json_does_not_name_are_kept(
    tiny_pair: TinyPair, tmp_path: Path, form: str
) -> None:
    original = Path(shutil.copytree(tiny_pair.base, tmp_path / "original"))
    config = read_json(original / "tokenizer_config.json")
    token = {"content": "<|turn|>", "special": True, "normalized": False}
    config.pop("added_tokens_decoder", None)
    if form == "tokenizer_config.json":
        config["added_tokens_decoder"] = {"600": token}
    elif form == "added_tokens.json":
        (original / form).write_text('{"<|turn|>": 600}')
    else:
        config["mask_token"] = "<|turn|>"
    (original / "tokenizer_config.json").write_text(json.dumps(config))
    before = AutoTokenizer.from_pretrained(original)("да<|turn|>")["input_ids"]
    new = extend(original, CORPUS, 40)
    folder = save_tokenizer(tmp_path / "new", new, original)
    assert before[-1] == 600 == AutoTokenizer.from_pretrained(folder)("да<|turn|>")["input_ids"][-1]
    assert new.get_vocab_size() == 641
    if form != "role":
        text = json.dumps(config).replace('"600"', '"700"')
        (original / "tokenizer_config.json").write_text(text)
        (original / "added_tokens.json").write_text('{"<|turn|>": 700}')
        with pytest.raises(RuadaptError, match=r"has id 700, but by tokenizer\.json it gets 600"):
            load_tokenizer(original)


def test_roles_that_only_the_class_knows_are_written_out(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """GPT-2's folder names no end of text: its class does."""
    original = of_type(tiny_pair, tmp_path, "gpt2")
    (original / "tokenizer_config.json").write_text("{}")
    folder = save_tokenizer(tmp_path / "new", extend(original, CORPUS, 40), original)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    assert not broken(certify(folder, original, {}, 40))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert broken(certify(folder, original, {}, 40)) == ["special tokens in their roles"]
    with pytest.raises(RuadaptError, match=r"transformers adds .*'<\|endoftext\|>'"):
        save_tokenizer(tmp_path / "none", Tokenizer(models.BPE({"a": 0}, [])), original)


def test_a_form_that_no_reader_takes_is_refused(
    tiny_pair: TinyPair, tmp_path: Path, variants: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ruadapt.vocab.save._AUTO_MAP", {})
    with pytest.raises(RuadaptError, match=r"model_type qwen2.*reads this differently"):
        save_tokenizer(tmp_path / "new", variants["unigram"], of_type(tiny_pair, tmp_path, "qwen2"))
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_files_disagree_is_found(reference: Path, tmp_path: Path) -> None:
    """A Unigram tokenizer.json that calls itself LlamaTokenizer is rebuilt as BPE, without a word."""
    source = reference / "tokenizers" / "darulm_20_05_24_part1-2_32000_unigram_hf"
    check_folder(source)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = {**read_json(source / "tokenizer_config.json"), "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RuadaptError, match="reads this differently"):
        check_folder(folder)
