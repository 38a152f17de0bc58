"""Preference tuning: each method raises the held-out margin, chained, merged, resumed; bad input is named."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import files
from ruadapt.errors import RuadaptError
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.preference import fitting, margins, prefer
from ruadapt.training.recording import Recorder

OPTIONS = {"steps": 20, "batch_size": 8, "learning_rate": 2e-3, "seed": 3, "lora_rank": 8, "max_length": 96}
OPTIONS["bf16"] = False  # a margin that is measured again is the same


def toy_pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Polite answers are preferred to rude ones, whatever the question."""
    places = ["у реки", "в лесу", "в городе", "в саду", "за рынком", "у моря"]
    return [
        {
            "prompt": [{"role": "user", "content": f"Где живёт врач {n}?"}],
            "chosen": [{"role": "assistant", "content": f"Врач живёт {places[n % 6]}."}],
            "rejected": [{"role": "assistant", "content": f"Отстань, {places[n % 6]}."}],
        }
        for n in range(start, start + count)
    ]


def ends(report: dict[str, Any]) -> list[dict[str, float]]:
    """Return the margins before and after a training."""
    return [
        {
            name: value
            for name, value in report["evaluations"][place].items()
            if name not in ("step", "tokens")
        }
        for place in (0, -1)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    files.write_jsonl(folder / "train.jsonl", toy_pairs(48))
    files.write_jsonl(folder / "heldout.jsonl", toy_pairs(12, start=100))
    return folder / "train.jsonl", folder / "heldout.jsonl"


@pytest.mark.parametrize("method", PREFERENCE_METHODS)
def test_each_method_raises_the_margin_of_pairs_it_has_not_seen(
    method: str, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, data: tuple[Path, Path], tmp_path: Path
) -> None:
    # As OpenChat: the tokenizer's end token does not end the model's answers, and there is none for padding.
    source = tmp_path / "source"
    shutil.copytree((tiny_pair if method == "simpo" else tiny_pair_untied).instruct, source)
    words = files.read_json(source / "tokenizer_config.json") | {"eos_token": "<|endoftext|>"}
    del words["pad_token"]
    files.write_json(source / "tokenizer_config.json", words)
    target = tmp_path / method
    report = prefer(source, target, *data, method, OPTIONS)
    before, after = ends(report)
    assert before["pairs"] == 12 and report["steps"] == 20
    assert after["margin_per_token"] > before["margin_per_token"] + 0.05
    assert after["margin"] > before["margin"] + 0.5
    # What was measured is what was written: reloaded, configs and tying as before.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    again = margins(model, fitting(list(files.read_jsonl(data[1])), tokenizer, 96))
    assert again == pytest.approx(after, rel=1e-3, abs=1e-4)
    for name in ("config.json", "generation_config.json"):
        old, new = (files.read_json(folder / name) for folder in (source, target))
        assert {**old, "transformers_version": ""} == {**new, "transformers_version": ""}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (method == "simpo")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([method, "source"])


def test_a_chain_goes_on_from_link_to_link_and_a_killed_one_from_its_checkpoint(
    tiny_pair: TinyPair, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"steps": 6, "save_every": 2}
    first = prefer(tiny_pair.instruct, tmp_path / "kto", *data, "kto", options)
    second = prefer(tmp_path / "kto", tmp_path / "simpo", *data, "simpo", options)
    assert ends(second)[0] == pytest.approx(ends(first)[1], rel=1e-3, abs=1e-4)
    assert prefer(tmp_path / "kto", tmp_path / "simpo", *data, "simpo", options) == second

    class Killed(Exception):
        pass

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed

    again = tmp_path / "again" / "simpo"
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Recorder, "on_step_end", stop)
        prefer(tmp_path / "kto", again, *data, "simpo", options)
    assert not again.exists() and list(again.parent.glob(".simpo.*.checkpoints/checkpoint-4"))
    resumed = prefer(tmp_path / "kto", again, *data, "simpo", options)
    weights = [load_file(folder / "model.safetensors") for folder in (again, tmp_path / "simpo")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert ends(resumed) == ends(second) and [path.name for path in again.parent.iterdir()] == ["simpo"]


def test_what_lora_adds_is_merged_at_the_stated_scale(
    tiny_pair: TinyPair, data: tuple[Path, Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"steps": 2}
    folders = {scale: tmp_path / str(scale) for scale in (0.0, 0.5, 1.0)}
    for scale, folder in folders.items():
        prefer(tiny_pair.instruct, folder, *data, "dpo", options | {"merge_scale": scale})
    old = load_file(tiny_pair.instruct / "model.safetensors")
    new = {scale: load_file(folder / "model.safetensors") for scale, folder in folders.items()}
    assert all(torch.equal(new[0.0][name], old[name]) for name in old)
    moved = [name for name in old if not torch.equal(new[1.0][name], old[name])]
    assert len(moved) == 14  # seven linear layers in each of two
    for name in moved:
        torch.testing.assert_close(
            new[0.5][name] - old[name], 0.5 * (new[1.0][name] - old[name]), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("orpo", {}, "unknown preference method 'orpo'; known: dpo, kto, simpo"),
        ("dpo", {"max_length": 4}, "0 of 48 pairs and 0 of 12 held-out ones fit into max_length 4"),
        ("dpo", {"batch_size": 64}, "a batch needs 64"),
        (
            "simpo",
            {"learning_rate": 1e30, "steps": 10, "log_every": 1},
            "loss became .*lower the learning rate",
        ),
    ],
)
def test_bad_options_are_named_and_leave_nothing(
    method: str,
    changes: dict[str, Any],
    message: str,
    tiny_pair: TinyPair,
    data: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(RuadaptError, match=message):
        prefer(tiny_pair.instruct, tmp_path / "out", *data, method, OPTIONS | changes)
    assert not (tmp_path / "out").exists()


def test_margins_are_differences_of_log_likelihoods(tiny_pair: TinyPair) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.instruct).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    pairs = toy_pairs(3)
    expected, per_token = [], []
    for pair in pairs:
        sums, means = [], []
        for name in ("chosen", "rejected"):
            prompt = f"<|user|>{pair['prompt'][0]['content']}<|end|><|assistant|>"
            ids = tokenizer(prompt + pair[name][0]["content"] + "<|end|>", return_tensors="pt").input_ids
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
            means.append(sums[-1] / (ids.shape[1] - start))
        expected.append(sums[0] - sums[1])
        per_token.append(means[0] - means[1])
    found = margins(model, fitting(pairs, tokenizer, 96))
    assert found["margin_per_token"] == pytest.approx(sum(per_token) / 3, rel=1e-4)
    assert found["margin"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert found["accuracy"] == sum(value > 0 for value in expected) / 3
