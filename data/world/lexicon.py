"""The world's words in both languages, from the tables beside this module, and its fixed facts."""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import yaml

from data.world.russian import (
    CASES,
    GENDERS,
    decline_first_name,
    decline_noun,
    decline_surname,
    decline_town,
    inflect_adjective,
    past_tense,
)
from data.world.splits import SPLITS, hash_order, split_of

Row = dict[str, str]
FOLDER = Path(__file__).parent


class Forms(dict[str, str]):
    """The forms of one entity in one language, as a template's slot asks for them.

    `forms["accs"]` is a stored form; `forms["он|она|оно"]` picks by the entity's gender.
    """

    def __init__(self, forms: dict[str, str], gender: int = 0) -> None:
        super().__init__(forms)
        self.gender = gender

    def __missing__(self, key: str) -> str:
        if "|" in key:
            return key.split("|")[self.gender]
        raise KeyError(key)

    def __str__(self) -> str:
        return self["plain"]


@dataclass(frozen=True)
class Entity:
    """One thing of the world in both languages."""

    key: str
    en: Forms
    ru: Forms

    def forms(self, language: str) -> Forms:
        """Return the entity's forms in `language` ("en" or "ru")."""
        return self.ru if language == "ru" else self.en


@dataclass(frozen=True)
class Fact:
    """A fixed fact: `subject` stands in `relation` to `object`."""

    relation: str
    subject: Entity
    object: Entity


