"""Tokenizers as data: loaded with clear errors, read as a dict, rebuilt with special tokens at their ids.

Nothing here knows a model's name: what kind of tokenizer a file holds is read from its own properties.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.hub import TOKENIZER_FILES, fetch_model

Spec = dict[str, Any]
SPACE_MARK = "▁"
SEPARATOR = "\ue000"  # between words on their way into a trainer; no word may hold it
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# The letter of each byte 0…255 in GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others
# take the code points from 256 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = iter(range(0x100, 0x200))
BYTE_LETTERS = tuple(chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256))
_VALUES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load `tokenizer.json` of a folder (or the file itself) with the tokens that transformers adds to it.

    Raises:
        RuadaptError: the file is missing (a slow tokenizer), is broken, is neither BPE nor Unigram, or is at
            odds with the files beside it.
    """
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise RuadaptError(f"{path} does not exist; convert a slow tokenizer to a fast one, which has it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise RuadaptError(f"{path} is not a readable tokenizer.json: {error}; fetch it again") from error
    kind = type(tokenizer.model).__name__
    if kind not in ("BPE", "Unigram"):
        raise RuadaptError(f"{folder} holds a {kind} model; BPE and Unigram are supported")
    # Settings of a training, saved in the file: they would silently cut what is measured and trained on, and
    # leave merges out at random.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if kind == "BPE":
        tokenizer.model.dropout = None
    if path.name == "tokenizer.json":
        _add_named_tokens(tokenizer, path.parent)
    return tokenizer


def _add_named_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json or added_tokens.json names, as transformers does."""
    config, listed = (read_json(folder / name, {}) for name in ("tokenizer_config.json", "added_tokens.json"))
    named = [config.get(key) for key in NAMED]
    roles = [token["content"] if isinstance(token, dict) else token for token in named if token]
    if "added_tokens_decoder" in config:
        tokens = {int(number): AddedToken(**each) for number, each in config["added_tokens_decoder"].items()}
    else:
        tokens = {number: AddedToken(each, special=each in roles) for each, number in listed.items()}
    known = special_ids(tokenizer)
    for number, token in sorted(tokens.items()):
        if token.content not in known:
            tokenizer.add_tokens([token])
            if (found := tokenizer.token_to_id(token.content)) != number:
                raise RuadaptError(
                    f"{folder}: {token.content!r} has id {number}, but by tokenizer.json it gets {found}; "
                    "save the folder anew by transformers' AutoTokenizer and save_pretrained"
                )
    tokenizer.add_special_tokens([role for role in roles if role not in special_ids(tokenizer)])


def fetch_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a folder or a file, or else from the hub by its name, OWNER/NAME[@REVISION].

    Raises:
        RuadaptError: neither is there (offline, gated, misspelt), or as `load_tokenizer`.
    """
    return load_tokenizer(name if Path(name).is_file() else fetch_model(name, files=TOKENIZER_FILES))


def read_spec(tokenizer: Tokenizer) -> Spec:
    """Return the content of tokenizer.json as a dict (merges always as [left, right] pairs)."""
    spec: Spec = json.loads(tokenizer.to_str())
    return spec


def build(spec: Spec) -> Tokenizer:
    """Return the tokenizer that a spec describes."""
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


def steps(tokenizer: Tokenizer, part: str) -> set[str]:
    """Return the types of the steps of a tokenizer's `pre_tokenizer` or `decoder`."""
    component = getattr(tokenizer, part)
    state = "" if component is None else component.__getstate__().decode()
    return set(re.findall(r'"type":"(\w+)"', state)) - {"Sequence"}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """True when the decoder or pre-tokenizer spells bytes as letters (GPT-2's alphabet)."""
    return "ByteLevel" in steps(tokenizer, "decoder") | steps(tokenizer, "pre_tokenizer")


def spell(surface: bytes) -> str:
    """Return bytes in byte-level letters."""
    return "".join(map(BYTE_LETTERS.__getitem__, surface))


def unspell(token: str) -> bytes:
    """Return the bytes of a byte-level token; one in other letters is read as the decoder does."""
    try:
        return bytes(map(_VALUES.__getitem__, token))
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
    fixed = {number: content for content, number in specials.items() if number < total}
    rest = iter([*ordinary, *(content for content, number in specials.items() if number >= total)])
    return {fixed[number] if number in fixed else next(rest): number for number in range(total)}


def with_model(spec: Spec, model: dict[str, Any], ids: Mapping[str, int]) -> Spec:
    """Return `spec` with another model; added tokens and the post-processor's template follow `ids`."""

    def renumbered(part: Any) -> Any:
        if isinstance(part, list):
            return list(map(renumbered, part))
        if not isinstance(part, dict):
            return part
        if "ids" in part and "tokens" in part:
            part = {**part, "ids": [ids[token] for token in part["tokens"]]}
        return {key: renumbered(value) for key, value in part.items()}

    added = [{**token, "id": ids[token["content"]]} for token in spec["added_tokens"]]
    added.sort(key=lambda token: token["id"])
    processor = renumbered(spec["post_processor"])
    return {**spec, "model": model, "added_tokens": added, "post_processor": processor}


def learn_bpe(words: Mapping[str, int], rows: int, alphabet: Iterable[str] = ()) -> Spec:
    """Learn a BPE model of up to `rows` tokens, those of its alphabet included, from the counts of words."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=rows, initial_alphabet=list(alphabet), min_frequency=2, show_progress=False
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
