"""What all commands share: a person's mistake is one message and an exit code, never a traceback."""

import json
import os
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from ruadapt.errors import RuadaptError

INTERRUPTED = 130
RECORD = "ruadapt.json"
"""What `init` and `lep` leave beside a model: how it was made."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Group(TyperGroup):
    """Ends a command with the error's message and exit code, and with 130 after Ctrl-C.

    `~` is the home also where no shell reads it as that: in quotes, and after `=`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parts = (argument.rpartition("=") for argument in args)
        return super().parse_args(ctx, ["".join([*start, os.path.expanduser(end)]) for *start, end in parts])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RuadaptError as error:
            typer.echo(f"ruadapt: {error}", err=True)
            raise typer.Exit(2) from None
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("ruadapt"):
                raise
            extras = "pip install 'ruadapt[training,evaluation,notebooks]'"
            typer.echo(f"ruadapt: {error.name} is missing; it comes with an extra: {extras}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("ruadapt: stopped; the same command goes on from here", err=True)
            raise typer.Exit(INTERRUPTED) from None


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as YAML, or as JSON."""
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        typer.echo(yaml.safe_dump(report, allow_unicode=True, sort_keys=False, width=110).rstrip())
