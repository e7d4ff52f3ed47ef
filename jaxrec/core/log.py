"""How the entries log: one line on standard error, ours at INFO, everybody else's from WARNING on."""

import logging
import sys


def start_logging() -> None:
    """Call once, first thing in an entry."""
    # `force`: libraries that were imported before have left handlers of their own.
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("jaxrec").setLevel(logging.INFO)
    logging.getLogger("__main__").setLevel(logging.INFO)
