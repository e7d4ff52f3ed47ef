"""The page at /docs: what /openapi.json says, for people. HTML without a script, and nothing from elsewhere.

The usual pages over an OpenAPI document load their program from another host, which the server's content security
policy forbids, and which is not there without the internet.
"""

import html
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["reference_page"]

Json = Mapping[str, Any]

ADDRESS = "http://127.0.0.1:8000"  # in the examples
TYPES = "#/components/schemas/"
KINDS = {"string": "text", "integer": "whole number", "boolean": "true or false", "array": "list"}
RANGES = (
    ("minimum", "maximum", "", ""),
    ("minLength", "maxLength", " character", " characters"),
    ("minItems", "maxItems", " entry", " entries"),
    ("minProperties", "maxProperties", " entry", " entries"),
)
HEAD = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>jaxrec: the interface</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="page/page.css">
  <link rel="stylesheet" href="page/reference.css">
</head>
"""


def reference_page(document: Json) -> bytes:
    """An OpenAPI document as a page."""
    types = document["components"]["schemas"]
    requests = [
        (method, path, request)
        for path, methods in document["paths"].items()
        for method, request in methods.items()
    ]
    bodies = {body["$ref"] for _, _, request in requests if "$ref" in (body := _body(request))}
    told_alone = {name: told for name, told in types.items() if TYPES + name not in bodies}
    info = document["info"]
    page = _tag(
        "body",
        _tag("a", "Skip to the requests", class_="skip", href="#requests"),
        _tag(
            "header",
            _tag("h1", f"{info['title']}: the interface"),
            _tag("p", f"Version {info['version']}. {info['description']}"),
            _tag("p", _tag("a", "The page to try it on", href="./")),
        ),
        _tag(
            "div",
            _tag(
                "nav",
                _tag(
                    "ul",
                    *(_tag("li", _link(method, path)) for method, path, _ in requests),
                    _tag("li", _tag("a", "Types", href="#types")),
                ),
                aria_label="Requests",
            ),
            _tag(
                "main",
                _introduction(),
                *(_request(*request, types) for request in requests),
                _tag("h2", "Types", id="types"),
                *(_type(name, told) for name, told in told_alone.items()),
                id="requests",
                tabindex="-1",
            ),
            class_="reference",
        ),
    )
    return f"{HEAD}{page}\n</html>\n".encode()


class _Html(str):
    """Text that is HTML already; any other is escaped."""


def _tag(name: str, *parts: str, **attributes: str) -> _Html:
    """An element. An attribute is named as Python can: `class_`, `aria_label`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    return _Html(f"<{name}{given}>{_joined(parts)}</{name}>")


def _joined(parts: Iterable[str], between: str = "") -> _Html:
    return _Html(between.join(part if isinstance(part, _Html) else html.escape(part) for part in parts))


def _code(value: Any) -> _Html:
    return _tag("code", json.dumps(value, ensure_ascii=False))


def _prose(text: str) -> _Html:
    """A docstring's text: what is in backticks is code."""
    parts = text.split("`")
    return _joined(_tag("code", part) if place % 2 else part for place, part in enumerate(parts))


def _introduction() -> _Html:
    return _tag(
        "section",
        _tag(
            "p",
            "Bodies and answers are JSON; in bodies under /v1 a field that is not told here is an error. Where the "
            "server has a token, every request bears it: ",
            _tag("code", "curl -H 'Authorization: Bearer TOKEN' …"),
            " The same as an OpenAPI document: ",
            _tag("a", "openapi.json", href="openapi.json"),
            ".",
        ),
    )


def _anchor(method: str, path: str) -> str:
    return f"{method}{path}".replace("/", "-").replace("{", "").replace("}", "")


def _link(method: str, path: str) -> _Html:
    return _tag("a", _heading(method, path), href=f"#{_anchor(method, path)}")


def _heading(method: str, path: str) -> _Html:
    # A path may be broken where a part of it ends, so that it fits a telephone.
    parts = _joined(path.split("/"), "/<wbr>")
    return _joined([_tag("span", method.upper(), class_="method"), " ", _tag("code", parts)])


def _request(method: str, path: str, request: Json, types: Json) -> _Html:
    parameters, body = request.get("parameters", ()), _body(request)
    anchor = _anchor(method, path)
    parts = [
        _tag("h2", _heading(method, path), id=anchor),
        _tag("p", _prose(request.get("description") or request["summary"])),
    ]
    if parameters:
        fields = (
            _field(
                told["name"],
                {**told["schema"], "description": told.get("description", "")},
                required=told["required"],
                place=told["in"],
            )
            for told in parameters
        )
        parts += [_tag("h3", "Parameters"), _tag("dl", *fields)]
    if body:
        parts += [_tag("h3", "Body"), _fields(_resolved(body, types))]
    parts += [
        _tag("h3", "Answers"),
        _tag("dl", *_answers(request["responses"])),
        _tag("h3", "Example"),
        _tag("pre", _tag("code", _curl(method, path, parameters, body, types))),
    ]
    return _tag("section", *parts, aria_labelledby=anchor)


