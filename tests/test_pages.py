"""Executed notebooks as pages that a code host shows: every figure, tables without style sheets."""

import importlib.util
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from ruadapt.files import project_root

LINK = re.compile(r"\]\(([^)\s]+)\)")
DRAW = "figure, ax = plots.panels(); ax.plot([{}, 1]); plots.save_figure(figure, '{}')"


def test_every_figure_of_a_notebook_is_on_its_page(tmp_path: Path) -> None:
    cells = ["import pandas as pd\nfrom paper import plots"]
    cells += [DRAW.format(number, tmp_path / f"figure{number}") for number in (2, 3)]
    cells += ["pd.DataFrame({'text': ['one\\ntwo']})"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    linked = "[page](../docs/devices.md#x), [next](02_model_pair.ipynb), [paper](https://arxiv.org/abs/1)"
    notebook.cells.append(nbformat.v4.new_markdown_cell(linked))
    NotebookClient(notebook, kernel_name="python3").execute(cwd=str(project_root()))
    nbformat.write(notebook, tmp_path / "shown.ipynb")
    spec = importlib.util.spec_from_file_location("render", project_root() / "docs" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    render.render(tmp_path / "shown.ipynb", tmp_path)
    links = LINK.findall((tmp_path / "shown.md").read_text(encoding="utf-8"))
    assert "https://arxiv.org/abs/1" in links and len(links) == 5  # two of them pictures
    places = [(tmp_path / link.partition("#")[0]).resolve() for link in links if ":" not in link]
    assert project_root() / "notebooks" / "02_model_pair.ipynb" in places
    assert all(place.exists() for place in places)
    page = (tmp_path / "shown.md").read_text(encoding="utf-8")
    assert len(list((tmp_path / "shown").glob("*.png"))) == page.count("![png](shown/") == 2
    assert "<style" not in page and "class=" not in page
