"""The payload: what is packed is what is parsed, what is wrong is refused, and its loss is a divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from cotuning.alignment import align, encode_batch
from cotuning.folding import fold_pair
from cotuning.mutual_loss import Head, mutual_loss, payload_loss
from cotuning.payload import PayloadError, PayloadRows, build_payload, match_rows, parse_payload
from cotuning.top_classes import TopClasses, keep_top, top_classes
from tests.cotuning.trained_tokenizers import SENTENCES, table_of, trained

CLASSES, K, DIM = 50, 8, 6
RESPONSES = ["The dog sleeps.", "", "naïve café"]
EXPECTED = {"fingerprint": "f" * 64, "num_classes": CLASSES, "probe_set": "a" * 64, "responses": RESPONSES}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(rows: int = 6, classes: int = CLASSES, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    return (random(rows, classes, seed=seed) * sharpness).log_softmax(1)


def packed(k: int = K, logs: Tensor | None = None, **options):
    """Four rows of the first sample, END of the second, one row of the third."""
    return build_payload(
        keep_top(log_probs() if logs is None else logs, k),
        sample_S=torch.tensor([0, 0, 0, 0, 1, 2]),
        byte_start_S=torch.tensor([0, 3, 7, 15, 0, 2]),
        responses=RESPONSES,
        num_classes=CLASSES,
        fingerprint=EXPECTED["fingerprint"],
        probe_set=EXPECTED["probe_set"],
        temperature=1.5,
        **options,
    )


def test_a_payload_survives_a_safetensors_file():
    tensors, metadata = packed()
    back = load(save(tensors, metadata))
    rows = parse_payload(back, metadata, **EXPECTED)
    assert rows.sample_S.tolist() == [0, 0, 0, 0, 1, 2]
    assert rows.byte_start_S.tolist() == [0, 3, 7, 15, 0, 2]
    assert (rows.temperature, rows.num_classes, rows.fingerprint) == (1.5, CLASSES, "f" * 64)
    assert torch.equal(rows.ids_SK.sort(1).values, keep_top(log_probs(), K).ids_SK.sort(1).values)
    assert bool((rows.log_probs_SK[:, 1:] <= rows.log_probs_SK[:, :-1]).all())
    assert all(isinstance(value, str) for value in metadata.values())
    again = packed()
    assert again[1] == metadata
    assert all(torch.equal(again[0][name], tensor) for name, tensor in tensors.items())


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(1e-6, 20),
    st.sampled_from([1, 4, 8, 32, CLASSES, 200]),
    st.sampled_from(["int7", "int8", "float16"]),
)
def test_rounding_errs_by_no_more_than_it_says(seed: int, sharpness: float, k: int, values: str) -> None:
    """The bounds of `packed_values`, on log-probabilities given that the class is one of the K, and of tails."""
    exact = log_probs(seed=seed, sharpness=sharpness)
    rows = parse_payload(*packed(k, exact, values=values), **EXPECTED)
    kept = keep_top(exact, k)
    mass = rows.log_probs_SK.exp().sum(1) + rows.tail_S
    assert (mass - 1).abs().max() <= 2e-6
    assert (rows.tail_S - kept.tail_S).abs().max() <= 2**-12
    assert ((rows.tail_S >= 0) & (rows.tail_S <= 1)).all()
    for place in range(len(exact)):
        true = exact[place, rows.ids_SK[place]]
        true = true - true.logsumexp(0)
        got = rows.log_probs_SK[place].double()
        error = (got - got.logsumexp(0) - true).abs()
        depth = true.max() - true
        reach = min(float(depth.max()), 20.0)
        scale = min(max(1.0222 * reach, 0.0798), 20.0)
        bound = {"int7": scale / 127, "int8": scale / 255, "float16": reach / 1024}[values]
        assert bound <= {"int7": 0.158, "int8": 0.079, "float16": 0.02}[values]
        assert float(error[depth <= 20].max()) <= bound + 2e-5
        assert float(got[depth > 20].exp().sum()) <= k * math.exp(-19.9)


@pytest.mark.parametrize(("values", "allowed"), [("int7", 1e-2), ("int8", 5e-3), ("float16", 5e-4)])
def test_rounding_hardly_moves_the_loss(values: str, allowed: float) -> None:
    teacher, student = log_probs(seed=1), log_probs(seed=2)
    rows = parse_payload(*packed(16, teacher, values=values), **EXPECTED)
    exact = slow_loss(teacher, student, 16)
    identity = Head(torch.eye(CLASSES, dtype=torch.float64), CLASSES)
    rounded = payload_loss(student, identity, rows, temperature=1.0).item()
    assert rounded == pytest.approx(exact, rel=allowed)


def slow_loss(teacher: Tensor, student: Tensor, k: int) -> float:
    """KL over the teacher's k most probable classes and one bucket for the rest, by loops."""
    total = 0.0
    for p_row, q_row in zip(teacher.exp().tolist(), student.exp().tolist(), strict=True):
        order = sorted(range(len(p_row)), key=lambda index: -p_row[index])
        groups = [[index] for index in order[:k]] + ([order[k:]] if k < len(p_row) else [])
        for group in groups:
            p, q = sum(p_row[index] for index in group), sum(q_row[index] for index in group)
            total += p * math.log(p / q)
    return total / len(teacher)


