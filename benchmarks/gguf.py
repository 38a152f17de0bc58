"""GGUF files against the folders they were made from: ids, logits, greedy tokens; memory, bits per byte.

    python -m benchmarks.gguf families LLAMA_CPP OUT.csv [NAME...]
    python -m benchmarks.gguf models OUT.csv FOLDER FILE.gguf [FOLDER FILE.gguf...]
    python -m benchmarks.gguf files OUT.csv FILE.gguf...

`families` takes the real tokenizers of RUADAPT_REFERENCE, each adapted in each way, on random models of their
architectures with small matrices, and compares the ids of 10,000 random texts, held-out text and chats.
`models` compares the same for real models and the files made from them.
`files` takes exported models: size, memory, and bits per byte of held-out text by llama.cpp itself.
Both need llama-cpp-python.
"""

import ctypes
import json
import math
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.measuring import measured, show
from ruadapt.checkpoints import initialise
from ruadapt.checkpoints.gguf_export import export_gguf
from ruadapt.data_sets import read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write
from ruadapt.vocab import (
    extend,
    load_tokenizer,
    optimize,
    rows,
    save_tokenizer,
    train_replacement,
)
from ruadapt.vocab.save import PROBES
from ruadapt.vocab.sentencepiece_file import random_texts
from ruadapt.vocab.spec import special_ids

ARCHITECTURES = {
    "qwen2.5": "qwen2",
    "llama-3": "llama",
    "mistral-nemo": "mistral",
    "llama-2": "llama",
    "mistral-7b-v0.1": "mistral",
    "gemma": "gemma3_text",
}
KINDS = ("original", "extended", "unigram", "optimized", "bpe")
HELDOUT = {"ru": "heldout_ru_gsd_taiga.txt", "en": "heldout_en_ewt.txt"}
SCORED = 5000  # characters of each language
RANDOM = 10_000
ADDED = 2000
REPLACED = 8000  # rows of a vocabulary that replaces the original's
CHAT = "{begin}user\n{one}{end}\n{begin}assistant\n{two}{end}\n"


def families(converter: Path, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row of agreement for each family's original and each adapted vocabulary."""
    for name in wanted or ARCHITECTURES:
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as scratch:
                folder, file = family_folder(Path(scratch), name, kind), Path(scratch) / "model.gguf"
                try:
                    export_gguf(folder, file, "f32", converter=converter)
                except RuadaptError as error:
                    row: dict[str, Any] = {"family": name, "vocabulary": kind, "refused": str(error)[:300]}
                else:
                    row = {"family": name, "vocabulary": kind, "refused": "", **_agreement(folder, file)}
                show("family", row)
                yield row


def family_folder(place: Path, name: str, kind: str, head_size: int = 16) -> Path:
    """Write a random model with a family's real tokenizer, adapted in one of `KINDS`; return its folder."""
    source, original = reference() / "tokenizers" / name, place / "original"
    _random_model(source, original, ARCHITECTURES[name], head_size)
    if kind == "original":
        return original
    learned = list(read_texts(reference() / "text" / "train_ru_modern.txt.gz"))[:8000]
    if kind == "extended":
        words = extend(source, learned, ADDED)
    elif kind == "optimized":
        kept = (rows(load_tokenizer(source)) - 1000) // 2
        words = optimize(source, learned, kept, ADDED, used_on=learned)
    else:
        words = train_replacement(learned, source, "bpe" if kind == "bpe" else "unigram", REPLACED)
    save_tokenizer(place / "words", words, original)
    initialise(original, place / "words", place / kind)
    return place / kind


def _random_model(source: Path, folder: Path, kind: str, head_size: int) -> None:
    """Write a random model with the real tokenizer and as many rows, but small matrices."""
    tokenizer, named = load_tokenizer(source), json.loads((source / "tokenizer_config.json").read_text())
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    carried = {key: value for key, value in named.items() if key != "added_tokens_decoder"}
    carried |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(carried))
    if (source / "tokenizer.model").exists():
        (folder / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    token = named.get("eos_token")
    ends = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
    sizes: Any = {"hidden_size": 4 * head_size, "intermediate_size": 128, "head_dim": head_size}
    sizes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    if kind.startswith("gemma"):  # llama.cpp takes the heads' size for it
        sizes |= {"query_pre_attn_scalar": head_size}
    sizes |= {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": None, "initializer_range": 0.1}
    torch.manual_seed(3)
    config: Any = CONFIG_MAPPING[kind]
    AutoModelForCausalLM.from_config(config(vocab_size=rows(tokenizer), **sizes)).save_pretrained(folder)


def _agreement(folder: Path, file: Path) -> dict[str, Any]:
    """Count texts that llama.cpp cuts otherwise, and compare logits and 32 greedy tokens."""
    tokenizer, texts_of = load_tokenizer(folder), reference() / "text"
    reader = _open(file, vocab_only=True)
    held = [line for name in HELDOUT.values() for line in read_texts(texts_of / name)]
    begin, end = [*special_ids(tokenizer)][-2:]  # the tokenizer's own: names of others are ordinary text
    chats = [CHAT.format(begin=begin, end=end, one=one, two=two) for one, two in pairwise(held[:500])]
    chats += [f"Да{token}no" for token in special_ids(tokenizer)]
    counts: dict[str, Any] = {}
    examples: list[str] = []
    for kind, texts in {
        "random": random_texts(tokenizer, RANDOM, seed=1),
        "heldout": held,
        "chat": chats,
        "hard": list(PROBES),
    }.items():
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        cut = tokenizer.encode_batch(texts, add_special_tokens=False)
        wrong = [
            text
            for text, one in zip(texts, cut, strict=True)
            if reader.tokenize(text.encode(), add_bos=False, special=True) != one.ids
        ]
        counts |= {f"{kind}_texts": len(texts), f"{kind}_differ": len(wrong)}
        examples += wrong[:2]
    reader.close()
    ids = tokenizer.encode("Пекарь живёт в маленьком городе у реки. The baker lives in 25 towns.").ids
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reader = _open(file, n_ctx=256, logits_all=True)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
        said = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=32, eos_token_id=None)
    reader.eval(ids)
    found = np.array(reader.scores[: len(ids)])
    spoken = [int(found[-1].argmax())]
    while len(spoken) < 32:
        reader.eval(spoken[-1:])
        spoken.append(int(reader.scores[reader.n_tokens - 1].argmax()))
    counts["logits_relative_error"] = float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))
    same = [one == two for one, two in zip(spoken, said[0, len(ids) :].tolist(), strict=True)]
    counts["greedy_same_of_32"] = same.index(False) if False in same else 32
    return counts | {"examples": json.dumps(examples, ensure_ascii=False)}


