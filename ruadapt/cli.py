"""The command `ruadapt`."""

from typing import Annotated

import typer

from ruadapt.commands import measurements, publishing, surgery
from ruadapt.commands.tokenizer import app as tokenizer_app
from ruadapt.console import Group, show
from ruadapt.pipeline.runner import Pipeline, run_profile

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


@app.command()
def run(
    profile: Annotated[str, typer.Argument(help="A file in profiles/: mini, smoke, text.")],
    first: Annotated[str | None, typer.Option("--from", help="Stage to start at: 03, tokenizers.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stage to stop after.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, its value in YAML.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run fresh stages too, from nothing; what they made is kept in stale/."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate downloads, disk, memory and hours, and stop.")
    ] = False,
    devices: Annotated[int, typer.Option(help="Devices of the estimate.")] = 1,
    teraflops: Annotated[float, typer.Option(help="Peak of one of them, dense bfloat16.")] = 312.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Execute the stages of a profile that are not fresh, into runs/PROFILE."""
    if dry_run:
        from ruadapt.commands.estimates import Machine, estimate  # builds models' shapes: slow to import

        report = estimate(profile, settings or (), Machine(devices, teraflops))
        return show(report, as_json)
    run_profile(profile, first, last, settings or (), force, announce=lambda line: typer.echo(line))


@app.command()
def stages(
    profile: Annotated[str, typer.Argument(help="The profile whose run is looked at.")] = "mini",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, its value in YAML.")
    ] = None,
) -> None:
    """List the notebooks, their parameters, and what would run."""
    pipeline = Pipeline(profile, settings or ())
    reasons = pipeline.states()
    for stage in pipeline.stages:
        typer.echo(f"{stage.name}: {reasons[stage.name] or 'fresh'}")
        for name, value in stage.defaults.items():
            typer.echo(f"    {name} = {value!r}")


if __name__ == "__main__":
    app()
