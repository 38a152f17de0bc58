"""From one vocabulary to another: old pieces of each new token, as a sparse matrix (METHOD, sec. 3)."""

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, bare, is_byte_level, rows, special_ids, spell
from ruadapt.vocab.surface import fallback_tokens, token_bytes

# A surface, and whether the token is a `<0x..>` byte: SentencePiece holds "A" and "<0x41>" side by side.
Key = tuple[bytes, bool]


def overlap(new: Tokenizer, old: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (new ids, old ids), int64, of the ordinary tokens whose surface both have (LEP: Overlap).

    Special tokens are not among them: their rows are copied from the instruct model, never fitted.
    """
    table = _table(_keys(old))
    pairs = [
        (number, found)
        for number, key in enumerate(_keys(new))
        if key is not None and (found := _find(table, key)) is not None
    ]
    if not pairs:
        raise RuadaptError("the two vocabularies share no token; they can't belong to one model family")
    new_ids, old_ids = torch.tensor(pairs, dtype=torch.int64).T
    return new_ids.contiguous(), old_ids.contiguous()


def conversion_matrix(
    new: Tokenizer,
    old: Tokenizer,
    old_rows: int | None = None,
    *,
    decay: float = 0.0,
    space_weight: float = 1.0,
) -> torch.Tensor:
    """Return T, a sparse COO float64 tensor [V_new, V_old] whose rows sum to 1: E_new = T E_old.

    Row t is one-hot where the surface of t exists in the old vocabulary and where a special token has the
    same name; otherwise it is the mean over the old tokens that the old model cuts the surface's bytes
    into. A special token that the old vocabulary lacks is cut like text. Entries are coalesced: sorted, one
    for each pair of tokens (`.to_sparse_csr()` is the same matrix by rows).

    Args:
        new, old: the two tokenizers.
        old_rows: width of T; the height of the old embedding matrix where it has padding rows.
        decay: piece number i of a token weighs exp(-decay i) before the row is normalised; 0 is the plain
            mean, 1 the reference implementation's exponential mean.
        space_weight: factor for a piece that is only spaces, beside other pieces; the reference's is 0.1.

    Raises:
        RuadaptError: `old_rows` below the old tokenizer's ids; an id without a token; two new tokens of one
            surface; a byte that the old vocabulary can't spell; a weight that is out of range.
    """
    needed = rows(old)
    width = needed if old_rows is None else old_rows
    if width < needed:
        raise RuadaptError(
            f"the old matrix has {width} rows but its tokenizer has ids up to {needed - 1}; "
            "this tokenizer belongs to another checkpoint"
        )
    pieces = old_pieces(new, old)
    row_of, columns, values = _weights(pieces, old, decay, space_weight)
    # coalesce adds up a piece that occurs twice in one surface
    return torch.sparse_coo_tensor(
        torch.stack([row_of, columns]), values, (len(pieces), width), check_invariants=True
    ).coalesce()


def mapping_log(
    new: Tokenizer, old: Tokenizer, *, decay: float = 0.0, space_weight: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Yield for each new id, in order, what its row is made of: a row of `files.write_jsonl`.

    Columns: `id`, `token` (as the file spells it), `surface` (as text; half characters show as "�"),
    `pieces` (old tokens in order), `piece_ids`, `weights` (they sum to 1).

    Raises:
        RuadaptError: as `conversion_matrix`.
    """
    pieces = old_pieces(new, old)
    weights = iter(_weights(pieces, old, decay, space_weight)[2].tolist())
    for number, (ids, surface) in enumerate(zip(pieces, token_bytes(new), strict=True)):
        token = new.id_to_token(number)
        yield {
            "id": number,
            "token": token,
            "surface": token if surface is None else surface.decode(errors="replace"),
            "pieces": [old.id_to_token(piece) for piece in ids],
            "piece_ids": ids,
            "weights": [next(weights) for _ in ids],
        }


def old_pieces(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """Return for each new id the old ids that it stands for, in order (see `conversion_matrix`).

    Raises:
        RuadaptError: an id without a token; two new tokens of one surface; a byte that can't be spelled.
    """
    keys, table = _keys(new), _table(_keys(old))
    if twins := _twins(keys):
        first, second = (f"{new.id_to_token(number)!r} (id {number})" for number in twins)
        raise RuadaptError(
            f"the new tokens {first} and {second} stand for the same text, so one of the two rows would "
            "never be used; build the vocabulary again without one of them"
        )
    old_specials = special_ids(old)
    pieces: list[list[int]] = []
    to_cut: list[tuple[int, bytes]] = []
    for number, key in enumerate(keys):
        if key is not None:
            found = _find(table, key)
        else:
            content = new.id_to_token(number)
            if content is None:
                raise RuadaptError(
                    f"id {number} of the new tokenizer has no token; number its tokens without holes"
                )
            found = old_specials.get(content)
        pieces.append([] if found is None else [found])
        if found is None:
            to_cut.append((number, key[0] if key is not None else str(new.id_to_token(number)).encode()))
    unknown = old.token_to_id(getattr(old.model, "unk_token", None) or "")
    for (number, surface), ids in zip(to_cut, _cut(old, [surface for _, surface in to_cut]), strict=True):
        if not ids or unknown in ids:
            raise RuadaptError(
                f"the old vocabulary can't spell {surface!r} (new id {number}): it lacks byte tokens"
            )
        pieces[number] = ids
    return pieces


def _weights(
    pieces: list[list[int]], old: Tokenizer, decay: float, space_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, column and share of every piece, flat and in order."""
    if decay < 0 or not 0 < space_weight <= 1:
        raise RuadaptError(
            f"decay {decay} and space_weight {space_weight}: give a decay of 0 or more and a weight in (0, 1]"
        )
    lengths = torch.tensor([len(ids) for ids in pieces])
    row_of = torch.repeat_interleave(torch.arange(len(pieces)), lengths)
    columns = torch.tensor([piece for ids in pieces for piece in ids])
    place = torch.arange(len(columns)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    values = torch.exp(-decay * place.double())
    if space_weight != 1:
        blank = torch.tensor(
            [surface is not None and not surface.strip(b" ") for surface in token_bytes(old)]
        )
        values[blank[columns]] *= space_weight  # a row of nothing but spaces is normalised to the same shares
    sums = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, row_of, values)
    return row_of, columns, values / sums[row_of]


def _keys(tokenizer: Tokenizer) -> list[Key | None]:
    byte_ids = set(fallback_tokens(tokenizer).values())
    surfaces = token_bytes(tokenizer)
    return [
        None if surface is None else (surface, number in byte_ids) for number, surface in enumerate(surfaces)
    ]


def _table(keys: list[Key | None]) -> dict[Key, int]:
    """Return {key: id}; of two old tokens with one surface the first id counts."""
    return {key: number for number, key in reversed(list(enumerate(keys))) if key is not None}


def _twins(keys: list[Key | None]) -> tuple[int, int] | None:
    """Return the first two ids with one key, None where all differ."""
    found = [key for key in keys if key is not None]
    if len(set(found)) == len(found):
        return None
    seen: dict[Key, int] = {}
    for number, key in enumerate(keys):
        if key is not None and seen.setdefault(key, number) != number:
            return seen[key], number
    return None


def _find(table: dict[Key, int], key: Key) -> int | None:
    found = table.get(key)
    return table.get((key[0], not key[1])) if found is None else found


def _cut(tokenizer: Tokenizer, surfaces: list[bytes]) -> list[list[int]]:
    """Cut byte strings with a model's own merges (or Unigram pieces) in one native call."""
    model = bare(tokenizer)
    if is_byte_level(tokenizer):
        return [
            encoding.ids
            for encoding in model.encode_batch(list(map(spell, surfaces)), add_special_tokens=False)
        ]
    # A SentencePiece model sees characters; bytes that form none are byte tokens.
    fallback = fallback_tokens(tokenizer)
    parts = [_characters(surface) for surface in surfaces]
    strings = sorted({part for cut in parts for part in cut if isinstance(part, str)})
    encodings = model.encode_batch(strings, add_special_tokens=False)
    cuts = {string: encoding.ids for string, encoding in zip(strings, encodings, strict=True)}
    return [
        [
            number
            for part in cut
            for number in (
                cuts[part] if isinstance(part, str) else [fallback[part]] if part in fallback else []
            )
        ]
        for cut in parts
    ]


def _characters(surface: bytes) -> list[str | int]:
    """Split bytes into runs of whole characters (spaces as `▁`) and single stray bytes."""
    text = surface.decode(errors="surrogateescape").replace(" ", SPACE_MARK)
    if text.isprintable():  # no stray byte, as in nearly all tokens
        return [text]
    parts: list[str | int] = []
    for character in text:
        if "\udc80" <= character <= "\udcff":
            parts.append(ord(character) - 0xDC00)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += character
        else:
            parts.append(character)
    return parts
