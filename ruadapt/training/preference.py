"""Preference tuning after calibration: DPO, KTO and SimPO through trl, each a LoRA that is merged.

METHOD section 6: the reference's pipelines go SFT → KTO → SimPO. A link of that chain is one call here; the
next starts from the folder that it wrote.
"""

import os
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt import files, freshness
from ruadapt.data_sets import Row
from ruadapt.errors import RuadaptError
from ruadapt.training.calibration import collate_chats, encode_chats
from ruadapt.training.chats import PREFERENCE_METHODS
from ruadapt.training.losses import IGNORED
from ruadapt.training.parallel import built_together
from ruadapt.training.recording import Recorder
from ruadapt.training.trainable import TrainingOptions, lora_config, merge_lora
from ruadapt.training.trainer import (
    common_arguments,
    finish,
    load_for_training,
    loss_curve,
    stored_dtype,
    train,
)

REPORT = "training.json"


@dataclass(frozen=True)
class PreferenceOptions(TrainingOptions):
    """How to tune on pairs of answers: always LoRA, the embeddings left as they are.

    `batch_size` counts pairs (KTO: single answers, two of each pair). `beta` scales the rewards:
    `beta (log p − log p_reference)` in DPO and KTO, `beta log p / tokens` in SimPO, which wants the chosen
    one `gamma` above. Pairs longer than `max_length` tokens are left out. `merge_scale`: as
    `TuningOptions.merge_scale`.
    """

    learning_rate: float = 5e-6
    warmup_steps: int = 10
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    lora_rank: int | None = 32
    lora_dropout: float = 0.0
    beta: float = 0.1
    gamma: float = 0.5
    merge_scale: float = 1.0
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
        `loss` by step, `steps`, `pairs`, `dropped_pairs`, `before` and `after`: `margins` of the held-out
        pairs.

    Raises:
        RuadaptError: unknown method, no pair short enough, a chat template that cannot render a pair, a loss
            that became NaN, or memory ran out; `target` is then left as it was.
    """
    if method not in PREFERENCE_METHODS:
        raise RuadaptError(f"unknown preference method {method!r}; known: {', '.join(PREFERENCE_METHODS)}")
    key = {
        "source": freshness.result_hash(source),
        "pairs": files.hash_path(pairs),
        "heldout": files.hash_path(heldout),
        "method": method,
        "options": options,
    }

    def build(folder: Path) -> None:
        chosen = PreferenceOptions(**options)
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
        network: Any = load_for_training(source, chosen.seed)
        configs = deepcopy((network.config, network.generation_config))
        if torch.accelerator.is_available():
            network.to(torch.accelerator.current_accelerator())
        before = margins(network, tested) if PartialState().is_main_process else {}
        checkpoints = target.with_name(f".{target.name}.checkpoints")
        trainer = _trainer(method, network, tokenizer, [pair for pair, *_ in kept], chosen, checkpoints, logs)
        tuned, after = train(trainer, chosen, checkpoints, key), {}
        if tuned is not None:
            tuned = merge_lora(tuned.float(), chosen.merge_scale)
            # The trainers write the tokenizer's special tokens into the configurations: a chat model would
            # lose the token that ends its answers where that is not the tokenizer's own end token.
            tuned.config, tuned.generation_config = configs
            after = margins(tuned, tested)
        finish(tuned, source, folder, stored_dtype(source), checkpoints=checkpoints)
        report = {
            "method": method,
            "loss": loss_curve(trainer),
            "steps": trainer.state.global_step,
            "pairs": len(kept),
            "dropped_pairs": len(given) - len(kept),
            "before": before,
            "after": after,
            "options": asdict(chosen),
        }
        files.write_json(folder / REPORT, report)

    report: dict[str, Any] = files.read_json(built_together(target, key, build, "prefer") / REPORT)
    return report


def fitting(
    pairs: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[Row, Row, Row]]:
    """Return the pairs of which no answer would be cut, with chosen and rejected as `encode_chats` does."""
    rows = [{"messages": [*pair["prompt"], *pair[name]]} for pair in pairs for name in ("chosen", "rejected")]
    encoded = encode_chats(rows, tokenizer, last_only=True) if rows else []
    both = zip(pairs, encoded[::2], encoded[1::2], strict=True)
    return [found for found in both if max(answer["length"] for answer in found[1:]) <= max_length]


@torch.inference_mode()
def margins(model: PreTrainedModel, pairs: Sequence[tuple[Row, Row, Row]]) -> dict[str, float]:
    """Say how much more likely a model finds the chosen answers than the rejected ones.

    Args:
        pairs: as `fitting` returns them.

    Returns:
        Means over the pairs: `margin`, `log p(chosen) − log p(rejected)` in nats of the whole answers with
        their end; `margin_per_token`, the same of the means over tokens; `accuracy`, the share of pairs with
        a positive margin; and `pairs`, their number.
    """
    model.eval()
    means, tokens = torch.zeros(2, len(pairs), 2, dtype=torch.float64)
    for row, (_, *answers) in enumerate(pairs):
        for column, answer in enumerate(answers):
            batch = collate_chats([answer])
            means[row, column] = -model(**{name: ids.to(model.device) for name, ids in batch.items()}).loss
            tokens[row, column] = (batch["labels"] != IGNORED).sum()
    margin, per_token = (values[:, 0] - values[:, 1] for values in (means * tokens, means))
    return {
        "margin": float(margin.mean()),
        "margin_per_token": float(per_token.mean()),
        "accuracy": float((margin > 0).double().mean()),
        "pairs": len(pairs),
    }


def _trainer(
    method: str,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    options: PreferenceOptions,
    checkpoints: Path,
    logs: Path | None,
) -> Any:
    arguments = common_arguments(options, checkpoints, logs) | {
        "gradient_checkpointing": options.gradient_checkpointing,
        "max_length": options.max_length + 1,  # an end token may be added; nothing is cut
        "beta": options.beta,
    }
    module, name = "trl", method.upper()
    if method == "simpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        module, name = "trl.experimental.cpo", "CPO"
        # cpo_alpha weighs a likelihood term that SimPO does not have; its collator takes all columns.
        arguments |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": options.gamma}
        arguments |= {"remove_unused_columns": False}
    if method == "kto":
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
        peft_config=lora_config(network, options, False),
        callbacks=[Recorder()],
    )
