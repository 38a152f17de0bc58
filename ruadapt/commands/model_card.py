"""A model for the hub: its card, told by what its run recorded, and the files that loading it takes."""

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from ruadapt.checkpoints.model_configs import CONFIGS
from ruadapt.checkpoints.model_folders import INDEX, TOKENIZER_FILES
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.plan import FOLDERS
from ruadapt.evaluation.statistics import MICRO
from ruadapt.files import atomic_folder, atomic_write, project_root, read_json, write_json
from ruadapt.reporting.provenance import versions
from ruadapt.reporting.report import markdown
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
TOLD = ("corpus_", "base_model", "instruct_model", "added_rows", "vocab_size", "keep_rows", "pretraining_")
TOLD += ("text_characters", "lep_method", "calibration_", "lora_", "copy_share", "preference_")
NOT_EVALUATED = "It was not evaluated in this run."


def model_card(folder: Path, repo: str, licence: str = "") -> ModelCard:
    """Return the card: what the model was made from and how, its scores with intervals, limits, licence.

    Parameters and scores are those of the run that `folder` lies in, or what `init` and `lep` recorded.

    Raises:
        RuadaptError: the licence of the models is not known here and not given, or `repo` is no OWNER/NAME.
    """
    owner, _, name = repo.partition("/")
    if not owner or not name or "/" in name:
        raise RuadaptError(f"--repo {repo!r} is no OWNER/NAME of the hub")
    run, surgery = _run(folder), _surgery(folder)
    stages = _parameters(run)
    values = {name: value for part in stages.values() for name, value in part.items()}
    made_from = {role: source["name"] for role, source in surgery.get("made_from", {}).items()}
    models = _hub_names([values.get(f"{role}_model") or made_from.get(role) for role in ("instruct", "base")])
    facts = read_json(project_root() / "data" / "models.json")
    known = {facts[name]["licence"] for name in models if name in facts}
    if not licence and len(known) != 1:
        raise RuadaptError(f"name the licence with --licence; known of the models: {sorted(known) or 'none'}")
    licence = licence or known.pop()
    data = [domain["source"] for domain in values.get("corpus_mix", ())]
    data += [values.get(name) for name in ("calibration_dataset", "preference_dataset")]
    rows = [("this model", "its folder in the run", _place(folder, run))] if run else []
    rows += [
        (stage, name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for stage, part in stages.items()
        for name, value in part.items()
        if stage < "08" and name.startswith(TOLD) and value not in ("", [])
    ]
    if surgery:
        rows += [(surgery["command"], *map(str, item)) for item in (made_from | surgery["options"]).items()]
    scores, measured = _scores(folder, run)
    about = ModelCardData(
        license=licence if licence in LICENCES else "other",
        license_name=None if licence in LICENCES else licence,
        language=["ru", "en"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=models or None,
        datasets=_hub_names(data) or None,
        model_name=name,
        eval_results=measured or None,
    )
    method = (
        markdown(pd.DataFrame(rows, columns=["stage", "parameter", "value"])) if rows else "Not recorded."
    )
    return ModelCard.from_template(about, template_str=CARD, name=name, method=method, scores=scores)


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
        record = {"made_by": versions(), "run": _parameters(_run(folder))}
        write_json(target / RECORD, record | {"surgery": _surgery(folder)})
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
        # The library says no more than which file it was, and keeps the reason behind it.
        told = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) else str(error)
        raise RuadaptError(
            f"{repo} could not be uploaded ({' '.join(told.split())[:250]}); log in with `hf auth login`, "
            "set HF_HUB_OFFLINE=0, check the network, and give the same command again"
        ) from error


def _run(folder: Path) -> Path | None:
    """Return the run that a model folder lies in, if it lies in one."""
    parents = Path(folder).resolve().parents
    return next((parent for parent in parents if (parent / "provenance").is_dir()), None)


def _scores(folder: Path, run: Path | None) -> tuple[str, list[EvalResult]]:
    """Return a table of the model's scores with intervals beside the original's, and its micro averages."""
    path = run / "08_evaluation" / "scores.csv" if run else None
    if run is None or path is None or not path.exists():
        return NOT_EVALUATED, []
    stage, *parts = _place(folder, run).split("/")
    kinds = {place: kind for kind, place in FOLDERS.items()}
    table = pd.read_csv(path, keep_default_na=False)
    table["task"] = table["task"].where(table["task"] != "", table["group"] + ", mean")
    mine = table[table["model"] == "-".join([kinds.get(stage, stage), *parts])]
    original = table[table["model"] == "original-instruct"]
    if mine.empty:
        return NOT_EVALUATED, []
    columns = ["language", "task", "items"]
    shown = mine[[*columns, "value", "low", "high"]].rename(columns=_bracket("this model"))
    beside = original[[*columns, "value", "low", "high"]].rename(columns=_bracket("original instruct"))
    told = markdown(shown.merge(beside, on=columns, how="left"))
    results = [
        EvalResult(
            *("text-generation", f"tasks-{row.language}", f"{row.language}, all tasks", "mean", row.value),
            metric_args={"interval_95": [row.low, row.high]},
        )
        for row in mine[mine["group"] == MICRO].itertuples()
    ]
    return f"{told}\n\n95 % intervals over items; zero-shot, through the chat template.", results


def _bracket(name: str) -> dict[str, str]:
    return {"value": name, "low": f"{name}_low", "high": f"{name}_high"}


def _surgery(folder: Path) -> dict[str, Any]:
    """Return what `ruadapt init` or `lep` recorded of a folder they made; nothing of any other."""
    found = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    return found if "made_from" in found else {}


def _parameters(run: Path | None) -> dict[str, dict[str, Any]]:
    """Return the notebooks' parameters by stage, without places of one machine."""
    found = {}
    for path in sorted((run / "provenance").glob("*.json")) if run else []:
        values = read_json(path)["key"]["parameters"]
        found[path.stem] = {
            name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for name, value in values.items()
            if name not in ("run_dir", "until", "processes")
        }
    return found


def _hub_names(values: list[Any]) -> list[str]:
    """Return those that are names on the hub, without revisions: it refuses a card with any other."""
    names = [value.partition("@")[0] for value in values if isinstance(value, str)]
    return [name for name in names if name.count("/") == 1 and not (project_root() / name).exists()]


def _place(folder: Path, run: Path) -> str:
    return Path(folder).resolve().relative_to(run).as_posix()
