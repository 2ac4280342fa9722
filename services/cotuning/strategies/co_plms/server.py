"""The cloud's round: devices' logits are checked, and the LLM and the proxy teach each other (SAML)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import activate, adapted, adapter_state, lora_config
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import Party, Teacher, learn_mutually
from cotuning.payload import PayloadRows
from cotuning.probe_logits import ProbePlaces, device_teachers, parse_probe_payload, probe_places
from cotuning.seeding import derive_seed
from cotuning.shared_rows import SharedRows, share_rows
from cotuning.strategies.co_plms.comparison import compared
from cotuning.strategies.device_ranks import for_devices
from cotuning.strategies.results import ServerResult, TeacherRows
from cotuning.training import OnProgress, draw_mixed_batches, row_sizes
from protocol.strategies import CoPlmsSettings

SERVER_STAGE = "server_mutual_learning"


def logits_places(proxy: LanguageModel, probe: Sequence[Example], settings: CoPlmsSettings) -> ProbePlaces:
    """Where on the probe set every device has to send the proxy's distributions."""
    return probe_places(proxy, probe, max_length=settings.server.max_length)


def parse_logits(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    proxy: LanguageModel,
    probe: Sequence[Example],
    places: ProbePlaces,
    settings: CoPlmsSettings,
) -> PayloadRows:
    """Check what a device sent as logits; the server's next step takes the result.

    Args:
        tensors: what came.
        metadata: its header.
        proxy: P.
        probe: Q.
        places: from `logits_places`; the same for every device.
        settings: of the strategy.

    Raises:
        PayloadError: another proxy, probe set, K or temperature, or values that cannot be distributions.
    """
    return parse_probe_payload(
        tensors,
        metadata,
        proxy=proxy,
        probe=probe,
        places=places,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )


def server_step(
    *,
    llm: LanguageModel,
    proxy: LanguageModel,
    public: Sequence[Example],
    probe: Sequence[Example],
    shared_adapter: Mapping[str, Tensor],
    llm_adapter: Mapping[str, Tensor] | None,
    device_logits: Sequence[PayloadRows],
    settings: CoPlmsSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> ServerResult:
    """The cloud's round: SAML between the LLM (omega) and the proxy (theta_bar) on public rows.

    On probe rows where a device does better than the student itself, its logits are one more teacher: of the proxy, and
    of the LLM if it has the proxy's tokenizer (else the LLM learns the same through the proxy).

    Args:
        llm: without adapters; given back so.
        proxy: without adapters; given back so.
        public: D_pub without the probe rows.
        probe: Q.
        shared_adapter: theta_bar, the aggregate.
        llm_adapter: omega after the last round, None in the first.
        device_logits: from `parse_logits`, one a device.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        CoverageTooLow: nothing was trained.
        AdapterMismatch: an adapter is not of this model and these settings.
    """
    server = settings.server
    proxy_config = lora_config(proxy, **settings.proxy_lora.model_dump())
    llm_config = lora_config(llm, **settings.llm_lora.model_dump())
    llm_start = derive_seed(seed, "llm_adapter") if llm_adapter is None else llm_adapter
    with (
        adapted(proxy, proxy_config, {"shared": shared_adapter}) as lent_proxy,
        adapted(llm, llm_config, {"llm": llm_start}) as lent_llm,
    ):
        if not server.steps:
            return ServerResult(
                for_devices(adapter_state(lent_proxy, "shared"), settings), adapter_state(lent_llm, "llm")
            )
        teachers, rows_taught = device_teachers(
            {"llm": lent_llm, "proxy": lent_proxy},
            lent_proxy,
            probe,
            device_logits,
            max_length=server.max_length,
            mode="off" if settings.matching == "ce_only" else server.device_teacher,
            weight=server.device_teacher_weight,
            first_row=len(public),
        )
        taught = TeacherRows(len(probe), rows_taught["proxy"], rows_taught["llm"])
        examples = [*public, *probe]
        shared = share_rows(
            EncodedRows(lent_llm, examples, max_length=server.max_length),
            EncodedRows(lent_proxy, examples, max_length=server.max_length),
            _server_batches(
                public, probe, teachers=teachers, settings=settings, seed=derive_seed(seed, "rows", round_number)
            ),
            min_coverage=settings.min_coverage,
        )
        losses = _learn_on_server(
            lent_llm,
            lent_proxy,
            shared,
            teachers,
            settings=settings,
            seed=derive_seed(seed, SERVER_STAGE, round_number),
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        theta = for_devices(adapter_state(lent_proxy, "shared"), settings)
        return ServerResult(theta, adapter_state(lent_llm, "llm"), losses, shared.alignment, taught)


def _learn_on_server(
    llm: LanguageModel,
    proxy: LanguageModel,
    shared: SharedRows,
    teachers: Mapping[str, Teacher | None],
    *,
    settings: CoPlmsSettings,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> dict[str, float]:
    """SAML: theta and omega learn; there is no domain adapter here."""
    server = settings.server
    activate(proxy, ["shared"], trainable=["shared"])
    activate(llm, ["llm"], trainable=["llm"])
    return learn_mutually(
        Party("llm", llm, "llm", server.llm_learning_rate, settings.alpha, teachers["llm"]),
        Party("proxy", proxy, "shared", server.proxy_learning_rate, settings.beta, teachers["proxy"]),
        shared,
        gradient_clip=server.gradient_clip,
        **compared(settings),
        precision=server.precision,
        gradient_checkpointing=server.gradient_checkpointing,
        micro_batch_size=server.micro_batch_size,
        seed=seed,
        stage=SERVER_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def _server_batches(
    public: Sequence[Example],
    probe: Sequence[Example],
    *,
    teachers: Mapping[str, Teacher | None],
    settings: CoPlmsSettings,
    seed: int,
) -> list[list[int]]:
    """Rows of each server step: public ones, and a set share of the probe rows that some device teaches."""
    server = settings.server
    taught = sorted({index for teacher in teachers.values() if teacher is not None for index in teacher.sample_of_row})
    from_taught = min(round(server.batch_size * server.probe_fraction), server.batch_size - 1) if taught else 0
    batches = draw_mixed_batches(
        row_sizes(public),
        row_sizes([probe[index - len(public)] for index in taught]),
        batch_size=server.batch_size,
        from_second=from_taught,
        steps=server.steps,
        seed=seed,
    )
    rows = [*range(len(public)), *taught]
    return [[rows[index] for index in batch] for batch in batches]
