"""Overrides on the command line: `--config.optimizer.learning_rate=3e-4`, typed by the annotations of the fields.

All overrides of a command are applied together, from the leaves up, so that two fields that must agree can change
in one command. A mapping is addressed by its keys (`--config.tasks.next_item.weight=2`; `=none` takes a key out), and
where its values are plain, by all that follows: keys may hold dots (`--config.optimizer.rates.encoder.*=0`). A field
that accepts several classes takes the name of one of them (`--config.data.split=GlobalTime`); a class is made with
the overrides below it, which must give the fields that have no default.
"""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxrec.config.fields import (
    alternatives,
    class_choices,
    dataclass_types,
    did_you_mean,
    field_annotations,
    field_docs,
    is_config,
    is_optional,
    leaves,
    mapping_value,
    type_name,
)

Config = TypeVar("Config")

# Text that needs no quotes in a list, nor in a shell.
PLAIN_WORD = re.compile(r"[\w@./-]+", re.ASCII)
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass
class _Change:
    """What the overrides ask of one node of the tree: a text for the node itself, and changes below it.

    Attributes:
      number: the text's place in the command.
    """

    text: str | None = None
    number: int = 0
    below: dict[str, "_Change"] = dataclasses.field(default_factory=dict)

    def by_dotted_key(self) -> dict[str, "_Change"]:
        """The changes below that bring a text, by all that is left of their paths, in the order of the command."""
        found = {name: change for name, change in self.below.items() if change.text is not None}
        for name, change in self.below.items():
            found |= {f"{name}.{key}": below for key, below in change.by_dotted_key().items()}
        return dict(sorted(found.items(), key=lambda item: item[1].number))


def split_overrides(arguments: Sequence[str], *, prefix: str = "config") -> tuple[list[str], list[str]]:
    """(dotted overrides, everything else) of a command line."""
    start = f"--{prefix}."
    overrides = [argument for argument in arguments if argument.startswith(start)]
    return overrides, [argument for argument in arguments if not argument.startswith(start)]


def apply_overrides(config: Config, overrides: Sequence[str], *, prefix: str = "config") -> Config:
    """A copy of `config` with `--prefix.field.field=value` applied; where a path comes twice, the last one counts.

    Raises:
        ValueError: an argument is not of that form, names an unknown field, or its value has another type than the
            field; or the classes refuse the values together.
    """
    root = _Change()
    for number, argument in enumerate(overrides):
        path, equals, text = argument.partition("=")
        start = f"--{prefix}."
        names = path.removeprefix(start).split(".")
        if not path.startswith(start) or not equals or not all(names):
            raise ValueError(
                f"{argument!r} is not an override; write {start}FIELD=VALUE, without spaces around '='."
            )
        node = root
        for name in names:
            node = node.below.setdefault(name, _Change())
        node.text, node.number = text, number
    return _changed(config, type(config), root, prefix, config)


def _changed(value: Any, annotation: Any, change: _Change, path: str, root: Any) -> Any:
    if change.text is not None:
        cls = class_choices(annotation).get(change.text)
        if cls is not None:
            return _made(cls, change, path, root)
        value = parse_value(annotation, change.text, path)
    if not change.below:
        return value
    if value is None and len(classes := list(class_choices(annotation).values())) == 1:
        return _made(classes[0], change, path, root)  # an optional part that is asked for now
    if value is None and mapping_value(annotation) is not None:
        value = {}  # likewise, or a required field of a class that is made now
    if is_config(value):
        present = {name: getattr(value, name) for name in field_annotations(type(value))}
        return _with_fields(type(value), present, change, path, root)
    if isinstance(value, Mapping):
        return _changed_keys(value, annotation, change, path, root)
    names = ", ".join(_shown_choices(annotation))
    remedy = f"set it first: --{path}=CLASS, with CLASS one of {names}" if names else f"write --{path}=VALUE"
    raise ValueError(f"{path} is {value!r} and has no field {next(iter(change.below))!r}; {remedy}.")


