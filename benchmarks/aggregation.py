"""LoRA aggregation and the logits payload: speed, memory, what re-factoring loses, and bytes.

Updates are random: a part that all devices share and a part of their own, of equal size. The adapter has the shapes of
a proxy of half a billion parameters (hidden 896, feed-forward 4,864, 24 layers, rank 8, all linear layers: 4.4 million
values, 17 MB).
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from assets.tensors import read_tensors, tensors_to_bytes
from benchmarks.measuring import Goal, compare, peak_memory_of, print_goals, print_table, write_results
from cotuning.aggregation import StreamingMean, apply_server_update
from cotuning.low_rank import product_norm, truncate_product
from cotuning.packed_values import Values
from cotuning.payload import build_payload
from cotuning.product_mean import ProductMean, lora_pairs
from cotuning.top_classes import keep_top

RANK = 8
SHAPES = {
    "q_proj": (896, 896), "k_proj": (128, 896), "v_proj": (128, 896), "o_proj": (896, 896),
    "gate_proj": (4864, 896), "up_proj": (4864, 896), "down_proj": (896, 4864),
}  # fmt: skip
LAYERS = 24
WEIGHT = 17.0
CHECKED = "StreamingMean, checks included"
OTHERS = {"apart": "with its tensors apart", "from_files": "with reading its file"}
MIB, KIB = 2**20, 2**10
Adapter = dict[str, Tensor]


def adapter(seed: int, *, layers: int, scale: float = 1.0) -> Adapter:
    """Random factors with the norms of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    state: Adapter = {}
    for layer in range(layers):
        for name, (outputs, inputs) in SHAPES.items():
            place = f"model.layers.{layer}.{name}"
            state[f"{place}.lora_A.weight"] = scale / inputs**0.5 * torch.randn(RANK, inputs, generator=generator)
            state[f"{place}.lora_B.weight"] = scale / outputs**0.5 * torch.randn(outputs, RANK, generator=generator)
    return state


def updates(count: int, *, layers: int) -> Iterator[Adapter]:
    """One delta after the other, half of each common to all."""
    common = adapter(1, layers=layers, scale=0.3)
    for place in range(count):
        own = adapter(2 + place, layers=layers, scale=0.3)
        yield {name: common[name] + tensor for name, tensor in own.items()}


def in_one_piece(state: Adapter) -> Adapter:
    """The same tensors one behind the other in memory, sorted by name: as `read_tensors` leaves them."""
    ordered = dict(sorted(state.items()))
    parts = torch.cat([tensor.flatten() for tensor in ordered.values()]).split([t.numel() for t in ordered.values()])
    return {name: part.view(ordered[name].shape) for name, part in zip(ordered, parts, strict=True)}


class Float32Sum:
    """The bare baseline: one in-place addition a tensor, nothing checked."""

    def __init__(self, like: Adapter) -> None:
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def add(self, delta: Adapter, weight: float) -> None:
        """`sum += weight * delta`, float32."""
        for name, tensor in delta.items():
            self.sums[name].add_(tensor, alpha=weight)


class KahanSum(Float32Sum):
    """Float32 with a running compensation (Kahan, 1965): what would replace float64."""

    def __init__(self, like: Adapter) -> None:
        super().__init__(like)
        self.lost = {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def add(self, delta: Adapter, weight: float) -> None:
        """`sum += weight * delta`, compensated."""
        for name, tensor in delta.items():
            total, lost = self.sums[name], self.lost[name]
            wanted = tensor.mul(weight).sub_(lost)
            after = total + wanted
            torch.sub(after, total, out=lost).sub_(wanted)
            total.copy_(after)


class PairwiseSum(Float32Sum):
    """Float32 sums of 16 updates, added up in float64, tensor by tensor: what StreamingMean does with one vector."""

    def __init__(self, like: Adapter) -> None:
        super().__init__(like)
        self.wide = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self.count = 0

    def add(self, delta: Adapter, weight: float) -> None:
        """`sum += weight * delta`; every 16th time into float64."""
        super().add(delta, weight)
        self.count += 1
        if self.count % 16 == 0:
            for name, total in self.sums.items():
                self.wide[name].add_(total)
                total.zero_()


class WideSum:
    """Float64 by torch's own mixed addition, nothing checked."""

    def __init__(self, like: Adapter) -> None:
        self.sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}

    def add(self, delta: Adapter, weight: float) -> None:
        """`sum += weight * delta`, float64."""
        for name, tensor in delta.items():
            self.sums[name].add_(tensor, alpha=weight)


