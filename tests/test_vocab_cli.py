"""`ruadapt tokenizer …` end to end: folders whole or not at all, JSON, exit codes, one message a mistake."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from typer.testing import CliRunner

from ruadapt import vocab
from ruadapt.cli import app
from ruadapt.vocab import load_tokenizer, rows

run = CliRunner()


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    paths = {"ru": tmp_path / "ru.txt", "en": tmp_path / "en.txt"}
    paths["ru"].write_text(RUSSIAN * 2, encoding="utf-8")
    paths["en"].write_text(ENGLISH * 2, encoding="utf-8")
    return {language: str(path) for language, path in paths.items()}


def call(*arguments: object, code: int = 0) -> str:
    result = run.invoke(app, ["tokenizer", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_extend_certify_and_measure(tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str]) -> None:
    target, base = tmp_path / "extended", tiny_pair.base
    arguments = ["extend", base, target, "--added-rows", 60, "--text", texts["ru"], "--json"]
    assert json.loads(call(*arguments))["added"] == 60
    assert rows(load_tokenizer(target)) == rows(load_tokenizer(base)) + 60
    common = ["certify", target, base, "--text", texts["ru"], "--text", texts["en"], "--strict"]
    report = json.loads(call(*common, "--added-rows", 60, "--json"))
    assert report["passed"] and {f"round trip: {path}" for path in texts.values()} <= report["checks"].keys()
    assert "passed: true" in call(*common) and "special tokens: 4 of 4" in call(*common)
    shown = call(*common, "--added-rows", 61, code=1)
    assert "passed: false" in shown and "- 60 added, not 61" in shown
    measured = ["measure", target, base, "--text", f"ru={texts['ru']}"]
    found = json.loads(call(*measured, "--json"))["measures"]
    assert [row["vocabulary"] for row in found] == [str(target), str(base)]
    assert found[0]["characters_per_token"] > found[1]["characters_per_token"]
    assert found[0]["rows"] == found[1]["rows"] + 60
    assert "whole_words" in call(*measured)
    (draft, own) = json.loads(call(*measured, "--draft", base, "--json"))["measures"]
    assert draft["draft_ids"] < own["draft_ids"] == 1 and draft["draft_text"] < own["draft_text"] == 1


def test_replace_and_optimize(tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str]) -> None:
    both = ["--text", texts["ru"], "--text", texts["en"]]
    shown = call("replace", tiny_pair.base, tmp_path / "bpe", "--vocab-size", 640, "--model", "bpe", *both)
    assert "new: 640" in shown
    arguments = ["--keep-rows", 400, "--added-rows", 60, "--used-on", texts["en"], *both]
    report = json.loads(call("optimize", tiny_pair.base, tmp_path / "small", *arguments, "--json"))
    assert report["new"] == rows(load_tokenizer(tmp_path / "small")) == 464
    # What was dropped and learned again is said: rows that have an old embedding count as kept.
    again = 60 - report["added"]
    assert again > 0 and report["kept"] == 404 + again
    assert report["note"].startswith(f"of the 60 rows learned, {again} are tokens that the original had")
    learned = ["--added-rows", 60, "--donor", tmp_path / "bpe", "--text", texts["ru"]]
    report = json.loads(call("optimize", tiny_pair.base, tmp_path / "whole", *learned, "--json"))
    assert report["new"] == 660 and report["added"] == 60 and "note" not in report


def test_a_data_set_is_read_as_a_stream(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows_ = [{"text": ENGLISH}, {"text": RUSSIAN * 2}, {"title": "no"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_]
    (folder / "train.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    common = ["extend", tiny_pair.base]
    wanted = ["--added-rows", 60]
    first = ["--text", folder, "--characters", 1]  # the first document alone
    assert "no Cyrillic letter" in call(*common, tmp_path / "no", *wanted, *first, code=2)
    table = tmp_path / "texts.parquet"
    pd.DataFrame({"body": [ENGLISH, None, RUSSIAN * 2]}).to_parquet(table)
    for number, source in enumerate([folder, folder / "train.jsonl", table]):
        column = ["--column", "body"] if source == table else []
        report = json.loads(
            call(*common, tmp_path / f"ru{number}", *wanted, "--text", source, *column, "--json")
        )
        assert report["added"] == 60
    replace = ["replace", tiny_pair.base, tmp_path / "bpe", "--vocab-size", 640, "--model", "bpe"]
    assert json.loads(call(*replace, "--text", table, "--column", "body", "--json"))["new"] == 640
    (folder / "train.jsonl").write_text(lines[2], encoding="utf-8")
    for name, message in ((folder, "no text in column 'text'"), (tmp_path / "nowhere", "cannot be read")):
        output = call(*common, tmp_path / "no", "--added-rows", 5, "--text", name, code=2)
        assert message in output and not (tmp_path / "no").exists()


def test_mistakes_get_one_message_and_leave_nothing(
    tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str]
) -> None:
    base, target = tiny_pair.base, tmp_path / "new"
    extend = ["extend", base, target, "--added-rows", 10, "--text"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    for arguments, message in (
        (["extend", base, full, "--added-rows", 10, "--text", texts["ru"]], "is not empty"),
        ([*extend, tmp_path / "missing.txt"], "data set {} cannot be read".format(tmp_path / "missing.txt")),
        ([*extend, texts["en"]], "no Cyrillic letter"),
        (["extend", tmp_path, target, "--added-rows", 10, "--text", texts["ru"]], "tokenizer.json does not"),
        (["certify", base, tmp_path / "no", "--text", texts["ru"]], "does not exist"),
        (["measure", base, "--text", texts["ru"]], "write the language before the path"),
        (["measure", base], "nothing to compare"),
    ):
        output = call(*arguments, code=2)
        assert message in output and output.count("ruadapt: ") == 1, output
    assert not target.exists() and [path.name for path in full.iterdir()] == ["note.txt"]


def test_home_is_found_where_no_shell_reads_it(
    tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    call("extend", tiny_pair.base, "~/new", "--added-rows", 20, "--text=~/ru.txt")
    call("measure", "~/new", "--text", "ru=~/ru.txt")
    assert (tmp_path / "new" / "tokenizer.json").exists() and not (tmp_path / "~").exists()


def test_what_cannot_be_kept_or_written_is_refused_before_work(
    tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<|chat|>"]}))
    monkeypatch.setattr(vocab, "extend", lambda *arguments, **options: pytest.fail("work began"))
    options = ["--added-rows", 20, "--text", texts["ru"]]
    assert "transformers adds ['<|chat|>']" in call("extend", base, tmp_path / "new", *options, code=2)
    assert "cannot write" in call("extend", tiny_pair.base, tmp_path / "ru.txt" / "new", *options, code=2)


def test_tokenizer_folders_have_the_modes_of_the_umask(
    tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str]
) -> None:
    previous = os.umask(0o027)
    try:
        call("extend", tiny_pair.base, tmp_path / "new", "--added-rows", 20, "--text", texts["ru"])
    finally:
        os.umask(previous)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o640}


def test_dropout_of_a_training_is_no_part_of_a_vocabulary(
    tiny_pair: TinyPair, tmp_path: Path, texts: dict[str, str]
) -> None:
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.5
    (base / "tokenizer.json").write_text(json.dumps(spec))
    call("extend", base, tmp_path / "new", "--added-rows", 20, "--text", texts["ru"])
    assert json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]["dropout"] is None
