"""Randomness that follows from a seed and a name, and leaves the caller's generators alone."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """A seed for one stage: a pure function of `seed` and `labels`, equal on every machine and Python.

    SHA-256 of their JSON, so that neighbouring seeds give unrelated streams; 63 bits, which every generator takes.
    """
    digest = hashlib.sha256(json.dumps([seed, *labels]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def isolated_generators(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's global generators (CPU, and `device`'s if it is a GPU) start from `seed`; outside, untouched.

    peft's initialisation and dropout draw from the global generators, and take no other.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
