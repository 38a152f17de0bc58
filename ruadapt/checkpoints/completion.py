"""An instruct model that was published as a LoRA adapter, made whole."""

from pathlib import Path

from ruadapt.checkpoints import adapters
from ruadapt.checkpoints.model_configs import read_chat_template, write_chat_template
from ruadapt.errors import RuadaptError


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
    template = Path(chat_template).read_text("utf-8") if chat_template else read_chat_template(words)
    adapters.merge(base, adapters.Adapter(adapter), target, words)
    if template is not None:
        write_chat_template(target, template)
