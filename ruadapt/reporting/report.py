"""The papers' tables with this run's values beside the published ones, and paired differences.

Published values are 7-12B models on Darumeru (arXiv 2412.21140), this run's are the embedded pair on the
world's tasks: both stand in the papers' columns, each row says which it is, none is averaged with the other.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import ORIGINAL, Plan, System
from ruadapt.evaluation.statistics import FINDING_COLUMNS, holm, interval
from ruadapt.files import atomic_write, hash_path, project_root, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.reporting.results import NAMES, Scores, published

SAME_PRETRAINING = "original, same continued pre-training"
SAME_CALIBRATION = "original, same calibration"
"""What tables call the controls."""

_LABELS = ["stage", "vocabulary", "method", "calibration"]
_MICROS = ["micro_avg", "micro_ru", "micro_en"]


def few_shot_table(scores: Scores, plan: Plan, characters: pd.DataFrame) -> pd.DataFrame:
    """Return table 2: adapted bases few-shot, with symbols per Russian token.

    Args:
        characters: `08_evaluation/characters_per_token.csv`.

    Raises:
        RuadaptError: a row that the plan promises is missing; the message names it.
    """

    def labels(system: System) -> dict[str, Any]:
        control = system.stage == "adapted" and system.vocabulary == ORIGINAL
        vocab = "Original, same continued pre-training" if control else NAMES[system.vocabulary]
        symbols = characters_per_token(characters, system.vocabulary, "ru")
        return {"model": scores.base, "vocab": vocab, "symbols_per_token": symbols}

    return _beside("darumeru_few_shot_adapted_bases", scores, plan.bases(), labels)


def lep_table(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return table 3: the LEP methods on each vocabulary, zero-shot, before calibration.

    The first row of this run is the original instruct model, the goal of all others.
    """

    def labels(system: System) -> dict[str, Any]:
        method = system.method.capitalize()
        return {"model": scores.instruct, "vocab": NAMES[system.vocabulary], "lep_method": method}

    return _beside("darumeru_zero_shot_lep", scores, [System(ORIGINAL), *plan.propagated()], labels)


