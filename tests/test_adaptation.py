"""Units of continued pre-training and calibration: same text for all, done once, shares as stated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import TrainerState

from ruadapt import checkpoints, files, vocab
from ruadapt.errors import RuadaptError
from ruadapt.pipeline import adaptation
from ruadapt.pipeline.adaptation import adapt, calibrate, mix
from ruadapt.training.recording import Recorder
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import fit

OPTIONS = {"batch_size": 4, "learning_rate": 0.03, "seed": 1, "train": "embeddings"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    texts = {"train": RUSSIAN.splitlines() * 4, "ru": RUSSIAN.splitlines(), "en": ENGLISH.splitlines()}
    for name, lines in texts.items():
        files.write_jsonl(folder / f"{name}.jsonl", ({"text": line} for line in lines))
    return {name: folder / f"{name}.jsonl" for name in texts}


def unit(pair: TinyPair, corpus: dict[str, Path], target: Path, **changes: object) -> dict[str, object]:
    settings = {
        "source": pair.base,
        "target": target,
        "corpus": corpus["train"],
        "heldout": {"ru": corpus["ru"], "en": corpus["en"]},
        "characters": 2000,
        "epochs": 2,
        "evaluations": 3,
        "documents": 4,
        "block_size": 32,
        "options": OPTIONS,
    }
    return adapt(**(settings | changes))  # type: ignore[arg-type]


def extended(pair: TinyPair, folder: Path) -> Tokenizer:
    """Write the base with 30 new rows to `folder/source`; return its tokenizer."""
    new = vocab.extend(pair.base, RUSSIAN.splitlines() * 40, added_rows=30)
    vocab.save_tokenizer(folder / "tokenizer", new, pair.base)
    checkpoints.initialise(pair.base, folder / "tokenizer", folder / "source")
    return new


def test_a_unit_trains_measures_and_is_done_once(
    tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = unit(tiny_pair, corpus, tmp_path / "seed1")
    evaluations = report["evaluations"]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == report["steps"]
    assert evaluations[-1]["ru"] < evaluations[0]["ru"]
    assert report["tokens"] == report["steps"] * 4 * 32
    assert 2000 <= report["characters"] < 2200
    assert (tmp_path / "seed1" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["seed1"]
    monkeypatch.setattr(adaptation, "fit", None)  # a second training would fail
    assert unit(tiny_pair, corpus, tmp_path / "seed1") == report
    with pytest.raises(TypeError):
        unit(tiny_pair, corpus, tmp_path / "seed1", epochs=1)


def test_checkpoints_of_another_training_are_not_resumed(
    tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def stop(self: Recorder, args: object, state: TrainerState, *_: object, **__: object) -> None:
        if state.global_step == 3:
            raise Killed

    options = OPTIONS | {"save_every": 1}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Recorder, "on_step_end", stop)
        unit(tiny_pair, corpus, tmp_path / "seed1", options=options)
    assert list(tmp_path.glob(".seed1.*.checkpoints/checkpoint-*"))
    other = options | {"learning_rate": 1e-4}
    found = [unit(tiny_pair, corpus, tmp_path / name, options=other)["loss"] for name in ("seed1", "plain")]
    assert found[0] == found[1] and {path.name for path in tmp_path.iterdir()} == {"seed1", "plain"}


def test_packed_text_is_found_again(
    tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, counts = adaptation.packed(tmp_path / "a", tiny_pair.base, corpus["train"], 2000, 16)
    assert counts["characters"] >= 2000
    monkeypatch.setattr(adaptation, "pack", None)  # packing again would fail
    again = adaptation.packed(tmp_path / "a", tiny_pair.base, corpus["train"], 2000, 16)
    assert again[1] == counts and np.array_equal(again[0][:]["input_ids"], blocks[:]["input_ids"])


def test_replay_is_the_stated_share_of_all_characters(
    tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path
) -> None:
    text = (tiny_pair.base, corpus["train"], 900, 16)
    blocks, read = adaptation.packed(tmp_path / "blocks", *text, corpus["en"], 0.25)
    longest = max(map(len, ENGLISH.splitlines()))
    assert 0 <= read["replayed"] - read["characters"] / 3 <= longest
    plain, _ = adaptation.packed(tmp_path / "plain", *text)
    # The corpus stands first and unchanged; the replay follows.
    assert np.array_equal(blocks[: len(plain) - 1]["input_ids"], plain[:-1]["input_ids"])
    report = unit(tiny_pair, corpus, tmp_path / "a", replay=corpus["en"], replay_share=0.25)
    assert report["replayed"] > 0 and report["tokens"] > unit(tiny_pair, corpus, tmp_path / "b")["tokens"]
    with pytest.raises(RuadaptError, match="share is 1"):
        unit(tiny_pair, corpus, tmp_path / "c", replay=corpus["en"], replay_share=1.0)


def test_new_rows_are_those_the_original_lacks(tiny_pair: TinyPair, tmp_path: Path) -> None:
    new = extended(tiny_pair, tmp_path)
    numbers = list(range(600, vocab.rows(new)))
    faster = {"new_rows_learning_rate_factor": 2.0}
    assert adaptation._new_rows(tmp_path / "source", tiny_pair.base, faster | {"train": "all"}) == numbers
    assert adaptation._new_rows(tmp_path / "source", tiny_pair.base, faster | {"train": "embeddings"}) == []
    assert adaptation._new_rows(tmp_path / "source", None, faster | {"train": "all"}) == []
    assert adaptation._new_rows(tmp_path / "source", tiny_pair.base, {"train": "all"}) == []


def test_new_rows_learn_faster_than_all_else(
    tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Adam's first step is the learning rate whatever the gradient: it shows who learns at which."""
    new = extended(tiny_pair, tmp_path)
    rate, factor = 0.01, 8
    options = TrainingOptions(
        steps=1, batch_size=4, learning_rate=rate, epsilon=1e-30, weight_decay=0.0, warmup_steps=0, seed=1
    )
    blocks, _ = adaptation.packed(tmp_path / "packed", tmp_path / "source", corpus["train"], 2000, 32)
    changes = {}
    for name, chosen in (
        ("plain", options),
        ("faster", replace(options, new_rows_learning_rate_factor=float(factor))),
    ):
        numbers = list(range(600, vocab.rows(new)))
        fit(tmp_path / "source", blocks, tmp_path / name, chosen, new_rows=numbers)
        before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", name))
        changes[name] = {key: (after[key].float() - before[key].float()).abs() for key in before}
    for key in changes["plain"].keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(changes["plain"][key], changes["faster"][key])
    plain, faster = (changes[name]["model.embed_tokens.weight"] for name in ("plain", "faster"))
    assert torch.allclose(plain[:600], faster[:600], atol=1e-3 * rate)
    assert faster[600:].median() == pytest.approx(factor * plain[600:].median().item(), rel=0.01)
    assert plain[600:].median() == pytest.approx(rate, rel=0.01)


