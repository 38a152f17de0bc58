"""The arena from questions to leaderboard, against a stub of an OpenAI-compatible server on loopback."""

import gzip
import json
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import TinyPair
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation import endpoint
from ruadapt.evaluation.answers import question
from ruadapt.evaluation.arena import judge_all, rate, verdict
from ruadapt.evaluation.asking import PART, ask_once, read_questions
from ruadapt.evaluation.endpoint import ask_server
from ruadapt.files import project_root, read_json, read_jsonl, write_jsonl

KEY = "sk-only-for-the-server"
QUESTIONS = project_root() / "data" / "arena" / "questions_ru.jsonl"


class Stub:
    """Answers with the model's name many times over; judges longer answers better, with mishaps."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        model, text = body["model"], body["messages"][-1]["content"]
        self.asked[model] += 1
        if model in (errors := {"missing": 404, "locked": 401, "overloaded": 503}):
            return errors[model], ""
        if not model.startswith("judge"):
            return 200, {"long": "подробно " * 9, "short": "кратко", "mute": ""}[model]
        if model == "judge-picky" and "кактус" in text:
            return 400, ""
        if model == "judge-nonsense":
            return 200, "Оба хороши. [[A]] или [[B]]?"
        if "кактус" in text and model == "judge":
            return 200, "Не знаю."  # both orders of one question
        first, second = (text.partition(f"<ответ {name}>")[2].partition("</ответ")[0] for name in "AB")
        if model == "judge-first":
            return 200, "[[A]]"
        if first == second:
            return 200, "[[=]]"
        # A Cyrillic В for the second, as a Russian judge may write it.
        return 200, f"Так лучше.\n[[{'A' if len(first) > len(second) else 'В'}]]"


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    server_app, stub = FastAPI(), Stub()

    @server_app.post("/v1/chat/completions")
    def complete(body: dict[str, Any], request: Request) -> Any:
        stub.keys.add(request.headers["authorization"].removeprefix("Bearer "))
        status, text = stub.reply(body)
        if status != 200:
            return JSONResponse({"error": {"message": f"no: {KEY}"}}, status, {"retry-after-ms": "1"})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return about | {"choices": [choice]}

    server = uvicorn.Server(uvicorn.Config(server_app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield stub
    server.should_exit = True
    thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rate.__kwdefaults__, "resamples", 40)
    monkeypatch.setattr(endpoint, "RETRIES", 1)


def arena(
    stub: Stub, folder: Path, *arguments: object, count: int = 2, code: int = 0, judge: str = "judge"
) -> str:
    """Run the command on the first questions, into a folder."""
    write_jsonl(folder / "questions.jsonl", list(read_jsonl(QUESTIONS))[:count])
    arguments = (folder / "questions.jsonl", *arguments, "--out", folder, "--judge", f"{judge}@{stub.url}")
    result = CliRunner().invoke(app, ["arena", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_command_judges_rates_and_resumes(
    stub: Stub, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = [f"{name}@{stub.url}" for name in ("long", "short", "mute")]
    asked = [tmp_path, f"tiny={tiny_pair.instruct}", *servers, "--max-tokens", 8, "--json"]
    report = json.loads(arena(stub, *asked, count=36))
    assert report["battles"] == 36 * 6 * 2
    assert report["without_verdict"] == 6 * 2  # the question about the cactus
    assert report["agreement"] == 1.0
    board = {row["model"]: row for row in report["leaderboard"]}
    assert board["mute"]["empty"] == 36 and board["short"]["empty"] == 0
    assert board["long"]["rating"] > board["short"]["rating"] > board["mute"]["rating"]
    assert board["mute"]["battles"] == 35 * 6
    for name in ("leaderboard.csv", "leaderboard.md", "battles.csv"):
        assert (tmp_path / name).stat().st_size
    # A run that was killed asks for the parts that are missing, and for no other.
    judgments = tmp_path / "judgments" / "judge"
    assert len(list(judgments.iterdir())) == -(-report["battles"] // PART)
    shutil.rmtree(judgments / "part64")
    before = stub.asked.copy()
    assert json.loads(arena(stub, *asked, count=36)) == report
    assert stub.asked - before == Counter({"judge": PART})
    # The key went to the server and nowhere else.
    assert KEY in stub.keys
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_a_judge_that_prefers_the_first_is_found_out(stub: Stub, tmp_path: Path) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}"]
    report = json.loads(arena(stub, tmp_path, *models, "--json", count=6, judge="judge-first"))
    assert report["agreement"] == 0.0
    assert [row["rating"] for row in report["leaderboard"]] == pytest.approx([1000, 1000], abs=1e-3)


def test_a_model_on_this_machine_can_judge(stub: Stub, tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("Кто?\n", encoding="utf-8")
    asked = [tmp_path / "questions.txt", f"long@{stub.url}", f"short@{stub.url}", "--out", tmp_path]
    asked += ["--judge", tiny_pair.instruct, "--max-tokens", 4]
    result = CliRunner().invoke(app, ["arena", *map(str, asked)])
    assert result.exit_code == 2  # random weights give no verdict, or find the instructions too long
    assert "no verdict that can be read" in result.output or "leaves no room" in result.output


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("judge-nonsense", "no verdict that can be read in 4 battles"),
        ("missing", "gives no answers of 'missing' (NotFoundError)"),
        ("locked", "environment variable OPENAI_API_KEY"),
        ("overloaded", "InternalServerError"),
    ],
)
def test_judges_that_do_not_judge(stub: Stub, tmp_path: Path, judge: str, message: str) -> None:
    models, before = [f"long@{stub.url}", f"short@{stub.url}"], stub.asked[judge]
    output = " ".join(arena(stub, tmp_path, *models, code=2, judge=judge).split())
    assert message in output
    assert KEY not in output  # servers that repeat the key in their message
    assert judge != "overloaded" or stub.asked[judge] - before >= 2  # tried twice


def test_refused_battles_are_counted(stub: Stub, tmp_path: Path) -> None:
    asked = [text for text, _ in read_questions(QUESTIONS)]
    questions = [*(text for text in asked[:36] if "кактус" in text), asked[0]]
    answered = {"a": ["ответ"] * 2, "b": ["другой ответ"] * 2}
    judge, before = f"judge-picky@{stub.url}", stub.asked["judge-picky"]
    for _ in range(2):
        table, report = judge_all(questions, answered, judge, tmp_path / "judge")
        assert len(table) == report["without_verdict"] == 2 and report["battles"] == 4
    assert stub.asked["judge-picky"] - before == 4


def test_stale_answers_are_named_and_kept(tiny_pair: TinyPair, tmp_path: Path, caplog: Any) -> None:
    model, folder = tmp_path / "model", tmp_path / "answers"
    shutil.copytree(tiny_pair.instruct, model)

    def answer(limit: int = 4) -> list[str]:
        return ask_once(folder, model, ["Кто?", "Где?"], max_tokens=limit)

    first = answer()
    assert answer() == first and not caplog.records
    shutil.copy(tiny_pair.base / "model.safetensors", model)
    answer()
    assert "part0 is stale: parameter model changed" in caplog.text
    assert [text for _, text, _ in read_json(folder / "stale" / "part0-1" / "answers.json")] == first
    answer(3)
    assert "parameter max_tokens changed" in caplog.text


def test_verdicts() -> None:
    assert verdict("Лучше первый.\n[[A]]") == 1
    assert verdict("<think>[[B]]?</think> [[ = ]] и ещё раз [[=]]") == 0.5
    assert verdict("[[В]]") == verdict("[[B]] [[В]]") == 0  # Cyrillic
    for reply in ("", "A", "[[A]] [[B]]", "[[C]]"):
        assert math.isnan(verdict(reply))


def test_our_questions_are_what_their_card_says() -> None:
    questions = read_questions(QUESTIONS)
    card = (QUESTIONS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(questions)} questions" in card
    for category, count in Counter(row["category"] for row in read_jsonl(QUESTIONS)).items():
        assert f"| {category} | {count} |" in card
    assert len({*questions}) == len(questions)


def test_mistakes_are_refused(tmp_path: Path, tiny_pair: TinyPair, stub: Stub) -> None:
    file = tmp_path / "questions.jsonl"
    for text, message in (
        ('{"question_id": 1, "turns": [{"content": " "}]}', "question 1: there is no text"),
        ('{"prompt": "a"}\n{"answer": "a"}', "question 2: there is no text"),
        ("", "holds no question"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RuadaptError, match=message):
            read_questions(file)
    with pytest.raises(RuadaptError, match="see whether it runs"):
        ask_server("judge@http://127.0.0.1:9/v1", [question("?")], 1, 0.0)
    for models, message in (
        ([tiny_pair.base], "two models or more"),
        ([tiny_pair.base, tiny_pair.base], "needs its own name"),
        ([tmp_path, "b"], "is not a model folder"),
    ):
        assert message in " ".join(arena(stub, tmp_path, *models, code=2).split())


def test_battles_are_fought_in_both_orders(stub: Stub, tmp_path: Path) -> None:
    questions = [text for text, _ in read_questions(QUESTIONS)[:2]]
    # Answers may hold whatever they like.
    answered = {name: [name * size + "$answer_b {x} $$"] * 2 for name, size in (("a", 5), ("b", 3), ("c", 1))}
    table, report = judge_all(questions, answered, f"judge@{stub.url}", tmp_path / "judge")
    assert report["battles"] == 2 * 3 * 2  # two questions, three pairs, two orders
    assert table.loc[table["first"] == "a", "outcome"].tolist() == [1] * 4
    assert table.loc[table["second"] == "a", "outcome"].tolist() == [0] * 4


def test_prompts_stand_in_text_files_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Кто?\n\nГде?\n", encoding="utf-8")
    assert read_questions(tmp_path / "a.txt") == [("Кто?", None), ("Где?", None)]
    (tmp_path / "a.jsonl").write_text('{"prompt": "Кто?", "answer": "Я."}', encoding="utf-8")
    assert read_questions(tmp_path / "a.jsonl") == [("Кто?", "Я.")]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read_questions(tmp_path / "a.jsonl.gz") == [("Кто?", "Я.")]
