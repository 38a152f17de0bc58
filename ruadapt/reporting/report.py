"""The papers' tables with this run's values beside the published ones, and the headline numbers.

Published values are 7-12B models on Darumeru (arXiv 2412.21140), this run's are the embedded pair on the
world's tasks: both stand in the papers' columns, each row says which it is, none is averaged with the other.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import Plan, System
from ruadapt.evaluation.statistics import interval
from ruadapt.files import atomic_write, hash_path, project_root, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.reporting.results import HELD_OUT, NAMES, Scores, published


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
    """Return paired differences of adapted instruct models to the original and to the calibrated original.

    The second tells what the vocabulary costs from what the extra data give.

    Returns:
        columns `vocabulary, method, calibration, against, measure, difference, low, high, items, seeds,
        differs`; measures `micro_avg, micro_ru, micro_en`; `differs`: the 95 % interval excludes 0.
    """
    tables = []
    for system in dict.fromkeys([*plan.propagated(), *plan.tuned()]):
        references = {"original instruct": System("original")}
        if system.calibration not in ("", "self") and system.vocabulary != "original":
            references["original, same calibration"] = System("calibrated", calibration=system.calibration)
        for against, reference in references.items() if system.stage != "original" else ():
            table = scores.difference(system, reference).loc[["micro_avg", "micro_ru", "micro_en"]]
            labels = {name: getattr(system, name) for name in ("vocabulary", "method", "calibration")}
            tables.append(table.rename_axis("measure").reset_index().assign(**labels, against=against))
    table = pd.concat(tables, ignore_index=True).rename(columns={"value": "difference"})
    table = table.astype({"items": int}).assign(differs=(table["low"] > 0) | (table["high"] < 0))
    return table[
        ["vocabulary", "method", "calibration", "against", *table.columns.drop([*labels, "against"])]
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


def headline(
    scores: Scores, plan: Plan, characters: pd.DataFrame, speed: pd.DataFrame, bits: pd.DataFrame
) -> dict[str, Any]:
    """Return the numbers that a README quotes, with intervals and numbers of seeds, items and repeats.

    Args:
        characters: `08_evaluation/characters_per_token.csv`.
        speed: `08_evaluation/speed.csv`.
        bits: `08_evaluation/bits_per_byte.csv`.

    Raises:
        RuadaptError: a number can't be computed because its rows are missing.
    """
    vocabulary, calibration = plan.headline
    original, lep = System("original"), System("lep", vocabulary, plan.lep_method)
    tuned = System("calibrated", vocabulary, plan.lep_method, calibration)
    fertility = {
        language: {
            name: characters_per_token(characters, name, language) for name in ("original", vocabulary)
        }
        for language in ("ru", "en")
    }
    for counts in fertility.values():
        counts["ratio"] = counts[vocabulary] / counts["original"]
    ratios = speed_ratios(speed).query("vocabulary == @vocabulary").set_index("language")
    ratios = ratios[["ratio", "low", "high", "repeats"]]
    if "ru" not in ratios.index:
        raise RuadaptError(f"speed.csv has no row for vocabulary {vocabulary!r}, language 'ru'")
    numbers = {
        "vocabulary": vocabulary,
        "lep_method": plan.lep_method,
        "calibration": calibration,
        "seeds": list(plan.seeds),
        "intervals": f"95 % bootstrap over seeds and items, {scores.resamples} resamples",
        "original_instruct": _numbers(scores.of(original)),
        "after_lep": _numbers(scores.of(lep)),
        "after_calibration": _numbers(scores.of(tuned)),
        "after_lep_minus_original": _numbers(scores.difference(lep, original)),
        "after_calibration_minus_original": _numbers(scores.difference(tuned, original)),
        "characters_per_token": fertility,
        "speed_ratio": ratios.to_dict("index"),
        "bits_per_byte": {language: _bits(bits, vocabulary, language) for language in ("ru", "en")},
    }
    return _rounded(numbers)


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
    """Return the table as Markdown: three decimals, intervals in brackets, "–" for empty cells."""
    columns = [name for name in table if not str(name).endswith(("_low", "_high"))]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + " --- |" * len(columns)]
    for row in table.to_dict("records"):
        lines.append("| " + " | ".join(_written(row, str(name)) for name in columns) + " |")
    return "\n".join(lines)


def caption(number: str, scores: Scores) -> str:
    """Return the sentences below table `number`: what each source is, the seeds, what an empty cell means."""
    return (
        f"Rows marked *published* are the paper's values (arXiv 2412.21140, table {number}: 7-8B models on "
        f"Darumeru). Rows marked *this run* are {scores.about}: means over {len(scores.seeds)} adaptation "
        f"seeds ({', '.join(scores.seeds)}; one for models "
        "on the original vocabulary) with 95 % bootstrap intervals over seeds and items. The tasks differ: "
        "compare rows within one source. A dash: not stated, or not readable with certainty, in that source."
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
    if isinstance(value, float) and not isinstance(value, bool):
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        interval = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
        return f"{value:.3f}{interval}"
    return str(value) if str(value) else "–"


def _numbers(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    wanted = table.loc[["micro_ru", "micro_en", "micro_avg"]].astype({"items": int})
    return {str(name): row for name, row in wanted.to_dict("index").items()}


def _bits(bits: pd.DataFrame, vocabulary: str, language: str) -> dict[str, float]:
    kinds = {
        "original_base": ("original", "original"),
        "same_training_old_vocabulary": ("adapted", "original"),
        "adapted_base": ("adapted", vocabulary),
    }
    found = {}
    for name, (stage, wanted) in kinds.items():
        rows = bits[
            (bits["stage"] == stage) & (bits["vocabulary"] == wanted) & (bits["language"] == language)
        ]
        if rows.empty:
            raise RuadaptError(f"bits_per_byte.csv has no row for {stage} {wanted}, language {language!r}")
        found[name] = float(rows["bits_per_byte"].mean())
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _relative(path: Path, root: Path) -> str:
    # A run may lie outside the repository; its own path would tell about this machine only.
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else "/".join(path.parts[-2:])
