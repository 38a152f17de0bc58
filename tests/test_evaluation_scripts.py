"""Stray scripts: what counts as one, how often, and a mask that no half character slips through."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, RUSSIAN, TinyPair, tiny_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, chat_ids, generate, question
from ruadapt.evaluation.asking import ask_once, read_sources
from ruadapt.evaluation.models import load
from ruadapt.evaluation.scripts import ANY, character_scripts, forbidden_tokens, stray_letters, stray_table
from ruadapt.vocab import optimize, token_bytes

CHINESE = "北京是中国的首都。今天天气很好,我们去学校学习汉语。春天来了,花都开了。"
PROMPTS = [line for line in RUSSIAN.splitlines() if line.endswith(".")][:4]
ASKED = [question(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Russian and Han tokens, and Han characters in pieces."""
    return tiny_tokenizer(500, [*RUSSIAN.splitlines(), *[CHINESE] * 4])


def chinese_model(tokenizer: PreTrainedTokenizerFast, like: Path) -> LlamaForCausalLM:
    """A random model that is pulled towards tokens with bytes that Han characters are made of."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # Rows without a token, as real checkpoints have.
        config = LlamaConfig.from_pretrained(like, vocab_size=len(tokenizer) + 7, initializer_range=0.2)
        model = LlamaForCausalLM(config).eval()
    pull = torch.zeros(config.vocab_size)
    for number, surface in enumerate(token_bytes(tokenizer.backend_tokenizer)):
        pull[number] = 8.0 * any(0x80 <= b < 0xC0 or 0xE3 <= b < 0xEA for b in surface or b"")
    model.lm_head.register_forward_hook(lambda *call: call[2] + pull)
    return model


def answers(model: Any, tokenizer: Any, conversations: Any, **options: Any) -> list[Answer]:
    return generate(model, tokenizer, [chat_ids(tokenizer, one) for one in conversations], **options)


def test_letters_have_scripts_and_other_characters_have_none() -> None:
    expected = {"ё": "Cyrillic", "q": "Latin", "国": "Cjk", "ア": "Katakana", "ｱ": "Katakana", "한": "Hangul"}
    expected |= {"ع": "Arabic", "Ａ": "Latin", "㈱": "Cjk", "ℝ": "Latin", "א": "Hebrew", "µ": "Greek"}
    for character, script in expected.items():
        assert character_scripts(character) == {script}, character
    assert all(not character_scripts(character) for character in "。«—7٣🙂\n ̈")


def test_only_what_the_prompt_lacks_is_stray() -> None:
    assert stray_letters("Что это?", "Это 国家, state и دولة.") == {"Cjk": 2, "Latin": 5, "Arabic": 4}
    assert stray_letters("Переведи: 国家 (state)", "Это 国家, state.") == {}


def test_shares_are_counted_by_hand() -> None:
    texts = ["Да.", "Это 国家.", "", "Файл data: 国 и عر"]
    table = stray_table(["Что?"] * 4, texts).set_index("script")
    assert table.index.tolist() == [ANY, "Latin", "Cjk", "Arabic"]
    assert table["strayed"].to_dict() == {ANY: 2, "Cjk": 2, "Latin": 1, "Arabic": 1}
    assert (table["share_low"] <= table["share"]).all() and (table["share"] <= table["share_high"]).all()
    assert (table["empty"] == 1).all()
    assert table.loc[ANY, "example"] == texts[3]  # the worst one
    # Wilson's interval by its formula, for 0 of 10: z^2 / (n + z^2).
    none = stray_table(["Что?"] * 10, ["Да."] * 10)
    assert none["share_high"].to_list() == pytest.approx([1.959964**2 / (10 + 1.959964**2)], abs=1e-6)
    with pytest.raises(RuadaptError, match="all answers are empty"):
        stray_table(["Что?"], [""])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_stops_a_model_that_wants_han(
    tokenizer: PreTrainedTokenizerFast, temperature: float, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    model = chinese_model(tokenizer, tiny_pair.base)
    options: Any = {"max_tokens": 40, "temperature": temperature, "seed": 5, "batch_size": 3}
    free = answers(model, tokenizer, ASKED, **options)
    table = stray_table(PROMPTS, [answer.text for answer in free]).set_index("script")
    assert table.loc["Cjk", "share"] == 1.0
    options |= {"suppress": forbidden_tokens(tokenizer, ["Cjk"])}
    masked = answers(model, tokenizer, ASKED, **options)
    assert all(not stray_letters("", answer.text)["Cjk"] for answer in masked)
    again = answers(model, tokenizer, ASKED, **options)
    assert masked == again
    # A pruned vocabulary loses the tokens, yet bytes still write the script: pruning alone promises nothing.
    tokenizer.save_pretrained(tmp_path)
    pruned = optimize(tmp_path, [RUSSIAN + " Ещё быстрее." * 9], None, 1, drop_scripts=["Cjk"])
    surfaces = [surface.decode(errors="replace") for surface in token_bytes(pruned) if surface]
    assert not any(stray_letters("", surface)["Cjk"] for surface in surfaces)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=pruned, eos_token="<|end|>")
    assert len(pruned.encode(CHINESE).ids) > len(tokenizer.backend_tokenizer.encode(CHINESE).ids)
    assert pruned.token_to_id("å") in forbidden_tokens(wrapped, ["Cjk"])  # the byte 0xE5


def test_batches_change_no_answer_and_no_random_state(tiny_pair: TinyPair) -> None:
    model, own = load(tiny_pair.instruct, device="cpu")
    state = torch.get_rng_state()
    options: Any = {"max_tokens": 12}
    alone, together = (answers(model, own, ASKED, batch_size=size, **options) for size in (1, 4))
    assert alone == together
    assert len({answer.text for answer in alone}) > 1
    sampled = [answers(model, own, ASKED, temperature=1.0, seed=seed, **options) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_no_sequence_of_allowed_pieces_writes_common_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    forbidden = {*forbidden_tokens(tokenizer, ["Cjk"])}
    generator = random.Random(0)
    surfaces = dict(enumerate(token_bytes(tokenizer.backend_tokenizer)))
    pieces = [surface for number, surface in surfaces.items() if surface and number not in forbidden]
    pieces = [surface for surface in pieces if max(surface) >= 0x80]
    broken = 0
    for _ in range(500):
        text = b"".join(generator.choices(pieces, k=12)).decode(errors="replace")
        assert not any("\u4e00" <= letter <= "\u9fff" for letter in text), text
        broken += "�" in text
    assert broken  # bytes were put together freely


def test_the_mask_leaves_all_other_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    forbidden = {*forbidden_tokens(tokenizer, ["Cjk"])}
    for text in [*RUSSIAN.splitlines(), "naïve — “ok”… ½ 🙂 かな カナ 한국 عربي ₽ 。"]:
        assert not forbidden & {*tokenizer(text)["input_ids"]}, text


def test_the_command_asks_with_and_without_the_script(tiny_pair: TinyPair, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ["scripts", f"tiny={tiny_pair.instruct}", "--prompts", prompts, "--mask", "Latin", "--json"]
    arguments += ["--max-tokens", 20, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(result.stdout)["stray_scripts"] if row["script"] == "Latin"]
    shares = {(row["masked"], row["decoding"]): row["share"] for row in rows}
    assert shares["", "sampled at 1"] > 0  # random weights write anything
    assert shares["Latin", "sampled at 1"] == shares["Latin", "greedy"] == 0
    for name in ("stray_scripts.csv", "stray_scripts.md", "answers/tiny greedy/part0/answers.json"):
        assert (tmp_path / "out" / name).stat().st_size


def test_a_stopped_command_goes_on_with_the_same_answers(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ruadapt.evaluation.asking.PART", 2)
    asked = [*PROMPTS, "Почему?"][:5]
    source, folder = tiny_pair.instruct, tmp_path / "answers"
    options: Any = {"max_tokens": 12, "temperature": 1.0}
    whole = ask_once(folder, source, asked, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["part0", "part2", "part4"]
    seen: list[int] = []

    def counted(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        seen.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr("ruadapt.evaluation.asking.generate", counted)
    for part in ("part2", "part4"):  # killed before they were whole
        shutil.rmtree(folder / part)
    assert ask_once(folder, source, asked, **options) == whole
    assert seen == [2, 1]
    assert ask_once(folder, source, asked, **options | {"temperature": 0.0}) != whole


@pytest.mark.parametrize("window", [None, 16])
def test_what_prompts_begin_with_is_read_once(
    window: int | None, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where attention has a window, which would count padding that stands inside the text."""
    model, own = load(tiny_pair.instruct, device="cpu")
    if window:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = MistralConfig(**model.config.to_dict() | {"sliding_window": window})
            model = MistralForCausalLM(config).eval()
    examples = own("\n\n".join(PROMPTS))["input_ids"]
    prompts = [examples + own(text)["input_ids"] for text in ("Кто?", "Почему это так?", PROMPTS[0])]
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0].numel()))
    found = []
    for many in (1 << 30, 8):
        monkeypatch.setattr("ruadapt.evaluation.answers.MANY", many)
        read.clear()
        found.append((generate(model, own, prompts, max_tokens=8, batch_size=3), sum(read)))
    (alone, all_read), (together, fewer_read) = found
    assert alone == together
    assert (fewer_read < 0.6 * all_read) == (window is None)


def test_mistakes_are_refused(tokenizer: PreTrainedTokenizerFast, tiny_pair: TinyPair) -> None:
    with pytest.raises(RuadaptError, match="spelled as Unicode does"):
        forbidden_tokens(tokenizer, ["Han"])
    model, own = load(tiny_pair.base, device="cpu")
    own.chat_template = None
    with pytest.raises(RuadaptError, match="chat_template is not set"):
        answers(model, own, [question("Кто?")])
    own.chat_template = CHAT_TEMPLATE
    with pytest.raises(RuadaptError, match="leaves no room for an answer"):
        answers(model, own, [question("Кто? " * 400)])


def test_names_stand_before_the_first_sign_and_paths_may_hold_one(tmp_path: Path) -> None:
    folder = tmp_path / "rows=8000"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    url = "judge@http://localhost/v1?key=none"
    assert read_sources([str(folder), f"new={folder}", url]) == {
        "rows=8000": folder,
        "new": folder,
        "judge": url,
    }
    with pytest.raises(RuadaptError, match="two are called new"):
        read_sources([f"new={folder}", f"new={folder}"])
