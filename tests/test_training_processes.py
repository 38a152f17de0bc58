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
from transformers import AutoTokenizer

from ruadapt import files
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.perplexity import text_bits
from ruadapt.pipeline.adaptation import adapt, calibrate
from ruadapt.training import losses
from ruadapt.training.encoding import pack
from ruadapt.training.recording import last_checkpoint
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import fit

TEXTS = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6
KILLED = -9
LORA = {"train": "embeddings", "lora_rank": 4}
OPTIONS = TrainingOptions(steps=14, batch_size=4, learning_rate=5e-3, seed=3, save_every=2, log_every=1)


def train(source: Path, target: Path, options: TrainingOptions, kill_at: int = -1) -> dict[str, Any]:
    """Train with checkpoints, measuring as a run does; die without a word at step `kill_at`."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(source)

    def evaluate(model: Any, step: int) -> dict[str, float]:
        if step == kill_at:
            os.kill(os.getpid(), 9)
        return {"ru": float(text_bits(model, tokenizer, TEXTS[:2], context=64, stride=32)[0].sum())}

    blocks = pack(TEXTS, tokenizer, 32)
    checkpoints = target.with_name("checkpoints")
    return fit(source, blocks, target, options, evaluate, checkpoints)


def unit(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    losses.MUCH_LOGITS = int(os.environ.get("MUCH", 0))
    corpus = target.parent.parent / "text.txt"
    return adapt(source, target, corpus, {"ru": corpus}, 0, 2, 2, 2, 32, options)


def tune(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return calibrate(source, target, [target.parent.parent / "chat.jsonl"], None, 0.0, options | LORA)


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
    with pytest.raises(RuadaptError, match="is finished"):
        work(source, target, options)
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


@pytest.mark.parametrize(
    ("environment", "changes"),
    [({}, LORA), ({}, {"train": "all"}), (FSDP, {"train": "all"}), (FSDP, {"train": "embeddings"})],
    ids=["ddp, lora", "ddp", "fsdp", "fsdp, embeddings"],
)
def test_two_processes_train_as_one(
    environment: dict[str, str], changes: dict[str, Any], tiny_pair: TinyPair, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    # In float32: bfloat16 rounds a half batch otherwise than a whole one.
    options = {"batch_size": 4, "learning_rate": 5e-3, "seed": 3, "log_every": 1, "bf16": False} | changes
    options |= {"lora_dropout": 0.0, "save_every": 30}
    alone = unit(tiny_pair.base, tmp_path / "alone" / "model", options)
    target = tmp_path / "shared" / "model"
    assert together(environment, unit, tiny_pair.base, target, options) == [0, 0]
    for rank in (0, 1):
        report = files.read_json(target.with_name(f"report{rank}.json"))
        assert report["processes"] == 2 and report["tokens"] == alone["tokens"] and report["steps"] > 50
        same(report, alone)
        for made, wanted in zip(report["evaluations"], alone["evaluations"], strict=True):
            assert made["ru"] == pytest.approx(wanted["ru"], rel=1e-4)
    close(tmp_path / "alone" / "model", target)
    names = {path.name for path in target.parent.iterdir()}
    assert names == {"model", "report0.json", "report1.json"}


def test_two_processes_tune_as_one(tiny_pair: TinyPair, tmp_path: Path) -> None:
    # Of one length: transformers sorts rows by length for each process's own batches.
    turns = [("user", "Где живёт врач {}?"), ("assistant", "Врач живёт у реки.")]
    rows = [[{"role": role, "content": said.format(n)} for role, said in turns] for n in range(8)]
    files.write_jsonl(tmp_path / "chat.jsonl", ({"messages": row} for row in rows))
    options = {"steps": 4, "batch_size": 8, "learning_rate": 2e-3, "seed": 3, "log_every": 1}
    options |= {"lora_rank": 4, "max_length": 96, "bf16": False}
    alone = tune(tiny_pair.instruct, tmp_path / "alone" / "model", options)
    target = tmp_path / "shared" / "model"
    assert together({}, tune, tiny_pair.instruct, target, options) == [0, 0]
    same(files.read_json(target.with_name("report0.json")), alone)
    close(tmp_path / "alone" / "model", target)


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    losses = [[row["loss"] for row in report["loss"]] for report in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def close(first: Path, second: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor - after[name]).norm() < 1e-3 * tensor.norm(), name
