"""llama.cpp's own converter, told what it can't know of an adapted tokenizer; a process of its own runs it.

    python -m ruadapt.checkpoints.gguf_converter FOLDER_OF_THE_CONVERTER FACTS.json ARGUMENTS...

The converter knows tokenizers by a hash of the ids of one text, which new tokens change, and some of its
families have special tokens at fixed ids. Nothing of its code is copied or changed on the disk.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from ruadapt.files import read_json

SCRIPT = "convert_hf_to_gguf"


def main(place: str, facts_file: str, *arguments: str) -> None:
    """Run the converter's `main` with `arguments`.

    The facts: `pre`, the name of the pre-tokenizer, or `original`, a folder whose hash tells the converter;
    `added`, the ids of added tokens, outside of which nothing is special; `ends`, ids that end an answer
    besides eos; `record`, text that is kept in the file.
    """
    facts = read_json(Path(facts_file))
    sys.path.insert(0, place)
    script: Any = import_module(SCRIPT)
    gguf: Any = import_module("gguf")  # the converter's own copy, where it has one

    def exactly(folder: Any, *_: Any, **__: Any) -> Any:
        """Read tokenizer.json as it is, whatever class the architecture suggests, and run no code of it."""
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    transformers.__dict__["AutoTokenizer"] = type("Exactly", (), {"from_pretrained": staticmethod(exactly)})
    bases: Any = sys.modules[script.ModelBase.__module__]
    name = facts["pre"]
    if facts["original"]:
        name = bases.TextModel.get_vocab_base_pre(None, exactly(facts["original"]))
    bases.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    plain, written = gguf.SpecialVocab.add_to_gguf, set[str]()

    def add_to_gguf(self: Any, writer: Any, quiet: bool = False) -> None:
        found = self.special_token_ids
        if not written:
            writer.add_string("ruadapt.record", facts["record"])
            found = found | dict(zip(("eot", "eom"), facts["ends"], strict=False))
        self.special_token_ids = {
            role: number for role, number in found.items() if role not in written and number in facts["added"]
        }
        written.update(self.special_token_ids, ["record"])
        plain(self, writer, quiet)

    gguf.SpecialVocab.add_to_gguf = add_to_gguf
    sys.argv = [SCRIPT, *arguments]
    script.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
