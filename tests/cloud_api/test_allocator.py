"""How the C library gives memory to threads."""

import ctypes
import subprocess
import sys

import pytest

from tests.cloud_api.test_process import SERVICES

SCRIPT = """
import ctypes, sys, tempfile, threading
if sys.argv[1] == "shared":
    from cloud_api.allocator import share_arenas
    share_arenas()
barrier = threading.Barrier(13)
def hold():
    block = bytes(100_000)
    barrier.wait()
    barrier.wait()
threads = [threading.Thread(target=hold) for _ in range(12)]
for thread in threads:
    thread.start()
barrier.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
barrier.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_threads_share_two_arenas() -> None:
    def arenas(how: str) -> int:
        command = [sys.executable, "-c", SCRIPT, how]
        environment = {"PYTHONPATH": str(SERVICES)}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert arenas("shared") == 2
    assert arenas("as they come") > 2
