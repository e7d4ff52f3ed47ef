"""Requests of many clients, computed together: what has come while the last batch was computed is the next batch.

Nobody waits for a batch to fill up: an idle server computes a request at once, a busy one computes many at a time. The
queue is bounded, and a request whose deadline has passed is not computed.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Batcher", "Closed", "Expired", "Overloaded"]

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        self._waiting: collections.deque[tuple[Item, float, asyncio.Future[Result]]] = collections.deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

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
        if len(self._waiting) >= self._max_queue:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already.")
        until = float("inf") if deadline is None else deadline
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, until, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            if deadline is None:
                return await future
            return await asyncio.wait_for(future, max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise Expired("the deadline passed.") from error

    async def close(self) -> None:
        """Takes nothing more, computes what waits, and returns then."""
        self._closed = True
        if self._worker is not None:
            await self._worker
        self._thread.shutdown(wait=True)

    async def _work(self) -> None:
        """Computes batch after batch while anything waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next_batch()
            if not batch:
                continue
            started = time.perf_counter()
            items = [item for item, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._compute, items)
                if len(results) != len(items):
                    raise RuntimeError(f"{len(results)} results for {len(items)} requests")
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self._observe(len(batch), time.perf_counter() - started)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        """The oldest requests that somebody waits for still."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        now = time.monotonic()
        while self._waiting and len(batch) < self._max_batch:
            item, until, future = self._waiting.popleft()
            if future.done():
                continue
            if until <= now:
                future.set_exception(Expired("the deadline passed."))
                continue
            batch.append((item, future))
        return batch
