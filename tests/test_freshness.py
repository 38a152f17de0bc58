"""What makes a result stale, named; what is kept aside; and that the table of `freshness` tells the truth."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ruadapt import files, freshness
from ruadapt.errors import RuadaptError
from ruadapt.freshness import STAGES, UNITS, cached
from ruadapt.pipeline import runner

ROOT = freshness.ROOT


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what decides about freshness, with a finished run of every stage that was never computed."""
    for name in ("ruadapt", "paper", "notebooks", "profiles", "data/world", "data/pair", "data/published"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for language in ("ru", "en"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "text.txt").write_text("слово\n", encoding="utf-8")
    profile = tmp_path / "profiles" / "mini.yaml"
    profile.write_text(
        f"{profile.read_text(encoding='utf-8')}corpus_ru: ~/ru\ncorpus_en: ~/en\n", encoding="utf-8"
    )
    pipeline = runner.Pipeline("mini", (), tmp_path)
    for stage in pipeline.stages:
        (pipeline.folder / stage.name).mkdir(parents=True)
        (pipeline.folder / stage.name / "result.csv").write_text(stage.name)
        (pipeline.folder / stage.name / "curve.png").write_text("picture")
    for stage in pipeline.stages:
        record = {"status": "done", **pipeline.made_of(stage), **pipeline.outputs(stage)}
        files.write_json(pipeline.record_path(stage.name), record)
    return tmp_path


def states(root: Path, *settings: str) -> dict[str, str]:
    """Return the first two words of the number and the whole state of every stage that is not fresh."""
    found = runner.Pipeline("mini", settings, root).states()
    return {name[:2]: state for name, state in found.items() if state}


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / file).read_text(encoding="utf-8")
        assert old in text
        (root / file).write_text(text.replace(old, new), encoding="utf-8")

    return change


def append(file: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / file).open("a", encoding="utf-8") as stream:
            stream.write(text)

    return change


def edit_cell(name: str, cell_type: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = next(cell for cell in reversed(notebook["cells"]) if cell["cell_type"] == cell_type)
        cell["source"] = ["".join(cell["source"]), text]
        path.write_text(json.dumps(notebook), encoding="utf-8")

    return change


def behind(stage: str) -> set[str]:
    """Return the numbers of the stages that read `stage`, directly or not."""
    stale = {stage}
    for name, declared in STAGES.items():
        if any(place.partition("/")[0] in stale for place in declared.reads.split()):
            stale.add(name)
    return {name[:2] for name in stale - {stage}}


LOSS, FIT = "ruadapt/training/losses.py", "ruadapt/lep/methods.py"
SCORER, TASK = "ruadapt/evaluation/scoring.py", "ruadapt/evaluation/lm_eval_tasks/_free.yaml"
COMMENT = '\n# A remark.\n\n\ndef _f(x: int) -> int:\n    """Say."""\n    return x\n'
MUTATIONS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # change: what is done, the first stage that is stale, its reason
    "the loss doubled": (append(LOSS, "\nFACTOR = 2\n"), "02_model_pair", f"{LOSS} changed"),
    "a way to fit": (append(FIT, "\nX = 1\n"), "06_lep", f"{FIT} changed"),
    "a vocabulary's training": (
        append("ruadapt/vocab/train.py", "\nX = 1\n"),
        "03_tokenizers",
        "ruadapt/vocab/train.py changed",
    ),
    "chat data": (
        append("ruadapt/training/chats.py", "\nX = 1\n"),
        "01_corpus",
        "ruadapt/training/chats.py changed",
    ),
    "statistics": (
        append("ruadapt/evaluation/statistics.py", "\nX = 1\n"),
        "08_evaluation",
        "ruadapt/evaluation/statistics.py changed",
    ),
    "own text under ~": (append("ru/text.txt", "другое\n"), "01_corpus", "input corpus_ru changed"),
    "the embedded corpus": (append("data/world/corpus/new.jsonl", "\n"), "01_corpus", "input corpus changed"),
    "the pair": (append("data/pair/base/config.json", " "), "02_model_pair", "input pair_dir changed"),
    "a scorer": (append(SCORER, "\nX = 1\n"), "08_evaluation", f"{SCORER} changed"),
    "a task": (append(TASK, "\n# x\n"), "08_evaluation", f"{TASK} changed"),
    "a cell": (
        edit_cell("06_lep", "code", "\nx = 1"),
        "06_lep",
        "cell cell-15 changed",
    ),
    "a result by hand": (
        append("runs/mini/03_tokenizers/result.csv", "1"),
        "03_tokenizers",
        "its result was changed or removed",
    ),
}


