"""Figures from gathered results: what is gathered, and that the repository's own are drawn again alike."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from matplotlib.testing.compare import compare_images
from test_report import make_items

from paper import collected
from paper.plan import Plan
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import ITEM_COLUMNS
from ruadapt.files import project_root, read_json, write_json
from ruadapt.vocab.registry import ORIGINAL

ROOT = project_root()
PARAMETERS = {
    "seeds": [1, 2],
    "vocabularies": ["unigram", "extended"],
    "methods": ["swap", "conversion"],
    "lep_method": "conversion",
    "calibration_vocabularies": ["extended"],
    "calibration_data": ["self", "instruct_copy"],
}


def fabricate(run: Path, parameters: Mapping[str, Any]) -> None:
    """Write what notebook 09 gathers of a run, with made-up scores."""
    plan = Plan(**parameters)
    vocabularies = [ORIGINAL, *plan.replaced()]
    tables = {"08_evaluation/items": make_items(plan, per_task=6)}
    texts = [
        (name, language, "held-out text", 1000, 400 - 60 * number)
        for number, name in enumerate(vocabularies)
        for language in ("ru", "en")
    ]
    columns = ["vocabulary", "language", "text", "characters", "tokens"]
    tables["08_evaluation/characters_per_token"] = pd.DataFrame(texts, columns=columns)
    times = [
        (name, 1000 * (number + 1), language, repeat, 300 + 60 * number + repeat, 400 + 90 * number, 0.002)
        for number, name in enumerate(vocabularies)
        for language in ("ru", "en")
        for repeat in range(3)
    ]
    tables["08_evaluation/speed"] = pd.DataFrame(times, columns=collected.TABLES["speed"][1])
    bits = [("original", ORIGINAL, "", language, 0.5) for language in ("ru", "en")]
    bits += [
        ("adapted", name, seed, language, 0.4 + 0.01 * number + 0.001 * seed)
        for number, name in enumerate(vocabularies)
        for seed in plan.seeds
        for language in ("ru", "en")
    ]
    tables["08_evaluation/bits_per_byte"] = pd.DataFrame(bits, columns=collected.TABLES["bits_per_byte"][1])
    curves = [
        (name, seed, tokens, "ru", 0.4 + 1 / (tokens / 1000 + 1 + seed))
        for name in vocabularies
        for seed in plan.seeds
        for tokens in range(0, 100_000, 10_000)
    ]
    tables["05_continued_pretraining/curves"] = pd.DataFrame(curves, columns=collected.TABLES["curves"][1])
    for name, table in tables.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        table.assign(further="x").to_csv(run / f"{name}.csv", index=False)
    write_json(
        run / "02_model_pair" / "pair.json", {"base": "data/pair/base", "instruct": "data/pair/instruct"}
    )
    (run / "03_tokenizers").mkdir()
    (run / "03_tokenizers" / "report.json").write_text("{}", encoding="utf-8")
    folder = run.resolve() / "corpus"
    record = {
        "status": "done",
        "key": {"parameters": {"corpus_ru": str(folder)}, "inputs": {f"a: {folder}": "1"}},
    }
    write_json(run / "provenance" / "05_continued_pretraining.json", record)
    write_json(run / "provenance" / "09_figures.json", record)


def draw(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Execute notebook 09 here, without a kernel, and return what its cells left."""
    notebook = read_json(ROOT / "notebooks" / "09_figures.ipynb")
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= {name: value for name, value in parameters.items() if name in names}
    plt.close("all")
    return names


def compare(first: Path, second: Path) -> None:
    """Compare the tables of two folders of figures, and the pictures where the same matplotlib drew them."""
    names = [sorted(path.name for path in folder.iterdir() if path.is_file()) for folder in (first, second)]
    assert names[0] == names[1]
    used = [read_json(folder / "manifest.json")["versions"]["matplotlib"] for folder in (first, second)]
    for name in names[0]:
        if name.endswith(".png") and used[0] == used[1]:
            assert compare_images(str(first / name), str(second / name), tol=1) is None, name
        elif name.endswith(".csv"):
            tables = [pd.read_csv(folder / name, keep_default_na=False) for folder in (first, second)]
            pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6, obj=name)
        elif name.endswith(".md") and name != "headline.md":
            assert (first / name).read_text().count("\n") == (second / name).read_text().count("\n")


