"""Break-even in closed form, phases of writing, and the command that puts them together."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import RUSSIAN, TinyPair
from typer.testing import CliRunner

from ruadapt.checkpoints import initialise
from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.breakeven import break_even, fertility_curve
from ruadapt.files import project_root
from ruadapt.vocab import characters_per_token, extend, load_tokenizer, rows, save_tokenizer

DIALOGUES = [
    ("Кто старше, моряк или садовник?", "Моряк старше садовника на 12 лет."),
    ("Кто?", "Врач купил собаку."),
]


@pytest.fixture(scope="module")
def extended(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    tokenizer = extend(tiny_pair.instruct, [RUSSIAN] * 2, 60)
    save_tokenizer(folder / "tokenizer", tokenizer, tiny_pair.instruct)
    (folder / "model").mkdir()
    initialise(tiny_pair.instruct, folder / "tokenizer", folder / "model")
    return folder / "model"


def timings(fixed: float, per_row: float, heights: tuple[int, ...], noise: float = 0.0) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    table = [
        {
            "rows": height,
            "repeat": repeat,
            "seconds": (fixed + per_row * height) * (1 + noise * generator.normal()),
        }
        for repeat in range(9)
        for height in heights
    ]
    return pd.DataFrame(table)


def test_the_tax_of_two_timings_is_the_closed_form() -> None:
    # 10 ms for the body and 2 ms for 100,000 rows: 50,000 more rows add 1 ms to 12.
    curve = pd.DataFrame({"added_rows": [50_000], "gain": [1.6]})
    table = break_even(curve, 100_000, timings(0.010, 2e-8, (100_000, 200_000)), resamples=5)
    assert table["tax"].item() == pytest.approx(1 / 13)
    assert table["speed_up"].item() == pytest.approx(1.6 * 12 / 13)
    with pytest.raises(RuadaptError, match="two heights"):
        break_even(curve, 100_000, timings(0.010, 2e-8, (100_000,)))


def test_the_best_size_is_where_the_closed_form_has_it() -> None:
    # The gain 1 + c sqrt(r) over the pass 1 + r / h is largest at r = (sqrt(1 + c^2 h) - 1)^2 / c^2, and is 1
    # again at r = (c h)^2.
    c, h = 0.004, 200_000.0
    added = np.arange(0, 700_001, 250)
    curve = pd.DataFrame({"added_rows": added, "gain": 1 + c * np.sqrt(added)})
    base = timings(0.0, 1e-7, (200_000, 300_000))  # all of the pass is the matrix: tax = r / (h + r)
    table = break_even(curve, 200_000, base, resamples=5)
    assert table["tax"].to_numpy() == pytest.approx(added / (h + added), abs=1e-9)
    best = table.loc[table["speed_up"].idxmax(), "added_rows"]
    assert best == pytest.approx((np.sqrt(1 + c**2 * h) - 1) ** 2 / c**2, abs=250)
    assert table.loc[table["speed_up"] < 1, "added_rows"].min() == pytest.approx((c * h) ** 2, abs=500)


def test_intervals_hold_the_truth() -> None:
    curve = pd.DataFrame({"added_rows": [0, 50_000], "gain": [1.0, 1.5]})
    table = break_even(curve, 150_000, timings(0.010, 2e-8, (150_000, 200_000), noise=0.01))
    truth = 1.5 * 0.013 / 0.014
    assert table["speed_up_low"].iloc[1] < truth < table["speed_up_high"].iloc[1]
    assert (table.loc[0, ["speed_up", "speed_up_low", "speed_up_high"]] == 1).all()
    broken = timings(0.01, 1e-8, (10, 20)).iloc[:-1]
    with pytest.raises(RuadaptError, match="every repeat"):
        break_even(curve, 10, broken)


def test_the_curve_ends_at_both_vocabularies(tiny_pair: TinyPair, extended: Path) -> None:
    old, new = load_tokenizer(tiny_pair.instruct), load_tokenizer(extended)
    texts = RUSSIAN.splitlines()
    curve = fertility_curve(tiny_pair.instruct, [tiny_pair.base, extended], texts, points=5)
    assert curve is not None
    assert curve["added_rows"].iloc[[0, -1]].tolist() == [0, rows(new) - rows(old)]
    assert curve["gain"].iloc[-1] == pytest.approx(
        characters_per_token(new, texts) / characters_per_token(old, texts)
    )
    assert curve["gain"].is_monotonic_increasing and curve["gain"].iloc[0] == 1
    assert fertility_curve(tiny_pair.instruct, [tiny_pair.base], texts) is None


def test_the_command_writes_tables_json_and_plots(
    tiny_pair: TinyPair, extended: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in DIALOGUES]
    prompts.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    arguments = ["speed", tiny_pair.instruct, f"new={extended}", "--prompts", prompts, "--batch-sizes", "1,2"]
    arguments += ["--repeats", 2, "--out", tmp_path / "out", "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["model"] for row in report["speed"]} == {"original", "new", "original + 60 rows"}
    assert {row["batch_size"] for row in report["break_even"]} == {1, 2}
    for name in ("speed.png", "break_even.png", "speed.md", "break_even.csv", "timings.csv"):
        assert (tmp_path / "out" / name).stat().st_size
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_the_original_writes_the_answers_that_a_file_lacks(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "Кто старше, моряк или садовник? Моряк старше садовника на 12 лет.\n", encoding="utf-8"
    )
    arguments = ["speed", project_root() / "data" / "pair" / "instruct", "--prompts", prompts, "--repeats", 2]
    result = CliRunner().invoke(
        app, [*map(str, arguments), "--characters", "5", "--out", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompts"] == 1 and {row["model"] for row in report["speed"]} == {"original"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "1;2"], "whole numbers with commas"),
        (["--engine", "vllm"], "vLLM is not installed"),
        (["--vocabulary", "BASE"], "does not extend the original's vocabulary"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_mistakes_are_refused(
    tiny_pair: TinyPair, tmp_path: Path, arguments: list[str], message: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Кто?", "answer": "Моряк."}), encoding="utf-8")
    given = [str(tiny_pair.base) if part == "BASE" else part for part in arguments]
    result = CliRunner().invoke(
        app, ["speed", str(tiny_pair.instruct), "--prompts", str(prompts), "--out", str(tmp_path), *given]
    )
    assert result.exit_code == 2 and message in " ".join(result.output.split())
