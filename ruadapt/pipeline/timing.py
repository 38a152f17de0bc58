"""How long a run will take here: timings of an earlier run, scaled by a short measurement, then by itself."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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


def timed_records(root: Path, profile: str, run_dir: Path) -> dict[str, Any]:
    """Return the provenance record by stage of a whole run: the committed one, else of this run folder."""
    own = {path.stem: read_json(path) for path in (run_dir / "provenance").glob("*.json")}
    committed = root / "data" / "results" / profile / "provenance.json"
    known = own | (read_json(committed) if committed.exists() else {})
    return {
        name: record
        for name, record in known.items()
        if record.get("status", "done") == "done"
        and not record.get("resumed")
        and record.get("machine", {}).get("speed")
    }


def expected_seconds(
    record: Mapping[str, Any], parameters: Mapping[str, Any], machine: Mapping[str, Any]
) -> float:
    """Scale a stage's wall clock by speed, by processes that compute at once, and by the number of seeds."""
    before: Mapping[str, Any] = record.get("key", {}).get("parameters", {})

    def pace(values: Mapping[str, Any], of: Mapping[str, Any]) -> float:
        return float(of["speed"] * min(values.get("processes", 1), of["cpus"]))

    seeds = len(parameters.get("seeds", ())) / max(1, len(before.get("seeds", ())))
    ratio = pace(before, record["machine"]) / pace(parameters, machine)
    return float(record["wall_clock_seconds"] * ratio * (seeds or 1))


@dataclass
class Estimate:
    """Seconds of the stages ahead, scaled by what those behind took against what was expected of them."""

    ahead: dict[str, float]
    expected: float = field(default=0.0, init=False)
    taken: float = field(default=0.0, init=False)

    def finish(self, stage: str, seconds: float) -> None:
        if stage in self.ahead:
            self.expected += self.ahead.pop(stage)
            self.taken += seconds

    def left(self, stage: str = "", elapsed: float = 0.0) -> str:
        """Say how long the rest takes, `elapsed` seconds into `stage`; nothing where it is unknown."""
        if not self.ahead:
            return ""
        scale = self.taken / self.expected if self.expected else 1.0
        own = max(0.0, self.ahead.get(stage, 0.0) * scale - elapsed)
        rest = own + scale * sum(seconds for name, seconds in self.ahead.items() if name != stage)
        return f"about {rest / 60:.0f} min left" if rest >= 90 else f"about {max(1, round(rest))} s left"
