"""Two commands share a run folder and are killed: nothing is lost, and the same command then ends well.

RUADAPT_KILLS=60 kills as often by hand.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from conftest import RUSSIAN, TinyPair
from tqdm import tqdm

from ruadapt.cli import app
from ruadapt.files import hash_path, write_json
from ruadapt.freshness import cached

KILLS = int(os.environ.get("RUADAPT_KILLS", 4))


def start(work: Callable[[], object]) -> int:
    """Fork a process that does the work, silently, and return its id: what was imported stays so."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        tqdm.set_lock(threading.RLock())  # the one that forks share stays locked where its holder is killed
        try:
            work()
        except BaseException as ended:
            os._exit(0 if isinstance(ended, SystemExit) and not ended.code else 1)
        os._exit(0)
    return child


def unit(folder: Path) -> None:
    for number in range(20):
        time.sleep(0.01)
        write_json(folder / f"{number}.json", [number] * 1000)


def test_nothing_is_lost_by_kills(tmp_path: Path, tiny_pair: TinyPair) -> None:
    (tmp_path / "ru.txt").write_text(RUSSIAN * 2, encoding="utf-8")
    arguments = ["tokenizer", "extend", tiny_pair.base, tmp_path / "words", "--added-rows", 40]
    text = ["--text", tmp_path / "ru.txt"]

    def command(*words: object) -> Callable[[], object]:
        return lambda: app([str(word) for word in words])

    assert os.waitpid(start(command(*arguments, *text)), 0)[1] == 0
    run = tmp_path / "run"
    for name in ("notes/.draft.old", ".film.part", ".model.1.part/mine.txt", "words.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")

    def works(folder: Path) -> dict[str, Callable[[], object]]:
        return {
            "words": command(*arguments[:3], folder / "words", *arguments[4:], *text),
            "model": command("init", tiny_pair.base, tmp_path / "words", folder / "model"),
            "unit": lambda: cached(folder / "unit", {"a": 1}, unit, "03_tokenizers"),
        }

    wanted, seconds = {}, {}
    for name, work in works(tmp_path / "once").items():  # undisturbed
        began = time.monotonic()
        assert os.waitpid(start(work), 0)[1] == 0
        seconds[name] = time.monotonic() - began
        wanted[name] = hash_path(tmp_path / "once" / name)

    draw, killed = random.Random(0), 0
    while killed < KILLS:
        first, second = draw.sample([*wanted], 2)
        shared = works(run)
        victim, other = start(shared[first]), start(shared[second])
        time.sleep(draw.uniform(0, 1.5 * seconds[first]))
        os.kill(victim, signal.SIGKILL)
        killed += os.waitpid(victim, 0)[1] == signal.SIGKILL
        assert os.waitpid(other, 0)[1] == 0
        assert hash_path(run / second) == wanted[second]
        if (run / first).exists():  # whole, or not there
            assert hash_path(run / first) == wanted[first]
        elif draw.random() < 0.7:  # the same command again
            assert os.waitpid(start(shared[first]), 0)[1] == 0
            assert hash_path(run / first) == wanted[first]
        for name in ("notes/.draft.old", ".film.part", ".model.1.part/mine.txt", "words.txt"):
            assert (run / name).read_text() == "mine"
        for name in {first, second}:
            if (run / name).exists():
                (run / name).rename(tmp_path / f"{name}-{time.monotonic_ns()}")
    kept = {"notes", ".film.part", ".model.1.part", "words.txt"}
    assert {path.name for path in run.iterdir()} >= kept
    for name, work in works(run).items():  # what the kills left goes with the next command for its target
        assert os.waitpid(start(work), 0)[1] == 0
        assert hash_path(run / name) == wanted[name]
    assert {path.name for path in run.iterdir()} == {
        "notes",
        ".film.part",
        ".model.1.part",
        "words.txt",
        *wanted,
    }
