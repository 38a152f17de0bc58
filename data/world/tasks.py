"""Tasks over the world: one generator a task, the same for pre-training text, chat data and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from data.world.lexicon import Entity, Fact, capitalise
from data.world.splits import split_of
from data.world.stories import Author, Scene

CHOICES = 4
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
# What a question about a story asks for, by the kind of the sentence that answers it: name of the question,
# and the answer in English and Russian.
ASKED = {
    "went": ("where", {"en": "{place[to]}", "ru": "{place[to]}"}),
    "did": ("what", {"en": "{thing[a]}", "ru": "{thing[accs]}"}),
    "ate": ("ate", {"en": "{dish}", "ru": "{dish[accs]}"}),
    "met": ("met", {"en": "{other[full]}", "ru": "{other[full_accs]}"}),
}


@dataclass(frozen=True)
class Item:
    """What the user says, the right answer, and the choices; both orders of a pair share its name."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    pair: str = ""


@dataclass(frozen=True)
class Task:
    """A generator of items, how they are scored, and the weight of the task in training text and chats."""

    group: str
    metric: str
    weight: int
    make: Callable[[Author], list[Item]]


def state_fact(author: Author, fact: Fact) -> str:
    """State a fact."""
    language = author.language
    template = author.world.templates["facts"][fact.relation][language]
    return capitalise(template.format(a=fact.subject.forms(language), b=fact.object.forms(language)))


def ask_fact(author: Author, fact: Fact) -> tuple[str, str]:
    """Ask for a fact without choices: the question and its answer."""
    question = author.wording(f"questions/{fact.relation}")
    return capitalise(question.format(a=fact.subject.forms(author.language))), _answer(author, fact)


def _answer(author: Author, fact: Fact) -> str:
    template = author.world.templates["options"].get(fact.relation, {}).get(author.language, "{b}")
    return str(template.format(b=fact.object.forms(author.language)))


def _knowledge(relations: tuple[str, ...], author: Author) -> list[Item]:
    relation = author.random.choice(relations)
    facts = [fact for fact in author.world.facts if fact.relation == relation]
    while True:
        place = author.random.randrange(len(facts))
        fact = facts[place]
        # Wrong answers are of the same sort: days stand among days, months among months.
        like = facts[max(0, place - 6) : place + 7] if relation == "next_day" else facts
        right = _answer(author, fact)
        others = sorted({_answer(author, other) for other in like} - {right})
        options = [right, *author.random.sample(others, CHOICES - 1)]
        if split_of("|".join([fact.subject.key, *sorted(options)])) == author.split:
            break
    author.random.shuffle(options)
    question, _ = ask_fact(author, fact)
    lines = [question, author.wording("choose"), *(f"- {option}" for option in options)]
    return [Item("\n".join(lines), right, tuple(options))]


def _reading(author: Author) -> list[Item]:
    people = author.random.randint(1, 2)
    stories: list[tuple[Scene, list[str]]] = []
    for _ in range(people):
        scene = author.scene(stories[0][0].who if stories else None)
        stories.append((scene, author.story(0 if people > 1 else author.random.randint(1, 2))))
    text = " ".join(line for scene, kinds in stories for line in scene.tell(kinds, author.language))
    scene, kinds = author.random.choice(stories)
    name, answers = ASKED[author.random.choice([kind for kind in ASKED if kind in kinds])]
    question = scene.fill(author.wording(f"reading/{name}"), author.language)
    answer = answers[author.language].format_map(scene.slots(author.language))
    return [Item(f"{text}\n{question}", answer)]


def _verdict(author: Author, both_orders: bool) -> list[Item]:
    """Ask whether a statement about a story is true, with the choices in both orders; or without choices,
    about one sentence.
    """
    language, verdicts = author.language, author.world.templates["verdict"]
    scene = author.scene()
    truth = author.random.random() < 0.5
    aspect = author.random.choice(("where", "what"))
    kinds = author.story(1) if both_orders else ["went" if aspect == "where" else "did"]
    slots = scene.slots(language)
    if not truth:
        # The false statement keeps the person and the deed and takes another place or thing.
        other = author.scene()
        while other.place.key == scene.place.key or other.thing.key == scene.thing.key:
            other = author.scene()
        slots |= {"place": other.place.forms(language), "thing": other.thing.forms(language)}
    statement = capitalise(author.wording(f"yes_no/{aspect}").format_map(slots))
    text = f"{' '.join(scene.tell(kinds, language))}\n{statement}"
    yes, no = verdicts["positive"][language], verdicts["negative"][language]
    answer = yes if truth else no
    if not both_orders:
        return [Item(text, answer)]
    pair = f"{author.random.getrandbits(48):012x}"
    items = []
    for first, second in ((yes, no), (no, yes)):
        either = capitalise(verdicts["either"][language].format(first=first, second=second))
        items.append(Item(f"{text}\n{either}", answer, (first, second), pair))
    return items


