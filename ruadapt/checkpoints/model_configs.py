"""Configs, chat templates and other small files of a model folder, carried over to another vocabulary."""

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json

TEMPLATE = "chat_template.jinja"
CONFIGS = ("config.json", "generation_config.json")
IDS = ("_token_id", "_token_index")
FORBIDDEN = ("bad_words_ids", "suppress_tokens")  # what is not to be written may be lacking
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",  # SentencePiece's, for readers of that file alone
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
    "tokenizer_json.py",  # where `vocab.save_tokenizer` needs it
)
# Templates by name, those of processors, and the modules that an `auto_map` names.
CARRIED = ("*.py", "additional_chat_templates/*.jinja", "chat_template.json", "*processor_config.json")


def new_configs(
    source_folder: Path, old: Tokenizer, new: Tokenizer, height: int, tied: bool
) -> dict[str, dict[str, Any]]:
    """Return a folder's `config.json` and `generation_config.json` for another tokenizer, height and tying.

    Raises:
        RuadaptError: a token that a config names is not in the new tokenizer.
    """
    configs = {}
    defaults = {"config.json": AutoConfig.from_pretrained(source_folder, local_files_only=True).to_dict()}
    for name in CONFIGS:
        if (path := source_folder / name).is_file():
            configs[name] = _moved_ids(read_json(path), defaults.get(name, {}), old, new, str(path))
    config = configs["config.json"]
    text = config.get("text_config")  # of models that read pictures, too
    if text is None or "vocab_size" in config:
        config["vocab_size"] = height
    if text is not None:
        text["vocab_size"] = height
    if not tied:
        config["tie_word_embeddings"] = False
    return configs


def _moved_ids(
    values: dict[str, Any], defaults: dict[str, Any], old: Tokenizer, new: Tokenizer, where: str
) -> dict[str, Any]:
    """Return a config whose entries of ids name the same tokens by their new ids, its parts' entries too.

    An id that never had a token (of a padding row) names nothing, and becomes null. `defaults` are the ids
    that the model's class takes where the file is silent. They are written out where they move, and a padding
    token's where its row is gone.
    """

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list):  # ids, or words as lists of ids: one that lost an id goes
            pairs = [(each, moved(key, each)) for each in value]
            whole = [(each, new) for each, new in pairs if new is not None]
            return [new for each, new in whole if not isinstance(each, list) or len(each) == len(new)]
        if not isinstance(value, int) or value < 0:  # some configs say -1 for "none"
            return value
        token = old.id_to_token(value)
        found = new.token_to_id(token) if token is not None else None
        if token is not None and found is None and key in values and not key.endswith(FORBIDDEN):
            raise RuadaptError(
                f"{where}: {key} is {value} ({token!r}), which the new tokenizer lacks; "
                "build the vocabulary with this token kept, or correct the config"
            )
        return found

    result = dict(values)
    for key, value in (defaults | values).items():
        if isinstance(value, dict) and key in values:
            result[key] = _moved_ids(value, defaults.get(key) or {}, old, new, f"{where}: {key}")
        elif key.endswith((*IDS, *FORBIDDEN)):
            number = moved(key, value)
            if key in values or (number != value and (number is not None or key == "pad_token_id")):
                result[key] = number
    return result


def eos_ids(folder: Path) -> list[int]:
    """Return the eos ids that a folder's configs name."""
    ids: list[int] = []
    for config in (read_json(folder / name, {}) for name in CONFIGS):
        for value in (config.get("eos_token_id"), config.get("text_config", {}).get("eos_token_id")):
            ids += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(ids))


def carried(folder: Path) -> list[str]:
    """Return the names of the files that belong to a model, whatever its vocabulary."""
    found = (path.relative_to(folder) for pattern in CARRIED for path in folder.glob(pattern))
    return sorted(path.as_posix() for path in found if path.name not in TOKENIZER_FILES)


def copy_files(source: Path, tokenizer: Path, target: Path) -> None:
    """Copy a model's small files and a tokenizer's; the chat template is the model's where it has one."""
    for name in carried(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, target / name)
    if (template := read_chat_template(source)) is not None:
        write_chat_template(target, template)


def read_chat_template(folder: Path, given: str = "") -> Any:
    """Return a folder's chat template, from its own file or the tokenizer's config; None without one.

    Args:
        given: a Jinja file that is read instead.

    Raises:
        RuadaptError: the given file does not exist.
    """
    if given and not Path(given).is_file():
        raise RuadaptError(f"the chat template {given} does not exist")
    if given or (folder / TEMPLATE).is_file():
        return Path(given or folder / TEMPLATE).read_text(encoding="utf-8")
    return read_json(folder / "tokenizer_config.json", {}).get("chat_template")


def write_chat_form(base: Path, chat_template: str, target: Path) -> None:
    """Write the tokenizer that a base is tuned with to chat: its own, a template, and what ends an answer.

    That is the last special token that the template puts behind an answer.

    Args:
        chat_template: a Jinja file; empty takes the base's own template.

    Raises:
        RuadaptError: there is no template, or it ends an answer with no special token.
    """
    template = read_chat_template(base, chat_template)
    if template is None:
        raise RuadaptError(f"{base} has no chat template to be tuned with; give one: chat_template=FILE")
    copy_files(base, base, target)
    write_chat_template(target, template)
    tokenizer = AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Ответ"}]
    answered = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition("Ответ")[2]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in tokenizer(answered, add_special_tokens=False)["input_ids"] if token in special]
    if not ends:
        raise RuadaptError(f"the chat template of {chat_template or base} ends no answer by a special token")
    own = {"eos_token_id": list(dict.fromkeys([ends[-1], *eos_ids(base)]))}
    write_json(target / CONFIGS[1], read_json(base / CONFIGS[1], {}) | own)


def write_chat_template(folder: Path, template: Any) -> None:
    """Make this a folder's only chat template: a text, or several by name as a config lists them."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, {})
    config.pop("chat_template", None)
    (folder / TEMPLATE).unlink(missing_ok=True)
    if isinstance(template, str):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = template
    write_json(path, config)
