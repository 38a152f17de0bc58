"""Surfaces and the mapping between vocabularies, exact about bytes."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from tokenizers import Tokenizer, decoders, models, normalizers

from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    conversion_matrix,
    extend,
    load_tokenizer,
    old_pieces,
    pieces,
    rows,
    script,
    shared_tokens,
    token_bytes,
    train_replacement,
)
from ruadapt.vocab.spec import build, read_spec, spell, unspell

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2


def sentencepiece() -> Tokenizer:
    """A hand-made SentencePiece-like BPE: byte fallback, `▁` for spaces, "A" beside <0x41>."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "A", "д", "а", "да", "▁да"]
    merges = [("д", "а"), ("▁", "да")]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def test_all_bytes_survive_spelling() -> None:
    everything = bytes(range(256))
    assert unspell(spell(everything)) == everything
    assert unspell("a b") == b"a b"  # a space is no byte letter: the decoder passes such tokens through


def test_surfaces_of_sentencepiece_tokens() -> None:
    tokenizer = sentencepiece()
    surfaces = token_bytes(tokenizer)
    assert surfaces[0] is None
    assert surfaces[tokenizer.token_to_id("<0x41>")] == surfaces[tokenizer.token_to_id("A")] == b"A"
    assert surfaces[tokenizer.token_to_id("▁да")] == " да".encode()
    assert surfaces[tokenizer.token_to_id("<0xD0>")] == b"\xd0"


def test_pieces_show_half_characters_and_special_tokens(tiny_pair: TinyPair) -> None:
    tokenizer = load_tokenizer(tiny_pair.base)
    assert pieces(tokenizer, "<|user|>a🙂") == ["<|user|>", "a", *"\ufffd" * 4]
    assert "".join(pieces(tokenizer, "The river")) == "The river"


@pytest.mark.parametrize(
    ("surface", "name"),
    [
        (" привет".encode(), "Cyrillic"),
        (b" hello", "Latin"),
        ("你好".encode(), "Cjk"),
        ("xю".encode(), "Mixed"),
        (b" 42", "Number"),
        ("—".encode(), "Symbol"),
        (b"\n ", "Space"),
        ("п".encode()[:1], "Bytes"),
        (None, "Special"),
    ],
)
def test_script(surface: bytes | None, name: str) -> None:
    assert script(surface) == name


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_matrix_of_a_replaced_vocabulary(tiny_pair: TinyPair, model: str) -> None:
    old = load_tokenizer(tiny_pair.base)
    new = train_replacement(CORPUS, tiny_pair.base, model, 640)  # type: ignore[arg-type]
    matrix = conversion_matrix(new, old)
    assert matrix.dtype == torch.float64 and matrix.shape == (640, rows(old))
    dense = matrix.to_dense()
    torch.testing.assert_close(dense.sum(1), torch.ones(640, dtype=torch.float64), rtol=0, atol=1e-12)
    old_vocab, new_vocab = old.get_vocab(), new.get_vocab()
    for token, number in new_vocab.items():
        if token in old_vocab:
            assert dense[number].argmax() == old_vocab[token] and dense[number].max() == 1, token
        else:
            assert dense[number].max() < 1 or len(set(unspell(token))) == 1, token
    new_ids, old_ids = torch.tensor(shared_tokens(new, old)).T
    shared = {token for token in new_vocab if token in old_vocab and not token.startswith("<|")}
    assert {new.id_to_token(number) for number in new_ids.tolist()} == shared
    assert (dense[new_ids, old_ids] == 1).all()


def test_row_is_the_mean_of_the_old_pieces(tiny_pair: TinyPair) -> None:
    old = load_tokenizer(tiny_pair.base)
    new = extend(tiny_pair.base, CORPUS, 100)
    dense = conversion_matrix(new, old).to_dense()
    assert torch.equal(dense[: rows(old)], torch.eye(rows(old), dtype=torch.float64))
    checked = 0
    for number in range(rows(old), rows(new)):
        try:
            text = unspell(new.id_to_token(number)).decode()
        except UnicodeDecodeError:
            continue
        expected = torch.zeros(rows(old), dtype=torch.float64)
        pieces = old.encode(text).ids
        for piece in pieces:  # a piece that occurs twice counts twice
            expected[piece] += 1 / len(pieces)
        torch.testing.assert_close(dense[number], expected, rtol=0, atol=1e-12)
        checked += 1
    assert checked > 50


def test_half_characters_are_cut_into_bytes() -> None:
    new = Tokenizer(models.BPE(vocab={spell(b" \xd0"): 0, spell("дAд".encode()[1:]): 1}, merges=[]))
    new.decoder = decoders.ByteLevel()
    old = sentencepiece()
    dense = conversion_matrix(new, old).to_dense()
    parts = {old.id_to_token(i): round(dense[0, i].item(), 3) for i in dense[0].nonzero().flatten().tolist()}
    assert parts == {"▁": 0.5, "<0xD0>": 0.5}
    parts = {old.id_to_token(i): round(dense[1, i].item(), 3) for i in dense[1].nonzero().flatten().tolist()}
    assert parts == {"<0xB4>": 0.333, "A": 0.333, "д": 0.333}


