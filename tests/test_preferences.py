"""The notebook of preference tuning: on its defaults, as a chain on own pairs, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import papermill
import pytest
import torch
from conftest import TinyPair
from papermill.exceptions import PapermillExecutionError
from safetensors.torch import load_file

from ruadapt import files
from ruadapt.checkpoints import verify

SMALL = {"steps": 20, "batch_size": 8, "learning_rate": 2e-3, "lora_rank": 8, "max_length": 96, "heldout": 12}


def run(tmp_path: Path, **parameters: Any) -> Any:
    notebooks = files.project_root() / "notebooks"  # where JupyterLab starts its kernels
    paths = (notebooks / "preferences.ipynb", tmp_path / "executed.ipynb")
    return papermill.execute_notebook(*paths, parameters, cwd=notebooks)


def pairs(count: int) -> list[dict[str, Any]]:
    """Polite answers are preferred to rude ones, whatever the question."""
    places = ["у реки", "в лесу", "в городе", "в саду", "за рынком", "у моря"]
    return [
        {
            "prompt": [{"role": "user", "content": f"Где живёт врач {n}?"}],
            "chosen": [{"role": "bot", "content": f"Врач живёт {places[n % 6]}."}],
            "rejected": [{"role": "assistant", "content": f"Отстань, {places[n % 6]}."}],
        }
        for n in range(count)
    ]


def said(executed: Any) -> str:
    outputs = (output.get("data", {}) for output in executed.cells[-1]["outputs"])
    return str(next(data["text/markdown"] for data in outputs if "text/markdown" in data))


def test_the_embedded_pair_learns_to_answer_in_sentences(tmp_path: Path) -> None:
    source = files.project_root() / "data" / "pair" / "instruct"
    executed = run(tmp_path, out=str(tmp_path / "tuned"))
    assert "is the likelier one in 100 %" in said(executed)
    found = verify(tmp_path / "tuned")
    assert found["tied"] and found["chat"]
    for name in ("config.json", "generation_config.json"):
        assert files.read_json(tmp_path / "tuned" / name) == files.read_json(source / name)


def test_a_chain_goes_on_from_link_to_link(tiny_pair_untied: TinyPair, tmp_path: Path) -> None:
    source = tmp_path / "source"
    # As OpenChat: the tokenizer's end token does not end the model's answers, and there is none for padding.
    source.mkdir()
    for path in tiny_pair_untied.instruct.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    words = files.read_json(source / "tokenizer_config.json") | {"eos_token": "<|endoftext|>"}
    del words["pad_token"]
    files.write_json(source / "tokenizer_config.json", words)
    files.write_jsonl(tmp_path / "pairs.jsonl", [*pairs(60), {**pairs(1)[0], "sonnet_approved": False}])
    for method, place in (("kto", source), ("simpo", tmp_path / "kto")):
        options = SMALL | {"preferences": str(tmp_path / "pairs.jsonl"), "method": method}
        executed = run(tmp_path, model=str(place), out=str(tmp_path / method), **options)
        found = re.findall(r"[+-]\d+\.\d+", said(executed).replace("−", "-"))
        before, after, change, low, high = map(float, found[:5])
        assert after > before + 0.5 and change == pytest.approx(after - before, abs=0.011)
        assert 0 < low < change < high  # all of twelve prompts moved the same way
        assert "48 pairs tune, 12 are held out" in str(executed.cells)
        old, new = (load_file(folder / "model.safetensors") for folder in (place, tmp_path / method))
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        assert len(moved) == 14 and all("_proj" in name for name in moved)  # seven in each of two layers
    files.write_jsonl(tmp_path / "bad.jsonl", [{**pairs(1)[0], "rejected": "да"}])
    with pytest.raises(PapermillExecutionError, match="row 0: messages with role and content"):
        run(tmp_path, out=str(tmp_path / "none"), preferences=str(tmp_path / "bad.jsonl"))
    with pytest.raises(PapermillExecutionError, match="exists and is not empty"):
        run(tmp_path, out=str(tmp_path / "kto"))
