"""Tasks by name: this project's YAML tasks, and whatever else lm-evaluation-harness knows."""

import difflib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.backend import Backend
from ruadapt.evaluation.documents import TASKS_FOLDER
from ruadapt.evaluation.tasks import answer_limit, fitting, quiet

_GROUP_KEYS = ("group", "task", "aggregate_metric_list", "metadata")


@dataclass(frozen=True)
class Named:
    """One task: its name, its innermost group, the name it was asked for by, the groups' settings."""

    name: str
    group: str
    asked: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    own: bool = True


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
                self.tasks += _leaves(name, index, name, name, {})
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

    def build(self, named: Named, tokenizer: str) -> dict[str, ConfigurableTask]:
        """Return the harness's tasks of one name, their data loaded; `tokenizer` counts copied sentences."""
        with quiet():
            if not named.own and self._others:
                return self._others.load([named.name])["tasks"]
            spec = {"group": named.group, "task": [{"task": named.name, **named.overrides}]}
            return self._manager(tokenizer).load([spec])["tasks"]

    def _manager(self, tokenizer: str = "") -> TaskManager:
        metadata: Any = {"data": self._data, "tokenizer": tokenizer}
        return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)


def asks_to_chat(task: ConfigurableTask) -> bool:
    """Tell whether a task of this project is meant for the chat template: it shows no examples."""
    return "raw" in task.features and not task.config.num_fewshot


def shorten(task: ConfigurableTask, units: int) -> None:
    """Keep the first `units` items (pairs count once) of a task; 0 keeps all."""
    split = task.config.test_split or task.config.validation_split
    documents = task.dataset[split]
    paired = "metric" in documents.features and documents[0]["metric"] == "both_orders"
    rows = min(len(documents), units * (1 + paired) or len(documents))
    task.dataset = dict(task.dataset) | {split: documents.select(range(rows))}


def prepare(task: ConfigurableTask, backend: Backend, chat: bool) -> int:
    """Make a task fit a model: BOS before raw text, and no more examples than its context holds.

    The world's free answers get the limit that `tasks.evaluate` gives them, Darumeru's that of their YAML.

    Returns:
        the number of examples.
    """
    config, own = task.config, "raw" in task.features
    generation = config.generation_kwargs or {}
    limit = int(generation.get("max_gen_toks", 0))
    if own and (not limit or config.dataset_kwargs["subset"].startswith("world:")):
        limit = answer_limit(backend, task.eval_docs)
        config.generation_kwargs = generation | {"max_gen_toks": limit}
    shots = int(config.num_fewshot or 0)
    if chat:
        return shots
    config.description = (backend.tokenizer.bos_token or "") + (config.description or "")
    if own and shots:
        end = config.target_delimiter + config.fewshot_delimiter
        examples = itertools.islice(task.fewshot_docs(), shots)
        config.num_fewshot = fitting(backend, task.eval_docs, examples, limit, end)
    return int(config.num_fewshot or 0)


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


def _leaves(
    name: str, index: Mapping[str, Any], group: str, asked: str, overrides: Mapping[str, Any]
) -> Iterator[Named]:
    config = index[name].cfg
    if "group" not in config:
        yield Named(name, group, asked, overrides)
        return
    own = {key: value for key, value in config.items() if key not in _GROUP_KEYS}
    for member in config["task"]:
        yield from _leaves(member, index, name, asked, own | dict(overrides))
