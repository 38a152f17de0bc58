"""What a run promises: the configurations that its parameters name, and the folders of their models."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruadapt.errors import RuadaptError
from ruadapt.pipeline.stages import FOLDERS
from ruadapt.vocab.registry import ORIGINAL


@dataclass(frozen=True)
class System:
    """One configuration of a run, whatever its seeds; the columns of `items.csv` that name it."""

    stage: str
    vocabulary: str = ORIGINAL
    method: str = ""
    calibration: str = ""
    few_shot: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if value)


@dataclass(frozen=True)
class Plan:
    """What a run measured, and so what must not be missing: names as in the notebooks' parameters.

    `calibration_vocabularies` are tuned after LEP by `lep_method`, on each of `calibration_data`; the
    original is too, except on "self", its own answers. `headline`: the (vocabulary, calibration) of the
    headline numbers, fixed before results are known.
    """

    vocabularies: Sequence[str]
    methods: Sequence[str]
    calibration_vocabularies: Sequence[str]
    calibration_data: Sequence[str]
    seeds: Sequence[int]
    lep_method: str = "conversion"
    headline: tuple[str, str] = ("extended", "instruct_copy")

    def seeds_of(self, system: System) -> list[int | str]:
        """Return a system's seeds: "" where nothing was trained, else all, those of the controls too."""
        return [""] if system.stage in ("original", "initialised") else list(self.seeds)

    def replaced(self) -> list[str]:
        """Return the vocabularies without the original."""
        return [name for name in self.vocabularies if name != ORIGINAL]

    def bases(self) -> list[System]:
        """Return the systems of table 2: the base, its control with the old vocabulary, the adapted bases."""
        adapted = [System("adapted", name, few_shot=True) for name in (ORIGINAL, *self.replaced())]
        return [System("original", few_shot=True), *adapted]

    def propagated(self) -> list[System]:
        """Return the systems of table 3: every new vocabulary by every LEP method."""
        return [System("lep", name, method) for name in self.replaced() for method in self.methods]

    def tuned(self) -> list[System]:
        """Return the systems of table 4: each vocabulary as it is, then after each calibration."""
        systems = [System("original")]
        for name in dict.fromkeys([ORIGINAL, *self.calibration_vocabularies]):
            if name != ORIGINAL:
                systems.append(System("lep", name, self.lep_method))
            for kind in self.calibration_data if self.calibration_vocabularies else ():
                if name != ORIGINAL:
                    systems.append(System("calibrated", name, self.lep_method, kind))
                elif kind != "self":
                    systems.append(System("calibrated", calibration=kind))
        return systems

    def systems(self) -> list[System]:
        """Return all systems in the order of the pipeline, with the bases before any training and the control
        of LEP: the original vocabulary after the same continued pre-training."""
        initialised = [System("initialised", name, few_shot=True) for name in self.replaced()]
        control = System("lep", ORIGINAL, self.lep_method)
        found = [System("original"), *self.bases(), *initialised, control, *self.propagated(), *self.tuned()]
        order = ["original", *FOLDERS]
        return sorted(dict.fromkeys(found), key=lambda system: order.index(system.stage))


def subjects(plan: Plan, run: Path, base: Path, instruct: Path) -> list[tuple[Path, bool, dict[str, Any]]]:
    """List the models that a run's parameters promise: folder, whether few-shot, and their labels.

    Labels are the columns that name a model in every table: `model, stage, vocabulary, method, calibration,
    seed`.

    Args:
        run: the run's folder.
        base: the original base model, for few-shot systems.
        instruct: the original instruct model.

    Raises:
        RuadaptError: a promised model does not exist; the message names the stage that makes it.
    """
    found = []
    for system in plan.systems():
        labels = asdict(system)
        few_shot = labels.pop("few_shot")
        # Calibration goes on from one method of LEP, so that only LEP's folders name it.
        method = system.method if system.stage == "lep" else ""
        parts = [part for part in (system.vocabulary, method, system.calibration) if part]
        for seed in plan.seeds_of(system):
            path = [*parts, f"seed{seed}"] if seed != "" else parts
            if system.stage == "original":
                path, folder = (["base"], base) if few_shot else (["instruct"], instruct)
            else:
                folder = run.joinpath(FOLDERS[system.stage], *path)
            if not (folder / "config.json").exists():
                made_by = FOLDERS.get(system.stage, "the pair")
                raise RuadaptError(
                    f"{folder} has no model, which the parameters promise: run {made_by} with them first"
                )
            name = "-".join([system.stage, *path])
            found.append((folder, few_shot, {"model": name, **labels, "seed": seed}))
    return found
