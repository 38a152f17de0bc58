"""Every profile of a real pair, all stages, on a tiny random model of its architecture, real tokenizer.

`make test-profiles` runs them. The configurations are those of `data/models.json`, so that padded rows,
extra chat rows and reserved tokens are as in the published checkpoints; the data are local, in the hub's
schemas.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_chats import save
from test_evaluation_darumeru import write_stand_in
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ruadapt import data_sets, files, vocab
from ruadapt.checkpoints import initialise, propagate, read_embeddings, verify
from ruadapt.checkpoints.adapters import complete_instruct, is_adapter
from ruadapt.pipeline.runner import Pipeline, run_profile
from ruadapt.vocab import load_tokenizer, rows

ROOT = files.project_root()
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m['role'] | capitalize }}: {{ m['content'] }}"
    "<|end_of_turn|>{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Profile → tokenizer of the reference, chat template, what the instruct model's tokenizer has besides, ends.
PAIRS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {"words": "qwen2.5", "ends": ["<|im_end|>", "<|endoftext|>"], "tasks": "darumeru"},
    "qwen2.5-3b": {"words": "qwen2.5", "ends": ["<|im_end|>", "<|endoftext|>"]},
    "mistral-7b-openchat": {
        "words": "mistral-7b-v0.1",
        "template": OPENCHAT,
        "added": ["<|end_of_turn|>", "<|pad_0|>"],
        "ends": ["<|end_of_turn|>"],
    },
    "llama-3-8b": {"words": "llama-3", "template": LLAMA_3, "ends": ["<|end_of_text|>", "<|eot_id|>"]},
    "llama-2-7b-saiga": {"words": "llama-2", "ends": ["</s>"]},
}


def make_model(folder: Path, words: Path, config: dict[str, Any], seed: int, form: dict[str, Any]) -> None:
    """Write a tiny random model with the configuration's own height, beside its real tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(words)
    if added := form.get("added"):
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    if "template" in form:
        tokenizer.chat_template = form["template"]
    key_values = min(2, config["num_key_value_heads"])
    small = {**config, **TINY, "num_key_value_heads": key_values, "initializer_range": 0.1}
    if "tasks" in form:
        small["max_position_embeddings"] = 512
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small))
    ends = tokenizer.convert_tokens_to_ids(form["ends"])
    model.generation_config.eos_token_id = ends
    with torch.no_grad():  # a random model would hardly ever end an answer
        model.get_output_embeddings().weight[ends[0]] *= 6
    model.to(getattr(torch, config["dtype"])).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(words / name, folder / name)
    if added or "template" in form:
        tokenizer.save_pretrained(folder)
    assert len(read_embeddings(folder).input) == config["vocab_size"] >= rows(load_tokenizer(folder))


def drift(base: Path, instruct: Path) -> None:
    """Give the instruct model the base's weights, moved a little; rows that the base lacks stay its own."""
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (base, instruct))
    ours = second.state_dict()
    with torch.no_grad():
        for name, tensor in first.state_dict().items():
            moved = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape).to(tensor.dtype)
            ours[name][: len(tensor)] = moved
    second.save_pretrained(instruct)


def make_pair(profile: str, folder: Path, reference: Path) -> tuple[Path, Path]:
    known = files.read_json(ROOT / "data" / "models.json")
    values = Pipeline(profile).values
    form = PAIRS[profile]
    words = reference / "tokenizers" / form["words"]
    base, instruct = folder / "base", folder / "instruct"
    plain = {"ends": form["ends"][-1:] if not form.get("added") else ["</s>"]}
    plain |= {name: form[name] for name in ("tasks",) if name in form}
    make_model(base, words, known[values["base_model"]]["config"], 1, plain)
    config = known[values["instruct_model"]]["config"]
    if config is None:  # published as an adapter
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(instruct)
    else:
        make_model(instruct, words, config, 1, form)
        drift(base, instruct)
    return base, instruct


def make_data(folder: Path, reference: Path) -> dict[str, Path]:
    """Write stand-ins for the corpora, Saiga's instructions, and Darumeru."""
    data = {}
    for language, size in (("ru", 150_000), ("en", 60_000)):
        lines = data_sets.read_texts(reference / "text" / f"train_{language}_modern.txt.gz")
        texts, total = [], 0
        while total < size:
            texts.append(next(lines))
            total += len(texts[-1])
        data[f"corpus_{language}"] = folder / f"{language}.jsonl"
        files.write_jsonl(data[f"corpus_{language}"], ({"text": text} for text in texts))
    rows = files.read_jsonl(ROOT / "data" / "world" / "corpus" / "chat.jsonl.gz")
    chats = (row for row in rows if row["meta"]["language"] == "ru")
    saiga = []
    for number in range(40):
        question, answer = next(chats)["messages"]
        turns = [question, {"role": "bot", "content": answer["content"]}]
        saiga.append(
            {"messages": turns, "opus_score": 6 + number % 5, "is_bad_by_regex": False, "source": "x"}
        )
    data["calibration_dataset"] = save(folder / "saiga_scored.parquet", saiga)
    data["evaluation_data"] = write_stand_in(folder / "darumeru")
    return data


