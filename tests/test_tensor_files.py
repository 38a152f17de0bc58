"""Safetensors files are the library's own, byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ruadapt.checkpoints import tensor_files
from ruadapt.checkpoints.tensor_files import map_tensors, same_bytes, write_tensors
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
def test_made_rows_stand_where_the_library_would_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt"})
    new = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    made = {"b": lambda first, last: new[first:last], "scale": lambda first, last: torch.ones(1)}
    tensors = load_file(tmp_path / "source.safetensors") | {"b": torch.empty(40, 3, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "streamed.safetensors", tensors, made)
    wanted = TENSORS | {"b": new.bfloat16(), "scale": torch.ones(())}
    save_file(wanted, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_blocks_of_another_shape_are_an_error(tmp_path: Path) -> None:
    made = {"a": lambda first, last: torch.zeros(last - first, 3)}
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(4, 2)}, made)


def test_tensors_are_mapped_and_their_file_stays_as_it_is(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for name, found in map_tensors(tmp_path / "a.safetensors").items():
        torch.testing.assert_close(found, TENSORS[name], rtol=0, atol=0, equal_nan=True)
        found.zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_tensors_are_compared_bit_for_bit(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS | {"a": torch.tensor([float("nan"), 0.0]).half()}, tmp_path / "b.safetensors")
    one, other = (map_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert [name for name in one if not same_bytes(one[name], other[name])] == ["a"]
    assert same_bytes(one["a"], one["a"]) and not same_bytes(one["a"], one["b"])


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for broken in (whole[:-1], whole[:50], b"", whole[:8] + b"?" + whole[9:], b"\xff" * 8 + whole[8:]):
        (tmp_path / "b.safetensors").write_bytes(broken)
        with pytest.raises(RuadaptError, match=r"b\.safetensors is truncated or corrupted"):
            map_tensors(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(whole.replace(b'"I64"', b'"I65"'))
    with pytest.raises(RuadaptError, match=r"b\.safetensors is truncated or corrupted .*I65"):
        map_tensors(tmp_path / "b.safetensors")
