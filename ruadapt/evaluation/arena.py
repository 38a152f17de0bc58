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

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages, question
from ruadapt.evaluation.asking import Source, ask_once
from ruadapt.evaluation.ratings import rate
from ruadapt.files import project_root, read_jsonl

# Russian judges write their own letters: А and В look the same.
OUTCOMES = {"A": 1.0, "А": 1.0, "B": 0.0, "В": 0.0, "=": 0.5}
"""What a verdict says of the answer shown first."""
_VERDICT = re.compile(rf"\[\[\s*([{''.join(OUTCOMES)}])\s*\]\]")

Answers = Mapping[str, Sequence[Answer]]
"""Answers of each model by its name, one a question."""


@dataclass(frozen=True)
class Question:
    """One question of a file; `category` is "" where the file has none."""

    id: str
    category: str
    text: str


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """Read questions in arena-hard's format: `question_id`, `category` (or `cluster`), `turns[0].content`.

    Args:
        limit: take the first ones only; 0 takes all.

    Raises:
        RuadaptError: no question, an empty one, a field is missing, more than one turn, an id occurs twice.
    """
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            (turn,) = row["turns"]
            text, identifier = str(turn["content"]), str(row["question_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise RuadaptError(
                f"{path}, question {number}: question_id and turns with exactly one content are needed"
            ) from error
        if not text.strip() or identifier in questions:
            raise RuadaptError(f"{path}, question {number} is empty, or its id {identifier} occurs twice")
        category = str(row.get("category") or row.get("cluster") or "")
        questions[identifier] = Question(identifier, category, text)
    if not questions:
        raise RuadaptError(f"{path} holds no question")
    return list(questions.values())[: limit or None]


@cache
def judge_prompt() -> dict[str, str]:
    """Return what the judge is told: `system`, and `user` with $question, $answer_a and $answer_b."""
    path = project_root() / "data" / "arena" / "judge_ru.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def judge_messages(asked: str, first: str, second: str) -> Messages:
    """Return the conversation that asks for a verdict."""
    filled = Template(judge_prompt()["user"]).substitute(question=asked, answer_a=first, answer_b=second)
    return [{"role": "system", "content": judge_prompt()["system"]}, *question(filled)]


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


def answer_all(
    models: Sequence[Source], questions: Sequence[Question], folder: Path, **options: Any
) -> dict[str, list[Answer]]:
    """Return greedy answers of models by their name, each kept in `folder` and asked for only once.

    Args:
        options: those of `ask_once`.

    Raises:
        RuadaptError: as `ask_once`, or a server refused a question.
    """
    asked = [question(one.text) for one in questions]
    answered = {
        model.name: ask_once(folder / model.name.replace("/", "_"), model, asked, **options)
        for model in models
    }
    for name, given in answered.items():
        refused = [
            f"{one.id} ({reply.failed})" for one, reply in zip(questions, given, strict=True) if reply.failed
        ]
        if refused:
            raise RuadaptError(
                f"the server of {name} refuses questions: {', '.join(refused[:5])}; leave them out"
            )
    return answered


def judge_all(
    questions: Sequence[Question],
    answered: Answers,
    fights: Sequence[tuple[str, str]],
    judge: Source,
    folder: Path,
    **options: Any,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Let a judge compare pairs of models on every question, in both orders.

    A reply is a record in `folder`: it is asked for once, whoever gave the answers, and stays when the run
    is killed. Two equal answers are a tie, and an empty one loses to any other, without asking.

    Args:
        fights: `pairs`.
        options: those of `ask_once`.

    Returns:
        battles with a verdict, one row an order: `question, category, first, second, outcome` (of the first:
        1, 0.5, 0), `first_length, second_length` (characters), `by_rule`; and what else happened: `battles`,
        `judged`, `by_rule`, `nonsense` (replies without one clear verdict), `cut_verdicts`, `refused` (by the
        server), `first_preferred` (share of decided verdicts for the answer shown first) and `agreement`
        (share of pairs of orders with the same verdict).

    Raises:
        RuadaptError: as `ask_once`, or no verdict can be read.
    """
    rows, conversations = [], []
    for number, asked in enumerate(questions):
        for first, second in (order for pair in fights for order in (pair, pair[::-1])):
            texts = [answered[name][number].text for name in (first, second)]
            ruled = _ruled(*map(str.strip, texts))
            if ruled is None:
                conversations.append(judge_messages(asked.text, *texts))
            rows.append(
                {"question": asked.id, "category": asked.category, "first": first, "second": second}
                | {"outcome": math.nan if ruled is None else ruled, "by_rule": ruled is not None}
                | {"first_length": len(texts[0]), "second_length": len(texts[1])}
            )
    replies = ask_once(folder, judge, conversations, **options)
    table = pd.DataFrame(rows)
    table.loc[~table["by_rule"], "outcome"] = [verdict(reply.text) for reply in replies]
    judged = table.dropna(subset="outcome").astype({"outcome": float}).reset_index(drop=True)
    refused = sum(bool(reply.failed) for reply in replies)
    nonsense = len(table) - len(judged) - refused
    if replies and judged["by_rule"].all():
        raise RuadaptError(
            f"{judge.name} gave no verdict that can be read in {nonsense} battles, and its server refused "
            f"{refused}; its replies are in {folder}; take a stronger judge"
        )
    # Each battle beside the one in the other order.
    asked_for = judged[~judged["by_rule"]]
    decided = asked_for.loc[asked_for["outcome"] != 0.5, "outcome"]
    turned = asked_for.rename(columns={"first": "second", "second": "first"})
    both = asked_for.merge(turned, on=["question", "first", "second"])
    same = both["outcome_x"] == 1 - both["outcome_y"]
    return judged, {
        "battles": len(table),
        "judged": len(judged),
        "by_rule": int(table["by_rule"].sum()),
        "nonsense": nonsense,
        "cut_verdicts": sum(reply.cut for reply in replies),
        "refused": refused,
        "first_preferred": float(decided.mean()) if len(decided) else None,
        "agreement": float(same.mean()) if len(both) else None,
    }


def verdict(reply: str) -> float:
    """Return the outcome for the answer shown first, NaN unless a reply gives one without contradiction."""
    # What a reasoning model thinks before its answer is no verdict.
    found = {OUTCOMES[letter] for letter in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return found.pop() if len(found) == 1 else math.nan


def leaderboard(battles: pd.DataFrame, answered: Answers, resamples: int = 1000) -> pd.DataFrame:
    """Return `rate`'s table of all models, what their ratings would be at equal length, and their answers.

    Returns:
        `rate`'s columns, `same_length, same_length_low, same_length_high`, and of each model's answers the
        mean `characters`, how many are `empty` and `cut`; `attrs["length"]` as in `rate`.
    """
    controlled = rate(battles, length_controlled=True, resamples=resamples)
    same = controlled.set_index("model")[["rating", "rating_low", "rating_high"]]
    same.columns = same.columns.str.replace("rating", "same_length")
    about = pd.DataFrame(
        {
            "characters": sum(len(answer.text) for answer in own) / len(own),
            "empty": sum(not answer.text.strip() for answer in own),
            "cut": sum(answer.cut for answer in own),
        }
        for own in answered.values()
    ).set_index(pd.Index(answered))
    table = rate(battles, resamples=resamples).join(same, on="model").join(about, on="model")
    table.attrs["length"] = controlled.attrs["length"]
    return table


def _ruled(first: str, second: str) -> float | None:
    if first == second:
        return 0.5
    return None if first and second else float(bool(first))
