"""Tokenizer folders that transformers reads exactly as `tokenizers` does, or a refusal."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_json, write_json
from ruadapt.vocab.spec import load_tokenizer, read_spec

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


def save_tokenizer(
    folder: Path | str, tokenizer: Tokenizer, original_folder: Path | str, model_type: str | None = None
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and the chat template, and prove that they load right.

    Everything of the original's tokenizer_config.json is carried over (special tokens, chat template,
    `model_max_length`) but the class, which becomes `PreTrainedTokenizerFast`. The files are loaded through
    AutoTokenizer, alone and beside the original's config.json where there is one, and must give the ids of
    tokenizer.json itself on `PROBES`; only then are they moved to `folder`. Architectures for which
    transformers insists on a class of its own (5.23: `qwen2`) and would rebuild the vocabulary get an
    `auto_map` besides: transformers then goes by `tokenizer_class`, and a caller who allows code of the
    folder gets the same class from `tokenizer_json.py`.

    Args:
        model_type: architecture that the tokenizer will stand beside; None takes that of the original's
            config.json, where there is one.

    Raises:
        RuadaptError: transformers reads the files differently in either form.
    """
    folder, original_folder = Path(folder), Path(original_folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, model_config = original_folder / "tokenizer_config.json", original_folder / "config.json"
    config = read_json(source) if source.exists() else {}
    written = {key: value for key, value in config.items() if key not in _NOT_CARRIED}
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if model_type is None and model_config.exists():
        model_type = read_json(model_config).get("model_type")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as name:
        temporary = Path(name)
        _write(tokenizer, temporary / "tokenizer.json")
        write_json(temporary / "tokenizer_config.json", written)
        for extra in ("chat_template.jinja", "special_tokens_map.json"):
            if (original_folder / extra).exists():
                shutil.copyfile(original_folder / extra, temporary / extra)
        check_folder(temporary)
        if model_type is not None:
            write_json(temporary / "config.json", {"model_type": model_type})
            try:
                check_folder(temporary)
            except RuadaptError:
                atomic_write(temporary / READER_FILE, _READER)
                write_json(temporary / "tokenizer_config.json", {**written, "auto_map": _AUTO_MAP})
                check_folder(temporary)
            (temporary / "config.json").unlink()
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
    return folder


def _write(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json with merges as "left right", as most originals have them.

    Pairs, as the library writes them, are needed only where a token holds a space or reads as a comment.
    """
    spec = read_spec(tokenizer)
    merges = spec["model"].get("merges")
    if merges and not any(" " in left + right or left.startswith("#version") for left, right in merges):
        spec["model"]["merges"] = list(map(" ".join, merges))
    path.write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def check_folder(folder: Path | str) -> None:
    """Compare the ids that AutoTokenizer gives for a folder with those of its tokenizer.json.

    Raises:
        RuadaptError: they differ on a probe, with or without special tokens.
    """
    from transformers import AutoTokenizer  # seconds to import

    folder = Path(folder)
    own = load_tokenizer(folder)
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise RuadaptError(f"transformers can't load the tokenizer in {folder}: {error}") from error
    probes = [*PROBES, *(f"Да{token.content}no" for token in own.get_added_tokens_decoder().values())]
    for with_specials in (False, True):
        for probe, encoding in zip(
            probes, own.encode_batch(probes, add_special_tokens=with_specials), strict=True
        ):
            ids = list(loaded(probe, add_special_tokens=with_specials)["input_ids"])
            if ids != encoding.ids:
                config = folder / "config.json"
                kind = read_json(config).get("model_type") if config.exists() else None
                raise RuadaptError(
                    f"transformers ({type(loaded).__name__}, model_type {kind}) reads this differently "
                    f"from its tokenizer.json: {probe!r} gives {ids[:9]}, not {encoding.ids[:9]}; "
                    "write the folder with save_tokenizer, or load it with "
                    "PreTrainedTokenizerFast.from_pretrained"
                )
