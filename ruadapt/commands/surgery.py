"""The commands `ruadapt init | lep | verify`: checkpoint surgery from the shell."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ruadapt import checkpoints
from ruadapt import lep as mathematics
from ruadapt.checkpoints import adapters
from ruadapt.checkpoints.model_folders import read_layout
from ruadapt.console import RECORD, AsJson, show
from ruadapt.files import atomic_folder, read_json, require_new_folder, write_json
from ruadapt.hub import fetch_model, origin
from ruadapt.reporting.provenance import versions
from ruadapt.vocab import load_tokenizer, rows

Folder = Annotated[Path, typer.Argument(help="Model folder or hub name, OWNER/NAME[@REVISION].")]
Out = Annotated[Path, typer.Argument(help="New or empty folder for the result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be read and written, and stop.")]


def init(
    base: Folder,
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new tokenizer.")],
    out: Out,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Give a base model a new vocabulary: rows of new tokens are means of old rows."""
    sources = _fetched(out, dry_run, base=base)
    base = sources["base"]
    if dry_run:
        return show(_sizes(sources, base, tokenizer), as_json)

    def work(folder: Path) -> dict[str, Any]:
        report = checkpoints.initialise(base, tokenizer, folder)
        return {"report": report, "verified": checkpoints.verify(folder, base, kept="shared")}

    _produce("init", sources | {"tokenizer": tokenizer}, out, {}, work, as_json)


def lep(
    base: Folder,
    instruct: Annotated[Path, typer.Argument(help="The instruct model tuned from the base.")],
    adapted: Annotated[Path, typer.Argument(help="The adapted base, or its peft adapter.")],
    out: Out,
    method: Annotated[str, typer.Option(help=f"{', '.join(mathematics.METHODS)}.")] = "conversion",
    body_scale: Annotated[
        float, typer.Option(help="Share of the body's change that is made; 0: none.")
    ] = 1.0,
    adapted_base: Annotated[
        Path | None, typer.Option(help="The model that the adapter was trained on; else its config says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take models that look like strangers.")] = False,
    device: Annotated[str, typer.Option(help="Where matrices are multiplied: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Carry what an adapted base learnt into the instruct model (Learned Embedding Propagation).

    The embeddings go through the method; a body that was trained with them, W_b^ru, goes as
    W_i + BODY_SCALE (W_b^ru - W_b), tensor by tensor.
    """
    mathematics.named(method)
    sources = _fetched(out, dry_run, base=base, instruct=instruct, adapted=adapted)
    base, instruct, adapted = sources.values()
    adapter = adapted if adapters.is_adapter(adapted) else None
    trained_on = adapters.trained_on(adapter, adapted_base) if adapter else adapted
    words = adapted if (adapted / "tokenizer.json").is_file() else trained_on
    if dry_run:
        return show(_sizes(sources | {"adapted": trained_on}, instruct, words), as_json)
    options: dict[str, Any] = {"method": method, "body_scale": body_scale, "force": force}

    def work(folder: Path) -> dict[str, Any]:
        whole = adapted
        if adapter:
            whole = folder.with_name("merged")
            adapters.merge(trained_on, adapter, whole, words)
        report = checkpoints.propagate(base, instruct, whole, folder, device=device, **options)
        changed = report["body"]["tensors"]
        return {"report": report, "verified": checkpoints.verify(folder, instruct, changed=changed)}

    _produce("lep", sources, out, options, work, as_json)


def verify(
    folder: Folder,
    source: Annotated[Path | None, typer.Argument(help="The model it was made from.")] = None,
    kept: Annotated[
        Literal["special", "shared"], typer.Option(help="Tokens whose rows must be the source's.")
    ] = "special",
    as_json: AsJson = False,
) -> None:
    """Reload a model folder, check it, and compare it with its source.

    Tensors of the body that the folder's ruadapt.json names as changed by LEP are not compared.
    """
    folder, source = fetch_model(folder), fetch_model(source) if source else None
    changed = read_json(folder / RECORD, {}).get("report", {}).get("body", {}).get("tensors", [])
    show(checkpoints.verify(folder, source, kept=kept, changed=changed), as_json)


def _produce(
    command: str,
    sources: dict[str, Path],
    out: Path,
    options: dict[str, Any],
    work: Callable[[Path], dict[str, Any]],
    as_json: bool,
) -> None:
    """Let `work(folder)` write a model, add the record of its making, and rename it to `out`."""
    with atomic_folder(out) as folder:
        found = work(folder)
        record = {"command": f"ruadapt {command}", "options": options}
        record |= {"made_from": {role: origin(path) for role, path in sources.items()}, **found}
        write_json(folder / RECORD, record | {"versions": versions()})
    show(found | {"folder": str(out)}, as_json)


def _fetched(out: Path, dry_run: bool, **names: Path) -> dict[str, Path]:
    """Return the models' folders, downloaded where need be. A dry run only looks into the cache."""
    if not dry_run:
        require_new_folder(out)
    return {role: fetch_model(name, download=not dry_run) for role, name in names.items()}


def _sizes(models: dict[str, Path], source: Path, tokenizer: Path) -> dict[str, Any]:
    """The bytes of the models that are read and of the one that is made from `source`, from headers."""
    layout, height = read_layout(source), rows(load_tokenizer(tokenizer))
    body = sum(tensor.size for tensor in layout.body().values())
    embeddings = layout.size() - body
    return {
        "reads": {role: read_layout(folder).size() for role, folder in models.items()},
        "written": body + embeddings * height // layout.height(),
    }
