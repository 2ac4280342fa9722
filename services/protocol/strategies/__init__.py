"""The settings of each strategy, and what each one lets cross the network, as data.

A strategy's mathematics lives in `cotuning.strategies`; here is only what must be said before it can start. The
discriminator of the settings is `name`. Symbols: theta the adapter that crosses the network, phi_i a device's domain
adapter, psi_i a device's SLM adapter, omega the LLM's adapter.
"""

from protocol.strategies.centralized import CentralizedSettings
from protocol.strategies.co_plms import CoPlmsSettings, Matching, ServerTraining
from protocol.strategies.data_based import DataBasedSettings
from protocol.strategies.feature_based import FeatureBasedSettings
from protocol.strategies.fed_lora import FedLoraSettings
from protocol.strategies.fedcollm import FedCoLlmSettings, MutualDistillation
from protocol.strategies.fedmkt import FedMktSettings
from protocol.strategies.settings import (
    AveragingSettings,
    Batches,
    LocalTraining,
    LoraSettings,
    ServerOptimizerSettings,
    ServerSteps,
    StrategySettings,
)
from protocol.strategies.spec import DownloadKind, MessageKind, PrivateRows, PublicSet, SmallModel, StrategySpec
from protocol.strategies.standalone import StandaloneSettings

# isort: split
# Last: it imports the modules of other distributions' strategies, and these import this package.
from protocol.strategies.registry import STRATEGIES, Strategy, spec_of

__all__ = [
    "STRATEGIES",
    "AveragingSettings",
    "Batches",
    "CentralizedSettings",
    "CoPlmsSettings",
    "DataBasedSettings",
    "DownloadKind",
    "FeatureBasedSettings",
    "FedCoLlmSettings",
    "FedLoraSettings",
    "FedMktSettings",
    "LocalTraining",
    "LoraSettings",
    "Matching",
    "MessageKind",
    "MutualDistillation",
    "PrivateRows",
    "PublicSet",
    "ServerOptimizerSettings",
    "ServerSteps",
    "ServerTraining",
    "SmallModel",
    "StandaloneSettings",
    "Strategy",
    "StrategySettings",
    "StrategySpec",
    "spec_of",
]
