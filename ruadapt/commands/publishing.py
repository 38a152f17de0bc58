"""The command `ruadapt publish`: a finished model as a folder for the hub, uploaded only on request."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ruadapt.console import show
from ruadapt.files import require_new_folder


def publish(
    folder: Annotated[Path, typer.Argument(help="Model folder, of a run or any other.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the hub.")],
    out: Annotated[Path | None, typer.Option(help="Write the complete folder here.")] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Upload it. Without it nothing leaves this machine.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str, typer.Option(help="Where the models' own is not known here.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a model, write its card, and upload both if asked; otherwise say what would be uploaded."""
    from ruadapt.checkpoints.verification import fits_memory, verify
    from ruadapt.commands.model_card import model_card, published_files, upload, write_folder

    card = model_card(folder, repo, licence)
    report: dict[str, Any] = {
        "repo": repo,
        "files": {path.name: path.stat().st_size for path in published_files(folder)},
        "verified": verify(folder, reload=fits_memory(folder)),
        "pushed": False,
    }
    if out is not None:
        require_new_folder(out)
        write_folder(folder, out, card)
    if push:
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=folder.parent) as beside:
            whole = out or write_folder(folder, Path(beside) / "model", card)
            report["pushed"] = upload(whole, repo, private)
    show(report | {"card": str(card)} if as_json else report, as_json)
    if not (as_json or push or out):
        typer.echo(f"\n{card}")
