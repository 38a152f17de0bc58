"""A run's measured results, read back for tables and pictures: which scores, how sure.

In the papers' columns stand the papers' selection of tasks: Russian knowledge, reasoning and summary, and
both copy groups. Intervals are those of `evaluation.statistics`, over seeds and items.
"""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from paper.plan import System
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import by_task, estimate, paired_differences
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
}
"""What the papers (and so the tables and pictures) call our folders."""

LANGUAGES = {"ru": "Russian", "en": "English"}
TASK_NAMES = {"world": "world tasks", "darumeru": "Darumeru"}
"""What pictures and captions call the languages and the tasks of a run."""

PAIR = ("Embedded pair (base)", "Embedded pair (instruct)")
ABOUT = "the embedded pair of this repository on the generated world's tasks"

PUBLISHED = project_root() / "data" / "published"


def published(name: str) -> pd.DataFrame:
    """Read a published table as printed in its source: every cell a string, "" where unreadable there."""
    return pd.read_csv(PUBLISHED / f"{name}.csv", dtype=str, keep_default_na=False)


class Scores:
    """Scores of a run's configurations with intervals, and paired differences between them.

    Args:
        items: every scored item, columns `statistics.ITEM_COLUMNS`, scores in 0 … 1.
        seeds: the adaptation seeds that every trained configuration must have, controls too.
        pair, about: names of base and instruct model, and what was measured, in tables and captions.
    """

    def __init__(
        self, items: pd.DataFrame, seeds: Sequence[int], pair: Sequence[str] = PAIR, about: str = ABOUT
    ) -> None:
        self.base, self.instruct = pair
        self.about = about
        self.seeds = [str(seed) for seed in seeds]
        items = items.assign(few_shot=pd.to_numeric(items["shots"]) > 0, seed=items["seed"].astype(str))
        self._items = {key: part for key, part in items.groupby(list(asdict(System(""))), sort=False)}
        self._tasks = {form: _tasks(part) for form, part in items.groupby("few_shot")}

    def of(self, system: System) -> pd.DataFrame:
        """Return the scores of one system: a row for each of `MEASURES` that has tasks.

        Columns are `value, low, high, items, seeds`.
        `daru_*` and `micro_avg` are the papers' selection (`micro_avg`: mean over its tasks); `micro_ru` and
        `micro_en` are means over all tasks of one language.

        Raises:
            RuadaptError: the system, one of its seeds or one of its tasks has no rows; the message names it.
        """
        return _measure(self._select(system))

    def difference(self, system: System, against: System) -> pd.DataFrame:
        """Return `system - against` on the same items, by seed where both are trained; rows as in `of`.

        Columns `statistics.FINDING_COLUMNS` say what the difference shows.

        Raises:
            RuadaptError: as `of`, or the two were scored on different items.
        """
        return _measure(paired_differences(self._select(system), self._select(against)), difference=True)

    def _select(self, system: System) -> pd.DataFrame:
        wanted = [""] if system.stage in ("original", "initialised") else self.seeds
        chosen = self._items.get(tuple(asdict(system).values()), pd.DataFrame(columns=["seed"]))
        chosen = chosen[chosen["seed"].isin(wanted)]
        lacking = ["seed " + seed for seed in wanted if seed not in set(chosen["seed"])]
        lacking += [] if chosen.empty else sorted(self._tasks[system.few_shot] - _tasks(chosen))
        if lacking:
            raise RuadaptError(f"the items lack {system}, {', '.join(lacking)}; run 08_evaluation again")
        return chosen


def _tasks(items: pd.DataFrame) -> set[str]:
    return set(items["language"] + "/" + items["group"] + "/" + items["task"])


def _measure(items: pd.DataFrame, difference: bool = False) -> pd.DataFrame:
    places = {measure: {place} for measure, place in PAPER_GROUPS.items()}
    places["micro_avg"] = set(PAPER_GROUPS.values())
    tasks, rows = by_task(items), {}
    for measure in MEASURES:
        chosen = [
            scores
            for (language, group, *_), scores in tasks.items()
            if measure == f"micro_{language}" or (group, language) in places.get(measure, ())
        ]
        if chosen:
            rows[measure] = estimate(chosen).row(difference)
    return pd.DataFrame(list(rows.values()), index=list(rows))
