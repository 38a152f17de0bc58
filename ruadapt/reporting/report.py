"""The papers' tables with this run's values beside the published ones, and paired differences.

Published values are 7-12B models on Darumeru (arXiv 2412.21140), this run's are the embedded pair on the
world's tasks: both stand in the papers' columns, each row says which it is, none is averaged with the other.
"""

from collections.abc import Iterable, Mapping
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
from ruadapt.reporting.results import HELD_OUT, NAMES, Scores, published

SAME_PRETRAINING = "original, same continued pre-training"
SAME_CALIBRATION = "original, same calibration"
"""What tables call the controls."""

NEEDED = (
    "Needed are so many items with the same seeds, or so many seeds with the same items: they would show it "
    "four times out of five. None: no number is enough. A dash: it is shown."
)
"""What tables say below numbers of items and seeds."""

_LABELS = ["stage", "vocabulary", "method", "calibration"]
_MICROS = ["micro_avg", "micro_ru", "micro_en"]


def few_shot_table(scores: Scores, plan: Plan, characters: pd.DataFrame) -> pd.DataFrame:
    """Return table 2: adapted bases few-shot, with symbols per Russian token.

    Args:
        characters: `08_evaluation/characters_per_token.csv`.

    Raises:
        RuadaptError: a row that the plan promises is missing; the message names it.
    """
    rows = []
    for system in plan.bases():
        control = system.stage == "adapted" and system.vocabulary == "original"
        vocab = "Original, same continued pre-training" if control else NAMES[system.vocabulary]
        symbols = characters_per_token(characters, system.vocabulary, "ru")
        rows.append(
            {"model": scores.base, "vocab": vocab, "symbols_per_token": symbols, **_cells(scores.of(system))}
        )
    return _beside("darumeru_few_shot_adapted_bases", rows)


