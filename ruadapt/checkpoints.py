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
from torch import Tensor
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
from ruadapt.vocab import conversion_matrix, load_tokenizer, overlap

__all__ = [
    "Embeddings",
    "drift",
    "initialise",
    "propagate",
    "read_embeddings",
    "verify",
    "write_model",
]

# Fine-tuned pairs have a mean cosine of base and instruct rows near 0.99, strangers near 0.
STRANGERS_COSINE = 0.5
# Ids that name another token in the instruct model's tokenizer than in the base's, as a share of all.
STRANGERS_IDS = 0.01
# How much nearer an adapted row is to its own token's old row than to another's: 0 with a wrong tokenizer.
OWN_ROWS_MARGIN = 0.1
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
    transfer = _transfer(new_tokenizer, old_tokenizer, old.input.shape[0])
    rows = {
        name: lep.initialise(matrix, transfer, norm_correction=norm_correction).to(matrix.dtype)
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


def propagate(
    base: Path,
    instruct: Path,
    adapted: Path,
    target: Path,
    method: str,
    *,
    tokenizer: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the instruct model with the adapted base's vocabulary: LEP, METHOD section 5.

    The body is the instruct model's, bit for bit. Rows of its special and added tokens are its own. Where
    base and instruct differ in height, the rows that both have are used; what the instruct model adds belongs
    to its added tokens.

    Args:
        method: a name in `lep.METHODS`.
        tokenizer: folder of the tokenizer that the adapted model is meant to have; checked when given.
        force: propagate although base and instruct look like strangers, or the adapted rows like another
            vocabulary's.

    Returns:
        `lep.fit_report` for `input` and, where it is untied, `head`.

    Raises:
        RuadaptError: the three models do not belong together, or one is unreadable; nothing is written then.
    """
    models = {name: read_embeddings(path) for name, path in _named(base, instruct, adapted).items()}
    _require_agreement(models)
    base_tokenizer, instruct_tokenizer = load_tokenizer(base), load_tokenizer(instruct)
    adapted_tokenizer = load_tokenizer(adapted)
    if tokenizer is not None and load_tokenizer(tokenizer).get_vocab() != adapted_tokenizer.get_vocab():
        raise RuadaptError(f"{adapted} was adapted with another tokenizer than {tokenizer}")
    for folder, own, model in (
        (base, base_tokenizer, models["base"]),
        (instruct, instruct_tokenizer, models["instruct"]),
        (adapted, adapted_tokenizer, models["adapted"]),
    ):
        require_rows(folder, own, model)
    if not force:
        _require_pair(base, instruct, models, base_tokenizer, instruct_tokenizer)

    common = min(models["base"].input.shape[0], models["instruct"].input.shape[0])
    new_rows = models["adapted"].input.shape[0]
    transfer = _transfer(adapted_tokenizer, base_tokenizer, common, rows=new_rows)
    overlap_new, overlap_old = overlap(adapted_tokenizer, base_tokenizer)
    copied_new, copied_old = _copied(instruct, instruct_tokenizer, adapted_tokenizer)
    fit_mask = torch.zeros(new_rows, dtype=torch.bool)
    fit_mask[transfer.indices()[0]] = True
    fit_mask[copied_new] = False
    pieces = _pieces(base_tokenizer, common)
    report: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for name, matrix in models["instruct"].matrices().items():
        inputs = lep.LepInputs(
            base=models["base"].matrices()[name][:common],
            instruct=matrix[:common],
            adapted=models["adapted"].matrices()[name],
            transfer=transfer,
            overlap_new=overlap_new,
            overlap_old=overlap_old,
            fit_mask=fit_mask,
            copied_new=copied_new,
            copied_rows=matrix[copied_old],
        )
        if not force:
            _require_own_rows(adapted, inputs)
        rows[name] = lep.propagate(method, inputs).to(matrix.dtype)
        report[name] = lep.fit_report(method, inputs, pieces)
    write_model(instruct, target, Embeddings(rows["input"], rows.get("head")), adapted)
    return report


def drift(base: Path, instruct: Path) -> dict[str, dict[str, float]]:
    """Say how far the instruct model's rows moved from the base's: `lep.compare` of input and untied head.

    Raises:
        RuadaptError: a folder is unreadable, or hidden sizes or tying differ.
    """
    models = {"base": read_embeddings(base), "instruct": read_embeddings(instruct)}
    _require_agreement(models)
    return _drift(models)


def _drift(models: dict[str, Embeddings]) -> dict[str, dict[str, float]]:
    common = min(models["base"].input.shape[0], models["instruct"].input.shape[0])
    instruct = models["instruct"].matrices()
    return {
        name: lep.compare(matrix[:common], instruct[name][:common])
        for name, matrix in models["base"].matrices().items()
    }


def _named(base: Path, instruct: Path, adapted: Path) -> dict[str, Path]:
    return {"base": Path(base), "instruct": Path(instruct), "adapted": Path(adapted)}


def _require_agreement(models: dict[str, Embeddings]) -> None:
    for what, values in (
        ("hidden size", {name: model.input.shape[1] for name, model in models.items()}),
        ("tying of the head", {name: tying(model.tied) for name, model in models.items()}),
    ):
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RuadaptError(f"the models differ in {what}: {found}; LEP needs models of one architecture")


def _require_pair(
    base: Path,
    instruct: Path,
    models: dict[str, Embeddings],
    base_tokenizer: Tokenizer,
    instruct_tokenizer: Tokenizer,
) -> None:
    ids, theirs = base_tokenizer.get_vocab(), instruct_tokenizer.get_vocab()
    moved = sum(theirs.get(token, number) != number for token, number in ids.items())
    if moved > STRANGERS_IDS * len(ids):
        raise RuadaptError(
            f"{instruct} gives {moved} of {len(ids)} tokens other ids than {base}: "
            "it is not tuned from this base; use force to go on"
        )
    for name, values in _drift(models).items():
        if values["mean_cosine"] < STRANGERS_COSINE:
            raise RuadaptError(
                f"{instruct} is not tuned from {base}: the mean cosine of their {name} rows is "
                f"{values['mean_cosine']:.2f}, under {STRANGERS_COSINE} (tuned models have about 0.99); "
                "use force to go on"
            )


def _require_own_rows(adapted: Path, inputs: lep.LepInputs) -> None:
    """Refuse an adapted model whose rows do not follow its tokenizer's tokens."""
    old = inputs.base[inputs.overlap_old]
    new = inputs.adapted[inputs.overlap_new]
    own, another = (lep.compare(old, rows)["mean_cosine"] for rows in (new, new.roll(1, dims=0)))
    if len(old) > 1 and own - another < OWN_ROWS_MARGIN:
        raise RuadaptError(
            f"{adapted}: rows of shared tokens resemble the base's rows of the same tokens no more "
            f"(cosine {own:.2f}) than those of others ({another:.2f}): the model was adapted with another "
            "tokenizer; use force to go on"
        )


def _transfer(new: Tokenizer, old: Tokenizer, old_rows: int, rows: int | None = None) -> Tensor:
    """T, `[rows, old_rows]`; rows beyond the new tokenizer's ids (padding) are empty."""
    matrix = conversion_matrix(new, old, old_rows=old_rows).to_sparse_coo()
    shape = (rows or matrix.shape[0], old_rows)
    return torch.sparse_coo_tensor(matrix.indices(), matrix.values(), shape, check_invariants=True).coalesce()


def _copied(folder: Path, instruct: Tokenizer, adapted: Tokenizer) -> tuple[Tensor, Tensor]:
    """New and old ids of the instruct tokenizer's added tokens.

    Raises:
        RuadaptError: the adapted vocabulary lost a special token: chat could not work.
    """
    pairs = []
    for old_id, token in instruct.get_added_tokens_decoder().items():
        new_id = adapted.token_to_id(token.content)
        if new_id is not None:
            pairs.append((new_id, old_id))
        elif token.special:
            raise RuadaptError(
                f"the adapted vocabulary lacks {token.content!r}, a special token of {folder}; "
                "build the new vocabulary from the instruct model's tokenizer"
            )
    ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]


def _pieces(tokenizer: Tokenizer, rows: int) -> Tensor:
    """Sparse `[rows, rows]` halves: the two tokens that a BPE merge makes a third of; none without merges."""
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"].get("merges", [])
    made: dict[int, tuple[int, int]] = {}
    for left, right in merges:
        made.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
    indices = [(token, part) for token, parts in made.items() for part in parts]
    return torch.sparse_coo_tensor(
        torch.tensor(indices, dtype=torch.long).reshape(-1, 2).T,
        torch.full((len(indices),), 0.5, dtype=torch.float64),
        (rows, rows),
        check_invariants=True,
    ).coalesce()


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
