"""A corpus from real data sets: domains mixed by weight, filtered, freed of duplicates, split by document.

Everything is read as a stream; a few kilobytes of each document that is kept stay in memory (datasketch's
index). Hub names go through `datasets`; METHOD section 4 names the mix of the papers.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ruadapt.data_sets import read_column
from ruadapt.errors import RuadaptError
from ruadapt.files import write_json

# Letters that text of a language is made of, and those that tell its neighbours from it.
LETTERS = {"ru": ("а-яё", "\u0450\u0452-\u04ff"), "en": ("a-z", "\u00df-\u024f")}
MINIMUM = 50  # characters of a document
OWN_LETTERS = 0.7  # the least share of a document's letters that are of its language
FOREIGN_LETTERS = 0.02  # the greatest share that tells a neighbour of the language
# Documents count as duplicates from this Jaccard similarity of their runs of five words.
LIKENESS = 0.8
SHINGLE = 5
PERMUTATIONS = 128
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One data set of a mix: `source` is a hub name, a file or a folder of jsonl, parquet or txt.

    `weight`: its share of the training text's characters, beside the other sources of its language. `config`
    and `split`: of a data set on the hub. `column`: where its text is. `domain`: what the statistics call it.
    """

    source: str
    language: str
    weight: float = 1.0
    domain: str = ""
    config: str = ""
    split: str = ""
    column: str = "text"

    @classmethod
    def of(cls, given: Row) -> "Source":
        """Check one entry of a `corpus_mix`.

        Raises:
            RuadaptError: an entry is unknown or missing, or has no positive weight or known language.
        """
        known = {field.name for field in fields(cls)}
        if given.keys() - known or not {"source", "language"} <= given.keys():
            raise RuadaptError(
                f"corpus_mix: {given} must name source and language, and beside them only {sorted(known)}"
            )
        source = cls(**given)
        if source.language not in LETTERS or not source.weight > 0:
            raise RuadaptError(
                f"corpus_mix, {source.source}: language must be one of {', '.join(LETTERS)} and the weight "
                f"positive, not {source.language} and {source.weight}"
            )
        return source

    @property
    def name(self) -> str:
        return self.domain or self.source


def read_mix(corpus_mix: Sequence[Row]) -> list[Source]:
    """Check the entries of a `corpus_mix`.

    Raises:
        RuadaptError: an entry is wrong, two of a language share a domain, or a language has none.
    """
    sources = [Source.of(entry) for entry in corpus_mix]
    if missing := LETTERS.keys() - {source.language for source in sources}:
        raise RuadaptError(f"corpus_mix has no source with language {min(missing)}; both are needed")
    names = [(source.language, source.name) for source in sources]
    if len(set(names)) < len(names):
        raise RuadaptError(f"corpus_mix: every source of a language needs a domain of its own, not {names}")
    return sources


def read_source(source: Source, root: Path, seed: int) -> Iterator[str]:
    """Yield the texts of a source in an order of its own; a path is taken from `root`.

    Raises:
        RuadaptError: as `data_sets.read_column`.
    """
    path = root / Path(source.source).expanduser()
    where = path if path.exists() else source.source
    return read_column(where, source.column, source.split, config=source.config, shuffled=seed)


def mix(
    streams: dict[Source, Iterator[str]], counts: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) so that the domains' shares of the characters that are kept follow the weights.

    Always the domain that is furthest behind gives the next document. The probabilities of
    `datasets.interleave_datasets` are of documents, and the lengths of a novel and a post differ a
    hundredfold. A domain that ends leaves its share to the others.

    Args:
        counts: `characters` kept so far of each domain; whoever takes the texts counts them in between.
    """
    streams = dict(streams)
    while streams:
        behind = min(streams, key=lambda source: counts[source.name]["characters"] / source.weight)
        text = next(streams[behind], None)
        if text is None:
            del streams[behind]
        else:
            yield behind.name, text


class Seen:
    """Remembers documents: their hashes, and by datasketch's MinHash those that are alike."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self.empty = MinHash(num_perm=PERMUTATIONS)
        self.exact: set[int] = set()
        self.alike = MinHashLSH(threshold=LIKENESS, num_perm=PERMUTATIONS)

    def kind(self, text: str) -> str | None:
        """Say what a text duplicates, `duplicate` or `near duplicate`; remember one that is new."""
        words = text.lower().split()
        key = hashed(" ".join(words))
        if key in self.exact:
            return "duplicate"
        minhash = self.empty.copy()
        runs = range(max(1, len(words) - SHINGLE + 1))
        minhash.update_batch({" ".join(words[place : place + SHINGLE]).encode() for place in runs})
        if self.alike.query(minhash):
            return "near duplicate"
        self.alike.insert(key, minhash)
        self.exact.add(key)
        return None


