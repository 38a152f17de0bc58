"""Launched jobs: one call in every process, one result, streamed output, errors and ends that are named."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from accelerate import PartialState
from accelerate.utils import gather_object
from test_parallel import _alive, _wait_for, add

from ruadapt.errors import RuadaptError
from ruadapt.training import launching
from ruadapt.training.launching import LAUNCH, launch_jobs
from ruadapt.training.recording import in_turn

HERE = Path(__file__).parent
ONE = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes 1"
# What `accelerate launch` itself starts where there is more than one device; it has no way to do so on CPUs.
TWO = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"


def total(target: Path, options: dict[str, Any], sizes: tuple[int, ...] = ()) -> dict[str, Any]:
    """Sum the ranks of all processes, as a training sums gradients; the main one writes."""
    distributed.init_process_group("gloo")
    rank = torch.tensor([float(distributed.get_rank() + 1)])
    distributed.all_reduce(rank)
    print("summed", options["progress"])
    if distributed.get_rank() == 0:
        assert isinstance(target, Path)
        target.write_text(str(rank.item()))
    found = {"sum": rank.item(), "processes": distributed.get_world_size(), "sizes": list(sizes)}
    distributed.destroy_process_group()
    return found


def meet(target: Path) -> dict[str, Any]:
    """Join the other machine's process, write in turn, and tell what was found."""
    state = PartialState(cpu=True)
    with in_turn():
        found = target.exists()
        time.sleep(0.2)
        target.touch()
    rows: list[Any] = gather_object([[state.process_index, found, os.environ.get("NCCL_DEBUG")]])
    state.destroy_process_group()
    return {"rows": rows}


def stop(target: Path, way: str) -> None:
    if way == "refused":
        raise RuadaptError("the corpus is empty")
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    target.write_text(str(os.getpid()))
    time.sleep(120)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")


def test_two_processes_do_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCH, TWO)
    jobs = [{"target": tmp_path / "out" / "a", "options": {"rate": 0.1}, "sizes": [1, 2]}]
    (result,) = launch_jobs(total, jobs, 4, "sums")
    assert result == {"sum": 3.0, "processes": 2, "sizes": [1, 2]}
    assert (tmp_path / "out" / "a").read_text() == "3.0"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    printed = capfd.readouterr().out
    assert "sums: 1 of 1, job target=" in printed and printed.count("summed") == 2


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("refused", r"^units, job target=.*: the corpus is empty$"),
        (
            "killed",
            r"units, job target=.* ended with exit code .*run again, it goes on from the last checkpoint",
        ),
    ],
)
def test_an_end_before_its_time_is_named(
    way: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH, ONE)
    with pytest.raises(RuadaptError, match=message):
        launch_jobs(stop, [{"target": tmp_path / "a", "way": way}], 1, "units")
    assert not list(tmp_path.iterdir())


SSH = """#!{python}
# In place of a machine: a fresh environment behind a terminal, which is hung up with this process (-tt).
import os, pty, sys
assert "secret" not in " ".join(sys.argv), "other users can read a command"
child, terminal = pty.fork()
if not child:
    os.execve("/bin/bash", ["bash", "-c", " ".join(sys.argv[3:])], {{"PATH": "/usr/bin:/bin"}})
try:
    while said := os.read(terminal, 4096):
        os.write(1, said)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
"""


@pytest.mark.parametrize("ends", [False, True], ids=["both", "the second fails"])
def test_two_machines_do_one_job_and_end_together(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 7\n" if ends else SSH.format(python=sys.executable))
    (tmp_path / "ssh").chmod(0o755)
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\n"
        "use_cpu: true\nnum_machines: 2\nnum_processes: 2\nrdzv_backend: static\nsame_network: true\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The second machine is given this environment, spaces included, and no other.
    given = {"SECOND": "there", "MASTER": "127.0.0.1", "PORT": str(port), "CONFIG": str(config)}
    given |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "NCCL_DEBUG": "a b"}
    given |= {"HF_TOKEN": "secret"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(LAUNCH, str(HERE.parent / "profiles" / "accelerate" / "two-nodes.sh"))
    job = {"target": tmp_path / "out" / "a"}
    if ends:
        # Where the first one would wait a quarter of an hour for it.
        with pytest.raises(RuadaptError, match="ended with exit code 7 "):
            launch_jobs(meet, [job], 1, "meetings")
        return
    (result,) = launch_jobs(meet, [job], 1, "meetings")
    assert result == {"rows": [[0, False, "a b"], [1, True, "a b"]]}


def test_without_a_launcher_jobs_run_in_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate.commands.config import config_args

    default = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(default))
    monkeypatch.delenv(LAUNCH, raising=False)
    assert launching.launcher() == []
    for processes, launched in ((1, False), (2, True)):
        default.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: 'no'\n"
            f"num_machines: 1\nnum_processes: {processes}\nuse_cpu: true\n"
        )
        assert bool(launching.launcher()) == launched
    monkeypatch.setenv(LAUNCH, "none")
    assert launching.launcher() == []
    assert launch_jobs(add, [{"left": 1, "right": 2}], 1, "sums")[0][0] == 3
    monkeypatch.setenv(LAUNCH, "accelerate launch '")
    with pytest.raises(RuadaptError, match="no command line"):
        launching.launcher()


def test_a_killed_parent_takes_the_launched_processes_along(tmp_path: Path) -> None:
    code = (
        "import test_launching as t; from pathlib import Path\n"
        "from ruadapt.training.launching import launch_jobs\n"
        f"launch_jobs(t.stop, [{{'target': Path({str(tmp_path / 'pid')!r}), 'way': 'wait'}}], 1, 'x')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {LAUNCH: ONE}, stdout=subprocess.DEVNULL
    )
    try:
        worker = _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    finally:
        parent.kill()
        parent.wait()
    assert _wait_for(lambda: not _alive(int(worker)))
