"""The numbers that a README quotes, and the table and sentences that it includes as they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import ORIGINAL, Plan, System
from ruadapt.evaluation.statistics import NO_WORSE_MARGIN, Estimate, needed, seed_estimate
from ruadapt.reporting.report import characters_per_token, methods_paired, speed_ratios
from ruadapt.reporting.results import NAMES, Scores

LANGUAGES = {"ru": "Russian", "en": "English"}
_MICROS = ["micro_ru", "micro_en", "micro_avg"]
# What a run is to show, and the limit by language, as (part of the numbers, key, limits). Bits per byte may
# not rise by more, scores may not fall by more. A language without a limit is not part of the goal.
_GOALS = {
    "bits per byte of the control, against the original base": (
        *("bits_per_byte", "control_over_original"),
        {"ru": 0.0, "en": 0.01},
    ),
    "bits per byte of {name}, against the control": (
        *("bits_per_byte", "adapted_{vocabulary}_over_control"),
        {"ru": 0.05},
    ),
    "few-shot average of {name}'s base, against the control": (
        *("differences", "adapted_base_{vocabulary}_minus_control"),
        {"ru": -0.05, "en": -0.05},
    ),
    "zero-shot average after LEP alone, against the original": (
        *("differences", "after_lep_minus_original"),
        {"ru": -0.05, "en": -0.05},
    ),
    "zero-shot average after LEP and calibration, against the original": (
        *("differences", "after_calibration_minus_original"),
        {"ru": -NO_WORSE_MARGIN, "en": -NO_WORSE_MARGIN},
    ),
}


def headline(
    scores: Scores, plan: Plan, characters: pd.DataFrame, speed: pd.DataFrame, bits: pd.DataFrame
) -> dict[str, Any]:
    """Return the headline numbers, with 95 % intervals and the numbers of seeds, items and repeats.

    Needed numbers of items or seeds are null where the claim is shown, "none" where no number is enough.

    Args:
        characters, speed, bits: the tables `characters_per_token`, `speed` and `bits_per_byte`.

    Raises:
        RuadaptError: a number can't be computed because its rows are missing.
    """
    vocabulary, calibration = plan.headline
    base, control = System("original", few_shot=True), System("adapted", few_shot=True)
    original, lep = System("original"), System("lep", vocabulary, plan.lep_method)
    tuned = System("calibrated", vocabulary, plan.lep_method, calibration)
    same = System("calibrated", calibration=calibration)
    bases = {name: System("adapted", name, few_shot=True) for name in plan.replaced()}
    systems = {
        "original_base": base,
        "control_base": control,
        **{f"adapted_base_{name}": system for name, system in bases.items()},
        "original_instruct": original,
        "control_after_lep": System("lep", method=plan.lep_method),
        "after_lep": lep,
        "after_calibration": tuned,
        "original_same_calibration": same,
    }
    pairs = {
        "control_base_minus_original_base": (control, base),
        **{f"adapted_base_{name}_minus_control": (system, control) for name, system in bases.items()},
        "after_lep_minus_original": (lep, original),
        "after_calibration_minus_original": (tuned, original),
        "after_calibration_minus_same_calibration": (tuned, same),
        "same_calibration_minus_original": (same, original),
    }
    writing = speed.assign(characters_per_second=speed["writing_characters_per_second"])
    numbers = {
        "vocabulary": vocabulary,
        "lep_method": plan.lep_method,
        "calibration": calibration,
        "vocabularies": plan.replaced(),
        "seeds": list(plan.seeds),
        "intervals": "95 %, over seeds and items, as ruadapt.evaluation.statistics says",
        "no_worse_margin": NO_WORSE_MARGIN,
        "scores": {name: _rows(scores.of(system)) for name, system in systems.items()},
        "differences": {name: _rows(scores.difference(*pair)) for name, pair in pairs.items()},
        "bits_per_byte": {language: _bits(bits, plan, language) for language in LANGUAGES},
        "characters_per_token": {
            language: _fertility(characters, vocabulary, language) for language in LANGUAGES
        },
        "speed_ratio": _speed(speed, vocabulary),
        "writing_speed_ratio": _speed(writing, vocabulary),
        "methods": methods_summary(methods_paired(scores, plan)),
    }
    return _plain(numbers)


def methods_summary(pairs: pd.DataFrame) -> dict[str, Any]:
    """Return what the table of paired methods says: how many pairs differ, and by how much others may.

    Returns:
        `pairs`, `detected` (their 95 % interval excludes 0), `detected_after_holm` (as many tests taken into
        account), `largest_possible_undetected` (the farthest end of the other intervals), `found` (sentences
        about the detected ones).
    """
    if pairs.empty:
        return {"pairs": 0}
    seen, others = pairs[pairs["detected"]], pairs[~pairs["detected"]]
    found = []
    for row in seen.itertuples():
        pair = f"{row.first.capitalize()} minus {row.second.capitalize()}"
        place = f"{NAMES.get(row.vocabulary, row.vocabulary)}, {LANGUAGES[row.language]}"
        found.append(f"{pair}, {place}: {_number(row._asdict() | {'value': row.difference}, sign=True)}")
    return {
        "pairs": len(pairs),
        "detected": len(seen),
        "detected_after_holm": int((pairs["p_holm"] < 0.05).sum()),
        "largest_possible_undetected": float(others["largest_possible"].max()) if len(others) else None,
        "found": found,
    }


def methods_sentence(summary: Mapping[str, Any]) -> str:
    """Say what `methods_summary` found, without the list."""
    if not summary["pairs"]:
        return "One LEP method was run, so there is nothing to compare."
    corrected = f"{summary['detected_after_holm']} after Holm's correction for their number"
    said = (
        f"Of {summary['pairs']} comparisons of two LEP methods, paired by item and seed, "
        f"{summary['detected']} show a difference ({corrected})."
    )
    if summary["largest_possible_undetected"] is not None:
        largest = summary["largest_possible_undetected"]
        said += f" The others may still differ by up to {largest:.3f}: what is not detected is not equal."
    return said


def headline_markdown(numbers: Mapping[str, Any]) -> str:
    """Return the table and the sentences of `headline` numbers, as a README includes them."""
    vocabulary, seeds = numbers["vocabulary"], len(numbers["seeds"])
    name = NAMES.get(vocabulary, vocabulary)
    fertility, bits = numbers["characters_per_token"], numbers["bits_per_byte"]
    counts = [
        f"{found[ORIGINAL]:.2f} → {found[vocabulary]:.2f} (× {found['ratio']:.2f})"
        for found in (fertility[code] for code in LANGUAGES)
    ]

    def spent(key: str) -> list[str]:
        return [_number(bits[code][key]) for code in LANGUAGES]

    def relative(key: str) -> list[str]:
        return [_percent(bits[code][key]) for code in LANGUAGES]

    rows = [
        (f"characters per token, original → {name}", counts),
        ("characters per second, reading the prompt and writing", _ratios(numbers["speed_ratio"])),
        ("characters per second, writing alone", _ratios(numbers["writing_speed_ratio"])),
        ("bits per byte, original base", [f"{bits[code]['original_base']:.3f}" for code in LANGUAGES]),
        ("… control: the old vocabulary, same continued pre-training", spent("control")),
        ("… control, relative to the original base", relative("control_over_original")),
    ]
    adapted = numbers["vocabularies"]
    for key in adapted:
        label = NAMES.get(key, key)
        rows += [(f"… {label}", spent(f"adapted_{key}"))]
        rows += [(f"… {label}, relative to the control", relative(f"adapted_{key}_over_control"))]
    rows += [
        ("few-shot average, original base", _cells(numbers, "scores", "original_base")),
        ("… control", _cells(numbers, "scores", "control_base")),
    ]
    for key in adapted:
        label = NAMES.get(key, key)
        rows += [(f"… {label}", _cells(numbers, "scores", f"adapted_base_{key}"))]
        paired = _cells(numbers, "differences", f"adapted_base_{key}_minus_control")
        rows += [(f"… {label} minus the control", paired)]
    same = _cells(numbers, "differences", "after_calibration_minus_same_calibration")
    rows += [
        ("zero-shot average, original instruct", _cells(numbers, "scores", "original_instruct")),
        (f"… {name} after LEP", _cells(numbers, "scores", "after_lep")),
        ("… minus the original", _cells(numbers, "differences", "after_lep_minus_original")),
        (f"… {name} after LEP and calibration", _cells(numbers, "scores", "after_calibration")),
        ("… minus the original", _cells(numbers, "differences", "after_calibration_minus_original")),
        ("… minus the original with the same calibration", same),
    ]
    lines = [f"| {seeds} seed{'s' if seeds > 1 else ''} | Russian | English |", "| --- | --- | --- |"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    said = [*_claims(numbers, name), methods_sentence(numbers["methods"])]
    sentences = (f"- {sentence}" for sentence in said)
    return "\n".join([*lines, "", *_goal_lines(numbers), "", *sentences]) + "\n"


def goals(numbers: Mapping[str, Any]) -> pd.DataFrame:
    """Hold the headline numbers against what a run is to show.

    Returns:
        columns `goal, language, limit, value, low, high, found`; `found` is "reached" where the whole 95 %
        interval keeps the limit, "not shown" where only the measured value does, else "missed".
    """
    vocabulary = numbers["vocabulary"]
    names = {"vocabulary": vocabulary, "name": NAMES.get(vocabulary, vocabulary)}
    rows = []
    for goal, (part, key, limits) in _GOALS.items():
        spent, name = part == "bits_per_byte", key.format(**names)
        for code, limit in limits.items():
            row = numbers[part][code][name] if spent else numbers[part][name][f"micro_{code}"]
            ends = {end: row[end] for end in ("value", "low", "high")}
            # Bits per byte may not lie above their limit, scores not below.
            kept = [
                end is not None and (end <= limit if spent else end >= limit)
                for end in (row["value"], row["high" if spent else "low"])
            ]
            said = "reached" if all(kept) else "not shown" if kept[0] else "missed"
            rows.append(
                {"goal": goal.format(**names), "language": code, "limit": limit} | ends | {"found": said}
            )
    return pd.DataFrame(rows)


def _goal_lines(numbers: Mapping[str, Any]) -> list[str]:
    lines = ["| goal | limit | measured | |", "| --- | --- | --- | --- |"]
    for row in goals(numbers).to_dict("records"):
        spent = row["goal"].startswith("bits")
        limit = f"{row['limit']:+.0%}".replace("%", " %") if spent else f"{row['limit']:+.2f}"
        measured = _percent(row) if spent else _number(row, sign=True)
        cells = (f"{row['goal']}, {LANGUAGES[row['language']]}", limit.replace("-", "−"), measured)
        lines.append(f"| {' | '.join(cells)} | {row['found']} |")
    return lines


def _claims(numbers: Mapping[str, Any], name: str) -> list[str]:
    kinds = {
        f"{name} after LEP alone, against the original": "after_lep_minus_original",
        f"{name} after LEP and calibration, against the original": "after_calibration_minus_original",
        "The same against the original with the same calibration": "after_calibration_minus_same_calibration",
    }
    said = []
    for title, key in kinds.items():
        parts = []
        for code, language in LANGUAGES.items():
            row = numbers["differences"][key][f"micro_{code}"]
            parts.append(f"in {language} {_number(row, sign=True)}, {claim(row)}")
        said.append(f"{title}: {'; '.join(parts)}.")
    return said


def claim(row: Mapping[str, Any]) -> str:
    """Say what a difference shows, and what is missing where "no worse" is not shown.

    Args:
        row: `value` and `statistics.FINDING_COLUMNS`, as in `Scores.difference` or in the headline.
    """
    row = _plain(dict(row))
    seen = "a difference is detected" if row["detected"] else "no difference is detected"
    margin = f"no worse by {NO_WORSE_MARGIN}"
    if row["no_worse"]:
        return f"{seen}, {margin} is shown"
    if row["value"] <= -NO_WORSE_MARGIN:
        return f"{seen}, {margin} is not shown: the measured value is worse"
    ends = (row[f"{kind}_to_show_no_worse"] for kind in ("items", "seeds"))
    more = needed(*(np.inf if number in (None, "none") else number for number in ends))
    return f"{seen}, {margin} is not shown: {more} would show it"


def _rows(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    wanted = table.loc[_MICROS].astype({"items": int})
    return {str(name): row for name, row in wanted.to_dict("index").items()}


def _fertility(characters: pd.DataFrame, vocabulary: str, language: str) -> dict[str, float]:
    found = {name: characters_per_token(characters, name, language) for name in (ORIGINAL, vocabulary)}
    return found | {"ratio": found[vocabulary] / found[ORIGINAL]}


def _speed(speed: pd.DataFrame, vocabulary: str) -> dict[str, dict[str, float]]:
    ratios = speed_ratios(speed).query("vocabulary == @vocabulary").set_index("language")
    missing = [language for language in LANGUAGES if language not in ratios.index]
    if missing:
        raise RuadaptError(f"speed.csv has no row for vocabulary {vocabulary!r}, language {missing[0]!r}")
    return ratios[["ratio", "low", "high", "repeats"]].to_dict("index")


def _bits(bits: pd.DataFrame, plan: Plan, language: str) -> dict[str, Any]:
    """Return bits per byte before and after continued pre-training, and ratios paired by seed, less 1."""

    def by_seed(stage: str, vocabulary: str) -> pd.Series:
        rows = bits[
            (bits["stage"] == stage) & (bits["vocabulary"] == vocabulary) & (bits["language"] == language)
        ]
        if rows.empty:
            raise RuadaptError(
                f"bits_per_byte.csv has no row for {stage} {vocabulary}, language {language!r}"
            )
        return rows.set_index(rows["seed"].astype(str))["bits_per_byte"].astype(float).sort_index()

    base, control = float(by_seed("original", ORIGINAL).mean()), by_seed("adapted", ORIGINAL)
    found: dict[str, Any] = {
        "original_base": base,
        "control": _ends(seed_estimate(control.to_numpy())),
        "control_over_original": _ends(seed_estimate(control.to_numpy() / base - 1)),
    }
    for name in plan.replaced():
        adapted = by_seed("adapted", name)
        if list(adapted.index) != list(control.index):
            raise RuadaptError(f"bits_per_byte.csv: {name} and the control have other seeds")
        found[f"adapted_{name}"] = _ends(seed_estimate(adapted.to_numpy()))
        found[f"adapted_{name}_over_control"] = _ends(seed_estimate((adapted / control).to_numpy() - 1))
    return found


def _ends(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval()
    return {"value": estimate.value, "low": float(low), "high": float(high), "seeds": estimate.seeds}


def _cells(numbers: Mapping[str, Any], part: str, name: str) -> list[str]:
    rows = numbers[part][name]
    return [_number(rows[f"micro_{code}"], sign=part == "differences") for code in LANGUAGES]


def _ratios(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    return ["× {ratio:.2f} [{low:.2f}, {high:.2f}]".format(**ratios[code]) for code in LANGUAGES]


def _number(row: Mapping[str, Any], sign: bool = False) -> str:
    if pd.isna(row["low"]):
        return ("{value:+.3f}" if sign else "{value:.3f}").format(**row).replace("-", "−") + " (one seed)"
    form = "{value:+.3f} [{low:+.3f}, {high:+.3f}]" if sign else "{value:.3f} [{low:.3f}, {high:.3f}]"
    return form.format(**row).replace("-", "−")


def _percent(row: Mapping[str, Any]) -> str:
    if pd.isna(row["low"]):
        return "{value:+.1%} (one seed)".format(**row).replace("-", "−").replace("%", " %")
    return "{value:+.1%} [{low:+.1%}, {high:+.1%}]".format(**row).replace("-", "−").replace("%", " %")


def _plain(value: Any) -> Any:
    """Round numbers to four decimals; infinity is "none", what is not a number null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float):
        if not np.isfinite(value):
            return "none" if np.isinf(value) else None
        return int(value) if value >= 2 and value.is_integer() else round(value, 4)
    return value
