"""FedAvgM and FedAdam against their formulas, number by number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from cotuning.adapters import AdapterMismatch
from cotuning.server_optimizers import optimizer_step

State = dict[str, Tensor]


def tensors(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(2, 3, generator=generator), "b": scale * torch.randn(4, generator=generator)}


def numbers(state: State) -> list[float]:
    return [float(value) for name in ("a", "b") for value in state[name].flatten()]


def slow_momentum(theta: list[float], deltas: list[list[float]], rate: float, beta: float) -> list[float]:
    """By unrolling: theta_T = theta_0 + eta * sum_t sum_{s <= t} beta^(t - s) Delta_s."""
    result = list(theta)
    for t in range(len(deltas)):
        for s in range(t + 1):
            for place, delta in enumerate(deltas[s]):
                result[place] += rate * beta ** (t - s) * delta
    return result


def slow_adam(
    theta: list[float], deltas: list[list[float]], rate: float, betas: tuple[float, float], tau: float
) -> list[float]:
    result = list(theta)
    for place in range(len(theta)):
        m, v = 0.0, tau * tau
        for delta in deltas:
            m = betas[0] * m + (1 - betas[0]) * delta[place]
            v = betas[1] * v + (1 - betas[1]) * delta[place] ** 2
            result[place] += rate * m / (math.sqrt(v) + tau)
    return result


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(1e-4, 1.0),
    st.floats(1e-3, 2.0),
    st.integers(0, 2**31),
)
def test_many_rounds_equal_the_formula(
    rounds: int, beta1: float, beta2: float, tau: float, rate: float, seed: int
) -> None:
    deltas = [tensors(seed + place + 1, scale=0.1) for place in range(rounds)]
    for optimizer in ("momentum", "adam"):
        theta, state = tensors(seed), {}
        for delta in deltas:
            theta, state = optimizer_step(
                theta, delta, state, optimizer=optimizer, learning_rate=rate, beta1=beta1, beta2=beta2, tau=tau
            )
        given_deltas = [numbers(delta) for delta in deltas]
        if optimizer == "momentum":
            expected = slow_momentum(numbers(tensors(seed)), given_deltas, rate, beta1)
        else:
            expected = slow_adam(numbers(tensors(seed)), given_deltas, rate, (beta1, beta2), tau)
        assert numbers(theta) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_by_hand() -> None:
    """One value, two rounds of Delta = 1 with beta = 0.5, eta = 2: m = 1, 1.5; theta = 2, 5."""
    theta, state = {"a": torch.zeros(1)}, {}
    for expected in (2.0, 5.0):
        theta, state = optimizer_step(
            theta, {"a": torch.ones(1)}, state, optimizer="momentum", learning_rate=2.0, beta1=0.5
        )
        assert theta["a"].item() == expected
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"momentum.a": [1.5]}


def test_sgd_is_one_addition_and_momentum_without_memory_is_sgd() -> None:
    theta, delta = tensors(0), tensors(1)
    plain, state = optimizer_step(theta, delta, {}, learning_rate=0.5)
    assert state == {}
    assert all(torch.equal(plain[name], theta[name] + 0.5 * delta[name]) for name in theta)
    other, _ = optimizer_step(theta, delta, {}, optimizer="momentum", learning_rate=0.5, beta1=0.0)
    for name in theta:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-6, atol=1e-7)


def test_adam_moves_every_value_by_at_most_about_eta() -> None:
    huge = {name: 1e6 * tensor for name, tensor in tensors(1).items()}
    theta, _ = optimizer_step(tensors(0), huge, {}, optimizer="adam", learning_rate=0.01, beta1=0.0, beta2=0.0)
    for name, tensor in tensors(0).items():
        assert float((theta[name] - tensor).abs().max()) <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_zero_delta_from_the_start_changes_nothing(optimizer) -> None:
    theta = tensors(0)
    zero = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    moved, _ = optimizer_step(theta, zero, {}, optimizer=optimizer)
    assert all(torch.equal(moved[name], theta[name]) for name in theta)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_saved_state_goes_on_bit_for_bit_and_a_step_can_be_repeated(optimizer) -> None:
    theta, state = optimizer_step(tensors(0), tensors(1), {}, optimizer=optimizer)
    saved = save(state)
    first = optimizer_step(theta, tensors(2), state, optimizer=optimizer)
    again = optimizer_step(theta, tensors(2), load(saved), optimizer=optimizer)
    assert save(state) == saved
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_state_or_delta_of_another_adapter_is_refused() -> None:
    theta, state = optimizer_step(tensors(0), tensors(1), {}, optimizer="momentum")
    with pytest.raises(AdapterMismatch, match=r"optimizer's state: wrong tensor names: expected variance.a"):
        optimizer_step(theta, tensors(1), state, optimizer="adam")
    with pytest.raises(AdapterMismatch, match="optimizer's state"):
        optimizer_step(theta, tensors(1), state, optimizer="sgd")
    with pytest.raises(AdapterMismatch, match=r"shape of momentum.b: expected \[4\], got \[5\]"):
        optimizer_step(theta, tensors(1), state | {"momentum.b": torch.zeros(5)}, optimizer="momentum")
    with pytest.raises(AdapterMismatch, match="delta: wrong tensor names"):
        optimizer_step(theta, {"a": tensors(1)["a"]}, state, optimizer="momentum")
