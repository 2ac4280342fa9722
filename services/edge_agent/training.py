"""Trains one assignment with the pure strategies of `cotuning`. The only module of the agent that imports torch.

What owns models and files is here; the mathematics is not. Models stay loaded between rounds: a strategy gives them
back as they came. Everything random follows from the assignment's seed, so training the same assignment again from the
same local state gives the same bytes; and so does going on from a checkpoint of it.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import LoraConfig
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from assets.adapters import read_adapter, save_adapter
from assets.checkpoints import FolderCheckpoints
from assets.data import read_examples
from assets.devices import available_memory
from assets.errors import AssetError, ModelFolderError, TensorFileError, VocabularyError
from assets.models import folder_identity, load_language_model, read_config
from assets.process_memory import peak_memory
from assets.tensors import read_tensors, tensors_to_bytes
from assets.vocabulary_files import read_vocabulary, vocabulary_file
from assets.wire_files import read_message, update_files
from cotuning.adapters import AdapterMismatch, adapted, lora_config
from cotuning.evaluation import evaluate
from cotuning.examples import Example, rows_digest
from cotuning.language_model import LanguageModel, UnknownHead
from cotuning.memory import CannotEstimate, NotEnoughMemory, estimate_memory, longest_row, require_memory
from cotuning.model_fingerprint import ModelFingerprint, fingerprint_model
from cotuning.payload import PayloadError
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies.interface import DeviceInputs
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, Message
from cotuning.training import OnProgress, TrainingDiverged
from cotuning.vocabulary import Vocabulary
from edge_agent.cycle import RoundFiles, TrainedUpdate
from edge_agent.errors import CannotTrain
from edge_agent.local_state import (
    DOMAIN_ADAPTER,
    SLM_ADAPTER,
    LocalState,
    LocalStates,
    StateRecord,
    WriteState,
    write_record,
)
from edge_agent.settings import Config
from protocol.assignments import Assignment
from protocol.assignments import ModelFingerprint as ExpectedModel
from protocol.errors import ErrorCode
from protocol.runs import AlignmentMetrics, DeviceMetrics, Scores
from protocol.statuses import PartKind
from protocol.strategies import DownloadKind, Strategy, spec_of

log = structlog.get_logger(__name__)


class Stopwatch:
    """Seconds by stage; a stage lasts until the next one is entered."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._entered = time.monotonic()

    def enter(self, stage: str | None) -> None:
        """Begin `stage`, or with None only end the last one."""
        now = time.monotonic()
        if self._stage is not None:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._entered
        self._stage, self._entered = stage, now

    def seconds(self) -> dict[str, float]:
        """End the last stage and return all of them, rounded to milliseconds."""
        self.enter(None)
        return {stage: round(seconds, 3) for stage, seconds in self._seconds.items()}


