"""Conversations and pairs of answers from data sets in the schemas of Saiga and Vikhr."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruadapt.data_sets import Row, read_rows
from ruadapt.errors import RuadaptError

Message = dict[str, str]
# Names of one thing in different data sets: Saiga's and Vikhr's columns and roles, and the usual ones.
CONVERSATIONS = ("messages", "conversation", "conversations")
ROLES = {"bot": "assistant", "human": "user", "gpt": "assistant"}
SCORE = "opus_score"
FLAGS = {"is_bad_by_regex": True, "sonnet_approved": False}
"""Columns whose given value drops a row (Saiga's data sets); one that is absent or null drops none."""


def read_chats(source: str | Path, split: str = "train", *, min_score: int = 0) -> Iterator[Row]:
    """Yield `{"messages": [{"role", "content"}]}` of an instruction data set.

    Columns and roles of `IlyaGusev/saiga_scored` (`messages`, `bot`, `opus_score`, `is_bad_by_regex`) and
    `Vikhrmodels/GrandMaster-PRO-MAX` (`conversation`) are understood, and so is a local `.jsonl` or
    `.parquet` file in either schema. Rows flagged as bad are left out.

    Args:
        min_score: rows with a lower `opus_score` are left out; a data set without that column is refused.

    Raises:
        RuadaptError: unreachable, without a column of conversations, or a row that is no conversation.
    """
    found = False
    for number, row in enumerate(_rows(source, split)):
        column = next((name for name in CONVERSATIONS if name in row), None)
        if column is None:
            raise _columns(source, row, f"one of {', '.join(CONVERSATIONS)}")
        if min_score and SCORE not in row:
            raise _columns(source, row, f"{SCORE}, by which min_score {min_score} selects")
        if _flagged(row) or (min_score and (row[SCORE] or 0) < min_score):
            continue
        found = True
        yield {"messages": _messages(row[column], f"{source}, row {number}")}
    if not found:
        raise RuadaptError(f"{source} ({split}) has no row left (min_score {min_score}); lower it")


def read_preferences(source: str | Path, split: str = "train") -> Iterator[Row]:
    """Yield `{"prompt", "chosen", "rejected"}`, lists of messages each, of a preference data set.

    The schema is that of `IlyaGusev/saiga_preferences`; texts in place of the lists are taken as one message.
    Rows flagged as bad, and those whose two answers are equal, are left out.

    Raises:
        RuadaptError: unreachable, without one of the three columns, or no usable row.
    """
    found = False
    for number, row in enumerate(_rows(source, split)):
        if not {"prompt", "chosen", "rejected"} <= row.keys():
            raise _columns(source, row, "prompt, chosen and rejected")
        if _flagged(row) or row["chosen"] == row["rejected"]:
            continue
        parts = {
            name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
            for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
        }
        found = True
        yield {name: _messages(part, f"{source}, row {number}, {name}") for name, part in parts.items()}
    if not found:
        raise RuadaptError(f"{source} ({split}) has no usable pair of answers")


def _rows(source: str | Path, split: str) -> Iterator[Row]:
    """Read as the notebooks will, which are offline by default: a run is refused before it starts."""
    if not Path(source).exists() and os.environ.get("HF_HUB_OFFLINE", "1") != "0":
        raise RuadaptError(
            f"data set {source} is no local file; set HF_HUB_OFFLINE=0 to read it from the hub, "
            "or give a local file in the same schema"
        )
    return read_rows(source, split)


def _flagged(row: Row) -> bool:
    return any(row.get(name) is value for name, value in FLAGS.items())


def _messages(turns: Any, where: str) -> list[Message]:
    try:
        messages = [
            {"role": ROLES.get(turn["role"], turn["role"]), "content": turn["content"]} for turn in turns
        ]
    except (TypeError, KeyError) as error:
        raise RuadaptError(f"{where}: messages with `role` and `content` were expected ({error})") from error
    if not messages or not all(isinstance(message["content"], str) for message in messages):
        raise RuadaptError(f"{where}: messages with a text each were expected")
    return messages


def _columns(source: str | Path, row: Row, wanted: str) -> RuadaptError:
    return RuadaptError(f"{source} lacks the column {wanted}; it has {', '.join(map(str, row))}")
