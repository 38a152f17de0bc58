"""Program code as text: Python's own standard library, of the running version.

Its single modules are for measuring. Its packages are for training, `python -m benchmarks.code FILE` writes
them as JSON lines. So no text stands in both.
"""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ruadapt.files import write_jsonl

DOCUMENT = 2_000  # characters
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "encodings", "pydoc_data"}
"""Folders of other people's packages, of tests, of tables, and of what not every version has."""


def held_out() -> Iterator[str]:
    """Yield documents of the library's single modules, by name, in pieces."""
    return _pieces(sorted(_library().glob("[a-z]*.py")))


def training() -> Iterator[str]:
    """Yield documents of the library's packages, by name, in pieces."""
    places = (path.relative_to(_library()) for path in sorted(_library().glob("[a-z]*/**/*.py")))
    return _pieces(_library() / place for place in places if not LEFT_OUT & {*place.parts})


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _pieces(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        text = path.read_text("utf-8")
        for first in range(0, len(text), DOCUMENT):
            yield text[first : first + DOCUMENT]


def main(file: Annotated[Path, typer.Argument(help="The JSON lines to write.")]) -> None:
    """Write code to train on."""
    write_jsonl(file, ({"text": text} for text in training()))


if __name__ == "__main__":
    typer.run(main)
