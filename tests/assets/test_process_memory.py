import sys
from pathlib import Path

import pytest

from assets.process_memory import forget_peak, peak_memory

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_it_is_the_systems_own_figure(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t 10 kB\n")
    assert peak_memory(tmp_path) == 2 * MIB
    assert peak_memory() > 10 * MIB
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert peak_memory(tmp_path) > 10 * MIB  # a sandbox that does not tell it


@linux
def test_a_peak_can_be_forgotten() -> None:
    held = bytearray(b"\1") * (64 * MIB)
    peak = peak_memory()
    del held
    if not forget_peak():
        pytest.skip("this system does not let a process forget its peak")
    assert peak_memory() < peak - 32 * MIB


@linux
def test_where_it_cannot_be_forgotten_it_says_so(tmp_path: Path) -> None:
    assert not forget_peak(tmp_path / "nothing")
