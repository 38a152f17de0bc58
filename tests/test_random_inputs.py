"""Random model folders and corpora through every step and reader: right results, or one clear refusal.

A few dozen of each, with fixed seeds; RUADAPT_RANDOM=1000 runs as many by hand.
"""

import gzip
import json
import os
import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, ENGLISH, RUSSIAN
from test_families import LLAMA2, LLAMA3, MISTRAL3, QWEN, STARCODER, learned
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from ruadapt.checkpoints import initialise, propagate, read_embeddings, verify
from ruadapt.data_sets import read_column, read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path
from ruadapt.lep import METHODS
from ruadapt.vocab import extend, load_tokenizer, optimize, rows, save_tokenizer, train_replacement

CASES = int(os.environ.get("RUADAPT_RANDOM", 24))
CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
}


def words_of(form: Any, extra: int) -> Tokenizer:
    tokenizer = Tokenizer.from_str(learned(form[0]))
    tokens = [AddedToken(f"<|extra {n}|>", special=n % 2 == 0, normalized=False) for n in range(extra)]
    tokenizer.add_tokens(tokens)
    return tokenizer


@cache
def vocabulary(place: Path, form: int, extra: int, how: str) -> Path:
    """A new vocabulary for a tokenizer, made once."""
    original, target = place / f"{form}-{extra}", place / f"{form}-{extra}-{how}"
    if not original.exists():
        original.mkdir(parents=True)
        if FORMS[form] is QWEN:
            (original / "config.json").write_text('{"model_type": "qwen2"}')
        words_of(FORMS[form], extra).save(str(original / "tokenizer.json"))
        (original / "tokenizer_config.json").write_text(json.dumps(FORMS[form][1]))
    new = {
        "extended": lambda: extend(original, CORPUS, 40),
        "optimized": lambda: optimize(original, CORPUS, 420, 40, used_on=CORPUS),
        "bpe": lambda: train_replacement(CORPUS, original, "bpe", 720),
        "unigram": lambda: train_replacement(CORPUS, original, "unigram", 720),
    }[how]()
    return save_tokenizer(target, new, original)


FORMS = (QWEN, LLAMA2, LLAMA3, MISTRAL3, STARCODER)


def write_model(
    draw: random.Random, folder: Path, config: dict[str, Any], words: Tokenizer, about: Any
) -> Any:
    """Write a random model in one file or in shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = getattr(transformers, config["architectures"][0])(AutoConfig.from_pretrained(folder))
    model.to(draw.choice([torch.float32, torch.bfloat16, torch.float16]))
    save(draw, model, folder)
    words.save(str(folder / "tokenizer.json"))
    template = {"chat_template": CHAT_TEMPLATE} if draw.random() < 0.7 else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | template))
    return model


def save(draw: random.Random, model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=draw.choice(["1GB", "20KB", "5KB"]))


def move(model: Any, names: str, amount: float) -> None:
    """Train, as it were."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(amount * torch.randn_like(parameter) * parameter.float().std().to(parameter))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.mark.parametrize("case", range(CASES))
def test_random_model_folders(case: int, place: Path, tmp_path: Path) -> None:
    draw = random.Random(case)
    torch.manual_seed(case)
    form, extra = draw.randrange(len(FORMS)), draw.randrange(4)
    words, about = words_of(FORMS[form], extra), FORMS[form][1]
    architecture = draw.choice([*KINDS])
    if KINDS[architecture] == "qwen2":  # transformers gives it this tokenizer, whatever the folder says
        form, words, about = 0, words_of(QWEN, extra), QWEN[1]
    # Padding rows, or added tokens at the end that have no row.
    padding = draw.choice([0, 0, 7, 64, *range(-extra, 0)])
    tied = draw.random() < 0.5
    eos = words.token_to_id(about["eos_token"])
    config = {
        **SIZES,
        "architectures": [architecture],
        "model_type": KINDS[architecture],
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": tied,
        "vocab_size": rows(words) + padding,
        "eos_token_id": draw.choice([eos, [eos]]),
        "bos_token_id": None,
        "pad_token_id": draw.choice([None, eos, rows(words) + padding - 1 if padding > 0 else eos]),
    }
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    model = write_model(draw, base, config, words, about)
    shutil.copytree(base, instruct)
    move(model, "", 0.05)
    for old in instruct.glob("*.safetensors*"):
        old.unlink()
    save(draw, model, instruct)
    shutil.copyfile(base / "config.json", instruct / "config.json")
    how = draw.choice(["extended", "optimized", "bpe", "unigram"])
    new = vocabulary(place, form, extra, how)

    initialise(base, new, tmp_path / "init")
    verify(tmp_path / "init", base, kept="shared")
    height = read_embeddings(tmp_path / "init").height()
    assert height == rows(load_tokenizer(new))
    adapted: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "init", dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if how == "extended":  # other text has its old ids, and the old model's answers to them
        ids = torch.tensor([words.encode(ENGLISH.splitlines()[0]).ids])
        ids = ids[:, ids[0] < before.get_input_embeddings().weight.shape[0]]
        with torch.no_grad():
            old, fresh = (each.float()(ids).logits for each in (before, adapted))
        shared = min(rows(words), old.shape[-1])
        torch.testing.assert_close(fresh[..., :shared], old[..., :shared], rtol=1e-4, atol=1e-5)
        adapted.to(read_embeddings(base).input.dtype)

    move(adapted, "embed", 0.02)
    body = draw.random() < 0.3
    if body:
        move(adapted, "mlp", 0.02)
    for stale in (tmp_path / "init").glob("*.safetensors*"):
        stale.unlink()
    save(draw, adapted, tmp_path / "init")
    report = propagate(base, instruct, tmp_path / "init", tmp_path / "lep", draw.choice([*METHODS]))
    changed = report["body"]["tensors"]
    assert bool(changed) == body
    found = verify(tmp_path / "lep", instruct, changed=changed)
    assert (found["rows"], found["tied"]) == (height, tied)


