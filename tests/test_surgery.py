"""`ruadapt init | lep | verify` end to end: reports, dry runs, bad input, full disks and kills."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair
from test_checkpoints import SPOILERS, copied, edit_json, edit_weights, embeddings_of, tokenizer_folder
from typer.testing import CliRunner

from ruadapt import files
from ruadapt.checkpoints import initialise, read_embeddings, tensor_files
from ruadapt.cli import app
from ruadapt.files import hash_path

run = CliRunner()


def call(*arguments: object, code: int = 0) -> str:
    result = run.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr if code else result.stdout


def lep_arguments(folders: dict[str, Path], out: Path) -> list[object]:
    return ["lep", folders["base"], folders["instruct"], folders["adapted"], out]


@pytest.fixture
def folders(tmp_path: Path, tiny_pair: TinyPair) -> dict[str, Path]:
    """Copies of base, instruct and adapted base, in a folder of their own."""
    words = tokenizer_folder(tmp_path / "sources" / "tokenizer", tiny_pair.base, "replaced")
    initialise(tiny_pair.base, words, tmp_path / "model")
    return copied(tiny_pair, tmp_path / "model", tmp_path / "sources")


def listing(folder: Path) -> dict[str, str]:
    return {path.name: hash_path(path) for path in folder.iterdir()}


def test_init_lep_and_verify(tmp_path: Path, tiny_pair_untied: TinyPair) -> None:
    base, instruct = tiny_pair_untied.base, tiny_pair_untied.instruct
    words = tokenizer_folder(tmp_path / "tokenizer", base, "extended")
    init = ["init", base, words, tmp_path / "adapted"]
    before = listing(tmp_path)
    needs = json.loads(call(*init, "--dry-run", "--json"))
    assert listing(tmp_path) == before
    found = json.loads(call(*init, "--json"))
    assert found["report"]["rows"] == 660 and found["verified"]["reloaded"]
    assert found["folder"] == str(tmp_path / "adapted")
    weights = (tmp_path / "adapted" / "model.safetensors").stat().st_size
    assert needs["written"] < weights < needs["written"] + 4096  # a header more

    lep = lep_arguments(
        {"base": base, "instruct": instruct, "adapted": tmp_path / "adapted"}, tmp_path / "lep"
    )
    before = listing(tmp_path)
    needs = json.loads(call(*lep, "--method", "delta", "--dry-run", "--json"))
    assert set(needs["reads"]) == {"base", "instruct", "adapted"} and listing(tmp_path) == before
    assert "explained" in call(*lep, "--method", "delta")
    found = json.loads(call("verify", tmp_path / "lep", instruct, "--json"))
    assert found["compared_with_source"] and found["rows"] == 660
    old, new = (read_embeddings(tmp_path / name).input for name in ("adapted", "lep"))
    change = read_embeddings(instruct).input - read_embeddings(base).input
    torch.testing.assert_close(new[4:600], old[4:600] + change[4:], rtol=1e-5, atol=1e-6)
    record = files.read_json(tmp_path / "lep" / "ruadapt.json")
    assert record["options"]["method"] == "delta"
    assert record["report"]["head"]["drift"]["mean_cosine"] > 0.99
    assert record["made_from"]["instruct"] == {"name": "instruct", "revision": None}
    assert str(tmp_path) not in json.dumps(record)


def test_results_that_fail_verification_are_not_kept(tmp_path: Path, folders: dict[str, Path]) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    edit_weights(folders["instruct"], broken)
    before = listing(tmp_path)
    assert "logits of" in call(*lep_arguments(folders, tmp_path / "out"), code=2)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", SPOILERS)
def test_bad_input_ends_with_one_message_and_nothing_written(
    tmp_path: Path, folders: dict[str, Path], name: str
) -> None:
    spoil, message = SPOILERS[name]
    spoil(folders)
    before = listing(tmp_path)
    output = call(*lep_arguments(folders, tmp_path / "out"), code=2)
    assert output.count("ruadapt: ") == 1 and "Traceback" not in output and re.search(message, output)
    assert listing(tmp_path) == before


def test_bad_input_of_init_and_verify(tmp_path: Path, folders: dict[str, Path]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    words, base = tmp_path / "sources" / "tokenizer", folders["base"]
    broken = Path(shutil.copytree(base, tmp_path / "infinite"))
    edit_weights(broken, lambda tensors: embeddings_of(tensors)[3].fill_(float("inf")))
    header = Path(shutil.copytree(base, tmp_path / "header"))
    content = (base / "model.safetensors").read_bytes()
    (header / "model.safetensors").write_bytes(content[:9] + b"!" + content[10:])
    integers = Path(shutil.copytree(base, tmp_path / "integers"))
    numbers = {"model.embed_tokens.weight": torch.ones(600, 32).long()}
    edit_weights(integers, lambda tensors: tensors.update(numbers))
    untied = Path(shutil.copytree(base, tmp_path / "untied"))
    edit_json(untied / "config.json", tie_word_embeddings=False)
    before = listing(tmp_path)
    for arguments, message in (
        (["init", base, words, full], "full exists and is not empty; give a new folder"),
        (["init", base, words, full / "note.txt"], "exists and is not empty"),
        (lep_arguments(folders, full), "is not empty"),
        (["init", broken, words, tmp_path / "out"], r"NaN or infinite values in rows [3]"),
        (["init", header, words, tmp_path / "out"], "truncated or corrupted"),
        (["init", integers, words, tmp_path / "out"], "is torch.int64"),
        (["init", untied, words, tmp_path / "out"], "no head is stored"),
        (["init", base, tmp_path / "none", tmp_path / "out"], "none does not exist"),
        (["init", tmp_path / "none", words, tmp_path / "out"], "config.json is missing"),
        ([*lep_arguments(folders, tmp_path / "out"), "--method", "swop"], "unknown LEP method 'swop'"),
        (["verify", broken], "NaN or infinite"),
    ):
        output = call(*arguments, code=2)
        assert message in output and output.count("ruadapt: ") == 1, output
    assert listing(tmp_path) == before
    # After `init` every shared row must be the source's, as ruadapt.json tells.
    call("init", base, words, tmp_path / "out")
    call("verify", tmp_path / "out", base)
    edit_weights(tmp_path / "out", lambda tensors: embeddings_of(tensors)[300].add_(1))
    assert "rows of shared tokens are not" in call("verify", tmp_path / "out", base, code=2)


def test_a_full_disk_is_seen_before_and_survived_midway(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(tmp_path)
    arguments = lep_arguments(folders, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert "MB but the disk has 0 MB free" in call(*arguments, code=2)

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        assert "No space left on device; check the disk" in call(*arguments, code=2)
    with monkeypatch.context() as patch:
        # A disk that takes a part of a block: the next write finds it full.
        patch.setattr(tensor_files, "BLOCK_BYTES", 1 << 12)
        limit = read_embeddings(folders["base"]).input.nbytes // 2
        code = (
            "import resource, sys; from ruadapt.cli import app; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); app()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and "File too large" in done.stderr, done.stderr
    assert listing(tmp_path) == before
    call(*arguments)


KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
# What the commands load late is loaded here: the children fork from a process that has run nothing yet.
import pydantic.type_adapter, transformers.integrations.hub_kernels, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from ruadapt.cli import app
from ruadapt.files import hash_path

folder = Path(sys.argv[1])
target = folder / "out"
report, sys.stdout = sys.stdout, open(os.devnull, "w")


def start(arguments):
    pid = os.fork()
    if pid == 0:
        try:
            app(arguments, standalone_mode=False)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def kill(arguments, times, chance):
    started = time.perf_counter()
    assert os.waitpid(start(arguments), 0)[1] == 0
    duration = time.perf_counter() - started
    whole = hash_path(target)
    shutil.rmtree(target)
    found = {"absent": 0, "whole": 0, "left": 0}
    for _ in range(times):
        pid = start(arguments)
        time.sleep(chance.uniform(0, duration * 1.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["left"] += len(list(folder.iterdir())) > target.exists()
        if target.exists():
            assert hash_path(target) == whole, "half a folder"
            found["whole"] += 1
            shutil.rmtree(target)
        else:
            found["absent"] += 1
    assert os.waitpid(start(arguments), 0)[1] == 0, "the run after the kills"
    assert hash_path(target) == whole
    assert [path.name for path in folder.iterdir()] == ["out"], "something was left behind"
    shutil.rmtree(target)
    return found


chance = random.Random(0)
print(json.dumps([kill(arguments, 15, chance) for arguments in json.loads(sys.argv[2])]), file=report)
"""


