"""The server's page in a browser."""

import pytest
from servers import Slows, running, wait_until

from calm_jax.serving.app import Limits
from calm_jax.serving.parts import served_models

KEY = "the right key"
BEARER = {"Authorization": f"Bearer {KEY}"}
LIMITS = Limits(max_tokens=5000)
CARDS = """[...document.querySelectorAll("article")].map(card => ({
    name: card.querySelector("h2").innerText, text: card.querySelector("p").innerText,
    foot: card.querySelector("footer").innerText,
    isError: card.querySelector("footer").classList.contains("error")}))"""


@pytest.fixture(scope="module")
def slow():
    """A server that says "a" every hundredth of a second."""
    with running([Slows().model()], LIMITS) as here:
        yield here


@pytest.fixture(scope="module")
def keyed():
    with running([Slows().model()], LIMITS, KEY) as here:
        yield here


@pytest.fixture
def page(browser):
    with browser.page() as page:
        yield page


def opened(page, server):
    page.open(server.url)
    page.wait("document.querySelector('#models input')")
    return page


def cards(page):
    return page.value(CARDS)


def footers(page, words, count=1):
    """Waits until there are so many cards, and each one's last line has the words."""
    page.wait(f"{CARDS}.filter(card => card.foot.includes({words!r})).length === {count}")
    assert len(cards(page)) == count
    return cards(page)


def test_an_answer_stands_behind_its_prompt(page, slow):
    opened(page, slow)
    assert page.value("document.activeElement.id") == "prompt"
    page.type("#max_tokens", "30")
    page.type("#prompt", "Say <b>it</b>: ")
    page.click("#ask")
    (card,) = footers(page, "30 tokens")
    assert card["name"] == "slow" and card["text"] == "Say <b>it</b>: " + 30 * "a"
    assert card["foot"].endswith("cut at its length")
    assert page.errors() == []
    assert all(
        address.startswith(slow.url) for address in page.requests() if "data:" not in address
    )


def test_stop_ends_the_answer_here_and_at_the_server(page, slow):
    opened(page, slow)
    assert not page.value("document.querySelector('#cancel').checkVisibility()")
    page.type("#max_tokens", "5000")
    page.type("#prompt", "Hello")
    page.press("Enter", 13, modifiers=2)
    page.wait(f"{CARDS}[0]?.text.startsWith('Helloaaa')")
    assert cards(page)[0]["foot"] == "answering …"
    assert slow.rows_in_use() == 1
    page.click("#cancel")
    (stopped,) = footers(page, "stopped")
    assert not stopped["isError"]
    wait_until(lambda: slow.rows_in_use() == 0)
    assert cards(page) == [stopped]
    assert not page.value("document.querySelector('#cancel').checkVisibility()")
    page.type("#max_tokens", "3")
    page.click("#ask")
    (card,) = footers(page, "3 tokens")
    assert card["text"] == "Helloaaa"


def test_a_refusal_is_told(page, slow):
    opened(page, slow)
    page.type("#max_tokens", "9999")
    page.type("#prompt", "Hello")
    page.click("#ask")
    (card,) = footers(page, "max_tokens is 9999")
    assert card["isError"]


