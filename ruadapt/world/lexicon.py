"""The world's words: tables of `data/world`, inflected through pymorphy3, and its fixed facts."""

import csv
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pymorphy3
import yaml

from ruadapt.errors import RuadaptError

LANGUAGES = ("en", "ru")
SPLITS = ("train", "dev", "test")
CASES = ("nomn", "gent", "datv", "accs", "ablt", "loct")
GENDERS = {"masc": 0, "femn": 1, "neut": 2}
# Endings of surnames in -ов/-ев/-ин, which dictionaries of common nouns do not decline as surnames.
SURNAME_ENDINGS = (("", "а", "у", "а", "ым", "е"), ("а", "ой", "ой", "у", "ой", "ой"))


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


def split_of(text: str) -> str:
    """Return the split that a combination belongs to, by its hash: 80 % train, 5 % dev, 15 % test."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    return "test" if bucket < 3 else "dev" if bucket == 3 else "train"


def capitalise(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """Return the English `noun` behind its indefinite article, or alone where it takes none."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def expand_wording(pattern: str) -> list[str]:
    """Return every wording of a pattern whose `(a|b)` lists alternatives; `{slots}` are left as they are."""
    pieces = re.split(r"\(((?:\{[^}]*\}|[^(){}])*)\)", pattern)
    wordings = [""]
    for index, piece in enumerate(pieces):
        options = re.split(r"\|(?![^{]*\})", piece) if index % 2 else [piece]
        wordings = [wording + option for wording in wordings for option in options]
    return wordings


