"""The memory of surgery does not grow with the body of the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyPair
from test_checkpoints import tokenizer_folder

# Each command in a child of one process that has the libraries. What counts is memory that the system can't
# take back: pages of mapped files are in it once they are changed, and not before.
MEASURE = r"""
import json, os, re, struct, sys, threading, time
from pathlib import Path
import torch
from ruadapt import checkpoints

torch.set_num_threads(1)
words, *bases = map(Path, sys.argv[1:])


def surgery(base, out):
    checkpoints.initialise(base, words, out)
    checkpoints.verify(out, base, kept="shared", reload=False)


def lep(base, out):
    trained = base.parent / f"{base.name} surgery"
    with (trained / "model.safetensors").open("r+b") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        stream.seek(json.loads(header)["extra"]["data_offsets"][0], 1)
        stream.write(struct.pack("<f", 1.0))
    report = checkpoints.propagate(base, base, trained, out, "swap")
    assert report["body"]["tensors"] == ["extra"], report["body"]


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def watch(seen):
    while True:
        seen.append(anonymous())
        time.sleep(0.002)


for base in bases:
    for work in (surgery, lep):
        pid = os.fork()
        if pid == 0:
            seen = [anonymous()]
            threading.Thread(target=watch, args=(seen,), daemon=True).start()
            work(base, base.parent / f"{base.name} {work.__name__}")
            print(json.dumps([f"{base.name} {work.__name__}", max(seen)]), flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, base
"""


def with_body(base: Path, folder: Path, size: int) -> Path:
    """A copy of `base` with one more tensor, `size` bytes of zeros, that take no place on the disk."""
    path = Path(shutil.copytree(base, folder)) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, content = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["extra"] = {
        "dtype": "F32",
        "shape": [size // 8, 2],
        "data_offsets": [len(content), len(content) + size],
    }
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + content)
        stream.truncate(stream.tell() + size)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_body(tmp_path: Path, tiny_pair_untied: TinyPair) -> None:
    base = tiny_pair_untied.base
    words = tokenizer_folder(tmp_path / "tokenizer", base, "extended")
    bodies = [
        with_body(base, tmp_path / "small", 1 << 20),
        with_body(base, tmp_path / "streamed", 1 << 28),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(words), *map(str, bodies)],
        capture_output=True,
        text=True,
        timeout=300,
        # What is freed goes back at once: what glibc would keep of it varies from run to run. A run of stages
        # in this process asks for the opposite, so its own setting is replaced.
        env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"},
    )
    assert done.returncode == 0, done.stderr
    peaks = dict(json.loads(line) for line in done.stdout.splitlines())
    for work in ("surgery", "lep"):
        assert peaks[f"streamed {work}"] - peaks[f"small {work}"] < 128 << 20, peaks
    for result in ("streamed surgery", "streamed lep"):
        assert (tmp_path / result / "model.safetensors").stat().st_size > 1 << 28
        shutil.rmtree(tmp_path / result)
