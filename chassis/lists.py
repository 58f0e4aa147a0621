"""Lists of rows, read page by page: by the key of the last row seen, never by an offset.

A page has as many rows as are asked for, unless they are so large that it would not fit
into a message; then it ends earlier, and its token goes on from there (AIP-158).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import sqlalchemy as sa

from chassis.database import Database, Statement
from chassis.paging import PageTokens

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
PAGE_BYTES_MAX = 1024 * 1024
"""Past so many bytes no further row begins: gRPC's clients take 4 MiB unless they are told
otherwise, and the edge 8 MiB of JSON, which says the same at several times the length."""

_NEWEST_ID = UUID(int=(1 << 128) - 1)


class PageQuery(Protocol):
    """What a query says of the page that it asks for."""

    @property
    def page_size(self) -> int:
        """Rows at the most; 0 leaves it to us."""
        ...

    @property
    def page_token(self) -> str:
        """The token of the page before; empty for the first."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a list, and the token of the next page; empty on the last."""

    rows: Sequence[Any]
    next_page_token: str


class PagedList:
    """A list by id, the newest first, or by version, the oldest first.

    Args:
        name: Tells the tokens of this list from those of others.
        rows: Selects the whole list; its bind parameters are the list's arguments. Its
            columns of binary data are what makes a row large.
        key: The selected column that orders the list, unique within it.
        oldest_first: The key is a version, counted from 1, and not an id.
    """

    def __init__(
        self,
        name: str,
        rows: sa.Select[Any],
        key: sa.Column[Any],
        *,
        oldest_first: bool = False,
    ) -> None:
        self._name = name
        self._key = key.name
        self._key_from = key.type.python_type
        self._start = 0 if oldest_first else _NEWEST_ID
        position = sa.bindparam("position", type_=key.type)
        order = key.asc() if oldest_first else key.desc()
        sizes = [
            sa.func.octet_length(column)
            for column in rows.selected_columns
            if isinstance(column.type, sa.LargeBinary)
        ]
        # Both windows are filled row by row, so they read no further than the limit.
        before = sa.func.sum(sum(sizes, sa.literal(0))).over(order_by=order, rows=(None, -1))
        more = sa.func.lead(key).over(order_by=order).is_not(None)
        page = (
            rows.add_columns(sa.func.coalesce(before, 0).label("before"), more.label("more"))
            .where(key > position if oldest_first else key < position)
            .order_by(order)
            .limit(sa.bindparam("size", type_=sa.Integer))
            .subquery("page")
        )
        ordered = page.c[self._key]
        self._statement = Statement(
            sa.select(page)
            .where(page.c.before < PAGE_BYTES_MAX)
            .order_by(ordered.asc() if oldest_first else ordered.desc())
        )

    async def page(
        self, database: Database, tokens: PageTokens, query: PageQuery, **arguments: Any
    ) -> Page:
        """A page of the list with these arguments: 50 rows, or what is asked for up to 1000.

        Raises:
            InvalidInputError: PAGE_TOKEN_INVALID, the token is not of this list with
                these arguments.
        """
        signed = (self._name, *map(str, arguments.values()))
        position = tokens.read(query.page_token, *signed)
        start = self._key_from(position[0]) if position else self._start
        size = min(query.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        async with database.reading() as connection:
            rows = await connection.fetch(*self._statement(position=start, size=size, **arguments))
        token = ""
        if rows and rows[-1]["more"]:
            token = tokens.make([str(rows[-1][self._key])], *signed)
        return Page(rows, token)
