"""Tasks by name: this project's YAML files, and whatever else lm-evaluation-harness knows."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.backend import quiet
from ruadapt.evaluation.documents import TASKS_FOLDER

_GROUP_KEYS = ("group", "task", "aggregate_metric_list", "metadata")


@dataclass(frozen=True)
class Named:
    """One task: its name, its tag (the group of its benchmark), the name it was asked for by, the settings of
    that one (`_base`), and what its file says of it (`skill`, `language`)."""

    name: str
    group: str
    asked: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

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
        names: tasks, tags or groups; those with `_base` are few-shot and raw.
        data: local data, as in `documents.load`.

    Raises:
        RuadaptError: an unknown name (like ones are named), or a task that is asked for twice.
    """

    def __init__(self, names: Sequence[str], data: str = "") -> None:
        self._data, self._defaults = data, False
        index = self._manager().task_index
        self._defaults = not all(name in index for name in names)
        known = self._manager().task_index if self._defaults else index
        self.tasks: list[Named] = []
        for name in names:
            if name not in known:
                like = difflib.get_close_matches(name, known, 5, 0.5) or sorted(index)
                raise RuadaptError(f"there is no task {name!r}; known are, for instance, {', '.join(like)}")
            self.tasks += _named(name, index) if name in index else [Named(name, name, name, {}, {})]
        found = [task.name for task in self.tasks]
        if twice := {name for name in found if found.count(name) > 1}:
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
        members = []
        for task in tasks:
            settings = dict(task.settings)
            if shots is not None and "num_fewshot" in settings:
                settings["num_fewshot"] = shots
            members.append({"task": task.name, **settings})
        manager = self._manager(tokenizer)
        with quiet():
            return manager.load([{"group": "asked", "task": members}])["tasks"]

    def _manager(self, tokenizer: str = "") -> TaskManager:
        metadata: Any = {"data": self._data, "tokenizer": tokenizer}
        with quiet():  # the harness's own tasks are thousands of files, which take seconds to read
            return TaskManager(
                include_path=str(TASKS_FOLDER), include_defaults=self._defaults, metadata=metadata
            )


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
    names = ("task", "num_fewshot", "output_type", "generation_kwargs", "fewshot_delimiter")
    settings = {name: task.config[name] for name in names}
    parts = [[entry for entry in documents or ()] for documents in (task.eval_docs, task.fewshot_docs())]
    rows = [[{k: v for k, v in row.items() if k != "tokenizer"} for row in part] for part in parts]
    text = json.dumps([str(task.VERSION), settings, rows], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def _named(asked: str, index: Mapping[str, Any]) -> list[Named]:
    settings = {key: value for key, value in (index[asked].cfg or {}).items() if key not in _GROUP_KEYS}
    grouped = "group" in (index[asked].cfg or {})
    found = []
    for name in _members(asked, index):
        config = index[name].cfg
        group = config.get("tag", asked) if name != asked else name
        about = config.get("metadata") or {}
        found.append(Named(name, group, asked, settings if grouped else {}, about))
    return found


def _members(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    config = index[name].cfg
    if config is None:  # a tag
        yield from sorted(index[name].tags)
    elif "group" in config:
        for member in config["task"]:
            yield from _members(member, index)
    else:
        yield name
