"""What makes a result stale, named; what is kept aside; and that the table of `freshness` tells the truth."""

import ast
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ruadapt import checkpoints, files, freshness, lep, vocab
from ruadapt.checkpoints.completion import complete_instruct
from ruadapt.commands import comparison
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.catalogue import Benchmark, Catalogue
from ruadapt.evaluation.jobs import evaluate_job
from ruadapt.evaluation.speed import generation_speed
from ruadapt.freshness import STAGES, UNITS, cached
from ruadapt.pipeline import adaptation, runner
from ruadapt.training import chats, corpora, mixing, preference
from ruadapt.world import load_world

ROOT = freshness.ROOT
# Code that runs in every unit, or that decides where and when it runs, and never what comes out.
PLUMBING = {
    f"ruadapt/{name}.py" for name in ("errors", "freshness", "training/launching", "training/parallel")
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what decides about freshness, with a finished run of every stage that was never computed."""
    for name in ("ruadapt", "notebooks", "profiles", "data/world", "data/pair", "data/published"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUADAPT_REFERENCE", "")
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
        record = {"status": "done", "key": pipeline.key(stage), **pipeline.outputs(stage)}
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
        if any(place.partition("/")[0] in stale for place in declared.reads):
            stale.add(name)
    return {name[:2] for name in stale - {stage}}


LOSS, FIT = "ruadapt/training/losses.py", "ruadapt/lep/fit.py"
SCORER, TASK = "ruadapt/evaluation/scoring.py", "ruadapt/evaluation/lm_eval_tasks/_free.yaml"
COMMENT = '\n# A remark.\n\n\ndef _f(x: int) -> int:\n    """Say."""\n    return x\n'
MUTATIONS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # change: what is done, the first stage that is stale, its reason
    "the loss doubled": (append(LOSS, "\nFACTOR = 2\n"), "05_continued_pretraining", f"{LOSS} changed"),
    "a way to fit": (append(FIT, "\nX = 1\n"), "06_lep", f"{FIT} changed"),
    "a vocabulary's training": (
        append("ruadapt/vocab/train.py", "\nX = 1\n"),
        "03_tokenizers",
        "ruadapt/vocab/train.py changed",
    ),
    "calibration": (
        append("ruadapt/training/calibration.py", "\nX = 1\n"),
        "07_calibration",
        "ruadapt/training/calibration.py changed",
    ),
    "chat data": (
        append("ruadapt/training/chats.py", "\nX = 1\n"),
        "07_calibration",
        "ruadapt/training/chats.py changed",
    ),
    "statistics": (
        append("ruadapt/evaluation/statistics.py", "\nX = 1\n"),
        "08_evaluation",
        "ruadapt/evaluation/statistics.py changed",
    ),
    "own text under ~": (append("ru/text.txt", "другое\n"), "01_corpus", "input corpus_ru changed"),
    "the world": (append("data/world/foods.tsv", "\n"), "01_corpus", "input world_dir changed"),
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
    replace("ruadapt/reporting/plots.py", "DOUBLE = ", "DOUBLE = 1 + ")(repository)
    assert set(states(repository).values()) == {"draws again: ruadapt/reporting/plots.py changed"}
    assert len(states(repository)) == 9


def test_prose_and_lost_pictures_only_draw_again(repository: Path) -> None:
    edit_cell("05_continued_pretraining", "markdown", " A remark.")(repository)
    (repository / "runs" / "mini" / "07_calibration" / "curve.png").unlink()
    assert states(repository) == {
        "05": "draws again: the text of the notebook changed",
        "07": "draws again: curve.png is missing",
    }


def test_comments_docstrings_and_layout_are_no_code(repository: Path) -> None:
    text = (repository / LOSS).read_text(encoding="utf-8")
    (repository / LOSS).write_text(text.replace('"""', '"""Said otherwise. ', 1), encoding="utf-8")
    append(LOSS, "\n\n# A remark.\n")(repository)
    assert states(repository) == {}


def test_a_library_and_a_parameter_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freshness._version.cache_clear()
    real = freshness.version
    monkeypatch.setattr(freshness, "version", lambda name: "9.9" if name == "peft" else real(name))
    found = states(repository, "added_rows=1999")
    freshness._version.cache_clear()
    assert found["03"] == "stale: parameter added_rows changed"
    assert found["05"] == f"stale: version of peft changed ({real('peft')} → 9.9)"
    assert "01" not in found


def test_a_data_set_of_a_mix_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ru").write_text("a")
    mix = {"corpus_mix": [{"source": "~/ru"}, {"source": "hub/name"}], "figures_dir": "ru", "names": ["ru"]}
    found = runner.inputs(mix, [], tmp_path)
    assert found == dict.fromkeys(("corpus_mix: ~/ru", "names: ru"), files.hash_path(tmp_path / "ru"))


def test_a_stage_that_is_not_declared_is_refused() -> None:
    with pytest.raises(RuadaptError, match=r"10_own is not declared: say in ruadapt/freshness\.py"):
        freshness.stage_state("10_own", {})


# Units


def build(folder: Path) -> None:
    (folder / "x.txt").write_text(str(len(list(folder.parent.glob("**/x.txt")))))


@pytest.fixture
def code_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kind of unit with one file of code, in a repository of its own."""
    (tmp_path / "fit.py").write_text("x = 1\n")
    monkeypatch.setitem(UNITS, "toy", freshness.Unit(("fit.py",), ("torch",)))
    real = freshness.unit_state
    monkeypatch.setattr(freshness, "unit_state", lambda unit: real(unit, tmp_path))
    monkeypatch.setattr(freshness, "_refuse_old_code", lambda unit: None)
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
        (key | {"options": {"learning_rate": 0.2, "seeds": [1, 2]}}, "parameter learning_rate changed"),
        (key, "parameter learning_rate changed"),
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
    for name, reason in {
        "old": "made by an earlier version of ruadapt",
        "own": "it holds no key.json",
    }.items():
        cached(tmp_path / name, {"steps": 3}, build, "toy")
        assert f"{name} is stale: {reason}" in caplog.records[-1].getMessage()
        assert (tmp_path / "stale" / f"{name}-1" / "mine.txt").exists()


def test_a_build_that_fails_leaves_the_old_unit(tmp_path: Path, code_of_one: Path) -> None:
    cached(tmp_path / "unit", {"steps": 1}, build, "toy")
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path / "unit", {"steps": 2}, lambda folder: 1 / 0, "toy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.py", "unit"]
    assert files.read_json(tmp_path / "unit" / "key.json")["key"] == {"steps": 1}


