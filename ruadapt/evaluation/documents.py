"""The data of tasks as documents of lm-evaluation-harness (`custom_dataset` of the YAML files).

A document holds `prompt` (the user's message of a chat), `raw` (the same with its answer mark, for base
models), `answer` and all right `answers`, `choices`, and `unit`: what counts once (a question, both orders of
one, a whole exam). Of Darumeru (METHOD, sec. 7) only the columns are stated; what is assumed of each part
stands in `_darumeru` and, its choices, in the part's YAML file.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import datasets

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.scoring import ifeval
from ruadapt.files import project_root, read_jsonl

Row = dict[str, Any]

HUB_NAME = "RefalMachine/darumeru"
SUMMARIES = "dichspace/daru_treeway_eval"
TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""What `lm_eval --include_path` is given."""

EMBEDDED = "data/world/corpus"
"""Folder of the world's items, from the repository's root."""

ANSWER_MARKS = {"en": "Answer:", "ru": "Ответ:"}
# ruTiE is one long conversation: so many characters of it stand in front of each question.
_DIALOGUE_CHARACTERS = 4000


def load(subset: str, data: str = "", choices: Sequence[str] = (), **options: Any) -> datasets.DatasetDict:
    """Return the documents of one task: splits `test` and `prompt` (examples for few-shot prompts).

    Called by the harness with the task's `dataset_kwargs` and its metadata, to which `lm_eval` adds
    `--model_args` and `--metadata`.

    Args:
        subset: a part of Darumeru, `sum`, `world:TASK:LANGUAGE`, `pairs:NAME` or `ifeval:LANGUAGE`.
        data: a local copy: `DATA/SUBSET/{test,prompt}.jsonl` or the same below `DATA/data` (as in a clone of
            the hub's repository); for the world `DATA/tasks.jsonl` and `DATA/fewshot.jsonl`, where they are
            missing the embedded items; for pairs (`good`, `bad`, `paradigm`) `DATA/NAME.jsonl.gz`, for
            IFEval's columns `DATA/ifeval_LANGUAGE.jsonl.gz`. Without it the hub is asked for Darumeru.
        choices: the answers of a part of Darumeru, if it has a few.
        options: `tokenizer` or `pretrained` names the tokenizer that counts the length of a copied sentence.

    Raises:
        RuadaptError: no data (the message names the ways out), or rows of another form.
    """
    tokenizer = str(options.get("tokenizer") or options.get("pretrained") or "")
    makers = {"world": _world, "sum": _summaries, "pairs": _pairs, "ifeval": _instructions}
    make, splits = makers.get(subset.partition(":")[0], _darumeru), {}
    for split in ("test", "prompt"):
        rows = _rows(subset, split, data)
        try:
            found = list(make(rows, subset, split, choices))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise RuadaptError(
                f"{subset}, {split}: a row lacks {error}; its columns: {', '.join(rows[0])}"
            ) from error
        if not found:
            raise RuadaptError(f"{subset}: the split {split!r} has no rows{' in ' + data if data else ''}")
        splits[split] = datasets.Dataset.from_list([row | {"tokenizer": tokenizer} for row in found])
    return datasets.DatasetDict(splits)


def _document(
    name: str, prompt: str, raw: str, answers: Sequence[str], choices: Sequence[str], unit: str = ""
) -> Row:
    if not prompt.strip() or not answers or not all(answer.strip() for answer in answers):
        raise RuadaptError(f"item {name}: the question or the answer is empty")
    if choices and answers[0] not in choices:
        raise RuadaptError(f"item {name}: expected one of {', '.join(choices)}, found {answers[0]!r}")
    texts = {"id": name, "prompt": prompt, "raw": raw, "answer": answers[0], "answers": list(answers)}
    return texts | {"choices": list(choices), "unit": unit or name}


@cache
def _world_items(split: str, data: str) -> list[Row]:
    name = "tasks.jsonl" if split == "test" else "fewshot.jsonl"
    own, embedded = Path(data) / name, project_root() / EMBEDDED / f"{name}.gz"
    return list(read_jsonl(own if data and own.exists() else embedded))


def _world(rows: Sequence[Row], subset: str, split: str, choices: Sequence[str]) -> Iterator[Row]:
    _, task, language = subset.split(":")
    for row in rows:
        meta, prompt = row["meta"], row["messages"][-1]["content"]
        if (meta["task"], meta["language"]) == (task, language):
            raw = f"{prompt}\n{ANSWER_MARKS[language]}\n"
            yield _document(meta["id"], prompt, raw, [row["outputs"]], meta["choices"], meta["pair"])


