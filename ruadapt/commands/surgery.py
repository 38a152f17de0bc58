"""The commands `ruadapt init | lep | verify | patch`: checkpoint surgery from the shell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from ruadapt import checkpoints
from ruadapt import lep as mathematics
from ruadapt.checkpoints import adapters, patches
from ruadapt.checkpoints.bodies import AdaptedBody
from ruadapt.checkpoints.hub import download_bytes, fetch_model
from ruadapt.checkpoints.model_configs import new_configs
from ruadapt.checkpoints.model_folders import Layout, plan, planned_bytes, read_layout, require_rows
from ruadapt.checkpoints.tensor_files import BLOCK_BYTES, Blocks
from ruadapt.checkpoints.verification import fits_memory
from ruadapt.console import Group, show
from ruadapt.files import (
    atomic_folder,
    atomic_write,
    read_json,
    require_disk_space,
    require_new_folder,
    write_json,
)
from ruadapt.reporting.provenance import versions
from ruadapt.vocab import load_tokenizer, rows

patch_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Keep a changed vocabulary as a small patch of the original model."
)

Folder = Annotated[Path, typer.Argument(help="Model folder or hub name, OWNER/NAME[@REVISION].")]
Patch = Annotated[Path, typer.Argument(help="Patch folder.")]
Out = Annotated[Path, typer.Argument(help="New or empty folder for the result.")]
Link = Annotated[bool, typer.Option("--link", help="Share unchanged files with the source by hard links.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be read, written and held, and stop."),
]
# Blocks that are alive at once: gathered old rows and new rows in float64, the cast copy.
BLOCKS_ALIVE = 24
# Square float64 matrices and float64 rows that a fit holds.
FIT_MATRICES, FIT_ROWS = 16, 65_536
CARD = """---
library_name: transformers
base_model: {base}
tags: [ruadapt]
---

# {name}

Written by ruadapt {version}, `{command}`, from {sources}. Their model cards are not repeated here;
their licences hold.

| option | value |
|---|---|
{options}

```json
{numbers}
```

Everything that is known about its making is in `ruadapt.json`.
"""


def init(
    base: Folder,
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    out: Out,
    norm_correction: Annotated[bool, typer.Option(help="Scale new rows to their pieces' mean norm.")] = False,
    decay: Annotated[float, typer.Option(help="Piece i weighs exp(-decay i).")] = 0.0,
    space_weight: Annotated[float, typer.Option(help="Weight of a piece that is only spaces.")] = 1.0,
    head_from_input: Annotated[bool, typer.Option(help="Make the head from the input rows, too.")] = False,
    link: Link = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Give a base model a new vocabulary: rows of new tokens are means of old rows."""
    base = _fetched(dry_run, as_json, base=base)["base"]
    options: dict[str, Any] = {
        "norm_correction": norm_correction,
        "decay": decay,
        "space_weight": space_weight,
        "head_from_input": head_from_input,
    }

    def work(folder: Path, scratch: Path) -> dict[str, Any]:
        report = checkpoints.initialise(base, tokenizer, folder, **options, link=link)
        return {"report": report, "verified": checkpoints.verify_initialised(folder, base)}

    needs = _needs({"base": base}, base, tokenizer, link=link)
    _produce("init", {"base": base, "tokenizer": tokenizer}, out, options, needs, work, as_json, dry_run)


