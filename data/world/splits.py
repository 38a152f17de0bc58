"""What belongs to training, development and test: combinations and wordings, by their hashes."""

import hashlib
import re
from functools import cache

SPLITS = ("train", "dev", "test")


def hash_order(text: str) -> bytes:
    """Return a key that sorts texts in an order of its own, the same on every machine."""
    return hashlib.sha256(text.encode()).digest()


def split_of(text: str) -> str:
    """Return the split that a combination belongs to: 80 % train, 5 % dev, 15 % test."""
    bucket = int.from_bytes(hash_order(text)[:4], "big") % 20
    return "test" if bucket < 3 else "dev" if bucket == 3 else "train"


def expand_wording(pattern: str) -> list[str]:
    """Return every wording of a pattern whose `(a|b)` lists alternatives; `{slots}` are left as they are."""
    pieces = re.split(r"\(((?:\{[^}]*\}|[^(){}])*)\)", pattern)
    wordings = [""]
    for index, piece in enumerate(pieces):
        options = re.split(r"\|(?![^{]*\})", piece) if index % 2 else [piece]
        wordings = [wording + option for wording in wordings for option in options]
    return wordings


def split_wordings(wordings: list[str]) -> dict[str, list[str]]:
    """Split wordings: a sixth for test and a tenth for dev, at least one each, the rest for train."""
    ranked = sorted(wordings, key=hash_order)
    test = max(1, len(ranked) // 6)
    dev = max(1, len(ranked) // 10)
    return {"test": ranked[:test], "dev": ranked[test : test + dev], "train": ranked[test + dev :]}


@cache
def split_pattern(pattern: str) -> dict[str, list[str]]:
    """Return the wordings of a pattern by split."""
    return split_wordings(expand_wording(pattern))
