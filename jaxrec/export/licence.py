"""Whose the data are that a model has learned from, as far as that is known; nothing is guessed."""

import re
from pathlib import Path

from jaxrec.data.config import DataConfig

EMBEDDED = (
    "MovieLens latest-small (F. M. Harper and J. A. Konstan, ACM TiiS 2015): research and non-commercial use only, by "
    "the terms that lie beside the data in the package."
)
README = "README.md"
MOST_CHARACTERS = 1000

_LINE = re.compile(r"^[ *_#>-]*licen[cs]e[*_]*:[ *_]*([^\s*_].*)$", re.IGNORECASE | re.MULTILINE)


def licence_of(data: DataConfig) -> str:
    """The licence of a run's data; "" = it is not known.

    Of a source that joins several directories each is named, with its own.
    """
    if data.source is None:
        return _of_path(data.path)
    found = {name: _of_path(path) for name, path in data.source.places.items()}
    if not any(found.values()):
        return ""
    return "\n".join(f"- `{name}`: {licence or 'Not stated.'}" for name, licence in found.items())


def _of_path(path: str) -> str:
    """What `data.path` says, or what the README of a directory says in a line such as `Licence: CC BY 4.0`."""
    if not path:
        return EMBEDDED
    readme = Path(path) / README
    if not readme.is_file():
        return ""
    line = _LINE.search(readme.read_text(encoding="utf-8", errors="replace"))
    return line[1].strip()[:MOST_CHARACTERS] if line else ""
