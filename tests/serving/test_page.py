"""The page in a real browser: a headless Chromium drives what a person would.

JAXREC_PAGE names a server to drive instead of the test's own, such as that of `make demo`: http://127.0.0.1:8000/
"""

import asyncio
import contextlib
import os
import shutil
import socket
import threading

import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from jaxrec.serving.app import make_app
from jaxrec.serving.engine import Engine
from jaxrec.serving.exploration import EpsilonGreedy
from jaxrec.serving.guard import Limits
from jaxrec.serving.measures import Measures
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.sqlite_store import SqliteStore

WAIT = 60_000  # milliseconds: two workers share two cores


@pytest.fixture(scope="module")
def address(request):
    """Where the page is."""
    return os.environ.get("JAXREC_PAGE") or request.getfixturevalue("own_address")


@pytest.fixture(scope="module")
def own_address(version, tmp_path_factory):
    """Of a server that neither explores nor has a token."""
    with serving(version, tmp_path_factory.mktemp("state"), Engine(), Limits()) as address:
        yield address


@contextlib.contextmanager
def serving(version, directory, engine, limits):
    """A server in a thread, with the version twice, under two names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    measures = Measures()
    options = ServiceOptions(deadline_ms=60_000)
    service = Service(SqliteStore(directory / "state.db"), engine, options, measures)
    other = object.__new__(type(version))
    other.__dict__.update(version.__dict__ | {"name": "v2"})

    async def run():
        for one in (version, other):
            service.live.install(one)
        await server.serve()

    config = uvicorn.Config(make_app(service, limits, measures), host="127.0.0.1", port=port, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "the tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The page, loaded."""
    with watched(browser, address) as page:
        page.goto(address)
        expect(page.locator("#list-a li")).to_have_count(10)
        yield page


@contextlib.contextmanager
def watched(browser, address, expected=()):
    """A page in which nothing may fail but what is expected, and nothing may come from elsewhere."""
    errors, elsewhere = [], []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: elsewhere.append(request.url) if not request.url.startswith(address) else None,
    )
    yield page
    page.close()
    assert not [error for error in errors if not any(text in error for text in expected)]
    assert not elsewhere


def titles(page, where="#list-a"):
    return page.locator(f"{where} .title").all_inner_texts()


def options(page, label):
    return page.get_by_label(label).evaluate("select => Array.from(select.options, option => option.value)")


def test_a_click_changes_the_list_and_pages_go_on(page):
    first = titles(page)
    expect(page.locator("#history-empty")).to_be_visible()
    page.get_by_role("button", name=f"Took it: {first[0]}", exact=True).first.click()
    expect(page.locator("#history li")).to_have_text([first[0]])
    expect(page.locator("#list-a .source").first).to_have_text("model")
    second = titles(page)
    assert first[0] not in second
    page.get_by_role("button", name="Next page").click()
    expect(page.locator("#list-a")).to_have_attribute("start", "11")
    assert not set(titles(page)) & set(second)


def test_rules_and_diversity_change_the_list(page):
    page.get_by_label("User").fill("1")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#history li").first).to_be_visible()
    if "JAXREC_PAGE" not in os.environ:
        expect(page.locator("#history li")).to_have_count(32)
    before = titles(page)
    page.get_by_label("Only these categories").select_option("Horror")
    expect(page.locator("#list-a .title").first).not_to_have_text(before[0])
    page.get_by_label("Items").fill("3")
    expect(page.locator("#list-a li")).to_have_count(3)


def test_a_search_a_new_item_and_why(page):
    page.get_by_label("Search by text").fill("toy story")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#found .title").first).to_contain_text("Toy Story")
    page.get_by_label("Add an item that the model has never seen").fill("Toy Story 12")
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#added")).to_have_text("Toy Story 12 is in the catalogue now.")
    page.get_by_label("Search by text").fill("toy story 12")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#found .title").first).to_have_text("Toy Story 12")
    page.locator("#found button", has_text="Why").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#similar li")).to_have_count(5)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_two_models_side_by_side_and_the_keyboard(page):
    first, second = (name for name in options(page, "Compare with") if name)
    page.get_by_label("User").fill("1")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#history li").first).to_be_visible()
    page.get_by_label("Model", exact=True).select_option(second)
    page.get_by_label("Compare with").select_option(first)
    expect(page.locator("#list-b li")).to_have_count(10)
    expect(page.locator("#name-b")).to_have_text(f"Model {first}")
    same = titles(page, "#list-b") == titles(page)
    assert same == ({first, second} == {"v1", "v2"}), "v1 and v2 are one model"
    for where, model in (("#list-b", first), ("#list-a", second)):
        page.locator(f"{where} button", has_text="Why").first.click()
        expect(page.locator("#about-model")).to_have_text(f"Model {model}.")
        expect(page.locator("#about-title")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator(f"{where} button", has_text="Why").first).to_be_focused()
    page.keyboard.press("Tab")
    unnamed = page.evaluate(
        "Array.from(document.querySelectorAll('input, select')).filter(e => !e.labels || !e.labels.length).length"
    )
    assert unnamed == 0


