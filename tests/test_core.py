"""`pip install .` is enough for tokenizers and surgery: no library of an extra is imported there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from conftest import RUSSIAN, TinyPair

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_AS = {"scikit_learn": "sklearn"}


def test_the_core_needs_no_extra(tmp_path: Path, tiny_pair: TinyPair) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for extra, lines in extras.items() if extra != "dev" for line in lines]
    names = [re.split(r"[=~<>]", line)[0].replace("-", "_") for line in lines]
    absent = [IMPORTED_AS.get(name, name) for name in names]
    program = f"import sys; sys.modules |= dict.fromkeys({absent}); from ruadapt.cli import app; app()"

    def ruadapt(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, words)]
        return subprocess.run(command, check=words[0] != "evaluate", capture_output=True, text=True)

    (tmp_path / "text.txt").write_text(RUSSIAN * 40, encoding="utf-8")
    text, words, start = tmp_path / "text.txt", tmp_path / "words", tmp_path / "start"
    ruadapt("tokenizer", "extend", tiny_pair.base, words, "--added-rows", 20, "--text", text)
    ruadapt("tokenizer", "certify", words, tiny_pair.base, "--text", text)
    ruadapt("tokenizer", "measure", words, tiny_pair.base, "--text", f"ru={text}")
    ruadapt("init", tiny_pair.base, words, start)
    ruadapt("lep", tiny_pair.base, tiny_pair.instruct, start, tmp_path / "lep")
    ruadapt("verify", tmp_path / "lep", tiny_pair.instruct)
    refused = ruadapt("evaluate", tiny_pair.instruct)
    assert refused.returncode == 1 and "pip install 'ruadapt[" in refused.stderr, refused.stderr