WORDS = RUSSIAN.split()


def line(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(1, 8)))


def write_file(draw: random.Random, path: Path) -> list[str]:
    """Write one file of texts in one of the forms that people have; return what a reader must find."""
    texts = [line(draw) for _ in range(draw.randrange(0, 6))]
    blank = draw.choice(["", "\n", "  \n\t\n"])
    end = draw.choice(["\n", "\r\n"])
    mark = draw.choice(["", "", "\ufeff"])
    name = path.name.lower()
    if ".jsonl" in name:
        body = "".join(
            json.dumps({"text": text, "n": None}, ensure_ascii=draw.random() < 0.5) + end for text in texts
        )
    else:
        body = "".join(text + end for text in texts)
    content = (mark + body + blank).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return texts


def spoil(draw: random.Random, folder: Path) -> None:
    """Leave one thing that no reader may pass over."""
    kind = draw.randrange(5)
    if kind == 0:
        (folder / "cp1251.txt").write_bytes("привет, мир".encode("cp1251"))
    elif kind == 1:
        (folder / "broken.jsonl").write_text('{"text": "x"}\n{"te')
    elif kind == 2:
        packed = gzip.compress((RUSSIAN * 3).encode(), mtime=0)
        (folder / "cut.txt.gz").write_bytes(packed[: draw.randrange(2, len(packed) - 9)])
    elif kind == 3:
        (folder / "link.txt").symlink_to(folder / "gone.txt")
    else:
        (folder / "other.jsonl").write_text(json.dumps({"text": draw.choice([3, ["a"]])}) + "\n")


@pytest.mark.parametrize("case", range(CASES))
def test_random_corpora(case: int, tmp_path: Path) -> None:
    draw = random.Random(case)
    root, elsewhere = (
        tmp_path / draw.choice(["corpus", "a:b", "text.txt", "{x}", "кор пус"]),
        tmp_path / "more",
    )
    endings = [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".TXT", ".Jsonl"]
    expected: dict[Path, list[str]] = {}
    folders = [root, root / "b", root / "b" / "c.txt", root / "linked"]
    elsewhere.mkdir()
    for number in range(draw.randrange(1, 7)):
        folder = draw.choice(folders)
        real = elsewhere if folder.name == "linked" else folder
        name = f"{draw.choice('абв x')}{number}{draw.choice(endings)}"
        expected[folder / name] = write_file(draw, real / name)
    root.mkdir(exist_ok=True)
    (root / "linked").symlink_to(elsewhere)
    for hidden in (".ipynb_checkpoints/a.txt", "._a.txt", "b/.git/x.jsonl"):  # copies, and not even text
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(b"\xff\xfe")
    (root / "README.md").write_text("about")
    (root / "dataset_infos.json").write_text('{"default": {}}')
    texts = [text for path in sorted(expected) for text in expected[path]]
    if texts:
        assert list(read_texts(root)) == texts
        column = list(read_column(root, "text"))
        assert list(filter(str.strip, column)) == texts
        assert Counter(read_column(root, "text", shuffled=case)) == Counter(column)
    else:
        with pytest.raises(RuadaptError, match=r"holds no text|is empty"):
            list(read_texts(root))
    assert hash_path(root) == hash_path(root)
    for kind in ("parquet", "csv"):
        table = pd.DataFrame({"text": ["раз, два", 'и "три"\nчетыре'], "none": [None, None]})
        getattr(table, f"to_{kind}")(tmp_path / f"table.{kind}", index=False)
        assert list(read_column(tmp_path / f"table.{kind}", "text")) == table["text"].tolist()
    spoil(draw, root)
    with pytest.raises(RuadaptError, match=r"UTF-8|not JSON|gzip|cannot be read|does not exist|no text in"):
        list(read_texts(root))
