"""What real models need: chats split by question, an instruct model made from a base, measures of their size.

The measures are tested on the tiny pair. Real ones are read where `RUADAPT_REAL_MODELS` names their folder.
"""

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import TinyPair
from transformers import AutoTokenizer

from benchmarks import code, own_answers
from benchmarks.real import changes, compared, markdown, read
from ruadapt import files, vocab
from ruadapt.checkpoints import verify
from ruadapt.checkpoints.model_configs import TEMPLATE, eos_ids, read_chat_template, write_chat_form
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.jobs import collect, evaluate_job
from ruadapt.evaluation.models import load
from ruadapt.evaluation.perplexity import answer_bits
from ruadapt.evaluation.scoring import ifeval
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.pipeline.adaptation import calibrate
from ruadapt.training import chats
from ruadapt.training.encoding import start_token

PAIRS = [
    ("agreement", "The baker lives in a small town.", "The baker live in a small town."),
    ("agreement", "The teacher works.", "The teacher work."),
    ("case", "He saw the old captain.", "Him saw the old captain."),
]
ASKED = [
    {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Say.", "instruction_id_list": ["no:such_thing"], "kwargs": [{}]},
]


def packed(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"paradigm": name, "good": good, "bad": bad} for name, good, bad in PAIRS]
    packed(tmp_path / "blimp.jsonl.gz", rows)
    packed(tmp_path / "ifeval_en.jsonl.gz", ASKED)
    return tmp_path


