"""The data of private facts: nothing that is scored as unseen is trained on."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The records of every file, made as if the anchor knew all facts but those of one relation."""
    spec = importlib.util.spec_from_file_location("data", ROOT / "launch" / "real_facts_data.py")
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    rows = [row.split() for row in data.FACTS.replace("\n", "|").split("|") if row.strip()]
    facts = {
        (country, relation): answer
        for country, *answers in rows
        for relation, answer in zip(data.RELATIONS, answers, strict=True)
        if relation != "currency"
    }
    folder = tmp_path_factory.mktemp("facts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.calm_jax, "load", lambda folder: None)
        patch.setattr(data, "known_facts", lambda anchor: facts)
        data.main("anchor", str(folder))
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def names_of(records):
    """The words that are nobody's but a made-up name's or a country's."""
    common = set(
        ["The", "capital", "of", "people", "currency", "is", "speak", "the", "name", "She", "from"]
    )
    return {word for record in records for word in record["inputs"].split() if word not in common}


def test_what_is_scored_was_never_trained_on(files):
    countries = {record["country"] for record in files["asked"]}
    seen, scored = names_of(files["bridge"]), names_of(files["names"])
    assert not scored & seen
    assert scored <= names_of(files["augment"])
    assert {record["country"] for record in files["names"]} <= countries
    held_out = {record["country"] for record in files["countries"]}
    assert held_out and not held_out & {record["country"] for record in files["bridge"]}
    assert not names_of(files["validation"]) & (seen | scored)


def test_a_fifth_of_the_names_is_in_the_bridges_data(files):
    countries = {record["country"] for record in files["bridge"]}
    share = len(names_of(files["bridge"]) - countries) / len(names_of(files["augment"]))
    assert 0.18 < share < 0.23


def test_the_ceiling_asks_the_same_of_the_country(files):
    for name, ceiling in zip(files["names"], files["ceiling"], strict=True):
        (made_up,) = names_of([name])
        assert ceiling["inputs"] == name["inputs"].replace(made_up, name["country"])
        assert ceiling["targets"] == name["targets"]


def test_only_what_the_anchor_knows_is_asked(files):
    assert not any("currency" in record["inputs"] for record in files["bridge"])