def test_a_process_with_old_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(freshness._LOADED, LOSS, 1)
    with pytest.raises(RuadaptError, match=r"losses\.py was changed .* restart the kernel"):
        cached(tmp_path / "unit", {}, build, "pretrain")
    monkeypatch.delitem(sys.modules, "ruadapt.training.losses")
    cached(tmp_path / "unit", {}, build, "pretrain")


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

WORLD_OPTIONS = {
    "seed": 0, "russian_characters": 3000, "english_characters": 3000, "heldout_documents": 3,
    "chat_count": 20, "prompt_count": 4, "russian_share": 0.5, "items_per_task": 1,
}  # fmt: skip
EMBEDDED = ROOT / "data" / "pair" / "instruct"  # answers, where a random model never ends
CHAT = [{"role": "user", "content": "Кто?"}, {"role": "assistant", "content": "Врач."}]
FAST = {"batch_size": 2, "learning_rate": 1e-3, "seed": 1}


class Tiny:
    """Every kind of unit, as the notebooks make it, on next to nothing."""

    def __init__(self, folder: Path, tiny_pair: TinyPair) -> None:
        self.folder, self.pair = folder, tiny_pair
        self.texts = {}
        for language, text in {"ru": RUSSIAN, "en": ENGLISH}.items():
            self.texts[language] = folder / f"{language}.jsonl"
            files.write_jsonl(self.texts[language], ({"text": line} for line in text.splitlines() * 4))
        self.chat = folder / "chat.jsonl"
        files.write_jsonl(self.chat, ({"messages": CHAT} for _ in range(8)))
        self.pairs = folder / "pairs.jsonl"
        rows = ({"prompt": f"Где {n}?", "chosen": "Тут.", "rejected": "Нет."} for n in range(8))
        files.write_jsonl(self.pairs, rows)
        self.world = load_world(ROOT / "data" / "world")

    def new(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def vocabulary(self) -> None:
        lines = RUSSIAN.splitlines() * 40
        old = self.pair.instruct
        for name, made in {
            "extended": lambda: vocab.extend(old, lines, 20),
            "optimized": lambda: vocab.optimize(old, lines, 400, 100, used_on=ENGLISH.splitlines()),
            "bpe": lambda: vocab.train_replacement(lines, old, "bpe", 400),
            "unigram": lambda: vocab.train_replacement(lines, old, "unigram", 400),
        }.items():
            vocab.save_tokenizer(self.new(name), made(), old)

    def corpus(self) -> None:
        corpora.write_world_corpus(load_world(ROOT / "data" / "world"), self.new("world"), **WORLD_OPTIONS)
        own = self.folder / "own.txt"
        own.write_text("".join(f"строка слов {n}\n" for n in range(60)), encoding="utf-8")
        corpora.write_text_corpus(own, self.new("own"), "ru", characters=0, heldout_documents=4, seed=0)
        rows = [{"source": str(path), "language": name, "weight": 1.0} for name, path in self.texts.items()]
        filters = mixing.Filters(10, 0, 0.5, 0.8)
        settings = {"filters": filters, "heldout_documents": 1, "heldout_share": 0.2, "seed": 0}
        corpora.mixed(rows, self.folder, {"ru": 500, "en": 500}, **settings)[1](self.new("mixed"))

    def complete(self) -> None:
        (self.folder / "template.jinja").write_text("{{ messages }}")
        model = AutoModelForCausalLM.from_pretrained(self.pair.base)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(self.folder / "adapter")
        template = str(self.folder / "template.jinja")
        complete_instruct(self.pair.base, self.folder / "adapter", template, self.folder / "whole")

    def extended(self) -> Path:
        target = self.new("extended")
        vocab.save_tokenizer(
            target, vocab.extend(self.pair.base, RUSSIAN.splitlines() * 40, 20), self.pair.base
        )
        return target

    def initialise(self, tokens: Path) -> None:
        checkpoints.initialise(self.pair.base, tokens, self.folder / "initialised", norm_correction=True)
        checkpoints.verify(self.folder / "initialised", self.pair.base)

    def adapt(self, train: str, **options: Any) -> None:
        adaptation.adapt(
            self.pair.base,
            self.folder / train,
            self.texts["ru"],
            self.texts,
            characters=2000,
            epochs=1,
            evaluations=1,
            documents=1,
            block_size=32,
            options=FAST | {"train": train, "save_every": 2} | options,
            original=self.pair.base,
            tokens=self.folder / "tokens",
        )

    def pretrain(self) -> None:
        self.adapt("embeddings")
        self.adapt("all")

    def propagate(self, adapted: Path) -> None:
        for method in lep.METHODS:
            target = self.folder / method
            checkpoints.propagate(self.pair.base, self.pair.instruct, adapted, target, method)
            checkpoints.verify(target, self.pair.instruct)
        rows = checkpoints.read_embeddings(adapted).matrices()
        lep.compare(rows["input"], checkpoints.read_embeddings(target).matrices()["input"])

    def write_chats(self) -> None:
        wanted = {"dataset": self.chat, "prompts": self.chat, "rows": 0, "min_score": 0}
        texts = {name: self.folder / f"long_{name}.jsonl" for name in self.texts}
        for path in texts.values():
            files.write_jsonl(path, [{"text": "Старый капитан видел море. " * 200}])
        target = self.new("chats")
        chats.write_chat_data(target, texts=texts, prompt_rows=2, copy_rows=2, seed=0, **wanted)
        chats.write_preferences(target, self.pairs, rows=0, heldout=2, seed=0)

    def answer(self) -> None:
        files.write_jsonl(self.folder / "prompts.jsonl", [{"messages": CHAT[:1]}] * 2)
        places = (self.folder / "prompts.jsonl", self.folder / "answers")
        adaptation.answer(EMBEDDED, *places, part=0, parts=1, max_new_tokens=60)

    def calibrate(self) -> None:
        options = FAST | {"steps": 2, "lora_rank": 2, "max_length": 64, "merge_scale": 0.5}
        adaptation.calibrate(self.pair.instruct, self.folder / "tuned", [self.chat], self.chat, 0.2, options)

    def prefer(self) -> None:
        rows = [
            {side: [{"role": role, "content": row[side]}] for side, role in SIDES.items()}
            for row in files.read_jsonl(self.pairs)
        ]
        files.write_jsonl(self.folder / "messages.jsonl", rows)
        options = FAST | {"steps": 1, "lora_rank": 2, "max_length": 64}
        data = (self.folder / "messages.jsonl",) * 2
        for method in ("dpo", "kto", "simpo"):
            preference.prefer(self.pair.instruct, self.folder / method, *data, method, options)

    def evaluate(self, benchmark: Benchmark, asked: dict[str, str]) -> None:
        labels = dict.fromkeys(("model", "stage", "vocabulary", "method", "calibration", "seed"), "")
        options = {"benchmark": benchmark, "asked": asked, "context": 64, "stride": 32}
        evaluate_job(EMBEDDED, self.folder / "evaluated", labels, texts={"ru": self.texts["ru"]}, **options)

    def compare(self, catalogue: Catalogue) -> None:
        texts = {"ru": RUSSIAN.splitlines()[:2]}
        models = {"instruct": self.pair.instruct}
        found = comparison.measure_models(models, catalogue, texts, self.folder / "kept", items_per_task=1)
        assert found.errors.empty

    def speed(self) -> None:
        generation_speed({"original": self.pair.instruct}, {"ru": [("Кто?", "Врач.")]}, repeats=1)


SIDES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def executed(work: Callable[[], None]) -> set[str]:
    """Return the files of this package whose functions run in `work`, by their path from the repository."""
    ran = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            ran.add(frame.f_code)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    package = str(ROOT / "ruadapt")
    # Modules and classes that are only imported run as code that is not that of a function.
    functions = [code for code in ran if code.co_flags & inspect.CO_OPTIMIZED]
    return {
        Path(code.co_filename).relative_to(ROOT).as_posix()
        for code in functions
        if code.co_filename.startswith(package)
    }


def works(tiny: Tiny, unit: str) -> Callable[[], None]:
    """Return what makes a unit, with all that is no part of it prepared."""
    if unit == "initialise":
        tokens = tiny.extended()
        return lambda: tiny.initialise(tokens)
    if unit == "propagate":
        tiny.initialise(tiny.extended())
        return lambda: tiny.propagate(tiny.folder / "initialised")
    if unit == "evaluate":
        benchmark = Benchmark(["world"], chat=False, shots=1, items_per_task=1)
        asked = benchmark.fingerprints()
        return lambda: tiny.evaluate(benchmark, asked)
    if unit == "compare":
        catalogue = Catalogue(["world_copy_sentence_en"])
        return lambda: tiny.compare(catalogue)
    if unit == "pack":
        place = (tiny.texts["ru"], tiny.pair.base, 500, 16, tiny.folder / "tokens")
        return lambda: adaptation.packed(*place) and None
    names = {"completed pair": "complete", "chats": "write_chats"}
    return getattr(tiny, names.get(unit, unit))


@pytest.mark.parametrize("unit", UNITS)
def test_all_code_that_makes_a_unit_is_declared(unit: str, tiny_pair: TinyPair, tmp_path: Path) -> None:
    work = works(Tiny(tmp_path, tiny_pair), unit)
    ran = executed(work) - PLUMBING
    assert ran, "nothing ran"
    assert sorted(ran - set(freshness.code(UNITS[unit].files))) == []


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Yield file and name of what `source` imports from this package by name, or uses of its packages."""
    tree = ast.parse(source)
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ruadapt":
            for alias in node.names:
                file = definition(f"{node.module}", alias.name)
                yield file, alias.name
                if file.endswith("__init__.py"):
                    packages.add(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            yield definition(f"ruadapt.{node.value.id}", node.attr), node.attr


def definition(module: str, name: str) -> str:
    """Return the file of `module.name`: of the module so named, or that which a package takes it from."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path / f"{name}.py", path / name / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse((path / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return definition(str(node.module), name)
    return (path / "__init__.py").relative_to(ROOT).as_posix()


# Names of columns, files, tensors and methods: where one changes, a finished unit is not another.
NAMES = {
    "ITEM_COLUMNS",
    "ORIGINAL",
    "MICRO",
    "FINDING_COLUMNS",
    "TOKENIZER_FILES",
    "HEAD_NAMES",
    "PREFERENCE_METHODS",
}


@pytest.mark.parametrize("unit", UNITS)
def test_constants_that_make_a_unit_are_declared(unit: str) -> None:
    declared = freshness.code(UNITS[unit].files)
    undeclared = {
        f"{name} of {file}"
        for path in declared
        if path.endswith(".py")
        for file, name in imports((ROOT / path).read_text(encoding="utf-8"))
        if name.isupper() and name not in NAMES and file not in declared
    }
    assert undeclared == set()


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_a_notebook_uses_and_reads_is_declared(stage: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    declared = STAGES[stage]
    kinds = [*declared.units, *(unit for unit, _ in declared.optional)]
    known = {name for kind in kinds for name in UNITS[kind].files} | {*declared.files, *declared.draws}
    used = {file for file, _ in imports(source) if not file.endswith("__init__.py")}
    runs = {"ruadapt/pipeline/runner.py", "ruadapt/reporting/provenance.py", "ruadapt/files.py"}
    assert sorted(used - set(freshness.code(known)) - PLUMBING - runs) == []
    read = {place.partition("/")[0] for place in declared.reads}
    assert set(re.findall(r'run\.needs\("(\w+)"\)', source)) <= read
    assert set(re.findall(r'unit="([\w ]+)"', source)) <= set(kinds)
    assert set(re.findall(r'"(ruadapt\.[\w.]+):', source)) <= {
        name.removesuffix(".py").replace("/", ".") for name in known
    }


def test_every_declared_file_exists() -> None:
    declared = [*UNITS.values(), *STAGES.values()]
    names = [name for part in declared for name in (*part.files, *getattr(part, "draws", ()))]
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert set(STAGES) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
