"""Databases of tests: one PostgreSQL for the whole run.

Starting a server takes a second, migrating a database a quarter of one, copying a migrated
one a tenth, and emptying its tables less than a millisecond. So a test that only reads and
writes rows gets a migrated database, emptied; one that kills what works on a database, or
changes its schema, gets a copy of its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest_asyncio

from meshctl.servers.throwaway import throwaway_postgres


class Databases:
    """The server of this run of the tests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._templates: set[str] = set()
        self._emptying: dict[str, str] = {}

    def url_of(self, database: str) -> str:
        """The URL of one database of the server."""
        return re.sub(r"/[^/]*$", f"/{database}", self.url)

    async def template(self, name: str, prepare: Callable[[str], Awaitable[None]]) -> str:
        """Makes a template once in the run; `prepare` gets its URL. Answers the name."""
        if name not in self._templates:
            await self._execute(f'CREATE DATABASE "{name}"')
            await prepare(self.url_of(name))
            self._templates.add(name)
        return name

    async def emptied(self, name: str, prepare: Callable[[str], Awaitable[None]]) -> str:
        """A database like the template, without a row from an earlier test; its URL."""
        working = f"{name}_emptied"
        url = self.url_of(working)
        if working not in self._emptying:
            await self.template(name, prepare)
            await self._execute(f'CREATE DATABASE "{working}" TEMPLATE "{name}"')
            tables = await self._fetch(url, _TABLES)
            self._emptying[working] = "; ".join(f"DELETE FROM {row[0]}" for row in tables)
        else:
            await self._execute(self._emptying[working], url)
        return url

    @asynccontextmanager
    async def cloned(self, template: str = "template1") -> AsyncIterator[str]:
        """A database like the template, gone after the block; yields its URL."""
        name = f"test_{secrets.token_hex(6)}"
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        try:
            yield self.url_of(name)
        finally:
            await self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def _execute(self, statement: str, url: str = "") -> None:
        connection = await asyncpg.connect(url or self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def _fetch(self, url: str, statement: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()


_TABLES = """
SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables
WHERE schemaname NOT IN ('pg_catalog', 'information_schema') AND tablename <> 'alembic_version'
"""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def databases() -> AsyncIterator[Databases]:
    """The PostgreSQL server that all tests share; each takes a database of its own."""
    async with throwaway_postgres() as url:
        yield Databases(url)


@pytest_asyncio.fixture
async def empty_database(databases: Databases) -> AsyncIterator[str]:
    """The URL of a database with nothing in it."""
    async with databases.cloned() as url:
        yield url
