"""The numbers that a README quotes, and the tables and sentences that it includes as they are."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import ORIGINAL, Plan, System
from ruadapt.evaluation.statistics import NO_WORSE_MARGIN, seed_estimate, sentence
from ruadapt.reporting.report import characters_per_token, speed_ratios
from ruadapt.reporting.results import LANGUAGES, NAMES, Scores

# What a run is to show: number, words, limit by language. Bits per byte may not rise by more, scores may not
# fall by more. A language without a limit is not part of the goal.
_GOALS: list[tuple[str, str, dict[str, float]]] = [
    (
        *("control_bits_over_original", "bits per byte of the control, against the original base"),
        {"ru": 0.0, "en": 0.01},
    ),
    ("{new}_bits_over_control", "bits per byte of {name}, against the control", {"ru": 0.05}),
    (
        *("{new}_base_minus_control", "few-shot average of {name}'s base, against the control"),
        {"ru": -0.05, "en": -0.05},
    ),
    (
        *("after_lep_minus_original", "zero-shot average after LEP alone, against the original"),
        {"ru": -0.05, "en": -0.05},
    ),
    (
        "after_calibration_minus_original",
        "zero-shot average after LEP and calibration, against the original",
        {"ru": -NO_WORSE_MARGIN, "en": -NO_WORSE_MARGIN},
    ),
]
_CLAIMS = {
    "after_lep_minus_original": "{name} after LEP alone, against the original",
    "after_calibration_minus_original": "{name} after LEP and calibration, against the original",
    "after_calibration_minus_same_calibration": "The same against the original with the same calibration",
}
ByLanguage = dict[str, dict[str, Any]]


def headline(
    scores: Scores, plan: Plan, characters: pd.DataFrame, speed: pd.DataFrame, bits: pd.DataFrame
) -> pd.DataFrame:
    """Return the headline numbers, one row a number and language, in the order in which they are told.

    Args:
        characters, speed, bits: the tables `characters_per_token`, `speed` and `bits_per_byte`.

    Returns:
        columns `number, label, language, form` (how it is written), `value`, `low, high` (95 %), `original`
        (what `value` is beside), `seeds, items, repeats`, and of differences `statistics.FINDING_COLUMNS`.

    Raises:
        RuadaptError: a number can't be computed because its rows are missing.
    """
    new, calibration = plan.headline
    name, rows = NAMES[new], []

    def add(number: str, label: str, form: str, found: ByLanguage) -> None:
        labels = {"number": number, "label": label, "form": form}
        rows.extend(labels | {"language": code} | found[code] for code in LANGUAGES)

    def score(number: str, label: str, system: System) -> None:
        add(number, label, ".3f", _micro(scores.of(system)))

    def difference(number: str, label: str, system: System, against: System) -> None:
        add(number, label, "+.3f", _micro(scores.difference(system, against)))

    counts = {
        code: [characters_per_token(characters, one, code) for one in (ORIGINAL, new)] for code in LANGUAGES
    }
    found = {code: {"original": old, "value": value} for code, (old, value) in counts.items()}
    add("characters_per_token", f"characters per token, original → {name}", ".2f", found)
    writing = speed.assign(characters_per_second=speed["writing_characters_per_second"])
    add("speed_ratio", "characters per second, reading the prompt and writing", "× .2f", _speed(speed, new))
    add("writing_speed_ratio", "characters per second, writing alone", "× .2f", _speed(writing, new))

    before, control = _bits(bits, ORIGINAL, ORIGINAL), _bits(bits, "adapted", ORIGINAL)
    base = {code: float(before[code].mean()) for code in LANGUAGES}
    found = {code: {"value": base[code]} for code in LANGUAGES}
    add("original_bits", "bits per byte, original base", ".3f", found)
    label = "… control: the old vocabulary, same continued pre-training"
    add("control_bits", label, ".3f", _over_seeds(control))
    over = {code: control[code] / base[code] - 1 for code in LANGUAGES}
    add("control_bits_over_original", "… control, relative to the original base", "+.1%", _over_seeds(over))
    for one in plan.replaced():
        adapted = _bits(bits, "adapted", one)
        add(f"{one}_bits", f"… {NAMES[one]}", ".3f", _over_seeds(adapted))
        over = {code: adapted[code] / control[code] - 1 for code in LANGUAGES}  # by seed
        if any(ratios.isna().any() for ratios in over.values()):
            raise RuadaptError(f"bits_per_byte.csv: {one} and the control have other seeds")
        label = f"… {NAMES[one]}, relative to the control"
        add(f"{one}_bits_over_control", label, "+.1%", _over_seeds(over))

    trained = System("adapted", few_shot=True)
    score("original_base", "few-shot average, original base", System(ORIGINAL, few_shot=True))
    score("control_base", "… control", trained)
    for one in plan.replaced():
        system = System("adapted", one, few_shot=True)
        score(f"{one}_base", f"… {NAMES[one]}", system)
        difference(f"{one}_base_minus_control", f"… {NAMES[one]} minus the control", system, trained)

    original, lep = System(ORIGINAL), System("lep", new, plan.lep_method)
    tuned = System("calibrated", new, plan.lep_method, calibration)
    same = System("calibrated", calibration=calibration)
    score("original_instruct", "zero-shot average, original instruct", original)
    score("after_lep", f"… {name} after LEP", lep)
    difference("after_lep_minus_original", "… minus the original", lep, original)
    score("after_calibration", f"… {name} after LEP and calibration", tuned)
    difference("after_calibration_minus_original", "… minus the original", tuned, original)
    label = "… minus the original with the same calibration"
    difference("after_calibration_minus_same_calibration", label, tuned, same)
    return pd.DataFrame(rows)


def headline_markdown(numbers: pd.DataFrame, plan: Plan, pairs: pd.DataFrame) -> str:
    """Return the tables and sentences of `headline` numbers and `report.methods_paired`, for a README."""
    name, seeds = NAMES[plan.headline[0]], len(plan.seeds)
    lines = [f"| {seeds} seed{'s' if seeds > 1 else ''} | Russian | English |", "| --- | --- | --- |"]
    for (_, label), part in numbers.groupby(["number", "label"], sort=False):
        lines.append(f"| {label} | {' | '.join(map(written, part.to_dict('records')))} |")
    lines += ["", "| goal | limit | measured | |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in goals(numbers, plan).itertuples(index=False)]
    lines.append("")
    for number, title in _CLAIMS.items():
        said = [
            f"{LANGUAGES[row['language']]} {written(row)}, {sentence(row)}."
            for row in numbers[numbers["number"] == number].to_dict("records")
        ]
        lines.append(f"- {title.format(name=name)}: {' '.join(said)}")
    return "\n".join([*lines, f"- {methods_sentence(pairs)}"]) + "\n"


def goals(numbers: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Hold the headline numbers against what a run is to show.

    Returns:
        columns `goal, limit, measured, found`, all in words; `found` is "reached" where the whole 95 %
        interval keeps the limit, "not shown" where only the measured value does, else "missed".
    """
    new, rows = plan.headline[0], []
    known = numbers.set_index(["number", "language"])
    for number, goal, limits in _GOALS:
        for code, limit in limits.items():
            row = known.loc[number.format(new=new), code].to_dict()
            # Bits per byte may not lie above their limit, scores not below.
            sign, end, form = (1, "high", "+.0%") if "bits" in number else (-1, "low", "+.2f")
            kept = [sign * row[part] <= sign * limit for part in ("value", end)]
            found = "reached" if all(kept) else "not shown" if kept[0] else "missed"
            words = f"{goal.format(name=NAMES[new])}, {LANGUAGES[code]}"
            rows.append((words, _typeset(format(limit, form)), written(row), found))
    return pd.DataFrame(rows, columns=["goal", "limit", "measured", "found"])


