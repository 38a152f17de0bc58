"""Tasks through the harness: the numbers of a direct computation and of its own backend; clear refusals."""

import copy
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import tasks as module
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.models import load
from ruadapt.evaluation.tasks import Benchmark
from ruadapt.files import write_jsonl

WORDS = re.split(" ", "река город дом учитель старый the baker river seven house Кто моряк? 25 зелёных")


def item(task: str, metric: str, number: int, language: str = "ru") -> dict[str, Any]:
    rng = random.Random(f"{task}{number}")
    question = " ".join(rng.choices(WORDS, k=6 + 5 * number))
    choices = ["дом у реки", "дом", "the old house"] if metric in ("choice", "both_orders") else []
    answer = choices[number % 3] if choices else " ".join(rng.choices(WORDS, k=4))
    return {
        "messages": [{"role": "user", "content": question}],
        "outputs": answer,
        "meta": {
            "id": f"{task}-{number}",
            "task": task,
            "metric": metric,
            "language": language,
            "choices": choices,
            "pair": str(number // 2) if metric == "both_orders" else "",
        },
    }


def every_metric(count: int = 4) -> list[dict[str, Any]]:
    tasks = {
        "nature": "choice",
        "yes_no": "both_orders",
        "reading": "f1",
        "abstractive": "rouge",
        "copy_sentence": "copy_sentence",
        "copy_paragraph": "copy_paragraph",
    }
    return [item(task, metric, number) for task, metric in tasks.items() for number in range(count)]


@pytest.fixture(scope="module", params=["tied", "untied"])
def loaded(request: pytest.FixtureRequest) -> Any:
    pair = request.getfixturevalue("tiny_pair" if request.param == "tied" else "tiny_pair_untied")
    return load(pair.instruct, device="cpu")


def requests(prompts: list[str], arguments: list[Any], kind: str) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=(prompt, argument), idx=0)  # type: ignore[arg-type]
        for prompt in prompts
        for argument in arguments
    ]


def prompts_with_common_beginning() -> list[str]:
    common = "<|user|>" + " ".join(WORDS * 5)
    asked = [common + "\n" * (n % 2) + " ".join(WORDS[:n]) for n in range(1, 8)]
    return [text + "<|end|><|assistant|>" for text in [*asked, "Кто", "The baker"]]


