"""Models by hub name or local path.

Nothing is downloaded while HF_HUB_OFFLINE is 1, as it is in notebooks unless it was set to 0.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import DryRunError, GatedRepoError, LocalEntryNotFoundError

from ruadapt.errors import RuadaptError
from ruadapt.files import hash_path

# Weights as safetensors only, configs, tokenizers; no second copy of the weights in another layout.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]
OTHER_LAYOUTS = ["original/*", "consolidated*", "onnx/*"]


def fetch_model(name: str | Path, revision: str = "") -> Path:
    """Return a model's folder: `name` itself where it is one, else a snapshot of the hub's repository.

    Only safetensors, configs and tokenizer files are downloaded, into the hub's own cache.

    Args:
        name: a folder, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        revision: branch, tag or commit; empty for the newest.

    Raises:
        RuadaptError: it can't be had: no such repository or revision, gated,
            cut off, or offline and not in the cache.
    """
    return Path(name) if _is_local(name) else Path(_snapshot(name, revision, dry_run=False))


def download_bytes(name: str | Path, revision: str = "") -> int:
    """Return how many bytes `fetch_model` would download: none for a folder or what the cache has.

    Raises:
        RuadaptError: as `fetch_model`.
    """
    files = [] if _is_local(name) else _snapshot(name, revision, dry_run=True)
    return sum(file.file_size for file in files if file.will_download)


def _is_local(name: str | Path) -> bool:
    return Path(name).is_dir() or Path(name).is_absolute()


def _snapshot(name: str | Path, revision: str, *, dry_run: bool) -> Any:
    repository, _, wanted = str(name).partition("@")
    options: dict[str, Any] = {
        "revision": revision or wanted or None,
        "allow_patterns": MODEL_FILES,
        "ignore_patterns": OTHER_LAYOUTS,
    }
    try:
        try:
            return snapshot_download(repository, **options, dry_run=dry_run)
        except DryRunError as error:  # it hides the reason, and that the cache may have everything
            with suppress(LocalEntryNotFoundError):
                snapshot_download(repository, **options, local_files_only=True)
                return []
            raise error.__cause__ or error from None
    except GatedRepoError as error:
        raise RuadaptError(
            f"{name} is gated: accept its terms on its page of the hub, then log in (`hf auth login`)"
        ) from error
    except Exception as error:  # whatever hub, network and disk raise
        if is_offline_mode() and isinstance(error, OSError):
            raise RuadaptError(
                f"{name} is no folder and not in the hub's cache; set HF_HUB_OFFLINE=0 to download it, "
                "or give a local folder"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise RuadaptError(
            f"{name} is no folder and could not be had from the hub ({reason}); check its name and revision, "
            "the network and the login (`hf auth login`): the same command keeps the files it has"
        ) from error


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
