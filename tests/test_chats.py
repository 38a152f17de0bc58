"""Chat data of real data sets: the hub's schemas in local files, filters, the copy task, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from ruadapt import files, hub
from ruadapt.errors import RuadaptError
from ruadapt.pipeline.runner import run_profile
from ruadapt.training import chats
from ruadapt.training.chats import read_chats

SAIGA = [
    {"messages": [{"role": "user", "content": f"Кто {n}?"}, {"role": "bot", "content": f"Врач {n}."}],
     "opus_score": n, "is_bad_by_regex": n == 9, "language": "ru"}
    for n in range(6, 11)
]  # fmt: skip
VIKHR = [
    {"conversation": [{"role": "system", "content": "Ты врач."}, {"role": "user", "content": "Где?"},
                      {"role": "assistant", "content": "Тут."}], "prompt_lang": "ru"}
]  # fmt: skip


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        files.write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("name", ["saiga.jsonl", "saiga.parquet"])
def test_saigas_schema_is_read_filtered_and_given_our_roles(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, SAIGA)
    rows = list(read_chats(path, min_score=8))
    assert [row["messages"][1]["content"] for row in rows] == ["Врач 8.", "Врач 10."]  # 9 is flagged
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert len(list(read_chats(path))) == 4


def test_vikhrs_schema_is_read(tmp_path: Path) -> None:
    (row,) = read_chats(save(tmp_path / "vikhr.jsonl", VIKHR))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_chat_data_is_written_with_copies_that_repeat_exactly(tmp_path: Path) -> None:
    vikhr = save(tmp_path / "vikhr.jsonl", VIKHR * 3)
    texts = {}
    sentences = {"ru": "Старый капитан видел море. ", "en": "The old captain saw the sea. "}
    for language, sentence in sentences.items():
        texts[language] = save(
            tmp_path / f"{language}.jsonl", [{"text": "no"}, {"text": sentence * 200}, {"text": sentence}]
        )
    counts = chats.write_chats(
        tmp_path / "out", [{"source": vikhr}], prompt_rows=5, texts=texts, copy_rows=12, seed=0
    )
    assert counts == {"chat": 3, "prompts": 1, "chat_copy": 12}
    (prompt,) = files.read_jsonl(tmp_path / "out" / "prompts.jsonl")
    assert [message["role"] for message in prompt["messages"]] == ["system", "user"]
    rows = list(files.read_jsonl(tmp_path / "out" / "chat_copy.jsonl"))
    for number, row in enumerate(rows):
        question, answer = (message["content"] for message in row["messages"])
        request, text = question.split("\n\n", 1)
        assert text == answer and request in chats.COPY_REQUESTS["ru" if number % 2 == 0 else "en"]
        assert chats.SHORTEST_COPY <= len(answer) <= max(chats.COPY_LENGTHS)
        assert answer.split()[-1] in "".join(sentences.values()).split()
    assert len({len(row["messages"][1]["content"]) for row in rows}) > 2


def written(path: Path) -> list[Any]:
    chats.write_chats(path, [{"source": path}], min_score=11, prompt_rows=1, texts={}, copy_rows=0, seed=0)
    return []


@pytest.mark.parametrize(
    ("rows", "read", "message"),
    [
        ([{"text": "да"}], read_chats, r"row 0: a column messages or .* was expected; its columns are text"),
        ([{"messages": "да"}], read_chats, "with `role` and `content` was expected"),
        ([{"messages": [{"role": "user", "content": None}]}], read_chats, "with `role`"),
        (VIKHR, lambda path: read_chats(path, min_score=8), "row 0 lacks opus_score"),
        (SAIGA, written, ".min_score 11. gives no rows for chat.jsonl"),
    ],
)
def test_data_of_another_form_is_refused(
    rows: list[dict[str, Any]], read: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RuadaptError, match=message):
        list(read(save(tmp_path / "rows.jsonl", rows)))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text(json.dumps({"messages": []})[:-2])
    (tmp_path / "rows.md").touch()
    for source, message in (
        (tmp_path / "broken.jsonl", "line 1: not JSON"),
        (tmp_path / "rows.md", r"holds no rows; give a file or folder of \."),
        ("IlyaGusev/no_such_data", "cannot be read .* set HF_HUB_OFFLINE=0"),
    ):
        with pytest.raises(RuadaptError, match=message):
            list(read_chats(source))
    for name in ("Qwen/No-Such-Model", "no such name"):
        with pytest.raises(RuadaptError, match=r"is no folder and"):
            hub.fetch_model(name)
    assert hub.fetch_model(tmp_path) == tmp_path


def test_a_run_looks_at_its_models_and_data_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "ru.txt").write_text("слово\n")
    run, data = tmp_path / "run", save(tmp_path / "pairs.jsonl", [{"prompt": "Где?"}])
    common = [f"run_dir={run}", f"corpus_ru={tmp_path}/ru.txt", f"corpus_en={tmp_path}/ru.txt"]
    models = [f"base_model={tmp_path}", f"instruct_model={tmp_path}"]
    saiga = save(tmp_path / "saiga.jsonl", SAIGA)
    present = [*models, f"calibration_dataset={saiga}"]
    for settings, message in (
        (present, r"cannot be loaded.* set HF_HUB_OFFLINE=0"),
        ([*present, f"evaluation_data={run}"], "has no rummlu"),
        ([*present, "evaluation_tasks=[darumru]"], "there is no task darumru"),
        (["evaluation_tasks=[world]"], "Qwen/Qwen2.5-0.5B is no folder"),
        (["evaluation_tasks=[world]", *models, f"calibration_dataset={data}"], "a column messages or"),
    ):
        with pytest.raises(RuadaptError, match=message):
            run_profile("qwen2.5-0.5b", settings=[*common, *settings])
    with pytest.raises(RuadaptError, match=r"Qwen2.5-0.5B is no folder"):  # nothing is evaluated there
        run_profile("qwen2.5-0.5b", last="05", settings=common)
    assert not run.exists()