SMALL: dict[str, Any] = {
    "text_characters_ru": 0, "text_characters_en": 0, "heldout_documents": 4, "added_rows": 300,
    "vocab_size": 4_000, "keep_rows": 3_000, "seeds": [1], "processes": 1,
    "pretraining_characters": 6_000, "pretraining_block_size": 32, "pretraining_batch_size": 4,
    "pretraining_accumulation": 1,
    "curve_points": 1, "curve_documents": 1,
    "calibration_steps": 2, "calibration_batch_size": 2, "calibration_accumulation": 1,
    "calibration_max_length": 1_000, "calibration_prompts": 24, "answer_tokens": 24, "copy_rows": 8,
    "lora_rank": 2, "speed_repeats": 2, "speed_answers": 1, "items_per_task": 1, "shots": 1,
}  # fmt: skip


def settings(profile: str, run: Path, base: Path, instruct: Path, data: dict[str, Path]) -> list[str]:
    values = SMALL | {name: str(path) for name, path in data.items()}
    values["corpus_mix"] = []
    if "tasks" not in PAIRS[profile]:  # a random model writes to the end of its context, again and again
        values |= {"evaluation_tasks": ["world"], "evaluation_data": ""}
    values |= {"run_dir": str(run), "base_model": str(base), "instruct_model": str(instruct)}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


@pytest.mark.parametrize("profile", ["mistral-7b-openchat", "llama-2-7b-saiga"])
def test_extra_chat_rows_and_an_adapter_go_through_the_engines(
    profile: str, tmp_path: Path, reference: Path
) -> None:
    """The part of a profile that is not training: whole instruct model, vocabulary, initialisation, LEP."""
    base, instruct = make_pair(profile, tmp_path, reference)
    template = Pipeline(profile).values.get("chat_template", "")
    assert is_adapter(instruct) == bool(template) == (profile == "llama-2-7b-saiga")
    if template:
        complete_instruct(base, instruct, str(ROOT / template), tmp_path / "whole")
        # As peft itself merges it.
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), instruct)
        expected = merged.merge_and_unload().state_dict()
        instruct = tmp_path / "whole"
        found = AutoModelForCausalLM.from_pretrained(instruct).state_dict()
        changed = [name for name in expected if not torch.equal(expected[name], found[name])]
        for name in changed:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)
        chat = AutoTokenizer.from_pretrained(instruct).apply_chat_template(
            [{"role": "user", "content": "Да?"}, {"role": "assistant", "content": "Да."}], tokenize=False
        )
        assert chat == "<s>user\nДа?</s><s>bot\nДа.</s>"
    texts = ["Старый капитан видел двадцать пять лошадей в маленьком городе у реки."] * 20
    vocab.save_tokenizer(tmp_path / "words", vocab.extend(instruct, texts, 10), instruct)
    initialise(base, tmp_path / "words", tmp_path / "initialised")
    verify(tmp_path / "initialised", base, kept="shared", reload=False)
    propagate(base, instruct, tmp_path / "initialised", tmp_path / "lep", "conversion")
    assert verify(tmp_path / "lep", instruct)["eos"] == PAIRS[profile]["ends"]


@pytest.mark.profiles
@pytest.mark.parametrize("profile", PAIRS)
def test_a_profile_runs_from_end_to_end(profile: str, tmp_path: Path, reference: Path) -> None:
    base, instruct = make_pair(profile, tmp_path, reference)
    run = tmp_path / "run"
    done = run_profile(
        profile, settings=settings(profile, run, base, instruct, make_data(tmp_path, reference))
    )
    assert len(done) == 9
    check(profile, run, base)


def check(profile: str, run: Path, base: Path) -> None:
    """Reload what a run left, verify it against its sources, chat, generate."""
    values = Pipeline(profile).values
    name = values["calibration_vocabularies"][-1]
    last = run / "07_calibration" / name / values["calibration_data"][-1] / "seed1"
    found = verify(last)
    assert found["chat"] and found["tied"] == read_embeddings(base).tied
    whole = ROOT / files.read_json(run / "02_model_pair" / "pair.json")["instruct"]
    assert found["eos"] == verify(whole)["eos"] and set(found["eos"]) == set(PAIRS[profile]["ends"])
    for each in values["vocabularies"]:
        verify(run / "04_initialisation" / each, base, kept="shared")
        verify(run / "06_lep" / each / values["lep_method"] / "seed1", whole)
    tokenizer, model = AutoTokenizer.from_pretrained(last), AutoModelForCausalLM.from_pretrained(last)
    chat = [{"role": "user", "content": "Где живёт учитель?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids.shape[1] and int(out.max()) < len(model.get_input_embeddings().weight)
    old = AutoTokenizer.from_pretrained(whole)
    text = "Старый учитель живёт в маленьком городе у реки."
    assert len(tokenizer(text).input_ids) < len(old(text).input_ids)
    if name == "extended":
        assert tokenizer("An old teacher.").input_ids == old("An old teacher.").input_ids
