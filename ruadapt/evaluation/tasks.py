"""Evaluation items run as lm-evaluation-harness tasks: one task per name and language, one score per item.

Item schema (Darumeru's columns): `messages`, `inputs`, `outputs`, and `meta` with `id`, `task`, `group`,
`language`, `metric`, `choices`, `pair`. Instruct models are asked zero-shot through their chat template, base
models as raw text with examples: question, `Answer:` (`Ответ:`), answer, blank line.
"""

import contextlib
import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.models import maximum_length
from ruadapt.files import read_jsonl

Item = dict[str, Any]
Scorer = Callable[[str, str], dict[str, float]]

CHOSEN = ("choice", "both_orders")
GENERATED = ("f1", "rouge", "copy_sentence", "copy_paragraph")
ANSWER_MARKS = {"en": "Answer:", "ru": "Ответ:"}
SHOT_END = "\n\n"


def read_items(path: Path) -> list[Item]:
    """Read and check evaluation items (or few-shot examples) of a JSON Lines file.

    Raises:
        RuadaptError: the file is missing, or an item breaks the schema.
    """
    items = list(read_jsonl(path))
    check_items(items)
    return items


def check_items(items: Sequence[Item]) -> None:
    """Check items against the schema above.

    Raises:
        RuadaptError: no items; a missing field; an unknown metric or language; an empty question or reference
            answer; fewer than two choices or a reference that is not among them; a repeated id; a task with
            two metrics or groups; half a pair.
    """
    if not items:
        raise RuadaptError(
            "there are no evaluation items; run the corpus stage, or name a file that has some"
        )
    kinds: dict[tuple[str, str], tuple[str, str]] = {}
    identifiers: set[tuple[str, str, str]] = set()
    for number, item in enumerate(items):
        try:
            meta, question, answer = item["meta"], _question(item), item["outputs"]
            name, task, language = meta["id"], meta["task"], meta["language"]
            metric, group, choices, pair = meta["metric"], meta["group"], meta["choices"], meta["pair"]
        except (KeyError, IndexError, TypeError) as error:
            raise RuadaptError(
                f"evaluation item {number} lacks the field {error}; see the item schema"
            ) from error
        if metric not in CHOSEN + GENERATED:
            raise RuadaptError(
                f"item {name}: unknown metric {metric!r}; known: {', '.join(CHOSEN + GENERATED)}"
            )
        if language not in ANSWER_MARKS:
            raise RuadaptError(
                f"item {name}: unknown language {language!r}; known: {', '.join(ANSWER_MARKS)}"
            )
        if not question.strip() or not answer.strip():
            raise RuadaptError(f"item {name}: the question or the reference answer is empty")
        if metric in CHOSEN and (len(choices) < 2 or answer not in choices or not all(choices)):
            raise RuadaptError(
                f"item {name}: the answer {answer!r} must be one of two or more choices, not {choices}"
            )
        if metric == "both_orders" and not pair:
            raise RuadaptError(f"item {name}: both_orders needs the name of its pair")
        if kinds.setdefault((task, language), (metric, group)) != (metric, group):
            raise RuadaptError(f"item {name}: task {task} ({language}) has items of another metric or group")
        if (task, language, name) in identifiers:
            raise RuadaptError(f"item {name} of task {task} ({language}) occurs twice")
        identifiers.add((task, language, name))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    chat: bool,
    shots: int = 0,
    examples: Sequence[Item] = (),
    batch_size: int = 64,
    answer_room: float = 1.5,
    progress: bool = False,
) -> pd.DataFrame:
    """Ask a model every item through lm-evaluation-harness and score each answer.

    Choices are compared by the log-likelihood of the whole choice behind the prompt. Free answers are greedy
    and end at an end token (base models: at a blank line) or after `answer_room` times the longest reference
    of the task, counted in the model's own tokens and rounded up to a power of two (32 at least); a copied
    sentence that has not ended by then scores 0, since its length has no bound.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        items: evaluation items.
        chat: ask through the chat template (zero-shot); otherwise raw text with examples.
        shots: examples before each question of a base model, from `examples` of the same task and language,
            in their order. A task whose longest prompt does not fit the context gets as many as fit.
        examples: items that no score uses.
        batch_size: prompts per forward pass.
        answer_room: see above.
        progress: show progress bars.

    Returns:
        one row per scored unit: `shots` (asked for), `language, group, task, metric, id, score`, and besides
        `exact` (words equal; free answers with metric f1), `answer`, `cut` (the answer hit the limit) and
        `used_shots`. For both_orders the unit is the pair: its name is the id, 1.0 if both orders are right.

    Raises:
        RuadaptError: items that break the schema, too few examples, a model without a chat template asked to
            chat, a prompt that does not fit the context, or an item that got no score.
    """
    check_items(items)
    if chat and shots:
        raise RuadaptError("instruct models are asked zero-shot: give shots=0 with chat=True")
    backend = Backend(model, tokenizer, batch_size, quiet=not progress)
    if chat:
        backend.apply_chat_template([{"role": "user", "content": "?"}])
    scorers = {metric: _scorer(metric, backend) for metric in {item["meta"]["metric"] for item in items}}
    tasks, sources, used = {}, {}, {}
    for (task, language), members in _by_task(items).items():
        name = f"{task}_{language}"
        shown = _examples(examples, task, language, shots)
        limit = _answer_limit(backend, members, answer_room)
        used[name] = _fitting(backend, members, shown, limit) if shots else 0
        tasks[name] = build_task(
            name,
            members,
            scorer=scorers[members[0]["meta"]["metric"]],
            chat=chat,
            examples=shown[: used[name]],
            answer_limit=limit,
            start=tokenizer.bos_token or "",
        )
        sources[name] = members
    with _quiet():
        results = run_harness(
            backend, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, apply_chat_template=chat
        )
    rows: list[dict[str, Any]] = []
    for name, members in sources.items():
        rows += _rows(members, results["samples"][name], backend.cut, shots, used[name])
    return pd.DataFrame(rows)