def measure_sums(repeats: int) -> dict[str, Any]:
    """Each way to sum: an update in memory as a file leaves it, one whose tensors lie apart, and a stream of files."""
    apart = next(updates(1, layers=LAYERS))
    delta = in_one_piece(apart)
    sums = {
        "float32 add_ (baseline)": Float32Sum(delta),
        CHECKED: StreamingMean(delta, max_norm=1e9),
        "float64 add_, unchecked": WideSum(delta),
        "float32 Kahan, unchecked": KahanSum(delta),
        "float32 sums of 16, unchecked": PairwiseSum(delta),
    }

    def many(running: Any, update: Adapter) -> None:
        for _ in range(16):
            running.add(update, WEIGHT)

    in_memory = compare({name: lambda running=running: many(running, delta) for name, running in sums.items()}, repeats)
    chosen = ["float32 add_ (baseline)", CHECKED]
    scattered = compare({name: lambda name=name: many(sums[name], apart) for name in chosen}, repeats)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{place}.safetensors" for place in range(4)]
        for path in paths:
            path.write_bytes(tensors_to_bytes(delta, {}))

        def from_files(running: Any) -> None:
            for path in paths:
                running.add(read_tensors(path)[0], WEIGHT)

        streamed = compare({name: lambda name=name: from_files(sums[name]) for name in chosen}, repeats)
    return {
        "update_mib": sum(tensor.nbytes for tensor in delta.values()) / MIB,
        "in_memory_ms": {name: timing.seconds * 1e3 / 16 for name, timing in in_memory.items()},
        "in_memory_speed": {name: timing.speed_ratio for name, timing in in_memory.items()},
        "apart_ms": {name: timing.seconds * 1e3 / 16 for name, timing in scattered.items()},
        "apart_speed": {name: timing.speed_ratio for name, timing in scattered.items()},
        "from_files_ms": {name: timing.seconds * 1e3 / len(paths) for name, timing in streamed.items()},
        "from_files_speed": {name: timing.speed_ratio for name, timing in streamed.items()},
    }


def stream(path: str, count: int, exact: bool) -> None:
    """Read and add the same update `count` times, as a worker reads one file after the other. Runs in a child."""
    torch.set_num_threads(1)
    first, _ = read_tensors(Path(path))
    mean = ProductMean(first) if exact else StreamingMean(first)
    for _ in range(count):
        mean.add(read_tensors(Path(path))[0], WEIGHT)
    mean.result()


def measure_memory(counts: tuple[int, ...]) -> dict[str, Any]:
    """Peak memory over the number of updates."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = next(updates(1, layers=LAYERS))
        # One linear layer for the exact mean: its memory is a sum over layers, and so is its time.
        one = {name: tensor for name, tensor in whole.items() if ".layers.0.down_proj." in name}
        for name, delta in (("StreamingMean", whole), ("ProductMean", one)):
            path = Path(folder) / f"{name}.safetensors"
            path.write_bytes(tensors_to_bytes(delta, {}))
            exact = name == "ProductMean"
            peaks = {
                count: peak_memory_of("benchmarks.aggregation:stream", path=str(path), count=count, exact=exact)
                for count in counts
            }
            found[name] = {
                "update_mib": path.stat().st_size / MIB,
                "extra_mib": {count: peak.extra_bytes / MIB for count, peak in peaks.items()},
                "growth": peaks[counts[-1]].extra_bytes / peaks[counts[0]].extra_bytes,
            }
    return found


def product_error(got: Adapter, exact: Adapter) -> float:
    """Relative Frobenius error over all layers of one adapter's products against another's."""
    error = whole = 0.0
    for left, right in lora_pairs(exact).items():
        difference = (
            torch.cat([got[left].double() / got[right].shape[0], -exact[left].double() / exact[right].shape[0]], 1),
            torch.cat([got[right].double(), exact[right].double()]),
        )
        error += product_norm(*difference) ** 2
        whole += product_norm(exact[left] / exact[right].shape[0], exact[right]) ** 2
    return (error / whole) ** 0.5


def measure_refactoring(device_counts: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """What averaging A and B apart errs, what the cut to rank loses, and how long one layer's round takes."""
    base = adapter(0, layers=1)
    rounds: dict[int, dict[str, float]] = {}
    for count in device_counts:
        apart, bounded = StreamingMean(base), ProductMean(base)
        exact = ProductMean(base, max_stack_rank=2 * RANK * count)
        for delta in updates(count, layers=1):
            apart.add(delta, WEIGHT)
            exact.add(delta, WEIGHT)
            bounded.add(delta, WEIGHT)
        stacked = exact.stacked()
        made = bounded.result()
        timing = compare({"result": bounded.result}, repeats)["result"]
        rounds[count] = {
            "fedavg_error": product_error(apply_server_update(base, apart.result(), 1.0), stacked),
            "exact_svd_error": product_error(made.adapter, stacked),
            "reported_error": made.relative_error,
            "error_bound": made.error_bound,
            "update_error": made.update_error,
            "seconds_a_layer": timing.seconds,
        }
    left, right = stacked["model.layers.0.o_proj.lora_B.weight"], stacked["model.layers.0.o_proj.lora_A.weight"]
    thin = compare(
        {
            "SVD of the full matrix": lambda: torch.linalg.svd(left.double() @ right.double(), full_matrices=False),
            "QR of the thin factors": lambda: truncate_product(left, right, RANK),
        },
        repeats,
    )
    return {
        "by_devices": rounds,
        "thin_rank": right.shape[0],
        "thin_speed": thin["QR of the thin factors"].speed_ratio,
    }


