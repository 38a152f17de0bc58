"""Every family of tokenizers: byte-level with one merge a token or all of them, SentencePiece with bytes."""

import importlib
import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks.vocab import truncate
from ruadapt.errors import RuadaptError
from ruadapt.vocab import (
    changed_ids,
    changed_texts,
    extend,
    load_tokenizer,
    optimize,
    reachable,
    read_donor,
    rows,
    script,
    token_bytes,
    train_replacement,
)
from ruadapt.vocab.spec import BYTE_LETTERS, build, read_spec, special_ids, unspell
from ruadapt.vocab.surface import letter_script
from ruadapt.vocab.words import learnable_words

Variants = dict[str, dict[str, Tokenizer]]
FAMILIES = ("one_merge", "every_split", "byte_fallback")
CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
RUSSIAN_OR_ANY = st.one_of(st.text(max_size=40), st.sampled_from(RUSSIAN.split()).map(" {}".format))


def every_split_spec(tokenizer: Tokenizer) -> dict:
    """The same vocabulary as LLaMA-3's file would have it."""
    spec = read_spec(tokenizer)
    vocabulary = spec["model"]["vocab"]
    merges = [
        [token[:middle], token[middle:]]
        for token in (left + right for left, right in spec["model"]["merges"])
        for middle in range(1, len(token))
        if token[:middle] in vocabulary and token[middle:] in vocabulary
    ]
    return {**spec, "model": {**spec["model"], "merges": merges, "ignore_merges": True}}


def byte_fallback_tokenizer() -> Tokenizer:
    """LLaMA-2's kind: `▁` for spaces, `<0x..>` for what has no token, no pre-tokenizer."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    learner.train_from_iterator(ENGLISH.splitlines() * 4 + RUSSIAN.splitlines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    result = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    result.normalizer = learner.normalizer
    result.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    result.add_special_tokens(specials)
    return result


@pytest.fixture(scope="session")
def folders(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    specs = {
        "one_merge": read_spec(load_tokenizer(tiny_pair.base)),
        "every_split": every_split_spec(load_tokenizer(tiny_pair.base)),
        "byte_fallback": read_spec(byte_fallback_tokenizer()),
    }
    for name, spec in specs.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return {name: folder / name for name in specs}


@pytest.fixture(scope="session")
def originals(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def extended(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: extend(folder, CORPUS, 120) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def every_variant(folders: dict[str, Path], extended: dict[str, Tokenizer]) -> Variants:
    built: Variants = {"extended": extended}
    built["optimized"] = {name: optimize(folder, CORPUS, 380, 90) for name, folder in folders.items()}
    for model in ("bpe", "unigram"):
        built[model] = {
            name: train_replacement(CORPUS, folder, model, 620) for name, folder in folders.items()
        }  # type: ignore[arg-type]
    return built


@pytest.mark.parametrize("name", FAMILIES)
def test_extension_is_exact_in_every_family(
    originals: dict[str, Tokenizer], extended: dict[str, Tokenizer], name: str
) -> None:
    old, new = originals[name], extended[name]
    assert rows(new) == rows(old) + 120
    assert all(new.token_to_id(token) == number for token, number in old.get_vocab().items())
    old_merges, merges = (read_spec(tokenizer)["model"]["merges"] for tokenizer in (old, new))
    assert merges[: len(old_merges)] == old_merges
    assert len({tuple(pair) for pair in merges}) == len(merges)
    fresh = [str(new.id_to_token(number)) for number in range(rows(old), rows(new))]
    assert all(reachable(new, fresh).values())
    for surface in token_bytes(new)[rows(old) :]:
        assert script(surface) in ("Cyrillic", "Bytes")
    made = ["".join(pair) for pair in merges[len(old_merges) :]]
    once = [token for token in made if token in set(fresh)]
    assert sorted(once if name != "every_split" else set(once)) == sorted(fresh)


def joined_by_rank(word: str, ranks: dict[str, int]) -> list[str]:
    """SentencePiece's rule: again and again, join the two neighbours whose token comes first in the list."""
    symbols = list(word)
    while True:
        found = [ranks.get(left + right, math.inf) for left, right in pairwise(symbols)]
        if min(found, default=math.inf) == math.inf:
            return symbols
        place = found.index(min(found))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def test_the_family_is_told_by_the_originals_merges(
    extended: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension, which has one split a token, is of its original's family when it is extended again."""
    module = importlib.import_module("ruadapt.vocab.extend")
    monkeypatch.setattr(module, "_SAMPLE", 200)
    found = {}
    for name, tokenizer in extended.items():
        merges = read_spec(tokenizer)["model"]["merges"]
        known = set(tokenizer.get_vocab())
        found[name] = module._lists_every_split(list(map(tuple, merges)), known)
    assert found == {"one_merge": False, "every_split": True, "byte_fallback": False}


def test_new_tokens_list_every_split_as_old_ones_do(
    originals: dict[str, Tokenizer], extended: dict[str, Tokenizer]
) -> None:
    """So the merges give the ids of SentencePiece's rule."""
    old, new = originals["every_split"], extended["every_split"]
    spec = read_spec(new)
    fresh = [str(new.id_to_token(number)) for number in range(rows(old), rows(new))]
    old_count, vocabulary = len(read_spec(old)["model"]["merges"]), spec["model"]["vocab"]
    every = [
        (token[:middle], token[middle:])
        for token in fresh
        for middle in range(1, len(token))
        if token[:middle] in vocabulary and token[middle:] in vocabulary
    ]
    assert sorted(map(tuple, spec["model"]["merges"][old_count:])) == sorted(every)
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(spec["model"]["merges"])))}
    model = Tokenizer(build({**spec, "model": {**spec["model"], "ignore_merges": False}}).model)
    draw = random.Random(5)
    parts = [*fresh, *fresh, *BYTE_LETTERS]
    words = [
        "".join(draw.choice(parts)[draw.randrange(3) :] for _ in range(draw.randrange(1, 6)))
        for _ in range(3000)
    ]
    found = [encoding.tokens for encoding in model.encode_batch(words)]
    assert found == [joined_by_rank(word, ranks) for word in words]


