"""What a token stands for: its exact bytes, and the script that they are written in."""

import unicodedata
from functools import lru_cache

from tokenizers import Tokenizer

from ruadapt.vocab.spec import SPACE_MARK, is_byte_level, rows, special_ids, steps, unspell

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes that each id stands for inside a text; the list has one entry for each row.

    None for special and other added tokens and for ids without a token. Byte-level tokens may be half a UTF-8
    character; `▁` is a space and `<0x41>` the byte 0x41 in SentencePiece vocabularies (METHOD, sec. 8).
    """
    specials = special_ids(tokenizer)
    byte_level = is_byte_level(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    result: list[bytes | None] = [None] * rows(tokenizer)
    for token, number in vocabulary.items():
        if token not in specials:
            result[number] = unspell(token) if byte_level else token.replace(SPACE_MARK, " ").encode()
    for byte, number in fallback_tokens(tokenizer).items():
        result[number] = bytes([byte])
    return result


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return a text as its tokens show it, in order; half a character shows as "�"."""
    surfaces = token_bytes(tokenizer)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [
        token if (surface := surfaces[number]) is None else surface.decode(errors="replace")
        for number, token in zip(encoding.ids, encoding.tokens, strict=True)
    ]


def fallback_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Return {byte: id} of the `<0x..>` tokens of a vocabulary with byte fallback, {} for others."""
    if "ByteFallback" not in steps(tokenizer, "decoder"):
        return {}
    found = {byte: tokenizer.token_to_id(token) for byte, token in enumerate(BYTE_TOKENS)}
    return {byte: number for byte, number in found.items() if number is not None}


@lru_cache(maxsize=65536)
def letter_script(letter: str) -> str:
    """Return the script of a letter as Unicode names it ("Cyrillic", "Latin", "Cjk"); "" if not a letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    return unicodedata.name(letter, "other").split()[0].capitalize()


def script(surface: bytes | None) -> str:
    """Classify a token: its script, "Mixed", "Number", "Symbol", "Space", "Special", "Bytes" (half ones)."""
    if surface is None:
        return "Special"
    try:
        text = surface.decode()
    except UnicodeDecodeError:
        return "Bytes"
    scripts = {letter_script(letter) for letter in text} - {""}
    if scripts:
        return scripts.pop() if len(scripts) == 1 else "Mixed"
    if any(unicodedata.category(letter).startswith("N") for letter in text):
        return "Number"
    return "Symbol" if text.strip() else "Space"
