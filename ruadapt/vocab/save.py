"""Tokenizer folders that transformers reads exactly as `tokenizers` does, or a refusal."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json
from ruadapt.vocab.sentencepiece_file import PIECES_FILE, is_sentencepiece, write_pieces
from ruadapt.vocab.spec import NAMED, load_tokenizer, special_ids

# Russian, English, code, numbers, spaces at every place, marks, emoji, other scripts: what readers get wrong.
PROBES = (
    "Привет, мир! Как дела?",
    " Ёлка — это дерево; 12 345,67 рубля…",
    "Hello world, it's 2024.",
    "  two spaces  and\ttabs\n\nand lines \n",
    "def f(x):\n    return x**2  # квадрат\n",
    "for (int i = 0; i < n; ++i) { total += a[i] * 0x1F; } // <a href='/x?y=1&z=%20'>",
    "naïve café “quotes” e\u0301 й",
    "你好 مرحبا 🙂👩‍👩‍👧 \u200b\x00�",
    "1234567890 ПриветМир camelCase_snake",
    "",
)
_NOT_CARRIED = (
    *("tokenizer_class", "added_tokens_decoder", "auto_map"),
    *("vocab_file", "tokenizer_file", "name_or_path"),
)
READER_FILE = "tokenizer_json.py"
_AUTO_MAP = {"AutoTokenizer": [None, "tokenizer_json.TokenizerJson"]}
_READER = '''"""The tokenizer of this folder is its tokenizer.json, whatever the model's architecture."""

from transformers import PreTrainedTokenizerFast


class TokenizerJson(PreTrainedTokenizerFast):
    """Reads tokenizer.json as it is; used only by callers who allow code of this folder."""
'''


def save_tokenizer(folder: Path | str, tokenizer: Tokenizer, original_folder: Path | str) -> Path:
    """Write tokenizer.json, tokenizer_config.json and the chat template, and prove that they load right.

    Everything of the original's tokenizer_config.json is carried over (special tokens, chat template,
    `model_max_length`) but the class, which becomes `PreTrainedTokenizerFast`; special tokens that only the
    original's class knows are written out. The files are loaded through AutoTokenizer, alone and beside the
    original's `model_type` where there is one, and must give the ids of tokenizer.json itself on `PROBES`;
    only then are they moved to `folder`. Architectures for which transformers insists on a class of its own
    (5.23: `qwen2`) and would rebuild the vocabulary get an `auto_map` besides: transformers then goes by
    `tokenizer_class`, and a caller who allows code of the folder gets the same class from
    `tokenizer_json.py`. Where the original's folder has SentencePiece's `tokenizer.model`, so has this one.

    Raises:
        RuadaptError: as `check_folder`, in either form; transformers adds special tokens to the original that
            the new tokenizer lacks; no `tokenizer.model` gives the same ids.
    """
    original_folder = Path(original_folder)
    config = read_json(original_folder / "tokenizer_config.json", {})
    written = {key: value for key, value in config.items() if key not in _NOT_CARRIED}
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if (loaded := load_as_transformers(original_folder)) is not None:
        written = {**{role: token for role, token in roles(loaded).items() if role not in config}, **written}
        require_tokens(loaded, tokenizer, original_folder)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        tokenizer.save(str(temporary / "tokenizer.json"), pretty=False)
        write_json(temporary / "tokenizer_config.json", written)
        for extra in ("chat_template.jinja", "special_tokens_map.json"):
            if (original_folder / extra).exists():
                shutil.copyfile(original_folder / extra, temporary / extra)
        if (original_folder / PIECES_FILE).is_file() and is_sentencepiece(tokenizer):
            write_pieces(temporary / PIECES_FILE, tokenizer, original_folder / PIECES_FILE)
        check_folder(temporary)
        if model_type := read_json(original_folder / "config.json", {}).get("model_type"):
            write_json(temporary / "config.json", {"model_type": model_type})
            try:
                check_folder(temporary)
            except RuadaptError:
                (temporary / READER_FILE).write_text(_READER, encoding="utf-8")
                write_json(temporary / "tokenizer_config.json", {**written, "auto_map": _AUTO_MAP})
                check_folder(temporary)
            (temporary / "config.json").unlink()
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in temporary.iterdir():  # not `copytree`, which would carry the temporary folder's mode
            shutil.copyfile(path, Path(folder) / path.name)
    return Path(folder)


def require_tokens(loaded: Any, tokenizer: Tokenizer, folder: Path | str) -> None:
    """Refuse a tokenizer that lacks special tokens which transformers adds to a folder's original.

    Args:
        loaded: what `load_as_transformers` gives for the folder.
    """
    known = special_ids(tokenizer)
    if missing := sorted(
        token for token in getattr(loaded, "added_tokens_encoder", ()) if token not in known
    ):
        raise RuadaptError(
            f"transformers adds {missing[:5]} to {folder}, tokenizer.json lacks them; save the original anew "
            "by transformers' AutoTokenizer and save_pretrained, and start from there"
        )


def load_as_transformers(folder: Path | str) -> Any:
    """Return what AutoTokenizer loads from a folder's own files, None where it can't."""
    from transformers import AutoTokenizer  # seconds to import

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers and its converters raise everything; some classes are the folder's code
        return None


def roles(loaded: Any) -> dict[str, str]:
    """Return {role: token} of the special tokens that transformers names: `bos_token`, `eos_token`, …"""
    return {role: str(token) for role in NAMED if (token := getattr(loaded, role, None)) is not None}


def check_folder(folder: Path | str) -> None:
    """Compare the ids that AutoTokenizer gives for a folder with those of its tokenizer.json.

    Raises:
        RuadaptError: it can't be loaded, or gives other ids on a probe, with or without special tokens.
    """
    folder = Path(folder)
    own, loaded = load_tokenizer(folder), load_as_transformers(folder)
    if loaded is None:
        raise RuadaptError(f"transformers can't load the tokenizer in {folder} by AutoTokenizer")
    probes = [*PROBES, *(f"Да{content}no" for content in special_ids(own))]
    for with_specials in (False, True):
        encodings = own.encode_batch(probes, add_special_tokens=with_specials)
        for probe, encoding in zip(probes, encodings, strict=True):
            ids = list(loaded(probe, add_special_tokens=with_specials)["input_ids"])
            if ids != encoding.ids:
                kind = read_json(folder / "config.json", {}).get("model_type")
                raise RuadaptError(
                    f"transformers ({type(loaded).__name__}, model_type {kind}) reads this differently "
                    f"from its tokenizer.json: {probe!r} gives {ids[:9]}, not {encoding.ids[:9]}; "
                    "write the folder with save_tokenizer, or load it with "
                    "PreTrainedTokenizerFast.from_pretrained"
                )
