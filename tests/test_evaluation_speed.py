"""Speed: every model writes the same text, and the table is complete."""

from typing import Any

import pytest
import torch

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import load
from ruadapt.evaluation.speed import _Writer, generation_speed

DIALOGUES = {
    "en": [("Where does the teacher live?", "In the old house."), ("Who?", "The sailor.")],
    "ru": [("Кто старше, моряк или садовник?", "Моряк старше садовника на 12 лет.")],
}


def test_every_model_writes_the_same_characters(tiny_pair: Any, tiny_pair_untied: Any) -> None:
    folders = {"original": tiny_pair.instruct, "extended": tiny_pair_untied.instruct}
    table = generation_speed(folders, DIALOGUES, repeats=2)
    assert len(table) == 2 * 2 * 2
    assert set(zip(table["vocabulary"], table["language"], table["repeat"], strict=True)) == {
        (name, language, repeat) for name in folders for language in DIALOGUES for repeat in range(2)
    }
    written = {language: sum(len(answer) for _, answer in pairs) for language, pairs in DIALOGUES.items()}
    assert table["characters"].to_list() == table["language"].map(written).to_list()
    both = table["reading_seconds"] + table["writing_seconds"]
    assert table["characters_per_second"].to_list() == pytest.approx(table["characters"] / both)
    assert (table[["reading_seconds", "writing_seconds"]] > 0).all(axis=None)


def test_the_time_of_a_written_token_does_not_know_the_prompt(
    tiny_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow reader: whatever reading costs, seconds per written token are those of writing."""
    monkeypatch.setattr(_Writer, "phases", lambda self, ids, answer, *_: (100.0, len(answer) - 1.0, 0.0))
    row = generation_speed({"original": tiny_pair.instruct}, DIALOGUES, repeats=1).iloc[0]
    assert row["seconds_per_written_token"] == 1 and row["reading_seconds"] == 200
    assert row["characters_per_second"] == row["characters"] / (200 + row["writing_seconds"])
    assert 0 < row["writing_characters_per_second"] * row["writing_seconds"] < row["characters"]


def test_the_answer_is_dictated_whatever_the_model_would_say(tiny_pair: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    writer = _Writer("original", model, tokenizer)
    for prompt, answer in DIALOGUES["en"] + DIALOGUES["ru"]:
        ids, dictated = writer.task(prompt, answer)
        assert tokenizer.decode(writer.write(torch.tensor([ids]), dictated, lambda: None)) == answer


def test_mistakes_are_refused(tiny_pair: Any) -> None:
    folders = {"original": tiny_pair.instruct}
    with pytest.raises(RuadaptError, match="can't be timed"):
        generation_speed(folders, {"en": [("Who?", "the sailor " * 500)]}, repeats=1)
    with pytest.raises(RuadaptError, match="speed needs models, and prompts with answers"):
        generation_speed(folders, {"ru": []})
