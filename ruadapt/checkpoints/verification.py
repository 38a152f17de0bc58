"""Written model folders, checked against what was promised."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt.checkpoints.model_configs import carried, eos_ids, new_configs
from ruadapt.checkpoints.model_folders import Layout, read_embeddings, require_rows, tying
from ruadapt.checkpoints.tensor_files import same_bytes
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json
from ruadapt.vocab import load_as_transformers, load_tokenizer, rows, shared_specials, shared_tokens

PROBES = ("The old captain has 25 horses.", "Старый капитан видел 25 лошадей.")


def verify(
    folder: Path,
    source: Path | None = None,
    *,
    kept: Literal["special", "shared"] = "special",
    changed: Collection[str] = (),
    reload: bool | None = None,
) -> dict[str, Any]:
    """Check a written model, reloaded as a user would.

    Checked: no embedding row is NaN or infinite; `AutoTokenizer` gives the ids of `tokenizer.json` and no
    others; eos ids have tokens. On reload: weights load with no name missing, the head is tied or not as the
    config says, logits of an English and a Russian sentence are finite. Against `source`: every other tensor
    bit for bit, the promised rows bit for bit, chat text, the model's own files, and both configs but for
    what the new vocabulary changes.

    Args:
        kept: rows that must be the source's: of its `special` and other added tokens (what `propagate`
            promises), or of all `shared` tokens (`initialise`).
        changed: tensors of the body that were meant to change (the report of `propagate` names them); only
            their dtype and shape are compared.
        reload: load the whole model; by default where it fits into half of the memory that is free. Without
            it, memory holds the embeddings and one block of the body.

    Returns:
        What was found, for a report.

    Raises:
        RuadaptError: something is wrong; where the model can be read, the message lists every failed check.
    """
    folder = Path(folder)
    if reload is None:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        reload = weights < psutil.virtual_memory().available / 2
    embeddings, raw = read_embeddings(folder), load_tokenizer(folder)
    height = len(embeddings.input)
    require_rows(folder, raw, height)
    if (tokenizer := load_as_transformers(folder)) is None:
        raise RuadaptError(f"transformers can't load the tokenizer in {folder} by AutoTokenizer")
    eos, chat = [raw.id_to_token(number) for number in eos_ids(folder)], _chat(tokenizer)
    problems = _reloaded(folder, embeddings, raw) if reload else []
    for text in PROBES:
        if tokenizer(text).input_ids != raw.encode(text).ids:
            problems.append(f"AutoTokenizer and tokenizer.json give different ids for {text!r}")
    if None in eos:
        problems.append("an eos id of the configs has no token")
    if source is not None:
        source = Path(source)
        old, before = load_tokenizer(source), read_embeddings(source)
        problems += _changed_tensors(embeddings, before, changed)
        problems += _moved_rows(before, old, embeddings, raw, kept)
        for name in carried(source):
            if not (folder / name).is_file() or (folder / name).read_bytes() != (source / name).read_bytes():
                problems.append(f"{name} is not {source}'s")
        if _chat(AutoTokenizer.from_pretrained(source, local_files_only=True)) not in (None, chat):
            problems.append(f"the chat template renders other text than {source}'s")
        for name, config in new_configs(source, old, raw, height, before.tied).items():
            if config != (own := read_json(folder / name)):
                keys = sorted(key for key in config | own if config.get(key) != own.get(key))
                problems.append(f"{name} differs from {source}'s in {', '.join(keys)}")
    if problems:
        raise RuadaptError(f"{folder} failed verification: " + "; ".join(problems))
    return {
        "rows": height,
        "tokens": rows(raw),
        "tied": embeddings.tied,
        "dtype": str(embeddings.input.dtype).removeprefix("torch."),
        "eos": eos,
        "chat": chat is not None,
        "reloaded": reload,
        "compared_with_source": source is not None,
        "changed": len(changed),
    }


def _reloaded(folder: Path, embeddings: Layout, tokenizer: Tokenizer) -> list[str]:
    """What is wrong with the model as transformers loads it, by the class that its config names."""
    names = read_json(folder / "config.json").get("architectures") or [""]
    loader = getattr(transformers, names[0], AutoModelForCausalLM)
    loaded: Any = loader.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, loading = loaded
    rows = model.get_input_embeddings().weight
    problems = []
    kinds = ("missing_keys", "unexpected_keys")
    if wrong := {kind: sorted(loading[kind])[:3] for kind in kinds if loading[kind]}:
        problems.append(f"weights do not match the architecture: {wrong}")
    if (model.get_output_embeddings().weight.data_ptr() == rows.data_ptr()) != embeddings.tied:
        problems.append(f"the reloaded head is not {tying(embeddings.tied)}")
    if not torch.equal(rows, embeddings.input):
        problems.append("the reloaded input embeddings differ from the file's")
    with torch.no_grad():
        for text in PROBES:
            if not model(torch.tensor([tokenizer.encode(text).ids])).logits.isfinite().all():
                problems.append(f"logits of {text!r} are not finite")
    return problems


def _chat(tokenizer: Any) -> str | None:
    """Render a message by the chat template, which is returned where it asks for others; None without one."""
    if not tokenizer.chat_template:
        return None
    message = {"role": "user", "content": PROBES[1]}
    try:
        return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):
        return str(tokenizer.chat_template)


def _changed_tensors(made: Layout, source: Layout, changed: Collection[str]) -> list[str]:
    """Body tensors that are not the source's as they should be, as sentences."""
    first, second = made.body(), source.body()
    if first.keys() != second.keys():
        return [f"the tensors are not those of {source.folder}"]
    if unknown := sorted(set(changed) - first.keys()):
        return [f"{unknown[0]} was meant to change and is no tensor of the body"]
    different = []
    for name in tqdm(sorted(first), desc=f"{made.folder.name} compared", disable=None):
        one, other = first[name], second[name]
        same_form = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not (same_form if name in changed else same_bytes(one, other)):
            different.append(name)
    return [f"{len(different)} tensors differ from {source.folder}'s: {different[:3]}"] if different else []


def _moved_rows(source: Layout, theirs: Tokenizer, made: Layout, own: Tokenizer, kept: str) -> list[str]:
    """Rows that were promised to stay the source's and did not, as sentences."""
    pairs = [pair for pair in shared_specials(own, theirs) if pair[1] < source.height()]
    pairs += shared_tokens(own, theirs) if kept == "shared" else []
    new, old = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    problems, matrices = [], source.matrices()
    for name, matrix in made.matrices().items():
        before = matrices.get(name)
        if before is None or (matrix.dtype, matrix.shape[1]) != (before.dtype, before.shape[1]):
            return [f"the embeddings do not have the form of {source.folder}'s"]
        moved: list[int] = []
        for ours, others in zip(new.split(4096), old.split(4096), strict=True):
            # Bytes, so that 0.0 does not equal -0.0.
            same = matrix[ours].view(torch.uint8) == before[others].view(torch.uint8)
            moved += ours[~same.all(dim=1)].tolist()
        if moved:
            tokens = [own.id_to_token(number) for number in moved[:3]]
            problems.append(f"{len(moved)} {name} rows of {kept} tokens are not {source.folder}'s: {tokens}")
    return problems
