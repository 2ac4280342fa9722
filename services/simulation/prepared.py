"""What a deployment's worker makes before round 1, for all strategies of a seed that need the same.

The proxy goes through a model folder, as it does on its way to devices, and stays there: who distils the same again
finds it.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assets.atomic import write_atomically
from assets.data import examples_to_jsonl
from assets.file_lock import locked
from assets.models import list_model_files, load_language_model, save_language_model
from cotuning.evaluation import bits_per_byte
from cotuning.examples import Example, rows_digest
from cotuning.language_model import LanguageModel
from cotuning.public_rows import PublicRows
from cotuning.strategies.preparation import distil, make_proxy
from cotuning.strategies.promotion import reading
from cotuning.training import OnProgress
from protocol.assignments import ModelFile, ModelManifest
from protocol.proxy_settings import ProxySettings
from protocol.strategies import SmallModel, StrategySettings, spec_of
from simulation.base_models import BaseModels
from simulation.budget import Meter
from simulation.cache import configuration_hash
from simulation.errors import SetupError
from simulation.settings import Entry
from simulation.setup import Experiment

MEASURED_FILE = "cotune_distillation.json"


@dataclass(frozen=True)
class Bits:
    """What a version is judged by."""

    bits_per_byte: float


@dataclass(frozen=True)
class SmallModelFolder:
    """The shared small model as it travels, or as it is recognised.

    Attributes:
        lm: loaded from its files.
        manifest_sha256: of the manifest.
        num_bytes: of the files and the manifest.
        manifest_bytes: of the manifest.
    """

    lm: LanguageModel
    manifest_sha256: str
    num_bytes: int
    manifest_bytes: int


@dataclass(frozen=True)
class Prepared:
    """What the rounds of a strategy with a seed start from. None and nothing where the strategy needs none.

    Attributes:
        llm: without adapters.
        small: the model whose adapter is shared.
        rows: public ones.
        probe_bytes: of the file of probe rows.
        probe_sha256: of that file.
        distilled: what the distillation measured, `seconds` among it; strategies with the same seed share it.
    """

    llm: LanguageModel | None
    small: SmallModelFolder | None
    rows: PublicRows | None
    probe_bytes: int
    probe_sha256: str | None
    distilled: Mapping[str, float] = field(default_factory=dict)

    @property
    def shared_model(self) -> LanguageModel | None:
        """The small model, without adapters."""
        return self.small.lm if self.small is not None else None


def prepare(
    experiment: Experiment,
    entry: Entry,
    models: BaseModels,
    seed: int,
    *,
    folder: Path,
    meter: Meter,
    on_progress: OnProgress,
) -> Prepared:
    """Make what a strategy needs.

    Args:
        experiment: whose models and rows.
        entry: the strategy.
        models: the base models.
        seed: of the run.
        folder: where distilled proxies stay.
        meter: measures it.
        on_progress: of the distillation.

    Raises:
        SetupError: a model cannot be loaded, or the proxy's settings do not fit the LLM.
        TrainingDiverged: the distillation came to no number.
    """
    spec = spec_of(entry.settings)
    rows, wanted = experiment.public_rows(spec, seed), entry.proxy or experiment.settings.proxy
    with meter.stage("loading"):
        llm = models.llm(experiment.settings.llm) if spec.needs_llm and experiment.settings.llm else None
    small, distilled = None, {}
    if spec.small_model is SmallModel.DISTILLED_PROXY:
        assert llm is not None
        assert rows is not None
        with meter.stage("distillation"):
            place = _place(experiment, wanted, rows.training, seed, folder)
            folder.mkdir(parents=True, exist_ok=True)
            with locked(place.with_suffix(".lock")):  # another process may be making the same
                if not (place / MEASURED_FILE).is_file():
                    _distil(wanted, llm, models, rows.training, seed=seed, place=place, on_progress=on_progress)
            small = _small_model(load_language_model(place), place)
            small.lm.model.to(llm.device)
            distilled = json.loads((place / MEASURED_FILE).read_bytes())
    elif spec.small_model is SmallModel.DEVICES_OWN:
        small = _small_model(models.slm(experiment.settings.slms[0]), None)
    probe = examples_to_jsonl(rows.probe) if rows is not None and rows.probe else b""
    return Prepared(llm, small, rows, len(probe), hashlib.sha256(probe).hexdigest() if probe else None, distilled)


def validation_bits(
    models: Mapping[str, LanguageModel], rows: Sequence[Example], settings: StrategySettings
) -> dict[str, Bits]:
    """The server's models on public validation rows; nothing for no rows."""
    return {name: Bits(bits_per_byte(lm, rows, **reading(settings))) for name, lm in models.items() if rows}


def _place(experiment: Experiment, wanted: ProxySettings, training: Sequence[Example], seed: int, folder: Path) -> Path:
    """The folder of the proxy, named by all that it depends on."""
    common, models = experiment.settings, ("llm", f"proxy {wanted.path}")
    depends: dict[str, Any] = {
        "proxy": wanted.model_dump(mode="json", exclude={"checkpoint_steps", "path"}),
        "loading": common.llm_loading.model_dump(mode="json"),
        "digests": {name: digest for name, digest in experiment.digests.items() if name in models},
        "rows": rows_digest(training),
        "seed": seed,
        "threads": common.threads,
    }
    return folder / f"proxy-{configuration_hash(depends)[:16]}"


def _distil(
    settings: ProxySettings,
    llm: LanguageModel,
    models: BaseModels,
    training: Sequence[Example],
    *,
    seed: int,
    place: Path,
    on_progress: OnProgress,
) -> None:
    try:
        proxy = models.fresh(settings.path) if settings.path else make_proxy(llm, training, settings, seed=seed)
    except ValueError as error:
        raise SetupError(f"`proxy` does not fit the model: {error}") from None
    proxy.model.to(llm.device)
    start = time.perf_counter()
    measured = distil(llm, proxy, training, settings, seed=seed, on_progress=on_progress)
    measured |= {"seconds": round(time.perf_counter() - start, 3)}
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".proxy-") as name:
        made = Path(name) / "proxy"
        save_language_model(proxy, made)
        if place.exists():  # of a run that was killed while it moved one here
            shutil.rmtree(place)
        made.rename(place)
    # Last: it says that the folder is whole.
    write_atomically(place / MEASURED_FILE, json.dumps(measured).encode())


def _small_model(lm: LanguageModel, place: Path | None) -> SmallModelFolder:
    """Describe a model by the files that a deployment would store for it."""
    with tempfile.TemporaryDirectory(prefix="cotune-model-") as name:
        folder = place
        if folder is None:
            folder = Path(name)
            save_language_model(lm, folder)
        contents = [(path.name, path.read_bytes()) for path in list_model_files(folder) if path.name != MEASURED_FILE]
    files = [
        ModelFile(path=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        for name, content in contents
    ]
    manifest = ModelManifest(files=files).model_dump_json().encode()
    total = len(manifest) + sum(len(content) for _, content in contents)
    return SmallModelFolder(lm, hashlib.sha256(manifest).hexdigest(), total, len(manifest))
