"""Data sets by path: every kind of file, folders with splits, an order by seed, and what is refused."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from ruadapt.data_sets import read_column, read_rows
from ruadapt.errors import RuadaptError

TEXTS = [f"Строка {number}." for number in range(30)]


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"text": texts})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".json":
        table.to_json(path, orient="records")
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as stream:
            stream.write(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv", "a.json", "a.txt"])
def test_every_kind_of_file_and_its_folder_give_the_same_rows(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "data" / "deeper" / name, TEXTS)
    (tmp_path / "data" / "README.md").write_text("not a row")
    assert list(read_rows(file)) == list(read_rows(tmp_path / "data")) == [{"text": text} for text in TEXTS]
    shuffled = list(read_column(file, "text", shuffled=3))
    assert shuffled != TEXTS and sorted(shuffled) == sorted(TEXTS)
    assert shuffled == list(read_column(file, "text", shuffled=3))


def test_a_named_split_of_a_folder_is_that_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", TEXTS[:20])
    write(tmp_path / "test.jsonl", TEXTS[20:])
    assert list(read_column(tmp_path, "text", "test")) == TEXTS[20:]
    assert sorted(read_column(tmp_path, "text")) == sorted(TEXTS)
    assert sorted(read_column(tmp_path, "text", shuffled=3)) == sorted(TEXTS)
    with pytest.raises(RuadaptError, match=r"cannot be read .* split 'validation'"):
        list(read_rows(tmp_path, "validation"))


def test_descriptions_beside_the_data_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet", TEXTS)
    (tmp_path / "clone" / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    for name in ("clone", "saved"):
        assert list(read_column(tmp_path / name, "text")) == TEXTS


def test_rows_without_a_text_are_empty_and_other_columns_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "yes", "n": 1}\n{"text": null, "n": "other"}\n{"n": 3}\n')
    assert list(read_column(file, "text")) == ["yes", "", ""]
    for column in ("n", "body"):
        with pytest.raises(RuadaptError, match=rf"no text in column '{column}'; its columns are text, n"):
            list(read_column(file, column))
