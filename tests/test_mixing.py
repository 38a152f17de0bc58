"""A corpus of real data sets: shares, filters, duplicates, the held-out side, sources and their mistakes."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from conftest import ENGLISH, RUSSIAN

from ruadapt import files
from ruadapt.errors import RuadaptError
from ruadapt.training.mixing import Seen, Source, read_mix, read_source, write_mixed_corpus

WORDS = sorted(set(RUSSIAN.split()))


def text(number: int, words: int = 60) -> str:
    """Random Russian words: no two texts alike."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    files.write_jsonl(path, ({column: line, "id": number} for number, line in enumerate(texts)))
    return path


def corpus(
    folder: Path, sources: list[Source], characters: int = 0, **changes: Any
) -> tuple[list[str], list[str], dict[str, Any]]:
    settings: dict[str, Any] = {
        "root": folder,
        "heldout_documents": 20,
        "heldout_share": 0.1,
        "seed": 1,
    }
    target = folder / f"corpus{len(list(folder.glob('corpus*')))}"
    target.mkdir()
    rows = write_mixed_corpus(sources, target, characters={"ru": characters}, **(settings | changes))
    parts = [list(files.read_texts(target / f"ru_{part}.jsonl")) for part in ("train", "heldout")]
    return parts[0], parts[1], {row["domain"]: row for row in rows}


def test_domains_get_their_share_of_the_characters(tmp_path: Path) -> None:
    write(tmp_path / "long.jsonl", [text(n, 300) for n in range(200)])
    (tmp_path / "short.txt").write_text("\n".join(text(n, 12) for n in range(1000, 9000)), encoding="utf-8")
    pd.DataFrame({"body": [text(n) for n in range(9000, 9020)]}).to_parquet(tmp_path / "few.parquet")
    sources = [
        Source("long.jsonl", "ru", weight=2),
        Source("short.txt", "ru", weight=1, domain="short"),
        Source("few.parquet", "ru", weight=1, column="body"),
    ]
    _, heldout, report = corpus(tmp_path, sources, characters=300_000)
    assert report["long.jsonl"]["characters"] == pytest.approx(2 * report["short"]["characters"], rel=0.1)
    # The third ended early, and left its share to the others.
    assert report["few.parquet"]["kept"] + report["few.parquet"]["heldout"] == 20
    assert 300_000 <= sum(row["characters"] for row in report.values()) < 303_000
    assert len(heldout) == 20
    again = corpus(tmp_path, sources, characters=300_000)
    assert again[2] == report and again[1] == heldout