def build_task(
    name: str,
    items: Sequence[Item],
    *,
    scorer: Scorer | None = None,
    chat: bool,
    examples: Sequence[Item] = (),
    answer_limit: int = 256,
    start: str = "",
) -> ConfigurableTask:
    """Build the harness task of items that share task, language and metric.

    Args:
        name: the task's name in the harness.
        items: at least one item.
        scorer: gives the scores of a free answer and its reference; unused for choices.
        chat: whether the harness will wrap the prompt into the chat template; otherwise the answer mark of
            the language follows the question.
        examples: all are put before every question.
        answer_limit: most tokens of a free answer.
        start: text in front of everything (BOS spelt out), for raw prompts.
    """
    documents = [_document(item, chat) for item in items]
    chosen = items[0]["meta"]["metric"] in CHOSEN
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "fewshot_delimiter": SHOT_END,
        "num_fewshot": len(examples),
        "fewshot_config": {"sampler": "first_n", "samples": [_document(e, chat) for e in examples]},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "description": "" if chat else start,
    }
    if chosen:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "process_results": _chosen}
    else:
        config |= {
            "output_type": "generate_until",
            "generation_kwargs": {"until": [] if chat else [SHOT_END], "max_gen_toks": answer_limit},
            "process_results": lambda document, results: (scorer or _missing)(results[0], document["answer"]),
        }
    with _quiet():
        return ConfigurableTask(config=config)


def _scorer(metric: str, backend: Backend) -> Scorer | None:
    if metric == "f1":
        return lambda answer, reference: {
            "score": scoring.f1(answer, reference),
            "exact": scoring.exact(answer, reference),
        }
    if metric == "rouge":
        rouge = scoring.Rouge()
        return lambda answer, reference: {"score": rouge(answer, reference)}
    if metric == "copy_sentence":
        count = backend.count
        return lambda answer, reference: {"score": scoring.copy_sentence(count(answer), count(reference))}
    if metric == "copy_paragraph":
        return lambda answer, reference: {"score": scoring.copy_paragraph(answer, reference)}
    return None


