"""Prepares a run, once: deals out the public rows, makes and distils the proxy, measures where everything starts.

What later stages and the devices need goes to the blob store; of the user's files only the LLM's folder is needed
afterwards.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import LoraConfig
from sqlalchemy.orm import Session

from assets.data import read_examples
from assets.errors import DataFileError, VocabularyError
from assets.models import folder_identity, list_model_files, save_language_model
from assets.process_memory import peak_memory
from cotuning.examples import Example, rows_digest
from cotuning.language_model import LanguageModel
from cotuning.model_fingerprint import fingerprint_model
from cotuning.public_rows import PublicRows, TooFewRows, in_hashed_order, split_public_rows
from cotuning.strategies.interface import ServerInputs
from cotuning.strategies.preparation import distil, first_adapter, make_proxy, peft_config
from cotuning.strategies.registry import steps_of
from cotuning.training import TrainingDiverged
from persistence import artifacts, results, runs
from persistence.blobs import BlobStore, StoredBlob
from persistence.clock import database_now
from persistence.results import PrepareResult
from protocol.assignments import ModelFile, ModelFingerprint, ModelManifest
from protocol.errors import DomainError, ErrorCode
from protocol.headers import PEFT
from protocol.runs import RunCreate
from protocol.safetensors_header import read_header
from protocol.strategies import DownloadKind, LoraSettings, PublicSet, SmallModel, StrategySpec, spec_of
from worker.adapter_files import described_config, get_adapter, put_adapter
from worker.checkpoints import PREPARATION, drop_outdated, forget_when_stored, open_checkpoints
from worker.memory_check import check_memory
from worker.message_files import put_message, put_vocabulary
from worker.model_cache import load_model
from worker.row_files import ROWS, RowFiles, put_rows
from worker.scoring import as_json, score
from worker.stage import Finish, Stopwatch, Work

T = TypeVar("T")


@dataclass
class _Files:
    """What the preparation stored for the devices and for round 1; None and nothing where the strategy needs none."""

    manifest: StoredBlob | None = None
    model: list[StoredBlob] = field(default_factory=list)
    """The shared small model's."""
    fingerprint: ModelFingerprint | None = None
    """Of the devices' own model."""
    adapter: StoredBlob | None = None
    llm_adapter: StoredBlob | None = None
    message: StoredBlob | None = None
    """To all devices, for round 1."""
    llm_vocabulary: StoredBlob | None = None
    probe_set: StoredBlob | None = None
    rows: list[StoredBlob] = field(default_factory=list)
    """What only the worker reads."""

    def by_kind(self, spec: StrategySpec) -> Iterator[tuple[str, StoredBlob]]:
        """Each file under the kind that traffic is counted by."""
        downloaded = self.fingerprint is None  # else devices have it, and only compare theirs
        if self.manifest is not None:
            yield "proxy_base" if downloaded else "model_manifest", self.manifest
        yield from (("proxy_base" if downloaded else "small_model", blob) for blob in self.model)
        yield from (("rows", blob) for blob in self.rows)
        for kind, blob in (
            ("adapter", self.adapter),
            ("llm_adapter", self.llm_adapter),
            ("probe_set", self.probe_set),
            ("llm_vocabulary", self.llm_vocabulary),
            (str(spec.received_message), self.message),
        ):
            if blob is not None:
                yield kind, blob


def prepare(work: Work) -> Finish:
    """Make everything that round 1 needs. A strategy that shares no adapter and trains no LLM needs nothing.

    Raises:
        DomainError: MODEL_FOLDER_MISSING, DATA_FILE_INVALID, INVALID_FIELD: what the run names cannot be used.
    """
    with work.database.reading() as session:
        run = runs.get_run(session, work.job.run_id)
    spec = spec_of(run.config.strategy)
    if spec.small_model is not SmallModel.NONE or spec.trains_llm:
        return _prepare(work, run.config, spec)
    return lambda session: results.finish_prepare(session, work.job, work.owner, PrepareResult(), database_now(session))


