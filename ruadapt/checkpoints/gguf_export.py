"""A model folder as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

llama.cpp's own converter writes it. What is done here is what the converter can't know of a new vocabulary:
the name of the rules that cut text before the merges, SentencePiece's scores, which tokens are special.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from ruadapt.checkpoints.model_configs import TOKENIZER_FILES, eos_ids
from ruadapt.checkpoints.model_folders import read_layout
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, require_disk_space, scratch_folder, write_json
from ruadapt.vocab import check_folder, load_tokenizer, special_ids
from ruadapt.vocab.sentencepiece_file import PIECES_FILE, begins_with_space, is_sentencepiece, write_pieces
from ruadapt.vocab.spec import Spec, read_spec

SCRIPT = "convert_hf_to_gguf"
# What the converter writes, with bits per weight.
TYPES = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
# Rules before the merges, as tokenizer.json states them, and llama.cpp's name of them (src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (True,): "gpt-2",
    ("digits", True): "smollm",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False): "llama-bpe",
    (_CASED + _REST.replace(r"[\r\n]*", r"[\r\n/]*"), False): "tekken",
}


def export_gguf(
    folder: Path,
    target: Path,
    kind: str = "bf16",
    *,
    converter: Path,
    original: Path | None = None,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model folder as a GGUF file, whole or not at all.

    Args:
        folder: model folder with safetensors and tokenizer.json.
        target: the new file.
        kind: one of `TYPES`; llama.cpp's quantiser makes smaller ones from the file.
        converter: llama.cpp's folder, with `convert_hf_to_gguf.py`.
        original: the folder that the vocabulary was made from, needed where the rules before the merges are
            not among `PRE_TOKENIZERS`: its hash tells the converter their name.
        record: of what and how the model was made; kept in the file as JSON, under `ruadapt.record`.

    Returns:
        `file`, `bytes`, `type`, `tokenizer` (SentencePiece, or the rules' name where they told it).

    Raises:
        RuadaptError: no converter, or one that refuses; rules or a kind of vocabulary that llama.cpp lacks;
            transformers reads other ids than tokenizer.json gives; an unknown type; the disk is full.
            `target` is then not there.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() or target.suffix != ".gguf":
        raise RuadaptError(f"{target} exists or is no .gguf; give a new file, such as out/model-{kind}.gguf")
    script = converter / f"{SCRIPT}.py"
    if not script.is_file():
        raise RuadaptError(
            f"there is no {script}; give llama.cpp's folder with --converter: a clone of "
            "https://github.com/ggml-org/llama.cpp, or vendor/llama.cpp in the source of llama-cpp-python"
        )
    layout, tokenizer = read_layout(folder), load_tokenizer(folder)
    check_folder(folder)
    if kind not in TYPES:
        known = ", ".join(TYPES)
        raise RuadaptError(f"{kind} is none of {known}; call llama.cpp's `llama-quantize` on a bf16 file")
    facts = _facts(folder, tokenizer, original, record or {})
    weights = sum(tensor.numel() for tensor in layout.tensors.values())
    words = (folder / "tokenizer.json").stat().st_size  # the file spells them shorter
    require_disk_space(target.parent, int(weights * TYPES[kind] / 8) + words)
    with scratch_folder(target) as scratch:
        model, made = scratch / "model", scratch / "converted.gguf"
        model.mkdir()
        _arrange(folder, model, tokenizer)
        write_json(scratch / "facts.json", facts)
        command: list[str | Path] = [sys.executable, "-m", __name__]
        command += [converter.resolve(), scratch / "facts.json", model, "--outfile", made, "--outtype", kind]
        command += ["--model-name", folder.resolve().name]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuadaptError(
                f"llama.cpp's converter {script} does not convert {folder}: {' / '.join(lines[-3:])}; take a "
                "newer llama.cpp, or give --original where it does not know the rules of the tokenizer"
            )
        os.replace(made, target)
    told = facts["pre"] or ("as the original" if facts["original"] else "SentencePiece")
    return {"file": str(target), "bytes": target.stat().st_size, "type": kind, "tokenizer": told}


def pre_tokenizer(spec: Spec) -> str | None:
    """Return llama.cpp's name for the rules that a byte-level tokenizer.json has before its merges."""
    whole = spec["pre_tokenizer"] or {}
    rules: list[Any] = []
    for step in whole.get("pretokenizers", [whole]):
        kind = step.get("type")
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            rules.append(step["use_regex"])
        elif kind == "Digits" and step["individual_digits"]:
            rules.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rules.append(step["pattern"].get("Regex"))
        else:
            return None
    return PRE_TOKENIZERS.get(tuple(rules))


