"""A corpus of real data sets: shares, filters, duplicates, the held-out side, sources and their mistakes."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from conftest import ENGLISH, RUSSIAN

from ruadapt import data_sets, files
from ruadapt.errors import RuadaptError
from ruadapt.training.mixing import Source, near_duplicates, read_mix, write_mixed_corpus

WORDS = sorted(set(RUSSIAN.split()))


def text(number: int, words: int = 60) -> str:
    """Random Russian words: no two texts alike."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    files.write_jsonl(path, ({column: line, "id": number} for number, line in enumerate(texts)))
    return path


def corpus(
    folder: Path, sources: list[Source], characters: int = 0, heldout_documents: int = 20, seed: int = 1
) -> tuple[list[str], list[str], dict[str, Any]]:
    """Mix files of a folder, each a domain of its own name."""
    sources = [replace(s, source=str(folder / s.source), domain=s.domain or s.source) for s in sources]
    target = folder / f"corpus{len(list(folder.glob('corpus*')))}"
    target.mkdir()
    settings: dict[str, Any] = {"heldout_documents": heldout_documents, "seed": seed, "heldout_share": 0.1}
    rows = write_mixed_corpus(sources, target, characters={"ru": characters}, **settings)
    parts = [list(data_sets.read_texts(target / f"ru_{part}.jsonl")) for part in ("train", "heldout")]
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
        "duplicate": [good[5], good[6].upper() + " ", " ".join(changed)],
    }
    texts = good + [line for lines in bad.values() for line in lines]
    write(tmp_path / "all.jsonl", texts)
    train, heldout, report = corpus(tmp_path, [Source("all.jsonl", "ru")])
    assert {reason: report["all.jsonl"].get(reason) for reason in bad} == {
        reason: len(lines) for reason, lines in bad.items()
    }
    assert len(train) + len(heldout) == 60 and report["all.jsonl"]["read"] == len(texts)
    _, _, whole = corpus(tmp_path, [Source("all.jsonl", "ru", shortest=1)])
    assert whole["all.jsonl"].get("too short") is None and whole["all.jsonl"]["duplicate"] == 3 + 2


def test_bands_find_likeness_as_it_is() -> None:
    found = {}
    for share in (0.02, 0.5):
        seen = near_duplicates()
        generator, hits = random.Random(4), 0
        for number in range(60):
            words = [f"{number}слово{place}" for place in range(200)]
            assert not seen(" ".join(words))
            for place in generator.sample(range(200), round(200 * share / 5)):
                words[place] = "иначе"
            hits += seen(" ".join(words))
        found[share] = hits / 60
    # One word in 200 changes 5 of 196 runs of five: a likeness of about 0.95; twenty words, of about 0.45.
    assert found[0.02] > 0.95 and found[0.5] < 0.05


def test_hub_names_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(**arguments: Any) -> datasets.IterableDataset:
        asked.append(arguments)
        return datasets.Dataset.from_dict({"body": [text(1), text(2)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("someone/corpus", "ru", config="small", split="validation", column="body")
    assert sorted(source.texts(0)) == sorted([text(1), text(2)])
    assert asked == [{"path": "someone/corpus", "name": "small", "split": "validation", "streaming": True}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"language": "ru"}, "'source'; an entry has source and language"),
        ({"source": "x"}, "missing .* 'language'; an entry"),
        ({"source": "x", "language": "ru", "wieght": 1}, "unexpected .* 'wieght'; an entry .* weight"),
        ({"source": "x", "language": "ru", "weight": 0}, "weights of x must be positive"),
        ({"source": "x", "language": "de"}, "ru and en need sources"),
    ],
)
def test_wrong_entries_are_named(entry: dict[str, Any], message: str) -> None:
    others = [{"source": f"{language}.jsonl", "language": language} for language in ("ru", "en")]
    assert [source.domain for source in read_mix(others)] == ["ru.jsonl", "en.jsonl"]
    with pytest.raises(RuadaptError, match=message):
        read_mix([*others, entry])
    with pytest.raises(RuadaptError, match="ru and en need sources"):
        read_mix(others[:1])


def test_mistakes_are_named(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", [text(1)], column="content")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{'text'", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("other.jsonl", "no text in column 'text'; its columns are content, id"),
        ("empty.jsonl", "is empty"),
        ("broken.jsonl", "line 1: not JSON"),
        ("folder", "holds no rows"),
        ("someone/nothing", "someone/nothing cannot be read .* HF_HUB_OFFLINE=0"),
    ):
        path = tmp_path / name
        with pytest.raises(RuadaptError, match=message):
            list(Source(str(path if path.exists() else name), "ru").texts(0))
    write(tmp_path / "short.jsonl", ["Да."])
    with pytest.raises(RuadaptError, match=r"too little is left .*'too short': 1"):
        corpus(tmp_path, [Source("short.jsonl", "ru")])


def test_a_corpus_of_both_languages_is_written_with_its_domains(tmp_path: Path) -> None:
    lines = ENGLISH.splitlines()
    paths = {
        "ru": write(tmp_path / "ru.jsonl", [text(number) for number in range(60)]),
        "en": write(tmp_path / "en.jsonl", [" ".join(random.Random(n).sample(lines, 3)) for n in range(60)]),
    }
    mix = read_mix(
        [{"source": str(path), "language": name, "domain": "news"} for name, path in paths.items()]
    )
    options: dict[str, Any] = {"heldout_documents": 2, "seed": 1, "heldout_share": 0.2}
    write_mixed_corpus(mix, tmp_path, characters={"ru": 5000, "en": 0}, **options)
    rows = [json.loads(line) for line in (tmp_path / "ru_train.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in rows} == {"news"}
    russian, english = files.read_json(tmp_path / "domains.json")
    assert (
        russian["characters"] == sum(len(row["text"]) for row in rows)
        and 5000 <= russian["characters"] < 6000
    )
    assert english["language"] == "en" and english["heldout"] == 2
    assert len(list(data_sets.read_texts(tmp_path / "en_heldout.jsonl"))) == 2
