"""Training that is killed, and training shared by two processes (gloo): the same model as from one alone."""

import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import ENGLISH, RUSSIAN, TinyPair
from safetensors.torch import load_file
from test_preference import toy_pairs
from transformers import AutoTokenizer

from ruadapt import files
from ruadapt.evaluation.perplexity import bits_per_byte
from ruadapt.pipeline.adaptation import adapt, calibrate
from ruadapt.training import calibration, preference
from ruadapt.training.packing import pack
from ruadapt.training.recording import last_checkpoint
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import pretrain

TEXTS = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6
KILLED = -9
OPTIONS = TrainingOptions(steps=14, batch_size=4, learning_rate=5e-3, seed=3, save_every=2, log_every=1)


def train(source: Path, target: Path, options: TrainingOptions, kill_at: int = -1) -> dict[str, Any]:
    """Train with checkpoints, measuring as a run does; die without a word at step `kill_at`."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(source)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        if step == kill_at:
            os.kill(os.getpid(), 9)
        return {"ru": bits_per_byte(model, tokenizer, TEXTS[:2], context=64, stride=32).value}

    blocks = pack(TEXTS, tokenizer, 32)
    checkpoints = target.with_name("checkpoints")
    return pretrain(source, source, blocks, target, options, evaluate, checkpoints)


def unit(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    corpus = target.parent.parent / "text.txt"
    heldout = {"ru": corpus}
    epochs = 2 * options["accumulation"]
    tokens = target.parent / "tokens"
    return adapt(source, target, corpus, heldout, 0, epochs, 2, 2, 32, options, tokens=tokens)


def tune(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    left, collate = int(os.environ.get("KILLED_AT", 99)), calibration.collate_chats

    def collated(examples: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
        return collate(examples)

    calibration.collate_chats = collated
    preference.bfloat16_is_native = lambda: False  # type: ignore[attr-defined]
    data = target.parent.parent
    if "lora_rank" in options:
        return calibrate(source, target, [data / "chat.jsonl"], None, 0.0, options | {"bf16": False})
    return preference.prefer(source, target, data / "pairs.jsonl", data / "heldout.jsonl", "kto", options)


def share(
    rank: int,
    port: int,
    environment: dict[str, str],
    work: Callable[[Path, Path, dict[str, Any]], dict[str, Any]],
    source: Path,
    target: Path,
    options: dict[str, Any],
) -> None:
    """Be one of two processes, as `accelerate launch` starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= environment
    if "ACCELERATE_USE_FSDP" in environment:
        shard_on_processors()
    report = work(source, target, options)
    assert work(source, target, options) == report  # done once
    files.write_json(target.with_name(f"report{rank}.json"), report)


def shard_on_processors() -> None:
    """Let accelerate use FSDP without a GPU, which torch can do and accelerate leaves out."""
    plain = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def run(*jobs: tuple[Any, ...]) -> list[int | None]:
    """Run each job, a function and its arguments, in a process of its own; return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "datasets", "ruadapt.pipeline.adaptation", "hypothesis"])
    processes = [context.Process(target=function, args=arguments) for function, *arguments in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    return [process.exitcode for process in processes]


def together(*arguments: Any) -> list[int | None]:
    """Let two processes share what `share` is given; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run(*((share, rank, port, *arguments) for rank in (0, 1)))


def test_ten_kills_leave_no_trace(tiny_pair: TinyPair, tmp_path: Path) -> None:
    options = replace(OPTIONS, evaluate_every=1, train="embeddings", save_every=1)
    whole = train(tiny_pair.base, tmp_path / "whole" / "model", options)
    steps = sorted(random.Random(5).sample(range(1, 14), 10))
    target = tmp_path / "killed" / "model"
    for step in steps:
        assert run((train, tiny_pair.base, target, options, step)) == [KILLED]
        assert not target.exists()
    assert last_checkpoint(target.with_name("checkpoints")) is not None
    resumed = train(tiny_pair.base, target, options)
    assert resumed["evaluations"] == whole["evaluations"] and resumed["loss"] == whole["loss"]
    first, second = (load_file(f / "model.safetensors") for f in (tmp_path / "whole" / "model", target))
    assert all(torch.equal(first[name], second[name]) for name in first)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


