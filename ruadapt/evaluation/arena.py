"""An arena: models answer questions, a judge compares the answers two by two and in both orders."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import yaml

from ruadapt.data_sets import read_texts
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, question
from ruadapt.evaluation.asking import ask_once
from ruadapt.evaluation.endpoint import Endpoint
from ruadapt.files import project_root, read_jsonl

# Russian judges write their own letters: А and В look the same.
OUTCOMES = {"A": 1.0, "А": 1.0, "B": 0.0, "В": 0.0, "=": 0.5}
"""What a verdict says of the answer shown first."""


@dataclass(frozen=True)
class Question:
    """One question of a file, and its answer where the file has one."""

    id: str
    text: str
    answer: str | None = None


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """Read questions: a text file has one a line, JSON lines have arena-hard's columns or `prompt`.

    Arena-hard's columns are `question_id` and `turns[0].content`; `answer` may stand beside them.

    Args:
        limit: take the first ones only; 0 takes all.

    Raises:
        RuadaptError: no question, one that is empty or has more than one turn, an id that occurs twice.
    """
    lines = path.suffix != ".jsonl"
    questions: dict[str, Question] = {}
    for number, row in enumerate(
        ({"prompt": text} for text in read_texts(path)) if lines else read_jsonl(path)
    ):
        turns = row.get("turns", [{"content": row.get("prompt", "")}])
        identifier, text = str(row.get("question_id", number)), turns[0]["content"]
        if len(turns) != 1 or not text.strip() or identifier in questions:
            raise RuadaptError(
                f"{path}, question {number + 1}: exactly one text in turns or prompt and an id of its own "
                "are needed"
            )
        questions[identifier] = Question(identifier, text, row.get("answer"))
    if not questions:
        raise RuadaptError(f"{path} holds no question")
    return list(questions.values())[: limit or None]


def pairs(names: Sequence[str], against: str | None = None) -> list[tuple[str, str]]:
    """Return who fights whom: all with all, or all with one.

    Raises:
        RuadaptError: fewer than two models, or `against` is none of them.
    """
    if len(names) < 2 or against not in (None, *names):
        raise RuadaptError(
            f"an arena needs two models or more, and --against one of them, not {', '.join(names)}"
        )
    return [pair for pair in combinations(names, 2) if against in (None, *pair)]


@cache
def _judge_prompt() -> dict[str, str]:
    path = project_root() / "data" / "arena" / "judge_ru.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def judge_messages(asked: str, first: str, second: str) -> Messages:
    """Return the conversation that asks for a verdict, in the words of `data/arena/judge_ru.yaml`."""
    filled = Template(_judge_prompt()["user"]).substitute(question=asked, answer_a=first, answer_b=second)
    return [{"role": "system", "content": _judge_prompt()["system"]}, *question(filled)]


def verdict(reply: str) -> float:
    """Return the outcome for the answer shown first, NaN unless a reply gives one without contradiction."""
    # What a reasoning model thinks before its answer is no verdict.
    letters = re.findall(rf"\[\[\s*([{''.join(OUTCOMES)}])\s*\]\]", reply.rpartition("</think>")[2])
    found = {OUTCOMES[letter] for letter in letters}
    return found.pop() if len(found) == 1 else math.nan


def judge_all(
    questions: Sequence[Question],
    answered: Mapping[str, Sequence[Answer]],
    fights: Sequence[tuple[str, str]],
    judge: Path | Endpoint,
    folder: Path,
    **options: Any,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Let a judge compare pairs of models on every question, in both orders; replies are kept in `folder`.

    Args:
        answered: answers of each model by its name, one a question.
        fights: `pairs`.
        options: those of `ask_once`.

    Returns:
        battles with a verdict, one row an order: `question, first, second, outcome` (of the first: 1, 0.5,
        0); and what else happened: `battles`, `judged`, `nonsense` (replies without one clear verdict),
        `refused` (by the server), `first_preferred` (share of decided verdicts for the answer shown first)
        and `agreement` (share of pairs of orders with the same verdict).

    Raises:
        RuadaptError: as `ask_once`, or no verdict can be read.
    """
    orders = [order for pair in fights for order in (pair, pair[::-1])]
    battles = [(number, *order) for number in range(len(questions)) for order in orders]
    conversations = [
        judge_messages(questions[number].text, *(answered[name][number].text for name in order))
        for number, *order in battles
    ]
    replies = ask_once(folder, judge, conversations, **options)
    table = pd.DataFrame(battles, columns=["question", "first", "second"])
    table["question"] = [questions[number].id for number in table["question"]]
    table["outcome"] = [verdict(reply.text) for reply in replies]
    judged = table.dropna(subset="outcome").reset_index(drop=True)
    refused = sum(bool(reply.failed) for reply in replies)
    nonsense = len(table) - len(judged) - refused
    if judged.empty:
        raise RuadaptError(
            f"the judge gave no verdict that can be read in {nonsense} battles, and its server refused "
            f"{refused}; its replies are in {folder}; take a stronger one"
        )
    decided = judged.loc[judged["outcome"] != 0.5, "outcome"]
    # Each battle beside the one in the other order.
    turned = judged.rename(columns={"first": "second", "second": "first"})
    both = judged.merge(turned, on=["question", "first", "second"])
    return judged, {
        "battles": len(table),
        "judged": len(judged),
        "nonsense": nonsense,
        "refused": refused,
        "first_preferred": float(decided.mean()) if len(decided) else None,
        "agreement": float((both["outcome_x"] == 1 - both["outcome_y"]).mean()) if len(both) else None,
    }
