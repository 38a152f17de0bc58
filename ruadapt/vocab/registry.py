"""The vocabularies of a run, each in one place: its name, label, look in charts, and how it is built.

To add one, add an entry to `VOCABULARIES` and name it under `vocabularies` in a profile. Stage 3 builds and
certifies it, the stages after it train it, and tables and charts show its label and its look.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import extend
from ruadapt.vocab.prune import optimize
from ruadapt.vocab.spec import load_tokenizer
from ruadapt.vocab.train import train_replacement


@dataclass(frozen=True)
class Look:
    """How one series is told apart: colour, and for grey print marker, line style and hatch."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[int, ...]]
    hatch: str


@dataclass(frozen=True)
class Materials:
    """What stage 3 gives to every builder: the original's folder, training texts, and sizes in rows."""

    original: Path
    russian: Sequence[str]
    english: Sequence[str]
    vocab_size: int  # of a vocabulary that replaces or shrinks the original
    added_rows: int  # to one that only grows
    keep_rows: int  # ordinary tokens that stay where the original is shrunk
    used_on: Sequence[str]  # text whose most used tokens these are


@dataclass(frozen=True)
class Vocabulary:
    """One entry: how it is shown, and what makes its tokenizer.

    `extends` says that every old id stays and `added_rows` follow, which its certificate then checks; any
    other vocabulary has `vocab_size` rows.
    """

    label: str
    look: Look
    build: Callable[[Materials], Tokenizer]
    extends: bool = False


def _replacement(m: Materials, model: Literal["bpe", "unigram"]) -> Tokenizer:
    return train_replacement([*m.russian, *m.english], m.original, model, m.vocab_size)


def _optimized(m: Materials) -> Tokenizer:
    specials = len(load_tokenizer(m.original).get_added_tokens_decoder())
    added_rows = m.vocab_size - m.keep_rows - specials
    return optimize(m.original, m.russian, m.keep_rows, added_rows, used_on=m.used_on)


ORIGINAL = "original"
VOCABULARIES = {
    ORIGINAL: Vocabulary(
        "Original", Look("#555555", "o", "-", ""), lambda m: load_tokenizer(m.original), extends=True
    ),
    "bpe": Vocabulary("BPE", Look("#e69f00", "s", "--", "///"), lambda m: _replacement(m, "bpe")),
    "unigram": Vocabulary("Unigram", Look("#56b4e9", "^", "-.", "..."), lambda m: _replacement(m, "unigram")),
    "extended": Vocabulary(
        "Extended",
        Look("#d55e00", "D", ":", "\\\\\\"),
        lambda m: extend(m.original, m.russian, m.added_rows),
        extends=True,
    ),
    "optimized": Vocabulary("Optimized", Look("#0072b2", "v", (0, (5, 1, 1, 1, 1, 1)), "xxx"), _optimized),
}
"""{name of its folder: vocabulary}, in the order of tables and charts."""


def vocabulary(name: str) -> Vocabulary:
    """Return the vocabulary of a folder's name.

    Raises:
        RuadaptError: there is none of that name.
    """
    if name not in VOCABULARIES:
        raise RuadaptError(f"unknown vocabulary {name!r}; choose from {', '.join(VOCABULARIES)}")
    return VOCABULARIES[name]