def _facts(
    folder: Path, tokenizer: Tokenizer, original: Path | None, record: dict[str, Any]
) -> dict[str, Any]:
    """Return what `_convert` is told; refuse vocabularies that llama.cpp has no reader for."""
    spec, pre = read_spec(tokenizer), None
    if spec["model"]["type"] != "BPE":
        raise RuadaptError(
            f"{folder} has a Unigram vocabulary with byte tokens, and llama.cpp has no reader for that; it "
            "reads BPE ones: `ruadapt tokenizer extend`, `optimize`, or `replace --model bpe`"
        )
    asked = None
    if not is_sentencepiece(tokenizer) and (pre := pre_tokenizer(spec)) is None:
        if original is None:
            raise RuadaptError(
                f"{folder}: llama.cpp's name for the rules that cut its text is not known here; give the "
                "folder of the original with --original, whose hash llama.cpp may know"
            )
        before, parts = read_spec(load_tokenizer(original)), ("normalizer", "pre_tokenizer")
        if [spec[part] for part in parts] != [before[part] for part in parts]:
            raise RuadaptError(f"{folder} cuts text by other rules than {original}; give its original")
        asked = str(original)
    loaded = read_json(folder / "tokenizer_config.json").get("eos_token")
    eos = loaded["content"] if isinstance(loaded, dict) else loaded
    ends = [number for number in eos_ids(folder) if tokenizer.id_to_token(number) != eos]
    return {
        "pre": pre,
        "original": asked,
        "added": [*special_ids(tokenizer).values()],
        "ends": ends,
        "record": json.dumps(record, ensure_ascii=False),
    }


def _arrange(folder: Path, model: Path, tokenizer: Tokenizer) -> None:
    """Make a folder that the converter reads right: links to the model, the tokenizer's files spelled out."""
    for path in folder.resolve().iterdir():
        if path.name not in TOKENIZER_FILES or path.suffix == ".jinja":
            (model / path.name).symlink_to(path)
    (model / "tokenizer.json").symlink_to(folder.resolve() / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    config.pop("auto_map", None)
    bare, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"add_bos_token": whole[0] != bare[0], "add_eos_token": whole[-1] != bare[-1]}
    if is_sentencepiece(tokenizer):
        write_pieces(model / PIECES_FILE, tokenizer)
        # The converter knows no user-defined pieces but those of this list.
        config["added_tokens_decoder"] = {
            str(number): {"content": token.content, "special": token.special}
            for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        config["add_prefix_space"] = begins_with_space(tokenizer)
    write_json(model / "tokenizer_config.json", config)


def _convert(place: str, facts_file: str, *arguments: str) -> None:
    """Run the converter's `main` with `arguments`, in a process of its own.

    It knows tokenizers by a hash of the ids of one text, which new tokens change, and some of its families
    have special tokens at fixed ids. Nothing of its code is copied or changed on the disk.

    The facts: `pre`, the name of the pre-tokenizer, or `original`, a folder whose hash tells the converter;
    `added`, the ids of added tokens, outside of which nothing is special; `ends`, ids that end an answer
    besides eos; `record`, text that is kept in the file.
    """
    facts = read_json(Path(facts_file))
    sys.path.insert(0, place)
    script: Any = import_module(SCRIPT)
    gguf: Any = import_module("gguf")  # the converter's own copy, where it has one

    def exactly(folder: Any, *_: Any, **__: Any) -> Any:
        """Read tokenizer.json as it is, whatever class the architecture suggests, and run no code of it."""
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    transformers.__dict__["AutoTokenizer"] = type("Exactly", (), {"from_pretrained": staticmethod(exactly)})
    bases: Any = sys.modules[script.ModelBase.__module__]
    name = facts["pre"]
    if facts["original"]:
        name = bases.TextModel.get_vocab_base_pre(None, exactly(facts["original"]))
    bases.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    plain, written = gguf.SpecialVocab.add_to_gguf, set[str]()

    def add_to_gguf(self: Any, writer: Any, quiet: bool = False) -> None:
        found = self.special_token_ids
        if not written:
            writer.add_string("ruadapt.record", facts["record"])
            found = found | dict(zip(("eot", "eom"), facts["ends"], strict=False))
        self.special_token_ids = {
            role: number for role, number in found.items() if role not in written and number in facts["added"]
        }
        written.update(self.special_token_ids, ["record"])
        plain(self, writer, quiet)

    gguf.SpecialVocab.add_to_gguf = add_to_gguf
    sys.argv = [SCRIPT, *arguments]
    script.main()


if __name__ == "__main__":
    _convert(*sys.argv[1:])
