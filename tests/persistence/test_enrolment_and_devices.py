"""Tokens, credentials, heartbeats, silence and revocation."""

import pytest

from persistence import devices, enrolment, rounds
from persistence.tables import DeviceRow, EnrolmentTokenRow
from protocol.devices import EnrolmentRequest, EnrolmentToken, EnrolmentTokenCreate, Heartbeat
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, DeviceStatus, RoundStatus, RunStatus
from tests.persistence.world import PROFILE, START, World


def request(token: EnrolmentToken) -> EnrolmentRequest:
    return EnrolmentRequest(token=token.token, name="edge-1", profile=PROFILE)


def code_of(error: pytest.ExceptionInfo[DomainError]) -> ErrorCode:
    return error.value.code


def test_a_token_enrols_as_many_devices_as_it_says(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(uses=2, expires_in_seconds=60), START)
    first = world.call(enrolment.enrol, request(token), START)
    second = world.call(enrolment.enrol, request(token), START)  # The same name: names need not be unique.
    assert first.device_id != second.device_id
    assert first.status is DeviceStatus.REGISTERED
    with pytest.raises(DomainError, match="was used 2 times") as caught:
        world.call(enrolment.enrol, request(token), START)
    assert code_of(caught) is ErrorCode.ENROLMENT_TOKEN_USED
    assert world.events()[0].type is EventType.DEVICE_ENROLLED


def test_unknown_and_expired_tokens(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(expires_in_seconds=60), START)
    with pytest.raises(DomainError) as caught:
        world.call(enrolment.enrol, request(token.model_copy(update={"token": "somebody else's"})), START)
    assert code_of(caught) is ErrorCode.ENROLMENT_TOKEN_UNKNOWN
    world.wait(60)
    with pytest.raises(DomainError, match="expired at") as caught:
        world.call(enrolment.enrol, request(token), world.now)
    assert code_of(caught) is ErrorCode.ENROLMENT_TOKEN_EXPIRED
    assert world.count(DeviceRow) == 0


def test_secrets_are_not_in_the_database(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), START)
    receipt = world.call(enrolment.enrol, request(token), START)
    everything = repr(world.snapshot()) + repr(world.events())
    assert token.token not in everything
    assert receipt.credential.partition(".")[2] not in everything
    assert world.count(EnrolmentTokenRow) == 1


def test_a_credential_proves_the_device(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), START)
    receipt = world.call(enrolment.enrol, request(token), START)
    assert world.call(enrolment.authenticate, receipt.credential).device_id == receipt.device_id
    wrong = [
        "",
        "x",
        receipt.device_id,
        f"{receipt.device_id}.",
        f"{receipt.device_id}.wrong",
        f"dev_0.{receipt.credential}",
    ]
    for credential in [*wrong, receipt.credential + "x", "\x00.x", "\ud800.x", "dev_.\ud800"]:
        with pytest.raises(DomainError) as caught:
            world.call(enrolment.authenticate, credential)
        assert code_of(caught) is ErrorCode.UNAUTHENTICATED
        assert receipt.device_id not in str(caught.value)


def test_a_heartbeat_is_remembered(world: World) -> None:
    device = world.enrol("a")
    world.wait(10)
    changed = PROFILE.model_copy(update={"num_examples": 41})
    heartbeat = Heartbeat(profile=changed, activity="training", reason="on battery")
    world.call(devices.record_heartbeat, device, heartbeat, world.now)
    shown = world.call(devices.get_device, device)
    assert (shown.activity, shown.reason, shown.last_seen_at) == ("training", "on battery", world.now)
    assert shown.profile.num_examples == 41
    world.call(devices.record_heartbeat, device, Heartbeat(), world.now)
    shown = world.call(devices.get_device, device)
    assert (shown.activity, shown.reason, shown.profile.num_examples) == ("idle", None, 41)


