"""The arena from questions to leaderboard, against a stub of an OpenAI-compatible server on loopback."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import uvicorn
from conftest import TinyPair
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer
from ruadapt.evaluation.arena import NONSENSE, judge_all, read_judge_prompt, read_questions, verdict
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.evaluation.records import open_records
from ruadapt.files import project_root

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
        if model == "missing":
            return 404, ""
        if model == "locked":
            return 401, ""
        if model == "overloaded":
            return 503, ""
        if model == "slow" or (model == "judge-slow" and "инфляция" in text):
            time.sleep(1.5)
        if not model.startswith("judge"):
            return 200, {"long": "подробно " * 9, "short": "кратко", "mute": "", "slow": "?"}[model]
        if model == "judge-nonsense":
            return 200, "Оба хороши. [[A]] или [[B]]?"
        if "кактус" in text and model == "judge":
            return 200, "Не знаю."  # both orders of one question
        first, second = (text.partition(f"<ответ {name}>")[2].partition("</ответ")[0] for name in "AB")
        if model == "judge-first":
            return 200, "[[A]]"
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
        choice = {"index": 0, "finish_reason": "length" if text == "?" else "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }

    server = uvicorn.Server(uvicorn.Config(server_app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield stub
    server.should_exit = True
    thread.join()


def arena(stub: Stub, *arguments: object, code: int = 0, judge: str = "judge") -> str:
    fixed = ["--judge", stub.url, "--judge-model", judge, "--resamples", 40, "--retries", 1]
    result = CliRunner().invoke(app, ["arena", str(QUESTIONS), *map(str, [*fixed, *arguments])])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_command_judges_rates_and_resumes(
    stub: Stub, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARENA_KEY", KEY)
    servers = [f"{name}@{stub.url}" for name in ("long", "short", "mute")]
    models = [f"tiny={tiny_pair.instruct}", *servers]
    options = ["--out", tmp_path, "--key-variable", "ARENA_KEY", "--max-tokens", 8, "--limit", 36, "--json"]
    report = json.loads(arena(stub, *models, *options))
    assert report["battles"] == 36 * 6 * 2
    # Empty answers are not asked about: against three models on each question, in both orders.
    assert report["by_rule"] >= 36 * 3 * 2
    # The question about the cactus: one pair, or three where the random model found words.
    assert report["nonsense"] in (2, 6)
    assert report["judged"] == report["battles"] - report["nonsense"]
    assert report["agreement"] == 1.0 and report["failed"] == {}
    board = {row["model"]: row for row in report["leaderboard"]}
    assert board["mute"]["empty"] == 36 and board["tiny"]["cut"] > 0
    assert board["long"]["rating"] > board["short"]["rating"] > board["mute"]["rating"]
    assert board["mute"]["won"] == 0 and board["mute"]["lost"] >= 36 * 4
    assert "short" not in report["without_bound"]
    assert ("mute" in report["without_bound"]) == (board["mute"]["lost"] == board["mute"]["battles"])
    for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.png", "leaderboard.pdf", "battles.csv"):
        assert (tmp_path / name).stat().st_size
    # A run that was killed while it wrote: the half record is dropped, told of, and only it is asked again.
    judgments = tmp_path / "judgments.jsonl"
    whole = judgments.read_bytes()
    judgments.write_bytes(whole[:-30])
    before = stub.asked.copy()
    again = json.loads(arena(stub, *models, *options))
    assert again.pop("dropped_bytes") > 0 and report.pop("dropped_bytes") == 0
    assert again == report
    assert stub.asked - before == Counter({"judge": 1})
    # The key went to the server and nowhere else.
    assert KEY in stub.keys
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_a_battle_that_timed_out_is_counted_and_asked_again(stub: Stub, tmp_path: Path) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}", "--out", str(tmp_path), "--limit", "2", "--json"]
    report = json.loads(arena(stub, *models, "--timeout", 0.5, "--retries", 0, judge="judge-slow"))
    assert report["failed"]["time-out"] >= 2  # both orders of the second question
    assert report["judged"] == 4 - report["failed"]["time-out"]
    again = json.loads(arena(stub, *models, judge="judge-slow"))
    assert again["judged"] == 4 and again["failed"] == {}


def test_a_judge_that_prefers_the_first_is_found_out(stub: Stub, tmp_path: Path) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}"]
    report = json.loads(arena(stub, *models, "--out", tmp_path, "--limit", 6, "--json", judge="judge-first"))
    assert report["first_preferred"] == 1.0 and report["agreement"] == 0.0
    assert [row["rating"] for row in report["leaderboard"]] == pytest.approx([1000, 1000], abs=1e-3)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("judge-nonsense", "no verdict that can be read in 4 battles"),
        ("missing", "knows no model 'missing'"),
        ("locked", "environment variable OPENAI_API_KEY"),
    ],
)
def test_judges_that_do_not_judge(stub: Stub, tmp_path: Path, judge: str, message: str) -> None:
    models = [f"long@{stub.url}", f"short@{stub.url}"]
    output = " ".join(arena(stub, *models, "--out", tmp_path, "--limit", 2, code=2, judge=judge).split())
    assert message in output
    assert KEY not in output  # servers that repeat the key in their message


def test_failures_are_counted_and_asked_again(stub: Stub, tmp_path: Path) -> None:
    questions = read_questions(QUESTIONS, 5)
    answered = {
        name: {question.id: Answer(text, cut=False) for question in questions}
        for name, text in (("a", "ответ"), ("b", "другой ответ"))
    }
    prompt, path = read_judge_prompt(), tmp_path / "judgments.jsonl"
    for model, reason in (("overloaded", "status 503"), ("slow", "time-out")):
        judge = Endpoint(stub.url, model, timeout=0.1, retries=1)
        before = stub.asked[model]
        with pytest.raises(RuadaptError, match=rf"none of the first 8 battles \({reason}\)"):
            judge_all(questions, answered, judge, path, prompt=prompt, parallel=8)
        assert stub.asked[model] - before >= 16  # each tried twice
    # With something judged before, failures are a number in the report.
    good = Endpoint(stub.url, "judge", retries=0)
    _, report = judge_all(questions[:1], answered, good, path, prompt=prompt)
    assert report["judged"] == 2
    few = {name: dict(list(given.items())[:3]) for name, given in answered.items()}
    table, report = judge_all(
        questions[:3], few, Endpoint(stub.url, "overloaded", retries=0), path, prompt=prompt, parallel=1
    )
    assert table.empty and report["failed"] == {"status 503": 6} and report["judged"] == 0


def test_verdicts() -> None:
    assert verdict("Лучше первый.\n[[A]]") == "A"
    assert verdict("<think>[[B]]?</think> [[ = ]] и ещё раз [[=]]") == "="
    assert verdict("[[В]]") == "B"  # Cyrillic
    for reply in ("", "A", "[[A]] [[B]]", "[[C]]"):
        assert verdict(reply) == NONSENSE


def test_answers_may_hold_whatever_they_like() -> None:
    prompt = read_judge_prompt()
    text = prompt.messages("$answer_b?", "$question {answer_b} $$", "[[A]]")[1]["content"]
    assert "$answer_b?" in text and "$question {answer_b} $$" in text and "[[A]]" in text


def test_our_questions_are_what_their_card_says() -> None:
    questions = read_questions(QUESTIONS)
    card = (QUESTIONS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(questions)} questions" in card
    for category, count in Counter(question.category for question in questions).items():
        assert f"| {category} | {count} |" in card
    assert len({question.text for question in questions}) == len(questions)


def test_mistakes_are_refused(tmp_path: Path, tiny_pair: TinyPair, stub: Stub) -> None:
    file = tmp_path / "questions.jsonl"
    for text, message in (
        ('{"question_id": 1, "turns": [{"content": "a"}, {"content": "b"}]}', "exactly one content"),
        ('{"question_id": 1, "turns": [{"content": " "}]}', "is empty"),
        ('{"question_id": 1, "turns": [{"content": "a"}]}\n' * 2, "has 1 twice"),
        ("", "holds no question"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RuadaptError, match=message):
            read_questions(file)
    (tmp_path / "judge.yaml").write_text("system: a\nuser: $question", encoding="utf-8")
    with pytest.raises(RuadaptError, match="must name"):
        read_judge_prompt(tmp_path / "judge.yaml")
    with pytest.raises(RuadaptError, match="not into the URL"):
        Endpoint("http://me:secret@localhost/v1", "judge")
    with pytest.raises(RuadaptError, match="can't be reached"):
        Endpoint("http://127.0.0.1:9/v1", "judge", retries=0).ask(
            [{"role": "user", "content": "?"}], max_tokens=1
        )
    assert "each with its own name" in " ".join(
        arena(stub, tiny_pair.base, "--out", tmp_path, code=2).split()
    )
    assert "is no model folder" in " ".join(arena(stub, tmp_path, "b", "--out", tmp_path, code=2).split())


def test_a_file_of_records_belongs_to_one_run(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with open_records(path) as records:
        records.add({"key": "a"})
        with pytest.raises(RuadaptError, match="in use by another run"), open_records(path):
            pass
    path.write_text('{"key": "a"}\n{"ke\n{"key": "b"}\n', encoding="utf-8")
    with pytest.raises(RuadaptError, match="line 2"), open_records(path):
        pass
    path.write_text('{"key": "a"}\n', encoding="utf-8")
    with open_records(path) as records:
        assert records.done == {"a": {"key": "a"}} and records.dropped == 0


def test_battles_keep_lengths_and_categories(stub: Stub, tmp_path: Path) -> None:
    questions = read_questions(QUESTIONS, 2)
    answered = {
        name: {question.id: Answer(name * size, cut=False) for question in questions}
        for name, size in (("a", 5), ("b", 3), ("c", 1))
    }
    judge = Endpoint(stub.url, "judge")
    table, report = judge_all(
        questions, answered, judge, tmp_path / "judgments.jsonl", prompt=read_judge_prompt(), baseline="b"
    )
    assert report["battles"] == 2 * 2 * 2  # two questions, two pairs with the baseline, two orders
    assert isinstance(table, pd.DataFrame) and set(table["category"]) == {"объяснение"}
    won = table[table["first"] == "a"]
    assert (
        (won["outcome"] == 1).all() and (won["first_length"] == 5).all() and (won["second_length"] == 3).all()
    )
