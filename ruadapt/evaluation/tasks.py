"""Tasks asked through lm-evaluation-harness: one score for each item, pairs and exams counted once.

Instruct models are asked zero-shot through their chat template, base models as raw text with examples:
question, `Answer:` (`Ответ:`), answer, blank line. A task is a YAML file of `lm_eval_tasks`, which names its
scorer in `ruadapt.evaluation.scoring`.
"""

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import pandas as pd
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend, quiet
from ruadapt.evaluation.documents import TASKS_FOLDER

Row = dict[str, Any]

ANSWER_ROOM = 1.5


class Benchmark:
    """Tasks that models are asked: zero-shot by chat, or raw with examples.

    Choices are compared by the log-likelihood of the whole choice behind the prompt. Free answers are greedy
    and end at an end token, at a stop string of the task, or at its limit: the world's take `ANSWER_ROOM`
    times the longest right answer of the task, counted in the model's own tokens and rounded up to a power of
    two (32 at least), Darumeru's what their YAML says. A copied sentence that has not ended by then scores 0,
    since its length has no bound.

    Args:
        names: `world`, `darumeru`, or tags or tasks of theirs.
        data: local data, as in `documents.load`.
        chat: for instruct models; else the names' few-shot form (`NAME_base`).
        shots: examples before each question of a few-shot task.
        items_per_task: first items (pairs and exams whole) of each task; 0: all.

    Raises:
        RuadaptError: an unknown name (like ones are named), a task that is asked for twice, or one that says
            not where it stands in a run's tables.
    """

    def __init__(
        self, names: Sequence[str], data: str = "", *, chat: bool, shots: int = 5, items_per_task: int = 0
    ) -> None:
        self.chat = chat
        self._names = [name if chat else f"{name}_base" for name in names]
        self._data, self._shots, self._items = data, shots, items_per_task
        index = self._manager().task_index
        for given, name in zip(names, self._names, strict=True):
            if name not in index:
                like = difflib.get_close_matches(name, index, 5, 0.5) or sorted(index)
                raise RuadaptError(f"there is no task {given!r}; known are, for instance, {', '.join(like)}")
        found = [task for name in self._names for task in _members(name, index)]
        if twice := {name for name in found if found.count(name) > 1}:
            raise RuadaptError(
                f"{', '.join(sorted(twice)[:3])} would run twice; ask for one of {', '.join(names)} at a time"
            )
        self.places = {name: _place(name, index[name].cfg["metadata"]) for name in found}
        """Each task's place in the papers' tables: `language`, `group` (a skill), `task`."""

    def build(self, tokenizer: str = "") -> dict[str, ConfigurableTask]:
        """Return the harness's tasks by name, their data loaded; `tokenizer` counts copied sentences."""
        with quiet():
            tasks = self._manager(tokenizer).load(self._names)["tasks"]
        for task in tasks.values():
            if task.config.num_fewshot:
                task.config.num_fewshot = self._shots
            if self._items:
                units = task.dataset["test"]["unit"]
                first = set(list(dict.fromkeys(units))[: self._items])
                chosen = [place for place, unit in enumerate(units) if unit in first]
                task.dataset = dict(task.dataset) | {"test": task.dataset["test"].select(chosen)}
        return tasks

    def items(self) -> pd.DataFrame:
        """Return what is asked: `language, group, task, metric, id, prompt, answer`, one row a question."""
        tables = []
        for name, task in self.build().items():
            labels = self.places[name] | {"metric": _metric(task)}
            tables.append(task.eval_docs.to_pandas()[["id", "prompt", "answer"]].assign(**labels))
        return pd.concat(tables, ignore_index=True)[[*labels, "id", "prompt", "answer"]]

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of what each task asks: documents, examples and settings."""
        found = {}
        for name, task in self.build().items():
            names = ("task", "num_fewshot", "output_type", "generation_kwargs", "fewshot_delimiter")
            settings = {key: task.config[key] for key in names}
            rows = [*task.eval_docs, *task.fewshot_docs()]  # `build` has named no tokenizer
            text = json.dumps([str(task.VERSION), settings, rows], sort_keys=True, default=str)
            found[name] = sha256(text.encode()).hexdigest()
        return found

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> pd.DataFrame:
        """Ask a model every item and return one row a scored unit.

        A few-shot task whose longest prompt does not fit the model's positions loses examples.

        Returns:
            columns of the tasks' places, `shots` (asked for), `used_shots`, `metric, id, score`, `exact`
            (words equal; of f1), `answer`, `cut` (it hit the limit). Of both_orders and exams the unit's name
            is the id.

        Raises:
            RuadaptError: a model without a chat template asked to chat, too few examples, a prompt that does
                not fit, items that got lost, or one that got no score.
        """
        if self.chat and not tokenizer.chat_template:
            raise RuadaptError(
                f"{tokenizer.name_or_path} has no chat template; evaluate it as a base model, few-shot"
            )
        backend, tasks = Backend(model, tokenizer, batch_size), self.build(str(tokenizer.name_or_path))
        labels = {
            name: self.places[name] | _prepare(task, backend, self.chat) for name, task in tasks.items()
        }
        with quiet():
            results = run_harness(
                backend, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, apply_chat_template=self.chat
            )
        rows: list[Row] = []
        for name, task in tasks.items():
            samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
            if len(samples) != len(task.eval_docs):
                asked = len(task.eval_docs)
                raise RuadaptError(
                    f"{asked} items of {name} were asked, {len(samples)} answered; evaluate again"
                )
            rows += _units([labels[name] | _row(sample, task, backend.cut) for sample in samples])
        return pd.DataFrame(rows)

    def _manager(self, tokenizer: str = "") -> TaskManager:
        metadata: Any = {"data": self._data, "tokenizer": tokenizer}
        return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)


def _members(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    config = index[name].cfg
    if config is None:  # a tag
        yield from sorted(index[name].tags)
    elif "group" in config:
        for member in config["task"]:
            yield from _members(member, index)
    else:
        yield name


def _place(name: str, about: Mapping[str, Any]) -> dict[str, str]:
    if not {"skill", "language"} <= about.keys():
        raise RuadaptError(f"the file of {name} names no skill and language, its place in a run's tables")
    short = name.partition("_")[2].removesuffix(f"_{about['language']}")
    return {"language": str(about["language"]), "group": str(about["skill"]), "task": short}


def _metric(task: ConfigurableTask) -> str:
    return str(task.config.process_results.__name__)


def _prepare(task: ConfigurableTask, backend: Backend, chat: bool) -> dict[str, int]:
    """Fit a task to a model: its answers' limit, BOS before raw text, no more examples than there is room.

    Returns:
        `shots` and `used_shots`.
    """
    config = task.config
    generation = config.generation_kwargs or {}
    limit = int(generation.get("max_gen_toks", 0))
    if config.dataset_kwargs["subset"].startswith("world:"):
        longest = max(len(backend.tok_encode(entry["answer"])) for entry in task.eval_docs)
        # Powers of two, so that tasks with like answers share their batches.
        limit = 1 << (max(32, math.ceil(ANSWER_ROOM * longest)) - 1).bit_length()
        config.generation_kwargs = generation | {"max_gen_toks": limit}
    shots = used = int(config.num_fewshot or 0)
    if not chat:
        config.description = (backend.tokenizer.bos_token or "") + (config.description or "")
    if shots and not chat:
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
    entry, responses, metric = sample["doc"], sample["filtered_resps"], _metric(task)
    generated, unit, value = task.OUTPUT_TYPE == "generate_until", "", sample["score"]
    if metric in scoring.UNITS:
        unit, value = value
    unfinished = generated and sample["arguments"][0][0] in cut
    if unfinished and metric == "copy_sentence":
        value = 0.0
    if not math.isfinite(value):
        raise RuadaptError(f"item {entry['id']} of task {task.task_name} got no score")
    return {
        "metric": metric,
        "id": entry["id"],
        "score": float(value),
        "exact": sample.get("exact", math.nan),
        "answer": str(responses[0]) if generated else scoring.chosen(entry, responses),
        "cut": unfinished,
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
        }