def split_wordings(wordings: list[str]) -> dict[str, list[str]]:
    """Split wordings by hash order: a sixth for test (at least one), a tenth for dev, the rest for train."""
    ranked = sorted(wordings, key=lambda wording: hashlib.sha256(wording.encode()).digest())
    test = max(1, len(ranked) // 6)
    dev = max(1, len(ranked) // 10)
    return {"test": ranked[:test], "dev": ranked[test : test + dev], "train": ranked[test + dev :]}


def agree(number: int, one: str, few: str, many: str) -> str:
    """Return the Russian form that `number` asks for (1 год, 2 года, 5 лет)."""
    if number % 10 == 1 and number % 100 != 11:
        return one
    return few if number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14) else many


class World:
    """The lexicon, the templates and the fixed facts; random choices are made by the caller's generator."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "templates.yaml").exists():
            raise RuadaptError(
                f"{self.folder} is not a world folder: templates.yaml is missing; give data/world"
            )
        self._adjectives: dict[tuple[str, str, int], str] = {}
        self._verbs: dict[tuple[str, int], Entity] = {}
        self._morph = pymorphy3.MorphAnalyzer(lang="ru")
        self.templates: dict[str, Any] = yaml.safe_load(
            (self.folder / "templates.yaml").read_text(encoding="utf-8")
        )
        self.places = {row["key"]: self._place(row) for row in self._table("places")}
        self.professions = {row["en"]: self._noun(row, "anim") for row in self._table("professions")}
        self.animals = {row["en"]: self._noun(row, "anim") for row in self._table("animals")}
        self.kinds = {row["en"]: self._noun(row) for row in self._table("kinds")}
        self.objects = {row["en"]: self._noun(row, "inan") for row in self._table("objects")}
        self.foods = {row["en"]: self._noun(row, "inan") for row in self._table("foods")}
        self.pets = {row["en"]: self._noun(row, "anim") for row in self._table("pets")}
        self.dishes = [self._noun(row, "inan") for row in self._table("dishes")]
        self.towns = {row["en"]: self._town(row) for row in self._table("towns")}
        self.adjectives = {row["en"]: row for row in self._table("adjectives")}
        self.verbs = list(self._table("verbs"))
        self.times = [self._plain(row) for row in self._table("times")]
        self.weather = [self._plain(row) for row in self._table("weather")]
        self.feelings = list(self._table("feelings"))
        self.kinship = {row["en"]: self._plain(row) for row in self._table("kinship")}
        calendar = list(self._table("calendar"))
        self.numbers = [self._plain(row) for row in calendar if row["kind"] == "number"]
        self.people = self._people()
        self._wordings: dict[str, dict[str, list[str]]] = {}
        self.citizens = self.people["train"][:48]
        self.facts = list(self._facts(calendar))

    def wording(self, path: str, language: str, split: str, generator: random.Random) -> str:
        """Pick a wording of the template at `path` ("questions/works") that belongs to `split`."""
        name = f"{path}/{language}"
        if name not in self._wordings:
            node = self.templates
            for part in name.split("/"):
                node = node[part]
            self._wordings[name] = split_wordings(expand_wording(str(node)))
        return generator.choice(self._wordings[name][split])

    def thing(self, adjective: str, noun: Entity) -> Entity:
        """Return a thing with its quality ("a red vase", "красную вазу" by case)."""
        row = self.adjectives[adjective]
        name = f"{adjective} {noun.en['name']}"
        russian = {
            case: f"{self._adjective(row['ru'], case, noun.ru.gender)} {noun.ru[case]}" for case in CASES
        }
        return Entity(
            name, Forms({"name": name, "a": article(name), "A": capitalise(article(name))}), Forms(russian)
        )

    def verb(self, row: dict[str, str], gender: int) -> Entity:
        """Return a past-tense verb: English past and base form, Russian past that agrees with `gender`."""
        if (row["en"], gender) not in self._verbs:
            parse = next(p for p in self._morph.parse(row["ru"]) if p.tag.POS == "INFN")
            past = parse.inflect({"past", "sing", ("masc", "femn")[gender]}).word
            english = Forms({"plain": row["en"], "base": row["base"]})
            self._verbs[row["en"], gender] = Entity(
                row["en"], english, Forms({"plain": past, "Cap": capitalise(past)})
            )
        return self._verbs[row["en"], gender]

    @cached_property
    def word_list(self) -> dict[str, list[str]]:
        """All single word forms of the lexicon, sorted, by language."""
        words: dict[str, set[str]] = {"en": set(), "ru": set()}
        groups: list[Any] = [
            self.places,
            self.professions,
            self.animals,
            self.objects,
            self.foods,
            self.pets,
            self.towns,
        ]
        for entity in [entity for group in groups for entity in group.values()] + self.dishes:
            words["en"].update(entity.en["name"].split())
            forms = [entity.ru.get(case + number, "") for case in CASES for number in ("", "_plural")]
            words["ru"].update(word for form in forms for word in form.split())
        for person in self.people["train"]:
            words["en"].update(person.en["full"].split())
            words["ru"].update(word for case in CASES for word in person.ru[f"full_{case}"].split())
        for row in self.adjectives.values():
            words["en"].add(row["en"])
            words["ru"].update(
                self._adjective(row["ru"], case, gender) for case in CASES for gender in range(3)
            )
        for row in self.verbs:
            words["en"].update((row["en"], row["base"]))
            words["ru"].update(self.verb(row, gender).ru["plain"] for gender in range(2))
        return {language: sorted(group) for language, group in words.items()}

    @cached_property
    def heldout_names(self) -> dict[str, set[tuple[str, str]]]:
        """First name and surname, in every case, of the people outside of the train split, by language."""
        people = self.people["dev"] + self.people["test"]
        forms = {"en": ("full",), "ru": tuple(f"full_{case}" for case in CASES)}
        return {
            language: {
                (first, surname)
                for person in people
                for name in names
                for first, surname in [person.forms(language)[name].split()]
            }
            for language, names in forms.items()
        }

    def _table(self, name: str) -> Iterator[dict[str, str]]:
        with (self.folder / f"{name}.tsv").open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream, delimiter="\t")

    def _parse(self, word: str, *wanted: str) -> Any:
        nouns = [
            parse
            for parse in self._morph.parse(word)
            if parse.tag.POS == "NOUN"
            and "nomn" in parse.tag
            and not {"Surn", "Abbr", "Name"} & set(parse.tag.grammemes)
        ]
        if not nouns:
            raise RuadaptError(f"the lexicon's word {word!r} is no noun in the nominative; mend its table")
        # Dolls are animate in the dictionary, tables are not: the wish decides between homonyms only.
        return next((parse for parse in nouns if set(wanted) <= set(parse.tag.grammemes)), nouns[0])

    def _decline(self, word: str, *wanted: str) -> tuple[dict[str, str], int]:
        parse = self._parse(word, *wanted)
        # The parse of the given form keeps its number, so that nouns without a singular stay plural.
        forms = {case: parse.inflect({case}).word for case in CASES}
        plurals = {f"{case}_plural": parse.inflect({case, "plur"}) for case in CASES}
        forms |= {case: plural.word for case, plural in plurals.items() if plural is not None}
        return forms, GENDERS.get(str(parse.tag.gender), 0)

    def _noun(self, row: dict[str, str], *wanted: str) -> Entity:
        name = row["en"]
        bare = name.split(" ", 1)[1] if name.startswith(("a ", "an ")) else name
        english = {"name": bare, "a": article(bare), "A": capitalise(article(bare)), "plain": name}
        russian, gender = self._decline(row["ru"], *wanted)
        russian |= {"plain": russian["nomn"], "Nomn": capitalise(russian["nomn"])}
        return Entity(bare, Forms(english, gender), Forms(russian, gender))

    def _place(self, row: dict[str, str]) -> Entity:
        russian, gender = self._decline(row["ru"], "inan")
        preposition = row["ru_preposition"]
        russian["in"] = f"{preposition} {row['ru_locative'] or russian['loct']}"
        russian["to"] = f"{preposition} {russian['accs']}"
        english = {
            "name": row["en"],
            "in": f"{row['preposition']} the {row['en']}",
            "to": f"to the {row['en']}",
        }
        return Entity(row["key"], Forms(english), Forms(russian, gender))

    def _town(self, row: dict[str, str]) -> Entity:
        name = row["ru"]
        feminine = name.endswith("а")
        stem = name[:-1] if feminine else name
        genitive = "и" if stem[-1] in "кгх" else "ы"
        endings = ("а", genitive, "е", "у", "ой", "е") if feminine else ("", "а", "у", "", "ом", "е")
        forms = {case: stem + ending for case, ending in zip(CASES, endings, strict=True)}
        return Entity(row["en"], Forms({"name": row["en"]}), Forms(forms, int(feminine)))

    def _plain(self, row: dict[str, str]) -> Entity:
        return Entity(row["en"], Forms({"plain": row["en"]}), Forms({"plain": row["ru"]}))

    def _adjective(self, word: str, case: str, gender: int) -> str:
        if (word, case, gender) not in self._adjectives:
            parse = next(p for p in self._morph.parse(word) if p.tag.POS in ("ADJF", "PRTF"))
            wanted = {case, "sing", ("masc", "femn", "neut")[gender]}
            if case == "accs" and gender == 0:
                wanted.add("inan")
            self._adjectives[word, case, gender] = str(parse.inflect(wanted).word)
        return self._adjectives[word, case, gender]

    def beast(self, adjective: str, animal: Entity) -> Entity:
        """Return an animal with its quality; the accusative of masculine animals equals the genitive."""
        thing = self.thing(adjective, animal)
        gender = animal.ru.gender
        russian = dict(thing.ru)
        if gender == 0:
            russian["accs"] = (
                f"{self._adjective(self.adjectives[adjective]['ru'], 'gent', 0)} {animal.ru['accs']}"
            )
        return Entity(thing.key, thing.en, Forms(russian, gender))

    def _people(self) -> dict[str, list[Entity]]:
        people: dict[str, list[Entity]] = {split: [] for split in SPLITS}
        surnames = list(self._table("surnames"))
        for first in self._table("first_names"):
            gender = int(first["gender"] == "f")
            parse = next(
                p
                for p in self._morph.parse(first["ru"])
                if {"Name", "nomn", ("masc", "femn")[gender]} <= set(p.tag.grammemes) and "Fixd" not in p.tag
            )
            names = {case: capitalise(parse.inflect({case, "sing"}).word) for case in CASES}
            for surname in surnames:
                english = {
                    "first": first["en"],
                    "full": f"{first['en']} {surname['en']}{'a' if gender else ''}",
                }
                russian = {
                    "first": names["nomn"],
                    "full": f"{names['nomn']} {surname['ru']}{SURNAME_ENDINGS[gender][0]}",
                }
                for case, ending in zip(CASES, SURNAME_ENDINGS[gender], strict=True):
                    russian[f"first_{case}"] = names[case]
                    russian[f"full_{case}"] = f"{names[case]} {surname['ru']}{ending}"
                person = Entity(english["full"], Forms(english, gender), Forms(russian, gender))
                people[split_of(person.key)].append(person)
        for group in people.values():
            group.sort(key=lambda person: hashlib.sha256(person.key.encode()).digest())
        return people

    def _facts(self, calendar: list[dict[str, str]]) -> Iterator[Fact]:
        def words(english: str, russian: str) -> Entity:
            return Entity(
                english, Forms({"plain": english, "a": article(english)}), Forms({"plain": russian})
            )

        for row in self._table("professions"):
            yield Fact("works", self.professions[row["en"]], self.places[row["place_en"]])
            yield Fact("tool", self.professions[row["en"]], words(row["tool_en"], row["tool_ru"]))
        for row in self._table("animals"):
            yield Fact("habitat", self.animals[row["en"]], self.places[row["habitat"]])
            yield Fact("food", self.animals[row["en"]], words(row["food_en"], row["food_ru"]))
            yield Fact("kind", self.animals[row["en"]], self.kinds[row["kind"]])
        for row in self._table("objects"):
            yield Fact("material", self.objects[row["en"]], words(row["material_en"], row["material_ru"]))
        for row in self._table("foods"):
            colour = self._adjective(self.adjectives[row["colour"]]["ru"], "gent", 0)
            yield Fact("colour", self.foods[row["en"]], words(row["colour"], colour))
        for row in self._table("towns"):
            yield Fact("river", self.towns[row["en"]], words(row["river_en"], row["river_ru"]))
            yield Fact("product", self.towns[row["en"]], words(row["product_en"], row["product_ru"]))
        for row in self._table("opposites"):
            pair = self._plain(row), words(row["opposite_en"], row["opposite_ru"])
            yield Fact("opposite", *pair)
            yield Fact("opposite", pair[1], words(row["en"], row["ru"]))
        for kind in ("day", "month", "number"):
            ring = [words(row["en"], row["ru"]) for row in calendar if row["kind"] == kind]
            for current, following in zip(
                ring, ring[1:] + ring[:1] if kind != "number" else ring[1:], strict=False
            ):
                yield Fact("next_day", current, following)
        generator = random.Random("citizens")
        towns, jobs, pets = (
            list(self.towns.values()),
            list(self.professions.values()),
            list(self.pets.values()),
        )
        for person in self.citizens:
            yield Fact("lives", person, generator.choice(towns))
            yield Fact("job", person, generator.choice(jobs))
            yield Fact("pet", person, generator.choice(pets))


def load_world(folder: Path) -> World:
    """Load the world of `folder` (the repository's `data/world`).

    Raises:
        RuadaptError: the folder is no world, or a word cannot be inflected.
    """
    return World(folder)
