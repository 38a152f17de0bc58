"""Preference tuning after calibration: DPO, KTO and SimPO through trl, each a LoRA that is merged.

METHOD section 6: the reference's pipelines go SFT → KTO → SimPO. A link of that chain is one call here; the
next starts from the folder that it wrote.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt import files, freshness
from ruadapt.data_sets import Row
from ruadapt.errors import RuadaptError
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.encoding import IGNORED, encode_chats, labelled_nats
from ruadapt.training.parallel import built_together
from ruadapt.training.recording import Recorder, checkpoint_folder
from ruadapt.training.trainable import TrainingOptions, lora_config
from ruadapt.training.trainer import fit


@dataclass(frozen=True)
class PreferenceOptions(TrainingOptions):
    """How to tune on pairs of answers: always LoRA, the embeddings left as they are.

    `batch_size` counts pairs (KTO: single answers, two of each pair). `beta` scales the rewards:
    `beta (log p − log p_reference)` in DPO and KTO, `beta log p / tokens` in SimPO, which wants the chosen
    one `gamma` above. Pairs longer than `max_length` tokens are left out.
    """

    learning_rate: float = 5e-6
    train: Literal["all", "embeddings", "body"] = "body"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    lora_rank: int | None = 32
    lora_dropout: float = 0.0
    method: str = PREFERENCE_METHODS[0]
    beta: float = 0.1
    gamma: float = 0.5
    max_length: int = 2048


def prefer(
    source: Path,
    target: Path,
    pairs: Path,
    heldout: Path,
    method: str,
    options: dict[str, Any],
    logs: Path | None = None,
) -> dict[str, Any]:
    """Tune the chat model `source` on pairs of answers; write the model to `target`. Done once per input.

    The reference of DPO and KTO is the model itself without its adapters, so no second one is held.

    Args:
        pairs, heldout: JSON Lines of `prompt`, `chosen`, `rejected`, lists of messages each.
        method: `dpo`, `kto` or `simpo`.
        options: of `PreferenceOptions`.
        logs: folder for TensorBoard.

    Returns:
        What `trainer.fit` reports, `evaluations` being the `margins` of the held-out pairs before and after;
        `pairs` and `dropped_pairs`.

    Raises:
        RuadaptError: unknown method, no pair short enough, a chat template that cannot render a pair, or a
            loss that became NaN; `target` is then left as it was.
    """
    if method not in PREFERENCE_METHODS:
        raise RuadaptError(f"unknown preference method {method!r}; known: {', '.join(PREFERENCE_METHODS)}")
    key = freshness.key_of(locals(), besides=("target", "logs"))

    def build(folder: Path) -> dict[str, Any]:
        chosen = PreferenceOptions(method=method, **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
        given, held = list(files.read_jsonl(pairs)), list(files.read_jsonl(heldout))
        kept, tested = (fitting(part, tokenizer, chosen.max_length) for part in (given, held))
        if len(kept) < chosen.batch_size or not tested:
            raise RuadaptError(
                f"{len(kept)} of {len(given)} pairs and {len(tested)} of {len(held)} held-out ones fit into "
                f"max_length {chosen.max_length}; a batch needs {chosen.batch_size}, the margin one: "
                "give more pairs or a greater length"
            )
        if tokenizer.pad_token is None:  # trl wants one; attention never looks at padding
            tokenizer.pad_token = tokenizer.eos_token
        rows = [pair | {"length": max(answer["length"] for answer in both)} for pair, *both in kept]
        report = fit(
            source,
            Dataset.from_list(rows),
            folder,
            chosen,
            evaluate=lambda model, step: margins(model, tested),
            checkpoints=checkpoint_folder(target, key),
            logs=logs,
            choose=lambda network: network,
            make=partial(_trainer, tokenizer, [pair for pair, *_ in kept], chosen),
        )
        return report | {"pairs": len(kept), "dropped_pairs": len(given) - len(kept)}

    return built_together(target, key, build, "prefer")


def fitting(
    pairs: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Row, Row, Row]]:
    """Return the pairs of which no answer would be cut, with chosen and rejected as `encode_chats` does."""
    rows = [{"messages": [*pair["prompt"], *pair[name]]} for pair in pairs for name in ("chosen", "rejected")]
    encoded = encode_chats(rows, tokenizer, last_only=True) if rows else []
    both = zip(pairs, encoded[::2], encoded[1::2], strict=True)
    return [found for found in both if max(answer["length"] for answer in found[1:]) <= max_length]


def margins(model: PreTrainedModel, pairs: Sequence[tuple[Row, Row, Row]]) -> dict[str, float]:
    """Say how much more likely a model finds the chosen answers than the rejected ones.

    Args:
        pairs: as `fitting` returns them.

    Returns:
        Means over the pairs: `margin`, `log p(chosen) − log p(rejected)` in nats of the whole answers with
        their end; `margin_per_token`, the same of the means over tokens; `accuracy`, the share of pairs with
        a positive margin; and `pairs`, their number.
    """
    answers = [answer for _, *both in pairs for answer in both]
    tokens = [sum(label != IGNORED for label in answer["labels"]) for answer in answers]
    log_p = -labelled_nats(model, answers)
    margin, per_token = (values[::2] - values[1::2] for values in (log_p, log_p / tokens))
    return {
        "margin": float(margin.mean()),
        "margin_per_token": float(per_token.mean()),
        "accuracy": float((margin > 0).mean()),
        "pairs": len(pairs),
    }


def _trainer(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    options: PreferenceOptions,
    network: PreTrainedModel,
    arguments: dict[str, Any],
    recorder: Recorder,
) -> Any:
    """Make trl's Trainer of a method, with LoRA around the network."""
    arguments = arguments | {
        "gradient_checkpointing": False,  # `fit` asks the network for it
        "max_length": options.max_length + 1,  # an end token may be added; nothing is cut
        "beta": options.beta,
    }
    module, name = "trl", options.method.upper()
    if options.method == "simpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        module, name = "trl.experimental.cpo", "CPO"
        # cpo_alpha weighs a likelihood term that SimPO does not have; its collator takes all columns.
        arguments |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": options.gamma}
        arguments |= {"remove_unused_columns": False}
    if options.method == "kto":
        rows = [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for name in ("chosen", "rejected")
            for pair in rows
        ]
        # trl takes them in their order: whatever else, a batch of good answers alone, and then of bad ones.
        random.Random(options.seed).shuffle(rows)
    trl: Any = import_module(module)  # takes seconds, and most runs go without it
    return getattr(trl, f"{name}Trainer")(
        model=network,
        args=getattr(trl, f"{name}Config")(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(network, options),
        callbacks=[recorder],
    )
