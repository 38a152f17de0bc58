"""A generated bilingual world: parallel facts, stories and tasks in English and Russian."""

from data.world.lexicon import FOLDER, World
from data.world.tasks import TASKS
from data.world.texts import chat_rows, documents, evaluation_items, mix_languages

__all__ = ["FOLDER", "TASKS", "World", "chat_rows", "documents", "evaluation_items", "mix_languages"]
