"""Configs and chat template of a model folder, carried over to another vocabulary."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json

TEMPLATE = "chat_template.jinja"
CONFIGS = ("config.json", "generation_config.json")


def new_configs(
    source_folder: Path, old: Tokenizer, new: Tokenizer, height: int
) -> dict[str, dict[str, Any]]:
    """Return a folder's `config.json` and `generation_config.json` for another tokenizer and height.

    Raises:
        RuadaptError: a token that a config names is not in the new tokenizer.
    """
    configs = {}
    for name in CONFIGS:
        if (path := source_folder / name).is_file():
            configs[name] = _moved_ids(read_json(path), old, new, str(path))
    configs["config.json"]["vocab_size"] = height
    return configs


def _moved_ids(values: dict[str, Any], old: Tokenizer, new: Tokenizer, where: str) -> dict[str, Any]:
    """Return a config whose `…_token_id` entries name the same tokens under the new ids."""

    def moved(key: str, value: int) -> int:
        token = old.id_to_token(value)
        found = new.token_to_id(token) if token is not None else None
        if found is None:
            raise RuadaptError(
                f"{where}: {key} is {value} ({token!r}), which the new tokenizer lacks; "
                "build the vocabulary with this token kept, or correct the config"
            )
        return found

    result = dict(values)
    for key, value in values.items():
        if not key.endswith("_token_id"):
            continue
        if isinstance(value, list):
            result[key] = [moved(key, item) for item in value]
        elif isinstance(value, int) and value >= 0:  # some configs say -1 for "none"
            result[key] = moved(key, value)
    return result


def read_chat_template(folder: Path) -> Any:
    """Return a folder's chat template, from its own file or the tokenizer's config; None without one."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return read_json(config).get("chat_template") if config.is_file() else None


def write_chat_template(folder: Path, template: Any) -> None:
    """Make this a folder's only chat template: a text, or several by name as a config lists them."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    config.pop("chat_template", None)
    (folder / TEMPLATE).unlink(missing_ok=True)
    if isinstance(template, str):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = template
    write_json(path, config)
