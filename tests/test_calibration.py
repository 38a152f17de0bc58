"""Chat tuning: the answer-only loss, merged adapters that reload as they were, self-calibration."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_jsonl, write_jsonl
from ruadapt.pipeline.adaptation import answer, calibrate
from ruadapt.training import trainer
from ruadapt.training.encoding import IGNORED, collate, encode_chats

OPTIONS = {"steps": 8, "batch_size": 4, "learning_rate": 5e-3, "seed": 5, "log_every": 1}
LORA = OPTIONS | {"train": "embeddings", "lora_rank": 4, "lora_alpha": 8}
CHAT = [
    {"role": "user", "content": "Где живёт врач?"},
    {"role": "assistant", "content": "У реки."},
    {"role": "user", "content": "Who is older?"},
    {"role": "assistant", "content": "The sailor."},
]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Повтори: рыбак нашёл {n} бутылок" + " в лесу" * (n % 5)},
            {"role": "assistant", "content": f"рыбак нашёл {n} бутылок"},
        ]
    }
    for n in range(20)
]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tune(source: Path, rows: list[Any], target: Path, options: dict[str, Any]) -> dict[str, Any]:
    chats = target.parent.parent / f"{target.parent.name}.jsonl"
    write_jsonl(chats, rows)
    return calibrate(source, target, [chats], None, 0.0, options)


def changed(first: Path, second: Path) -> set[str]:
    before, after = read(first), read(second)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_labels_are_exactly_the_assistants_tokens(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    (example,) = encode_chats([{"messages": CHAT}], tokenizer)
    text = tokenizer.decode(example["input_ids"])
    assert text == (
        "<|user|>Где живёт врач?<|end|><|assistant|>У реки.<|end|>"
        "<|user|>Who is older?<|end|><|assistant|>The sailor.<|end|>"
    )
    # Each run of labels, as text: the answer with its end, and nothing of the questions.
    runs: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    assert [tokenizer.decode(run) for run in runs if run] == ["У реки.<|end|>", "The sailor.<|end|>"]
    assert example["length"] == len(example["input_ids"])


def test_a_token_over_the_border_belongs_to_the_answer(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "the bro"}, {"role": "assistant", "content": "ther"}]
    (example,) = encode_chats([{"messages": chat}], tokenizer)
    assert tokenizer("the brother")["input_ids"] == example["input_ids"]
    answer = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(answer) == " brother"


def test_padding_changes_neither_loss_nor_logits(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.instruct).eval()
    examples = encode_chats(ROWS[3:5], tokenizer)
    assert examples[0]["length"] != examples[1]["length"]
    with torch.no_grad():
        batch = collate(examples)
        together = model(**batch)
    assert batch["input_ids"].shape[1] % 16 == 0
    total = counted = 0.0
    for place, example in enumerate(examples):
        bare = {name: torch.tensor([example[name]]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            alone = model(**bare)
        torch.testing.assert_close(together.logits[place, : example["length"]], alone.logits[0])
        answer = sum(label != IGNORED for label in example["labels"])
        total, counted = total + float(alone.loss) * answer, counted + answer
    assert float(together.loss) == pytest.approx(total / counted, rel=1e-5)


@pytest.mark.parametrize("trained", ["embeddings", "body"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_lora_is_merged_and_reloads_as_it_was_trained(
    kind: str,
    trained: str,
    tiny_pair: TinyPair,
    tiny_pair_untied: TinyPair,
    tmp_path: Path,
    unmerged_logits: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    source = (tiny_pair if kind == "tied" else tiny_pair_untied).instruct
    probe = torch.arange(0, 600, 7)[None]
    kept = unmerged_logits(probe)
    report = tune(source, ROWS, tmp_path / "out", LORA | {"train": trained})
    assert report["loss"][-1]["loss"] < report["loss"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=probe).logits, kept["logits"], rtol=1e-4, atol=1e-4)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "tied")
    moved = changed(source, tmp_path / "out")
    matrices = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "untied" else set())
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linear = {name for name in read(source) if name.split(".")[-2] in layers}
    assert len(linear) == 14
    assert moved == linear | (matrices if trained == "embeddings" else set())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("options", [OPTIONS, LORA], ids=["whole", "lora"])
def test_a_killed_tuning_goes_on_from_its_checkpoint(
    options: dict[str, Any], tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"steps": 6, "save_every": 2, "lora_dropout": 0.1}
    whole = tune(tiny_pair.instruct, ROWS, tmp_path / "whole", options)
    target = tmp_path / "killed"
    seen: list[int] = []
    real = trainer.collate

    def dying(examples: list[Any]) -> Any:
        seen.append(len(seen))
        if len(seen) == 6:  # batches are made one ahead: step 5
            raise KeyboardInterrupt
        return real(examples)

    monkeypatch.setattr(trainer, "collate", dying)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_pair.instruct, ROWS, target, options)
    assert not target.exists() and list(tmp_path.glob(".killed.*.checkpoints/checkpoint-4"))
    seen.append(99)
    resumed = tune(tiny_pair.instruct, ROWS, target, options)
    assert len(seen) <= 7 + 3, "it should not begin anew"
    assert resumed["loss"] == whole["loss"] and not list(tmp_path.glob(".killed.*"))
    assert not changed(tmp_path / "whole", target)


@pytest.mark.parametrize("trained", ["all", "body"])
def test_full_tuning_moves_embeddings_only_if_asked(
    trained: str, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        tune(tiny_pair.base, ROWS, tmp_path / name, OPTIONS | {"train": trained, "steps": 3})
    moved = changed(tiny_pair.base, tmp_path / "first")
    assert ("model.embed_tokens.weight" in moved) == (trained == "all")
    assert {name for name in read(tiny_pair.base) if "_proj" in name} <= moved
    assert not changed(tmp_path / "first", tmp_path / "second")


def test_rows_too_long_are_left_out_and_counted(tiny_pair: TinyPair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    lengths = [example["length"] for example in encode_chats(ROWS, tokenizer)]
    limit = sorted(lengths)[12]
    report = tune(tiny_pair.instruct, ROWS, tmp_path / "out", LORA | {"max_length": limit, "steps": 1})
    assert report["rows"] == sum(length <= limit for length in lengths) < len(ROWS)
    assert report["rows"] + report["dropped_rows"] == len(ROWS) and report["unused_rows"] == 0
    write_jsonl(tmp_path / "chats.jsonl", ROWS)
    write_jsonl(tmp_path / "copies.jsonl", ROWS[:3])  # so few copies let few chats in, and the report says so
    files = [tmp_path / "chats.jsonl"], tmp_path / "copies.jsonl"
    report = calibrate(tiny_pair.instruct, tmp_path / "few", *files, 0.5, LORA | {"steps": 1})
    assert (report["rows"], report["unused_rows"]) == (6, len(ROWS) - 3)
    with pytest.raises(RuadaptError, match="longer than max_length 3"):
        tune(tiny_pair.instruct, ROWS, tmp_path / "none", LORA | {"max_length": 3})


@pytest.mark.parametrize(("passes", "steps"), [(0, 8), (0.4, 2), (1, 5), (9, 8)])
def test_a_tuning_ends_after_so_many_passes(
    passes: float, steps: int, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    report = tune(tiny_pair.instruct, ROWS, tmp_path / "out", LORA | {"passes": passes})
    assert (report["steps"], report["loss"][-1]["step"]) == (steps, steps)


def test_unfit_rows_are_named(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.instruct)
    with pytest.raises(RuadaptError, match="chat row 1 has no `messages`"):
        encode_chats([ROWS[0], {"text": "нет"}], tokenizer)
    with pytest.raises(RuadaptError, match="chat row 0 has no `messages` with a turn of the assistant"):
        encode_chats([{"messages": CHAT[:1]}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only system') }}"
    with pytest.raises(RuadaptError, match=r"chat row 0 cannot be rendered .* only system"):
        encode_chats(ROWS, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RuadaptError, match="changes the prompt"):
        encode_chats(ROWS, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(RuadaptError, match="chat_template is not set"):
        encode_chats(ROWS, tokenizer)


def test_answers_are_the_models_own_and_unusable_ones_are_counted(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    # A model that has learned to say one sentence, and prompts of different lengths.
    rows = [{"messages": [row["messages"][0], {"role": "assistant", "content": "Моряк."}]} for row in ROWS]
    tune(tiny_pair.instruct, rows, tmp_path / "model", OPTIONS | {"steps": 60, "learning_rate": 1e-2})
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, ({"messages": row["messages"][:1], "meta": {"id": n}} for n, row in enumerate(ROWS)))
    for _ in range(2):  # batches with padding say the same as single prompts
        counts = answer(tmp_path / "model", prompts, tmp_path / "answers", 128)
        expected = [{"messages": row["messages"], "meta": {"id": n}} for n, row in enumerate(rows)]
        assert list(read_jsonl(tmp_path / "answers" / "rows.jsonl")) == expected
        assert counts == {"answered": 20}
    with pytest.raises(RuadaptError, match=r"no usable answer to 20 prompts: .*'unfinished': 20"):
        answer(tmp_path / "model", prompts, tmp_path / "short", 1)
    silent = tmp_path / "silent"
    shutil.copytree(tmp_path / "model", silent)
    settings = json.loads((silent / "generation_config.json").read_text())
    first = AutoTokenizer.from_pretrained(silent)("Моряк.")["input_ids"][0]
    (silent / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": first}))
    with pytest.raises(RuadaptError, match="'empty': 20"):
        answer(silent, prompts, tmp_path / "none", 128)
