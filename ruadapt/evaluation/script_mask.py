"""The scripts of letters, and the tokens that a model must not write to stay out of some of them."""

import codecs
import unicodedata
from collections.abc import Collection
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.vocab.surface import letter_script, token_bytes


@lru_cache(maxsize=65536)
def character_scripts(character: str) -> frozenset[str]:
    """Return the scripts of a character's letters as `vocab` names them ("Cyrillic", "Cjk", "Arabic", …).

    Compatibility forms count as what they stand for (NFKC): a full-width A is Latin, ㈱ holds a Han letter.
    Digits, punctuation (。 too) and signs have none.
    """
    return frozenset(map(letter_script, unicodedata.normalize("NFKC", character))) - {"", "Modifier"}


def forbidden_tokens(tokenizer: PreTrainedTokenizerBase, scripts: Collection[str]) -> list[int]:
    """Return the tokens that write letters of some scripts, for `generate(suppress_tokens=…)`.

    A byte-level token may be half a character: those whose half begins letters of these scripts alone are
    among them (0xE5 begins Han alone). Beginnings that other letters share (0xE3: kana, too) are not, so
    letters behind them, such as Han's rare extensions, can still be spelled byte by byte.

    Args:
        tokenizer: a fast tokenizer, byte-level or with byte fallback.
        scripts: names as `character_scripts` gives them.

    Raises:
        RuadaptError: no script, or none of its letters can be written by the vocabulary.
    """
    wanted = frozenset(scripts)
    own: set[bytes] = set()
    others: set[bytes] = set()
    # The surrogates are no characters, and no letter lies beyond plane 3.
    for character in map(chr, (*range(0x80, 0xD800), *range(0xE000, 0x40000))):
        if found := character_scripts(character):
            data = character.encode()
            (own if found & wanted else others).update(data[:length] for length in range(1, len(data)))
    alone, chosen = own - others, []
    for number, surface in enumerate(token_bytes(tokenizer.backend_tokenizer)):
        text, used = codecs.utf_8_decode(surface or b"", "replace", False)
        opened = (surface or b"")[used:]
        if opened in alone or any(character_scripts(c) & wanted for c in text):
            chosen.append(number)
    if not chosen:
        raise RuadaptError(
            f"no token writes a letter of {', '.join(scripts) or 'no script'}; "
            'scripts are spelled as Unicode does, such as "Cjk", "Hangul", "Arabic"'
        )
    return chosen