def test_shares_are_of_the_text_that_is_kept(tmp_path: Path) -> None:
    """Two equal weights, one source with every text twice: 50 to 50 within a document's length."""
    write(tmp_path / "once.jsonl", [text(number) for number in range(500)])
    write(tmp_path / "twice.jsonl", [text(number // 2) for number in range(5_000, 5_800)])
    sources = [Source("twice.jsonl", "ru"), Source("once.jsonl", "ru")]
    train, _, report = corpus(tmp_path, sources, characters=200_000)
    assert report["twice.jsonl"]["duplicate"] > 30
    apart = report["twice.jsonl"]["characters"] - report["once.jsonl"]["characters"]
    assert abs(apart) <= max(map(len, train))


def test_the_side_of_a_document_depends_on_nothing_else(tmp_path: Path) -> None:
    texts = [text(number) for number in range(400)]
    write(tmp_path / "all.jsonl", texts)
    write(tmp_path / "part.jsonl", texts[100:])
    source = Source("all.jsonl", "ru")
    train, heldout, _ = corpus(tmp_path, [source], heldout_documents=1000)
    less, fewer, counts = corpus(tmp_path, [Source("part.jsonl", "ru")], heldout_documents=5, seed=9)
    assert set(train) | set(heldout) == set(texts) and 20 < len(heldout) < 60
    assert set(less) < set(train) and set(fewer) < set(heldout) and len(fewer) == 5
    assert counts["part.jsonl"]["not needed to hold out"] == len(set(heldout) & set(texts[100:])) - 5


def test_filters_count_what_they_leave_out(tmp_path: Path) -> None:
    good = [text(number) for number in range(60)]
    changed = good[7].split()
    changed[30] = "слово"
    bad = {
        "too short": ["Да."] * 3,
        "other language": [ENGLISH, "Ґанок і їжак є біля ґазди, і їхні діти теж є тут " * 3, "12345 " * 30],
        "duplicate": [good[5], good[6].upper() + " "],
        "near duplicate": [" ".join(changed)],
    }
    texts = good + [line for lines in bad.values() for line in lines]
    write(tmp_path / "all.jsonl", texts)
    train, heldout, report = corpus(tmp_path, [Source("all.jsonl", "ru")])
    assert {reason: report["all.jsonl"].get(reason) for reason in bad} == {
        reason: len(lines) for reason, lines in bad.items()
    }
    assert len(train) + len(heldout) == 60 and report["all.jsonl"]["read"] == len(texts)


def test_bands_find_likeness_as_it_is() -> None:
    found = {}
    for share in (0.02, 0.5):
        seen = Seen()
        generator, hits = random.Random(4), 0
        for number in range(60):
            words = [f"{number}слово{place}" for place in range(200)]
            assert seen.kind(" ".join(words)) is None
            for place in generator.sample(range(200), round(200 * share / 5)):
                words[place] = "иначе"
            hits += seen.kind(" ".join(words)) == "near duplicate"
        found[share] = hits / 60
    # One word in 200 changes 5 of 196 runs of five: a likeness of about 0.95; twenty words, of about 0.45.
    assert found[0.02] > 0.95 and found[0.5] < 0.05


def test_hub_names_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(**arguments: Any) -> datasets.IterableDataset:
        asked.append(arguments)
        return datasets.Dataset.from_dict({"body": [text(1), text(2)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("someone/corpus", "ru", config="small", split="validation", column="body")
    assert sorted(read_source(source, tmp_path, 0)) == sorted([text(1), text(2)])
    assert asked == [{"path": "someone/corpus", "name": "small", "split": "validation", "streaming": True}]


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuadaptError, match=r"corpus_mix: .* must name source and language"):
        Source.of({"source": "x", "weight": 1})
    with pytest.raises(RuadaptError, match="only"):
        Source.of({"source": "x", "language": "ru", "wieght": 1})
    with pytest.raises(RuadaptError, match="weight positive"):
        Source.of({"source": "x", "language": "ru", "weight": 0})
    write(tmp_path / "other.jsonl", [text(1)], column="content")
    with pytest.raises(RuadaptError, match=r"no text in column 'text'; its columns are content, id"):
        list(read_source(Source("other.jsonl", "ru"), tmp_path, 0))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RuadaptError, match=r"empty|cannot be read"):
        list(read_source(Source("empty.jsonl", "ru"), tmp_path, 0))
    (tmp_path / "broken.jsonl").write_text("{'text'", encoding="utf-8")
    with pytest.raises(RuadaptError, match="line 1: not JSON"):
        list(read_source(Source("broken.jsonl", "ru"), tmp_path, 0))
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuadaptError, match="holds no rows"):
        list(read_source(Source("folder", "ru"), tmp_path, 0))
    with pytest.raises(RuadaptError, match=r"someone/nothing cannot be read .* HF_HUB_OFFLINE=0"):
        list(read_source(Source("someone/nothing", "ru"), tmp_path, 0))
    write(tmp_path / "short.jsonl", ["Да."])
    with pytest.raises(RuadaptError, match=r"0 characters to train on .*'too short': 1"):
        corpus(tmp_path, [Source("short.jsonl", "ru")])


def test_a_corpus_of_both_languages_is_written_with_its_domains(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [text(number) for number in range(60)])
    lines = ENGLISH.splitlines()
    write(tmp_path / "en.jsonl", [" ".join(random.Random(n).sample(lines, 3)) for n in range(60)])
    entries = [
        {"source": "all.jsonl", "language": "ru", "domain": "news"},
        {"source": "en.jsonl", "language": "en"},
    ]
    settings = {"root": tmp_path, "heldout_documents": 2, "heldout_share": 0.2, "seed": 1}
    write_mixed_corpus(read_mix(entries), tmp_path, characters={"ru": 5000, "en": 0}, **settings)
    rows = [json.loads(line) for line in (tmp_path / "ru_train.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in rows} == {"news"}
    domains = {row["domain"]: row for row in files.read_json(tmp_path / "domains.json")}
    assert domains["news"]["share"] == 100 and 5000 <= domains["news"]["characters"] < 6000
    assert domains["en.jsonl"]["left out"] < 50
    assert len(list(files.read_texts(tmp_path / "en_heldout.jsonl"))) == 2
    with pytest.raises(RuadaptError, match="no source with language en"):
        read_mix(entries[:1])
    with pytest.raises(RuadaptError, match="a domain of its own"):
        read_mix(entries + entries[1:])
