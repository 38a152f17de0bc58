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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets.table import InMemoryTable
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import ANSWER_MARKS, CHOSEN, GENERATED, Count, chosen_of, document, score
from ruadapt.files import read_jsonl
from ruadapt.training.generation import maximum_length

Item = dict[str, Any]

SHOT_END = "\n\n"
ANSWER_ROOM = 1.5


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
    answer_room: float = ANSWER_ROOM,
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
    tasks, labels = {}, {}
    for (task, language), members in _by_task(items).items():
        name = f"{task}_{language}"
        shown = _examples(examples, task, language, shots)
        asked = [document(member) for member in members]
        limit = answer_limit(backend, asked, answer_room)
        used = fitting(backend, asked, [document(example) for example in shown], limit) if shots else 0
        tasks[name] = build_task(
            name,
            members,
            count=backend.count,
            chat=chat,
            examples=shown[:used],
            answer_limit=limit,
            start=tokenizer.bos_token or "",
        )
        labels[name] = {"language": language, "group": members[0]["meta"]["group"], "task": task}
        labels[name] |= {"shots": shots, "used_shots": used}
    return pd.concat([pd.DataFrame(rows) for rows in ask(backend, tasks, labels, chat).values()])


def ask(
    backend: Backend, tasks: Mapping[str, ConfigurableTask], labels: Mapping[str, Item], chat: bool
) -> dict[str, list[Item]]:
    """Run tasks through the harness and return their rows: `labels` and the columns that `evaluate` names.

    Besides, `empty` tells a free answer without a letter, and `classes` holds the right and the chosen class.
    Tasks of other makers may be among them: an item's score is then the first number of its metrics.

    Raises:
        RuadaptError: items got lost, or one got no score.
    """
    with quiet():
        results = run_harness(
            backend, {"tasks": dict(tasks), "groups": {}}, bootstrap_iters=0, apply_chat_template=chat
        )
    found = {}
    for name, task in tasks.items():
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        if len(samples) != len(task.eval_docs):
            asked = len(task.eval_docs)
            raise RuadaptError(f"{asked} items of {name} were asked, {len(samples)} answered; evaluate again")
        rows = [labels[name] | _row(sample, task, backend.cut) for sample in samples]
        found[name] = list(_units(rows))
    return found


def build_task(
    name: str,
    items: Sequence[Item],
    *,
    count: Count | None = None,
    chat: bool,
    examples: Sequence[Item] = (),
    answer_limit: int = 256,
    start: str = "",
) -> ConfigurableTask:
    """Build the harness task of items that share task, language and metric.

    Args:
        name: the task's name in the harness.
        items: at least one item.
        count: tokens of a text, for copied sentences.
        chat: whether the harness will wrap the prompt into the chat template; otherwise the answer mark of
            the language follows the question.
        examples: all are put before every question.
        answer_limit: most tokens of a free answer.
        start: text in front of everything (BOS spelt out), for raw prompts.
    """
    documents = [document(item) | {"start": start} for item in items]
    config: dict[str, Any] = {
        "task": name,
        # With a fingerprint of our own: the library's takes longer than the model for small tasks.
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset(InMemoryTable.from_pylist(documents), fingerprint=name)
        },
        "test_split": "test",
        "doc_to_text": "prompt" if chat else "raw",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "fewshot_delimiter": SHOT_END,
        "num_fewshot": len(examples),
        "fewshot_config": {"sampler": "first_n", "samples": [document(e) for e in examples]},
        "metric_list": [{"metric": "score", "aggregation": len, "higher_is_better": True}],
        # The name of a column: text would be read as a template anew for every item.
        "description": "start" if start and not chat else "",
        # A lambda, since the harness copies whatever else it finds in the configuration, the model too.
        "process_results": lambda entry, results: score(entry, results, count),
    }
    if items[0]["meta"]["metric"] in CHOSEN:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    else:
        config |= {
            "output_type": "generate_until",
            "generation_kwargs": {"until": [] if chat else [SHOT_END], "max_gen_toks": answer_limit},
        }
    with quiet():
        return ConfigurableTask(config=config)


def _question(item: Item) -> str:
    return str(item["messages"][-1]["content"])


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


def answer_limit(backend: Backend, documents: Iterable[Item], room: float = ANSWER_ROOM) -> int:
    """Return the most tokens of a free answer: `room` times the longest right one, as `evaluate` says."""
    longest = math.ceil(room * max(backend.count(entry["answer"]) for entry in documents))
    # Powers of two, so that tasks with like answers share their batches.
    return 1 << (max(32, longest) - 1).bit_length()


def fitting(
    backend: Backend, documents: Iterable[Item], examples: Iterable[Item], limit: int, end: str = SHOT_END
) -> int:
    """Return how many examples leave room for the longest question and its answer."""
    question = max(backend.count(entry["raw"]) for entry in documents)
    room = maximum_length(backend.model) - limit - question - 1
    shots = 0
    for shots, example in enumerate(examples, start=1):
        room -= backend.count(example["raw"] + example["answer"] + end)
        if room < 0:
            return shots - 1
    return shots


def _row(sample: Mapping[str, Any], task: ConfigurableTask, cut: set[str]) -> Item:
    entry, generated = sample["doc"], task.OUTPUT_TYPE == "generate_until"
    own = "answers" in entry  # else: another maker's task
    measure = "score" if own else next(name for name in task.aggregation() if name in sample)
    metric, value, unit = entry["metric"] if own else measure, sample[measure], ""
    if metric in scoring.UNITS:
        unit, value = value
    name = str(entry["id"] if own else sample["doc_id"])
    unfinished = generated and sample["arguments"][0][0] in cut
    if unfinished and metric == "copy_sentence":
        value = 0.0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RuadaptError(f"item {name} of task {task.task_name} got no score")
    chosen = own and not generated
    responses = sample["filtered_resps"]
    answer = chosen_of(entry, responses) if chosen else str(responses[0])
    return {
        "metric": metric,
        "id": name,
        "score": float(value),
        "exact": sample.get("exact", math.nan),
        "classes": sample.get("f1_macro"),
        "answer": answer,
        "cut": unfinished,
        "empty": generated and not answer.strip(),
        "unit": unit,
    }


def _units(rows: Sequence[Item]) -> Iterator[Item]:
    """Yield one row a unit: items as they are, then pairs and exams."""
    units: dict[str, list[Item]] = defaultdict(list)
    for row in rows:
        unit = row.pop("unit")
        if row["metric"] in scoring.UNITS:
            units[unit].append(row)
        else:
            yield row
    for unit, members in units.items():
        combine = scoring.UNITS[members[0]["metric"]]
        yield members[0] | {
            "id": unit,
            "score": combine({unit: [row["score"] for row in members]})[unit],
            "answer": " | ".join(row["answer"] for row in members),
            "cut": any(row["cut"] for row in members),
            "empty": any(row["empty"] for row in members),
        }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's notes on tasks built in code, and its progress bar per task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
