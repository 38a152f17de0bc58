"""The grid of `benchmarks.propagation` with few cells, on a real model: does its region hold there?

The base is a chat model; instruct models are tuned further from it at several strengths. One adaptation
serves all. What is asked are held-out chats: their questions are in no chat that tunes.

    python -m benchmarks.propagation_real RUN RESULTS BASE --chats ru=FILE --chats en=FILE \
        --text ru=FILE --text en=FILE
"""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from benchmarks.propagation import (
    FEW,
    Grid,
    Recipe,
    Study,
    build_vocabulary,
    initialised,
    pretraining,
)
from benchmarks.real import named_paths
from ruadapt import data_sets, files, freshness, vocab
from ruadapt.training.chats import read_chats
from ruadapt.training.encoding import encode_chats
from ruadapt.vocab.registry import Materials

LONGEST = 160  # tokens of the adapted vocabulary; long chats would cost most of the time
HELD_OUT_SHARE = 0.25  # of the questions
RECIPES = [Recipe(method) for method in FEW] + [Recipe("conversion", body=0.0)]


class RealStudy(Study):
    """The grid on one base, with text and chats of each language."""

    accumulation = 4  # all eight chats at once would take 11 GB

    def __init__(
        self, folder: Path, grid: Grid, model: Path, texts: Mapping[str, Path], chats: Mapping[str, Path]
    ) -> None:
        super().__init__(folder, grid)
        self.model, self.texts, self.chats = model, texts, chats

    def base(self, form: str) -> Path:
        return self.model

    def pairs(self) -> Iterator[tuple[str, str, str, str, list[Recipe]]]:
        for strength in self.grid.strengths:
            yield "tied", "both", strength, "extended", RECIPES

    def prepare(self) -> None:
        """Write the vocabulary, the initialised base, and chats that tune and that are asked."""
        texts = {language: list(data_sets.read_texts(path)) for language, path in self.texts.items()}
        size, words = self.grid.added_rows, self.folder / "vocabularies" / "extended"
        height = vocab.rows(vocab.load_tokenizer(self.model)) + size
        given = Materials(self.model, texts["ru"], texts["en"], height, size, 0, [])
        build = partial(build_vocabulary, "extended", given)
        key = freshness.key_of({"rows": size, "texts": [*self.texts.values()], "model": self.model})
        freshness.cached(words, key, build, unit="vocabulary")
        initialised(self.model, words, self.adapted("tied", "extended", 0, 0))
        tokenizer = AutoTokenizer.from_pretrained(words)
        tuning: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        for language, path in self.chats.items():
            rows = list(read_chats(str(path)))
            short = [len(row["input_ids"]) <= LONGEST for row in encode_chats(rows, tokenizer)]
            rows = [row for row, fits in zip(rows, short, strict=True) if fits]
            questions = sorted({row["messages"][-2]["content"] for row in rows})
            held = set(random.Random(0).sample(questions, round(len(questions) * HELD_OUT_SHARE)))
            tuning += [row for row in rows if row["messages"][-2]["content"] not in held]
            seen: set[str] = set()
            for row in rows:
                question, answer = (message["content"] for message in row["messages"][-2:])
                if question in held - seen and len(seen) < self.grid.items:
                    seen.add(question)
                    label = {"language": language, "task": "answers", "id": f"{language}-{len(seen)}"}
                    asked.append(label | {"characters": len(answer), "messages": row["messages"]})
        files.write_jsonl(self.folder / "chat.jsonl", random.Random(0).sample(tuning, len(tuning)))
        files.write_jsonl(self.asked, asked)

    def pretraining(self, amount: int, seed: int) -> dict[str, Any]:
        """As the profile `smollm2-135m` trains."""
        changes = {"batch_size": 4, "learning_rate": 2e-4, "warmup_steps": 10}
        settings = pretraining(amount, seed, **changes, new_rows_learning_rate_factor=10.0)
        return settings | {"corpus": self.texts["ru"], "replay": self.texts["en"], "replay_share": 0.15}


def main(
    run: Annotated[Path, typer.Argument(help="Folder to compute in; finished parts are found again.")],
    results: Annotated[Path, typer.Argument(help="Folder for the tables.")],
    base: Annotated[Path, typer.Argument(help="A chat model.")],
    text: Annotated[list[str], typer.Option(metavar="LANGUAGE=FILE", help="Training text, ru and en.")],
    chats: Annotated[list[str], typer.Option(metavar="LANGUAGE=FILE", help="Chats, ru and en.")],
    strengths: Annotated[str, typer.Option(help="Of tuning, as in `Grid`.")] = "gentle middle",
    characters: Annotated[int, typer.Option(help="Russian ones of continued pre-training.")] = 150_000,
    tuning_steps: Annotated[int, typer.Option(help="Of 8 chats.")] = 24,
    items: Annotated[int, typer.Option(help="Held-out chats of a language.")] = 24,
    added_rows: Annotated[int, typer.Option(help="New rows.")] = 24_000,
    processes: Annotated[int, typer.Option(help="Trainings at once.")] = 2,
) -> None:
    """Compute the cells that are missing, and write the tables."""
    grid = Grid(
        seeds=[1],
        amounts=[characters],
        strengths=strengths.split(),
        few=(),
        rivals=(),
        examples=(),
        tuning_steps=tuning_steps,
        items=items,
        added_rows=added_rows,
    )
    study = RealStudy(run, grid, base, named_paths(text), named_paths(chats))
    study.run(processes)
    study.write(results)


if __name__ == "__main__":
    typer.run(main)
