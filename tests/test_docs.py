"""The pages say what is there: links lead somewhere, commands and their options exist, profiles do."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from ruadapt.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)\)")


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "notebooks").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def commands() -> list[str]:
    """Return the lines of the pages' shell blocks that call `ruadapt`, with their continuations joined."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ]
    text = re.sub(r"\\\n", " ", "\n".join(blocks))
    found = re.findall(r"^\s*(?:[A-Z_]+=\S+ )*(ruadapt (?:'[^']*'|[^'\n])*)", text, flags=re.MULTILINE)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    while hasattr(command, "resolve_command"):
        _, command, words = command.resolve_command(typer.Context(command), words)
    # It parses the words and refuses what it does not know; nothing is called.
    context = command.make_context(command.name, words)
    if command.name in ("run", "stages"):
        assert (ROOT / "profiles" / f"{context.params['profile']}.yaml").exists() or "PROFILE" in line


def test_the_readme_is_a_door() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.encode()) <= 10_000
