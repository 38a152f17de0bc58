"""A generated bilingual world: parallel facts, stories and tasks in English and Russian."""

from ruadapt.world.corpus import chat_rows, documents, evaluation_items
from ruadapt.world.lexicon import World
from ruadapt.world.tasks import TASKS

__all__ = ["TASKS", "World", "chat_rows", "documents", "evaluation_items"]
