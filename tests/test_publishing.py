"""Publishing: what a card says comes from the run; the folder loads without code; nothing is sent unasked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import TinyPair
from typer.testing import CliRunner

from ruadapt import files
from ruadapt.cli import app
from ruadapt.commands import publishing
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import SCORE_COLUMNS


@pytest.fixture
def model(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    """A calibrated model in a run with recorded parameters and scores."""
    run = tmp_path / "run"
    folder = run / "07_calibration" / "extended" / "instruct" / "seed1"
    shutil.copytree(tiny_pair.instruct, folder)
    (folder / "key.json").write_text("{}")
    mix = [{"source": "dichspace/darulm", "language": "ru"}, {"source": "data/world", "language": "en"}]
    pair = {"base_model": "Qwen/Qwen2.5-0.5B", "instruct_model": "Qwen/Qwen2.5-0.5B-Instruct@v1"}
    for stage, parameters in {
        "01_corpus": {"corpus_mix": mix},
        "02_model_pair": {"run_dir": str(run), **pair},
        "07_calibration": {
            "calibration_dataset": "IlyaGusev/saiga_scored",
            "calibration_data": ["self", "instruct"],
        },
    }.items():
        files.write_json(run / "provenance" / f"{stage}.json", {"key": {"parameters": parameters}})
    rows = []
    for name, value in (
        ("calibrated-extended-instruct-seed1", 0.5),
        ("original-instruct", 0.75),
        ("other", 0.1),
    ):
        for group, task in (("knowledge", "facts"), ("micro", "")):
            found = {"model": name, "language": "ru", "group": group, "task": task, "items": 40}
            rows.append(found | {"value": value, "low": value - 0.125, "high": value + 0.125})
    (run / "08_evaluation").mkdir()
    pd.DataFrame(rows, columns=SCORE_COLUMNS).to_csv(run / "08_evaluation" / "scores.csv", index=False)
    return folder


def test_the_card_tells_what_the_run_recorded(model: Path) -> None:
    card = str(publishing.model_card(model, "someone/RuQwen"))
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "language": ["ru", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"],
        "datasets": ["dichspace/darulm", "IlyaGusev/saiga_scored"],
    }
    assert "    instruct_model: Qwen/Qwen2.5-0.5B-Instruct@v1\n" in text
    assert "    calibration_data:\n    - self\n    - instruct\n" in text
    assert "| ru | micro, mean | 40 | 0.500 [0.375, 0.625] | 0.750 [0.625, 0.875] |" in text
    assert "| ru | facts | 40 | 0.500" in text and "0.100" not in text
    assert str(model.parents[3]) not in card


def test_nothing_is_sent_unless_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[str]] = []

    def upload(folder: Path, names: list[str], card: Any, repo: str, private: bool) -> str:
        assert (folder, repo, private) == (model, "someone/RuQwen", True)
        sent.append(names)
        return "https://hub/commit"

    monkeypatch.setattr(publishing, "upload", upload)
    call = ["publish", str(model), "--repo", "someone/RuQwen", "--json"]
    dry = CliRunner().invoke(app, call)
    assert dry.exit_code == 0
    report = json.loads(dry.stdout)
    assert report["pushed"] is False and report["verified"]["chat"] and report["card"].startswith("---\n")
    assert "key.json" not in report["files"] and not sent
    pushed = CliRunner().invoke(app, [*call, "--push", "--private"])
    assert json.loads(pushed.stdout)["pushed"] == "https://hub/commit"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(sent[0])


def test_a_model_made_by_a_command_keeps_its_record(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pair.instruct, tmp_path / "lep"))
    sources = {"base": "Qwen/Qwen2.5-0.5B", "instruct": "Qwen/Qwen2.5-0.5B-Instruct", "adapted": "trained"}
    made_from = {role: {"name": name, "revision": None} for role, name in sources.items()}
    record = {"command": "ruadapt lep", "options": {"method": "delta"}, "made_from": made_from}
    files.write_json(folder / "ruadapt.json", record)
    (folder / "preprocessor_config.json").write_text("{}")
    card = publishing.model_card(folder, "someone/model")
    assert yaml.safe_load(str(card).split("---\n")[1])["base_model"] == [sources["instruct"], sources["base"]]
    assert "    adapted:\n      name: trained\n" in str(card) and "    method: delta\n" in str(card)
    assert {"ruadapt.json", "preprocessor_config.json"} <= set(publishing.published_files(folder))


def test_what_cannot_be_published_is_refused(model: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="name the licence with --licence"):
        publishing.model_card(tiny_pair.instruct, "someone/model")
    assert "not evaluated" in str(publishing.model_card(tiny_pair.instruct, "someone/model", "mit"))
    with pytest.raises(RuadaptError, match="no complete model folder"):
        publishing.published_files(tmp_path)
    config = files.read_json(model / "tokenizer_config.json")
    files.write_json(model / "tokenizer_config.json", config | {"auto_map": {}})
    with pytest.raises(RuadaptError, match="only with code of the folder"):
        publishing.published_files(model)
    assert CliRunner().invoke(app, ["publish", str(model), "--repo", "model"]).exit_code == 2


def test_an_upload_replaces_the_old_model_and_fails_in_one_message(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **options: Any) -> None:
            asked.update(repo=repo, **options)

        def upload_folder(self, **options: Any) -> str:
            asked.update(options)
            if options["repo_id"] == "someone/refused":
                raise RuntimeError("file a") from ValueError("403\nForbidden")
            return "https://hub/commit"

    class Card:
        def push_to_hub(self, repo: str) -> None:
            asked["card"] = repo

    monkeypatch.setattr(publishing, "HfApi", Api)
    card: Any = Card()
    assert publishing.upload(model, ["a"], card, "someone/model", private=True) == "https://hub/commit"
    assert asked["private"] and asked["exist_ok"] and asked["folder_path"] == model
    assert asked["allow_patterns"] == ["a"] and asked["card"] == "someone/model"
    # Readers take one file of weights before shards: what the new model lacks has to go.
    assert {"model*.safetensors", "config.json", "tokenizer.json"} <= set(asked["delete_patterns"])
    with pytest.raises(RuadaptError, match=r"someone/refused could not be uploaded \(file a 403 Forbidden\)"):
        publishing.upload(model, [], card, "someone/refused", private=False)
