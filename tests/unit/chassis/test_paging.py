"""Page tokens: opaque, signed, and good for one list alone."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import InvalidInputError
from chassis.paging import PageTokens

TOKENS = PageTokens("secret")


def assert_refused(token: str, *arguments: str, tokens: PageTokens = TOKENS) -> None:
    """The token is refused, with the field at fault."""
    with pytest.raises(InvalidInputError) as caught:
        tokens.read(token, *arguments)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
    assert caught.value.metadata == {"field": "page_token"}


@given(position=st.lists(st.text()), arguments=st.lists(st.text()))
def test_a_token_leads_back_to_its_position(position: list[str], arguments: list[str]) -> None:
    """Whatever the position holds, and whatever the list was asked for."""
    token = TOKENS.make(position, *arguments)
    assert TOKENS.read(token, *arguments) == position
    assert token.isascii()


def test_no_token_is_the_beginning() -> None:
    """The first page has none."""
    assert TOKENS.read("", "orders", "default") == []


@given(data=st.data())
def test_a_token_that_was_tampered_with_is_refused(data: st.DataObject) -> None:
    """Whichever byte is changed, in the signature or in the position."""
    token = TOKENS.make(["018c", "7"], "orders", "default")
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    forged = base64.urlsafe_b64encode(bytes(raw)).decode().rstrip("=")
    assert_refused(forged, "orders", "default")


@given(token=st.text(min_size=1, max_size=1024))
def test_any_text_is_refused(token: str) -> None:
    """Never an accident of ours, whatever it is: too short, not Base64, not ASCII."""
    assert_refused(token, "orders", "default")


@pytest.mark.parametrize(
    "arguments",
    [("orders", "acme"), ("events", "default"), ("orders",), ("orders", "default", ""), ()],
)
def test_a_token_of_other_arguments_is_refused(arguments: tuple[str, ...]) -> None:
    """Another merchant, another list, more or fewer arguments."""
    assert_refused(TOKENS.make(["1"], "orders", "default"), *arguments)


def test_arguments_do_not_run_into_each_other() -> None:
    """Where one ends and the next begins is part of what is signed."""
    assert_refused(TOKENS.make(["1"], "ab", "c"), "a", "bc")
    assert_refused(TOKENS.make(["1"], 'a", "b'), "a", "b")


def test_replicas_with_the_same_key_read_each_others_tokens() -> None:
    """And with another key they do not."""
    token = TOKENS.make(["1"], "orders")
    assert PageTokens("secret").read(token, "orders") == ["1"]
    assert_refused(token, "orders", tokens=PageTokens("other"))
