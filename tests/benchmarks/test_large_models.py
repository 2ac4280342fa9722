"""The benchmark for graphics cards runs on a processor at tiny sizes, and measures what it says it does."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import large_models, measuring
from benchmarks.large_models import Turns, byte_offsets, has_trl, main
from benchmarks.pairs import Shape, random_model, reader, step_operations

TINY = Shape(16, 1, 2, 1, 32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("checkpointing", "with_trl"), [(False, has_trl()), (True, False)])
def test_it_runs_at_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, with_trl: bool
) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(large_models, "has_trl", lambda: with_trl)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    sizes = ["--llm-vocabulary", "8300", "--slm-vocabulary", "4200", "--rows", "2", "--length", "24"]
    shapes = ["--llm", "16,2,2,1,32", "--proxy", "8,1,2,1,16,tied", "--slm", "8,1,2,2,16"]
    rest = ["--repeats", "2", "--product-size", "16", "--lora-rank", "2"]
    main(["--device", "cpu", *sizes, *shapes, *rest, *(["--gradient-checkpointing"] if checkpointing else [])])
    written = json.loads((tmp_path / "bench_large.json").read_text())
    assert written["product_operations_a_second"] > 0
    rivals = ["trl_gkd", "trl_gold"] if with_trl else [None, None]
    for (_, found), rival in zip(written["couples"].items(), rivals, strict=True):
        assert found["steps"].keys() == {"bare", "saml", *([rival] if rival else [])}
        for step in found["steps"].values():
            assert len(step["all_seconds"]) == 2
            assert step["over_bare"] > 0
        assert found["steps"]["saml"]["share_of_product_rate"] > 0
        assert [model["tokens"] for model in found["models"]] == [48, 48]
        assert all(model["trained_parameters"] < model["parameters"] for model in found["models"])
    assert [model["vocabulary"] for model in written["couples"]["server"]["models"]] == [8300, 8300]


def test_without_a_card_it_says_so_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(large_models, "measure", lambda arguments: pytest.fail("measured"))
    main([])
    assert "needs a CUDA device" in capsys.readouterr().out


def fail(message: str) -> None:
    raise RuntimeError(message)


def test_what_runs_out_of_memory_is_a_result_and_the_others_go_on() -> None:
    calls: list[str] = []

    def large() -> None:
        calls.append("large")
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no room")

    turns = Turns({"bare": lambda: calls.append("bare"), "large": large}, torch.device("cpu"))
    turns.run(3)
    with pytest.raises(RuntimeError, match="sizes differ"):
        Turns({"bare": partial(fail, "sizes differ")}, torch.device("cpu")).run(1)
    results = turns.results()
    assert results["large"] == {"failed": "out of memory"}
    assert len(results["bare"]["all_seconds"]) == 3
    assert calls == ["bare", "large", "large", "bare", "bare", "large", "bare"]


def test_operations_of_frozen_weights_are_four_and_of_trained_ones_six() -> None:
    every, adapter = (reader("bpe_whole_numbers", TINY, 4200, rows=1, length=8, lora_rank=rank) for rank in (None, 2))
    decoder = TINY.hidden_size * (2 * 16 + 2 * 8) + 3 * 16 * 32
    head = 4200 * 16
    assert step_operations([every]) == 6 * (decoder + head) * 8
    lora = sum(parameter.numel() for parameter in adapter.trained())
    assert step_operations([adapter]) == (4 * (decoder + head) + 6 * lora) * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_made_in_their_type_and_positions_in_float32(dtype: torch.dtype) -> None:
    model = random_model(TINY, 40, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() is torch.float32


def test_a_shape_that_cannot_be_read_is_refused() -> None:
    assert Shape.parse("16,1,2,1,32,tied") == Shape(16, 1, 2, 1, 32, tied=True)
    for text in ("16,1,2,1", "16,1,2,1,x", "16,1,2,1,32,untied", "16,1,2,1,32,tied,tied"):
        with pytest.raises(ValueError, match="expected hidden,layers,heads"):
            Shape.parse(text)


def test_byte_offsets_cover_the_response_without_gaps() -> None:
    each = reader("bpe_single_digits", TINY, None, rows=2, length=24)
    offsets_BT2 = byte_offsets(each.batch)
    for row, content_T in zip(offsets_BT2, each.batch.content_mask_BT, strict=True):
        inside = row[content_T]
        assert inside[0, 0] == 0
        assert torch.equal(inside[1:, 0], inside[:-1, 1])
        assert bool((inside[:, 1] > inside[:, 0]).all())
