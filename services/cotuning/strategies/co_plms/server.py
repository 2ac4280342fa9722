"""The cloud's round: devices' logits are checked, and the LLM and the proxy teach each other (SAML)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import activate, adapted, adapter_state, lora_config
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
from cotuning.strategies.interface import ServerInputs
from cotuning.strategies.results import ServerResult, TeacherRows
from cotuning.training import draw_mixed_batches, row_sizes
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


def server_step(given: ServerInputs, settings: CoPlmsSettings) -> ServerResult:
    """The cloud's round: SAML between the LLM (omega) and the proxy (theta_bar) on public rows.

    On probe rows where a device does better than the student itself, its logits are one more teacher: of the proxy, and
    of the LLM if it has the proxy's tokenizer (else the LLM learns the same through the proxy).

    Args:
        given: its logits are from `parse_logits`.
        settings: of the strategy.

    Raises:
        CoverageTooLow: nothing was trained.
        AdapterMismatch: an adapter is not of this model and these settings.
    """
    assert given.llm is not None
    assert given.shared_model is not None
    assert given.shared_adapter is not None
    proxy_config = lora_config(given.shared_model, **settings.proxy_lora.model_dump())
    llm_config = lora_config(given.llm, **settings.llm_lora.model_dump())
    omega = derive_seed(given.seed, "llm_adapter") if given.llm_adapter is None else given.llm_adapter
    with (
        adapted(given.shared_model, proxy_config, {"shared": given.shared_adapter}) as proxy,
        adapted(given.llm, llm_config, {"llm": omega}) as llm,
    ):
        if not settings.server.steps:
            return ServerResult(for_devices(adapter_state(proxy, "shared"), settings), adapter_state(llm, "llm"))
        teachers, taught = _device_teachers(llm, proxy, given, settings)
        shared = _shared_rows(llm, proxy, teachers, given, settings)
        losses = _learn_on_server(llm, proxy, shared, teachers, given=given, settings=settings)
        theta = for_devices(adapter_state(proxy, "shared"), settings)
        return ServerResult(theta, adapter_state(llm, "llm"), losses, shared.alignment, taught)


def _device_teachers(
    llm: LanguageModel, proxy: LanguageModel, given: ServerInputs, settings: CoPlmsSettings
) -> tuple[dict[str, Teacher | None], TeacherRows]:
    """What the devices' logits teach either model, and on how many probe rows."""
    server = settings.server
    teachers, rows_taught = device_teachers(
        {"llm": llm, "proxy": proxy},
        proxy,
        given.probe,
        given.device_logits,
        max_length=server.max_length,
        mode="off" if settings.matching == "ce_only" else server.device_teacher,
        weight=server.device_teacher_weight,
        first_row=len(given.public),
    )
    return teachers, TeacherRows(len(given.probe), rows_taught["proxy"], rows_taught["llm"])


def _shared_rows(
    llm: LanguageModel,
    proxy: LanguageModel,
    teachers: Mapping[str, Teacher | None],
    given: ServerInputs,
    settings: CoPlmsSettings,
) -> SharedRows:
    """Rows of each step: public ones, and a set share of the probe rows that some device teaches."""
    server, public, probe = settings.server, given.public, given.probe
    taught = sorted({index for teacher in teachers.values() if teacher is not None for index in teacher.sample_of_row})
    from_taught = min(round(server.batch_size * server.probe_fraction), server.batch_size - 1) if taught else 0
    batches = draw_mixed_batches(
        row_sizes(public),
        row_sizes([probe[index - len(public)] for index in taught]),
        batch_size=server.batch_size,
        from_second=from_taught,
        steps=server.steps,
        seed=derive_seed(given.seed, "rows", given.round_number),
    )
    rows, examples = [*range(len(public)), *taught], [*public, *probe]
    return share_rows(
        EncodedRows(llm, examples, max_length=server.max_length),
        EncodedRows(proxy, examples, max_length=server.max_length),
        [[rows[index] for index in batch] for batch in batches],
        min_coverage=settings.min_coverage,
    )


def _learn_on_server(
    llm: LanguageModel,
    proxy: LanguageModel,
    shared: SharedRows,
    teachers: Mapping[str, Teacher | None],
    *,
    given: ServerInputs,
    settings: CoPlmsSettings,
) -> dict[str, float]:
    """SAML: theta and omega learn; there is no domain adapter here."""
    server = settings.server
    learns = not settings.freeze_proxy
    activate(proxy, ["shared"], trainable=["shared"] if learns else [])
    activate(llm, ["llm"], trainable=["llm"])
    return learn_mutually(
        Party("llm", llm, "llm", server.llm_learning_rate, settings.alpha, teachers["llm"]),
        Party("proxy", proxy, "shared", server.proxy_learning_rate, settings.beta, teachers["proxy"], learns=learns),
        shared,
        gradient_clip=server.gradient_clip,
        **compared(settings),
        precision=server.precision,
        gradient_checkpointing=server.gradient_checkpointing,
        micro_batch_size=server.micro_batch_size,
        seed=derive_seed(given.seed, SERVER_STAGE, given.round_number),
        stage=SERVER_STAGE,
        on_progress=given.on_progress,
        checkpoints=given.checkpoints,
    )