def test_the_figures_of_the_repository_are_those_of_its_results(tmp_path: Path) -> None:
    source = ROOT / "data" / "results" / "mini"
    assert source.is_dir(), f"{source} is missing: run `ruadapt run mini`, which gathers the results"
    profile = yaml.safe_load((ROOT / "profiles" / "mini.yaml").read_text(encoding="utf-8"))
    draw(profile | {"collect_results": False, "figures_dir": str(tmp_path / "figures")})
    compare(ROOT / "figures", tmp_path / "figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fabricated") / "run"
    fabricate(folder, PARAMETERS)
    return folder


def test_a_run_of_ones_own_draws_from_what_it_gathered(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    draw({**PARAMETERS, "run_dir": str(own)})
    figures = own / "09_figures"
    for name in ("figure1", "figure2", "methods", "method_differences", "differences", "vocabulary_rows"):
        assert (figures / f"{name}.png").stat().st_size > 5_000
    # What was gathered is enough: without the run the same is drawn, somewhere else.
    shutil.move(figures / "results", tmp_path / "results")
    shutil.rmtree(own / "08_evaluation")
    again = {"collect_results": False, "results_dir": str(tmp_path / "results")}
    draw({**PARAMETERS, **again, "run_dir": str(tmp_path / "none"), "figures_dir": str(tmp_path / "figures")})
    compare(figures, tmp_path / "figures")
    assert not (tmp_path / "none").exists()


def test_one_method_and_one_seed_are_drawn_too(tmp_path: Path) -> None:
    few = PARAMETERS | {"seeds": [1], "methods": ["conversion"]}
    fabricate(tmp_path / "run", few)
    draw({**few, "run_dir": str(tmp_path / "run")})
    figures = tmp_path / "run" / "09_figures"
    assert "nothing to compare" in (figures / "headline.md").read_text(encoding="utf-8")
    assert not (figures / "methods_paired.csv").exists()


def test_gathered_results_are_small_whole_and_name_no_machine(run: Path, tmp_path: Path) -> None:
    collected.collect(run, tmp_path / "results")
    items = collected.read(tmp_path / "results", "items")
    written = collected.read(run / "08_evaluation", "items")[ITEM_COLUMNS]
    pd.testing.assert_frame_equal(items, written.astype(items.dtypes.to_dict()), check_dtype=False)
    assert (tmp_path / "results" / "items.parquet").stat().st_size < 10 * len(items)
    text = (tmp_path / "results" / "provenance.json").read_text(encoding="utf-8")
    assert str(run.resolve().parent) not in text and json.loads(text)["05_continued_pretraining"]["key"] == {
        "parameters": {"corpus_ru": "corpus"},
        "inputs": {"a: corpus": "1"},
    }
    assert "09_figures" not in text
    collected.collect(run, tmp_path / "results")  # an earlier collection is replaced
    (tmp_path / "results" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RuadaptError, match=r"other files \(mine\.txt\)"):
        collected.collect(run, tmp_path / "results")
    begun = shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("08_*"))
    collected.collect(begun, tmp_path / "some")
    assert not collected.read(tmp_path / "some", "curves").empty
    with pytest.raises(RuadaptError, match="collect_results"):
        collected.read(tmp_path / "some", "items")
    (tmp_path / "items.csv").write_text(",".join(ITEM_COLUMNS), encoding="utf-8")
    with pytest.raises(RuadaptError, match="no rows"):
        collected.read(tmp_path, "items")


def test_the_readme_includes_the_headline_as_it_was_computed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marker = "<!-- results -->"
    assert text.count(marker) == 2, f"README.md needs the headline between two lines {marker}"
    block = text.split(marker)[1]
    written = (ROOT / "figures" / "headline.md").read_text(encoding="utf-8")
    assert block.strip() == written.partition("\n\n")[2].strip()  # all but its first table