@pytest.mark.parametrize("change", MUTATIONS)
def test_a_change_makes_its_stage_stale_and_those_that_read_it(repository: Path, change: str) -> None:
    assert states(repository) == {}
    mutate, stage, reason = MUTATIONS[change]
    mutate(repository)
    found = {name: why for name, why in states(repository).items() if not why.startswith("draws again")}
    assert found.pop(stage[:2]) == f"stale: {reason}"
    assert set(found) == behind(stage)
    said = ("stale: reads ", f"stale: {reason}", "stale: result of ")
    assert all(why.startswith(said) for why in found.values())


def test_drawing_is_not_computing(repository: Path) -> None:
    replace("paper/plots.py", "DOUBLE = ", "DOUBLE = 1 + ")(repository)
    assert set(states(repository).values()) == {"draws again: paper/plots.py changed"}
    assert len(states(repository)) == 9


def test_prose_and_lost_pictures_only_draw_again(repository: Path) -> None:
    edit_cell("05_continued_pretraining", "markdown", " A remark.")(repository)
    (repository / "runs" / "mini" / "07_calibration" / "curve.png").unlink()
    assert states(repository) == {
        "05": "draws again: the text of the notebook changed",
        "07": "draws again: a picture is missing",
    }


def test_comments_docstrings_and_layout_are_no_code(repository: Path) -> None:
    text = (repository / LOSS).read_text(encoding="utf-8")
    (repository / LOSS).write_text(text.replace('"""', '"""Said otherwise. ', 1), encoding="utf-8")
    append(LOSS, "\n\n# A remark.\n")(repository)
    assert states(repository) == {}


def test_a_library_and_a_parameter_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freshness.installed_version.cache_clear()
    real = freshness.version
    monkeypatch.setattr(freshness, "version", lambda name: "9.9" if name == "peft" else real(name))
    found = states(repository, "added_rows=1999")
    freshness.installed_version.cache_clear()
    assert found["03"] == "stale: parameter added_rows changed"
    assert found["05"] == f"stale: version of peft changed ({real('peft')} → 9.9)"
    assert "01" not in found


def test_a_data_set_of_a_mix_is_an_input(repository: Path) -> None:
    pipeline = runner.Pipeline("mini", ["corpus_mix=[{source: ~/ru}, {source: hub/name}]"], repository)
    found = pipeline.made_of(pipeline.stages[0])["key"]["inputs"]
    assert found["corpus_mix: ~/ru"] == files.hash_path(repository / "ru")
    assert {*found} == {"corpus_ru", "corpus_en", "corpus_mix: ~/ru", "corpus"}


def test_places_of_home_and_texts_longer_than_a_name_are_taken_as_they_are(repository: Path) -> None:
    template = "{{ messages[0].content }}" * 15
    pipeline = runner.Pipeline("mini", ["run_dir=~/{a} runs", f"chat_template={template}"], repository)
    assert pipeline.folder == repository / "{a} runs"
    key = pipeline.made_of(pipeline.stages[1])["key"]
    assert key["parameters"]["chat_template"] == template and {*key["inputs"]} == {"pair_dir"}


