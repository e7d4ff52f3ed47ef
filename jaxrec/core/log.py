"""How the entries speak on standard error: a line each, ours from INFO and others' from WARNING on; errors in red."""

import logging
import sys

from rich.console import Console


def start_logging() -> None:
    """Call once, first thing in an entry."""
    # `force`: libraries that were imported before have left handlers of their own.
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("jaxrec").setLevel(logging.INFO)
    logging.getLogger("__main__").setLevel(logging.INFO)


def failed(error: Exception) -> int:
    """Says what was wrong with the input, in red where there are colours; returns the exit status for it."""
    console = Console(stderr=True)
    console.print(
        f"error: {error}", style="bold red", markup=False, emoji=False, highlight=False, soft_wrap=True
    )
    return 2
