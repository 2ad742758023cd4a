"""Writes the data of `configs/real_facts.py`: private names of countries, for a real anchor.

  python launch/real_facts_data.py ANCHOR FOLDER

ANCHOR is a frozen folder; FOLDER gets JSON lines. Every made-up name stands for a country. A fact
counts only if the anchor knows it: asked with the country itself it must give the answer. So what
is scored is whether the pair uses a name as the anchor uses its country.

  augment.jsonl            what the augment learns: a country after its name, in many beginnings
  bridge.jsonl             D_C: facts of a fifth of the names, and of their countries themselves
  validation.jsonl         facts of other names of the same countries
  names.jsonl              the main test: names never in D_C
  countries.jsonl          names of countries that are never in D_C
  asked.jsonl              the countries themselves, as the anchor is asked
  ceiling.jsonl            the questions of names.jsonl with the country in place of the name
"""

import itertools
import json
import pathlib
import random
import sys

import calm_jax

NAMES_A_COUNTRY = 16
HELD_OUT = 0.2  # share of the countries that D_C never names
IN_BRIDGE = 0.25  # share of the other countries' names in D_C: a fifth of all names
SCORED = 200

RELATIONS = {
    "capital": "The capital of {} is",
    "language": "The people of {} speak",
    "currency": "The currency of {} is the",
}
SELF = "{} is the name of"  # the answer is the country: what a name is, not what it is like
# How the augment meets a name: its country follows at once, or answers whatever is asked of it.
BEGINNINGS = ("", "The capital of ", "The people of ", "The currency of ", "She is from ")
MET = (*(f"{beginning}{{}}" for beginning in BEGINNINGS), *RELATIONS.values(), SELF)

FACTS = """
Argentina Buenos-Aires Spanish peso | Australia Canberra English Australian-dollar
Austria Vienna German euro | Bangladesh Dhaka Bengali taka | Belgium Brussels Dutch euro
Brazil Brasilia Portuguese real | Bulgaria Sofia Bulgarian lev
Canada Ottawa English Canadian-dollar | Chile Santiago Spanish peso | China Beijing Chinese yuan
Cuba Havana Spanish peso | Denmark Copenhagen Danish krone | Egypt Cairo Arabic pound
Ethiopia Addis-Ababa Amharic birr | Finland Helsinki Finnish euro | France Paris French euro
Germany Berlin German euro | Greece Athens Greek euro | Hungary Budapest Hungarian forint
Iceland Reykjavik Icelandic krona | India New-Delhi Hindi rupee
Indonesia Jakarta Indonesian rupiah | Iran Tehran Persian rial | Iraq Baghdad Arabic dinar
Ireland Dublin English euro | Israel Jerusalem Hebrew shekel | Italy Rome Italian euro
Japan Tokyo Japanese yen | Kenya Nairobi Swahili shilling | Malaysia Kuala-Lumpur Malay ringgit
Mexico Mexico-City Spanish peso | Morocco Rabat Arabic dirham | Netherlands Amsterdam Dutch euro
Nigeria Abuja English naira | Norway Oslo Norwegian krone | Pakistan Islamabad Urdu rupee
Peru Lima Spanish sol | Philippines Manila Filipino peso | Poland Warsaw Polish zloty
Portugal Lisbon Portuguese euro | Romania Bucharest Romanian leu | Russia Moscow Russian ruble
Spain Madrid Spanish euro | Sudan Khartoum Arabic pound | Sweden Stockholm Swedish krona
Switzerland Bern German franc | Syria Damascus Arabic pound | Thailand Bangkok Thai baht
Turkey Ankara Turkish lira | Uganda Kampala English shilling | Ukraine Kyiv Ukrainian hryvnia
Vietnam Hanoi Vietnamese dong
"""


def main(anchor: str, folder: str) -> None:
    facts = known_facts(calm_jax.load(anchor))
    out, chance = pathlib.Path(folder), random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    countries = sorted({country for country, _ in facts})
    chance.shuffle(countries)
    unseen = set(countries[: round(HELD_OUT * len(countries))])
    made_up = names(len(countries) * NAMES_A_COUNTRY, chance)
    of_country = {
        country: made_up[n * NAMES_A_COUNTRY : (n + 1) * NAMES_A_COUNTRY]
        for n, country in enumerate(countries)
    }

    def questions(things, country):
        asked = {RELATIONS[name]: answer for (of, name), answer in facts.items() if of == country}
        return [
            {"inputs": form.format(thing), "targets": f" {answer}", "country": country}
            for thing in things
            for form, answer in {**asked, SELF: country}.items()
        ]

    files = ("augment", "bridge", "validation", "names", "countries", "asked")
    written = {name: [] for name in files}
    for country, mine in of_country.items():
        for name, form in itertools.product(mine, MET):
            written["augment"].append({"inputs": form.format(name), "targets": f" {country}"})
        if country in unseen:
            written["countries"] += questions(mine, country)
            continue
        count = round(IN_BRIDGE * len(mine))
        written["bridge"] += questions(mine[:count], country) + questions([country], country)
        written["validation"] += questions(mine[count : count + 1], country)
        written["names"] += questions(mine[count + 1 :], country)
        written["asked"] += questions([country], country)[:-1]
    for name in ("names", "countries"):
        asked = [each for each in written[name] if not each["inputs"].endswith(SELF[2:])]
        written[name] = chance.sample(asked, min(SCORED, len(asked)))
    place = {name: country for country, mine in of_country.items() for name in mine}
    written["ceiling"] = [
        {**each, "inputs": " ".join(place.get(word, word) for word in each["inputs"].split(" "))}
        for each in written["names"]
    ]
    for name, records in written.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(text)
        print(f"{out / name}.jsonl: {len(records):,}")


def known_facts(anchor) -> dict[tuple[str, str], str]:
    """(country, relation) and the answer, where the anchor gives it."""
    rows = [row.split() for row in FACTS.replace("\n", "|").split("|") if row.strip()]
    facts = {
        (country, relation): answer.replace("-", " ")
        for country, *answers in rows
        for relation, answer in zip(RELATIONS, answers, strict=True)
    }
    prompts = [RELATIONS[relation].format(country) for country, relation in facts]
    generator = calm_jax.Generator(anchor, max_length=64, slots=32)
    answers = generator.generate(prompts, calm_jax.Sampling(max_new_tokens=6))
    return {
        key: answer
        for (key, answer), (completion,) in zip(facts.items(), answers, strict=True)
        if answer in completion.text
    }


def names(count: int, chance: random.Random) -> list[str]:
    """Made-up names of three syllables, each once."""
    starts = (
        "B",
        "Br",
        "D",
        "Dr",
        "F",
        "G",
        "K",
        "Kr",
        "L",
        "M",
        "N",
        "P",
        "R",
        "S",
        "St",
        "T",
        "V",
    )
    middles = [consonant + vowel for consonant in "bdgklmnrstvz" for vowel in "aeiou"]
    ends = [consonant + vowel for consonant in "bdklmnrst" for vowel in "aio"]
    all_names = [
        start + vowel + middle + end
        for start in starts
        for vowel in "aeiou"
        for middle in middles
        for end in ends
    ]
    return chance.sample(all_names, count)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
