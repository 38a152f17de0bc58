"""The generated world: right Russian, right answers, and splits that do not leak."""

import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.world import FOLDER, TASKS, World, __main__, chat_rows, documents, evaluation_items
from data.world.russian import agree
from data.world.splits import expand_wording, split_of, split_wordings
from ruadapt.files import read_lines

LANGUAGES = ("en", "ru")


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def items(world: World) -> list[dict]:
    return [item for language in LANGUAGES for item in evaluation_items(world, language, "test", 0, 25)]


def test_russian_is_inflected(world: World) -> None:
    vase, wolf = world.objects["vase"], world.animals["wolf"]
    assert world.thing("red", vase).ru["accs"] == "красную вазу"
    assert world.thing("blue", world.objects["coat"]).ru["accs"] == "синее пальто"
    assert world.thing("grey", wolf, alive=True).ru["accs"] == "серого волка"
    assert world.thing("old", vase).en["a"] == "an old vase"
    assert world.places["forest"].ru["in"] == "в лесу"
    assert world.places["airport"].ru["in"] == "в аэропорту"
    assert world.places["market"].ru["to"] == "на рынок"
    assert world.professions["judge"].ru["ablt"] == "судьёй"
    found = next(row for row in world.verbs if row["en"] == "found")
    assert (world.verb(found, 0).ru["plain"], world.verb(found, 1).ru["plain"]) == ("нашёл", "нашла")
    people = {person.key: person for group in world.people.values() for person in group}
    assert people["Anna Sokolova"].ru["full_accs"] == "Анну Соколову"
    assert people["Fyodor Ilyin"].ru["full_datv"] == "Фёдору Ильину"


def test_thousands_of_russian_word_forms(world: World) -> None:
    assert len(world.word_list["ru"]) > 2500
    assert all(re.fullmatch(r"[А-Яа-яЁё-]+", word) for word in world.word_list["ru"])


@given(st.integers(0, 10_000))
def test_numerals_agree(number: int) -> None:
    form = agree(number, "год", "года", "лет")
    if number % 100 in (11, 12, 13, 14):
        assert form == "лет"
    else:
        assert form == {1: "год", 2: "года", 3: "года", 4: "года"}.get(number % 10, "лет")


def test_wordings_expand_outside_of_slots() -> None:
    assert expand_wording("(Who|Which) is {who[он|она]}(?|.)") == [
        "Who is {who[он|она]}?",
        "Who is {who[он|она]}.",
        "Which is {who[он|она]}?",
        "Which is {who[он|она]}.",
    ]
    assert expand_wording("({a[x|y]} went?|Did {a[x|y]} go?)") == ["{a[x|y]} went?", "Did {a[x|y]} go?"]


@given(st.lists(st.text(min_size=1), min_size=3, max_size=60, unique=True))
def test_wordings_are_split_without_overlap(wordings: list[str]) -> None:
    parts = split_wordings(wordings)
    assert sorted(part for group in parts.values() for part in group) == sorted(wordings)
    assert all(parts.values())


def test_people_of_the_splits_are_different(world: World) -> None:
    names = {split: {person.key for person in group} for split, group in world.people.items()}
    assert not names["train"] & names["test"] and not names["dev"] & (names["train"] | names["test"])
    assert all(split_of(name) == split for split, group in names.items() for name in group)


@pytest.mark.parametrize("language", LANGUAGES)
def test_evaluation_does_not_stand_in_training_text(world: World, items: list[dict], language: str) -> None:
    trained = "\n\n".join(islice(documents(world, language, "train", "leak"), 3000))
    chats = {row["messages"][0]["content"] for row in islice(chat_rows(world, language, "train", 1), 3000)}
    own = [item for item in items if item["meta"]["language"] == language]
    assert not [item["inputs"] for item in own if item["inputs"] in trained or item["inputs"] in chats]
    neighbours = set(re.findall(r"(?=\b(\w+) (\w+)\b)", trained))
    people = {tuple(person.forms(language)["full"].split()) for person in world.people["test"]}
    assert len(people) > 200 and not people & neighbours