def _body(request: Json) -> Json:
    """The schema of a request's body; {} = it has none."""
    content = request.get("requestBody", {}).get("content", {})
    return content.get("application/json", {}).get("schema", {})


def _answers(responses: Json) -> Iterator[_Html]:
    """What is answered, with the statuses that are answered so."""
    statuses: dict[_Html, list[str]] = {}
    for status, told in responses.items():
        schema = told.get("content", {}).get("application/json", {}).get("schema", {})
        statuses.setdefault(_kind(schema), []).append(status)
    for kind, those in statuses.items():
        yield _tag("dt", ", ".join(those))
        yield _tag("dd", kind)


def _type(name: str, told: Json) -> _Html:
    parts = [
        _tag("h3", _tag("code", name), id=f"type-{name}"),
        _tag("p", _prose(told.get("description", ""))),
    ]
    parts.append(_fields(told) if "properties" in told else _tag("p", _kind(told), class_="kind"))
    return _tag("section", *parts, aria_labelledby=f"type-{name}")


def _fields(told: Json) -> _Html:
    required = told.get("required", ())
    fields = told.get("properties", {}).items()
    return _tag("dl", *(_field(name, field, required=name in required) for name, field in fields))


def _field(name: str, schema: Json, *, required: bool, place: str = "") -> _Html:
    """Its name, what it may be, and what it is for."""
    marks = [_tag("code", name)]
    if place:
        marks.append(_tag("span", f"in the {place}", class_="mark"))
    if required:
        marks.append(_tag("span", "required", class_="mark"))
    parts = [_tag("dt", _joined(marks, " ")), _tag("dd", _kind(schema), *_default(schema), class_="kind")]
    if told := schema.get("description"):
        parts.append(_tag("dd", _prose(told)))
    return _joined(parts)


def _default(schema: Json) -> list[str]:
    # The defaults of an object's fields are told where its type is.
    told = "default" in schema and not isinstance(schema["default"], Mapping)
    return ["; default ", _code(schema["default"])] if told else []


def _kind(schema: Json) -> _Html:
    """What a value may be, in words."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(TYPES)
        return _tag("a", name, href=f"#type-{name}")
    if "anyOf" in schema:
        return _joined((_kind(one) for one in schema["anyOf"]), " or ")
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return _joined(map(_code, schema["enum"]), ", ")
    kind = str(schema.get("type", "any JSON"))
    parts = [KINDS.get(kind, kind)]
    if bounds := list(_bounds(schema)):
        parts += [" (", _joined(bounds, ", "), ")"]
    of = schema.get("items") or schema.get("additionalProperties")
    if isinstance(of, Mapping):
        parts += [" of ", _kind(of)]
    return _joined(parts)


def _bounds(schema: Json) -> Iterator[_Html]:
    for least, most, one, many in RANGES:
        bounds = [_number(schema[key]) if key in schema else "" for key in (least, most)]
        unit = one if bounds[1] == "1" else many
        if all(bounds):
            yield _joined([" to ".join(dict.fromkeys(bounds)), unit])
        elif any(bounds):
            yield _joined([f"at least {bounds[0]}" if bounds[0] else f"at most {bounds[1]}", unit])
    for key, word in (("exclusiveMinimum", "above"), ("exclusiveMaximum", "below")):
        if key in schema:
            yield _joined([f"{word} {_number(schema[key])}"])
    if "pattern" in schema:
        yield _joined(["matching ", _tag("code", schema["pattern"])])
    if "propertyNames" in schema:
        yield _joined(["names of ", *_bounds(schema["propertyNames"])])


def _number(bound: float) -> str:
    """As people write it; FastAPI makes floats of whole numbers."""
    return f"{int(bound):,}" if float(bound).is_integer() else f"{bound}"


def _curl(method: str, path: str, parameters: Iterable[Json], body: Json, types: Json) -> str:
    for parameter in parameters:
        value = parameter["schema"].get("examples", [parameter["name"].upper()])[0]
        path = path.replace(f"{{{parameter['name']}}}", str(value))
    line = f"curl -s {'-X DELETE ' if method == 'delete' else ''}{shlex.quote(ADDRESS + path)}"
    if not body:
        return line
    example = shlex.quote(json.dumps(_example(body, types), ensure_ascii=False))
    return f"{line} \\\n  -H 'content-type: application/json' \\\n  -d {example}"


def _example(schema: Json, types: Json) -> Any:
    """A value: of an object what it must have, and what its schema has an example of."""
    schema = _resolved(schema, types)
    if "examples" in schema:
        return schema["examples"][0]
    if "const" in schema:
        return schema["const"]
    if "items" in schema:
        return [_example(schema["items"], types)]
    if "properties" in schema:
        required = schema.get("required", ())
        shown = {
            name: field
            for name, field in schema["properties"].items()
            if name in required or "examples" in field
        }
        return {name: _example(field, types) for name, field in shown.items()}
    return {"integer": 1, "number": 1.0, "boolean": True}.get(schema.get("type", ""), "text")


def _resolved(schema: Json, types: Json) -> Json:
    return {**types[schema["$ref"].removeprefix(TYPES)], **schema} if "$ref" in schema else schema
