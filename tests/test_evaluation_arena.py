"""The arena from questions to leaderboard, against a stub of an OpenAI-compatible server on loopback."""

import json
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
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
from ruadapt.evaluation.answers import Answer, question
from ruadapt.evaluation.arena import judge_all, judge_messages, pairs, read_questions, verdict
from ruadapt.evaluation.asking import PART, ask_once
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.evaluation.ratings import rate
from ruadapt.files import project_root, read_json, read_jsonl

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


def arena(stub: Stub, *arguments: object, code: int = 0, judge: str = "judge") -> str:
    arguments = (QUESTIONS, *arguments, "--judge", f"{judge}@{stub.url}")
    result = CliRunner().invoke(app, ["arena", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_command_judges_rates_and_resumes(
    stub: Stub, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = [f"{name}@{stub.url}" for name in ("long", "short", "mute")]
    options = ["--out", tmp_path, "--max-tokens", 8, "--limit", 36, "--json"]
    asked = [f"tiny={tiny_pair.instruct}", *servers, *options]
    report = json.loads(arena(stub, *asked))
    assert report["battles"] == 36 * 6 * 2
    assert report["nonsense"] == 6 * 2  # the question about the cactus
    assert report["judged"] == report["battles"] - report["nonsense"]
    assert report["agreement"] == 1.0 and report["refused"] == 0
    board = {row["model"]: row for row in report["leaderboard"]}
    assert board["mute"]["empty"] == 36 and board["tiny"]["cut"] > 0
    assert board["long"]["rating"] > board["short"]["rating"] > board["mute"]["rating"]
    assert board["mute"]["won"] == 0 and board["mute"]["lost"] >= 35 * 4
    for name in ("leaderboard.csv", "leaderboard.md", "battles.csv"):
        assert (tmp_path / name).stat().st_size
    # A run that was killed asks for the parts that are missing, and for no other.
    judgments = tmp_path / "judgments" / "judge"
    assert len(list(judgments.iterdir())) == -(-report["battles"] // PART)
    shutil.rmtree(judgments / "part64")
    before = stub.asked.copy()
    assert json.loads(arena(stub, *asked)) == report
    assert stub.asked - before == Counter({"judge": PART})
    # The key went to the server and nowhere else.
    assert KEY in stub.keys
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_a_judge_that_prefers_the_first_is_found_out(stub: Stub, tmp_path: Path) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}"]
    report = json.loads(arena(stub, *models, "--out", tmp_path, "--limit", 6, "--json", judge="judge-first"))
    assert report["first_preferred"] == 1.0 and report["agreement"] == 0.0
    assert [row["rating"] for row in report["leaderboard"]] == pytest.approx([1000, 1000], abs=1e-3)


def test_a_model_on_this_machine_can_judge(stub: Stub, tiny_pair: TinyPair, tmp_path: Path) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}", "--out", str(tmp_path), "--limit", "1"]
    result = CliRunner().invoke(
        app, ["arena", str(QUESTIONS), *models, "--judge", str(tiny_pair.instruct), "--max-tokens", "4"]
    )
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
    output = " ".join(arena(stub, *models, "--out", tmp_path, "--limit", 2, code=2, judge=judge).split())
    assert message in output
    assert KEY not in output  # servers that repeat the key in their message
    assert judge != "overloaded" or stub.asked[judge] - before >= 2  # tried twice


def test_refused_battles_are_counted(stub: Stub, tmp_path: Path) -> None:
    questions = [asked for asked in read_questions(QUESTIONS, 36) if "кактус" in asked.text]
    questions += read_questions(QUESTIONS, 1)
    answered = {name: [Answer(text)] * 2 for name, text in (("a", "ответ"), ("b", "другой ответ"))}
    judge, before = Endpoint(stub.url, "judge-picky"), stub.asked["judge-picky"]
    for _ in range(2):
        table, report = judge_all(questions, answered, pairs("ab"), judge, tmp_path / "judge")
        assert len(table) == report["judged"] == report["refused"] == 2 and report["nonsense"] == 0
    assert stub.asked["judge-picky"] - before == 4


def test_stale_answers_are_named_and_kept(tiny_pair: TinyPair, tmp_path: Path, caplog: Any) -> None:
    model, folder = tmp_path / "model", tmp_path / "answers"
    shutil.copytree(tiny_pair.instruct, model)
    asked = [question(text) for text in ("Кто?", "Где?")]

    def answer(limit: int = 4) -> list[Answer]:
        return ask_once(folder, model, asked, max_tokens=limit)

    first = answer()
    assert answer() == first and not caplog.records
    shutil.copy(tiny_pair.base / "model.safetensors", model)
    answer()
    assert "part0 is stale: parameter model changed" in caplog.text
    assert read_json(folder / "stale" / "part0-1" / "answers.json") == [[*astuple(one)] for one in first]
    answer(3)
    assert "parameter max_tokens changed" in caplog.text


def test_verdicts() -> None:
    assert verdict("Лучше первый.\n[[A]]") == 1
    assert verdict("<think>[[B]]?</think> [[ = ]] и ещё раз [[=]]") == 0.5
    assert verdict("[[В]]") == verdict("[[B]] [[В]]") == 0  # Cyrillic
    for reply in ("", "A", "[[A]] [[B]]", "[[C]]"):
        assert math.isnan(verdict(reply))


def test_answers_may_hold_whatever_they_like() -> None:
    text = judge_messages("$answer_b?", "$question {answer_b} $$", "[[A]]")[1]["content"]
    assert "$answer_b?" in text and "$question {answer_b} $$" in text and "[[A]]" in text


def test_our_questions_are_what_their_card_says() -> None:
    questions = read_questions(QUESTIONS)
    card = (QUESTIONS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(questions)} questions" in card
    for category, count in Counter(row["category"] for row in read_jsonl(QUESTIONS)).items():
        assert f"| {category} | {count} |" in card
    assert len({asked.text for asked in questions}) == len(questions)


def test_mistakes_are_refused(tmp_path: Path, tiny_pair: TinyPair, stub: Stub) -> None:
    file = tmp_path / "questions.jsonl"
    for text, message in (
        ('{"question_id": 1, "turns": [{"content": "a"}, {"content": "b"}]}', "exactly one text"),
        ('{"question_id": 1, "turns": [{"content": " "}]}', "exactly one text"),
        ('{"question_id": 1, "turns": [{"content": "a"}]}\n' * 2, "an id of its own"),
        ("", "holds no question"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RuadaptError, match=message):
            read_questions(file)
    with pytest.raises(RuadaptError, match="not into the URL"):
        Endpoint("http://me:secret@localhost/v1", "judge").ask_all([question("?")], 1, 1)
    with pytest.raises(RuadaptError, match="see whether it runs"):
        Endpoint("http://127.0.0.1:9/v1", "judge").ask_all([question("?")], 1, 1)
    for models, message in (
        ([tiny_pair.base], "two models or more"),
        ([tiny_pair.base, tiny_pair.instruct, "--against", "other"], "--against one of them"),
        ([tiny_pair.base, tiny_pair.base], "needs its own name"),
        ([tmp_path, "b"], "is not a model folder"),
    ):
        assert message in " ".join(arena(stub, *models, "--out", tmp_path, code=2).split())


def test_battles_are_fought_in_both_orders(stub: Stub, tmp_path: Path) -> None:
    questions = read_questions(QUESTIONS, 2)
    answered = {name: [Answer(name * size)] * 2 for name, size in (("a", 5), ("b", 3), ("c", 1))}
    judge = Endpoint(stub.url, "judge")
    table, report = judge_all(questions, answered, pairs("abc", "b"), judge, tmp_path / "judge")
    assert report["battles"] == 2 * 2 * 2  # two questions, two pairs with the baseline, two orders
    assert table.loc[table["first"] == "a", "outcome"].tolist() == [1, 1]
    assert table.loc[table["second"] == "a", "outcome"].tolist() == [0, 0]


def test_prompts_stand_in_text_files_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Кто?\n\nГде?\n", encoding="utf-8")
    assert [one.text for one in read_questions(tmp_path / "a.txt")] == ["Кто?", "Где?"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "Кто?", "answer": "Я."}', encoding="utf-8")
    (only,) = read_questions(tmp_path / "a.jsonl")
    assert (only.text, only.answer) == ("Кто?", "Я.")
