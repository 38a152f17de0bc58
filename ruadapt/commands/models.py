"""The commands `ruadapt init | lep | verify | export gguf | publish`: model folders from the shell."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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
    from ruadapt import checkpoints

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
    method: Annotated[str, typer.Option(help="How rows are mapped; a wrong name lists all.")] = "conversion",
    body_scale: Annotated[
        float, typer.Option(help="Share of the body's change that is made; 0: none.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Take models that look like strangers.")] = False,
    device: Annotated[str, typer.Option(help="Where matrices are multiplied: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Carry what an adapted base learnt into the instruct model (Learned Embedding Propagation).

    The embeddings go through the method; a body that was trained with them, W_b^ru, goes as
    W_i + BODY_SCALE (W_b^ru - W_b), tensor by tensor.
    """
    from ruadapt import checkpoints
    from ruadapt.checkpoints import adapters
    from ruadapt.lep import named

    named(method)
    sources = _fetched(out, dry_run, base=base, instruct=instruct, adapted=adapted)
    base, instruct, adapted = sources.values()
    adapter = adapted if adapters.is_adapter(adapted) else None
    trained_on = adapters.trained_on(adapter) if adapter else adapted
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
    as_json: AsJson = False,
) -> None:
    """Reload a model folder, check it, and compare it with its source.

    The folder's ruadapt.json tells what must be the source's: after `init` the rows of all shared tokens,
    else those of special tokens, and the tensors of the body that LEP did not change.
    """
    from ruadapt import checkpoints

    folder, source = fetch_model(folder), fetch_model(source) if source else None
    record = read_json(folder / RECORD, {})
    changed = record.get("report", {}).get("body", {}).get("tensors", [])
    kept: Any = "shared" if record.get("command") == "ruadapt init" else "special"
    show(checkpoints.verify(folder, source, kept=kept, changed=changed), as_json)


def export(
    form: Annotated[Literal["gguf"], typer.Argument(help="The format of the file.")],
    folder: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Argument(help="The new file, such as model-q8_0.gguf.")],
    converter: Annotated[Path, typer.Option(help="llama.cpp's folder, with convert_hf_to_gguf.py.")],
    kind: Annotated[str, typer.Option("--type", help="f32, f16, bf16 or q8_0.")] = "bf16",
    original: Annotated[
        Path | None, typer.Option(help="The original, for rules that ruadapt does not know by name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model folder as a GGUF file by llama.cpp's own converter."""
    from ruadapt.checkpoints.gguf_export import export_gguf
    from ruadapt.commands.publishing import read_record

    options: dict[str, Any] = {"converter": converter, "original": original, "record": read_record(folder)}
    show(export_gguf(folder, out, kind, **options), as_json)


def publish(
    folder: Annotated[Path, typer.Argument(help="Model folder, of a run or any other.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the hub.")],
    push: Annotated[
        bool, typer.Option("--push", help="Upload it. Without it nothing leaves this machine.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str, typer.Option(help="Where the models' own is not known here.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a model, write its card, and upload both if asked; otherwise say what would be uploaded."""
    from ruadapt import checkpoints
    from ruadapt.commands.publishing import model_card, published_files, upload

    card, names = model_card(folder, repo, licence), published_files(folder)
    report: dict[str, Any] = {
        "repo": repo,
        "files": {name: (folder / name).stat().st_size for name in names},
        "verified": checkpoints.verify(folder),
        "pushed": upload(folder, names, card, repo, private) if push else False,
    }
    show(report | {"card": str(card)} if as_json else report, as_json)
    if not as_json:
        typer.echo(f"\n{card}")


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
    from ruadapt.checkpoints.model_folders import read_layout

    layout, height = read_layout(source), rows(load_tokenizer(tokenizer))
    body = sum(tensor.nbytes for tensor in layout.body().values())
    embeddings = layout.size() - body
    return {
        "reads": {role: read_layout(folder).size() for role, folder in models.items()},
        "written": body + embeddings * height // layout.height(),
    }
