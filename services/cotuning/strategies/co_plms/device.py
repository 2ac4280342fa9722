"""A device's round: DST trains the domain adapter, SAML the shared one and the SLM's."""

from cotuning.adapters import activate, adapted, adapter_state, lora_config, subtract
from cotuning.encoded_rows import EncodedRows
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.probe_logits import probe_payload
from cotuning.seeding import derive_seed
from cotuning.shared_rows import SharedRows, share_rows
from cotuning.strategies.co_plms.comparison import compared
from cotuning.strategies.interface import DeviceInputs
from cotuning.strategies.results import DeviceResult
from cotuning.strategies.tuning import adapter_training
from cotuning.training import draw_batches, draw_mixed_batches, row_sizes
from cotuning.tuning import tune_adapter
from protocol.strategies import CoPlmsSettings

DOMAIN_STAGE = "domain_tuning"
MUTUAL_STAGE = "mutual_learning"


def device_step(given: DeviceInputs, settings: CoPlmsSettings) -> DeviceResult:
    """One device's round: DST (phi_i), SAML (theta and psi_i), the delta of theta, and logits on the probe set.

    Args:
        given: its theta and phi_i have the rank that the settings say (`device_ranks.device_start`).
        settings: of the strategy.

    Raises:
        CoverageTooLow: the tokenizers cannot be aligned on this data; no adapter was trained by SAML.
        AdapterMismatch: an adapter is not of this model and these settings.
    """
    assert given.shared_model is not None
    assert given.shared_adapter is not None
    proxy_config = lora_config(given.shared_model, **settings.proxy_lora.model_dump())
    slm_config = lora_config(given.slm, **settings.slm_lora.model_dump())
    phi = derive_seed(given.seed, "domain_adapter") if given.domain_adapter is None else given.domain_adapter
    psi = derive_seed(given.seed, "slm_adapter") if given.slm_adapter is None else given.slm_adapter
    with (
        adapted(given.shared_model, proxy_config, {"shared": given.shared_adapter, "domain": phi}) as proxy,
        adapted(given.slm, slm_config, {"slm": psi}) as slm,
    ):
        # Aligned before any training: a pair of tokenizers that does not fit is refused with nothing spent.
        shared = _shared_rows(slm, proxy, given, settings)
        losses = _tune_domain(proxy, shared.rows_b, given, settings)
        losses |= _learn_on_device(slm, proxy, shared, given, settings)
        logits, metadata = probe_payload(
            proxy,
            given.probe,
            top_k=settings.top_k,
            temperature=settings.temperature,
            values=settings.logits_values,
            max_length=settings.server.max_length,
        )
        return DeviceResult(
            delta=subtract(adapter_state(proxy, "shared"), given.shared_adapter),
            logits=logits,
            logits_metadata=metadata,
            domain_adapter=adapter_state(proxy, "domain"),
            slm_adapter=adapter_state(slm, "slm"),
            num_examples=len(given.private),
            losses=losses,
            alignment=shared.alignment,
        )


def _shared_rows(slm: LanguageModel, proxy: LanguageModel, given: DeviceInputs, settings: CoPlmsSettings) -> SharedRows:
    """Rows of each SAML step: private ones, and a set share of public ones."""
    training = settings.training
    examples = [*given.private, *given.probe]
    wanted = min(round(training.batch_size * settings.public_fraction), training.batch_size - 1)
    batches = draw_mixed_batches(
        row_sizes(given.private),
        row_sizes(given.probe),
        batch_size=training.batch_size,
        from_second=wanted if given.probe else 0,
        steps=training.steps,
        seed=derive_seed(given.seed, "rows", given.round_number),
    )
    return share_rows(
        EncodedRows(slm, examples, max_length=training.max_length),
        EncodedRows(proxy, examples, max_length=training.max_length),
        batches,
        min_coverage=settings.min_coverage,
    )


def _tune_domain(
    proxy: LanguageModel, rows: EncodedRows, given: DeviceInputs, settings: CoPlmsSettings
) -> dict[str, float]:
    """DST: phi_i learns D_i, of which `rows` has the private ones first, by cross-entropy; theta is active, frozen."""
    training = settings.training
    activate(proxy, ["shared", "domain"], trainable=["domain"])
    batches = draw_batches(
        row_sizes(given.private),
        batch_size=training.batch_size,
        steps=settings.domain_steps,
        seed=derive_seed(derive_seed(given.seed, DOMAIN_STAGE, given.round_number), "rows"),
    )
    losses = tune_adapter(
        proxy,
        "domain",
        rows,
        batches,
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
        **adapter_training(training, given, stage=DOMAIN_STAGE, learning_rate=settings.proxy_learning_rate),
    )
    return {"domain_ce": losses["cross_entropy"]} if losses else {}


def _learn_on_device(
    slm: LanguageModel, proxy: LanguageModel, shared: SharedRows, given: DeviceInputs, settings: CoPlmsSettings
) -> dict[str, float]:
    """SAML: theta and psi_i learn, phi_i speaks and is frozen."""
    training = settings.training
    learns = not settings.freeze_proxy
    activate(proxy, ["shared", "domain"], trainable=["shared"] if learns else [])
    activate(slm, ["slm"], trainable=["slm"])
    return learn_mutually(
        Party("slm", slm, "slm", training.learning_rate, settings.alpha),
        Party("proxy", proxy, "shared", settings.proxy_learning_rate, settings.beta, learns=learns),
        shared,
        weight_decay=training.weight_decay,
        gradient_clip=training.gradient_clip,
        **compared(settings),
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        micro_batch_size=training.micro_batch_size,
        seed=derive_seed(given.seed, MUTUAL_STAGE, given.round_number),
        stage=MUTUAL_STAGE,
        on_progress=given.on_progress,
        checkpoints=given.checkpoints,
    )