def test_a_silent_device_is_offline_until_it_is_heard_from(world: World) -> None:
    quiet, talking, polling = world.enrol("quiet"), world.enrol("talking"), world.enrol("polling")
    world.wait(60)
    world.call(devices.record_heartbeat, talking, Heartbeat(), world.now)
    assert world.call(devices.mark_silent_devices, world.now, 30) == 2
    assert world.call(devices.mark_silent_devices, world.now, 30) == 0
    assert world.call(devices.get_device, talking).status is DeviceStatus.REGISTERED
    assert world.call(devices.get_device, quiet).status is DeviceStatus.OFFLINE
    world.call(devices.record_heartbeat, quiet, Heartbeat(), world.now)
    assert world.call(devices.get_device, quiet).status is DeviceStatus.REGISTERED
    assert world.poll(polling) is None
    shown = world.call(devices.get_device, polling)
    assert (shown.status, shown.last_seen_at) == (DeviceStatus.REGISTERED, world.now)
    moves = [event.data["to"] for event in world.events() if event.type is EventType.DEVICE_STATUS_CHANGED]
    assert moves == ["offline", "offline", "registered", "registered"]


def test_a_poll_counts_as_a_sign_of_life(world: World) -> None:
    device = world.enrol("a")
    world.wait(1)
    assert world.poll(device) is None  # So soon after the last one it costs no write.
    assert world.call(devices.get_device, device).last_seen_at == START
    world.wait(devices.TOUCH_AFTER_SECONDS)
    assert world.poll(device) is None
    assert world.call(devices.get_device, device).last_seen_at == world.now


def test_lists_have_pages_and_filters(world: World) -> None:
    ids = world.enrol_many("a", "b", "c", "d", "e")
    world.call(devices.revoke_device, ids[1], world.now)
    seen, cursor = [], None
    while True:
        page = world.call(devices.list_devices, cursor=cursor, limit=2)
        assert len(page.items) <= 2
        seen += [device.device_id for device in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == ids
    revoked = world.call(devices.list_devices, limit=10, status=DeviceStatus.REVOKED)
    assert [device.device_id for device in revoked.items] == [ids[1]]
    assert revoked.next_cursor is None


def test_unknown_devices(world: World) -> None:
    for function, arguments in [
        (devices.get_device, ()),
        (devices.revoke_device, (START,)),
        (devices.record_heartbeat, (Heartbeat(), START)),
    ]:
        with pytest.raises(DomainError) as caught:
            world.call(function, "dev_0", *arguments)
        assert code_of(caught) is ErrorCode.DEVICE_NOT_FOUND


def test_a_device_that_waits_for_approval_gets_no_work_until_it_is_approved(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(approval=True), START)
    receipt = world.call(enrolment.enrol, request(token), START)
    assert receipt.status is DeviceStatus.PENDING
    assert world.call(enrolment.authenticate, receipt.credential).device_id == receipt.device_id
    run = world.start_run()
    with pytest.raises(DomainError, match="waits for an operator's approval") as caught:
        world.poll(receipt.device_id)
    assert code_of(caught) is ErrorCode.DEVICE_NOT_APPROVED
    world.wait(600)
    assert world.call(devices.mark_silent_devices, world.now, 30) == 0  # It is not offline, it waits.
    for _ in range(2):
        assert world.call(devices.approve_device, receipt.device_id, world.now).status is DeviceStatus.REGISTERED
    moves = [event.data["to"] for event in world.events() if event.type is EventType.DEVICE_STATUS_CHANGED]
    assert moves == ["registered"]
    assert world.take(receipt.device_id).run_id == run.run_id


def test_a_revoked_device_is_not_approved(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(approval=True), START)
    device_id = world.call(enrolment.enrol, request(token), START).device_id
    world.call(devices.revoke_device, device_id, START)
    with pytest.raises(DomainError) as caught:
        world.call(devices.approve_device, device_id, START)
    assert code_of(caught) is ErrorCode.ILLEGAL_TRANSITION


def test_tokens_are_listed_without_their_secrets_and_revoked(world: World) -> None:
    tokens = []
    for note in ("one", "two", "three"):
        world.wait(1)
        tokens.append(world.call(enrolment.create_token, EnrolmentTokenCreate(uses=2, note=note), world.now))
    world.call(enrolment.enrol, request(tokens[0]), world.now)
    page = world.call(enrolment.list_tokens, limit=2)
    rest = world.call(enrolment.list_tokens, limit=2, cursor=page.next_cursor)
    assert [(each.note, each.used) for each in page.items + rest.items] == [("three", 0), ("two", 0), ("one", 1)]
    assert rest.next_cursor is None
    assert all(token.token not in repr(page) + repr(rest) for token in tokens)
    revoked = world.call(enrolment.revoke_token, tokens[0].token_id, world.now)
    assert revoked.revoked_at == world.now
    world.wait(1)
    assert world.call(enrolment.revoke_token, tokens[0].token_id, world.now) == revoked
    with pytest.raises(DomainError) as caught:
        world.call(enrolment.enrol, request(tokens[0]), world.now)
    assert code_of(caught) is ErrorCode.ENROLMENT_TOKEN_REVOKED
    with pytest.raises(DomainError) as caught:
        world.call(enrolment.revoke_token, "tok_0", world.now)
    assert code_of(caught) is ErrorCode.ENROLMENT_TOKEN_NOT_FOUND


def known(world: World, credential: str) -> bool:
    try:
        identity = world.call(enrolment.authenticate, credential)
    except DomainError:
        return False
    world.call(enrolment.adopt_credential, identity)
    return True


def test_a_credential_is_good_until_the_one_after_it_is_used(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), START)
    first = world.call(enrolment.enrol, request(token), START)
    lost = world.call(enrolment.offer_credential, first.device_id).credential  # The answer did not arrive.
    second = world.call(enrolment.offer_credential, first.device_id).credential
    assert known(world, first.credential)
    assert not known(world, lost)
    # The device has stored the new one, and is killed before it used it: whichever it has on disk opens.
    assert known(world, first.credential)
    assert known(world, second)
    assert not known(world, first.credential)
    assert known(world, second)
    assert not known(world, f"{first.device_id}.")


