"""Speed: every model writes the same text, and the table is complete."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyPair
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation import speed
from ruadapt.evaluation.models import load
from ruadapt.evaluation.speed import measure_speed
from ruadapt.files import project_root

DIALOGUES = {
    "en": [("Where does the teacher live?", "In the old house."), ("Who?", "The sailor.")],
    "ru": [("Кто старше, моряк или садовник?", "Моряк старше садовника на 12 лет.")],
}


def test_every_model_writes_the_same_characters(tiny_pair: Any, tiny_pair_untied: Any) -> None:
    folders = {"original": tiny_pair.instruct, "adapted": tiny_pair_untied.instruct}
    table = measure_speed(folders, DIALOGUES, repeats=2)
    assert len(table) == 2 * 2 * 2
    assert not table.duplicated(["model", "language", "repeat"]).any()
    written = {language: sum(len(answer) for _, answer in pairs) for language, pairs in DIALOGUES.items()}
    assert table["characters"].to_list() == table["language"].map(written).to_list()
    both = table["reading_seconds"] + table["writing_seconds"]
    assert table["characters_per_second"].to_list() == pytest.approx(table["characters"] / both)
    assert (table[["reading_seconds", "writing_seconds"]] > 0).all(axis=None)


def test_reading_and_writing_are_told_apart(tiny_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reader: whatever reading costs, seconds per written token are those of writing."""
    monkeypatch.setattr(speed, "phases", lambda model, ids, answer, tick: (100.0, len(answer) - 1.0))
    row = measure_speed({"original": tiny_pair.instruct}, DIALOGUES, repeats=1).iloc[0]
    assert row["seconds_per_written_token"] == 1 and row["reading_seconds"] == 200
    assert row["characters_per_second"] == row["characters"] / (200 + row["writing_seconds"])
    asked = sum(len(prompt) for prompt, _ in DIALOGUES["en"])
    assert row["reading_characters_per_second"] == asked / 200
    tokenizer = load(tiny_pair.instruct, device="cpu")[1]
    counts = [(len(text), len(tokenizer.tokenize(text))) for _, text in DIALOGUES["en"]]
    behind = sum(length * (tokens - 1) / tokens for length, tokens in counts)
    assert row["writing_characters_per_second"] * row["writing_seconds"] == pytest.approx(behind)


def test_the_answer_is_dictated_whatever_the_model_would_say(tiny_pair: Any) -> None:
    """Prompt and answer pass through the model in order, and each token is read behind all those before."""
    reader = speed._Transformers(tiny_pair.instruct)
    model, tokenizer = reader._model, reader._tokenizer
    read: list[Any] = []
    told: list[Any] = []

    def see(_: Any, arguments: Any, given: dict[str, Any], output: Any) -> None:
        read.extend(given["input_ids"].tolist())
        told.append(output.logits[0, -1])

    model.register_forward_hook(see, with_kwargs=True)
    for prompt, answer in DIALOGUES["en"] + DIALOGUES["ru"]:
        ids, dictated = speed.task(reader, prompt, answer)
        read.clear()
        speed.phases(reader, ids, dictated, lambda: None)
        assert read == [ids, *([token] for token in dictated[:-1])]
        assert tokenizer.decode(dictated) == answer
        last = told[-1]
        with torch.inference_mode():
            whole = model(input_ids=torch.tensor([ids + dictated[:-1]]))
        assert torch.allclose(last, whole.logits[0, -1], atol=1e-4)


def test_mistakes_are_refused(tiny_pair: Any) -> None:
    folders = {"original": tiny_pair.instruct}
    with pytest.raises(RuadaptError, match="can't be timed; give one of two tokens or more, within"):
        measure_speed(folders, {"en": [("Who?", "the sailor " * 500)]}, repeats=1)
    with pytest.raises(RuadaptError, match="1 tokens of an answer behind 'Who' can't be timed"):
        measure_speed(folders, {"en": [("Who", "I")]}, repeats=1)
    with pytest.raises(RuadaptError, match="speed needs models, and prompts with answers"):
        measure_speed(folders, {"ru": []})