class LocalTrainer:
    """Implements `edge_agent.cycle.Trainer`.

    Args:
        config: of the agent.
        states: where checkpoints go; without it a killed training starts anew.
    """

    def __init__(self, config: Config, states: LocalStates | None = None) -> None:
        torch.set_num_threads(config.training.torch_threads)
        disable_progress_bar()  # a log is no terminal
        self._config = config
        self._states = states
        self._fits: list[tuple[Strategy, int | None]] = []
        self._slm: LanguageModel | None = None
        self._slm_fingerprint: ModelFingerprint | None = None
        self._proxy: tuple[Path, LanguageModel] | None = None
        self._vocabulary_file: bytes | None = None
        self._llm_vocabulary: tuple[Path, Vocabulary] | None = None

    def train(
        self, assignment: Assignment, files: RoundFiles, start: LocalState | None, on_progress: OnProgress
    ) -> TrainedUpdate:
        """Do the device's step of the run's strategy on this device's rows.

        Raises:
            CannotTrain: the model, the data or the alignment of the two tokenizers will not do.
            AgentError: whatever `on_progress` raises.
        """
        with _told(files):
            return self._train(assignment, files, start, on_progress)

    def last_step(
        self, assignment: Assignment, files: RoundFiles, start: LocalState, on_progress: OnProgress
    ) -> WriteState | None:
        """Do the device's step after the last round; None where it changes nothing. Raises as `train`."""
        with _told(files):
            slm = self._load_slm()
            given = self._inputs(assignment, files, start, slm, on_progress)
            result = steps_of(assignment.strategy).last_step(given)
            return None if result is None else self._state_writer(assignment, result, slm)

    def _train(
        self, assignment: Assignment, files: RoundFiles, start: LocalState | None, on_progress: OnProgress
    ) -> TrainedUpdate:
        watch = Stopwatch()

        def note(stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
            watch.enter(stage)
            on_progress(stage, step, steps, dict(losses))

        watch.enter("load")
        slm = self._load_slm()
        before = self._scores("evaluation_before", slm, None, assignment, note) if assignment.evaluate_before else None
        watch.enter("load")
        given = self._inputs(assignment, files, start, slm, note)
        result = steps_of(assignment.strategy).device_step(given)
        tuned = (self._slm_lora(assignment, slm), result.slm_adapter)
        after = self._scores("evaluation_after", slm, tuned, assignment, note) if assignment.evaluate_after else None

        metrics = DeviceMetrics(
            before=before,
            after=after,
            losses=result.losses,
            alignment=AlignmentMetrics(**asdict(result.alignment)) if result.alignment else None,
            seconds_by_stage=watch.seconds(),
            peak_memory_bytes=peak_memory(),
        )
        parts = _parts(assignment, result, self._write_vocabulary)
        return TrainedUpdate(parts, result.num_examples, metrics, self._state_writer(assignment, result, slm))

    def _state_writer(self, assignment: Assignment, result: DeviceResult, slm: LanguageModel) -> WriteState:
        config = self._slm_lora(assignment, slm)

        def write_state(folder: Path) -> None:
            save_adapter(folder / SLM_ADAPTER, result.slm_adapter, config, self._config.model.path)
            if result.domain_adapter is not None:
                (folder / DOMAIN_ADAPTER).write_bytes(tensors_to_bytes(result.domain_adapter, {}))
            write_record(folder, _record(assignment, result.num_examples))

        return write_state

    def _slm_lora(self, assignment: Assignment, slm: LanguageModel) -> LoraConfig:
        return lora_config(slm, **assignment.strategy.slm_lora.model_dump())

    def _inputs(
        self,
        assignment: Assignment,
        files: RoundFiles,
        start: LocalState | None,
        slm: LanguageModel,
        on_progress: OnProgress,
    ) -> DeviceInputs:
        private = read_examples(self._config.data.train)
        strategy, phi = assignment.strategy, start.domain_adapter if start else None
        if strategy.shared_lora is not None:
            self._require_rank(assignment.adapter_rank or strategy.shared_lora.rank)
        self._require_memory(assignment, slm, private, files)
        if DownloadKind.MODEL_MANIFEST in spec_of(strategy).downloads:
            self._require_same_model(slm, files.expected_slm)
        return DeviceInputs(
            slm=slm,
            private=private,
            slm_adapter=read_adapter(start.slm_adapter)[0] if start else None,
            domain_adapter=read_tensors(phi)[0] if phi else None,
            shared_model=self._load_proxy(files.proxy_folder) if files.proxy_folder else None,
            shared_adapter=read_tensors(files.adapter)[0] if files.adapter else None,
            adapter_rank=assignment.adapter_rank,
            probe=read_examples(files.probe_set) if files.probe_set else (),
            message=_message(strategy, files),
            llm_vocabulary=self._load_llm_vocabulary(files.llm_vocabulary, slm) if files.llm_vocabulary else None,
            round_number=assignment.round_number,
            seed=assignment.seed,
            on_progress=on_progress,
            checkpoints=self._checkpoints(assignment, start, private),
        )

    def _require_rank(self, rank: int) -> None:
        """Refuse an adapter larger than the owner allows, as a run that does not ask for that limit may send."""
        most = self._config.training.max_adapter_rank
        if most is not None and rank > most:
            raise CannotTrain("adapter_rank_too_high", f"expected an adapter of rank {most} at most, got {rank}")

    def _require_same_model(self, slm: LanguageModel, expected: ExpectedModel | None) -> None:
        """Refuse to train an adapter that will be averaged with those of another model."""
        if expected is None:
            raise CannotTrain("incomplete_assignment", "expected a fingerprint of the run's small model")
        if self._slm_fingerprint is None:  # every weight is read for it; the model stays loaded
            self._slm_fingerprint = fingerprint_model(slm)
        for what, code in (("tokenizer", "other_tokenizer"), ("weights", "other_model")):
            ours, theirs = getattr(self._slm_fingerprint, what), getattr(expected, what)
            if ours != theirs:
                name = Path(self._config.model.path).name
                raise CannotTrain(
                    code,
                    f"this run averages adapters of one small model that every device has: expected {what} "
                    f"{theirs[:12]}, those of {name} are {ours[:12]}",
                )

    def _require_memory(
        self, assignment: Assignment, slm: LanguageModel, private: Sequence[Example], files: RoundFiles
    ) -> None:
        """Refuse what will not fit before any step is taken; asked once for each strategy and rank."""
        strategy = assignment.strategy
        asked = strategy, assignment.adapter_rank
        if not self._config.training.check_memory or asked in self._fits:
            return
        training = strategy.training
        options: dict[str, Any] = {
            "learns": "adapter",
            "batch_size": training.rows_at_once,
            "length": longest_row(slm.tokenizer, private, max_length=training.max_length),
            "precision": training.precision,
            "gradient_checkpointing": training.gradient_checkpointing,
        }
        try:
            estimates = {"slm": estimate_memory(slm.base.config, rank=strategy.slm_lora.rank, **options)}
            if strategy.shared_lora is not None and files.proxy_folder is not None:
                proxy = read_config(files.proxy_folder)
                rank = assignment.adapter_rank or strategy.shared_lora.rank
                estimates["proxy"] = estimate_memory(proxy, rank=rank, adapters=2, **options)
        except CannotEstimate as error:
            log.warning("memory_not_estimated", reason=str(error))
        else:
            require_memory(estimates, available_memory("cpu"))
        self._fits.append(asked)

    def _checkpoints(
        self, assignment: Assignment, start: LocalState | None, private: Sequence[Example]
    ) -> FolderCheckpoints | None:
        """Where this training's states are kept, under the name of everything that determines it."""
        every = self._config.training.checkpoint_steps
        if self._states is None or not every:
            return None
        about = assignment.model_dump(
            mode="json",
            include={"assignment_id", "run_id", "round_number", "strategy", "seed", "proxy_manifest"}
            | {"adapter", "adapter_rank", "message", "llm_vocabulary"},
        )
        start_record = start.record.model_dump(mode="json") if start else None
        probe = assignment.probe_set.sha256 if assignment.probe_set else None
        model = folder_identity(self._config.model.path)
        configuration = json.dumps([about, start_record, probe, model, rows_digest(private)], sort_keys=True)
        return FolderCheckpoints(
            self._states.begin_training(assignment.run_id, assignment.assignment_id),
            configuration=hashlib.sha256(configuration.encode()).hexdigest(),
            every=every,
            on_ignored=lambda reason: log.warning("checkpoint_ignored", reason=reason),
        )

    def _scores(
        self,
        stage: str,
        slm: LanguageModel,
        tuned: tuple[LoraConfig, Mapping[str, Tensor]] | None,
        assignment: Assignment,
        on_progress: OnProgress,
    ) -> Scores | None:
        """Measure the SLM, as it is or with an adapter, on the owner's test rows; None if there are none."""
        limit, path = assignment.evaluation.test_rows, self._config.data.test
        if not limit or path is None:
            return None
        rows = read_examples(path, limit=limit)
        settings = self._config.training

        def note(done: int, total: int) -> None:
            on_progress(stage, done, total, {})

        note(0, 2 * len(rows))
        with adapted(slm, tuned[0], {"slm": tuned[1]}) if tuned else nullcontext(slm) as lent:
            scores = evaluate(
                lent,
                rows,
                max_new_tokens=assignment.evaluation.max_new_tokens,
                batch_size=settings.evaluation_batch_size,
                max_length=settings.evaluation_max_length,
                on_rows=note,
            )
        return Scores(**asdict(scores))

    def _load_slm(self) -> LanguageModel:
        if self._slm is None:
            self._slm = load_language_model(self._config.model.path)
        return self._slm

    def _write_vocabulary(self) -> bytes:
        """The file of the SLM's tokenizer; made once, since it takes seconds for a large one."""
        if self._vocabulary_file is None:
            self._vocabulary_file = vocabulary_file(self._load_slm())
        return self._vocabulary_file

    def _load_llm_vocabulary(self, file: Path, slm: LanguageModel) -> Vocabulary:
        if self._llm_vocabulary is None or self._llm_vocabulary[0] != file:
            self._llm_vocabulary = (file, read_vocabulary(file, slm.device))
        return self._llm_vocabulary[1]

    def _load_proxy(self, folder: Path) -> LanguageModel:
        if self._proxy is None or self._proxy[0] != folder:
            self._proxy = None  # before loading the next, so that two never lie in memory
            self._proxy = (folder, load_language_model(str(folder)))
        return self._proxy[1]


@contextmanager
def _told(files: RoundFiles) -> Iterator[None]:
    """Say of what goes wrong with these files why this device cannot do it."""
    try:
        yield
    except NotEnoughMemory as error:
        raise CannotTrain(ErrorCode.NOT_ENOUGH_MEMORY, str(error)) from None
    except CoverageTooLow as error:
        raise CannotTrain(ErrorCode.COVERAGE_TOO_LOW, str(error)) from None
    except TrainingDiverged as error:
        raise CannotTrain(ErrorCode.NON_FINITE_VALUES, str(error)) from None
    except (AdapterMismatch, UnknownHead) as error:
        raise CannotTrain("model_unsuitable", str(error)) from None
    except VocabularyError as error:
        where = f"{files.llm_vocabulary}: "
        raise CannotTrain("tokenizer_unsuitable", str(error).removeprefix(where)) from None
    except PayloadError as error:
        raise CannotTrain(ErrorCode.MESSAGE_MISMATCH, f"the server's message: {error}") from None
    except ModelFolderError as error:
        raise CannotTrain(ErrorCode.MODEL_FOLDER_MISSING, str(error)) from None
    except AssetError as error:
        raise CannotTrain(ErrorCode.DATA_FILE_INVALID, _without_data(error)) from None


def _without_data(error: AssetError) -> str:
    """Name the file and the line only: the message quotes the row, for the owner's eyes and nobody else's."""
    place = re.match(r"(.*?:\d+):", str(error))
    where = Path(place[1]).name if place else "a data file"
    return f"{where} cannot be read; `cotune-agent start` shows its owner why"


def _message(strategy: Strategy, files: RoundFiles) -> Message | None:
    """What the server sent, of the kind that the strategy declares and of no other."""
    kind = spec_of(strategy).received_message
    if files.message is None or kind is None:
        return None
    try:
        return read_message(files.message, kind)
    except TensorFileError as error:
        detail = str(error).removeprefix(f"{files.message}: ")  # where it lies is nobody's business
        raise CannotTrain(ErrorCode.MESSAGE_MISMATCH, f"the server's message: {detail}") from None


def _parts(assignment: Assignment, result: DeviceResult, vocabulary: Callable[[], bytes]) -> dict[PartKind, bytes]:
    manifest, adapter, probe_set = assignment.proxy_manifest, assignment.adapter, assignment.probe_set
    return update_files(
        result,
        spec_of(assignment.strategy),
        vocabulary=vocabulary,
        model_sha256=manifest.sha256 if manifest else None,
        adapter_sha256=adapter.sha256 if adapter else None,
        probe_set_sha256=probe_set.sha256 if probe_set else None,
    )


def _record(assignment: Assignment, num_examples: int) -> StateRecord:
    return StateRecord(
        run_id=assignment.run_id,
        run_name=assignment.run_name,
        round_number=assignment.round_number,
        assignment_id=assignment.assignment_id,
        adapter_sha256=assignment.adapter.sha256 if assignment.adapter else None,
        message_sha256=assignment.message.sha256 if assignment.message else None,
        num_examples=num_examples,
        last_step_due=spec_of(assignment.strategy).last_step and assignment.round_number == assignment.rounds,
    )