def _three_people(author: Author) -> list[Entity]:
    """Draw people with different first names; which three stand together belongs to the split."""
    while True:
        people = [author.random.choice(author.world.people["train"]) for _ in range(3)]
        names = [person.en["first"] for person in people]
        if len(set(names)) == 3 and split_of("|".join(names)) == author.split:
            return people


def _comparison(author: Author) -> list[Item]:
    people = [person.forms(author.language) for person in _three_people(author)]
    scale = author.random.choice(list(author.world.templates["comparison"]))
    statement = author.world.templates["comparison"][scale]["statement"][author.language]
    lines = [statement.format(a=a, b=b) for a, b in pairwise(people)]
    end = author.random.choice(("most", "least"))
    question = author.wording(f"comparison/{scale}/{end}")
    names = [person["first"] for person in people]
    answer = names[0] if end == "most" else names[-1]
    return [Item(f"{' '.join(lines)}\n{question}", answer, tuple(sorted(names)))]


def _kinship(author: Author) -> list[Item]:
    language, world = author.language, author.world
    (first, second), result = author.random.choice(list(KINSHIP_RULES.items()))
    a, b, c = _three_people(author)

    def word(relation: tuple[str, str], person: Entity) -> str:
        return str(world.kinship[relation[0 if person.ru.gender else 1]].forms(language))

    def state(person: Entity, relation: tuple[str, str], of: Entity) -> str:
        template = world.templates["kinship"]["statement"][language]
        slots = {"a": person.forms(language), "relation": word(relation, person), "b": of.forms(language)}
        return str(template.format(**slots))

    question = author.wording("kinship/question").format(a=a.forms(language), b=c.forms(language))
    choices = dict.fromkeys(word(relation, a) for relation in KINSHIP_RULES.values())
    text = f"{state(a, first, b)} {state(b, second, c)}\n{question}"
    return [Item(text, word(result, a), tuple(choices))]


def _story(author: Author) -> tuple[Scene, list[str], list[str]]:
    """Draw a short story: its scene, the kinds of its sentences, and the sentences."""
    scene = author.scene()
    kinds = author.story(author.random.randint(1, 2))
    return scene, kinds, scene.tell(kinds, author.language)


def _extractive(author: Author) -> list[Item]:
    _, kinds, sentences = _story(author)
    return [Item(f"{author.wording('extractive')}\n{' '.join(sentences)}", sentences[kinds.index("did")])]


def _abstractive(author: Author) -> list[Item]:
    scene, _, sentences = _story(author)
    instruction = author.wording("abstractive/instruction")
    answer = scene.fill(author.world.templates["abstractive"]["summary"][author.language], author.language)
    return [Item(f"{instruction}\n{' '.join(sentences)}", answer)]


def _copy(author: Author, paragraph: bool) -> list[Item]:
    count = author.random.randint(2, 4) if paragraph else 1
    sentences = author.scene().tell(author.story(2), author.language)
    start = author.random.randrange(len(sentences) - count + 1)
    text = " ".join(sentences[start : start + count])
    if not paragraph and author.split == "train" and author.random.random() < 0.5:
        # Lists of words teach copying as such, whatever the words are.
        text = _word_list(author)
    return [Item(f"{author.wording('copy')}\n{text}", text)]


def _word_list(author: Author) -> str:
    while True:
        count = author.random.randint(2, 7)
        words = author.random.choices(author.world.word_list[author.language], k=count)
        # A first name before a surname must not make a person of another split.
        if author.world.heldout_names[author.language].isdisjoint(pairwise(words)):
            return " ".join(words)


_NATURE = ("habitat", "food", "kind", "material", "colour")
_SOCIETY = ("works", "tool", "river", "product", "opposite", "next_day")
_PEOPLE = ("lives", "job", "pet")
TASKS = {
    "nature": Task("knowledge", "choice", 3, partial(_knowledge, _NATURE)),
    "society": Task("knowledge", "choice", 3, partial(_knowledge, _SOCIETY)),
    "people": Task("knowledge", "choice", 3, partial(_knowledge, _PEOPLE)),
    "reading": Task("reasoning", "f1", 3, _reading),
    "comparison": Task("reasoning", "choice", 3, _comparison),
    "yes_no": Task("reasoning", "both_orders", 5, partial(_verdict, both_orders=True)),
    "kinship": Task("reasoning", "choice", 2, _kinship),
    "extractive": Task("summary", "rouge", 1, _extractive),
    "abstractive": Task("summary", "rouge", 1, _abstractive),
    "copy_sentence": Task("copy", "copy_sentence", 1, partial(_copy, paragraph=False)),
    "copy_paragraph": Task("copy", "copy_paragraph", 1, partial(_copy, paragraph=True)),
}
# A step towards `yes_no`, in training text only: it is not evaluated.
PRACTICE = {"verdict": Task("reasoning", "f1", 4, partial(_verdict, both_orders=False))}