def rows_of(teacher: Tensor, k: int, temperature: float = 1.0) -> PayloadRows:
    """Rows without rounding."""
    ids = teacher.topk(min(k, teacher.shape[1])).indices
    tail = teacher.exp().scatter(1, ids, 0.0).sum(1)
    places = torch.zeros(len(teacher), dtype=torch.int64)
    return PayloadRows(places, places, ids, teacher.gather(1, ids), tail, teacher.shape[1], temperature, "f")


@pytest.mark.parametrize("k", [1, 5, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_equals_the_slow_formula(k, temperature):
    teacher = log_probs(seed=1)
    hidden, weight = random(6, DIM, seed=3), random(CLASSES + 4, DIM, seed=4)
    student = (hidden @ weight[:CLASSES].T / temperature).log_softmax(1)
    loss = payload_loss(hidden, Head(weight, CLASSES), rows_of(teacher, k, temperature), chunk_rows=4)
    assert loss.item() == pytest.approx(temperature**2 * slow_loss(teacher, student, k), rel=1e-10)


def test_with_all_classes_it_is_the_mutual_loss():
    hidden, weight = random(6, DIM, seed=3), random(CLASSES, DIM, seed=4)
    teacher_hidden, teacher_weight = random(6, DIM, seed=5), random(CLASSES, DIM, seed=6)
    teacher, student = Head(teacher_weight, CLASSES), Head(weight, CLASSES)
    pair = fold_pair(None, small_table(), None, small_table())
    full = mutual_loss(hidden, student, teacher_hidden, teacher, pair)[0]
    top = top_classes(teacher_hidden, teacher, k=999, chunk_rows=4)
    assert top.ids_SK.shape == (6, CLASSES)
    assert float(top.tail_S.max()) == 0.0
    rows = rows_of((teacher_hidden @ teacher_weight.T).log_softmax(1), CLASSES)
    assert payload_loss(hidden, student, rows).item() == pytest.approx(full.item(), rel=1e-12)


def small_table():
    """A table of as many ids as there are classes here; only its size matters."""
    from dataclasses import replace

    table = table_of("byte_level")
    return replace(table, pieces=table.pieces[:CLASSES])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, CLASSES), st.floats(0.1, 10))
def test_it_is_never_negative_and_grows_with_k(seed, k, sharpness):
    teacher, student = log_probs(seed=seed, sharpness=sharpness), log_probs(seed=seed + 1, sharpness=sharpness)
    identity = Head(torch.eye(CLASSES, dtype=torch.float64), CLASSES)
    coarse, finer = (
        payload_loss(student, identity, rows_of(teacher, size)).item() for size in (k, min(k + 3, CLASSES))
    )
    assert -1e-9 <= coarse <= finer + 1e-9
    assert abs(payload_loss(teacher, identity, rows_of(teacher, k)).item()) <= 1e-9


