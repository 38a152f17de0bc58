"""Small stories of the world: a scene is drawn once and can be told in English and in Russian."""

import random
from dataclasses import dataclass
from typing import Any

from ruadapt.world.lexicon import Entity, Forms, World, agree, capitalise, split_of

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
    verb: dict[str, str]
    dish: Entity
    beast: Entity
    number: int
    feeling: dict[str, str]
    variants: dict[str, int]

    def slots(self, language: str) -> dict[str, Any]:
        """Return what the slots of a template stand for in `language`."""
        gender = self.who.ru.gender
        verb = self.world.verb(self.verb, gender)
        russian = language == "ru"
        coins = agree(self.number, "монета", "монеты", "монет") if russian else "coins"
        feeling = self.feeling[("ru_m", "ru_f")[gender]] if russian else self.feeling["en"]
        entities = {
            name: getattr(self, name) for name in ("who", "other", "place", "time", "thing", "dish", "beast")
        } | {"number": self.world.numbers[self.number - 1], "verb": verb}
        named: dict[str, Forms | str] = {name: entity.forms(language) for name, entity in entities.items()}
        return named | {"base": verb.en["base"], "coins": coins, "feeling": feeling}

    def sentence(self, kind: str, language: str) -> str:
        """Tell one sentence of the scene: went, did, or one of the extras."""
        options = self.world.templates["story"][kind]
        template = options[self.variants[kind] % len(options)][language]
        return capitalise(template.format_map(self.slots(language)))

    def fill(self, template: str, language: str) -> str:
        """Fill any template with the scene's entities."""
        return capitalise(template.format_map(self.slots(language)))


def draw_person(world: World, split: str, generator: random.Random, unlike: Entity | None = None) -> Entity:
    """Draw a person of `split` whose first name differs from that of `unlike`."""
    while True:
        person = generator.choice(world.people[split])
        if unlike is None or person.en["first"] != unlike.en["first"]:
            return person


def draw_scene(world: World, split: str, generator: random.Random, unlike: Entity | None = None) -> Scene:
    """Draw a scene whose people and whose combination of deed, quality and thing belong to `split`."""
    who = draw_person(world, split, generator, unlike)
    while True:
        verb = generator.choice(world.verbs)
        adjective = generator.choice(list(world.adjectives))
        noun = generator.choice(list(world.objects.values()))
        if split_of(f"{verb['en']}|{adjective}|{noun.key}") == split:
            break
    return Scene(
        world=world,
        who=who,
        other=draw_person(world, split, generator, who),
        place=generator.choice(list(world.places.values())),
        time=generator.choice(world.times),
        thing=world.thing(adjective, noun),
        verb=verb,
        dish=generator.choice(world.dishes),
        beast=world.beast(
            generator.choice(list(world.adjectives)), generator.choice(list(world.animals.values()))
        ),
        number=generator.randint(3, 12),
        feeling=generator.choice(world.feelings),
        variants={kind: generator.randrange(12) for kind in ("went", "did", *EXTRAS)},
    )


def draw_story(scene: Scene, generator: random.Random, extras: int) -> list[str]:
    """Draw the order of a story's sentences: kinds for `tell` ("weather:3", "went", "did", …)."""
    kinds = ["went", "did"]
    if generator.random() < 0.4:
        kinds.insert(0, f"weather:{generator.randrange(len(scene.world.weather))}")
    return kinds + generator.sample(EXTRAS, extras)


def tell(scene: Scene, kinds: list[str], language: str) -> list[str]:
    """Tell the sentences `kinds` of the scene in `language`."""
    sentences = []
    for kind in kinds:
        if kind.startswith("weather:"):
            sentences.append(str(scene.world.weather[int(kind.split(":")[1])].forms(language)))
        else:
            sentences.append(scene.sentence(kind, language))
    return sentences
