"""Vocabulary patches: what changed between two model folders, in both directions, bit for bit.

A patch holds, for each side, the files that differ from the other side and, of tensors that differ, the rows
that the other side does not have. So `revert` needs nothing but the adapted model; the price is that old rows
which the new vocabulary dropped are in the patch, too (none where it was extended).
"""

from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ruadapt.checkpoints.model_folders import Layout, read_layout, read_tensor, rows_of
from ruadapt.checkpoints.tensor_files import (
    DTYPES,
    Blocks,
    RowFunction,
    Stored,
    parse_header,
    place_file,
    raw_header,
    read_tensors,
    same_bytes,
    write_parts,
    write_tensors,
)
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, hash_path, read_json, require_disk_space, write_json

Side = Literal["original", "adapted"]
MANIFEST, ROWS, HEADER = "patch.json", "rows.safetensors", ".header"
FORMAT = 1
# Suffixes of weights: of these only the safetensors that the model consists of count.
WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors")


def make(original: Path, adapted: Path, target: Path) -> dict[str, Any]:
    """Write the patch that turns `original` into `adapted` and back.

    Returns:
        `bytes` of the patch, and for each changed tensor its rows that are `kept`, `new` and `dropped`.

    Raises:
        RuadaptError: a folder is no readable model; nothing is written then.
    """
    layouts: dict[Side, Layout] = {"original": read_layout(original), "adapted": read_layout(adapted)}
    stored = {side: layout.stored() for side, layout in layouts.items()}
    same = {
        name
        for name in stored["original"].keys() & stored["adapted"].keys()
        if same_bytes(stored["original"][name], stored["adapted"][name])
    }
    manifest: dict[str, Any] = {"format": FORMAT} | {side: _inventory(layouts[side]) for side in layouts}
    changed: dict[str, dict[str, int]] = {}
    with atomic_folder(Path(target)) as patch:
        for side, layout in layouts.items():
            other: Side = "original" if side == "adapted" else "adapted"
            (patch / side).mkdir()
            for name, entry in manifest[side]["files"].items():
                entry["same"] = manifest[other]["files"].get(name, {}).get("sha256") == entry["sha256"]
                if name in layout.shards() and not entry["same"]:
                    (patch / side / f"{name}{HEADER}").write_bytes(raw_header(layout.folder / name))
                elif not entry["same"]:
                    place_file(layout.folder / name, patch / side / name, link=False)
            parts: dict[str, Stored | Blocks] = {}
            for name in stored[side].keys() - same:
                matrix = read_tensor(layout, name)
                source = _bits(read_tensor(layouts[other], name)) if name in stored[other] else None
                kept = _found(_bits(matrix), source)
                new = (kept < 0).nonzero()[:, 0]
                parts[f"{name}.kept"] = Blocks("I64", tuple(kept.shape), rows_of(kept))
                if len(new):
                    dtype = stored[side][name].dtype
                    rows = matrix if matrix.ndim > 1 else matrix.reshape(1, -1)
                    if dtype not in DTYPES:
                        dtype, rows = "U8", _bits(matrix)
                    parts[name] = Blocks(dtype, (len(new), *rows.shape[1:]), _selected(rows, new))
                counts = changed.setdefault(name, {"kept": 0, "new": 0, "dropped": 0})
                counts["new" if side == "adapted" else "dropped"] = len(new)
                counts["kept"] = len(kept) - len(new)
            order = sorted(parts, key=lambda name: (-DTYPES[parts[name].dtype].itemsize, name))
            write_tensors(patch / side / ROWS, {name: parts[name] for name in order}, {})
        write_json(patch / MANIFEST, manifest)
        size = sum(path.stat().st_size for path in patch.rglob("*") if path.is_file())
    return {"bytes": size, "tensors": changed}


def apply(patch: Path, original: Path, target: Path, *, link: bool = False) -> dict[str, Any]:
    """Write the adapted model from the original: every file bit for bit as it was when the patch was made.

    Returns:
        `files` written and their `bytes`.

    Raises:
        RuadaptError: `original` is not what the patch was made from, or the patch is damaged; nothing is
            written then.
    """
    return _rebuild(Path(patch), Path(original), Path(target), "adapted", link)


def revert(patch: Path, adapted: Path, target: Path, *, link: bool = False) -> dict[str, Any]:
    """Write the original from the adapted model, bit for bit; as `apply`."""
    return _rebuild(Path(patch), Path(adapted), Path(target), "original", link)


def needs(patch: Path, side: Side, *, link: bool = False) -> dict[str, Any]:
    """Return what `apply` (side adapted) or `revert` (original) reads and writes, in bytes."""
    manifest = _manifest(Path(patch))
    other = manifest["original" if side == "adapted" else "adapted"]["files"].values()
    written = [entry["bytes"] for entry in manifest[side]["files"].values() if not (link and entry["same"])]
    return {"read_bytes": sum(entry["bytes"] for entry in other), "written_bytes": sum(written)}


