"""Model folders of other forms: what counts is what transformers loads, else a refusal before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, TinyPair
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_json, edit_weights, tokenizer_folder
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from ruadapt.checkpoints import initialise, propagate, read_embeddings, verify
from ruadapt.checkpoints.model_folders import INDEX
from ruadapt.errors import RuadaptError
from ruadapt.vocab import load_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def base(tmp_path: Path, tiny_pair_untied: TinyPair) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_pair_untied.base, tmp_path / "base"))


def extended(base: Path, target: Path) -> Path:
    """The model with 60 more tokens, checked against its source."""
    initialise(base, tokenizer_folder(target.with_name("words"), base, "extended"), target)
    verify(target, base, kept="shared")
    return target


def more(name: str, shape: tuple[int, ...]) -> Callable[[Path], object]:
    return lambda base: edit_weights(base, lambda tensors: tensors.update({name: torch.ones(shape)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (more("lm_head.bias", (600,)), r"lm_head\.bias has a row for each token"),
        (more("final_logits_bias", (1, 600)), "final_logits_bias has a row for each token"),
        (more("model.embed_tokens_per_layer.weight", (599, 8)), "embed_tokens_per_layer"),
        (more("model.layers.2.embed_tokens.weight", (600, 32)), "multi-token prediction, MTP"),
        (lambda base: edit_json(base / "config.json", quantization_config={"bits": 4}), "is quantised; give"),
        (lambda base: (base / "adapter_config.json").write_text("{}"), "takes it for an adapter"),
        (lambda base: edit_json(base / "config.json", model_type="own"), "which 'own' is not"),
    ],
)
def test_what_would_not_follow_the_vocabulary_is_refused(
    base: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(base)
    with pytest.raises(RuadaptError, match=message):
        read_embeddings(base)


@pytest.mark.parametrize("shards", ["gone", "older"])
def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path, base: Path, shards: str) -> None:
    tensors = load_file(base / "model.safetensors")
    if shards == "older":
        save_file({name: tensor * 0 for name, tensor in tensors.items()}, base / "older.safetensors")
    files = dict.fromkeys(tensors, "older.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert torch.equal(read_embeddings(base).input, tensors["model.embed_tokens.weight"])
    assert not (extended(base, tmp_path / "model") / INDEX).exists()


def test_ids_without_a_token_are_dropped(tmp_path: Path, base: Path) -> None:
    """A padding row that the config names for padding; the new vocabulary gives its id to a token."""
    edit_weights(
        base,
        lambda tensors: tensors.update(
            {
                name: torch.cat([tensors[name], torch.zeros(100, 32)])
                for name in ("model.embed_tokens.weight", "lm_head.weight")
            }
        ),
    )
    edit_json(base / "config.json", vocab_size=700, pad_token_id=650)
    edit_json(base / "generation_config.json", eos_token_id=[3, 650])
    model = extended(base, tmp_path / "model")
    configs = [json.loads((model / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert configs[0]["pad_token_id"] is None and configs[1]["eos_token_id"] == [3]


def test_ids_that_are_not_to_be_written_follow_their_tokens(tmp_path: Path, base: Path) -> None:
    """In lists, and in lists of words; what the new vocabulary lacks can't be written anyhow."""
    old = load_tokenizer(base)
    words = tokenizer_folder(tmp_path / "words", base, "replaced")
    new = load_tokenizer(words)
    kept = next(number for number in range(599, 4, -1) if new.token_to_id(str(old.id_to_token(number))))
    gone = next(number for number in range(599, 4, -1) if not new.token_to_id(str(old.id_to_token(number))))
    forbidden = {"begin_suppress_tokens": [kept, gone], "bad_words_ids": [[kept, kept], [kept, gone]]}
    edit_json(base / "generation_config.json", **forbidden)
    initialise(base, words, tmp_path / "model")
    verify(tmp_path / "model", base, kept="shared")
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    there = new.token_to_id(str(old.id_to_token(kept)))
    assert config["begin_suppress_tokens"] == [there] and config["bad_words_ids"] == [[there, there]]


@pytest.mark.parametrize(
    "template",
    [
        [{"name": "tool_use", "template": "{{ messages }}"}],
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}",
        "{{ messages[0].name.lower() }}",
    ],
)
def test_templates_that_ask_for_other_messages_are_kept(tmp_path: Path, base: Path, template: Any) -> None:
    (base / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(base / "tokenizer_config.json", chat_template=template)
    model = extended(base, tmp_path / "model")
    found = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (base, model)]
    assert found[0] == found[1] != CHAT_TEMPLATE
    edit_json(model / "tokenizer_config.json", chat_template="{{ messages[0].other.lower() }}")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(RuadaptError, match="other text than"):
        verify(model, base, kept="shared")


def test_an_added_token_may_lack_a_row(tmp_path: Path, tiny_pair: TinyPair) -> None:
    """As in Gemma 3 1B: base and instruct have one special token more than rows; the result gives it one."""
    folders = {}
    for name in ("base", "instruct"):
        folders[name] = Path(shutil.copytree(getattr(tiny_pair, name), tmp_path / name))
        tokenizer = load_tokenizer(folders[name])
        tokenizer.add_special_tokens(["<image>"])
        tokenizer.save(str(folders[name] / "tokenizer.json"))
    verify(folders["base"])
    adapted = extended(folders["base"], tmp_path / "model")
    before, after = (read_embeddings(path).input for path in (folders["base"], adapted))
    new = load_tokenizer(adapted)
    torch.testing.assert_close(after[new.token_to_id("<image>")], before.mean(dim=0))
    propagate(folders["base"], folders["instruct"], adapted, tmp_path / "lep", "conversion")
    verify(tmp_path / "lep", folders["instruct"])


def test_files_of_the_model_are_carried_and_compared(tmp_path: Path, base: Path) -> None:
    (base / "modeling_own.py").write_text("X = 1\n")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "preprocessor_config.json").write_text("{}")
    model = extended(base, tmp_path / "model")
    for name in ("modeling_own.py", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json"):
        assert (model / name).read_bytes() == (base / name).read_bytes()
    (model / "modeling_own.py").write_text("X = 2\n")
    with pytest.raises(RuadaptError, match=r"modeling_own\.py is not"):
        verify(model, base, kept="shared")


def gemma(base: Path) -> Any:
    inner = SMALL | {"vocab_size": 600, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 3}
    vision = SMALL | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=inner, vision_config=vision, mm_tokens_per_image=4, image_token_index=2, boi_token_index=0
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(base)


def qwen(base: Path) -> Any:
    """A flat config, as the hub has it: in transformers 5 its text part knows no tying."""
    flat = SMALL | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 600,
        "num_key_value_heads": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    }
    (base / "config.json").write_text(json.dumps(flat))
    Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(base)).save_pretrained(base)
    (base / "config.json").write_text(json.dumps(flat))


@pytest.mark.parametrize(("build", "tied"), [(gemma, True), (qwen, False)])
def test_models_that_see_pictures(
    tmp_path: Path, base: Path, build: Callable[[Path], Any], tied: bool
) -> None:
    (base / "generation_config.json").unlink()
    build(base)
    words = tokenizer_folder(tmp_path / "words", base, "replaced")
    initialise(base, words, tmp_path / "model")
    assert verify(tmp_path / "model", base)["tied"] == tied
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.get("text_config", config)["vocab_size"] == 500
    if "image_token_index" in config:
        old, new = load_tokenizer(base), load_tokenizer(words)
        assert config["image_token_index"] == new.token_to_id(str(old.id_to_token(2)))
