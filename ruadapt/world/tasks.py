"""Tasks over the world: one generator a task, the same for pre-training text, chat data and evaluation."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ruadapt.world.lexicon import Entity, Fact, World, capitalise, split_of
from ruadapt.world.stories import draw_person, draw_scene, draw_story, tell

CHOICES = 4
SUBJECTS = {
    "nature": ("habitat", "food", "kind", "material", "colour"),
    "society": ("works", "tool", "river", "product", "opposite", "next_day"),
    "people": ("lives", "job", "pet"),
}
# (relation of A to B, of B to C) → relation of A to C; in each pair the form for women, then the one for men.
PARENT, SIBLING, CHILD = ("mother", "father"), ("sister", "brother"), ("daughter", "son")
KINSHIP_RULES = {
    (PARENT, PARENT): ("grandmother", "grandfather"),
    (SIBLING, PARENT): ("aunt", "uncle"),
    (CHILD, CHILD): ("granddaughter", "grandson"),
    (CHILD, SIBLING): ("niece", "nephew"),
    (PARENT, SIBLING): PARENT,
    (SIBLING, SIBLING): SIBLING,
}


@dataclass(frozen=True)
class Item:
    """One task item: what the user says, the right answer, and how it is scored."""

    task: str
    group: str
    metric: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    pair: str = ""


def fact_text(world: World, fact: Fact, language: str) -> str:
    """State a fact in `language`."""
    template = world.templates["facts"][fact.relation][language]
    return capitalise(template.format(a=fact.subject.forms(language), b=fact.object.forms(language)))


def _option(world: World, fact: Fact, language: str) -> str:
    template = world.templates["options"].get(fact.relation, {}).get(language, "{b}")
    return str(template.format(b=fact.object.forms(language)))


def recall(world: World, fact: Fact, language: str, split: str, generator: random.Random) -> tuple[str, str]:
    """Ask for a fact without choices: the question in a wording of `split`, and the answer."""
    question = world.wording(f"questions/{fact.relation}", language, split, generator)
    return capitalise(question.format(a=fact.subject.forms(language))), _option(world, fact, language)


def _knowledge(world: World, subject: str, language: str, split: str, generator: random.Random) -> list[Item]:
    relation = generator.choice(SUBJECTS[subject])
    facts = [fact for fact in world.facts if fact.relation == relation]
    while True:
        fact = generator.choice(facts)
        right = _option(world, fact, language)
        others = sorted(
            {_option(world, other, language) for other in facts if _fits(fact, other, facts)} - {right}
        )
        options = [right, *generator.sample(others, CHOICES - 1)]
        if split_of("|".join([fact.subject.key, *sorted(options)])) == split:
            break
    generator.shuffle(options)
    question, _ = recall(world, fact, language, split, generator)
    instruction = world.wording("choose", language, split, generator)
    text = "\n".join([question, instruction, *(f"- {option}" for option in options)])
    return [Item(subject, "knowledge", "choice", text, right, tuple(options))]


def _fits(fact: Fact, other: Fact, facts: list[Fact]) -> bool:
    """A wrong answer must be of the same sort: days with days, months with months."""
    if fact.relation != "next_day":
        return True
    return abs(facts.index(fact) - facts.index(other)) < 7


def _passage(
    world: World, language: str, split: str, generator: random.Random, people: int
) -> tuple[list[str], list[tuple]]:
    scenes: list[tuple] = []
    sentences: list[str] = []
    for _ in range(people):
        scene = draw_scene(world, split, generator, scenes[0][0].who if scenes else None)
        kinds = draw_story(scene, generator, 0 if people > 1 else generator.randint(1, 2))
        scenes.append((scene, kinds))
        sentences += tell(scene, kinds, language)
    return sentences, scenes


def _reading(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    sentences, scenes = _passage(world, language, split, generator, generator.randint(1, 2))
    scene, kinds = generator.choice(scenes)
    aspect = generator.choice([kind for kind in ("went", "did", "ate", "met") if kind in kinds])
    name = {"went": "where", "did": "what"}.get(aspect, aspect)
    answers = {
        "en": {"where": "{place[to]}", "what": "{thing[a]}", "ate": "{dish}", "met": "{other[full]}"},
        "ru": {
            "where": "{place[to]}",
            "what": "{thing[accs]}",
            "ate": "{dish[accs]}",
            "met": "{other[full_accs]}",
        },
    }
    question = scene.fill(world.wording(f"reading/{name}", language, split, generator), language)
    answer = answers[language][name].format_map(scene.slots(language))
    return [Item("reading", "reasoning", "f1", f"{' '.join(sentences)}\n{question}", answer)]


def _yes_no(
    world: World, language: str, split: str, generator: random.Random, practice: bool = False
) -> list[Item]:
    scene = draw_scene(world, split, generator)
    truth = generator.random() < 0.5
    aspect = generator.choice(("where", "what"))
    # Practice has one sentence and no choices.
    kinds = ["went" if aspect == "where" else "did"] if practice else draw_story(scene, generator, 1)
    asked = scene.slots(language)
    if not truth:
        # The false statement keeps the person and the deed and takes another place or thing.
        other = draw_scene(world, split, generator)
        while other.place.key == scene.place.key or other.thing.key == scene.thing.key:
            other = draw_scene(world, split, generator)
        asked |= {"place": other.place.forms(language), "thing": other.thing.forms(language)}
    wording = world.wording(f"yes_no/{aspect}", language, split, generator)
    statement = capitalise(wording.format_map(asked))
    yes, no = (world.templates["verdict"][name][language] for name in ("positive", "negative"))
    text = f"{' '.join(tell(scene, kinds, language))}\n{statement}"
    answer = yes if truth else no
    if practice:
        return [Item("verdict", "reasoning", "f1", text, answer)]
    pair = f"{generator.getrandbits(48):012x}"
    items = []
    for first, second in ((yes, no), (no, yes)):
        either = capitalise(world.templates["verdict"]["either"][language].format(first=first, second=second))
        items.append(
            Item("yes_no", "reasoning", "both_orders", f"{text}\n{either}", answer, (first, second), pair)
        )
    return items


def _comparison(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    people = _three_people(world, split, generator)
    scale = generator.choice(list(world.templates["comparison"]))
    template = world.templates["comparison"][scale]["statement"][language]
    lines = [template.format(a=a.forms(language), b=b.forms(language)) for a, b in pairwise(people)]
    end = generator.choice(("most", "least"))
    question = world.wording(f"comparison/{scale}/{end}", language, split, generator)
    names = [person.forms(language)["first"] for person in people]
    answer = names[0] if end == "most" else names[-1]
    choices = tuple(sorted(names))
    return [Item("comparison", "reasoning", "choice", f"{' '.join(lines)}\n{question}", answer, choices)]


def _three_people(world: World, split: str, generator: random.Random) -> list[Entity]:
    """Draw people with different first names; which three stand together belongs to `split`."""
    while True:
        people = [draw_person(world, "train", generator) for _ in range(3)]
        names = [person.en["first"] for person in people]
        if len(set(names)) == 3 and split_of("|".join(names)) == split:
            return people


def _kinship(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    (first, second), result = generator.choice(list(KINSHIP_RULES.items()))
    a, b, c = _three_people(world, split, generator)
    statement = world.templates["kinship"]["statement"][language]

    def state(person: Entity, relation: tuple[str, str], of: Entity) -> str:
        word = world.kinship[relation[0 if person.ru.gender else 1]].forms(language)
        return str(statement.format(a=person.forms(language), relation=word, b=of.forms(language)))

    question = world.wording("kinship/question", language, split, generator)
    question = question.format(a=a.forms(language), b=c.forms(language))
    gender = 0 if a.ru.gender else 1
    results = list(dict.fromkeys(pair[gender] for pair in KINSHIP_RULES.values()))
    choices = tuple(str(world.kinship[word].forms(language)) for word in results)
    answer = str(world.kinship[result[gender]].forms(language))
    text = f"{state(a, first, b)} {state(b, second, c)}\n{question}"
    return [Item("kinship", "reasoning", "choice", text, answer, choices)]


def _extractive(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    sentences, scenes = _passage(world, language, split, generator, 1)
    kinds = scenes[0][1]
    instruction = world.wording("extractive", language, split, generator)
    answer = sentences[kinds.index("did")]
    return [Item("extractive", "summary", "rouge", f"{instruction}\n{' '.join(sentences)}", answer)]


def _abstractive(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    sentences, scenes = _passage(world, language, split, generator, 1)
    instruction = world.wording("abstractive/instruction", language, split, generator)
    answer = scenes[0][0].fill(world.templates["abstractive"]["summary"][language], language)
    return [Item("abstractive", "summary", "rouge", f"{instruction}\n{' '.join(sentences)}", answer)]


def _copy_text(world: World, language: str, split: str, generator: random.Random, sentences: int) -> str:
    scene = draw_scene(world, split, generator)
    kinds = draw_story(scene, generator, 2)
    told = tell(scene, kinds, language)
    start = generator.randrange(len(told) - sentences + 1)
    return " ".join(told[start : start + sentences])


def _word_list(world: World, language: str, generator: random.Random) -> str:
    heldout = world.heldout_names[language]
    while True:
        words = generator.choices(world.word_list[language], k=generator.randint(2, 7))
        # A first name before a surname must not make a person of another split.
        if heldout.isdisjoint(pairwise(words)):
            return " ".join(words)


def _copy_sentence(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    text = _copy_text(world, language, split, generator, 1)
    if split == "train" and generator.random() < 0.5:
        # Lists of words teach copying as such, whatever the words are.
        text = _word_list(world, language, generator)
    instruction = world.wording("copy", language, split, generator)
    return [Item("copy_sentence", "copy", "copy_sentence", f"{instruction}\n{text}", text)]


def _copy_paragraph(world: World, language: str, split: str, generator: random.Random) -> list[Item]:
    text = _copy_text(world, language, split, generator, generator.randint(2, 4))
    instruction = world.wording("copy", language, split, generator)
    return [Item("copy_paragraph", "copy", "copy_paragraph", f"{instruction}\n{text}", text)]


def _subject(name: str) -> Callable[[World, str, str, random.Random], list[Item]]:
    return lambda world, language, split, generator: _knowledge(world, name, language, split, generator)


TASKS: dict[str, Callable[[World, str, str, random.Random], list[Item]]] = {
    "nature": _subject("nature"),
    "society": _subject("society"),
    "people": _subject("people"),
    "reading": _reading,
    "comparison": _comparison,
    "yes_no": _yes_no,
    "kinship": _kinship,
    "extractive": _extractive,
    "abstractive": _abstractive,
    "copy_sentence": _copy_sentence,
    "copy_paragraph": _copy_paragraph,
}


# Steps towards the tasks, for training text only: they are not evaluated.
PRACTICE: dict[str, Callable[[World, str, str, random.Random], list[Item]]] = {
    "verdict": lambda world, language, split, generator: _yes_no(world, language, split, generator, True),
}


def make_item(world: World, task: str, language: str, split: str, generator: random.Random) -> list[Item]:
    """Make one item of `task` in `split`; two where both orders of the choices count."""
    return (TASKS | PRACTICE)[task](world, language, split, generator)
