"""A finished model as a folder for the hub; its card is told by what its run, or a command, recorded."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData

from ruadapt.checkpoints.model_configs import CONFIGS, TOKENIZER_FILES, carried
from ruadapt.checkpoints.model_folders import INDEX
from ruadapt.console import RECORD
from ruadapt.errors import RuadaptError
from ruadapt.files import project_root, read_json
from ruadapt.pipeline.stages import FOLDERS
from ruadapt.reporting.provenance import without_places
from ruadapt.reporting.report import markdown, written
from ruadapt.vocab.save import READER_FILE

# Licences by the hub's identifiers; any other is `other` with its name beside it.
LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0")
NOT_EVALUATED = "It was not evaluated in this run."


def model_card(folder: Path, repo: str, licence: str = "") -> ModelCard:
    """Return the card: what the model was made from and how, its scores with intervals, limits, licence.

    Raises:
        RuadaptError: the licence of the models is not known here and not given, or `repo` is no OWNER/NAME.
    """
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise RuadaptError(f"--repo {repo!r} is no OWNER/NAME of the hub")
    record = read_record(folder)
    values = {name: value for stage in record["run"].values() for name, value in stage.items()}
    sources = record["surgery"].get("made_from", {})
    models = _hub_names(
        values.get(f"{role}_model") or sources.get(role, {}).get("name") for role in ("instruct", "base")
    )
    facts = read_json(project_root() / "data" / "models.json")
    known = {facts[model]["licence"] for model in models if model in facts}
    if not licence and len(known) != 1:
        raise RuadaptError(f"name the licence with --licence; known of the models: {sorted(known) or 'none'}")
    licence = licence or known.pop()
    data = [domain["source"] for domain in values.get("corpus_mix", ())]
    data.append(values.get("calibration_dataset"))
    about = ModelCardData(
        license=licence if licence in LICENCES else "other",
        license_name=None if licence in LICENCES else licence,
        language=["ru", "en"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=models or None,
        datasets=_hub_names(data) or None,
    )
    made = yaml.safe_dump({key: part for key, part in record.items() if part}, allow_unicode=True, width=110)
    told = {"method": f"```yaml\n{made}```" if any(record.values()) else "Not recorded."}
    told |= {"name": repo.split("/")[1], "scores": _scores(folder)}
    template = project_root() / "data" / "model_card.md"
    return ModelCard.from_template(about, template_path=str(template), **told)


def published_files(folder: Path) -> list[str]:
    """Return the names of a model folder's files that belong to the model.

    Raises:
        RuadaptError: it is no complete model folder, or can be read only with code of its own, which users of
            transformers and vLLM would have to allow.
    """
    known = [*CONFIGS, *TOKENIZER_FILES, INDEX, RECORD, *carried(folder)]
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    names = weights + [name for name in known if (folder / name).is_file()]
    if not weights or "tokenizer.json" not in names:
        raise RuadaptError(f"{folder} is no complete model folder: safetensors and tokenizer.json are needed")
    if READER_FILE in names or "auto_map" in read_json(folder / "tokenizer_config.json"):
        raise RuadaptError(
            f"{folder}: transformers reads this tokenizer beside this architecture only with code of the "
            "folder; publish a vocabulary that extends the original's"
        )
    return names


def upload(folder: Path, names: list[str], card: ModelCard, repo: str, private: bool) -> str:
    """Upload files and card to the hub's repository, made where it is missing; return the commit's address.

    Files of a model that was there before go with the same commit: transformers would take old weights in one
    file before new ones in shards.

    Raises:
        RuadaptError: not logged in, no right to write there, offline, or cut off.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        old = ["model*.safetensors", INDEX, *CONFIGS, *TOKENIZER_FILES]
        card.push_to_hub(repo)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, delete_patterns=old)
        )
    except Exception as error:  # whatever hub, network and storage raise
        # Of an upload the library may say no more than which file it was, and keep the reason behind it.
        told = " ".join(f"{error} {error.__cause__ or ''}".split())[:250]
        raise RuadaptError(
            f"{repo} could not be uploaded ({told}); log in with `hf auth login`, set HF_HUB_OFFLINE=0, "
            "check the network, and give the same command again"
        ) from error


def _run(folder: Path) -> Path | None:
    """Return the run that a model folder lies in, if it lies in one."""
    parents = folder.resolve().parents
    return next((parent for parent in parents if (parent / "provenance").is_dir()), None)


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `run`, its parameters by stage, and `surgery`, what `init` or `lep` recorded of the folder."""
    run, surgery = _run(folder), read_json(folder / RECORD, {})
    files = sorted((run / "provenance").glob("0[1-7]_*.json")) if run else []
    stages = {file.stem: without_places(read_json(file)["key"]["parameters"]) for file in files}
    return {"run": stages, "surgery": surgery}


def _scores(folder: Path) -> str:
    """Return a table of the model's scores with intervals beside the original's."""
    run = _run(folder)
    if run is None or not (run / "08_evaluation" / "scores.csv").exists():
        return NOT_EVALUATED
    stage, *parts = folder.resolve().relative_to(run).parts
    name = "-".join([next((kind for kind, place in FOLDERS.items() if place == stage), stage), *parts])
    table = pd.read_csv(run / "08_evaluation" / "scores.csv", keep_default_na=False)
    table["task"] = table["task"].where(table["task"] != "", table["group"] + ", mean")
    table["score"] = [written(row) for row in table.to_dict("records")]
    wanted = {name: "this model", "original-instruct": "original instruct"}
    table = table[table["model"].isin(wanted)].assign(model=table["model"].map(wanted))
    if "this model" not in set(table["model"]):
        return NOT_EVALUATED
    shown = table.pivot(index=["language", "task", "items"], columns="model", values="score")
    told = markdown(shown[[one for one in wanted.values() if one in shown]].reset_index().fillna(""))
    return f"{told}\n\n95 % intervals over items; zero-shot, through the chat template."


def _hub_names(values: Iterable[Any]) -> list[str]:
    """Return those that are names on the hub, without revisions: it refuses a card with any other."""
    names = [value.partition("@")[0] for value in values if isinstance(value, str)]
    return [name for name in names if name.count("/") == 1 and not (project_root() / name).exists()]
