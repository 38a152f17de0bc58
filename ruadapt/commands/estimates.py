"""What a profile will download, write and hold in memory, from its parameters alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from ruadapt.evaluation.documents import HUB_NAME, SUMMARIES
from ruadapt.files import free_bytes, located, project_root, read_json
from ruadapt.hub import fetch_model
from ruadapt.pipeline.runner import Pipeline
from ruadapt.training.losses import MUCH_LOGITS
from ruadapt.vocab.registry import ORIGINAL, vocabulary

TRAINED_BYTES, STATE_BYTES, SAVED_BYTES = 4, 12, 2  # float32; its gradient and Adam's two moments; bfloat16
LAYER_BYTES = 34  # a layer's activations, for each token and hidden unit, in 16 bits (arXiv 2205.05198)
LOGIT_BYTES = 10  # 16-bit logits, their float32 copy and its gradient


def estimate(profile: str, settings: Iterable[str] = ()) -> dict[str, Any]:
    """Return `downloads`, `disk`, and the `memory` of each training in gigabytes on one device.

    Parameters that the profile leaves to the command line may still be missing.

    Raises:
        RuadaptError: an unknown profile or parameter, or a base whose configuration can't be had.
    """
    pipeline = Pipeline(profile, settings)
    values = {name: value for stage in pipeline.stages for name, value in pipeline.parameters(stage).items()}
    own = values["base_model"]  # an instruct model that is tuned here is as large
    models = [
        values[f"{role}_model"] or own or f"{values['pair_dir']}/{role}" for role in ("base", "instruct")
    ]
    facts = read_json(project_root() / "data" / "models.json")
    known = {name: facts.get(name.partition("@")[0], {}) for name in models if not located(name).exists()}
    sources = {row["source"] for row in [*values["corpus_mix"], *values["chats"]]}
    sources.add(values["calibration_dataset"])
    if "darumeru" in values["evaluation_tasks"]:
        sources |= {values["evaluation_data"]} if values["evaluation_data"] else {HUB_NAME, SUMMARIES}
    config, body, row, height = _shape(models[0], known.get(models[0], {}).get("config"))
    heights = {ORIGINAL: height} | {
        name: height + values["added_rows"] if vocabulary(name).extends else values["vocab_size"]
        for name in values["vocabularies"]
    }
    sizes = {name: body + row * count for name, count in heights.items()}  # parameters by vocabulary
    tuned = [ORIGINAL, *values["calibration_vocabularies"]] if values["calibration_vocabularies"] else []
    trained = [*heights] * (1 + len(values["methods"])) + tuned * len(values["calibration_data"])
    each_seed = sum(sizes[name] for name in trained)
    saved = sum(sizes.values()) - sizes[ORIGINAL] + len(values["seeds"]) * each_seed
    matrices = row * max(heights.values())
    checkpoint = TRAINED_BYTES * body + STATE_BYTES * matrices
    disk, free = SAVED_BYTES * saved + 3 * checkpoint, free_bytes(pipeline.folder)
    fetched = [name for name, each in known.items() if each.get("config", True)]  # an adapter is small
    downloads = {
        "models_gigabytes": dict.fromkeys(fetched, _gigabytes(SAVED_BYTES * sizes[ORIGINAL])),
        "data_sets": sorted(name for name in sources if name and not located(name).exists()),
    }
    return {
        "downloads": downloads,
        "disk": {"gigabytes": _gigabytes(disk), "free_gigabytes": _gigabytes(free), "enough": free > disk},
        "memory_gigabytes": _memory(values, config, body, matrices, max(heights.values())),
    }


def _shape(name: str, known: Mapping[str, Any] | None) -> tuple[Any, int, int, int]:
    """Return a model's text config, parameters of the body and of a row, and rows.

    The model is known here, local or on the hub; a row counts twice where the head is not tied.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if known:
        config = AutoConfig.for_model(**known)
    else:
        place = located(name) if located(name).exists() else fetch_model(name, files=["config.json"])
        config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    height, width = model.get_input_embeddings().weight.shape
    row = width if config.tie_word_embeddings else 2 * width
    body = sum(parameter.numel() for parameter in model.parameters()) - row * height
    return config.get_text_config(), body, row, height


def _memory(values: Mapping[str, Any], config: Any, body: int, matrices: int, rows: int) -> dict[str, float]:
    """Return the gigabytes of each kind of training with a whole batch on one device.

    Of activations with checkpointing one layer is held, and 2 bytes for each unit of the others. FSDP divides
    parameters and states by the number of devices, every way of training the rest.
    """
    everything, layers = body + matrices, config.num_hidden_layers
    tuned = (matrices if values["lora_rank"] else everything) * values["calibration_embeddings"]
    learnt = everything if values["pretraining_train"] == "all" else matrices
    asked = {"pretraining": (learnt, values["pretraining_block_size"], values["pretraining_checkpointing"])}
    if values["calibration_data"]:
        asked["calibration"] = (tuned, values["calibration_max_length"], values["gradient_checkpointing"])
    found = {}
    for kind, (trained, length, checkpointing) in asked.items():
        tokens = values[f"{kind}_batch_size"] * length
        held = 1 + 2 * layers / LAYER_BYTES if checkpointing else layers
        logits = min(tokens * rows, MUCH_LOGITS // 4)
        states = TRAINED_BYTES * everything + STATE_BYTES * trained
        found[kind] = _gigabytes(
            states + LAYER_BYTES * tokens * config.hidden_size * held + LOGIT_BYTES * logits
        )
    return found


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 2)
