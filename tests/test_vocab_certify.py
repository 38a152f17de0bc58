"""The certificate: it passes what keeps its promises and finds each promise broken on purpose."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    certify,
    extend,
    load_tokenizer,
    render_certificate,
    rows,
    save_tokenizer,
    train_replacement,
)
from ruadapt.vocab.spec import build, read_spec, spell

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
TEXTS = {"russian": RUSSIAN.splitlines(), "english": ENGLISH.splitlines()}


@pytest.fixture(scope="module")
def extended(tiny_pair: TinyPair) -> Tokenizer:
    return extend(tiny_pair.base, CORPUS, 100)


def failed(report: dict[str, Any]) -> set[str]:
    return {row["name"].split(":")[0] for row in report["guarantees"] if row["promised"] and not row["holds"]}


def test_an_extension_passes_and_the_table_says_so(
    tiny_pair: TinyPair, tmp_path: Path, extended: Tokenizer
) -> None:
    folder = save_tokenizer(tmp_path / "new", extended, tiny_pair.base)
    report = certify(folder, tiny_pair.base, TEXTS, added_rows=100, repeats=1)
    assert report["passed"] and report["extended"] and not failed(report)
    assert all(row["promised"] for row in report["guarantees"])
    assert report["rows"]["added"] == 100
    assert report["texts"]["russian"]["new"] > report["texts"]["russian"]["old"]
    assert report["texts"]["english"]["new"] == report["texts"]["english"]["old"]
    assert sum(report["scripts"]["new"].values()) == rows(extended)
    assert report["times"]["characters_per_second"]["russian"]["new"] > 0
    assert json.loads(json.dumps(report, ensure_ascii=False)) == report
    table = render_certificate(report)
    assert "every promised guarantee holds" in table and "FAILS" not in table
    assert failed(certify(folder, tiny_pair.base, TEXTS, added_rows=99, repeats=1)) == {
        "rows added, without holes"
    }


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_replacement_promises_less(tiny_pair: TinyPair, tmp_path: Path, model: Any) -> None:
    new = train_replacement(CORPUS, tiny_pair.base, model, 640)
    report = certify(save_tokenizer(tmp_path / "new", new, tiny_pair.base), tiny_pair.base, TEXTS, repeats=1)
    assert report["passed"] and not report["extended"]
    assert "(not promised)" in render_certificate(report)
    as_extension = certify(tmp_path / "new", tiny_pair.base, TEXTS, extended=True, repeats=1)
    assert {"old tokens at their ids", "ids of other text"} <= failed(as_extension)
    moved = next(row for row in as_extension["guarantees"] if row["name"] == "old tokens at their ids")
    assert len(moved["counterexamples"]) == 5  # not all of them


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
    report = certify(tmp_path, tiny_pair.base, TEXTS, extended=True, repeats=1)
    assert name in failed(report) and not report["passed"]
    assert "FAILS" in render_certificate(report)


def test_a_certificate_needs_texts_and_tokenizers(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="at least one text"):
        certify(tiny_pair.base, tiny_pair.base, {})
    with pytest.raises(RuadaptError, match="does not exist"):
        certify(tmp_path / "nothing", tiny_pair.base, TEXTS)
    assert certify(tiny_pair.base, tiny_pair.base, TEXTS, added_rows=0, repeats=1)["passed"]
    assert load_tokenizer(tiny_pair.base).get_vocab_size() == rows(load_tokenizer(tiny_pair.base))
