"""Files written whole or not at all, hashed, and read with one clear error when they are unreadable."""

import glob
import gzip
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ruadapt.errors import RuadaptError


def project_root() -> Path:
    """Return the repository root: the folder that holds `pyproject.toml` above this package.

    Raises:
        RuadaptError: the package was installed away from its repository.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        raise RuadaptError(
            f"{root} is not the ruadapt repository; clone it and install with `pip install -e .` from there"
        )
    return root


def located(name: str | Path, root: Path | None = None) -> Path:
    """Return the path that a parameter names: from the home after `~`, else from the repository root."""
    return (root or project_root()) / Path(name).expanduser()


def source_named(name: str, root: Path | None = None) -> str:
    """Return the path that a parameter names if something is there, else the parameter: a name of the hub."""
    place = str(located(name, root))
    return place if name and os.path.exists(place) else name


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before work starts when the file system of `folder` has less than `needed_bytes` free.

    Raises:
        RuadaptError: not enough space; the message names both numbers.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise RuadaptError(
            f"{folder} needs {needed_bytes / 1e6:,.0f} MB but the disk has {free / 1e6:,.0f} MB free; "
            "free some space or write to another disk"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system where `folder` is or will be."""
    folder = linked_to(folder)
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def linked_to(path: Path | str) -> Path:
    """Return the place that a path stands for: a link stays, and what it leads to is written."""
    return Path(os.path.realpath(path))


def require_new_folder(target: Path) -> None:
    """Refuse before work starts to write over something, or where `atomic_folder` could not.

    The folders above it are made.

    Raises:
        RuadaptError: `target` is a file or a folder that is not empty, or can't be made.
    """
    place = linked_to(target)
    if os.path.isfile(place) or (os.path.isdir(place) and any(place.iterdir())):
        raise RuadaptError(f"{target} exists and is not empty; give a new folder")
    if os.path.ismount(place):
        raise RuadaptError(f"{target} is where a disk is mounted; give a folder below it")
    with scratch_folder(place):  # what the system does not allow, it says here
        pass


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, and remove it in the end.

    A locked file stands beside it from before it is made until after it is gone: what a killed process left
    for this target is removed, nothing else is.

    Raises:
        RuadaptError: the disk is full or the folder is not writable.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    lock = temporary.with_suffix(".part.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.????????.part.lock"):
            with suppress(Timeout), FileLock(left, blocking=False):
                shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                left.unlink(missing_ok=True)
        with FileLock(lock):
            temporary.mkdir()
            yield temporary
    except OSError as error:
        raise RuadaptError(f"cannot write {target}: {error}; check the disk and its permissions") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            lock.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder in a scratch folder; rename it to `target` on success, remove it on error.

    An existing `target` is replaced only once the new content is complete; a link stays, what it leads to is
    the target. What is written beside the new folder goes with the scratch folder.

    Raises:
        RuadaptError: as `scratch_folder`.
    """
    target = linked_to(target)
    with scratch_folder(target) as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        # Beside the scratch folder, which the next run sweeps: a kill between the renames loses nothing.
        old = scratch.with_suffix(".old")
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Write `text` (UTF-8) beside `path`, then rename.

    Raises:
        RuadaptError: the disk is full or the folder is not writable; `path` keeps its old content.
    """
    path = linked_to(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RuadaptError(f"cannot write {path}: {error}; check the disk and its permissions") from error


def read_json(path: Path, missing: Any = None) -> Any:
    """Read one JSON file, or return `missing` where there is no file and one is given.

    Raises:
        RuadaptError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise RuadaptError(f"{path} does not exist") from error
    except ValueError as error:  # no JSON, or not UTF-8
        raise RuadaptError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    atomic_write(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file.

    Raises:
        RuadaptError: the file is missing, is not UTF-8, or a line is not a JSON object (named by number).
    """
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RuadaptError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RuadaptError(f"{path}, line {number}: a JSON object was expected")
        yield row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def data_files(path: Path, endings: str | tuple[str, ...] = "") -> list[Path]:
    """Return a file, or the files in a folder and the folders below it, sorted.

    Linked folders count. Hidden files and folders do not: they are copies that Jupyter and macOS keep.

    Raises:
        RuadaptError: a folder can't be read, or a link leads to nothing or back.
    """

    def stop(error: OSError) -> None:
        raise RuadaptError(f"{error.filename} cannot be read: {error.strerror}") from error

    found = [] if path.is_dir() else [path]
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True) if path.is_dir() else ():
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in names if not name.startswith(".")]
        found += [Path(folder, name) for name in shown if name.lower().endswith(endings)]
    if lost := [file for file in found if file.is_symlink() and not file.exists()]:
        raise RuadaptError(f"{lost[0]} is a link to {os.readlink(lost[0])}, which does not exist")
    return sorted(file for file in found if file.is_file())


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, gzipped where its suffix is `.gz`; a byte order mark is no text.

    Raises:
        RuadaptError: the file is missing, is not UTF-8, or is damaged.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            yield from stream
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RuadaptError(
            f"{path} is not UTF-8 or damaged ({error}); get it again, or save it as UTF-8"
        ) from error
    except OSError as error:
        raise RuadaptError(f"{path} cannot be read: {error.strerror}") from error


def take_characters(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield whole texts until `characters` are reached, all of them for 0 or where they end before.

    Every vocabulary trains on the same text, however many tokens it makes of it.
    """
    taken = 0
    for text in texts:
        if characters and taken >= characters:
            return
        taken += len(text)
        yield text


def hash_path(path: Path, besides: Callable[[Path], bool] = lambda file: False) -> str:
    """Return the SHA-256 of a file, or of a folder's relative names and contents.

    Args:
        besides: says which files of a folder don't count, by their places in it.

    Raises:
        RuadaptError: the path does not exist.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        raise RuadaptError(f"{path} does not exist")
    digest = hashlib.sha256()
    for file in data_files(path):
        if not besides(name := file.relative_to(path)):
            digest.update(name.as_posix().encode() + b"\0" + hash_path(file).encode())
    return digest.hexdigest()
