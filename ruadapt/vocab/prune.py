"""Shrinking a BPE vocabulary before it is extended (METHOD, sec. 2: Optimized)."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.extend import Merge, append_rows, cuts, require_merges
from ruadapt.vocab.spec import (
    BYTE_LETTERS,
    as_list,
    build,
    by_id,
    is_byte_level,
    load_tokenizer,
    place,
    read_spec,
    special_ids,
    with_model,
)
from ruadapt.vocab.surface import BYTE_TOKENS, fallback_tokens, letter_script, token_bytes
from ruadapt.vocab.words import learnable_words


def optimize(
    original_folder: Path | str,
    texts: Iterable[str],
    keep_rows: int | None,
    added_rows: int,
    *,
    used_on: Iterable[str] | None = None,
    drop_scripts: Collection[str] = (),
    donor: Path | str | None = None,
) -> Tokenizer:
    """Prune the old vocabulary to exactly `keep_rows` ordinary tokens, number anew, then extend.

    Kept are all single bytes, all special tokens (on top of `keep_rows`; at their own ids where those still
    exist), tokens of digits (numbers cut in another way break arithmetic: arXiv 2506.06607) and of white
    space (prose has no indents, and code cut into single spaces is lost), and the first tokens by id, or
    those used most on `used_on`, each with every token that its own merges pass through.
    Rows of the result: keep_rows + special tokens + added_rows. What is learned from the texts may bring
    back tokens that were pruned: they count as added, and get their old embeddings again.

    Args:
        keep_rows: ordinary tokens to keep; None for all that `drop_scripts` leaves.
        used_on: text whose most used tokens stay, instead of the first ones.
        drop_scripts: tokens with a letter of these scripts go ("Cjk", "Hangul", "Arabic", …, as
            `surface.letter_script` names them), but for those that a kept token is made of.
        original_folder, texts, added_rows, donor: as in `extend`.

    Raises:
        RuadaptError: as `extend`; `keep_rows` outside what bytes need and the vocabulary has.
    """
    original = load_tokenizer(original_folder)
    usage = Counter(chain.from_iterable(cuts(original, as_list(used_on)) if used_on is not None else ()))
    pruned = _prune(original, keep_rows, usage, drop_scripts)
    spec = read_spec(append_rows(pruned, learnable_words(pruned, texts, donor), added_rows))
    specials = special_ids(original)
    ids = place([token for token in by_id(spec["model"]["vocab"]) if token not in specials], specials)
    return build(with_model(spec, {**spec["model"], "vocab": ids}, ids))


def _prune(
    tokenizer: Tokenizer, keep_rows: int | None, usage: Mapping[int, int], drop_scripts: Collection[str]
) -> Tokenizer:
    spec, specials = read_spec(tokenizer), special_ids(tokenizer)
    require_merges(spec)
    model = spec["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if token not in specials}
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    kept = _base_tokens(tokenizer, vocabulary)
    limit = len(vocabulary) if keep_rows is None else keep_rows
    if not len(kept) <= limit <= len(vocabulary):
        raise RuadaptError(
            f"keep_rows {keep_rows}: this vocabulary needs {len(kept)} rows for its bytes and has "
            f"{len(vocabulary)} ordinary tokens"
        )
    dropped, surfaces = set(drop_scripts), token_bytes(tokenizer)
    candidates: list[tuple[bool, int, int, str]] = []
    for token, number in vocabulary.items():
        surface = surfaces[number] or b""
        first = surface.isspace() or surface.strip(b" ").isdigit()
        # Half characters count as no letters.
        if not dropped or dropped.isdisjoint(map(letter_script, surface.decode(errors="ignore"))):
            candidates.append((not first, -usage.get(number, 0), number, token))
    if dropped and len(candidates) == len(vocabulary):
        raise RuadaptError(f"no token has a letter of {', '.join(dropped)}; check how these are spelled")
    for *_, token in sorted(candidates):
        if len(kept) == limit:
            break
        if token not in kept:
            path = map("".join, _fired(token, ranks))
            needed = ({token, *token, *path} & vocabulary.keys()) - kept
            if len(kept) + len(needed) <= limit:
                kept |= needed
    if keep_rows is not None and len(kept) < keep_rows:
        raise RuadaptError(f"keep_rows {keep_rows} can't be met exactly; {len(kept)} rows are possible")
    # Dropping merges off a token's own path leaves the lowest-ranked pair of each step where it was: every
    # kept token stays reachable.
    merges = [pair for pair in model["merges"] if kept >= {*pair, "".join(pair)}]
    ids = place([token for token in by_id(vocabulary) if token in kept], specials)
    return build(with_model(spec, {**model, "vocab": ids, "merges": merges}, ids))


def _fired(symbols: Sequence[str], ranks: Mapping[Merge, int]) -> list[Merge]:
    """Return the merges that a model makes of a word's symbols, in order."""
    symbols, made = list(symbols), []
    while found := [pair for pair in pairwise(symbols) if pair in ranks]:
        best = min(found, key=ranks.__getitem__)
        place = list(pairwise(symbols)).index(best)
        symbols[place : place + 2] = ["".join(best)]
        made.append(best)
    return made


def _base_tokens(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> set[str]:
    """Return the tokens that spell every text: bytes, or all characters where there is no byte fallback."""
    if is_byte_level(tokenizer):
        return set(BYTE_LETTERS) & set(vocabulary)
    if not (fallback := fallback_tokens(tokenizer)):
        return {token for token in vocabulary if len(token) == 1}
    # Gemma spells the tab as a character and lacks its byte token.
    return {chr(byte) for byte in range(128) if byte not in fallback} & set(vocabulary) | {
        BYTE_TOKENS[byte] for byte in fallback
    }
