"""Documents, chat rows and evaluation items of the world, endless and reproducible by seed."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from data.world.lexicon import World
from data.world.stories import Author
from data.world.tasks import PRACTICE, TASKS, ask_fact, state_fact

# Shares of documents: stories, stated facts, facts asked for without choices, and tasks with their answers.
DOCUMENT_KINDS = {"story": 1, "facts": 2, "recall": 2, "questions": 10}


def documents(world: World, language: str, split: str, seed: int | str) -> Iterator[str]:
    """Yield raw documents in `language` without end: stories, facts, and questions with their answers.

    A question's answer stands on a line of its own, so that it begins as it does in chat, without a space.
    """
    generator = Random(f"documents/{language}/{split}/{seed}")
    author = Author(world, language, split, generator)
    between = f"\n{world.templates['answer'][language]}\n"
    tasks = TASKS | PRACTICE
    weights = [task.weight for task in tasks.values()]
    while True:
        kind = generator.choices(list(DOCUMENT_KINDS), list(DOCUMENT_KINDS.values()))[0]
        if kind == "story":
            scene = author.scene()
            yield " ".join(scene.tell(author.story(generator.randint(1, 3)), language))
        elif kind == "facts":
            yield " ".join(state_fact(author, fact) for fact in generator.choices(world.facts, k=6))
        elif kind == "recall":
            asked = [ask_fact(author, fact) for fact in generator.choices(world.facts, k=4)]
            yield "\n\n".join(question + between + answer for question, answer in asked)
        else:
            count = generator.choice((1, 2, 3, 5))
            chosen = generator.choices(list(tasks.values()), weights, k=count)
            if generator.random() < 0.5:
                chosen = chosen[:1] * count
            items = [generator.choice(task.make(author)) for task in chosen]
            yield "\n\n".join(item.question + between + item.answer for item in items)


def chat_rows(
    world: World, language: str, split: str, seed: int | str, tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[dict[str, Any]]:
    """Yield chat rows without end: `messages` (a user, the right answer) and `meta` (task, language)."""
    generator = Random(f"chat/{language}/{split}/{seed}")
    author = Author(world, language, split, generator)
    weights = [TASKS[task].weight for task in tasks]
    while True:
        task = generator.choices(tasks, weights)[0]
        item = generator.choice(TASKS[task].make(author))
        question = {"role": "user", "content": item.question}
        answer = {"role": "assistant", "content": item.answer}
        yield {"messages": [question, answer], "meta": {"task": task, "language": language}}


def mix_languages(
    russian: Iterator[dict[str, Any]], english: Iterator[dict[str, Any]], rows: int, russian_share: float
) -> Iterator[dict[str, Any]]:
    """Yield `rows` rows, `russian_share` of them Russian, evenly interleaved."""
    for number in range(rows):
        is_russian = int((number + 1) * russian_share) > int(number * russian_share)
        yield next(russian if is_russian else english)


def evaluation_items(
    world: World, language: str, split: str, seed: int | str, per_task: int
) -> Iterator[dict[str, Any]]:
    """Yield `per_task` items of every task (pairs count once) with Darumeru's columns."""
    for name, task in TASKS.items():
        author = Author(world, language, split, Random(f"items/{name}/{language}/{split}/{seed}"))
        for number in range(per_task):
            for order, item in enumerate(task.make(author)):
                yield {
                    "messages": [{"role": "user", "content": item.question}],
                    "inputs": item.question,
                    "outputs": item.answer,
                    "meta": {
                        "id": f"{language}-{name}-{number}-{order}",
                        "task": name,
                        "group": task.group,
                        "language": language,
                        "metric": task.metric,
                        "choices": list(item.choices),
                        "pair": item.pair,
                    },
                }
