"""How long a run will take here: times of an earlier run, scaled by a short measurement."""

from collections.abc import Mapping
from typing import Any


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
    return round(1 / timer.blocked_autorange(min_run_time=2.0).median, 3)


def left(ahead: Mapping[str, Any], records: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """Say how long stages will take; nothing where it is unknown.

    Args:
        ahead: parameters by stage.
        records: provenance by stage; those of whole runs on measured machines count, by their speed, by the
            processes that compute at once, and by the number of seeds.
        machine: this one, with its `speed`.
    """
    seconds = []
    for name in ahead.keys() & records.keys():
        record, there = records[name], records[name]["machine"]
        if record["status"] == "done" and not record["resumed"] and there.get("speed"):
            scale = _cost(ahead[name], machine) / _cost(record["key"]["parameters"], there)
            seconds.append(record["wall_clock_seconds"] * scale)
    rest = sum(seconds)
    said = f"{rest / 60:.0f} min" if rest >= 90 else f"{max(1, round(rest))} s"
    return f"about {said} left" if seconds else ""


def _cost(parameters: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    able = machine["speed"] * min(parameters.get("processes", 1), machine["cpus"])
    return float(len(parameters.get("seeds", "1")) / able)