def _missing(answer: str, reference: str) -> dict[str, float]:
    raise RuadaptError("free answers need a scorer")


def _chosen(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    likelihoods = [likelihood for likelihood, _ in results]
    if not all(math.isfinite(value) for value in likelihoods):
        raise RuadaptError(
            f"item {document['id']}: the model gives no finite probability; its weights are broken"
        )
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return {"score": float(document["choices"][best] == document["answer"]), "best": float(best)}


def _question(item: Item) -> str:
    return str(item["messages"][-1]["content"])


def _document(item: Item, chat: bool) -> dict[str, Any]:
    meta = item["meta"]
    prompt = _question(item) if chat else f"{_question(item)}\n{ANSWER_MARKS[meta['language']]}\n"
    return {"id": meta["id"], "prompt": prompt, "answer": item["outputs"], "choices": list(meta["choices"])}


def _by_task(items: Sequence[Item]) -> dict[tuple[str, str], list[Item]]:
    tasks: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        tasks[item["meta"]["task"], item["meta"]["language"]].append(item)
    return tasks


def _examples(examples: Sequence[Item], task: str, language: str, shots: int) -> list[Item]:
    own = _by_task(examples).get((task, language), [])
    if len(own) < shots:
        raise RuadaptError(
            f"task {task} ({language}) has {len(own)} examples, {shots} are asked for; add some"
        )
    return own[:shots]


def _answer_limit(backend: Backend, items: Sequence[Item], room: float) -> int:
    longest = math.ceil(room * max(backend.count(item["outputs"]) for item in items))
    # Powers of two, so that tasks with like answers share their batches.
    return 1 << (max(32, longest) - 1).bit_length()


def _fitting(backend: Backend, items: Sequence[Item], examples: Sequence[Item], limit: int) -> int:
    """Return how many examples leave room for the longest question and its answer."""
    question = max(backend.count(_document(item, chat=False)["prompt"]) for item in items)
    room = maximum_length(backend.model) - limit - question - 1
    for shots, example in enumerate(examples):
        document = _document(example, chat=False)
        room -= backend.count(document["prompt"] + document["answer"] + SHOT_END)
        if room < 0:
            return shots
    return len(examples)


def _rows(
    items: Sequence[Item], samples: Sequence[Mapping[str, Any]], cut: set[str], shots: int, used: int
) -> Iterator[dict[str, Any]]:
    if len(samples) != len(items):
        raise RuadaptError(f"{len(items)} items were asked but {len(samples)} came back; evaluate again")
    rows = []
    for item, sample in zip(items, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        meta = item["meta"]
        chosen = meta["metric"] in CHOSEN
        unfinished = not chosen and sample["arguments"][0][0] in cut
        score = sample["score"] if not (unfinished and meta["metric"] == "copy_sentence") else 0.0
        if not math.isfinite(score):
            raise RuadaptError(f"item {meta['id']} of task {meta['task']} got no score")
        rows.append(
            {"shots": shots}
            | {name: meta[name] for name in ("language", "group", "task", "metric", "id")}
            | {
                "score": score,
                "exact": sample.get("exact", math.nan),
                "answer": meta["choices"][int(sample["best"])] if chosen else sample["filtered_resps"][0],
                "cut": unfinished,
                "used_shots": used,
                "pair": meta["pair"],
            }
        )
    return _pairs(rows)


def _pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    pairs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        pair = row.pop("pair")
        if row["metric"] == "both_orders":
            pairs[pair].append(row)
        else:
            yield row
    scores = scoring.both_orders({pair: [row["score"] for row in both] for pair, both in pairs.items()})
    for pair, both in pairs.items():
        yield both[0] | {
            "id": pair,
            "score": scores[pair],
            "answer": " | ".join(row["answer"] for row in both),
        }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's notes on tasks built in code, and its progress bar per task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
