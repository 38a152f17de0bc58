"""From one vocabulary to another: old pieces of each new token, as a sparse matrix (METHOD, sec. 3)."""

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
    table = _table(old)
    pairs = [
        (number, found)
        for number, key in enumerate(_keys(new))
        if key is not None and (found := _find(table, key)) is not None
    ]
    if not pairs:
        raise RuadaptError("the two vocabularies share no token; they can't belong to one model family")
    new_ids, old_ids = torch.tensor(pairs, dtype=torch.int64).T
    return new_ids.contiguous(), old_ids.contiguous()


def conversion_matrix(new: Tokenizer, old: Tokenizer, old_rows: int | None = None) -> torch.Tensor:
    """Return T, a sparse COO float64 tensor [V_new, V_old] whose rows sum to 1: E_new = T E_old.

    Row t is one-hot where the surface of t exists in the old vocabulary and where a special token has the
    same name; otherwise it is the mean over the old tokens that the old model cuts the surface's bytes
    into. A special token that the old vocabulary lacks is cut like text.

    Args:
        new, old: the two tokenizers.
        old_rows: width of T; the height of the old embedding matrix where it has padding rows.

    Raises:
        RuadaptError: `old_rows` below the old tokenizer's ids; an id without a token; a byte that the old
            vocabulary can't spell.
    """
    width = rows(old) if old_rows is None else old_rows
    if width < rows(old):
        raise RuadaptError(
            f"the old matrix has {width} rows but its tokenizer has ids up to {rows(old) - 1}; "
            "this tokenizer belongs to another checkpoint"
        )
    old_specials = special_ids(old)
    table = _table(old)
    pieces: list[list[int]] = []
    to_cut: list[tuple[int, bytes]] = []
    for number, key in enumerate(_keys(new)):
        found = None
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
    for (number, surface), ids in zip(to_cut, _cut(old, [surface for _, surface in to_cut]), strict=True):
        if not ids:
            raise RuadaptError(
                f"the old vocabulary can't spell {surface!r} (new id {number}): it lacks byte tokens"
            )
        pieces[number] = ids
    lengths = torch.tensor([len(ids) for ids in pieces])
    row_of = torch.repeat_interleave(torch.arange(len(pieces)), lengths)
    columns = torch.tensor([piece for ids in pieces for piece in ids])
    values = torch.repeat_interleave(1.0 / lengths.double(), lengths)
    # coalesce adds up a piece that occurs twice in one surface
    matrix = torch.sparse_coo_tensor(
        torch.stack([row_of, columns]), values, (len(pieces), width), check_invariants=True
    )
    return matrix.coalesce()


def _keys(tokenizer: Tokenizer) -> list[Key | None]:
    byte_ids = set(fallback_tokens(tokenizer).values())
    surfaces = token_bytes(tokenizer)
    return [
        None if surface is None else (surface, number in byte_ids) for number, surface in enumerate(surfaces)
    ]


def _table(tokenizer: Tokenizer) -> dict[Key, int]:
    """Return {key: id}; of two tokens with one surface the first id counts."""
    table: dict[Key, int] = {}
    for number, key in enumerate(_keys(tokenizer)):
        if key is not None:
            table.setdefault(key, number)
    return table


def _find(table: dict[Key, int], key: Key) -> int | None:
    return table.get(key, table.get((key[0], not key[1])))


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
    parts: list[str | int] = []
    for character in text:
        if "\udc80" <= character <= "\udcff":
            parts.append(ord(character) - 0xDC00)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += character
        else:
            parts.append(character)
    return parts
