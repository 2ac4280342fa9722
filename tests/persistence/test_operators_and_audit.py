"""Operators' keys, and the trail of what they did."""

import pytest
from sqlalchemy import select

from persistence import audit, operators
from persistence.operator_tables import AuditRow, OperatorKeyRow
from protocol.errors import DomainError, ErrorCode
from protocol.operators import OperatorKeyCreate, OperatorRole
from tests.persistence.world import START, World


def create(world: World, name: str = "ada", **changed: object) -> tuple[str, str]:
    request = OperatorKeyCreate.model_validate({"name": name, **changed})
    created = world.call(operators.create_key, request, "bootstrap", world.now)
    return created.key_id, created.key


def refused(world: World, key: str) -> str:
    with pytest.raises(DomainError) as caught:
        world.call(operators.authenticate, key, world.now)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    return caught.value.detail


def test_a_key_proves_its_operator_and_only_its_hash_is_kept(world: World) -> None:
    key_id, key = create(world, role="operator")
    found = world.call(operators.authenticate, key, world.now)
    assert (found.key_id, found.name, found.role) == (key_id, "ada", OperatorRole.OPERATOR)
    assert key.startswith(found.prefix)
    assert len(found.prefix) < len(key) / 2
    assert key not in repr(world.snapshot())
    for wrong in ("", "cok_", key[:-1], key + "x", found.prefix, "cok_\x00", "cok_\ud800"):
        refused(world, wrong)
    assert world.count(OperatorKeyRow) == 1


def test_a_key_expires_and_is_revoked_at_once(world: World) -> None:
    _, brief = create(world, expires_in_seconds=60)
    lasting_id, lasting = create(world, expires_in_seconds=None)
    world.wait(60)
    assert "expired at" in refused(world, brief)
    assert world.call(operators.authenticate, lasting, world.now).expires_at is None
    revoked = world.call(operators.revoke_key, lasting_id, world.now)
    assert "was revoked at" in refused(world, lasting)
    world.wait(1)
    assert world.call(operators.revoke_key, lasting_id, world.now) == revoked
    with pytest.raises(DomainError) as caught:
        world.call(operators.revoke_key, "key_0", world.now)
    assert caught.value.code is ErrorCode.OPERATOR_KEY_NOT_FOUND


def test_keys_are_listed_page_by_page(world: World) -> None:
    ids = []
    for name in ("a", "b", "c"):
        world.wait(1)
        ids.append(create(world, name)[0])
    page = world.call(operators.list_keys, limit=2)
    rest = world.call(operators.list_keys, limit=2, cursor=page.next_cursor)
    assert [each.key_id for each in page.items + rest.items] == ids
    assert rest.next_cursor is None


@pytest.mark.parametrize("role", OperatorRole)
def test_each_role_includes_those_before_it(role: OperatorRole) -> None:
    order = ["viewer", "operator", "admin"]
    assert [role.includes(other) for other in OperatorRole] == [order.index(role) >= place for place in range(3)]


def deed(**changed: object) -> audit.Deed:
    values: dict[str, object] = {"key_id": "key_1", "name": "ada", "action": "run.stop", "subject": "run_1"}
    return audit.Deed(**(values | {"request_id": "r"} | changed))  # type: ignore[arg-type]


def test_the_trail_is_read_newest_first_and_by_key_action_and_subject(world: World) -> None:
    for number in range(5):
        what = deed(subject=f"run_{number}", key_id=f"key_{number % 2}", action=("run.stop", "run.create")[number // 3])
        world.call(audit.record, what, "done", world.now)
    seen, cursor = [], None
    while True:
        page = world.call(audit.list_entries, cursor=cursor, limit=2)
        seen += [entry.subject for entry in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == ["run_4", "run_3", "run_2", "run_1", "run_0"]
    for filters, expected in (
        ({"key_id": "key_1"}, ["run_3", "run_1"]),
        ({"action": "run.create"}, ["run_4", "run_3"]),
        ({"subject": "run_2", "key_id": "key_0"}, ["run_2"]),
    ):
        assert [entry.subject for entry in world.call(audit.list_entries, **filters).items] == expected
    for cursor in ("x", "-1", "9" * 30, "\u0663"):
        with pytest.raises(DomainError) as caught:
            world.call(audit.list_entries, cursor=cursor)
        assert caught.value.code is ErrorCode.INVALID_FIELD


def test_an_entry_can_neither_be_changed_nor_removed(world: World) -> None:
    world.call(audit.record, deed(subject="a\x00" + "b" * 300), "done", START)
    with world.database.transaction() as session:
        row = session.scalars(select(AuditRow)).one()
        row.outcome = "nothing"
        with pytest.raises(AttributeError, match="append-only"):
            session.flush()
        session.rollback()
    with world.database.transaction() as session:
        session.delete(session.scalars(select(AuditRow)).one())
        with pytest.raises(AttributeError, match="append-only"):
            session.flush()
        session.rollback()
    [entry] = world.call(audit.list_entries).items
    assert entry.outcome == "done"
    assert len(entry.subject or "") == audit.LONGEST_SUBJECT
