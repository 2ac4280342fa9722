"""A device's round: DST trains the domain adapter, SAML the shared one and the SLM's."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import activate, adapted, adapter_state, lora_config, subtract
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.probe_logits import probe_payload
from cotuning.seeding import derive_seed
from cotuning.shared_rows import SharedRows, share_rows
from cotuning.strategies.co_plms.comparison import compared
from cotuning.strategies.results import DeviceResult
from cotuning.training import OnProgress, draw_batches, draw_mixed_batches, row_sizes
from cotuning.tuning import tune_adapter
from protocol.strategies import CoPlmsSettings

DOMAIN_STAGE = "domain_tuning"
MUTUAL_STAGE = "mutual_learning"


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
        micro_batch_size=training.micro_batch_size,
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
        **compared(settings),
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        micro_batch_size=training.micro_batch_size,
        seed=seed,
        stage=MUTUAL_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
