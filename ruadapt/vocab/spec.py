"""Tokenizers as data: loaded with clear errors, read as a dict, rebuilt with special tokens at their ids.

Nothing here knows a model's name: what kind of tokenizer a file holds is read from its own properties.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ruadapt.errors import RuadaptError

Spec = dict[str, Any]
SPACE_MARK = "▁"
SEPARATOR = "\ue000"  # between words on their way into a trainer; no word may hold it


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load `tokenizer.json` of a folder (or the file itself) with the `tokenizers` library.

    Raises:
        RuadaptError: the file is missing (a slow tokenizer), is broken, or is neither BPE nor Unigram.
    """
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise RuadaptError(
            f"{path} does not exist; convert a slow tokenizer to a fast one (tokenizer.json) first"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise RuadaptError(f"{path} is not a readable tokenizer.json: {error}; fetch it again") from error
    return _checked(tokenizer, str(folder))


def fetch_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a folder, or else from the hub by its name, OWNER/NAME[@REVISION].

    Raises:
        RuadaptError: neither is there (offline, gated, misspelt), or as `load_tokenizer`.
    """
    if Path(name).expanduser().exists():
        return load_tokenizer(Path(name).expanduser())
    try:
        # Straight from tokenizer.json: transformers may rebuild it by the model's type and change its ids.
        repository, _, revision = name.partition("@")
        tokenizer = Tokenizer.from_pretrained(repository, revision=revision or "main")
    except Exception as error:  # the library raises bare Exception for every kind of trouble
        raise RuadaptError(
            f"{name} is no folder and could not be had from the hub ({' '.join(str(error).split())}); set "
            "HF_HUB_OFFLINE=0 to go online, log in for gated models, or give a folder with its tokenizer.json"
        ) from error
    return _checked(tokenizer, name)


def _checked(tokenizer: Tokenizer, where: str) -> Tokenizer:
    # A truncation or padding setting saved in the file would silently cut what is measured and trained on.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kind = type(tokenizer.model).__name__
    if kind not in ("BPE", "Unigram"):
        raise RuadaptError(f"{where} holds a {kind} model; BPE and Unigram are supported")
    return tokenizer


def read_spec(tokenizer: Tokenizer) -> Spec:
    """Return the content of tokenizer.json as a dict (merges always as [left, right] pairs)."""
    spec: Spec = json.loads(tokenizer.to_str())
    return spec


def build(spec: Spec) -> Tokenizer:
    """Return the tokenizer that a spec describes."""
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """Return the model alone (shared, not copied): no normaliser, pre-tokenizer or added tokens.

    It cuts strings in the model's own spelling: byte-level letters, or text with `▁` for spaces.
    """
    return Tokenizer(tokenizer.model)


def steps(tokenizer: Tokenizer, part: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's `normalizer`, `pre_tokenizer` or `decoder`, sequences flattened."""
    component = getattr(tokenizer, part)
    if component is None:
        return []
    found: list[dict[str, Any]] = []
    pending = [json.loads(component.__getstate__())]
    while pending:
        step = pending.pop(0)
        inner = [step[key] for key in ("pretokenizers", "normalizers", "decoders") if key in step]
        pending[:0] = inner[0] if inner else []
        found.extend([] if inner else [step])
    return found


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """True when the decoder or pre-tokenizer spells bytes as letters (GPT-2's alphabet)."""
    parts = (*steps(tokenizer, "decoder"), *steps(tokenizer, "pre_tokenizer"))
    return any(step["type"] == "ByteLevel" for step in parts)


@cache
def byte_letters() -> tuple[str, ...]:
    """Return the letter of each byte 0…255 in the byte-level alphabet.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@cache
def _letter_values() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}


def spell(surface: bytes) -> str:
    """Return bytes in byte-level letters."""
    return "".join(map(byte_letters().__getitem__, surface))


def unspell(token: str) -> bytes:
    """Return the bytes of a byte-level token; one in other letters is read as the decoder does."""
    try:
        return bytes(map(_letter_values().__getitem__, token))
    except KeyError:
        return token.encode()


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return content and id of every added token (special, chat and control tokens), by id."""
    return {token.content: number for number, token in sorted(tokenizer.get_added_tokens_decoder().items())}


def rows(tokenizer: Tokenizer) -> int:
    """Return the number of embedding rows that the tokenizer needs: its highest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def by_id(vocabulary: Mapping[str, int]) -> list[str]:
    """Return the tokens of a vocabulary in the order of their ids."""
    return sorted(vocabulary, key=vocabulary.__getitem__)


def place(ordinary: Sequence[str], specials: Mapping[str, int]) -> dict[str, int]:
    """Number tokens 0…n-1: special tokens keep ids that fit; the last rows take the other ones."""
    total = len(ordinary) + len(specials)
    order: list[str | None] = [None] * total
    homeless = []
    for content, number in specials.items():
        if number < total:
            order[number] = content
        else:
            homeless.append(content)
    free = [number for number, token in enumerate(order) if token is None]
    for number, token in zip(free, [*ordinary, *homeless], strict=True):
        order[number] = token
    return {token: number for number, token in enumerate(order) if token is not None}


def with_model(spec: Spec, model: dict[str, Any], ids: Mapping[str, int]) -> Spec:
    """Return `spec` with another model; added tokens and the post-processor's template follow `ids`."""
    result = copy.deepcopy({key: value for key, value in spec.items() if key != "model"})
    for token in result["added_tokens"]:
        token["id"] = ids[token["content"]]
    result["added_tokens"].sort(key=lambda token: token["id"])
    _renumber(result["post_processor"], ids)
    return {**result, "model": model}


def _renumber(part: Any, ids: Mapping[str, int]) -> None:
    if isinstance(part, dict):
        if "ids" in part and "tokens" in part:
            part["ids"] = [ids[token] for token in part["tokens"]]
        for value in part.values():
            _renumber(value, ids)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, ids)


def learn_bpe(
    words: Mapping[str, int], rows: int, alphabet: Iterable[str] = (), min_frequency: int = 2
) -> Spec:
    """Learn a BPE model of up to `rows` tokens, those of its alphabet included, from the counts of words."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=rows, initial_alphabet=list(alphabet), min_frequency=min_frequency, show_progress=False
    )
    learner.train_from_iterator(_repeated(words), trainer)
    return read_spec(learner)["model"]


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    # Each word as often as it was counted, in long strings: few calls into the native trainer.
    for word, count in words.items():
        for start in range(0, count, 4096):
            yield SEPARATOR.join([word] * min(4096, count - start))


def as_list(texts: Iterable[str]) -> list[str]:
    """Return the texts as a list.

    Raises:
        RuadaptError: there is no text.
    """
    result = list(texts)
    if not any(text.strip() for text in result):
        raise RuadaptError("the corpus holds no text; give at least one non-empty line")
    return result
