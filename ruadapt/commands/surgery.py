"""The commands `ruadapt init | lep | verify`: checkpoint surgery from the shell."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from ruadapt import checkpoints
from ruadapt import lep as mathematics
from ruadapt.checkpoints import adapters
from ruadapt.checkpoints.bodies import AdaptedBody
from ruadapt.checkpoints.hub import download_bytes, fetch_model, origin
from ruadapt.checkpoints.model_configs import new_configs
from ruadapt.checkpoints.model_folders import Layout, plan, planned_bytes, read_layout, require_rows
from ruadapt.checkpoints.tensor_files import BLOCK_BYTES
from ruadapt.checkpoints.verification import fits_memory
from ruadapt.console import show
from ruadapt.files import atomic_folder, read_json, require_disk_space, require_new_folder, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.vocab import load_tokenizer, rows

Folder = Annotated[Path, typer.Argument(help="Model folder or hub name, OWNER/NAME[@REVISION].")]
Out = Annotated[Path, typer.Argument(help="New or empty folder for the result.")]
Link = Annotated[bool, typer.Option("--link", help="Share unchanged files with the source by hard links.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be read, written and held, and stop.")
]
# Blocks of rows that are alive at once, and square float64 matrices and float64 rows that a fit holds.
BLOCKS, FIT_MATRICES, FIT_ROWS = 96, 16, 65_536
RECORD = "ruadapt.json"


def init(
    base: Folder,
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    out: Out,
    norm_correction: Annotated[bool, typer.Option(help="Scale new rows to their pieces' mean norm.")] = False,
    link: Link = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Give a base model a new vocabulary: rows of new tokens are means of old rows."""
    base = _fetched(dry_run, as_json, base=base)["base"]

    def work(folder: Path, scratch: Path) -> dict[str, Any]:
        report = checkpoints.initialise(base, tokenizer, folder, norm_correction=norm_correction, link=link)
        return {"report": report, "verified": checkpoints.verify(folder, base, kept="shared")}

    needs = _needs({"base": base}, base, tokenizer, rows(load_tokenizer(tokenizer)), link=link)
    if not _only_told(out, needs, as_json, dry_run):
        sources = {"base": base, "tokenizer": tokenizer}
        _produce("init", sources, out, {"norm_correction": norm_correction}, work, as_json)


