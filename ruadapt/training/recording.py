"""What happens beside training: evaluations, a NaN loss that stops it, its time, and its checkpoints."""

import glob
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ruadapt import freshness
from ruadapt.errors import RuadaptError

EvaluationHook = Callable[[Any, int], dict[str, Any]]


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a Trainer folder: the state file is the last to be written."""
    complete = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except json.JSONDecodeError:  # cut short by a kill
            continue
    return max(complete)[1] if complete else None


def checkpoint_folder(target: Path, key: dict[str, Any], unit: str) -> Path:
    """Return the folder of the checkpoints of a training, named by what the training depends on.

    Those of other trainings for the same target, or of other code, are removed.
    """
    wanted = json.dumps([key, freshness.state(unit)])
    name = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = target.with_name(f".{target.name}.{name}.checkpoints")
    for other in target.parent.glob(f".{glob.escape(target.name)}.{'?' * len(name)}.checkpoints"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


class Recorder(TrainerCallback):
    """Calls the evaluation hook, stops at a NaN loss, shows a bar, and takes the time of training alone.

    Evaluations are kept in the Trainer's own log history, so that a resumed training has the whole curve.
    """

    def __init__(self, evaluate: EvaluationHook | None = None, every: int = 0) -> None:
        self.evaluate, self.every = evaluate, every
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate(kwargs["model"], state)
        # A plain bar: the Trainer's own is a widget in notebooks, which a log does not show. Not in workers.
        shown = state.is_world_process_zero and current_process().name == "MainProcess"
        done, steps = state.global_step, state.max_steps
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=not shown)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
        # What is saved is logged first, so that a NaN stops the training before it reaches a checkpoint.
        # At the end the model itself is saved, and checked.
        control.should_save &= state.global_step < state.max_steps
        control.should_log |= control.should_save
        if (self.every and state.global_step % self.every == 0) or state.global_step == state.max_steps:
            self.seconds += time.perf_counter() - self.started
            self._evaluate(kwargs["model"], state)
            self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise RuadaptError(
                    f"{name} became {logs[name]} at or shortly before step {state.global_step}; lower the "
                    f"learning rate ({args.learning_rate}) or lengthen the warm-up; last good checkpoint: "
                    f"{last_checkpoint(Path(args.output_dir)) or 'none'}"
                )

    def _evaluate(self, model: Any, state: Any) -> None:
        if self.evaluate is not None:
            model.eval()
            with torch.no_grad():
                result = self.evaluate(model, state.global_step)
            model.train()
            state.log_history.append({"step": state.global_step, "evaluation": result})
