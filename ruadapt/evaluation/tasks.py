"""Tasks asked through lm-evaluation-harness: one score for each item, pairs and exams counted once.

Instruct models are asked zero-shot through their chat template, base models as raw text with examples:
question, `Answer:` (`Ответ:`), answer, blank line. A task is a YAML file of `lm_eval_tasks`, which names its
scorer in `ruadapt.evaluation.scoring`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend, quiet
from ruadapt.evaluation.catalogue import Catalogue, fingerprint, shorten

Row = dict[str, Any]

ANSWER_ROOM = 1.5


class Benchmark:
    """The tasks that all models of a run are asked: zero-shot by chat, or raw with examples.

    Args:
        names: `world`, `darumeru`.
        data: as in `Catalogue`.
        chat: for instruct models; else the names' few-shot form (`NAME_base`).
        shots: examples before each question of a few-shot task.
        items_per_task: first items (pairs and exams whole) of each task; 0: all.

    Raises:
        RuadaptError: as `Catalogue` and `Named.place`.
    """

    def __init__(
        self, names: Sequence[str], data: str = "", *, chat: bool, shots: int = 5, items_per_task: int = 0
    ) -> None:
        self.chat = chat
        self._shots = shots
        self._items = items_per_task
        self._catalogue = Catalogue([name if chat else f"{name}_base" for name in names], data)
        self.places = {named.name: named.place() for named in self._catalogue.tasks}

    def build(self, tokenizer: str = "") -> dict[str, ConfigurableTask]:
        """Return the harness's tasks by name, their data loaded."""
        found = self._catalogue.build(*self._catalogue.tasks, tokenizer=tokenizer, shots=self._shots)
        for task in found.values():
            shorten(task, self._items)
        return found

    def items(self) -> pd.DataFrame:
        """Return what is asked: `language, group, task, metric, id, prompt, answer`, one row a question."""
        tables = []
        for name, task in self.build().items():
            labels = self.places[name] | {"metric": task.config.process_results.__name__}
            tables.append(task.eval_docs.to_pandas()[["id", "prompt", "answer"]].assign(**labels))
        return pd.concat(tables, ignore_index=True)[[*labels, "id", "prompt", "answer"]]

    def fingerprints(self) -> dict[str, str]:
        """Return what each task asks, as `fingerprint`."""
        return {name: fingerprint(task) for name, task in self.build().items()}

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> pd.DataFrame:
        """Ask a model every item and return one row a scored unit, `ask`'s with the tasks' places.

        Raises:
            RuadaptError: as `ask`.
        """
        backend = Backend(model, tokenizer, batch_size)
        rows = ask(backend, self.build(str(tokenizer.name_or_path)), self.places, self.chat)
        return pd.concat([pd.DataFrame(part) for part in rows.values()], ignore_index=True)


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
    if chat and not backend.tokenizer.chat_template:
        raise RuadaptError(
            f"{backend.tokenizer.name_or_path} has no chat template; evaluate it as a base model, few-shot"
        )
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
        found[name] = list(_units([labels[name] | _row(sample, task, backend.cut) for sample in samples]))
    return found


def _prepare(task: ConfigurableTask, backend: Backend, chat: bool) -> dict[str, int]:
    """Fit a task to a model: its answers' limit, BOS before raw text, no more examples than there is room.

    Returns:
        `shots` and `used_shots`.
    """
    config, own = task.config, "raw" in task.features
    generation = config.generation_kwargs or {}
    limit = int(generation.get("max_gen_toks", 0))
    if own and config.dataset_kwargs["subset"].startswith("world:"):
        longest = max(len(backend.tok_encode(entry["answer"])) for entry in task.eval_docs)
        # Powers of two, so that tasks with like answers share their batches.
        limit = 1 << (max(32, math.ceil(ANSWER_ROOM * longest)) - 1).bit_length()
        config.generation_kwargs = generation | {"max_gen_toks": limit}
    shots = used = int(config.num_fewshot or 0)
    if not chat:
        config.description = (backend.tokenizer.bos_token or "") + (config.description or "")
    if own and shots and not chat:
        examples = list(itertools.islice(task.fewshot_docs(), shots))
        if len(examples) < shots:
            raise RuadaptError(
                f"task {task.task_name} has {len(examples)} examples, {shots} are asked for; lower shots"
            )
        end = config.target_delimiter + config.fewshot_delimiter
        sizes = [len(backend.tok_encode(entry["raw"] + entry["answer"] + end)) for entry in examples]
        question = max(len(backend.tok_encode(entry["raw"])) for entry in task.eval_docs)
        room = backend.max_length - limit - question - 1
        used = config.num_fewshot = sum(total <= room for total in itertools.accumulate(sizes))
    return {"shots": shots, "used_shots": used}


def _row(sample: Mapping[str, Any], task: ConfigurableTask, cut: set[str]) -> Row:
    entry, own, generated = sample["doc"], "raw" in task.features, task.OUTPUT_TYPE == "generate_until"
    measure = "score" if own else next(name for name in task.aggregation() if name in sample)
    metric = task.config.process_results.__name__ if own else measure
    unit, value = "", sample[measure]
    if metric in scoring.UNITS:
        unit, value = value
    name = str(entry["id"] if own else sample["doc_id"])
    unfinished = generated and sample["arguments"][0][0] in cut
    if unfinished and metric == "copy_sentence":
        value = 0.0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RuadaptError(f"item {name} of task {task.task_name} got no score")
    responses = sample["filtered_resps"]
    answer = scoring.chosen(entry, responses) if own and not generated else str(responses[0])
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
    units: dict[str, list[Row]] = {}
    for row in rows:
        if unit := row.pop("unit"):
            units.setdefault(unit, []).append(row)
        else:
            yield row
    for unit, members in units.items():
        yield members[0] | {
            "id": unit,
            "score": scoring.UNITS[members[0]["metric"]]([row["score"] for row in members]),
            "answer": " | ".join(row["answer"] for row in members),
            "cut": any(row["cut"] for row in members),
            "empty": any(row["empty"] for row in members),
        }
