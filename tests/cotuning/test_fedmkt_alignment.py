"""Devices whose tokenizers the LLM cannot follow: they teach nothing, and the others teach as if alone."""

from cotuning.examples import Example
from cotuning.strategies.fedmkt import FedMkt
from cotuning.strategies.results import ServerResult
from tests.cotuning.strategy_inputs import same, sent, server_inputs
from tests.cotuning.test_fedmkt import PROBE, knowing, omega, said, settings
from tests.tiny_models import tiny_language_model

UNLIKE = [*PROBE[:-1], Example("x", "Say it.", "", "ﬁn ½ x")]
"""On the last row the tokenizers of bloom and llama, of which one normalises, do not align whole."""


def served(*names: str, min_coverage: float = 1.0) -> ServerResult:
    messages = [sent(said(knowing(name), UNLIKE), knowing(name), num_examples=12) for name in names]
    chosen = settings(token_alignment="fold", min_coverage=min_coverage)
    inputs = server_inputs(llm=tiny_language_model("llama"), probe=UNLIKE, device_messages=messages)
    return FedMkt(chosen).server_step(inputs)


def test_a_device_that_cannot_be_aligned_ends_nobody_elses_round() -> None:
    alone, beside, all_heard = served("llama"), served("bloom", "llama"), served("bloom", "llama", min_coverage=0.0)
    assert same(omega(alone), omega(beside))
    assert alone.teacher is not None
    assert beside.teacher is not None
    assert beside.teacher.llm_rows == [0, *alone.teacher.llm_rows]
    assert beside.teacher.llm_rows[1] > 0
    assert alone.alignment == beside.alignment != all_heard.alignment