@pytest.mark.parametrize("folded", [False, True])
def test_gradients_pass_gradcheck_and_reach_the_student_only(folded):
    hidden, weight = random(6, DIM, seed=3).requires_grad_(), random(70, DIM, seed=4).requires_grad_()
    map_v = torch.randint(CLASSES, (70,), generator=torch.Generator().manual_seed(0))
    map_v[:CLASSES] = torch.arange(CLASSES)
    rows = rows_of(log_probs(seed=1), 5, 1.3)

    weights = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(hidden_sd: Tensor, weight_vd: Tensor) -> Tensor:
        head = Head(weight_vd, 70 if folded else CLASSES)
        return payload_loss(hidden_sd, head, rows, map_V=map_v if folded else None, weights_S=weights, chunk_rows=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_rows_is_zero_with_a_graph():
    hidden = random(6, DIM, seed=3).requires_grad_()
    empty = rows_of(log_probs(), 5).take(torch.zeros(0, dtype=torch.int64))
    loss = payload_loss(hidden[:0], Head(random(CLASSES, DIM), CLASSES), empty)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0


def test_sizes_that_do_not_fit_are_refused():
    rows = rows_of(log_probs(), 5)
    with pytest.raises(ValueError, match="5 and 6 rows"):
        payload_loss(random(5, DIM), Head(random(CLASSES, DIM), CLASSES), rows)
    with pytest.raises(ValueError, match=f"{CLASSES} classes, got 40"):
        payload_loss(random(6, DIM), Head(random(40, DIM), 40), rows)


def altered(name: str, change) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = packed()
    tensors[name] = change(tensors[name].clone())
    return tensors, metadata


def with_value(tensor: Tensor, value: float, place: int = 0) -> Tensor:
    tensor[place] = value
    return tensor


def flipped(tensor: Tensor, *bits: int, row: int | None = None) -> Tensor:
    """With some bits turned over, of one row or of a tensor that has no rows."""
    place = tensor if row is None else tensor[row]
    for bit in bits:
        place[bit // 8] ^= 1 << bit % 8
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids", lambda t: flipped(t, 31, row=2), "class ids of row 2: expected 8 ids, received [79]"),
        ("ids", lambda t: t[:, :-1], r"'ids': expected torch.uint8 \[6, 5\], received torch.uint8 \[6, 4\]"),
        ("ids", lambda t: t.to(torch.int64), "received torch.int64"),
        ("values", lambda t: t[:-1], r"'values': expected torch.uint8 \[6, 8\], received torch.uint8 \[5, 8\]"),
        ("values", lambda t: t[:, :-1], r"\[6, 8\], received torch.uint8 \[6, 7\]"),
        ("values", lambda t: t.half(), "received torch.float16"),
        ("tail", lambda t: with_value(t, 1.5, 1), r"'tail' of row 1: expected a value in \[0, 1\], received 1.5"),
        ("tail", lambda t: with_value(t, -0.1, 1), "'tail' of row 1"),
        ("tail", lambda t: with_value(t, math.nan, 1), "'tail' of row 1"),
        ("starts", lambda t: flipped(t, 3), "rows of all samples: expected 6, received 5"),
        ("starts", lambda t: flipped(t, 1), "rows of all samples: expected 6, received 7"),
        ("starts", lambda t: flipped(t, 3, 30), "last place of a row: expected less than 30, received 30"),
        ("starts", lambda t: t[:3], r"'starts': expected torch.uint8 \[4\], received torch.uint8 \[3\]"),
        ("digest", lambda t: with_value(t, 5, 1), "digest of sample 1: expected"),
    ],
)
def test_a_payload_with_a_wrong_tensor_is_refused(name, change, message):
    with pytest.raises(PayloadError, match=message) as caught:
        parse_payload(*altered(name, change), **EXPECTED)
    assert caught.value.expected != caught.value.received


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"), ("fingerprint", "0" * 64), ("probe_set", "b" * 64), ("num_classes", "51"),
        ("top_k", "0"), ("top_k", "9999"), ("top_k", "many"), ("temperature", "nan"), ("temperature", "0"),
        ("temperature", "hot"), ("temperature", "inf"), ("values", "float64"), ("values", ""),
    ],
)  # fmt: skip
def test_a_payload_with_a_wrong_header_is_refused(field, value):
    tensors, metadata = packed()
    with pytest.raises(PayloadError, match=f"header field '{field}': expected .*, received '{value}'"):
        parse_payload(tensors, metadata | {field: value}, **EXPECTED)
    del metadata[field]
    with pytest.raises(PayloadError, match="received None"):
        parse_payload(tensors, metadata, **EXPECTED)