def _rebuild(patch: Path, source: Path, target: Path, side: Side, link: bool) -> dict[str, Any]:
    manifest = _manifest(patch)
    other = manifest["original" if side == "adapted" else "adapted"]
    for name, entry in other["files"].items():
        if not (source / name).is_file() or hash_path(source / name) != entry["sha256"]:
            revision = f", revision {other['revision']}" if other["revision"] else ""
            raise RuadaptError(
                f"{source / name} is not the file that {patch} was made from ({other['name']}{revision}, "
                f"sha256 {entry['sha256'][:12]}…); give that model"
            )
    require_disk_space(target.parent, needs(patch, side, link=link)["written_bytes"])
    layout = read_layout(source)
    stored = layout.stored()
    files = manifest[side]["files"]
    with atomic_folder(target) as folder:
        changes = read_tensors(patch / side / ROWS)
        for name, entry in files.items():
            if entry["same"]:
                place_file(source / name, folder / name, link=link)
                continue
            try:
                if name.endswith(".safetensors"):
                    header = (patch / side / f"{name}{HEADER}").read_bytes()
                    forms = parse_header(header, source)[0].items()
                    parts = [_patched(tensor, form, layout, stored, changes) for tensor, form in forms]
                    write_parts(folder / name, header, parts)
                else:
                    place_file(patch / side / name, folder / name, link=False)
            except (FileNotFoundError, LookupError, RuntimeError, ValueError):
                pass  # the hash tells
            if not (folder / name).is_file() or hash_path(folder / name) != entry["sha256"]:
                raise RuadaptError(f"{patch} is damaged: {name} does not come out as it was; copy it again")
    return {"files": len(files), "bytes": sum(entry["bytes"] for entry in files.values())}


def _patched(
    name: str, form: Stored, source: Layout, stored: dict[str, Stored], changes: dict[str, Tensor]
) -> Stored | Blocks:
    """Bytes of a tensor: the source's as they are, or its rows and the patch's put together."""
    if f"{name}.kept" not in changes:
        return stored[name]
    kept = changes[f"{name}.kept"]
    old = _bits(read_tensor(source, name)) if (kept >= 0).any() else None
    new = _bits(changes[name]) if (kept < 0).any() else None
    places = (kept < 0).cumsum(0) - 1
    width = form.size // max(len(kept), 1)

    def rows(first: int, last: int) -> Tensor:
        ids = kept[first:last]
        block = torch.empty(last - first, width, dtype=torch.uint8)
        if old is not None:
            block[ids >= 0] = old[ids[ids >= 0]]
        if new is not None:
            block[ids < 0] = new[places[first:last][ids < 0]]
        return block

    return Blocks("U8", (len(kept), width), rows)


def _manifest(patch: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(patch / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise RuadaptError(f"{patch} is no patch of format {FORMAT}; make it again with this version")
    for name in (*manifest["original"]["files"], *manifest["adapted"]["files"]):
        if Path(name).name != name:
            raise RuadaptError(f"{patch} names a file outside its folder: {name}; do not use it")
    return manifest


def _inventory(layout: Layout) -> dict[str, Any]:
    """Name, revision, hash and bytes of a model's weights and of every small file beside them."""
    small = {
        path.name
        for path in layout.folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix not in WEIGHTS
    }
    paths = [layout.folder / name for name in sorted(small | set(layout.shards()))]
    files = {path.name: {"sha256": hash_path(path), "bytes": path.stat().st_size} for path in paths}
    return origin(layout.folder) | {"files": files}


def origin(folder: Path) -> dict[str, Any]:
    """Name and, for a snapshot in a hub cache, revision of a model folder."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"name": name, "revision": folder.name}
    return {"name": folder.resolve().name, "revision": None}


def _selected(rows: Tensor, ids: Tensor) -> RowFunction:
    return lambda first, last: rows[ids[first:last]]


def _bits(tensor: Tensor) -> Tensor:
    """Rows as bytes, `[V, width]`; a tensor of one dimension is one row."""
    flat = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    return flat.view(torch.uint8)


def _found(rows: Tensor, source: Tensor | None) -> Tensor:
    """For each row of bytes the number of an equal row of `source`, int64; -1 where there is none."""
    if source is None or rows.shape[1] != source.shape[1]:
        return torch.full((len(rows),), -1)
    places = {digest: number for number, digest in enumerate(_digests(source))}
    return torch.tensor([places.get(digest, -1) for digest in _digests(rows)])


def _digests(rows: Tensor) -> list[bytes]:
    return [blake2b(row, digest_size=16).digest() for row in rows.numpy()]