def chat(number: int, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Вопрос {number}?"}, {"role": "bot", "content": answer}]
    return {"messages": turns}


def test_chats_are_split_by_question(tmp_path: Path) -> None:
    rows = [chat(number, f"Ответ {model}.") for number in range(6) for model in "абв"]
    files.write_jsonl(tmp_path / "ru.jsonl", [*rows, chat(7, "д" * 2_000)])
    files.write_jsonl(tmp_path / "text.jsonl", [{"text": "Пекарь живёт в маленьком городе у реки."}])
    texts = {"ru": tmp_path / "text.jsonl", "en": tmp_path / "text.jsonl"}
    options: dict[str, Any] = {"prompt_rows": 0, "texts": texts, "copy_rows": 2, "seed": 0}
    sources = [{"source": str(tmp_path / "ru.jsonl"), "language": "ru"}]
    counts = chats.write_chats(tmp_path / "out", sources, heldout=2, **options)
    assert counts == {"chat": 3 * 4 + 1, "prompts": 5, "chat_copy": 2}
    heldout = list(files.read_jsonl(tmp_path / "out" / "ru_chat_heldout.jsonl"))
    kept = list(files.read_jsonl(tmp_path / "out" / "chat.jsonl"))
    questions = {row["messages"][0]["content"] for row in heldout}
    assert len(questions) == 2
    assert not questions & {row["messages"][0]["content"] for row in kept}
    assert all(row["messages"][1] == {"role": "assistant", "content": "Ответ а."} for row in heldout)
    with pytest.raises(RuadaptError, match="of 7 questions 6 have an answer"):
        chats.write_chats(tmp_path / "more", sources, heldout=7, **options)


def test_prompts_are_drawn_from_all_languages(tmp_path: Path) -> None:
    for language in ("en", "ru"):
        turns = [[("user", f"{language} {number}?"), ("bot", "!")] for number in range(40)]
        rows = [{"messages": [{"role": role, "content": said} for role, said in pair]} for pair in turns]
        files.write_jsonl(tmp_path / f"{language}.jsonl", rows)
    files.write_jsonl(tmp_path / "text.jsonl", [{"text": "Пекарь живёт в маленьком городе у реки."}])
    sources = [{"source": str(tmp_path / f"{name}.jsonl"), "language": name} for name in ("en", "ru")]
    options: dict[str, Any] = {"texts": {"ru": tmp_path / "text.jsonl"}, "copy_rows": 2}
    drawn = []
    for seed in (0, 0, 1):
        chats.write_chats(tmp_path / "out", sources, prompt_rows=40, seed=seed, **options)
        prompts = files.read_jsonl(tmp_path / "out" / "prompts.jsonl")
        drawn.append([row["messages"][0]["content"] for row in prompts])
        assert len({*drawn[-1]}) == 40 and 10 < sum(text.startswith("ru") for text in drawn[-1]) < 30
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_base_is_tuned_into_an_instruct_model(tiny_pair: TinyPair, tmp_path: Path) -> None:
    base, words = tmp_path / "base", tmp_path / "words"
    base.mkdir(), words.mkdir()
    for path in tiny_pair.base.iterdir():
        if path.name != TEMPLATE:
            (base / path.name).write_bytes(path.read_bytes())
    settings = files.read_json(base / "tokenizer_config.json")
    files.write_json(base / "tokenizer_config.json", settings | {"chat_template": None})
    with pytest.raises(RuadaptError, match="has no chat template to be tuned with"):
        write_chat_form(base, "", words)
    template = tmp_path / "form.jinja"
    template.write_text(str(read_chat_template(tiny_pair.instruct)).replace("<|end|>", "."), "utf-8")
    with pytest.raises(RuadaptError, match="ends no answer by a special token"):
        write_chat_form(base, str(template), words)
    template.write_text(str(read_chat_template(tiny_pair.instruct)), "utf-8")
    write_chat_form(base, str(template), words)
    rows = [chat(number, "Да.") for number in range(4)]
    for row in rows:
        row["messages"][1]["role"] = "assistant"
    files.write_jsonl(tmp_path / "chat.jsonl", rows)
    options = {"steps": 2, "batch_size": 2, "lora_rank": None}
    calibrate(base, tmp_path / "instruct", [tmp_path / "chat.jsonl"], None, 0, options, words=words)
    found = verify(tmp_path / "instruct")
    assert found["chat"] and found["eos"][0] == "<|end|>"
    assert set(eos_ids(base)) <= set(eos_ids(tmp_path / "instruct"))


def test_minimal_pairs_go_to_the_more_probable_sentence(tiny_pair: TinyPair, tasks: Path) -> None:
    model, tokenizer = load(tiny_pair.instruct)
    scores = []
    for asked in (True, False):  # by no chat template: both forms are the same question
        benchmark = Benchmark(["blimp"], str(tasks), chat=asked)
        table = benchmark.evaluate(model, tokenizer)
        assert set(table["task"]) == {"blimp"} and set(table["shots"]) == {0 if asked else 5}
        scores.append(table.set_index("id")["score"])
        assert list(scores[-1].index) == ["agreement-0", "case-0", "agreement-1"]  # paradigms take turns
    assert scores[0].equals(scores[1])
    for number, (_, *sentences) in enumerate(PAIRS):
        spent = []
        for sentence in sentences:
            ids = torch.tensor([[start_token(tokenizer), *tokenizer(sentence)["input_ids"]]])
            with torch.no_grad():
                spent.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
        assert scores[0][["agreement-0", "agreement-1", "case-0"][number]] == float(spent[0] < spent[1])


def test_ifeval_asks_what_can_be_judged(tiny_pair: TinyPair, tasks: Path) -> None:
    items = Benchmark(["ifeval_en"], str(tasks), chat=True).items()
    assert list(items["id"]) == ["1"] and list(items["task"]) == ["ifeval"]
    with pytest.raises(RuadaptError, match="of chat models only"):
        Benchmark(["ifeval_en"], str(tasks), chat=False).build()
    both = ["punctuation:no_comma", "change_case:english_lowercase"]
    document = ASKED[0] | {"instruction_id_list": both, "kwargs": [{"num_words": None}, {}]}
    said = {"all of this is in lower case letters": 1.0, "all, of this": 0.5, "All, or NOT": 0.0, "": 0.0}
    for answer, share in said.items():
        assert ifeval(document, [answer]) == {"score": share, "exact": float(share == 1)}


def test_answers_cost_their_bits_and_no_others(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_pair.instruct)
    turns = [{"role": "user", "content": "Где живёт учитель?"}, {"role": "assistant", "content": "У реки."}]
    (bits,), (characters,) = answer_bits(model, tokenizer, [{"messages": turns}])
    prompt = tokenizer("<|user|>Где живёт учитель?<|end|><|assistant|>")["input_ids"]
    answer = tokenizer("У реки.<|end|>")["input_ids"]
    with torch.no_grad():
        shares = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    nats = sum(float(shares[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
    assert characters == len("У реки.") and math.isclose(bits, -nats / math.log(2), rel_tol=1e-5)
    with torch.no_grad():  # all tokens alike: log2 of the rows a token, whatever the words
        model.get_output_embeddings().weight.zero_()
    (bits,), _ = answer_bits(model, tokenizer, [{"messages": turns}])
    assert math.isclose(
        bits, len(answer) * math.log2(len(model.get_output_embeddings().weight)), rel_tol=1e-6
    )
    files.write_jsonl(tmp_path / "heldout.jsonl", [{"messages": turns}] * 2)
    labels = dict.fromkeys(["model", "stage", "vocabulary", "method", "calibration", "seed"], "x")
    benchmark = Benchmark(["world_copy_en"], "", chat=True, items_per_task=1)
    options: dict[str, Any] = {"benchmark": benchmark, "texts": {}}
    options["chats"] = {"ru": tmp_path / "heldout.jsonl"}
    evaluate_job(tiny_pair.instruct, tmp_path / "job", labels, **options)
    table = collect([tmp_path / "job"], "bits")
    assert list(table["of"]) == ["answers"] * 2 and set(table["size"]) == {len("У реки.")}


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_a_real_tokenizer_keeps_its_ids_where_it_is_extended(name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("RUADAPT_REAL_MODELS", "")) / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"RUADAPT_REAL_MODELS names no folder with {name}")
    texts = ["Старый капитан видел двадцать пять лошадей в маленьком городе у реки."] * 20
    vocab.save_tokenizer(tmp_path / "words", vocab.extend(folder, texts, 3), folder)
    assert not vocab.broken(vocab.certify(tmp_path / "words", folder, {"ru": texts}, 3))
    new, old = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "words", folder))
    assert len(new(texts[0])["input_ids"]) < len(old(texts[0])["input_ids"])
    assert new("An old captain.")["input_ids"] == old("An old captain.")["input_ids"]


def test_changes_are_paired_by_document() -> None:
    sizes = np.array([100.0, 50.0, 200.0, 80.0])
    first = sizes * [1.5, 2.0, 1.0, 1.8]
    found = compared(1.1 * first, sizes, first, relative=True)
    ends = [found[name] for name in ("change", "change_low", "change_high")]
    assert ends == pytest.approx([0.1] * 3) and found["value"] == pytest.approx(1.1 * first.sum() / 430)
    right, before = np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 0, 1])
    found = compared(right, np.ones(4), before, relative=False)
    assert (found["value"], found["change"]) == (0.75, 0.25) and found["change_low"] < 0


