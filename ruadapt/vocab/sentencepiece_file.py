"""`tokenizer.model`, SentencePiece's file: the same vocabulary for readers that know no tokenizer.json.

Such a reader knows no merges. It joins, again and again, the two neighbours whose piece has the highest
score; a piece scores the higher, the earlier a merge makes it. Why both give the same ids is told in
docs/compatibility.md; here the library reads back what was written and is compared on random text.
"""

import random
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import SPACE_MARK, read_spec, rows, special_ids
from ruadapt.vocab.surface import fallback_tokens, token_bytes

PIECES_FILE = "tokenizer.model"


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """True for vocabularies of LLaMA-2's kind, which spell unknown characters by tokens `<0x41>`."""
    return bool(read_spec(tokenizer)["model"].get("byte_fallback"))


def begins_with_space(tokenizer: Tokenizer) -> bool:
    """True where a text's first word gets a space before it."""
    return str(tokenizer.encode("a", add_special_tokens=False).tokens[0]).startswith(SPACE_MARK)


def write_pieces(path: Path, tokenizer: Tokenizer, original: Path | None = None) -> None:
    """Write a SentencePiece-like vocabulary as `tokenizer.model`, and prove that it gives the same ids.

    Special tokens become control pieces, other added tokens user-defined ones; what neither merges nor
    letters make is unused, and so are ids that have no token.

    Args:
        path: the new file.
        tokenizer: a BPE or Unigram with byte fallback.
        original: the file whose settings (normaliser, names of special pieces) hold on; else identity.

    Raises:
        RuadaptError: the library reads a text otherwise than the tokenizer; no unknown token.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    formats: Any = sentencepiece_model_pb2  # its names are made when it is imported
    ModelProto, kinds = formats.ModelProto, formats.ModelProto.SentencePiece
    model, added = read_spec(tokenizer)["model"], tokenizer.get_added_tokens_decoder()
    proto, unigram = ModelProto(), model["type"] == "Unigram"
    unknown = model["unk_id"] if unigram else tokenizer.token_to_id(model["unk_token"] or "")
    if unknown is None:
        raise RuadaptError("SentencePiece needs an unknown token, and this tokenizer names none")
    if unigram:
        scores = dict(map(tuple, model["vocab"]))
    else:
        scores = {}
        for rank, (left, right) in enumerate(model["merges"]):
            scores.setdefault(left + right, -rank)
    if original is not None:
        settings = ModelProto.FromString(original.read_bytes())
        proto.trainer_spec.CopyFrom(settings.trainer_spec)
        proto.normalizer_spec.CopyFrom(settings.normalizer_spec)
    else:
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.remove_extra_whitespaces = False
        proto.normalizer_spec.add_dummy_prefix = begins_with_space(tokenizer)
        proto.trainer_spec.unk_piece = str(tokenizer.id_to_token(unknown))
    total, byte_ids = rows(tokenizer), {*fallback_tokens(tokenizer).values()}
    proto.trainer_spec.vocab_size, proto.trainer_spec.byte_fallback = total, True
    proto.trainer_spec.model_type = (formats.TrainerSpec.BPE, formats.TrainerSpec.UNIGRAM)[unigram]
    for number in range(total):
        token = tokenizer.id_to_token(number)
        score, kind = scores.get(token, -len(scores) - 1.0), kinds.NORMAL
        if token is None:
            token, kind = f"<hole{number}>", kinds.UNUSED
        elif number == unknown:
            kind = kinds.UNKNOWN
        elif number in added:
            kind = kinds.CONTROL if added[number].special else kinds.USER_DEFINED
        elif number in byte_ids:
            kind = kinds.BYTE
        elif len(token) == 1 and tokenizer.token_to_id(f"<0x{ord(token):02X}>") is None and token < "\x80":
            token, kind = f"<0x{ord(token):02X}>", kinds.BYTE  # Gemma's tab, which transformers spells out
        elif len(token) > 1 and token not in scores:
            kind = kinds.UNUSED
        proto.pieces.add(piece=token, score=score, type=kind)
    content = proto.SerializeToString()
    try:
        reader = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise RuadaptError(f"sentencepiece can't read this vocabulary: {error}") from error
    for text in random_texts(tokenizer):
        wanted, found = tokenizer.encode(text, add_special_tokens=False).ids, reader.encode(text)
        if wanted != found:
            raise RuadaptError(
                f"no {PIECES_FILE} can give the ids of tokenizer.json: {text!r} becomes {found[:12]} in "
                f"sentencepiece, not {wanted[:12]}; serve the model with a reader of tokenizer.json"
            )
    path.write_bytes(content)


def random_texts(tokenizer: Tokenizer, count: int = 300, seed: int = 0) -> list[str]:
    """Return texts of random tokens and characters, without special tokens, the same for the same seed."""
    draw = random.Random(seed)
    specials = re.compile("|".join(map(re.escape, special_ids(tokenizer))) or "(?!)")
    surfaces = [surface.decode(errors="ignore") for surface in token_bytes(tokenizer) if surface]
    letters = "абвгдеёжзийклмнопрстуфхцчшщъыьэюяАБЯ abcxyzQ019.,!?-—«»\n\t(){}<>=+#'\"_/你م😀é\u200b"
    texts: list[str] = []
    while len(texts) < count:
        parts = [
            draw.choice(surfaces) if draw.random() < 0.6 else "".join(draw.choices(letters, k=4))
            for _ in range(draw.randrange(1, 12))
        ]
        text = draw.choice(("", " ")).join(parts)
        if text and not specials.search(text):
            texts.append(text)
    return texts
