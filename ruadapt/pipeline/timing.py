"""How long a run will take here: times of an earlier run, scaled by a short measurement, then by itself."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruadapt.files import read_json

MEASURED_SECONDS = 2.0


def measured_speed() -> float:
    """Return training steps a second of a small transformer on one thread, or on the GPU that trains."""
    import torch  # slow to import, and of no use where all is fresh
    from torch import nn

    from ruadapt.devices import bfloat16_is_native

    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 640, 0.0, batch_first=True), 2)
    model = nn.Sequential(nn.Embedding(4096, 256), body, nn.Linear(256, 4096)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(512, device=device).reshape(4, 128)
    threads, steps = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    start = time.monotonic()
    while steps < 3 or time.monotonic() < start + MEASURED_SECONDS:
        if steps == 2:  # the first two warm up
            start = time.monotonic()
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_native()):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # a GPU is waited for
        steps += 1
    torch.set_num_threads(threads)
    return round((steps - 2) / (time.monotonic() - start), 3)


class Estimate:
    """Seconds of the stages ahead, scaled by what those behind took against what was expected of them.

    Args:
        ahead: parameters by stage that will run.
        records: folders of provenance records or files of them, the most trusted last. Those of whole runs on
            measured machines count.
        machine: this one, with its `speed`.
    """

    def __init__(self, ahead: Mapping[str, Any], records: Iterable[Path], machine: Mapping[str, Any]) -> None:
        known: dict[str, Any] = {}
        for place in records:
            known |= {path.stem: read_json(path) for path in place.glob("*.json")}
            known |= read_json(place) if place.is_file() else {}
        self.ahead = {
            name: _scaled(known[name], parameters, machine)
            for name, parameters in ahead.items()
            if known.get(name, {}).get("status") == "done"
            and not known[name]["resumed"]
            and known[name]["machine"].get("speed")
        }
        self.expected = self.taken = 0.0

    def finish(self, stage: str, seconds: float | None) -> None:
        """Note what a stage took; None where it was fresh after all."""
        expected = self.ahead.pop(stage, None)
        if expected is not None and seconds is not None:
            self.expected += expected
            self.taken += seconds

    def left(self) -> str:
        """Say how long the rest takes; nothing where it is unknown."""
        rest = sum(self.ahead.values()) * (self.taken / self.expected if self.expected else 1.0)
        if not self.ahead:
            return ""
        return f"about {rest / 60:.0f} min left" if rest >= 90 else f"about {max(1, round(rest))} s left"


def _scaled(record: Mapping[str, Any], parameters: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    """Scale a stage's wall clock by speed, by processes that compute at once, and by the number of seeds."""
    before = record.get("key", {}).get("parameters", {})

    def pace(values: Mapping[str, Any], of: Mapping[str, Any]) -> float:
        return float(of["speed"] * min(values.get("processes", 1), of["cpus"]))

    seeds = len(parameters.get("seeds", ())) / max(1, len(before.get("seeds", ()))) or 1
    ratio = pace(before, record["machine"]) / pace(parameters, machine)
    return float(record["wall_clock_seconds"] * ratio * seeds)
