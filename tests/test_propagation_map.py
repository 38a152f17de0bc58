"""The grid of propagations: its models are those of the package, and its notebook runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import TinyPair
from test_checkpoints import moved, tokenizer_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import propagation, propagation_real
from ruadapt import checkpoints, files
from ruadapt.errors import RuadaptError
from ruadapt.lep import Sums
from ruadapt.training.encoding import encode_chats

TINY: dict[str, Any] = {
    "seeds": [1, 2],
    "amounts": [0, 8_000],
    "strengths": ["middle"],
    "few": ["middle"],
    "rivals": ["middle"],
    "tuning_steps": 2,
    "items": 2,
    "added_rows": 200,
    "prompts": 20,
    "examples": [16],
    "calibration_seeds": [1],
    "calibrated_methods": ["conversion"],
}


@pytest.mark.parametrize("method", ["conversion", "delta"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_model_in_memory_is_the_one_that_lep_writes(
    tmp_path: Path, tiny_pair_untied: TinyPair, method: str, scale: float
) -> None:
    pair = tiny_pair_untied
    words = tokenizer_folder(tmp_path / "tokenizer", pair.base, "extended")
    checkpoints.initialise(pair.base, words, tmp_path / "adapted")
    moved(tmp_path / "adapted")
    folders = pair.base, pair.instruct, tmp_path / "adapted"
    checkpoints.propagate(*folders, tmp_path / "out", method, body_scale=scale)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    found = propagation.body(*folders, scale)
    for role, inputs in checkpoints.lep_inputs(*folders).items():
        found[propagation.NAMES[role]] = propagation.rows_of(
            propagation.Recipe(method, body=scale), Sums(inputs)
        ).float()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_half_a_method_lies_between_it_and_swap(tmp_path: Path, tiny_pair: TinyPair) -> None:
    words = tokenizer_folder(tmp_path / "tokenizer", tiny_pair.base, "extended")
    checkpoints.initialise(tiny_pair.base, words, tmp_path / "adapted")
    moved(tmp_path / "adapted")
    inputs = checkpoints.lep_inputs(tiny_pair.base, tiny_pair.instruct, tmp_path / "adapted")["input"]
    rows = {
        recipe: propagation.rows_of(propagation.Recipe(*recipe), Sums(inputs)).double()
        for recipe in (("swap", 1.0), ("delta", 1.0), ("delta", 0.5), ("chat_vector", 1.0))
    }
    middle = (rows["swap", 1.0] + rows["delta", 1.0]) / 2
    torch.testing.assert_close(rows["delta", 0.5], middle)
    new = torch.bincount(inputs.transfer.indices()[0]) > 1
    assert torch.equal(rows["chat_vector", 1.0][new], rows["swap", 1.0][new])
    assert torch.equal(rows["chat_vector", 1.0][~new], rows["delta", 1.0][~new])


def test_what_a_model_expects_is_its_likelihood(tiny_pair: TinyPair) -> None:
    """Against one answer after another, and against a greedy answer of its own."""
    network = propagation.opened(tiny_pair.instruct)
    questions = [("Кто живёт у реки?", "Анна."), ("What is it?", "a big purse"), ("Да?", "да, да, да")]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in questions
    ]
    examples = encode_chats(rows, AutoTokenizer.from_pretrained(tiny_pair.instruct))
    prompt = [label == -100 for label in examples[0]["labels"]].count(True)
    ids = torch.tensor([examples[0]["input_ids"][:prompt]])
    for _ in range(4):
        ids = torch.cat([ids, network(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    greedy = {"input_ids": ids[0].tolist(), "labels": [-100] * prompt + ids[0, prompt:].tolist()}
    examples.append(greedy)
    found = propagation.expected(network, examples)
    assert found[:, 1].tolist() == [0, 0, 0, 1] and (found[:3, 2] < 0).all() and found[3, 2] > 0
    for row, example in zip(found, examples, strict=True):
        labels = torch.tensor([example["labels"]])
        with torch.no_grad():
            loss = network(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss
        tokens = (labels != -100).sum()
        assert row[0] == pytest.approx(float(loss * tokens / np.log(2)), rel=1e-4)


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match="holds no results of the grid; give run_dir"):
        propagation.read(tmp_path)


def tables(*cells: propagation.Cell, bits: float = 3.0) -> dict[str, pd.DataFrame]:
    """Results of some models on two questions."""
    models = pd.DataFrame([vars(cell) | {"seed": 0} for cell in cells])
    scores = pd.DataFrame({"model": model, "item": item} for model in range(len(cells)) for item in (0, 1))
    cell = {name: [getattr(cells[0], name)] for name in propagation.CELL}
    return {
        "models": models,
        "items": pd.DataFrame({"id": ["one", "two"]}),
        "scores": scores.assign(bits=bits + scores["model"] + scores["item"], exact=False, margin=0.0),
        "fits": pd.DataFrame(cell | {"method": "swap", "explained": 0.0}),
        "instructs": pd.DataFrame({name: [name] for name in propagation.LABELS["instructs"]}),
    }


def test_two_runs_become_one_grid() -> None:
    first, second, third = (propagation.Cell("lep", strength) for strength in ("light", "middle", "strong"))
    there, added = tables(first, second), tables(second, third, bits=4.0)
    found = propagation.joined(there, added)
    assert found["models"]["strength"].tolist() == ["light", "middle", "strong"]
    assert found["scores"]["model"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["scores"]["bits"].tolist() == [3, 4, 4, 5, 5, 6]
    assert len(found["fits"]) == 2 and len(found["instructs"]) == 1
    with pytest.raises(RuadaptError, match="other questions or models"):
        propagation.joined(there, tables(second, third))


def test_the_grid_runs_on_another_model(tmp_path: Path, tiny_pair: TinyPair) -> None:
    """Its questions tune nothing, and each strength makes a model of its own from the one adaptation."""
    chats = [
        {"messages": [{"role": "user", "content": f"Вопрос {number}?"}, {"role": "bot", "content": "Да."}]}
        for number in range(24)
    ]
    files.write_jsonl(tmp_path / "chats.jsonl", chats)
    places = [f"{language}={tmp_path / 'chats.jsonl'}" for language in ("ru", "en")]
    texts = [f"{language}={propagation.WORLD / f'{language}_train.jsonl.gz'}" for language in ("ru", "en")]
    sizes = {"characters": 8_000, "tuning_steps": 2, "items": 3, "added_rows": 200, "processes": 1}
    propagation_real.main(
        tmp_path / "run", tmp_path / "out", tiny_pair.instruct, texts, places, "gentle strong", **sizes
    )
    models, items, _, drifts, _ = propagation.read(tmp_path / "out")
    assert models["kind"].value_counts().to_dict() == {
        "lep": 2 * len(propagation_real.RECIPES),
        "original": 2,
    }
    assert items["language"].value_counts().to_dict() == {"ru": 3, "en": 3}
    assert drifts["mean_cosine"].is_monotonic_decreasing
    questions, tuning = (
        {row["messages"][0]["content"] for row in files.read_jsonl(tmp_path / "run" / f"{name}.jsonl")}
        for name in ("questions", "chat")
    )
    assert len(tuning) == 18 and not questions & tuning


def run(tmp_path: Path, **parameters: Any) -> list[Any]:
    root = files.project_root()
    executed = papermill.execute_notebook(
        root / "notebooks" / "propagation_map.ipynb",
        tmp_path / "executed.ipynb",
        parameters,
        cwd=root / "notebooks",  # where JupyterLab starts its kernels
    )
    return [output for cell in executed.cells for output in cell.get("outputs", [])]


def test_the_map_is_drawn_from_what_is_committed(tmp_path: Path) -> None:
    committed = files.project_root() / "data" / "results" / "propagation"
    for path in committed.iterdir():
        (tmp_path / path.name).symlink_to(path)
    outputs = run(tmp_path, results_dir=str(tmp_path), pictures_dir=str(tmp_path))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (tmp_path / "map.pdf").exists()
    assert "Ahead of conversion" in outputs[-1]["data"]["text/markdown"]


def test_the_grid_runs_and_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "results"
    places = {"run_dir": str(tmp_path / "run"), "results_dir": str(results), "pictures_dir": str(tmp_path)}
    run(tmp_path, grid=TINY, least_accuracy=0.0, **places)
    study = propagation.Study(tmp_path / "run", propagation.Grid(**TINY))
    models = propagation.read(results)[0]
    assert set(models["kind"]) == {
        *("original", "lep", "ceiling", "calibrated"),
        *("elchat", "elchat merged", "elchat embeddings", "elchat embeddings merged"),
        "lep embeddings",
    }
    jobs = [*study.training_jobs(), *(job for _, _, job in study.pair_jobs())]
    before = {job["target"]: job["target"].stat().st_mtime_ns for job in jobs}
    study.run(1)
    assert before == {target: target.stat().st_mtime_ns for target in before}
