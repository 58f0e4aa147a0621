"""How a mail comes to its end, with the database and the mail server played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from chassis.errors import UnavailableError
from notify_svc.commands import State
from notify_svc.delivery import (
    SETTLE_SECONDS,
    Accepted,
    Deferred,
    Delivery,
    Mail,
    Outgoing,
    Refused,
    SendOutcome,
    Settlement,
)
from tests.eventually import eventually
from tests.unit.notify_svc.builders import a_recipient, an_outgoing


class Store:
    """Hands out what it holds and keeps what became of it."""

    def __init__(self, *queued: Outgoing) -> None:
        self.queued = list(queued)
        self.settled: list[Settlement] = []
        self.away = 0
        """How many more settlements find the database away."""

    async def claim(self, limit: int, *, lease_seconds: float) -> Sequence[Outgoing]:
        """Claims from the front."""
        claimed, self.queued = self.queued[:limit], self.queued[limit:]
        return claimed

    async def settle(self, settlements: Sequence[Settlement]) -> list[State | None]:
        """Keeps the settlements."""
        if self.away:
            self.away -= 1
            raise UnavailableError("DEPENDENCY_UNAVAILABLE", "the database does not answer")
        self.settled.extend(settlements)
        return [settlement.state for settlement in settlements]

    def state_of(self, outgoing: Outgoing) -> tuple[State, str]:
        """What became of one; it must have been settled once, under its claim."""
        (found,) = [s for s in self.settled if s.notification_id == outgoing.notification_id]
        assert found.claim == outgoing.claim
        return found.state, found.failure_reason


class Letters:
    """Renders any mail as its template's name; fails for the template `broken`."""

    def render(self, outgoing: Outgoing) -> Mail | None:
        """A mail to the customer."""
        if outgoing.template == "broken":
            raise KeyError("discount")
        if outgoing.recipient is None or outgoing.recipient.email is None:
            return None
        return Mail(outgoing.recipient.email, outgoing.template.encode())


class Post:
    """A mail server that answers as told and counts what it got."""

    send_seconds = 5.0

    def __init__(self, answer: Callable[[Mail], SendOutcome] = lambda _: Accepted()) -> None:
        self.answer = answer
        self.sent: list[Mail] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, mail: Mail) -> SendOutcome:
        """Takes the mail once the door is open."""
        self.sent.append(mail)
        await self.open.wait()
        return self.answer(mail)


IN_HAND_MAX = 64


def a_delivery(store: Store, post: Post) -> Delivery:
    """The delivery, between the two."""
    return Delivery(store=store, renderer=Letters(), channel=post, in_hand_max=IN_HAND_MAX)


@pytest.mark.parametrize(
    ("answer", "settled"),
    [
        (Accepted(), (State.SENT, "")),
        (Deferred("451 later"), (State.RETRYING, "451 later")),
        (Refused("550 nobody"), (State.DEAD, "550 nobody")),
    ],
)
async def test_the_mail_servers_answer_is_written_down(
    answer: SendOutcome, settled: tuple[State, str]
) -> None:
    """Each outcome has its state."""
    outgoing = an_outgoing()
    store = Store(outgoing)
    assert await a_delivery(store, Post(lambda _: answer)).worker.run_once() == 1
    assert store.state_of(outgoing) == settled


async def test_an_erased_recipient_is_not_written_to() -> None:
    """The notification ends as suppressed; the mail server hears nothing."""
    outgoing = an_outgoing(recipient=a_recipient(email=None))
    store, post = Store(outgoing), Post()
    await a_delivery(store, post).worker.run_once()
    assert post.sent == []
    assert store.state_of(outgoing)[0] is State.SUPPRESSED


async def test_a_mail_that_cannot_be_rendered_is_tried_again_and_its_neighbours_go() -> None:
    """It is our fault, and three days are time to put it right."""
    broken, fine = an_outgoing("broken"), an_outgoing()
    store = Store(broken, fine)
    await a_delivery(store, Post()).worker.run_once()
    assert store.state_of(broken) == (
        State.RETRYING,
        "it could not be rendered: KeyError",
    )
    assert store.state_of(fine)[0] is State.SENT


async def test_a_slow_mail_does_not_hold_up_the_settling_of_its_neighbours() -> None:
    """Each is settled as soon as its own outcome is known."""
    slow, quick = an_outgoing("slow"), an_outgoing("quick")
    gate = asyncio.Event()

    class PostWithOneSlow(Post):
        async def send(self, mail: Mail) -> SendOutcome:
            if mail.content == b"slow":
                await gate.wait()
            return Accepted()

    store = Store(slow, quick)
    round_ = asyncio.create_task(a_delivery(store, PostWithOneSlow()).worker.run_once())
    await eventually(lambda: len(store.settled) == 1)
    assert store.state_of(quick)[0] is State.SENT
    gate.set()
    await round_
    assert store.state_of(slow)[0] is State.SENT


