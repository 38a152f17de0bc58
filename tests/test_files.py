"""Files are written whole or not at all, and unreadable ones are named."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ruadapt import data_sets, files
from ruadapt.errors import RuadaptError


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), files.atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with files.atomic_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    with files.atomic_folder(target) as folder:
        (folder / "next").write_text("y")
        assert (target / "whole").exists()
    assert [path.name for path in target.iterdir()] == ["next"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replaced_folder_is_lost_at_no_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the second rename fails, nor where a kill comes before it and the next run sweeps."""
    target, rename, renames = tmp_path / "model", os.replace, []

    def failing(source: Path, place: Path) -> None:
        renames.append(place)
        if len(renames) == 2:
            raise OSError("no rename")
        rename(source, place)

    def write(content: str) -> None:
        with files.atomic_folder(target) as folder:
            (folder / "weights").write_text(content)

    write("old")
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(RuadaptError, match="no rename"):
        write("new")
    assert (target / "weights").read_text() == "old" and [*tmp_path.iterdir()] == [target]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda source, place: rename(source, place) or os._exit(9))
    if (child := os.fork()) == 0:
        write("new")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not target.exists()
    monkeypatch.undo()
    write("newer")
    assert (target / "weights").read_text() == "newer"
    kept = [path for path in tmp_path.glob(".model.*/weights") if path.read_text() == "old"]
    assert len(kept) == 1


def test_only_what_a_killed_process_left_for_the_same_target_is_removed(tmp_path: Path) -> None:
    code = "import os, sys, ruadapt.files as f\nwith f.atomic_folder(sys.argv[1]): os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    for name in (".out.mine.part", ".other.1.part"):
        (tmp_path / name).mkdir()
    with files.atomic_folder(tmp_path / "out"), files.atomic_folder(tmp_path / "out"):  # the first one lives
        assert len(list(tmp_path.iterdir())) == 6  # both with their locks
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.mine.part", ".other.1.part"}


def test_what_a_link_leads_to_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster, where folders of the home are links to a larger disk."""
    asked, usage = [], files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage(path))
    for name in ("there", "not_yet"):
        link, disk = tmp_path / "home" / name, tmp_path / "disk" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(disk)
        if name == "there":
            disk.mkdir(parents=True)
        files.require_new_folder(link)
        files.require_disk_space(link, 1)
        with files.atomic_folder(link) as folder:
            assert folder.parent.parent == tmp_path / "disk"
            (folder / "a.json").write_text("{}")
        files.write_json(link / "a.json", {"a": 1})
        assert link.is_symlink() and files.read_json(disk / "a.json") == {"a": 1}
    assert asked == [tmp_path / "disk" / "there", tmp_path / "disk"]
    (tmp_path / "home" / "a.json").symlink_to(disk / "a.json")
    files.write_json(tmp_path / "home" / "a.json", {"a": 2})
    assert (tmp_path / "home" / "a.json").is_symlink() and files.read_json(disk / "a.json") == {"a": 2}


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with files.atomic_folder(tmp_path / "out") as folder:
            files.write_json(folder / "a.json", {})
    finally:
        os.umask(previous)
    modes = [(tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("", "a.json")]
    assert modes == [0o750, 0o640]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "exists and is not empty"),
        ("ы" * 125, "cannot write .* name too long"),
        ("a" * 300 + "/out", "cannot write .* name too long"),
        ("file/out", "cannot write .*(Not a directory|File exists)"),
        ("full", "exists and is not empty"),
        ("mounted", "where a disk is mounted"),
    ],
)
def test_targets_that_cannot_be_made_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "mounted")
    (tmp_path / "file").touch()
    (tmp_path / "full" / "inner").mkdir(parents=True)
    with pytest.raises(RuadaptError, match=message):
        files.require_new_folder(tmp_path / target)
    assert len(list(tmp_path.iterdir())) == 2


def test_names_that_no_file_system_takes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / ("ы" * 125), tmp_path / "file" / "out"):
        with pytest.raises(RuadaptError, match="cannot write"), files.atomic_folder(target):
            pass
        with pytest.raises(RuadaptError, match="cannot write"):
            files.write_json(target, {})


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": "ё"})

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RuadaptError, match="No space left on device; check the disk"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": "ё"}
    assert [found.name for found in tmp_path.iterdir()] == ["value.json"]


def test_disk_space_is_checked_with_both_numbers(tmp_path: Path) -> None:
    files.require_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RuadaptError, match=r"needs 1,000,000,000,000 MB but the disk has"):
        files.require_disk_space(tmp_path, 10**18)


def test_hash_tells_names_and_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    one = files.hash_path(tmp_path)
    (tmp_path / "a").write_text("2")
    two = files.hash_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({one, two, files.hash_path(tmp_path)}) == 3
    with pytest.raises(RuadaptError, match="does not exist"):
        files.hash_path(tmp_path / "none")


def test_corpora_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("раз\n\nдва\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("три\n")
    (tmp_path / "c.jsonl").write_text('\ufeff{"text": "четыре"}\n{"text": " "}\n', encoding="utf-8")
    (tmp_path / "ignored.md").write_text("пять")
    (tmp_path / "folder.txt" / ".ipynb_checkpoints").mkdir(parents=True)
    for copy in ("._d.txt", "folder.txt/.ipynb_checkpoints/d.txt"):
        (tmp_path / copy).write_bytes(b"\xff")
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "e.txt").write_text("\ufeffпять", encoding="utf-8")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert list(data_sets.read_texts(tmp_path)) == ["раз", "два", "три", "четыре", "пять"]
    before = files.hash_path(tmp_path)
    (elsewhere / "e.txt").write_text("шесть", encoding="utf-8")
    assert files.hash_path(tmp_path) != before
    (elsewhere / "back").symlink_to(tmp_path)
    with pytest.raises(RuadaptError, match="back"):
        files.hash_path(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "привет".encode("cp1251"), r"a\.txt is not UTF-8 .* save it as UTF-8"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl has no text in column 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "a JSON object was expected"),
        ("a.txt.gz", b"not gzip", "or damaged"),
        ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:12] + b"\xff" * 20, "or damaged"),
        ("a.parquet", b"x", r"a\.parquet cannot be read"),
        ("a.md", b"x", r"a\.md holds no rows; give a file or folder of \.parquet"),
    ],
)
def test_unreadable_corpora_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuadaptError, match=message):
        list(data_sets.read_texts(tmp_path / name))


def test_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="none does not exist; give a file or folder"):
        list(data_sets.read_texts(tmp_path / "none"))
