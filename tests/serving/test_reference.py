"""The page at /docs: all that /openapi.json says, as HTML that is whole; and what it says to send is answered."""

import asyncio
import collections
import html.parser
import json
import shlex

import httpx
import pytest

from jaxrec.serving.app import make_app
from jaxrec.serving.guard import Limits
from jaxrec.serving.reference import ADDRESS, reference_page

VOID = {"meta", "link", "wbr"}


class Page(html.parser.HTMLParser):
    """What is on a page; a tag that is not closed, or twice, is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.labels = [], collections.Counter(), [], []
        self.texts = collections.defaultdict(list)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs)
        assert tag not in ("script", "style") and not any(name.startswith("on") for name in given)
        assert "style" not in given, "the content security policy has no inline code"
        self.ids.update([given["id"]] if "id" in given else [])
        self.links += [given["href"]] if tag == "a" else []
        self.labels += [given["aria-labelledby"]] if "aria-labelledby" in given else []
        if tag not in VOID:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture
def ask(tmp_path, make_service):
    """A function that asks a server of its own, without a socket; `requests` are methods, paths and bodies."""

    def answers(*requests, versions=()):
        async def main():
            service = make_service(None, tmp_path)
            for version in versions:
                service.live.install(version)
            transport = httpx.ASGITransport(app=make_app(service, Limits(), service.measures))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                found = [await http.request(method, path, json=body) for method, path, body in requests]
            await service.close()
            return found

        return asyncio.run(main())

    return answers


DOCUMENT, PAGE = (("GET", path, None) for path in ("/openapi.json", "/docs"))


def test_all_that_the_document_says_is_on_the_page(ask):
    described, answer, again = ask(DOCUMENT, PAGE, PAGE)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == again.content
    page, document = Page(answer.text), described.json()
    assert set(page.ids.values()) == {1}
    assert {link[1:] for link in page.links if link.startswith("#")} | set(page.labels) <= set(page.ids)
    assert [link for link in page.links if not link.startswith("#")] == ["./", "openapi.json"]
    headings = [
        f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods
    ]
    assert len(headings) > 15
    assert [text for text in page.texts["h2"] if text != "Types"] == headings
    assert len(page.texts["pre"]) == len(headings)
    for told in document["components"]["schemas"].values():
        for name, field in told.get("properties", {}).items():
            assert name in page.texts["dt"] or f"{name} required" in page.texts["dt"]
            assert field["description"].replace("`", "") in page.texts["dd"]
    kinds = page.texts["dd"]
    assert "whole number (1 to 100); default 10" in kinds
    assert 'text (at most 64 characters, matching ^[A-Za-z0-9._-]*$); default ""' in kinds
    assert "list (at most 1,000 entries) of Key or null" in kinds
    assert (
        "object (at most 50 entries, names of 1 to 64 characters) of number (-1,000,000 to 1,000,000)"
        in kinds
    )
    assert "number (at most 1, above 0) or null" in kinds
    assert "list (2 entries) of whole number" in kinds
    assert "user_id in the path required" in page.texts["dt"]


def test_whatever_a_document_says_is_text(ask):
    info = ask(DOCUMENT)[0].json()["info"]
    bad = "<script>alert('1')</script>&lt;\"'"
    request = {
        "description": bad,
        "parameters": [
            {"name": bad, "in": bad, "required": False, "schema": {"pattern": bad, "default": bad}}
        ],
        "requestBody": {"content": {"application/json": {"schema": {"const": bad}}}},
        "responses": {bad: {"content": {"application/json": {"schema": {"enum": [bad]}}}}},
    }
    types = {bad: {"description": bad, "properties": {bad: {"type": bad, "description": bad}}}}
    page = Page(
        reference_page(
            {"info": info, "paths": {bad: {bad: request}}, "components": {"schemas": types}}
        ).decode()
    )
    assert page.texts["h2"][0] == f"{bad.upper()} {bad}"
    assert bad in page.texts["p"]
    assert bad in page.texts["dd"]
    assert bad in page.texts["h3"]


def test_what_the_page_says_to_send_is_answered(ask, version):
    requests = []
    for command in Page(ask(PAGE)[0].text).texts["pre"]:
        program, quiet, *words = shlex.split(command.replace("\\\n", "").replace("VERSION", "v1"))
        assert (program, quiet) == ("curl", "-s")
        method = "GET"
        if words[0] == "-X":
            method, words = words[1], words[2:]
        address, *rest = words
        path = address.removeprefix(ADDRESS)
        if rest:
            header, kind, data, body = rest
            assert (header, kind, data) == ("-H", "content-type: application/json", "-d")
            requests.append(("POST", path, json.loads(body)))
        else:
            requests.append((method, path, None))

    for request, answer in zip(requests, ask(*requests, versions=[version]), strict=True):
        assert answer.status_code in (200, 201), (request, answer.text)
    assert {method for method, _, _ in requests} == {"GET", "POST", "DELETE"}
