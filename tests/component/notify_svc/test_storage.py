"""Recipients and notifications in a real PostgreSQL: once, claimed once, settled once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest

from chassis.database import Database
from chassis.errors import ConflictError
from chassis.ids import new_id
from notify_svc.commands import (
    HearHandler,
    Introduction,
    Line,
    News,
    Notification,
    Occasion,
    Recipient,
    State,
)
from notify_svc.delivery import Outgoing, Settlement
from notify_svc.storage import PostgresNotifications
from tests.builders import ACause, eur
from tests.component.notify_svc.conftest import prepare
from tests.unit.notify_svc.builders import a_news, a_recipient, merchants

LEASE_SECONDS = 60.0


class Handed:
    """Takes what transactions claim for this process, as long as there is room."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.taken: list[Outgoing] = []

    def attach(self, store: PostgresNotifications) -> None:
        """Has a store hand over from now on."""
        store.hand_over_to(self.taken.extend, room=lambda: self.room, lease_seconds=LEASE_SECONDS)


@pytest.fixture
def store(database: Database) -> PostgresNotifications:
    """The store of a process that sends nothing itself."""
    return PostgresNotifications(database, new_id=new_id)


def compose(news: News, recipient: Recipient) -> Sequence[Notification]:
    """What the service composes, everyone written to in what they asked for."""
    handler = HearHandler(
        store=None,  # type: ignore[arg-type]
        merchants=merchants(),
        negotiate_locale=lambda _, asked: asked,
        new_id=new_id,
    )
    return handler.compose(news, recipient)


async def introduced(store: PostgresNotifications, **changes: Any) -> Recipient:
    """A recipient whose OrderCreated has arrived."""
    recipient = a_recipient(**changes)
    assert await store.record([an_introduction(recipient)], [], compose) == []
    return recipient


def an_introduction(recipient: Recipient) -> Introduction:
    """OrderCreated of a recipient."""
    return Introduction(recipient=recipient, cause=ACause())


async def rows(database: Database, statement: str = "") -> list[dict[str, Any]]:
    """Notifications, the oldest first."""
    async with database.reading() as connection:
        found = await connection.fetch(
            statement or "SELECT * FROM notifications ORDER BY create_time, template"
        )
    return [dict(row) for row in found]


async def move(database: Database, change: str) -> None:
    """Changes every notification, as time does."""
    async with database.reading() as connection:
        await connection.execute(f"UPDATE notifications SET {change}")


def settled(outgoing: Outgoing, state: State, reason: str = "", jitter: float = 1.0) -> Settlement:
    """What became of one."""
    return Settlement(
        merchant=outgoing.merchant,
        notification_id=outgoing.notification_id,
        claim=outgoing.claim,
        state=state,
        failure_reason=reason,
        jitter=jitter,
    )


# --- noting ---------------------------------------------------------------------------


async def test_news_queues_its_mails(database: Database, store: PostgresNotifications) -> None:
    """One row for each of whom it concerns, holding all that the mail needs later."""
    recipient = await introduced(store)
    news = a_news(recipient, detail="some reason")
    assert await store.record([], [news], compose) == []
    customer, merchant = sorted(await rows(database), key=lambda row: row["audience"])
    assert customer["state"] == merchant["state"] == "QUEUED"
    assert (customer["template"], merchant["template"]) == (
        "order_confirmed",
        "merchant_order_confirmed",
    )
    assert customer["event_id"] == news.cause.event_id
    assert customer["order_id"] == recipient.order_id
    assert (customer["currency_code"], customer["minor_units"]) == ("EUR", 2500)
    assert (customer["payment_state"], customer["detail"]) == ("PAID", "some reason")
    assert customer["correlation_id"] == "corr-1"
    assert customer["attempts"] == 0


