"""An instruct model that was published as a LoRA adapter, made whole."""

import shutil
from pathlib import Path

from ruadapt.checkpoints import adapters
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json

TEMPLATE = "chat_template.jinja"


def complete_instruct(base: Path, adapter: Path, chat_template: str, target: Path) -> None:
    """Merge a published peft adapter onto `base` as a stream, and write the whole instruct model.

    Args:
        adapter: its tokenizer is taken where it has one, else the base's.
        chat_template: a Jinja file for an adapter that came without one; empty keeps what there is.

    Raises:
        RuadaptError: the template is missing, or as `adapters.merge`.
    """
    if chat_template and not Path(chat_template).is_file():
        raise RuadaptError(f"the chat template {chat_template} does not exist")
    words = adapter if (adapter / "tokenizer.json").is_file() else base
    adapters.merge(base, adapters.Adapter(adapter), target, words)
    if chat_template:
        config = read_json(target / "tokenizer_config.json")
        config.pop("chat_template", None)
        write_json(target / "tokenizer_config.json", config)
    template = Path(chat_template or words / TEMPLATE)
    if template.is_file():
        shutil.copyfile(template, target / TEMPLATE)