def test_kills_leave_nothing_or_all_of_it(tmp_path: Path, folders: dict[str, Path]) -> None:
    """15 kills of each at random moments: no half folder, sources as before, then a run that succeeds."""
    before, results = hash_path(tmp_path / "sources"), tmp_path / "results"
    results.mkdir()
    init = ["init", folders["base"], tmp_path / "sources" / "tokenizer", results / "out"]
    commands = [
        [str(part) for part in command] for command in (init, lep_arguments(folders, results / "out"))
    ]
    code = [sys.executable, "-c", KILLS, str(results), json.dumps(commands)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found["absent"] and found["left"], found
    assert hash_path(tmp_path / "sources") == before


def test_hub_names_are_fetched_and_dry_runs_download_nothing(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def snapshot(name: str, *, revision: str | None, local_files_only: bool, **others: Any) -> str:
        asked.append((name, revision, local_files_only))
        return str(folders["base"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    arguments = ["init", "someone/base@v1", tmp_path / "sources" / "tokenizer", tmp_path / "out"]
    call(*arguments, "--dry-run")
    call(*arguments)
    assert asked == [("someone/base", "v1", True), ("someone/base", "v1", False)]
    monkeypatch.undo()
    assert "set HF_HUB_OFFLINE=0" in call("verify", "someone/no-such-model", code=2)