def test_documents_are_reproducible_and_differ_by_seed(world: World) -> None:
    first, again, other = (list(islice(documents(world, "ru", "train", seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_items_have_the_columns_of_darumeru(items: list[dict]) -> None:
    assert {item["meta"]["task"] for item in items} == set(TASKS)
    assert {item["meta"]["group"] for item in items} == {"knowledge", "reasoning", "summary", "copy"}
    assert len({item["meta"]["id"] for item in items}) == len(items)
    for item in items:
        assert item["messages"] == [{"role": "user", "content": item["inputs"]}]
        assert item["outputs"]
        if item["meta"]["choices"]:
            assert item["meta"]["choices"].count(item["outputs"]) == 1


def test_right_answers_stand_in_every_place(items: list[dict]) -> None:
    own = [item for item in items if item["meta"]["group"] == "knowledge"]
    places = [item["meta"]["choices"].index(item["outputs"]) for item in own]
    assert all(places.count(place) > len(own) / 8 for place in range(4))
    for item in own:
        assert item["inputs"].split("\n")[2:] == [f"- {choice}" for choice in item["meta"]["choices"]]


def test_both_orders_ask_the_same_question(items: list[dict]) -> None:
    pairs: dict[str, list[dict]] = {}
    for item in items:
        if item["meta"]["pair"]:
            pairs.setdefault(item["meta"]["pair"], []).append(item)
    assert len(pairs) == 50
    for first, second in pairs.values():
        assert first["outputs"] == second["outputs"]
        assert first["meta"]["choices"] == second["meta"]["choices"][::-1]
        *text, choices = first["inputs"].split("\n")
        *text_again, choices_again = second["inputs"].split("\n")
        assert text == text_again and choices != choices_again


def test_yes_is_said_of_what_the_text_says(items: list[dict]) -> None:
    for item in items:
        if item["meta"]["task"] != "yes_no" or item["meta"]["language"] != "en":
            continue
        text, statement, _ = item["inputs"].split("\n")
        place = re.search(r"(?:go|went) (to the [a-z ]+)", statement)
        thing = re.search(r"\b(an? [a-z]+ [a-z ]+)(?:[?.]|$)", statement)
        said = place.group(1) if place else thing.group(1) if thing else ""
        assert said and (said in text) == (item["outputs"] == "yes"), item


@pytest.mark.parametrize(
    ("language", "least"), [("en", "youngest|shortest|weakest"), ("ru", "младше|ниже|слабее")]
)
def test_comparisons_are_right(items: list[dict], language: str, least: str) -> None:
    own = [i for i in items if i["meta"]["task"] == "comparison" and i["meta"]["language"] == language]
    assert {bool(re.search(least, item["inputs"])) for item in own} == {True, False}
    for item in own:
        statements, question = item["inputs"].split("\n")
        first, last = statements.split()[0], statements.rstrip(".").split()[-1]
        if re.search(least, question):
            # The last name stands in an oblique case: it begins as the answer does.
            assert last.startswith(item["outputs"][:2])
        else:
            assert item["outputs"] == first


def test_copies_and_readings_stand_in_the_prompt(items: list[dict]) -> None:
    for item in items:
        task = item["meta"]["task"]
        if task in ("reading", "extractive", "copy_sentence", "copy_paragraph"):
            assert item["outputs"] in item["inputs"], item


def test_the_committed_corpus_is_what_the_world_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "CHARACTERS", {"ru": 30_000, "en": 10_000})
    for name in ("CHAT_ROWS", "PROMPT_ROWS", "HELDOUT_DOCUMENTS"):
        monkeypatch.setattr(__main__, name, 20)
    __main__.write(tmp_path)
    committed = sorted((FOLDER / "corpus").iterdir())
    assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        lines = list(read_lines(tmp_path / path.name))
        assert len(lines) >= 20 and lines == list(islice(read_lines(path), len(lines)))
