"""A finished model as a folder for the hub: files, card, checks; uploaded only on request."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
import yaml

from ruadapt.checkpoints.model_configs import CONFIGS
from ruadapt.checkpoints.model_folders import INDEX, TOKENIZER_FILES
from ruadapt.checkpoints.tensor_files import place_file
from ruadapt.checkpoints.verification import fits_memory, verify
from ruadapt.console import show
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import FOLDERS
from ruadapt.evaluation.statistics import MICRO
from ruadapt.files import (
    atomic_folder,
    atomic_write,
    project_root,
    read_json,
    require_new_folder,
    write_json,
)
from ruadapt.pipeline.stages import UNTIL
from ruadapt.reporting.provenance import versions
from ruadapt.vocab.save import READER_FILE

# Licences by the hub's identifiers; any other is `other` with its name beside it.
LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0")
RECORD = "ruadapt.json"
CARD = """---
{front}---

# {name}

{base}, adapted to Russian with ruadapt ([arXiv 2412.21140](https://arxiv.org/abs/2412.21140)): a new
vocabulary, continued pre-training of the base model's embeddings, Learned Embedding Propagation into the
instruct model, calibration.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")
```

No code beside the libraries' own is needed.

## How it was made

| stage | parameter | value |
|---|---|---|
{method}

## Scores

{scores}

## Limits

The model keeps the limits of the models it was made from: it states things that are not so, and repeats
what its data say. Scores hold for the tasks named beside them and say nothing of others.{own_limits}

## Licence

{licence}. The licences of the models and data that it was made from hold for it, too.
"""

# What a reader of the card wants to know of each stage's parameters.
TOLD: tuple[str, ...] = (
    *("corpus_", "text_characters", "base_model", "instruct_model", "added_rows", "vocab_size", "keep_rows"),
    *("pretraining_", "lep_method", "calibration_", "lora_", "copy_share", "preference_"),
)


def publish(
    folder: Annotated[Path, typer.Argument(help="Model folder, of a run or any other.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the hub.")],
    out: Annotated[Path | None, typer.Option(help="Write the complete folder here.")] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Upload it. Without it nothing leaves this machine.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str, typer.Option(help="Where the models' own is not known here.")] = "",
    limits: Annotated[str, typer.Option(help="A sentence on this model's own limits.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a model, write its card, and upload both if asked; otherwise say what would be uploaded."""
    _require_name(repo)
    card = model_card(folder, repo, licence, limits)
    paths = published_files(folder)
    report: dict[str, Any] = {
        "repo": repo,
        "files": {path.name: path.stat().st_size for path in paths},
        "verified": verify(folder, reload=fits_memory(folder)),
        "pushed": False,
    }
    if out is not None:
        require_new_folder(out)
        write_folder(folder, out, card)
        report["folder"] = str(out)
    if push:
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=folder.parent) as name:
            whole = out
            if whole is None:
                whole = Path(name) / "model"
                write_folder(folder, whole, card)
            report["pushed"] = upload(whole, repo, private)
    elif out is None:
        report["card"] = card
    show(report if as_json else {name: value for name, value in report.items() if name != "card"}, as_json)
    if not as_json and "card" in report:
        typer.echo(f"\n{card}")


def published_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that loading it takes.

    Raises:
        RuadaptError: it is no complete model folder, has no chat template, or can be read only with code of
            its own, which users of transformers and vLLM would have to allow.
    """
    folder = Path(folder)
    wanted = [*CONFIGS, *TOKENIZER_FILES, INDEX]
    paths = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in wanted)]
    found = [path for path in paths if path.is_file()]
    names = {path.name for path in found}
    if not any(name.endswith(".safetensors") for name in names) or "tokenizer.json" not in names:
        raise RuadaptError(f"{folder} is no complete model folder: safetensors and tokenizer.json are needed")
    if READER_FILE in names or "auto_map" in read_json(folder / "tokenizer_config.json"):
        raise RuadaptError(
            f"{folder}: transformers reads this tokenizer beside this architecture only with code of the "
            "folder; publish a vocabulary that extends the original's"
        )
    return found


def write_folder(folder: Path, out: Path, card: str) -> None:
    """Write a model's files, its card and record into `out`; weights are shared by hard links if possible."""
    with atomic_folder(out) as target:
        for path in published_files(folder):
            place_file(path, target / path.name, link=path.suffix == ".safetensors")
        atomic_write(target / "README.md", card)
        record = {"made_by": versions(), "run": _parameters(run_of(folder))}
        write_json(target / RECORD, record | ({"surgery": made} if (made := _surgery(folder)) else {}))


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to the hub's repository, made where it is missing, and return the commit's address.

    Files of a model that was there before go with the same commit: transformers would take old weights in one
    file before new ones in shards.

    Raises:
        RuadaptError: not logged in, no right to write there, offline, or cut off.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Upload the model",
                delete_patterns=["model*.safetensors", INDEX, *CONFIGS, *TOKENIZER_FILES],
            )
        )
    except Exception as error:  # whatever hub, network and storage raise
        # The library says no more than which file it was, and keeps the reason behind it.
        told = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else str(error)
        raise RuadaptError(
            f"{repo} could not be uploaded ({' '.join(told.split())[:250]}); log in with `hf auth login`, "
            "set HF_HUB_OFFLINE=0, check the network, and give the same command again"
        ) from error


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RuadaptError(f"--repo {repo!r} is no OWNER/NAME of the hub: {error}") from error
    if repo.count("/") != 1:
        raise RuadaptError(f"--repo {repo!r} is no OWNER/NAME")


def run_of(folder: Path) -> Path | None:
    """Return the run that a model folder lies in, if it lies in one."""
    return next(
        (parent for parent in Path(folder).resolve().parents if (parent / "provenance").is_dir()), None
    )


def model_card(folder: Path, repo: str, licence: str = "", limits: str = "") -> str:
    """Return the card: what the model was made from and how, its scores with intervals, limits, licence.

    Parameters and scores are those of the run that `folder` lies in.

    Raises:
        RuadaptError: the licence of the models is not known here and not given.
    """
    run = run_of(folder)
    parameters = _parameters(run)
    values = {name: value for part in parameters.values() for name, value in part.items()}
    surgery = _surgery(folder)
    made_from = {role: source["name"] for role, source in surgery.get("made_from", {}).items()}
    sources = _hub_names(values.get(f"{role}_model") or made_from.get(role) for role in ("instruct", "base"))
    facts = read_json(project_root() / "data" / "models.json")
    known = {facts[name]["licence"] for name in sources if name in facts}
    if not sources and values.get("pair_dir") == "data/pair":
        known = {"apache-2.0"}
    if not licence and len(known) != 1:
        found = (
            f"the models have {', '.join(sorted(known))}" if known else "the models' own is not known here"
        )
        raise RuadaptError(f"name the licence with --licence: {found}")
    licence = licence or known.pop()
    data = [values.get(name) for name in ("calibration_dataset", "preference_dataset")]
    data = [*(domain["source"] for domain in values.get("corpus_mix", ())), *data]
    front: dict[str, Any] = {"license": licence} if licence in LICENCES else {"license": "other"}
    if licence not in LICENCES:
        front["license_name"] = licence
    front |= {"language": ["ru", "en"], "library_name": "transformers", "pipeline_tag": "text-generation"}
    if sources:
        front["base_model"] = sources
    if named := _hub_names(data):
        front["datasets"] = named
    told = [f"| this model | its folder in the run | {_place(folder, run)} |"] if run else []
    told += [
        f"| {stage} | {name} | {_short(value)} |"
        for stage, part in parameters.items()
        if stage < "08"
        for name, value in part.items()
        if name.startswith(TOLD) and value not in ("", [])
    ]
    told += [
        f"| {surgery['command']} | {name} | {_short(value)} |"
        for name, value in (made_from | surgery["options"] if surgery else {}).items()
    ]
    return CARD.format(
        front=yaml.safe_dump(front, allow_unicode=True, sort_keys=False),
        name=repo.split("/")[1],
        repo=repo,
        base=f"`{sources[0]}`" if sources else "An instruct model",
        method="\n".join(told)
        or "| | | not recorded: the folder lies in no run, and no command of ruadapt made it |",
        scores=_scores(folder, run),
        own_limits=f" {limits}" if limits else "",
        licence=licence,
    )


def _surgery(folder: Path) -> dict[str, Any]:
    """Return what `ruadapt init` or `lep` recorded of a folder they made; nothing of any other."""
    path = Path(folder) / RECORD
    found = read_json(path) if path.is_file() else {}
    return found if "made_from" in found else {}


def _parameters(run: Path | None) -> dict[str, dict[str, Any]]:
    """Return the notebooks' parameters by stage, places of one machine left out."""
    found = {}
    for path in sorted((run / "provenance").glob("*.json")) if run else []:
        values = read_json(path)["key"]["parameters"]
        found[path.stem] = {
            name: _told(value)
            for name, value in values.items()
            if name not in ("run_dir", UNTIL, "processes")
        }
    return found


def _hub_names(values: Iterable[Any]) -> list[str]:
    """Return those that are names on the hub, without revisions: it refuses a card with any other."""
    names = [value.partition("@")[0] for value in values if isinstance(value, str)]
    return [name for name in names if name.count("/") == 1 and not (project_root() / name).exists()]


def _told(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _place(folder: Path, run: Path) -> str:
    return Path(folder).resolve().relative_to(run).as_posix()


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _scores(folder: Path, run: Path | None) -> str:
    """Return a table of the model's micro averages and tasks, with intervals, beside the original's."""
    table = run / "08_evaluation" / "scores.csv" if run else None
    if run is None or table is None or not table.exists():
        return "It was not evaluated in this run."
    stage, *path = _place(folder, run).split("/")
    kinds = {place: kind for kind, place in FOLDERS.items()}
    name = "-".join([kinds.get(stage, stage), *path])
    scores = pd.read_csv(table, keep_default_na=False)
    lines = ["| language | tasks | this model | original instruct model | items |", "|---|---|---|---|---|"]
    for row in scores[scores["model"] == name].itertuples():
        same = scores[(scores["model"] == "original-instruct") & (scores["language"] == row.language)]
        same = same[(same["group"] == row.group) & (same["task"] == row.task)]
        title = "**micro average**" if row.group == MICRO else row.task or f"{row.group} (mean)"
        other = _interval(next(same.itertuples())) if len(same) else "–"
        lines.append(f"| {row.language} | {title} | {_interval(row)} | {other} | {row.items} |")
    if len(lines) == 2:
        return "It was not evaluated in this run."
    return "\n".join(lines) + "\n\n95 % intervals over items; zero-shot, through the chat template."


def _interval(row: Any) -> str:
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
