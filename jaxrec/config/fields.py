"""What the annotations of a config say: the fields of a class, the classes a field accepts, and their documentation.

A config is a tree of frozen dataclasses and of mappings from names to dataclasses; its leaves are numbers, strings,
booleans, None and tuples of them. Overrides, JSON and the help text all read the tree through this module.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any


def field_annotations(cls: type) -> dict[str, Any]:
    """Annotation by name of the fields that may be set, in their order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_optional(annotation: Any) -> bool:
    """Whether None is accepted."""
    return annotation is None or type(None) in alternatives(annotation)


def dataclass_types(annotation: Any) -> tuple[type, ...]:
    """The dataclasses that an annotation names."""
    return tuple(
        one for one in alternatives(annotation) if isinstance(one, type) and dataclasses.is_dataclass(one)
    )


def mapping_value(annotation: Any) -> Any | None:
    """The annotation of a mapping's values, or None where the annotation is no mapping from strings."""
    for one in alternatives(annotation):
        origin = typing.get_origin(one)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            key, value = typing.get_args(one)
            if key is str:
                return value
    return None


def class_choices(annotation: Any) -> dict[str, type]:
    """The classes that fit an annotation, by name: those it names and their subclasses that are imported."""
    choices: dict[str, type] = {}
    waiting = list(dataclass_types(annotation))
    while waiting:
        cls = waiting.pop(0)
        if dataclasses.is_dataclass(cls):
            choices.setdefault(cls.__name__, cls)
        waiting += cls.__subclasses__()
    return choices


def type_name(annotation: Any) -> str:
    """An annotation as a user would write it."""
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(annotation))
    parts = alternatives(annotation)
    if len(parts) > 1:
        return " | ".join(type_name(part) for part in parts)
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is not None:
        arguments = ", ".join(
            "..." if one is Ellipsis else type_name(one) for one in typing.get_args(annotation)
        )
        return f"{typing.get_origin(annotation).__name__}[{arguments}]"
    return getattr(annotation, "__name__", str(annotation))


def is_config(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, annotation, value) of every leaf; an empty mapping has none."""
    if is_config(config):
        children = [(name, annotation, getattr(config, name)) for name, annotation in _annotations(config)]
    else:
        children = [(str(name), None, value) for name, value in config.items()]
    for name, annotation, value in children:
        path = f"{prefix}.{name}" if prefix else name
        if is_config(value) or isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, annotation, value


def _annotations(config: Any) -> list[tuple[str, Any]]:
    return list(field_annotations(type(config)).items())


def did_you_mean(word: str, choices: list[str]) -> str:
    """ "; did you mean ...?" where one of `choices` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def field_docs(cls: type) -> dict[str, str]:
    """What the `Attributes:` sections of a class and of its bases say of each field."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _attributes_section(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return docs


def _attributes_section(doc: str) -> dict[str, str]:
    """Entries `name: text` or `name, name: text`; a deeper indented line goes on with the entry above it."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return {}
    lines = [line for line in section.group(1).splitlines() if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[tuple[list[str], list[str]]] = []
    for line in lines:
        start = re.match(r"(\w+(?:, \w+)*): *(.*)", line[margin:])
        if start:
            entries.append((start.group(1).split(", "), [start.group(2)]))
        elif entries:
            entries[-1][1].append(line.strip())
    return {name: " ".join(text) for names, text in entries for name in names}
