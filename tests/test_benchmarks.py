"""The benchmarks run, at sizes where their numbers mean nothing."""

import gzip
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENGLISH, RUSSIAN, TinyPair, tiny_tokenizer
from test_checkpoints import tokenizer_folder

from benchmarks import corpora, lep, text_curve, training
from ruadapt import checkpoints
from ruadapt.files import project_root, read_json, write_json, write_jsonl


def steps(capfd: pytest.CaptureFixture[str]) -> dict[str, dict]:
    return {row["step"]: row for row in map(json.loads, capfd.readouterr().out.splitlines())}


def test_lep_equals_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(lep.SHAPES, "tiny", (608, 32, True, 4_000, 40_000))
    for rows in (600, 700):
        tiny_tokenizer(rows).save_pretrained(tmp_path / str(rows))
    lep.main(tmp_path / "700", tmp_path / "600", tmp_path / "models", "tiny", compare_plain=True)
    assert steps(capfd)["plain"]["result"]["equal_entries"] > 0.999


def tiny_training() -> None:
    training.SHAPES["tiny"] = (32, 1, 2, 1, 64, 3_000)
    sizes = {"batch": 2, "block": 16, "steps": 2, "rounds": 1, "tokens": 64, "rows": 2_000, "width": 16}
    training.main(shape="tiny", modes="embeddings", **sizes)


def test_the_chunked_loss_is_the_plain_one(capfd: pytest.CaptureFixture[str]) -> None:
    # A benchmark forks for each step, and threads with which other tests have trained can't be forked.
    process = multiprocessing.get_context("spawn").Process(target=tiny_training)
    process.start()
    process.join()
    assert process.exitcode == 0
    found = steps(capfd)
    assert max(found["relative differences"]["result"].values()) < 1e-5
    assert found["embeddings"]["result"]["trained_parameters"] == 3_000 * 32


def test_corpora_are_built_and_packed(capfd: pytest.CaptureFixture[str]) -> None:
    corpora.main([1])
    assert steps(capfd)["its tokens, 1 MB"]["result"] > 100


def test_a_curve_of_text_reaches_the_chat_model_and_is_not_trained_twice(
    tmp_path: Path, tiny_pair: TinyPair
) -> None:
    run, texts = tmp_path / "run", {"ru": RUSSIAN.splitlines(), "en": ENGLISH.splitlines()}
    for language, lines in texts.items():
        for part in ("train", "heldout"):
            rows = [{"text": line} for line in lines]
            write_jsonl(run / "01_corpus" / f"{language}_{part}.jsonl", rows)
        chats = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": line}]}
            for line in lines
        ]
        write_jsonl(run / "01_corpus" / "chats" / f"{language}_chat_heldout.jsonl", chats)
        with gzip.open(tmp_path / f"{'ru' * (language == 'ru')}blimp.jsonl.gz", "wt") as stream:
            pairs = [{"good": line, "bad": line[::-1], "paradigm": "order"} for line in lines]
            stream.writelines(json.dumps(pair) + "\n" for pair in pairs)
    for name in ("chat", "chat_copy"):
        write_jsonl(run / "01_corpus" / "chats" / f"{name}.jsonl", chats)
    pair = {"base": str(tiny_pair.base), "instruct": str(tiny_pair.instruct)}
    write_json(run / "02_model_pair" / "pair.json", pair)
    words = tokenizer_folder(tmp_path / "words", tiny_pair.base, "extended")
    checkpoints.initialise(tiny_pair.base, words, run / "04_initialisation" / "extended")

    settings = [f"run_dir={run}", "pretraining_block_size=16", "calibration_batch_size=4", "copy_share=0.5"]
    given = [f"{language}={run / '01_corpus' / f'{language}_heldout.jsonl'}" for language in texts]

    def measured() -> pd.DataFrame:
        amounts = ["extended=300:3", "original=300:3"]
        text_curve.main("smoke", tmp_path / "t.csv", amounts, tmp_path, given, settings, 4, 2_500)
        return pd.read_csv(tmp_path / "t.csv")

    table = measured()
    assert table.groupby("vocabulary")["characters"].unique().map(list).to_dict() == {
        "extended": [300],
        "original": [0, 300],
    }
    first, trained = table[table["characters"] == 0], table[table["characters"] == 300]
    assert first["change"].isna().all() and trained["change"].notna().all()
    assert (trained["chats"] == 20).all() and (first["chats"] == 0).all()
    assert (trained["tokens"] > 0).all() and (trained["change"] != 0).any()
    extended = table["vocabulary"] == "extended"  # the amount before it is the original itself
    assert (table.loc[extended, "gain"] == table.loc[extended, "change"]).all()
    kinds = {("bits per byte", "code"), *((kind, one) for kind in ("chat", "bits per byte") for one in texts)}
    kinds |= {("minimal pairs", one) for one in texts}
    assert {*zip(first["measure"], first["language"], strict=True)} == kinds
    assert read_json(tmp_path / "t.json")["parameters"]["pretraining_block_size"] == 16
    made = {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    pd.testing.assert_frame_equal(measured(), table)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")} == made

    # The peaks of the same steps: a line each, and nothing is left behind.
    settings += ["evaluation_tasks=[blimp]", f"evaluation_data={tmp_path}"]
    # A process of its own forks: torch's threads, which tests have used, do not outlive a fork.
    command = [sys.executable, "-m", "benchmarks.peaks", "smoke", str(tmp_path / "p.csv"), "extended"]
    command += ["--characters=300", "--steps=3", *(f"--set={setting}" for setting in settings)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=project_root()).stdout
    shown = [json.loads(line) for line in told.splitlines() if line.startswith('{"step"')]
    table = pd.read_csv(tmp_path / "p.csv")
    steps = ["extended, pre-training", "extended, LEP and calibration", "evaluation"]
    assert list(table["step"]) == [line["step"] for line in shown] == steps
    assert shown[1]["result"]["chats"] == 20 and table["peak_gigabytes"].between(0.1, 4).all()
    assert read_json(tmp_path / "p.json")["parameters"]["calibration_batch_size"] == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")} == made
