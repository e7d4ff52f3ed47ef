"""Versions on disk: which there are, and taking new ones into use while the server runs."""

import asyncio
import json
import logging
from pathlib import Path

from jaxrec.serving.service import Service

__all__ = ["Watcher", "versions_in"]

MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 16 << 20

log = logging.getLogger(__name__)


def versions_in(directory: Path) -> list[Path]:
    """The versions below a directory, or the directory itself where it is one; the oldest first.

    Raises:
      ValueError: there is none.
    """
    if (directory / MANIFEST).is_file():
        return [directory]
    inside = directory.iterdir() if directory.is_dir() else ()
    found = [
        (_created(path), path.name, path)
        for path in inside
        if not path.name.startswith(".") and (path / MANIFEST).is_file()
    ]
    if not found:
        raise ValueError(f"{directory} holds no exported version; make one with python -m jaxrec.export.")
    return [path for _, _, path in sorted(found)]


def _lying(directory: Path) -> tuple:
    """Names, sizes and times of the files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _created(path: Path) -> str:
    """When the version was made; "" where its manifest does not say: such a version is the oldest."""
    try:
        manifest = path / MANIFEST
        if manifest.stat().st_size > MOST_MANIFEST_BYTES:
            return ""
        return str(json.loads(manifest.read_text(encoding="utf-8"))["facts"]["created"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


class Watcher:
    """Looks for newer versions now and then; one that cannot be loaded is passed over, and the old one answers on."""

    def __init__(self, service: Service, directory: Path, seconds: float):
        self._service, self._directory, self._seconds = service, directory, seconds
        self._known: set[str] = set()
        self._refused: dict[str, tuple] = {}  # what lay there when it was refused
        self._task: asyncio.Task[None] | None = None

    async def load_first(self, also: set[str]) -> None:
        """Loads the newest version that is not the shadow, and those that are named.

        Raises:
          ValueError: there is none, or it is damaged.
        """
        paths = versions_in(self._directory)
        heard = [path for path in paths if path.name != self._service.options.shadow] or paths
        for path in paths:
            if path == heard[-1] or path.name in also:
                await self._service.live.load(path)
        self._known = {path.name for path in paths}
        missing = also - self._known
        if missing:
            raise ValueError(
                f"version {min(missing)!r} is named by an option, but {self._directory} has "
                f"{', '.join(sorted(self._known))}; name one of these."
            )

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Looks no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look_once(self) -> list[str]:
        """Takes what is new and newer than the newest into use; returns the names. What is gone is dropped: a rollback.

        Where all that answer are gone, the newest of those that lie there is loaded first; where there is none, the
        last one answers on. One that was refused is tried again when its files have changed: it may have been copied
        meanwhile.
        """
        live = self._service.live
        loaded: list[str] = []
        heard = [name for name in live.names if name != self._service.options.shadow]
        gone = [name for name in heard if await asyncio.to_thread(self._is_gone, name)]
        if gone and gone == heard:
            loaded += await self._take_newest()
            gone = gone if loaded else gone[:-1]
        for name in gone:
            if name in live and name not in loaded:
                live.drop(name)
                log.info("version %s is gone: %s answers now", name, live.newest.version.name)
        for path in await asyncio.to_thread(self._unknown):
            loaded += await self._take(path)
        return loaded

    async def _take_newest(self) -> list[str]:
        """The name of the newest version that is not in use and can be taken into use; [] = there is none."""
        live = self._service.live
        in_use = {live.named(name).version.bundle.directory for name in live.names}
        for path in reversed(await asyncio.to_thread(versions_in, self._directory)):
            if path not in in_use and (taken := await self._take(path)):
                return taken
        return []

    async def _take(self, path: Path) -> list[str]:
        """The name of a version that is taken into use; [] = it is refused, or was as it lies there."""
        lying = await asyncio.to_thread(_lying, path)
        if self._refused.get(path.name) == lying:
            return []
        try:
            name = await self._service.live.load(path)
        except Exception as error:
            self._refused[path.name] = lying
            self._service.measures.reload_failed()
            log.error("version %s is not taken into use: %s", path.name, error)
            return []
        self._known.add(path.name)
        share = self._service.live.share_of(name)
        log.info("version %s answers now: %.0f %% of the users", name, 100 * share)
        return [name]

    def _is_gone(self, name: str) -> bool:
        """Whether the directory of a version that no option names was removed."""
        if self._service.live.is_kept(name):
            return False
        directory = self._service.live.named(name).version.bundle.directory
        return directory.parent.is_dir() and not (directory / MANIFEST).exists()

    def _unknown(self) -> list[Path]:
        """The versions that came after the newest of those that were taken into use."""
        paths = versions_in(self._directory)
        known = [number for number, path in enumerate(paths) if path.name in self._known]
        self._known &= {path.name for path in paths}
        self._refused = {path.name: self._refused[path.name] for path in paths if path.name in self._refused}
        return paths[known[-1] + 1 :] if known else paths

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look_once()
            except Exception as error:
                log.error("looking for versions failed: %s", error)