def hashed(text: str) -> int:
    """Return 64 bits that are the text's own."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _refusal(text: str, language: str) -> str | None:
    """Say why a text is left out by length or language, or None."""
    if len(text) < MINIMUM:
        return "too short"
    own, foreign = LETTERS[language]
    lowered = text.lower()
    letters = len(re.sub(r"[\W\d_]+", "", lowered))
    ours = letters - len(re.sub(rf"[\W\d_{own}]+", "", lowered))
    others = len(re.findall(rf"[{foreign}]", lowered))
    if ours < OWN_LETTERS * letters or not letters or others > FOREIGN_LETTERS * letters:
        return "other language"
    return None


def write_mixed_corpus(
    sources: Sequence[Source],
    target: Path,
    *,
    root: Path,
    characters: Mapping[str, int],
    heldout_documents: int,
    seed: int,
    heldout_share: float = 0.01,
) -> list[Row]:
    """Write `{language}_train.jsonl`, `{language}_heldout.jsonl` and `domains.json` into the folder `target`.

    Args:
        root: what relative paths of sources are relative to.
        characters: of each language's training part; 0 takes all there is.
        heldout_documents, heldout_share: documents whose own hash falls into this share are held out, the
            first so many of them, and never trained on: a document's side does not depend on the rest.

    Returns:
        The rows of `domains.json`, for each domain `{"language", "domain", "weight", "read", "kept",
        "heldout", "characters"}`, the numbers of documents left out by reason, its `share` of its language's
        characters and what part of the documents read was `left out`, in percent.

    Raises:
        RuadaptError: as `read_source`; or nothing is left to train on or to hold out.
    """
    rows = []
    for language, wanted in characters.items():
        own = [source for source in sources if source.language == language]
        streams = {source: read_source(source, root, seed) for source in own}
        counts = _write_language(streams, target, language, wanted, heldout_documents, heldout_share)
        total = sum(count["characters"] for count in counts.values())
        for source in own:
            count = counts[source.name]
            left = count["read"] - count["kept"] - count["heldout"]
            percents = {
                "share": 100 * count["characters"] / total,
                "left out": 100 * left / max(1, count["read"]),
            }
            label = {"language": language, "domain": source.name, "weight": source.weight}
            rows.append(label | count | percents)
    write_json(target / "domains.json", rows)
    return rows


def _write_language(
    streams: dict[Source, Iterator[str]],
    target: Path,
    language: str,
    characters: int,
    heldout_documents: int,
    heldout_share: float,
) -> dict[str, Counter[str]]:
    """Write the two files of a language; count each domain's documents by what became of them."""
    counts = {source.name: Counter(read=0, kept=0, heldout=0, characters=0) for source in streams}
    written = held = 0
    seen = Seen()
    paths = [target / f"{language}_{part}.jsonl" for part in ("train", "heldout")]
    bar = tqdm(desc=f"text, {language}", total=characters or None, unit=" characters", unit_scale=True)
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as heldout, bar:
        for domain, text in mix(streams, counts):
            if characters and written >= characters:
                break
            count = counts[domain]
            count["read"] += 1
            line = json.dumps({"text": text, "domain": domain}, ensure_ascii=False) + "\n"
            if reason := _refusal(text, language) or seen.kind(text):
                count[reason] += 1
            elif (hashed(text) + 2**63) / 2**64 < heldout_share:
                # Those beyond the number wanted are dropped: the order must not decide what is trained on.
                kept = held < heldout_documents
                count["heldout" if kept else "not needed to hold out"] += 1
                held += kept
                heldout.write(line if kept else "")
            else:
                train.write(line)
                count.update(kept=1, characters=len(text))
                written += len(text)
                bar.update(len(text))
    if not written or not held:
        raise RuadaptError(
            f"corpus_mix, {language}: {written} characters to train on and {held} documents to hold out are "
            f"left ({dict(sum(counts.values(), Counter()))}); give more text"
        )
    return counts