def test_byte_tokens_and_letters_of_one_surface_stay_apart() -> None:
    tokenizer = sentencepiece()
    assert torch.equal(
        conversion_matrix(tokenizer, tokenizer).to_dense(), torch.eye(rows(tokenizer), dtype=torch.float64)
    )


def test_padding_rows_widen_the_matrix_and_too_few_rows_are_refused(tiny_pair: TinyPair) -> None:
    tokenizer = load_tokenizer(tiny_pair.base)
    wide = conversion_matrix(tokenizer, tokenizer, old_rows=rows(tokenizer) + 40)
    assert wide.shape == (rows(tokenizer), rows(tokenizer) + 40)
    assert wide.to_dense()[:, rows(tokenizer) :].abs().sum() == 0
    with pytest.raises(RuadaptError, match="belongs to another checkpoint"):
        conversion_matrix(tokenizer, tokenizer, old_rows=rows(tokenizer) - 1)


def test_special_token_that_the_old_vocabulary_lacks_is_cut_like_text(tiny_pair: TinyPair) -> None:
    old, new = load_tokenizer(tiny_pair.base), load_tokenizer(tiny_pair.base)
    new.add_special_tokens(["<|tool|>"])
    dense = conversion_matrix(new, old).to_dense()
    assert dense[-1].sum() == pytest.approx(1) and (dense[-1] > 0).sum() > 2
    user = new.token_to_id("<|user|>")
    assert dense[user, old.token_to_id("<|user|>")] == 1


def test_a_hole_that_the_original_had_stays(tiny_pair: TinyPair) -> None:
    spec = read_spec(load_tokenizer(tiny_pair.base))
    spec["model"]["vocab"][spell("щщ".encode())] = 605
    old, new = build(spec), build(spec)
    assert old_pieces(new, old)[600:] == [[number] for number in range(600, 606)]
    with pytest.raises(RuadaptError, match="no token of id 600"):
        old_pieces(new, load_tokenizer(tiny_pair.base))


def test_a_byte_that_the_old_vocabulary_cannot_spell_is_an_error(tiny_pair: TinyPair) -> None:
    poor = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    poor.decoder = decoders.ByteLevel()
    with pytest.raises(RuadaptError, match="lacks bytes to spell"):
        conversion_matrix(load_tokenizer(tiny_pair.base), poor)


def test_a_piece_that_occurs_twice_counts_twice() -> None:
    old = sentencepiece()
    surfaces = [" Aдa".encode(), b"\xd0", b"   "]
    new = Tokenizer(models.BPE(vocab={spell(text): n for n, text in enumerate(surfaces)}, merges=[]))
    new.decoder = decoders.ByteLevel()
    found = old_pieces(new, old)
    named = [[old.id_to_token(piece) for piece in ids] for ids in found]
    assert named == [["▁", "A", "д", "<0x61>"], ["<0xD0>"], ["▁"] * 3]
    dense = conversion_matrix(new, old).to_dense()
    assert dense[0, found[0]].tolist() == [0.25] * 4 and dense[1].max() == 1
    assert dense[2, old.token_to_id("▁")] == pytest.approx(1)


def test_an_added_token_beyond_the_old_rows_is_the_mean_of_all(tiny_pair: TinyPair) -> None:
    """As Gemma 3's `<image_soft_token>`; an ordinary token there belongs to another model."""
    old = load_tokenizer(tiny_pair.base)
    height = rows(old)
    old.add_special_tokens(["<image>"])
    found = conversion_matrix(old, old, height)
    assert found.shape == (height + 1, height)
    torch.testing.assert_close(found.to_dense()[:height], torch.eye(height, dtype=torch.float64))
    assert found.to_dense()[height].unique().tolist() == [1 / height]
    with pytest.raises(RuadaptError, match="belongs to another checkpoint"):
        conversion_matrix(old, old, height - 1)


def test_pieces_spell_exactly_the_bytes_of_the_token_across_families(reference: Path) -> None:
    """Byte-level to SentencePiece and back, half characters, `<0x..>` and spaces included."""
    names = ("llama-2", "darulm_20_05_24_part1-2_32000_unigram_hf")
    loaded = [load_tokenizer(reference / "tokenizers" / name) for name in names]
    byte_level = load_tokenizer(reference / "tokenizers" / "llama-2")
    spec = read_spec(byte_level)
    spelled = sorted({spell(surface) for surface in token_bytes(byte_level) if surface is not None})
    byte_level = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(spelled)}, merges=[]))
    byte_level.decoder = decoders.ByteLevel()
    assert spec["model"]["byte_fallback"]
    for new, old in permutations([*loaded, byte_level], 2):
        surfaces, parts = token_bytes(new), token_bytes(old)
        for number, ids in enumerate(old_pieces(new, old)):
            if surfaces[number] is not None:
                assert b"".join(parts[part] or b"" for part in ids) == surfaces[number]
