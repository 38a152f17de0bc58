"""The embedded model pair: an English-heavy tokenizer, a base from nothing, and its instruct model."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from ruadapt.checkpoints import adapters
from ruadapt.checkpoints.tensor_files import place_file
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_folder, atomic_write, read_json, write_json
from ruadapt.world import World, documents

SEPARATOR, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [SEPARATOR, USER, ASSISTANT, END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Words with the space before them, single digits, punctuation, line breaks, spaces: as Qwen2.5 splits.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_base_tokenizer(
    world: World, target: Path, vocab_size: int, russian_documents: int, english_documents: int, context: int
) -> Path:
    """Train the pair's byte-level BPE on English-heavy text of the world and save its folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        yield from islice(documents(world, "en", "train", "tokenizer"), english_documents)
        yield from islice(documents(world, "ru", "train", "tokenizer"), russian_documents)

    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=END,
        pad_token=SEPARATOR,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    generation = GenerationConfig(
        bos_token_id=fast.bos_token_id,
        eos_token_id=[fast.eos_token_id, fast.bos_token_id],
        pad_token_id=fast.pad_token_id,
    )
    with atomic_folder(target) as folder:
        fast.save_pretrained(folder)
        generation.save_pretrained(folder)
    return target


def base_config(
    tokenizer_folder: Path,
    hidden_size: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    intermediate_size: int,
) -> LlamaConfig:
    """Return the configuration of the pair: Llama type, tied embeddings, bfloat16 on disk."""
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    return LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=fast.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        dtype="bfloat16",
    )


def pretraining_texts(world: World, characters: int, russian_share: float, seed: int) -> Iterator[str]:
    """Yield English and Russian training documents, mixed by characters, up to `characters` in all."""
    streams = {
        language: documents(world, language, "train", f"pretraining-{seed}") for language in ("en", "ru")
    }
    written = {"en": 0, "ru": 0}
    while sum(written.values()) < characters:
        behind = written["ru"] * (1 - russian_share) <= written["en"] * russian_share
        language = "ru" if behind else "en"
        text = next(streams[language])
        written[language] += len(text)
        yield text


def is_incomplete(instruct: Path, chat_template: str) -> bool:
    """Say whether `complete_instruct` has something to do."""
    return bool(chat_template) or adapters.is_adapter(instruct)


def complete_instruct(base: Path, instruct: Path, chat_template: str, target: Path) -> None:
    """Write a whole instruct model where a published one is a LoRA adapter, or has no chat template.

    Args:
        instruct: a model folder, whose files are shared by hard links where that is possible, or a peft
            adapter, which is merged onto `base` as a stream; its tokenizer is taken where it has one.
        chat_template: file of a Jinja template; empty keeps what there is.

    Raises:
        RuadaptError: the template is missing, or as `adapters.merge`.
    """
    with atomic_folder(target) as part:
        folder = part / "model"
        if adapters.is_adapter(instruct):
            words = instruct if (instruct / "tokenizer.json").is_file() else base
            adapters.merge(base, adapters.Adapter(instruct), folder, words)
            if (words / "chat_template.jinja").is_file():
                shutil.copyfile(words / "chat_template.jinja", folder / "chat_template.jinja")
        else:
            folder.mkdir()
            for path in instruct.iterdir():
                if path.is_file():
                    place_file(path, folder / path.name, link=path.suffix == ".safetensors")
        if chat_template:
            if not Path(chat_template).is_file():
                raise RuadaptError(f"the chat template {chat_template} does not exist")
            config = read_json(folder / "tokenizer_config.json")
            config.pop("chat_template", None)
            write_json(folder / "tokenizer_config.json", config)
            shutil.copyfile(chat_template, folder / "chat_template.jinja")
        for path in folder.iterdir():
            path.rename(part / path.name)
        folder.rmdir()


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write the model card of the pair: what it is, how it was made, and its training's record."""
    card = f"""---
license: apache-2.0
language: [en, ru]
library_name: transformers
---
# The embedded pair of ruadapt

A base and its instruct model, made by this project from nothing, so that the method runs without a download.
They know the generated world of `data/world` only: facts, stories and tasks in English and Russian.
The tokenizer is English-heavy, as real ones are. No text of others went into the data or the weights.

- `base/`: trained on raw text of the world (questions and answers as plain text, no chat format).
- `instruct/`: the base, lightly tuned as a whole on chat data, mostly English.

Train the pair again from nothing: `ruadapt run pair` (writes `runs/pair/02_model_pair/pair/`).

```json
{json.dumps(record, ensure_ascii=False, indent=2)}
```
"""
    atomic_write(folder / "README.md", card)
