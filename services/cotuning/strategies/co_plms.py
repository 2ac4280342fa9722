"""Co-PLMs (arXiv 2511.11678): domain-specific tuning (DST), then structure-agnostic mutual learning (SAML), on the
device and on the server; only the proxy's shared adapter and its logits on public text cross the network.

Symbols: theta the shared adapter, phi_i the domain adapter, psi_i the SLM's, omega the LLM's.

Ours, where the paper leaves it open: phi_i is trained from its state of the last round and stays frozen during SAML;
alpha weighs what a model learns from the proxy (the SLM on a device, the LLM on the server) and beta what the proxy
learns from it; the probe rows that a device's logits teach are a set share of the server's batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cotuning.adapters import activate, adapted, adapter_state, lora_config, subtract
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import CoverageTooLow, Party, SharedRows, Teacher, learn_mutually, share_rows
from cotuning.payload import PayloadRows
from cotuning.probe_logits import ProbePlaces, device_teachers, parse_probe_payload, probe_payload, probe_places
from cotuning.seeding import derive_seed
from cotuning.strategies.device_ranks import for_devices
from cotuning.strategies.results import DeviceResult, ServerResult, TeacherRows
from cotuning.training import OnProgress, draw_batches, draw_mixed_batches, row_sizes, tune_adapter
from protocol.strategies import CoPlmsSettings

__all__ = [
    "DOMAIN_STAGE",
    "MUTUAL_STAGE",
    "SERVER_STAGE",
    "CoverageTooLow",
    "DeviceResult",
    "ServerResult",
    "TeacherRows",
    "device_step",
    "logits_places",
    "parse_logits",
    "server_step",
]

DOMAIN_STAGE = "domain_tuning"
MUTUAL_STAGE = "mutual_learning"
SERVER_STAGE = "server_mutual_learning"


def device_step(
    *,
    slm: LanguageModel,
    proxy: LanguageModel,
    private: Sequence[Example],
    probe: Sequence[Example],
    shared_adapter: Mapping[str, Tensor],
    domain_adapter: Mapping[str, Tensor] | None,
    slm_adapter: Mapping[str, Tensor] | None,
    settings: CoPlmsSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DeviceResult:
    """One device's round: DST (phi_i), SAML (theta and psi_i), the delta of theta, and logits on the probe set.

    Args:
        slm: without adapters; given back so.
        proxy: without adapters; given back so.
        private: D_i.
        probe: Q, public.
        shared_adapter: theta_t.
        domain_adapter: phi_i after the last round, None in the first.
        slm_adapter: psi_i after the last round, None in the first.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's; equal arguments give equal bits.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`; each stage has its own.

    Raises:
        CoverageTooLow: the tokenizers cannot be aligned on this data; no adapter was trained by SAML.
        AdapterMismatch: an adapter is not of this model and these settings.
    """
    proxy_config = lora_config(proxy, **settings.proxy_lora.model_dump())
    slm_config = lora_config(slm, **settings.slm_lora.model_dump())
    phi = derive_seed(seed, "domain_adapter") if domain_adapter is None else domain_adapter
    psi = derive_seed(seed, "slm_adapter") if slm_adapter is None else slm_adapter
    row_seed = derive_seed(seed, "rows", round_number)
    with (
        adapted(proxy, proxy_config, {"shared": shared_adapter, "domain": phi}) as lent_proxy,
        adapted(slm, slm_config, {"slm": psi}) as lent_slm,
    ):
        # Aligned before any training: a pair of tokenizers that does not fit is refused with nothing spent.
        shared = _shared_rows(lent_slm, lent_proxy, private=private, probe=probe, settings=settings, seed=row_seed)
        losses = _tune_domain(
            lent_proxy,
            shared.rows_b,
            num_private=len(private),
            settings=settings,
            seed=derive_seed(seed, DOMAIN_STAGE, round_number),
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        losses |= _learn_on_device(
            lent_slm,
            lent_proxy,
            shared,
            settings=settings,
            seed=derive_seed(seed, MUTUAL_STAGE, round_number),
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        logits, metadata = probe_payload(
            lent_proxy,
            probe,
            top_k=settings.top_k,
            temperature=settings.temperature,
            values=settings.logits_values,
            max_length=settings.server.max_length,
        )
        return DeviceResult(
            delta=subtract(adapter_state(lent_proxy, "shared"), shared_adapter),
            logits=logits,
            logits_metadata=metadata,
            domain_adapter=adapter_state(lent_proxy, "domain"),
            slm_adapter=adapter_state(lent_slm, "slm"),
            num_examples=len(private),
            losses=losses,
            alignment=shared.alignment,
        )


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
        )
        theta = for_devices(adapter_state(lent_proxy, "shared"), settings)
        return ServerResult(theta, adapter_state(lent_llm, "llm"), losses, shared.alignment, taught)


def _shared_rows(
    slm: LanguageModel,
    proxy: LanguageModel,
    *,
    private: Sequence[Example],
    probe: Sequence[Example],
    settings: CoPlmsSettings,
    seed: int,
) -> SharedRows:
    """Rows of each SAML step: private ones, and a set share of public ones."""
    training = settings.training
    examples = [*private, *probe]
    from_probe = min(round(training.batch_size * settings.public_fraction), training.batch_size - 1) if probe else 0
    sizes = row_sizes(private), row_sizes(probe)
    return share_rows(
        EncodedRows(slm, examples, max_length=training.max_length),
        EncodedRows(proxy, examples, max_length=training.max_length),
        draw_mixed_batches(
            *sizes, batch_size=training.batch_size, from_second=from_probe, steps=training.steps, seed=seed
        ),
        min_coverage=settings.min_coverage,
    )


def _tune_domain(
    proxy: LanguageModel,
    rows: EncodedRows,
    *,
    num_private: int,
    settings: CoPlmsSettings,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> dict[str, float]:
    """DST: phi_i learns D_i, the first `num_private` of `rows`, by cross-entropy, with theta active and frozen."""
    training = settings.training
    activate(proxy, ["shared", "domain"], trainable=["domain"])
    sizes = row_sizes(rows.examples[:num_private])
    batches = draw_batches(
        sizes, batch_size=training.batch_size, steps=settings.domain_steps, seed=derive_seed(seed, "rows")
    )
    losses = tune_adapter(
        proxy,
        "domain",
        rows,
        batches,
        learning_rate=settings.proxy_learning_rate,
        weight_decay=training.weight_decay,
        gradient_clip=training.gradient_clip,
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        seed=seed,
        stage=DOMAIN_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    return {"domain_ce": losses["cross_entropy"]} if losses else {}


def _learn_on_device(
    slm: LanguageModel,
    proxy: LanguageModel,
    shared: SharedRows,
    *,
    settings: CoPlmsSettings,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> dict[str, float]:
    """SAML: theta and psi_i learn, phi_i speaks and is frozen."""
    training = settings.training
    activate(proxy, ["shared", "domain"], trainable=["shared"])
    activate(slm, ["slm"], trainable=["slm"])
    return learn_mutually(
        Party("slm", slm, "slm", training.learning_rate, settings.alpha),
        Party("proxy", proxy, "shared", settings.proxy_learning_rate, settings.beta),
        shared,
        weight_decay=training.weight_decay,
        gradient_clip=training.gradient_clip,
        **_compared(settings),
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        seed=seed,
        stage=MUTUAL_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def _learn_on_server(
    llm: LanguageModel,
    proxy: LanguageModel,
    shared: SharedRows,
    teachers: Mapping[str, Teacher | None],
    *,
    settings: CoPlmsSettings,
    seed: int,
    on_progress: OnProgress,
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
        **_compared(settings),
        precision=server.precision,
        gradient_checkpointing=server.gradient_checkpointing,
        seed=seed,
        stage=SERVER_STAGE,
        on_progress=on_progress,
    )


def _compared(settings: CoPlmsSettings) -> dict[str, Any]:
    """What the two models compare, and how: the same on devices and on the server."""
    names = ("temperature", "divergence", "jsd_beta", "matching", "span_likelihood_weight")
    return {name: getattr(settings, name) for name in names}


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
