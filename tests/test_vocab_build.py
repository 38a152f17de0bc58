"""New vocabularies: exact rows and old ids, round trips, reachable tokens, clear refusals."""

import json
import math
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN, SPECIAL_TOKENS, TinyPair
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    extend,
    joined_numbers,
    load_tokenizer,
    measure,
    optimize,
    reachable,
    row_report,
    rows,
    train_replacement,
)
from ruadapt.vocab.spec import BYTE_LETTERS, place, read_spec, special_ids, spell
from ruadapt.vocab.train import _fit

CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
SIZES = {"bpe": 700, "unigram": 650, "extended": 760, "optimized": 564}


@pytest.fixture(scope="session")
def original(tiny_pair: TinyPair) -> Tokenizer:
    return load_tokenizer(tiny_pair.base)


@pytest.fixture(scope="session")
def variants(tiny_pair: TinyPair) -> dict[str, Tokenizer]:
    return {
        "bpe": train_replacement(CORPUS, tiny_pair.base, "bpe", SIZES["bpe"]),
        "unigram": train_replacement(CORPUS, tiny_pair.base, "unigram", SIZES["unigram"]),
        "extended": extend(tiny_pair.base, CORPUS, added_rows=160),
        "optimized": optimize(tiny_pair.base, CORPUS, keep_rows=400, added_rows=160),
    }


@pytest.mark.parametrize("name", SIZES)
def test_rows_are_exactly_as_asked_and_have_no_holes(variants: dict[str, Tokenizer], name: str) -> None:
    tokenizer = variants[name]
    assert rows(tokenizer) == SIZES[name]
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZES[name]))
    assert set(BYTE_LETTERS) <= set(tokenizer.get_vocab())


@pytest.mark.parametrize("name", SIZES)
def test_special_tokens_keep_their_ids(
    variants: dict[str, Tokenizer], original: Tokenizer, name: str
) -> None:
    assert special_ids(variants[name]) == special_ids(original)
    turn = "<|user|>Привет<|end|>"
    assert [token for token in variants[name].encode(turn).tokens if token in SPECIAL_TOKENS] == [
        "<|user|>",
        "<|end|>",
    ]


@pytest.mark.parametrize("name", SIZES)
def test_russian_gets_cheaper(variants: dict[str, Tokenizer], original: Tokenizer, name: str) -> None:
    lines = RUSSIAN.splitlines()
    before, after = measure(original, lines), measure(variants[name], lines)
    assert after["characters_per_token"] > before["characters_per_token"]
    assert after["whole_words"] > before["whole_words"]


def test_every_ordinary_token_of_a_pruned_vocabulary_is_reachable(
    variants: dict[str, Tokenizer], original: Tokenizer
) -> None:
    ordinary = set(variants["optimized"].get_vocab()) - set(SPECIAL_TOKENS)
    assert all(reachable(variants["optimized"], ordinary).values())
    report = row_report(variants["optimized"], original)
    assert report["saved"] == rows(original) - SIZES["optimized"] == 36
    assert report["kept"] + report["added"] == SIZES["optimized"]


def test_unreachable_token_is_seen() -> None:
    model = models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, merges=[("a", "b")])
    assert reachable(Tokenizer(model), ["ab", "bc"]) == {"ab": True, "bc": False}


def test_pruning_by_use_keeps_what_the_text_uses(tiny_pair: TinyPair, original: Tokenizer) -> None:
    english = ENGLISH.splitlines()
    by_use = optimize(tiny_pair.base, CORPUS, 450, 100, used_on=english)
    by_id = optimize(tiny_pair.base, CORPUS, 450, 100)
    assert measure(by_use, english)["tokens"] < measure(by_id, english)["tokens"]


