"""The steps of the method on Hugging Face model folders: initialise, propagate, verify.

Base, instruct and adapted models are folders; only their embeddings are read, everything else is copied
(`ruadapt.model_folders`). The mathematics is in `ruadapt.lep`, the mapping between vocabularies in
`ruadapt.vocab`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import lep
from ruadapt.errors import RuadaptError
from ruadapt.model_folders import (
    Embeddings,
    read_embeddings,
    read_layout,
    read_tensor,
    require_rows,
    tying,
    write_model,
)
from ruadapt.propagation import drift, propagate
from ruadapt.vocab import conversion_matrix, load_tokenizer

__all__ = [
    "Embeddings",
    "drift",
    "initialise",
    "propagate",
    "read_embeddings",
    "verify",
    "write_model",
]

PROBES = ("The old captain has 25 horses.", "Старый капитан видел 25 лошадей.")


def initialise(
    base_folder: Path, tokenizer_folder: Path, target: Path, *, norm_correction: bool = False
) -> dict[str, Any]:
    """Write the base model with the vocabulary of `tokenizer_folder`, its rows `T E_old` (METHOD section 3).

    Input embeddings and, where it is untied, the head are each made from their own old rows.

    Returns:
        `rows`, `copied` (rows that are one old row), `mean_pieces` (different old rows in each other row).

    Raises:
        RuadaptError: unreadable or inconsistent input; nothing is written then.
    """
    old = read_embeddings(base_folder)
    old_tokenizer, new_tokenizer = load_tokenizer(base_folder), load_tokenizer(tokenizer_folder)
    require_rows(base_folder, old_tokenizer, old)
    transfer = conversion_matrix(new_tokenizer, old_tokenizer, old_rows=old.input.shape[0])
    rows = {
        name: lep.initialise(matrix, transfer, norm_correction=norm_correction)
        for name, matrix in old.matrices().items()
    }
    write_model(base_folder, target, Embeddings(rows["input"], rows.get("head")), tokenizer_folder)
    pieces = torch.bincount(transfer.indices()[0], minlength=transfer.shape[0])
    composed = pieces > 1
    return {
        "rows": transfer.shape[0],
        "copied": int((~composed).sum()),
        "mean_pieces": float(pieces[composed].double().mean()) if composed.any() else 1.0,
    }


def verify(folder: Path, source: Path | None = None) -> dict[str, Any]:
    """Reload a written model as a user would, and check it.

    Checked: weights load with no name missing; a tied head shares its memory; logits of an English and a
    Russian sentence are finite; `AutoTokenizer` gives the ids of `tokenizer.json` and has no id beyond the
    rows; eos ids have tokens; the chat template renders. Against `source`: every other tensor bit for bit,
    eos tokens and chat text.

    Returns:
        What was found, for a report.

    Raises:
        RuadaptError: something is wrong; the message lists every failed check.
    """
    folder = Path(folder)
    embeddings, raw = read_embeddings(folder), load_tokenizer(folder)
    require_rows(folder, raw, embeddings)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, loading = loaded
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    eos = _eos_tokens(folder, raw)
    problems = []
    if loading["missing_keys"] or loading["unexpected_keys"]:
        problems.append(f"weights do not match the architecture: {loading}")
    if (head.data_ptr() == rows.data_ptr()) != embeddings.tied:
        problems.append(f"the reloaded head is not {tying(embeddings.tied)}")
    if not torch.equal(rows, embeddings.input):
        problems.append("the reloaded input embeddings differ from the file's")
    for text in PROBES:
        ids = tokenizer(text).input_ids
        if ids != raw.encode(text).ids:
            problems.append(f"AutoTokenizer and tokenizer.json give different ids for {text!r}")
        elif not model(torch.tensor([ids])).logits.isfinite().all():
            problems.append(f"logits of {text!r} are not finite")
    if len(tokenizer) > len(rows):
        problems.append(f"{len(tokenizer)} tokens for {len(rows)} rows")
    if None in eos:
        problems.append("an eos id of the configs has no token")
    chat = _chat(folder)
    if source is not None:
        problems += _differences(folder, Path(source))
        if eos != _eos_tokens(Path(source), load_tokenizer(source)):
            problems.append(f"eos tokens differ from {source}: {eos}")
        if (wanted := _chat(Path(source))) is not None and chat != wanted:
            problems.append(f"the chat template renders other text than {source}'s")
    if problems:
        raise RuadaptError(f"{folder} failed verification: " + "; ".join(problems))
    return {
        "rows": len(rows),
        "tokens": len(tokenizer),
        "tied": embeddings.tied,
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "eos": eos,
        "chat": chat is not None,
        "compared_with_source": source is not None,
    }


def _eos_tokens(folder: Path, tokenizer: Tokenizer) -> list[str | None]:
    values: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            values += value if isinstance(value, list) else [] if value is None else [value]
    return [tokenizer.id_to_token(value) for value in dict.fromkeys(values)]


def _chat(folder: Path) -> str | None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        return None
    message = {"role": "user", "content": PROBES[1]}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def _differences(folder: Path, source: Path) -> list[str]:
    """Body tensors that are not bit for bit the source's, as sentences."""
    ours, theirs = read_layout(folder), read_layout(source)
    names = ours.files.keys() - ours.embedding_names()
    if names != theirs.files.keys() - theirs.embedding_names():
        return [f"the tensors are not those of {source}"]
    different = []
    for name in sorted(names):
        first, second = read_tensor(ours, name), read_tensor(theirs, name)
        # Bytes, so that NaN equals NaN and 0.0 does not equal -0.0.
        if first.dtype != second.dtype or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            different.append(name)
    return [f"{len(different)} tensors differ from {source}'s: {different[:3]}"] if different else []