def lep(
    base: Annotated[Path, typer.Option(help="The original base model.")],
    instruct: Annotated[Path, typer.Option(help="The instruct model tuned from it.")],
    adapted: Annotated[Path, typer.Option(help="The adapted base, or its peft adapter.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the result.")],
    method: Annotated[
        str, typer.Option(help=f"{mathematics.AUTO}, {', '.join(mathematics.METHODS)}.")
    ] = "conversion",
    strength: Annotated[float, typer.Option(help="Share of the change that is made; 0 is swap.")] = 1.0,
    norm_correction: Annotated[
        bool, typer.Option(help="Let row norms change as the old rows' norms did.")
    ] = False,
    adapted_base: Annotated[
        Path | None, typer.Option(help="The model that the adapter was trained on; else its config says.")
    ] = None,
    body_scale: Annotated[
        float, typer.Option(help="Share of the body's change that is made; 0: none.")
    ] = 1.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The adapted model's tokenizer, to be checked.")
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
    found = _fetched(dry_run, as_json, base=base, instruct=instruct, adapted=adapted)
    base, instruct, adapted = found["base"], found["instruct"], found["adapted"]
    options = {
        "method": method,
        "strength": strength,
        "norm_correction": norm_correction,
        "body_scale": body_scale,
        "force": force,
    }
    mathematics.require_known(method, mathematics.AUTO)
    adapter = adapters.Adapter(adapted) if adapters.is_adapter(adapted) else None
    trained_on = adapters.trained_on(adapter, adapted_base) if adapter else adapted
    words = adapted if (adapted / "tokenizer.json").is_file() else trained_on
    height = adapter.height(read_layout(trained_on)) if adapter else read_layout(adapted).height()
    body = AdaptedBody(read_layout(trained_on), adapter)

    def work(folder: Path, scratch: Path) -> dict[str, Any]:
        scratch.mkdir()
        rows_folder = adapted
        if adapter:
            rows_folder = scratch / "rows"
            adapters.merge(trained_on, adapter, rows_folder, words, body=False)
        report = checkpoints.propagate(
            base,
            instruct,
            rows_folder,
            folder,
            method,
            options=mathematics.Options(strength=strength, norm_correction=norm_correction),
            tokenizer=tokenizer,
            force=force,
            body_scale=body_scale,
            adapted_body=body,
            link=link,
            device=device,
        )
        return {"report": report, "verified": checkpoints.verify_propagated(folder, instruct, report)}

    sources = {"base": base, "instruct": instruct, "adapted": adapted}
    read = {"base": base, "instruct": instruct, "adapted": trained_on}
    needs = _needs(read, instruct, words, height, link=link, fits=True)
    _produce("lep", sources, out, options, needs, work, as_json, dry_run)


def verify(
    folder: Folder,
    source: Annotated[Path | None, typer.Option(help="The model it was made from.")] = None,
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
    record = folder / "ruadapt.json"
    made = read_json(record).get("report", {}) if source and record.is_file() else {}
    changed = made.get("body", {}).get("tensors", [])
    reload = fits_memory(folder)
    show(checkpoints.verify(folder, source, kept=kept, changed=changed, reload=reload), as_json)


@patch_app.command()
def make(
    original: Folder, adapted: Folder, out: Out, as_json: AsJson = False, dry_run: DryRun = False
) -> None:
    """Save what an adapted model changed in the original."""
    found = _fetched(dry_run, as_json, original=original, adapted=adapted)
    original, adapted = found["original"], found["adapted"]
    needs = {"reads": [_read(read_layout(path)) for path in (original, adapted)]}
    _run(out, needs, lambda: patches.make(original, adapted, out), as_json, dry_run)


@patch_app.command()
def apply(
    patch: Patch,
    original: Folder,
    out: Out,
    link: Link = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Make the adapted model from the original and a patch, bit for bit."""
    original = _fetched(dry_run, as_json, original=original)["original"]
    needs = patches.needs(patch, "adapted", link=link)
    _run(out, needs, lambda: patches.apply(patch, original, out, link=link), as_json, dry_run)


@patch_app.command()
def revert(
    patch: Patch,
    adapted: Folder,
    out: Out,
    link: Link = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Make the original from the adapted model and a patch, bit for bit."""
    adapted = _fetched(dry_run, as_json, adapted=adapted)["adapted"]
    needs = patches.needs(patch, "original", link=link)
    _run(out, needs, lambda: patches.revert(patch, adapted, out, link=link), as_json, dry_run)


def _fetched(dry_run: bool, as_json: bool, **models: Path) -> dict[str, Path]:
    """Return the models' folders; a dry run stops at models that would be downloaded first, and says so."""
    if dry_run and (sizes := {role: size for role, name in models.items() if (size := download_bytes(name))}):
        show({"downloaded_bytes": sizes, "free_bytes": psutil.disk_usage(str(Path.home())).free}, as_json)
        raise typer.Exit()
    return {role: fetch_model(name) for role, name in models.items()}


def _run(
    out: Path, needs: dict[str, Any], work: Callable[[], dict[str, Any]], as_json: bool, dry_run: bool
) -> None:
    """Check the target, say what is needed or do the work, and print its report."""
    require_new_folder(out)
    show(needs if dry_run else work() | {"folder": str(out)}, as_json)


def _produce(
    command: str,
    sources: dict[str, Path],
    out: Path,
    options: dict[str, Any],
    needs: dict[str, Any],
    work: Callable[[Path, Path], dict[str, Any]],
    as_json: bool,
    dry_run: bool,
) -> None:
    """Let `work(folder, scratch)` fill a folder, add its record and card, and rename it to `out`."""

    def whole() -> dict[str, Any]:
        require_disk_space(out, needs["written_bytes"])
        with atomic_folder(out) as part:
            model, scratch = part / "model", part / "scratch"
            found = work(model, scratch)
            record = {
                "command": f"ruadapt {command}",
                "options": options,
                "made_from": {role: patches.origin(path) for role, path in sources.items()},
                **found,
                "versions": versions(),
            }
            write_json(model / "ruadapt.json", record)
            atomic_write(model / "README.md", _card(out.name, record))
            shutil.rmtree(scratch, ignore_errors=True)
            for path in model.iterdir():
                path.rename(part / path.name)
            model.rmdir()
        return found

    _run(out, needs, whole, as_json, dry_run)


def _needs(
    sources: dict[str, Path],
    source: Path,
    tokenizer: Path,
    height: int | None = None,
    *,
    link: bool,
    fits: bool = False,
) -> dict[str, Any]:
    """What a model with `height` rows (or the tokenizer's), made from `source`, takes to make, in bytes.

    Memory is an estimate beside what the libraries take: the embeddings that are read and blocks of rows;
    where a map is fitted, also the fit's own matrices and blocks.
    """
    layouts = {role: read_layout(path) for role, path in sources.items()}
    layout = read_layout(source)
    new = load_tokenizer(tokenizer)
    height = height or rows(new)
    require_rows(tokenizer, new, height)
    new_configs(
        source, load_tokenizer(source), new, height
    )  # refuses a tokenizer that lacks a token of theirs
    roles = ["input"] if layout.tied else ["input", "head"]
    shards = plan(layout, height, dict.fromkeys(roles, lambda first, last: torch.empty(0)))
    reads = {role: _read(found) for role, found in layouts.items()}
    memory = sum(read["embedding_bytes"] for read in reads.values()) + BLOCKS_ALIVE * BLOCK_BYTES
    if fits:
        parts = [part for tensors in shards.values() for part in (tensors or {}).values()]
        width = next(part.shape[1] for part in parts if isinstance(part, Blocks))
        memory += 8 * width * (FIT_MATRICES * width + FIT_ROWS)
    return {
        "reads": reads,
        "written_bytes": planned_bytes(layout, shards, link=link),
        "memory_bytes": memory,
    }


def _read(layout: Layout) -> dict[str, Any]:
    sizes = {name: stored.size for name, stored in layout.stored().items()}
    return {
        "folder": str(layout.folder),
        "shards": len(layout.shards()),
        "embedding_bytes": sum(sizes[name] for name in layout.embedding_names()),
        "body_bytes": sum(sizes[name] for name in sizes.keys() - layout.embedding_names()),
    }


def _card(name: str, record: dict[str, Any]) -> str:
    sources = record["made_from"]
    named = [
        f"{role} `{source['name']}`" + (f" (revision `{source['revision']}`)" if source["revision"] else "")
        for role, source in sources.items()
    ]
    numbers = {
        "report": _main(record["report"]),
        "verified": record["verified"],
        "versions": record["versions"],
    }
    return CARD.format(
        base=sources.get("instruct", sources["base"])["name"],
        name=name,
        version=record["versions"]["ruadapt"],
        command=record["command"],
        sources=", ".join(named),
        options="\n".join(f"| {key} | {value} |" for key, value in record["options"].items()),
        numbers=json.dumps(numbers, ensure_ascii=False, indent=2),
    )


def _main(report: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """The numbers and words of a report without its tables."""
    return {
        key: _main(value, depth - 1) if isinstance(value, dict) else value
        for key, value in report.items()
        if not isinstance(value, list) and not (isinstance(value, dict) and depth == 1)
    }
