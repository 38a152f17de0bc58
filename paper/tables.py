"""The papers' tables with this run's values beside the published ones, and paired differences.

Published values are 7-12B models on Darumeru (arXiv 2412.21140), this run's are the embedded pair on the
world's tasks: both stand in the papers' columns, each row says which it is, none is averaged with the other.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import pandas as pd

from paper.plan import Plan, System
from paper.results import ABOUT, LANGUAGES, MEASURES, NAMES, Scores, published
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import FINDING_COLUMNS, holm
from ruadapt.vocab.registry import ORIGINAL

PAPER_TABLES = {
    2: "darumeru_few_shot_adapted_bases",
    3: "darumeru_zero_shot_lep",
    4: "darumeru_calibration",
}
"""The papers' tables by number, as files of `data/published`."""

SAME_PRETRAINING = "original, same continued pre-training"
SAME_CALIBRATION = "original, same calibration"
"""What tables call the controls."""

_LABELS = ["stage", "vocabulary", "method", "calibration"]
_MICROS = ["micro_avg", "micro_ru", "micro_en"]
_ENDS = {"": "value", "_low": "low", "_high": "high"}


def tidy(scores: Scores, systems: Iterable[System]) -> pd.DataFrame:
    """Return what charts draw: columns of `System`, `measure`, and `value, low, high, items, seeds`."""
    tables = [
        scores.of(system).rename_axis("measure").reset_index().assign(**asdict(system)) for system in systems
    ]
    return pd.concat(tables, ignore_index=True)


def paper_table(
    number: int, scores: Scores, systems: Iterable[System], characters: pd.DataFrame
) -> pd.DataFrame:
    """Return one of the `PAPER_TABLES` as published, with a row for each of this run's systems below it.

    Args:
        systems: `Plan.bases` for table 2; the original and `Plan.propagated` for 3; `Plan.tuned` for 4.
        characters: the table `characters_per_token`, for the symbols per Russian token of table 2.

    Returns:
        the published columns behind `source`, with `x_low` and `x_high` (95 %) for each score `x`, and
        `micro_ru, micro_en, seeds, items`.

    Raises:
        RuadaptError: as `Scores.of`; the message names the row that is missing.
    """
    theirs, rows = published(PAPER_TABLES[number]), []
    for system in systems:
        table = scores.of(system)
        if lacking := [measure for measure in MEASURES if measure not in table.index]:
            raise RuadaptError(f"the items have no task for {', '.join(lacking)}")
        control = system.stage == "adapted" and system.vocabulary == ORIGINAL
        data = NAMES[system.calibration]
        labels = {
            "model": scores.base if system.few_shot else scores.instruct,
            "vocab": SAME_PRETRAINING.capitalize() if control else NAMES[system.vocabulary],
            "symbols_per_token": characters_per_token(characters, system.vocabulary, "ru"),
            "lep_method": system.method.capitalize(),
            "fine_tuning_data": data if scores.about == ABOUT else data.removeprefix("world "),
        }
        row: dict[str, Any] = {"source": "this run"}
        row |= {name: label for name, label in labels.items() if name in theirs}
        for measure, found in table.iterrows():
            row |= {f"{measure}{end}": found[part] for end, part in _ENDS.items()}
        items = int(table.loc[["micro_ru", "micro_en"], "items"].sum())
        rows.append(row | {"seeds": int(table["seeds"].iloc[0]), "items": items})
    theirs.insert(0, "source", "published")
    return pd.concat([theirs.astype(object), pd.DataFrame(rows, dtype=object)], ignore_index=True).fillna("")


def differences(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return paired differences of every trained model to its original, and to its control.

    A control is the original vocabulary after the same continued pre-training, or after the same calibration:
    against it shows what the vocabulary costs, apart from what the text or the data give.

    Returns:
        columns `stage, vocabulary, method, calibration, against, measure, difference, low, high, items,
        seeds` and `statistics.FINDING_COLUMNS`; measures `micro_avg, micro_ru, micro_en`.
    """
    tables = []
    for system in plan.systems():
        for against, reference in _references(system, plan).items():
            table = scores.difference(system, reference).loc[_MICROS].rename_axis("measure").reset_index()
            labels = {name: getattr(system, name) for name in _LABELS}
            tables.append(table.assign(**labels, against=against))
    table = pd.concat(tables, ignore_index=True).rename(columns={"value": "difference"})
    numbers = ["difference", "low", "high", "items", "seeds", *FINDING_COLUMNS]
    return table[[*_LABELS, "against", "measure", *numbers]]


def _references(system: System, plan: Plan) -> dict[str, System]:
    """Return what a system is compared with, by its name: nothing where it was not trained."""
    if system.stage in (ORIGINAL, "initialised"):
        return {}
    original = "original base" if system.few_shot else "original instruct"
    found = {original: System(ORIGINAL, few_shot=system.few_shot)}
    if system.vocabulary == ORIGINAL:
        return found
    if system.stage == "adapted" or (system.stage == "lep" and system.method == plan.lep_method):
        found[SAME_PRETRAINING] = replace(system, vocabulary=ORIGINAL)
    if system.calibration not in ("", "self"):
        found[SAME_CALIBRATION] = System("calibrated", calibration=system.calibration)
    return found


def methods_paired(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return every LEP method against every other, paired by item and seed.

    Returns:
        for each vocabulary, language and pair of methods: `vocabulary, language, first, second, difference`
        (first minus second), `low, high` (95 %), `detected, p, p_holm` (corrected for the number of rows),
        `largest_possible` (the end of the interval that is farther from 0), `items, seeds, items_to_detect,
        seeds_to_detect`; empty with one method.
    """
    rows: list[dict[str, Any]] = []
    for vocabulary in plan.replaced():
        for first, second in combinations(plan.methods, 2):
            table = scores.difference(System("lep", vocabulary, first), System("lep", vocabulary, second))
            labels = {"vocabulary": vocabulary, "first": first, "second": second}
            rows += [labels | {"language": code, **table.loc[f"micro_{code}"]} for code in LANGUAGES]
    columns = ["vocabulary", "language", "first", "second", "difference", "low", "high", "detected", "p"]
    columns += ["p_holm", "largest_possible", "items", "seeds", "items_to_detect", "seeds_to_detect"]
    found = pd.DataFrame(rows).rename(columns={"value": "difference"})
    if rows:
        found["largest_possible"] = found[["low", "high"]].abs().max(axis=1)
        found["p_holm"] = holm(found["p"].to_list())
    return found.reindex(columns=columns)


def characters_per_token(table: pd.DataFrame, vocabulary: str, language: str) -> float:
    """Return characters over tokens of the held-out text of one language in `characters_per_token.csv`.

    Raises:
        RuadaptError: no such row.
    """
    chosen = (table["vocabulary"] == vocabulary) & (table["language"] == language)
    rows = table[chosen & (table["text"] == "held-out text")]
    if rows.empty:
        raise RuadaptError(f"characters_per_token.csv has no row for vocabulary {vocabulary!r}, {language!r}")
    return float(rows["characters"].sum() / rows["tokens"].sum())