def test_missing_and_unknown_tensors_and_other_probe_sets_are_refused():
    tensors, metadata = packed()
    with pytest.raises(PayloadError, match="tensor names"):
        parse_payload({name: tensor for name, tensor in tensors.items() if name != "tail"}, metadata, **EXPECTED)
    with pytest.raises(PayloadError, match="tensor names"):
        parse_payload(tensors | {"extra": torch.zeros(1)}, metadata, **EXPECTED)
    with pytest.raises(PayloadError, match="digest of sample 2"):
        parse_payload(tensors, metadata, **(EXPECTED | {"responses": [*RESPONSES[:2], "naive cafe"]}))
    with pytest.raises(PayloadError, match=r"'starts': expected torch.uint8 \[3\], received torch.uint8 \[4\]"):
        parse_payload(tensors, metadata, **(EXPECTED | {"responses": RESPONSES[:2]}))
    scalar = tensors | {"tail": torch.zeros((), dtype=torch.float16)}
    with pytest.raises(PayloadError, match=r"'ids': expected"):
        parse_payload(scalar, metadata, **EXPECTED)


def test_values_are_bounded_and_read_as_the_header_says():
    tensors, metadata = packed(values="float16")
    assert metadata["values"] == "float16"
    for value in (math.nan, math.inf, -0.5, 21.0):
        wrong = tensors | {"values": tensors["values"].clone()}
        wrong["values"][2, 3] = value
        with pytest.raises(PayloadError, match=r"values of row 2: expected a value in \[0, 20\]"):
            parse_payload(wrong, metadata, **EXPECTED)
    for values, message in (("int8", "received torch.float16"), ("int7", "received torch.float16")):
        with pytest.raises(PayloadError, match=message):
            parse_payload(tensors, metadata | {"values": values}, **EXPECTED)
    tensors, metadata = packed(7)
    wrong = tensors | {"values": flipped(tensors["values"].clone(), 8 + 7 * 7, row=4)}
    with pytest.raises(PayloadError, match="values of row 4: expected zeros after 7 integers of 7 bits, received ones"):
        parse_payload(wrong, metadata, **EXPECTED)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["int7", "int8", "float16"]), st.sampled_from([1, 5, K, CLASSES]), st.data())
def test_whatever_is_written_over_a_payload_it_is_refused_or_a_set_of_distributions(values, k, data):
    """Hostile bytes in any tensor: a `PayloadError` and nothing else, or rows that hold what rows promise."""
    tensors, metadata = packed(k, values=values)
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].clone().view(torch.uint8).flatten()
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=6)):
        raw[place] = data.draw(st.integers(0, 255))
    changed = tensors | {name: raw.view(tensors[name].dtype).reshape(tensors[name].shape)}
    try:
        rows = parse_payload(changed, metadata, **EXPECTED)
    except PayloadError:
        return
    assert bool(((rows.ids_SK >= 0) & (rows.ids_SK < CLASSES)).all())
    assert all(len(set(ids)) == k for ids in rows.ids_SK.tolist())
    assert (rows.log_probs_SK.exp().sum(1) + rows.tail_S - 1).abs().max() <= 2e-6
    sizes = torch.tensor([len(response.encode()) for response in RESPONSES])
    assert bool(((rows.byte_start_S >= 0) & (rows.byte_start_S <= sizes[rows.sample_S])).all())


def test_rows_that_are_not_in_order_are_not_packed():
    top = keep_top(log_probs(2), K)
    options = {"responses": ["abc"], "num_classes": CLASSES, "fingerprint": "f", "probe_set": "p", "temperature": 1.0}
    for bytes_s in ([1, 1], [2, 1], [0, 4], [-1, 0]):
        places = {"sample_S": torch.zeros(2, dtype=torch.int64), "byte_start_S": torch.tensor(bytes_s)}
        with pytest.raises(ValueError, match="ascending bytes"):
            build_payload(top, **places, **options)


