import pytest
import torch
from torch import Tensor

from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example, render_prompt
from cotuning.pooled_features import View, distances, feature_steps, fit_map, pool, pooled_rows
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = [*tiny_examples(5), Example("long", "Say it.", "", "the red apple and the green river")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_pooled_state_is_the_mean_over_the_response() -> None:
    lm = tiny_language_model("gpt2")
    pooled_ND = pooled_rows(lm, EncodedRows(lm, ROWS, max_length=64))
    for row, pooled_D in zip(ROWS, pooled_ND, strict=True):
        prompt = render_prompt(lm.tokenizer, row)
        ids = lm.tokenizer(prompt + row.output, add_special_tokens=False)["input_ids"]
        num_prompt = len(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            states_TD = lm.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        # The state at a position predicts the next token: from the prompt's last token to the response's last.
        torch.testing.assert_close(pooled_D, states_TD[num_prompt - 1 :].mean(0), atol=1e-5, rtol=1e-4)


def test_padding_and_the_rest_of_the_batch_change_nothing() -> None:
    lm = tiny_language_model("gpt2")
    rows = EncodedRows(lm, ROWS, max_length=64)
    whole, alone = rows.batch(range(6)), rows.batch([0])
    hidden_BTD = random(*whole.input_ids_BT.shape, 3)
    hidden_BTD[0, alone.input_ids_BT.shape[1] :] = 1e9
    assert torch.equal(pool(hidden_BTD, whole)[0], pool(hidden_BTD[:1, : alone.input_ids_BT.shape[1]], alone)[0])


def test_a_row_without_a_response_is_refused() -> None:
    lm = tiny_language_model("gpt2")
    batch = EncodedRows(lm, ROWS, max_length=64).batch([0, 1])
    batch.labels_BT[1] = -100
    with pytest.raises(ValueError, match="row 1 has no token of one"):
        pool(torch.zeros(*batch.input_ids_BT.shape, 3), batch)


@pytest.mark.parametrize(("num_rows", "width"), [(30, 4), (6, 12)], ids=["tall", "wide"])
def test_the_map_is_the_least_of_its_objective(num_rows: int, width: int) -> None:
    x_ND, f_NE = random(num_rows, width), random(num_rows, 3, seed=1)
    found = fit_map(x_ND, f_NE, ridge=0.2).double()
    added = 0.2 * float(torch.linalg.svdvals(x_ND).square().sum() / width)
    map_DE = found.clone().requires_grad_()
    objective = (x_ND @ map_DE - f_NE).square().sum() + added * map_DE.square().sum()
    objective.backward()  # type: ignore[no-untyped-call]
    assert map_DE.grad is not None
    assert float(map_DE.grad.abs().max()) < 1e-4
    # As ordinary least squares with the ridge as further rows.
    stacked = torch.cat([x_ND, added**0.5 * torch.eye(width, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([f_NE, torch.zeros(width, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_map_of_nothing_is_nothing_and_bad_input_is_refused() -> None:
    assert not fit_map(torch.zeros(4, 2), random(4, 3), ridge=0.1).any()
    with pytest.raises(ValueError, match=r"got 4 and 5 rows, ridge 0\.1"):
        fit_map(random(4, 2), random(5, 3), ridge=0.1)
    with pytest.raises(ValueError, match="got 4 and 4 rows, ridge 0"):
        fit_map(random(4, 2), random(4, 3), ridge=0)


def test_distances_by_hand() -> None:
    found = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[6.0, 8.0], [0.0, -1.0], [0.0, 5.0], [1.0, 0.0]])
    assert distances(found, target, "cosine", size=1.0).tolist() == pytest.approx([0.0, 2.0, 1.0, 1.0], abs=1e-6)
    assert distances(found, target, "mse", size=2.0).tolist() == pytest.approx([12.5, 4.5, 13.0, 0.5])
    assert torch.equal(distances(target, target, "mse", size=1.0), torch.zeros(4))
    with pytest.raises(ValueError, match="a distance of cosine or mse, got 'dot'"):
        distances(found, target, "dot", size=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_teachers_gradient_is_exactly_zero(distance: str) -> None:
    found, target = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    distances(found, target, distance, size=2.0).sum().backward()  # type: ignore[arg-type, no-untyped-call]
    assert target.grad is None
    assert found.grad is not None
    assert found.grad.any()
    assert torch.autograd.gradcheck(lambda x: distances(x, target, distance, size=2.0), (found,))  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_step_is_the_mean_over_its_rows_however_it_is_cut(distance: str) -> None:
    lm = tiny_language_model("gpt2")
    rows = EncodedRows(lm, ROWS, max_length=64)
    pooled_ND = pooled_rows(lm, rows)
    centre_D, map_DE, target_NE = pooled_ND.mean(0), random(16, 3, seed=2).float(), random(6, 3, seed=3).float()
    indices = [4, 0, 5, 2]
    found_NE = (pooled_ND - centre_D) @ map_DE
    values = []
    for index in indices:
        a, b = found_NE[index].double(), target_NE[index].double()
        size = float(target_NE.double().square().sum(1).mean())
        cosine = float(a @ b / (a.norm() * b.norm()))
        values.append(1 - cosine if distance == "cosine" else float((a - b) @ (a - b)) / size)
    for micro in (None, 1, 3):
        step_at = feature_steps(
            lm,
            "slm",
            rows,
            [indices],
            view=View(centre_D, map_DE),
            target_NE=target_NE,
            distance=distance,  # type: ignore[arg-type]
            weight=0.5,
            micro_batch_size=micro,
        )
        with torch.no_grad():
            parts = list(step_at(0))
        assert len(parts) == {None: 1, 1: 4, 3: 2}[micro]
        assert sum(float(part.report["feature"]) for part in parts) == pytest.approx(sum(values) / 4, rel=1e-4)
        assert sum(float(part.objectives["slm"]) for part in parts) == pytest.approx(sum(values) / 8, rel=1e-4)