@settings(max_examples=100, deadline=None)
@given(text=RUSSIAN_OR_ANY)
def test_text_comes_back_as_it_does_from_the_original(
    originals: dict[str, Tokenizer], every_variant: Variants, text: str
) -> None:
    for variant, families in every_variant.items():
        for name, new in families.items():
            before = originals[name].decode(originals[name].encode(text).ids, skip_special_tokens=False)
            assert new.decode(new.encode(text).ids, skip_special_tokens=False) == before, (variant, name)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "Cyrillic" not in map(letter_script, text)))
def test_text_in_other_scripts_keeps_its_ids(
    originals: dict[str, Tokenizer], extended: dict[str, Tokenizer], text: str
) -> None:
    for name, new in extended.items():
        assert new.encode(text).ids == originals[name].encode(text).ids, name


def random_texts(count: int) -> list[str]:
    draw = random.Random(17)
    ranges = [(32, 127), (0x400, 0x530), (0, 0xD800), (0xE000, 0x110000)]
    return [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 25)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("variant", ["extended", "optimized", "bpe", "unigram"])
def test_random_unicode_round_trips(every_variant: Variants, variant: str, name: str) -> None:
    texts = ["<0x41> a<0x0A>", " ", "  два  слова\n", *random_texts(1000)]
    # `▁` itself reads as a space in the SentencePiece family, in the original, too.
    texts = [text.replace("▁", "_") for text in texts]
    assert changed_texts(every_variant[variant][name], texts) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_and_replaced_vocabularies_have_the_rows_asked_for(
    originals: dict[str, Tokenizer], every_variant: Variants, name: str
) -> None:
    specials = special_ids(originals[name])
    assert rows(every_variant["optimized"][name]) == 380 + 90 + len(specials)
    for variant in ("bpe", "unigram"):
        new = every_variant[variant][name]
        assert sorted(new.get_vocab().values()) == list(range(620))
        assert special_ids(new) == specials
    ordinary = set(every_variant["optimized"][name].get_vocab()) - set(specials)
    ordinary -= {f"<0x{byte:02X}>" for byte in range(256)}
    assert all(reachable(every_variant["optimized"][name], ordinary).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_dropped_script_go(
    folders: dict[str, Path], originals: dict[str, Tokenizer], name: str
) -> None:
    new = optimize(folders[name], CORPUS, None, 5, drop_scripts=["Latin"])
    left = [surface for surface in token_bytes(new) if script(surface) == "Latin"]
    assert all(surface is not None and len(surface) == 1 for surface in left)
    assert rows(new) < rows(originals[name])
    digits = ["12 345", "?!"]
    assert changed_texts(new, ["Latin is bytes now", *digits]) == []


def test_pruning_by_prose_keeps_the_indents_of_code(tmp_path: Path) -> None:
    code = ["if x:\n        return x\n    y = 1\n\n\n"] * 20
    tiny_tokenizer(500, [*CORPUS, *code]).save_pretrained(tmp_path)
    old = load_tokenizer(tmp_path)
    new = optimize(tmp_path, CORPUS, 300, 10, used_on=[*CORPUS, " x" * 99])
    blank = "x\n        x\n    x\n\n\n"
    assert len(old.encode(blank).tokens) < 12
    assert new.encode(blank).tokens == old.encode(blank).tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_truncated_extension_is_the_smaller_extension(folders: dict[str, Path], name: str) -> None:
    original = load_tokenizer(folders[name])
    large, small = (extend(folders[name], CORPUS, size) for size in (120, 50))
    assert truncate(large, original, 50).to_str() == small.to_str()
    with pytest.raises(RuadaptError, match="the extension has 120"):
        truncate(large, original, 121)


def test_a_donor_has_its_share_of_the_weight(tiny_pair: TinyPair, tmp_path: Path) -> None:
    pieces = [("<unk>", -100.0), ("▁дом", math.log(0.3)), ("▁лес", math.log(0.1))]
    Tokenizer(models.Unigram(pieces, 0, False)).save(str(tmp_path / "tokenizer.json"))
    old = load_tokenizer(tiny_pair.base)

    def learned(texts: list[str], donor: Path | None) -> dict[str, int]:
        found = learnable_words(old, texts, donor)
        return {unspell(word).decode(): count for word, count in found.items()}

    texts = [" дом лес 17" * 100, "the лес" * 100]
    assert learned(texts, None) == {" дом": 100, " лес": 200}
    assert learned(texts, tmp_path) == {" дом": round(50 + 112.5), " лес": round(100 + 37.5)}
    assert learned([], tmp_path) == {" дом": 60, " лес": 20}


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_rows_as_the_text_has(folders: dict[str, Path], name: str) -> None:
    most = extend(folders[name], CORPUS, 10_000, exact=False)
    count = rows(most) - rows(load_tokenizer(folders[name]))
    assert extend(folders[name], CORPUS, count).to_str() == most.to_str()
    with pytest.raises(RuadaptError, match=f"only {count} rows are possible"):
        extend(folders[name], CORPUS, count + 1)


def donor_files(folder: Path, folders: dict[str, Path]) -> dict[str, Path]:
    """One vocabulary of each kind that can give its words."""
    unigram = train_replacement(CORPUS, folders["byte_fallback"], "unigram", 700)
    kinds = {"unigram": unigram, "bpe": train_replacement(CORPUS, folders["one_merge"], "bpe", 700)}
    lowercase = Tokenizer.from_str(unigram.to_str())
    lowercase.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    kinds["other_normalizer"] = lowercase
    files = {}
    for name, tokenizer in kinds.items():
        files[name] = folder / f"{name}.json"
        tokenizer.save(str(files[name]))
    return files


def test_a_donor_of_any_kind_gives_its_words(folders: dict[str, Path], tmp_path: Path) -> None:
    files = donor_files(tmp_path, folders)
    # The donor's normaliser is not asked: the surfaces of its tokens are what counts.
    assert read_donor(files["unigram"]) == read_donor(files["other_normalizer"])
    for kind, file in files.items():
        for name, folder in folders.items():
            new = extend(folder, (), 60, donor=file)
            assert rows(new) == rows(load_tokenizer(folder)) + 60, (kind, name)
            both = extend(folder, iter([*CORPUS, " Пекарнями" * 500]), 60, donor=file)
            assert both.encode("ах Пекарнями").ids[-1] >= rows(load_tokenizer(folder)), (kind, name)


def test_two_donor_tokens_with_one_surface_add_up(tmp_path: Path) -> None:
    model = models.Unigram([("<unk>", 0.0), ("▁да", -1.0), (" да", -1.0)], unk_id=0)
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert read_donor(tmp_path)[" да"] == pytest.approx(2 * 2.718281828**-1)


def wordpiece(folder: Path) -> Path:
    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "wordpiece.json"))
    return folder / "wordpiece.json"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base, here: extend(base, CORPUS, 10, donor=wordpiece(here)), "WordPiece"),
        (lambda base, here: extend(base, CORPUS, 10, donor=here / "none.json"), "does not exist"),
        (lambda base, here: extend(base, ["Only English."], 10), "the text has no Cyrillic letter"),
        (lambda base, here: extend(here, CORPUS, 10), "slow tokenizer"),
        (lambda base, here: optimize(base, CORPUS, None, 9, drop_scripts=["CJK"]), "no token has a letter"),
    ],
)
def test_bad_input_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, call: Callable, message: str
) -> None:
    with pytest.raises(RuadaptError, match=message):
        call(folders["one_merge"], tmp_path)


