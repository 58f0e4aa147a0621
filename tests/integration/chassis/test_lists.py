"""Lists read page by page: every row once, in order, and no page larger than a message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

import pytest
import sqlalchemy as sa

from chassis.database import Database
from chassis.errors import InvalidInputError
from chassis.lists import PAGE_BYTES_MAX, Page, PagedList
from chassis.paging import PageTokens
from chassis.testing import SequentialIds
from tests.integration.chassis.conftest import documents

TOKENS = PageTokens("secret")
_owned = sa.select(documents.c.id, documents.c.version, documents.c.body).where(
    documents.c.owner == sa.bindparam("owner", type_=sa.Text)
)
NEWEST_FIRST = PagedList("documents", _owned, documents.c.id)
OLDEST_FIRST = PagedList("versions", _owned, documents.c.version, oldest_first=True)
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A query for a page."""

    page_size: int = 0
    page_token: str = ""


async def write(database: Database, *sizes: int, owner: str = "default") -> list[UUID]:
    """Writes documents of these sizes; answers their ids, the oldest first."""
    new_id = SequentialIds()
    ids = [new_id() for _ in sizes]
    async with database.transaction() as connection:
        await connection.executemany(
            # Not compressed, so that the size is what it says.
            "INSERT INTO documents (owner, id, body) VALUES ($1, $2, $3)",
            [(owner, key, bytes(size)) for key, size in zip(ids, sizes, strict=True)],
        )
    return ids


async def pages(
    database: Database, listed: PagedList = NEWEST_FIRST, *, page_size: int = 0
) -> list[list[UUID]]:
    """The ids of every page, from the first to the last."""
    found: list[list[UUID]] = []
    token = ""
    while not found or token:
        page = await listed.page(database, TOKENS, Asked(page_size, token), owner="default")
        found.append([row["id"] for row in page.rows])
        token = page.next_page_token
    return found


async def first_page(database: Database, asked: int) -> Page:
    """The first page of a size."""
    return await NEWEST_FIRST.page(database, TOKENS, Asked(asked), owner="default")


async def test_pages_hold_every_row_once(database: Database) -> None:
    """The newest first by id, and the oldest first by version; no other owner's."""
    await write(database, 1, owner="acme")
    a, b, c, d, e = await write(database, 1, 1, 1, 1, 1)
    assert await pages(database, page_size=2) == [[e, d], [c, b], [a]]
    assert await pages(database, OLDEST_FIRST, page_size=2) == [[a, b], [c, d], [e]]


async def test_a_full_last_page_has_no_token(database: Database) -> None:
    """Nobody asks for an empty page."""
    ids = await write(database, 1, 1)
    assert await pages(database, page_size=2) == [ids[::-1]]


async def test_a_list_without_rows_is_one_empty_page(database: Database) -> None:
    """Which has no token either."""
    assert await pages(database) == [[]]


async def test_a_page_of_large_rows_ends_before_it_is_too_large_to_send(
    database: Database,
) -> None:
    """And the next goes on where it ended, so that nothing is left out."""
    ids = await write(database, *[MEBIBYTE // 4] * 10)
    found = await pages(database, page_size=1000)
    assert [len(page) for page in found] == [4, 4, 2]
    assert [key for page in found for key in page] == ids[::-1]


async def test_a_row_larger_than_a_page_is_a_page(database: Database) -> None:
    """Else the list would end there for ever."""
    a, b, c = await write(database, 1, PAGE_BYTES_MAX + 1, PAGE_BYTES_MAX + 1)
    assert await pages(database) == [[c], [b], [a]]


@pytest.mark.parametrize(("asked", "size"), [(0, 50), (1, 1), (1000, 1000), (2**31 - 1, 1000)])
async def test_a_page_has_the_size_that_is_asked_for_within_bounds(
    database: Database, asked: int, size: int
) -> None:
    """50 where none is asked for, 1000 at the most (AIP-158)."""
    await write(database, *[1] * 1001)
    assert len((await first_page(database, asked)).rows) == size


async def test_a_token_of_other_arguments_or_another_list_is_refused(database: Database) -> None:
    """Else one owner's list would go on with another's position."""
    await write(database, 1, 1)
    token = (await first_page(database, 1)).next_page_token
    with pytest.raises(InvalidInputError):
        await NEWEST_FIRST.page(database, TOKENS, Asked(1, token), owner="acme")
    with pytest.raises(InvalidInputError):
        await OLDEST_FIRST.page(database, TOKENS, Asked(1, token), owner="default")


async def test_a_page_reads_no_more_of_the_list_than_it_shows(database: Database) -> None:
    """However long the list is: the windows stop with the limit."""
    await write(database, *[1] * 3000)
    async with database.reading() as connection:
        await connection.execute("ANALYZE documents")
        text, *arguments = NEWEST_FIRST._statement(
            owner="default", position=UUID(int=(1 << 128) - 1), size=10
        )
        plan = await connection.fetch(f"EXPLAIN (ANALYZE, TIMING off) {text}", *arguments)
    (scan,) = [row[0] for row in plan if " on documents" in row[0]]
    assert re.search(r"Index Scan Backward .*actual rows=11\b", scan), plan
