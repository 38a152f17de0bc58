"""Darumeru through the harness on a stand-in of its data; the world by plain lm_eval."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import catalogue, documents
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.catalogue import Benchmark, Catalogue, asks_to_chat, fingerprint, shorten
from ruadapt.evaluation.documents import TASKS_FOLDER, load, score
from ruadapt.evaluation.models import load as load_model
from ruadapt.evaluation.tasks import ask
from ruadapt.files import project_root, write_jsonl

LETTERS = ["Земля", "Луна", "Солнце", "Марс"]
QUESTION = "{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}"


def row(template: str, inputs: Any, outputs: Any, **meta: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": template}],
        "inputs": inputs,
        "outputs": outputs,
        "meta": {"id": 0} | meta,
    }


def lettered(number: int) -> dict[str, Any]:
    choices = dict(zip("abcd", LETTERS, strict=True))
    return row(QUESTION, {"question": f"Что светит днём {number}?"} | choices, "ABCD"[number % 4], id=number)


def stand_in(subset: str) -> list[dict[str, Any]]:
    """A few rows as the columns of Darumeru have them."""
    pairs = {"choice1": "пошёл дождь", "choice2": "взошло солнце"}
    if subset in ("rummlu", "ruopenbookqa", "ruworldtree"):
        return [lettered(number) for number in range(6)]
    if subset == "multiq":
        inputs = {"text": "Врач живёт у реки {Ока}.", "question": "Где живёт врач?"}
        segments = [{"segment": "у реки"}, {"segment": "у Оки"}]
        return [row("{text}\nВопрос: {question}", inputs, segments, id=n) for n in range(5)]
    if subset == "parus":
        shown = "Почему стало мокро?\n1. {choice1}\n2. {choice2}\nОтвет:"
        return [row(shown, pairs, "1" if n % 2 else "2", id=n) for n in range(5)]
    if subset == "rutie":
        shown = "{context}\n{question}\n1. {choice1}\n2. {choice2}\nОтвет:"
        asked = [row(shown, pairs | {"question": f"Вопрос {n}?"}, "1", question_id=n) for n in range(5)]
        return asked[::-1]
    if subset == "rcb":
        return [row("{text} Верно ли?", {"text": "Кот спит."}, str(n % 3 + 1), id=n) for n in range(6)]
    if subset == "rwsd":
        return [row("{text}", {"text": "Он — это кот?"}, ("Да", "Нет.")[n % 2], id=n) for n in range(5)]
    if subset == "use":
        kinds = [
            ("matching", "8", "4,2,1"),
            ("text", "4", "кот,кота"),
            ("multiple_choice_based_on_text", "16", "1,3"),
        ]
        return [
            row("{task}", {"task": "Задание"}, answer, id=n, id_task=task, type=kind, variant=variant)
            for variant in (1, 2)
            for n, (kind, task, answer) in enumerate(kinds)
        ]
    if subset == "sum":
        sentences = ["Садовник посадил яблони.", "Осенью он продал яблоки."]
        return [{"src_sents": sentences, "summary_sents": sentences[:1], "extractive_summary": [0]}] * 5
    text = "Рыбак нашёл 25 бутылок.\n\nОн отдал их {имя}." if "doc" in subset else "Рыбак нашёл бутылку."
    return [row("Повтори текст:\n{text}", {"text": text}, text, id=n) for n in range(5)]


SUBSETS = [*documents._SUBSETS, "sum"]


def write_stand_in(folder: Path) -> Path:
    for subset in SUBSETS:
        place = folder / "data" / subset  # as in a clone of the hub's repository
        rows = stand_in(subset)
        answered = [
            entry | ({"messages": [*entry["messages"], {"role": "assistant", "content": "…"}]})
            if "messages" in entry
            else entry
            for entry in rows
        ]
        for split, lines in (("test", rows), ("prompt", answered)):
            write_jsonl(place / f"{split}.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stand_in(tmp_path_factory.mktemp("darumeru"))


def test_prompts_are_filled_and_marked(data: Path) -> None:
    first = load("rummlu", str(data))["test"][0]
    shown = "Что светит днём 0?\nA. Земля\nB. Луна\nC. Солнце\nD. Марс"
    assert (first["prompt"], first["raw"]) == (shown, shown + "\nОтвет:")
    assert first["choices"] == list("ABCD") and first["answer"] == "A"
    assert "{Ока}" in load("multiq", str(data))["test"][0]["prompt"]
    assert load("multiq", str(data))["test"][0]["answers"] == ["у реки", "у Оки"]
    assert load("rwsd", str(data))["test"][1]["answer"] == "Нет"
    assert load("cp_sent_en", str(data))["test"][0]["raw"].endswith("\nAnswer:")


def test_both_orders_swap_choices_and_answer(data: Path) -> None:
    parus = load("parus", str(data))
    one, other = parus["test"][0], parus["test"][1]
    assert (one["answer"], other["answer"], one["unit"], other["unit"]) == ("2", "1", "0", "0")
    assert "1. пошёл дождь\n2. взошло солнце" in one["prompt"]
    assert "1. взошло солнце\n2. пошёл дождь" in other["prompt"]
    assert (len(parus["test"]), len(parus["prompt"])) == (10, 5)


def test_the_conversation_of_rutie_grows_in_its_order(data: Path) -> None:
    asked = load("rutie", str(data))["test"]
    assert [unit for unit in asked["unit"][::2]] == ["0", "1", "2", "3", "4"]
    assert asked[0]["prompt"].startswith("\nВопрос 0?")
    before = "Вопрос {}?\n1. пошёл дождь\n2. взошло солнце\nОтвет: 1"
    assert asked[4]["prompt"].startswith(before.format(0) + "\n" + before.format(1) + "\nВопрос 2?")


def sample(metric: str, answers: list[str], **more: Any) -> dict[str, Any]:
    return {"id": "x", "metric": metric, "answers": answers, "unit": "u", "kind": "", "number": ""} | more


def test_answers_are_scored_by_their_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [(-2.0, False), (-1.0, False)]
    two = sample("choice", ["B"], choices=["A", "B"])
    assert score(two, chosen) == {"score": 1.0}
    assert score(two | {"kind": "classes"}, chosen)["f1_macro"] == ["B", "B"]
    assert score(two | {"metric": "both_orders"}, chosen)["score"] == ["u", 1.0]
    assert score(sample("f1", ["у реки", "у Оки"]), ["У Оки."]) == {"score": 1.0, "exact": 1.0}
    assert score(sample("exam", ["4,2,1"], kind="matching"), ["4,3,1"])["score"] == ["u", 2]
    with monkeypatch.context() as words:
        words.setattr(documents, "_counter", lambda name: lambda text: len(text.split()))
        assert score(sample("copy_sentence", ["а б в г"], tokenizer="x"), ["а б"])["score"] == 0.5
    with pytest.raises(RuadaptError, match="no finite probability"):
        score(two, [(float("nan"), False), (-1.0, False)])
    with pytest.raises(RuadaptError, match="name its tokenizer"):
        score(sample("copy_sentence", ["а"], tokenizer=""), ["а"])


def test_units_are_averaged_as_units() -> None:
    assert documents.mean_of_pairs([("a", 1.0), ("a", 1.0), ("b", 1.0), ("b", 0.0)]) == 0.5
    assert documents.mean_of_exams([("1", 17), ("1", 17), ("2", 0)]) == 0.5
    assert documents.f1_macro([("1", "1"), ("2", "1")]) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("names", [["darumeru", "darumeru_cp_doc_en"], ["darumeru_base"]])
def test_all_of_darumeru_runs(data: Path, tiny_pair: Any, names: list[str]) -> None:
    model, tokenizer = load_model(tiny_pair.base if "base" in names[0] else tiny_pair.instruct, "cpu")
    model.config.max_position_embeddings = 8192  # random weights anyway
    backend = Backend(model, tokenizer, quiet=True)
    seen = {}
    for named in Catalogue(names, str(data)).tasks:
        ((name, task),) = Catalogue(names, str(data)).build(named, tokenizer=str(tiny_pair.base)).items()
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = 8
        rows = ask(backend, {name: task}, {name: {"group": named.group}}, asks_to_chat(task))[name]
        seen[name] = (named.group, rows[0]["used_shots"], len(rows))
        assert all(0 <= found["score"] <= 1 for found in rows)
    base = names[0].endswith("_base")
    assert {shots for _, shots, _ in seen.values()} == {5 if base else 0}
    assert seen["darumeru_parus"][0] == "daru_mera" and seen["darumeru_parus"][2] == 5
    assert seen["darumeru_use"][2] == 2  # exams
    groups = ["daru_mmlu", "daru_mera", "daru_sum", "daru_copy_en", "daru_copy_ru"]
    assert [group for group in dict.fromkeys(group for group, *_ in seen.values())][:5] == groups
    assert len(seen) == (15 if base else 16)


def test_the_harness_reports_the_groups_micro_average(data: Path, tiny_pair: Any) -> None:
    model, tokenizer = load_model(tiny_pair.instruct, "cpu")
    metadata: Any = {"data": str(data), "tokenizer": str(tiny_pair.instruct)}
    tasks = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
    loaded = tasks.load(["daru_mera"])
    found = run_harness(
        Backend(model, tokenizer, quiet=True), loaded, bootstrap_iters=0, apply_chat_template=True
    )
    means = [found["results"][name]["score,none"] for name in loaded["tasks"]]
    assert found["results"]["daru_mera"]["score,none"] == pytest.approx(sum(means) / 8)
    assert 0 <= found["results"]["darumeru_rcb"]["f1_macro,none"] <= 1


def test_missing_data_and_other_columns_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="--data DIR"):
        load("rummlu")  # no network here
    with pytest.raises(RuadaptError, match=r"has no rummlu/test.jsonl.*RUADAPT_EVALUATION_DATA"):
        load("rummlu", str(tmp_path))
    for change, message in (
        (
            lambda r: r.pop("meta"),
            "expected messages, inputs, outputs, meta; found messages, inputs, outputs",
        ),
        (lambda r: r["inputs"].pop("choice2"), "expected choice1, choice2; found choice1"),
        (lambda r: r.update(outputs="3"), "expected one of 1, 2 in outputs, found '3'"),
        (lambda r: r["messages"].append({"role": "user", "content": "?"}), "one user message"),
    ):
        broken = stand_in("parus")[0]
        change(broken)
        (tmp_path / "parus").mkdir(exist_ok=True)
        (tmp_path / "parus" / "test.jsonl").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(RuadaptError, match=message):
            load("parus", str(tmp_path))
    (tmp_path / "parus" / "test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RuadaptError, match="no rows"):
        load("parus", str(tmp_path))


def test_local_data_can_be_named_by_a_variable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(documents.DATA_VARIABLE, str(data))
    assert len(load("rcb")["test"]) == 6


def test_unknown_and_repeated_names_are_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the harness's own thousands of files, which take seconds to read.
    monkeypatch.setattr(
        catalogue, "TaskManager", lambda **o: TaskManager(**(o | {"include_defaults": False}))
    )
    with pytest.raises(RuadaptError, match="darumeru_parus"):
        Catalogue(["darumeru_paru"])
    with pytest.raises(RuadaptError, match="one of world, world_base at a time"):
        Catalogue(["world", "world_base"])


def test_fingerprints_follow_questions_and_examples_not_places(data: Path, tmp_path: Path) -> None:
    def fresh(folder: Path, name: str, units: int = 0) -> str:
        catalogue = Catalogue([name], str(folder))
        (task,) = catalogue.build(next(t for t in catalogue.tasks if t.name == "darumeru_rcb")).values()
        shorten(task, units)
        return fingerprint(task)

    shutil.copytree(data, tmp_path / "copy")
    known = fresh(data, "daru_mera")
    assert fresh(tmp_path / "copy", "daru_mera") == known
    assert fresh(data, "daru_mera", 2) != known
    assert fresh(data, "darumeru_base") != known


def test_a_few_units_keep_pairs_and_exams_whole(data: Path) -> None:
    tasks = Benchmark(["darumeru"], str(data), chat=True, items_per_task=1).build()
    kept = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert kept["darumeru_use"] == 3 and kept["darumeru_parus"] == kept["darumeru_rutie"] == 2
    assert {count for name, count in kept.items() if name[9:] not in ("use", "parus", "rutie")} == {1}


def test_every_yaml_file_is_a_task_or_a_group_of_some() -> None:
    index = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False).task_index
    files = {path for path in TASKS_FOLDER.rglob("*.yaml") if path.parent != TASKS_FOLDER}
    assert {entry.yaml_path for entry in index.values()} == files
    for entry in index.values():
        assert entry.cfg and ("group" not in entry.cfg or set(entry.cfg["task"]) <= index.keys())


def test_plain_lm_eval_gives_the_notebooks_scores() -> None:
    """What `lm_eval --include_path … --apply_chat_template` does with its own backend on the pair."""
    folder, per_task = project_root() / "data" / "pair" / "instruct", 4
    model, tokenizer = load_model(folder, "cpu")
    ours = Benchmark(["world"], chat=True, items_per_task=per_task).evaluate(model.float(), tokenizer)
    ours = ours[ours["task"].isin(["people", "yes_no", "reading", "extractive", "copy_sentence"])]
    names = [
        f"world_{task}_{language}" for task, language in {(r.task, r.language) for r in ours.itertuples()}
    ]
    manager = TaskManager(
        include_path=str(TASKS_FOLDER),
        include_defaults=False,
        metadata={"pretrained": str(folder)},  # type: ignore[dict-item]
    )
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=names,
        samples={name: list(range(per_task * (2 if "yes_no" in name else 1))) for name in names},
        apply_chat_template=True,
        task_manager=manager,
        bootstrap_iters=0,
    )
    for (task, language), part in ours.groupby(["task", "language"]):
        found = theirs["results"][f"world_{task}_{language}"]["score,none"]
        assert found == pytest.approx(part["score"].mean(), abs=1e-6), (task, language)
