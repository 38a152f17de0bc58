"""What happens beside training: evaluations, a NaN loss that stops it, its time, progress, TensorBoard."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ruadapt.errors import RuadaptError

EvaluationHook = Callable[[PreTrainedModel, int], dict[str, Any]]


class Recorder(TrainerCallback):
    """Calls the evaluation hook, stops at a NaN loss, and takes the time of training alone.

    Evaluations are kept in the Trainer's own log history, so that a resumed training has the whole curve.
    """

    def __init__(
        self,
        evaluate: EvaluationHook | None,
        evaluate_every: int,
        tokens_per_step: int,
        writer: SummaryWriter | None,
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
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(float(loss)):
            raise RuadaptError(
                f"the loss became {loss} at or shortly before step {state.global_step}; lower the learning "
                f"rate ({args.learning_rate}) or lengthen the warm-up; "
                "the last good checkpoint, if any, is kept"
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
