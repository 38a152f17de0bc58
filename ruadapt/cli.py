"""The command `ruadapt`: what a subcommand computes with is imported when it is called."""

from typing import Annotated

import typer

from ruadapt.commands import measurements, publishing, surgery
from ruadapt.commands.tokenizer import app as tokenizer_app
from ruadapt.console import Group, show

app = typer.Typer(
    cls=Group,
    help="Adapt an open language model to Russian, stage by stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tokenizer_app, name="tokenizer")
for command in (
    *(surgery.init, surgery.lep, surgery.verify),
    *(measurements.evaluate, measurements.speed, measurements.scripts, measurements.arena),
    publishing.publish,
):
    app.command()(command)

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, its value in YAML.")
]


@app.command()
def run(
    profile: Annotated[str, typer.Argument(help="A file in profiles/: mini, smoke, text.")],
    first: Annotated[str | None, typer.Option("--from", help="Stage to start at: 03, tokenizers.")] = None,
    last: Annotated[str | None, typer.Option("--to", "--until", help="Stage to stop after.")] = None,
    settings: Settings = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run fresh stages too, from nothing; what they made is kept in stale/."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it downloads, writes and holds in memory, and stop.")
    ] = False,
    devices: Annotated[int, typer.Option(help="Devices that share a batch, for the dry run.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the dry run as JSON.")] = False,
) -> None:
    """Execute the stages of a profile that are not fresh, into runs/PROFILE."""
    if dry_run:
        from ruadapt.commands.estimates import estimate

        return show(estimate(profile, settings or (), devices), as_json)
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
