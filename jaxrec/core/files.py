"""Files that are there whole or not at all: a kill or an error leaves the old one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place beside `path` to write to; what lies there takes the name of `path` at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text, as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