async def test_an_address_stands_in_one_table_alone(
    database: Database, store: PostgresNotifications
) -> None:
    """So that erasing it there erases it."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient)], compose)
    assert "ada@example.com" in repr(await rows(database, "SELECT * FROM recipients"))
    assert "ada@example.com" not in repr(await rows(database))
    assert "ada@example.com" not in repr(await rows(database, "SELECT * FROM inbox"))


async def test_an_event_that_comes_again_queues_nothing(
    database: Database, store: PostgresNotifications
) -> None:
    """Neither in another batch nor twice in one."""
    recipient = a_recipient()
    introduction, news = an_introduction(recipient), a_news(recipient)
    for _ in range(3):
        left = await store.record([introduction, introduction], [news, news], compose)
        assert left == []
    assert len(await rows(database)) == 2
    assert len(await rows(database, "SELECT * FROM recipients")) == 1


async def test_consumers_that_get_an_event_at_once_queue_it_once(
    database: Database, store: PostgresNotifications
) -> None:
    """Twenty at the same time: one has the effect, the others wait and find it done."""
    recipient = await introduced(store)
    batches = [a_news(recipient, occasion) for occasion in Occasion]
    left = await asyncio.gather(
        *(store.record([], [*batches] if n % 2 else batches[::-1], compose) for n in range(8))
    )
    assert left == [[]] * 8
    assert len(await rows(database)) == 7


async def test_the_constraint_holds_even_when_the_inbox_has_forgotten(
    database: Database, store: PostgresNotifications
) -> None:
    """After its retention, or a restore: one per event, recipient, channel and template."""
    recipient = await introduced(store)
    news = a_news(recipient)
    await store.record([], [news], compose)
    async with database.reading() as connection:
        await connection.execute("DELETE FROM inbox")
    await store.record([], [news], compose)
    assert len(await rows(database)) == 2


async def test_two_events_of_an_order_are_two_mails(
    database: Database, store: PostgresNotifications
) -> None:
    """Two refunds of an order are told twice."""
    recipient = await introduced(store)
    news = [a_news(recipient, Occasion.REFUNDED, amount=eur(n)) for n in (500, 700)]
    await store.record([], news, compose)
    assert sorted(row["minor_units"] for row in await rows(database)) == [500, 700]


async def test_news_and_its_recipient_may_come_in_one_batch(
    database: Database, store: PostgresNotifications
) -> None:
    """As they do when a consumer catches up."""
    recipient = a_recipient(locale="fr")
    left = await store.record([an_introduction(recipient)], [a_news(recipient)], compose)
    assert left == []
    assert {row["locale"] for row in await rows(database)} == {"fr", "en"}


async def test_news_of_an_unknown_order_is_left_out_and_can_come_again(
    database: Database, store: PostgresNotifications
) -> None:
    """It is not in the inbox, so that it has its effect once the recipient is known."""
    known, late = await introduced(store), a_recipient()
    early = a_news(late)
    assert await store.record([], [early, a_news(known)], compose) == [early]
    assert {row["order_id"] for row in await rows(database)} == {known.order_id}
    assert await store.record([an_introduction(late)], [early], compose) == []
    assert len(await rows(database)) == 4


async def test_a_recipient_of_another_merchant_is_none(
    database: Database, store: PostgresNotifications
) -> None:
    """Even for the same order id."""
    recipient = await introduced(store)
    foreign = a_news(recipient, merchant="acme")
    assert await store.record([], [foreign], compose) == [foreign]
    assert await rows(database) == []


async def test_a_batch_that_fails_leaves_nothing(
    database: Database, store: PostgresNotifications
) -> None:
    """Inbox, recipients and notifications are one transaction."""

    def failing(news: News, recipient: Recipient) -> Sequence[Notification]:
        raise ConflictError("CONCURRENT_CHANGE", "not yet")

    recipient = a_recipient()
    with pytest.raises(ConflictError):
        await store.record([an_introduction(recipient)], [a_news(recipient)], failing)
    for table in ("inbox", "recipients", "notifications"):
        assert await rows(database, f"SELECT * FROM {table}") == []


async def test_titles_come_back_as_they_were(store: PostgresNotifications) -> None:
    """Quotes, backslashes, emoji and braces on their way through JSON."""
    lines = (Line(1, 'Tasse "Ø 8 cm" \\ {{x}}'), Line(10_000, "👩\u200d🚀"), Line(3, ""))
    recipient = await introduced(store, lines=lines)
    await store.record([], [a_news(recipient, Occasion.PAID)], compose)
    (outgoing,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert outgoing.recipient == recipient


# --- claiming -------------------------------------------------------------------------


async def test_what_is_handed_over_is_what_would_have_been_claimed(
    database: Database, store: PostgresNotifications
) -> None:
    """In memory or from the table, a mail is the same."""
    handed = Handed()
    handed.attach(store)
    recipient = await introduced(store, locale="de-AT")
    await store.record([], [a_news(recipient, Occasion.PAID, detail="x")], compose)
    (given,) = handed.taken
    assert [row["state"] for row in await rows(database)] == ["SENDING"]
    await move(database, "due_time = now(), attempts = attempts - 1")
    (claimed,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    differing = {
        field for field in Outgoing.__slots__ if getattr(given, field) != getattr(claimed, field)
    }
    assert differing == {"claim", "lease_end"}


async def test_what_is_handed_over_is_claimed_by_nobody_else(
    store: PostgresNotifications,
) -> None:
    """Until its lease has ended."""
    handed = Handed()
    handed.attach(store)
    recipient = await introduced(store)
    await store.record([], [a_news(recipient)], compose)
    assert len(handed.taken) == 2
    assert await store.claim(10, lease_seconds=LEASE_SECONDS) == []


async def test_no_more_is_handed_over_than_there_is_room_for(
    database: Database, store: PostgresNotifications
) -> None:
    """The rest is queued for whoever has a hand free."""
    handed = Handed(room=3)
    handed.attach(store)
    recipient = await introduced(store)
    await store.record([], [a_news(recipient) for _ in range(4)], compose)
    assert len(handed.taken) == 3
    states = [row["state"] for row in await rows(database)]
    assert (states.count("SENDING"), states.count("QUEUED")) == (3, 5)
    assert len(await store.claim(10, lease_seconds=LEASE_SECONDS)) == 5


async def test_nothing_is_handed_over_by_a_batch_that_failed(store: PostgresNotifications) -> None:
    """A mail goes out for what is committed, or not at all."""
    handed = Handed()
    handed.attach(store)
    recipient = await introduced(store)
    calls = 0

    def failing_later(news: News, recipient: Recipient) -> Sequence[Notification]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConflictError("CONCURRENT_CHANGE", "not yet")
        return compose(news, recipient)

    with pytest.raises(ConflictError):
        await store.record([], [a_news(recipient), a_news(recipient)], failing_later)
    assert handed.taken == []


async def test_concurrent_claims_share_without_overlapping(store: PostgresNotifications) -> None:
    """Each notification is in one hand."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient, Occasion.PAID) for _ in range(40)], compose)
    claims = await asyncio.gather(*(store.claim(10, lease_seconds=30) for _ in range(6)))
    ids = [outgoing.notification_id for claim in claims for outgoing in claim]
    assert len(ids) == len(set(ids)) == 40


