"""All or nothing: a directory is built beside its final place and appears there by one rename."""

import contextlib
import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["staged_directory"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_WORDS = ("no space left", "disk quota", "file too large", "enospc")


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """An empty directory that becomes `out` when the block ends, and vanishes when it fails.

    Raises:
      OSError: the disk is full; the message says where and how much is free.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    staging = out.parent / f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _move_into_place(staging, out)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if _is_no_space(error):
            free = shutil.disk_usage(out.parent).free
            raise OSError(
                errno.ENOSPC,
                f"no space left while writing {out} ({free:,} bytes free after clean-up); nothing half-written was "
                f"left. Free some space or choose another --out ({error})",
            ) from error
        raise


def _is_no_space(error: BaseException) -> bool:
    """Python says it by number; the C++ writers of Arrow and ArrayRecord say it in words."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return isinstance(error, Exception) and any(word in str(error).lower() for word in _NO_SPACE_WORDS)


def _move_into_place(staging: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{socket.gethostname()}-{os.getpid()}"
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Directories of killed runs on this machine; those of a live process, or of another machine, stay."""
    host = socket.gethostname()
    for kind in ("partial", "old"):
        for left in out.parent.glob(f"{glob.escape(f'.{out.name}.{kind}-{host}-')}*"):
            number = left.name.rsplit("-", 1)[1]
            if number.isdigit() and not _is_alive(int(number)):
                # A run killed between the two renames leaves the former dataset under its old name only.
                if kind == "old" and not out.exists():
                    left.rename(out)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