@pytest.mark.parametrize(
    "name", ["qwen2.5", "llama-3", "mistral-nemo", "llama-2", "mistral-7b-v0.1", "gemma"]
)
def test_real_originals_are_extended_exactly(reference: Path, name: str) -> None:
    folder = reference / "tokenizers" / name
    old = load_tokenizer(folder)
    russian = (reference / "text/heldout_ru_gsd_taiga.txt").read_text(encoding="utf-8").splitlines()
    english = (reference / "text/heldout_en_ewt.txt").read_text(encoding="utf-8").splitlines()
    new = extend(folder, russian, 1500)
    assert rows(new) == rows(old) + 1500
    fresh = [str(new.id_to_token(number)) for number in range(rows(old), rows(new))]
    assert all(reachable(new, fresh).values())
    assert changed_ids(new, old, english) == []
    assert changed_texts(new, [*russian, *random_texts(300)]) == []
    assert all(new.token_to_id(token) == number for token, number in special_ids(old).items())


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3", "mistral-7b-v0.1"])
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_real_originals_are_replaced(reference: Path, name: str, model: str) -> None:
    folder = reference / "tokenizers" / name
    texts = (reference / "text/heldout_ru_gsd_taiga.txt").read_text(encoding="utf-8").splitlines()[:600]
    new = train_replacement(texts, folder, model, 3000)  # type: ignore[arg-type]
    assert rows(new) == 3000
    assert changed_texts(new, texts) == []
    numbers = ["2024", "7", "1234567", *map(str, range(1000))]
    both = [each.encode_batch(numbers, add_special_tokens=False) for each in (new, load_tokenizer(folder))]
    assert all(after.tokens == before.tokens for after, before in zip(*both, strict=True))


def test_pruning_keeps_the_tokens_of_numbers(reference: Path) -> None:
    """LLaMA-3 has a token for every number of up to three digits, most of them late in its vocabulary."""
    folder = reference / "tokenizers" / "llama-3"
    texts = (reference / "text/heldout_ru_gsd_taiga.txt").read_text(encoding="utf-8").splitlines()[:600]
    numbers = [str(number) for number in (*range(1_000), 123_456, 2_026)]
    old, new = load_tokenizer(folder), optimize(folder, texts, 3_000, 30)
    for before, after in zip(*(each.encode_batch(numbers) for each in (old, new)), strict=True):
        assert before.tokens == after.tokens