def test_the_keyboard_stays_where_it_was_and_hears_what_happened(page):
    page.get_by_role("button", name="Invent a user").click()
    expect(page.locator("#status")).to_have_text("Items 1 to 10.")
    button = lambda text, place: page.locator(f"#list-a li:nth-child({place}) button", has_text=text)  # noqa: E731
    hidden = []
    for text, said in (
        ("Took it", "is in the history now. Items 1 to 10."),
        ("Hide", "is hidden now. Items 1 to 10."),
    ):
        title = titles(page)[2]
        hidden.append(page.locator("#list-a li").nth(2).get_attribute("data-item"))
        button(text, 3).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text(f"{title} {said}")
        assert title not in titles(page)
        expect(button(text, 3)).to_be_focused()
    page.get_by_label("Search by text").fill(title)
    page.keyboard.press("Enter")
    expect(page.locator("#found li")).to_have_count(5)
    assert title not in titles(page, "#found"), "it is hidden"
    hidden.append(page.locator("#found li").last.get_attribute("data-item"))
    page.locator("#found button", has_text="Hide").last.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#found li")).to_have_count(4)
    expect(page.locator("#found button", has_text="Hide").last).to_be_focused()
    page.get_by_role("button", name="Next page").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Items 11 to 20.")
    expect(page.locator("#recommended")).to_be_focused()
    page.get_by_role("button", name="Forget this user").click()
    expect(page.locator("#status")).to_contain_text("1 events of guest-")
    expect(page.locator("#list-a")).to_have_attribute("start", "1")
    expect(page.locator("#history li")).to_have_count(0)
    for item_id in hidden:  # other tests look for them
        page.evaluate("item_id => call('v1/items/hide', { item_id, hidden: false })", item_id)


def test_the_second_dialog_and_a_list_that_was_made_anew_behind_it(page):
    page.locator("#list-a button", has_text="Why").first.click()
    expect(page.locator("#similar li")).to_have_count(5)
    similar = titles(page, "#similar")
    page.locator("#similar button", has_text="Why").first.click()
    expect(page.locator("#about-title")).to_have_text(similar[0])
    expect(page.locator("#about-title")).to_be_focused()
    title = titles(page, "#similar")[0]
    page.locator("#similar button", has_text="Took it").first.click()
    expect(page.locator("#about-status")).to_contain_text(f"{title} is in the history now.")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#recommended")).to_be_focused()


def test_the_page_asks_for_the_token(browser, version, tmp_path):
    engine, limits = Engine(exploration=EpsilonGreedy(epsilon=0.5)), Limits(token="secret")
    with (
        serving(version, tmp_path, engine, limits) as address,
        watched(browser, address, expected=["401 (Unauthorized)"]) as page,
    ):
        page.goto(address)
        expect(page.get_by_label("Token")).to_be_focused()
        for given, answer in (("wrong", "did not take"), ("", "did not take"), ("secret", "did not take")):
            page.get_by_label("Token").fill(given)
            page.keyboard.press("Enter")
            expect(page.locator("#token-why")).to_contain_text(answer)
        expect(page.locator("#list-a li")).to_have_count(10)
        expect(page.locator("#token-form")).to_be_hidden()
        expect(page.locator("#recommended")).to_be_focused()
        page.reload()
        expect(page.locator("#list-a li")).to_have_count(10)
        assert page.url == address, "the token is in no address"
        assert page.get_by_label("Token").input_value() == ""
        expect(page.locator("#explore-why")).to_be_hidden()
        expect(page.locator("#list-a .score").first).not_to_contain_text("chance")
        page.get_by_label("Try what the model is unsure of").check()
        expect(page.locator("#list-a .score").first).to_contain_text("chance")
        page.get_by_role("link", name="The interface").click()
        expect(page.get_by_role("heading", name="POST /v1/recommend")).to_be_visible()


def test_a_server_that_does_not_explore_says_so(browser, own_address):
    with watched(browser, own_address) as page:
        page.goto(own_address)
        expect(page.get_by_label("Try what the model is unsure of")).to_be_disabled()
        expect(page.locator("#explore-why")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_the_interface_is_a_page_without_a_script(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("link", name="The interface").click()
    page.get_by_role("navigation").get_by_role("link", name="GET /v1/about").click()
    expect(page.get_by_role("heading", name="GET /v1/about")).to_be_in_viewport()
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    page.get_by_role("link", name="The page to try it on").click()
    expect(page.locator("#list-a li")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
