"""The command `ruadapt`; what takes seconds to import is imported by the commands that need it."""

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ruadapt.commands import measurements, models, tokenizer
from ruadapt.console import AsJson, show
from ruadapt.errors import RuadaptError


class Commands(TyperGroup):
    """Ends a command with the message of a person's mistake and exit code 2, and with 130 after Ctrl-C.

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
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="Adapt an open language model to Russian, stage by stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tokenizer.app, name="tokenizer")
app.command()(models.init)
app.command()(models.lep)
app.command()(models.verify)
app.command()(measurements.evaluate)
app.command()(measurements.speed)
app.command()(measurements.scripts)
app.command()(measurements.arena)
app.command()(models.export)
app.command()(models.publish)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A parameter; lists and switches in YAML."),
]


@app.command()
def run(
    profile: Annotated[str, typer.Argument(help="A file in profiles/: mini, smoke, text.")],
    first: Annotated[str | None, typer.Option("--from", help="Stage to start at: 03, tokenizers.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stage to stop after.")] = None,
    settings: Settings = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run fresh stages too, from nothing; what they made is kept in stale/."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it downloads, writes and holds in memory, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Execute the stages of a profile that are not fresh, into runs/PROFILE."""
    if dry_run:
        from ruadapt.commands.estimates import estimate

        return show(estimate(profile, settings or ()), as_json)
    from ruadapt.pipeline.runner import run_profile

    run_profile(profile, first, last, settings or (), force, announce=typer.echo)


@app.command()
def stages(
    profile: Annotated[str, typer.Argument(help="The profile whose run is looked at.")] = "mini",
    settings: Settings = None,
) -> None:
    """List the notebooks, their parameters, and what would run."""
    from ruadapt.pipeline.runner import Pipeline

    pipeline = Pipeline(profile, settings or ())
    reasons = pipeline.states()
    for stage in pipeline.stages:
        typer.echo(f"{stage.name}: {reasons[stage.name] or 'fresh'}")
        for name, value in stage.defaults.items():
            typer.echo(f"    {name} = {value!r}")


if __name__ == "__main__":
    app()