def calibration_table(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return table 4: original and adapted instruct models before and after calibration, zero-shot."""

    def labels(system: System) -> dict[str, Any]:
        data = scores.data(system.calibration)
        return {"model": scores.instruct, "vocab": NAMES[system.vocabulary], "fine_tuning_data": data}

    return _beside("darumeru_calibration", scores, plan.tuned(), labels)


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
    control = system.vocabulary == ORIGINAL
    if system.stage in (ORIGINAL, "initialised"):
        return {}
    if system.stage == "adapted":
        found = {"original base": System(ORIGINAL, few_shot=True)}
        return found if control else found | {SAME_PRETRAINING: System("adapted", few_shot=True)}
    found = {"original instruct": System(ORIGINAL)}
    if system.stage == "lep" and not control and system.method == plan.lep_method:
        found[SAME_PRETRAINING] = System("lep", method=plan.lep_method)
    if system.calibration not in ("", "self") and not control:
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
    rows = []
    for vocabulary in plan.replaced():
        for first, second in combinations(plan.methods, 2):
            table = scores.difference(System("lep", vocabulary, first), System("lep", vocabulary, second))
            for language in ("ru", "en"):
                labels = {"vocabulary": vocabulary, "language": language, "first": first, "second": second}
                rows.append(labels | table.loc[f"micro_{language}"].to_dict())
    if not rows:
        return pd.DataFrame()
    found = pd.DataFrame(rows).rename(columns={"value": "difference"})
    found["largest_possible"] = found[["low", "high"]].abs().max(axis=1)
    found["p_holm"] = holm(found["p"].to_list())
    columns = ["difference", "low", "high", "detected", "p", "p_holm", "largest_possible", "items", "seeds"]
    return found[[*labels, *columns, "items_to_detect", "seeds_to_detect"]]


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


def speed_ratios(speed: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Compare generation speed with the original's: medians over repeats, with 95 % bootstrap intervals.

    The ratio is taken within each repeat, where the models took turns: a slow moment of the machine falls on
    both sides.

    Returns:
        columns `vocabulary, language, characters_per_second, ratio, low, high, repeats`; the interval is the
        ratio's.

    Raises:
        RuadaptError: the original or a repeat is missing, or there are fewer than two repeats.
    """
    rows = []
    for language, part in speed.groupby("language", sort=False):
        table = part.pivot(index="repeat", columns="vocabulary", values="characters_per_second")
        holes = table.columns[table.isna().any()].tolist()
        if ORIGINAL not in table or holes or len(table) < 2:
            what = "a repeat of " + ", ".join(holes) if holes else "a second repeat or the original"
            raise RuadaptError(f"speed.csv lacks {what}, language {language!r}; run 08_evaluation again")
        drawn = np.random.default_rng(0).integers(len(table), size=(resamples, len(table)))
        for vocabulary in part["vocabulary"].unique():
            ratios = (table[vocabulary] / table[ORIGINAL]).to_numpy(float)
            low, high = interval(np.median(ratios[drawn], axis=1))
            pace = float(table[vocabulary].median())
            rows.append((vocabulary, language, pace, float(np.median(ratios)), low, high, len(table)))
    columns = ["vocabulary", "language", "characters_per_second", "ratio", "low", "high", "repeats"]
    return pd.DataFrame(rows, columns=columns)


def save_table(table: pd.DataFrame, path: Path, title: str, note: str = "") -> None:
    """Write `path`.csv (every number in full) and `path`.md (as `markdown`, between title and note)."""
    atomic_write(Path(f"{path}.csv"), table.to_csv(index=False, lineterminator="\n"))
    atomic_write(Path(f"{path}.md"), f"# {title}\n\n{markdown(table)}\n\n{note}".rstrip() + "\n")


def markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown: three decimals, intervals in brackets, "–" for empty cells.

    Columns `x_low`, `x_high` become the bracket behind `x`, and `low`, `high` the one behind `difference`.
    Needed numbers of items and seeds are whole; "none" says that no number is enough.
    """
    ends = {"low", "high"} if {"difference", "low", "high"} <= set(table) else set()
    columns = [name for name in table if not str(name).endswith(("_low", "_high")) and name not in ends]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + " --- |" * len(columns)]
    for row in table.to_dict("records"):
        lines.append("| " + " | ".join(_written(row, str(name)) for name in columns) + " |")
    return "\n".join(lines)


def _written(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value) if str(value) else "–"
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "none"
    if name.startswith(("items_to_", "seeds_to_")):
        return f"{value:,.0f}"
    low, high = (row.get(end if name == "difference" else f"{name}_{end}") for end in ("low", "high"))
    bracket = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    return f"{value:.3f}{bracket}"


def write_manifest(folder: Path, traced: Mapping[str, Iterable[Path]], parameters: Mapping[str, Any]) -> None:
    """Write `folder`/manifest.json: each figure and table with its hash and the results it was made from.

    Args:
        traced: name without suffix → result files; every file `name.*` in the folder is listed.
        parameters: the notebook's parameters, seeds among them.

    Raises:
        RuadaptError: a result file is missing.
    """
    entries: dict[str, Any] = {}
    for name, sources in traced.items():
        origin = {_place(source): hash_path(source) for source in sources}
        for path in sorted(Path(folder).glob(f"{name}.*")):
            entries[path.name] = {"sha256": hash_path(path), "made_from": origin}
    packages = ("matplotlib", "numpy", "pandas", "scipy", "seaborn")
    used = versions() | {name: version(name) for name in packages}
    manifest = {"parameters": dict(parameters), "versions": used, "files": entries}
    write_json(Path(folder) / "manifest.json", manifest)


def _place(path: Path) -> str:
    # A run may lie outside the repository; its own path would tell about this machine only.
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else "/".join(path.parts[-2:])


def _beside(
    name: str, scores: Scores, systems: Iterable[System], labels: Callable[[System], dict[str, Any]]
) -> pd.DataFrame:
    """Return a published table with a row for each of the run's systems below it."""
    rows = []
    for system in systems:
        table = scores.of(system)
        row = labels(system)
        for measure, (value, low, high) in zip(
            table.index, table[["value", "low", "high"]].to_numpy(), strict=True
        ):
            row |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
        items = int(table.loc[["micro_ru", "micro_en"], "items"].sum())
        rows.append(row | {"seeds": int(table["seeds"].iloc[0]), "items": items})
    theirs, ours = published(name), pd.DataFrame(rows)
    columns = [*theirs.columns, *(column for column in ours if column not in theirs)]
    theirs, ours = (part.reindex(columns=columns).astype(object) for part in (theirs, ours))
    theirs.insert(0, "source", "published")
    ours.insert(0, "source", "this run")
    return pd.concat([theirs, ours], ignore_index=True).fillna("")
