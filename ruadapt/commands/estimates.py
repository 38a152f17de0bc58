"""What a profile will download, write and hold in memory, from its parameters alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.documents import HUB_NAME, SUMMARIES
from ruadapt.evaluation.plan import ORIGINAL
from ruadapt.files import free_bytes, located, project_root, read_json
from ruadapt.pipeline.runner import Pipeline
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.losses import MUCH_LOGITS, chunk_tokens

TRAINED_BYTES, STATE_BYTES, SAVED_BYTES = 4, 12, 2  # float32; its gradient and Adam's two moments; bfloat16
LAYER_BYTES = 34  # a layer's activations, for each token and hidden unit, in 16 bits (arXiv 2205.05198)
LOGIT_BYTES = 10  # 16-bit logits, their float32 copy and its gradient
ASSUMED = (
    f"{TRAINED_BYTES} bytes a parameter and {STATE_BYTES} more a trained one (FSDP shards both); "
    f"{LAYER_BYTES} × batch × length × hidden × layers (with checkpointing one layer, and 2 for each other); "
    f"{LOGIT_BYTES} bytes a logit; a batch is that of all devices together"
)


@dataclass(frozen=True)
class Shape:
    """Numbers of parameters: `body` without embeddings and head, `row` of one row of one matrix."""

    body: int
    row: int
    matrices: int
    height: int
    layers: int

    def parameters(self, height: int) -> int:
        return self.body + self.matrices * height * self.row


def estimate(
    profile: str, settings: Iterable[str] = (), devices: int = 1, root: Path | None = None
) -> dict[str, Any]:
    """Return `licences`, `downloads`, `disk`, `memory` of each training on a device, and what was assumed.

    Parameters that the profile leaves to the command line may still be missing.

    Raises:
        RuadaptError: an unknown profile or parameter, a batch that the devices can't share, or a model whose
            configuration can't be had.
    """
    pipeline = Pipeline(profile, settings, root)
    values = {name: value for stage in pipeline.stages for name, value in pipeline.parameters(stage).items()}
    for name in ("pretraining_batch_size", "calibration_batch_size", "preference_batch_size"):
        if values[name] % devices:
            raise RuadaptError(
                f"{name} counts the sequences of all devices together: {values[name]} is no multiple of "
                f"{devices}; add --set {name}=... (and change the accumulation the other way)"
            )
    facts = read_json((root or project_root()) / "data" / "models.json")
    names = {role: values[f"{role}_model"] or f"{values['pair_dir']}/{role}" for role in ("base", "instruct")}
    shapes = {role: _shape(name, facts) for role, name in names.items()}
    shape = shapes["base"]
    if shape is None:
        raise RuadaptError(f"{names['base']} is an adapter; name the whole model as base_model")
    heights = {ORIGINAL: shape.height} | {
        name: shape.height + values["added_rows"] if name == "extended" else values["vocab_size"]
        for name in values["vocabularies"]
    }
    sources = {values["calibration_dataset"], values["preference_dataset"], ""}
    sources |= {row["source"] for row in values["corpus_mix"]}
    if "darumeru" in values["evaluation_tasks"]:
        sources |= {values["evaluation_data"]} if values["evaluation_data"] else {HUB_NAME, SUMMARIES}
    remote = {name for name in {*names.values(), *sources} if name and not located(name).exists()}
    disk = _disk_bytes(values, shape, heights)
    return {
        "profile": profile,
        "still_to_be_given": pipeline.missing,
        "licences": {name: _licence(name, facts) for name in names.values() if name in remote},
        "downloads": {
            "models_gigabytes": {
                names[role]: _gigabytes(SAVED_BYTES * found.parameters(found.height))
                for role, found in shapes.items()
                if found and names[role] in remote
            },
            "data_sets": sorted(remote & sources),
        },
        "disk": {
            "gigabytes": _gigabytes(disk),
            "free_gigabytes": _gigabytes(free_bytes(pipeline.folder)),
            "enough": free_bytes(pipeline.folder) > disk,
        },
        "memory": _memory(values, shape, heights, devices),
        "memory_assumed": ASSUMED,
    }


def _shape(name: str, facts: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a model that is known here, local or on the hub; None for an adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path, (repository, _, revision) = located(name), name.partition("@")
    known = facts.get(repository) if not path.exists() else None
    if (path / "adapter_config.json").is_file() or (known and known["config"] is None):
        return None
    try:
        if known:
            config = AutoConfig.for_model(**known["config"])
        else:
            place = path if path.is_dir() else repository
            config = AutoConfig.from_pretrained(place, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise RuadaptError(
            f"the configuration of {name} can't be had ({' '.join(str(error).split())[:150]}); check its "
            "name, set HF_HUB_OFFLINE=0 to ask the hub, or give a local folder"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = 1 if config.tie_word_embeddings else 2
    height, width = model.get_input_embeddings().weight.shape
    body = sum(parameter.numel() for parameter in model.parameters()) - matrices * height * width
    return Shape(body, width, matrices, height, config.get_text_config().num_hidden_layers)


def _memory(
    values: Mapping[str, Any], shape: Shape, heights: Mapping[str, int], devices: int
) -> list[dict[str, Any]]:
    """Return what each kind of training holds on one device, in gigabytes, plain and sharded."""
    tallest = max(heights.values())
    rows = shape.matrices * tallest * shape.row
    everything = shape.parameters(tallest)
    trained = everything if values["pretraining_train"] == "all" else rows
    tuned = (rows if values["lora_rank"] else everything) if values["calibration_embeddings"] else 0
    kinds = [("continued pre-training", "pretraining")]
    kinds += [
        (kind, "preference" if kind in PREFERENCE_METHODS else "calibration")
        for kind in values["calibration_data"]
    ]
    found = []
    for kind, name in kinds:
        length = values["pretraining_block_size" if name == "pretraining" else f"{name}_max_length"]
        answers = 2 if kind in ("dpo", "simpo") else 1  # both of a pair at once
        tokens = values[f"{name}_batch_size"] * answers * length
        checkpointing = values[
            "pretraining_checkpointing" if name == "pretraining" else "gradient_checkpointing"
        ]
        layers = 1 + 2 * shape.layers / LAYER_BYTES if checkpointing else shape.layers
        chunked = name != "preference" and 4 * tokens * tallest > MUCH_LOGITS
        logits = (chunk_tokens(tallest) if chunked else tokens) * tallest
        changed = {"pretraining": trained, "calibration": tuned, "preference": 0}[name]
        states = TRAINED_BYTES * everything + STATE_BYTES * changed
        batch = (LAYER_BYTES * tokens * shape.row * layers + LOGIT_BYTES * logits) / devices
        whole, sharded = _gigabytes(states + batch), _gigabytes(states / devices + batch)
        found.append({"what": kind, "gigabytes": whole, "gigabytes_sharded": sharded})
    return found


def _disk_bytes(values: Mapping[str, Any], shape: Shape, heights: Mapping[str, int]) -> float:
    """Return the bytes of a finished run's models, with the most that checkpoints take beside them."""
    new, seeds = [name for name in heights if name != ORIGINAL], len(values["seeds"])
    tuned = [ORIGINAL, *values["calibration_vocabularies"]] if values["calibration_vocabularies"] else []
    trained = [*heights] * (1 + len(values["methods"])) + tuned * len(values["calibration_data"])
    models = [*new, *trained * seeds]
    tallest = max(heights.values())
    rows = shape.matrices * tallest * shape.row
    checkpoint = TRAINED_BYTES * shape.parameters(tallest) + (STATE_BYTES - TRAINED_BYTES) * rows
    return SAVED_BYTES * sum(shape.parameters(heights[name]) for name in models) + 3 * checkpoint


def _licence(name: str, facts: Mapping[str, Any]) -> str:
    known = facts.get(name.partition("@")[0])
    if known is None:
        return "not known here: read its card"
    gate = f"; GATED: {known['gated']} on its page of the hub, then `hf auth login`" if known["gated"] else ""
    return f"{known['licence']}{gate}"


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 2)
