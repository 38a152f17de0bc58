"""Saved tokenizers: transformers reads what was saved, or the saving is refused."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.vocab import check_folder, extend, optimize, save_tokenizer, train_replacement
from ruadapt.vocab.save import PROBES

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2


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


def test_an_architecture_that_reads_it_differently_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """transformers builds Qwen2Tokenizer in every qwen2 folder and turns a Unigram vocabulary into BPE."""
    original = tmp_path / "original"
    shutil.copytree(tiny_pair.base, original)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    unigram = train_replacement(CORPUS, original, "unigram", 640)
    with pytest.raises(RuadaptError, match="qwen2"):
        save_tokenizer(tmp_path / "new", unigram, original)
    assert not list((tmp_path / "new").iterdir())


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
