"""Jobs over worker processes: order, failures that name their job, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ruadapt.errors import RuadaptError
from ruadapt.training.parallel import launched, run_jobs

# Jobs for the workers: functions of a module, as in real use.


def add(left: int, right: int) -> tuple[int, int]:
    return left + right, torch.get_num_threads()


def fail(target: Path, seconds: float) -> None:
    folder, name = target.parent, target.name
    target.touch()
    if name == "bad":
        raise RuadaptError("no such corpus")
    if name == "broken":
        raise ValueError("odd")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    (folder / f"{name}.done").touch()


def test_results_come_in_order_and_each_worker_has_its_share_of_threads() -> None:
    jobs = [{"left": n, "right": 1} for n in range(5)]
    results = run_jobs(add, jobs, 2, "sums")
    assert [total for total, _ in results] == [1, 2, 3, 4, 5]
    assert {threads for _, threads in results} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert run_jobs(add, [], 2, "sums") == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bad", RuadaptError, r"bad: no such corpus"),
        ("broken", ValueError, r"odd"),
        ("killed", TerminatedWorkerError, r"excessive memory usage"),
    ],
)
def test_the_first_failure_names_its_job_and_stops_the_rest(
    name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    jobs = [{"target": tmp_path / other, "seconds": 60} for other in (name, "slow", "later")]
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_jobs(fail, jobs, 2, "units")
    assert time.monotonic() - started < 40
    assert not list(tmp_path.glob("*.done"))


def sleep_and_tell(folder: Path) -> None:
    (folder / "worker").write_text(str(os.getpid()))
    time.sleep(120)


def test_a_killed_parent_leaves_no_workers(tmp_path: Path) -> None:
    code = (
        "if __name__ == '__main__':\n"
        "    from pathlib import Path; import test_parallel as t\n"
        "    from ruadapt.training.parallel import run_jobs\n"
        f"    run_jobs(t.sleep_and_tell, [{{'folder': Path({str(tmp_path)!r})}}] * 2, 2, 'sleep')\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}"}
    parent = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)
    try:
        worker = _wait_for(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text())
    finally:
        parent.kill()
        parent.wait()
    assert _wait_for(lambda: not _alive(int(worker)))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_for(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := check():
            return value
        time.sleep(0.2)
    raise AssertionError("it took more than a minute")


def tell(target: Path, places: dict[str, Path], rate: float) -> None:
    target.write_text(f"{places['ru']} {rate}")


def test_jobs_are_written_for_accelerate_launch(tmp_path: Path) -> None:
    job = {"target": tmp_path / "unit", "places": {"ru": Path("a/b")}, "rate": 0.5}
    with pytest.raises(RuadaptError, match=r"launch -m ruadapt\.training\.parallel \S+unit\.job\.json"):
        run_jobs(tell, [job], 0, "units")
    launched(tmp_path / "unit.job.json")
    assert (tmp_path / "unit").read_text() == "a/b 0.5"
    run_jobs(tell, [job], 0, "units")  # it is finished: the next run goes on
