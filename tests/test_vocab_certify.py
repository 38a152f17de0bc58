"""The certificate: it passes what keeps its promises and finds each promise broken on purpose."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    broken,
    certify,
    changed_texts,
    extend,
    load_tokenizer,
    rows,
    save_tokenizer,
    train_replacement,
)
from ruadapt.vocab.certify import Certificate
from ruadapt.vocab.spec import build, read_spec, spell

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
TEXTS = {"russian": RUSSIAN.splitlines(), "english": ENGLISH.splitlines()}


@pytest.fixture(scope="module")
def extended(tiny_pair: TinyPair) -> Tokenizer:
    return extend(tiny_pair.base, CORPUS, 100)


def failed(certificate: Certificate) -> set[str]:
    return {re.split(r":| \(", name)[0] for name in broken(certificate)}


def test_an_extension_keeps_every_promise(tiny_pair: TinyPair, tmp_path: Path, extended: Tokenizer) -> None:
    folder = save_tokenizer(tmp_path / "new", extended, tiny_pair.base)
    certificate = certify(folder, tiny_pair.base, TEXTS, added_rows=100)
    assert not failed(certificate)
    assert certificate["round trip: russian"]["found"] == "10 of 10"
    assert json.loads(json.dumps(certificate, ensure_ascii=False)) == certificate
    assert certify(folder, tiny_pair.base, TEXTS).keys() == certificate.keys()
    assert failed(certify(folder, tiny_pair.base, TEXTS, added_rows=99)) == {"rows added, without holes"}


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_replacement_promises_less(tiny_pair: TinyPair, tmp_path: Path, model: Any) -> None:
    new = train_replacement(CORPUS, tiny_pair.base, model, 640)
    certificate = certify(save_tokenizer(tmp_path / "new", new, tiny_pair.base), tiny_pair.base, TEXTS)
    assert not broken(certificate) and "old tokens at their ids" not in certificate
    as_extension = certify(tmp_path / "new", tiny_pair.base, TEXTS, added_rows=40)
    assert {"old tokens at their ids", "ids of other text"} <= failed(as_extension)
    assert len(as_extension["old tokens at their ids"]["counterexamples"]) == 5  # not all of them


def swap_merges(spec: dict[str, Any]) -> None:
    spec["model"]["merges"][:2] = spec["model"]["merges"][1::-1]


def unreachable_token(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"][spell("щщщ".encode())] = len(spec["model"]["vocab"])


def hole(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"][spell("щщщ".encode())] = len(spec["model"]["vocab"]) + 1


def twin(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"][" the"] = len(spec["model"]["vocab"])  # "Ġthe" is there


def join_digits(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"].pop(0)
    spec["model"]["vocab"]["12"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].append(["1", "2"])


def lower_case(spec: dict[str, Any]) -> None:
    spec["normalizer"] = {"type": "Lowercase"}
    spec["decoder"] = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (swap_merges, "old merges come first"),
        (unreachable_token, "tokens within reach"),
        (hole, "rows added, without holes"),
        (twin, "one row for each text"),
        (join_digits, "digits cut as before"),
        (lower_case, "round trip"),
    ],
)
def test_each_broken_promise_is_found(
    tiny_pair: TinyPair, tmp_path: Path, extended: Tokenizer, damage: Callable[..., None], name: str
) -> None:
    spec = copy.deepcopy(read_spec(extended))
    damage(spec)
    build(spec).save(str(tmp_path / "tokenizer.json"))
    assert name in failed(certify(tmp_path, tiny_pair.base, TEXTS, added_rows=100))


def test_what_the_original_does_itself_is_no_fault(tmp_path: Path, tiny_pair: TinyPair) -> None:
    """Metaspace "first" loses a text's first space, in the original as in its extension."""
    tokenizer = load_tokenizer(tiny_pair.base)
    spec = read_spec(tokenizer)
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [spec["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    (tmp_path / "old").mkdir()
    build(spec).save(str(tmp_path / "old" / "tokenizer.json"))
    old, texts = load_tokenizer(tmp_path / "old"), [" да", "да", " "]
    assert changed_texts(old, texts) == [" да", " "] and changed_texts(old, texts, old) == []
    assert changed_texts(old, texts, tokenizer) == [" да", " "]
    new = save_tokenizer(tmp_path / "new", extend(tmp_path / "old", CORPUS, 50), tiny_pair.base)
    assert not failed(certify(new, tmp_path / "old", {"ru": texts}))


def test_a_certificate_needs_tokenizers(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="does not exist"):
        certify(tmp_path / "nothing", tiny_pair.base, TEXTS)
    assert not broken(certify(tiny_pair.base, tiny_pair.base, {}, added_rows=0))
    assert load_tokenizer(tiny_pair.base).get_vocab_size() == rows(load_tokenizer(tiny_pair.base))
