"""Where the state is: the store that a command line names."""

from pathlib import Path

from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.store import Store

__all__ = ["open_store"]

SCHEMES = ("redis", "rediss", "unix")


def open_store(where: str, *, must_exist: bool = False) -> Store:
    """The state of users: a Redis server by its URL, or an SQLite file.

    Args:
      must_exist: refuse to make a new file.

    Raises:
      ConnectionError: the Redis server does not answer.
      FileNotFoundError: there is no such file, and it must exist.
      ValueError: the file is of another format, is no database, or cannot be opened.
    """
    if where.split("://")[0] in SCHEMES:
        return RedisStore(where)
    if must_exist and not Path(where).is_file():
        raise FileNotFoundError(f"there is no state {where}; name the --state of the server.")
    return SqliteStore(where)