def _prepare(work: Work, config: RunCreate, spec: StrategySpec) -> Finish:
    watch = Stopwatch()
    drop_outdated(work)
    with watch.measure("loading"), work.lease.long_call("reading the rows, loading the LLM"):
        rows, test_rows = _read_rows(config, spec)
        check_memory(config, rows.training if rows is not None else [])
        llm = _load_llm(work, config) if spec.needs_llm else None
    files, distilled = _Files(), {}
    if spec.small_model is SmallModel.DISTILLED_PROXY:
        assert llm is not None
        with watch.measure("distillation"):
            assert rows is not None
            distilled = _store_proxy(work, llm, rows.training, config, files)
    elif spec.small_model is SmallModel.DEVICES_OWN:
        with watch.measure("loading"), work.lease.long_call("storing the devices' model"):
            _store_devices_model(work, config, files)
    shared_model = work.cache.proxy(files.manifest.sha256) if files.manifest is not None else None
    models = {name: lm for name, lm in (("llm", llm), ("proxy", shared_model)) if lm is not None}
    peft_configs = _store_adapters(work, config, models, files)
    row_files = _store_rows(work.blobs, rows, test_rows, files) if rows is not None else None
    if spec.messages_down:
        with watch.measure("message"), work.lease.long_call("making the first message"):
            _store_message(work, config, models, rows, files)
    with watch.measure("evaluation"):  # a fresh adapter changes nothing: the base models are version 0
        validation = score(models, rows.validation if rows is not None else [], config, work.lease)
        test = score(models, test_rows, config, work.lease)
    metrics = {
        "validation": as_json(validation),
        "test": as_json(test),
        "models": {name: _describe(lm) for name, lm in models.items()},
        PEFT: {name: described_config(each) for name, each in peft_configs.items()},
        "distillation": distilled,
        **({ROWS: row_files.as_json()} if row_files is not None else {}),
        "seconds_by_stage": {f"preparing.{part}": seconds for part, seconds in watch.seconds.items()},
        "peak_memory_bytes": {"preparing": peak_memory()},
    }
    return _finish(work, spec, files, metrics)


def _load_llm(work: Work, config: RunCreate) -> LanguageModel:
    assert config.llm is not None
    return work.cache.llm(config.llm, config.llm_loading)


def _store_proxy(
    work: Work, llm: LanguageModel, training: list[Example], config: RunCreate, files: _Files
) -> dict[str, float]:
    """Make and distil the proxy and store it; return what the distillation measured."""
    with work.lease.long_call("making the proxy"):
        proxy = _make_proxy(llm, training, config)
        proxy.model.to(llm.device)
    with work.lease.long_call("beginning the distillation"):
        distilled = _distil(work, llm, proxy, training, config)
    with work.lease.long_call("storing the proxy"):
        files.manifest, files.model = store_model(work.blobs, proxy)
    return distilled


def _store_devices_model(work: Work, config: RunCreate, files: _Files) -> None:
    """Store the small model that every device has, as this machine reads it, and what it is recognised by."""
    assert config.slm is not None
    slm = load_model(config.slm)
    files.fingerprint = ModelFingerprint(**asdict(fingerprint_model(slm)))
    files.manifest, files.model = store_model(work.blobs, slm, files.fingerprint)


def _store_adapters(
    work: Work, config: RunCreate, models: Mapping[str, LanguageModel], files: _Files
) -> dict[str, LoraConfig]:
    """Store the adapters that round 1 starts from; return their peft configs by model."""
    settings, configs = config.strategy, {}
    manifest = files.manifest.sha256 if files.manifest is not None else None

    def first(
        name: str, lora: LoraSettings | None, adapter: Literal["shared_adapter", "llm_adapter"]
    ) -> StoredBlob | None:
        if lora is None or name not in models:
            return None
        lm = models[name]
        configs[name] = _asked_for("lora", lambda: peft_config(lm, lora))
        state = _asked_for("lora", lambda: first_adapter(lm, lora, adapter, seed=config.seed))
        return put_adapter(work.blobs, state, proxy_sha256=manifest)

    files.adapter = first("proxy", settings.shared_lora, "shared_adapter")
    files.llm_adapter = first("llm", settings.trained_llm_lora, "llm_adapter")
    return configs


def _store_message(
    work: Work, config: RunCreate, models: Mapping[str, LanguageModel], rows: PublicRows | None, files: _Files
) -> None:
    """Store what all devices are sent before round 1, and the LLM's tokenizer where they read its logits."""
    spec, llm = spec_of(config.strategy), models.get("llm")
    given = ServerInputs(
        round_number=0,
        seed=config.seed,
        on_progress=work.lease.on_progress,
        llm=llm if spec.trains_llm else None,
        shared_model=models.get("proxy"),
        shared_adapter=get_adapter(work.blobs, files.adapter.sha256) if files.adapter is not None else None,
        llm_adapter=get_adapter(work.blobs, files.llm_adapter.sha256) if files.llm_adapter is not None else None,
        public=rows.training if rows is not None else (),
        probe=rows.probe if rows is not None else (),
    )
    files.message = put_message(work.blobs, steps_of(config.strategy).first_message(given), spec)
    if llm is not None and DownloadKind.LLM_VOCABULARY in spec.downloads:
        try:
            files.llm_vocabulary = put_vocabulary(work.blobs, llm)
        except VocabularyError as error:
            raise DomainError(ErrorCode.INVALID_FIELD, f"`llm` does not fit {spec.name}: {error}") from error


