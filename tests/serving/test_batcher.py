"""Batches: each request its own result, bounds that hold, deadlines, and a clean end."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.serving.batcher import Batcher, Closed, Expired, Overloaded


@settings(max_examples=20)
@given(waves=st.lists(st.integers(1, 40), min_size=1, max_size=4), max_batch=st.integers(1, 9))
def test_everybody_gets_their_own_result_in_bounded_batches(waves, max_batch):
    sizes = []

    async def main():
        batcher = Batcher(lambda items: [2 * item for item in items], max_batch=max_batch,
                          observe=lambda size, seconds: sizes.append(size))  # fmt: skip
        for wave in waves:
            found = await asyncio.gather(*(batcher.submit(number) for number in range(wave)))
            assert found == [2 * number for number in range(wave)]
        await batcher.close()

    asyncio.run(main())
    assert sum(sizes) == sum(waves)
    assert max(sizes) <= max_batch


class Slow:
    """Computes when it is let."""

    def __init__(self):
        self.let, self.seen = threading.Event(), []

    def __call__(self, items):
        self.seen.append(list(items))
        assert self.let.wait(10)
        return items


async def started(slow):
    while not slow.seen:
        await asyncio.sleep(0.001)


def test_what_comes_during_a_batch_is_the_next_batch_and_a_full_queue_refuses():
    async def main():
        slow = Slow()
        batcher = Batcher(slow, max_batch=8, max_queue=3)
        first = asyncio.create_task(batcher.submit("a"))
        await started(slow)
        others = [asyncio.create_task(batcher.submit(name)) for name in "bcd"]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 requests are waiting already"):
            await batcher.submit("e")
        slow.let.set()
        assert await asyncio.gather(first, *others) == ["a", "b", "c", "d"]
        assert slow.seen == [["a"], ["b", "c", "d"]]

    asyncio.run(main())


def test_who_is_late_is_told_in_time_and_not_computed():
    async def main():
        slow = Slow()
        batcher = Batcher(slow)
        first = asyncio.create_task(batcher.submit("a"))
        await started(slow)
        before = time.monotonic()
        with pytest.raises(Expired):
            await batcher.submit("late", deadline=before + 0.05)
        assert time.monotonic() - before < 5
        last = asyncio.create_task(batcher.submit("b", deadline=time.monotonic() + 60))
        slow.let.set()
        assert [await first, await last] == ["a", "b"]
        assert slow.seen == [["a"], ["b"]]

    asyncio.run(main())


def test_an_error_reaches_those_of_its_batch_alone():
    def compute(items):
        if "bad" in items:
            raise ZeroDivisionError("bad")
        return items

    async def main():
        batcher = Batcher(compute, max_batch=1)
        found = await asyncio.gather(*map(batcher.submit, ["a", "bad", "b"]), return_exceptions=True)
        assert [found[0], found[2]] == ["a", "b"]
        assert isinstance(found[1], ZeroDivisionError)
        short = Batcher(lambda items: [])
        with pytest.raises(RuntimeError, match="0 results for 1 requests"):
            await short.submit("a")

    asyncio.run(main())


def test_closing_finishes_what_waits_and_takes_no_more():
    async def main():
        slow = Slow()
        batcher = Batcher(slow, max_batch=1)
        waiting = [asyncio.create_task(batcher.submit(name)) for name in "abc"]
        await started(slow)
        slow.let.set()
        await batcher.close()
        assert await asyncio.gather(*waiting) == ["a", "b", "c"]
        with pytest.raises(Closed):
            await batcher.submit("d")

    asyncio.run(main())


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="max_queue=0"):
        Batcher(list, max_queue=0)
