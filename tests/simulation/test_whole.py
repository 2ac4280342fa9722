"""From a data folder to a page with real, tiny models: the parts fit together as a simulator uses them."""

import json
from pathlib import Path

from assets.data_folders import protected_rows
from cotuning.adapters import activate, adapted, lora_config
from cotuning.contamination import text_of
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.training import draw_batches, row_sizes
from cotuning.tuning import tune_adapter
from simulation.budget import Crossing, Meter
from simulation.cache import ResultCache
from simulation.gates import contamination_gate, exact_match_gate, lead_gate, proxy_gate
from simulation.markdown import markdown
from simulation.partition import DeviceRows, one_domain_each, read_domains
from simulation.report import DeviceFacts, Entry, build_report
from simulation.run_results import RunKey, RunResult
from simulation.scores import RowScores, score
from simulation.targets import Wanted
from tests.tiny_models import tiny_examples, tiny_language_model

MODELS = {"colour": "gpt2", "sum": "qwen2"}
ENTRIES = (
    Entry(name="before", kind="before", about="as they came"),
    Entry(name="standalone", kind="baseline", about="each alone"),
)


def write_folder(folder: Path) -> None:
    for kind in MODELS:
        for start, split in ((0, "train"), (40, "validation"), (60, "test")):
            path = folder / kind / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = tiny_examples(8, start=start, kind=kind)
            path.write_text(
                "".join(
                    json.dumps(
                        {"id": each.id, "instruction": each.instruction, "input": each.input, "output": each.output}
                    )
                    + "\n"
                    for each in rows
                )
            )


def measured(lm: LanguageModel, rows: tuple[Example, ...], name: str) -> RowScores:
    return score(lm, rows, name=name, max_new_tokens=3)


def play(devices: list[DeviceRows], key: RunKey) -> RunResult:
    """One run: each device trains alone, or nobody does."""
    meter = Meter(Crossing(up=frozenset({"metrics"})))
    scores: dict[str, dict[str, RowScores]] = {}
    for device in devices:
        lm = tiny_language_model(MODELS[device.domain])
        with adapted(lm, lora_config(lm, rank=2, alpha=4.0), {"slm": key.seed}) as lent:
            activate(lent, ["slm"], trainable=["slm"])
            if key.strategy == "standalone":
                rows = EncodedRows(lent, device.train, max_length=64)
                batches = draw_batches(row_sizes(device.train), batch_size=4, steps=3, seed=key.seed)
                with meter.stage("devices"):
                    how = {"learning_rate": 1e-2, "seed": key.seed, "stage": "slm"}
                    tune_adapter(lent, "slm", rows, batches, **how, on_progress=lambda *_: None)
                meter.count_steps(device.name, 3)
                meter.count_bytes(1, device.name, "up", "metrics", 100)
            scores[device.name] = {other.test_set: measured(lent, other.test, other.test_set) for other in devices}
    return RunResult(key=key, own={each.name: each.test_set for each in devices}, scores=scores, cost=meter.cost())


def test_from_a_folder_to_a_page(tmp_path: Path) -> None:
    write_folder(tmp_path)
    devices = one_domain_each(read_domains(tmp_path), list(MODELS), seed=0)
    llm, proxy = tiny_language_model("llama"), tiny_language_model("llama_proxy")
    slms = {each.name: measured(tiny_language_model(MODELS[each.domain]), each.validation, "own") for each in devices}
    strong, small = ({each.name: measured(lm, each.validation, "own") for each in devices} for lm in (llm, proxy))
    gates = [
        exact_match_gate(strong),
        lead_gate(strong, slms),
        proxy_gate(strong, small, slms),
        contamination_gate(protected_rows(tmp_path), {"public": [text_of(row) for row in devices[0].train[:3]]}),
    ]
    cache = ResultCache(tmp_path / "cache", {"steps": 3})
    keys = [RunKey(strategy=each.name, seed=seed) for each in ENTRIES for seed in (0, 1)]
    for key in cache.missing(keys):
        cache.write(play(devices, key))
    assert cache.missing(keys) == []
    runs = [found for key in keys if (found := cache.read(key))]
    assert runs[2] == play(devices, keys[2]).model_copy(update={"cost": runs[2].cost})
    report = build_report(
        title="Tiny",
        command="pytest",
        configuration={"steps": 3},
        facts={},
        devices=[DeviceFacts(name=each.name, mixture=each.mixture, test_rows=len(each.test)) for each in devices],
        entries=ENTRIES,
        runs=runs,
        gates=gates,
        wanted=Wanted(method="standalone", baselines=("before",), controls=(), bytes_peer="before"),
        draws=400,
    )
    # What untrained models lead by is chance; that they answer nothing and that the rows were seen is not.
    assert [report.gates[place].passed for place in (0, 3)] == [False, False]
    assert report.gates[3].measured.startswith("3 of 3 texts hold one")
    found = next(each for each in report.comparisons if each.metric == "bits_per_byte")
    assert found.difference.value > 0
    assert report.summary("standalone").cost.steps == {"colour": 3.0, "sum": 3.0}
    assert "**Gate failed: nothing seen before** (3 of 3 texts hold one: colour/train:" in markdown(report)
