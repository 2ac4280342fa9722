"""What no strategy declared does not cross the simulator's network unseen."""

from pathlib import Path

import pytest
import torch

from cotuning.examples import Example
from cotuning.strategies.results import DeviceResult, Message
from protocol.strategies import STRATEGIES
from simulation.budget import Meter
from simulation.errors import UndeclaredTraffic
from simulation.prepared import Prepared
from simulation.wire import Wire, crossing

MESSAGE = Message({"kept": torch.zeros(3)}, {"about": "them"})


def wire_of(folder: Path, name: str) -> Wire:
    spec = STRATEGIES[name]
    return Wire(folder, spec, Prepared(None, None, None, 0, None), Meter(crossing(spec)))


def sent(message: Message) -> DeviceResult:
    return DeviceResult({}, num_examples=1, losses={}, message=message)


def test_a_declared_message_is_counted_and_read_as_it_came(tmp_path: Path) -> None:
    network = wire_of(tmp_path, "data_based")
    received = network.upload_message("phone", 1, sent(MESSAGE))
    assert received is not None
    assert (received.metadata, torch.equal(received.tensors["kept"], MESSAGE.tensors["kept"])) == (
        {"about": "them"},
        True,
    )
    (traffic,) = network.meter.cost().traffic
    assert list(traffic.up) == ["counts"]
    assert traffic.up["counts"] > 12


def test_a_message_that_was_not_declared_is_refused_in_both_directions(tmp_path: Path) -> None:
    network = wire_of(tmp_path, "standalone")
    with pytest.raises(UndeclaredTraffic, match=r"travels up .*\(none\), got 'message' of phone"):
        network.upload_message("phone", 1, sent(MESSAGE))
    with pytest.raises(UndeclaredTraffic, match=r"travels down .*\(none\), got 'message' of phone"):
        network.download("phone", 1, network.publish(None, MESSAGE))


def test_no_text_leaves_a_device(tmp_path: Path) -> None:
    with pytest.raises(UndeclaredTraffic, match="expected a message without rows from phone, got 1"):
        wire_of(tmp_path, "data_based").upload_message("phone", 1, sent(Message(rows=[Example("a", "b", "", "c")])))
