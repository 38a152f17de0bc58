"""When does which propagation win: the grid behind `notebooks/propagation_map.ipynb`, on the embedded pair.

An adapted base does not depend on the instruct model. So few adaptations serve many instruct models, and a
propagated model costs matrix products alone: it is made in memory, and asked the tasks of the world. Its
answers are not written but expected: one pass over question and right answer gives the bits that the model
spends on the answer, and whether greedy decoding would write it.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import checkpoints, data_sets, files, freshness, lep, vocab
from ruadapt.checkpoints.bodies import carry
from ruadapt.checkpoints.model_folders import read_layout
from ruadapt.errors import RuadaptError
from ruadapt.lep.sums import Gram, Sums, solve
from ruadapt.pipeline.adaptation import adapt, answer, calibrate, mix
from ruadapt.reporting.provenance import git_state, machine, versions
from ruadapt.training.encoding import IGNORED, collate, encode_chats
from ruadapt.training.parallel import built_together, run_jobs
from ruadapt.training.trainable import TuningOptions
from ruadapt.training.trainer import fit
from ruadapt.vocab.registry import Materials, vocabulary

WORLD = files.project_root() / "data" / "world" / "corpus"
PAIR = files.project_root() / "data" / "pair"
CODE = f"{freshness.UNITS['propagate']} {freshness.TRAINING} benchmarks/propagation.py"
RIDGE = 0.1
"""What `ridge` adds to the diagonal of X'X, as a share of its mean."""
BATCH = 32
TABLES = ("models", "items", "fits", "instructs", "scores")
CELL = ["form", "what", "strength", "vocabulary", "amount"]
"""What names a cell of the grid: fields of `Cell`, whose recipes are compared with each other."""
LABELS = {"fits": [*CELL, "method"], "instructs": ["form", "what", "strength", "matrix"]}
"""What names a row of these tables."""

# How hard the base is tuned: the learning rate of its embeddings, in terms of the body's. That moves the
# embeddings far or little and leaves the instruct models about equally good.
STRENGTHS = {"gentle": 0.2, "light": 1.0, "middle": 5.0, "strong": 12.0, "extreme": 30.0}
RATE = 2e-4
EMBEDDINGS_ALONE = {"train": "embeddings", "learning_rate": 6e-3, "new_rows_learning_rate_factor": 1.0}
"""Training of the embeddings alone: all rows at the rate that new rows have beside a trained body."""


@dataclass(frozen=True)
class Grid:
    """The cells. A test makes them few and small.

    Attributes:
        seeds: of continued pre-training.
        amounts: Russian characters of continued pre-training; 0 leaves the initialised base.
        strengths: of tuning, where base and instruct model differ in all weights.
        few: the strengths of every other part of the grid.
        rivals: the strengths for which the rivals of LEP are trained.
        ways: those rivals; what is called embeddings trains these alone, the others all weights.
        tuning_steps: of 8 chats each, of every instruct model.
        items: of each task and language.
        prompts: that the instruct model answers for self-calibration.
        examples: sizes of the calibration curve; a step reads 8.
        calibrated: the strength whose models are calibrated, those of `calibrated_methods`.
        calibration_seeds: and those of these seeds.
    """

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    amounts: Sequence[int] = (0, 100_000, 600_000)
    strengths: Sequence[str] = tuple(STRENGTHS)
    few: Sequence[str] = ("gentle", "middle", "extreme")
    rivals: Sequence[str] = ("gentle", "strong")
    ways: Sequence[str] = ("elchat", "elchat embeddings", "lep embeddings", "ceiling")
    tuning_steps: int = 400
    items: int = 10
    added_rows: int = 2_000
    prompts: int = 2_000
    examples: Sequence[int] = (120, 480, 1_920)
    calibrated: str = "middle"
    calibrated_methods: Sequence[str] = ("conversion", "swap")
    calibration_seeds: Sequence[int] = (1, 2, 3)


# --- methods ---------------------------------------------------------------------------------------------


def ridge(sums: Sums) -> lep.Map:
    """`E_i^ru = E_b^ru W`, W as conversion's, drawn towards the identity: `(X'X + λ I) D = X'(Y − X)`."""
    gram = sums.over("new")
    more = RIDGE * gram.xx.diagonal().mean() * torch.eye(len(gram.xx), dtype=gram.xx.dtype)
    return lep.Map(solve(Gram(gram.rows, gram.xx + more, gram.xy)))