def test_a_stage_that_is_not_declared_is_refused() -> None:
    with pytest.raises(RuadaptError, match=r"10_own is not declared: say in ruadapt/freshness\.py"):
        freshness.stage_state("10_own")


# Units


def build(folder: Path) -> None:
    (folder / "x.txt").write_text(str(len(list(folder.parent.glob("**/x.txt")))))


@pytest.fixture
def code_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kind of unit with one file of code, in a repository of its own."""
    (tmp_path / "fit.py").write_text("x = 1\n")
    monkeypatch.setitem(UNITS, "toy", "fit.py")
    real = freshness.state
    monkeypatch.setattr(freshness, "state", lambda unit: real(unit, root=tmp_path))
    return tmp_path / "fit.py"


def test_a_stale_unit_is_named_kept_and_made_anew(
    tmp_path: Path, code_of_one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    unit = run / "05_continued_pretraining" / "bpe" / "seed1"
    key = {"options": {"learning_rate": 0.1, "seeds": (1, 2)}, "steps": 3}
    for _ in range(2):
        cached(unit, key, build, "toy")
    (unit / "mine.txt").write_text("a user's own")
    assert not caplog.records and not (run / "stale").exists()
    changed = [
        (
            key | {"options": {"learning_rate": 0.2, "seeds": [1, 2]}},
            "parameter options.learning_rate changed",
        ),
        (key, "parameter options.learning_rate changed"),
    ]
    for number, (wanted, reason) in enumerate(changed, start=1):
        cached(unit, wanted, build, "toy")
        assert f"seed1 is stale: {reason}; it is made anew" in caplog.records[-1].getMessage()
        assert (run / "stale" / "05_continued_pretraining" / "bpe" / f"seed1-{number}" / "x.txt").exists()
    assert (run / "stale" / "05_continued_pretraining" / "bpe" / "seed1-1" / "mine.txt").exists()
    code_of_one.write_text("x = 1  # one\n")
    cached(unit, key, build, "toy")
    assert len(caplog.records) == 2
    code_of_one.write_text("x = 2\n")
    cached(unit, key, build, "toy")
    assert "seed1 is stale: fit.py changed; " in caplog.records[-1].getMessage()


def test_a_unit_of_an_earlier_version_is_stale_and_one_of_a_user_is_kept(
    tmp_path: Path, code_of_one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("old", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("x")
    files.write_json(tmp_path / "old" / "key.json", {"steps": 3})
    for name in ("old", "own"):
        cached(tmp_path / name, {"steps": 3}, build, "toy")
        assert f"{name} is stale: nothing here tells what it was" in caplog.records[-1].getMessage()
        assert (tmp_path / "stale" / f"{name}-1" / "mine.txt").exists()


def test_a_build_that_fails_leaves_the_old_unit(tmp_path: Path, code_of_one: Path) -> None:
    cached(tmp_path / "unit", {"steps": 1}, build, "toy")
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path / "unit", {"steps": 2}, lambda folder: 1 / 0, "toy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.py", "unit"]
    assert files.read_json(tmp_path / "unit" / "key.json")["key"] == {"steps": 1}


def test_a_process_with_old_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(freshness.LOADED, LOSS, 1)
    with pytest.raises(RuadaptError, match=r"losses\.py was changed .* restart the kernel"):
        cached(tmp_path / "unit", {}, build, "pretrain")
    cached(tmp_path / "unit", {}, build, "vocabulary")


def test_a_notebooks_own_cell_is_code(
    tmp_path: Path, code_of_one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, value in enumerate((1, 1, 2)):
        path = tmp_path / f"cell{number}.py"
        path.write_text(f"def build(folder):  # {number}\n    (folder / 'x.txt').write_text('{value}')\n")
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(path.read_text(), str(path), "exec"), names)
        cached(tmp_path / "unit", {}, names["build"], "toy")
    assert [record.getMessage().count("the cell that builds it changed") for record in caplog.records] == [1]
    assert (tmp_path / "unit" / "x.txt").read_text() == "2"


def test_results_are_told_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.csv").write_text("1")
    before = freshness.result_hash(tmp_path)
    for name in ("a/x.png", "a/x.pdf", "a/key.json", "a/training.json", "tensorboard/x", ".x.part/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("2")
    assert freshness.result_hash(tmp_path) == before
    (tmp_path / "a" / "x.csv").write_text("2")
    assert len({freshness.result_hash(tmp_path), before, freshness.result_hash(tmp_path / "none")}) == 3


# The table

# Code that decides where and when work runs, or where its input comes from, and never what comes out.
PLUMBING = {"errors", "files", "freshness", "hub", "training/parallel"}
# The functions of this module belong to two stages; it is followed for neither.
SHARED = "pipeline/adaptation"
# Names of columns, files, tensors and methods: where one changes, a finished unit is not another.
NAMES = {"ITEM_COLUMNS", "MICRO", "FINDING_COLUMNS", "TOKENIZER_FILES"}


def module(path: str) -> str:
    return path.removeprefix("ruadapt/").removesuffix(".py")


def used(source: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of all that `source` takes from this package."""
    tree = ast.parse(source)
    taken = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ruadapt"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in taken:
            yield definition(*taken[node.id]), node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken:
            yield definition(".".join(taken[node.value.id]), node.attr), node.attr


