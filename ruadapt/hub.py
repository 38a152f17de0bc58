"""Models and tokenizers by hub name or local path.

Nothing is downloaded while HF_HUB_OFFLINE is 1, as it is in notebooks unless it was set to 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path

# Weights as safetensors only, configs, tokenizers; no second copy of the weights in another layout.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.py", "tokenizer.model", "README.md", "LICENSE*"]
OTHER_LAYOUTS = ["original/*", "consolidated*", "onnx/*"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"]


def fetch_model(name: str | Path, *, download: bool = True, files: Sequence[str] = MODEL_FILES) -> Path:
    """Return a model's folder: `name` itself where it is one, else a snapshot of the hub's repository.

    Only safetensors, configs and tokenizer files are downloaded, into the hub's own cache.

    Args:
        name: a folder, `OWNER/NAME` or `OWNER/NAME@REVISION` (a branch, tag or commit; else the newest).
        download: false to look into the cache alone.
        files: patterns of what is wanted.

    Raises:
        RuadaptError: it can't be had: no such repository or revision, gated, cut off, or not to be downloaded
            and not in the cache.
    """
    if (path := Path(name).expanduser()).is_absolute() or path.is_dir():
        return path
    from huggingface_hub import snapshot_download  # slow to import

    repository, _, revision = str(name).partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(files),
            ignore_patterns=OTHER_LAYOUTS,
            local_files_only=not download,
        )
    except Exception as error:  # whatever hub, network and disk raise
        raise RuadaptError(
            f"{name} is no folder and could not be had from the hub ({' '.join(str(error).split())[:200]}); "
            "set HF_HUB_OFFLINE=0 to download it (a dry run downloads nothing), accept the terms of a gated "
            "model on its page and log in (`hf auth login`), or give a local folder; the same command keeps "
            "the files it has"
        ) from error
    return Path(folder)


def origin(folder: Path) -> dict[str, Any]:
    """Return the name and, for a snapshot in a hub cache, the revision of a model folder."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"name": name, "revision": folder.name}
    return {"name": folder.resolve().name, "revision": None}


def identity(source: str | Path) -> str:
    """Return what results made from a model or data set depend on: a local one's hash, else its name."""
    return hash_path(Path(source)) if source and Path(source).exists() else str(source)
