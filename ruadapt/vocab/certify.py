"""A certificate of what a new vocabulary changed against the original, and what it did not."""

import random
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import reachable
from ruadapt.vocab.measure import changed_ids, changed_texts, characters_per_token, composition, row_report
from ruadapt.vocab.save import PROBES, check_folder
from ruadapt.vocab.spec import is_byte_level, load_tokenizer, read_spec, rows, special_ids
from ruadapt.vocab.surface import letter_script, token_bytes

CODE = (
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "for (int i = 0; i < n; ++i) { total += a[i] * 0x1F; } // “quotes”",
    "SELECT name, COUNT(*) FROM users WHERE id >= 42 GROUP BY name;",
    "<div class=\"row\">\n\t<a href='/x?y=1&z=%20'>link</a>\n</div>",
    '$ git log --oneline | head -n 5 && echo "done"',
)
_DIGIT = re.compile(rb"\d")
_EXAMPLES = 5
_TIMED_CHARACTERS = 300_000


def certify(
    new_folder: Path | str,
    against_folder: Path | str,
    texts: Mapping[str, Iterable[str]],
    *,
    added_rows: int | None = None,
    extended: bool | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Check a new vocabulary's guarantees against the original's and measure what it costs.

    Every vocabulary promises that texts round-trip, digits are cut as before, special tokens survive, no two
    rows stand for one text, no token is out of the merges' reach that the original could reach, and
    transformers reads the folder as `tokenizers` does. An extended one promises besides: old ids and merges
    stay, texts without a letter of the added tokens' scripts keep their ids, and the budget is exact.

    Args:
        new_folder, against_folder: folders (or files) of tokenizer.json.
        texts: {name: lines}; code, numbers and hard characters are checked in any case.
        added_rows: rows that an extended vocabulary was asked to add.
        extended: whether the promises of an extended vocabulary are checked; None: if all old ids are kept.
        repeats: how often each time is taken, new and old in turn; the least counts.

    Returns:
        A dict for JSON: `new`, `against`, `extended`, `rows` (see `row_report`), `guarantees` (`name`,
        `promised`, `holds`, `found`, `counterexamples`), `scripts` {script: tokens old and new}, `texts`
        (characters per token), `times` (load seconds, characters/s), `passed` (all that is promised holds).

    Raises:
        RuadaptError: a tokenizer is missing or broken; no text.
    """
    new, old = load_tokenizer(new_folder), load_tokenizer(against_folder)
    if not texts:
        raise RuadaptError("nothing to certify on; give at least one text")
    listed = {name: list(lines) for name, lines in texts.items()}
    numbers = _numbers()
    everything = {**listed, "code": list(CODE), "numbers": numbers, "hard characters": list(PROBES)}
    moved = [token for token, number in old.get_vocab().items() if new.token_to_id(token) != number]
    extended = not moved if extended is None else extended
    start, end = rows(old), rows(new)
    surfaces = token_bytes(new)
    guarantees: list[dict[str, Any]] = []

    def check(name: str, wrong: list[str], total: int, promised: bool = True, found: str = "") -> None:
        guarantees.append(
            {
                "name": name,
                "promised": promised,
                "holds": not wrong,
                "found": found or f"{total - len(wrong):,} of {total:,}",
                "counterexamples": wrong[:_EXAMPLES],
            }
        )

    for name, lines in everything.items():
        check(f"round trip: {name}", changed_texts(new, lines), len(lines))
    scripts = _letter_scripts(surfaces[start:])
    for name, lines in everything.items():
        other = [line for line in lines if scripts.isdisjoint(map(letter_script, set(line)))]
        if other:
            check(f"ids of other text: {name}", changed_ids(new, old, other), len(other), extended)
    check("digits cut as before", _cut_differently(new, old, numbers), len(numbers))
    specials, kept = special_ids(old), special_ids(new)
    check("special tokens", [token for token in specials if token not in kept], len(specials))
    check("old tokens at their ids", moved, len(old.get_vocab()), extended)
    before, after = (read_spec(tokenizer)["model"].get("merges", []) for tokenizer in (old, new))
    same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    broken = [" ".join(before[same])] if same < len(before) else []
    check(
        "old merges come first",
        broken,
        len(before),
        extended,
        f"{min(same, len(before)):,} of {len(before):,}",
    )
    lost = sorted(_out_of_reach(new) - _out_of_reach(old)) if after else []
    check("tokens within reach", lost, end, bool(after))
    holes = [str(number) for number in range(end) if new.id_to_token(number) is None]
    added = end - start
    budget = [] if added_rows in (None, added) else [f"{added:,} added, not {added_rows:,}"]
    check("rows added, without holes", holes + budget, end, extended, f"{added:+,} rows")
    check("one row for each text", _shared_surfaces(surfaces, start, old), end)
    try:
        check_folder(Path(new_folder) if Path(new_folder).is_dir() else Path(new_folder).parent)
        check("transformers reads it right", [], len(PROBES))
    except RuadaptError as error:
        check("transformers reads it right", [str(error)], len(PROBES), found="no")
    return {
        "new": str(new_folder),
        "against": str(against_folder),
        "extended": extended,
        "passed": all(row["holds"] for row in guarantees if row["promised"]),
        "rows": row_report(new, old),
        "guarantees": guarantees,
        "scripts": {"old": composition(old), "new": composition(new)},
        "texts": {
            name: {
                key: characters_per_token(tokenizer, lines) for key, tokenizer in (("old", old), ("new", new))
            }
            for name, lines in listed.items()
        },
        "times": _times(
            {"new": Path(new_folder), "old": Path(against_folder)},
            {"new": new, "old": old},
            listed,
            repeats,
        ),
    }


def render_certificate(report: Mapping[str, Any]) -> str:
    """Return the certificate as a table for people: one line for each guarantee, then what was measured."""
    counts = report["rows"]
    lines = [
        f"{report['new']} against {report['against']}",
        f"rows: {counts['old']:,} -> {counts['new']:,} ({counts['kept']:,} kept, {counts['added']:,} new)",
        "",
    ]
    for row in report["guarantees"]:
        verdict = ("ok" if row["holds"] else "FAILS") if row["promised"] else "(not promised)"
        lines.append(f"{verdict:<15} {row['name']:<40} {row['found']}")
        if row["promised"]:
            lines += [f"{'':<15}   {example!r}" for example in row["counterexamples"]]
    lines += ["", f"{'characters per token':<40} {'old':>12} {'new':>12} {'ratio':>7}"]
    pairs = {name: (values["old"], values["new"]) for name, values in report["texts"].items()}
    lines += [f"{name:<40} {old:>12.3f} {new:>12.3f} {new / old:>7.2f}" for name, (old, new) in pairs.items()]
    lines.append("encoding, characters per second")
    for name, values in report["times"]["characters_per_second"].items():
        lines.append(f"{name:<40} {values['old']:>12,.0f} {values['new']:>12,.0f} {values['ratio']:>7.2f}")
    load = report["times"]["load_seconds"]
    lines.append(
        f"{'load, seconds (ratio for each row, byte)':<40} {load['old']:>12.3f} {load['new']:>12.3f} "
        f"{load['ratio_per_row']:>7.2f} {load['ratio_per_byte']:>7.2f}"
    )
    lines.append("tokens by script")
    old, new = report["scripts"]["old"], report["scripts"]["new"]
    largest = sorted({*old, *new}, key=lambda name: -new.get(name, 0))[:12]
    lines += [f"{name:<40} {old.get(name, 0):>12,} {new.get(name, 0):>12,}" for name in largest]
    lines += ["", "every promised guarantee holds" if report["passed"] else "a promised guarantee FAILS"]
    return "\n".join(lines)


def _numbers() -> list[str]:
    """Return numbers as people write them, the same in every run."""
    draw = random.Random(0)
    long = [str(draw.randrange(10 ** draw.randrange(4, 16))) for _ in range(600)]
    written = [f"{a[:3]} {a[3:6]},{b[:2]}" for a, b in zip(long[::2], long[1::2], strict=True)]
    return [
        *map(str, range(1000)),
        *long,
        *written,
        "3.14159e-10",
        "2024-11-25 22:09:59",
        "№ 12/7-A",
        "+7 (495) 123-45-67",
    ]


def _cut_differently(new: Tokenizer, old: Tokenizer, texts: list[str]) -> list[str]:
    """Return the texts whose tokens with a digit in them differ; what stands between digits may change."""
    cuts = []
    for tokenizer in (new, old):
        surfaces = token_bytes(tokenizer)
        with_digit = [surface is not None and bool(_DIGIT.search(surface)) for surface in surfaces]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        cuts.append(
            [[surfaces[number] for number in encoding.ids if with_digit[number]] for encoding in encodings]
        )
    return [text for text, left, right in zip(texts, *cuts, strict=True) if left != right]


def _letter_scripts(surfaces: list[bytes | None]) -> set[str]:
    letters = set("".join((surface or b"").decode(errors="ignore") for surface in surfaces))
    return set(map(letter_script, letters)) - {""}


def _out_of_reach(tokenizer: Tokenizer) -> set[str]:
    """Return ordinary tokens that the merges do not make, or that the rules before them always cut."""
    specials = special_ids(tokenizer)
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token not in specials}
    lost = {token for token, found in reachable(tokenizer, vocabulary).items() if not found}
    if is_byte_level(tokenizer):  # other families put a space before a text's first word
        surfaces = token_bytes(tokenizer)
        whole = [(token, number) for token, number in vocabulary.items() if _is_text(surfaces[number])]
        encodings = tokenizer.encode_batch_fast(
            [(surfaces[number] or b"").decode() for _, number in whole], add_special_tokens=False
        )
        lost |= {
            token for (token, number), found in zip(whole, encodings, strict=True) if found.ids != [number]
        }
    return lost


def _is_text(surface: bytes | None) -> bool:
    return surface is not None and "\ufffd" not in surface.decode(errors="replace")


def _shared_surfaces(surfaces: list[bytes | None], start: int, old: Tokenizer) -> list[str]:
    """Return surfaces of rows from `start` on that an earlier row has too (not `<0x41>` beside "A")."""
    seen = set(surfaces[:start])
    found = []
    for surface in surfaces[start:]:
        if surface is not None and surface in seen and len(surface) > 1:
            found.append(surface.decode(errors="replace"))
        seen.add(surface)
    return found


def _times(
    paths: Mapping[str, Path],
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[str, list[str]],
    repeats: int,
) -> dict[str, Any]:
    """Return the least seconds that each file takes to load, and the characters encoded in one second.

    Seconds are processor time of all threads, so that what else runs matters less, and the two take turns.
    A model remembers the words that it has cut: it is made to forget them each time.
    """
    timed = {name: _beginning(lines) for name, lines in texts.items()}
    spent: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in paths}
    for _ in range(repeats):
        for key, tokenizer in tokenizers.items():
            started = time.process_time()
            load_tokenizer(paths[key])
            spent[key][""].append(time.process_time() - started)
            for name, lines in timed.items():
                tokenizer.model._clear_cache()
                started = time.process_time()
                tokenizer.encode_batch_fast(lines, add_special_tokens=False)
                spent[key][name].append(time.process_time() - started)
    best = {key: {name: min(times) for name, times in found.items()} for key, found in spent.items()}
    files = {key: path / "tokenizer.json" if path.is_dir() else path for key, path in paths.items()}
    sizes = {
        "row": {key: rows(tokenizer) for key, tokenizer in tokenizers.items()},
        "byte": {key: file.stat().st_size for key, file in files.items()},
    }
    ratio = best["new"][""] / best["old"][""]
    speeds = {
        name: {key: sum(map(len, lines)) / best[key][name] for key in paths} for name, lines in timed.items()
    }
    return {
        "load_seconds": {key: found[""] for key, found in best.items()}
        | {f"ratio_per_{kind}": ratio * size["old"] / size["new"] for kind, size in sizes.items()},
        "characters_per_second": {
            name: speed | {"ratio": speed["new"] / speed["old"]} for name, speed in speeds.items()
        },
    }


def _beginning(lines: list[str]) -> list[str]:
    """Return the first lines, _TIMED_CHARACTERS of them or a little more."""
    ends = accumulate(map(len, lines), initial=0)
    return [line for line, end in zip(lines, ends, strict=False) if end < _TIMED_CHARACTERS]
