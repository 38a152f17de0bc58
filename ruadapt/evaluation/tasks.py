"""Tasks asked through lm-evaluation-harness: one score for each item, pairs and exams counted once.

Instruct models are asked zero-shot through their chat template, base models as raw text with examples:
question, `Answer:` (`Ответ:`), answer, blank line. A task is a YAML file of `lm_eval_tasks`, which names its
scorer in `ruadapt.evaluation.scoring`.
"""

import contextlib
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import TASKS_FOLDER
from ruadapt.hub import identity

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
        names: `world`, `darumeru`, tags or tasks of theirs, `blimp`, `rublimp` or `ifeval_en`. Where a task's
            file says `raw`, chat models too are asked in plain text, without examples. A task that has no
            few-shot form is asked of chat models only.
        data: local data, as in `documents.load`.
        chat: for instruct models; else the names' few-shot form (`NAME_base`).
        shots: examples before each question of a few-shot task.
        items_per_task: first items (pairs and exams whole) of each task; 0: all.

    Raises:
        RuadaptError: an unknown name; known ones are listed.
    """

    def __init__(
        self, names: Sequence[str], data: str = "", *, chat: bool, shots: int = 5, items_per_task: int = 0
    ) -> None:
        self.chat = chat
        self._data, self._shots, self._items = data, shots, items_per_task
        self.asks = {"tasks": list(names), "data": identity(data), "chat": chat, "shots": shots}
        self.asks |= {"items_per_task": items_per_task}
        """What the scores depend on besides model and code."""
        known = self._manager().all_tasks
        forms = {name: f"{name}_base" for name in names if f"{name}_base" in known and not chat}
        self._names = [forms.get(name, name) for name in names]
        if unknown := [name for name in self._names if name not in known]:
            listed = ", ".join(name for name in known if chat or name.endswith("_base"))
            raise RuadaptError(f"there is no task {', '.join(unknown)}; known are {listed}")

    def build(self, tokenizer: str = "") -> dict[str, ConfigurableTask]:
        """Return the harness's tasks by name, their data loaded; `tokenizer` counts copied sentences.

        Raises:
            RuadaptError: as `documents.load`; or a task is asked for twice.
        """
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tasks = self._manager(tokenizer).load(self._names)["tasks"]
        except ValueError as error:
            raise RuadaptError(f"{error}; ask for one of them at a time") from error
        if not self.chat:
            tasks = {name: task for name, task in tasks.items() if task.config.num_fewshot or _raw(task)}
        if not tasks:
            raise RuadaptError(f"{', '.join(self._names)} can be asked of chat models only")
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
        columns = ["id", "prompt", "answer"]
        tables = [
            task.eval_docs.to_pandas()[columns].assign(**_labels(task)) for task in self.build().values()
        ]
        return pd.concat(tables, ignore_index=True)[["language", "group", "task", "metric", *columns]]

    def evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
        """Ask a model every item and return one row a scored unit.

        A few-shot task whose longest prompt does not fit the model's positions loses examples.

        Returns:
            columns `language, group, task, metric`, `shots` (asked for), `used_shots`, `id, score`, `exact`
            (words equal; of f1), `answer`, `cut` (it hit the limit). Of both_orders and exams the unit's name
            is the id.

        Raises:
            RuadaptError: a model without a chat template asked to chat, too few examples, a prompt that does
                not fit, or a choice without a finite probability.
        """
        if self.chat and not tokenizer.chat_template:
            raise RuadaptError(
                f"{tokenizer.name_or_path} has no chat template; evaluate it as a base model, few-shot"
            )
        backend, tasks = Backend(model, tokenizer), self.build(str(tokenizer.name_or_path))
        labels: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        for chat in {self.chat and not _raw(task) for task in tasks.values()}:
            part = {name: task for name, task in tasks.items() if chat == (self.chat and not _raw(task))}
            # By its shots a base is told from an instruct model in every table, also where a task has none.
            form: dict[str, Any] = {} if self.chat else {"shots": self._shots}
            labels |= {name: _labels(task) | _fit(task, backend, chat) | form for name, task in part.items()}
            asked = {"tasks": part, "groups": {}}
            with contextlib.redirect_stderr(io.StringIO()):  # a bar for each task
                found = run_harness(backend, asked, bootstrap_iters=0, apply_chat_template=chat)
            samples |= found["samples"]
        rows: list[Row] = []
        for name, task in tasks.items():
            units: dict[str, list[Row]] = defaultdict(list)
            for sample in samples[name]:
                units[sample["doc"]["unit"]].append(sample)
            for unit, members in units.items():
                rows.append(labels[name] | {"id": unit} | _scored(task, members, backend.cut))
        return pd.DataFrame(rows)

    def _manager(self, tokenizer: str = "") -> TaskManager:
        metadata: Any = {"data": self._data, "tokenizer": tokenizer}
        return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)


def _raw(task: ConfigurableTask) -> bool:
    return bool((task.config.metadata or {}).get("raw"))


def _labels(task: ConfigurableTask) -> dict[str, str]:
    """Return a task's place in the papers' tables (`language`, `group`: a skill, `task`) and its `metric`."""
    about, name = task.config.metadata or {}, task.task_name
    if not {"skill", "language"} <= about.keys():
        raise RuadaptError(f"the file of {name} names no skill and language, its place in a run's tables")
    plain = name.removesuffix(f"_{about['language']}")
    short = plain.partition("_")[2] or plain  # without the benchmark's name before it
    place = {"language": about["language"], "group": about["skill"], "task": short}
    return place | {"metric": task.config.process_results.__name__}


def _fit(task: ConfigurableTask, backend: Backend, chat: bool) -> dict[str, int]:
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


def _scored(task: ConfigurableTask, members: Sequence[Mapping[str, Any]], cut: set[str]) -> Row:
    """Return `score, exact, answer, cut` of a unit: one sample, or those of a pair or an exam."""
    metric, generated = task.config.process_results.__name__, task.OUTPUT_TYPE == "generate_until"
    given = [(member["doc"], member["filtered_resps"]) for member in members]
    answers = [str(said[0]) if generated else scoring.chosen(asked, said) for asked, said in given]
    was_cut = generated and any(member["arguments"][0][0] in cut for member in members)
    score = task.aggregation()["score"]([member["score"] for member in members])
    if was_cut and metric == "copy_sentence":
        score = 0.0
    exact = members[0].get("exact", math.nan)
    return {"score": float(score), "exact": exact, "answer": " | ".join(answers), "cut": was_cut}
