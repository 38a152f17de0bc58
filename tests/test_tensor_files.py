"""Streamed safetensors files are the library's own, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ruadapt.checkpoints import tensor_files
from ruadapt.checkpoints.tensor_files import Made, Stored, map_tensor, read_header, write_tensors
from ruadapt.errors import RuadaptError

TENSORS = {
    "ё.weight": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "b": torch.randn(33, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "a": torch.tensor([float("nan"), -0.0], dtype=torch.float16),
    "ids": torch.arange(3),
    "scale": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 24])
def test_a_rewritten_file_is_the_librarys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt"})
    stored, metadata = read_header(tmp_path / "source.safetensors")
    new = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    parts = stored | {"b": Made("b", "BF16", (40, 3), lambda first, last: new[first:last])}
    write_tensors(tmp_path / "streamed.safetensors", parts, metadata)
    save_file(TENSORS | {"b": new.bfloat16()}, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "streamed.safetensors")["b"], new.bfloat16())


def test_blocks_of_another_shape_are_an_error(tmp_path: Path) -> None:
    parts = {"a": Made("a", "F32", (4, 2), lambda first, last: torch.zeros(last - first, 3))}
    with pytest.raises(RuntimeError, match="do not have its shape"):
        write_tensors(tmp_path / "a.safetensors", parts, {})


def test_tensors_are_mapped_and_their_file_stays_as_it_is(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for name, stored in read_header(tmp_path / "a.safetensors")[0].items():
        found = map_tensor(stored)
        torch.testing.assert_close(found, TENSORS[name], rtol=0, atol=0, equal_nan=True)
        found.zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    with pytest.raises(RuadaptError, match="a tensor of F4 cannot be read"):
        map_tensor(Stored(tmp_path / "a.safetensors", "F4", (2,), 8, 1))


def test_a_file_far_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Body shards may be longer than memory and swap: no mapping may claim their whole length."""
    size = 1 << 40
    save_file({"rows": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]) | {
        "body": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [32, 32 + size]}
    }
    text = json.dumps(entries).encode()
    with (tmp_path / "b.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + torch.ones(4, 2).numpy().tobytes())
        try:
            stream.truncate(stream.tell() + size)
        except OSError:
            pytest.skip("the file system has no files of a terabyte")
    stored, _ = read_header(tmp_path / "b.safetensors")
    assert stored["body"].size == size
    assert torch.equal(map_tensor(stored["rows"]), torch.ones(4, 2))


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for broken in (whole[:-1], whole[:50], b"", whole[:8] + b"?" + whole[9:], b"\xff" * 8 + whole[8:]):
        (tmp_path / "b.safetensors").write_bytes(broken)
        with pytest.raises(RuadaptError, match=r"b\.safetensors is truncated or corrupted"):
            read_header(tmp_path / "b.safetensors")
