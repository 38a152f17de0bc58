"""Darumeru and the world's tasks as lm-evaluation-harness reads them: data to documents, answers to scores.

The YAML files in `lm_eval_tasks` name the functions of this module (`!function`), so that plain `lm_eval
--include_path` and this package ask and score the same. A document holds `prompt` (the user's message of a
chat), `raw` (the same with its answer mark, for base models), `answer` and all right `answers`, `choices`,
`metric`, and `unit`: what counts once (a question, both orders of one, a whole exam).

Of Darumeru (METHOD, sec. 7) only the columns are stated; what is assumed of each part stands in `_SUBSETS`.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
from datasets.table import InMemoryTable
from transformers import AutoTokenizer

from ruadapt.errors import RuadaptError
from ruadapt.evaluation import scoring
from ruadapt.files import project_root, read_jsonl
from ruadapt.world import evaluation_items, load_world

Row = dict[str, Any]
Count = Callable[[str], int]

HUB_NAME = "RefalMachine/darumeru"
SUMMARIES = "dichspace/daru_treeway_eval"
DATA_VARIABLE = "RUADAPT_EVALUATION_DATA"
TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""What `lm_eval --include_path` is given."""

CHOSEN = ("choice", "both_orders")
ANSWER_MARKS = {"en": "Answer:", "ru": "Ответ:"}
COLUMNS = ("messages", "inputs", "outputs", "meta")
_LETTERS, _DIGITS = ("A", "B", "C", "D"), ("1", "2", "3")
# subset → (metric, choices, inputs that must be there, entries of `meta` that must be there)
_SUBSETS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "rummlu": ("choice", _LETTERS, (), ()),
    "multiq": ("f1", (), (), ()),
    "parus": ("both_orders", _DIGITS[:2], ("choice1", "choice2"), ()),
    "rcb": ("choice", _DIGITS, (), ()),
    "ruopenbookqa": ("choice", _LETTERS, (), ()),
    "rutie": ("both_orders", _DIGITS[:2], ("question", "choice1", "choice2"), ("question_id",)),
    "ruworldtree": ("choice", _LETTERS, (), ()),
    "rwsd": ("choice", ("Да", "Нет"), (), ()),
    "use": ("exam", (), (), ("id_task", "type", "variant")),
    **{
        f"cp_{size}_{language}": (metric, (), ("text",), ())
        for size, metric in (("sent", "copy_sentence"), ("para", "copy_paragraph"), ("doc", "copy_paragraph"))
        for language in ("ru", "en")
    },
}
# Their choices are classes, so that they have a macro F1 besides.
_CLASSES = ("rcb", "ruopenbookqa", "ruworldtree")
# ruTiE is one long conversation: so many characters of the questions before stand in front of each.
_DIALOGUE_CHARACTERS = 4000


def load(subset: str, data: str = "", **options: Any) -> datasets.DatasetDict:
    """Return the documents of one task: splits `test` and `prompt` (examples for few-shot prompts).

    Called by the harness with the task's `dataset_kwargs` and its metadata, to which `lm_eval` adds
    `--model_args` and `--metadata`.

    Args:
        subset: a part of Darumeru, `sum`, or `world:TASK:LANGUAGE`.
        data: a local copy: `DATA/SUBSET/{test,prompt}.jsonl` or the same below `DATA/data` (as in a clone of
            the hub's repository); for the world a corpus folder with `tasks.jsonl` and `fewshot.jsonl`. The
            variable RUADAPT_EVALUATION_DATA stands in for it. Without both the hub is asked, and the world
            is generated.
        options: `tokenizer` or `pretrained` names the tokenizer that counts the length of a copied sentence.

    Raises:
        RuadaptError: no data (the message names the ways out), or rows of another form.
    """
    tokenizer = str(options.get("tokenizer") or options.get("pretrained") or "")
    data = data or os.environ.get(DATA_VARIABLE, "")
    splits = {}
    for split in ("test", "prompt"):
        if subset.startswith("world:"):
            _, task, language = subset.split(":")
            items = [item for item in _world_items(split, language, data) if item["meta"]["task"] == task]
            found = [document(item) for item in items]
        elif subset == "sum":
            rows = _rows(SUMMARIES, subset, split, data)
            found = [_summary(row, split, str(number)) for number, row in enumerate(rows)]
        else:
            found = list(_darumeru(_rows(HUB_NAME, subset, split, data), subset, split))
        if not found:
            raise RuadaptError(f"{subset}: the split {split!r} has no rows{' in ' + data if data else ''}")
        table = InMemoryTable.from_pylist([row | {"tokenizer": tokenizer} for row in found])
        # With a fingerprint of our own: the library's takes as long as a small task's answers.
        splits[split] = datasets.Dataset(table, fingerprint=f"{subset} {split}")
    return datasets.DatasetDict(splits)


