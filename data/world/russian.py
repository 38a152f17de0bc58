"""Russian words in their forms: pymorphy3 inflects, and a few rules serve names that its dictionary lacks."""

from functools import cache
from typing import Any

import pymorphy3

from ruadapt.errors import RuadaptError

CASES = ("nomn", "gent", "datv", "accs", "ablt", "loct")
GENDERS = ("masc", "femn", "neut")
# Surnames in -ов, -ев and -ин, by gender and case: a dictionary of common nouns declines them otherwise.
SURNAME_ENDINGS = (("", "а", "у", "а", "ым", "е"), ("а", "ой", "ой", "у", "ой", "ой"))


@cache
def _analyzer() -> pymorphy3.MorphAnalyzer:
    return pymorphy3.MorphAnalyzer(lang="ru")  # reads its dictionary from the disk


def _parses(word: str, *speech: str) -> list[Any]:
    return [parse for parse in _analyzer().parse(word) if parse.tag.POS in speech]


def decline_noun(word: str, *wanted: str) -> tuple[dict[str, str], int]:
    """Return a noun's forms by case ("accs", "accs_plural"), and the place of its gender in GENDERS.

    Args:
        wanted: grammemes that decide between homonyms, such as "anim".

    Raises:
        RuadaptError: the dictionary knows no such noun.
    """
    names = {"Surn", "Abbr", "Name"}
    nouns = [
        parse
        for parse in _parses(word, "NOUN")
        if "nomn" in parse.tag and not names & set(parse.tag.grammemes)
    ]
    if not nouns:
        raise RuadaptError(f"the lexicon's word {word!r} is no noun in the nominative; mend its table")
    parse = next((parse for parse in nouns if set(wanted) <= set(parse.tag.grammemes)), nouns[0])
    # The parse of the given form keeps its number, so that nouns without a singular stay plural.
    forms = {case: parse.inflect({case}).word for case in CASES}
    plurals = {f"{case}_plural": parse.inflect({case, "plur"}) for case in CASES}
    forms |= {name: plural.word for name, plural in plurals.items() if plural is not None}
    gender = parse.tag.gender
    return forms, GENDERS.index(gender) if gender in GENDERS else 0


@cache
def inflect_adjective(word: str, case: str, gender: int) -> str:
    """Return an adjective's singular form; the masculine accusative is that of lifeless things."""
    lifeless = {"inan"} if (case, gender) == ("accs", 0) else set()
    return str(_parses(word, "ADJF", "PRTF")[0].inflect({case, "sing", GENDERS[gender]} | lifeless).word)


@cache
def past_tense(verb: str, gender: int) -> str:
    """Return the singular past of an infinitive."""
    return str(_parses(verb, "INFN")[0].inflect({"past", "sing", GENDERS[gender]}).word)


@cache
def decline_first_name(name: str, gender: int) -> dict[str, str]:
    """Return the forms of a person's first name by case."""
    wanted = {"Name", "nomn", GENDERS[gender]}
    names = [parse for parse in _parses(name, "NOUN") if wanted <= set(parse.tag.grammemes)]
    parse = next(parse for parse in names if "Fixd" not in parse.tag)
    return {case: parse.inflect({case, "sing"}).word.capitalize() for case in CASES}


def decline_surname(stem: str, gender: int) -> dict[str, str]:
    """Return the forms of a surname in -ов, -ев or -ин by case."""
    return {case: stem + ending for case, ending in zip(CASES, SURNAME_ENDINGS[gender], strict=True)}


def decline_town(name: str) -> tuple[dict[str, str], int]:
    """Return the forms of a town's name by case, and the place of its gender in GENDERS."""
    feminine = name.endswith("а")
    stem = name.removesuffix("а")
    genitive = "и" if stem[-1] in "кгх" else "ы"
    endings = ("а", genitive, "е", "у", "ой", "е") if feminine else ("", "а", "у", "", "ом", "е")
    return {case: stem + ending for case, ending in zip(CASES, endings, strict=True)}, int(feminine)


def agree(number: int, one: str, few: str, many: str) -> str:
    """Return the form that a number asks for (1 год, 2 года, 5 лет)."""
    if number % 10 == 1 and number % 100 != 11:
        return one
    return few if number % 10 in (2, 3, 4) and number % 100 not in (12, 13, 14) else many
