"""How long a run will take here: times of an earlier run, scaled by a short measurement, then by itself."""

from collections.abc import Mapping
from typing import Any

MEASURED_SECONDS = 2.0


def measured_speed() -> float:
    """Return training steps a second of a small transformer on one thread, or on the GPU that trains."""
    import torch  # slow to import, and of no use where all is fresh
    from torch import nn
    from torch.utils.benchmark import Timer

    from ruadapt.devices import bfloat16_is_native

    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 640, 0.0, batch_first=True), 2)
    model = nn.Sequential(nn.Embedding(4096, 256), body, nn.Linear(256, 4096)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(512, device=device).reshape(4, 128)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_native()):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timer = Timer("step()", globals={"step": step})  # one thread; it warms up, and waits for a GPU
    return round(1 / timer.blocked_autorange(min_run_time=MEASURED_SECONDS).median, 3)


class Estimate:
    """Seconds of the stages ahead, scaled by what those behind took against what was expected of them.

    Args:
        ahead: parameters by stage that will run.
        records: provenance by stage; those of whole runs on measured machines count, by their speed, by the
            processes that compute at once, and by the number of seeds.
        machine: this one, with its `speed`.
    """

    def __init__(
        self, ahead: Mapping[str, Any], records: Mapping[str, Any], machine: Mapping[str, Any]
    ) -> None:
        self.ahead: dict[str, float] = {}
        self.expected = self.taken = 0.0
        for name in ahead.keys() & records.keys():
            record, there = records[name], records[name]["machine"]
            if record["status"] == "done" and not record["resumed"] and there.get("speed"):
                scale = _cost(ahead[name], machine) / _cost(record["key"]["parameters"], there)
                self.ahead[name] = record["wall_clock_seconds"] * scale

    def finish(self, stage: str, seconds: float | None) -> None:
        """Note what a stage took; None where it was fresh after all."""
        expected = self.ahead.pop(stage, None)
        if expected and seconds:
            self.expected += expected
            self.taken += seconds

    def left(self) -> str:
        """Say how long the rest takes; nothing where it is unknown."""
        rest = sum(self.ahead.values()) * (self.taken / self.expected if self.expected else 1.0)
        said = f"{rest / 60:.0f} min" if rest >= 90 else f"{max(1, round(rest))} s"
        return f"about {said} left" if self.ahead else ""


def _cost(parameters: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    able = machine["speed"] * min(parameters.get("processes", 1), machine["cpus"])
    return float(len(parameters.get("seeds", "1")) / able)
