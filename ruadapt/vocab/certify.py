"""A certificate: what a new vocabulary promises against its original, checked one by one."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import cuts, reachable
from ruadapt.vocab.save import PROBES, check_folder, load_as_transformers, roles
from ruadapt.vocab.spec import load_tokenizer, read_spec, rows, special_ids
from ruadapt.vocab.surface import letter_script, token_bytes

_DIGIT = re.compile(rb"\d")
_EXAMPLES = 5

Certificate = dict[str, dict[str, Any]]


def certify(
    new_folder: Path | str,
    against_folder: Path | str,
    texts: Mapping[str, Iterable[str]],
    added_rows: int | None = None,
) -> Certificate:
    """Check what a new vocabulary promises against the original; what the original fails alike is no fault.

    Every vocabulary promises that texts round-trip, digits are cut as before, special tokens survive, no two
    rows stand for one text, no token is out of the merges' reach that the original could reach, and
    transformers reads the folder as `tokenizers` does. An extended one promises besides: old ids and merges
    stay, texts without a letter of the added tokens' scripts keep their ids, and rows have no holes.

    Args:
        new_folder, against_folder: folders of tokenizer.json.
        texts: {name: lines}; numbers, code and hard characters are checked in any case.
        added_rows: rows that an extended vocabulary was asked to add, exactly. Without it a vocabulary counts
            as extended where all old ids are kept.

    Returns:
        {name of a check: `found` (as text), `counterexamples` (a few)}; see `broken`.

    Raises:
        RuadaptError: a tokenizer is missing or broken.
    """
    new, old = load_tokenizer(new_folder), load_tokenizer(against_folder)
    numbers = _numbers()
    everything = {f": {name}": list(lines) for name, lines in texts.items()}
    everything |= {" (numbers)": numbers, " (code and hard characters)": list(PROBES)}
    moved = [token for token, number in old.get_vocab().items() if new.token_to_id(token) != number]
    extended = added_rows is not None or not moved
    start, end = rows(old), rows(new)
    surfaces = token_bytes(new)
    certificate: Certificate = {}

    def check(name: str, wrong: list[str], total: int, found: str = "") -> None:
        found = found or f"{total - len(wrong):,} of {total:,}"
        certificate[name] = {"found": found, "counterexamples": wrong[:_EXAMPLES]}

    letters = "".join((surface or b"").decode(errors="ignore") for surface in surfaces[start:])
    scripts = set(map(letter_script, letters)) - {""}
    for name, lines in everything.items():
        check(f"round trip{name}", changed_texts(new, lines, old), len(lines))
        other = [line for line in lines if scripts.isdisjoint(map(letter_script, set(line)))]
        if extended and other:
            check(f"ids of other text{name}", changed_ids(new, old, other), len(other))
    check("digits cut as before", _cut_differently(new, old, numbers), len(numbers))
    specials, kept = special_ids(old), special_ids(new)
    check("special tokens", [token for token in specials if token not in kept], len(specials))
    if extended:
        check("old tokens at their ids", moved, len(old.get_vocab()))
        before, after = (read_spec(tokenizer)["model"].get("merges", []) for tokenizer in (old, new))
        other = [" ".join(a) for a, b in zip_longest(before, after[: len(before)]) if a != b]
        check("old merges come first", other, len(before))
        holes = [number for number in range(end) if new.id_to_token(number) is None]
        wrong = [f"id {number}" for number in holes if number >= start or old.id_to_token(number) is not None]
        if added_rows not in (None, end - start):
            wrong.append(f"{end - start:,} added, not {added_rows:,}")
        check("rows added, without holes", wrong, end, f"{end - start:+,} rows")
    if read_spec(new)["model"]["type"] == "BPE":
        check("tokens within reach", sorted(_out_of_reach(new) - _out_of_reach(old)), end)
    twins = _twins(surfaces) - _twins(token_bytes(old))
    check("one row for each text", [surface.decode(errors="replace") for surface in sorted(twins)], end)
    misread = _misread(new_folder)
    if misread and _misread(against_folder):
        misread = []
    check("transformers reads it right", misread, len(PROBES), "no" if misread else "")
    given, named = (roles(load_as_transformers(path)) for path in (against_folder, new_folder))
    lost = [
        f"{role}: {named.get(role)}, not {token}" for role, token in given.items() if named.get(role) != token
    ]
    check("special tokens in their roles", lost, len(given))
    return certificate


def broken(certificate: Certificate) -> list[str]:
    """Return the names of the checks that do not hold."""
    return [name for name, row in certificate.items() if row["counterexamples"]]


def changed_ids(new: Tokenizer, old: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts whose ids differ between two tokenizers."""
    pairs = zip(texts, cuts(new, texts), cuts(old, texts), strict=True)
    return [text for text, left, right in pairs if left != right]


def changed_texts(tokenizer: Tokenizer, texts: Sequence[str], original: Tokenizer | None = None) -> list[str]:
    """Return the texts that do not decode to themselves after the tokenizer's own normaliser.

    With `original`, those that it decodes to the same other text are left out.
    """
    # Prepending a space is undone by the decoder; composing characters (NFC) is not.
    normal = str if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
    lost = [
        (before, after)
        for before, after in zip(texts, _decoded(tokenizer, texts), strict=True)
        if after != before and normal(after) != normal(before)
    ]
    if original is not None:
        given = _decoded(original, [before for before, _ in lost])
        lost = [pair for pair, other in zip(lost, given, strict=True) if pair[1] != other]
    return [before for before, _ in lost]


def _decoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    return tokenizer.decode_batch(list(cuts(tokenizer, texts)), skip_special_tokens=False)


def _misread(folder: Path | str) -> list[str]:
    try:
        check_folder(folder)
    except RuadaptError as error:
        return [str(error)]
    return []


def _numbers() -> list[str]:
    """Return numbers as people write them, the same in every run."""
    draw = random.Random(0)
    long = [str(draw.randrange(10 ** draw.randrange(4, 16))) for _ in range(600)]
    written = [f"{a[:3]} {a[3:6]},{b[:2]}" for a, b in zip(long[::2], long[1::2], strict=True)]
    others = ["3.14159e-10", "2024-11-25 22:09:59", "№ 12/7-A", "+7 (495) 123-45-67"]
    return [*map(str, range(1000)), *long, *written, *others]


def _cut_differently(new: Tokenizer, old: Tokenizer, texts: list[str]) -> list[str]:
    """Return the texts whose tokens with a digit in them differ; what stands between digits may change."""
    found = []
    for tokenizer in (new, old):
        surfaces = [surface or b"" for surface in token_bytes(tokenizer)]
        digits = [surface if _DIGIT.search(surface) else b"" for surface in surfaces]
        found.append([[digits[number] for number in ids if digits[number]] for ids in cuts(tokenizer, texts)])
    return [text for text, left, right in zip(texts, *found, strict=True) if left != right]


def _out_of_reach(tokenizer: Tokenizer) -> set[str]:
    """Return ordinary tokens that the merges do not make."""
    ordinary = tokenizer.get_vocab().keys() - special_ids(tokenizer)
    return {token for token, found in reachable(tokenizer, ordinary).items() if not found}


def _twins(surfaces: Iterable[bytes | None]) -> set[bytes]:
    """Return the surfaces that several rows have (not `<0x41>` beside "A")."""
    counts = Counter(surface for surface in surfaces if surface is not None and len(surface) > 1)
    return {surface for surface, count in counts.items() if count > 1}
