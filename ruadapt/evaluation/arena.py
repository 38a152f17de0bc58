"""An arena: models answer questions, a judge compares the answers two by two and in both orders."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, answers
from ruadapt.evaluation.endpoint import Endpoint, UnansweredError
from ruadapt.evaluation.models import load
from ruadapt.evaluation.records import Records, open_records, record_key
from ruadapt.files import hash_path, project_root, read_jsonl

NONSENSE = "nonsense"
OUTCOMES = {"A": 1.0, "B": 0.0, "=": 0.5}
# Russian judges write their own letters: А and В look the same.
_LOOKALIKES = str.maketrans("АВ", "AB")
_VERDICT = re.compile(r"\[\[\s*([ABАВ=])\s*\]\]")
# So many failures before the first judgment are a judge that doesn't work.
_GIVE_UP = 8


@dataclass(frozen=True)
class Question:
    """One question of a file; `category` is "" where the file has none."""

    id: str
    category: str
    text: str


@dataclass(frozen=True)
class Contestant:
    """A model that answers: a folder, or a model behind an endpoint."""

    name: str
    source: Path | Endpoint


@dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told: `system`, and `user` with $question, $answer_a and $answer_b."""

    system: str
    user: str

    def messages(self, question: str, first: str, second: str) -> list[dict[str, str]]:
        """Return the conversation that asks for a verdict."""
        filled = Template(self.user).substitute(question=question, answer_a=first, answer_b=second)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": filled}]


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
    repeated = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
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
        holes = set(Template(prompt.user).get_identifiers())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise RuadaptError(f"{path}: a YAML file with `system` and `user` was expected ({error})") from error
    if holes != {"question", "answer_a", "answer_b"} or not Template(prompt.user).is_valid():
        raise RuadaptError(f"{path}: `user` must name $question, $answer_a and $answer_b, and write $ as $$")
    return prompt


def contestants(specs: Sequence[str], **options: Any) -> list[Contestant]:
    """Read `[NAME=]FOLDER` and `[NAME=]MODEL@URL`; a folder's last part is its name, and so is MODEL.

    Args:
        options: those of `Endpoint`.

    Raises:
        RuadaptError: fewer than two, two with one name, or a folder that is none.
    """
    found = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not separator or "/" in name or "@" in name:
            name, rest = "", spec
        model, separator, url = rest.partition("@")
        if separator and "://" in url:
            found.append(Contestant(name or model, Endpoint(url, model, **options)))
            continue
        folder = Path(rest)
        if not (folder / "config.json").exists():
            raise RuadaptError(f"{rest} is no model folder; give one, or MODEL@URL for a model on a server")
        found.append(Contestant(name or folder.resolve().name, folder))
    names = [contestant.name for contestant in found]
    if len(set(names)) < len(names) or len(names) < 2:
        raise RuadaptError(
            f"an arena needs two models or more, each with its own name, not {', '.join(names)}; "
            "write NAME=FOLDER"
        )
    return found


def answer_all(
    contestant: Contestant,
    questions: Sequence[Question],
    path: Path,
    *,
    max_tokens: int,
    device: str | None = None,
    batch_size: int = 8,
    parallel: int = 4,
) -> tuple[dict[str, Answer], int]:
    """Return greedy answers by question id, kept in the records at `path` and asked for only once.

    The second value counts the bytes of a half-written record that was found there and dropped.

    Raises:
        RuadaptError: no chat template, no such server, or a question that it did not answer.
    """
    source = contestant.source
    identity = hash_path(source) if isinstance(source, Path) else [source.url, source.model]
    keys = {question.id: record_key(identity, max_tokens, question.text) for question in questions}
    with open_records(path) as records:
        missing = [question for question in questions if keys[question.id] not in records.done]
        if missing and isinstance(source, Path):
            texts = [question.text for question in missing]
            written = answers(
                *load(source, device),
                texts,
                max_new_tokens=max_tokens,
                batch_size=batch_size,
                description=contestant.name,
            )
            for question, answer in zip(missing, written, strict=True):
                records.add(_answer_record(keys[question.id], question, answer))
        elif missing and isinstance(source, Endpoint):
            conversations = [[{"role": "user", "content": question.text}] for question in missing]
            replies = _asked(source, conversations, max_tokens, parallel, contestant.name)
            failed = []
            for place, reply in replies:
                question = missing[place]
                if isinstance(reply, Answer):
                    records.add(_answer_record(keys[question.id], question, reply))
                else:
                    failed.append(f"{question.id} ({reply})")
            if failed:
                raise RuadaptError(
                    f"{contestant.name} left {len(failed)} questions unanswered: {', '.join(failed[:5])}; "
                    "the same command asks them again"
                )
        done = {name: records.done[key] for name, key in keys.items()}
        return {
            name: Answer(record["answer"], record["cut"]) for name, record in done.items()
        }, records.dropped


