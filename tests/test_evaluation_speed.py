"""Speed: every model writes the same budget of characters, and the table is complete."""

from typing import Any

import pytest

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import load
from ruadapt.evaluation.speed import _Speaker, generation_speed

PROMPTS = {"en": ["Where does the teacher live?", "Who?"], "ru": ["Кто старше, моряк или садовник?"]}


def test_every_model_writes_the_budget(tiny_pair: Any, tiny_pair_untied: Any) -> None:
    folders = {"original": tiny_pair.instruct, "extended": tiny_pair_untied.instruct}
    table = generation_speed(folders, PROMPTS, characters=30, repeats=2, device="cpu")
    assert len(table) == 2 * 2 * 2
    assert set(zip(table["vocabulary"], table["language"], table["repeat"], strict=True)) == {
        (name, language, repeat) for name in folders for language in PROMPTS for repeat in range(2)
    }
    least = table["language"].map({"en": 60, "ru": 30})
    assert (table["characters"] >= least).all() and (table["characters"] <= 2 * least).all()
    assert table["characters_per_second"].to_list() == pytest.approx(table["characters"] / table["seconds"])
    assert (table["seconds"] > 0).all()


def test_end_tokens_are_suppressed_and_the_count_is_exact(tiny_pair: Any) -> None:
    speaker = _Speaker("original", *load(tiny_pair.instruct, device="cpu"))
    tokens, characters = speaker.measure("Кто?", 50)
    written = speaker._write(speaker._prompt("Кто?"), tokens)
    assert len(written) == tokens
    assert len(speaker._tokenizer.decode(written)) == characters >= 50
    assert not set(written) & set(speaker._tokenizer.all_special_ids)


def test_mistakes_are_refused(tiny_pair: Any) -> None:
    folders = {"original": tiny_pair.instruct}
    with pytest.raises(RuadaptError, match="lower the budget"):
        generation_speed(folders, PROMPTS, characters=10_000, repeats=1, device="cpu")
    with pytest.raises(RuadaptError, match="prompts in every language"):
        generation_speed(folders, {"ru": []}, characters=10, device="cpu")
    model, tokenizer = load(tiny_pair.base, device="cpu")
    tokenizer.chat_template = None
    with pytest.raises(RuadaptError, match="no chat template"):
        _Speaker("base", model, tokenizer)
