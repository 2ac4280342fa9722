"""Every tuned number of the demo: base models, steps, learning rates, rows. Measured values: `docs/`.

Two sets: `FACTS` for the domains that the project generates (at most 4 minutes on 2 cores), `GIVEN` for a folder of the
user's in the format of the project's own (at most 10 minutes). `settings` gives one in this machine's precision.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from command_line.base_model_recipes import BaseModelsRecipe, ModelRecipe, fast_precision
from protocol.proxy_settings import ProxySettings
from protocol.runs import EvaluationSettings, RunCreate
from protocol.strategies import CoPlmsSettings, LocalTraining, LoraSettings, ServerTraining, StandaloneSettings

TEST_ROWS = 150
"""At most so many test rows a domain."""


@dataclass(frozen=True)
class Distillation:
    """How the run brings the proxy, which is pretrained, closer to the LLM."""

    steps: int
    batch_size: int
    learning_rate: float
    max_length: int


@dataclass(frozen=True)
class DemoSettings:
    """One kind of demo: how its base models are made and how they are tuned. The runs of both strategies give an SLM
    the same number of steps of the same size."""

    base_models: BaseModelsRecipe
    slm: LocalTraining
    slm_lora: LoraSettings
    co_plms: CoPlmsSettings
    distillation: Distillation
    evaluation: EvaluationSettings
    probe_rows: int
    grace_seconds: float
    round_deadline_seconds: float


_LLM = ModelRecipe(
    name="llm",
    architecture="llama",
    tokenizer="bpe_single_digits",
    vocab_size=1024,
    hidden_size=192,
    layers=4,
    heads=4,
    steps=300,
    batch_size=32,
    learning_rate=2e-3,
    document_share=0.03,
)
_PROXY = replace(_LLM, name="proxy", hidden_size=96, layers=2, steps=250, learning_rate=3e-3)
_GPT2 = ModelRecipe(
    name="slm-gpt2",
    architecture="gpt2",
    tokenizer="bpe_whole_numbers",
    vocab_size=800,
    hidden_size=96,
    layers=2,
    heads=4,
    steps=220,
    batch_size=32,
    learning_rate=3e-3,
    document_share=0.1,
)
_QWEN = replace(_GPT2, name="slm-qwen3", architecture="qwen3", tokenizer="bpe_digit_groups", vocab_size=700, steps=120)
_BLOOM = replace(_GPT2, name="slm-bloom", architecture="bloom", tokenizer="unigram", vocab_size=1000, steps=120)

FACTS = DemoSettings(
    base_models=BaseModelsRecipe(
        llm=_LLM,
        proxy=_PROXY,
        slms=(_GPT2, _QWEN, _BLOOM),
        max_length=128,
        positions=256,
        prompt_weight=0.02,
        corpus_bytes=1_000_000,
        precision="float32",
        least_vocab_share=0.0,
    ),
    slm=LocalTraining(steps=60, batch_size=16, learning_rate=5e-3, max_length=128),
    slm_lora=LoraSettings(rank=8, alpha=16.0),
    co_plms=CoPlmsSettings(
        domain_steps=15,
        server=ServerTraining(steps=40, batch_size=16, llm_learning_rate=1e-3, max_length=128),
    ),
    distillation=Distillation(steps=100, batch_size=16, learning_rate=1e-3, max_length=128),
    evaluation=EvaluationSettings(validation_rows=64, test_rows=3 * TEST_ROWS, max_new_tokens=16),
    probe_rows=128,
    grace_seconds=10.0,
    round_deadline_seconds=600.0,
)
"""For the project's own domains."""

GIVEN = DemoSettings(
    base_models=BaseModelsRecipe(
        llm=replace(_LLM, vocab_size=3000, steps=500, batch_size=12, learning_rate=2e-3, document_share=0.5),
        proxy=replace(_PROXY, vocab_size=3000, steps=240, batch_size=12, learning_rate=3e-3, document_share=0.5),
        slms=tuple(
            replace(each, vocab_size=size, steps=240, batch_size=12, learning_rate=3e-3, document_share=0.5)
            for each, size in ((_GPT2, 2000), (_QWEN, 1800), (_BLOOM, 2400))
        ),
        max_length=128,
        positions=512,
        prompt_weight=0.3,
        corpus_bytes=3_000_000,
        precision="float32",
        least_vocab_share=0.0,
    ),
    slm=LocalTraining(steps=40, batch_size=12, learning_rate=4e-3, max_length=192),
    slm_lora=FACTS.slm_lora,
    co_plms=FACTS.co_plms.model_copy(
        update={
            "server": FACTS.co_plms.server.model_copy(
                update={"steps": 30, "batch_size": 12, "llm_learning_rate": 3e-4, "max_length": 192}
            )
        }
    ),
    distillation=Distillation(steps=120, batch_size=12, learning_rate=1e-3, max_length=192),
    evaluation=EvaluationSettings(validation_rows=64, test_rows=TEST_ROWS, max_new_tokens=32),
    probe_rows=64,
    grace_seconds=10.0,
    round_deadline_seconds=900.0,
)
"""For a folder of the user's."""


def settings(*, given: bool) -> DemoSettings:
    """`GIVEN` for data that the user gave, else `FACTS`; in the precision that is fast on this machine."""
    chosen = GIVEN if given else FACTS
    precision = fast_precision()
    server = chosen.co_plms.server.model_copy(update={"precision": precision})
    return replace(
        chosen,
        base_models=replace(chosen.base_models, precision=precision),
        slm=chosen.slm.model_copy(update={"precision": precision}),
        co_plms=chosen.co_plms.model_copy(update={"server": server}),
    )


def base_models_recipe(*, given: bool) -> BaseModelsRecipe:
    """How the base models are made."""
    return settings(given=given).base_models


def standalone_run(*, rounds: int, devices: int, given: bool) -> RunCreate:
    """The run in which each device tunes its own model alone."""
    chosen = settings(given=given)
    return RunCreate(
        name="standalone",
        strategy=StandaloneSettings(slm_lora=chosen.slm_lora, training=chosen.slm),
        rounds=rounds,
        evaluation=chosen.evaluation,
        min_updates=devices,
        grace_seconds=chosen.grace_seconds,
        round_deadline_seconds=chosen.round_deadline_seconds,
    )


def co_plms_run(
    *, rounds: int, devices: int, given: bool, llm: Path, proxy: Path, public_data: Path, evaluation_data: Path
) -> RunCreate:
    """The run in which the same models take the same number of steps together."""
    chosen = settings(given=given)
    return RunCreate(
        name="co-plms",
        strategy=chosen.co_plms.model_copy(update={"slm_lora": chosen.slm_lora, "training": chosen.slm}),
        rounds=rounds,
        llm=str(llm),
        public_data=str(public_data),
        evaluation_data=str(evaluation_data),
        probe_rows=chosen.probe_rows,
        proxy=ProxySettings(
            source="pretrained", path=str(proxy), **asdict(chosen.distillation), precision=chosen.base_models.precision
        ),
        evaluation=chosen.evaluation,
        min_updates=devices,
        grace_seconds=chosen.grace_seconds,
        round_deadline_seconds=chosen.round_deadline_seconds,
    )
