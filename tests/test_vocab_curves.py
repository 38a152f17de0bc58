"""Curves of added rows: numbers of direct extensions, intervals."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair

from benchmarks import kept_rows
from benchmarks import vocab as benchmark
from ruadapt.files import read_json
from ruadapt.vocab import extend, load_tokenizer, measure, train_replacement
from ruadapt.vocab import rows as vocab_rows

CORPUS = RUSSIAN.splitlines()


def test_curves_hold_the_numbers_of_direct_extensions(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SIZES", (20, 60, 50_000))
    train_replacement([*CORPUS, *ENGLISH.splitlines()], tiny_pair.base, "bpe", 480).save(
        str(tmp_path / "d.json")
    )
    heldout = {"ru_first": CORPUS[::2], "ru_second": CORPUS[1::2]}
    table = benchmark.curves(tiny_pair.base, CORPUS, {"donor": tmp_path / "d.json"}, heldout)
    assert list(dict.fromkeys(table["rule"])) == ["text", "donor", "donor + text"]
    assert sorted(set(table["added_rows"])) == [0, 20, 60]  # 50,000 rows are not in such a text
    found = table.set_index(["rule", "text", "added_rows"])["characters_per_token"]
    for text, lines in heldout.items():
        direct = {0: load_tokenizer(tiny_pair.base), 20: extend(tiny_pair.base, CORPUS, 20)}
        for size, tokenizer in direct.items():
            expected = measure(tokenizer, lines)["characters_per_token"]
            assert found["text", text, size] == pytest.approx(expected)
        assert found["donor", text, 0] == found["text", text, 0]
    assert (table["low"] < table["characters_per_token"]).all()
    assert (table["high"] > table["characters_per_token"]).all()
    benchmark.write_curves(tmp_path / "out", table, {"seed": 0})
    suffixes = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert suffixes == [".csv", ".json"]
    assert read_json(tmp_path / "out" / "vocabulary_rows.json") == {"seed": 0}
    again = pd.read_csv(tmp_path / "out" / "vocabulary_rows.csv")
    pd.testing.assert_frame_equal(again, table)


def test_a_budget_is_shared_out_whole(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = train_replacement([*CORPUS, *ENGLISH.splitlines()], tiny_pair.base, "bpe", 480)
    made = {name: donor for name in benchmark.DONORS.values()} | {"tiny": load_tokenizer(tiny_pair.base)}
    for name, tokenizer in made.items():
        (tmp_path / "tokenizers" / name).mkdir(parents=True)
        tokenizer.save(str(tmp_path / "tokenizers" / name / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    for name, text in {"train_ru_a": RUSSIAN, "train_en_a": ENGLISH, "heldout_ru_a": RUSSIAN}.items():
        (tmp_path / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setenv("RUADAPT_REFERENCE", str(tmp_path))
    monkeypatch.setattr(kept_rows, "NEW", (3, 7))
    rows = vocab_rows(load_tokenizer(tiny_pair.base)) - 40
    kept_rows.main(tmp_path / "kept.csv", model="tiny", rows=rows, characters=10_000)
    table = pd.read_csv(tmp_path / "kept.csv")
    specials = len(load_tokenizer(tiny_pair.base).get_added_tokens_decoder())
    shared = table[table["rule"] != "original"]
    assert set(shared["new_rows"] + shared["kept_rows"] + specials) == {rows}
    assert set(table["text"]) == {"ru_a", "code"} and table["characters_per_token"].gt(1).all()
    ru = shared[(shared["text"] == "ru_a") & (shared["rule"] == "text")].set_index("new_rows")
    assert ru.loc[7, "characters_per_token"] > ru.loc[3, "characters_per_token"]