def test_the_command_writes_tables_and_json(
    tiny_pair: TinyPair, tiny_pair_untied: TinyPair, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in DIALOGUES["ru"] + DIALOGUES["en"][1:]]
    prompts.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    arguments = ["speed", tiny_pair.instruct, f"new={tiny_pair_untied.instruct}", "--prompts", prompts]
    arguments += ["--repeats", 2, "--out", tmp_path / "out", "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["model"] for row in report["speed"]} == {"original", "new"}
    assert {row["phase"] for row in report["speed"]} == {"reading", "writing"}
    for name in ("speed.md", "speed.csv", "timings.csv"):
        assert (tmp_path / "out" / name).stat().st_size
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_the_original_writes_the_answers_that_a_file_lacks(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "Кто старше, моряк или садовник? Моряк старше садовника на 12 лет.\n", encoding="utf-8"
    )
    arguments = ["speed", project_root() / "data" / "pair" / "instruct", "--prompts", prompts, "--repeats", 2]
    result = CliRunner().invoke(
        app, [*map(str, arguments), "--characters", "5", "--out", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompts"] == 1 and {row["model"] for row in report["speed"]} == {"original"}


def test_a_missing_file_of_prompts_is_named(tiny_pair: TinyPair, tmp_path: Path) -> None:
    asked = ["speed", tiny_pair.instruct, "--prompts", "nowhere.txt", "--out", tmp_path]
    result = CliRunner().invoke(app, list(map(str, asked)))
    assert result.exit_code == 2 and "nowhere.txt does not exist" in " ".join(result.output.split())


def test_llama_cpp_is_dictated_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Every token of prompt and answer passes through the engine, in order and from an empty cache."""

    class Engine:
        metadata = {"tokenizer.chat_template": "template"}  # noqa: RUF012
        read: list[list[int]]

        def __init__(self, file: str, **options: Any) -> None:
            if not file.endswith(".gguf"):
                raise ValueError("no GGUF file")

        def reset(self) -> None:
            Engine.read = []

        def eval(self, ids: list[int]) -> None:
            Engine.read.append(ids)
            time.sleep(0.001)

        def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
            assert not add_bos  # the template has it
            return [*text[:20]]

        def detokenize(self, ids: list[int], special: bool) -> bytes:
            return str(ids[0]).encode()

        def token_eos(self) -> int:
            return 7

        def token_bos(self) -> int:
            return -1

        def n_vocab(self) -> int:
            return 256

    class Formatter:
        def __init__(self, template: str, eos_token: str, bos_token: str) -> None:
            assert (template, eos_token, bos_token) == ("template", "7", "")

        def __call__(self, messages: Any) -> Any:
            return SimpleNamespace(prompt=f"<{messages[0]['content']}>")

    stubs = {"llama_cpp": ModuleType("llama_cpp"), "llama_cpp.llama_chat_format": ModuleType("format")}
    vars(stubs["llama_cpp"]).update(Llama=Engine)
    vars(stubs["llama_cpp.llama_chat_format"]).update(Jinja2ChatFormatter=Formatter)
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    files = {"original": tmp_path / "one.gguf", "adapted": tmp_path / "two.gguf"}
    table = measure_speed(files, {"": [("Who?", "The sailor.")]}, repeats=2, engine="llama.cpp")
    assert sorted(table["model"]) == ["adapted"] * 2 + ["original"] * 2 and set(table["rows"]) == {256}
    assert Engine.read == [[*b"<Who?>"], *([letter] for letter in b"The sailor")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who?\n", encoding="utf-8")
    files["original"].touch()
    asked = ["speed", files["original"], "--prompts", prompts, "--engine", "llama.cpp", "--out", tmp_path]
    result = CliRunner().invoke(app, list(map(str, asked)))
    assert result.exit_code == 2 and "give each prompt its `answer`" in result.output
    with pytest.raises(RuadaptError, match=r"no GGUF file; llama\.cpp takes files"):
        measure_speed({"one": tmp_path}, {"": [("Who?", "The sailor.")]}, engine="llama.cpp")