def judge_all(
    questions: Sequence[Question],
    answered: Mapping[str, Mapping[str, Answer]],
    judge: Endpoint,
    path: Path,
    *,
    prompt: JudgePrompt,
    baseline: str | None = None,
    max_tokens: int = 1024,
    parallel: int = 4,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Let a judge compare all pairs of models (or each with a baseline) on every question, in both orders.

    A judgment is a record at `path`: it is asked for once, whoever gave the answers, and stays when the run
    is killed. Two equal answers are a tie, and an empty one loses to any other, without asking.

    Args:
        answered: {model: {question id: answer}}.

    Returns:
        battles with a verdict, one row an order: `question, category, first, second, outcome` (of the first:
        1, 0.5, 0), `first_length, second_length` (characters), `by_rule`; and what else happened: `battles`,
        `judged`, `by_rule`, `nonsense`, `cut_verdicts`, `failed` {reason: battles}, `dropped_bytes` (of a
        half-written record), `first_preferred` (share of decided verdicts for the answer shown first) and
        `agreement` (share of pairs of orders with the same verdict).

    Raises:
        RuadaptError: an unknown baseline; the judge can't be reached; none of its first replies came.
    """
    names = list(answered)
    if baseline is not None and baseline not in names:
        raise RuadaptError(f"baseline {baseline!r} is none of {', '.join(names)}")
    pairs = [pair for pair in combinations(names, 2) if baseline is None or baseline in pair]
    plan = [(question, *order) for question in questions for pair in pairs for order in (pair, pair[::-1])]
    rows, keys, conversations = [], [], {}
    for question, first, second in plan:
        texts = [answered[name][question.id].text for name in (first, second)]
        key = record_key(judge.url, judge.model, max_tokens, vars(prompt), question.text, *texts)
        ruled = _ruled(*texts)
        if ruled is None:
            conversations[key] = prompt.messages(question.text, *texts)
        keys.append(key)
        rows.append(
            {"question": question.id, "category": question.category, "first": first, "second": second}
            | {"outcome": ruled, "by_rule": ruled is not None}
            | {"first_length": len(texts[0]), "second_length": len(texts[1])}
        )
    with open_records(path) as records:
        failed = _judge(judge, conversations, records, max_tokens, parallel)
        done, dropped = records.done, records.dropped
    for row, key in zip(rows, keys, strict=True):
        if row["outcome"] is None and key in done:
            row["outcome"] = OUTCOMES.get(done[key]["verdict"])
    asked = [done[key] for key in keys if key in conversations and key in done]
    table = pd.DataFrame(rows)
    report = {
        "battles": len(rows),
        "judged": int(table["outcome"].notna().sum()),
        "by_rule": int(table["by_rule"].sum()),
        "nonsense": sum(record["verdict"] == NONSENSE for record in asked),
        "cut_verdicts": sum(record["cut"] for record in asked),
        "failed": dict(Counter(failed[key] for key in keys if key in failed)),
        "dropped_bytes": dropped,
    }
    table = table[table["outcome"].notna()].astype({"outcome": float}).reset_index(drop=True)
    return table, report | _order_effects(table[~table["by_rule"]])


def verdict(reply: str) -> str:
    """Return "A", "B" or "=" as the judge's reply says once and without contradiction, else `NONSENSE`."""
    # What a reasoning model thinks before its answer is no verdict.
    found = {letter.translate(_LOOKALIKES) for letter in _VERDICT.findall(reply.rpartition("</think>")[2])}
    return found.pop() if len(found) == 1 else NONSENSE


def _ruled(first: str, second: str) -> float | None:
    if first.strip() == second.strip():
        return 0.5
    return None if first.strip() and second.strip() else float(bool(first.strip()))


def _judge(
    judge: Endpoint,
    conversations: Mapping[str, Sequence[dict[str, str]]],
    records: Records,
    max_tokens: int,
    parallel: int,
) -> dict[str, str]:
    """Add a record for every conversation without one; return why those failed that did."""
    missing = [key for key in conversations if key not in records.done]
    failed: dict[str, str] = {}
    successes = 0
    replies = _asked(judge, [conversations[key] for key in missing], max_tokens, parallel, "judgments")
    for place, reply in replies:
        key = missing[place]
        if isinstance(reply, Answer):
            successes += 1
            records.add(
                {"key": key, "judge": judge.model, "verdict": verdict(reply.text), "cut": reply.cut}
                | {"reply": reply.text, "asked": conversations[key][-1]["content"]}
            )
        else:
            failed[key] = reply
            if not successes and len(failed) >= _GIVE_UP:
                raise RuadaptError(
                    f"the judge at {judge.url} answered none of the first {len(failed)} battles ({reply}); "
                    "see its log, or allow it more time"
                )
    return failed


def _asked(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[dict[str, str]]],
    max_tokens: int,
    parallel: int,
    description: str,
) -> Iterator[tuple[int, Answer | str]]:
    """Yield the number of a conversation and its reply, or the reason why there is none, as they come in.

    `parallel` requests are under way at a time.
    """

    def ask(conversation: Sequence[dict[str, str]]) -> Answer | str:
        try:
            return endpoint.ask(conversation, max_tokens=max_tokens)
        except UnansweredError as error:
            return str(error)

    pool = ThreadPoolExecutor(max(1, parallel))
    try:
        places = {pool.submit(ask, conversation): place for place, conversation in enumerate(conversations)}
        for future in tqdm(as_completed(places), total=len(places), desc=description, leave=False):
            yield places[future], future.result()
    finally:
        # After an error nobody waits for what was still to be asked.
        pool.shutdown(wait=False, cancel_futures=True)


def _answer_record(key: str, question: Question, answer: Answer) -> dict[str, Any]:
    return {"key": key, "question_id": question.id, "answer": answer.text, "cut": answer.cut}


def _order_effects(asked: pd.DataFrame) -> dict[str, float | None]:
    decided = asked[asked["outcome"] != 0.5]
    turned = asked.rename(columns={"first": "second", "second": "first"})
    both = asked.merge(turned, on=["question", "first", "second"])
    same = both["outcome_x"] == 1 - both["outcome_y"]
    return {
        "first_preferred": float(decided["outcome"].mean()) if len(decided) else None,
        "agreement": float(same.mean()) if len(both) else None,
    }
