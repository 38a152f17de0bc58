"""Tasks asked through lm-evaluation-harness: one score for each item, pairs and exams counted once.

Instruct models are asked zero-shot through their chat template, base models as raw text with examples:
question, `Answer:` (`Ответ:`), answer, blank line.
"""

import contextlib
import io
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import chosen_of
from ruadapt.training.generation import maximum_length

Row = dict[str, Any]

ANSWER_ROOM = 1.5


def ask(
    backend: Backend, tasks: Mapping[str, ConfigurableTask], labels: Mapping[str, Row], chat: bool
) -> dict[str, list[Row]]:
    """Run tasks, freshly built, through the harness and return the rows of each, one a scored unit.

    Choices are compared by the log-likelihood of the whole choice behind the prompt. Free answers are greedy
    and end at an end token, at a stop string of the task, or at its limit: the world's take `ANSWER_ROOM`
    times the longest right answer of the task, counted in the model's own tokens and rounded up to a power of
    two (32 at least), Darumeru's what their YAML says. A copied sentence that has not ended by then scores 0,
    since its length has no bound.

    Args:
        backend: the model.
        tasks: by name; a few-shot one whose longest prompt does not fit the context loses examples.
        labels: columns to put in front of each task's rows.
        chat: ask through the chat template; otherwise raw text, with the start token in front.

    Returns:
        for each task rows of its labels and `shots` (asked for), `used_shots`, `metric, id, score`, `exact`
        (words equal; free answers with metric f1), `classes` (the right and the chosen one), `answer`, `cut`
        (the answer hit the limit), `empty` (no letter in it). For both_orders and exams the unit's name is
        the id. Of tasks of other makers the score is the first number of their metrics.

    Raises:
        RuadaptError: a model without a chat template asked to chat, too few examples, a prompt that does not
            fit the context, items that got lost, or one that got no score.
    """
    if chat:
        backend.apply_chat_template([{"role": "user", "content": "?"}])
    labels = {name: {**labels[name], **_prepare(task, backend, chat)} for name, task in tasks.items()}
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


def _prepare(task: ConfigurableTask, backend: Backend, chat: bool) -> dict[str, int]:
    """Fit a task to a model: its answers' limit, BOS before raw text, no more examples than there is room.

    Returns:
        `shots` and `used_shots`.
    """
    config, own = task.config, "raw" in task.features
    generation = config.generation_kwargs or {}
    limit = int(generation.get("max_gen_toks", 0))
    if own and (not limit or config.dataset_kwargs["subset"].startswith("world:")):
        limit = _answer_limit(backend, task.eval_docs)
        config.generation_kwargs = generation | {"max_gen_toks": limit}
    shots = int(config.num_fewshot or 0)
    if not chat:
        config.description = (backend.tokenizer.bos_token or "") + (config.description or "")
    if own and shots and not chat:
        examples = list(itertools.islice(task.fewshot_docs(), shots))
        if len(examples) < shots:
            raise RuadaptError(
                f"task {task.task_name} has {len(examples)} examples, {shots} are asked for; lower shots"
            )
        end = config.target_delimiter + config.fewshot_delimiter
        config.num_fewshot = _fitting(backend, task.eval_docs, examples, limit, end)
    return {"shots": shots, "used_shots": int(config.num_fewshot or 0)}


def _answer_limit(backend: Backend, documents: Iterable[Row]) -> int:
    longest = math.ceil(ANSWER_ROOM * max(backend.count(entry["answer"]) for entry in documents))
    # Powers of two, so that tasks with like answers share their batches.
    return 1 << (max(32, longest) - 1).bit_length()


def _fitting(
    backend: Backend, documents: Iterable[Row], examples: Iterable[Row], limit: int, end: str
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


def _row(sample: Mapping[str, Any], task: ConfigurableTask, cut: set[str]) -> Row:
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


def _units(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield one row a unit: items as they are, then pairs and exams."""
    units: dict[str, list[Row]] = defaultdict(list)
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
