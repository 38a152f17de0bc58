"""What a profile will download, write, hold in memory and compute, before anything starts.

Orders of magnitude from the parameters alone; every assumption stands in the result beside the numbers.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.documents import HUB_NAME, SUMMARIES
from ruadapt.evaluation.plan import ORIGINAL
from ruadapt.files import project_root, read_json
from ruadapt.pipeline.runner import Run
from ruadapt.pipeline.stages import UNTIL, check_parameters, find_stages, load_profile, parse_settings
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.losses import MUCH_LOGITS, chunk_tokens
from ruadapt.vocab.registry import vocabulary

FACTS = "models.json"
ANSWERS = "self-calibration answers"
# Russian characters per token: original vocabularies, and new ones of 30,000 to 50,000 Russian tokens.
CHARACTERS_PER_TOKEN = {True: 2.5, False: 3.7}
CYRILLIC_BYTES = 1.8  # a character of Russian text with its spaces and digits
TRAINED_BYTES, STATE_BYTES, SAVED_BYTES = 4, 12, 2  # float32; its gradient and Adam's two moments; bfloat16
LAYER_BYTES = 34  # a layer's activations, for each token and hidden unit, in 16 bits (arXiv 2205.05198)
LOGIT_BYTES = 10  # 16-bit logits, their float32 copy and its gradient
# Operations for each parameter beside the 4 of training: the reference's pass, and KTO's mean divergence.
REFERENCE_PASSES = {"dpo": 2, "kto": 6}


@dataclass(frozen=True)
class Machine:
    """Devices, the peak of each (10^12 dense bfloat16 operations a second), the share that is reached."""

    devices: int = 1
    teraflops: float = 312.0
    utilisation: float = 0.4
    decoding_utilisation: float = 0.05


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

    def computing(self, height: int) -> int:
        """Count what each token is multiplied with: all but the input embeddings, which are looked up."""
        return self.body + height * self.row


def estimate(
    profile: str, settings: Iterable[str] = (), machine: Machine | None = None, root: Path | None = None
) -> dict[str, Any]:
    """Return `licences`, `downloads`, `disk`, `trainings` (tokens, memory, hours), `total`, `assumptions`.

    Parameters that the profile leaves to the command line may still be missing; what depends on them is null.

    Raises:
        RuadaptError: an unknown profile or parameter, a batch that the devices can't share, or a model whose
            configuration can't be had.
    """
    root, machine = root or project_root(), machine or Machine()
    stages = find_stages(root / "notebooks")
    given = load_profile(root / "profiles", profile) | parse_settings(settings)
    given.pop(UNTIL, None)
    missing = sorted(name for name, value in given.items() if value is None)
    defaults = {name: value for stage in stages for name, value in stage.defaults.items()}
    known = check_parameters({name: value for name, value in given.items() if value is not None}, stages)
    values = defaults | {"run_dir": f"runs/{profile}"} | known
    for name in ("pretraining_batch_size", "calibration_batch_size", "preference_batch_size"):
        if values[name] % machine.devices:
            raise RuadaptError(
                f"{name} counts the sequences of all devices together: {values[name]} is no multiple of "
                f"{machine.devices}; add --set {name}=... (and change the accumulation the other way)"
            )
    names = {role: values[f"{role}_model"] or f"{values['pair_dir']}/{role}" for role in ("base", "instruct")}
    facts = read_json(root / "data" / FACTS)
    revisions = {role: str(values[f"{role}_revision"]) for role in names}
    configs = {role: _config(name, revisions[role], facts) for role, name in names.items()}
    if (base := configs["base"]) is None:
        raise RuadaptError(f"{names['base']} is an adapter; name the whole model as base_model")
    shapes = {role: _shape(config or base) for role, config in configs.items()}
    shape = shapes["base"]
    heights = {ORIGINAL: shape.height} | {
        name: shape.height + values["added_rows"] if vocabulary(name).extends else values["vocab_size"]
        for name in values["vocabularies"]
    }
    trainings = [
        _pretraining(values, shape, heights, _characters(values)),
        *_calibrations(values, shape, heights),
    ]
    for training in trainings:
        flops, (states, batch) = training.pop("flops"), training.pop("memory")
        batch /= machine.devices
        training["memory_gigabytes"] = _gigabytes(states + batch)
        training["memory_gigabytes_sharded"] = _gigabytes(states / machine.devices + batch)
        share = machine.decoding_utilisation if training["what"] == ANSWERS else machine.utilisation
        rate = machine.teraflops * 1e12 * share
        training["petaflops"] = None if flops is None else round(flops / 1e15, 1)
        training["device_hours"] = None if flops is None else round(flops / rate / 3600, 2)
    hours = [training["device_hours"] for training in trainings]
    disk = _disk(values, shape, heights)
    free = shutil.disk_usage(_existing(Run.path(values["run_dir"]))).free
    sources = {values[name] for name in ("calibration_dataset", "preference_dataset")} | {
        domain["source"] for domain in values["corpus_mix"]
    }
    if "darumeru" in values["evaluation_tasks"]:
        sources |= {values["evaluation_data"]} if values["evaluation_data"] else {HUB_NAME, SUMMARIES}
    local = {name for name in {*names.values(), *sources} if name and Run.path(name).exists()}
    total = None if None in hours else round(sum(hours), 2)
    return {
        "profile": profile,
        "still_to_be_given": missing,
        "licences": {name: _licence(name, facts) for name in names.values() if name not in local},
        "downloads": {
            "models_gigabytes": {
                name: _gigabytes(SAVED_BYTES * shapes[role].parameters(shapes[role].height))
                for role, name in names.items()
                if name not in local and configs[role]
            },
            "data_sets": sorted(sources - local - {""}),
        },
        "disk": disk | {"free_gigabytes": _gigabytes(free), "enough": free > disk["gigabytes"] * 1e9},
        "trainings": trainings,
        "total": {
            "device_hours": total,
            "wall_clock_hours": None if total is None else round(total / machine.devices, 2),
        },
        "assumptions": asdict(machine)
        | {
            "operations": "a token costs 2 N forward and 2 N backward through N parameters, 2 more for each "
            "one that is trained; N counts the head, not the input embeddings; attention is left out",
            "memory": f"each device, without sharding: {TRAINED_BYTES} bytes a parameter, {STATE_BYTES} more "
            f"a trained one, {LAYER_BYTES} bytes × batch × length × hidden × layers of activations (with "
            f"gradient checkpointing one layer's, and 2 bytes for each), {LOGIT_BYTES} bytes a logit (but in "
            "preference tuning taken in chunks); a batch is that of all devices together; FSDP shards the "
            "first two",
            "characters_per_token": {
                "original": CHARACTERS_PER_TOKEN[True],
                "new": CHARACTERS_PER_TOKEN[False],
            },
            "lengths": "calibration and answers count as if all had their greatest length",
            "left_out": "vocabularies, surgery, evaluation, and the download of adapters",
        },
    }


def _config(name: str, revision: str, facts: Mapping[str, Any]) -> PreTrainedConfig | None:
    """Return a model's configuration: known here, local or the hub's; None for an adapter, which has none."""
    path, (repository, _, wanted) = Run.path(name), name.partition("@")
    if (path / "adapter_config.json").is_file():
        return None
    if repository in facts and not path.exists():
        known = facts[repository]["config"]
        return AutoConfig.for_model(**known) if known else None
    try:
        if path.is_dir():
            return AutoConfig.from_pretrained(path)
        return AutoConfig.from_pretrained(repository, revision=revision or wanted or "main")
    except (OSError, ValueError) as error:
        raise RuadaptError(
            f"the configuration of {name} can't be had ({' '.join(str(error).split())[:150]}); check its "
            "name, set HF_HUB_OFFLINE=0 to ask the hub, or give a local folder"
        ) from error


def _shape(config: PreTrainedConfig) -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = [model.get_input_embeddings().weight]
    if not config.tie_word_embeddings:
        embeddings.append(model.get_output_embeddings().weight)
    height, width = embeddings[0].shape
    total = sum(parameter.numel() for parameter in model.parameters())
    body = total - len(embeddings) * height * width
    return Shape(body, width, len(embeddings), height, config.get_text_config().num_hidden_layers)


def _characters(values: Mapping[str, Any]) -> int | None:
    """Return the Russian characters that are trained on; None where only reading them all would tell."""
    wanted = [values[name] for name in ("text_characters_ru", "pretraining_characters") if values[name]]
    path = Run.path(values["corpus_ru"]) if values["corpus_ru"] else None
    if path is not None and path.exists():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        wanted.append(round(sum(file.stat().st_size for file in files) / CYRILLIC_BYTES))
    return min(wanted) if wanted else None


def _units(names: Iterable[str], seeds: Sequence[int]) -> list[str]:
    return [name for name in dict.fromkeys(names) for _ in seeds]


def _pretraining(
    values: Mapping[str, Any], shape: Shape, heights: Mapping[str, int], characters: int | None
) -> dict[str, Any]:
    units = _units(heights, values["seeds"])
    characters = characters or (values["text_characters_ru"] or None)
    tokens = {
        name: round(values["pretraining_epochs"] * characters / CHARACTERS_PER_TOKEN[name == ORIGINAL])
        for name in units
        if characters
    }
    checkpointing = values["pretraining_checkpointing"]
    passes = 4 + 2 * checkpointing
    flops = [
        tokens[name] * (passes * shape.computing(heights[name]) + 2 * heights[name] * shape.row)
        for name in units
        if tokens
    ]
    trained = {name: shape.matrices * heights[name] * shape.row for name in units}
    largest = max(units, key=lambda name: heights[name])
    batch, length = values["pretraining_batch_size"], values["pretraining_block_size"]
    return {
        "what": "continued pre-training of the embeddings",
        "models": len(units),
        "tokens": sum(tokens[name] for name in units) if tokens else None,
        "memory": _memory(shape, heights[largest], trained[largest], batch, length, checkpointing),
        "flops": sum(flops) if tokens else None,
    }


def _calibrations(
    values: Mapping[str, Any], shape: Shape, heights: Mapping[str, int]
) -> list[dict[str, Any]]:
    kinds = [kind for kind in values["calibration_data"] if kind not in PREFERENCE_METHODS]
    names = [ORIGINAL, *values["calibration_vocabularies"]] if values["calibration_vocabularies"] else []
    units = _units(names, values["seeds"])
    tallest = max([heights[name] for name in names], default=shape.height)
    checkpointing = values["gradient_checkpointing"]
    found = []
    if "self" in kinds:
        tokens = values["calibration_prompts" if values["calibration_dataset"] else "prompt_rows"]
        tokens *= values["answer_tokens"]
        found.append(
            {
                "what": ANSWERS,
                "models": 1,
                "tokens": tokens,
                "memory": (SAVED_BYTES * shape.parameters(shape.height), 0),
                "flops": tokens * 2 * shape.computing(shape.height),
            }
        )
    trained = shape.matrices * tallest * shape.row if values["calibration_embeddings"] else 0
    for kind in values["calibration_data"]:
        mine = [name for name in units if (name, kind) != (ORIGINAL, "self")]
        prefix, rows = ("preference", 0) if kind in PREFERENCE_METHODS else ("calibration", trained)
        # Two answers of a pair at once, but one in KTO.
        answers = 2 if kind in ("dpo", "simpo") else 1
        passes = 4 + 2 * checkpointing + REFERENCE_PASSES.get(kind, 0)
        batch, length = values[f"{prefix}_batch_size"], values[f"{prefix}_max_length"]
        tokens = values[f"{prefix}_steps"] * values[f"{prefix}_accumulation"] * batch * answers * length
        costs = [passes * shape.computing(heights[name]) + 2 * rows for name in mine]
        found.append(
            {
                "what": f"{kind} by LoRA",
                "models": len(mine),
                "tokens": tokens * len(mine),
                "memory": _memory(
                    shape,
                    tallest,
                    rows,
                    batch * answers,
                    length,
                    checkpointing,
                    kind not in PREFERENCE_METHODS,
                ),
                "flops": tokens * sum(costs),
            }
        )
    return found


def _memory(
    shape: Shape,
    height: int,
    trained: int,
    batch: int,
    length: int,
    checkpointing: bool,
    chunked: bool = True,
) -> tuple[float, float]:
    """Return the bytes of weights and their states, and those of a batch of all devices together."""
    layers = 1 + 2 * shape.layers / LAYER_BYTES if checkpointing else shape.layers
    activations = LAYER_BYTES * batch * length * shape.row * layers
    count = batch * length * height
    # In chunks where they would be many; their gradient by the head is whole.
    if chunked and 4 * count > MUCH_LOGITS:
        count = chunk_tokens(height) * height
    logits = LOGIT_BYTES * count
    return TRAINED_BYTES * shape.parameters(height) + STATE_BYTES * trained, activations + logits


def _disk(values: Mapping[str, Any], shape: Shape, heights: Mapping[str, int]) -> dict[str, Any]:
    """Gigabytes of a finished run, with the most that checkpoints take beside it."""
    new = [name for name in heights if name != ORIGINAL]
    trained = _units(heights, values["seeds"])
    tuned = _units([ORIGINAL, *values["calibration_vocabularies"]], values["seeds"])
    kinds = len(values["calibration_data"]) if values["calibration_vocabularies"] else 0
    models = [*new, *trained, *trained * len(values["methods"]), *tuned * kinds]
    size = {name: shape.parameters(height) for name, height in heights.items()}
    largest = max(heights, key=lambda name: heights[name])
    rows = shape.matrices * heights[largest] * shape.row
    checkpoint = TRAINED_BYTES * size[largest] + (STATE_BYTES - TRAINED_BYTES) * rows
    return {
        "models": len(models),
        "gigabytes": _gigabytes(SAVED_BYTES * sum(size[name] for name in models) + 3 * checkpoint),
    }


def _licence(name: str, facts: Mapping[str, Any]) -> str:
    name = name.partition("@")[0]
    if name not in facts:
        return "not known here: read its card"
    gate = facts[name]["gated"]
    return facts[name]["licence"] + (
        f"; GATED: {gate} on its page of the hub, then `hf auth login`" if gate else ""
    )


def _gigabytes(size: float) -> float:
    return round(size / 1e9, 2)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
