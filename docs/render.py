"""A run's executed notebooks as pages with pictures: `python docs/render.py runs/mini [FOLDER]`."""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter


def cleaned(page: str) -> str:
    """Take out what a code host shows badly: style sheets, and line breaks within the cells of a table."""
    page = re.sub(r"<style.*?</style>\n?", "", page, flags=re.DOTALL)
    looks = r'\s+(?:class|id|style|border)="[^"]*"|\s+(?=>)'
    page = re.sub(r"<(?:table|tr|th|td)\b[^>]*>", lambda tag: re.sub(looks, "", tag[0]), page)
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace("\n", "<br>"), page, flags=re.DOTALL)


def relinked(text: str, target: Path) -> str:
    """Make links of a notebook, which start at `notebooks/`, start at the page's folder."""
    start = os.path.relpath(Path(__file__).parents[1] / "notebooks", target)
    own = r"\]\((?![a-z]+:|#)([^)\s]+)\)"
    return re.sub(own, lambda link: f"]({os.path.normpath(os.path.join(start, link[1]))})", text)


def render(notebook: Path, target: Path) -> None:
    """Write `NAME.md` into `target`, its pictures into `target/NAME/`; what stood there goes."""
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":  # progress is written to stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, target)
    name = notebook.stem
    resources = {"unique_key": "picture", "output_files_dir": name}
    page, resources = MarkdownExporter().from_notebook_node(content, resources)
    shutil.rmtree(target / name, ignore_errors=True)
    for path, picture in resources["outputs"].items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(picture)
    (target / f"{name}.md").write_text(cleaned(page).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    run, *rest = sys.argv[1:]
    for executed in sorted((Path(run) / "notebooks").glob("*.ipynb")):
        render(executed, Path(*rest or ["docs/notebooks"]))