WHOLE = {"accumulation": 1, "chunked_loss": True, "save_every": 30}
PART = {"accumulation": 2, "train": "embeddings", "lora_rank": 4, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("environment", "changes"),
    [({}, WHOLE), (FSDP, WHOLE), (FSDP, PART), (ZERO3, WHOLE), (ZERO3, PART)],
    ids=["ddp", "fsdp", "fsdp, embeddings and lora", "zero3", "zero3, embeddings and lora"],
)
def test_two_processes_train_as_one(
    environment: dict[str, str], changes: dict[str, Any], tiny_pair: TinyPair, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    if environment is ZERO3:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        config = {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
        wanted = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        files.write_json(tmp_path / "zero3.json", config | dict.fromkeys(wanted, "auto"))
        environment = ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}
    # In float32: bfloat16 rounds a half batch otherwise than a whole one, 3e-4 of the loss after 50 steps.
    options = {"batch_size": 4, "learning_rate": 5e-3, "seed": 3, "log_every": 1, "bf16": False} | changes
    alone = unit(tiny_pair.base, tmp_path / "alone" / "model", options)
    target = tmp_path / "shared" / "model"
    assert together(environment, unit, tiny_pair.base, target, options) == [0, 0]
    for rank in (0, 1):
        report = files.read_json(target.with_name(f"report{rank}.json"))
        assert report["processes"] == 2 and report["tokens"] == alone["tokens"] and report["steps"] > 50
        losses = [[row["loss"] for row in one["loss"]] for one in (report, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for made, wanted in zip(report["evaluations"], alone["evaluations"], strict=True):
            assert made["ru"] == pytest.approx(wanted["ru"], rel=1e-4)
    first, second = (load_file(f / "model.safetensors") for f in (tmp_path / "alone" / "model", target))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() < 1e-3 * tensor.norm(), name
    assert {path.name for path in target.parent.iterdir()} == {
        "model",
        "tokens",
        "report0.json",
        "report1.json",
    }


SFT = {"lora_rank": 4, "max_length": 96, "save_every": 4}
KTO = {"max_length": 96, "save_every": 4}


@pytest.mark.parametrize(
    ("environment", "changes"),
    [({}, SFT), (FSDP, SFT), (FSDP, KTO)],
    ids=["calibration, ddp", "calibration, fsdp", "kto, fsdp, one answer a process"],
)
def test_two_processes_tune_as_one(
    environment: dict[str, str], changes: dict[str, Any], tiny_pair: TinyPair, tmp_path: Path
) -> None:
    pairs = toy_pairs(40)
    files.write_jsonl(tmp_path / "chat.jsonl", [{"messages": p["prompt"] + p["chosen"]} for p in pairs])
    files.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    files.write_jsonl(tmp_path / "heldout.jsonl", toy_pairs(4, start=100))
    size = 2 if changes is KTO else 8
    options = {"steps": 6, "batch_size": size, "learning_rate": 2e-3, "seed": 3, "log_every": 1} | changes
    alone = tune(tiny_pair.instruct, tmp_path / "alone" / "model", options)
    target = tmp_path / "shared" / "model"
    if changes is SFT:  # both die with step 4 saved
        assert together(environment | {"KILLED_AT": "6"}, tune, tiny_pair.instruct, target, options) == [
            -9,
            -9,
        ]
        assert (target.with_name(".model.checkpoints") / "checkpoint-4").is_dir()
    assert together(environment, tune, tiny_pair.instruct, target, options) == [0, 0]
    shared = files.read_json(target.with_name("report0.json"))
    losses = [[row["loss"] for row in one["loss"]] for one in (shared, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    first, second = (load_file(f / "model.safetensors") for f in (tmp_path / "alone" / "model", target))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() < 1e-3 * tensor.norm(), name
