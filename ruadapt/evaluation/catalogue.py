"""Tasks by name: this project's YAML tasks, and whatever else lm-evaluation-harness knows."""

import difflib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pandas as pd
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import TASKS_FOLDER
from ruadapt.evaluation.tasks import ask, quiet

_GROUP_KEYS = ("group", "task", "aggregate_metric_list", "metadata")


@dataclass(frozen=True)
class Named:
    """One task: its name, its innermost group, the name it was asked for by, the groups' settings, and what
    the innermost group says of itself (`skill`, `language`)."""

    name: str
    group: str
    asked: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    own: bool = True

    def place(self) -> dict[str, str]:
        """Return the task's place in the papers' tables: `language`, `group` (a skill), `task`.

        Raises:
            RuadaptError: it has none: a task of another maker.
        """
        if not {"skill", "language"} <= self.about.keys():
            raise RuadaptError(
                f"{self.name} has no place in a run's tables, which are of darumeru or world; measure it by "
                "`ruadapt evaluate --tasks`"
            )
        language = str(self.about["language"])
        short = self.name.partition("_")[2].removesuffix(f"_{language}")
        return {"language": language, "group": str(self.about["skill"]), "task": short}


class Catalogue:
    """Finds tasks before work starts and builds each for itself, so that one that fails spoils no other.

    Args:
        names: tasks or groups; those with `_base` are few-shot and raw.
        data: local data, as in `documents.load`.

    Raises:
        RuadaptError: an unknown name (like ones are named), or a task that is asked for twice.
    """

    def __init__(self, names: Sequence[str], data: str = "") -> None:
        self._data = data
        self._others: TaskManager | None = None
        index = self._manager().task_index
        self.tasks: list[Named] = []
        for name in names:
            if name in index:
                self.tasks += _leaves(name, index, Named(name, name, name))
                continue
            if self._others is None:
                with quiet():
                    self._others = TaskManager()
            if name not in self._others.task_index:
                known = [*index, *self._others.task_index]
                like = difflib.get_close_matches(name, known, 5, 0.5) or sorted(index)
                raise RuadaptError(f"there is no task {name!r}; known are, for instance, {', '.join(like)}")
            self.tasks.append(Named(name, name, name, own=False))
        twice = {task.name for task in self.tasks if [t.name for t in self.tasks].count(task.name) > 1}
        if twice:
            raise RuadaptError(
                f"{', '.join(sorted(twice)[:3])} would run twice; ask for one of {', '.join(names)} at a time"
            )

    def build(
        self, *tasks: Named, tokenizer: str = "", shots: int | None = None
    ) -> dict[str, ConfigurableTask]:
        """Return the harness's tasks of some names, their data loaded.

        Args:
            tokenizer: counts the length of copied sentences.
            shots: examples of a few-shot task, if not as many as its settings say.
        """
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for task in tasks:
            if task.own:
                settings = dict(task.overrides)
                if shots is not None and "num_fewshot" in settings:
                    settings["num_fewshot"] = shots
                groups[task.group].append({"task": task.name, **settings})
        found: dict[str, ConfigurableTask] = {}
        with quiet():
            if groups:
                specs = [{"group": name, "task": members} for name, members in groups.items()]
                found |= self._manager(tokenizer).load(specs)["tasks"]
            if self._others and (others := [task.name for task in tasks if not task.own]):
                found |= self._others.load(others)["tasks"]
        return found

    def _manager(self, tokenizer: str = "") -> TaskManager:
        metadata: Any = {"data": self._data, "tokenizer": tokenizer}
        return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)


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
        self._places = {named.name: named.place() for named in self._catalogue.tasks}

    def build(self, tokenizer: str = "") -> dict[str, ConfigurableTask]:
        """Return the harness's tasks by name, their data loaded."""
        found = self._catalogue.build(*self._catalogue.tasks, tokenizer=tokenizer, shots=self._shots)
        for task in found.values():
            shorten(task, self._items)
        return found

    def items(self) -> pd.DataFrame:
        """Return what is asked: `language, group, task, metric, id, prompt, answer`, one row a question."""
        columns = ("metric", "id", "prompt", "answer")
        return pd.DataFrame(
            self._places[name] | {column: entry[column] for column in columns}
            for name, task in self.build().items()
            for entry in task.eval_docs
        )

    def fingerprints(self) -> dict[str, str]:
        """Return what each task asks, as `fingerprint`."""
        return {name: fingerprint(task) for name, task in self.build().items()}

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> pd.DataFrame:
        """Ask a model every item and return one row a scored unit, `tasks.ask`'s with the tasks' places.

        Raises:
            RuadaptError: as `tasks.ask`.
        """
        backend = Backend(model, tokenizer, batch_size, quiet=True)
        rows = ask(backend, self.build(str(tokenizer.name_or_path)), self._places, self.chat)
        return pd.concat([pd.DataFrame(part) for part in rows.values()], ignore_index=True)


def asks_to_chat(task: ConfigurableTask) -> bool:
    """Tell whether a task of this project is meant for the chat template: it shows no examples."""
    return "raw" in task.features and not task.config.num_fewshot


def shorten(task: ConfigurableTask, units: int) -> None:
    """Keep the first `units` items (pairs and exams whole) of a task; 0 keeps all."""
    split = task.config.test_split or task.config.validation_split
    documents = task.dataset[split]
    if units:
        names = documents["unit"] if "unit" in documents.features else range(len(documents))
        first = set(list(dict.fromkeys(names))[:units])
        documents = documents.select([place for place, name in enumerate(names) if name in first])
    task.dataset = dict(task.dataset) | {split: documents}


def fingerprint(task: ConfigurableTask) -> str:
    """Return the SHA-256 of what a task asks: its documents, examples and settings, not where they lie."""
    config = task.config
    settings = {
        name: config[name]
        for name in ("task", "num_fewshot", "output_type", "generation_kwargs", "fewshot_delimiter")
    }
    parts = [[entry for entry in documents or ()] for documents in (task.eval_docs, task.fewshot_docs())]
    rows = [[{k: v for k, v in row.items() if k != "tokenizer"} for row in part] for part in parts]
    text = json.dumps([str(task.VERSION), settings, rows], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def _leaves(name: str, index: Mapping[str, Any], above: Named) -> Iterator[Named]:
    config = index[name].cfg
    if "group" not in config:
        yield replace(above, name=name)
        return
    own = {key: value for key, value in config.items() if key not in _GROUP_KEYS}
    inner = replace(
        above, group=name, overrides=own | dict(above.overrides), about=config.get("metadata") or {}
    )
    for member in config["task"]:
        yield from _leaves(member, index, inner)