def test_the_docs_have_the_committed_results_of_real_models() -> None:
    root = files.project_root()
    names = {"SmolLM2-135M": "smollm2", "Gemma-3-270M": "gemma"}
    tables = {base: read(root / "data" / "results" / f"real_{name}.csv") for base, name in names.items()}
    for table in tables.values():
        assert markdown(table) in (root / "docs" / "real_models.md").read_text("utf-8")
    assert changes(tables) in (root / "README.md").read_text("utf-8")


def test_models_are_scored_on_the_originals_own_answers(tiny_pair: TinyPair, tmp_path: Path) -> None:
    asked = [chat(number, "Да.")["messages"] for number in range(6)]
    for turns in asked:
        turns[1]["role"] = "assistant"
    taught = [{"messages": [turns[0], turns[1] | {"content": "Моряк."}]} for turns in asked]
    files.write_jsonl(tmp_path / "ru.jsonl", ({"messages": turns} for turns in asked))
    files.write_jsonl(tmp_path / "taught.jsonl", taught)
    options = {"steps": 60, "batch_size": 4, "learning_rate": 1e-2, "seed": 5}
    original = tmp_path / "original"
    calibrate(tiny_pair.instruct, original, [tmp_path / "taught.jsonl"], None, 0, options)
    models = [f"original={original}", f"before={tiny_pair.instruct}"]
    own_answers.main(tmp_path / "t.csv", models, [f"ru={tmp_path / 'ru.jsonl'}"], 32, tmp_path / "work")
    table = pd.read_csv(tmp_path / "t.csv").set_index(["model", "answers"])
    assert list(files.read_jsonl(tmp_path / "work" / "ru" / "rows.jsonl")) == taught
    assert (table["rows"] == 6).all() and table.loc["original", "change"].isna().all()
    assert table.loc[("before", "the original's own"), "change_low"] > 1
    assert table.loc[("before", "data set"), "change_high"] < 0  # its own words left it no others
    record = files.read_json(tmp_path / "t.json")
    assert record["answers of the original"] == {"ru": {"answered": 6}}
    assert record["steps of the last training"] == {"original": 60, "before": None}


def test_the_study_draws_what_is_committed(tmp_path: Path) -> None:
    root = files.project_root()
    executed = papermill.execute_notebook(
        root / "notebooks" / "real_models.ipynb",
        tmp_path / "executed.ipynb",
        cwd=root / "notebooks",  # where JupyterLab starts its kernels
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "adapted, bits per byte, Russian" in outputs[-1]["data"]["text/markdown"]
    docs, told = (root / "docs" / "real_models.md").read_text("utf-8"), []
    for output in outputs:
        told += output.get("data", {}).get("text/markdown", "").split("\n\n")
    tables = [part for part in told if part.startswith("| ")]
    assert len(tables) == 7  # chat and scores of two bases, own answers, the goals, and what more text gives
    assert not [table for table in tables if table not in docs]


def test_no_code_is_both_held_out_and_trained_on() -> None:
    heldout, training = list(code.held_out()), list(code.training())
    assert len(heldout) > 500 and len(training) > 1_000
    assert not {*heldout} & {*training}
    assert max(map(len, heldout + training)) <= code.DOCUMENT
    assert any("\n        return " in text for text in training)  # indents are what it is for
