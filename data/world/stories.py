"""Small stories of the world: a scene is drawn once and can be told in English and in Russian."""

from dataclasses import dataclass
from functools import reduce
from operator import getitem
from random import Random
from typing import Any

from data.world.lexicon import Entity, Row, World, capitalise
from data.world.russian import agree
from data.world.splits import split_of, split_pattern

EXTRAS = ("met", "beast", "ate", "cost", "felt", "gave")


@dataclass(frozen=True)
class Scene:
    """One person, one journey, one thing done there, and what went along with it."""

    world: World
    who: Entity
    other: Entity
    place: Entity
    time: Entity
    thing: Entity
    verb: Row
    dish: Entity
    beast: Entity
    number: int
    feeling: Row
    variants: dict[str, int]

    def slots(self, language: str) -> dict[str, Any]:
        """Return what the slots of a template stand for in `language`."""
        gender = self.who.ru.gender
        verb = self.world.verb(self.verb, gender)
        names = ("who", "other", "place", "time", "thing", "dish", "beast")
        entities = {name: getattr(self, name) for name in names}
        entities |= {"number": self.world.numbers[self.number - 1], "verb": verb}
        slots: dict[str, Any] = {name: entity.forms(language) for name, entity in entities.items()}
        slots |= {"base": verb.en["base"], "coins": "coins", "feeling": self.feeling["en"]}
        if language == "ru":
            slots["coins"] = agree(self.number, "монета", "монеты", "монет")
            slots["feeling"] = self.feeling[("ru_m", "ru_f")[gender]]
        return slots

    def fill(self, template: str, language: str) -> str:
        """Fill a template with the scene's entities."""
        return capitalise(template.format_map(self.slots(language)))

    def tell(self, kinds: list[str], language: str) -> list[str]:
        """Tell a story's sentences: "went", "did", one of the EXTRAS, or the weather by its number."""
        sentences = []
        for kind in kinds:
            if kind.startswith("weather:"):
                weather = self.world.weather[int(kind.removeprefix("weather:"))]
                sentences.append(str(weather.forms(language)))
            else:
                options = self.world.templates["story"][kind]
                template = options[self.variants[kind] % len(options)][language]
                sentences.append(self.fill(template, language))
        return sentences


@dataclass(frozen=True)
class Author:
    """Who draws people, scenes and wordings of one split, and writes in one language."""

    world: World
    language: str
    split: str
    random: Random

    def wording(self, path: str) -> str:
        """Draw a wording of the template at `path` ("questions/works") that belongs to the split."""
        pattern = reduce(getitem, [*path.split("/"), self.language], self.world.templates)
        return self.random.choice(split_pattern(str(pattern))[self.split])

    def person(self, unlike: Entity | None = None) -> Entity:
        """Draw a person whose first name differs from that of `unlike`."""
        while True:
            person = self.random.choice(self.world.people[self.split])
            if unlike is None or person.en["first"] != unlike.en["first"]:
                return person

    def scene(self, unlike: Entity | None = None) -> Scene:
        """Draw a scene whose people and whose deed, quality and thing together belong to the split."""
        world, choice = self.world, self.random.choice
        qualities, objects = list(world.adjectives), list(world.objects.values())
        who = self.person(unlike)
        while True:
            verb, quality, noun = choice(world.verbs), choice(qualities), choice(objects)
            if split_of(f"{verb['en']}|{quality}|{noun.key}") == self.split:
                break
        return Scene(
            world=world,
            who=who,
            other=self.person(who),
            place=choice(list(world.places.values())),
            time=choice(world.times),
            thing=world.thing(quality, noun),
            verb=verb,
            dish=choice(world.dishes),
            beast=world.thing(choice(qualities), choice(list(world.animals.values())), alive=True),
            number=self.random.randint(3, 12),
            feeling=choice(world.feelings),
            variants={kind: self.random.randrange(12) for kind in ("went", "did", *EXTRAS)},
        )

    def story(self, extras: int) -> list[str]:
        """Draw the order of a story's sentences, as `Scene.tell` takes it."""
        kinds = ["went", "did"]
        if self.random.random() < 0.4:
            kinds.insert(0, f"weather:{self.random.randrange(len(self.world.weather))}")
        return kinds + self.random.sample(EXTRAS, extras)
