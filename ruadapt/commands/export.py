"""The command `ruadapt export gguf`: a model folder for llama.cpp and what is built on it."""

from pathlib import Path
from typing import Annotated

import typer

from ruadapt.console import AsJson, show

app = typer.Typer(no_args_is_help=True, help="Write a model in the format of other programs.")


@app.callback()
def export() -> None:
    """Write a model in the format of other programs."""


@app.command()
def gguf(
    folder: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Argument(help="The new file, such as model-q8_0.gguf.")],
    kind: Annotated[str, typer.Option("--type", help="f32, f16, bf16 or q8_0.")] = "bf16",
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's folder, with convert_hf_to_gguf.py; else an installed one."),
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="The original, for rules that ruadapt does not know by name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model folder as a GGUF file by llama.cpp's own converter, and compare what llama.cpp reads."""
    from ruadapt.checkpoints.gguf_export import export_gguf
    from ruadapt.commands.publishing import read_record

    run, surgery = read_record(folder).values()
    values = {name: value for stage in run.values() for name, value in stage.items()}
    models = [values[name] for name in ("base_model", "instruct_model") if values.get(name)]
    record = surgery | ({"command": "ruadapt run", "models": models, "run": run} if run else {})
    found = export_gguf(folder, out, kind, converter=converter, original=original, record=record)
    show(found, as_json)
