"""An arena: models answer questions, a judge compares the answers two by two and in both orders."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

NONSENSE = "nonsense"
OUTCOMES = {"A": 1.0, "B": 0.0, "=": 0.5}
# Russian judges write their own letters: А and В look the same.
_LOOKALIKES = str.maketrans("АВ", "AB")
_VERDICT = re.compile(r"\[\[\s*([ABАВ=])\s*\]\]")

Answers = Mapping[str, Sequence[Answer]]
"""Answers of each model by its name, one a question."""


@dataclass(frozen=True)
class Question:
    """One question of a file; `category` is "" where the file has none."""

    id: str
    category: str
    text: str


@dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told: `system`, and `user` with $question, $answer_a and $answer_b."""

    system: str
    user: str

    def messages(self, asked: str, first: str, second: str) -> Messages:
        """Return the conversation that asks for a verdict."""
        filled = Template(self.user).substitute(question=asked, answer_a=first, answer_b=second)
        return [{"role": "system", "content": self.system}, *question(filled)]


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """Read questions in arena-hard's format: `question_id`, `category` (or `cluster`), `turns[0].content`.

    Args:
        limit: take the first ones only; 0 takes all.

    Raises:
        RuadaptError: no question, a field is missing, more than one turn, or an id that occurs twice.
    """
    questions: list[Question] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            (turn,) = row["turns"]
            text, identifier = str(turn["content"]), str(row["question_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise RuadaptError(
                f"{path}, question {number}: question_id and turns with exactly one content are needed"
            ) from error
        if not text.strip():
            raise RuadaptError(f"{path}, question {number} is empty")
        questions.append(Question(identifier, str(row.get("category") or row.get("cluster") or ""), text))
    repeated = [name for name, count in Counter(asked.id for asked in questions).items() if count > 1]
    if not questions or repeated:
        raise RuadaptError(f"{path} " + (f"has {repeated[0]} twice" if repeated else "holds no question"))
    return questions[: limit or None]


def read_judge_prompt(path: Path | None = None) -> JudgePrompt:
    """Read a judge's instructions (YAML); by default the project's own, `data/arena/judge_ru.yaml`.

    Raises:
        RuadaptError: the file is missing or broken, or lacks a part or a placeholder.
    """
    path = path or project_root() / "data" / "arena" / "judge_ru.yaml"
    try:
        prompt = JudgePrompt(**yaml.safe_load(path.read_text(encoding="utf-8")))
        prompt.messages("", "", "")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise RuadaptError(
            f"{path}: a YAML file with `system` and `user` was expected, in `user` $question, $answer_a and "
            f"$answer_b, and $ written as $$ ({error})"
        ) from error
    if set(Template(prompt.user).get_identifiers()) != {"question", "answer_a", "answer_b"}:
        raise RuadaptError(f"{path}: `user` must name $question, $answer_a and $answer_b")
    return prompt


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


def answer_all(source: Source, questions: Sequence[Question], folder: Path, **options: Any) -> list[Answer]:
    """Return a model's greedy answers, each kept in `folder` and asked for only once.

    Args:
        options: those of `ask_once`.

    Raises:
        RuadaptError: as `ask_once`, or a server did not answer a question.
    """
    path = folder / f"{source.name.replace('/', '_')}.jsonl"
    answers = ask_once(path, source, [question(asked.text) for asked in questions], **options)
    failed = [
        f"{asked.id} ({answer.failed})"
        for asked, answer in zip(questions, answers, strict=True)
        if answer.failed
    ]
    if failed:
        raise RuadaptError(
            f"{source.name} left {len(failed)} questions unanswered: {', '.join(failed[:5])}; "
            "the same command asks them again"
        )
    return answers


def judge_all(
    questions: Sequence[Question],
    answered: Answers,
    fights: Sequence[tuple[str, str]],
    judge: Source,
    path: Path,
    *,
    prompt: JudgePrompt,
    **options: Any,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Let a judge compare pairs of models on every question, in both orders.

    A reply is a record at `path`: it is asked for once, whoever gave the answers, and stays when the run
    is killed. Two equal answers are a tie, and an empty one loses to any other, without asking.

    Args:
        fights: `pairs`.
        options: those of `ask_once`.

    Returns:
        battles with a verdict, one row an order: `question, category, first, second, outcome` (of the first:
        1, 0.5, 0), `first_length, second_length` (characters), `by_rule`; and what else happened: `battles`,
        `judged`, `by_rule`, `nonsense`, `cut_verdicts`, `failed` {reason: battles}, `first_preferred` (share
        of decided verdicts for the answer shown first) and `agreement` (share of pairs of orders with the
        same verdict).

    Raises:
        RuadaptError: as `ask_once`, or no verdict can be read.
    """
    rows, conversations = [], []
    for number, asked in enumerate(questions):
        for first, second in (order for pair in fights for order in (pair, pair[::-1])):
            texts = [answered[name][number].text for name in (first, second)]
            ruled = _ruled(*texts)
            if ruled is None:
                conversations.append(prompt.messages(asked.text, *texts))
            rows.append(
                {"question": asked.id, "category": asked.category, "first": first, "second": second}
                | {"outcome": math.nan if ruled is None else ruled, "by_rule": ruled is not None}
                | {"first_length": len(texts[0]), "second_length": len(texts[1])}
            )
    replies = ask_once(path, judge, conversations, **options)
    verdicts = ["" if reply.failed else verdict(reply.text) for reply in replies]
    table = pd.DataFrame(rows)
    table.loc[~table["by_rule"], "outcome"] = [OUTCOMES.get(found, math.nan) for found in verdicts]
    report = {
        "battles": len(rows),
        "judged": int(table["outcome"].notna().sum()),
        "by_rule": int(table["by_rule"].sum()),
        "nonsense": verdicts.count(NONSENSE),
        "cut_verdicts": sum(reply.cut for reply in replies),
        "failed": dict(Counter(reply.failed for reply in replies if reply.failed)),
    }
    if report["nonsense"] and report["judged"] == report["by_rule"]:
        raise RuadaptError(
            f"{judge.name} gave no verdict that can be read in {report['nonsense']} battles; its replies are "
            f"in {path}; take a stronger judge"
        )
    table = table[table["outcome"].notna()].astype({"outcome": float}).reset_index(drop=True)
    return table, report | _order_effects(table[~table["by_rule"]])


def verdict(reply: str) -> str:
    """Return "A", "B" or "=" as the judge's reply says once and without contradiction, else `NONSENSE`."""
    # What a reasoning model thinks before its answer is no verdict.
    found = {letter.translate(_LOOKALIKES) for letter in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return found.pop() if len(found) == 1 else NONSENSE


def leaderboard(battles: pd.DataFrame, answered: Answers, resamples: int = 1000) -> pd.DataFrame:
    """Return `rate`'s table of all models, what their ratings would be at equal length, and their answers.

    Returns:
        `rate`'s columns, `same_length, same_length_low, same_length_high`, and of each model's answers the
        mean `characters`, how many are `empty` and `cut`; `attrs["length"]` as in `rate`.
    """
    controlled = rate(battles, length_controlled=True, resamples=resamples)
    ratings = ["rating", "rating_low", "rating_high"]
    same = controlled.set_index("model")[ratings].rename(
        columns=lambda name: name.replace("rating", "same_length")
    )
    about = {
        name: {
            "characters": sum(len(answer.text) for answer in own) / len(own),
            "empty": sum(not answer.text.strip() for answer in own),
            "cut": sum(answer.cut for answer in own),
        }
        for name, own in answered.items()
    }
    table = rate(battles, resamples=resamples).join(same, on="model")
    table = table.join(pd.DataFrame.from_dict(about, orient="index"), on="model")
    table.attrs["length"] = controlled.attrs["length"]
    return table


def _ruled(first: str, second: str) -> float | None:
    if first.strip() == second.strip():
        return 0.5
    return None if first.strip() and second.strip() else float(bool(first.strip()))


def _order_effects(asked: pd.DataFrame) -> dict[str, float | None]:
    decided = asked[asked["outcome"] != 0.5]
    turned = asked.rename(columns={"first": "second", "second": "first"})
    both = asked.merge(turned, on=["question", "first", "second"])
    same = both["outcome_x"] == 1 - both["outcome_y"]
    return {
        "first_preferred": float(decided["outcome"].mean()) if len(decided) else None,
        "agreement": float(same.mean()) if len(both) else None,
    }
