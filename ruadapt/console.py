"""What all commands share: their records, and how they show what they found."""

import json
from typing import Annotated, Any

import typer
import yaml

RECORD = "ruadapt.json"
"""What `init` and `lep` leave beside a model: how it was made."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as YAML, or as JSON."""
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        typer.echo(yaml.safe_dump(report, allow_unicode=True, sort_keys=False, width=110).rstrip())
