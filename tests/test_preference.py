"""Preference tuning: each method raises the held-out margin, chained, merged, resumed; bad input is named."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import files
from ruadapt.preference import METHODS, margins, prefer

OPTIONS = {"steps": 20, "batch_size": 8, "learning_rate": 2e-3, "seed": 3, "lora_rank": 8, "max_length": 96}
RATES = {"dpo": 2e-3, "kto": 2e-3, "simpo": 2e-3}


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    files.write_jsonl(folder / "train.jsonl", toy_pairs(48))
    files.write_jsonl(folder / "heldout.jsonl", toy_pairs(12, start=100))
    return folder / "train.jsonl", folder / "heldout.jsonl"


@pytest.mark.parametrize("method", METHODS)
def test_each_method_raises_the_margin_of_pairs_it_has_not_seen(
    method: str, tiny_pair: TinyPair, tiny_pair_untied: TinyPair, data: tuple[Path, Path], tmp_path: Path
) -> None:
    source = (tiny_pair if method == "simpo" else tiny_pair_untied).instruct
    target = tmp_path / method
    report = prefer(source, target, *data, method, OPTIONS | {"learning_rate": RATES[method]})
    print(method, report["before"], report["after"], [row["loss"] for row in report["loss"]])
    assert report["before"]["pairs"] == 12 and report["steps"] == 20
    assert report["after"]["margin_per_token"] > report["before"]["margin_per_token"] + 0.05
    assert report["after"]["margin"] > report["before"]["margin"] + 0.5
    # What was measured is what was written: reloaded, configs and tying as before.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    again = margins(model, tokenizer, list(files.read_jsonl(data[1])))
    assert again == pytest.approx(report["after"], rel=1e-3, abs=1e-4)
    for name in ("config.json", "generation_config.json"):
        old, new = (files.read_json(folder / name) for folder in (source, target))
        assert {**old, "transformers_version": ""} == {**new, "transformers_version": ""}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (method == "simpo")
    assert sorted(path.name for path in tmp_path.iterdir()) == [method]