def _pairs(rows: Sequence[Row], subset: str, split: str, choices: Sequence[str]) -> Iterator[Row]:
    """Yield minimal pairs, one of each paradigm in turn: the first few of a task are of all paradigms."""
    paradigms: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        name = f"{row['paradigm']}-{len(paradigms[row['paradigm']])}"
        document = {"id": name, "unit": name, "prompt": "", "raw": "", "answer": row["good"]}
        paradigms[row["paradigm"]].append(document | {"choices": [row["good"], row["bad"]]})
    return filter(None, chain.from_iterable(zip_longest(*paradigms.values())))


def _instructions(rows: Sequence[Row], subset: str, split: str, choices: Sequence[str]) -> Iterator[Row]:
    """Yield the prompts of IFEval whose checkers work here: some want data that nltk downloads."""
    for row in rows:
        try:
            ifeval(row, ["One answer. And another."])
        except LookupError:  # of nltk, and of an instruction that is not known
            continue
        name = str(row["key"])
        yield dict(row) | {"id": name, "unit": name, "raw": "", "answer": "", "choices": []}


def _summaries(rows: Sequence[Row], subset: str, split: str, choices: Sequence[str]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        text, summary = (" ".join(row[name]) for name in ("src_sents", "summary_sents"))
        prompt = f"Напиши краткую аннотацию этого текста на русском языке, без пояснений.\n\n{text}"
        yield _document(str(number), prompt, f"{prompt}\n\nАннотация:", [summary], ())


def _darumeru(rows: Sequence[Row], subset: str, split: str, choices: Sequence[str]) -> Iterator[Row]:
    turns: list[str] = []  # of ruTiE
    if subset == "rutie":
        rows = sorted(rows, key=lambda row: int(row["meta"]["question_id"]))
    for number, row in enumerate(rows):
        inputs, output, meta = row["inputs"], row["outputs"], row["meta"]
        roles = [message["role"] for message in row["messages"]]
        if roles != ["user"] and (split, roles) != ("prompt", ["user", "assistant"]):
            raise RuadaptError(f"{subset}, {split}, row {number}: expected one user message, found {roles}")
        if subset == "multiq":
            answers = [str(answer["segment"]) for answer in output]
        elif subset.startswith("cp_"):
            answers = [str(inputs["text"])]
        else:  # RWSD's answers may go on behind the choice
            said = str(output).strip()
            answers = [choice for choice in choices if said.startswith(choice)] or [said]
        orders = [(inputs, answers)]
        if subset in ("parus", "rutie"):
            one = inputs | {"context": "\n".join(turns)[-_DIALOGUE_CHARACTERS:]}
            turned = one | {"choice1": inputs["choice2"], "choice2": inputs["choice1"]}
            orders = [(one, answers), (turned, [choice for choice in choices if choice not in answers])]
        for order, (shown, right) in enumerate(orders if split == "test" else orders[:1]):
            prompt = _filled(row["messages"][0]["content"], shown)
            raw = prompt.rstrip()
            if not raw.endswith(":"):
                raw += "\n" + ANSWER_MARKS["en" if subset.endswith("_en") else "ru"]
            name = f"{number}-{order}" if len(orders) > 1 else str(number)
            unit = str(meta["variant"]) if subset == "use" else str(number)
            exam = {"kind": meta["type"], "number": str(meta["id_task"])} if subset == "use" else {}
            yield _document(name, prompt, raw, right, choices, unit) | exam
        if subset == "rutie":
            question = "{question}\n1. {choice1}\n2. {choice2}".format(**inputs)
            turns.append(f"{question}\n{ANSWER_MARKS['ru']} {output}")


def _filled(template: str, inputs: Any) -> str:
    """Fill `{name}` with the inputs; other braces belong to the text."""
    values = inputs if isinstance(inputs, Mapping) else {}
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)


def _rows(subset: str, split: str, data: str) -> list[Row]:
    kind, _, name = subset.partition(":")
    if kind == "world":
        return _world_items(split, data)
    if kind in ("pairs", "ifeval"):  # which have no examples
        return list(read_jsonl(Path(data) / f"{name if kind == 'pairs' else f'ifeval_{name}'}.jsonl.gz"))
    ways = (
        "set HF_HUB_OFFLINE=0 to ask the hub, or give a local copy with "
        f"{subset}/test.jsonl and {subset}/prompt.jsonl: "
        """`ruadapt evaluate --data DIR` or `lm_eval --metadata '{"data": "DIR"}'`"""
    )
    if data:
        for folder in (Path(data) / subset, Path(data) / "data" / subset):
            if (folder / f"{split}.jsonl").exists():
                return list(read_jsonl(folder / f"{split}.jsonl"))
        raise RuadaptError(f"{data} has no {subset}/{split}.jsonl; {ways}")
    place = (SUMMARIES,) if subset == "sum" else (HUB_NAME, subset)
    try:
        return list(datasets.load_dataset(*place, split=split))
    except Exception as error:  # the library raises many kinds for "cannot be reached"
        raise RuadaptError(f"the data set of {subset} cannot be loaded: {error}; {ways}") from error
