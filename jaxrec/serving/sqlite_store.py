"""The state in one SQLite file, for the processes of one machine."""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxrec.serving.store import HOUR, MOST_HISTORY, AddedItem, Feedback

__all__ = ["SqliteStore"]

VERSION = 1
WAIT_SECONDS = 10.0  # of a write for those of other processes
_SCHEMA = """
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    behaviour TEXT NOT NULL,
    value REAL,
    seconds INTEGER NOT NULL,
    version TEXT NOT NULL,
    propensity REAL
);
CREATE INDEX events_of_user ON events (user_id, number);
CREATE INDEX events_by_time ON events (seconds, item_id);
CREATE TABLE items (item_id TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE hidden (item_id TEXT PRIMARY KEY);
CREATE TABLE revision (number INTEGER NOT NULL);
INSERT INTO revision VALUES (0);
"""
_COLUMNS = "event_id, user_id, item_id, behaviour, value, seconds, version, propensity"


class SqliteStore:
    """See `store.Store`. Write-ahead logging: readers never wait for a writer, and a killed process loses nothing.

    Raises:
      ValueError: the file is of another format, is no database, or cannot be opened.
    """

    def __init__(self, path: str | Path):
        """Opens the file, or makes it."""
        self._path = Path(path)
        self._of_thread = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
        except sqlite3.Error as error:
            self.close()
            raise ValueError(
                f"the state {self._path} cannot be opened: {error}; name an SQLite file that a server has made, or one "
                "that is not there yet."
            ) from error

    def append(self, events: Sequence[Feedback]) -> int:
        """See `Store`."""
        rows = [
            (e.event_id, e.user_id, e.item_id, e.behaviour, e.value, e.seconds, e.version, e.propensity)
            for e in events
        ]
        with self._writing() as connection:
            before = connection.total_changes
            connection.executemany(
                f"INSERT OR IGNORE INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            return connection.total_changes - before

    def history(self, user_id: str, limit: int = MOST_HISTORY) -> list[Feedback]:
        """See `Store`."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM events WHERE user_id = ? ORDER BY number DESC LIMIT ?",
            (user_id, min(limit, MOST_HISTORY)),
        )
        return [_feedback(row) for row in rows][::-1]

    def erase(self, user_id: str) -> int:
        """See `Store`; what was freed is overwritten, as soon as no reader holds the file's older state."""
        with self._writing() as connection:
            erased = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return erased

    def trending(self, since: int, limit: int) -> list[tuple[str, int]]:
        """See `Store`."""
        rows = self._connection.execute(
            "SELECT item_id, COUNT(*) AS num FROM events WHERE seconds >= ? GROUP BY item_id "
            "ORDER BY num DESC, item_id LIMIT ?",
            (since // HOUR * HOUR, limit),
        )
        return [(item, count) for item, count in rows]

    def log(self, after: int, limit: int) -> list[tuple[int, Feedback]]:
        """See `Store`."""
        rows = self._connection.execute(
            f"SELECT number, {_COLUMNS} FROM events WHERE number > ? ORDER BY number LIMIT ?", (after, limit)
        )
        return [(row[0], _feedback(row[1:])) for row in rows]

    def put_item(self, item: AddedItem) -> None:
        """See `Store`."""
        with self._changing() as connection:
            connection.execute(
                "INSERT INTO items VALUES (?, ?) ON CONFLICT (item_id) DO UPDATE SET content = excluded.content",
                (item.item_id, item.to_json()),
            )

    def items(self) -> Mapping[str, AddedItem]:
        """See `Store`."""
        rows = self._connection.execute("SELECT item_id, content FROM items ORDER BY item_id")
        return {item: AddedItem.from_json(content) for item, content in rows}

    def hide(self, item_id: str, hidden: bool = True) -> None:
        """See `Store`."""
        with self._changing() as connection:
            if hidden:
                connection.execute("INSERT OR IGNORE INTO hidden VALUES (?)", (item_id,))
            else:
                connection.execute("DELETE FROM hidden WHERE item_id = ?", (item_id,))

    def hidden(self) -> frozenset[str]:
        """See `Store`."""
        return frozenset(item for (item,) in self._connection.execute("SELECT item_id FROM hidden"))

    def revision(self) -> int:
        """See `Store`."""
        return int(self._connection.execute("SELECT number FROM revision").fetchone()[0])

    def close(self) -> None:
        """See `Store`."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._of_thread = threading.local()

    @property
    def _connection(self) -> sqlite3.Connection:
        """The thread's own."""
        found = getattr(self._of_thread, "connection", None)
        if found is None:
            found = sqlite3.connect(
                self._path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            found.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power loss may
            found.execute("PRAGMA secure_delete = ON")
            self._of_thread.connection = found
            with self._lock:
                self._connections.append(found)
        return found

    def _writing(self) -> "_Transaction":
        return _Transaction(self._connection)

    def _changing(self) -> "_Transaction":
        """A transaction that makes a new revision."""
        return _Transaction(self._connection, "UPDATE revision SET number = number + 1")

    def _prepare(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        with self._writing():
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise ValueError(
                    f"{self._path} is of format {version}, and this program reads format {VERSION}; name another file."
                )
            if version == 0:
                for statement in _SCHEMA.split(";")[:-1]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")


class _Transaction:
    """One writer at a time from its first statement on, so that no write fails half way for a lock."""

    def __init__(self, connection: sqlite3.Connection, first: str = ""):
        self._connection, self._first = connection, first

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        if self._first:
            self._connection.execute(self._first)
        return self._connection

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _feedback(row: tuple) -> Feedback:
    names = _COLUMNS.split(", ")
    return Feedback(**dict(zip(names, row, strict=True)))
