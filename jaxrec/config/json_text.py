"""A config as JSON text and back, classes by "module:qualname".

Reading is strict, since the text may come from somewhere else: a class is used only where the annotation of its
field accepts it, every value is checked against its annotation, and the only code that runs is the import of the
named module and the checks of the dataclass itself. Modules of jaxrec and modules that are imported already are
looked up; any other module (a user's own task) is imported by its name, as an `import` line in a config file would
do, if it is not of Python's standard library. Nothing is ever evaluated or unpickled.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxrec.config.fields import (
    alternatives,
    dataclass_types,
    did_you_mean,
    field_annotations,
    is_config,
    mapping_value,
    type_name,
)

Config = TypeVar("Config")

CLASS = "class"
CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
# Modules that exist only while one process has a config file loaded.
CONFIG_FILE_MODULE = "jaxrec_config_file_"
MAX_DEPTH = 64


def to_json(config: Any) -> str:
    """The JSON text of a config.

    Raises:
        ValueError: a value has no JSON form, or a class cannot be imported by another process.
    """
    return json.dumps(_encoded(config, "config"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str, expected: type[Config]) -> Config:
    """The config that `to_json` wrote; a field that the text lacks has its default.

    Raises:
        ValueError: the text is not JSON, names a class that the field does not accept or that cannot be imported, or
            holds an unknown field or a value of another type.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config is not JSON: {error}") from error
    return _decoded(expected, value, "config", 0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _encoded(value: Any, path: str) -> Any:
    if is_config(value):
        cls = type(value)
        fields = {name: _encoded(getattr(value, name), f"{path}.{name}") for name in field_annotations(cls)}
        return {CLASS: _class_name(cls, path), **fields}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"{path} has a key that is not a string: {list(value)}.")
        return {name: _encoded(one, f"{path}.{name}") for name, one in value.items()}
    if isinstance(value, tuple):
        return [_encoded(one, f"{path}[{number}]") for number, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity; `float` reads the word back
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{path} is a {type(value).__name__}, and a config holds numbers, strings, booleans, None, tuples, mappings and"
        " dataclasses of them."
    )


def _class_name(cls: type, path: str) -> str:
    name = f"{cls.__module__}:{cls.__qualname__}"
    homeless = cls.__module__ == "__main__" or cls.__module__.startswith(CONFIG_FILE_MODULE)
    if homeless or "<" in cls.__qualname__ or not CLASS_NAME.fullmatch(name):
        raise ValueError(
            f"{path}: class {cls.__qualname__} is defined in a config file, a script or a function, where evaluate and"
            " recommend cannot import it; move it to a module of its own, and import it from there."
        )
    return name


def _decoded(annotation: Any, value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict) and (classes := dataclass_types(annotation)) and CLASS in value:
        return _decoded_class(classes, value, path, depth)
    of_values = mapping_value(annotation)
    if isinstance(value, dict) and of_values is not None:
        return {name: _decoded(of_values, one, f"{path}.{name}", depth + 1) for name, one in value.items()}
    for option in alternatives(annotation):
        try:
            return _decoded_plain(option, value, path, depth)
        except TypeError:
            continue
    shown = json.dumps(value)
    raise ValueError(
        f"{path} is {shown[:80]}{'...' if len(shown) > 80 else ''}, and its type is {type_name(annotation)}."
    )


def _decoded_class(classes: tuple[type, ...], value: dict[str, Any], path: str, depth: int) -> Any:
    cls = _class_of(value[CLASS], classes, path)
    annotations = field_annotations(cls)
    for name in value:
        if name != CLASS and name not in annotations:
            raise ValueError(
                f"{path} has no field {name!r}{did_you_mean(name, list(annotations))} ({cls.__name__}; its fields:"
                f" {', '.join(annotations)})."
            )
    values = {
        name: _decoded(annotations[name], one, f"{path}.{name}", depth + 1)
        for name, one in value.items()
        if name != CLASS
    }
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _class_of(name: Any, expected: tuple[type, ...], path: str) -> type:
    """The class of that name, once it is known to be one that the field accepts."""
    if not isinstance(name, str) or not CLASS_NAME.fullmatch(name):
        raise ValueError(f"{path}: {name!r} is not the name of a class; write 'module:Class'.")
    module_name, _, qualname = name.partition(":")
    found: Any = _module(module_name, path)
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, type) or hasattr(found, "__dict__") else None
    accepted = " or ".join(cls.__name__ for cls in expected)
    if not isinstance(found, type):
        raise ValueError(f"{path}: {module_name} has no class {qualname}; expected a {accepted}.")
    if not issubclass(found, expected) or not dataclasses.is_dataclass(found):
        raise ValueError(f"{path}: {name} is not a {accepted}, which the field accepts.")
    return found


def _module(name: str, path: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    root = name.split(".")[0]
    if root in sys.stdlib_module_names:
        raise ValueError(f"{path}: {name} is a module of Python itself, and holds no class of a config.")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{path}: module {name} cannot be imported ({error}); install it, or put its directory on PYTHONPATH."
        ) from error


def _decoded_plain(option: Any, value: Any, path: str, depth: int) -> Any:
    """Raises TypeError where the value is not of the option's kind; the caller tries the next one."""
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        if any(value == one and type(value) is type(one) for one in typing.get_args(option)):
            return value
    elif origin is tuple and isinstance(value, list):
        kinds = typing.get_args(option)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(
                _decoded(kind, one, f"{path}[{number}]", depth + 1)
                for number, (kind, one) in enumerate(zip(kinds, value, strict=True))
            )
    elif option is float and value in ("inf", "-inf", "nan"):
        return float(value)
    elif type(value) is option or (option is float and type(value) is int):
        return value
    raise TypeError
