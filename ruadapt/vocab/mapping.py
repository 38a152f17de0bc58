"""From one vocabulary to another: the old pieces of each new token, as a sparse matrix (METHOD, sec. 3)."""

import re
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, is_byte_level, rows, special_ids, spell
from ruadapt.vocab.surface import fallback_tokens, token_bytes

if TYPE_CHECKING:
    import torch  # seconds to import: here only where a tensor is made

# A surface, and whether the token is a `<0x..>` byte: SentencePiece holds "A" and "<0x41>" side by side.
Key = tuple[bytes, bool]
_STRAY_BYTE = re.compile("([\udc80-\udcff])")  # as `surrogateescape` decodes a byte that is half a character


def shared_tokens(new: Tokenizer, old: Tokenizer) -> list[tuple[int, int]]:
    """Return (new id, old id) of the ordinary tokens whose surface both vocabularies have, by new id."""
    table = _table(old)
    return [(number, table[key]) for number, key in enumerate(_keys(new)) if key in table]


def shared_specials(new: Tokenizer, old: Tokenizer) -> list[tuple[int, int]]:
    """Return (new id, old id) of the special and other added tokens that both have by one name."""
    ids, old_ids = special_ids(new), special_ids(old)
    return [(ids[token], old_ids[token]) for token in old_ids if token in ids]


def conversion_matrix(
    new: Tokenizer, old: Tokenizer, old_rows: int | None = None, new_rows: int | None = None
) -> "torch.Tensor":
    """Return T, a sparse COO float64 tensor [V_new, V_old] whose rows sum to 1: E_new = T E_old.

    Row t is one-hot where the surface of t exists in the old vocabulary and where a special token has the
    same name; otherwise it is the mean over the old tokens that the old model cuts the surface's bytes
    into. A special token that the old vocabulary lacks is cut like text. One whose old id is beyond the old
    matrix (Gemma 3's last) is the mean of all rows. Entries are coalesced: sorted, one for each pair of
    tokens (`.to_sparse_csr()` is the same matrix by rows).

    Args:
        new, old: the two tokenizers.
        old_rows: width of T; the height of the old embedding matrix where it is not the tokenizer's.
        new_rows: height of T, likewise: rows beyond the new ids are empty, ids beyond the rows are left out.

    Raises:
        RuadaptError: an ordinary old token without a row; an id without a token; a byte that the old
            vocabulary can't spell.
    """
    import torch

    width = rows(old) if old_rows is None else old_rows
    if (last := max(old.get_vocab(with_added_tokens=False).values())) >= width:
        raise RuadaptError(
            f"the old matrix has {width} rows but its tokenizer has ids up to {last}; "
            "this tokenizer belongs to another checkpoint"
        )
    pieces = [ids if max(ids) < width else list(range(width)) for ids in old_pieces(new, old)[:new_rows]]
    lengths = np.array(list(map(len, pieces)))
    row_of = np.repeat(np.arange(len(pieces)), lengths)
    places = torch.from_numpy(np.stack([row_of, np.fromiter(chain.from_iterable(pieces), np.int64)]))
    # coalesce adds up a piece that occurs twice in one surface
    values, shape = torch.from_numpy(1 / lengths[row_of]), (new_rows or len(pieces), width)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()


def old_pieces(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """Return for each new id the old ids that it stands for, in order (see `conversion_matrix`).

    An id that has no token in either vocabulary stands for itself: that row is nobody's and stays.

    Raises:
        RuadaptError: an id without a token; a byte that can't be spelled.
    """
    pieces = {number: [other] for number, other in (*shared_tokens(new, old), *shared_specials(new, old))}
    end, surfaces, to_cut = rows(old), token_bytes(new), dict[int, bytes]()
    for number in sorted(set(range(len(surfaces))) - pieces.keys()):
        if (token := new.id_to_token(number)) is not None:
            to_cut[number] = token.encode() if (surface := surfaces[number]) is None else surface
        elif number < end and old.id_to_token(number) is None:
            pieces[number] = [number]
        else:
            raise RuadaptError(f"the new tokenizer has no token of id {number}; number them without holes")
    unknown = old.token_to_id(getattr(old.model, "unk_token", None) or "")
    for (number, surface), ids in zip(to_cut.items(), _cut(old, list(to_cut.values())), strict=True):
        if not ids or unknown in ids:
            raise RuadaptError(f"the old vocabulary lacks bytes to spell {surface!r} (new id {number})")
        pieces[number] = ids
    return [pieces[number] for number in range(len(surfaces))]


def _keys(tokenizer: Tokenizer) -> list[Key | None]:
    byte_ids = set(fallback_tokens(tokenizer).values())
    surfaces = enumerate(token_bytes(tokenizer))
    return [None if surface is None else (surface, number in byte_ids) for number, surface in surfaces]


def _table(tokenizer: Tokenizer) -> dict[Key | None, int]:
    """Return {key: id}; the first id of a surface counts, a byte serves where there is no letter."""
    table: dict[Key | None, int] = {}
    keys = [(key, number) for number, key in enumerate(_keys(tokenizer)) if key is not None]
    for key, number in keys:
        table.setdefault(key, number)
    for (surface, byte), number in keys:
        table.setdefault((surface, not byte), number)
    return table


def _cut(tokenizer: Tokenizer, surfaces: list[bytes]) -> list[list[int]]:
    """Cut byte strings with a model's own merges (or Unigram pieces) in one native call."""
    # It cuts strings in its own spelling: letters of bytes, `▁` for spaces.
    model = Tokenizer(tokenizer.model)
    if is_byte_level(tokenizer):
        spelled = list(map(spell, surfaces))
        return [encoding.ids for encoding in model.encode_batch(spelled, add_special_tokens=False)]
    # A SentencePiece model sees characters, `▁` for spaces; bytes that form none are byte tokens.
    texts = (surface.decode(errors="surrogateescape").replace(" ", SPACE_MARK) for surface in surfaces)
    parts = [[part for part in _STRAY_BYTE.split(text) if part] for text in texts]
    strings = sorted({part for cut in parts for part in cut if not _STRAY_BYTE.match(part)})
    encodings = model.encode_batch(strings, add_special_tokens=False)
    ids = {string: encoding.ids for string, encoding in zip(strings, encodings, strict=True)}
    ids |= {chr(0xDC00 + byte): [number] for byte, number in fallback_tokens(tokenizer).items()}
    return [
        [number for part in cut for number in ids[part]] if ids.keys() >= set(cut) else [] for cut in parts
    ]