def lep(
    base: Folder,
    instruct: Annotated[Path, typer.Argument(help="The instruct model tuned from the base.")],
    adapted: Annotated[Path, typer.Argument(help="The adapted base, or its peft adapter.")],
    out: Out,
    method: Annotated[
        str, typer.Option(help=f"{mathematics.AUTO}, {', '.join(mathematics.METHODS)}.")
    ] = "conversion",
    strength: Annotated[float, typer.Option(help="Share of the change that is made; 0 is swap.")] = 1.0,
    body_scale: Annotated[
        float, typer.Option(help="Share of the body's change that is made; 0: none.")
    ] = 1.0,
    adapted_base: Annotated[
        Path | None, typer.Option(help="The model that the adapter was trained on; else its config says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take models that look like strangers.")] = False,
    device: Annotated[str, typer.Option(help="Where matrices are multiplied: cpu or cuda.")] = "cpu",
    link: Link = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Carry what an adapted base learnt into the instruct model (Learned Embedding Propagation).

    The embeddings go through the method; a body that was trained with them, W_b^ru, goes as
    W_i + BODY_SCALE (W_b^ru - W_b), tensor by tensor.
    """
    mathematics.require_known(method, mathematics.AUTO)
    sources = _fetched(dry_run, as_json, base=base, instruct=instruct, adapted=adapted)
    base, instruct, adapted = sources.values()
    adapter = adapters.Adapter(adapted) if adapters.is_adapter(adapted) else None
    trained_on = adapters.trained_on(adapter, adapted_base) if adapter else adapted
    words = adapted if (adapted / "tokenizer.json").is_file() else trained_on
    body = AdaptedBody(read_layout(trained_on), adapter)
    height = adapter.height(body.layout) if adapter else body.layout.height()
    options = {"method": method, "strength": strength, "body_scale": body_scale, "force": force}

    def work(folder: Path, scratch: Path) -> dict[str, Any]:
        if adapter:
            adapters.merge(trained_on, adapter, scratch, words, body=False)
        report = checkpoints.propagate(
            base,
            instruct,
            scratch if adapter else adapted,
            folder,
            method,
            strength=strength,
            force=force,
            body_scale=body_scale,
            adapted_body=body,
            link=link,
            device=device,
        )
        changed = report["body"]["tensors"]
        return {"report": report, "verified": checkpoints.verify(folder, instruct, changed=changed)}

    changed = body.changed(read_layout(base)) if dry_run and body_scale else []
    read = {"base": base, "instruct": instruct, "adapted": trained_on}
    needs = _needs(read, instruct, words, height, changed, link=link, fits=True)
    if not _only_told(out, needs, as_json, dry_run):
        _produce("lep", sources, out, options, work, as_json)


def verify(
    folder: Folder,
    source: Annotated[Path | None, typer.Argument(help="The model it was made from.")] = None,
    kept: Annotated[str, typer.Option(help="Rows that must be the source's: special or shared.")] = "special",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Reload a model folder, check it, and compare it with its source.

    Tensors of the body that the folder's ruadapt.json names as changed by LEP are not compared.
    """
    found = _fetched(dry_run, as_json, folder=folder, **({"source": source} if source else {}))
    folder, source = found["folder"], found.get("source")
    if dry_run:
        reads = {role: _read(read_layout(path)) for role, path in found.items()}
        return show({"reads": reads, "reloads": fits_memory(folder)}, as_json)
    made = read_json(folder / RECORD).get("report", {}) if source and (folder / RECORD).is_file() else {}
    changed = made.get("body", {}).get("tensors", [])
    show(checkpoints.verify(folder, source, kept=kept, changed=changed), as_json)


def _fetched(dry_run: bool, as_json: bool, **models: Path) -> dict[str, Path]:
    """Return the models' folders; a dry run stops at models that would be downloaded first, and says so."""
    if dry_run and (sizes := {role: size for role, name in models.items() if (size := download_bytes(name))}):
        show({"downloaded_bytes": sizes, "free_bytes": psutil.disk_usage(str(Path.home())).free}, as_json)
        raise typer.Exit()
    return {role: fetch_model(name) for role, name in models.items()}


def _only_told(out: Path, needs: dict[str, Any], as_json: bool, dry_run: bool) -> bool:
    """Check the target and the disk; in a dry run say what is needed instead of doing the work."""
    require_new_folder(out)
    if dry_run:
        show(needs, as_json)
    else:
        require_disk_space(out, needs["written_bytes"])
    return dry_run


def _produce(
    command: str,
    sources: dict[str, Path],
    out: Path,
    options: dict[str, Any],
    work: Callable[[Path, Path], dict[str, Any]],
    as_json: bool,
) -> None:
    """Let `work(folder, scratch)` write a model, add the record of its making, and rename it to `out`."""
    with atomic_folder(out) as part:
        found = work(part / "model", part / "scratch")
        record = {"command": f"ruadapt {command}", "options": options}
        record |= {"made_from": {role: origin(path) for role, path in sources.items()}, **found}
        write_json(part / "model" / RECORD, record | {"versions": versions()})
        shutil.rmtree(part / "scratch", ignore_errors=True)
        for path in (part / "model").iterdir():
            path.rename(part / path.name)
        (part / "model").rmdir()
    show(found | {"folder": str(out)}, as_json)


def _needs(
    sources: dict[str, Path],
    source: Path,
    tokenizer: Path,
    height: int,
    changed: Iterable[str] = (),
    *,
    link: bool,
    fits: bool = False,
) -> dict[str, Any]:
    """What a model of `height` rows and some `changed` tensors, made from `source`, takes to make, in bytes.

    Memory is an estimate beside what the libraries take: the embeddings that are read and blocks of rows;
    where a map is fitted, also the fit's own matrices and blocks.

    Raises:
        RuadaptError: the tokenizer has more ids than rows, or lacks a token that the source's configs name.
    """
    layout, new = read_layout(source), load_tokenizer(tokenizer)
    require_rows(tokenizer, new, height)
    new_configs(source, load_tokenizer(source), new, height)

    def nothing(first: int, last: int) -> torch.Tensor:
        return torch.empty(0)

    roles = ["input"] if layout.tied else ["input", "head"]
    shards = plan(layout, height, dict.fromkeys(roles, nothing), dict.fromkeys(changed, nothing))
    reads = {role: _read(read_layout(path)) for role, path in sources.items()}
    memory = sum(read["embedding_bytes"] for read in reads.values()) + BLOCKS * BLOCK_BYTES
    if fits:
        width = layout.stored[layout.input_name].shape[1]
        memory += 8 * width * (FIT_MATRICES * width + FIT_ROWS)
    return {
        "reads": reads,
        "written_bytes": planned_bytes(layout, shards, link=link),
        "memory_bytes": memory,
    }


def _read(layout: Layout) -> dict[str, Any]:
    body = sum(tensor.size for tensor in layout.body().values())
    return {
        "folder": str(layout.folder),
        "shards": len(layout.shards()),
        "embedding_bytes": sum(tensor.size for tensor in layout.stored.values()) - body,
        "body_bytes": body,
    }
