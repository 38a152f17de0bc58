"""A step of a benchmark in a process of its own, with what it took."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ruadapt.errors import RuadaptError

UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Run in a child of this process, which must not have used a GPU.

    Returns:
        `seconds`; `peak_gigabytes` of memory, libraries and mapped files included; `device_gigabytes`, the
        peak of CUDA's allocator; and `result`, what `work` returned, as JSON.

    Raises:
        RuadaptError: `work` failed.
    """
    os.sync()  # what earlier steps wrote is not to be paid for here
    reading, writing = os.pipe()
    started = time.perf_counter()
    if (pid := os.fork()) == 0:
        try:
            found = work()
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
            with os.fdopen(writing, "w") as stream:
                json.dump({"result": found, "device_gigabytes": peak / 1e9}, stream)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuadaptError("a step failed; its message is above")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gigabytes": usage.ru_maxrss * UNIT / 1e9, **json.loads(found)}


def show(name: str, found: dict[str, Any]) -> None:
    """Print one step as a line of JSON."""
    print(json.dumps({"step": name} | found, ensure_ascii=False), flush=True)
