"""The page in a real browser: a headless Chromium drives what a person would.

JAXREC_PAGE names a server to drive instead of the test's own, such as that of `make demo`: http://127.0.0.1:8000/
"""

import asyncio
import os
import shutil
import socket
import threading

import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from jaxrec.serving.app import make_app
from jaxrec.serving.engine import Engine
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
    """A server in a thread, with the version twice, under two names."""
    state = tmp_path_factory.mktemp("state") / "state.db"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    measures = Measures()
    service = Service(SqliteStore(state), Engine(), ServiceOptions(deadline_ms=60_000), measures)
    other = object.__new__(type(version))
    other.__dict__.update(version.__dict__ | {"name": "v2"})

    async def run():
        for one in (version, other):
            service.live.install(one)
        await server.serve()

    config = uvicorn.Config(
        make_app(service, Limits(), measures), host="127.0.0.1", port=port, log_config=None
    )
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
    """The page, loaded; nothing may fail in it, and nothing may come from elsewhere."""
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
    page.goto(address)
    expect(page.locator("#list-a li")).to_have_count(10)
    yield page
    page.close()
    assert not errors
    assert not elsewhere


def titles(page, where="#list-a"):
    return page.locator(f"{where} .title").all_inner_texts()


def options(page, label):
    return page.get_by_label(label).evaluate("select => Array.from(select.options, option => option.value)")


def test_a_click_changes_the_list_and_pages_go_on(page):
    first = titles(page)
    expect(page.locator("#history-empty")).to_be_visible()
    page.get_by_role("button", name=f"Took {first[0]}", exact=True).first.click()
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
    page.keyboard.press("Tab")
    unnamed = page.evaluate(
        "Array.from(document.querySelectorAll('input, select')).filter(e => !e.labels || !e.labels.length).length"
    )
    assert unnamed == 0
