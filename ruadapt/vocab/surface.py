"""What a token stands for: its exact bytes, and the script that they are written in."""

import unicodedata
from functools import lru_cache

from tokenizers import Tokenizer

from ruadapt.vocab.spec import SPACE_MARK, byte_letters, is_byte_level, read_spec, rows, special_ids


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes that each id stands for inside a text; the list has one entry for each row.

    None for special and other added tokens and for ids without a token. Byte-level tokens may be half a UTF-8
    character; `▁` is a space and `<0x41>` the byte 0x41 in SentencePiece vocabularies (METHOD, sec. 8).
    """
    spec = read_spec(tokenizer)
    specials = special_ids(spec)
    byte_level = is_byte_level(spec)
    fallback = bool(spec["model"].get("byte_fallback"))
    values = {letter: byte for byte, letter in enumerate(byte_letters())}
    result: list[bytes | None] = [None] * rows(tokenizer)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if token in specials:
            continue
        if not byte_level:
            result[number] = _fallback_byte(token) if fallback else None
            if result[number] is None:
                result[number] = token.replace(SPACE_MARK, " ").encode()
        elif all(letter in values for letter in token):
            result[number] = bytes(values[letter] for letter in token)
        else:  # the byte-level decoder passes such a token through as it is written
            result[number] = token.encode()
    return result


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


def fallback_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Return {byte: id} of the `<0x..>` tokens of a vocabulary with byte fallback, {} for others."""
    if not read_spec(tokenizer)["model"].get("byte_fallback"):
        return {}
    found = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {byte: number for byte, number in found.items() if number is not None}


@lru_cache(maxsize=65536)
def letter_script(letter: str) -> str:
    """Return the script of a letter as Unicode names it ("Cyrillic", "Latin", "Cjk"); "" if not a letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    return unicodedata.name(letter, "other").split()[0].capitalize()


def script(surface: bytes | None) -> str:
    """Classify a token's bytes: a script, "Mixed", "Number", "Symbol", "Space", "Bytes" (halves), "Special"."""
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
