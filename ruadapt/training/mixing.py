"""A corpus from real data sets: domains mixed by weight, freed of duplicates, split by document.

Everything is read as a stream; a few kilobytes of each document that is kept stay in memory (datasketch's
index). METHOD section 4 names the mix of the papers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ruadapt.data_sets import Row, read_column
from ruadapt.errors import RuadaptError
from ruadapt.files import source_named, write_json

LANGUAGES = ("ru", "en")
# Documents count as duplicates from this Jaccard similarity of their runs of five words.
LIKENESS = 0.8
SHINGLE = 5
PERMUTATIONS = 128


@dataclass(frozen=True)
class Source:
    """One data set of a mix: `source` is a hub name, a file or a folder of jsonl, parquet or txt.

    `weight`: its share of the training text's characters, beside the other sources of its language. `config`
    and `split`: of a data set on the hub. `column`: where its text is. `domain`: what the statistics call it.
    `shortest`: fewer characters are no document.
    """

    source: str
    language: str
    weight: float = 1.0
    domain: str = ""
    config: str = ""
    split: str = ""
    column: str = "text"
    shortest: int = 50

    def texts(self, seed: int) -> Iterator[str]:
        """Yield its texts in an order of its own; errors as `data_sets.read_column`."""
        place = source_named(self.source)
        return read_column(place, self.column, self.split, config=self.config, shuffled=seed)


def read_mix(corpus_mix: Sequence[Row]) -> list[Source]:
    """Check the entries of a `corpus_mix`: the fields of `Source`, whose name is a domain's where none is.

    Raises:
        RuadaptError: a field is unknown or missing, a weight is not positive, or a language has no source.
    """
    try:
        sources = [
            Source(**entry | {"domain": entry.get("domain") or entry["source"]}) for entry in corpus_mix
        ]
    except (KeyError, TypeError) as error:
        known = ", ".join(Source.__dataclass_fields__)
        raise RuadaptError(
            f"corpus_mix: {error}; an entry has source and language, and of {known}"
        ) from error
    if {source.language for source in sources} != {*LANGUAGES}:
        raise RuadaptError(f"corpus_mix: {' and '.join(LANGUAGES)} need sources, and no other language")
    if wrong := [source.domain for source in sources if not source.weight > 0]:
        raise RuadaptError(f"corpus_mix: the weights of {', '.join(wrong)} must be positive")
    return sources


def near_duplicates() -> Callable[[str], bool]:
    """Return a function that says whether a text like this one was given to it before, by MinHash."""
    from datasketch import MinHash, MinHashLSH

    empty, known = MinHash(num_perm=PERMUTATIONS), MinHashLSH(threshold=LIKENESS, num_perm=PERMUTATIONS)

    def seen(text: str) -> bool:
        words, minhash = text.lower().split(), empty.copy()
        runs = range(max(1, len(words) - SHINGLE + 1))
        minhash.update_batch({" ".join(words[place : place + SHINGLE]).encode() for place in runs})
        found = bool(known.query(minhash))
        if not found:
            known.insert(len(known.keys), minhash)
        return found

    return seen


def _fate(text: str, shortest: int, heldout_share: float, seen: Callable[[str], bool]) -> str:
    """Say whether a text is kept or held out, or why it is left out."""
    if len(text) < shortest or not text.strip():
        return "too short"
    if seen(text):
        return "duplicate"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = (int.from_bytes(digest, "big", signed=True) + 2**63) / 2**64
    return "heldout" if place < heldout_share else "kept"


def write_mixed_corpus(
    sources: Sequence[Source],
    target: Path,
    *,
    characters: Mapping[str, int],
    heldout_documents: int,
    seed: int,
    heldout_share: float = 0.01,
) -> list[Row]:
    """Write `{language}_train.jsonl`, `{language}_heldout.jsonl` and `domains.json` into the folder `target`.

    Always the domain that is furthest behind its share of the characters kept gives the next document. The
    probabilities of `datasets.interleave_datasets` are of documents, and the lengths of a novel and a post
    differ a hundredfold. A domain that ends leaves its share to the others.

    Args:
        characters: of each language's training part; 0 takes all there is.
        heldout_documents: the first so many documents whose own hash falls into `heldout_share` are held
            out. Of that share none is trained on: a document's side does not depend on the rest.

    Returns:
        The rows of `domains.json`, for each domain `{"language", "domain", "weight", "read", "kept",
        "heldout", "characters"}`, and the numbers of documents left out by reason.

    Raises:
        RuadaptError: as `Source.texts`; or nothing is left to train on or to hold out.
    """
    rows: list[Row] = []
    for language, wanted in characters.items():
        streams = {source: source.texts(seed) for source in sources if source.language == language}
        counts = {source: Counter(read=0, kept=0, heldout=0, characters=0) for source in streams}
        total, seen = Counter[str](), near_duplicates()
        paths = [target / f"{language}_{part}.jsonl" for part in ("train", "heldout")]
        train, heldout = (path.open("w", encoding="utf-8") for path in paths)
        files = {"kept": train, "heldout": heldout}
        bar = tqdm(desc=f"text, {language}", total=wanted or None, unit=" characters", unit_scale=True)
        with train, heldout, bar:
            while streams and not (wanted and total["characters"] >= wanted):
                source = min(streams, key=lambda source: counts[source]["characters"] / source.weight)
                text = next(streams[source], None)
                if text is None:
                    del streams[source]
                    continue
                fate = _fate(text, source.shortest, heldout_share, seen)
                if fate == "heldout" and total[fate] >= heldout_documents:
                    fate = "not needed to hold out"
                if fate in files:
                    row = {"text": text, "domain": source.domain}
                    files[fate].write(json.dumps(row, ensure_ascii=False) + "\n")
                found = {fate: 1, "read": 1, "characters": len(text) if fate == "kept" else 0}
                bar.update(found["characters"])
                total.update(found)
                counts[source].update(found)
        if not total["kept"] or not total["heldout"]:
            raise RuadaptError(
                f"corpus_mix, {language}: too little is left to train on and to hold out ({dict(total)}); "
                "give more text"
            )
        for source, found in counts.items():
            rows.append({"language": language, "domain": source.domain, "weight": source.weight} | found)
    write_json(target / "domains.json", rows)
    return rows
