"""Rows brought together by a key, while memory holds one group."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any


def grouped(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each key in their order, keys sorted. Rows hold JSON values; they are sorted on disk."""
    with closing(temporary_database()) as database:
        database.execute(
            "CREATE TABLE row (key TEXT, number INTEGER, value TEXT, PRIMARY KEY (key, number)) WITHOUT ROWID"
        )
        numbered = ((key, number, json.dumps(row)) for number, (key, row) in enumerate(rows))
        database.executemany("INSERT INTO row VALUES (?, ?, ?)", numbered)
        in_order = database.execute("SELECT key, value FROM row ORDER BY key, number")
        for _, group in groupby(in_order, key=lambda row: row[0]):
            yield [json.loads(value) for _, value in group]


def temporary_database() -> sqlite3.Connection:
    """A database in a temporary file that is gone when it is closed; no more than its page cache is in memory."""
    database = sqlite3.connect("")
    database.execute("PRAGMA journal_mode = OFF")
    return database
