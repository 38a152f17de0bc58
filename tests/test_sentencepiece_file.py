"""`tokenizer.model`: whoever reads only that file gets the tokens of tokenizer.json, or there is no file."""

import shutil
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_vocab_families import byte_fallback_tokenizer
from tokenizers import AddedToken, Tokenizer, normalizers

from ruadapt.checkpoints.model_configs import copy_files
from ruadapt.errors import RuadaptError
from ruadapt.vocab import extend, load_tokenizer, optimize, save_tokenizer, train_replacement
from ruadapt.vocab.save import PROBES
from ruadapt.vocab.sentencepiece_file import PIECES_FILE, random_texts, write_pieces
from ruadapt.vocab.spec import build, read_spec

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
FAMILIES = ("tiny", "llama-2", "mistral-7b-v0.1")


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and tokenizer.model, the reference's own where it is one of these."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        byte_fallback_tokenizer().save(str(folder / "tokenizer.json"))
        write_pieces(folder / PIECES_FILE, load_tokenizer(folder))
    else:
        source = request.getfixturevalue("reference") / "tokenizers" / request.param
        for name in ("tokenizer.json", PIECES_FILE):
            shutil.copyfile(source / name, folder / name)
    return folder


def variants(original: Path) -> dict[str, Tokenizer]:
    rows = load_tokenizer(original).get_vocab_size()
    built = {"extended": extend(original, CORPUS, 60)}
    built["optimized"] = optimize(original, CORPUS, min(rows - 10, 20_000), 60)
    if rows < 1000:
        for model in ("bpe", "unigram"):
            built[model] = train_replacement(CORPUS, original, model, 500)
    return built


def test_what_is_saved_holds_the_same_vocabulary(original: Path, tmp_path: Path) -> None:
    for name, tokenizer in variants(original).items():
        folder = save_tokenizer(tmp_path / name, tokenizer, original)
        reader = SentencePieceProcessor(str(folder / PIECES_FILE))
        assert reader.vocab_size() == tokenizer.get_vocab_size()
        for text in [*random_texts(tokenizer, 1000, seed=7), *CORPUS, *PROBES]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert reader.encode(text) == ids, (name, text)
        # Both files follow the model from folder to folder.
        (tmp_path / f"{name}-model").mkdir()
        copy_files(tmp_path, folder, tmp_path / f"{name}-model")
        assert (tmp_path / f"{name}-model" / PIECES_FILE).read_bytes() == (folder / PIECES_FILE).read_bytes()


def test_an_original_without_the_file_gets_none(original: Path, tmp_path: Path) -> None:
    source = shutil.copytree(original, tmp_path / "without")
    (source / PIECES_FILE).unlink()
    folder = save_tokenizer(tmp_path / "saved", load_tokenizer(source), source)
    assert not (folder / PIECES_FILE).exists()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp("any")
    byte_fallback_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer = extend(folder, CORPUS, 120)
    write_pieces(folder / PIECES_FILE, tokenizer)
    return tokenizer, SentencePieceProcessor(str(folder / PIECES_FILE))


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.text("стараяя ▁<0x>41s/", max_size=20)))
def test_any_text_gives_the_same_ids(read: tuple[Tokenizer, SentencePieceProcessor], text: str) -> None:
    tokenizer, reader = read
    if not any(
        token in text for token in ("<unk>", "<s>", "</s>")
    ):  # control pieces are never read from text
        assert reader.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_added_tokens_keep_their_kind(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("[NAME]", normalized=False)])
    write_pieces(tmp_path / PIECES_FILE, tokenizer)
    reader = SentencePieceProcessor(str(tmp_path / PIECES_FILE))
    end, name = map(tokenizer.token_to_id, ("<|end|>", "[NAME]"))
    assert reader.is_control(end) and reader.id_to_piece(end) == "<|end|>"
    assert name in reader.encode("the [NAME] lives") and not reader.is_control(name)
    assert reader.is_unknown(0) and reader.is_byte(tokenizer.token_to_id("<0x41>"))


def test_what_no_scores_can_say_is_refused(tmp_path: Path) -> None:
    lower = byte_fallback_tokenizer()
    lower.normalizer = normalizers.Sequence([normalizers.Lowercase(), lower.normalizer])
    with pytest.raises(RuadaptError, match=r"no tokenizer\.model can give the ids"):
        write_pieces(tmp_path / PIECES_FILE, lower)
    nameless = read_spec(byte_fallback_tokenizer())
    nameless["model"]["unk_token"] = None
    with pytest.raises(RuadaptError, match="unknown token"):
        write_pieces(tmp_path / PIECES_FILE, build(nameless))
    assert not list(tmp_path.iterdir())