def definition(package: str, name: str) -> str:
    """Return the module that defines `package.name`, or that a package takes it from."""
    path = ROOT.joinpath(*package.split("."))
    for file in (path / f"{name}.py", path / name / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return module(file.relative_to(ROOT).as_posix())
    source = (path / "__init__.py").read_text(encoding="utf-8") if path.is_dir() else ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return definition(str(node.module), name)
    return f"{package.removeprefix('ruadapt.').replace('.', '/')}/__init__"


def undeclared(source: str, declared: set[str]) -> set[str]:
    return {
        f"{name} of {place}"
        for place, name in used(source)
        if place not in declared | PLUMBING and not place.endswith("__init__") and name not in NAMES
    }


@pytest.mark.parametrize("unit", UNITS)
def test_all_code_that_a_unit_uses_is_declared(unit: str) -> None:
    files = [path for path in freshness.state(unit)["code"] if path.endswith(".py")]
    declared = {module(path) for path in files}
    for path in files:
        if module(path) != SHARED:
            assert undeclared((ROOT / path).read_text(encoding="utf-8"), declared) == set(), path


def test_what_answers_are_made_with_is_declared() -> None:
    source = (ROOT / "ruadapt" / "evaluation" / "asking.py").read_text(encoding="utf-8")
    declared = {module(path) for path in freshness.state("ask", "served")["code"]}
    assert undeclared(source, declared) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_a_notebook_uses_and_reads_is_declared(stage: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    declared = STAGES[stage]
    state = freshness.stage_state(stage)
    known = {module(path) for path in {*state["code"], *freshness.code(declared.draws)}}
    assert undeclared(source, known | {"pipeline/runner", "reporting/provenance"}) == set()
    read = {place.partition("/")[0] for place in declared.reads.split()}
    assert set(re.findall(r'run\.needs\("(\w+)"\)', source)) <= read
    assert set(re.findall(r'unit="(\w+)"', source)) <= {*declared.units.split()}
    assert {name.replace(".", "/") for name in re.findall(r'"ruadapt\.([\w.]+):', source)} <= known


def test_every_declared_file_exists() -> None:
    parts = [*UNITS.values(), *(f"{one.code} {one.draws}" for one in STAGES.values())]
    for name in set(" ".join(parts).split()):
        known = freshness.installed_version(name[1:]) if name.startswith("@") else freshness.code(name)
        assert known, name
    assert set(STAGES) == {path.stem for path in (ROOT / "notebooks").glob("0*.ipynb")}
