"""The hub over HTTP, from a server on this machine: what is asked of it, what comes back, what goes wrong."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import TinyPair
from hub_server import CUT, Files, Hub, serve
from huggingface_hub import close_session, constants

from ruadapt.errors import RuadaptError
from ruadapt.hub import fetch_model
from ruadapt.vocab import fetch_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that this process and the ones it starts talk to, with a cache of its own."""
    with serve() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "token",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        close_session()  # one made by an earlier test may go through a proxy
        yield hub


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_by_name_is_downloaded_without_pickles_at_its_revision(hub: Hub, tiny_pair: TinyPair) -> None:
    others = {"pytorch_model.bin": b"\x80", "original/consolidated.safetensors": b"", "onnx/model.onnx": b""}
    first = hub.commit("models/someone/base", contents(tiny_pair.base) | others)
    hub.commit("models/someone/base", contents(tiny_pair.instruct) | others)
    hub.fail("GET .*model.safetensors", CUT)  # the library goes on where it was cut
    assert contents(fetch_model(f"someone/base@{first}")) == contents(tiny_pair.base)
    assert contents(fetch_model("someone/base")) == contents(tiny_pair.instruct)
    assert fetch_tokenizer(f"someone/base@{first}").get_vocab_size() == 600
    assert not [request for request in hub.requests if any(name in request for name in others)]


def test_a_model_that_cannot_be_had_is_one_message(
    hub: Hub, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("models/someone/base", contents(tiny_pair.base))
    for name, fault, told in (
        ("someone/none", None, "Repository Not Found"),
        ("someone/base@v2", None, "Revision Not Found"),
        ("someone/base", "GatedRepo", "accept the terms of a gated model"),
        ("someone/base", 401, "401 Unauthorized"),
    ):
        if fault:
            hub.fail("/api/models/someone/base", fault)
        with pytest.raises(RuadaptError, match=told):
            fetch_model(name)
    hub.fail("GET .*model.safetensors", 500)
    with pytest.raises(RuadaptError, match=r"500 Internal.*keeps the files it has"):
        fetch_model("someone/base")
    before = len(hub.requests)
    assert contents(fetch_model("someone/base")) == contents(tiny_pair.base)
    files = [request for request in hub.requests[before:] if request.startswith("GET /someone")]
    assert files == [f"GET /someone/base/resolve/{commit}/model.safetensors"]

    # Offline, and with the network down, what the cache has whole is had.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for offline, told in ((False, "refused"), (True, "set HF_HUB_OFFLINE=0")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert fetch_model("someone/base").name == commit
        with pytest.raises(RuadaptError, match=told):
            fetch_model("someone/other")


def test_data_sets_are_streamed_by_name(hub: Hub, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "bot", "content": f"ответ {n}"}], "opus_score": n} for n in range(9)]
    table = io.BytesIO()
    pd.DataFrame(chats).to_parquet(table)
    lines = "".join(json.dumps({"text": f"слово {n}"}) + "\n" for n in range(9)).encode()
    card = "---\nconfigs:\n- config_name: news\n  data_files:\n  - split: dev\n    path: news/*.jsonl\n---\n"
    hub.commit("datasets/someone/chats", {"data/train-00000-of-00001.parquet": table.getvalue()})
    parts = card.replace("news", "rcb").replace("dev", "test").encode()
    hub.commit("datasets/RefalMachine/darumeru", {"README.md": parts, "rcb/1.jsonl": lines})
    hub.commit("datasets/someone/texts", {"README.md": card.encode(), "news/1.jsonl": lines})
    # Another process: `datasets` reads its settings once, and this one has been offline.
    code = (
        "from ruadapt.data_sets import *; from ruadapt.training.chats import *; "
        "print([*read_column('someone/texts', 'text', 'dev', config='news')][-1]); "
        "from ruadapt.evaluation.documents import _rows; "
        "print(len(_rows('rcb', 'test', ''))); "
        "print([row['messages'] for row in read_chats('someone/chats', min_score=8)]); "
        "next(read_rows('someone/none'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    told = [{"role": "assistant", "content": "ответ 8"}]
    assert done.stdout.splitlines() == ["слово 8", "9", str([told])]
    assert "RuadaptError: data set someone/none cannot be read" in done.stderr
