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

from paper.results import PAPER_GROUPS
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import TASKS_FOLDER, load
from ruadapt.evaluation.models import load as load_model
from ruadapt.evaluation.tasks import Benchmark
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


SUBSETS = [path.stem for path in sorted((TASKS_FOLDER / "darumeru").glob("[a-z]*.yaml"))]


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


def splits(subset: str, data: Path) -> Any:
    """Return a part's documents, read as its YAML file says."""
    (task,) = Benchmark([f"darumeru_{subset}"], str(data), chat=True).build().values()
    return task.dataset


def test_prompts_are_filled_and_marked(data: Path) -> None:
    first = splits("rummlu", data)["test"][0]
    shown = "Что светит днём 0?\nA. Земля\nB. Луна\nC. Солнце\nD. Марс"
    assert (first["prompt"], first["raw"]) == (shown, shown + "\nОтвет:")
    assert first["choices"] == list("ABCD") and first["answer"] == "A"
    assert "{Ока}" in splits("multiq", data)["test"][0]["prompt"]
    assert splits("multiq", data)["test"][0]["answers"] == ["у реки", "у Оки"]
    assert splits("rwsd", data)["test"][1]["answer"] == "Нет"
    assert splits("cp_sent_en", data)["test"][0]["raw"].endswith("\nAnswer:")


def test_both_orders_swap_choices_and_answer(data: Path) -> None:
    parus = splits("parus", data)
    one, other = parus["test"][0], parus["test"][1]
    assert (one["answer"], other["answer"], one["unit"], other["unit"]) == ("2", "1", "0", "0")
    assert "1. пошёл дождь\n2. взошло солнце" in one["prompt"]
    assert "1. взошло солнце\n2. пошёл дождь" in other["prompt"]
    assert (len(parus["test"]), len(parus["prompt"])) == (10, 5)


def test_the_conversation_of_rutie_grows_in_its_order(data: Path) -> None:
    asked = splits("rutie", data)["test"]
    assert [unit for unit in asked["unit"][::2]] == ["0", "1", "2", "3", "4"]
    assert asked[0]["prompt"].startswith("\nВопрос 0?")
    before = "Вопрос {}?\n1. пошёл дождь\n2. взошло солнце\nОтвет: 1"
    assert asked[4]["prompt"].startswith(before.format(0) + "\n" + before.format(1) + "\nВопрос 2?")


@pytest.mark.parametrize("chat", [True, False])
def test_all_of_darumeru_runs(
    data: Path, tiny_pair: Any, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny_pair.instruct if chat else tiny_pair.base, "cpu")
    model.config.max_position_embeddings = 8192  # random weights anyway
    build = Benchmark.build

    def short(self: Benchmark, tokenizer: str = "") -> Any:
        tasks = build(self, tokenizer)
        for task in tasks.values():
            task.config.generation_kwargs = (task.config.generation_kwargs or {}) | {"max_gen_toks": 8}
        return tasks

    monkeypatch.setattr(Benchmark, "build", short)
    scored = Benchmark(["darumeru"], str(data), chat=chat).evaluate(model, tokenizer)
    assert scored["score"].between(0, 1).all() and set(scored["used_shots"]) == {0 if chat else 5}
    counts = scored.groupby(["task", "language"]).size()
    assert counts["parus", "ru"] == 5 and counts["use", "ru"] == 2  # both orders, exams
    assert len(counts) == len(SUBSETS) - 1  # English documents are no part of the mean
    groups = ["knowledge", "reasoning", "summary", "copy"]
    assert list(scored["group"].unique()) == groups


def test_the_harness_alone_reports_the_mean_over_tasks(data: Path, tiny_pair: Any) -> None:
    model, tokenizer = load_model(tiny_pair.instruct, "cpu")
    metadata: Any = {"data": str(data), "tokenizer": str(tiny_pair.instruct)}
    tasks = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
    loaded = tasks.load(["darumeru"])
    options = {"bootstrap_iters": 0, "apply_chat_template": True, "limit": 2}
    found = run_harness(Backend(model, tokenizer), loaded, **options)
    means = [found["results"][name]["score,none"] for name in loaded["tasks"]]
    assert found["results"]["darumeru"]["score,none"] == pytest.approx(sum(means) / len(means))
    assert 0 <= found["results"]["darumeru_rcb"]["f1_macro,none"] <= 1


def test_missing_data_and_other_columns_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="--data DIR"):
        load("rummlu")  # no network here
    with pytest.raises(RuadaptError, match=r"has no rummlu/test\.jsonl"):
        load("rummlu", str(tmp_path))
    for change, message in (
        (lambda r: r.pop("meta"), "lacks 'meta'; its columns: messages, inputs, outputs"),
        (lambda r: r["inputs"].pop("choice2"), "lacks 'choice2'"),
        (lambda r: r.update(outputs="3"), "expected one of 1, 2, found '3'"),
        (lambda r: r["messages"].append({"role": "user", "content": "?"}), "one user message"),
        (lambda r: r["messages"][0].update(content=" "), "is empty"),
    ):
        broken = stand_in("parus")[0]
        change(broken)
        (tmp_path / "parus").mkdir(exist_ok=True)
        (tmp_path / "parus" / "test.jsonl").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(RuadaptError, match=message):
            load("parus", str(tmp_path), choices=["1", "2"])
    (tmp_path / "parus" / "test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RuadaptError, match="no rows"):
        load("parus", str(tmp_path))


def test_an_unknown_name_is_refused_before_work() -> None:
    with pytest.raises(RuadaptError, match="darumeru_parus"):
        Benchmark(["darumeru_paru"], chat=True)


def test_tasks_have_a_place_in_the_tables_of_a_run(data: Path) -> None:
    items = Benchmark(["darumeru"], str(data), chat=False, items_per_task=1).items()
    places = set(items[["language", "group", "task"]].itertuples(index=False, name=None))
    assert {("ru", "knowledge", "rummlu"), ("en", "copy", "cp_para")} <= places
    worlds = Benchmark(["world"], chat=False, items_per_task=1).items()
    places |= set(worlds[["language", "group", "task"]].itertuples(index=False, name=None))
    assert set(PAPER_GROUPS.values()) <= {(group, language) for language, group, _ in places}
    with pytest.raises(RuadaptError, match="darumeru_cp_doc_en names no skill"):
        Benchmark(["darumeru_cp_doc_en"], str(data), chat=True).items()


def test_scores_depend_on_what_is_asked_not_on_places(data: Path, tmp_path: Path) -> None:
    def asks(folder: Path, chat: bool = True, units: int = 0) -> dict[str, Any]:
        return Benchmark(["darumeru"], str(folder), chat=chat, items_per_task=units).asks

    shutil.copytree(data, tmp_path / "copy")
    known = asks(data)
    assert asks(tmp_path / "copy") == known
    assert known not in (asks(data, units=2), asks(data, chat=False))
    (tmp_path / "copy" / "data" / "rcb" / "test.jsonl").write_text("{}")
    assert asks(tmp_path / "copy") != known


def test_a_few_units_keep_pairs_and_exams_whole(data: Path) -> None:
    tasks = Benchmark(["darumeru"], str(data), chat=True, items_per_task=1).build()
    kept = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert kept["darumeru_use"] == 3 and kept["darumeru_parus"] == kept["darumeru_rutie"] == 2
    assert {count for name, count in kept.items() if name[9:] not in ("use", "parus", "rutie")} == {1}


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
