"""A donor vocabulary read as data: what its tokens stand for, and how often they can be expected."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import sentencepiece_model_pb2_new

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, load_tokenizer, read_spec
from ruadapt.vocab.surface import fallback_tokens, token_bytes

sentencepiece: Any = sentencepiece_model_pb2_new  # its classes are made when it is imported


def read_donor(path: Path | str) -> dict[str, float]:
    """Return {surface: expected share of running tokens} of a BPE or Unigram vocabulary, best first.

    Args:
        path: tokenizer.json, a folder with one, or a SentencePiece `.model` (or a folder with only that).

    A Unigram score is the logarithm of a share. A BPE vocabulary has no scores: token number r gets 1 / r
    (Zipf), for merges are learned in the order of their counts. Half characters, special and byte tokens are
    left out. The donor's normaliser is not asked: what counts are the surfaces of its tokens.

    Raises:
        RuadaptError: no such file, a broken one, or a model other than BPE and Unigram.
    """
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        path = next(iter(sorted(path.glob("*.model"))), path)
    found = _sentencepiece(path) if path.suffix == ".model" else _tokenizer_json(path)
    shares: dict[str, float] = {}
    for surface, share in found:
        shares[surface] = shares.get(surface, 0.0) + share
    return shares


def _tokenizer_json(path: Path) -> Iterator[tuple[str, float]]:
    tokenizer = load_tokenizer(path)
    model = read_spec(tokenizer)["model"]
    unigram = model["type"] == "Unigram"
    byte_tokens = set(fallback_tokens(tokenizer).values())
    for number, surface in enumerate(token_bytes(tokenizer)):
        try:
            text = surface.decode() if surface else ""
        except UnicodeDecodeError:
            continue
        if text and number not in byte_tokens:
            yield text, math.exp(model["vocab"][number][1]) if unigram else 1.0 / (number + 1)


def _sentencepiece(path: Path) -> Iterator[tuple[str, float]]:
    model = sentencepiece.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError as error:
        raise RuadaptError(f"{path} does not exist") from error
    except Exception as error:  # protobuf's own DecodeError
        raise RuadaptError(
            f"{path} is not a readable SentencePiece model ({error}); fetch it again"
        ) from error
    kinds = sentencepiece.TrainerSpec
    if model.trainer_spec.model_type not in (kinds.UNIGRAM, kinds.BPE):
        raise RuadaptError(f"{path} holds a word or character model; BPE and Unigram are supported")
    unigram = model.trainer_spec.model_type == kinds.UNIGRAM
    for number, piece in enumerate(model.pieces):
        if piece.type == sentencepiece.ModelProto.SentencePiece.NORMAL:
            share = math.exp(piece.score) if unigram else 1.0 / (number + 1)
            yield piece.piece.replace(SPACE_MARK, " "), share
