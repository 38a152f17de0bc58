"""A run's measured results, read back for tables and pictures: which scores, how sure.

In the papers' columns stand the papers' selection of tasks: Russian knowledge, reasoning and summary, and
both copy groups. Intervals are those of `evaluation.statistics`, over seeds and items.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import System
from ruadapt.evaluation.statistics import (
    FINDING_COLUMNS,
    ITEM_COLUMNS,
    MICRO,
    paired_differences,
    task_differences,
    task_scores,
)
from ruadapt.files import project_root
from ruadapt.vocab.registry import VOCABULARIES

PAPER_GROUPS = {
    "daru_mmlu": ("knowledge", "ru"),
    "daru_mera": ("reasoning", "ru"),
    "daru_sum": ("summary", "ru"),
    "daru_copy_en": ("copy", "en"),
    "daru_copy_ru": ("copy", "ru"),
}
"""The papers' columns and the group and language of the world tasks that stand in each."""

MEASURES = ("micro_avg", *PAPER_GROUPS, "micro_ru", "micro_en")
"""Scores of one row: the papers' six, then the micro averages of all tasks of one language."""

NAMES = {
    **{name: entry.label for name, entry in VOCABULARIES.items()},
    "": "none",
    "self": "self-calibration",
    "instruct": "world instructions",
    "instruct_copy": "world instructions + copy task",
    "dpo": "DPO",
    "kto": "KTO",
    "simpo": "SimPO",
}
"""What the papers (and so the tables and pictures) call our folders."""

TASK_NAMES = {"world": "world tasks", "darumeru": "Darumeru"}
"""What pictures and captions call the tasks of a run."""

PAIR = ("Embedded pair (base)", "Embedded pair (instruct)")
ABOUT = "the embedded pair of this repository on the generated world's tasks"
HELD_OUT = "held-out text"  # what 08_evaluation calls it in `characters_per_token.csv`
_PAPER = "paper"  # the pseudo-language of the papers' selection of tasks


def published_path(name: str) -> Path:
    """Return the path of one published table, `data/published/NAME.csv`."""
    return project_root() / "data" / "published" / f"{name}.csv"


def published(name: str) -> pd.DataFrame:
    """Read a published table as printed in its source: every cell a string, "" where unreadable there."""
    return pd.read_csv(published_path(name), dtype=str, keep_default_na=False)


class Scores:
    """Scores of a run's configurations with intervals, and paired differences between them.

    Args:
        items: every scored item, columns `statistics.ITEM_COLUMNS`, scores in 0 … 1.
        seeds: the adaptation seeds that every trained configuration must have, controls too.
        pair, about: names of base and instruct model, and what was measured, in tables and captions.
    """

    def __init__(
        self,
        items: pd.DataFrame,
        seeds: Sequence[int],
        pair: Sequence[str] = PAIR,
        about: str = ABOUT,
    ) -> None:
        self.base, self.instruct = pair
        self.about = about
        self.seeds = [str(seed) for seed in seeds]
        self._items = items.assign(few_shot=pd.to_numeric(items["shots"]) > 0, seed=items["seed"].astype(str))
        self._known: dict[tuple[System, System | None], pd.DataFrame] = {}
        self._selected: dict[System, pd.DataFrame] = {}

    def data(self, calibration: str) -> str:
        """Return what tables call a kind of calibration data; the world's only where it is the world's."""
        return NAMES[calibration] if self.about == ABOUT else NAMES[calibration].removeprefix("world ")

    def of(self, system: System) -> pd.DataFrame:
        """Return the scores of one system: index `MEASURES`, columns `value, low, high, items, seeds`.

        `daru_*` and `micro_avg` are the papers' selection: Russian knowledge, reasoning, summary, and copying
        in both languages (`micro_avg`: mean over these tasks); `micro_ru` and `micro_en` are means over all
        tasks of one language.

        Raises:
            RuadaptError: the system, one of its seeds or one of its tasks has no rows; the message names it.
        """
        if (system, None) not in self._known:
            self._known[system, None] = self._measure(self._select(system), task_scores)
        return self._known[system, None]

    def difference(self, system: System, against: System) -> pd.DataFrame:
        """Return `system - against` on the same items, by seed where both are trained; rows as in `of`.

        Columns `statistics.FINDING_COLUMNS` and `p` say what the difference shows.

        Raises:
            RuadaptError: as `of`, or the two were scored on different items.
        """
        if (system, against) not in self._known:
            differences = paired_differences(self._select(system), self._select(against))
            self._known[system, against] = self._measure(
                differences, partial(task_differences, means_only=True)
            )
        return self._known[system, against]

    def _select(self, system: System) -> pd.DataFrame:
        if system not in self._selected:
            self._selected[system] = self._find(system)
        return self._selected[system]

    def _find(self, system: System) -> pd.DataFrame:
        chosen = self._items
        for column, value in asdict(system).items():
            chosen = chosen[chosen[column] == value]
        trained = system.stage not in ("original", "initialised")
        seeds = self.seeds if trained else sorted(set(chosen["seed"]))
        chosen = chosen[chosen["seed"].isin(seeds)]
        missing = [seed for seed in seeds if seed not in set(chosen["seed"])]
        if chosen.empty or missing:
            which = f"{system}{', seed ' if missing else ''}{', '.join(missing)}"
            raise RuadaptError(f"the items have no row for {which}; run 08_evaluation again with it")
        unit = ["language", "group", "task"]
        wanted = self._items[self._items["few_shot"] == system.few_shot].groupby(unit).size()
        found = chosen.groupby(unit)["seed"].nunique().reindex(wanted.index, fill_value=0)
        if (found < len(seeds)).any():
            task = "/".join(found.index[found < len(seeds)][0])
            raise RuadaptError(
                f"the items lack the task {task} of {system} in some seed; run 08_evaluation again"
            )
        return chosen

    def _measure(self, items: pd.DataFrame, score: Callable[..., pd.DataFrame]) -> pd.DataFrame:
        column = {pair: name for name, pair in PAPER_GROUPS.items()}
        pairs = pd.Series(list(zip(items["group"], items["language"], strict=True)), index=items.index)
        paper = items.assign(language=_PAPER, group=pairs.map(column)).dropna(subset="group")
        for name, (group, language) in PAPER_GROUPS.items():
            if name not in set(paper["group"]):
                raise RuadaptError(f"the items have no {group} task in language {language!r} ({name})")
        views = pd.concat([paper, items])[ITEM_COLUMNS]
        rows = score(views, over_seeds=True)
        rows = rows[rows["task"] == ""].set_index(["language", "group"])
        where = {"micro_avg": (_PAPER, MICRO), **{name: (_PAPER, name) for name in PAPER_GROUPS}}
        where |= {"micro_ru": ("ru", MICRO), "micro_en": ("en", MICRO)}
        numbers = ["value", "low", "high", "items"]
        more = [name for name in (*FINDING_COLUMNS, "p") if name in rows]
        table = rows.loc[[where[name] for name in MEASURES], numbers + more].astype(
            dict.fromkeys(numbers, float)
        )
        return table.set_axis(list(MEASURES)).assign(seeds=items["seed"].nunique())


def tidy(scores: Scores, systems: Iterable[System]) -> pd.DataFrame:
    """Return what charts draw: columns of `System`, `measure`, and `value, low, high, items, seeds`."""
    tables = [
        scores.of(system).rename_axis("measure").reset_index().assign(**asdict(system)) for system in systems
    ]
    return pd.concat(tables, ignore_index=True)
