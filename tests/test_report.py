"""Tables, differences, speed ratios and pictures against values worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from paper import headline, plots, results, tables
from paper.plan import Plan, System
from paper.results import Scores
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.statistics import ITEM_COLUMNS, estimate, speed_ratios
from ruadapt.reporting import report
from ruadapt.vocab.registry import VOCABULARIES

TASKS = [
    ("knowledge", "knowledge", "choice"),
    ("reasoning", "comparison", "choice"),
    ("reasoning", "kinship", "both_orders"),
    ("summary", "extractive", "rouge"),
    ("copy", "copy_sentence", "copy_sentence"),
]
PLAN = Plan(
    vocabularies=["bpe", "extended"],
    methods=["swap", "conversion"],
    calibration_vocabularies=["extended"],
    calibration_data=["self", "instruct_copy"],
    seeds=[1, 2],
)


def level(system: System, language: str, task: str, seed: int) -> float:
    """Give each task of each system a score of its own, with exact means: 0.4, 0.5, … by task."""
    value = 0.4 + 0.1 * [name for _, name, _ in TASKS].index(task) + (0.05 if language == "en" else 0)
    value -= {"original": 0.0, "adapted": 0.02, "lep": 0.2, "calibrated": 0.01}.get(system.stage, 0.3)
    return value + (0 if system.stage == "original" else 0.01 * (seed - 1.5))


def make_items(plan: Plan, per_task: int = 4) -> pd.DataFrame:
    rows = []
    for system in plan.systems():
        for seed in map(str, plan.seeds_of(system)):
            for language in ("ru", "en"):
                for group, task, metric in TASKS:
                    mean = level(system, language, task, int(seed or 0))
                    for number in range(per_task):
                        # The same deviations for every system: paired differences have no noise from items.
                        score = mean + (0.1 if number % 2 else -0.1)
                        kind = (system.stage, system.vocabulary, system.method, system.calibration)
                        place = (seed, 5 if system.few_shot else 0, language, group, task, metric)
                        rows.append((str(system), *kind, *place, f"{language}-{task}-{number}", score))
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


@pytest.fixture(scope="module")
def items() -> pd.DataFrame:
    return make_items(PLAN)


@pytest.fixture(scope="module")
def scores(items: pd.DataFrame) -> Scores:
    return Scores(items, PLAN.seeds)


@pytest.fixture
def characters() -> pd.DataFrame:
    fertility = {"original": 2, "bpe": 4, "extended": 3}
    rows = [
        (name, language, text, 600, 600 // n // times)
        for name, n in fertility.items()
        for language in ("ru", "en")
        for text, times in (("held-out text", 1), ("questions", 5))
    ]
    table = pd.DataFrame(rows, columns=["vocabulary", "language", "text", "characters", "tokens"])
    return table.assign(characters_per_token=table["characters"] / table["tokens"])


@pytest.fixture
def speed() -> pd.DataFrame:
    rows = []
    for repeat, pace in enumerate((100.0, 50.0, 200.0)):  # a machine that is slow and fast by turns
        for language in ("ru", "en"):
            rows += [("original", language, repeat, pace)]
            rows += [("extended", language, repeat, pace * (1.5 + 0.1 * repeat))]
    table = pd.DataFrame(rows, columns=["vocabulary", "language", "repeat", "characters_per_second"])
    return table.assign(writing_characters_per_second=2 * table["characters_per_second"])


@pytest.fixture
def bits() -> pd.DataFrame:
    rows = [("base", "original", "original", "", 1.5), ("i", "initialised", "extended", "", 9.0)]
    rows += [
        ("a", "adapted", name, seed, size * (1.0 + 0.1 * seed))
        for name, size in (("original", 1.0), ("bpe", 3.0), ("extended", 2.0))
        for seed in (1, 2)
    ]
    table = pd.DataFrame(rows, columns=["model", "stage", "vocabulary", "seed", "bits_per_byte"])
    return pd.concat([table.assign(language=language) for language in ("ru", "en")])


def test_measures_are_means_over_the_papers_tasks(scores: Scores) -> None:
    table = scores.of(System("original"))
    russian = dict(zip([task for _, task, _ in TASKS], [0.4, 0.5, 0.6, 0.7, 0.8], strict=True))
    expected = {
        "daru_mmlu": 0.4,
        "daru_mera": 0.55,  # two tasks
        "daru_sum": 0.7,
        "daru_copy_en": 0.85,
        "daru_copy_ru": 0.8,
        "micro_avg": (0.4 + 0.5 + 0.6 + 0.7 + 0.85 + 0.8) / 6,  # over tasks, not over groups
        "micro_ru": sum(russian.values()) / 5,
        "micro_en": sum(russian.values()) / 5 + 0.05,
    }
    assert table["value"].to_dict() == pytest.approx(expected)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert table.loc["micro_ru", "items"] == 20 and table["seeds"].eq(1).all()


def test_difference_is_paired_and_its_interval_holds_the_seeds(scores: Scores) -> None:
    tuned = System("calibrated", "extended", "conversion", "instruct_copy")
    row = scores.difference(tuned, System("original")).loc["micro_ru"]
    # Items cancel in pairs: what is left is a t interval over the two seeds, which differ by ±0.005.
    low, high = estimate([np.array([[-0.015], [-0.005]])]).interval()
    assert row[["value", "low", "high"]].tolist() == pytest.approx([-0.01, low, high])
    assert not row["detected"] and not row["no_worse"] and row["items_to_show_no_worse"] == np.inf
    assert row["seeds_to_show_no_worse"] > 2
    control = System("calibrated", calibration="instruct_copy")
    row = scores.difference(tuned, control).loc["micro_ru"]
    assert row[["value", "low", "high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-12)  # paired by seed too


def test_tables_stand_in_the_papers_shape(scores: Scores, characters: pd.DataFrame) -> None:
    systems = {2: PLAN.bases(), 3: [System("original"), *PLAN.propagated()], 4: PLAN.tuned()}
    ours = {}
    for number, name in tables.PAPER_TABLES.items():
        printed = results.published(name)
        table = tables.paper_table(number, scores, systems[number], characters)
        theirs = table[table["source"] == "published"][list(printed.columns)].reset_index(drop=True)
        pd.testing.assert_frame_equal(theirs, printed, check_dtype=False)  # "1.000" and "" stay what they are
        ours[number] = table[table["source"] == "this run"]
    names = ["Original", "Original, same continued pre-training", "BPE", "Extended"]
    assert ours[2]["vocab"].tolist() == names
    assert ours[2]["symbols_per_token"].tolist() == [2, 2, 4, 3]
    assert ours[2]["micro_ru"].tolist() == pytest.approx([0.6, 0.58, 0.58, 0.58])
    assert ours[3]["lep_method"].tolist() == ["", "Swap", "Conversion", "Swap", "Conversion"]
    copy = "world instructions + copy task"
    assert ours[4]["fine_tuning_data"].tolist() == ["none", copy, "none", "self-calibration", copy]


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        (lambda t: (t["vocabulary"] == "bpe") & (t["stage"] == "adapted"), "stage=adapted, vocabulary=bpe"),
        (lambda t: (t["vocabulary"] == "bpe") & (t["stage"] == "adapted") & (t["seed"] == "2"), "seed 2"),
        (
            lambda t: (t["vocabulary"] == "bpe") & (t["stage"] == "adapted") & (t["task"] == "kinship"),
            "en/reasoning/kinship",
        ),
        (lambda t: t["group"] == "summary", "no task for daru_sum"),
    ],
)
def test_a_missing_row_is_an_error_that_names_it(
    items: pd.DataFrame, characters: pd.DataFrame, drop: Callable[[pd.DataFrame], pd.Series], named: str
) -> None:
    with pytest.raises(RuadaptError, match=named):
        tables.paper_table(2, Scores(items[~drop(items)], PLAN.seeds), PLAN.bases(), characters)


def test_tasks_that_the_papers_lack_have_their_averages(items: pd.DataFrame) -> None:
    others = items.assign(group="minimal pairs")
    table = Scores(others[others["language"] == "ru"], PLAN.seeds).difference(
        System("lep", "bpe", "swap"), System("original")
    )
    assert list(table.index) == ["micro_ru"]


def test_differences_have_every_comparison(scores: Scores) -> None:
    table = tables.differences(scores, PLAN)
    counts = table.groupby(["stage", "against"]).size().to_dict()
    assert counts == {
        ("adapted", "original base"): 3 * 3,  # two vocabularies and the control, three measures
        ("adapted", tables.SAME_PRETRAINING): 2 * 3,
        ("lep", "original instruct"): 5 * 3,  # two vocabularies by two methods, and the control
        ("lep", tables.SAME_PRETRAINING): 2 * 3,  # by the control's method
        ("calibrated", "original instruct"): 3 * 3,
        ("calibrated", tables.SAME_CALIBRATION): 3,
    }
    row = table[(table["calibration"] == "instruct_copy") & (table["vocabulary"] == "extended")]
    row = row[(row["against"] == "original instruct") & (row["measure"] == "micro_en")].iloc[0]
    assert row["difference"] == pytest.approx(-0.01) and row["seeds"] == 2
    equal = table[table["against"] == tables.SAME_CALIBRATION]
    assert equal["difference"].abs().max() < 1e-12 and equal["no_worse"].all()


def test_methods_are_paired_with_each_other(items: pd.DataFrame) -> None:
    """One method answers two items of one task better, with both seeds: seen only because all is paired."""
    better = (items["method"] == "swap") & (items["vocabulary"] == "bpe") & (items["language"] == "ru")
    noise = np.random.default_rng(0).normal(0, 1e-3, len(items))
    changed = items.assign(score=items["score"] + np.where(better, 0.05, 0) + noise)
    pairs = tables.methods_paired(Scores(changed, PLAN.seeds), PLAN)
    assert pairs[["first", "second"]].drop_duplicates().to_numpy().tolist() == [["swap", "conversion"]]
    found = pairs.set_index(["vocabulary", "language"])
    row = found.loc[("bpe", "ru")]
    assert row["difference"] == pytest.approx(0.05, abs=2e-3) and row["detected"] and row["p_holm"] < 0.05
    assert found["detected"].sum() <= 2 and found["largest_possible"].max() < 0.06
    assert headline.methods_sentence(pairs).startswith("4 comparisons of two LEP methods, paired by item")
    one = Plan(["extended"], ["swap"], ["extended"], ["self"], [1, 2])
    assert tables.methods_paired(Scores(items, PLAN.seeds), one).empty


def test_speed_ratio_is_taken_within_repeats(speed: pd.DataFrame) -> None:
    row = speed_ratios(speed).set_index(["vocabulary", "language"]).loc[("extended", "ru")]
    assert row["ratio"] == pytest.approx(1.6) and row["repeats"] == 3  # 1.5 if medians were divided
    assert row["low"] == pytest.approx(1.5) and row["high"] == pytest.approx(1.7)
    assert row["characters_per_second"] == 150
    lacking = (speed.iloc[:-1], speed[speed["repeat"] == 0], speed[speed["vocabulary"] != "original"])
    for part in lacking:
        with pytest.raises(RuadaptError, match="the original and two repeats of every model"):
            speed_ratios(part)


def test_headline_numbers(
    scores: Scores, characters: pd.DataFrame, speed: pd.DataFrame, bits: pd.DataFrame
) -> None:
    table = headline.headline(scores, PLAN, characters, speed, bits)
    found = table.set_index(["number", "language"])
    assert found.loc[("original_instruct", "ru"), "value"] == pytest.approx(0.6)
    assert found.loc[("after_calibration_minus_original", "en"), "value"] == pytest.approx(-0.01)
    row = found.loc[("after_lep_minus_original", "en")]
    assert row["detected"] and not row["no_worse"] and row["items_to_show_no_worse"] == np.inf
    assert found.loc[("characters_per_token", "ru"), ["original", "value"]].tolist() == [2, 3]
    assert found.loc[("speed_ratio", "ru"), ["value", "repeats"]].tolist() == pytest.approx([1.6, 3])
    assert found.loc[("original_bits", "ru"), "value"] == 1.5
    assert found.loc[("control_bits", "ru"), "value"] == pytest.approx(1.15)
    # Paired by seed: twice the control's with each.
    row = found.loc[("extended_bits_over_control", "ru"), ["value", "low", "high", "seeds"]]
    assert row.tolist() == pytest.approx([1, 1, 1, 2])
    text = headline.headline_markdown(table, PLAN, tables.methods_paired(scores, PLAN))
    assert "| 2 seeds | Russian | English |" in text and "nan" not in text
    assert "| … Extended, relative to the control | +100.0 % [+100.0 %, +100.0 %] |" in text
    assert "no worse by 0.02: not shown (" in text and "| × 1.60 [1.50, 1.70] |" in text
    assert "| 2.00 → 3.00 (× 1.50) |" in text


def test_goals_hold_for_whole_intervals(
    scores: Scores, characters: pd.DataFrame, speed: pd.DataFrame, bits: pd.DataFrame
) -> None:
    table = headline.headline(scores, PLAN, characters, speed, bits)
    lep = ("after_lep_minus_original", "zero-shot average after LEP alone, against the original, Russian")
    over = ("extended_bits_over_control", "bits per byte of Extended, against the control, Russian")
    for (number, words), ends, said in (
        (lep, (-0.01, -0.03, 0.01), "reached"),  # limit -0.05
        (lep, (-0.049, -0.069, -0.029), "not shown"),
        (lep, (-0.2, -0.22, -0.18), "missed"),
        (over, (0.04, 0.02, 0.06), "not shown"),  # bits may not lie above 0.05
        (over, (0.04, 0.03, 0.05), "reached"),
    ):
        table.loc[table["number"] == number, ["value", "low", "high"]] = ends
        assert headline.goals(table, PLAN).set_index("goal").loc[words, "found"] == said


def test_tables_on_disk(tmp_path: Path, scores: Scores, characters: pd.DataFrame) -> None:
    systems = [System("original"), *PLAN.propagated()]
    table = tables.paper_table(3, scores, systems, characters)
    report.save_table(table, tmp_path / "table3", "Table 3", "A note.")
    text = (tmp_path / "table3.md").read_text(encoding="utf-8")
    assert "| published | OpenChat-3.5 | BPE | Swap | 0.587 |" in text
    assert "| this run | Embedded pair (instruct) | Extended | Conversion | 0." in text
    assert text.endswith("\n\nA note.\n") and "nan" not in text
    again = pd.read_csv(tmp_path / "table3.csv", keep_default_na=False)
    ours = again[again["source"] == "this run"]
    assert ours["micro_ru"].astype(float).iloc[0] == pytest.approx(0.6, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("value", {"value": -0.05, "low": -0.0871, "high": 0.02}, "−0.050 [−0.087, 0.020]"),
        ("p", {"value": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}, "0.040"),
        ("x", {"x": 0.5, "x_low": 0.4, "x_high": 0.6}, "0.500 [0.400, 0.600]"),
        ("x", {"x": 0.5, "x_low": "", "x_high": ""}, "0.500"),
        ("value", {"value": 0.4, "low": float("nan"), "high": float("nan")}, "0.400"),
        ("items_to_detect", {"items_to_detect": 12345.0}, "12,345"),
        ("items_to_detect", {"items_to_detect": float("inf")}, "none"),
        ("x", {"x": True}, "yes"),
        ("x", {"x": ""}, "–"),
    ],
)
def test_cells_for_a_reader(name: str, row: dict[str, object], told: str) -> None:
    assert report.written(row, name) == told


def marks() -> pd.DataFrame:
    names = ["original", "bpe", "extended", "Новая модель"]
    table = pd.DataFrame({"name": names, "value": [0.5, 0.6, 0.7, 0.8], "language": ["ru", "en", "ru", "en"]})
    return table.assign(low=table["value"] - 0.05, high=table["value"] + 0.02)


def draw(folder: Path) -> None:
    figure, (left, right) = plots.panels(2, width=plots.DOUBLE, height=4)
    plots.bars(left, marks(), "name", "language", "value", "score", title="bars", horizontal=True)
    plots.dots(right, marks(), "language", "name", "value", "score", reference=0.75)
    plots.legend(figure, [left, right])
    plots.save_figure(figure, folder / "deep" / "picture.of")
    plt.close(figure)


def test_pictures_are_written_twice_alike(tmp_path: Path) -> None:
    draw(tmp_path / "a")
    draw(tmp_path / "b")
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        first, second = (tmp_path / run / "deep" / f"picture.of{suffix}" for run in ("a", "b"))
        assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(magic)
        assert first.stat().st_size > 5_000
    assert len(list((tmp_path / "a" / "deep").iterdir())) == 2  # nothing half-written is left
    image = plt.imread(tmp_path / "a" / "deep" / "picture.of.png")
    assert image.shape[:2] == (800, 1400) and np.ptp(image) > 0.9


def test_marks_stand_where_their_numbers_are() -> None:
    """Two hues in one group stand beside its place, one alone stands on it; intervals are their ends."""
    table = marks().assign(language=["ru", "ru", "en", "fr"], name=["swap", "delta", "delta", "delta"])
    figure, (left, right) = plots.panels(2)
    plots.bars(left, table, "language", "name", "value", "score", number="")
    plots.dots(right, table, "language", "name", "value", "score")
    drawn = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in left.patches)
    assert np.array(drawn) == pytest.approx(np.array([(-0.2, 0.5), (0.2, 0.6), (1, 0.7), (2, 0.8)]))
    ends = np.concatenate([part for lines in right.collections for part in lines.get_segments()])
    assert sorted(set(ends[:, 0].round(2))) == [0.45, 0.52, 0.55, 0.62, 0.65, 0.72, 0.75, 0.82]
    assert [text.get_text() for text in right.get_yticklabels()] == ["ru", "en", "fr"]
    plt.close(figure)


def test_lines_are_means_in_their_band() -> None:
    seeds = pd.DataFrame({"x": [0, 0, 1, 1], "y": [1.0, 3.0, 2.0, 2.0], "name": "swap"})
    figure, (left, right) = plots.panels(2)
    plots.lines(left, seeds, "x", "y", "name", "x", "y")
    plots.lines(right, seeds.assign(low=0.0, high=9.0), "x", "y", "name", "x", "y")
    assert left.lines[0].get_ydata().tolist() == [2, 2]
    bands = [ax.collections[0].get_paths()[0].vertices[:, 1] for ax in (left, right)]
    assert [(band.min(), band.max()) for band in bands] == [(1, 3), (0, 9)]
    plt.close(figure)


def test_series_differ_without_colour() -> None:
    look = plots.looks(VOCABULARIES)
    chosen = [look[name] for name in VOCABULARIES]
    for aspect in ("marker", "linestyle", "hatch"):
        assert len({getattr(one, aspect) for one in chosen}) == len(chosen)
    mixed = plots.looks(["swap", "Extended", "delta"])
    assert mixed["Extended"] == look["extended"]  # a vocabulary looks the same whatever stands beside it
    assert mixed["swap"] not in chosen and mixed["delta"] not in [*chosen, mixed["swap"]]