def chat_vector(sums: Sums) -> Tensor:
    """`E_b^ru + (E_i − E_b)` for the tokens of both vocabularies, `E_b^ru` for new ones: a chat vector.

    Delta is the same with T, which gives new tokens a share of their old pieces' moves.
    """
    inputs = sums.inputs
    copies = torch.bincount(inputs.transfer.indices()[0], minlength=len(inputs.adapted)) == 1
    rows = lep.propagate(lep.Map(residual=True), inputs)
    return torch.where(copies[:, None], rows, inputs.adapted)


MAPS: dict[str, Callable[[Sums], lep.Map]] = {**lep.METHODS, "ridge": ridge}


@dataclass(frozen=True)
class Recipe:
    """A method, how far it goes (1: all the way, 0: swap), and α of the body's change."""

    method: str
    share: float = 1.0
    body: float = 1.0


WITH_BODY = [
    *(Recipe(method) for method in MAPS),
    *(Recipe(method, 0.5) for method in ("overlap", "conversion", "delta")),
    Recipe("chat_vector"),
]
WITHOUT_BODY = [
    Recipe(method, body=0.0) for method in ("swap", "overlap", "conversion", "delta", "chat_vector")
]
RIVAL_METHODS = ("conversion", "swap", "delta")
FEW = ("swap", "overlap", "conversion", "delta", "residual", "chat_vector")


def rows_of(recipe: Recipe, sums: Sums) -> Tensor:
    """Return the instruct model's rows by a recipe, `[V_new, d]` in the instruct model's dtype."""
    inputs = sums.inputs
    if recipe.method == "chat_vector":
        return chat_vector(sums)
    rows = lep.propagate(MAPS[recipe.method](sums), inputs)
    if recipe.share == 1:
        return rows
    kept = rows[inputs.copied_new]
    rows = torch.lerp(inputs.adapted.double(), rows.double(), recipe.share).to(rows.dtype)
    rows[inputs.copied_new] = kept
    return rows


# --- scores ----------------------------------------------------------------------------------------------


def questions(items: int) -> list[dict[str, Any]]:
    """Return the first items of every task and language: `language, task, id, characters`, `messages`."""
    rows = []
    taken: Counter[tuple[str, str]] = Counter()
    for item in files.read_jsonl(WORLD / "tasks.jsonl.gz"):
        meta = {name: item["meta"][name] for name in ("language", "task", "id")}
        taken[meta["language"], meta["task"]] += 1
        if taken[meta["language"], meta["task"]] <= items:
            messages = [*item["messages"], {"role": "assistant", "content": item["outputs"]}]
            rows.append(meta | {"characters": len(item["outputs"]), "messages": messages})
    return rows