async def test_a_mail_whose_claim_may_end_while_it_is_sent_is_left_alone() -> None:
    """Another process could send it too; it is claimed anew after its lease."""
    now = asyncio.get_running_loop().time()
    late = an_outgoing(lease_end=now + Post.send_seconds - 0.1)
    store, post = Store(late), Post()
    await a_delivery(store, post).worker.run_once()
    assert (post.sent, store.settled) == ([], [])


async def test_a_database_that_is_away_for_a_moment_does_not_send_a_mail_twice() -> None:
    """The outcome is written down when it is back, while the claim holds."""
    now = asyncio.get_running_loop().time()
    outgoing = an_outgoing(lease_end=now + 30)
    store, post = Store(outgoing), Post()
    store.away = 2
    await a_delivery(store, post).worker.run_once()
    assert len(post.sent) == 1
    assert store.state_of(outgoing)[0] is State.SENT


async def test_an_outcome_is_given_up_when_the_claim_has_ended() -> None:
    """Somebody else may hold it by then, and sends the mail again."""
    clock = asyncio.get_running_loop().time

    class Hasty(Post):
        send_seconds = 0.2

    outgoing = an_outgoing(lease_end=clock() + 1.0)
    store = Store(outgoing)
    store.away = 1000
    with pytest.raises(UnavailableError):
        await a_delivery(store, Hasty()).worker.run_once()
    assert clock() <= outgoing.lease_end
    assert store.settled == []


async def test_what_is_handed_over_is_sent_without_being_claimed_again() -> None:
    """The transaction that queued it has claimed it."""
    outgoing = an_outgoing()
    store, post = Store(), Post()
    delivery = a_delivery(store, post)
    stopping = asyncio.Event()
    running = asyncio.create_task(delivery.worker.run(stopping))
    await eventually(lambda: delivery.room == IN_HAND_MAX)
    delivery.offer([outgoing])
    assert delivery.room == IN_HAND_MAX - 1
    await eventually(lambda: store.settled)
    await eventually(lambda: delivery.room == IN_HAND_MAX)
    assert store.state_of(outgoing)[0] is State.SENT
    stopping.set()
    await running


async def test_a_process_that_sends_nothing_claims_nothing() -> None:
    """What it queues is left for one that does."""
    assert a_delivery(Store(), Post()).room == 0


async def test_all_that_is_in_hand_is_begun_with_however_it_came() -> None:
    """Offered one by one, or claimed: none waits in memory while its lease runs."""
    store, post = Store(*(an_outgoing() for _ in range(10))), Post()
    post.open.clear()
    delivery = a_delivery(store, post)
    stopping = asyncio.Event()
    running = asyncio.create_task(delivery.worker.run(stopping))
    await eventually(lambda: len(post.sent) == 10)
    for _ in range(delivery.room):
        delivery.offer([an_outgoing()])
    await eventually(lambda: len(post.sent) == IN_HAND_MAX)
    post.open.set()
    await eventually(lambda: len(store.settled) == IN_HAND_MAX)
    stopping.set()
    await running


async def test_no_more_is_taken_in_hand_than_is_begun_at_once() -> None:
    """So that no lease runs out in memory."""
    store, post = Store(*(an_outgoing() for _ in range(IN_HAND_MAX + 10))), Post()
    post.open.clear()
    delivery = a_delivery(store, post)
    stopping = asyncio.Event()
    running = asyncio.create_task(delivery.worker.run(stopping))
    await eventually(lambda: len(post.sent) == IN_HAND_MAX)
    assert delivery.room == 0
    assert len(store.queued) == 10
    post.open.set()
    await eventually(lambda: len(store.settled) == IN_HAND_MAX + 10)
    stopping.set()
    await running


async def test_stopping_finishes_what_is_being_sent() -> None:
    """And begins nothing new."""
    first, second = an_outgoing(), an_outgoing()
    store, post = Store(first), Post()
    post.open.clear()
    delivery = a_delivery(store, post)
    stopping = asyncio.Event()
    running = asyncio.create_task(delivery.worker.run(stopping))
    await eventually(lambda: len(post.sent) == 1)
    store.queued.append(second)
    stopping.set()
    await asyncio.sleep(0)
    assert not running.done()
    post.open.set()
    await asyncio.wait_for(running, 5)
    assert store.state_of(first)[0] is State.SENT
    assert store.queued == [second]


async def test_a_lease_covers_sending_and_settling() -> None:
    """As long as the channel may take, and then some."""
    assert a_delivery(Store(), Post()).lease_seconds == Post.send_seconds + SETTLE_SECONDS