def capitalise(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _english(noun: str) -> dict[str, str]:
    """Return the forms of an English noun: bare, and behind its indefinite article."""
    with_article = f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
    return {"name": noun, "a": with_article, "A": capitalise(with_article)}


def _noun(row: Row, *wanted: str) -> Entity:
    bare = row["en"].removeprefix("a ").removeprefix("an ")
    russian, gender = decline_noun(row["ru"], *wanted)
    russian |= {"plain": russian["nomn"], "Nomn": capitalise(russian["nomn"])}
    return Entity(bare, Forms(_english(bare) | {"plain": row["en"]}, gender), Forms(russian, gender))


def _place(row: Row) -> Entity:
    russian, gender = decline_noun(row["ru"], "inan")
    before, name = row["ru_preposition"], row["en"]
    russian["in"] = f"{before} {row['ru_locative'] or russian['loct']}"
    russian["to"] = f"{before} {russian['accs']}"
    english = {"name": name, "in": f"{row['preposition']} the {name}", "to": f"to the {name}"}
    return Entity(row["key"], Forms(english), Forms(russian, gender))


def _words(row: Row, prefix: str = "") -> Entity:
    """Return what two columns of a row say, which is never inflected."""
    english, russian = row[f"{prefix}en"], row[f"{prefix}ru"]
    return Entity(english, Forms(_english(english) | {"plain": english}), Forms({"plain": russian}))


def _person(first: Row, surname: Row) -> Entity:
    gender = int(first["gender"] == "f")
    full = f"{first['en']} {surname['en']}{'a' if gender else ''}"
    names = decline_first_name(first["ru"], gender)
    surnames = decline_surname(surname["ru"], gender)
    russian = {"first": names["nomn"], "full": f"{names['nomn']} {surnames['nomn']}"}
    for case in CASES:
        russian |= {f"first_{case}": names[case], f"full_{case}": f"{names[case]} {surnames[case]}"}
    return Entity(full, Forms({"first": first["en"], "full": full}, gender), Forms(russian, gender))


class World:
    """The lexicon, the templates and the fixed facts; an `Author` chooses among them."""

    def __init__(self) -> None:
        templates = (FOLDER / "templates.yaml").read_text(encoding="utf-8")
        self.templates: dict[str, Any] = yaml.safe_load(templates)
        self.places = {row["key"]: _place(row) for row in self._table("places")}
        self.towns = {
            row["en"]: Entity(row["en"], Forms({"name": row["en"]}), Forms(*decline_town(row["ru"])))
            for row in self._table("towns")
        }
        self.professions = {row["en"]: _noun(row, "anim") for row in self._table("professions")}
        self.animals = {row["en"]: _noun(row, "anim") for row in self._table("animals")}
        self.pets = {row["en"]: _noun(row, "anim") for row in self._table("pets")}
        self.kinds = {row["en"]: _noun(row) for row in self._table("kinds")}
        self.objects = {row["en"]: _noun(row, "inan") for row in self._table("objects")}
        self.foods = {row["en"]: _noun(row, "inan") for row in self._table("foods")}
        self.dishes = [_noun(row, "inan") for row in self._table("dishes")]
        self.adjectives = {row["en"]: row["ru"] for row in self._table("adjectives")}
        self.verbs = self._table("verbs")
        self.times = [_words(row) for row in self._table("times")]
        self.weather = [_words(row) for row in self._table("weather")]
        self.feelings = self._table("feelings")
        self.kinship = {row["en"]: _words(row) for row in self._table("kinship")}
        self.numbers = [_words(row) for row in self._table("calendar") if row["kind"] == "number"]
        self.people: dict[str, list[Entity]] = {split: [] for split in SPLITS}
        for first, surname in product(self._table("first_names"), self._table("surnames")):
            person = _person(first, surname)
            self.people[split_of(person.key)].append(person)
        for group in self.people.values():
            group.sort(key=lambda person: hash_order(person.key))
        self.citizens = self.people["train"][:48]
        self.facts = list(self._facts())

    def thing(self, adjective: str, noun: Entity, alive: bool = False) -> Entity:
        """Return a thing, or a living one, with its quality ("a red vase", "красную вазу" by case)."""
        gender = noun.ru.gender
        russian = {}
        for case in CASES:
            # The accusative of what lives and is masculine looks like its genitive.
            wanted = "gent" if alive and (case, gender) == ("accs", 0) else case
            russian[case] = f"{inflect_adjective(self.adjectives[adjective], wanted, gender)} {noun.ru[case]}"
        english = _english(f"{adjective} {noun.en['name']}")
        return Entity(english["name"], Forms(english), Forms(russian, gender))

    def verb(self, row: Row, gender: int) -> Entity:
        """Return a past-tense verb: English past and base form, Russian past that agrees with `gender`."""
        past = past_tense(row["ru"], gender)
        english = Forms({"plain": row["en"], "base": row["base"]})
        return Entity(row["en"], english, Forms({"plain": past, "Cap": capitalise(past)}))

    @cached_property
    def word_list(self) -> dict[str, list[str]]:
        """All single word forms of the lexicon, sorted, by language."""
        nouns = (self.places, self.towns, self.professions, self.animals, self.objects, self.foods, self.pets)
        english, russian = set(self.adjectives), set[str]()
        for entity in chain(self.dishes, *(table.values() for table in nouns)):
            english.update(entity.en["name"].split())
            for name, form in entity.ru.items():
                if name.removesuffix("_plural") in CASES:
                    russian.update(form.split())
        english.update(chain.from_iterable(_names(self.people["train"], "en")))
        russian.update(chain.from_iterable(_names(self.people["train"], "ru")))
        for word, case, gender in product(self.adjectives.values(), CASES, range(len(GENDERS))):
            russian.add(inflect_adjective(word, case, gender))
        for row in self.verbs:
            english.update((row["en"], row["base"]))
            russian.update(past_tense(row["ru"], gender) for gender in (0, 1))
        return {"en": sorted(english), "ru": sorted(russian)}

    @cached_property
    def heldout_names(self) -> dict[str, set[tuple[str, ...]]]:
        """First name and surname, in every case, of the people outside of the train split, by language."""
        people = self.people["dev"] + self.people["test"]
        return {language: _names(people, language) for language in ("en", "ru")}

    def _table(self, name: str) -> list[Row]:
        with (FOLDER / f"{name}.tsv").open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream, delimiter="\t"))

    def _facts(self) -> Iterator[Fact]:
        for row in self._table("professions"):
            yield Fact("works", self.professions[row["en"]], self.places[row["place_en"]])
            yield Fact("tool", self.professions[row["en"]], _words(row, "tool_"))
        for row in self._table("animals"):
            yield Fact("habitat", self.animals[row["en"]], self.places[row["habitat"]])
            yield Fact("food", self.animals[row["en"]], _words(row, "food_"))
            yield Fact("kind", self.animals[row["en"]], self.kinds[row["kind"]])
        for row in self._table("objects"):
            yield Fact("material", self.objects[row["en"]], _words(row, "material_"))
        for row in self._table("foods"):
            colour = inflect_adjective(self.adjectives[row["colour"]], "gent", 0)
            yield Fact("colour", self.foods[row["en"]], _words({"en": row["colour"], "ru": colour}))
        for row in self._table("towns"):
            yield Fact("river", self.towns[row["en"]], _words(row, "river_"))
            yield Fact("product", self.towns[row["en"]], _words(row, "product_"))
        for row in self._table("opposites"):
            yield Fact("opposite", _words(row), _words(row, "opposite_"))
            yield Fact("opposite", _words(row, "opposite_"), _words(row))
        for kind in ("day", "month", "number"):
            ring = [_words(row) for row in self._table("calendar") if row["kind"] == kind]
            closed = [] if kind == "number" else ring[:1]
            for current, following in pairwise(ring + closed):
                yield Fact("next_day", current, following)
        generator = random.Random("citizens")
        for person in self.citizens:
            yield Fact("lives", person, generator.choice(list(self.towns.values())))
            yield Fact("job", person, generator.choice(list(self.professions.values())))
            yield Fact("pet", person, generator.choice(list(self.pets.values())))


def _names(people: list[Entity], language: str) -> set[tuple[str, ...]]:
    """Return first name and surname of people in every form."""
    forms = chain.from_iterable(person.forms(language).items() for person in people)
    return {tuple(form.split()) for name, form in forms if name.startswith("full")}