def _made(cls: type, change: _Change, path: str, root: Any) -> Any:
    """A new `cls` of its defaults and the changes."""
    present = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            present[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            present[field.name] = field.default_factory()
    return _with_fields(cls, present, change, path, root)


def _with_fields(cls: type, present: dict[str, Any], change: _Change, path: str, root: Any) -> Any:
    """`cls` of the `present` fields and the changes; a required field may be in neither."""
    annotations = field_annotations(cls)
    for name in change.below:
        if name not in annotations:
            raise ValueError(_unknown(name, list(annotations), path, cls.__name__, root))
    changes = {
        name: _changed(present.get(name), annotations[name], below, f"{path}.{name}", root)
        for name, below in change.below.items()
    }
    missing = [name for name in annotations if name not in present and name not in changes]
    if missing:
        them = " ".join(_giving(f"{path}.{name}", annotations[name]) for name in missing)
        raise ValueError(f"{path}: {cls.__name__} needs {', '.join(missing)}; give {them}.")
    try:
        return cls(**(present | changes))
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{path}.{name}" for name in changes) or path
        raise ValueError(f"{error} (set by {given})") from error


def _giving(path: str, annotation: Any) -> str:
    """The form of an override that gives a field."""
    of_values = mapping_value(annotation)
    if of_values is not None:
        path, annotation = f"{path}.KEY", of_values
    return f"--{path}={'|'.join(_shown_choices(annotation)) or 'VALUE'}"


def _changed_keys(
    value: Mapping[str, Any], annotation: Any, change: _Change, path: str, root: Any
) -> dict[str, Any]:
    of_values = mapping_value(annotation)
    result = dict(value)
    plain = not dataclass_types(of_values) and mapping_value(of_values) is None
    for name, below in (change.by_dotted_key() if plain else change.below).items():
        is_removal = below.text is not None and below.text.lower() == "none" and not is_optional(of_values)
        # A class or a plain value may bring a new key; a field below it, or its removal, needs an old one.
        if name not in result and (below.text is None or is_removal):
            choices = ", ".join(_shown_choices(of_values))
            adding = f" To add it: --{path}.{name}=CLASS, with CLASS one of {choices}." if choices else ""
            raise ValueError(_unknown(name, list(result), path, "mapping", root) + adding)
        if is_removal:
            del result[name]
            continue
        # Of plain values the order may count (`optimizer.rates`), and what is said later goes last.
        old = result.pop(name, None) if plain else result.get(name)
        result[name] = _changed(old, of_values, below, f"{path}.{name}", root)
    return result


def _unknown(name: str, known: list[str], path: str, owner: str, root: Any) -> str:
    hint = did_you_mean(name, known)
    if not hint:
        prefix = path.split(".")[0]
        elsewhere = [f"{prefix}.{leaf}" for leaf, _, _ in leaves(root) if leaf.split(".")[-1] == name]
        hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    kind = "key" if owner == "mapping" else "field"
    has = f"its {kind}s: {', '.join(known)}" if known else f"it has no {kind}s"
    return f"{path} has no {kind} {name!r}{hint} ({owner}; {has})."


def parse_value(annotation: Any, text: str, path: str) -> Any:
    """The value that `text` stands for under an annotation: a plain one, as a class is made with its fields.

    Raises:
        ValueError: the text does not fit; the message names the path, the text and what is expected.
    """
    options = alternatives(annotation)
    # Exact kinds go before strings, which accept anything: under `int | str`, "3" is a number.
    for option in sorted(options, key=lambda one: one is str):
        try:
            return _parse_one(option, text)
        except ValueError:
            continue
    choices = class_choices(annotation)
    if choices:
        none = "none or " if is_optional(annotation) else ""
        raise ValueError(
            f"{path}={text!r}: expected {none}one of the classes {', '.join(_shown_choices(annotation))}"
            f"{did_you_mean(text, [*choices]) or '.'} Or set one field of it: --{path}.FIELD=VALUE."
        )
    if mapping_value(annotation) is not None:
        raise ValueError(f"{path}={text!r}: set its keys one by one: --{path}.KEY=VALUE.")
    raise ValueError(f"{path}={text!r}: expected {_expected(annotation)}.")


def _expected(annotation: Any) -> str:
    name = type_name(annotation)
    if any(typing.get_origin(one) is tuple for one in alternatives(annotation)):
        return f"{name}, such as 1,2 or [] for none"
    return "true or false" if annotation is bool else name


def _parse_one(option: Any, text: str) -> Any:
    """Raises ValueError where the text does not fit; the caller writes the message."""
    origin = typing.get_origin(option)
    if option is type(None):
        if text.lower() != "none":
            raise ValueError
        return None
    if option is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError
        return BOOLEANS[text.lower()]
    if option is int:
        return int(text)
    if option is float:
        if math.isnan(number := float(text)):
            raise ValueError
        return number
    if option is str:
        return text
    if origin is typing.Literal:
        for value in typing.get_args(option):
            if str(value) == text:
                return value
        raise ValueError
    if origin is tuple:
        return _parse_tuple(option, text)
    raise ValueError


def _parse_tuple(option: Any, text: str) -> tuple[Any, ...]:
    items = _tuple_items(text)
    kinds = typing.get_args(option)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    elif len(kinds) != len(items):
        raise ValueError
    return tuple(parse_value(kind, item, "") for kind, item in zip(kinds, items, strict=True))


def _tuple_items(text: str) -> list[str]:
    """`1,2`, `(1, 2)`, `[1, 2]`; or a JSON list, where a string holds a comma."""
    text = text.strip()
    if text.startswith("["):
        try:
            values = json.loads(text)
            return [value if isinstance(value, str) else json.dumps(value) for value in values]
        except ValueError:
            pass
    if (text[:1], text[-1:]) in {("(", ")"), ("[", "]")}:
        text = text[1:-1].strip()
    items = [item.strip() for item in text.split(",")]
    # A trailing comma ends the list, as in Python; a lone empty text is the empty list.
    return items[:-1] if items[-1] == "" else items


def format_value(value: Any) -> str:
    """The text that `parse_value` turns back into `value`."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        if all(not isinstance(one, str) or PLAIN_WORD.fullmatch(one) for one in value):
            return ",".join(format_value(one) for one in value) or "[]"
        return json.dumps(list(value), ensure_ascii=False)
    return repr(value) if isinstance(value, float) else str(value)


def describe_fields(config: Any, *, prefix: str = "config") -> str:
    """Every field of the tree with its value, type and documentation: the second half of a `--help`."""
    lines: list[str] = []
    _describe(config, prefix, None, lines)
    return "\n".join(lines)


def _describe(config: Any, path: str, annotation: Any, lines: list[str]) -> None:
    owner = type(config)
    if is_config(config):
        children = [(name, hint, getattr(config, name)) for name, hint in field_annotations(owner).items()]
        docs = field_docs(owner)
        doc = owner.__doc__ or ""
        # Without a docstring a dataclass has its own signature there.
        summary = "" if doc.startswith(f"{owner.__name__}(") else " - " + doc.strip().partition("\n")[0]
        others = [name for name in _shown_choices(annotation) if name != owner.__name__]
        instead = f" (or --{path}={'|'.join(others)})" if others else ""
        lines.append(f"\n{path}: {owner.__name__}{summary.rstrip(' -')}{instead}")
    else:
        of_values = mapping_value(annotation)
        children = [(name, of_values, value) for name, value in config.items()]
        docs = {}
        choices = "|".join(_shown_choices(of_values)) or "VALUE"
        lines.append(f"\n{path}: --{path}.NAME={choices} adds one, --{path}.NAME=none takes one out")
    inner = []
    for name, hint, value in children:
        if is_config(value) or isinstance(value, Mapping):
            inner.append((f"{path}.{name}", hint, value))
            continue
        lines.append(f"  --{path}.{name}={format_value(value)}  ({type_name(hint)})")
        if name in docs:
            lines.append(f"      {docs[name]}")
    for child_path, hint, value in inner:
        _describe(value, child_path, hint, lines)


def _shown_choices(annotation: Any) -> list[str]:
    """The classes worth naming: a base that has subclasses is there to be derived from."""
    bases = {cls for cls in dataclass_types(annotation) if cls.__subclasses__()}
    return [name for name, cls in class_choices(annotation).items() if cls not in bases]