async def test_no_more_is_claimed_than_asked_for_by_any_plan(own_database_url: str) -> None:
    """PostgreSQL joins as its statistics tell it to; a process has only so many hands."""
    async with (
        Database.opened(own_database_url, application_name="test") as database,
        database.reading() as connection,
    ):
        name = await connection.fetchval("SELECT current_database()")
        for way in ("hashagg", "hashjoin", "mergejoin", "material", "sort"):
            await connection.execute(f'ALTER DATABASE "{name}" SET enable_{way} = off')
    async with Database.opened(own_database_url, application_name="test") as database:
        store = PostgresNotifications(database, new_id=new_id)
        recipient = await introduced(store)
        await store.record([], [a_news(recipient, Occasion.PAID) for _ in range(40)], compose)
        assert len(await store.claim(10, lease_seconds=LEASE_SECONDS)) == 10


async def test_a_claim_whose_holder_died_is_taken_over(
    database: Database, store: PostgresNotifications
) -> None:
    """After its lease, as a further attempt and under another token."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient, Occasion.PAID)], compose)
    (first,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert await store.claim(10, lease_seconds=LEASE_SECONDS) == []
    await move(database, "due_time = now() - interval '1 second'")
    (second,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert (first.attempts, second.attempts) == (1, 2)
    assert first.claim != second.claim
    # The first comes back late, and changes nothing.
    assert await store.settle([settled(first, State.DEAD, "550 nobody")]) == [None]
    assert [row["state"] for row in await rows(database)] == ["SENDING"]
    assert await store.settle([settled(second, State.SENT)]) == [State.SENT]


async def test_an_erased_recipient_is_claimed_without_an_address(
    database: Database, store: PostgresNotifications
) -> None:
    """Setting it to null erases it; a row that is gone altogether does no harm either."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient, Occasion.PAID)], compose)
    async with database.reading() as connection:
        await connection.execute("UPDATE recipients SET email = NULL, customer_id = ''")
    (outgoing,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert outgoing.recipient is not None
    assert outgoing.recipient.email is None
    async with database.reading() as connection:
        await connection.execute("DELETE FROM recipients")
    await move(database, "due_time = now()")
    (outgoing,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert outgoing.recipient is None


async def test_an_order_created_that_comes_again_does_not_bring_an_address_back(
    database: Database, store: PostgresNotifications
) -> None:
    """A dead letter may be played again long after the customer has asked to be erased."""
    recipient = a_recipient()
    introduction = an_introduction(recipient)
    await store.record([introduction], [], compose)
    async with database.reading() as connection:
        await connection.execute("UPDATE recipients SET email = NULL; DELETE FROM inbox")
    await store.record([introduction], [a_news(recipient, Occasion.PAID)], compose)
    (row,) = await rows(database)
    assert row["recipient"] == ""
    assert (await rows(database, "SELECT email FROM recipients")) == [{"email": None}]


# --- settling -------------------------------------------------------------------------


async def claimed_one(store: PostgresNotifications) -> Outgoing:
    """A notification in our hand."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient, Occasion.PAID)], compose)
    (outgoing,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    return outgoing


async def test_a_sent_mail_stays_sent(database: Database, store: PostgresNotifications) -> None:
    """With the time at which it went."""
    outgoing = await claimed_one(store)
    assert await store.settle([settled(outgoing, State.SENT)]) == [State.SENT]
    (row,) = await rows(database)
    assert row["state"] == "SENT"
    assert row["send_time"] >= row["create_time"]
    await move(database, "due_time = now()")
    assert await store.claim(10, lease_seconds=LEASE_SECONDS) == []


@pytest.mark.parametrize("state", [State.DEAD, State.SUPPRESSED])
async def test_a_final_state_is_never_left(
    database: Database, store: PostgresNotifications, state: State
) -> None:
    """And says why."""
    outgoing = await claimed_one(store)
    assert await store.settle([settled(outgoing, state, "550 nobody")]) == [state]
    (row,) = await rows(database)
    assert (row["state"], row["failure_reason"], row["send_time"]) == (
        state.name,
        "550 nobody",
        None,
    )
    await move(database, "due_time = now()")
    assert await store.claim(10, lease_seconds=LEASE_SECONDS) == []


@pytest.mark.parametrize(
    ("attempts", "pause_seconds"),
    [(1, 2), (2, 4), (5, 32), (9, 512), (10, 900), (64, 900), (100_000, 900)],
)
async def test_tries_grow_rarer(
    database: Database, store: PostgresNotifications, attempts: int, pause_seconds: int
) -> None:
    """Twice the pause each time, fifteen minutes at the most, times the jitter."""
    outgoing = await claimed_one(store)
    await move(database, f"attempts = {attempts}")
    result = await store.settle([settled(outgoing, State.RETRYING, "451 later", jitter=0.5)])
    assert result == [State.RETRYING]
    (row,) = await rows(
        database,
        "SELECT *, extract(epoch FROM due_time - now())::float8 AS pause FROM notifications",
    )
    assert row["failure_reason"] == "451 later"
    assert pause_seconds / 2 - 5 < row["pause"] <= pause_seconds / 2


async def test_a_mail_that_is_put_off_comes_again(
    database: Database, store: PostgresNotifications
) -> None:
    """When its time has come, as a further attempt; the reason goes when it is sent."""
    outgoing = await claimed_one(store)
    await store.settle([settled(outgoing, State.RETRYING, "451 later")])
    assert await store.claim(10, lease_seconds=LEASE_SECONDS) == []
    await move(database, "due_time = now()")
    (again,) = await store.claim(10, lease_seconds=LEASE_SECONDS)
    assert again.attempts == 2
    assert again.create_time == outgoing.create_time
    await store.settle([settled(again, State.SENT)])
    (row,) = await rows(database)
    assert (row["state"], row["failure_reason"], row["attempts"]) == ("SENT", "", 2)


@pytest.mark.parametrize(("hours", "state"), [(71, State.RETRYING), (73, State.DEAD)])
async def test_after_three_days_a_mail_is_given_up(
    database: Database, store: PostgresNotifications, hours: int, state: State
) -> None:
    """Saying what it failed for last."""
    outgoing = await claimed_one(store)
    await move(database, f"create_time = now() - interval '{hours} hours'")
    assert await store.settle([settled(outgoing, State.RETRYING, "451 later")]) == [state]
    (row,) = await rows(database)
    assert (row["state"], row["failure_reason"]) == (state.name, "451 later")


async def test_many_outcomes_are_written_at_once(
    database: Database, store: PostgresNotifications
) -> None:
    """Each to its own row, whatever their order."""
    recipient = await introduced(store)
    await store.record([], [a_news(recipient, Occasion.PAID) for _ in range(10)], compose)
    claimed = await store.claim(10, lease_seconds=LEASE_SECONDS)
    outcomes = [State.SENT, State.DEAD, State.RETRYING, State.SUPPRESSED, State.SENT] * 2
    settlements = [
        settled(outgoing, state) for outgoing, state in zip(claimed, outcomes, strict=True)
    ]
    lost = Settlement(
        merchant="default", notification_id=uuid4(), claim=uuid4(), state=State.SENT,
        failure_reason="", jitter=1.0,
    )  # fmt: skip
    assert await store.settle([*settlements, lost]) == [*outcomes, None]
    states = {row["notification_id"]: row["state"] for row in await rows(database)}
    assert [states[outgoing.notification_id] for outgoing in claimed] == [
        state.name for state in outcomes
    ]


async def test_the_tables_are_what_the_models_say(own_database_url: str) -> None:
    """Migrated again, nothing happens; and no column is in one place alone."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy.ext.asyncio import create_async_engine

    from notify_svc.tables import metadata

    await prepare(own_database_url)
    engine = create_async_engine(own_database_url.replace("postgresql://", "postgresql+asyncpg://"))
    try:
        async with engine.connect() as connection:
            differences = await connection.run_sync(
                lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
            )
    finally:
        await engine.dispose()
    assert differences == []
