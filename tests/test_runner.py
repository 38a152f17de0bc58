"""The runner on toy notebooks: freshness, resumption, refusals, failures, provenance."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from ruadapt import files, freshness
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.pipeline import runner, timing
from ruadapt.pipeline.stages import find_stage, find_stages, read_stage

FIRST_PARAMETERS = (
    'run_dir = "runs/mini"\nseeds = [1]\ncount = 2\nrate = 0.5\nsource = ""\ncorpus_ru = ""\nfigures_dir = ""'
)
FIRST = """
import pathlib
import helper
out = pathlib.Path(run_dir) / "01_first"
out.mkdir(parents=True, exist_ok=True)
for number in range(count):
    unit = out / f"unit{number}.txt"
    if not unit.exists():
        with (out / "built.log").open("a") as log:
            log.write(f"{number}\\n")
        unit.write_text(str(helper.double(number)))
print("progress", count)
"""
SECOND = """
import pathlib
run = pathlib.Path(run_dir)
out = run / "02_second"
out.mkdir(exist_ok=True)
(out / "sum.txt").write_text(str(sum(int(f.read_text()) for f in (run / "01_first").glob("unit*.txt"))))
"""


def write_notebook(path: Path, parameters: str, *cells: str) -> None:
    """Write a notebook: a title, the parameters cell, the code cells."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Toy"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(notebook), encoding="utf-8")


