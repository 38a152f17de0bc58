"""The memory of surgery does not grow with the body of the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import TinyPair
from test_checkpoints import tokenizer_folder

# Each command in a child of one process that has the libraries: its peak is what the command adds to them.
MEASURE = """
import json, os, resource, struct, sys
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
        stream.seek(-4, 2)  # the last number of the body
        stream.write(struct.pack("<f", 1.0))
    report = checkpoints.propagate(base, base, trained, out, "swap")
    assert report["body"]["tensors"] == ["extra"], report["body"]


for base in bases:
    for work in (surgery, lep):
        pid = os.fork()
        if pid == 0:
            work(base, base.parent / f"{base.name} {work.__name__}")
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            print(json.dumps([f"{base.name} {work.__name__}", peak]), flush=True)
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
    )
    assert done.returncode == 0, done.stderr
    peaks = dict(json.loads(line) for line in done.stdout.splitlines())
    assert peaks["streamed surgery"] - peaks["small surgery"] < 64 << 20
    # Blocks of three bodies and of the result, less than the one changed tensor.
    assert peaks["streamed lep"] - peaks["small lep"] < 1 << 28
    for result in ("streamed surgery", "streamed lep"):
        assert (tmp_path / result / "model.safetensors").stat().st_size > 1 << 28
        shutil.rmtree(tmp_path / result)
