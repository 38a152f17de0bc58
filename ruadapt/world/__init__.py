"""A generated bilingual world: parallel facts, stories and tasks in English and Russian."""

from ruadapt.world.corpus import chat_rows, documents, evaluation_items
from ruadapt.world.lexicon import World, load_world
from ruadapt.world.tasks import TASKS, Item, make_item

__all__ = ["TASKS", "Item", "World", "chat_rows", "documents", "evaluation_items", "load_world", "make_item"]
