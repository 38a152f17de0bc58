"""How a chat model is tuned after LEP, on answers.

METHOD section 6: the propagated model is tuned on answers of the ORIGINAL instruct model (self-calibration),
or on instruction data with or without a copy task.
"""

from dataclasses import dataclass

from ruadapt.training.trainable import TrainingOptions


@dataclass(frozen=True)
class TuningOptions(TrainingOptions):
    """How to tune on chats; METHOD's LoRA has rank 32 and alpha 32.

    Rows longer than `max_length` tokens are left out, never cut: a cut answer would teach to stop early or
    not at all.
    """

    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    lora_dropout: float = 0.0
    max_length: int = 512