def test_new_rows_learn_faster_in_calibration_too(tiny_pair: TinyPair, tmp_path: Path) -> None:
    extended(tiny_pair, tmp_path)
    chat = [{"role": "user", "content": "Кто?"}, {"role": "assistant", "content": RUSSIAN.splitlines()[0]}]
    files.write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}] * 4)
    options = {"steps": 1, "batch_size": 4, "learning_rate": 0.01, "epsilon": 1e-30, "warmup_steps": 0}
    options |= {"new_rows_learning_rate_factor": 8.0, "seed": 1}
    places = (tmp_path / "source", tmp_path / "tuned", [tmp_path / "chats.jsonl"], None, 0.0)
    calibrate(*places, options, original=tiny_pair.base)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "tuned"))
    moved = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs()
    assert moved[600:].median() == pytest.approx(8 * 0.01, rel=0.01)
    assert moved[:600].median() == pytest.approx(0.01, rel=0.01)


def test_too_little_text_is_an_error(tiny_pair: TinyPair, corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RuadaptError, match=r"less than one batch of 4"):
        unit(tiny_pair, corpus, tmp_path / "seed1", characters=60, epochs=1)
    assert not (tmp_path / "seed1").exists()


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 0.95), st.integers(0, 5))
def test_mixed_rows_have_the_stated_share(rows: int, others: int, share: float, seed: int) -> None:
    mixed = mix([{"id": n} for n in range(rows)], [{"id": -1 - n} for n in range(others)], share, seed)
    copies = sum(row["id"] < 0 for row in mixed)
    assert len({row["id"] for row in mixed}) == len(mixed)
    assert abs(copies - share * len(mixed)) <= 1
    # Nothing is left out without need: one of the two is used up.
    assert copies >= others - 1 or len(mixed) - copies >= rows - 1


def test_a_calibration_unit_mixes_and_tunes(tiny_pair: TinyPair, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Кто?"}, {"role": "assistant", "content": "Врач."}]
    copy = [{"role": "user", "content": "Повтори: да"}, {"role": "assistant", "content": "да"}]
    files.write_jsonl(tmp_path / "chat.jsonl", ({"messages": chat} for _ in range(12)))
    files.write_jsonl(tmp_path / "copy.jsonl", ({"messages": copy} for _ in range(12)))
    options = {"steps": 2, "batch_size": 4, "train": "embeddings", "lora_rank": 4, "seed": 1}
    arguments = (tiny_pair.instruct, tmp_path / "out", [tmp_path / "chat.jsonl"], tmp_path / "copy.jsonl")
    report = calibrate(*arguments, 0.25, options)
    assert report["rows"] == 16
    assert calibrate(*arguments, 0.25, options) == report
    with pytest.raises(RuadaptError, match="cannot mix"):
        calibrate(*arguments, 1.0, options)