def test_many_classes_and_no_rows_at_all():
    wide = torch.full((1, 70_000), -30.0)
    wide[0, 69_999] = 0.0
    tensors, metadata = build_payload(
        keep_top(wide.log_softmax(1), 2), sample_S=torch.tensor([0]), byte_start_S=torch.tensor([0]), responses=["x"],
        num_classes=70_000, fingerprint="f", probe_set="p", temperature=1.0,
    )  # fmt: skip
    rows = parse_payload(tensors, metadata, fingerprint="f", num_classes=70_000, probe_set="p", responses=["x"])
    assert rows.ids_SK[0, 0] == 69_999
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = build_payload(
        keep_top(torch.zeros(0, CLASSES), K), sample_S=nothing, byte_start_S=nothing, responses=RESPONSES,
        num_classes=CLASSES, fingerprint="f" * 64, probe_set="a" * 64, temperature=1.0,
    )  # fmt: skip
    assert len(parse_payload(*empty, **EXPECTED).sample_S) == 0


@pytest.mark.parametrize(
    ("values", "classes", "most"),
    [("int7", 8_192, 37), ("int7", 32_000, 41), ("int7", 151_936, 45), ("int8", 32_000, 43), ("int8", 151_936, 47)],
)
def test_a_response_of_512_tokens_takes_so_many_kibibytes_whatever_is_in_it(values, classes, most) -> None:
    """At K = 32, every token and END: a row's bytes do not depend on its ids and values."""
    rows = 513
    log_probs_sk = log_probs(rows, 32).float()
    top = TopClasses(torch.arange(32).repeat(rows, 1) * (classes // 32), log_probs_sk, torch.full((rows,), 0.1))
    tensors, metadata = build_payload(
        top, sample_S=torch.zeros(rows, dtype=torch.int64), byte_start_S=torch.arange(rows) * 4,
        responses=["x" * 2052], num_classes=classes, fingerprint="f" * 64, probe_set="a" * 64, temperature=1.0,
        values=values,
    )  # fmt: skip
    assert len(save(tensors, metadata)) <= most * 1024


def test_rows_are_found_again_in_a_batch_of_another_order_and_tokenizer():
    """A teacher's rows at its own token boundaries, a student with other tokens, samples 2 and 0 of the probe set."""
    probe = list(SENTENCES[:4])
    teacher, table = trained("byte_level"), table_of("byte_level")
    batch = encode_batch(teacher, table, ["Q:\n"] * 4, probe, max_length=256)
    spans = align(batch, batch)
    top = keep_top(log_probs(spans.num_spans, table.num_tokens), 4)
    tensors, metadata = build_payload(
        top, sample_S=spans.sample_S, byte_start_S=spans.byte_start_S, responses=probe,
        num_classes=table.num_tokens, fingerprint=table.fingerprint, probe_set="p", temperature=1.0,
    )  # fmt: skip
    rows = parse_payload(
        tensors, metadata, fingerprint=table.fingerprint, num_classes=table.num_tokens, probe_set="p", responses=probe
    )
    picked = [probe[2], probe[0]]
    student = encode_batch(trained("unigram"), table_of("unigram"), ["Q:\n"] * 2, picked, max_length=256)
    same = encode_batch(teacher, table, ["Q:\n"] * 2, picked, max_length=256)
    found = match_rows(rows, student, torch.tensor([2, 0]))
    both = align(student, same)
    assert found.batch_row_S.tolist() == both.sample_S.tolist()
    assert found.position_S.tolist() == both.row_a_S.tolist()
    matched = rows.take(found.payload_row_S)
    assert matched.byte_start_S.tolist() == both.byte_start_S.tolist()
    assert matched.sample_S.tolist() == [2 if row == 0 else 0 for row in both.sample_S.tolist()]
    assert len(match_rows(rows, student, torch.tensor([3, 3])).position_S) >= 0