def direct(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_log_likelihoods_equal_a_direct_forward_pass(loaded: Any, batch_size: int) -> None:
    model, tokenizer = loaded
    choices = ["дом", " старый дом у реки", "7", " река, the river"]
    asked = requests(prompts_with_common_beginning(), choices, "loglikelihood")
    scores = Backend(model, tokenizer, batch_size).loglikelihood(asked, disable_tqdm=True)
    for request, (score, _) in zip(asked, scores, strict=True):
        assert score == pytest.approx(direct(model, tokenizer, *request.args), abs=1e-3)


def test_many_choices_of_one_prompt_never_stand_in_memory_at_once(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minimal pairs: the start of a text is their prompt, and all of their sentences are its choices."""
    model, tokenizer = loaded
    choices = [" " + " ".join(WORDS[first : first + 1 + first % 3]) for first in range(len(WORDS) - 3)] * 3
    asked = requests(["Кто", "Почему это"], choices, "loglikelihood")
    limit = 9 * 24 * model.config.vocab_size
    monkeypatch.setattr("ruadapt.evaluation.backend.LOGITS", limit)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))
    scores = Backend(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    hook.remove()
    assert len(asked) > 3 * 9 and max(sizes) <= limit
    for request, (score, _) in zip(asked, scores, strict=True):
        assert score == pytest.approx(direct(model, tokenizer, *request.args), abs=1e-3)


def test_a_prompt_and_its_own_answer_must_fit_and_no_others(tiny_pair: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    long = " дом" * (int(0.8 * model.config.max_position_embeddings) // len(tokenizer(" дом")["input_ids"]))
    asked = requests([long], [" река"], "loglikelihood") + requests(["Кто"], [long], "loglikelihood")
    scores = Backend(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    for request, (score, _) in zip(asked, scores, strict=True):
        assert score == pytest.approx(direct(model, tokenizer, *request.args), rel=1e-5)
    with pytest.raises(RuadaptError, match="leaves no room for an answer"):
        Backend(model, tokenizer).loglikelihood(requests([long], [long], "loglikelihood"))


def test_a_token_across_the_line_break_of_the_answer_mark_is_kept(tiny_pair: Any) -> None:
    """`:\\n` as one token: the prompt must keep its line break, which the harness's own split loses."""
    model, tokenizer = load(tiny_pair.base, device="cpu")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["merges"] = [[":", "Ċ"], *core["model"]["merges"]]
    core["model"]["vocab"][":Ċ"] = core["model"]["vocab"].pop(
        core["model"]["merges"][-1][0] + core["model"]["merges"][-1][1]
    )
    core["model"]["merges"].pop()
    merged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<|endoftext|>"
    )
    backend = Backend(model, merged)
    prompt, choice = "Кто моряк?\nОтвет:\n", "дом"
    before, behind = backend._encode_pair(prompt, choice)
    assert merged.convert_ids_to_tokens(before[-1]) == ":Ċ"
    assert merged.decode(before) == prompt and merged.decode(behind) == choice
    score = backend.loglikelihood(requests([prompt], [choice], "loglikelihood"), True)[0][0]
    assert score == pytest.approx(direct(model, merged, prompt, choice), abs=1e-3)


def test_the_harness_own_backend_gives_the_same(loaded: Any) -> None:
    model, tokenizer = loaded
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False)
    ours = Backend(model, tokenizer, 4)
    prompts = prompts_with_common_beginning()
    choices = requests(prompts, ["дом", " старый дом"], "loglikelihood")
    for a, b in zip(
        ours.loglikelihood(choices, True), theirs.loglikelihood(copy.deepcopy(choices), True), strict=True
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[1] == b[1]
    answers = requests(prompts, [{"until": ["е"], "max_gen_toks": 12}], "generate_until")
    assert ours.generate_until(answers) == theirs.generate_until(copy.deepcopy(answers), True)


def test_each_answer_of_a_batch_stops_for_itself(tiny_pair: Any) -> None:
    """`HFLM` goes on until all of them hold the stop string, or to the limit."""
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    prompts = ["Кто моряк?", "The baker"]
    backend, passes = Backend(model, tokenizer), []

    def written(until: list[str], limit: int) -> list[str]:
        told = [{"until": until, "max_gen_toks": limit}]
        return backend.generate_until(requests(prompts, told, "generate_until"))

    firsts = [text[:1] for text in written([], 6)]
    backend.cut.clear()
    model.register_forward_hook(lambda *_: passes.append(1))
    assert written(firsts, 200) == ["", ""] and not backend.cut and len(passes) < 4


def test_batches_do_not_change_answers(loaded: Any) -> None:
    model, tokenizer = loaded
    asked = requests(prompts_with_common_beginning(), [{"until": [], "max_gen_toks": 15}], "generate_until")
    together = Backend(model, tokenizer).generate_until(asked)
    assert together == Backend(model, tokenizer, 1).generate_until(asked)


def test_an_answer_ends_with_the_models_positions(tiny_pair: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    backend = Backend(model, tokenizer)
    room, prompts = model.config.max_position_embeddings, ["река " * 100, "дом " * 150]
    asked = requests(prompts, [{"until": [], "max_gen_toks": 10 * room}], "generate_until")
    assert all(backend.generate_until(asked)) and backend.cut == set(prompts)


def test_an_answer_ends_at_any_end_token_also_where_it_is_no_special_one(tiny_pair: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    asked = requests(["Кто моряк?"], [{"until": [], "max_gen_toks": 12}], "generate_until")
    ids = torch.tensor([tokenizer("Кто моряк?", add_special_tokens=False)["input_ids"]])
    written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    end = next(token for token in written[1:] if token != written[0])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    backend = Backend(model, tokenizer)
    assert backend.generate_until(asked) == [tokenizer.decode(written[: written.index(end)])]
    assert not backend.cut


@pytest.fixture
def evaluate(tmp_path: Path) -> Any:
    """Ask a model items of the world's tasks, with examples for its few-shot form."""

    def run(
        model: Any,
        tokenizer: Any,
        items: list[dict[str, Any]],
        shots: int | None = None,
        examples: list[dict[str, Any]] | None = None,
    ) -> pd.DataFrame:
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        write_jsonl(folder / "tasks.jsonl", items)
        write_jsonl(folder / "fewshot.jsonl", examples or items)
        asked = list(dict.fromkeys(f"world_{i['meta']['task']}_{i['meta']['language']}" for i in items))
        benchmark = Benchmark(asked if shots is None else ["world"], str(folder), chat=shots is None)
        if shots is not None:  # the few-shot form of a part
            settings = benchmark._manager().task_index["world_base"].cfg
            few_shot = {key: settings[key] for key in ("num_fewshot", "doc_to_text", "fewshot_delimiter")}
            members = [{"task": name, **few_shot} for name in asked]
            benchmark._names, benchmark._shots = [{"group": "part", "task": members}], shots  # type: ignore
        return benchmark.evaluate(model, tokenizer)

    return run


@pytest.mark.parametrize("shots", [None, 1])
def test_every_metric_gets_a_score_for_every_item(loaded: Any, evaluate: Any, shots: int | None) -> None:
    items = every_metric()
    examples = [
        item(i["meta"]["task"], i["meta"]["metric"], 50) | {"outputs": i["outputs"]} for i in items[::4]
    ]
    scores = evaluate(*loaded, items, shots, examples)
    counts = scores.groupby("task").size()
    assert counts["yes_no"] == 2  # pairs
    assert (counts.drop("yes_no") == 4).all() and len(counts) == 6
    assert scores["score"].between(0, 1).all()
    assert set(scores["shots"]) == {shots or 0}
    assert set(scores["group"]) == {"knowledge", "reasoning", "summary", "copy"}


def test_scores_are_what_the_probabilities_say(tiny_pair: Any, evaluate: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    items = [item("nature", "choice", number) for number in range(6)]
    scores = evaluate(model, tokenizer, items).set_index("id")
    for entry in items:
        prompt = f"<|user|>{entry['messages'][0]['content']}<|end|><|assistant|>"
        best = max(entry["meta"]["choices"], key=lambda choice: direct(model, tokenizer, prompt, choice))
        assert scores.loc[entry["meta"]["id"], "answer"] == best
        assert scores.loc[entry["meta"]["id"], "score"] == float(best == entry["outputs"])


def test_base_models_see_the_examples_in_the_raw_form(
    tiny_pair: Any, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(tiny_pair.base, device="cpu")
    seen: list[str] = []
    original = Backend.loglikelihood

    def spy(self: Backend, asked: list[Instance], disable_tqdm: bool = False) -> Any:
        seen.extend(request.args[0] for request in asked)
        return original(self, asked, disable_tqdm)

    monkeypatch.setattr(Backend, "loglikelihood", spy)
    entry, example = item("nature", "choice", 0, "en"), item("nature", "choice", 1, "en")
    evaluate(model, tokenizer, [entry], 1, [example])
    shot, question = example["messages"][0]["content"], entry["messages"][0]["content"]
    expected = f"<|endoftext|>{shot}\nAnswer:\n{example['outputs']}\n\n{question}\nAnswer:\n"
    assert set(seen) == {expected}


def test_examples_that_do_not_fit_are_left_out_and_told(tiny_pair: Any, evaluate: Any) -> None:
    model, tokenizer = load(tiny_pair.base, device="cpu")
    examples = [item("nature", "choice", number) for number in (10, 11, 12, 13, 14)]
    scores = evaluate(model, tokenizer, [item("nature", "choice", 0)], 5, examples)
    assert scores["shots"].item() == 5
    assert 0 < scores["used_shots"].item() < 5


def test_an_unfinished_copy_scores_nothing(tiny_pair: Any, evaluate: Any) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    scores = evaluate(model, tokenizer, [item("copy_sentence", "copy_sentence", n) for n in range(4)])
    assert (scores.loc[scores["cut"], "score"] == 0).all()
    assert scores["cut"].any(), "a random model should run on"


def test_what_cannot_be_asked_is_refused(tiny_pair: Any, evaluate: Any, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_pair.instruct, device="cpu")
    question = [item("nature", "choice", 0)]
    with pytest.raises(RuadaptError, match="leaves no room"):
        evaluate(model, tokenizer, [item("reading", "f1", 200)])
    with pytest.raises(RuadaptError, match="world_nature_ru has 1 examples, 2"):
        evaluate(model, tokenizer, question, 2)
    tokenizer.chat_template, template = None, tokenizer.chat_template
    with pytest.raises(RuadaptError, match="chat template"):
        evaluate(model, tokenizer, question)
    tokenizer.chat_template = template
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(RuadaptError, match="probability"):
        evaluate(model, tokenizer, question)
    with pytest.raises(RuadaptError, match="cannot open the model folder"):
        load(tmp_path)


def test_a_task_is_one_file_to_add(tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Path(shutil.copytree(module.TASKS_FOLDER, tmp_path / "tasks"))
    (tasks / "world" / "toy_ru.yaml").write_text(
        """
include: ../_choice.yaml
task: world_toy_ru
tag: world_knowledge_ru
dataset_kwargs: {subset: "world:toy:ru"}
metadata: {version: 1, skill: knowledge, language: ru}
"""
    )
    monkeypatch.setattr(module, "TASKS_FOLDER", tasks)
    toys = [item("toy", "choice", number) for number in range(2)]
    for name in ("tasks", "fewshot"):
        write_jsonl(tmp_path / f"{name}.jsonl", toys)
    scored = Benchmark(["world_toy_ru"], str(tmp_path), chat=True).evaluate(*load(tiny_pair.instruct, "cpu"))
    assert scored[["language", "group", "task", "metric"]].drop_duplicates().values.tolist() == [
        ["ru", "knowledge", "toy", "choice"]
    ]
    assert len(scored) == 2
