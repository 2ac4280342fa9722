"""How much each transfer holds at a time."""

from contextlib import ExitStack

from cloud_api.transfers import LARGEST_BYTES, SMALLEST_BYTES, TOGETHER_BYTES, Transfers


def test_the_more_transfers_the_less_each_holds() -> None:
    transfers = Transfers()
    assert transfers.block_bytes == LARGEST_BYTES
    with ExitStack() as running:
        for number in range(1, 1001):
            running.enter_context(transfers.one())
            assert SMALLEST_BYTES <= transfers.block_bytes <= LARGEST_BYTES
            together = number * transfers.block_bytes
            assert together <= TOGETHER_BYTES or transfers.block_bytes == SMALLEST_BYTES
        assert transfers.block_bytes == SMALLEST_BYTES
    assert transfers.block_bytes == LARGEST_BYTES