def test_merge_into_an_old_token_costs_no_row(tmp_path: Path, tiny_pair: TinyPair) -> None:
    """An old token that its merges miss becomes reachable again; the budget counts new tokens only."""
    spec = read_spec(load_tokenizer(tiny_pair.base))
    spec["model"]["vocab"][spell("пекарями".encode())] = len(spec["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    old = load_tokenizer(tmp_path)
    new = extend(tmp_path, ["пекарями пекарями рыбаками рыбаками"], added_rows=6)
    assert rows(new) == rows(old) + 6
    fresh = [new.id_to_token(number) for number in range(rows(old), rows(new))]
    assert all(reachable(new, fresh).values())


def test_a_unigram_vocabulary_is_fitted_to_the_counts_of_its_pieces() -> None:
    words = {"аб": 100, "абаб": 10, "вг": 50}
    # «абаб» is two times «аб», which is likelier than the whole word; what is never used counts as a half.
    used = {"аб": 120, "вг": 50}
    whole = {piece: math.exp(score) * 170 for piece, score in _fit(words, list("абвг"), 7).items()}
    assert whole == pytest.approx(used | dict.fromkeys(["абаб", *"абвг"], 0.5))
    fewer = {piece: math.exp(score) * 170 for piece, score in _fit(words, list("абвг"), 6).items()}
    assert fewer == pytest.approx(used | dict.fromkeys("абвг", 0.5))


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_building_twice_gives_one_tokenizer(tiny_pair: TinyPair, model: str) -> None:
    first, second = (train_replacement(CORPUS, tiny_pair.base, model, 640) for _ in range(2))  # type: ignore[arg-type]
    assert first.to_str() == second.to_str()
    grown = [optimize(tiny_pair.base, CORPUS, 400, 60).to_str() for _ in range(2)]
    assert grown[0] == grown[1]


def test_special_tokens_move_to_the_last_rows_only_where_they_must() -> None:
    assert place(["a", "b"], {"<s>": 1, "</s>": 900}) == {"a": 0, "<s>": 1, "b": 2, "</s>": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base: extend(base, ["only English"], 10), "no Cyrillic letter"),
        (lambda base: extend(base, [], 10), "no Cyrillic letter"),
        (lambda base: extend(base, CORPUS, 100_000), r"only \d+ rows are possible"),
        (lambda base: extend(base, CORPUS, 0), "at least one"),
        (lambda base: optimize(base, CORPUS, 20, 10), "needs 256 rows"),
        (lambda base: optimize(base, CORPUS, 5000, 10), "596 ordinary tokens"),
        (
            lambda base: train_replacement(CORPUS, base, "bpe", 100),
            "256 bytes, 0 numbers and 4 special tokens",
        ),
        (lambda base: train_replacement(CORPUS, base, "bpe", 50_000), r"gives \d+ rows"),
        (lambda base: train_replacement(CORPUS, base, "unigram", 50_000), r"gives \d+ rows"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(tiny_pair: TinyPair, call, message: str) -> None:
    with pytest.raises(RuadaptError, match=message):
        call(tiny_pair.base)


def test_a_unigram_vocabulary_has_no_merges_to_extend(tmp_path: Path, variants: dict[str, Tokenizer]) -> None:
    variants["unigram"].save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RuadaptError, match="`replace` it instead"):
        extend(tmp_path, CORPUS, 10)


def test_what_has_no_bytes_is_not_replaced(tmp_path: Path) -> None:
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RuadaptError, match="adapt a model"):
        train_replacement(CORPUS, tmp_path, "bpe", 600)


@pytest.mark.parametrize(
    ("most", "model", "kept"), [(9, "bpe", True), (9, "unigram", False), (2, "unigram", True)]
)
def test_a_replacement_cuts_numbers_as_the_merges_did(
    tmp_path: Path, most: int, model: str, kept: bool
) -> None:
    """Unigram can't imitate merges in "333"; where every number that is cut is a token, it need not."""
    old = Tokenizer(models.BPE())
    splits = pre_tokenizers.Split(Regex(f"[0-9]{{1,{most}}}"), "isolated")
    old.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    old.decoder = decoders.ByteLevel()
    numbers = [f"{number:02}" for number in range(100)] * 9
    trainer = trainers.BpeTrainer(vocab_size=366, initial_alphabet=list(BYTE_LETTERS), show_progress=False)
    old.train_from_iterator(numbers, trainer)
    old.save(str(tmp_path / "tokenizer.json"))
    new = train_replacement([*CORPUS, "2024 33333 12 года " * 9], tmp_path, model, 600)
    texts = ["в 2024 году 1234567", *map(str, range(2000))]
    cut = [[encoding.tokens for encoding in each.encode_batch(texts[1:])] for each in (old, new)]
    assert (cut[0] == cut[1]) == kept and rows(new) == 600
    assert len(joined_numbers(old)) >= 110 and set(joined_numbers(old)) <= set(new.get_vocab())


def test_unreadable_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod', encoding="utf-8")
    with pytest.raises(RuadaptError, match="not a readable"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(RuadaptError, match="WordPiece"):
        load_tokenizer(tmp_path)