DECLARED = {
    "01_first": freshness.Stage(code="helper.py", draws="drawing.py"),
    "02_second": freshness.Stage(reads="01_first", draws="drawing.py"),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two small stages and one profile."""
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", FIRST_PARAMETERS, FIRST)
    write_notebook(tmp_path / "notebooks" / "02_second.ipynb", 'run_dir = "runs/mini"', SECOND)
    for name, stage in DECLARED.items():
        monkeypatch.setitem(freshness.STAGES, name, stage)
    monkeypatch.setattr(timing, "measured_speed", lambda: 2.0)
    (tmp_path / "drawing.py").write_text("colour = 1\n")
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "toy.yaml").write_text("seeds: [5]\ncount: 3\n")
    return tmp_path


def run(root: Path, *settings: str, **options: object) -> list[str]:
    return runner.run_profile("toy", settings=settings, root=root, announce=lambda line: None, **options)


def reason(root: Path, stage: str, *settings: str) -> str:
    return runner.Pipeline("toy", settings, root).states()[stage]


def test_a_fresh_run_is_skipped_and_each_change_is_seen(root: Path) -> None:
    folder = root / "runs" / "toy"
    built = folder / "01_first" / "built.log"
    assert run(root) == ["01_first", "02_second"]
    assert (folder / "02_second" / "sum.txt").read_text() == "6"
    assert run(root) == []

    # A parameter: the stage runs again, and finds its finished units.
    assert reason(root, "01_first", "count=4") == "stale: parameter count changed"
    assert reason(root, "02_second", "count=4") == "stale: reads 01_first, which is stale"
    assert run(root, "count=4") == ["01_first", "02_second"]
    assert built.read_text().split() == ["0", "1", "2", "3"]

    # Code that is declared. Nothing is removed: units know themselves what they were made of.
    (root / "helper.py").write_text("def double(x):\n    return x + x + 1\n")
    assert reason(root, "01_first", "count=4") == "stale: helper.py changed"
    assert run(root, "count=4", last="1") == ["01_first"]
    assert built.read_text().split() == ["0", "1", "2", "3"]
    # As nothing of the result changed, what reads it stays fresh.
    assert run(root, "count=4") == []

    # Code that draws: the page is made anew, and nothing behind it.
    (root / "drawing.py").write_text("colour = 2\n")
    assert reason(root, "01_first", "count=4") == "draws again: drawing.py changed"
    assert run(root, "count=4", last="1") == ["01_first"]
    assert reason(root, "02_second", "count=4") == "draws again: drawing.py changed"
    assert run(root, "count=4") == ["02_second"]

    # An input file, and a result changed by hand.
    (root / "words.txt").write_text("слово\n")
    named = "stale: parameter source changed, input source changed"
    assert reason(root, "01_first", "count=4", "source=words.txt") == named
    run(root, "count=4", "source=words.txt")
    (root / "words.txt").write_text("другое слово\n")
    assert reason(root, "01_first", "count=4", "source=words.txt") == "stale: input source changed"
    (folder / "02_second" / "sum.txt").write_text("0")
    run(root, "count=4", "source=words.txt", last="1")
    assert (
        reason(root, "02_second", "count=4", "source=words.txt") == "stale: its result was changed or removed"
    )


def test_provenance_tells_what_the_result_was_made_of(root: Path) -> None:
    run(root, "source=helper.py", last="first")
    record = read_json(root / "runs" / "toy" / "provenance" / "01_first.json")
    assert record["status"] == "done"
    assert record["key"]["parameters"] == {
        "run_dir": "runs/toy",
        "seeds": [5],
        "count": 3,
        "rate": 0.5,
        "source": "helper.py",
        "corpus_ru": "",
        "figures_dir": "",
    }
    assert record["key"]["inputs"] == {"source": files.hash_path(root / "helper.py")}
    assert record["versions"]["torch"].startswith("2.13")
    assert set(record["git"]) == {"commit", "dirty"}
    assert record["wall_clock_seconds"] > 0
    assert record["machine"]["speed"] == 2.0 and record["machine"]["cpus"] >= 1
    executed = read_json(root / "runs" / "toy" / "notebooks" / "01_first.ipynb")
    assert any("injected-parameters" in cell["metadata"].get("tags", []) for cell in executed["cells"])
    assert executed["cells"][-1]["outputs"][0]["text"] == ["progress 3\n"]


@pytest.mark.parametrize(
    ("profile", "settings", "message"),
    [
        ("tiny", [], "unknown profile 'tiny'.*Known: toy"),
        ("toy", ["cuont=4"], "unknown parameter 'cuont'; did you mean count.*Known: .*seeds"),
        ("toy", ["count=[4]"], "parameter count: .*does not fit"),
        ("toy", ["count=true"], "parameter count: True does not fit"),
        ("toy", ["count=4.5"], "parameter count: 4.5 does not fit"),
        ("toy", ["seeds=1"], "parameter seeds: 1 does not fit"),
        ("toy", ["seeds=[a]"], "parameter seeds: .*does not fit"),
        ("toy", ["rate=high"], "parameter rate: 'high' does not fit"),
        ("toy", ["count"], "write --set name=value"),
        ("toy", ["count=null"], "parameter count has no value.*--set count="),
        ("toy", ["seeds=[1"], "not YAML"),
        ("toy", ["corpus_ru=nowhere"], "data set nowhere cannot be read"),
        ("toy", ["corpus_ru=empty"], "empty holds no rows"),
        ("toy", ["corpus_ru=latin.txt"], "latin.txt is not UTF-8"),
    ],
)
def test_mistakes_are_refused_before_work(
    root: Path, profile: str, settings: list[str], message: str
) -> None:
    (root / "empty").mkdir()
    (root / "latin.txt").write_bytes("слово".encode("cp1251"))
    with pytest.raises(RuadaptError, match=message):
        runner.run_profile(profile, settings=settings, root=root)
    assert not (root / "runs").exists()


def test_values_take_the_type_of_the_notebook(root: Path) -> None:
    given = ["rate=1e-3", "source=2024-01-01", "seeds=[]", "corpus_ru=", "figures_dir='{a} #1'"]
    values = runner.Pipeline("toy", given, root).values
    expected = {"rate": 0.001, "source": "2024-01-01", "seeds": [], "corpus_ru": "", "figures_dir": "{a} #1"}
    assert values == {"run_dir": "runs/toy", "count": 3} | expected
    assert runner.Pipeline("toy", ["source={a} #1"], root).values["source"] == "{a} #1"


def test_stage_names_and_ranges(root: Path) -> None:
    stages = find_stages(root / "notebooks")
    for name in ("2", "02", "second", "02_second"):
        assert find_stage(name, stages) == 1
    with pytest.raises(RuadaptError, match=r"unknown stage 'secnd'; did you mean 02_second.*01_first"):
        find_stage("secnd", stages)
    with pytest.raises(RuadaptError, match=r"unknown stage '0'.*Known: 01_first, 02_second"):
        find_stage("0", stages)
    with pytest.raises(RuadaptError, match="comes after"):
        run(root, first="2", last="1")


def test_a_profile_names_its_last_stage(root: Path) -> None:
    (root / "profiles" / "toy.yaml").write_text("until: first\ncount: 0\n")
    assert runner.Pipeline("toy", (), root).last == "first"
    (root / "profiles" / "toy.yaml").write_text("- a\n")
    with pytest.raises(RuadaptError, match="must hold lines"):
        runner.Pipeline("toy", (), root)


@pytest.mark.parametrize("source", ["x = y", "import os", "x = [1 for _ in y]", "x, y = 1, 2"])
def test_parameters_are_literals(tmp_path: Path, source: str) -> None:
    write_notebook(tmp_path / "01_bad.ipynb", source)
    with pytest.raises(RuadaptError, match="of literals only"):
        read_stage(tmp_path / "01_bad.ipynb")


def test_full_disk_and_unwritable_folder_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(RuadaptError, match=r"needs .* MB but the disk has 0 MB free"):
        run(root)
    monkeypatch.undo()
    (root / "runs").write_text("a file where the folder should be")
    with pytest.raises(RuadaptError, match="cannot write to"):
        run(root)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["x = 1", "1 / 0", "x = 2"],
            r"01_first.ipynb: ZeroDivisionError: division by zero\n.*In \[4\] of .*01_first.ipynb",
        ),
        (
            ["from ruadapt.errors import RuadaptError\nraise RuadaptError('the corpus is empty')"],
            r"01_first.ipynb: the corpus is empty\n",
        ),
        (
            [
                "import os\nos.abort()",
                "2",
            ],
            r"01_first.ipynb: the kernel ended",
        ),
    ],
    ids=["error", "mistake", "dead-kernel"],
)
def test_a_failed_stage_names_its_cell(root: Path, cells: list[str], message: str) -> None:
    write_notebook(root / "notebooks" / "01_first.ipynb", FIRST_PARAMETERS, *cells)
    with pytest.raises(RuadaptError, match=message):
        run(root)
    record = read_json(root / "runs" / "toy" / "provenance" / "01_first.json")
    assert record["status"] == reason(root, "01_first") == "did not finish"
    assert (root / "runs" / "toy" / "notebooks" / "01_first.ipynb").exists()
    assert not (root / "runs" / "toy" / "02_second").exists()


SLOW = """
import os, pathlib, time
out = pathlib.Path(run_dir) / "01_first"
out.mkdir(parents=True, exist_ok=True)
for number in range(count):
    unit = out / f"unit{number}.txt"
    if unit.exists():
        continue
    (out / f".unit{number}.txt.part").write_text("half")
    (pathlib.Path(run_dir) / "kernel.pid").write_text(str(os.getpid()))
    time.sleep(60 if number == 1 and not pathlib.Path("go").exists() else 0)
    (out / f".unit{number}.txt.part").rename(unit)
"""
START = """
import signal
import sys
from pathlib import Path
from ruadapt import freshness
from ruadapt.pipeline.runner import run_profile
freshness.STAGES["01_first"] = freshness.Stage()
freshness.STAGES["02_second"] = freshness.Stage(reads="01_first")
# A shell's background job begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
run_profile("toy", root=Path(sys.argv[1]))
"""


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_stopped(root: Path, stop: signal.Signals) -> None:
    write_notebook(root / "notebooks" / "01_first.ipynb", FIRST_PARAMETERS, SLOW)
    run_dir = root / "runs" / "toy"
    started = subprocess.Popen(
        [sys.executable, "-c", START, str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        half = run_dir / "01_first" / ".unit1.txt.part"
        wait_for(half.exists)
        with pytest.raises(RuadaptError, match="in use by another run"):
            run(root)
        kernel = psutil.Process(int((run_dir / "kernel.pid").read_text()))
        started.send_signal(stop)
        started.communicate(timeout=180)
    finally:
        started.kill()
    # The kernel looks after its parent once a second.
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, seconds=15)
    first = (run_dir / "01_first" / "unit0.txt").stat().st_mtime_ns

    (root / "go").touch()
    assert reason(root, "01_first") == "did not finish"
    assert run(root, last="1") == ["01_first"]
    assert (run_dir / "01_first" / "unit0.txt").stat().st_mtime_ns == first
    assert sorted(path.name for path in (run_dir / "01_first").iterdir()) == [
        "unit0.txt",
        "unit1.txt",
        "unit2.txt",
    ]
    assert read_json(run_dir / "provenance" / "01_first.json")["resumed"]


def test_a_run_leaves_what_is_not_its_own(root: Path) -> None:
    run_dir = root / "runs" / "{a} a}b"
    (run_dir / "notes").mkdir(parents=True)
    own = [run_dir / "notes" / ".draft.old", run_dir / ".film.part", run_dir / ".01_first.1.part"]
    for path in own:
        path.write_text("mine")
    with files.atomic_folder(run_dir / "01_first") as live:  # as another command would
        (live / "weights").write_text("w")
        assert run(root, f"run_dir={run_dir}", last="1") == ["01_first"]
    assert (run_dir / "01_first" / "weights").exists() and all(path.exists() for path in own)


def test_force_starts_from_nothing_and_keeps_what_was_there(root: Path) -> None:
    run(root, last="1")
    (root / "runs" / "toy" / "01_first" / "mine.txt").touch()
    lines: list[str] = []
    assert runner.run_profile("toy", last="1", force=True, root=root, announce=lines.append) == ["01_first"]
    assert not (root / "runs" / "toy" / "01_first" / "mine.txt").exists()
    kept = root / "runs" / "toy" / "stale" / "01_first-1"
    assert sorted(path.name for path in kept.iterdir()) == [
        *("built.log", "mine.txt", "unit0.txt", "unit1.txt", "unit2.txt"),
    ]
    assert any(line.endswith(f"kept in {kept}") for line in lines)
    assert reason(root, "01_first") == ""


def test_a_run_says_how_long_it_will_take(root: Path) -> None:
    lines: list[str] = []
    runner.run_profile("toy", root=root, announce=lines.append)
    assert lines[0] == "no estimate: not run before"
    # Committed timings of a machine half as fast, with as many seeds, count before those of this folder.
    seeds = {"parameters": {"seeds": [1], "processes": 1}}
    timed = {"status": "done", "resumed": False, "machine": {"speed": 1.0, "cpus": 2}, "key": seeds}
    committed = {"01_first": timed | {"wall_clock_seconds": 1200.0}}
    committed["02_second"] = timed | {"wall_clock_seconds": 0.001}
    files.write_json(root / "data" / "results" / "toy" / "provenance.json", committed)
    lines.clear()
    runner.run_profile("toy", force=True, root=root, announce=lines.append)
    assert lines[0] == "about 10 min on this machine"
    assert lines[1] == "[1/2] 01_first: runs (asked for) about 10 min left"
    assert next(line for line in lines if line.startswith("[2/2]")).endswith("about 1 s left")


def test_an_estimate_is_scaled_by_speed_processes_and_seeds() -> None:
    record = {
        "status": "done",
        "resumed": False,
        "machine": {"speed": 3.0, "cpus": 4},
        "key": {"parameters": {"processes": 2, "seeds": [1, 2, 3]}},
        "wall_clock_seconds": 900.0,
    }
    records = {"a": record, "b": record | {"wall_clock_seconds": 1800.0}}
    here, asked = {"speed": 1.0, "cpus": 1}, {"processes": 2, "seeds": [1]}
    ahead = {"a": asked, "b": asked, "c": {}}
    assert timing.left(ahead, records, here) == "about 90 min left"
    ahead.pop("a")
    assert timing.left(ahead, records, here) == "about 60 min left"
    assert timing.left({"c": {}}, records, here) == ""


def test_a_kernel_of_the_users_home_is_not_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = root / "home" / "share"
    kernel = data / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(data))
    assert run(root, last="1") == ["01_first"]


def test_run_finds_folders_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.Run("runs/mini").folder == files.project_root() / "runs" / "mini"
    here = runner.Run(tmp_path / "here")
    with pytest.raises(RuadaptError, match=r"01_corpus is missing .*ruadapt run here --to 01_corpus"):
        here.needs("01_corpus")
    (here.stage("01_corpus") / "ru_train.jsonl").touch()
    assert here.needs("01_corpus") == tmp_path / "here" / "01_corpus"
    files.write_json(tmp_path / "here" / "provenance" / "01_corpus.json", {"status": "running"})
    with pytest.raises(RuadaptError, match="not finished"):
        here.needs("01_corpus")
    state = freshness.stage_state("01_corpus")
    record = {"status": "done", "key": {"parameters": {}, **state}}
    files.write_json(tmp_path / "here" / "provenance" / "01_corpus.json", record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here.needs("01_corpus")
    state["code"]["ruadapt/training/mixing.py"] = "other"
    files.write_json(tmp_path / "here" / "provenance" / "01_corpus.json", record)
    with pytest.warns(UserWarning, match=r"01_corpus is stale: ruadapt/training/mixing.py changed; run"):
        here.needs("01_corpus")


def test_command_line_shows_mistakes_without_traceback() -> None:
    command = [sys.executable, "-m", "ruadapt.cli", "run", "minni"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 2
    assert "unknown profile 'minni'; did you mean mini?" in done.stderr
    assert "Traceback" not in done.stderr
