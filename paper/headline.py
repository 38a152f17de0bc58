"""The numbers that a README quotes, and the tables and sentences that it includes as they are."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from paper.plan import Plan, System
from paper.results import LANGUAGES, NAMES, Scores
from paper.tables import characters_per_token
from ruadapt.evaluation.statistics import estimate, sentence, speed_ratios
from ruadapt.reporting.report import written
from ruadapt.vocab.registry import ORIGINAL

# What a run is to show: number, words, limits in Russian and in English. Bits per byte may not rise by more,
# scores may not fall by more. A language without a limit is not part of the goal.
_LEP = "zero-shot average after LEP"
_GOALS: list[tuple[str, str, float, float | None]] = [
    ("control_bits_over_original", "bits per byte of the control, against the original base", 0.0, 0.01),
    ("{new}_bits_over_control", "bits per byte of {name}, against the control", 0.05, None),
    ("{new}_base_minus_control", "few-shot average of {name}'s base, against the control", -0.05, -0.05),
    ("after_lep_minus_original", f"{_LEP} alone, against the original", -0.05, -0.05),
    ("after_calibration_minus_original", f"{_LEP} and calibration, against the original", -0.02, -0.02),
]
ByLanguage = Mapping[str, Mapping[str, Any]]


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
        RuadaptError: a score, a count or a timing that the plan promises is missing.
    """
    new, calibration = plan.headline
    name = NAMES[new]
    rows: list[dict[str, Any]] = []

    def add(number: str, label: str, form: str, found: ByLanguage) -> None:
        labels = {"number": number, "label": label, "form": form}
        rows.extend({**labels, "language": code, **found[code]} for code in LANGUAGES)

    counts = {
        code: {
            part: characters_per_token(characters, one, code)
            for part, one in {"original": ORIGINAL, "value": new}.items()
        }
        for code in LANGUAGES
    }
    add("characters_per_token", f"characters per token, original → {name}", ".2f", counts)
    for number, column, phases in (
        ("speed_ratio", "characters_per_second", "reading the prompt and writing"),
        ("writing_speed_ratio", "writing_characters_per_second", "writing alone"),
    ):
        ratios = speed_ratios(speed.assign(characters_per_second=speed[column]))
        ratios = ratios[ratios["vocabulary"] == new].set_index("language").rename(columns={"ratio": "value"})
        found = ratios[["value", "low", "high", "repeats"]].to_dict("index")
        add(number, f"characters per second, {phases}", ".2f", found)

    by_seed = (
        bits.astype({"seed": str})
        .pivot(index="seed", columns=["stage", "vocabulary", "language"], values="bits_per_byte")
        .sort_index(axis=1)
    )
    before, control = by_seed[ORIGINAL, ORIGINAL].loc[""], by_seed["adapted", ORIGINAL]
    untrained = {code: {"value": before[code]} for code in LANGUAGES}
    add("original_bits", "bits per byte, original base", ".3f", untrained)
    label = "… control: the old vocabulary, same continued pre-training"
    add("control_bits", label, ".3f", _over_seeds(control))
    label = "… control, relative to the original base"
    add("control_bits_over_original", label, "+.1%", _over_seeds(control / before - 1))
    for one in plan.replaced():
        adapted = by_seed["adapted", one]
        add(f"{one}_bits", f"… {NAMES[one]}", ".3f", _over_seeds(adapted))
        label = f"… {NAMES[one]}, relative to the control"
        add(f"{one}_bits_over_control", label, "+.1%", _over_seeds(adapted / control - 1))

    def score(number: str, label: str, system: System) -> None:
        add(number, label, ".3f", _micro(scores.of(system)))

    def difference(number: str, label: str, system: System, against: System) -> None:
        add(number, label, "+.3f", _micro(scores.difference(system, against)))

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
    """Return the tables and sentences of `headline` numbers and `tables.methods_paired`, for a README."""
    seeds = len(plan.seeds)
    lines = [f"| {seeds} seed{'s' if seeds > 1 else ''} | Russian | English |", "| --- | --- | --- |"]
    for (_, label), part in numbers.groupby(["number", "label"], sort=False):
        lines.append(f"| {label} | {' | '.join(map(_told, part.to_dict('records')))} |")
    lines += ["", "| goal | limit | measured | |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in goals(numbers, plan).itertuples(index=False)]
    claims = numbers[numbers["number"] == "after_calibration_minus_original"].to_dict("records")
    said = " ".join(f"In {LANGUAGES[row['language']]}: {sentence(row)}." for row in claims)
    lines += ["", f"{NAMES[plan.headline[0]]} after LEP and calibration, against the original. {said}"]
    return "\n".join([*lines, "", methods_sentence(pairs)]) + "\n"


def goals(numbers: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Hold the headline numbers against what a run is to show.

    Returns:
        columns `goal, limit, measured, found`, all in words; `found` is "reached" where the whole 95 %
        interval keeps the limit, "not shown" where only the measured value does, else "missed".
    """
    new, rows = plan.headline[0], []
    known = numbers.set_index(["number", "language"], drop=False)
    for number, goal, *limits in _GOALS:
        for code, limit in zip(LANGUAGES, limits, strict=True):
            if limit is None:
                continue
            row = known.loc[number.format(new=new), code].to_dict()
            # Bits per byte may not lie above their limit, scores not below.
            sign, end, form = (1, "high", "+.0%") if "bits" in number else (-1, "low", "+.2f")
            kept = [sign * row[part] <= sign * limit for part in ("value", end)]
            found = "reached" if all(kept) else "not shown" if kept[0] else "missed"
            words = f"{goal.format(name=NAMES[new])}, {LANGUAGES[code]}"
            rows.append((words, written({"value": limit}, form=form), _told(row), found))
    return pd.DataFrame(rows, columns=["goal", "limit", "measured", "found"])


def methods_sentence(pairs: pd.DataFrame) -> str:
    """Say how many pairs of `tables.methods_paired` differ, and by how much the others may."""
    if pairs.empty:
        return "One LEP method was run, so there is nothing to compare."
    others = pairs[~pairs["detected"].astype(bool)]
    said = (
        f"{len(pairs)} comparisons of two LEP methods, paired by item and seed: a difference is detected in "
        f"{len(pairs) - len(others)}, after Holm's correction for their number in "
        f"{(pairs['p_holm'] < 0.05).sum()}."
    )
    if len(others):
        largest = others["largest_possible"].max()
        said += f" The others may still differ by up to {largest:.3f}: what is not detected is not equal."
    return said


def _told(row: Mapping[str, Any]) -> str:
    """Write a headline number: a ratio as `× 2.03 [1.94, 2.23]`, counts as `2.33 → 4.15 (× 1.78)`."""
    text = written(row, form=row["form"])
    if row["seeds"] == 1 and pd.isna(row["low"]):
        return f"{text} (one seed)"
    if row["number"] == "characters_per_token":
        return f"{written(row, 'original', row['form'])} → {text} (× {row['value'] / row['original']:.2f})"
    return f"× {text}" if row["number"].endswith("speed_ratio") else text


def _micro(table: pd.DataFrame) -> ByLanguage:
    return {code: table.loc[f"micro_{code}"].to_dict() for code in LANGUAGES}


def _over_seeds(values: pd.DataFrame) -> ByLanguage:
    """Return the mean over seeds (rows) for each language (column), with its interval."""
    rows = {code: estimate([values[[code]].dropna().to_numpy()]).row() for code in LANGUAGES}
    return {
        code: {name: row[name] for name in ("value", "low", "high", "seeds")} for code, row in rows.items()
    }