@torch.inference_mode()
def expected(network: Any, examples: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return how a model expects given answers, float32 `(items, 3)`.

    The columns: bits of the answer and its end; 1 where greedy decoding writes exactly that; and the least
    margin over the answer's tokens, log-likelihood of the right one less that of the best other, in nats.
    """
    found = np.zeros((len(examples), 3), dtype=np.float32)
    order = sorted(range(len(examples)), key=lambda number: len(examples[number]["input_ids"]))
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH]
        batch = collate([examples[number] for number in numbers])
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORED
        hidden = network.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][counted]
        log_p = network.get_output_embeddings()(hidden).float().log_softmax(-1)
        right = labels[counted][:, None]
        own = log_p.gather(1, right)[:, 0]
        margin = own - log_p.scatter(1, right, -torch.inf).max(1).values
        of_item = counted.nonzero()[:, 0]
        bits = torch.zeros(len(numbers)).index_add(0, of_item, -own / np.log(2))
        least = torch.full((len(numbers),), torch.inf).scatter_reduce(0, of_item, margin, "amin")
        found[numbers] = torch.stack([bits, (least > 0).float(), least], 1).numpy()
    return found


def encoded(folder: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return chat rows as the folder's tokenizer and template render them, with labels on the last answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return encode_chats(list(rows), tokenizer, last_only=True)


def opened(folder: Path) -> Any:
    """Open a model in float32 for scoring."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _save(folder: Path, found: Mapping[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = dict(found)
    np.savez_compressed(folder / "scores.npz", **arrays)


def score_model(model: Path, target: Path, asked: Path) -> Path:
    """Score a model as it lies in its folder; write `(items, 3)` of `expected` to `target/scores.npz`."""

    def build(folder: Path) -> None:
        _save(folder, {"model": expected(opened(model), encoded(model, files.read_jsonl(asked)))})

    return freshness.cached(target, freshness.key_of({"model": model, "asked": asked}), build, CODE)


def score_pair(
    base: Path, instruct: Path, adapted: Path, target: Path, recipes: Sequence[Recipe], asked: Path
) -> Path:
    """Score what every recipe makes of a base, its instruct model, and its adapted base.

    `target/scores.npz` takes `(items, 3)` of `expected` for each recipe, in their order; `target/fits.json`
    the held-out fit reports of the methods.
    """
    key = freshness.key_of({"base": base, "instruct": instruct, "adapted": adapted, "asked": asked})

    def build(folder: Path) -> None:
        examples = encoded(adapted, files.read_jsonl(asked))
        network = opened(adapted)
        fits, found = {}, {}
        sums = {role: Sums(given) for role, given in checkpoints.lep_inputs(base, instruct, adapted).items()}
        for method in lep.METHODS:
            first = sums["input"]
            fits[method] = lep.fit_report(first, method, lep.fit(method, first))
        bodies = {scale: body(base, instruct, adapted, scale) for scale in {row.body for row in recipes}}
        for number, recipe in enumerate(recipes):
            weights = dict(bodies[recipe.body])
            for role, given in sums.items():
                weights[NAMES[role]] = rows_of(recipe, given).float()
            network.load_state_dict(weights, strict=False)
            found[f"recipe{number}"] = expected(network, examples)
        _save(folder, found)
        files.write_json(folder / "fits.json", fits)

    return freshness.cached(target, key | {"recipes": [vars(row) for row in recipes]}, build, CODE)


NAMES = {"input": "model.embed_tokens.weight", "head": "lm_head.weight"}


def body(base: Path, instruct: Path, adapted: Path, scale: float) -> dict[str, Tensor]:
    """Return the body that LEP gives to an instruct model, float32 by name, rounded as its folder's is."""
    before, after, own = map(read_layout, (base, adapted, instruct))
    changed, _ = carry(before, after, own, scale)
    found = {}
    for name, tensor in own.body().items():
        if name in changed:
            tensor = changed[name](0, len(tensor)).to(tensor.dtype)
        found[name] = tensor.float()
    return found


# --- models ----------------------------------------------------------------------------------------------


def untie(source: Path, target: Path) -> Path:
    """Write a tied model with a head of its own, equal to its input embeddings."""

    def build(folder: Path) -> None:
        network: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        rows = network.get_input_embeddings().weight.detach().clone()
        network.config.tie_word_embeddings = False
        untied = AutoModelForCausalLM.from_config(network.config, dtype=network.dtype)
        untied.load_state_dict(network.state_dict() | {NAMES["head"]: rows})
        untied.generation_config = network.generation_config
        untied.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return freshness.cached(target, {"source": files.hash_path(source)}, build, CODE)


def pretraining(amount: int, seed: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `adapt`: those of the default run, without a teacher, and changed options."""
    return {
        "corpus": WORLD / "ru_train.jsonl.gz",
        "heldout": {},
        "characters": amount,
        "epochs": 1,
        "evaluations": 1,
        "documents": 0,
        "block_size": 256,
        "replay": WORLD / "en_train.jsonl.gz",
        "replay_share": 0.3,
        "options": {
            "batch_size": 2,
            "learning_rate": 1.5e-4,
            "weight_decay": 0.0,
            "warmup_steps": 40,
            "new_rows_learning_rate_factor": 40.0,
            "seed": seed,
        }
        | changes,
    }


def tune(
    source: Path, target: Path, data: Path, what: Any, strength: str, steps: int, accumulation: int = 1
) -> dict[str, Any]:
    """Make an instruct model of a base, on the same chats whatever is tuned; write it to `target`.

    Args:
        what: both (embeddings and body), body, or embeddings.
        strength: a name in STRENGTHS.
        accumulation: into how many parts the eight chats of a step are cut.
    """
    factor = STRENGTHS[strength]
    options = TuningOptions(
        steps=steps,
        batch_size=8 // accumulation,
        accumulation=accumulation,
        learning_rate=RATE * factor if what == "embeddings" else RATE,
        lora_rank=None,
        train="all" if what == "both" else what,
        new_rows_learning_rate_factor=factor if what == "both" else 1.0,
    )

    def build(folder: Path, checkpoints: Path) -> dict[str, Any]:
        rows = encode_chats(list(files.read_jsonl(data)), AutoTokenizer.from_pretrained(source))
        height = vocab.rows(vocab.load_tokenizer(source))
        return fit(
            *(source, Dataset.from_list(rows), folder, options),
            new_rows=range(height) if what == "both" else (),
        )

    key = freshness.key_of({"source": source, "data": data, "options": vars(options), "what": what})
    return built_together(target, key, build, CODE)


# --- the run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One propagated or rival model, but for its seed: what names it in every result.

    Attributes:
        kind: lep, original (an instruct model), calibrated, or a rival: a name in `Grid.ways`, with
            "merged" where special tokens got their rows back.
        what: the part of the base that tuning changed: both (embeddings and body), body, embeddings.
        form: tied or untied.
        data, examples: of calibration.
    """

    kind: str
    strength: str
    what: str = "both"
    form: str = "tied"
    vocabulary: str = "extended"
    amount: int = 0
    method: str = ""
    share: float = 1.0
    body: float = 1.0
    data: str = ""
    examples: int = 0


def build_vocabulary(name: str, given: Materials, target: Path) -> None:
    """Write a vocabulary of the registry, learned from what is given."""
    vocab.save_tokenizer(target, vocabulary(name).build(given), given.original)


def unit(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function in a worker: jobs of several kinds make one list."""
    return function(**arguments)


class Study:
    """A run of the grid in a folder. Each `…_jobs` gives units of work; what is finished is found again."""

    accumulation = 1

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        self.asked = folder / "questions.jsonl"

    def prepare(self) -> None:
        """Write what all cells start from: chats, the untied base, vocabularies, initialised bases."""
        for name in ("chat", "chat_copy", "prompts"):
            rows = files.read_jsonl(WORLD / f"{name}.jsonl.gz")
            taken = islice(rows, self.grid.prompts) if name == "prompts" else rows
            files.write_jsonl(self.folder / f"{name}.jsonl", taken)
        files.write_jsonl(self.asked, questions(self.grid.items))
        untie(PAIR / "base", self.base("untied"))
        texts = [
            list(data_sets.read_texts(WORLD / f"{language}_train.jsonl.gz")) for language in ("ru", "en")
        ]
        size = self.grid.added_rows
        height = vocab.rows(vocab.load_tokenizer(PAIR / "instruct")) + size
        given = Materials(PAIR / "instruct", texts[0], texts[1], height, size, 0, [])
        for name in ("extended", "unigram"):
            build = partial(build_vocabulary, name, given)
            key = {"rows": size, "corpus": files.hash_path(WORLD)}
            freshness.cached(self.folder / "vocabularies" / name, key, build, unit="vocabulary")
        for form, name in (("tied", "extended"), ("tied", "unigram"), ("untied", "extended")):
            initialised(self.base(form), self.folder / "vocabularies" / name, self.adapted(form, name, 0, 0))

    def pretraining(self, amount: int, seed: int) -> dict[str, Any]:
        return pretraining(amount, seed)

    def base(self, form: str) -> Path:
        return PAIR / "base" if form == "tied" else self.folder / "bases" / form

    def instruct(self, form: str, what: str, strength: str) -> Path:
        return self.folder / "instruct" / f"{form}-{what}-{strength}"

    def adapted(self, form: str, name: str, amount: int, seed: int) -> Path:
        folder = self.folder / "adapted" / f"{form}-{name}-{amount}"
        return folder / f"seed{seed}" if amount else folder

    def pairs(self) -> Iterator[tuple[str, str, str, str, list[Recipe]]]:
        """Yield form, what was tuned, strength, vocabulary and recipes of every part of the grid."""
        few = [row for row in (*WITH_BODY, *WITHOUT_BODY) if row.method in FEW and row.share == 1]
        for strength in self.grid.strengths:
            yield "tied", "both", strength, "extended", [*WITH_BODY, *WITHOUT_BODY]
        if self.grid.few:
            yield "tied", "body", "light", "extended", few  # its embeddings don't move, whatever the strength
        for strength in self.grid.few:
            yield "tied", "embeddings", strength, "extended", few
            yield "tied", "both", strength, "unigram", few
            yield "untied", "both", strength, "extended", few

    def tuned(self) -> list[tuple[str, str, str]]:
        """Return form, what was tuned and strength of every instruct model."""
        rivals = [("tied", "both", strength) for strength in self.grid.rivals]
        return list(dict.fromkeys([*(row[:3] for row in self.pairs()), *rivals]))

    def amounts(self, form: str, what: str, name: str) -> Sequence[int]:
        """Return all amounts for the main part of the grid, none and the most for the others."""
        every = self.grid.amounts
        return every if (form, what, name) == ("tied", "both", "extended") else [every[0], every[-1]]

    def seeds(self, amount: int) -> Sequence[int]:
        return self.grid.seeds if amount else [0]

    def training_jobs(self) -> list[dict[str, Any]]:
        """Return the tuning of every instruct model, and every continued pre-training."""
        jobs: dict[Path, dict[str, Any]] = {}
        for form, what, strength in self.tuned():
            target = self.instruct(form, what, strength)
            jobs[target] = {"function": tune, "source": self.base(form), "target": target} | {
                "data": self.folder / "chat.jsonl",
                "what": what,
                "strength": strength,
                "steps": self.grid.tuning_steps,
                "accumulation": self.accumulation,
            }
        for form, what, _, name, _ in self.pairs():
            for amount in self.amounts(form, what, name):
                for seed in self.grid.seeds if amount else ():
                    target = self.adapted(form, name, amount, seed)
                    jobs[target] = {"function": adapt, "target": target} | {
                        "source": self.adapted(form, name, 0, 0),
                        "original": self.base(form),
                        **self.pretraining(amount, seed),
                    }
        return list(jobs.values())

    def pair_jobs(self) -> list[tuple[list[Cell], int, dict[str, Any]]]:
        """Return the scoring of every pair of an instruct model and an adapted base: cells, seed, job."""
        jobs = []
        for form, what, strength, name, recipes in self.pairs():
            for amount in self.amounts(form, what, name):
                # An untrained base has the original body.
                used = recipes if amount else [row for row in recipes if row.body]
                cells = [
                    Cell("lep", strength, what, form, name, amount, row.method, row.share, row.body)
                    for row in used
                ]
                for seed in self.seeds(amount):
                    place = f"{form}-{what}-{strength}/{name}-{amount}/seed{seed}"
                    job = {"function": score_pair, "target": self.folder / "scores" / "lep" / place}
                    job |= {"base": self.base(form), "instruct": self.instruct(form, what, strength)}
                    job |= {"adapted": self.adapted(form, name, amount, seed), "recipes": used}
                    jobs.append((cells, seed, job | {"asked": self.asked}))
        return jobs

    def original_jobs(self) -> list[tuple[list[Cell], int, dict[str, Any]]]:
        """Return the scoring of the instruct models themselves."""
        jobs = []
        for form, what, strength in self.tuned():
            target = self.folder / "scores" / "original" / f"{form}-{what}-{strength}"
            job = {"function": score_model, "model": self.instruct(form, what, strength), "target": target}
            cells = [Cell("original", strength, what, form, "original")]
            jobs.append((cells, 0, job | {"asked": self.asked}))
        return jobs

    def rival_jobs(self) -> list[tuple[list[Cell], int, dict[str, Any]]]:
        """Return what a user would do instead of LEP, with the same text: train and score in one job."""
        jobs = []
        amount = self.grid.amounts[-1]
        for strength in self.grid.rivals:
            instruct = self.instruct("tied", "both", strength)
            for seed in self.grid.seeds:
                for way in self.grid.ways:
                    name = f"{way.replace(' ', '-')}/{strength}-seed{seed}"
                    job: dict[str, Any] = {"target": self.folder / "rivals" / name, "asked": self.asked}
                    job["scored"] = self.folder / "scores" / name
                    cells = [Cell(way, strength, amount=amount)]
                    if way == "ceiling":
                        job |= {"function": ceiling, "data": self.folder / "chat.jsonl"}
                        job |= {"adapted": self.adapted("tied", "extended", amount, seed)}
                        job |= {"strength": strength, "steps": self.grid.tuning_steps}
                    elif way == "lep embeddings":
                        job |= {"function": propagated_embeddings, "instruct": instruct}
                        job |= {"base": self.base("tied"), "source": self.adapted("tied", "extended", 0, 0)}
                        job["target"] = self.folder / "adapted" / "tied-extended-embeddings" / f"seed{seed}"
                        job["settings"] = pretraining(amount, seed, **EMBEDDINGS_ALONE)
                        cells = [Cell(way, strength, amount=amount, method=name) for name in RIVAL_METHODS]
                    else:
                        job |= {"function": elchat, "instruct": instruct}
                        job["source"] = self.started("initialised", strength)
                        changes = {} if way == "elchat" else EMBEDDINGS_ALONE
                        job["settings"] = pretraining(amount, seed, **changes)
                        cells.append(Cell(f"{way} merged", strength, amount=amount))
                    jobs.append((cells, seed, job))
        return jobs

    def started(self, *names: str) -> Path:
        """Return where a model lies that several jobs start from."""
        return self.folder.joinpath("starts", *names)

    def start(self) -> None:
        """Write these models."""
        words = self.folder / "vocabularies" / "extended"
        for strength in self.grid.rivals:
            instruct = self.instruct("tied", "both", strength)
            initialised(instruct, words, self.started("initialised", strength))
        for _, _, job in self.calibration_jobs():
            adapted = self.adapted("tied", "extended", self.grid.amounts[-1], job["seed"])
            method = job["source"].parent.name
            propagated(self.base("tied"), job["instruct"], adapted, job["source"], method)

    def calibration_jobs(self) -> list[tuple[list[Cell], int, dict[str, Any]]]:
        """Return the calibration of two methods' models on more and more examples of each kind of data."""
        jobs = []
        amount, strength = self.grid.amounts[-1], self.grid.calibrated
        for method in self.grid.calibrated_methods:
            for seed in self.grid.calibration_seeds:
                for data in ("self", "instruct", "instruct_copy"):
                    for examples in self.grid.examples:
                        name = f"{method}/{data}-{examples}/seed{seed}"
                        job = {"function": calibrated, "target": self.folder / "calibrated" / name}
                        job |= {"scored": self.folder / "scores" / "calibrated" / name}
                        job |= {"folder": self.folder, "data": data, "examples": examples}
                        job |= {"source": self.started(method, f"seed{seed}"), "seed": seed}
                        job |= {"instruct": self.instruct("tied", "both", strength)}
                        labels: dict[str, Any] = {"amount": amount, "method": method, "data": data}
                        cell = Cell("calibrated", strength, examples=examples, **labels)
                        jobs.append(([cell], seed, job | {"asked": self.asked}))
        return jobs

    def scoring_jobs(self) -> list[tuple[list[Cell], int, dict[str, Any]]]:
        """Return every job that leaves scores."""
        return [*self.original_jobs(), *self.pair_jobs(), *self.rival_jobs(), *self.calibration_jobs()]

    def run(self, processes: int) -> None:
        """Do what is missing."""
        self.prepare()
        run_jobs(unit, self.training_jobs(), processes, "trainings")
        self.start()
        if self.grid.examples:  # what self-calibration learns from
            model = self.instruct("tied", "both", self.grid.calibrated)
            answer(model, self.folder / "prompts.jsonl", self.folder / "answers", 120)
        run_jobs(unit, [job for _, _, job in self.scoring_jobs()], processes, "models scored")

    def results(self) -> dict[str, pd.DataFrame]:
        """Gather what is finished.

        Returns:
            `models`: a row for each scored model, the fields of Cell and `seed`; `items`: the questions;
            `scores`: `model, item` (row numbers of the two), `bits`, `exact`, `margin`; `fits`: what the
            held-out fit says of each method; `instructs`: how far each instruct model drifted.
        """
        models: list[dict[str, Any]] = []
        scores, fits = [], []
        for cells, seed, job in self.scoring_jobs():
            folder = job.get("scored", job["target"])  # of jobs that train a model, too
            if not (folder / "scores.npz").exists():
                continue
            with np.load(folder / "scores.npz") as arrays:
                for cell, name in zip(cells, arrays.files, strict=True):
                    bits, exact, margin = arrays[name].T
                    table = {"model": len(models), "item": np.arange(len(bits)), "bits": bits}
                    scores.append(pd.DataFrame(table | {"exact": exact > 0, "margin": margin}))
                    models.append(vars(cell) | {"seed": seed})
            if (
                cells[0].kind == "lep"
                and seed == min(self.seeds(cells[0].amount))
                and (folder / "fits.json").exists()
            ):
                label = {name: getattr(cells[0], name) for name in CELL}
                fits += [label | _flat(report) for report in files.read_json(folder / "fits.json").values()]
        drifts = []
        for cells, _, job in self.original_jobs():
            if job["model"].exists():
                moved = checkpoints.drift(self.base(cells[0].form), job["model"])
                label = {name: getattr(cells[0], name) for name in ("form", "what", "strength")}
                drifts += [label | {"matrix": matrix} | values for matrix, values in moved.items()]
        found = pd.concat(scores, ignore_index=True)
        found = found.astype({"model": "int16", "item": "int16", "margin": "float16"})
        return {
            "models": pd.DataFrame(models),
            "items": pd.DataFrame(files.read_jsonl(self.asked)).drop(columns="messages"),
            "scores": found,
            "fits": pd.DataFrame(fits),
            "instructs": pd.DataFrame(drifts),
        }

    def write(self, target: Path) -> None:
        """Write the results where `read` finds them, beside those of other cells that are there.

        `provenance.json` tells every run whose cells are there.

        Raises:
            RuadaptError: a model of the same name there has other scores, so the two are no one grid.
        """
        target.mkdir(parents=True, exist_ok=True)
        tables, place = self.results(), target / "provenance.json"
        runs = files.read_json(place, {"runs": []})["runs"]
        if runs:
            tables = joined(dict(zip(TABLES, read(target), strict=True)), tables)
        for name, table in tables.items():
            if name == "scores":
                table.to_parquet(target / f"{name}.parquet", compression="zstd", index=False)
            else:
                files.atomic_write(target / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        made = {"grid": vars(self.grid), "versions": versions(), "machine": machine()}
        files.write_json(place, {"runs": [*runs, made | git_state(files.project_root())]})


def joined(there: dict[str, pd.DataFrame], added: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables of `Study.results` of two runs as those of one; models of both are kept as they are.

    Raises:
        RuadaptError: the runs asked other questions, or a model of both has other scores in each.
    """
    names = [*there["models"].columns]
    first, second = (tables["models"].reset_index(names="model") for tables in (there, added))
    both = first.merge(second, on=names)
    known, again = (
        tables["scores"].set_index("model")["bits"].loc[both[column]].to_numpy()
        for tables, column in ((there, "model_x"), (added, "model_y"))
    )
    if not there["items"].equals(added["items"]) or not np.allclose(known, again, rtol=1e-3, atol=1e-2):
        raise RuadaptError("the results there are of other questions or models; write to another folder")
    fresh = second[~second["model"].isin(both["model_y"])]
    number = dict(zip(fresh["model"], range(len(first), len(first) + len(fresh)), strict=True))
    scores = added["scores"][added["scores"]["model"].isin(number)]
    scores = scores.assign(model=scores["model"].map(number).astype("int16"))
    found = {
        "models": pd.concat([first, fresh], ignore_index=True).drop(columns="model"),
        "items": there["items"],
        "scores": pd.concat([there["scores"], scores], ignore_index=True),
    }
    for name in ("fits", "instructs"):
        every = pd.concat([there[name], added[name]], ignore_index=True)
        found[name] = every.drop_duplicates(LABELS[name], ignore_index=True)
    return found


def read(folder: Path) -> list[pd.DataFrame]:
    """Return the tables of `Study.results` that were written to a folder, in its order.

    Raises:
        RuadaptError: there are none.
    """
    if not (folder / "scores.parquet").exists():
        raise RuadaptError(f"{folder} holds no results of the grid; give run_dir a folder to compute it in")
    empty = {"keep_default_na": False, "na_values": {"explained": [""]}}
    tables = [pd.read_csv(folder / f"{name}.csv", **empty) for name in TABLES if name != "scores"]
    return [*tables, pd.read_parquet(folder / "scores.parquet")]


def _flat(report: dict[str, Any]) -> dict[str, Any]:
    held = report["held_out"] or {}
    names = ("method", "explained", "untrained_rows")
    return {name: report[name] for name in names} | {f"held_out_{name}": held[name] for name in held}


def propagated(base: Path, instruct: Path, adapted: Path, target: Path, method: str) -> Path:
    """Write the instruct model that a method of LEP makes."""
    key = freshness.key_of({"base": base, "instruct": instruct, "adapted": adapted, "method": method})

    def build(folder: Path) -> None:
        checkpoints.propagate(base, instruct, adapted, folder, method)

    return freshness.cached(target, key, build, "propagate")


def initialised(source: Path, words: Path, target: Path) -> Path:
    """Write a model with another vocabulary and nothing trained."""
    key = freshness.key_of({"source": source, "words": words})

    def build(folder: Path) -> None:
        checkpoints.initialise(source, words, folder)

    return freshness.cached(target, key, build, "initialise")


def elchat(
    target: Path, scored: Path, instruct: Path, source: Path, settings: dict[str, Any], asked: Path
) -> Path:
    """Train the instruct model itself on the text; score it as it is, and with its special tokens' rows back.

    Source: ElChat, arXiv 2412.11704. Text without chats pushes the rows of chat tokens away.
    """
    adapt(source=source, target=target, original=instruct, **settings)

    def build(made: Path) -> None:
        network, examples = opened(target), encoded(target, files.read_jsonl(asked))
        found = {"recipe0": expected(network, examples)}
        own = opened(instruct).get_input_embeddings().weight
        new, old = vocab.load_tokenizer(target), vocab.load_tokenizer(instruct)
        with torch.no_grad():
            for token, number in vocab.special_ids(old).items():
                network.get_input_embeddings().weight[vocab.special_ids(new)[token]] = own[number]
        found["recipe1"] = expected(network, examples)
        _save(made, found)

    key = freshness.key_of({"model": target, "instruct": instruct, "asked": asked})
    return freshness.cached(scored, key, build, CODE)


def propagated_embeddings(
    target: Path,
    scored: Path,
    base: Path,
    instruct: Path,
    source: Path,
    settings: dict[str, Any],
    asked: Path,
) -> Path:
    """Train the base's embeddings alone, as LEP's paper does, and score what LEP makes of them."""
    adapt(source=source, target=target, original=base, **settings)
    return score_pair(base, instruct, target, scored, [Recipe(name) for name in RIVAL_METHODS], asked)


def ceiling(
    target: Path, scored: Path, adapted: Path, data: Path, strength: str, steps: int, asked: Path
) -> Path:
    """Tune the adapted base as the base was tuned, and score it: what LEP saves, and at best reaches."""
    tune(adapted, target, data, "both", strength, steps)
    return score_model(target, scored, asked)


def calibrated(
    target: Path,
    scored: Path,
    folder: Path,
    source: Path,
    instruct: Path,
    data: str,
    examples: int,
    seed: int,
    asked: Path,
) -> Path:
    """Calibrate a propagated model as the default run does, on so many examples, and score it."""
    rows = list(files.read_jsonl(folder / ("answers/rows.jsonl" if data == "self" else "chat.jsonl")))
    if data == "instruct_copy":
        rows = mix(rows, list(files.read_jsonl(folder / "chat_copy.jsonl")), 0.2, 0)
    rows = random.Random(0).sample(rows, min(examples, len(rows)))
    chosen = folder / "calibration" / f"{data}-{examples}.jsonl"
    options = {"steps": max(2, examples // 8), "batch_size": 8, "learning_rate": 4e-4, "lora_rank": None}
    options |= {"warmup_steps": 20, "hidden_state_weight": 3.0, "seed": seed}
    files.write_jsonl(chosen, rows)
    calibrate(source, target, [chosen], None, 0.0, options, original=instruct)
    return score_model(target, scored, asked)