def _finish(work: Work, spec: StrategySpec, files: _Files, metrics: dict[str, Any]) -> Finish:
    expected = None
    if files.adapter is not None:
        with work.blobs.open(files.adapter.sha256) as stream:
            expected = read_header(stream, files.adapter.size).tensors
    result = PrepareResult(
        proxy_manifest_sha256=_hash(files.manifest),
        adapter_sha256=_hash(files.adapter),
        llm_adapter_sha256=_hash(files.llm_adapter),
        message_sha256=_hash(files.message),
        probe_set_sha256=_hash(files.probe_set),
        llm_vocabulary_sha256=_hash(files.llm_vocabulary),
        expected_tensors=expected,
        metrics=metrics,
    )

    def finish(session: Session) -> None:
        forget_when_stored(work, session)
        now, run_id = database_now(session), work.job.run_id
        for kind, blob in files.by_kind(spec):
            artifacts.register(session, blob.sha256, blob.size, kind, run_id, now)
        results.finish_prepare(session, work.job, work.owner, result, now)

    return finish


def _hash(blob: StoredBlob | None) -> str | None:
    return None if blob is None else blob.sha256


def _describe(lm: LanguageModel) -> dict[str, Any]:
    """What operators are told about a model of the run that no device reports."""
    return {"architecture": lm.architecture, "parameters": lm.num_parameters}


def store_model(
    blobs: BlobStore, lm: LanguageModel, fingerprint: ModelFingerprint | None = None
) -> tuple[StoredBlob, list[StoredBlob]]:
    """Store a model folder file by file; return its manifest and its files.

    The manifest is sorted by name, so equal models have one hash.
    """
    with tempfile.TemporaryDirectory(prefix="cotune-proxy-") as name:
        folder = Path(name)
        save_language_model(lm, folder)
        stored = {path.name: blobs.put_file(path) for path in list_model_files(folder)}
    files = [ModelFile(path=name, sha256=blob.sha256, size_bytes=blob.size) for name, blob in stored.items()]
    manifest = ModelManifest(files=files, fingerprint=fingerprint).model_dump_json(exclude_none=True)
    return blobs.put_bytes(manifest.encode()), list(stored.values())


def _read_rows(config: RunCreate, spec: StrategySpec) -> tuple[PublicRows | None, list[Example]]:
    """The public rows dealt out, and those to test on; a run without public rows has neither."""
    if config.public_data is None:
        return None, []
    try:
        public = split_public_rows(
            _read(config.public_data),
            probe_rows=config.probe_rows if spec.public_set is PublicSet.SERVER_AND_DEVICES else 0,
            validation_rows=config.evaluation.validation_rows,
            seed=config.seed,
            source=config.public_data,
        )
    except TooFewRows as error:
        raise DomainError(
            ErrorCode.DATA_FILE_INVALID, str(error), expected=error.expected, received=error.received
        ) from error
    if config.evaluation_data is None or not config.evaluation.test_rows:
        return public, []
    # Hashed order: the first rows of a file are often all of one kind.
    return public, in_hashed_order(_read(config.evaluation_data), config.seed)[: config.evaluation.test_rows]


def _read(source: str) -> list[Example]:
    try:
        return read_examples(Path(source))
    except DataFileError as error:
        raise DomainError(ErrorCode.DATA_FILE_INVALID, str(error), received=source) from error


def _store_rows(blobs: BlobStore, public: PublicRows, test: list[Example], files: _Files) -> RowFiles:
    files.rows = [put_rows(blobs, rows) for rows in (public.training, public.validation, *([test] if test else []))]
    hashes = [blob.sha256 for blob in files.rows]
    if public.probe:
        files.probe_set = put_rows(blobs, public.probe)
    return RowFiles(hashes[0], hashes[1], hashes[2] if test else None)


def _make_proxy(llm: LanguageModel, training: list[Example], config: RunCreate) -> LanguageModel:
    if config.proxy.source == "pretrained":
        assert config.proxy.path is not None
        return load_model(config.proxy.path)
    return _asked_for("proxy", lambda: make_proxy(llm, training, config.proxy, seed=config.seed))


def _distil(
    work: Work, llm: LanguageModel, proxy: LanguageModel, training: list[Example], config: RunCreate
) -> dict[str, float]:
    about, every = _determined_by(training, config), config.proxy.checkpoint_steps
    try:
        return distil(
            llm,
            proxy,
            training,
            config.proxy,
            seed=config.seed,
            on_progress=work.lease.on_progress,
            checkpoints=open_checkpoints(work, PREPARATION, about=about, every=every),
        )
    except TrainingDiverged as error:
        raise DomainError(ErrorCode.JOB_FAILED, str(error)) from error


def _determined_by(training: list[Example], config: RunCreate) -> list[object]:
    """What the distillation follows from, beside what its loop sees."""
    assert config.llm is not None
    path = config.proxy.path
    models = [folder_identity(config.llm), folder_identity(path) if path else None]
    return [config.proxy.model_dump(mode="json"), config.seed, models, rows_digest(training)]


def _asked_for(field: str, make: Callable[[], T]) -> T:
    """Make what the run's settings ask for; what does not fit the model is the user's to correct, and not a fault."""
    try:
        return make()
    except ValueError as error:
        raise DomainError(ErrorCode.INVALID_FIELD, f"`{field}` does not fit the model: {error}") from error
