"""Updates on a timer: each in a process of its own, so that what one holds or breaks does not outlive it."""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["run_on_timer"]

logger = logging.getLogger(__name__)


def run_on_timer(command: Sequence[str], every_seconds: float) -> None:
    """Runs a command now, and then `every_seconds` from start to start, or at once where one took longer.

    SIGTERM and SIGINT end it: a command that runs is told to stop, and waited for. One that fails is tried again at its
    next time. Call it from the main thread.
    """
    stop = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def end(number: int, frame: Any) -> None:
        stop.set()
        for process in running:
            process.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not stop.is_set():
            begun = time.monotonic()
            # A session of its own: an interrupt from the keyboard reaches the command once, through `end`.
            running[:] = [subprocess.Popen(command, start_new_session=True)]
            if stop.is_set():  # the signal came before the process was known
                running[0].terminate()
            status = running[0].wait()
            running.clear()
            logger.info("the update ended with status %d", status)
            stop.wait(max(begun + every_seconds - time.monotonic(), 0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