def models(pairs: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row of agreement for each folder and the file made from it."""
    for folder, file in zip(pairs[::2], pairs[1::2], strict=True):
        row = {"file": file.name, **_agreement(folder, file)}
        show("model", row)
        yield row


def files(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield size, memory and bits per byte of each file, each in a process of its own."""
    for path in paths:
        found = measured(partial(_scored, path))
        row = {"file": path.name, "bytes": path.stat().st_size, **found["result"]}
        show("file", row)
        yield row


def _scored(path: Path) -> dict[str, Any]:
    before = psutil.Process().memory_info().rss
    reader = _open(path, n_ctx=512, logits_all=True)
    result: dict[str, Any] = {}
    reader.eval([0] * 32)
    result["memory_bytes"] = psutil.Process().memory_info().rss - before
    for language, name in HELDOUT.items():
        whole = "\n".join(read_texts(reference() / "text" / name))
        result[f"bits_per_byte_{language}"] = _bits(reader, whole[:SCORED])
    return result


def _bits(reader: Any, text: str, window: int = 500) -> float:
    """Score a text in windows of so many tokens, each begun by BOS; every token counts once."""
    ids, spent = reader.tokenize(text.encode(), add_bos=False, special=False), 0.0
    start = reader.token_bos() if reader.token_bos() >= 0 else reader.token_eos()
    for first in range(0, len(ids), window):
        part = [start, *ids[first : first + window]]
        reader.reset()
        reader.eval(part[:-1])
        for place, target in enumerate(part[1:]):
            logits = torch.from_numpy(reader.scores[place])
            spent += float(logits.logsumexp(-1) - logits[target])
    return spent / math.log(2) / len(text.encode())


def _open(file: Path, **options: Any) -> Any:
    import llama_cpp

    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    _KEPT.append(quiet)
    return llama_cpp.Llama(str(file), verbose=False, n_threads=1, n_threads_batch=1, **options)


_KEPT: list[Any] = []  # a callback must outlive its library's use


def reference() -> Path:
    folder = Path(os.environ.get("RUADAPT_REFERENCE", ""))
    if not (folder / "tokenizers").is_dir():
        raise RuadaptError("RUADAPT_REFERENCE names no folder of real tokenizers")
    return folder


if __name__ == "__main__":
    if sys.argv[1:2] == ["families"]:
        found, out = families(Path(sys.argv[2]), sys.argv[4:]), Path(sys.argv[3])
    else:
        measure = {"models": models, "files": files}[sys.argv[1]]
        found, out = measure(list(map(Path, sys.argv[3:]))), Path(sys.argv[2])
    atomic_write(out, pd.DataFrame(found).to_csv(index=False))