def methods_sentence(pairs: pd.DataFrame) -> str:
    """Say how many pairs of `report.methods_paired` differ, and by how much the others may."""
    if pairs.empty:
        return "One LEP method was run, so there is nothing to compare."
    others = pairs[~pairs["detected"]]
    said = (
        f"{len(pairs)} comparisons of two LEP methods, paired by item and seed: a difference is detected in "
        f"{len(pairs) - len(others)}, after Holm's correction for their number in "
        f"{(pairs['p_holm'] < 0.05).sum()}."
    )
    if len(others):
        largest = others["largest_possible"].max()
        said += f" The others may still differ by up to {largest:.3f}: what is not detected is not equal."
    return said


def written(row: Mapping[str, Any]) -> str:
    """Write a number as `form` says, with its interval: `−0.053 [−0.087, −0.020]`."""
    times, form = row["form"].startswith("× "), row["form"].removeprefix("× ")
    said = "× " * times + format(row["value"], form)
    if not pd.isna(row["original"]):
        said = f"{row['original']:{form}} → {said} (× {row['value'] / row['original']:{form}})"
    if not pd.isna(row["low"]):
        said += f" [{row['low']:{form}}, {row['high']:{form}}]"
    elif row["seeds"] == 1:
        said += " (one seed)"
    return _typeset(said)


def _typeset(text: str) -> str:
    return text.replace("-", "−").replace("%", " %")


def _micro(table: pd.DataFrame) -> ByLanguage:
    rows = table.to_dict("index")
    return {code: rows[f"micro_{code}"] for code in LANGUAGES}


def _speed(speed: pd.DataFrame, vocabulary: str) -> ByLanguage:
    ratios = speed_ratios(speed).query("vocabulary == @vocabulary").set_index("language")
    if missing := [language for language in LANGUAGES if language not in ratios.index]:
        raise RuadaptError(f"speed.csv has no row for vocabulary {vocabulary!r}, language {missing[0]!r}")
    return ratios.rename(columns={"ratio": "value"})[["value", "low", "high", "repeats"]].to_dict("index")


def _bits(bits: pd.DataFrame, stage: str, vocabulary: str) -> dict[str, pd.Series]:
    """Return the bits per byte of each language, by seed."""
    rows = bits[(bits["stage"] == stage) & (bits["vocabulary"] == vocabulary)]
    if missing := set(LANGUAGES) - set(rows["language"]):
        raise RuadaptError(f"bits_per_byte.csv has no row for {stage} {vocabulary}, {', '.join(missing)}")
    rows = rows.set_index(rows["seed"].astype(str)).sort_index()
    return {code: rows[rows["language"] == code]["bits_per_byte"].astype(float) for code in LANGUAGES}


def _over_seeds(values: Mapping[str, pd.Series]) -> ByLanguage:
    found = {code: seed_estimate(values[code].to_numpy()) for code in LANGUAGES}
    ends = {code: dict(zip(("low", "high"), one.interval(), strict=True)) for code, one in found.items()}
    return {code: {"value": one.value, **ends[code], "seeds": one.seeds} for code, one in found.items()}
