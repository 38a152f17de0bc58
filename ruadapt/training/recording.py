"""What happens beside training: evaluations, a NaN loss that stops it, its time, progress, TensorBoard."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ruadapt import freshness
from ruadapt.errors import RuadaptError
from ruadapt.files import read_json, write_json
from ruadapt.training.trainable import TrainingOptions

if TYPE_CHECKING:  # the library is slow to import, and not needed where nothing is logged
    from torch.utils.tensorboard import SummaryWriter

EvaluationHook = Callable[[PreTrainedModel, int], dict[str, Any]]


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a Trainer folder: the state file is the last to be written."""
    complete = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(complete)[1] if complete else None


def claim_checkpoints(folder: Path, identity: dict[str, Any]) -> None:
    """Make a Trainer's folder that of one training: checkpoints of another, or of other code, are removed."""
    # Preference tuning stands on all the other code that trains.
    marker = folder / "identity.json"
    wanted = json.loads(json.dumps(identity | freshness.unit_state("prefer")))
    if folder.exists() and not (marker.exists() and read_json(marker) == wanted):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        write_json(marker, wanted)


def join_processes() -> PartialState:
    """Return the state of a launched job's processes, joined where they are not yet.

    They wait while the main one packs a corpus or writes a model: torch's own ten minutes can be too short. A
    process that died is its launcher's affair, which ends the others.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the main process of a launched job go first, then one of each other machine, then the rest.

    What is written once is so by the main process, wherever the machines share the folder, and by one of each
    machine where they do not.
    """
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def own_share(batch_size: int, what: str) -> int:
    """Return how many of a batch, which counts those of all processes together, are one process's.

    Raises:
        RuadaptError: they can't be shared out evenly; `what` names them.
    """
    processes = PartialState().num_processes
    if batch_size % processes:
        raise RuadaptError(
            f"batch_size {batch_size} counts the {what} of all {processes} processes together; "
            f"give a multiple of {processes}"
        )
    return batch_size // processes


def summary_writer(logs: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(logs))


def out_of_memory(
    error: Exception, options: TrainingOptions, args: TrainingArguments, chunked: bool
) -> RuadaptError | None:
    """Return the error that says what to lower, or None where memory is not what ran out."""
    signs = ("out of memory", "not enough memory", "can't allocate memory")
    if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in signs):
        return None
    advice = [
        f"a smaller batch_size than {options.batch_size} with a larger accumulation than "
        f"{options.accumulation} (the product is what learning sees), shorter blocks"
    ]
    advice += [] if options.gradient_checkpointing else ["gradient_checkpointing"]
    advice += [] if chunked else ["chunked_loss"]
    advice += ["train embeddings or new_rows instead of all"] if options.train == "all" else []
    return RuadaptError(
        f"out of memory with {args.per_device_train_batch_size} sequences on each of {args.world_size} "
        f"devices; try, in this order: {'; '.join(advice)}; FSDP over more devices. "
        f"A training with checkpoints goes on from the last one. ({str(error).splitlines()[0][:200]})"
    )


class Recorder(TrainerCallback):
    """Calls the evaluation hook, stops at a NaN loss, and takes the time of training alone.

    Evaluations are kept in the Trainer's own log history, so that a resumed training has the whole curve.
    """

    def __init__(
        self,
        evaluate: EvaluationHook | None,
        evaluate_every: int,
        tokens_per_step: int,
        writer: "SummaryWriter | None",
        progress: bool,
    ) -> None:
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.tokens_per_step = tokens_per_step
        self.writer = writer
        self.progress = progress
        self.seconds = 0.0
        self.steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._evaluate(kwargs["model"], state)
        self.first_step = state.global_step
        # A plain bar: the Trainer's own is a widget in notebooks, which a log does not show.
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not self.progress,
        )
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.update()
        # What is saved is logged first, so that a NaN stops the training before it reaches a checkpoint.
        # At the end the model itself is saved, and checked.
        control.should_save &= state.global_step < state.max_steps
        control.should_log |= control.should_save
        due = self.evaluate_every and state.global_step % self.evaluate_every == 0
        if self.evaluate and (due or state.global_step == state.max_steps):
            self.seconds += time.perf_counter() - self.started
            self._evaluate(kwargs["model"], state)
            self.started = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self.started
        self.steps = state.global_step - self.first_step
        self.bar.close()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        loss = logs.get("loss")
        if loss is None:
            return
        for name, value in (("loss", loss), ("gradients' norm", logs.get("grad_norm", 0.0))):
            if not math.isfinite(float(value)):
                kept = last_checkpoint(Path(str(args.output_dir)))
                raise RuadaptError(
                    f"the {name} became {value} at or shortly before step {state.global_step}; lower the "
                    f"learning rate ({args.learning_rate}) or lengthen the warm-up; "
                    + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was made before")
                )
        self.bar.set_postfix(loss=loss, refresh=False)

    def _evaluate(self, model: PreTrainedModel, state: TrainerState) -> None:
        if self.evaluate is None:
            return
        # The compiled wrapper would compile anew for the shapes of the evaluation; use the model inside.
        model = getattr(model, "_orig_mod", model)
        model.eval()
        with torch.no_grad():
            result = self.evaluate(model, state.global_step)
        model.train()
        tokens = self.tokens_per_step * state.global_step
        history: list[dict[str, Any]] = state.log_history
        history.append({"step": state.global_step, "evaluation": {"tokens": tokens, **result}})
        if self.writer is not None:
            for name, value in result.items():
                self.writer.add_scalar(f"eval/{name}", value, state.global_step)
