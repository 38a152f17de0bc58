"""Documents, chat rows and evaluation items of the world, endless and reproducible by seed."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ruadapt.world.lexicon import World
from ruadapt.world.stories import draw_scene, draw_story, tell
from ruadapt.world.tasks import TASKS, fact_text, make_item, recall

# Shares of documents: stories, stated facts, facts asked for without choices, and tasks with their answers.
DOCUMENT_KINDS = {"story": 1, "facts": 2, "recall": 2, "questions": 10}
TASK_WEIGHTS = {
    "nature": 3, "society": 3, "people": 3, "reading": 3, "comparison": 3, "yes_no": 5, "kinship": 2,
    "extractive": 1, "abstractive": 1, "copy_sentence": 1, "copy_paragraph": 1,
}  # fmt: skip
PRACTICE_WEIGHTS = {"verdict": 4}


def documents(world: World, language: str, split: str, seed: int | str) -> Iterator[str]:
    """Yield raw documents in `language` without end: stories, facts, and questions with their answers.

    A question's answer stands on a line of its own, so that it begins as it does in chat, without a space.
    """
    generator = random.Random(f"documents/{language}/{split}/{seed}")
    kinds, weights = list(DOCUMENT_KINDS), list(DOCUMENT_KINDS.values())
    answer_line = world.templates["answer"][language]
    task_weights = TASK_WEIGHTS | PRACTICE_WEIGHTS
    while True:
        kind = generator.choices(kinds, weights)[0]
        if kind == "story":
            scene = draw_scene(world, split, generator)
            yield " ".join(tell(scene, draw_story(scene, generator, generator.randint(1, 3)), language))
        elif kind == "facts":
            yield " ".join(fact_text(world, fact, language) for fact in generator.choices(world.facts, k=6))
        elif kind == "recall":
            facts = generator.choices(world.facts, k=4)
            recalled = [recall(world, fact, language, split, generator) for fact in facts]
            yield "\n\n".join(f"{question}\n{answer_line}\n{answer}" for question, answer in recalled)
        else:
            count = generator.choice((1, 2, 3, 5))
            chosen = generator.choices(list(task_weights), list(task_weights.values()), k=count)
            if generator.random() < 0.5:
                chosen = chosen[:1] * count
            blocks = []
            for task in chosen:
                item = generator.choice(make_item(world, task, language, split, generator))
                blocks.append(f"{item.question}\n{answer_line}\n{item.answer}")
            yield "\n\n".join(blocks)


def chat_rows(
    world: World, language: str, split: str, seed: int | str, tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[dict[str, Any]]:
    """Yield chat rows without end: `messages` (a user, the right answer) and `meta` (task, language)."""
    generator = random.Random(f"chat/{language}/{split}/{seed}")
    weights = [TASK_WEIGHTS[task] for task in tasks]
    while True:
        task = generator.choices(tasks, weights)[0]
        item = generator.choice(make_item(world, task, language, split, generator))
        yield {
            "messages": [
                {"role": "user", "content": item.question},
                {"role": "assistant", "content": item.answer},
            ],
            "meta": {"task": task, "language": language},
        }


def evaluation_items(
    world: World, language: str, split: str, seed: int | str, per_task: int
) -> Iterator[dict[str, Any]]:
    """Yield `per_task` items of every task (pairs count once) with Darumeru's columns."""
    for task in TASKS:
        generator = random.Random(f"items/{task}/{language}/{split}/{seed}")
        for number in range(per_task):
            for order, item in enumerate(make_item(world, task, language, split, generator)):
                yield {
                    "messages": [{"role": "user", "content": item.question}],
                    "inputs": item.question,
                    "outputs": item.answer,
                    "meta": {
                        "id": f"{language}-{task}-{number}-{order}",
                        "task": task,
                        "group": item.group,
                        "language": language,
                        "metric": item.metric,
                        "choices": list(item.choices),
                        "pair": item.pair,
                    },
                }
