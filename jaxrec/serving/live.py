"""The versions in use: each with its batches and its catalogue, and which of them answers whom.

Use it on one event loop.
"""

import asyncio
import contextlib
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxrec.export.bundle import Bundle
from jaxrec.export.catalogue import Key
from jaxrec.export.layout import SERVED_PROGRAMS, STABLEHLO
from jaxrec.export.manifest import Manifest
from jaxrec.serving.batcher import Batcher
from jaxrec.serving.measures import Measures
from jaxrec.serving.precompile import precompile
from jaxrec.serving.ranker import Judged, Needs, ToJudge
from jaxrec.serving.store import Store
from jaxrec.serving.version import History, Query, Version
from jaxrec.serving.view import View

__all__ = ["Live", "LiveVersions", "UnknownError"]

TURN_SECONDS = 5e-5  # of a thread, while a version is loaded
VERSIONS_KEPT = 2  # the newest and the one to go back to
LOADER_NICENESS = 10  # not the most: on a full machine it would hold the interpreter and not be let on


class UnknownError(LookupError):
    """Something that a request names is not there."""


class Live:
    """A version with its batches and the latest view of its catalogue.

    Attributes:
      ranker: None = the formula names no task heads.
    """

    def __init__(
        self,
        version: Version,
        batcher: Batcher[History, Query],
        ranker: Batcher[ToJudge, Judged] | None = None,
    ):
        self.version, self.batcher, self.ranker = version, batcher, ranker
        self._view: View | None = None

    async def close(self) -> None:
        """Takes nothing more, and answers what waits: the tower's first, whose answers the ranker is asked with."""
        await self.batcher.close()
        if self.ranker is not None:
            await self.ranker.close()

    def view(self, store: Store) -> View:
        """The catalogue as the store has it now."""
        revision = store.revision()
        if self._view is None or self._view.revision != revision:
            self._view = View.of(self.version, store.items(), store.hidden(), revision, self._view)
        return self._view


class LiveVersions:
    """The versions in use, the newest last.

    A shadow is never the newest, and has no share, while another version is in use.
    """

    def __init__(
        self,
        batcher_of: Callable[[Version], Batcher[History, Query]],
        store: Store,
        measures: Measures,
        *,
        shares: Mapping[str, float],
        shadow: str = "",
        needs: Needs = Needs(),
        ranker_of: Callable[[Version], Batcher[ToJudge, Judged] | None] = lambda version: None,
    ):
        """Empty.

        Args:
          shares: version -> its share of the users; {} = the newest version has all.
          shadow: the version that is asked too, and never heard; "" = none. It stays when newer ones come, and so do
            those with a share.
          needs: what a version must have; one that lacks it is refused.
          ranker_of: compiles the task heads that the formula names.
        """
        self._needs, self._ranker_of = needs, ranker_of
        self._batcher_of, self._store, self._measures = batcher_of, store, measures
        self._shadow, self._kept = shadow, {*shares, shadow}
        self._shares = {name: share for name, share in shares.items() if name != shadow}
        self._live: dict[str, Live] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=_stand_back)

    def __contains__(self, name: str) -> bool:
        return name in self._live

    def __len__(self) -> int:
        return len(self._live)

    @property
    def names(self) -> list[str]:
        """The newest last; a shadow first, however new it is."""
        return sorted(self._live, key=lambda name: name != self._shadow)

    @property
    def newest(self) -> Live:
        """The one that is asked where nothing else is said.

        Raises:
          UnknownError: there is none yet.
        """
        if not self._live:
            raise UnknownError("no model is loaded.")
        return self._live[self.names[-1]]

    def named(self, name: str) -> Live:
        """Raises UnknownError where there is none of this name."""
        if name not in self._live:
            raise UnknownError(f"version {name!r} is not loaded; there are {', '.join(self._live)}.")
        return self._live[name]

    def of_user(self, user_id: Key | None) -> Live:
        """The version that the user has been dealt, the same each time."""
        shares = {key: share for key, share in self._shares.items() if key in self._live}
        if not shares or user_id is None:
            return self.newest
        digest = hashlib.blake2b(str(user_id).encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "big") / 2**64 * sum(shares.values())
        for key, share in shares.items():
            if drawn < share:
                return self._live[key]
            drawn -= share
        return self.newest

    def is_kept(self, name: str) -> bool:
        """Whether an option names the version, so that it stays."""
        return name in self._kept

    def share_of(self, name: str) -> float:
        """Of the users that have an id, those that the version is dealt."""
        shares = {key: share for key, share in self._shares.items() if key in self._live}
        if not shares:
            return float(name == self.newest.version.name)
        return shares.get(name, 0.0) / sum(shares.values())

    def install(self, version: Version) -> None:
        """Takes a version into use; the one before stays, and those that are named by an option.

        Raises:
          ValueError: it lacks what the options ask for.
        """
        self._needs.check(version)
        self._install(self._live_of(version))

    async def load(self, directory: str | Path) -> str:
        """Opens a version beside those in use, and takes it into use; a damaged one changes nothing.

        Raises:
          ValueError: it is damaged, or lacks what the options ask for.
        """

        def opened() -> Version:
            with _short_turns():
                version = Version(Bundle.open(directory))
                self._needs.check(version)  # before it is compiled
                return version

        def compiled() -> Live:
            with _short_turns():
                version.warm_up()
                live = self._live_of(version)
                live.view(self._store)  # made here, the first request need not wait for it
                return live

        in_loader = functools.partial(asyncio.get_running_loop().run_in_executor, self._loader)
        version = await in_loader(opened)
        if self._live and not _programs_of(version.bundle.manifest) <= self._programs_in_use():
            await precompile(directory, self._needs)
        live = await in_loader(compiled)
        self._install(live)
        return live.version.name

    def _live_of(self, version: Version) -> Live:
        return Live(version, self._batcher_of(version), self._ranker_of(version))

    def _programs_in_use(self) -> set[str]:
        return set().union(*(_programs_of(live.version.bundle.manifest) for live in self._live.values()))

    def drop(self, name: str) -> None:
        """Takes a version out of use: the one before it answers again.

        Raises:
          UnknownError: there is no such version.
          ValueError: it is the only one.
        """
        live = self.named(name)
        if len(self._live) == 1:
            raise ValueError(f"version {name!r} is the only one.")
        del self._live[name]
        self._retire(live)
        self._measures.version(self.newest.version.name)

    async def close(self) -> None:
        """Takes nothing more, and answers what waits."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*(live.close() for live in self._live.values()), *self._retiring)

    def _install(self, live: Live) -> None:
        version = live.version
        if (same := self._live.pop(version.name, None)) is not None:
            self._retire(same)
        self._live[version.name] = live
        others = [name for name in self._live if name not in self._kept]
        for name in others[:-VERSIONS_KEPT]:
            self._retire(self._live.pop(name))
        self._measures.version(self.newest.version.name)

    def _retire(self, live: Live) -> None:
        """Answers what waits for a version, and lets go of it."""
        task = asyncio.ensure_future(live.close())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _programs_of(manifest: Manifest) -> set[str]:
    """The checksums of what a version has to compile; lists of another length, for one, are none of it."""
    served = tuple(f"{STABLEHLO}/{name}" for name in SERVED_PROGRAMS)
    return {entry.sha256 for path, entry in manifest.files.items() if path.startswith(served)}


def _stand_back() -> None:
    """Lets the threads that answer go first, where the system has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Lets threads take turns sooner: a request comes back to the interpreter dozens of times.

    Not at all times: the threads of one request would interrupt each other.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
