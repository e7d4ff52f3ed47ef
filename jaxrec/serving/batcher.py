"""Requests of many clients, computed together: what has come while the last batch was computed is the next batch.

Nobody waits for a batch to fill up: an idle server computes a request at once, a busy one computes many at a time. The
queue is bounded, and a request whose deadline has passed is not computed.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batcher", "Closed", "Expired", "Overloaded"]

Item = TypeVar("Item")
Result = TypeVar("Result")
_Waiting = tuple[Item, float, "asyncio.Future[Result]"]


class Overloaded(Exception):
    """The queue is full."""


class Expired(Exception):
    """The deadline passed before the request was computed."""


class Closed(Exception):
    """The server takes no requests any more."""


class Batcher(Generic[Item, Result]):
    """One queue in front of one function that computes many requests at a time, in a thread of its own.

    Use it on one event loop.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        """Starts empty.

        Args:
          compute: takes at most `max_batch` requests and gives as many results; what it raises all of them get.
          max_queue: requests that wait, at most.
          observe: is told the size of each batch and how long it took.

        Raises:
          ValueError: a size below 1.
        """
        if max_batch < 1 or max_queue < 1:
            raise ValueError(f"max_batch={max_batch} and max_queue={max_queue} must be at least 1.")
        self._compute, self._observe = compute, observe
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: queue.SimpleQueue[_Waiting[Item, Result] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize()

    async def submit(self, item: Item, *, deadline: float | None = None) -> Result:
        """The result for a request.

        Args:
          deadline: by `time.monotonic()`; None = none.

        Raises:
          Overloaded: the queue is full.
          Expired: nobody waits for it any more.
          Closed: after `close`.
        """
        if self._closed:
            raise Closed("the server is shutting down.")
        if self.waiting >= self._max_queue:
            raise Overloaded(f"{self.waiting} requests are waiting already.")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(loop,), name="batch", daemon=True)
            self._thread.start()
        until = float("inf") if deadline is None else deadline
        self._waiting.put((item, until, future))
        if deadline is None:
            return await future
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await future
        except TimeoutError as error:
            raise Expired("the deadline passed.") from error

    async def close(self) -> None:
        """Takes nothing more, computes what waits, and returns then."""
        self._closed = True
        self._waiting.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Computes batch after batch until `close`; futures belong to the loop, so that it is told what came out."""
        while batch := self._next_batch():
            items, futures = [item for item, _ in batch], [future for _, future in batch]
            started = time.perf_counter()
            found: Sequence[Result] | Exception
            try:
                found = self._compute(items)
                if len(found) != len(items):
                    found = RuntimeError(f"{len(found)} results for {len(items)} requests")
            except Exception as error:
                found = error
            try:
                loop.call_soon_threadsafe(self._tell, futures, found, time.perf_counter() - started)
            except RuntimeError:  # the loop is closed: nobody waits
                return

    def _tell(
        self,
        futures: "Sequence[asyncio.Future[Result]]",
        found: Sequence[Result] | Exception,
        seconds: float,
    ) -> None:
        """Hands out the results of a batch."""
        if isinstance(found, Exception):
            for future in futures:
                if not future.done():
                    future.set_exception(found)
            return
        self._observe(len(futures), seconds)
        for future, result in zip(futures, found, strict=True):
            if not future.done():
                future.set_result(result)

    def _next_batch(self) -> "list[tuple[Item, asyncio.Future[Result]]]":
        """The oldest requests that somebody waits for still, as soon as there are any; none after `close`."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while len(batch) < self._max_batch:
            if batch and self._waiting.empty():
                break
            waiting = self._waiting.get()
            if waiting is None:
                self._waiting.put(None)  # for the next look, when this batch is done
                break
            item, until, future = waiting
            # Who waits for an expired one is told by `submit`.
            if not future.done() and until > time.monotonic():
                batch.append((item, future))
        return batch