def document(item: Row) -> Row:
    """Return the document of an item of the world (`ruadapt.world`).

    Raises:
        RuadaptError: a field is missing, the question or the answer empty, or the answer none of the choices.
    """
    try:
        meta, question, answer = item["meta"], str(item["messages"][-1]["content"]), item["outputs"]
        found = _document(
            str(meta["id"]),
            question,
            f"{question}\n{ANSWER_MARKS[meta['language']]}\n",
            [answer],
            meta["metric"],
            meta["choices"],
            unit=meta["pair"],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise RuadaptError(
            f"an evaluation item lacks the field {error}; its columns: {', '.join(item)}"
        ) from error
    if not question.strip() or not answer.strip():
        raise RuadaptError(f"item {found['id']}: the question or the reference answer is empty")
    if found["metric"] in CHOSEN and (len(found["choices"]) < 2 or answer not in found["choices"]):
        raise RuadaptError(
            f"item {found['id']}: the answer {answer!r} must be one of two or more choices, "
            f"not {found['choices']}"
        )
    return found


def score(entry: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Score one answer (the harness's `process_results`).

    Args:
        entry: a document.
        results: `(log-likelihood, greedy)` of each choice, or the one generated text.

    Returns:
        `score`: a number 0 … 1, or `[unit, number]` where several documents make one unit; besides
        `f1_macro` (the right and the chosen one) of classes and `exact` of f1.

    Raises:
        RuadaptError: a choice has no finite probability.
    """
    metric, answers = entry["metric"], entry["answers"]
    if metric in CHOSEN:
        chosen = chosen_of(entry, results)
        value = float(chosen == answers[0])
        extra = {"f1_macro": [answers[0], chosen]} if entry["kind"] == "classes" else {}
        return {"score": [entry["unit"], value] if metric in scoring.UNITS else value} | extra
    text = str(results[0])
    if metric == "f1":
        best_of = {name: max(rate(text, answer) for answer in answers) for name, rate in _WORD_SCORES.items()}
        return {"score": best_of["f1"], "exact": best_of["exact"]}
    if metric == "rouge":
        return {"score": _rouge()(text, answers[0])}
    if metric == "copy_sentence":
        count = _counter(entry["tokenizer"])
        return {"score": scoring.copy_sentence(count(text), count(answers[0]))}
    if metric == "copy_paragraph":
        return {"score": scoring.copy_paragraph(text, answers[0])}
    return {"score": [entry["unit"], scoring.exam_points(text, answers[0], entry["kind"], entry["number"])]}


def chosen_of(entry: Mapping[str, Any], results: Sequence[Any]) -> str:
    """Return the most probable choice (the first of equals).

    Raises:
        RuadaptError: a choice has no finite probability.
    """
    likelihoods = [float(likelihood) for likelihood, _ in results]
    if not all(map(math.isfinite, likelihoods)):
        raise RuadaptError(
            f"item {entry['id']}: the model gives no finite probability; its weights are broken"
        )
    return str(entry["choices"][max(range(len(likelihoods)), key=likelihoods.__getitem__)])


def mean_of_pairs(scores: Iterable[tuple[str, float]]) -> float:
    """Aggregate both orders: the share of questions that are right in both (the harness's `aggregation`)."""
    return _mean_of_units("both_orders", scores)


def mean_of_exams(scores: Iterable[tuple[str, float]]) -> float:
    """Aggregate graded answers: the mean over exams of their share of all points."""
    return _mean_of_units("exam", scores)


def f1_macro(classes: Iterable[tuple[str, str]]) -> float:
    """Aggregate pairs (right class, chosen class) to the macro F1."""
    right, chosen = zip(*classes, strict=True)
    return scoring.f1_macro(right, chosen)


def _mean_of_units(metric: str, scores: Iterable[tuple[str, float]]) -> float:
    units = defaultdict(list)
    for unit, value in scores:
        units[unit].append(value)
    values = scoring.UNITS[metric](units).values()
    return sum(values) / len(values)


_WORD_SCORES = {"f1": scoring.f1, "exact": scoring.exact}


@cache
def _rouge() -> scoring.Rouge:
    return scoring.Rouge()


@cache
def _counter(name: str) -> Count:
    if not name:
        raise RuadaptError(
            "the length of a copied sentence is counted in the model's own tokens: name its tokenizer, "
            """`--metadata '{"tokenizer": "FOLDER"}'`"""
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _document(
    name: str,
    prompt: str,
    raw: str,
    answers: Sequence[str],
    metric: str,
    choices: Sequence[str] = (),
    unit: str = "",
    kind: str = "",
    number: str = "",
) -> Row:
    return {
        **{"id": name, "prompt": prompt, "raw": raw, "answer": answers[0], "answers": list(answers)},
        **{"metric": metric, "choices": list(choices), "unit": unit or name, "kind": kind, "number": number},
    }


@cache
def _world_items(split: str, language: str, data: str) -> list[Row]:
    file = Path(data) / ("tasks.jsonl" if split == "test" else "fewshot.jsonl")
    if data and file.exists():
        return [item for item in read_jsonl(file) if item["meta"]["language"] == language]
    world = load_world(project_root() / "data" / "world")
    part, count = ("test", 40) if split == "test" else ("dev", 5)
    return list(evaluation_items(world, language, part, 0, count))


def _rows(hub: str, subset: str, split: str, data: str) -> list[Row]:
    for folder in (Path(data) / subset, Path(data) / "data" / subset) if data else ():
        if (folder / f"{split}.jsonl").exists():
            return list(read_jsonl(folder / f"{split}.jsonl"))
    ways = (
        f"give a local copy with {subset}/test.jsonl and {subset}/prompt.jsonl: "
        "`ruadapt evaluate --data DIR`, "
        f"""`lm_eval --metadata '{{"data": "DIR"}}'`, or the variable {DATA_VARIABLE}"""
    )
    if data:
        raise RuadaptError(f"{data} has no {subset}/{split}.jsonl; {ways}")
    try:
        if hub != HUB_NAME:
            return list(datasets.load_dataset(hub, split=split))
        try:
            return list(datasets.load_dataset(hub, subset, split=split))
        except ValueError as error:  # a repository may name no configurations, and have only folders
            if "BuilderConfig" not in str(error):
                raise
            return list(datasets.load_dataset(hub, data_dir=f"data/{subset}", split=split))
    except Exception as error:  # the library raises many kinds for "cannot be reached"
        raise RuadaptError(f"the data set {hub} ({subset}) cannot be loaded: {error}; {ways}") from error


def _darumeru(rows: Sequence[Row], subset: str, split: str) -> Iterator[Row]:
    metric, choices, inputs, entries = _SUBSETS[subset]
    for number, row in enumerate(rows):
        for part, names in ((row, COLUMNS), (row.get("inputs"), inputs), (row.get("meta"), entries)):
            missing = [name for name in names if not isinstance(part, Mapping) or name not in part]
            if missing:
                found = ", ".join(part) if isinstance(part, Mapping) else repr(part)
                where = f"{subset}, {split}, row {number}"
                raise RuadaptError(f"{where}: expected {', '.join(names)}; found {found or 'nothing'}")
    make = partial(_question, subset=subset, split=split, metric=metric, choices=choices)
    if metric != "both_orders":
        yield from (make(row, str(number)) for number, row in enumerate(rows))
        return
    if subset == "rutie":
        rows = sorted(rows, key=lambda row: int(row["meta"]["question_id"]))
    before: list[str] = []
    for number, row in enumerate(rows):
        told = "\n".join(_recent(before))
        for order, turned in enumerate((row, _turned(row))):
            turned = turned | {"inputs": {"context": told} | turned["inputs"] | {"context": told}}
            if split == "test" or not order:
                yield make(turned, f"{number}-{order}", unit=str(number))
        if subset == "rutie":
            question = "{question}\n1. {choice1}\n2. {choice2}".format(**row["inputs"])
            before.append(f"{question}\n{ANSWER_MARKS['ru']} {row['outputs']}")


def _question(
    row: Row, name: str, *, subset: str, split: str, metric: str, choices: Sequence[str], unit: str = ""
) -> Row:
    messages = [message["role"] for message in row["messages"]]
    if messages != ["user"] and not (split == "prompt" and messages == ["user", "assistant"]):
        raise RuadaptError(
            f"{subset}, {split}, row {name}: expected one user message (and its answer in `prompt`), "
            f"found {messages}"
        )
    text = _filled(row["messages"][0]["content"], row["inputs"])
    mark = ANSWER_MARKS["en" if subset.endswith("_en") else "ru"]
    raw = text.rstrip() if text.rstrip().endswith(":") else f"{text.rstrip()}\n{mark}"
    if subset == "multiq":
        answers = [str(answer["segment"]) for answer in row["outputs"]]
    else:
        answers = [str(row["inputs"]["text"] if metric.startswith("copy") else row["outputs"])]
    if choices:  # RWSD's answers may go on behind the choice
        answers = [choice for choice in choices if answers[0].strip().startswith(choice)]
    if not answers or not answers[0].strip():
        expected = f"one of {', '.join(choices)}" if choices else "an answer"
        raise RuadaptError(
            f"{subset}, {split}, row {name}: expected {expected} in outputs, found {row['outputs']!r}"
        )
    meta = row["meta"] if metric == "exam" else {}
    return _document(
        *(name, text, raw, answers, metric, choices),
        unit=unit or str(meta.get("variant", "")),
        kind="classes" if subset in _CLASSES else str(meta.get("type", "")),
        number=str(meta.get("id_task", "")),
    )


def _summary(row: Row, split: str, name: str) -> Row:
    if not {"src_sents", "summary_sents"} <= row.keys():
        raise RuadaptError(f"sum, {split}: expected src_sents, summary_sents; found {', '.join(row)}")
    text, summary = (" ".join(row[name]) for name in ("src_sents", "summary_sents"))
    prompt = f"Напиши краткую аннотацию этого текста на русском языке, без пояснений.\n\n{text}"
    return _document(name, prompt, f"{prompt}\n\nАннотация:", [summary], "rouge")


def _filled(template: str, inputs: Any) -> str:
    """Fill `{name}` with the inputs; other braces belong to the text."""
    values = inputs if isinstance(inputs, Mapping) else {}
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)


def _turned(row: Row) -> Row:
    inputs = row["inputs"]
    swapped = inputs | {"choice1": inputs["choice2"], "choice2": inputs["choice1"]}
    return row | {"inputs": swapped, "outputs": {"1": "2", "2": "1"}.get(str(row["outputs"]), "")}


def _recent(turns: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for turn in reversed(turns):
        if sum(map(len, kept)) + len(turn) > _DIALOGUE_CHARACTERS:
            break
        kept.insert(0, turn)
    return kept