def measure_payload(rows: int, num_classes: int, values: Values) -> float:
    """KiB of a file for one response of 512 tokens, four bytes a token."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, num_classes, generator=generator)
    tensors, metadata = build_payload(
        keep_top(logits.log_softmax(1), 32),
        sample_S=torch.zeros(rows, dtype=torch.int64),
        byte_start_S=torch.linspace(0, 2048, rows).long(),
        responses=["x" * 2048],
        num_classes=num_classes,
        fingerprint="f" * 64,
        probe_set="a" * 64,
        temperature=1.0,
        values=values,
    )
    return len(tensors_to_bytes(tensors, metadata)) / KIB


def show(results: dict[str, Any]) -> list[Goal]:
    """Print every table, and return what was aimed at."""
    sums, memory, svd, payload = (results[name] for name in ("sums", "memory", "refactoring", "payload_kib"))
    rows = [
        (name, sums["in_memory_ms"][name], speed, *(sums[f"{where}_speed"].get(name, "-") for where in OTHERS))
        for name, speed in sums["in_memory_speed"].items()
    ]
    title = f"one update of {sums['update_mib']:.1f} MiB"
    print_table(title, ("sum", "ms in memory", "speed in memory", *OTHERS.values()), rows)
    svd_rows: list[tuple[object, ...]] = []
    counts = list(memory["StreamingMean"]["extra_mib"])
    rows = [(name, each["update_mib"], *each["extra_mib"].values()) for name, each in memory.items()]
    columns = ("peak over start, MiB", "of one update", *(f"{count} updates" for count in counts))
    print_table("memory of a stream", columns, rows)
    for measure in next(iter(svd["by_devices"].values())):
        svd_rows.append((measure, *(each[measure] for each in svd["by_devices"].values())))
    title = "mean of products: relative Frobenius errors against the exact sum, and seconds"
    print_table(title, ("one layer of 7 matrices", *(f"{count} devices" for count in svd["by_devices"])), svd_rows)
    print(f"QR of thin factors of rank {svd['thin_rank']} against the full 896 x 896 SVD: {svd['thin_speed']:.1f}x")
    print_table("logits payload of 512 tokens, K = 32", ("rows, classes, values", "KiB"), list(payload.items()))
    speeds = {"in_memory": "already in memory", **OTHERS}
    return [
        *(Goal(f"mean's speed against add_: {name}", sums[f"{where}_speed"][CHECKED], 0.8, True)
          for where, name in speeds.items()),
        *(Goal(f"{name}: memory of {counts[-1]} updates against {counts[0]}", each["growth"], 1.1, False)
          for name, each in memory.items()),
        *(Goal(f"payload: {name}", size, 45.0, False, "KiB") for name, size in payload.items() if "int7" in name),
    ]  # fmt: skip


def main() -> None:
    """Measure everything, print it, and write `results/bench_aggregation.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each comparison of sums")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    results = {
        "sums": measure_sums(repeats),
        "memory": measure_memory((10, 100, 1000)),
        "refactoring": measure_refactoring((2, 10, 40), repeats=3),
        "payload_kib": {
            f"{rows} rows, {classes:,} classes, {values}": measure_payload(rows, classes, values)
            for rows in (410, 513)
            for classes in (8_192, 32_000, 151_936)
            for values in get_args(Values)
        },
    }
    goals = show(results)
    print_goals("bench-aggregation", goals)
    write_results("aggregation", {**results, "goals": [vars(goal) | {"met": goal.met} for goal in goals]})


if __name__ == "__main__":
    main()
