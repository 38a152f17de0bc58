"""What a profile will download, write and hold in memory, from its parameters alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.documents import HUB_NAME, SUMMARIES
from ruadapt.files import free_bytes, located, project_root, read_json
from ruadapt.pipeline.runner import Pipeline
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.losses import MUCH_LOGITS
from ruadapt.vocab.registry import ORIGINAL

TRAINED_BYTES, STATE_BYTES, SAVED_BYTES = 4, 12, 2  # float32; its gradient and Adam's two moments; bfloat16
LAYER_BYTES = 34  # a layer's activations, for each token and hidden unit, in 16 bits (arXiv 2205.05198)
LOGIT_BYTES = 10  # 16-bit logits, their float32 copy and its gradient


def estimate(profile: str, settings: Iterable[str] = (), root: Path | None = None) -> dict[str, Any]:
    """Return `licences`, `downloads`, `disk`, and the `memory` of each training in gigabytes on one device.

    Parameters that the profile leaves to the command line may still be missing.

    Raises:
        RuadaptError: an unknown profile or parameter, or a base whose configuration can't be had.
    """
    pipeline = Pipeline(profile, settings, root)
    values = {name: value for stage in pipeline.stages for name, value in pipeline.parameters(stage).items()}
    facts = read_json((root or project_root()) / "data" / "models.json")
    own = values["base_model"]  # an instruct model that is tuned here is as large
    models = [
        values[f"{role}_model"] or own or f"{values['pair_dir']}/{role}" for role in ("base", "instruct")
    ]
    sources = {values["calibration_dataset"], values["preference_dataset"]}
    sources |= {row["source"] for row in [*values["corpus_mix"], *values["chats"]]}
    if "darumeru" in values["evaluation_tasks"]:
        sources |= {values["evaluation_data"]} if values["evaluation_data"] else {HUB_NAME, SUMMARIES}
    body, width, row, height, layers = _shape(models[0], facts)
    heights = {ORIGINAL: height} | {
        name: height + values["added_rows"] if name == "extended" else values["vocab_size"]
        for name in values["vocabularies"]
    }
    sizes = {name: body + row * count for name, count in heights.items()}  # parameters by vocabulary
    tuned = [ORIGINAL, *values["calibration_vocabularies"]] if values["calibration_vocabularies"] else []
    trained = [*heights] * (1 + len(values["methods"])) + tuned * len(values["calibration_data"])
    saved = (
        sum(sizes.values()) - sizes[ORIGINAL] + len(values["seeds"]) * sum(sizes[name] for name in trained)
    )
    tallest = max(heights.values())
    checkpoint = TRAINED_BYTES * (body + row * tallest) + (STATE_BYTES - TRAINED_BYTES) * row * tallest
    disk, free = SAVED_BYTES * saved + 3 * checkpoint, free_bytes(pipeline.folder)
    remote = [name for name in models if not located(name).exists()]
    return {
        "profile": profile,
        "still_to_be_given": pipeline.missing,
        "licences": {name: _licence(name, facts) for name in remote},
        "downloads": {
            "models_gigabytes": {  # an instruct model is as large as its base, an adapter small
                name: _gigabytes(SAVED_BYTES * sizes[ORIGINAL])
                for name in remote
                if _known(name, facts).get("config", True)
            },
            "data_sets": sorted(name for name in sources if name and not located(name).exists()),
        },
        "disk": {
            "gigabytes": _gigabytes(disk),
            "free_gigabytes": _gigabytes(free),
            "enough": free > disk,
        },
        "memory_gigabytes": _memory(values, body, width, row, tallest, layers),
    }


def _shape(name: str, facts: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Return a model's parameters in the body, hidden size, parameters of a row, rows, and layers.

    The model is known here, local or on the hub; a row counts twice where the head is not tied.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path, (repository, _, revision) = located(name), name.partition("@")
    known = None if path.exists() else _known(name, facts).get("config")
    try:
        if known:
            config = AutoConfig.for_model(**known)
        else:
            config = AutoConfig.from_pretrained(
                path if path.is_dir() else repository, revision=revision or None
            )
    except (OSError, ValueError) as error:
        raise RuadaptError(
            f"the configuration of {name} can't be had ({' '.join(str(error).split())[:150]}); check its "
            "name, set HF_HUB_OFFLINE=0 to ask the hub, or give the folder of a whole model"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    height, width = model.get_input_embeddings().weight.shape
    row = width if config.tie_word_embeddings else 2 * width
    body = sum(parameter.numel() for parameter in model.parameters()) - row * height
    return body, width, row, height, config.get_text_config().num_hidden_layers


def _memory(
    values: Mapping[str, Any], body: int, width: int, row: int, rows: int, layers: int
) -> dict[str, float]:
    """Return the gigabytes of each kind of training with a whole batch on one device.

    Of activations with checkpointing one layer is held, and 2 bytes for each unit of the others. FSDP divides
    parameters and states by the number of devices, every way of training the rest.
    """
    matrices, everything = row * rows, body + row * rows
    trained = {
        "pretraining": everything if values["pretraining_train"] == "all" else matrices,
        "calibration": (matrices if values["lora_rank"] else everything) * values["calibration_embeddings"],
        "preference": 0,
    }
    found = {}
    for kind in ("pretraining", *values["calibration_data"]):
        name = (
            "preference" if kind in PREFERENCE_METHODS else "calibration" if kind != "pretraining" else kind
        )
        length = values["pretraining_block_size" if name == "pretraining" else f"{name}_max_length"]
        tokens = (
            values[f"{name}_batch_size"] * length * (2 if kind in ("dpo", "simpo") else 1)
        )  # both of a pair
        pretraining = name == "pretraining"
        checkpointing = values["pretraining_checkpointing" if pretraining else "gradient_checkpointing"]
        held = 1 + 2 * layers / LAYER_BYTES if checkpointing else layers
        logits = tokens * rows if kind == "simpo" else min(tokens * rows, MUCH_LOGITS // 4)
        states = TRAINED_BYTES * everything + STATE_BYTES * trained[name]
        found[kind] = _gigabytes(states + LAYER_BYTES * tokens * width * held + LOGIT_BYTES * logits)
    return found


def _known(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(facts.get(name.partition("@")[0], {}))


def _licence(name: str, facts: Mapping[str, Any]) -> str:
    known = _known(name, facts)
    if not known:
        return "not known here: read its card"
    gate = f"; GATED: {known['gated']} on its page of the hub, then `hf auth login`" if known["gated"] else ""
    return f"{known['licence']}{gate}"


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 2)
