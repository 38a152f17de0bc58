"""A model for the hub: its card, told by what its run recorded, and the files that loading it takes."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import HfApi, ModelCard, ModelCardData

from ruadapt.checkpoints.model_configs import CONFIGS
from ruadapt.checkpoints.model_folders import INDEX, TOKENIZER_FILES
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import FOLDERS
from ruadapt.files import atomic_folder, atomic_write, project_root, read_json, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.reporting.report import markdown, written
from ruadapt.vocab.save import READER_FILE

# Licences by the hub's identifiers; any other is `other` with its name beside it.
LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0")
RECORD = "ruadapt.json"
CARD = """---
{{ card_data }}
---

# {{ name }}

An instruct model adapted to Russian with ruadapt ([arXiv 2412.21140](https://arxiv.org/abs/2412.21140)): a
new vocabulary, continued pre-training of the base model's embeddings, Learned Embedding Propagation into
the instruct model, calibration. transformers loads it without any code of its own.

## How it was made

{{ method }}

## Scores

{{ scores }}

## Limits

The model keeps the limits of the models it was made from: it states things that are not so, and repeats
what its data say. Scores hold for the tasks named beside them and say nothing of others. The licences of
the models and data that it was made from hold for it, too.
"""
# What a reader of the card wants to know of each stage's parameters.
TOLD = (
    "corpus_",
    "text_characters",
    "base_model",
    "instruct_model",
    "added_rows",
    "vocab_size",
    "keep_rows",
    "pretraining_",
    "lep_method",
    "calibration_",
    "lora_",
    "copy_share",
    "preference_",
)
NOT_EVALUATED = "It was not evaluated in this run."


def model_card(folder: Path, repo: str, licence: str = "") -> ModelCard:
    """Return the card: what the model was made from and how, its scores with intervals, limits, licence.

    Parameters and scores are those of the run that `folder` lies in, or what `init` and `lep` recorded.

    Raises:
        RuadaptError: the licence of the models is not known here and not given, or `repo` is no OWNER/NAME.
    """
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise RuadaptError(f"--repo {repo!r} is no OWNER/NAME of the hub")
    name, record = repo.split("/")[1], _record(folder)
    values = {name: value for stage in record["run"].values() for name, value in stage.items()}
    made_from = {role: source["name"] for role, source in record["surgery"].get("made_from", {}).items()}
    models = _hub_names([values.get(f"{role}_model") or made_from.get(role) for role in ("instruct", "base")])
    facts = read_json(project_root() / "data" / "models.json")
    known = {facts[model]["licence"] for model in models if model in facts}
    if not licence and len(known) != 1:
        raise RuadaptError(f"name the licence with --licence; known of the models: {sorted(known) or 'none'}")
    licence = licence or known.pop()
    data = [domain["source"] for domain in values.get("corpus_mix", ())]
    data += [values.get(name) for name in ("calibration_dataset", "preference_dataset")]
    rows = [
        (stage, parameter, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for stage, part in record["run"].items()
        for parameter, value in part.items()
        if stage < "08" and parameter.startswith(TOLD) and value not in ("", [])
    ]
    if surgery := record["surgery"]:
        rows += [(surgery["command"], *map(str, item)) for item in (made_from | surgery["options"]).items()]
    about = ModelCardData(
        license=licence if licence in LICENCES else "other",
        license_name=None if licence in LICENCES else licence,
        language=["ru", "en"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=models or None,
        datasets=_hub_names(data) or None,
    )
    told = {
        "name": name,
        "method": markdown(pd.DataFrame(rows, columns=["stage", "parameter", "value"]))
        if rows
        else "Not recorded.",
        "scores": _scores(folder),
    }
    return ModelCard.from_template(about, template_str=CARD, **told)


def published_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that loading it takes.

    Raises:
        RuadaptError: it is no complete model folder, or can be read only with code of its own, which users of
            transformers and vLLM would have to allow.
    """
    wanted = ("*.safetensors", INDEX, *CONFIGS, *TOKENIZER_FILES)
    found = [path for pattern in wanted for path in sorted(folder.glob(pattern)) if path.is_file()]
    names = {path.name for path in found}
    if not any(path.suffix == ".safetensors" for path in found) or "tokenizer.json" not in names:
        raise RuadaptError(f"{folder} is no complete model folder: safetensors and tokenizer.json are needed")
    if READER_FILE in names or "auto_map" in read_json(folder / "tokenizer_config.json"):
        raise RuadaptError(
            f"{folder}: transformers reads this tokenizer beside this architecture only with code of the "
            "folder; publish a vocabulary that extends the original's"
        )
    return found


def write_folder(folder: Path, out: Path, card: ModelCard) -> Path:
    """Write a model's files, its card and record into `out`; weights are shared by hard links if possible."""
    with atomic_folder(out) as target:
        for path in published_files(folder):
            place = _link if path.suffix == ".safetensors" else shutil.copyfile
            place(path, target / path.name)
        atomic_write(target / "README.md", str(card))
        write_json(target / RECORD, {"made_by": versions(), **_record(folder)})
    return out


def _link(source: Path, target: Path) -> None:
    """Share a file's content by a hard link where the file system can, else copy it."""
    try:
        os.link(source.resolve(), target)  # hub caches hold symbolic links
    except OSError:
        shutil.copyfile(source, target)


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to the hub's repository, made where it is missing, and return the commit's address.

    Files of a model that was there before go with the same commit: transformers would take old weights in one
    file before new ones in shards.

    Raises:
        RuadaptError: not logged in, no right to write there, offline, or cut off.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        old = ["model*.safetensors", INDEX, *CONFIGS, *TOKENIZER_FILES]
        return str(api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=old))
    except Exception as error:  # whatever hub, network and storage raise
        # Of an upload the library says no more than which file it was, and keeps the reason behind it.
        told = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else str(error)
        raise RuadaptError(
            f"{repo} could not be uploaded ({' '.join(told.split())[:250]}); log in with `hf auth login`, "
            "set HF_HUB_OFFLINE=0, check the network, and give the same command again"
        ) from error


def _run(folder: Path) -> Path | None:
    """Return the run that a model folder lies in, if it lies in one."""
    parents = folder.resolve().parents
    return next((parent for parent in parents if (parent / "provenance").is_dir()), None)


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the parameters of the run by stage, and what `init` or `lep` recorded of a folder they made."""
    run, path = _run(folder), folder / RECORD
    surgery = read_json(path) if path.is_file() else {}
    stages = {} if run is None else {file.stem: file for file in sorted((run / "provenance").glob("*.json"))}
    parameters = {
        stage: {
            # Places of one machine tell nobody anything.
            name: Path(value).name if isinstance(value, str) and value.startswith("/") else value
            for name, value in read_json(file)["key"]["parameters"].items()
        }
        for stage, file in stages.items()
    }
    return {"run": parameters, "surgery": surgery if "made_from" in surgery else {}}


def _scores(folder: Path) -> str:
    """Return a table of the model's scores with intervals beside the original's."""
    run = _run(folder)
    if run is None or not (run / "08_evaluation" / "scores.csv").exists():
        return NOT_EVALUATED
    stage, *parts = folder.resolve().relative_to(run).parts
    kinds = {place: kind for kind, place in FOLDERS.items()}
    table = pd.read_csv(run / "08_evaluation" / "scores.csv", keep_default_na=False)
    table["task"] = table["task"].where(table["task"] != "", table["group"] + ", mean")
    table["score"] = [written(row) for row in table.to_dict("records")]
    table = table.set_index(["language", "task", "items"])
    mine = table[table["model"] == "-".join([kinds.get(stage, stage), *parts])]
    original = table.loc[table["model"] == "original-instruct", "score"]
    if mine.empty:
        return NOT_EVALUATED
    beside = pd.DataFrame({"this model": mine["score"]}).join(original.rename("original instruct"))
    told = markdown(beside.reset_index().fillna(""))
    return f"{told}\n\n95 % intervals over items; zero-shot, through the chat template."


def _hub_names(values: list[Any]) -> list[str]:
    """Return those that are names on the hub, without revisions: it refuses a card with any other."""
    names = [value.partition("@")[0] for value in values if isinstance(value, str)]
    return [name for name in names if name.count("/") == 1 and not (project_root() / name).exists()]