@pytest.mark.parametrize("width", [1280, 400, 320])
def test_nothing_is_cut_off_covered_or_faint(page, keyed, width):
    """Of all that the page can show: the field for the key, an answer, and a message."""
    page.resize(width)
    page.open(keyed.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#key", KEY)
    page.type("#max_tokens", "200")
    page.type("#prompt", "Hello")
    page.click("#ask")
    footers(page, "200 tokens")
    page.type("#key", "another")
    page.click("#prompt")
    page.wait("document.querySelector('#trouble').checkVisibility()")
    assert page.wider() == []
    assert page.overlaps() == []
    behind = set()
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert page.faint() == []
        behind.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(behind) == 2


def test_a_message_is_seen_on_a_low_screen(page, keyed):
    page.resize(400, 500)
    page.open(keyed.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#key", "the wrong key")
    page.press("Tab", 9)
    box = "document.querySelector('#trouble').getBoundingClientRect()"
    page.wait(f"{box}.height > 0")
    assert page.value(f"{box}.top") >= 0 and page.value(f"{box}.bottom") <= 500


def test_a_server_with_a_key_asks_for_it(page, keyed, slow):
    assert not opened(page, slow).value("document.querySelector('#key').checkVisibility()")
    page.open(keyed.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#key", "the wrong key")
    page.press("Tab", 9)
    page.wait(
        "document.querySelector('#trouble').innerText === 'The server does not know this key.'"
    )
    assert page.value("document.querySelector('#models').children.length") == 0
    page.type("#key", KEY)
    page.press("Tab", 9)
    page.wait("document.querySelector('#title').innerText === 'slow'")
    assert not page.value("document.querySelector('#trouble').checkVisibility()")
    page.type("#max_tokens", "4")
    page.type("#prompt", "Hello")
    page.click("#ask")
    assert footers(page, "4 tokens")[0]["text"] == "Helloaaaa"
    assert all("401" in error for error in page.errors())
    assert KEY not in "".join(page.requests())


def test_an_answer_without_the_key_asks_for_it_again(page, keyed):
    page.open(keyed.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#prompt", "Hello")
    page.click("#ask")
    page.wait("document.activeElement.id === 'key'")
    page.type("#key", "the wrong key")
    page.click("#ask")
    page.wait(
        "document.querySelector('#trouble').innerText === 'The server does not know this key.'"
    )
    assert cards(page) == []


def test_the_first_answer_needs_no_step_between_key_and_button(page, keyed):
    page.open(keyed.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#max_tokens", "4")
    page.type("#prompt", "Hello")
    page.type("#key", KEY)
    page.press("Enter", 13, text="\r")
    assert footers(page, "4 tokens")[0]["text"] == "Helloaaaa"


@pytest.fixture(scope="module")
def tiny(pair):
    """A pair and its parts, whose answers may take seconds."""
    options = {"slots": 2, "max_length": 2048, "prefill_chunk": 32, "cache_dtype": None}
    with running(served_models(pair, "pair", options), LIMITS, KEY) as here:
        yield here


@pytest.mark.slow
def test_a_chat_with_a_pair_and_its_parts(page, tiny):
    """Answers in the form of a chat are those of the API, and Stop ends all three."""
    page.open(tiny.url)
    page.wait("document.querySelector('#key').checkVisibility()")
    page.type("#key", KEY)
    page.press("Tab", 9)
    page.wait("document.querySelector('#title').innerText === 'pair: a pair and its parts'")
    page.type("#prompt", "Wer reitet so spät?")
    page.click("input[value=chat]")
    page.type("#max_tokens", "9")
    page.click("#ask")
    wanted = {}
    for name in ("pair", "pair/anchor", "pair/augment"):
        body = {"model": name, "max_tokens": 9, "temperature": 0}
        body["messages"] = [{"role": "user", "content": "Wer reitet so spät?"}]
        answer = tiny.post("/v1/chat/completions", json=body, headers=BEARER).json()
        wanted[name] = answer["choices"][0]["message"]["content"]
    shown = footers(page, " tokens · ", 3)
    texts = "[...document.querySelectorAll('article p')].map(text => text.textContent)"
    assert dict(zip([card["name"] for card in shown], page.value(texts), strict=True)) == wanted
    assert len(set(wanted.values())) == 3

    page.type("#max_tokens", "1900")
    page.click("#ask")
    page.wait(f"{CARDS}.filter(card => card.text.length > 9).length === 3")
    assert tiny.rows_in_use() == 3
    page.click("#cancel")
    footers(page, "stopped", 3)
    wait_until(lambda: tiny.rows_in_use() == 0)

    page.click("input[value='pair/anchor']")
    page.click("input[value='pair/augment']")
    page.type("#max_tokens", "9")
    page.click("#ask")
    (alone,) = footers(page, " tokens · ")
    assert alone["name"] == "pair"
    assert page.value(texts) == [wanted["pair"]]
