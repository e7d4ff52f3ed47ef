"""A version appears whole or not at all: it is written beside its place, synced to the disk, and renamed."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxrec.export.manifest import check_name

TEMPORARY_PREFIX = ".export-"  # no version begins with a dot, so that readers see no half one


@contextlib.contextmanager
def new_version(out: Path, version: str) -> Iterator[Path]:
    """A directory to fill, which becomes `out/version` when the block ends well and is removed when it does not.

    A process that is killed leaves a hidden `.export-*` directory, which nothing reads and anyone may remove.

    Raises:
      ValueError: the name is not strict, or the version is there.
    """
    final = out / check_name(version)
    if final.exists():
        raise ValueError(
            f"{final} is there already, and versions are never changed; choose another --version."
        )
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f"{TEMPORARY_PREFIX}{version}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if final.exists():
            raise ValueError(f"{final} was exported by another process meanwhile; choose another --version.")
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(out)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