def lep_table(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return table 3: the LEP methods on each vocabulary, zero-shot, before calibration.

    The first row of this run is the original instruct model, the goal of all others.
    """
    rows = [
        {
            "model": scores.instruct,
            "vocab": "Original",
            "lep_method": "",
            **_cells(scores.of(System("original"))),
        }
    ]
    for system in plan.propagated():
        labels = {
            "vocab": NAMES.get(system.vocabulary, system.vocabulary),
            "lep_method": system.method.capitalize(),
        }
        rows.append({"model": scores.instruct, **labels, **_cells(scores.of(system))})
    return _beside("darumeru_zero_shot_lep", rows)


def calibration_table(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return table 4: original and adapted instruct models before and after calibration, zero-shot."""
    rows = []
    for system in plan.tuned():
        labels = {"vocab": NAMES[system.vocabulary], "fine_tuning_data": scores.data(system.calibration)}
        rows.append({"model": scores.instruct, **labels, **_cells(scores.of(system))})
    return _beside("darumeru_calibration", rows)


def differences(scores: Scores, plan: Plan) -> pd.DataFrame:
    """Return paired differences of every trained model to its original, and to its control.

    A control is the original vocabulary after the same continued pre-training, or after the same calibration:
    against it shows what the vocabulary costs, apart from what the text or the data give.

    Returns:
        columns `stage, vocabulary, method, calibration, against, measure, difference, low, high, items,
        seeds`, `statistics.FINDING_COLUMNS` and `p`; measures `micro_avg, micro_ru, micro_en`.
    """
    trained = [system for system in plan.systems() if system.stage not in ("original", "initialised")]
    tables = []
    for system in trained:
        for against, reference in _references(system, plan).items():
            table = scores.difference(system, reference).loc[_MICROS].rename_axis("measure").reset_index()
            labels = {name: getattr(system, name) for name in _LABELS}
            tables.append(table.assign(**labels, against=against))
    table = pd.concat(tables, ignore_index=True).rename(columns={"value": "difference"})
    numbers = ["difference", "low", "high", "items", "seeds", *FINDING_COLUMNS, "p"]
    return table.astype({"items": int})[[*_LABELS, "against", "measure", *numbers]]


def _references(system: System, plan: Plan) -> dict[str, System]:
    """Return what a trained model is compared with, by its name."""
    control = system.vocabulary == ORIGINAL
    if system.stage == "adapted":
        found = {"original base": System("original", few_shot=True)}
        same = {SAME_PRETRAINING: System("adapted", few_shot=True)}
        return found if control else found | same
    found = {"original instruct": System("original")}
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
    found = pd.DataFrame(rows).rename(columns={"value": "difference"}).astype({"items": int})
    found["largest_possible"] = found[["low", "high"]].abs().max(axis=1)
    found["p_holm"] = holm(found["p"].to_list())
    columns = ["difference", "low", "high", "detected", "p", "p_holm", "largest_possible", "items", "seeds"]
    return found[
        ["vocabulary", "language", "first", "second", *columns, "items_to_detect", "seeds_to_detect"]
    ]


def characters_per_token(table: pd.DataFrame, vocabulary: str, language: str) -> float:
    """Return characters over tokens of the held-out text of one language in `characters_per_token.csv`.

    Raises:
        RuadaptError: no such row.
    """
    rows = table[(table["vocabulary"] == vocabulary) & (table["language"] == language)]
    rows = rows[rows["text"] == HELD_OUT]
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
        if "original" not in table or holes or len(table) < 2:
            what = "a repeat of " + ", ".join(holes) if holes else "a second repeat or the original"
            raise RuadaptError(f"speed.csv lacks {what}, language {language!r}; run 08_evaluation again")
        drawn = np.random.default_rng(0).integers(len(table), size=(resamples, len(table)))
        for vocabulary in part["vocabulary"].unique():
            ratios = (table[vocabulary] / table["original"]).to_numpy(float)
            low, high = interval(np.median(ratios[drawn], axis=1))
            pace = float(table[vocabulary].median())
            rows.append((vocabulary, language, pace, float(np.median(ratios)), low, high, len(table)))
    columns = ["vocabulary", "language", "characters_per_second", "ratio", "low", "high", "repeats"]
    return pd.DataFrame(rows, columns=columns)


def save_table(table: pd.DataFrame, path: Path, title: str, note: str = "") -> None:
    """Write `path`.csv (every number in full) and `path`.md (three decimals, intervals in brackets).

    `path` has no suffix. Columns `x_low`, `x_high` become the bracket behind `x` in the Markdown.
    """
    target = Path(path)
    atomic_write(target.with_name(target.name + ".csv"), table.to_csv(index=False, lineterminator="\n"))
    atomic_write(
        target.with_name(target.name + ".md"), f"# {title}\n\n{markdown(table)}\n\n{note}".rstrip() + "\n"
    )


def markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown: three decimals, intervals in brackets, "–" for empty cells.

    Needed numbers of items and seeds are whole; "none" says that no number is enough.
    """
    ends = {"low", "high"} if {"difference", "low", "high"} <= set(table) else set()
    columns = [name for name in table if not str(name).endswith(("_low", "_high")) and name not in ends]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + " --- |" * len(columns)]
    for row in table.to_dict("records"):
        lines.append("| " + " | ".join(_written(row, str(name)) for name in columns) + " |")
    return "\n".join(lines)


def caption(number: str, scores: Scores) -> str:
    """Return the sentences below table `number`: what each source is, the seeds, what an empty cell means."""
    seeds = f"{len(scores.seeds)} adaptation seeds ({', '.join(scores.seeds)}; an untrained model has none)"
    return (
        f"Rows marked *published* are the paper's values (arXiv 2412.21140, table {number}: 7-8B models on "
        f"Darumeru). Rows marked *this run* are {scores.about}: means over {seeds} "
        "with 95 % intervals over seeds and items. The tasks differ: compare rows within one source. "
        "A dash: not stated, or not readable with certainty, in that source."
    )


def write_manifest(folder: Path, traced: Mapping[str, Iterable[Path]], parameters: Mapping[str, Any]) -> None:
    """Write `folder`/manifest.json: each figure and table with its hash and the results it was made from.

    Args:
        traced: name without suffix → result files; every file `name.*` in the folder is listed.
        parameters: the notebook's parameters, seeds among them.

    Raises:
        RuadaptError: a name has no file, or a result file is missing.
    """
    root = project_root()
    entries: dict[str, Any] = {}
    for name, sources in traced.items():
        files = sorted(path for path in Path(folder).glob(f"{name}.*") if path.suffix != ".part")
        if not files:
            raise RuadaptError(f"{folder}/{name} was to be written, but is not there")
        origin = {_relative(Path(source), root): hash_path(Path(source)) for source in sources}
        entries |= {path.name: {"sha256": hash_path(path), "made_from": origin} for path in files}
    packages = ("matplotlib", "numpy", "pandas", "scipy", "seaborn")
    used = versions() | {name: version(name) for name in packages}
    manifest = {"parameters": dict(parameters), "versions": used, "files": entries}
    write_json(Path(folder) / "manifest.json", manifest)


def _cells(table: pd.DataFrame) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, row in table.iterrows():
        cells |= {str(name): row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    both = table.loc[["micro_ru", "micro_en"], "items"].sum()
    return cells | {"seeds": int(table["seeds"].iloc[0]), "items": int(both)}


def _beside(name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    theirs, ours = published(name), pd.DataFrame(rows)
    columns = [*theirs.columns, *(column for column in ours if column not in theirs)]
    theirs, ours = (part.reindex(columns=columns).astype(object) for part in (theirs, ours))
    theirs.insert(0, "source", "published")
    ours.insert(0, "source", "this run")
    return pd.concat([theirs, ours], ignore_index=True).fillna("")


def _written(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value) if str(value) else "–"
    if np.isnan(value) or np.isinf(value):
        return "–" if np.isnan(value) else "none"
    if name.startswith(("items_to_", "seeds_to_")):
        return f"{value:,.0f}"
    ends = ("low", "high") if name == "difference" else (f"{name}_low", f"{name}_high")
    low, high = (row.get(end) for end in ends)
    bracket = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    return f"{value:.3f}{bracket}"


def _relative(path: Path, root: Path) -> str:
    # A run may lie outside the repository; its own path would tell about this machine only.
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else "/".join(path.parts[-2:])