def test_a_revoked_device_is_out_at_once(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), START)
    receipt = world.call(enrolment.enrol, request(token), START)
    assert world.call(devices.revoke_device, receipt.device_id, START).status is DeviceStatus.REVOKED
    assert world.call(devices.revoke_device, receipt.device_id, START).status is DeviceStatus.REVOKED
    with pytest.raises(DomainError) as caught:
        world.call(enrolment.authenticate, receipt.credential)
    assert code_of(caught) is ErrorCode.DEVICE_REVOKED
    with pytest.raises(DomainError) as caught:
        world.poll(receipt.device_id)
    assert code_of(caught) is ErrorCode.DEVICE_REVOKED


def test_revoking_in_the_middle_of_a_round_drops_the_update(world: World) -> None:
    done, working, other = world.enrol_many("done", "working", "other")
    run = world.start_run(min_updates=1)
    world.deliver(done)
    world.take(working)
    world.take(other)
    world.call(devices.revoke_device, done, world.now)
    world.call(devices.revoke_device, working, world.now)
    assert world.statuses(run.run_id) == {
        "done": AssignmentStatus.REJECTED,
        "working": AssignmentStatus.LOST,
        "other": AssignmentStatus.OFFERED,
    }
    assert {device.reason for device in world.round(run.run_id).devices} == {"the device was revoked", None}
    assert world.round(run.run_id).status is RoundStatus.COLLECTING


def test_revoking_the_last_one_to_wait_for_closes_the_round(world: World) -> None:
    done, working = world.enrol_many("done", "working")
    run = world.start_run(min_updates=1)
    world.take(working)
    world.deliver(done)
    assert world.round(run.run_id).status is RoundStatus.COLLECTING
    world.call(devices.revoke_device, working, world.now)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_an_update_that_is_being_aggregated_is_not_taken_out_of_it(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    world.deliver(device)
    world.call(devices.revoke_device, device, world.now)
    world.finish_round()
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.COUNTED}
    assert world.run(run.run_id).status is RunStatus.RUNNING
    assert world.call(rounds.mark_lost_assignments, world.now) == 0
