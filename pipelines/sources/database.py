"""A database through ADBC, read-only. The connection URI is a secret: errors, reprs and pins show scheme, host and name only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import adbc_driver_postgresql.dbapi
import adbc_driver_sqlite.dbapi
import pyarrow as pa
from adbc_driver_manager import Error

from pipelines.errors import InputError, SourceError

POSTGRESQL, SQLITE = "postgresql", "sqlite"
_SCHEMES = {"postgresql": POSTGRESQL, "postgres": POSTGRESQL, "sqlite": SQLITE}
_CONNECT = {POSTGRESQL: adbc_driver_postgresql.dbapi.connect, SQLITE: adbc_driver_sqlite.dbapi.connect}
# SQLite's driver tells a column's type by its first rows, so more of them than its 1024.
_SQLITE_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class Database:
    """Where to connect to. Picklable: a worker makes its own connection."""

    kind: str
    address: str
    uri: str = field(repr=False)

    @classmethod
    def of(cls, uri: str) -> Database:
        """Read a URI such as `postgresql://user:password@host/name` or `sqlite:///path/to/file.db`."""
        try:
            parts = urlsplit(uri)
            host, kind = parts.hostname or "", _SCHEMES.get(parts.scheme)
        except ValueError:
            raise InputError("`source.uri` is no URI. Write postgresql://user:password@host/name, or sqlite:///path.") from None
        if kind is None:
            raise InputError("`source.uri` has an unknown scheme. Use postgresql:// or sqlite://.")
        if kind == SQLITE:
            return cls(kind=kind, address=f"sqlite://{parts.path}", uri=f"file:{quote(unquote(parts.path))}?mode=ro")
        return cls(kind=kind, address=f"postgresql://{host}{parts.path}", uri=uri)

    def schema(self, statement: str) -> pa.Schema:
        """Return the columns of an answer."""
        with self._answer(statement, ()) as reader, self._named():
            return reader.schema

    def stream(self, statement: str, *, settings: Sequence[tuple[str, str]] = ()) -> Iterator[pa.RecordBatch]:
        """Stream an answer in a read-only transaction."""
        with self._answer(statement, settings) as reader:
            batches = iter(reader)
            while True:
                with self._named():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    @contextmanager
    def _answer(self, statement: str, settings: Sequence[tuple[str, str]]) -> Iterator[Any]:
        with self._named():
            connection = _CONNECT[self.kind](self.uri)
        with connection, connection.cursor() as cursor:
            with self._named():
                self._prepare(connection, cursor, settings)
                cursor.execute(statement)
                reader = cursor.fetch_record_batch()
            yield reader

    def _prepare(self, connection: Any, cursor: Any, settings: Sequence[tuple[str, str]]) -> None:
        """Make the session read-only and its zone UTC; SQLite's file is already open for reading only."""
        if self.kind == SQLITE:
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(_SQLITE_ROWS)})
            return
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()
        for name, value in settings:
            cursor.execute("SELECT set_config($1, $2, false)", (name, value))
            cursor.fetchall()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn a driver's error into ours, without the URI or the password that libpq may quote."""
        try:
            yield
        except (Error, OSError, pa.ArrowException) as error:
            message = f"{self.address}: {self._masked(str(error))}. Check the address, the rights and the query; in SQLite, CAST a column that mixes types."
        else:
            return
        raise SourceError(message)

    def _masked(self, text: str) -> str:
        parts = urlsplit(self.uri)
        password = parts.password or ""
        for secret in (self.uri, password, unquote(password), parts.query):
            text = text.replace(secret, "***") if secret else text
        return " ".join(text.split())
