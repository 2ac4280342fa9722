"""Cursors that are ids or names: one that a list never gave out is refused, not taken for a place in the list."""

from collections.abc import Callable
from typing import Any

import pytest

from persistence import devices, enrolment, federations, operators, runs, webhooks
from protocol.errors import DomainError, ErrorCode
from tests.persistence.world import World

LISTS: list[tuple[Callable[..., Any], str]] = [
    (devices.list_devices, "dev"),
    (enrolment.list_tokens, "tok"),
    (operators.list_keys, "key"),
    (runs.list_runs, "run"),
    (webhooks.list_webhooks, "whk"),
]


@pytest.mark.parametrize(("function", "prefix"), LISTS)
def test_a_cursor_of_another_form_is_refused(world: World, function: Callable[..., Any], prefix: str) -> None:
    digits = "0197c0ffee00a1b2c3d4e5f60718"
    assert world.call(function, cursor=f"{prefix}_{digits}", limit=10).next_cursor is None
    for wrong in ("", "zzz", digits, f"asg_{digits}", f"{prefix}_{digits}0", f"{prefix}_{digits.upper()}", "\x00"):
        with pytest.raises(DomainError, match=f"{prefix}_") as caught:
            world.call(function, cursor=wrong, limit=10)
        assert caught.value.code is ErrorCode.INVALID_FIELD


def test_a_cursor_that_is_no_federations_name_is_refused(world: World) -> None:
    assert world.call(federations.list_federations, cursor="a-1").next_cursor is None
    for wrong in ("", "A", "a b", "x" * 65):
        with pytest.raises(DomainError) as caught:
            world.call(federations.list_federations, cursor=wrong)
        assert caught.value.code is ErrorCode.INVALID_FIELD
